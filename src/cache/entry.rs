//! One blob of the cache, sealed or on its way.
//!
//! A blob's life, and the order that keeps every crash harmless, of the process and of the machine:
//! 1. Beginning. `partial/<hex>.data` is made empty, the exclusive flock(2) on it taken, the map written, and last the data
//!    file given its length. A data file without its length has no valid map.
//! 2. Chunks arrive: bytes, then checksum (`chunkmap.rs`). Nothing is synced; what a power cut loses, the checksum finds.
//! 3. Sealing, once the caller has found the SHA-256 of the whole file right:
//!    a. fdatasync of the data. When that fails the file goes as in 4: the kernel tells of lost pages once, and the next
//!    fdatasync would say that all is well.
//!    b. under the cache's lock, if the name still leads to this file, rename to `blobs/sha256/<hex>`;
//!    c. fsync of both directories;
//!    d. state "sealed" in the map for other processes; e. map removed. One that stays is swept (`sweep.rs`).
//! 4. Discarding, when the SHA-256 is wrong:
//!    a. state "discarded" in the map, before anybody in this process is told: whoever is may begin the blob anew at once, and would take
//!    the wrong bytes for those of an earlier run;
//!    b. under the cache's lock, map removed, then data taken away: whoever finds new data finds no old map. Whoever opens the blob
//!    between a and b does b himself. Those who have the files open read on from one under `removed/`, and learn of it from the state.
//!
//! Whoever uses the blob holds a shared flock(2) on the data file, which stays the same file through sealing.
//! The file is never shortened and never punched: it may be mapped, or be read by the kernel in our place.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rustix::fs::{Timespec, Timestamps};

use super::chunkmap::{ChunkMap, State};
use super::disk::{self, Access, sync_dir};
use super::lock::{self, Claim};
use super::mapped::{Data, Map};
use super::{Cache, CacheError};
use crate::base::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::base::{ByteRange, Digest, Hasher};

/// The last use of a blob is noted again only when the note is older than this.
const TOUCH_AFTER: Duration = Duration::from_secs(1);

/// So many milliseconds pass before the disk is asked again whether it has lost bytes.
const ASK_AFTER: u64 = 500;

/// So many milliseconds pass before a file is read from the disk itself again, to see whether that goes.
const PROBE_AFTER: u64 = 250;

/// Fewer bytes than these are copied: that costs less than two system calls with a page table between them.
const MAP_FROM: u64 = 32 << 10;

/// An open blob of the cache. While one exists, no process evicts the blob.
#[derive(Debug)]
pub struct Entry {
    pub(super) cache: Cache,
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) data: File,
    identity: Identity,
    /// `None` when the blob was sealed already.
    pub(super) map: Option<ChunkMap>,
    state: AtomicU8,
    /// All of the data file, made when it is first of use; `None` where it cannot be had.
    mapping: OnceLock<Option<Arc<Map>>>,
    /// When a sealed file was last read from the disk itself, in milliseconds after [`Entry::opened`]; 0 before the first time.
    probed: AtomicU64,
    /// When the disk was last asked whether it has lost bytes, in milliseconds after [`Entry::opened`].
    asked: AtomicU64,
    opened: Instant,
    /// The last field: it goes once the files above are closed.
    closing: Closing,
}

/// Which file an entry is of, sealed or on its way. Numbers of files are used again, so the time at which it was made belongs to it,
/// where the file system tells that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    /// Nanoseconds after 1970; 0 where nobody knows.
    made: u64,
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Self {
        let made = metadata.created().ok();
        let made = made.and_then(|made| made.duration_since(SystemTime::UNIX_EPOCH).ok());
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            made: made.map_or(0, |made| u64::try_from(made.as_nanos()).unwrap_or(0)),
        }
    }

    /// For who has to know the file again in another process.
    pub fn to_numbers(self) -> [u64; 3] {
        [self.device, self.inode, self.made]
    }

    /// What [`Identity::to_numbers`] gave.
    pub fn from_numbers([device, inode, made]: [u64; 3]) -> Self {
        Self {
            device,
            inode,
            made,
        }
    }
}

const PARTIAL: u8 = 0;
const SEALED: u8 = 1;
const DISCARDED: u8 = 2;

impl Entry {
    /// Opens a blob of the cache, making an empty partial one where there is none.
    pub(super) fn open(cache: &Cache, digest: &Digest, size: u64) -> Result<Self, CacheError> {
        // Every pass either succeeds or saw another process move the blob on; those steps are few.
        for _ in 0..100 {
            if let Some(entry) = Self::open_sealed(cache, digest, size)? {
                return Ok(entry);
            }
            if let Some(entry) = Self::open_partial(cache, digest, size)? {
                return Ok(entry);
            }
        }
        let path = cache.layout().data(digest);
        Err(CacheError::io("open", &path)(
            io::ErrorKind::ResourceBusy.into(),
        ))
    }

    /// Opens a blob that is sealed.
    pub(super) fn open_sealed(
        cache: &Cache,
        digest: &Digest,
        size: u64,
    ) -> Result<Option<Self>, CacheError> {
        let path = cache.layout().sealed(digest);
        let failed = || CacheError::io("open", &path);
        let data = match disk::open(&path, Access::Read) {
            Ok(data) => data,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed()(error)),
        };
        lock::shared(&data, lock::PATIENCE).map_err(failed())?;
        let metadata = data.metadata().map_err(failed())?;
        // Evicted, or taken away for being wrong.
        if !names(&path, &metadata) {
            return Ok(None);
        }
        if metadata.len() != size {
            return Err(CacheError::WrongLength {
                path,
                length: metadata.len(),
                size,
            });
        }
        touch(&data, &metadata);
        Ok(Some(Self {
            cache: cache.clone(),
            digest: *digest,
            size,
            data,
            identity: Identity::of(&metadata),
            map: None,
            state: AtomicU8::new(SEALED),
            mapping: OnceLock::new(),
            probed: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            opened: Instant::now(),
            closing: Closing::new(cache),
        }))
    }

    /// Removes a sealed file whose content does not have its digest, whoever has it open, so that the blob can be fetched
    /// again; whether it did. Reads all of the file.
    pub(super) fn discard_wrong(cache: &Cache, digest: &Digest) -> Result<bool, CacheError> {
        let path = cache.layout().sealed(digest);
        let file = match disk::open(&path, Access::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(CacheError::io("open", &path)(error)),
        };
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match (&file).read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CacheError::io("read", &path)(error)),
            }
        }
        if hasher.finish() == *digest {
            return Ok(false);
        }
        cache.locked(|| {
            let metadata = file.metadata().map_err(CacheError::io("look at", &path))?;
            // Only the file that was read; a right one may have taken its name.
            if !names(&path, &metadata) {
                return Ok(false);
            }
            cache.unpublish_users(digest)?;
            cache
                .take_away(&path, &file)
                .map_err(CacheError::io("remove", &path))?;
            Ok(true)
        })
    }

    /// Opens or makes the partial blob; `None` when it changed under us and the caller should look again.
    fn open_partial(cache: &Cache, digest: &Digest, size: u64) -> Result<Option<Self>, CacheError> {
        let data_path = cache.layout().data(digest);
        let map_path = cache.layout().map(digest);
        let failed = || CacheError::io("open", &data_path);
        let open_map =
            || disk::open(&map_path, Access::Make).map_err(CacheError::io("open", &map_path));
        let load =
            || ChunkMap::load(open_map()?, digest, size).map_err(CacheError::io("read", &map_path));
        // One of another length has no valid map: somebody is making it now, or nobody has it open.
        let is_made = |metadata: &fs::Metadata| metadata.len() == size && size != 0;
        let (data, mut metadata) =
            disk::open_and_look(&data_path, Access::Make).map_err(failed())?;
        let mut map = None;
        if is_made(&metadata) {
            lock::shared(&data, lock::PATIENCE).map_err(failed())?;
            metadata = data.metadata().map_err(failed())?;
            if !names(&data_path, &metadata) {
                return Ok(None);
            }
            if is_made(&metadata) {
                map = load()?;
            }
        }
        if map.is_none() {
            // Taking the exclusive lock gives up the shared one first, so two of us cannot wait for each other.
            if !lock::try_exclusive(&data).map_err(failed())? {
                if ChunkMap::is_discarded(&open_map()?) {
                    Self::remove_discarded(cache, digest, &data)?;
                    return Ok(None);
                }
                // Somebody is making the files now, or uses them as they are.
                lock::shared(&data, lock::PATIENCE).map_err(failed())?;
                drop(data);
                crate::base::rt::pause(Duration::from_millis(2));
                return Ok(None);
            }
            metadata = data.metadata().map_err(failed())?;
            if !names(&data_path, &metadata) || cache.layout().sealed(digest).exists() {
                return Ok(None);
            }
            if is_made(&metadata) {
                map = load()?;
            }
            if map.is_none() {
                // Nobody else has the file open, so cutting it off can hurt nobody.
                if metadata.len() > 0 {
                    disk::set_len(&data, 0).map_err(failed())?;
                }
                let empty = ChunkMap::reset(open_map()?, digest, size);
                map = Some(empty.map_err(CacheError::io("write", &map_path))?);
                disk::set_len(&data, size).map_err(failed())?;
            }
            // For a moment there is no lock, and whoever evicts may come.
            lock::shared(&data, lock::PATIENCE).map_err(failed())?;
            if !names(&data_path, &metadata) {
                return Ok(None);
            }
        }
        touch(&data, &metadata);
        Ok(map.map(|map| Self {
            cache: cache.clone(),
            digest: *digest,
            size,
            data,
            identity: Identity::of(&metadata),
            map: Some(map),
            state: AtomicU8::new(PARTIAL),
            mapping: OnceLock::new(),
            probed: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            opened: Instant::now(),
            closing: Closing::new(cache),
        }))
    }

    /// The blob's digest.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The blob's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Which file it is of.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether it is complete and verified.
    pub fn is_sealed(&self) -> bool {
        self.state.load(Ordering::Acquire) == SEALED
    }

    /// Whether its content was found wrong, by this or another process.
    pub fn is_discarded(&self) -> bool {
        self.state.load(Ordering::Acquire) == DISCARDED
    }

    /// The data file, for whoever reads it without us. Only bytes that are present mean anything.
    pub fn file(&self) -> &File {
        &self.data
    }

    /// The unit in which bytes become present.
    pub fn chunk(&self) -> u64 {
        self.map.as_ref().map_or(1, ChunkMap::chunk)
    }

    /// Whether the disk still gives what is on it, whatever the kernel has in memory: for those who are about to read [`Entry::file`]
    /// without us, who would be told by nobody else.
    ///
    /// # Errors
    /// What the disk says.
    pub fn probe(&self) -> Result<(), CacheError> {
        let now = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = self.probed.load(Ordering::Relaxed);
        if last > 0 && now < last.saturating_add(PROBE_AFTER) {
            return Ok(());
        }
        disk::probe(&self.data, self.size)
            .map_err(|error| CacheError::io("read", &self.path())(error))?;
        self.probed.store(now.max(1), Ordering::Relaxed);
        Ok(())
    }

    fn open_map(&self) -> Option<&ChunkMap> {
        self.map.as_ref().filter(|_| !self.is_sealed())
    }

    /// Whether all of `range` is here, as far as this process knows.
    pub fn has(&self, range: ByteRange) -> bool {
        self.open_map().is_none_or(|map| map.has(range))
    }

    /// What of `range` is not here, as far as this process knows: whole chunks, in order, neighbours merged.
    pub fn missing(&self, range: ByteRange) -> Vec<ByteRange> {
        self.open_map()
            .map_or_else(Vec::new, |map| map.missing(range))
    }

    /// Bytes of `range` that are here.
    pub fn present(&self, range: ByteRange) -> u64 {
        let range = range.intersect(ByteRange::new(0, self.size));
        self.open_map()
            .map_or(range.len(), |map| map.present(range))
    }

    /// Looks at what other processes have done to `range` and to the blob.
    pub fn refresh(&self, range: ByteRange) -> Result<(), CacheError> {
        let Some(map) = self.open_map() else {
            return Ok(());
        };
        let path = || self.cache.layout().map(&self.digest);
        match map
            .refresh(range)
            .map_err(|error| CacheError::io("read", &path())(error))?
        {
            State::Partial => {}
            State::Sealed => self.state.store(SEALED, Ordering::Release),
            State::Discarded => {
                self.state.store(DISCARDED, Ordering::Release);
                self.closing.discarded.store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Reads all of `range`; `None` when not all of it is here, or what was here turned out damaged.
    pub fn read(&self, range: ByteRange) -> Result<Option<Bytes>, CacheError> {
        if !self.is_sound(range)? {
            return Ok(None);
        }
        let failed = |error| CacheError::io("read", &self.path())(error);
        self.read_unchecked(range).map(Some).map_err(failed)
    }

    /// Fills `buffer` with the bytes from `offset` on; `false` when not all of them are here, or what was here turned out
    /// damaged.
    pub fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, CacheError> {
        if !self.is_sound(ByteRange::at(offset, buffer.len() as u64))? {
            return Ok(false);
        }
        let read = disk::read_exact(&self.data, buffer, offset);
        read.map_err(|error| CacheError::io("read", &self.path())(error))?;
        Ok(true)
    }

    /// All of `range` for the kernel to copy; `None` when not all of it is here, or what was here turned out damaged.
    pub fn share(&self, range: ByteRange) -> Result<Option<Data>, CacheError> {
        if range.len() < MAP_FROM {
            return Ok(self.read(range)?.map(Data::Owned));
        }
        if !self.is_sound(range)? {
            return Ok(None);
        }
        if let Some(Ok(mapped)) = self.mapping().map(|map| map.range(range)) {
            return Ok(Some(Data::Mapped(mapped)));
        }
        // A read finds out what is wrong, should anything be.
        let failed = |error| CacheError::io("read", &self.path())(error);
        let bytes = self.read_unchecked(range).map_err(failed)?;
        Ok(Some(Data::Owned(bytes)))
    }

    fn mapping(&self) -> Option<&Arc<Map>> {
        let make = || match Map::new(&self.data, self.size) {
            Ok(map) => Some(Arc::new(map)),
            Err(error) => {
                tracing::debug!(digest = %self.digest, %error, "a cache file is read, not mapped");
                None
            }
        };
        self.mapping.get_or_init(make).as_ref()
    }

    /// Whether all of `range` is here and every chunk of it was either written or found sound by this process.
    fn is_sound(&self, range: ByteRange) -> Result<bool, CacheError> {
        let Some(map) = self.open_map() else {
            return Ok(true);
        };
        if !map.has(range) || self.has_lost_bytes() {
            return Ok(false);
        }
        let sound = map
            .check(range, |buffer, at| disk::read_exact(&self.data, buffer, at))
            .map_err(|error| CacheError::io("read", &self.path())(error))?;
        if !sound {
            tracing::warn!(digest = %self.digest, %range, "cached bytes were damaged; fetching them again");
        }
        Ok(sound)
    }

    /// Whether the disk has lost bytes of a blob on its way since they were written; it is discarded then. The kernel tells it when it
    /// is asked, and reads on from what it has in memory until it needs that for something else.
    fn has_lost_bytes(&self) -> bool {
        let now = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = self.asked.load(Ordering::Relaxed);
        if now < last.saturating_add(ASK_AFTER) {
            return false;
        }
        self.asked.store(now, Ordering::Relaxed);
        let lost = disk::has_lost_bytes(&self.data);
        if lost {
            tracing::warn!(digest = %self.digest, "the disk has lost bytes of the cache; they are fetched again");
            self.discard();
        }
        lost
    }

    fn read_unchecked(&self, range: ByteRange) -> io::Result<Bytes> {
        let len = usize::try_from(range.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut buffer: Vec<u8> = Vec::with_capacity(len);
        while buffer.len() < len {
            let at = range.start() + buffer.len() as u64;
            if disk::read_some(&self.data, &mut buffer, at)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        // The allocator may have given more than was asked for.
        buffer.truncate(len);
        Ok(Bytes::from(buffer))
    }

    /// Claims `range` for fetching, against other processes; `None` when one of them is at it.
    pub fn claim(&self, range: ByteRange) -> Result<Option<Claim>, CacheError> {
        let map = self.map.as_ref().ok_or_else(|| self.gone())?;
        map.claim(range)
            .map_err(|error| CacheError::io("lock", &self.cache.layout().map(&self.digest))(error))
    }

    /// Claims all of the blob for one stream; `None` when another process, or this one, is fetching some of it.
    pub fn claim_all(&self) -> Result<Option<Claim>, CacheError> {
        let map = self.map.as_ref().ok_or_else(|| self.gone())?;
        map.claim_all()
            .map_err(|error| CacheError::io("lock", &self.cache.layout().map(&self.digest))(error))
    }

    /// All of it is here and will be sealed soon: the disk need not wait for that. Takes as long as the disk's queue is full.
    pub fn begin_sync(&self) {
        if self.open_map().is_some() {
            disk::begin_sync(&self.data);
        }
    }

    /// Step 3 of the blob's life. The caller has hashed the whole file and found the digest right.
    ///
    /// # Errors
    /// What the disk says. When it may have lost bytes, the entry is discarded and nothing of it may be read any more.
    pub fn seal(&self) -> Result<(), CacheError> {
        let Some(map) = self.open_map() else {
            return Ok(());
        };
        let layout = self.cache.layout();
        let (data, sealed) = (layout.data(&self.digest), layout.sealed(&self.digest));
        if let Err(error) = disk::sync(&self.data) {
            self.discard();
            return Err(CacheError::io("sync", &data)(error));
        }
        self.cache.locked(|| {
            let metadata = self
                .data
                .metadata()
                .map_err(CacheError::io("look at", &data))?;
            // The names may lead to another file by now, whose bytes nobody has hashed: after the directory was removed
            // below us, or after somebody discarded this one. The lock keeps that from happening in between.
            if names(&data, &metadata) {
                disk::rename(&data, &sealed).map_err(CacheError::io("rename", &data))
            } else if names(&sealed, &metadata) {
                Ok(()) // another process was first
            } else {
                Err(CacheError::Unusable {
                    path: data.clone(),
                    reason: "another file has taken this one's name".to_owned(),
                })
            }
        })?;
        // Right in any case; whether it is still there after a power cut is what the rest is about.
        self.state.store(SEALED, Ordering::Release);
        sync_dir(&layout.sealed_dir()).map_err(CacheError::io("sync", &sealed))?;
        sync_dir(&layout.partial_dir()).map_err(CacheError::io("sync", &data))?;
        let _ = map.set_state(State::Sealed);
        let _ = disk::remove(&layout.map(&self.digest));
        Ok(())
    }

    /// Step 4 of the blob's life: the content is wrong, nothing of it is kept.
    pub fn discard(&self) {
        let Some(map) = self.open_map() else { return };
        let _ = map.set_state(State::Discarded);
        self.state.store(DISCARDED, Ordering::Release);
        self.closing.discarded.store(true, Ordering::Release);
        map.forget();
        if let Err(error) = Self::remove_discarded(&self.cache, &self.digest, &self.data) {
            tracing::warn!(digest = %self.digest, %error, "wrong bytes stay in the cache until they are found wrong again");
        }
    }

    /// Step 4b, unless it is done.
    fn remove_discarded(cache: &Cache, digest: &Digest, data: &File) -> Result<(), CacheError> {
        let path = cache.layout().data(digest);
        cache.locked(|| {
            let metadata = data.metadata().map_err(CacheError::io("look at", &path))?;
            if !names(&path, &metadata) {
                return Ok(());
            }
            let _ = disk::remove(&cache.layout().map(digest));
            cache
                .take_away(&path, data)
                .map_err(CacheError::io("remove", &path))
        })
    }

    pub(super) fn path(&self) -> std::path::PathBuf {
        let layout = self.cache.layout();
        if self.is_sealed() {
            layout.sealed(&self.digest)
        } else {
            layout.data(&self.digest)
        }
    }

    pub(super) fn gone(&self) -> CacheError {
        CacheError::Unusable {
            path: self.path(),
            reason: "the blob is decided on and takes no more bytes".to_owned(),
        }
    }
}

/// Has the room of a discarded blob given back when its last entry is closed.
#[derive(Debug)]
struct Closing {
    cache: Cache,
    discarded: AtomicBool,
}

impl Closing {
    fn new(cache: &Cache) -> Self {
        Self {
            cache: cache.clone(),
            discarded: AtomicBool::new(false),
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        if *self.discarded.get_mut() {
            self.cache.sweep_removed();
        }
    }
}

/// Whether `path` still leads to the file that `open` describes.
pub(super) fn names(path: &std::path::Path, open: &fs::Metadata) -> bool {
    fs::symlink_metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (open.dev(), open.ino()))
}

/// Notes the use of a blob in its access time, whatever the mount options say of access times.
fn touch(data: &File, metadata: &fs::Metadata) {
    let recent = SystemTime::now() - TOUCH_AFTER;
    if metadata.accessed().is_ok_and(|at| at > recent) {
        return;
    }
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW as _,
    };
    let keep = Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_OMIT as _,
    };
    let _ = rustix::fs::futimens(
        data,
        &Timestamps {
            last_access: now,
            last_modification: keep,
        },
    );
}
