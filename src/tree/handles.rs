//! Open files and directories.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::TreeError;
use super::binding::{Binding, Hold};
use super::journal::What;
use super::node::{Node, NodeId};
use super::shown::Shown;
use super::view::DirEntry;
use crate::base::{ByteRange, lock};
use crate::blob::BlobError;
use crate::cache::{self, Data};
use crate::model::{File, FileHold};

/// A handle's number: counted, never used twice by one tree, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// A file that can be read; cheap to clone, and good for as long as it is held, whatever becomes of its name.
#[derive(Clone, Debug)]
pub struct OpenFile {
    shown: Arc<Shown>,
    path: Arc<str>,
    /// Keeps the file's bytes from being evicted while it is open.
    hold: Option<Arc<FileHold>>,
}

impl OpenFile {
    pub(super) fn new(shown: Arc<Shown>, path: &str) -> Result<Self, TreeError> {
        match shown.file(path) {
            Some(file) => {
                let hold = file.hold().map(Arc::new);
                Ok(Self {
                    shown,
                    path: path.into(),
                    hold,
                })
            }
            None => Err(TreeError::not_found(path)),
        }
    }

    /// The cache's file, when the whole of it is the content of this file, it is sealed and its disk works.
    pub(super) fn sealed(&self) -> Option<Arc<cache::Entry>> {
        let hold = self.hold.as_ref().filter(|_| self.file().is_whole_blob());
        hold?.readable()
    }

    fn file(&self) -> &File {
        self.shown
            .file(&self.path)
            .expect("checked when it was made, and a shown model never changes")
    }

    /// `length` bytes from `offset`, cut at the file's end, if they can be had without waiting.
    pub fn try_read(&self, offset: u64, length: u32) -> Option<Result<Data, TreeError>> {
        let range = self.cut(offset, length);
        self.file()
            .try_share(range)
            .map(|result| self.checked(range, result))
    }

    /// `length` bytes from `offset`, cut at the file's end and nowhere else.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Data, TreeError> {
        let range = self.cut(offset, length);
        self.checked(range, self.file().share(range).await)
    }

    fn cut(&self, offset: u64, length: u32) -> ByteRange {
        ByteRange::at(offset, u64::from(length)).intersect(ByteRange::new(0, self.file().size))
    }

    fn checked(
        &self,
        range: ByteRange,
        result: Result<Data, BlobError>,
    ) -> Result<Data, TreeError> {
        match result {
            Ok(data) if data.len() == range.len() => Ok(data),
            Ok(data) => Err(TreeError::Short {
                path: self.path.to_string(),
                wanted: range.len(),
                got: data.len(),
            }),
            Err(source) => Err(TreeError::Read {
                path: self.path.to_string(),
                source,
            }),
        }
    }
}

#[derive(Debug)]
enum Handle {
    File(
        NodeId,
        /// `None` while the artifact of a handle from another process cannot be had.
        Option<OpenFile>,
        #[expect(dead_code, reason = "dropped when the handle is closed")] Hold,
    ),
    Directory(Arc<OpenDirectory>),
}

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDirectory {
    pub(super) id: NodeId,
    pub(super) node: Node,
    /// What decides on its content, below a model.
    pub(super) binding: Option<Arc<Binding>>,
    /// What it lists: made when it is first asked for, because the kernel mostly knows it already.
    pub(super) entries: OnceLock<Arc<[DirEntry]>>,
    #[expect(dead_code, reason = "dropped when the handle is closed")]
    pub(super) hold: Option<Hold>,
}

/// What was closed.
#[derive(Debug)]
pub(super) enum Closed {
    /// A file, by its node.
    File(NodeId),
    /// A directory.
    Directory(Arc<OpenDirectory>),
}

/// All open handles of a tree.
#[derive(Debug)]
pub(super) struct Handles {
    next: AtomicU64,
    open: Mutex<HashMap<HandleId, Handle>>,
}

impl Handles {
    pub(super) fn new() -> Self {
        Self {
            next: AtomicU64::new(1),
            open: Mutex::default(),
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<HandleId, Handle>> {
        lock(&self.open)
    }

    fn add(&self, handle: Handle) -> HandleId {
        let id = HandleId(self.next.fetch_add(1, Ordering::Relaxed));
        self.open().insert(id, handle);
        id
    }

    pub(super) fn add_file(&self, node: NodeId, file: OpenFile, hold: Hold) -> HandleId {
        self.add(Handle::File(node, Some(file), hold))
    }

    pub(super) fn add_directory(&self, directory: OpenDirectory) -> HandleId {
        self.add(Handle::Directory(Arc::new(directory)))
    }

    pub(super) fn file(&self, id: HandleId) -> Option<OpenFile> {
        match self.open().get(&id)? {
            Handle::File(_, file, _) => file.clone(),
            Handle::Directory(_) => None,
        }
    }

    pub(super) fn directory(&self, id: HandleId) -> Option<Arc<OpenDirectory>> {
        match self.open().get(&id)? {
            Handle::Directory(directory) => Some(directory.clone()),
            Handle::File(..) => None,
        }
    }

    /// Has a file that another process opened, or once more when it can be had.
    pub(super) fn adopt_file(
        &self,
        id: HandleId,
        node: NodeId,
        file: Option<OpenFile>,
        hold: Hold,
    ) {
        self.adopt(id, Handle::File(node, file, hold));
    }

    /// Has a directory that another process opened.
    pub(super) fn adopt_directory(&self, id: HandleId, directory: OpenDirectory) {
        self.adopt(id, Handle::Directory(Arc::new(directory)));
    }

    fn adopt(&self, id: HandleId, handle: Handle) {
        self.above(id.0);
        let before = self.open().insert(id, handle);
        drop(before);
    }

    /// Gives out numbers above this one only.
    pub(super) fn above(&self, highest: u64) {
        self.next
            .fetch_max(highest.saturating_add(1), Ordering::Relaxed);
    }

    /// Whether a handle is open.
    pub(super) fn is_open(&self, id: HandleId) -> bool {
        self.open().contains_key(&id)
    }

    /// What a journal keeps of a handle.
    pub(super) fn kept(&self, id: HandleId) -> Option<(NodeId, What)> {
        let directory = match self.open().get(&id)? {
            Handle::File(node, ..) => return Some((*node, What::File { backing: 0 })),
            Handle::Directory(directory) => Arc::clone(directory),
        };
        // Below a model the listing follows from what is bound. `.` and `..` are in all.
        let names = match (&directory.binding, directory.entries.get()) {
            (None, Some(entries)) => {
                let names = entries.iter().skip(2).map(|entry| entry.name.clone());
                Some(names.collect())
            }
            _ => None,
        };
        Some((directory.id, What::Directory { names }))
    }

    /// Closes a handle.
    pub(super) fn close(&self, id: HandleId) -> Option<Closed> {
        // What a handle holds is let go outside the lock.
        let handle = self.open().remove(&id);
        match handle? {
            Handle::File(node, ..) => Some(Closed::File(node)),
            Handle::Directory(directory) => Some(Closed::Directory(directory)),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.open().len()
    }
}
