//! Which way the kernel reads an open file: through us, or past us from the cache's own file.
//!
//! The kernel takes one way for all who have a node open (`fuse_inode_uncached_io_start` in fs/fuse/iomode.c): an open that is
//! answered the other way fails. So the first open decides, for as long as any handle or mapping of the node lives. A blob
//! that is sealed while its file is open through us gets a second node for the same file, which new lookups lead to. So does one whose
//! cache file can no longer be read while the kernel reads it for older handles: those get the disk's errors, new ones go through us.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::node::{Node, NodeId};
use super::table::NodeTable;
use crate::base::lock;

/// The way of every node that is open.
#[derive(Debug)]
pub(super) struct Modes {
    /// Whether the kernel can be given files at all.
    possible: AtomicBool,
    open: Mutex<HashMap<NodeId, Open>>,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    handles: usize,
    direct: bool,
    /// Past us, to a file that can no longer be read.
    lost: bool,
}

impl Modes {
    pub(super) fn new(possible: bool) -> Self {
        Self {
            possible: AtomicBool::new(possible),
            open: Mutex::default(),
        }
    }

    /// Whether the kernel can be given files.
    pub(super) fn possible(&self) -> bool {
        self.possible.load(Ordering::Relaxed)
    }

    /// From now on everything goes through us.
    pub(super) fn give_up(&self) {
        self.possible.store(false, Ordering::Relaxed);
    }

    /// Counts a handle on a node; whether it goes past us. `sealed` says that it could.
    pub(super) fn enter(&self, node: NodeId, sealed: bool) -> bool {
        let mut all = lock(&self.open);
        let open = all.entry(node).or_insert(Open {
            handles: 0,
            direct: sealed && self.possible(),
            lost: false,
        });
        open.handles += 1;
        open.direct
    }

    /// Counts a handle that another process gave out.
    pub(super) fn adopt(&self, node: NodeId, direct: bool) {
        let mut all = lock(&self.open);
        let open = all.entry(node).or_insert(Open {
            handles: 0,
            direct,
            lost: false,
        });
        open.handles += 1;
    }

    /// Counts a handle less.
    pub(super) fn leave(&self, node: NodeId) {
        let mut all = lock(&self.open);
        if let Some(open) = all.get_mut(&node) {
            open.handles -= 1;
            if open.handles == 0 {
                all.remove(&node);
            }
        }
    }

    /// Whether a node is open through us.
    pub(super) fn is_held(&self, node: NodeId) -> bool {
        lock(&self.open).get(&node).is_some_and(|open| !open.direct)
    }

    /// The file of a node that is opened cannot be read without us; whether its handles go past us, so that none may join them.
    pub(super) fn lost(&self, node: NodeId) -> bool {
        let mut all = lock(&self.open);
        let direct = all.get_mut(&node).filter(|open| open.direct);
        direct.map(|open| open.lost = true).is_some()
    }

    fn is_lost(&self, node: NodeId) -> bool {
        lock(&self.open).get(&node).is_some_and(|open| open.lost)
    }

    /// The node that a lookup of `node` leads to.
    pub(super) fn placed<'a>(&self, table: &NodeTable, node: &'a Node) -> Cow<'a, Node> {
        let Node::File {
            shown,
            path,
            direct: false,
        } = node
        else {
            return Cow::Borrowed(node);
        };
        if !self.possible() {
            return Cow::Borrowed(node);
        }
        let second = Node::File {
            shown: shown.clone(),
            path: path.clone(),
            direct: true,
        };
        let (first_id, second_id) = (table.id(node), table.id(&second));
        if self.is_lost(second_id) {
            return Cow::Borrowed(node);
        }
        // Once the kernel has it, the name stays with it.
        let promoted = table.holds(second_id)
            || self.is_lost(first_id)
            || (self.is_held(first_id) && shown.file(path).is_some_and(|file| file.is_sealed()));
        if promoted {
            Cow::Owned(second)
        } else {
            Cow::Borrowed(node)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_open_decides_until_the_last_is_closed() {
        let modes = Modes::new(true);
        let node = NodeId(7);
        assert!(!modes.enter(node, false));
        assert!(!modes.enter(node, true), "sealed meanwhile");
        assert!(modes.is_held(node));
        modes.leave(node);
        assert!(!modes.enter(node, true));
        modes.leave(node);
        modes.leave(node);
        assert!(!modes.is_held(node));
        assert!(modes.enter(node, true));
        assert!(
            modes.enter(node, false),
            "what is open that way stays that way"
        );
        assert!(!modes.is_held(node));
        modes.give_up();
        assert!(modes.enter(node, true));
        for _ in 0..3 {
            modes.leave(node);
        }
        assert!(!modes.enter(node, true));
        assert!(lock(&modes.open).len() == 1);
    }

    #[test]
    fn a_file_that_is_lost_is_so_until_its_last_handle_is_closed() {
        let modes = Modes::new(true);
        let (past, through) = (NodeId(7), NodeId(8));
        assert!(!modes.lost(past), "nobody has it open");
        assert!(modes.enter(past, true) && !modes.enter(through, false));
        assert!(modes.lost(past) && !modes.lost(through));
        assert!(modes.is_lost(past) && !modes.is_lost(through));
        modes.leave(past);
        assert!(!modes.is_lost(past));
        assert!(!modes.enter(past, false), "begun anew");
    }
}
