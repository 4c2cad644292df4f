//! Where the bytes of a request go: into the cache, or through memory where that keeps nothing.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;

use super::BlobError;
use super::budget::Reservation;
use super::flight::{Flight, Urgency};
use super::hedge::Feed;
use super::hold::Hold;
use super::lazy::LazyBlob;
use crate::base::rt::{aside, timeout, timeout_at};
use crate::base::{ByteRange, Chain, Instant, lock};
use crate::cache::{CacheError, Claim, Writer};
use crate::registry::RegistryError;

/// What a stream that only passes through memory keeps there. It runs ahead of its readers by half of it.
const RING: u64 = 16 << 20;
/// What a request takes while it runs: the HTTP client's buffer and what is gathered from it.
const IN_FLIGHT: u64 = 768 << 10;
/// A cache that had no room is asked again after this.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Bytes for the cache are gathered until there are so many, or a reader waits for them: each write costs a system call for
/// the data and one for the chunk map, and a slow link gives a few KiB at a time.
const GATHER: u64 = 256 << 10;
/// Bytes that have come in more pieces than these are not handed on as they are: a message to the kernel has no room for so many.
const MOST_PIECES: usize = 64;
/// Such a stream is given up when its readers pause for so long.
const IDLE: Duration = Duration::from_secs(5);
/// Gathered bytes are written after this long: other processes may wait for them, and a kill would lose them.
const LINGER: Duration = Duration::from_millis(10);
/// That the cache has no room for a blob is said again after this.
const SAY_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Whether what a request brings may be kept, and the claim that others respect, for as long as it is.
#[derive(Debug)]
pub(super) struct Keep {
    allowed: bool,
    _claim: Option<Claim>,
}

impl Keep {
    pub(super) fn new(claim: Option<Option<Claim>>) -> Self {
        Self {
            allowed: claim.is_some(),
            _claim: claim.flatten(),
        }
    }

    /// Nothing more is kept, so nobody else need wait for it.
    fn give_up(&mut self) {
        *self = Self::new(None);
    }
}

/// Where the bytes of a request go.
#[derive(Debug)]
pub(super) struct Sink<'a> {
    target: Target,
    keep: &'a mut Keep,
    gathered: Gathered,
    /// The memory that the request takes; given back before more is waited for.
    room: Option<Reservation>,
    end: u64,
}

#[derive(Debug)]
enum Target {
    Cache(Writer),
    Memory { at: u64 },
}

/// Bytes that have come and are not written yet.
#[derive(Debug, Default)]
struct Gathered {
    pieces: Vec<Bytes>,
    len: u64,
    since: Option<Instant>,
}

impl LazyBlob {
    /// Moves what comes into the sink, whose position tells how far it came.
    pub(super) async fn pour(
        &self,
        flight: &Flight,
        feed: &mut Feed<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<Poured, RegistryError> {
        loop {
            if flight.whole && matches!(sink.target, Target::Memory { .. }) {
                flight.pass();
                if !self.write(flight, sink).await {
                    return Ok(Poured::NoRoom);
                }
                let wanted = flight.wanted(sink.position(), self.ring() / 2);
                if timeout(IDLE, wanted).await.is_err() {
                    return Ok(Poured::Idle);
                }
            }
            let next = match sink.gathered.since {
                None => feed.next().await,
                Some(since) => {
                    let until = since + LINGER;
                    match timeout_at(until, feed.next()).await {
                        Ok(next) => next,
                        Err(_) if self.write(flight, sink).await => continue,
                        Err(_) => return Ok(Poured::NoRoom),
                    }
                }
            };
            let bytes = match next {
                Ok(Some(bytes)) => bytes,
                end if self.write(flight, sink).await => return end.map(|_| Poured::All),
                _ => return Ok(Poured::NoRoom),
            };
            sink.gathered.push(bytes);
            let awaited = flight.is_awaited(sink.position());
            if awaited && sink.hand(flight) {
                // Whoever got them passes them on before this goes on.
                yield_now().await;
            }
            let due = awaited || sink.gathered.len >= GATHER;
            if due && !self.write(flight, sink).await {
                return Ok(Poured::NoRoom);
            }
        }
    }

    /// Writes what was gathered to the cache, whole chunks of it, or hands it to memory; so, too, once the cache fails.
    /// `false` when there is no memory for it either.
    async fn write(&self, flight: &Flight, sink: &mut Sink<'_>) -> bool {
        if let Target::Cache(writer) = &mut sink.target {
            let start = writer.position();
            let pieces = sink
                .gathered
                .take(writer.whole(start + sink.gathered.len) - start);
            if pieces.is_empty() {
                return true;
            }
            let len = pieces.iter().map(|piece| piece.len() as u64).sum();
            let Err(error) = beside(len, || writer.push_pieces(&pieces)) else {
                flight.advance(writer.whole(writer.position()));
                return true;
            };
            tracing::debug!(digest = %self.digest, error = %Chain(&error), "the cache takes no more; reading on without it");
            if matches!(error, CacheError::Io { .. }) {
                let entry = Arc::clone(writer.entry());
                self.distrust(&entry, &error);
            }
            sink.gathered.put_back(pieces);
            // The part of a chunk that was written before is not marked, so its readers ask for it again.
            sink.target = Target::Memory { at: start };
            sink.keep.give_up();
            sink.room = None;
            let rest = ByteRange::new(start, sink.end);
            let Some(room) = self.memory(flight, rest).await else {
                return false;
            };
            sink.room = Some(room);
        }
        let Target::Memory { at } = &mut sink.target else {
            return true;
        };
        if sink.gathered.len > 0 {
            let bytes = sink.gathered.concat();
            let start = *at;
            *at += bytes.len() as u64;
            self.remember(flight, start, bytes);
            flight.advance(*at);
        }
        true
    }

    /// Keeps bytes in memory, those that readers of a passing stream have asked for.
    fn remember(&self, flight: &Flight, start: u64, mut bytes: Bytes) {
        if flight.whole && start < flight.from {
            let before = usize::try_from(flight.from - start).unwrap_or(usize::MAX);
            bytes = bytes.split_off(before.min(bytes.len()));
        }
        let start = start.max(flight.from);
        if !bytes.is_empty() {
            lock(&self.state).overlay.push(flight.id, start, bytes);
        }
    }

    /// Bytes that a passing stream keeps in memory.
    fn ring(&self) -> u64 {
        RING.min(self.shared.budget.limit() / 4)
    }

    /// Gets memory for the bytes of `range`, which is the overlay's from then on, and for bringing them.
    async fn memory(&self, flight: &Flight, range: ByteRange) -> Option<Reservation> {
        let kept = if flight.whole {
            self.ring()
        } else {
            range.len()
        };
        let bytes = kept + IN_FLIGHT.min(range.len());
        let mut room = if flight.is_boosted() {
            self.shared.room(bytes, Urgency::Demand).await
        } else {
            // Nobody waits for it yet; where memory is scarce it had better be asked for in small pieces.
            self.shared.try_room(bytes, flight.urgency)?
        };
        let kept = room.split(kept);
        lock(&self.state)
            .overlay
            .begin(flight.id, kept, flight.whole);
        Some(room)
    }

    pub(super) async fn sink<'a>(
        &self,
        flight: &Flight,
        hold: &Hold,
        range: ByteRange,
        keep: &'a mut Keep,
    ) -> Result<Sink<'a>, BlobError> {
        let allowed = keep.allowed;
        let sink = |target, room, keep| Sink {
            target,
            keep,
            gathered: Gathered::default(),
            room: Some(room),
            end: range.end(),
        };
        let entry = hold.entry().filter(|_| allowed && !self.had_no_room());
        if let Some(entry) = entry {
            let bytes = IN_FLIGHT.min(range.len());
            let room = self.room_for(flight, bytes).await;
            match beside(range.len(), || entry.writer(range)) {
                Ok(writer) => return Ok(sink(Target::Cache(writer), room, keep)),
                Err(error) => {
                    tracing::debug!(digest = %self.digest, %range, error = %Chain(&error), "not kept");
                    let mut state = lock(&self.state);
                    if state
                        .no_room
                        .is_none_or(|at| at.elapsed() >= SAY_AGAIN_AFTER)
                    {
                        tracing::info!(digest = %self.digest, error = %Chain(&error), "served without being kept");
                    }
                    state.no_room = Some(Instant::now());
                }
            }
        }
        keep.give_up();
        // What fills the cache is of no use in memory.
        if flight.urgency == Urgency::Fill {
            return Err(self.no_room());
        }
        match self.memory(flight, range).await {
            Some(room) => {
                let at = range.start();
                Ok(sink(Target::Memory { at }, room, keep))
            }
            None => {
                lock(&self.state).prefetcher.cut(range.start());
                Err(self.no_room())
            }
        }
    }

    /// Memory to bring bytes: in the queue of readers from when one of them waits.
    async fn room_for(&self, flight: &Flight, bytes: u64) -> Reservation {
        tokio::select! {
            biased;
            room = self.shared.room(bytes, flight.urgency_now()) => room,
            // Not until then: what a reader waits for would stay in the queue of what is fetched ahead, which may get nothing for long.
            () = flight.boosted(), if !flight.is_boosted() => {
                self.shared.room(bytes, Urgency::Demand).await
            }
        }
    }

    /// Whether the cache had no room for the blob just now.
    pub(super) fn had_no_room(&self) -> bool {
        let last = lock(&self.state).no_room;
        last.is_some_and(|at| at.elapsed() < ASK_AGAIN_AFTER)
    }

    pub(super) fn no_room(&self) -> BlobError {
        BlobError::NoRoom {
            digest: self.digest,
            size: self.size,
        }
    }
}

pub(super) enum Poured {
    /// The body to its end.
    All,
    /// Nobody wanted more of it.
    Idle,
    /// The cache failed, and there is no memory.
    NoRoom,
}

impl Sink<'_> {
    /// Gives what has come and is to be written to those who want nothing else; whether there was one.
    fn hand(&self, flight: &Flight) -> bool {
        match &self.target {
            Target::Cache(writer) if self.gathered.pieces.len() <= MOST_PIECES => {
                flight.hand(writer.position(), &self.gathered.pieces)
            }
            _ => false,
        }
    }

    /// The offset of the next byte to come.
    pub(super) fn position(&self) -> u64 {
        let at = match &self.target {
            Target::Cache(writer) => writer.position(),
            Target::Memory { at } => *at,
        };
        at + self.gathered.len
    }
}

impl Gathered {
    fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.since.get_or_insert_with(Instant::now);
            self.len += bytes.len() as u64;
            self.pieces.push(bytes);
        }
    }

    /// Puts what was taken before the rest again.
    fn put_back(&mut self, mut taken: Vec<Bytes>) {
        self.len += taken.iter().map(|piece| piece.len() as u64).sum::<u64>();
        taken.append(&mut self.pieces);
        self.pieces = taken;
    }

    /// All of it in memory of its own: a small piece of the client's buffer would keep all of that.
    fn concat(&mut self) -> Bytes {
        let all = std::mem::take(self);
        all.pieces.concat().into()
    }

    /// The first `len` bytes of it. What is left begins to linger anew when the next piece comes.
    fn take(&mut self, len: u64) -> Vec<Bytes> {
        let mut taken = Vec::with_capacity(self.pieces.len());
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let mut rest = Vec::new();
        for mut piece in self.pieces.drain(..) {
            let first = piece.split_to(left.min(piece.len()));
            left -= first.len();
            self.len -= first.len() as u64;
            for (part, list) in [(first, &mut taken), (piece, &mut rest)] {
                if !part.is_empty() {
                    list.push(part);
                }
            }
        }
        self.pieces = rest;
        self.since = None;
        taken
    }
}

/// Does what may wait for the disk on behalf of `bytes` bytes. For many, the runtime's other tasks move to another thread meanwhile;
/// for few, that would cost more than it saves.
fn beside<T>(bytes: u64, work: impl FnOnce() -> T) -> T {
    if bytes < GATHER { work() } else { aside(work) }
}

/// Lets whoever was woken go first.
async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
