//! What the process before this one told the kernel of, and this one cannot have yet: files of artifacts whose manifest is neither in
//! the cache nor, just now, to be had from a registry, and what directories of those list.
//!
//! Whoever has such a file open must not be told that it is gone, because it is not: who asks waits, as who looks a name up does, while
//! the artifacts are asked for again and again ([`super::restore`]). That somebody waits has them asked for at once.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::node::NodeId;
use super::restore::Source;
use super::{Tree, TreeError};
use crate::base::lock;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Absent {
    /// Whether there is anything, for whoever asks at every request.
    any: AtomicBool,
    state: Mutex<State>,
    changed: watch::Sender<()>,
    wanted: Notify,
}

#[derive(Debug, Default)]
struct State {
    nodes: HashMap<NodeId, (What, Source)>,
    /// Why those that were asked for last cannot be had, where asking at once again would not help.
    refused: HashMap<Source, TreeError>,
}

/// What of a node cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A file: anything.
    File,
    /// A directory that is open: what is in it.
    Listing,
}

impl Absent {
    /// Nothing.
    pub(super) fn new() -> Self {
        Self {
            any: AtomicBool::new(false),
            state: Mutex::default(),
            changed: watch::Sender::new(()),
            wanted: Notify::new(),
        }
    }

    /// These nodes are of artifacts that could not be had, some of them for a lasting reason; no others are.
    pub(super) fn are(
        &self,
        nodes: HashMap<NodeId, (What, Source)>,
        refused: HashMap<Source, TreeError>,
    ) {
        self.any.store(!nodes.is_empty(), Ordering::Release);
        *lock(&self.state) = State { nodes, refused };
        self.changed.send_replace(());
    }

    fn has(&self, node: NodeId, listing: bool) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let state = lock(&self.state);
        let what = state.nodes.get(&node).map(|(what, _)| *what);
        what.is_some_and(|what| (what == What::Listing) == listing)
    }

    /// Returns when somebody waits.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Returns when the node is there, or its artifact was refused.
    async fn come(&self, node: NodeId) -> Result<(), TreeError> {
        let mut changed = self.changed.subscribe();
        self.wanted.notify_one();
        loop {
            {
                let state = lock(&self.state);
                let Some((_, source)) = state.nodes.get(&node) else {
                    return Ok(());
                };
                if let Some(error) = state.refused.get(source) {
                    return Err(error.clone());
                }
            }
            // The sender lives as long as this.
            let _ = changed.changed().await;
        }
    }

    fn what(&self, node: NodeId) -> String {
        let state = lock(&self.state);
        let source = state.nodes.get(&node);
        source.map_or_else(String::new, |(_, (repository, digest))| {
            format!("{repository}@{digest}")
        })
    }
}

impl Tree {
    /// Whether the node is of a process before this one and what is asked of it cannot be had yet, so that whoever asks has to wait:
    /// [`Tree::come`]. `listing` says that entries of an open directory are asked for.
    pub fn is_absent(&self, node: NodeId, listing: bool) -> bool {
        self.0.absent.has(node, listing)
    }

    /// Returns when such a node can be had, or will not be.
    ///
    /// # Errors
    /// Why it cannot; [`TreeError::Timeout`] after [`super::TreeConfig::read_patience`] where bytes of it are wanted, else after
    /// [`super::TreeConfig::patience`].
    pub async fn come(&self, node: NodeId, bytes: bool) -> Result<(), TreeError> {
        let patience: Duration = match bytes {
            true => self.0.config.read_patience,
            false => self.0.config.patience,
        };
        let come = self.0.absent.come(node);
        match tokio::time::timeout(patience, come).await {
            Ok(outcome) => outcome,
            Err(_) => Err(TreeError::Timeout {
                what: self.0.absent.what(node),
                source: None,
            }),
        }
    }
}
