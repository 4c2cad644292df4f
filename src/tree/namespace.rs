//! The operations on the tree.

use std::collections::HashMap;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use super::absent::Absent;
use super::binding::{Binding, BoundModel};
use super::debts::Debts;
use super::handles::{HandleId, Handles};
use super::modes::Modes;
use super::names::{self, DOCKER_HUB, DOCKER_LIBRARY, NAME_MAX, Name, RootName};
use super::node::{Folder, Node, NodeId, Place};
use super::resolver::Resolver;
use super::shown::{Child, join};
use super::table::NodeTable;
use super::{
    Attr, Catalogue, Entry, Invalidation, Journal, Kind, Space, TreeConfig, TreeError, attr,
};
use crate::base::Digest;
use crate::registry::Reference;

/// For how long the kernel keeps what cannot change. A day bounds what a wrong answer could do.
const FOREVER: Duration = Duration::from_secs(86_400);

/// For how long the kernel keeps directories that exist by their spelling alone.
const SPELLED: Duration = Duration::from_secs(60);

/// For how long the kernel keeps the attributes of a file that is being fetched: `st_blocks` grows.
const GROWING: Duration = Duration::from_secs(1);

/// The same where nobody in this process fetches it. Another one may.
const RESTING: Duration = Duration::from_secs(60);

/// The same for a file that is all here. Only that it is evicted can change its `st_blocks`.
const COMPLETE: Duration = Duration::from_secs(3600);

/// The tree; clones share it.
///
/// Methods that begin with `try_` and those that are not async never wait for a registry. The async ones need a tokio
/// runtime and end by [`TreeConfig::patience`], reads by the deadline of the blob below.
#[derive(Clone, Debug)]
pub struct Tree(pub(super) Arc<Inner>);

/// What a tree is made of.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) config: TreeConfig,
    pub(super) table: Arc<NodeTable>,
    pub(super) resolver: Resolver,
    pub(super) handles: Handles,
    pub(super) modes: Modes,
    pub(super) debts: Arc<Debts>,
    pub(super) absent: Absent,
    /// Handles of the process before this one, by the request that they were to answer.
    pub(super) unanswered: Mutex<HashMap<u64, HandleId>>,
}

/// What a name in a directory leads to.
pub(super) enum Step {
    /// A node, without asking anybody.
    Node(Node),
    /// The model shown at a place, or something in it.
    Model(Place, Want),
}

/// What is wanted of a model.
pub(super) enum Want {
    /// Its directory.
    Directory,
    /// What has this name in this directory.
    Child(String, String),
}

impl Tree {
    /// A tree over `catalogue`, and what the kernel must be told while it is mounted.
    pub fn new(
        catalogue: Arc<dyn Catalogue>,
        config: TreeConfig,
    ) -> (Self, Receiver<Invalidation>) {
        let journal = || config.journal.clone();
        let (debts, receiver) = Debts::new(journal());
        let debts = Arc::new(debts);
        let table = Arc::new(NodeTable::new(journal()));
        let resolver = Resolver::new(
            catalogue,
            table.clone(),
            Arc::clone(&debts),
            config.tag_ttl,
            config.failure_ttl,
            config.patience,
            journal(),
        );
        let passthrough = config.passthrough;
        let inner = Inner {
            config,
            table,
            resolver,
            handles: Handles::new(),
            modes: Modes::new(passthrough),
            debts,
            absent: Absent::new(),
            unanswered: Mutex::default(),
        };
        (Self(Arc::new(inner)), receiver)
    }

    // Lookups.

    /// Looks a name up if nobody has to be asked for it. An entry counts as one more time that the kernel holds the node.
    pub fn try_lookup(&self, parent: NodeId, name: &str) -> Option<Result<Entry, TreeError>> {
        let (parent, step) = match self.first_step(parent, name) {
            Ok(step) => step,
            Err(error) => return Some(Err(error)),
        };
        match step {
            Step::Node(node) => Some(Ok(self.remember(&parent, &node))),
            Step::Model(place, want) => match self.0.resolver.try_bind(&place.reference())? {
                Ok(binding) => Some(
                    last_step(&place, want, &binding).map(|node| self.remember(&parent, &node)),
                ),
                Err(error) => Some(Err(error)),
            },
        }
    }

    /// Looks a name up.
    pub async fn lookup(&self, parent: NodeId, name: &str) -> Result<Entry, TreeError> {
        let (parent, step) = self.first_step(parent, name)?;
        let node = match step {
            Step::Node(node) => node,
            Step::Model(place, want) => {
                let binding = self.0.resolver.bind(&place.reference()).await?;
                last_step(&place, want, &binding)?
            }
        };
        Ok(self.remember(&parent, &node))
    }

    /// The kernel forgets `count` times that it was told of a node.
    pub fn forget(&self, node: NodeId, count: u64) {
        self.0.table.forget(node, count);
    }

    fn first_step(&self, parent: NodeId, name: &str) -> Result<(Node, Step), TreeError> {
        if name.len() > NAME_MAX {
            return Err(TreeError::NameTooLong);
        }
        let parent = self.0.table.get(parent)?;
        let step = self.step(&parent, name)?;
        Ok((parent, step))
    }

    /// What a name can be, as far as its spelling and what is bound tell.
    pub(super) fn step(&self, parent: &Node, name: &str) -> Result<Step, TreeError> {
        let nothing = || TreeError::not_found(name);
        let here = |node| Ok(Step::Node(node));
        match parent {
            Node::Root => match names::root(name) {
                RootName::Host => here(Node::Host(name.to_owned())),
                RootName::Link(target) => here(parent.link(name, target)),
                RootName::Nothing => Err(nothing()),
            },
            Node::Host(host) => match names::below(name) {
                // `docker.io/gpt2:v1` is `docker.io/library/gpt2:v1`, as everywhere in OCI.
                Name::Tagged(..) | Name::Pinned(..) if host == DOCKER_HUB => {
                    here(parent.link(name, format!("{DOCKER_LIBRARY}/{name}")))
                }
                Name::TaggedPinned(component, digest) if host == DOCKER_HUB => {
                    here(parent.link(name, format!("{DOCKER_LIBRARY}/{component}@{digest}")))
                }
                spelled => spelled_step(parent, host, None, name, spelled),
            },
            Node::Folder(folder) => {
                let latest = || folder.repository().map(Place::Latest).ok_or_else(nothing);
                let in_latest = || {
                    Ok(Step::Model(
                        latest()?,
                        Want::Child(String::new(), name.to_owned()),
                    ))
                };
                match names::below(name) {
                    Name::TagAlias(tag) => {
                        here(parent.link(name, format!("../{}:{tag}", folder.name())))
                    }
                    Name::DigestAlias(digest) => {
                        here(parent.link(name, format!("../{}@{digest}", folder.name())))
                    }
                    Name::FileLike => in_latest(),
                    Name::Component | Name::Other if self.latest_has(folder, name) => in_latest(),
                    spelled => {
                        spelled_step(parent, &folder.host, Some(&folder.path), name, spelled)
                    }
                }
            }
            Node::Directory { place, path } => Ok(Step::Model(
                place.clone(),
                Want::Child(path.clone(), name.to_owned()),
            )),
            Node::File { .. } | Node::Link { .. } => Err(TreeError::NotDirectory),
        }
    }

    /// Whether `:latest` of the repository is shown already and has something of this name.
    fn latest_has(&self, folder: &Folder, name: &str) -> bool {
        self.latest(folder)
            .is_some_and(|binding| binding.shown.child("", name).is_some())
    }

    /// What `:latest` of a repository shows, when it is shown already.
    pub(super) fn latest(&self, folder: &Folder) -> Option<Arc<Binding>> {
        self.0
            .resolver
            .bindings()
            .get(&Place::Latest(folder.repository()?).reference())
    }

    /// Counts one more time that the kernel is told of the node, and makes the answer.
    pub(super) fn remember(&self, parent: &Node, node: &Node) -> Entry {
        let node = &self.0.modes.placed(&self.0.table, node);
        let ino = self.0.table.remember(node);
        Entry {
            attr: self.attr(node, ino),
            entry_ttl: self.entry_ttl(parent, node),
            attr_ttl: self.attr_ttl(node),
        }
    }

    // Attributes.

    /// What stat(2) tells of a node, and for how long that holds.
    pub fn getattr(&self, node: NodeId) -> Result<(Attr, Duration), TreeError> {
        let found = self.0.table.get(node)?;
        Ok((self.attr(&found, node), self.attr_ttl(&found)))
    }

    fn attr(&self, node: &Node, ino: NodeId) -> Attr {
        let mut executable = false;
        let (kind, size, blocks, time) = match node {
            Node::Root | Node::Host(_) | Node::Folder(_) => {
                (Kind::Directory, 0, 0, self.0.config.started)
            }
            Node::Directory { place, .. } => {
                let binding = self.0.resolver.bindings().get(&place.reference());
                let time = binding.map_or(self.0.config.started, |binding| {
                    binding.shown.model().created
                });
                (Kind::Directory, 0, 0, time)
            }
            Node::File { shown, path, .. } => {
                let file = shown.file(path);
                let (size, cached) = file.map_or((0, 0), |file| (file.size, file.cached()));
                let time = file
                    .and_then(|file| file.modified)
                    .unwrap_or(shown.model().created);
                executable = file.is_some_and(|file| file.executable);
                (Kind::File, size, attr::blocks(size, cached), time)
            }
            Node::Link { target, .. } => {
                (Kind::Link, target.len() as u64, 0, self.0.config.started)
            }
        };
        Attr {
            ino,
            kind,
            size,
            blocks,
            executable,
            time,
            uid: self.0.config.uid,
            gid: self.0.config.gid,
            umask: self.0.config.umask,
        }
    }

    /// For how long the kernel may believe that the name still means this node.
    fn entry_ttl(&self, parent: &Node, node: &Node) -> Duration {
        match (parent, node) {
            // A link of a tag's model may be another one when the tag moves; other links follow from their names.
            (_, Node::Link { directory, .. }) if !directory.starts_with("sha256:") => FOREVER,
            (_, Node::Root | Node::Host(_) | Node::Folder(_)) => SPELLED,
            (Node::Directory { place, .. }, _) => self.inside(place),
            (_, Node::Directory { place, .. }) if place.is_immutable() => FOREVER,
            _ => self.of_tag(),
        }
    }

    fn attr_ttl(&self, node: &Node) -> Duration {
        match node {
            Node::Link { .. } => FOREVER,
            Node::Root | Node::Host(_) | Node::Folder(_) => SPELLED,
            Node::Directory { place, .. } => self.inside(place),
            Node::File { shown, path, .. } => match shown.file(path) {
                Some(file) if file.cached() >= file.size => COMPLETE,
                Some(file) if file.is_growing() => GROWING,
                _ => RESTING,
            },
        }
    }

    /// For how long the kernel keeps what a tag means. It must be short against `tag_ttl`, because names that the kernel keeps
    /// are looked up without us seeing it.
    fn of_tag(&self) -> Duration {
        self.0.config.tag_ttl / 10
    }

    /// For how long the kernel keeps what is inside of a model directory. Whoever comes there comes by the directory's own name,
    /// which we see often enough, and of what changes inside the kernel is told. That may cross an answer on its way, so even
    /// then there is an end.
    fn inside(&self, place: &Place) -> Duration {
        if place.is_immutable() {
            FOREVER
        } else {
            self.0.config.tag_ttl
        }
    }

    /// For how long the kernel may believe that there is no such name in the directory; `None` when it should ask each time.
    pub fn missing_ttl(&self, directory: NodeId) -> Option<Duration> {
        match self.0.table.get(directory).ok()? {
            Node::Directory { place, .. } => {
                self.0.resolver.bindings().get(&place.reference())?;
                Some(self.inside(&place))
            }
            _ => None,
        }
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, node: NodeId) -> Result<String, TreeError> {
        match self.0.table.get(node)? {
            Node::Link { target, .. } => Ok(target),
            _ => Err(TreeError::NotLink),
        }
    }

    /// The extended attributes of a node.
    pub fn xattrs(&self, node: NodeId) -> Result<Vec<(&'static str, String)>, TreeError> {
        let node = self.0.table.get(node)?;
        if let Node::File { shown, path, .. } = &node {
            let Some(file) = shown.file(path) else {
                return Ok(Vec::new());
            };
            let mut attributes = attr::of_file(file);
            let direct = self.0.modes.possible() && file.is_sealed();
            let served = if direct { "passthrough" } else { "daemon" };
            attributes.push(("user.ocifs.served", served.to_owned()));
            return Ok(attributes);
        }
        let binding = node
            .model_place()
            .and_then(|place| self.0.resolver.bindings().get(&place.reference()));
        Ok(binding.map_or_else(Vec::new, |binding| {
            vec![
                ("user.oci.digest", binding.shown.digest().to_string()),
                ("user.oci.reference", binding.reference.to_string()),
            ]
        }))
    }

    /// One extended attribute.
    pub fn xattr(&self, node: NodeId, name: &str) -> Result<String, TreeError> {
        // Every `ls -l` asks for labels and access lists. Those need no look at the node.
        if !name.starts_with("user.oci") {
            // A file system without access lists says that it has none, so that nobody asks again (xattr(7), acl(5)).
            let could_be = ["user.", "security.", "trusted."];
            return Err(match could_be.iter().any(|kind| name.starts_with(kind)) {
                true => TreeError::NoAttribute,
                false => TreeError::NoNamespace,
            });
        }
        let found = self
            .xattrs(node)?
            .into_iter()
            .find(|(known, _)| *known == name);
        found.map(|(_, value)| value).ok_or(TreeError::NoAttribute)
    }

    /// The size of the cache, for statfs.
    pub fn space(&self) -> Space {
        (self.0.config.space)()
    }

    // For people.

    /// Asks the registry what a tag points at now and shows that, whatever is open: open files stay what they are.
    pub async fn refresh(&self, reference: &Reference) -> Result<Digest, TreeError> {
        Ok(self.0.resolver.refresh(reference).await?.shown.digest())
    }

    /// What is shown now.
    pub fn bound(&self) -> Vec<BoundModel> {
        self.0.resolver.bindings().summary()
    }

    /// Where is kept what another process needs.
    pub fn journal(&self) -> Option<Arc<Journal>> {
        self.0.config.journal.clone()
    }

    /// The time of directories that are of no artifact.
    pub fn started(&self) -> SystemTime {
        self.0.config.started
    }

    /// How many nodes the kernel holds.
    pub fn nodes(&self) -> usize {
        self.0.table.len()
    }

    /// How many handles are open.
    pub fn open_handles(&self) -> usize {
        self.0.handles.len()
    }
}

/// What a name in a host or repository directory means by its spelling.
fn spelled_step(
    parent: &Node,
    host: &str,
    path: Option<&str>,
    name: &str,
    spelled: Name<'_>,
) -> Result<Step, TreeError> {
    let path = |component: &str| {
        path.map_or_else(
            || component.to_owned(),
            |path| format!("{path}/{component}"),
        )
    };
    let nothing = || TreeError::not_found(name);
    let repository = |component| names::repository(host, &path(component)).ok_or_else(nothing);
    match spelled {
        Name::Tagged(component, tag) => Ok(Step::Model(
            Place::Tagged(repository(component)?, tag),
            Want::Directory,
        )),
        Name::Pinned(component, digest) => Ok(Step::Model(
            Place::Pinned(repository(component)?, digest),
            Want::Directory,
        )),
        Name::TaggedPinned(component, digest) => Ok(Step::Node(
            parent.link(name, format!("{component}@{digest}")),
        )),
        Name::Component => {
            repository(name)?;
            Ok(Step::Node(Node::Folder(Folder {
                host: host.to_owned(),
                path: path(name),
            })))
        }
        Name::TagAlias(_) | Name::DigestAlias(_) | Name::FileLike | Name::Other => Err(nothing()),
    }
}

/// What is wanted of a model, now that it is there.
pub(super) fn last_step(
    place: &Place,
    want: Want,
    binding: &Arc<Binding>,
) -> Result<Node, TreeError> {
    match want {
        Want::Directory => Ok(place.directory("")),
        Want::Child(path, name) => match binding.shown.child(&path, &name) {
            Some(child) => Ok(child_node(place, &path, &name, child, binding)),
            None => Err(TreeError::not_found(name)),
        },
    }
}

pub(super) fn child_node(
    place: &Place,
    path: &str,
    name: &str,
    child: Child,
    binding: &Binding,
) -> Node {
    let path = join(path, name);
    match child {
        Child::Directory => place.directory(&path),
        Child::File(_) => Node::File {
            shown: binding.shown.clone(),
            path,
            direct: false,
        },
        // By the artifact's digest, as a file: what it says never changes.
        Child::Link(link) => Node::Link {
            directory: binding.shown.digest().to_string(),
            name: path,
            target: binding.shown.target(link).to_owned(),
        },
    }
}
