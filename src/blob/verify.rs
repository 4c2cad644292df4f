//! Hashing behind the download, and what follows from the result.
//!
//! SHA-256 is sequential: the prefix of the blob that is here without a gap is hashed as it grows, by threads that serve no
//! reader (`hashers.rs`). When it reaches the end, the blob is sealed or thrown away.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use super::hold::Hold;
use super::lazy::LazyBlob;
use super::{Event, Verified, Wrong};
use crate::base::sync::Mutex;
use crate::base::sync::atomic::Ordering;
use crate::base::{ByteRange, Chain, Digest, Hasher, Instant, lock};
use crate::cache::Entry;

/// Bytes hashed at a time: few enough to stay in a processor's second-level cache between reading and hashing.
const STEP: u64 = 256 << 10;

/// How far the hash of a blob is.
#[derive(Debug)]
pub(super) struct Hashing {
    /// A job is waiting or being done.
    busy: watch::Sender<bool>,
    /// Taken out while the blob is being hashed.
    done: Mutex<Hashed>,
}

impl Default for Hashing {
    fn default() -> Self {
        Self {
            busy: watch::Sender::new(false),
            done: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct Hashed {
    /// The opening of the blob whose bytes these were.
    opening: u64,
    hasher: Hasher,
    upto: u64,
}

/// Hashing one blob from where it stopped last to the next gap or the end.
#[derive(Debug)]
pub(super) struct Job {
    blob: Arc<LazyBlob>,
    hold: Hold,
    entry: Arc<Entry>,
    hashed: Hashed,
    buffer: Box<[u8]>,
    /// Bytes of the last step.
    step: u64,
    broken: Option<crate::cache::CacheError>,
}

/// How a step of a [`Job`] went.
#[derive(Debug)]
pub(super) enum Step {
    /// There may be more to do.
    More,
    /// There may be, and whoever does it gets too little time.
    Starved,
    /// There is nothing more to do now: [`Job::end`].
    End,
}

impl Job {
    fn new(blob: &Arc<LazyBlob>, hold: Hold, entry: Arc<Entry>) -> Self {
        let opening = hold.opening();
        let mut hashed = std::mem::take(&mut *lock(&blob.hashing.done));
        if hashed.opening != opening {
            // Bytes may have been evicted and fetched again since: only what is here now counts.
            hashed = Hashed {
                opening,
                ..Hashed::default()
            };
        }
        Self {
            blob: Arc::clone(blob),
            hold,
            entry,
            hashed,
            buffer: vec![0; STEP.min(blob.size) as usize].into(),
            step: 0,
            broken: None,
        }
    }

    /// Bytes that the last step hashed.
    pub(super) fn step_len(&self) -> u64 {
        self.step
    }

    /// Hashes a little. Takes no lock that a reader takes.
    pub(super) fn step(&mut self) -> Step {
        self.step = 0;
        let range = ByteRange::at(self.hashed.upto, STEP);
        let range = range.intersect(ByteRange::new(0, self.blob.size));
        if range.is_empty() || self.entry.is_sealed() {
            return Step::End;
        }
        let buffer = &mut self.buffer[..range.len() as usize];
        match self.entry.read_into(range.start(), buffer) {
            Ok(true) => {}
            Ok(false) => return Step::End,
            Err(error) => {
                self.broken = Some(error);
                return Step::End;
            }
        }
        self.hashed.hasher.update(buffer);
        self.hashed.upto = range.end();
        self.step = range.len();
        Step::More
    }

    /// Decides on the blob if all of it is hashed, and lets others hash it.
    pub(super) fn end(self) {
        let Self {
            blob,
            hold,
            entry,
            hashed,
            broken,
            ..
        } = self;
        if let Some(error) = broken {
            blob.distrust(&entry, &error);
        } else if *blob.verified.borrow() != Verified::NotYet {
            // Nothing is left to find out.
        } else if entry.is_sealed() {
            blob.verified.send_replace(Verified::Yes);
        } else if hashed.upto == blob.size {
            blob.decide(&entry, hashed.hasher);
        } else {
            *lock(&blob.hashing.done) = hashed;
        }
        blob.hashing.busy.send_replace(false);
        // What came in between the last look and now has found this job under way.
        if blob.can_go_on(&hold) {
            blob.hash_soon();
        }
    }
}

impl LazyBlob {
    /// Hashes what has arrived, if the blob is on its way to completion and nobody is at it.
    pub(super) fn hash_soon(self: &Arc<Self>) {
        if *self.verified.borrow() != Verified::NotYet {
            return;
        }
        let hold = self.hold();
        let Some(entry) = hold.entry() else { return };
        if !self.filling.load(Ordering::Acquire) && !entry.has(ByteRange::new(0, self.size)) {
            return;
        }
        while !self.hashing.busy.send_replace(true) {
            if self.can_go_on(&hold) {
                let job = Box::new(Job::new(self, hold, entry));
                if let Err(job) = self.shared.hashers.add(job) {
                    // No thread was to be had; the next part that arrives tries again.
                    *lock(&self.hashing.done) = job.hashed;
                    self.hashing.busy.send_replace(false);
                }
                return;
            }
            self.hashing.busy.send_replace(false);
            // What came since the last look has found this thread busy.
            if !self.can_go_on(&hold) {
                return;
            }
        }
    }

    fn can_go_on(&self, hold: &Hold) -> bool {
        let (upto, opening) = {
            let done = lock(&self.hashing.done);
            (done.upto, done.opening)
        };
        let upto = if opening == hold.opening() { upto } else { 0 };
        let next = ByteRange::at(upto, STEP).intersect(ByteRange::new(0, self.size));
        *self.verified.borrow() == Verified::NotYet
            && hold.entry().is_some_and(|entry| entry.has(next))
    }

    /// Hashes all there is and tells whether the blob is decided now.
    pub(super) async fn hash_what_came(self: &Arc<Self>, hold: &Hold) -> bool {
        let mut busy = self.hashing.busy.subscribe();
        loop {
            self.hash_soon();
            // The sender lives as long as the blob.
            let _ = busy.wait_for(|busy| !busy).await;
            if *self.verified.borrow() != Verified::NotYet {
                return true;
            }
            if !self.can_go_on(hold) {
                return false;
            }
        }
    }

    fn decide(self: &Arc<Self>, entry: &Arc<Entry>, hasher: Hasher) {
        let actual = hasher.finish();
        if actual == self.digest {
            if let Err(error) = entry.seal() {
                tracing::warn!(digest = %self.digest, error = %Chain(&error), "a verified blob cannot be sealed");
                if entry.is_discarded() {
                    // The disk has lost bytes of it since they were hashed.
                    self.filling
                        .store(false, std::sync::atomic::Ordering::Release);
                    self.let_go(entry, Some(Instant::now()));
                    return;
                }
            }
            self.verified.send_replace(Verified::Yes);
            self.proves(entry);
            self.doubted.store(false, Ordering::Release);
            self.take_sources();
            tracing::info!(digest = %self.digest, bytes = self.size, "complete and verified");
            let _ = self.shared.events.send(Event::Sealed(self.digest));
        } else {
            self.wrong(entry, actual);
        }
    }

    /// What came is wrong. It is thrown away and fetched again from somebody else, once; then reads fail.
    fn wrong(self: &Arc<Self>, entry: &Arc<Entry>, actual: Digest) {
        let lasting = self.doubted.swap(true, Ordering::AcqRel);
        if lasting {
            // Readers fail from here on, before the bytes go.
            self.verified.send_replace(Verified::No { actual });
        }
        let sources = self.take_sources();
        for repository in self.repositories() {
            self.shared
                .registry
                .blame(&repository, &self.digest, &sources);
        }
        let mut named: Vec<_> = sources.iter().map(ToString::to_string).collect();
        named.sort();
        named.dedup();
        let from = if named.is_empty() {
            "an earlier run".to_owned()
        } else {
            named.join(", ")
        };
        if lasting {
            tracing::error!(digest = %self.digest, %actual, from, "the content is wrong again; nothing of it is kept, and reads fail");
        } else {
            tracing::error!(digest = %self.digest, %actual, from, "the content is wrong; nothing of it is kept, and it is fetched again from elsewhere. Whoever has read it may have read wrong bytes");
        }
        self.shared.note_wrong(Wrong {
            digest: self.digest,
            actual,
            sources: named,
            at: SystemTime::now(),
            lasting,
        });
        self.shared.will_discard(self.digest);
        entry.discard();
        self.abandon(entry);
        if !lasting {
            let blob = Arc::clone(self);
            self.shared.runtime.spawn(async move {
                if let Err(error) = blob.complete().await {
                    tracing::warn!(digest = %blob.digest, error = %Chain(&error), "a blob that was wrong cannot be fetched again");
                    blob.filling.store(false, Ordering::Release);
                }
            });
        }
    }
}
