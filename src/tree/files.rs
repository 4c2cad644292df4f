//! Open files, and what becomes of them when their blob is complete.

use super::handles::{Closed, HandleId, OpenFile};
use super::journal::{Record, What};
use super::namespace::Tree;
use super::node::{Node, NodeId};
use super::{Invalidation, Opened, TreeError, Way};
use crate::base::{Digest, lock};

impl Tree {
    /// Opens a file for reading.
    pub fn open(&self, node: NodeId) -> Result<Opened, TreeError> {
        let Node::File { shown, path, .. } = self.0.table.get(node)? else {
            return Err(TreeError::IsDirectory);
        };
        let hold = self
            .0
            .resolver
            .bindings()
            .hold_artifact(shown.digest(), self.0.config.tag_ttl);
        let file = OpenFile::new(shown, &path)?;
        let sealed = if self.0.modes.possible() {
            file.sealed()
        } else {
            None
        };
        if sealed.is_none() && self.0.modes.lost(node) {
            // Its disk has failed, or it was evicted behind our back. The kernel looks the name up anew on this answer, and finds a node
            // whose handles go through us.
            return Err(TreeError::Stale(node.0));
        }
        let direct = self.0.modes.enter(node, sealed.is_some());
        Ok(Opened {
            handle: self.0.handles.add_file(node, file, hold),
            kept: true,
            way: match direct {
                true => Way::Past(sealed),
                false => Way::Through,
            },
        })
    }

    /// The kernel does not take files from us: from now on all reads come here.
    pub fn without_passthrough(&self) {
        self.0.modes.give_up();
    }

    /// Whether the kernel reads sealed blobs without us.
    pub fn has_passthrough(&self) -> bool {
        self.0.modes.possible()
    }

    /// A blob was sealed: names of its files that are open through us lead to a second node from now on, which the kernel
    /// reads itself. What is open stays as it is.
    pub fn promote(&self, blob: Digest) {
        if !self.0.modes.possible() {
            return;
        }
        let shows = |node: &Node| match node {
            Node::File {
                shown,
                path,
                direct: false,
            } => shown
                .file(path)
                .is_some_and(|file| file.digest == Some(blob) && file.is_sealed()),
            _ => false,
        };
        let mut stale = Vec::new();
        for id in self.0.table.matching(shows) {
            if !self.0.modes.is_held(id) {
                continue;
            }
            let Ok(Node::File { shown, path, .. }) = self.0.table.get(id) else {
                continue;
            };
            let (directory, name) = path.rsplit_once('/').unwrap_or(("", &path));
            for place in self.0.resolver.bindings().places(shown.digest()) {
                let parent = self.0.table.id(&place.directory(directory));
                if self.0.table.holds(parent) {
                    let name = name.to_owned();
                    stale.push(Invalidation::Entry { parent, name });
                }
            }
        }
        self.0.debts.tell(stale);
    }

    /// The file that a handle is open on. A handle that is not known is of a tree before this one: then the node tells.
    pub fn file(&self, node: NodeId, handle: HandleId) -> Result<OpenFile, TreeError> {
        if let Some(file) = self.0.handles.file(handle) {
            return Ok(file);
        }
        match self.0.table.get(node)? {
            Node::File { shown, path, .. } => OpenFile::new(shown, &path),
            _ => Err(TreeError::IsDirectory),
        }
    }

    /// The kernel is about to be told of a handle, in answer to the request `unique`: keeps that for the process that may have to
    /// go on from here. `backing` is what the kernel reads in our place, 0 where it does not.
    pub fn opened(&self, handle: HandleId, unique: u64, backing: i32) {
        let Some(journal) = &self.0.config.journal else {
            return;
        };
        let Some((node, what)) = self.0.handles.kept(handle) else {
            return;
        };
        let (handle, node) = (handle.0, node.0);
        journal.write(&match what {
            What::File { .. } => Record::Opened {
                handle,
                node,
                unique,
                backing,
            },
            What::Directory { names } => Record::Listed {
                handle,
                node,
                unique,
                names,
            },
        });
    }

    /// A request to open something comes once more, because it was not answered. A process before this one may have prepared
    /// the answer: the handle of that is nobody's, and is closed. The node that was not opened.
    pub fn reopened(&self, unique: u64) -> Option<NodeId> {
        let handle = lock(&self.0.unanswered).remove(&unique)?;
        self.release(handle)
    }

    /// Closes a file or directory; the node of a file.
    pub fn release(&self, handle: HandleId) -> Option<NodeId> {
        let node = match self.0.handles.close(handle)? {
            Closed::File(node) => {
                self.0.modes.leave(node);
                Some(node)
            }
            Closed::Directory(directory) => {
                self.closed(&directory);
                None
            }
        };
        if let Some(journal) = &self.0.config.journal {
            journal.write(&Record::Closed { handle: handle.0 });
        }
        node
    }

    /// The content of a blob has turned out wrong: the kernel must not serve from its memory what it was given of it.
    pub fn drop_content(&self, blob: Digest) {
        let debt = self.0.debts.next_of_blob(blob);
        let files = self.files_of(&blob).into_iter();
        self.0.debts.pay(debt, files.map(Invalidation::Content));
    }

    /// The news of some blobs that turned out wrong were missed. What is done for them here may be done once more for one whose
    /// bytes go only now, so no debt is settled by it.
    pub(super) fn drop_all_content(&self) {
        for blob in self.0.debts.blobs() {
            let files = self.files_of(&blob).into_iter();
            self.0.debts.pay(None, files.map(Invalidation::Content));
        }
    }

    /// The nodes of files that a blob is in.
    pub(super) fn files_of(&self, blob: &Digest) -> Vec<NodeId> {
        let shows = |node: &Node| match node {
            Node::File { shown, path, .. } => shown
                .file(path)
                .is_some_and(|file| file.digest == Some(*blob)),
            _ => false,
        };
        self.0.table.matching(shows)
    }
}
