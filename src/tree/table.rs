//! The table of nodes that the kernel holds.
//!
//! # Invariants
//! - A node's number is a function of its key, so the same path has the same number in every process: the first eight
//!   bytes of the key's SHA-256. 0 means "none" to FUSE and 1 is the root, so neither is given to anything else. Where
//!   two live keys meet, the later one is hashed again with a counter, and that is remembered while it lives.
//! - A node lives here from the first [`NodeTable::remember`] until the kernel has forgotten it as often as it was
//!   told of it. After that nothing is lost: everything in it follows from its key and the registry.
//!
//! # Over a restart
//! Another process must answer for the numbers that this one gave out, and drop them when the kernel has forgotten them as often as
//! both have told it. So each telling is in the journal before [`NodeTable::remember`] returns, because its result is sent to the
//! kernel, and each forgetting after it was done. What a kill leaves is a count that is too high, never one that is too low: of a
//! lookup that was counted and not answered (it comes again and counts twice), of a forgetting that was read and not written. Such
//! a node stays here until the end of the session, at the price of its name.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};

use super::TreeError;
use super::journal::{Journal, Record};
use super::node::{Node, NodeId};
use crate::base::{Digest, lock};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct NodeTable {
    derive: fn(&str, u32) -> u64,
    journal: Option<Arc<Journal>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    nodes: HashMap<NodeId, Slot>,
    /// Live keys that could not have the first number derived from them.
    displaced: HashMap<String, NodeId>,
}

#[derive(Debug)]
struct Slot {
    node: Node,
    /// How often the kernel was told of the node and has not forgotten it.
    lookups: u64,
}

/// Candidate number `attempt` for a key.
fn derive(key: &str, attempt: u32) -> u64 {
    let digest = match attempt {
        0 => Digest::of(key.as_bytes()),
        // A zero byte is in no key, so no key can be made to look like another one's second attempt.
        _ => Digest::of(format!("{key}\0{attempt}").as_bytes()),
    };
    let [a, b, c, d, e, f, g, h, ..] = *digest.as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

impl NodeTable {
    /// A table with nothing but the root. What happens in it is written to `journal`.
    pub(super) fn new(journal: Option<Arc<Journal>>) -> Self {
        Self::with(derive, journal)
    }

    fn with(derive: fn(&str, u32) -> u64, journal: Option<Arc<Journal>>) -> Self {
        Self {
            derive,
            journal,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Counts one more time that the kernel is told of `node`; its number.
    pub(super) fn remember(&self, node: &Node) -> NodeId {
        if matches!(node, Node::Root) {
            return NodeId::ROOT;
        }
        let key = node.key();
        let mut state = self.state();
        let (id, attempt) = self.place(&state, &key);
        match state.nodes.entry(id) {
            Entry::Occupied(mut slot) => {
                slot.get_mut().lookups += 1;
                self.write(|| Some(Record::Again { id: id.0 }));
            }
            Entry::Vacant(slot) => {
                let (id, count) = (id.0, 1);
                self.write(|| {
                    Some(Record::Told {
                        id,
                        count,
                        node: node.kept()?,
                    })
                });
                slot.insert(Slot {
                    node: node.clone(),
                    lookups: 1,
                });
                if attempt > 0 {
                    state.displaced.insert(key, NodeId(id));
                }
            }
        }
        id
    }

    /// Under the lock, so that records of a node are in the order of what happened to it.
    fn write(&self, record: impl FnOnce() -> Option<Record>) {
        if let Some(journal) = &self.journal
            && let Some(record) = record()
        {
            journal.write(&record);
        }
    }

    /// Has a node that another process told the kernel of `lookups` times, under the number that it gave.
    pub(super) fn adopt(&self, id: NodeId, node: Node, lookups: u64) {
        let key = node.key();
        let mut state = self.state();
        if id.0 != (self.derive)(&key, 0) {
            state.displaced.insert(key, id);
        }
        // The kernel may have been told of it by this process too, while it could not be had.
        let slot = state.nodes.entry(id);
        slot.or_insert(Slot { node, lookups: 0 }).lookups += lookups;
    }

    /// The number that the node has or would get.
    pub(super) fn id(&self, node: &Node) -> NodeId {
        match node {
            Node::Root => NodeId::ROOT,
            _ => self.place(&self.state(), &node.key()).0,
        }
    }

    /// The number for a key, and how many candidates were taken by others.
    fn place(&self, state: &State, key: &str) -> (NodeId, u32) {
        if let Some(id) = state.displaced.get(key) {
            return (*id, 1);
        }
        let mut attempt = 0;
        loop {
            let id = NodeId((self.derive)(key, attempt));
            if id.0 > NodeId::ROOT.0
                && state
                    .nodes
                    .get(&id)
                    .is_none_or(|slot| slot.node.key() == key)
            {
                return (id, attempt);
            }
            attempt += 1;
        }
    }

    /// The node with this number.
    pub(super) fn get(&self, id: NodeId) -> Result<Node, TreeError> {
        if id == NodeId::ROOT {
            return Ok(Node::Root);
        }
        self.state()
            .nodes
            .get(&id)
            .map(|slot| slot.node.clone())
            .ok_or(TreeError::Stale(id.0))
    }

    /// Whether the kernel holds this node.
    pub(super) fn holds(&self, id: NodeId) -> bool {
        id == NodeId::ROOT || self.state().nodes.contains_key(&id)
    }

    /// The numbers of the nodes that the kernel holds and `wanted` picks.
    pub(super) fn matching(&self, wanted: impl Fn(&Node) -> bool) -> Vec<NodeId> {
        let state = self.state();
        let picked = state.nodes.iter().filter(|(_, slot)| wanted(&slot.node));
        picked.map(|(id, _)| *id).collect()
    }

    /// The kernel forgets `count` times that it was told of the node.
    pub(super) fn forget(&self, id: NodeId, count: u64) {
        let mut state = self.state();
        let Entry::Occupied(mut slot) = state.nodes.entry(id) else {
            return;
        };
        let left = slot.get().lookups.saturating_sub(count);
        self.write(|| Some(Record::Forgot { id: id.0, count }));
        if left > 0 {
            slot.get_mut().lookups = left;
            return;
        }
        let slot = slot.remove();
        if !state.displaced.is_empty() {
            state.displaced.remove(&slot.node.key());
        }
    }

    /// How many nodes the kernel holds, the root not counted.
    pub(super) fn len(&self) -> usize {
        self.state().nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> Node {
        Node::Host(name.to_owned())
    }

    #[test]
    fn numbers_follow_from_names_alone() {
        let (one, two) = (NodeTable::new(None), NodeTable::new(None));
        two.remember(&host("first.example"));
        assert_eq!(
            one.remember(&host("r.example")),
            two.remember(&host("r.example"))
        );
        // Pinned: a daemon of another version must derive the same.
        assert_eq!(
            derive("/r.example", 0),
            u64::from_be_bytes(
                Digest::of(b"/r.example").as_bytes()[..8]
                    .try_into()
                    .unwrap()
            )
        );
        assert_eq!(one.remember(&Node::Root), NodeId::ROOT);
    }

    #[test]
    fn a_node_lives_until_it_was_forgotten_as_often_as_told() {
        let table = NodeTable::new(None);
        let id = table.remember(&host("r.example"));
        table.remember(&host("r.example"));
        table.forget(id, 1);
        assert!(table.get(id).is_ok());
        table.forget(id, 1);
        assert!(matches!(table.get(id), Err(TreeError::Stale(_))));
        table.forget(id, 7);
        assert_eq!(table.len(), 0);
        table.forget(NodeId::ROOT, 1);
        assert!(table.get(NodeId::ROOT).is_ok());
    }

    #[test]
    fn colliding_keys_get_numbers_of_their_own_and_keep_them() {
        // Everything collides, and the first candidates are numbers that FUSE reserves.
        let table = NodeTable::with(|_, attempt| u64::from(attempt), None);
        let a = table.remember(&host("a.example"));
        let b = table.remember(&host("b.example"));
        let c = table.remember(&host("c.example"));
        assert_eq!((a.0, b.0, c.0), (2, 3, 4));
        table.forget(a, 1);
        assert_eq!(
            table.remember(&host("c.example")),
            c,
            "a number must not change while it is held"
        );
        assert_eq!(table.id(&host("b.example")), b);
        table.forget(b, 1);
        table.forget(c, 2);
        assert_eq!(table.len(), 0);
        assert!(table.state().displaced.is_empty());
    }

    #[test]
    fn a_node_keeps_its_number_over_a_restart_displaced_or_not() {
        let derive = |_: &str, attempt| 7 + u64::from(attempt);
        let first = NodeTable::with(derive, None);
        let (a, b) = (first.remember(&host("a")), first.remember(&host("b")));
        let second = NodeTable::with(derive, None);
        second.adopt(b, host("b"), 2);
        assert_eq!(second.remember(&host("b")), b);
        second.adopt(a, host("a"), 1);
        assert_eq!((second.id(&host("a")), second.id(&host("b"))), (a, b));
        second.forget(b, 3);
        second.forget(a, 1);
        assert_eq!(second.len(), 0);
        assert!(second.state().displaced.is_empty());
    }
}
