//! Requests under way, and waiting for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Notify, watch};

use super::BlobError;
use crate::base::ByteRange;

/// Why a request is made, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// A reader waits for it.
    Demand,
    /// A reader will come to it soon.
    Window,
    /// The blob is to be completed.
    Fill,
}

/// How far a request is.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    /// The bytes of its range before this offset are here.
    pub(super) at: u64,
    /// How it ended, once it has.
    pub(super) ended: Option<Result<(), BlobError>>,
}

/// One request under way: bytes of `range` arrive in order.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) range: ByteRange,
    pub(super) urgency: Urgency,
    /// The server ignores ranges: this is the one stream that brings the whole blob.
    pub(super) whole: bool,
    progress: watch::Sender<Progress>,
    boosted: AtomicBool,
    boost: Notify,
}

impl Flight {
    pub(super) fn new(range: ByteRange, urgency: Urgency, whole: bool) -> Arc<Self> {
        Arc::new(Self {
            range,
            urgency,
            whole,
            progress: watch::Sender::new(Progress {
                at: range.start(),
                ended: None,
            }),
            boosted: AtomicBool::new(urgency == Urgency::Demand),
            boost: Notify::new(),
        })
    }

    /// A reader waits for it now, whatever it was begun for.
    pub(super) fn boost(&self) {
        if !self.boosted.swap(true, Ordering::AcqRel) {
            self.boost.notify_one();
        }
    }

    /// Returns once a reader waits for it.
    pub(super) async fn boosted(&self) {
        if !self.boosted.load(Ordering::Acquire) {
            self.boost.notified().await;
        }
    }

    pub(super) fn advance(&self, at: u64) {
        self.progress.send_if_modified(|progress| {
            let moved = at > progress.at;
            progress.at = progress.at.max(at);
            moved
        });
    }

    pub(super) fn end(&self, result: Result<(), BlobError>) {
        self.progress.send_modify(|progress| {
            progress.ended.get_or_insert(result);
        });
    }

    /// A view of its progress from now on.
    pub(super) fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }
}
