//! Listings: what an open directory shows, decided when it is opened.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use super::binding::{Binding, Bindings};
use super::handles::{HandleId, OpenDirectory};
use super::namespace::{Step, Tree, Want, child_node, last_step};
use super::node::{Node, NodeId};
use super::{DirEntry, Entry, Invalidation, Kind, Opened, TreeError, Way, list};

impl Tree {
    /// Opens a directory if nobody has to be asked for what is in it.
    pub fn try_opendir(&self, id: NodeId) -> Option<Result<Opened, TreeError>> {
        let node = match self.0.table.get(id) {
            Ok(node) => node,
            Err(error) => return Some(Err(error)),
        };
        let opened = match &node {
            Node::Folder(_) => return None,
            Node::Directory { place, .. } => match self.0.resolver.try_bind(&place.reference())? {
                Ok(binding) => self.open_bound(id, node, binding),
                Err(error) => Err(error),
            },
            _ => self.open_listing(id, node, BTreeSet::new()),
        };
        Some(opened)
    }

    /// Opens a directory: what it lists is decided now. A repository's tags are asked for, its manifests are not.
    pub async fn opendir(&self, id: NodeId) -> Result<Opened, TreeError> {
        let node = self.0.table.get(id)?;
        match &node {
            Node::Directory { place, .. } => {
                let binding = self.0.resolver.bind(&place.reference()).await?;
                self.open_bound(id, node, binding)
            }
            Node::Folder(folder) => {
                let Some(repository) = folder.repository() else {
                    return self.open_listing(id, node, BTreeSet::new());
                };
                let patience = self.0.config.tags_patience;
                let tags = self.0.resolver.catalogue().tags(&repository, patience);
                // The catalogue keeps to its time; this is for the case that it does not.
                let tags = tokio::time::timeout(patience * 2, tags)
                    .await
                    .unwrap_or_default();
                let tags = tags.into_iter().map(|tag| format!("@{tag}")).collect();
                self.open_listing(id, node, tags)
            }
            _ => self.open_listing(id, node, BTreeSet::new()),
        }
    }

    /// Opens a directory of a model. What it lists follows from the binding, and the kernel is told when that changes.
    fn open_bound(
        &self,
        id: NodeId,
        node: Node,
        binding: Arc<Binding>,
    ) -> Result<Opened, TreeError> {
        if let Node::Directory { path, .. } = &node
            && !binding.shown.has_directory(path)
        {
            return Err(TreeError::not_found(path));
        }
        let hold = Bindings::hold_one(binding.clone());
        let directory = OpenDirectory {
            id,
            node,
            binding: Some(binding),
            entries: OnceLock::new(),
            hold: Some(hold),
        };
        Ok(Opened {
            handle: self.0.handles.add_directory(directory),
            kept: true,
            way: Way::Through,
        })
    }

    /// Opens a directory above models.
    fn open_listing(
        &self,
        id: NodeId,
        node: Node,
        more: BTreeSet<String>,
    ) -> Result<Opened, TreeError> {
        let entries = self.listing(&node, None, more)?;
        let directory = OpenDirectory {
            id,
            node,
            binding: None,
            entries: OnceLock::from(entries),
            hold: None,
        };
        Ok(Opened {
            handle: self.0.handles.add_directory(directory),
            kept: false,
            way: Way::Through,
        })
    }

    /// A directory is closed. The kernel may have kept what it read by this handle after it was told that something else is shown.
    pub(super) fn closed(&self, directory: &OpenDirectory) {
        let Some(binding) = &directory.binding else {
            return;
        };
        let now = self.0.resolver.bindings().get(&binding.reference);
        let shown = now.is_some_and(|now| Arc::ptr_eq(&now, binding));
        if !shown && directory.entries.get().is_some() {
            let stale = vec![Invalidation::Content(directory.id)];
            self.0.debts.tell(stale);
        }
    }

    /// What an open directory lists, `.` and `..` first, then by name.
    pub fn entries(&self, node: NodeId, handle: HandleId) -> Result<Arc<[DirEntry]>, TreeError> {
        let Some(directory) = self.0.handles.directory(handle) else {
            // A handle of a tree before this one.
            let node = self.0.table.get(node)?;
            let reference = node.model_place().map(|place| place.reference());
            let binding =
                reference.and_then(|reference| self.0.resolver.bindings().get(&reference));
            return self.listing(&node, binding.as_ref(), BTreeSet::new());
        };
        if let Some(entries) = directory.entries.get() {
            return Ok(entries.clone());
        }
        let entries = self.listing(&directory.node, directory.binding.as_ref(), BTreeSet::new())?;
        Ok(directory.entries.get_or_init(|| entries).clone())
    }

    /// The node of a listed entry, as a lookup would answer it; `None` where that would mean asking somebody.
    pub fn lookup_listed(&self, directory: NodeId, entry: &DirEntry) -> Option<Entry> {
        let node = entry.node.as_ref()?;
        let directory = self.0.table.get(directory).ok()?;
        Some(self.remember(&directory, node))
    }

    fn listing(
        &self,
        node: &Node,
        binding: Option<&Arc<Binding>>,
        more: BTreeSet<String>,
    ) -> Result<Arc<[DirEntry]>, TreeError> {
        let mut entries = vec![
            self.dir_entry(".", node),
            self.dir_entry("..", &node.parent()),
        ];
        match node {
            Node::Directory { place, path } => {
                let binding = binding.ok_or_else(|| TreeError::not_found(path))?;
                if !binding.shown.has_directory(path) {
                    return Err(TreeError::not_found(path));
                }
                for (name, child) in binding.shown.list(path) {
                    entries
                        .push(self.dir_entry(name, &child_node(place, path, name, child, binding)));
                }
            }
            Node::Root | Node::Host(_) | Node::Folder(_) => {
                for name in self.names_above_models(node, more) {
                    entries.extend(self.spelled_entry(node, &name));
                }
            }
            Node::File { .. } | Node::Link { .. } => return Err(TreeError::NotDirectory),
        }
        Ok(entries.into())
    }

    /// What a directory above models listed when another process opened it: the same entries at the same places, so that whoever is
    /// in the middle of it goes on there.
    pub(super) fn named(&self, node: &Node, names: &[String]) -> Arc<[DirEntry]> {
        let mut entries = vec![
            self.dir_entry(".", node),
            self.dir_entry("..", &node.parent()),
        ];
        for name in names {
            let entry = self.spelled_entry(node, name);
            // It was there, as a file of `:latest` that cannot be told now.
            entries.push(entry.unwrap_or_else(|| DirEntry {
                name: name.clone(),
                ino: self.0.table.id(node),
                kind: Kind::File,
                node: None,
            }));
        }
        entries.into()
    }

    /// Names in a directory above models: what is known, and what `:latest` has where it is shown already.
    fn names_above_models(&self, node: &Node, mut names: BTreeSet<String>) -> BTreeSet<String> {
        let mut known = self.0.resolver.catalogue().known();
        known.extend(self.0.resolver.bindings().references());
        match node {
            Node::Root => names.extend(list::root(&known)),
            Node::Host(host) => names.extend(list::below(host, None, &known)),
            Node::Folder(folder) => {
                names.extend(list::below(&folder.host, Some(&folder.path), &known));
                if let Some(binding) = self.latest(folder) {
                    names.extend(binding.shown.list("").map(|(name, _)| name.to_owned()));
                }
            }
            _ => {}
        }
        names
    }

    /// The entry that a lookup of `name` would find, as far as that is known without asking.
    fn spelled_entry(&self, parent: &Node, name: &str) -> Option<DirEntry> {
        match self.step(parent, name).ok()? {
            Step::Node(node) => Some(self.dir_entry(name, &node)),
            Step::Model(place, want) => {
                match (self.0.resolver.bindings().get(&place.reference()), want) {
                    (Some(binding), want) => {
                        let node = last_step(&place, want, &binding).ok()?;
                        Some(self.dir_entry(name, &node))
                    }
                    // Listed by name, found when it is looked up.
                    (None, Want::Directory) => {
                        let ino = self.0.table.id(&place.directory(""));
                        Some(DirEntry {
                            name: name.to_owned(),
                            ino,
                            kind: Kind::Directory,
                            node: None,
                        })
                    }
                    (None, Want::Child(..)) => None,
                }
            }
        }
    }

    fn dir_entry(&self, name: &str, node: &Node) -> DirEntry {
        let kind = match node {
            Node::File { .. } => Kind::File,
            Node::Link { .. } => Kind::Link,
            _ => Kind::Directory,
        };
        DirEntry {
            name: name.to_owned(),
            ino: self.0.table.id(&self.0.modes.placed(&self.0.table, node)),
            kind,
            node: Some(node.clone()),
        }
    }
}
