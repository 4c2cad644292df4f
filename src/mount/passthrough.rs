//! Files that the kernel reads without us (`FOPEN_PASSTHROUGH`, Linux 6.9 and later, with CAP_SYS_ADMIN).
//!
//! The tree decides which opens go that way. Here is what the protocol asks for beside: all handles of a node name the same
//! backing id, and it is kept while any of them is open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use crate::base::lock;
use crate::fuse::{Backing, Reply};
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

impl Backings {
    /// The backing file for one more handle on `node`, whose bytes are those of `file`; an error when the kernel refuses,
    /// which it does once for a node and then for good.
    pub(super) fn open(
        &self,
        node: NodeId,
        file: &File,
        reply: &Reply,
    ) -> io::Result<Option<Arc<Backing>>> {
        let mut all = lock(&self.0);
        if let Some(shared) = all.get_mut(&node) {
            shared.handles += 1;
            return Ok(shared.backing.clone());
        }
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
