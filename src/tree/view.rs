//! What the tree hands out.

use std::sync::Arc;
use std::time::Duration;

use super::attr::{Attr, Kind};
use super::handles::HandleId;
use super::node::{Node, NodeId};
use crate::cache;

/// The answer to a lookup. The kernel holds the node from then on, until it is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The node's attributes.
    pub attr: Attr,
    /// For how long the name means this node without asking again.
    pub entry_ttl: Duration,
    /// For how long the attributes hold without asking again.
    pub attr_ttl: Duration,
}

/// One entry of a listing.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// The name.
    pub name: String,
    /// The number that the node has, or will have when it is looked up.
    pub ino: NodeId,
    /// Its kind.
    pub kind: Kind,
    /// The node itself, where nobody has to be asked for it.
    pub(super) node: Option<Node>,
}

/// The answer to an open.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The handle.
    pub handle: HandleId,
    /// Whether the kernel may keep what it reads: it never changes, or the kernel is told when it does.
    pub kept: bool,
    /// All who have the node open are answered the same way.
    pub way: Way,
}

/// How the kernel reads an open file.
#[derive(Clone, Debug)]
pub enum Way {
    /// Through us.
    Through,
    /// Past us, from the cache's file of a sealed blob. `None` when that is gone from the cache: then those who have the node
    /// open read it all the same, and whoever joins them needs nothing else.
    Past(Option<Arc<cache::Entry>>),
}

/// What the kernel must be told to drop from its caches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// A name in a directory means something else now.
    Entry {
        /// The directory.
        parent: NodeId,
        /// The name.
        name: String,
    },
    /// A node's attributes have changed.
    Attributes(NodeId),
    /// What the kernel keeps of a file's content is wrong.
    Content(NodeId),
    /// The kernel has been told of all that came before this: to be given to [`super::Journal::settle`].
    Settled(DebtId),
}

/// Names what the kernel is owed to be told, in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DebtId(pub(super) u64);
