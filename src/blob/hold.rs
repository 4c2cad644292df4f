//! The cache entry of a blob, open while somebody holds it.

use std::sync::Arc;
use std::time::Duration;

use super::lazy::LazyBlob;
use super::{Event, Notice, Verified};
use crate::base::sync::atomic::Ordering;
use crate::base::{ByteRange, Chain, Instant, lock};
use crate::cache::{CacheError, Entry, Identity};

/// A cache that could not open the blob is asked again after this.
const OPEN_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// What a closed blob has in the cache is believed for so long: only another process can add to it.
const COUNT_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// The cache entry, open while somebody holds the blob.
#[derive(Debug, Default)]
pub(super) struct Slot {
    entry: Option<Arc<Entry>>,
    holds: usize,
    /// Counts the openings: what was found out about an earlier one's bytes says nothing of this one's.
    opening: u64,
    /// The file that readers were given bytes from, until those are known to be wrong and dropped everywhere.
    given: Option<Identity>,
    /// That they were is on record, for who goes on after this process.
    noted: bool,
    /// What was in the cache of it when somebody looked, while it was closed.
    counted: Option<(Instant, u64)>,
    /// When opening failed last.
    failed: Option<Instant>,
}

impl Slot {
    /// Of a blob nobody holds; `given` is what a process before this one gave to readers.
    pub(super) fn after(given: Option<Identity>) -> Self {
        Self {
            given,
            noted: given.is_some(),
            ..Self::default()
        }
    }
}

/// Keeps a blob's cache entry open.
#[derive(Debug)]
pub struct Hold {
    blob: Arc<LazyBlob>,
}

impl LazyBlob {
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
                    replaced = self.gives(&mut slot, &entry);
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

    /// Readers are given bytes of this entry from here on; whether they were given other ones, never known to be right. Nobody has the
    /// entry before it is on record, nor is it on record before the end of the former file is.
    fn gives(&self, slot: &mut Slot, entry: &Entry) -> bool {
        let file = entry.identity();
        let same = slot.given == Some(file);
        let given = slot.given.replace(file);
        let replaced = given.is_some() && !same && *self.verified.borrow() == Verified::NotYet;
        if replaced {
            self.shared.will_discard(self.digest);
        }
        let noted = std::mem::replace(&mut slot.noted, !entry.is_sealed());
        if slot.noted && !(noted && same) {
            self.shared.notice(self.digest, Notice::Gives(file));
        }
        if noted && !slot.noted {
            self.shared.notice(self.digest, Notice::Proves);
        }
        replaced
    }

    /// What readers were given of this entry is right.
    pub(super) fn proves(&self, entry: &Entry) {
        let mut slot = lock(&self.slot);
        if slot.given == Some(entry.identity()) && std::mem::take(&mut slot.noted) {
            self.shared.notice(self.digest, Notice::Proves);
        }
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
