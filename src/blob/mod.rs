//! Lazy blobs: which bytes are here, which to fetch, in what order; verification; prefetch.
//!
//! A read, in the order of the files: [`LazyBlob::read`] (`read.rs`) holds the blob's cache entry (`hold.rs`) and looks into it; what
//! is missing becomes requests (`ensure.rs`; `plan.rs`, pure) that nobody else has under way, in this process (`flight.rs`) or another
//! (the cache's claims); they run (`fetch.rs`) and fill the cache (`sink.rs`), and the read goes on as soon as its own bytes are there. What else to fetch is decided in
//! `prefetch.rs` (pure); completing a blob (`complete.rs`) asks in the same way. A blob that is whole is hashed and sealed behind
//! all this (`verify.rs`). Bytes that the cache cannot take are handed through memory (`overlay.rs`).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, broadcast, watch};

mod budget;
mod complete;
mod ensure;
#[cfg(test)]
mod fault_tests;
mod fetch;
mod flight;
mod hashers;
mod hedge;
mod hold;
mod lazy;
mod link;
mod memory;
mod overlay;
mod plan;
mod prefetch;
mod read;
mod readers;
mod sink;
#[cfg(test)]
mod tests;
mod verify;

pub use hashers::HashCost;
pub use hold::Hold;
pub use lazy::LazyBlob;
pub use memory::{LastingMemory, Memory};

use budget::Budget;
use hashers::Hashers;
use hedge::Purse;
use readers::Readers;

use crate::base::meter::Counter;
use crate::base::rt::{Handle, hashing_threads};
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicU64, Ordering};
use crate::base::{ByteRange, Digest, lock};
use crate::cache::{Cache, Identity};
use crate::registry::{Registry, RegistryConfig, RegistryError, Repository};

/// Parts of a blob that are asked for at a time when it is completed. How many of them run, the registry client decides for
/// each host ([`Registry::lane`]).
const PARTS_AT_ONCE: usize = RegistryConfig::MOST_CONNECTIONS;
/// Requests for what a reader waits for, beside those.
const DEMANDS_AT_ONCE: usize = 32;

/// Most blobs that turned out wrong which are remembered.
const MOST_WRONG: usize = 64;

/// What is fetched beside what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Prefetch {
    /// Nothing.
    None,
    /// A sequential reader's blob, ahead of it and then to its end.
    Blob,
    /// The whole model once weights are read in earnest.
    #[default]
    Model,
}

/// How blobs are read.
#[derive(Clone, Debug)]
pub struct BlobConfig {
    /// See [`Prefetch`].
    pub prefetch: Prefetch,
    /// How long a read waits for bytes that do not come.
    pub read_timeout: Duration,
    /// Never ask a registry for anything.
    pub offline: bool,
    /// Serve nothing of a blob before all of it is here and has its digest.
    pub strict: bool,
    /// Memory for everything under way, in bytes.
    pub memory: u64,
}

impl Default for BlobConfig {
    fn default() -> Self {
        Self {
            prefetch: Prefetch::default(),
            // An error here is SIGBUS in a process that maps the file, so patience is cheap.
            read_timeout: Duration::from_secs(300),
            offline: false,
            strict: false,
            memory: 256 << 20,
        }
    }
}

/// What can go wrong in a read. Cheap to clone: every waiter of a failed request gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BlobError {
    /// The registry could not deliver.
    #[error("blob {digest}: bytes {range} could not be fetched")]
    Fetch {
        /// The blob.
        digest: Digest,
        /// The range.
        range: ByteRange,
        /// The cause.
        #[source]
        source: Arc<RegistryError>,
    },
    /// The whole blob came and does not have its digest.
    #[error(
        "blob {digest}: the content that the registry sent has digest {actual}; none of it is kept"
    )]
    Corrupt {
        /// The digest that it should have.
        digest: Digest,
        /// The digest that it has.
        actual: Digest,
    },
    /// The bytes are not in the cache, and no registry may be asked.
    #[error("blob {digest}: bytes {range} are not in the cache, and ocifs is offline")]
    Offline {
        /// The blob.
        digest: Digest,
        /// The range.
        range: ByteRange,
    },
    /// The deadline passed.
    #[error("blob {digest}: bytes {range} did not come in time")]
    Deadline {
        /// The blob.
        digest: Digest,
        /// The range.
        range: ByteRange,
    },
    /// The caller asked for bytes behind the end.
    #[error("blob {digest} has {size} bytes, {range} is outside")]
    OutOfBounds {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// The range.
        range: ByteRange,
    },
    /// It is compressed, and what it holds cannot be had.
    #[error("blob {digest}: {reason}")]
    Undecodable {
        /// The blob.
        digest: Digest,
        /// Why, for people.
        reason: String,
        /// Whether it will be so the next time too.
        lasting: bool,
    },
    /// The cache cannot keep the blob, so it cannot be completed.
    #[error("blob {digest} ({size} bytes) does not fit into the cache beside what is in use there")]
    NoRoom {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
    },
}

/// Whether a blob's content has its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// It has.
    Yes,
    /// Not known: not all of it is here, or it is being hashed.
    NotYet,
    /// It has not: reads fail.
    No {
        /// The digest that it has.
        actual: Digest,
    },
}

/// A blob that came whole and did not have its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The digest that it should have.
    pub digest: Digest,
    /// The digest that it had.
    pub actual: Digest,
    /// Who sent it, for people; nobody, when an earlier process had brought it.
    pub sources: Vec<String>,
    /// When it was found out.
    pub at: SystemTime,
    /// Whether it is final: it was wrong the second time, and reads fail. Else it was fetched again.
    pub lasting: bool,
}

/// What happens to blobs, for the layers above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A reader has shown that it wants all of this blob.
    Wanted(Digest),
    /// A blob is complete, verified and sealed.
    Sealed(Digest),
    /// A blob was complete and wrong; nothing of what came so far may be served from any cache. It may be fetched again.
    Corrupt(Digest),
    /// What readers were given of a blob in this process came from a file that is not in the cache any more, and it was never known to
    /// be right: another process may have found it wrong, or evicted it.
    Replaced(Digest),
}

/// What has to be known of a blob by who goes on where this process is killed. It is told before it happens, in the order in which it
/// happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Bytes of it that readers may have been given are thrown away; [`Event::Corrupt`] or [`Event::Replaced`] follows.
    Discards,
    /// Readers are given bytes of this file from here on, and nobody knows yet whether they are right.
    Gives(Identity),
    /// What readers were given so far is right.
    Proves,
}

/// Who is told.
struct Witness(Box<dyn Fn(Digest, Notice) + Send + Sync>);

impl std::fmt::Debug for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Witness")
    }
}

/// All lazy blobs of this process; clones share them.
#[derive(Clone, Debug)]
pub struct Blobs {
    shared: Arc<Shared>,
}

/// What all blobs have in common.
#[derive(Debug)]
struct Shared {
    cache: Cache,
    registry: Registry,
    config: BlobConfig,
    runtime: Handle,
    table: Mutex<HashMap<(Digest, u64), Weak<LazyBlob>>>,
    demands: Semaphore,
    /// The one place from which a part to be filled goes on to wait for a lane: all that gave way to readers wake together, and would
    /// be fetched in any order.
    fills: Semaphore,
    /// How many readers wait, and how many requests for what readers want are under way.
    foreground: watch::Sender<usize>,
    budget: Budget,
    link: link::Link,
    readers: Arc<Readers>,
    hashers: Hashers,
    purse: Purse,
    /// Second requests that were made beside slow ones.
    hedges: AtomicU64,
    /// Bytes that registries have sent.
    received: Counter,
    /// The last blobs that turned out wrong.
    wrong: Mutex<VecDeque<Wrong>>,
    witness: OnceLock<Witness>,
    /// What a process before this one gave to readers who are there still, and did not know to be right.
    given: OnceLock<HashMap<Digest, Identity>>,
    events: broadcast::Sender<Event>,
}

/// Something that readers want is under way: filling in the background waits meanwhile.
#[derive(Debug)]
struct Foreground(Arc<Shared>);

impl Shared {
    fn foreground(self: &Arc<Self>) -> Foreground {
        // Only that nobody waits any more is waited for.
        self.foreground.send_if_modified(|count| {
            *count += 1;
            false
        });
        self.readers.wait(true);
        Foreground(Arc::clone(self))
    }
}

impl Shared {
    fn notice(&self, digest: Digest, notice: Notice) {
        if let Some(witness) = self.witness.get() {
            witness.0(digest, notice);
        }
    }

    /// The bytes of a blob are about to be thrown away, or were.
    fn will_discard(&self, digest: Digest) {
        self.notice(digest, Notice::Discards);
    }

    /// The file that a process before this one gave to readers.
    fn given(&self, digest: &Digest) -> Option<Identity> {
        self.given.get()?.get(digest).copied()
    }

    fn note_wrong(&self, wrong: Wrong) {
        let mut all = lock(&self.wrong);
        if all.len() == MOST_WRONG {
            all.pop_front();
        }
        all.push_back(wrong);
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        self.0.foreground.send_if_modified(|count| {
            *count -= 1;
            *count == 0
        });
        self.0.readers.wait(false);
    }
}

impl Blobs {
    /// Joins a cache and a registry client.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(cache: Cache, registry: Registry, config: BlobConfig) -> Self {
        Self::with(cache, registry, config, hashing_threads())
    }

    fn with(cache: Cache, registry: Registry, config: BlobConfig, threads: usize) -> Self {
        let readers = Arc::new(Readers::new());
        Self {
            shared: Arc::new(Shared {
                cache,
                registry,
                budget: Budget::new(config.memory),
                link: link::Link::default(),
                config,
                runtime: Handle::current(),
                table: Mutex::default(),
                demands: Semaphore::new(DEMANDS_AT_ONCE),
                fills: Semaphore::new(1),
                foreground: watch::Sender::new(0),
                hashers: Hashers::new(Arc::clone(&readers), threads),
                purse: Purse::default(),
                hedges: AtomicU64::new(0),
                received: Counter::default(),
                wrong: Mutex::default(),
                witness: OnceLock::new(),
                given: OnceLock::new(),
                readers,
                events: broadcast::Sender::new(1024),
            }),
        }
    }

    /// The lazy blob with this digest and size, fetched from `repository` where it is not cached. Touches neither network nor disk.
    pub fn open(&self, digest: Digest, size: u64, repository: &Repository) -> Arc<LazyBlob> {
        let mut table = lock(&self.shared.table);
        let known = table.get(&(digest, size)).and_then(Weak::upgrade);
        let blob = known.unwrap_or_else(|| {
            table.retain(|_, blob| blob.strong_count() > 0);
            let blob = LazyBlob::new(Arc::clone(&self.shared), digest, size);
            table.insert((digest, size), Arc::downgrade(&blob));
            blob
        });
        drop(table);
        blob.add_repository(repository);
        blob
    }

    /// The cache below.
    pub fn cache(&self) -> &Cache {
        &self.shared.cache
    }

    /// The registry client below.
    pub fn registry(&self) -> &Registry {
        &self.shared.registry
    }

    /// The settings.
    pub fn config(&self) -> &BlobConfig {
        &self.shared.config
    }

    /// Blobs that something refers to now.
    pub fn live(&self) -> Vec<Arc<LazyBlob>> {
        lock(&self.shared.table)
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Bytes of [`BlobConfig::memory`] that are in use, and the most that ever were.
    pub fn memory(&self) -> (u64, u64) {
        self.shared.budget.used()
    }

    /// What hashing has cost since these blobs were joined.
    pub fn hash_cost(&self) -> HashCost {
        self.shared.hashers.cost()
    }

    /// The last blobs that turned out wrong, the latest last.
    pub fn wrong(&self) -> Vec<Wrong> {
        lock(&self.shared.wrong).iter().cloned().collect()
    }

    /// Requests that were made a second time beside a slow one.
    pub fn hedges(&self) -> u64 {
        self.shared.hedges.load(Ordering::Relaxed)
    }

    /// Bytes of blobs that registries have sent.
    pub fn received(&self) -> u64 {
        self.shared.received.get()
    }

    /// Has `witness` called with what must be known of a blob should this process be killed, on a thread that may wait for a disk and
    /// nothing else, and that no other one may wait for: for a note that outlives this process. The first witness counts.
    pub fn witness(&self, witness: impl Fn(Digest, Notice) + Send + Sync + 'static) {
        let _ = self.shared.witness.set(Witness(Box::new(witness)));
    }

    /// Goes on for another process, whose witness saw that these files were given to readers and not proved right. Where a blob has
    /// another file by now, somebody else may have found the former one wrong: whoever holds the blob first finds that out, and
    /// [`Event::Replaced`] tells of it. To be called before any blob is opened; the first call counts.
    pub fn were_given(&self, files: impl IntoIterator<Item = (Digest, Identity)>) {
        let _ = self.shared.given.set(files.into_iter().collect());
    }

    /// What happens from now on. A receiver that falls far behind misses the oldest events.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }
}
