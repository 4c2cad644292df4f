//! One lazy blob, and a read of it from top to bottom.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use super::budget::Reservation;
use super::complete::ROUNDS;
use super::flight::{Flight, Urgency};
use super::memory::Held;
use super::overlay::Overlay;
use super::plan;
use super::prefetch::{Advice, Prefetcher, Reach};
use super::verify::Hashing;
use super::{BlobError, Event, Prefetch, Shared, Verified};
use crate::base::rt::timeout_at;
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::base::{Begun, ByteRange, Chain, Deadline, Digest, Instant, lock};
use crate::cache::{Cache, CacheError, Data, Entry, Identity};
use crate::registry::{Repository, Source};

/// A cache that could not open the blob is asked again after this.
const OPEN_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// A cache that had no room is not filled for this long; what is fetched ahead of readers goes to memory.
const PREFETCH_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What a closed blob has in the cache is believed for so long: only another process can add to it.
const COUNT_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// Whole streams of one blob at a time, where the server ignores ranges and the cache has no room: a reader each.
const STREAMS: usize = 3;
/// Most servers of a blob that are remembered.
const MOST_SOURCES: usize = 16;
/// A reader who wants no more than this gets it before it is written to the cache. More would be given to the kernel while it is still
/// gathered.
const HANDED: u64 = 128 << 10;
/// A request that somebody else began may fail for his reasons; a reader that joined it tries this often himself.
const OWN_TRIES: u32 = 2;

/// How bytes that are there are taken from the cache: [`Entry::read`] or [`Entry::share`].
type Take<T> = fn(&Entry, ByteRange) -> Result<Option<T>, CacheError>;

/// One lazy blob: some of its bytes are here, the rest come when they are read.
#[derive(Debug)]
pub struct LazyBlob {
    pub(super) shared: Arc<Shared>,
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) repositories: Mutex<Vec<Repository>>,
    slot: Mutex<Slot>,
    pub(super) state: Mutex<State>,
    pub(super) verified: watch::Sender<Verified>,
    pub(super) hashing: Hashing,
    /// All of it is wanted, so hashing what has arrived is not in vain.
    pub(super) filling: AtomicBool,
    /// A sealed file of another length was looked into.
    examined: AtomicBool,
    /// Bytes that the registry sent for it.
    pub(super) received: AtomicU64,
    /// Who sent them, since it was last found wrong.
    sources: Mutex<Vec<Arc<Source>>>,
    /// It was wrong once, and is fetched again.
    pub(super) doubted: AtomicBool,
}

/// The cache entry, open while somebody holds the blob.
#[derive(Debug, Default)]
struct Slot {
    entry: Option<Arc<Entry>>,
    holds: usize,
    /// Counts the openings: what was found out about an earlier one's bytes says nothing of this one's.
    opening: u64,
    /// The file that readers were given bytes from, until those are known to be wrong and dropped everywhere.
    given: Option<Identity>,
    /// What was in the cache of it when somebody looked, while it was closed.
    counted: Option<(Instant, u64)>,
    /// When opening failed last.
    failed: Option<Instant>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) flights: Vec<Arc<Flight>>,
    pub(super) overlay: Overlay,
    /// The server sent the whole blob for a range.
    pub(super) no_ranges: bool,
    /// When the cache had no room for it last.
    pub(super) no_room: Option<Instant>,
    pub(super) prefetcher: Prefetcher,
}

impl LazyBlob {
    pub(super) fn new(shared: Arc<Shared>, digest: Digest, size: u64) -> Arc<Self> {
        Arc::new(Self {
            shared,
            digest,
            size,
            repositories: Mutex::default(),
            slot: Mutex::default(),
            state: Mutex::default(),
            verified: watch::Sender::new(decided(digest, size)),
            hashing: Hashing::default(),
            filling: AtomicBool::new(false),
            examined: AtomicBool::new(false),
            received: AtomicU64::new(0),
            sources: Mutex::default(),
            doubted: AtomicBool::new(false),
        })
    }

    pub(super) fn add_repository(&self, repository: &Repository) {
        let mut known = lock(&self.repositories);
        if !known.contains(repository) {
            known.push(repository.clone());
        }
    }

    /// Where the blob can be fetched from, the first known first.
    pub fn repositories(&self) -> Vec<Repository> {
        lock(&self.repositories).clone()
    }

    /// Its digest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Its size in bytes, as its descriptor tells.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that the registry has sent for it, in this process.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Takes note of who sends it.
    pub(super) fn comes_from(&self, source: &Arc<Source>) {
        let mut sources = lock(&self.sources);
        if sources.len() < MOST_SOURCES && !sources.contains(source) {
            sources.push(Arc::clone(source));
        }
    }

    /// Who has sent it since this was last asked.
    pub(super) fn take_sources(&self) -> Vec<Arc<Source>> {
        std::mem::take(&mut lock(&self.sources))
    }

    /// Takes note that bytes of it came.
    pub(super) fn came(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.shared.received.add(bytes);
        self.shared.link.came(bytes);
    }

    /// From how long on a request for so many bytes of it is slow.
    pub(super) fn slow(&self, bytes: u64) -> Duration {
        let first = lock(&self.repositories).first().cloned();
        first.map_or(Duration::MAX, |repository| {
            self.shared.registry.slow(&repository, &self.digest, bytes)
        })
    }

    /// Bytes that are in the cache.
    pub fn cached(self: &Arc<Self>) -> u64 {
        self.cached_in(ByteRange::new(0, self.size))
    }

    /// Bytes of `range` that are in the cache.
    pub fn cached_in(self: &Arc<Self>, range: ByteRange) -> u64 {
        let range = range.intersect(ByteRange::new(0, self.size));
        let mut slot = lock(&self.slot);
        if let Some(entry) = slot.entry.clone() {
            drop(slot);
            return entry.present(range);
        }
        let recent = slot
            .counted
            .filter(|(at, _)| at.elapsed() < COUNT_AGAIN_AFTER);
        let counted = recent.map_or_else(
            || self.shared.cache.present(&self.digest, self.size),
            |(_, count)| count,
        );
        slot.counted = recent.or(Some((Instant::now(), counted)));
        drop(slot);
        match counted {
            0 => 0,
            all if all >= self.size => range.len(),
            some if self.size == range.len() => some,
            // Which of them lie in the range shows only in the map.
            _ => self.hold().entry().map_or(0, |entry| entry.present(range)),
        }
    }

    /// Whether somebody holds it, so that more of it may come at any time.
    pub fn is_held(&self) -> bool {
        lock(&self.slot).holds > 0
    }

    /// Whether it is known to be right.
    pub fn verified(&self) -> Verified {
        let verified = *self.verified.borrow();
        if verified == Verified::NotYet && self.shared.cache.is_sealed_as(&self.digest, self.size) {
            return Verified::Yes;
        }
        verified
    }

    /// Keeps the blob's cache entry open, and the blob safe from eviction, until the hold is dropped.
    pub fn hold(self: &Arc<Self>) -> Hold {
        let mut slot = lock(&self.slot);
        let (mut undecided, mut replaced) = (false, false);
        slot.holds += 1;
        slot.counted = None;
        let recently = |at: &Instant| at.elapsed() < OPEN_AGAIN_AFTER;
        // Of a blob that turned out wrong nothing is read again.
        let of_use =
            self.size > 0 && self.check().is_ok() && !slot.failed.as_ref().is_some_and(recently);
        if slot.entry.is_none() && of_use {
            match self.shared.cache.entry(&self.digest, self.size) {
                Ok(entry) => {
                    let sealed = entry.is_sealed();
                    undecided = !sealed && entry.has(ByteRange::new(0, self.size));
                    let given = slot.given.replace(entry.identity());
                    replaced = given.is_some_and(|given| given != entry.identity())
                        && *self.verified.borrow() == Verified::NotYet;
                    slot.entry = Some(Arc::new(entry));
                    slot.opening += 1;
                    // Evicted since it was last open: what was known of it is void.
                    let mut void = false;
                    self.verified.send_if_modified(|verified| match *verified {
                        Verified::NotYet if sealed => {
                            *verified = Verified::Yes;
                            true
                        }
                        Verified::Yes if !sealed => {
                            *verified = Verified::NotYet;
                            void = true;
                            true
                        }
                        _ => false,
                    });
                    if void {
                        self.filling.store(false, Ordering::Release);
                    }
                }
                Err(error) => {
                    slot.failed = Some(Instant::now());
                    self.shared.cache.failed(&error);
                    match error {
                        // That is said once for all blobs.
                        CacheError::Io { .. } => {
                            tracing::debug!(digest = %self.digest, error = %Chain(&error), "reading without the cache");
                        }
                        _ => {
                            tracing::warn!(digest = %self.digest, error = %Chain(&error), "reading without the cache");
                        }
                    }
                    if matches!(error, CacheError::WrongLength { .. })
                        && !self.examined.swap(true, Ordering::AcqRel)
                    {
                        self.examine();
                    }
                }
            }
        }
        drop(slot);
        if replaced {
            self.shared.will_discard(self.digest);
            let _ = self.shared.events.send(Event::Replaced(self.digest));
        }
        let hold = Hold {
            blob: Arc::clone(self),
        };
        if undecided {
            // All of it came before somebody was killed, and nothing will come that would have it hashed.
            self.hash_soon();
        }
        hold
    }

    /// Finds out whether the sealed file or the descriptor is wrong, on a thread that may take its time. A wrong file goes,
    /// and the blob begins anew; what a wrong descriptor says of a right file is no reason to lose it.
    fn examine(self: &Arc<Self>) {
        let blob = Arc::clone(self);
        self.shared.runtime.spawn_blocking(move || {
            match blob.shared.cache.discard_wrong(&blob.digest) {
                Ok(true) => lock(&blob.slot).failed = None,
                Ok(false) => {
                    tracing::warn!(digest = %blob.digest, size = blob.size, "a descriptor has another size than the blob in the cache, whose digest is right");
                }
                Err(error) => {
                    tracing::warn!(digest = %blob.digest, error = %Chain(&error), "a sealed file of the wrong length stays in the cache");
                }
            }
        });
    }

    /// The bytes of `range` if all are here; neither waits nor fetches. May be called from any thread, and counts as a
    /// read for the prefetcher.
    pub fn try_read(self: &Arc<Self>, range: ByteRange) -> Option<Result<Bytes, BlobError>> {
        self.try_take(range, Entry::read)
    }

    /// As [`LazyBlob::try_read`], for the kernel to copy.
    pub fn try_share(self: &Arc<Self>, range: ByteRange) -> Option<Result<Data, BlobError>> {
        self.try_take(range, Entry::share)
    }

    fn try_take<T: Held>(
        self: &Arc<Self>,
        range: ByteRange,
        take: Take<T>,
    ) -> Option<Result<T, BlobError>> {
        let hold = self.hold();
        let result = self
            .look(&hold, range, self.shared.config.strict, take)
            .transpose()?;
        // Without memory for the reply it has to wait. Few threads ask here, so what they look at does not count before.
        let result = match result {
            Ok(bytes) => Ok(bytes.with_room_now(&self.shared)?),
            Err(error) => Err(error),
        };
        if result.is_ok() {
            self.shared.readers.note();
            self.note(range);
        }
        Some(result)
    }

    /// The bytes of `range`, fetched where they are missing.
    ///
    /// # Errors
    /// Any [`BlobError`] but `NoRoom`: what the cache cannot keep is served all the same.
    pub async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Bytes, BlobError> {
        self.take(range, Entry::read).await
    }

    /// As [`LazyBlob::read`], for the kernel to copy.
    pub async fn share(self: &Arc<Self>, range: ByteRange) -> Result<Data, BlobError> {
        self.take(range, Entry::share).await
    }

    async fn take<T: Held>(
        self: &Arc<Self>,
        range: ByteRange,
        take: Take<T>,
    ) -> Result<T, BlobError> {
        if self.shared.config.strict {
            return self.read_strictly(range, take).await;
        }
        self.note(range);
        let deadline = Deadline::after(self.shared.config.read_timeout);
        let (bytes, room) = self.fetch_and_read(range, deadline, take).await?;
        Ok(bytes.with_room(room))
    }

    /// The bytes of `range` once the blob is whole and right, from the cache file that was hashed and nowhere else.
    async fn read_strictly<T: Held>(
        self: &Arc<Self>,
        range: ByteRange,
        take: Take<T>,
    ) -> Result<T, BlobError> {
        let hold = self.hold();
        for _ in 0..ROUNDS {
            self.complete().await?;
            let deadline = Deadline::after(self.shared.config.read_timeout);
            let room = self.shared.room(range.len(), Urgency::Demand);
            let Ok(room) = timeout_at(deadline.instant(), room).await else {
                return Err(BlobError::Deadline {
                    digest: self.digest,
                    range,
                });
            };
            if let Some(bytes) = self.look(&hold, range, true, take)? {
                return Ok(bytes.with_room(room));
            }
        }
        Err(BlobError::NoRoom {
            digest: self.digest,
            size: self.size,
        })
    }

    /// The bytes of `range` by `deadline`, and nothing fetched beside them: for headers and listings.
    pub async fn peek(
        self: &Arc<Self>,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<Bytes, BlobError> {
        // Whoever looks at headers keeps what it saw while it looks at more, so the memory for it is not held.
        let (bytes, _room) = self.fetch_and_read(range, deadline, Entry::read).await?;
        Ok(bytes)
    }

    /// The bytes of `range` with memory for them; for what is too large to wait in memory all at once, of the last piece.
    async fn fetch_and_read<T: Held>(
        self: &Arc<Self>,
        range: ByteRange,
        deadline: Deadline,
        take: Take<T>,
    ) -> Result<(T, Reservation), BlobError> {
        let most = (self.shared.budget.limit() / 8).max(1);
        if range.len() <= 2 * most {
            return self.fetch_piece(range, deadline, take).await;
        }
        // Where the cache keeps nothing, the first bytes of such a read would be given up before the last have come.
        let _hold = self.hold();
        let mut all = BytesMut::new();
        loop {
            let at = range.start() + all.len() as u64;
            let piece = ByteRange::at(at, most).intersect(range);
            let (bytes, room) = self.fetch_piece(piece, deadline, Entry::read).await?;
            all.extend_from_slice(&bytes);
            if piece.end() == range.end() {
                return Ok((all.freeze().into(), room));
            }
        }
    }

    async fn fetch_piece<T: Held>(
        self: &Arc<Self>,
        range: ByteRange,
        deadline: Deadline,
        take: Take<T>,
    ) -> Result<(T, Reservation), BlobError> {
        let hold = self.hold();
        let mut as_they_come = T::AS_THEY_COME.filter(|_| range.len() <= HANDED);
        loop {
            let wants = as_they_come.map(|_| range);
            let came = self
                .ensure(&hold, range, wants, Urgency::Demand, deadline)
                .await?;
            if let (Some(pieces), Some(take)) = (came, as_they_come) {
                self.check()?;
                if let Some(room) = self.shared.try_room(range.len(), Urgency::Demand) {
                    return Ok((take(pieces), room));
                }
                // They are not waited with: the memory that they lie in is not theirs.
                as_they_come = None;
                continue;
            }
            // Nothing only when a cached chunk turned out damaged or memory ran over meanwhile: fetch again.
            let room = self.shared.room(range.len(), Urgency::Demand);
            let Ok(room) = timeout_at(deadline.instant(), room).await else {
                return Err(BlobError::Deadline {
                    digest: self.digest,
                    range,
                });
            };
            if let Some(bytes) = self.look(&hold, range, false, take)? {
                return Ok((bytes, room));
            }
            if deadline.passed() {
                return Err(BlobError::Deadline {
                    digest: self.digest,
                    range,
                });
            }
        }
    }

    /// What `range` holds, from cache and memory; `None` when some of it is not here.
    fn look<T: Held>(
        &self,
        hold: &Hold,
        range: ByteRange,
        strict: bool,
        take: Take<T>,
    ) -> Result<Option<T>, BlobError> {
        self.check()?;
        if range.end() > self.size {
            return Err(BlobError::OutOfBounds {
                digest: self.digest,
                size: self.size,
                range,
            });
        }
        if range.is_empty() {
            return Ok(Some(Bytes::new().into()));
        }
        let entry = hold.entry();
        if strict && *self.verified.borrow() != Verified::Yes {
            return Ok(None);
        }
        if let Some(entry) = &entry {
            match take(entry, range) {
                Ok(Some(bytes)) => return Ok(Some(bytes)),
                Ok(None) => {}
                Err(error) => self.distrust(entry, &error),
            }
        }
        let mut state = lock(&self.state);
        if strict || state.overlay.is_empty() {
            return Ok(None);
        }
        let mut bytes = BytesMut::with_capacity(usize::try_from(range.len()).unwrap_or(0));
        while (bytes.len() as u64) < range.len() {
            let at = range.start() + bytes.len() as u64;
            if let Some(piece) = state.overlay.read(at, range.end()) {
                bytes.extend_from_slice(&piece);
                continue;
            }
            let Some(entry) = &entry else { return Ok(None) };
            let chunk =
                ByteRange::new(at, (at / entry.chunk() + 1) * entry.chunk()).intersect(range);
            match entry.read(chunk) {
                Ok(Some(piece)) => bytes.extend_from_slice(&piece),
                _ => return Ok(None),
            }
        }
        state.overlay.note_read(range);
        Ok(Some(bytes.freeze().into()))
    }

    /// Goes on without a cache file that cannot be read, for a while: its bytes come from the registry again.
    pub(super) fn distrust(&self, entry: &Arc<Entry>, error: &CacheError) {
        if !self.let_go(entry, Some(Instant::now())) {
            return; // somebody else was faster
        }
        self.shared.cache.failed(error);
        tracing::debug!(digest = %self.digest, error = %Chain(error), "the cache fails; reading without it");
        let void = self.verified.send_if_modified(|verified| {
            let was = *verified == Verified::Yes;
            if was {
                *verified = Verified::NotYet;
            }
            was
        });
        if void {
            self.filling.store(false, Ordering::Release);
        }
    }

    /// Closes the entry for all who hold the blob, so that a file without a name takes no room; whether it was open. Unless it `failed`,
    /// its bytes are wrong, and dropped everywhere.
    pub(super) fn let_go(&self, entry: &Arc<Entry>, failed: Option<Instant>) -> bool {
        let mut slot = lock(&self.slot);
        let gone = slot.entry.take_if(|now| Arc::ptr_eq(now, entry));
        if gone.is_some() {
            slot.failed = failed;
            if failed.is_none() {
                slot.given = None;
            }
        }
        drop(slot);
        gone.is_some()
    }

    /// Forgets all that came of it, here and in the kernel: some of it is wrong. Whoever holds the blob next begins it anew.
    pub(super) fn abandon(&self, entry: &Arc<Entry>) {
        self.let_go(entry, None);
        lock(&self.state).overlay.clear();
        let _ = self.shared.events.send(Event::Corrupt(self.digest));
    }

    /// An error once the content is known to be wrong.
    pub(super) fn check(&self) -> Result<(), BlobError> {
        match *self.verified.borrow() {
            Verified::No { actual } => Err(BlobError::Corrupt {
                digest: self.digest,
                actual,
            }),
            Verified::Yes | Verified::NotYet => Ok(()),
        }
    }

    /// What of `range` has to be fetched.
    pub(super) fn missing(&self, hold: &Hold, range: ByteRange) -> Vec<ByteRange> {
        if range.is_empty() {
            return Vec::new();
        }
        let gaps = match hold.entry() {
            Some(entry) => {
                let gaps = entry.missing(range);
                if gaps.is_empty() {
                    return gaps;
                }
                // Another process may have brought it.
                if let Err(error) = entry.refresh(range) {
                    tracing::debug!(digest = %self.digest, error = %Chain(&error), "cannot look at the chunk map");
                }
                if entry.is_discarded() {
                    // Another process found it wrong. Whoever holds the blob next begins it anew.
                    self.shared.will_discard(self.digest);
                    self.abandon(&entry);
                }
                entry.missing(range)
            }
            None => vec![range.align(Cache::chunk(self.size), self.size)],
        };
        let gaps = lock(&self.state).overlay.missing(gaps);
        plan::aligned(gaps, Cache::chunk(self.size), self.size)
    }

    /// Has `range` fetched, and returns when all of it is here. The bytes of `wants` may be returned before, as they came.
    pub(super) async fn ensure(
        self: &Arc<Self>,
        hold: &Hold,
        range: ByteRange,
        wants: Option<ByteRange>,
        urgency: Urgency,
        mut deadline: Deadline,
    ) -> Result<Option<Vec<Bytes>>, BlobError> {
        let mut tries = 0;
        let mut passed: Option<(Arc<Flight>, ByteRange)> = None;
        loop {
            self.check()?;
            let gaps = self.missing(hold, range);
            let Some(&gap) = gaps.first() else {
                return Ok(None);
            };
            if self.shared.config.offline {
                return Err(BlobError::Offline {
                    digest: self.digest,
                    range,
                });
            }
            let late = || BlobError::Deadline {
                digest: self.digest,
                range,
            };
            if deadline.passed() {
                return Err(late());
            }
            let (flight, mut begun) = self.launch(&gaps, urgency);
            if urgency == Urgency::Demand {
                flight.want(gap.end());
            }
            let _waiting = (urgency == Urgency::Demand).then(|| {
                flight.boost();
                self.shared.foreground()
            });
            let arrived = gap.end().min(flight.range.end());
            // A flight that is past the gap and has not filled it will not: the cache failed under it.
            let in_vain = passed
                .as_ref()
                .is_some_and(|(last, at)| Arc::ptr_eq(last, &flight) && *at == gap);
            loop {
                let (at, ended) = flight.progress();
                if let Some(Err(error)) = &ended {
                    tries += 1;
                    let no_room = matches!(error, BlobError::NoRoom { .. });
                    // What a prefetch could not keep, a reader still gets through memory.
                    if if no_room {
                        urgency == Urgency::Fill
                    } else {
                        tries >= OWN_TRIES
                    } {
                        return Err(error.clone());
                    }
                }
                if ended.is_some() || (at >= arrived && !in_vain) {
                    break;
                }
                let until = if in_vain { u64::MAX } else { arrived };
                let wants = wants.filter(|wants| !in_vain && flight.range.contains(*wants));
                let arrival = arrival(&flight, until, wants, &mut begun);
                let came = timeout_at(deadline.instant(), arrival).await;
                if let Ok(Some(pieces)) = came {
                    return Ok(Some(pieces));
                }
                if came.is_err() {
                    // The one stream has to come past everything before; while it moves there is hope.
                    if !flight.whole || flight.progress().0 == at {
                        return Err(late());
                    }
                    deadline = Deadline::after(self.shared.config.read_timeout);
                }
            }
            passed = Some((flight, gap));
        }
    }

    /// Begins what is needed for `gaps` beyond what is under way; returns the flight that brings the first byte, and what the caller
    /// may do of it while it waits.
    fn launch(
        self: &Arc<Self>,
        gaps: &[ByteRange],
        urgency: Urgency,
    ) -> (Arc<Flight>, Option<Begun>) {
        // What lies in one part is one request, however large the parts are.
        let small = |gap: &ByteRange| gap.start() / plan::PART == (gap.end() - 1) / plan::PART;
        let part = match gaps.iter().all(small) {
            true => plan::PART,
            false => self.part_size(),
        };
        let mut state = lock(&self.state);
        let mut begun = Vec::new();
        let first = gaps[0].start();
        if state.no_ranges {
            let streams = || state.flights.iter().filter(|flight| flight.whole);
            let under_way = match streams().find(|flight| flight.brings(first)) {
                None if streams().count() >= STREAMS => streams().next(), // it ends when its readers pause
                found => found,
            };
            if let Some(stream) = under_way {
                return (Arc::clone(stream), None);
            }
            begun.push(Flight::whole(self.size, urgency, first));
        } else {
            let flying: Vec<_> = state.flights.iter().map(|flight| flight.range).collect();
            let requests = plan::requests(gaps, &flying, part).into_iter();
            begun.extend(requests.map(|range| Flight::new(range, urgency)));
        }
        state.flights.extend(begun.iter().cloned());
        let covers = |flight: &&Arc<Flight>| flight.range.contains(ByteRange::at(first, 1));
        let new = begun.iter().find(covers);
        let bringer = new
            .or_else(|| state.flights.iter().find(covers))
            .map(Arc::clone);
        drop(state);
        let bringer = bringer
            .unwrap_or_else(|| unreachable!("what is missing and not under way was begun above"));
        let mut own = None;
        for flight in begun {
            let first = Arc::ptr_eq(&flight, &bringer);
            let begun = self.fly(flight);
            if first {
                own = begun;
            }
        }
        (bringer, own)
    }

    /// Tells the prefetcher of a read, and does what it advises.
    fn note(self: &Arc<Self>, range: ByteRange) {
        if self.shared.config.prefetch == Prefetch::None || self.shared.config.offline {
            return;
        }
        if *self.verified.borrow() != Verified::NotYet {
            return;
        }
        let (Advice { ahead, everything }, room) = {
            let mut state = lock(&self.state);
            let recently = |at: &Instant| at.elapsed() < PREFETCH_AGAIN_AFTER;
            let room = !state.no_room.as_ref().is_some_and(recently);
            let (latency, rate) = self.shared.link.measured();
            let mut reach = Reach::of(latency, rate);
            if !room {
                // The windows of several readers have to go into the memory that there is.
                reach = reach.at_most(self.shared.budget.limit() / 16);
            }
            (state.prefetcher.read(range, self.size, reach), room)
        };
        if let Some(ahead) = ahead {
            let hold = self.hold();
            let gaps = self.missing(&hold, ahead);
            if !gaps.is_empty() {
                drop(self.launch(&gaps, Urgency::Window));
            }
        }
        if everything && room && !self.filling.swap(true, Ordering::AcqRel) {
            let _ = self.shared.events.send(Event::Wanted(self.digest));
            let blob = Arc::clone(self);
            self.shared.runtime.spawn(async move {
                if let Err(error) = blob.complete().await {
                    tracing::warn!(digest = %blob.digest, error = %Chain(&error), "cannot complete a blob");
                    blob.filling.store(false, Ordering::Release);
                }
            });
        }
    }
}

/// Waits as [`Flight::arrival`] does, and does the flight's work meanwhile if that was begun here: its bytes then reach the reader
/// without another thread.
async fn arrival(
    flight: &Flight,
    until: u64,
    wants: Option<ByteRange>,
    begun: &mut Option<Begun>,
) -> Option<Vec<Bytes>> {
    let mut arrival = pin!(flight.arrival(until, wants));
    let mut first = true;
    poll_fn(|cx| {
        // What is waited for is said first, so that the work knows of it.
        if std::mem::take(&mut first)
            && let Poll::Ready(came) = arrival.as_mut().poll(cx)
        {
            return Poll::Ready(came);
        }
        if let Some(work) = begun
            && Pin::new(work).poll(cx).is_ready()
        {
            *begun = None;
        }
        arrival.as_mut().poll(cx)
    })
    .await
}

/// What is known of a blob before any byte of it came: of an empty one everything.
fn decided(digest: Digest, size: u64) -> Verified {
    let actual = Digest::of(b"");
    match size {
        0 if digest == actual => Verified::Yes,
        0 => Verified::No { actual },
        _ => Verified::NotYet,
    }
}

/// Keeps a blob's cache entry open.
#[derive(Debug)]
pub struct Hold {
    blob: Arc<LazyBlob>,
}

impl Hold {
    /// The blob.
    pub fn blob(&self) -> &Arc<LazyBlob> {
        &self.blob
    }

    /// The blob's entry, unless the cache is of no use for it.
    pub fn entry(&self) -> Option<Arc<Entry>> {
        lock(&self.blob.slot).entry.clone()
    }

    /// The blob's entry when it is sealed and its file can be read from the disk, for who reads that without us.
    pub fn readable(&self) -> Option<Arc<Entry>> {
        let entry = self.entry().filter(|entry| entry.is_sealed())?;
        match entry.probe() {
            Ok(()) => Some(entry),
            Err(error) => {
                self.blob.distrust(&entry, &error);
                None
            }
        }
    }

    /// Which opening of the blob this is.
    pub(super) fn opening(&self) -> u64 {
        lock(&self.blob.slot).opening
    }
}

impl Clone for Hold {
    fn clone(&self) -> Self {
        self.blob.hold()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut slot = lock(&self.blob.slot);
        slot.holds -= 1;
        if slot.holds == 0 {
            let entry = slot.entry.take();
            drop(slot);
            drop(entry);
            lock(&self.blob.state).overlay.clear();
        }
    }
}
