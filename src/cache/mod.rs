//! The cache: an OCI image layout on disk plus what ocifs alone needs.
//!
//! Any number of processes share one directory. Blobs are kept by digest, so every tag, repository, mount and process that
//! shows the same bytes shares one copy. A broken or full cache makes reads slower, never wrong: whoever fails to
//! keep something here serves it from where it came.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

mod chunkmap;
#[cfg(test)]
mod crash_tests;
mod disk;
mod entry;
mod evict;
#[cfg(test)]
mod faults;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod health;
mod index;
mod layout;
mod lock;
mod mapped;
mod notes;
#[cfg(test)]
mod power;
mod space;
mod sweep;
mod tags;
#[cfg(test)]
mod tests;
mod unpacked;
mod writer;

pub use entry::{Entry, Identity};
#[cfg(test)]
pub(crate) use faults::fail_writes;
pub use index::Published;
pub use lock::Claim;
pub use mapped::{Data, Mapped};
pub use notes::NoteKind;
pub use space::{Usage, Verdict};
pub use tags::TagRecord;
pub use unpacked::{Growing, Unpacker, Unpacking};
pub use writer::Writer;

use crate::base::Digest;
use disk::Access;
use health::Health;
use layout::Layout;
use space::Space;

/// Where the cache is and how large it may become.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// The directory; made (0700) when it is missing.
    pub dir: PathBuf,
    /// Limit on allocated bytes.
    pub limit: u64,
}

/// What can go wrong with the cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system says no.
    #[error("cannot {action} {path} in the cache")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// A directory or file is not one that this version may use.
    #[error("{path} is not usable as a cache: {reason}")]
    Unusable {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A sealed file is not as long as its blob: the file is damaged, or the descriptor lies.
    #[error("{path} has {length} bytes, its descriptor says {size}")]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: u64,
        /// The blob's size.
        size: u64,
    },
    /// There is no room, and nothing more that may be evicted.
    #[error("no room in the cache for {wanted} bytes: what is there is in use or the disk is full")]
    Full {
        /// Bytes that were wanted.
        wanted: u64,
    },
    /// A blob cannot be removed while somebody uses it.
    #[error("{digest} is in use")]
    InUse {
        /// The blob.
        digest: Digest,
    },
    /// There is no such blob or artifact in the cache.
    #[error("{what} is not in the cache")]
    Absent {
        /// What was named.
        what: String,
    },
}

impl CacheError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// One blob of the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its digest.
    pub digest: Digest,
    /// Allocated bytes.
    pub allocated: u64,
    /// Its full size.
    pub size: u64,
    /// Whether it is complete and verified.
    pub sealed: bool,
    /// Last use.
    pub used: SystemTime,
    /// Whether some process has it open.
    pub open: bool,
}

/// A handle on a cache directory; clones share it, as do other processes on the same directory.
#[derive(Clone, Debug)]
pub struct Cache {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: Layout,
    space: Space,
    health: Health,
}

impl Cache {
    /// Opens or makes the cache.
    ///
    /// # Errors
    /// [`CacheError::Unusable`] when the directory holds something else or another version.
    pub fn open(config: CacheConfig) -> Result<Self, CacheError> {
        let layout = Layout::open(&config.dir)?;
        let cache = Self {
            inner: Arc::new(Inner {
                layout,
                space: Space::new(config.limit),
                health: Health::default(),
            }),
        };
        cache.sweep();
        Ok(cache)
    }

    fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.layout().dir()
    }

    /// Whether the directory is on overlayfs, which is a file system on others.
    pub fn is_on_overlay(&self) -> bool {
        /// `OVERLAYFS_SUPER_MAGIC` (include/uapi/linux/magic.h).
        const OVERLAYFS: u64 = 0x794c_7630;
        rustix::fs::statfs(self.dir()).is_ok_and(|stat| stat.f_type as u64 == OVERLAYFS)
    }

    /// The unit, in bytes, in which a blob of `size` bytes becomes present.
    pub fn chunk(size: u64) -> u64 {
        u64::from(chunkmap::chunk_size(size))
    }

    /// Opens a blob of `size` bytes, making an empty partial one where there is none. While the entry lives, nobody evicts it.
    pub fn entry(&self, digest: &Digest, size: u64) -> Result<Entry, CacheError> {
        Entry::open(self, digest, size)
    }

    /// Bytes of a blob that are here, found without opening it for use.
    pub fn present(&self, digest: &Digest, size: u64) -> u64 {
        if self.sealed_len(digest) == Some(size) {
            return size;
        }
        let load = || {
            let map = disk::open(&self.layout().map(digest), Access::Read).ok()?;
            chunkmap::ChunkMap::load(map, digest, size).ok()?
        };
        load().map_or(0, |map| map.present(crate::base::ByteRange::new(0, size)))
    }

    /// Whether a blob is complete and verified.
    pub fn is_sealed(&self, digest: &Digest) -> bool {
        self.sealed_len(digest).is_some()
    }

    fn sealed_len(&self, digest: &Digest) -> Option<u64> {
        let found = std::fs::symlink_metadata(self.layout().sealed(digest)).ok()?;
        found.is_file().then_some(found.len())
    }

    /// Whether a blob of `size` bytes is complete and verified; a file of another length is not it.
    pub fn is_sealed_as(&self, digest: &Digest, size: u64) -> bool {
        self.sealed_len(digest) == Some(size)
    }

    /// Removes a sealed file whose content does not have its digest; whether it did. Reads all of it, and may be called while
    /// it is open elsewhere: whoever has it open reads on from a file without a name.
    pub fn discard_wrong(&self, digest: &Digest) -> Result<bool, CacheError> {
        let removed = Entry::discard_wrong(self, digest)?;
        if removed {
            self.sweep_removed();
            tracing::warn!(%digest, "a sealed file in the cache was damaged and is removed; it is fetched again");
        }
        Ok(removed)
    }

    /// Keeps small content whose digest was checked (a manifest, a config). Best effort: a failure is logged.
    pub fn put(&self, digest: &Digest, content: &[u8]) {
        debug_assert_eq!(Digest::of(content), *digest);
        if self.is_sealed_as(digest, content.len() as u64) {
            return;
        }
        let path = self.layout().sealed(digest);
        let keep = || layout::replace(&path, content).map_err(CacheError::io("write", &path));
        let kept = self.reserve(content.len() as u64, keep);
        if let Err(error) = kept {
            self.failed(&error);
            tracing::debug!(%digest, %error, "not kept in the cache");
        }
    }

    /// Reads a sealed blob of at most `limit` bytes whole and checks its digest again; `None` when that is not to be had.
    pub fn get(&self, digest: &Digest, limit: u64) -> Option<Bytes> {
        let content = self.peek(digest, limit)?;
        if content.is_none()
            && let Err(error) = self.discard_wrong(digest)
        {
            tracing::warn!(%digest, %error, "a damaged blob stays in the cache");
        }
        content
    }

    /// As [`Cache::get`]; `Some(None)` when its digest is not right. Leaves it where it is.
    fn peek(&self, digest: &Digest, limit: u64) -> Option<Option<Bytes>> {
        let content = disk::read(&self.layout().sealed(digest), limit).ok()?;
        let right = Digest::of(&content) == *digest;
        Some(right.then(|| content.into()))
    }

    /// Remembers what a tag points at. Best effort: a failure is logged.
    pub fn set_tag(&self, record: &TagRecord) {
        let dir = self.layout().tags_dir();
        if let Err(error) = tags::set(&dir, record).map_err(CacheError::io("write a tag to", &dir))
        {
            self.failed(&error);
            tracing::debug!(name = record.name, %error, "a tag's digest is not kept in the cache");
        }
    }

    /// What `name` (`host/path:tag`) was last known to point at.
    pub fn tag(&self, name: &str) -> Option<TagRecord> {
        tags::get(&self.layout().tags_dir(), name)
    }

    /// Every tag that is remembered, by name.
    pub fn tags(&self) -> Vec<TagRecord> {
        tags::list(&self.layout().tags_dir())
    }

    /// Forgets a tag.
    pub fn remove_tag(&self, name: &str) -> Result<(), CacheError> {
        tags::remove(&self.layout().tags_dir(), name).map_err(|_| CacheError::Absent {
            what: name.to_owned(),
        })
    }

    /// Names an artifact whose blobs are all sealed in `index.json`, so that ordinary tools find it. Best effort: a failure is logged.
    pub fn publish(
        &self,
        name: &str,
        media_type: &str,
        digest: &Digest,
        size: u64,
        artifact_type: Option<&str>,
    ) {
        let path = self.layout().index();
        let published = self.locked(|| {
            index::publish(&path, name, media_type, digest, size, artifact_type)
                .map_err(CacheError::io("write", &path))
        });
        if let Err(error) = published {
            self.failed(&error);
            tracing::debug!(name, %error, "not entered in the cache's index.json");
        }
    }

    /// The artifacts that are whole.
    pub fn published(&self) -> Vec<Published> {
        index::list(&self.layout().index()).unwrap_or_default()
    }

    /// Runs `action` under the cache's exclusive lock, which all processes respect. Not reentrant.
    ///
    /// # Errors
    /// When somebody keeps the lock for longer than [`lock::PATIENCE`], beside those of `action`.
    fn locked<T>(&self, action: impl FnOnce() -> Result<T, CacheError>) -> Result<T, CacheError> {
        let path = self.layout().lock();
        let file = disk::open(&path, Access::Make).map_err(CacheError::io("open", &path))?;
        lock::exclusive(&file, lock::PATIENCE).map_err(CacheError::io("lock", &path))?;
        action()
    }
}
