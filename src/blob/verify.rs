//! Hashing behind the download, and what follows from the result.
//!
//! SHA-256 is sequential: the prefix of the blob that is here without a gap is hashed as it grows, on a thread that serves no
//! reader. When it reaches the end, the blob is sealed or thrown away.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use tokio::sync::oneshot;

use super::lazy::{Chain, Hold, LazyBlob};
use super::{Event, Verified};
use crate::base::{ByteRange, Hasher, lock};

/// Bytes hashed at a time.
const STEP: u64 = 1 << 20;

/// The nice value of hashing threads: a tenth of the weight of those that serve readers (sched(7)).
const NICE: i32 = 10;

/// Runs `job` on a thread of its own that gives way to readers where processors are few.
///
/// Not on the runtime's threads: only root could make one of these as important again as it was.
fn behind_readers(job: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let job = move || {
        // "Process" 0 is the calling thread on Linux (setpriority(2), "C library/kernel differences").
        let _ = rustix::process::setpriority_process(None, NICE);
        job();
    };
    thread::Builder::new()
        .name("ocifs-hash".into())
        .spawn(job)
        .map(drop)
}

#[derive(Debug, Default)]
pub(super) struct Hashing {
    busy: AtomicBool,
    done: Mutex<Hashed>,
}

#[derive(Debug, Default)]
struct Hashed {
    /// The opening of the blob whose bytes these were.
    opening: u64,
    hasher: Hasher,
    upto: u64,
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
        if self.hashing.busy.swap(true, Ordering::AcqRel) {
            return;
        }
        let blob = Arc::clone(self);
        let job = move || {
            blob.hash(&hold);
            blob.hashing.busy.store(false, Ordering::Release);
            // What came in between the last look and now has found this thread busy.
            if blob.can_go_on(&hold) {
                blob.hash_soon();
            }
        };
        if behind_readers(job).is_err() {
            // No thread was to be had; the next part that arrives tries again.
            self.hashing.busy.store(false, Ordering::Release);
        }
    }

    fn can_go_on(&self, hold: &Hold) -> bool {
        let upto = lock(&self.hashing.done).upto;
        let next = ByteRange::at(upto, STEP).intersect(ByteRange::new(0, self.size));
        *self.verified.borrow() == Verified::NotYet
            && hold
                .entry()
                .is_some_and(|entry| upto < self.size && entry.has(next))
    }

    /// Hashes all there is and tells whether the blob is decided now.
    pub(super) async fn hash_what_came(self: &Arc<Self>, hold: &Hold) -> bool {
        let blob = Arc::clone(self);
        let hold = hold.clone();
        let (done, hashed) = oneshot::channel();
        let job = move || {
            blob.hash(&hold);
            let _ = done.send(());
        };
        behind_readers(job).is_ok()
            && hashed.await.is_ok()
            && *self.verified.borrow() != Verified::NotYet
    }

    /// Goes on from where the last call stopped until a gap or the end. One thread at a time.
    fn hash(&self, hold: &Hold) {
        let mut hashed = lock(&self.hashing.done);
        if *self.verified.borrow() != Verified::NotYet {
            return;
        }
        let Some(entry) = hold.entry() else { return };
        if entry.is_sealed() {
            self.verified.send_replace(Verified::Yes);
            return;
        }
        let opening = hold.opening();
        if hashed.opening != opening {
            // Bytes may have been evicted and fetched again since: only what is here now counts.
            *hashed = Hashed {
                opening,
                ..Hashed::default()
            };
        }
        while hashed.upto < self.size {
            let range = ByteRange::at(hashed.upto, STEP).intersect(ByteRange::new(0, self.size));
            match entry.read(range) {
                Ok(Some(bytes)) => hashed.hasher.update(&bytes),
                Ok(None) => return,
                Err(error) => {
                    self.distrust(&entry, &error);
                    return;
                }
            }
            hashed.upto = range.end();
        }
        let hasher = std::mem::take(&mut *hashed).hasher;
        self.decide(hold, hasher);
    }

    fn decide(&self, hold: &Hold, hasher: Hasher) {
        let actual = hasher.finish();
        if actual == self.digest {
            if let Some(entry) = hold.entry()
                && let Err(error) = entry.seal()
            {
                tracing::warn!(digest = %self.digest, error = %Chain(&error), "a verified blob cannot be sealed");
            }
            self.verified.send_replace(Verified::Yes);
            tracing::info!(digest = %self.digest, bytes = self.size, "complete and verified");
            let _ = self.shared.events.send(Event::Sealed(self.digest));
        } else {
            // Readers fail from here on, before the bytes go.
            self.verified.send_replace(Verified::No { actual });
            tracing::error!(digest = %self.digest, %actual, "the registry's content is wrong; nothing of it is kept");
            if let Some(entry) = hold.entry() {
                entry.discard();
                self.let_go(&entry, None);
            }
            let _ = self.shared.events.send(Event::Corrupt(self.digest));
        }
    }
}
