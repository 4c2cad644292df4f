//! One lazy blob, and what is known of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::flight::Flight;
use super::hold::Slot;
use super::overlay::Overlay;
use super::prefetch::Prefetcher;
use super::verify::Hashing;
use super::{BlobError, Shared, Verified};
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::base::{Digest, Instant, lock};
use crate::registry::{Repository, Source};

/// Most servers of a blob that are remembered.
const MOST_SOURCES: usize = 16;

/// One lazy blob: some of its bytes are here, the rest come when they are read.
#[derive(Debug)]
pub struct LazyBlob {
    pub(super) shared: Arc<Shared>,
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) repositories: Mutex<Vec<Repository>>,
    pub(super) slot: Mutex<Slot>,
    pub(super) state: Mutex<State>,
    pub(super) verified: watch::Sender<Verified>,
    pub(super) hashing: Hashing,
    /// All of it is wanted, so hashing what has arrived is not in vain.
    pub(super) filling: AtomicBool,
    /// A sealed file of another length was looked into.
    pub(super) examined: AtomicBool,
    /// Bytes that the registry sent for it.
    pub(super) received: AtomicU64,
    /// Who sent them, since it was last found wrong.
    sources: Mutex<Vec<Arc<Source>>>,
    /// It was wrong once, and is fetched again.
    pub(super) doubted: AtomicBool,
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
        let slot = Slot::after(shared.given(&digest));
        Arc::new(Self {
            shared,
            digest,
            size,
            repositories: Mutex::default(),
            slot: Mutex::new(slot),
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
