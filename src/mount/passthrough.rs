//! Files that the kernel reads without us (`FOPEN_PASSTHROUGH`, Linux 6.9 and later, with CAP_SYS_ADMIN).
//!
//! The tree decides which opens go that way. Here is what the protocol asks for beside: all handles of a node name the same
//! backing id, and it is kept while any of them is open.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use crate::base::lock;
use crate::fuse::{Backing, Notifier, Reply};
use crate::tree::NodeId;

/// The backing files in use.
#[derive(Debug, Default)]
pub(super) struct Backings(Mutex<HashMap<NodeId, Shared>>);

#[derive(Debug)]
struct Shared {
    handles: usize,
    /// `None` when the kernel has refused the file: then all of the node's handles go through us.
    backing: Option<Arc<Backing>>,
}

/// How many backing ids around the highest that is known may be of a process that was killed before it wrote them down: more than it
/// has threads.
const LOST: i32 = 64;

impl Backings {
    /// Those of a process before this one: by node, how many handles there are and the backing id. Ids that it was given by the
    /// kernel and did not come to use are given back; `highest` is the highest that was used.
    pub(super) fn adopt(
        notifier: &Notifier,
        known: BTreeMap<NodeId, (usize, i32)>,
        highest: i32,
    ) -> Self {
        let used: Vec<i32> = known.values().map(|(_, id)| *id).collect();
        // The kernel counts them up from 1, and says ENOENT to those that it does not have.
        for id in highest.saturating_sub(LOST).max(1)..=highest.saturating_add(LOST) {
            if !used.contains(&id) {
                drop(notifier.backing(id));
            }
        }
        let shared = known.into_iter().map(|(node, (handles, id))| {
            let backing = Some(Arc::new(notifier.backing(id)));
            (node, Shared { handles, backing })
        });
        Self(Mutex::new(shared.collect()))
    }

    /// The backing file for one more handle on `node`, whose bytes are those of `file`; an error when the kernel refuses,
    /// which it does once for a node and then for good. `None` for `file` where only those can be joined who have the node open.
    pub(super) fn open(
        &self,
        node: NodeId,
        file: Option<&File>,
        reply: &Reply,
    ) -> io::Result<Option<Arc<Backing>>> {
        let mut all = lock(&self.0);
        if let Some(shared) = all.get_mut(&node) {
            shared.handles += 1;
            return Ok(shared.backing.clone());
        }
        let Some(file) = file else {
            return Ok(None);
        };
        let opened = reply.open_backing(file).map(Arc::new);
        let backing = opened.as_ref().ok().cloned();
        let handles = 1;
        all.insert(node, Shared { handles, backing });
        opened.map(Some)
    }

    /// One handle on `node` less.
    pub(super) fn release(&self, node: NodeId) {
        let mut all = lock(&self.0);
        if let Some(shared) = all.get_mut(&node) {
            shared.handles -= 1;
            if shared.handles == 0 {
                all.remove(&node);
            }
        }
    }
}
