//! A read of a blob from top to bottom: what is here at once, the rest when it has come.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::budget::Reservation;
use super::complete::ROUNDS;
use super::flight::Urgency;
use super::hold::Hold;
use super::lazy::LazyBlob;
use super::memory::Held;
use super::prefetch::{Advice, Reach};
use super::{BlobError, Event, Prefetch, Verified};
use crate::base::rt::timeout_at;
use crate::base::sync::atomic::Ordering;
use crate::base::{ByteRange, Chain, Deadline, Instant, lock};
use crate::cache::{CacheError, Data, Entry};

/// A reader who wants no more than this gets it before it is written to the cache. More would be given to the kernel while it is still
/// gathered.
const HANDED: u64 = 128 << 10;
/// A cache that had no room is not filled for this long; what is fetched ahead of readers goes to memory.
const PREFETCH_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How bytes that are there are taken from the cache: [`Entry::read`] or [`Entry::share`].
type Take<T> = fn(&Entry, ByteRange) -> Result<Option<T>, CacheError>;

impl LazyBlob {
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
            let room = self.room_by(range, deadline).await?;
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
            let room = self.room_by(range, deadline).await?;
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

    /// Memory for the bytes of `range`, which a reader waits for.
    async fn room_by(
        &self,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<Reservation, BlobError> {
        let room = self.shared.room(range.len(), Urgency::Demand);
        let room = timeout_at(deadline.instant(), room).await;
        room.map_err(|_| BlobError::Deadline {
            digest: self.digest,
            range,
        })
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
