//! Requests under way, and waiting for them.

use std::sync::Arc;

use bytes::Bytes;
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
    waiters: Vec<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    /// The offset before which it needs all bytes.
    until: u64,
    /// What it wants of them, while nothing of that has been written: then it takes them as they come.
    wants: Option<ByteRange>,
    wake: oneshot::Sender<Option<Vec<Bytes>>>,
}

impl Waiter {
    /// From what offset on it has a use for what has come.
    fn served_at(&self) -> u64 {
        self.wants.map_or(self.until, ByteRange::end)
    }
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
        for waiter in &mut progress.waiters {
            waiter.wants.take_if(|wants| wants.start() < at);
        }
        let reached = progress.waiters.extract_if(.., |waiter| waiter.until <= at);
        let reached: Vec<_> = reached.collect();
        self.note_awaited(&progress);
        drop(progress);
        for waiter in reached {
            let _ = waiter.wake.send(None);
        }
    }

    /// The bytes from `at` on that have come and are not here yet: gives them to those who want no others. Whether there was one.
    pub(super) fn hand(&self, at: u64, pieces: &[Bytes]) -> bool {
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        let come = ByteRange::at(at, len);
        let mut progress = lock(&self.progress);
        let served = |waiter: &mut Waiter| waiter.wants.is_some_and(|wants| come.contains(wants));
        let served: Vec<_> = progress.waiters.extract_if(.., served).collect();
        if served.is_empty() {
            return false;
        }
        self.note_awaited(&progress);
        drop(progress);
        for Waiter { wants, wake, .. } in served {
            let _ = wake.send(wants.map(|wants| cut(at, pieces, wants)));
        }
        true
    }

    /// The first result counts; wakes everybody.
    pub(super) fn end(&self, result: Result<(), BlobError>) {
        let mut progress = lock(&self.progress);
        progress.ended.get_or_insert(result);
        let all = std::mem::take(&mut progress.waiters);
        self.note_awaited(&progress);
        drop(progress);
        for waiter in all {
            let _ = waiter.wake.send(None);
        }
    }

    /// Up to where its bytes are here, and how it ended, once it has.
    pub(super) fn progress(&self) -> (u64, Option<Result<(), BlobError>>) {
        let progress = lock(&self.progress);
        (progress.at, progress.ended.clone())
    }

    /// Returns once the bytes before `until` are here, or it has ended; with [`u64::MAX`] only then. The bytes of `wants`, which lie
    /// before `until`, may come sooner, in pieces.
    pub(super) async fn arrival(&self, until: u64, wants: Option<ByteRange>) -> Option<Vec<Bytes>> {
        let arrival = {
            let mut progress = lock(&self.progress);
            if progress.ended.is_some() || progress.at >= until {
                return None;
            }
            let (wake, arrival) = oneshot::channel();
            // Those who gave up waiting are not to have the bytes hurried.
            progress.waiters.retain(|waiter| !waiter.wake.is_closed());
            let at = progress.at;
            progress.waiters.push(Waiter {
                until,
                wants: wants.filter(|wants| wants.start() >= at),
                wake,
            });
            self.note_awaited(&progress);
            arrival
        };
        arrival.await.ok().flatten()
    }

    fn note_awaited(&self, progress: &Progress) {
        let lowest = progress.waiters.iter().map(Waiter::served_at).min();
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

/// What of `pieces`, which begin at `at`, is in `range`. It must lie within them.
fn cut(at: u64, pieces: &[Bytes], range: ByteRange) -> Vec<Bytes> {
    let mut from = at;
    let cut = pieces.iter().filter_map(|piece| {
        let whole = ByteRange::at(from, piece.len() as u64);
        from = whole.end();
        let part = whole.intersect(range);
        (!part.is_empty()).then(|| {
            let start = (part.start() - whole.start()) as usize;
            piece.slice(start..start + part.len() as usize)
        })
    });
    cut.collect()
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn pieces(flight: &Flight) -> Vec<Bytes> {
        let range = flight.range;
        let bytes: Vec<u8> = (range.start()..range.end()).map(|at| at as u8).collect();
        bytes.chunks(7).map(Bytes::copy_from_slice).collect()
    }

    fn joined(pieces: &[Bytes]) -> Vec<u8> {
        pieces.concat()
    }

    #[test]
    fn bytes_are_handed_to_those_who_want_no_others_before_they_are_here() {
        let flight = Flight::new(ByteRange::new(100, 150), Urgency::Demand);
        let wait = |until, wants: Option<(u64, u64)>| {
            let wants = wants.map(|(start, end)| ByteRange::new(start, end));
            let mut arrival = Box::pin(flight.arrival(until, wants));
            assert!(arrival.as_mut().now_or_never().is_none());
            arrival
        };
        let some = wait(150, Some((106, 130)));
        let all = wait(150, Some((100, 150)));
        let mut more = wait(150, Some((120, 151)));
        let mut none = wait(150, None);
        assert!(!flight.is_awaited(129));
        assert!(
            flight.is_awaited(130),
            "it need not wait for the rest of a chunk"
        );
        let came = pieces(&flight);
        assert!(flight.hand(100, &came));
        let wanted = |range: std::ops::Range<u8>| Some(range.collect::<Vec<u8>>());
        let got = |pieces: Option<Option<Vec<Bytes>>>| pieces.unwrap().map(|all| joined(&all));
        assert_eq!(got(some.now_or_never()), wanted(106..130));
        assert_eq!(got(all.now_or_never()), wanted(100..150));
        assert!(more.as_mut().now_or_never().is_none());
        assert!(none.as_mut().now_or_never().is_none());
        assert!(!flight.hand(100, &came));
        flight.advance(150);
        assert_eq!(more.now_or_never(), Some(None));
        assert_eq!(none.now_or_never(), Some(None));
    }

    #[test]
    fn who_comes_when_some_of_it_is_written_waits_for_the_rest_to_be() {
        let flight = Flight::new(ByteRange::new(0, 50), Urgency::Demand);
        let range = ByteRange::new(8, 20);
        let mut before = Box::pin(flight.arrival(50, Some(range)));
        assert!(before.as_mut().now_or_never().is_none());
        flight.advance(10);
        let mut behind = Box::pin(flight.arrival(50, Some(range)));
        assert!(behind.as_mut().now_or_never().is_none());
        let came = pieces(&flight).split_off(2);
        assert!(!flight.hand(14, &came));
        assert!(!flight.is_awaited(49));
        flight.advance(50);
        assert_eq!(before.now_or_never(), Some(None));
        assert_eq!(behind.now_or_never(), Some(None));
    }
}
