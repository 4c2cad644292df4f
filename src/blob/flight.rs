//! Requests under way, and waiting for them.

use std::sync::Arc;

use tokio::sync::{Notify, oneshot, watch};

use super::BlobError;
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::base::{ByteRange, lock};

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

/// How far a request is, and who waits for it.
#[derive(Debug)]
struct Progress {
    /// The bytes of its range before this offset are here.
    at: u64,
    /// How it ended, once it has.
    ended: Option<Result<(), BlobError>>,
    /// Each with the offset before which it needs all bytes.
    waiters: Vec<(u64, oneshot::Sender<()>)>,
}

/// The offset that nobody waits for.
const NOBODY: u64 = u64::MAX;

/// One request under way: bytes of `range` arrive in order.
#[derive(Debug)]
pub(super) struct Flight {
    /// No other has it.
    pub(super) id: u64,
    pub(super) range: ByteRange,
    pub(super) urgency: Urgency,
    /// The server ignores ranges: this is the one stream that brings the whole blob.
    pub(super) whole: bool,
    progress: Mutex<Progress>,
    /// The lowest offset of the waiters; [`NOBODY`] when there is none.
    awaited: AtomicU64,
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
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            range,
            urgency,
            whole,
            from,
            front: watch::Sender::new(from),
            passing: AtomicBool::new(false),
            progress: Mutex::new(Progress {
                at: range.start(),
                ended: None,
                waiters: Vec::new(),
            }),
            awaited: AtomicU64::new(NOBODY),
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

    /// Whether a reader waits for it, or has.
    pub(super) fn is_boosted(&self) -> bool {
        self.boosted.load(Ordering::Acquire)
    }

    /// How urgent it is by now.
    pub(super) fn urgency_now(&self) -> Urgency {
        if self.is_boosted() {
            Urgency::Demand
        } else {
            self.urgency
        }
    }

    /// Returns once a reader waits for it.
    pub(super) async fn boosted(&self) {
        if !self.is_boosted() {
            self.boost.notified().await;
        }
    }

    /// The bytes before `at` are here; wakes those who waited for no more.
    pub(super) fn advance(&self, at: u64) {
        let mut progress = lock(&self.progress);
        if at <= progress.at {
            return;
        }
        progress.at = at;
        let reached = progress.waiters.extract_if(.., |(until, _)| *until <= at);
        let reached: Vec<_> = reached.collect();
        self.note_awaited(&progress);
        drop(progress);
        for (_, waiter) in reached {
            let _ = waiter.send(());
        }
    }

    /// The first result counts; wakes everybody.
    pub(super) fn end(&self, result: Result<(), BlobError>) {
        let mut progress = lock(&self.progress);
        progress.ended.get_or_insert(result);
        let all = std::mem::take(&mut progress.waiters);
        self.note_awaited(&progress);
        drop(progress);
        for (_, waiter) in all {
            let _ = waiter.send(());
        }
    }

    /// Up to where its bytes are here, and how it ended, once it has.
    pub(super) fn progress(&self) -> (u64, Option<Result<(), BlobError>>) {
        let progress = lock(&self.progress);
        (progress.at, progress.ended.clone())
    }

    /// Returns once the bytes before `until` are here, or it has ended; with [`u64::MAX`] only then.
    pub(super) async fn arrival(&self, until: u64) {
        let arrival = {
            let mut progress = lock(&self.progress);
            if progress.ended.is_some() || progress.at >= until {
                return;
            }
            let (waiter, arrival) = oneshot::channel();
            // Those who gave up waiting are not to have the bytes hurried.
            progress.waiters.retain(|(_, waiter)| !waiter.is_closed());
            progress.waiters.push((until, waiter));
            self.note_awaited(&progress);
            arrival
        };
        let _ = arrival.await;
    }

    fn note_awaited(&self, progress: &Progress) {
        let lowest = progress.waiters.iter().map(|(until, _)| *until).min();
        self.awaited
            .store(lowest.unwrap_or(NOBODY), Ordering::Release);
    }

    /// Whether somebody waits for no more than the bytes before `at`.
    pub(super) fn is_awaited(&self, at: u64) -> bool {
        let lowest = self.awaited.load(Ordering::Acquire);
        lowest != NOBODY && lowest <= at
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
        !self.passing.load(Ordering::Acquire) || (self.from <= at && lock(&self.progress).at <= at)
    }
}
