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
    /// Where the reader for whom a whole stream was begun wants to begin.
    pub(super) from: u64,
    /// Up to where readers of a whole stream have asked for it.
    front: watch::Sender<u64>,
    /// The bytes of a whole stream go to memory, which keeps few of them.
    passing: AtomicBool,
    boosted: AtomicBool,
    boost: Notify,
}

impl Flight {
    pub(super) fn new(range: ByteRange, urgency: Urgency) -> Arc<Self> {
        Self::make(range, urgency, false, range.start())
    }

    /// The stream that brings all `size` bytes of a blob, begun for a reader at `from`.
    pub(super) fn whole(size: u64, urgency: Urgency, from: u64) -> Arc<Self> {
        Self::make(ByteRange::new(0, size), urgency, true, from)
    }

    fn make(range: ByteRange, urgency: Urgency, whole: bool, from: u64) -> Arc<Self> {
        Arc::new(Self {
            range,
            urgency,
            whole,
            from,
            front: watch::Sender::new(from),
            passing: AtomicBool::new(false),
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

    /// A reader of the whole stream wants the bytes before `end`.
    pub(super) fn want(&self, end: u64) {
        self.front.send_if_modified(|front| {
            let moved = end > *front;
            *front = end.max(*front);
            moved
        });
    }

    /// Returns once the readers have come so far that the byte at `at` is at most `ahead` in front of them.
    pub(super) async fn wanted(&self, at: u64, ahead: u64) {
        let mut front = self.front.subscribe();
        // The sender lives as long as `self`.
        let _ = front
            .wait_for(|front| at < front.saturating_add(ahead))
            .await;
    }

    /// From here on its bytes go to memory.
    pub(super) fn pass(&self) {
        self.passing.store(true, Ordering::Release);
    }

    /// Whether the byte at `at` will come, or is kept.
    pub(super) fn brings(&self, at: u64) -> bool {
        !self.passing.load(Ordering::Acquire)
            || (self.from <= at && self.progress.borrow().at <= at)
    }

    /// A view of its progress from now on.
    pub(super) fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }
}
