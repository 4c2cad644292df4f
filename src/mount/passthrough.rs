//! Files that the kernel reads without us (`FOPEN_PASSTHROUGH`, Linux 6.9 and later, with CAP_SYS_ADMIN).
//!
//! The tree decides which opens go that way. Here is what the protocol asks for beside: all handles of a node name the same
//! backing id, and it is kept while any of them is open.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};

use fuser::{BackingId, ReplyOpen};

use crate::base::lock;
use crate::tree::NodeId;

/// The backing ids in use.
#[derive(Debug, Default)]
pub(super) struct Backings(Mutex<HashMap<NodeId, Backing>>);

#[derive(Debug)]
struct Backing {
    handles: usize,
    /// `None` when the kernel has refused the file: then all of the node's handles go through us.
    id: Option<Arc<BackingId>>,
}

impl Backings {
    /// The backing id for one more handle on `node`, whose bytes are those of `file`; an error when the kernel refuses, which
    /// it does once for a node and then for good.
    pub(super) fn open(
        &self,
        node: NodeId,
        file: &File,
        reply: &ReplyOpen,
    ) -> Result<Option<Arc<BackingId>>, std::io::Error> {
        let mut all = lock(&self.0);
        if let Some(backing) = all.get_mut(&node) {
            backing.handles += 1;
            return Ok(backing.id.clone());
        }
        let id = reply.open_backing(file.as_fd()).map(Arc::new);
        let (id, result) = match id {
            Ok(id) => (Some(Arc::clone(&id)), Ok(Some(id))),
            Err(error) => (None, Err(error)),
        };
        all.insert(node, Backing { handles: 1, id });
        result
    }

    /// One handle on `node` less.
    pub(super) fn release(&self, node: NodeId) {
        let mut all = lock(&self.0);
        if let Some(backing) = all.get_mut(&node) {
            backing.handles -= 1;
            if backing.handles == 0 {
                all.remove(&node);
            }
        }
    }
}
