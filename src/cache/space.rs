//! Room: what the cache takes, what must go, what is damaged.
//!
//! What is counted is what the files allocate (`st_blocks`), partial blobs and their maps included. Each process keeps an
//! estimate that it raises with each reservation and replaces by a scan of the directory when the limit comes near or the
//! estimate is old, so that several processes see each other's bytes.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use super::chunkmap::ChunkMap;
use super::evict::{self, Candidate};
use super::{BlobInfo, Cache, CacheError, index, lock};
use crate::base::{ByteRange, Digest, Hasher, lock as guard};

/// An estimate older than this is replaced by a scan.
const FRESH: Duration = Duration::from_secs(1);
/// After an eviction that freed too little, the next one waits this long: a full cache must not be scanned at each read.
const EVICT_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// With less room left than this, the estimate is not trusted.
const NEAR: u64 = 256 << 20;
/// Eviction frees this part of the limit beyond what is needed, so that not every part that arrives evicts.
const SLACK: u64 = 50;
/// The largest manifest that is searched for the blobs that it names.
const LARGEST_MANIFEST: u64 = 16 << 20;

/// How full the cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Allocated bytes, all blobs counted.
    pub allocated: u64,
    /// The limit.
    pub limit: u64,
    /// What may still be added: bounded by the limit and by the disk.
    pub free: u64,
}

/// What `verify` found out about one blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Its digest, or for a partial blob the checksum of each chunk, is right.
    Sound,
    /// It was damaged and has been removed, or the damaged chunks of it have.
    Removed,
    /// It is damaged, and in use.
    DamagedInUse,
}

#[derive(Debug)]
pub(super) struct Space {
    limit: u64,
    estimate: Mutex<Option<(u64, Instant)>>,
    /// Held from the decision that there is room until the room is taken.
    reserving: Mutex<()>,
    /// When eviction last found nothing to evict.
    exhausted: Mutex<Option<Instant>>,
    /// When the lock was last waited for in vain: not every part that arrives is to wait for it again.
    stuck: Mutex<Option<Instant>>,
}

impl Space {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            estimate: Mutex::new(None),
            reserving: Mutex::new(()),
            exhausted: Mutex::new(None),
            stuck: Mutex::new(None),
        }
    }

    /// Takes note of what is allocated now.
    fn note(&self, bytes: u64) {
        *guard(&self.estimate) = Some((bytes, Instant::now()));
    }
}

/// One blob's files.
struct Found {
    digest: Digest,
    size: u64,
    allocated: u64,
    used: SystemTime,
    sealed: bool,
    /// No blob, but something that was made of one: it takes room and may go, and is not listed.
    aside: bool,
    data: PathBuf,
}

impl Found {
    fn is_open(&self) -> bool {
        File::open(&self.data)
            .and_then(|file| lock::try_exclusive(&file))
            .is_ok_and(|alone| !alone)
    }
}

impl Cache {
    /// How full the cache is, as of a second ago at most.
    pub fn usage(&self) -> Usage {
        let space = &self.inner.space;
        let allocated = self.estimate().unwrap_or(0);
        let disk =
            rustix::fs::statvfs(self.dir()).map_or(u64::MAX, |stat| stat.f_bavail * stat.f_frsize);
        Usage {
            allocated,
            limit: space.limit,
            free: space.limit.saturating_sub(allocated).min(disk),
        }
    }

    fn estimate(&self) -> Result<u64, CacheError> {
        let mut estimate = guard(&self.inner.space.estimate);
        match *estimate {
            Some((bytes, at)) if at.elapsed() < FRESH => Ok(bytes),
            _ => {
                let bytes = self.scan()?.iter().map(|found| found.allocated).sum();
                *estimate = Some((bytes, Instant::now()));
                Ok(bytes)
            }
        }
    }

    /// Has `allocate` take `bytes` more when they fit under the limit, evicting what nobody uses.
    ///
    /// Far from the limit the estimate is good enough. Near it, look, decision and allocation happen under the lock that all
    /// processes respect, so that no two of them take the same room.
    pub(super) fn reserve(
        &self,
        bytes: u64,
        allocate: impl FnOnce() -> Result<(), CacheError>,
    ) -> Result<(), CacheError> {
        let space = &self.inner.space;
        let _alone = guard(&space.reserving);
        let known = self.estimate()?;
        if known.saturating_add(bytes).saturating_add(NEAR) <= space.limit {
            allocate()?;
            space.note(known.saturating_add(bytes));
            return Ok(());
        }
        let recently = |at: &Option<Instant>| at.is_some_and(|at| at.elapsed() < lock::PATIENCE);
        if recently(&guard(&space.stuck)) {
            return Err(CacheError::Full { wanted: bytes });
        }
        let reserved = self.locked(|| {
            let found = self.scan()?;
            let mut allocated = found.iter().map(|blob| blob.allocated).sum::<u64>();
            if allocated.saturating_add(bytes) > space.limit {
                let full = || CacheError::Full { wanted: bytes };
                if guard(&space.exhausted).is_some_and(|at| at.elapsed() < EVICT_AGAIN_AFTER) {
                    return Err(full());
                }
                let target = space
                    .limit
                    .saturating_sub(bytes)
                    .saturating_sub(space.limit / SLACK);
                allocated = self.evict_from(found, target)?;
                if allocated.saturating_add(bytes) > space.limit {
                    *guard(&space.exhausted) = Some(Instant::now());
                    return Err(full());
                }
            }
            allocate()?;
            space.note(allocated.saturating_add(bytes));
            Ok(())
        });
        if let Err(CacheError::Io { source, .. }) = &reserved
            && source.kind() == io::ErrorKind::TimedOut
        {
            *guard(&space.stuck) = Some(Instant::now());
        }
        reserved
    }

    /// Evicts blobs that nobody uses, least recently used first, until at most `target` bytes are allocated. Returns what is.
    pub fn evict(&self, target: u64) -> Result<u64, CacheError> {
        self.locked(|| self.evict_from(self.scan()?, target))
    }

    /// Evicts from what a scan found. Under the lock.
    fn evict_from(&self, mut found: Vec<Found>, target: u64) -> Result<u64, CacheError> {
        let mut allocated: u64 = found.iter().map(|blob| blob.allocated).sum();
        let candidates: Vec<_> = found
            .iter()
            .map(|blob| Candidate {
                allocated: blob.allocated,
                used: blob.used,
            })
            .collect();
        for at in evict::order(&candidates) {
            if allocated <= target {
                break;
            }
            if self.remove_unused(&mut found[at])? {
                tracing::info!(digest = %found[at].digest, bytes = found[at].allocated, "evicted");
                allocated = allocated.saturating_sub(found[at].allocated);
            }
        }
        self.inner.space.note(allocated);
        Ok(allocated)
    }

    /// Removes one blob.
    ///
    /// # Errors
    /// [`CacheError::InUse`], [`CacheError::Absent`].
    pub fn remove(&self, digest: &Digest) -> Result<(), CacheError> {
        self.locked(|| {
            let mut any = false;
            for mut found in self
                .scan()?
                .into_iter()
                .filter(|found| found.digest == *digest)
            {
                any = true;
                if !self.remove_unused(&mut found)? {
                    return Err(CacheError::InUse { digest: *digest });
                }
            }
            if any {
                Ok(())
            } else {
                Err(CacheError::Absent {
                    what: digest.to_string(),
                })
            }
        })?;
        *guard(&self.inner.space.estimate) = None;
        Ok(())
    }

    /// Removes a blob's files unless somebody uses them; the artifacts that need it leave the index first. Under the lock.
    fn remove_unused(&self, found: &mut Found) -> Result<bool, CacheError> {
        let failed = |error| CacheError::io("remove", &found.data)(error);
        let file = match File::open(&found.data) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(failed(error)),
        };
        if !lock::try_exclusive(&file).map_err(failed)? {
            return Ok(false);
        }
        if found.sealed {
            self.unpublish_users(&found.digest);
        }
        // Data before map: a map without its data is never believed.
        fs::remove_file(&found.data).map_err(failed)?;
        if !found.sealed && !found.aside {
            let _ = fs::remove_file(self.layout().map(&found.digest));
        }
        Ok(true)
    }

    /// Takes the artifacts that a blob belongs to out of the index.
    pub(super) fn unpublish_users(&self, blob: &Digest) {
        let path = self.layout().index();
        let needle = blob.hex();
        let whole = |manifest: &Digest| {
            manifest != blob
                && self.get(manifest, LARGEST_MANIFEST).is_some_and(|bytes| {
                    !bytes
                        .windows(needle.len())
                        .any(|window| window == needle.as_bytes())
                })
        };
        if let Err(error) = index::retain(&path, whole) {
            tracing::warn!(%error, "the cache's index.json may name an artifact that is not whole");
        }
    }

    /// All blobs, most recently used first.
    pub fn list(&self) -> Result<Vec<BlobInfo>, CacheError> {
        let mut blobs: Vec<_> = self
            .scan()?
            .into_iter()
            .filter(|found| !found.aside)
            .map(|found| BlobInfo {
                digest: found.digest,
                allocated: found.allocated,
                size: found.size,
                sealed: found.sealed,
                used: found.used,
                open: found.is_open(),
            })
            .collect();
        blobs.sort_by(|a, b| b.used.cmp(&a.used).then(a.digest.cmp(&b.digest)));
        Ok(blobs)
    }

    /// Evicts down to `target` bytes and removes what crashes left behind. Returns what is allocated then.
    pub fn gc(&self, target: u64) -> Result<u64, CacheError> {
        let allocated = self.evict(target)?;
        self.locked(|| {
            for entry in list_dir(&self.layout().partial_dir())? {
                let path = entry.path();
                let orphan = path.extension().is_some_and(|e| e == "map")
                    && !path.with_extension("data").exists();
                if orphan {
                    let _ = fs::remove_file(path);
                }
            }
            let path = self.layout().index();
            index::retain(&path, |manifest| self.is_sealed(manifest))
                .map_err(CacheError::io("write", &path))
        })?;
        Ok(allocated)
    }

    /// Reads every blob again and removes what is damaged, reporting each as it is done.
    pub fn verify(&self, mut report: impl FnMut(&BlobInfo, Verdict)) -> Result<(), CacheError> {
        for info in self.list()? {
            let verdict = if info.sealed {
                self.verify_sealed(&info)
            } else {
                self.verify_partial(&info)
            };
            match verdict {
                Ok(verdict) => report(&info, verdict),
                // Evicted or sealed meanwhile.
                Err(CacheError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(CacheError::Absent { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn verify_sealed(&self, info: &BlobInfo) -> Result<Verdict, CacheError> {
        let path = self.layout().sealed(&info.digest);
        let failed = |error| CacheError::io("read", &path)(error);
        let mut file = File::open(&path).map_err(failed)?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(digest = %info.digest, %error, "unreadable");
                    break;
                }
            }
        }
        if hasher.finish() == info.digest {
            return Ok(Verdict::Sound);
        }
        match self.remove(&info.digest) {
            Ok(()) => Ok(Verdict::Removed),
            Err(CacheError::InUse { .. }) => Ok(Verdict::DamagedInUse),
            Err(error) => Err(error),
        }
    }

    fn verify_partial(&self, info: &BlobInfo) -> Result<Verdict, CacheError> {
        let (data, map) = (
            self.layout().data(&info.digest),
            self.layout().map(&info.digest),
        );
        let failed = |error| CacheError::io("read", &data)(error);
        let data = File::open(&data).map_err(failed)?;
        let map = File::options()
            .read(true)
            .write(true)
            .open(map)
            .map_err(failed)?;
        let Some(map) = ChunkMap::load(map, &info.digest, info.size).map_err(failed)? else {
            return Ok(Verdict::Sound); // nothing of it counts as present
        };
        let mut sound = true;
        for start in (0..info.size).step_by(1 << 20) {
            let piece = ByteRange::at(start, 1 << 20);
            let gaps = map.missing(piece);
            let mut from = start;
            for end in gaps
                .iter()
                .map(|gap| gap.start())
                .chain([piece.end().min(info.size)])
            {
                let present = ByteRange::new(from, end);
                sound &= map
                    .check(present, |buffer, at| data.read_exact_at(buffer, at))
                    .map_err(failed)?;
                from = gaps
                    .iter()
                    .find(|gap| gap.start() == end)
                    .map_or(end, |gap| gap.end());
            }
        }
        Ok(if sound {
            Verdict::Sound
        } else {
            Verdict::Removed
        })
    }

    fn scan(&self) -> Result<Vec<Found>, CacheError> {
        let mut blobs = Vec::new();
        for (dir, suffix, sealed, aside) in [
            (self.layout().sealed_dir(), "", true, false),
            (self.layout().partial_dir(), ".data", false, false),
            (self.layout().unpacked_dir(), ".tar", false, true),
            (self.layout().notes_dir(), ".listing", false, true),
            (self.layout().notes_dir(), ".unpacked", false, true),
        ] {
            for entry in list_dir(&dir)? {
                let name = entry.file_name();
                let Some(digest) = name
                    .to_str()
                    .and_then(|name| name.strip_suffix(suffix))
                    .and_then(|hex| Digest::from_hex(hex).ok())
                else {
                    continue;
                };
                // Gone since the directory was listed: not here.
                let Ok(metadata) = entry.metadata() else {
                    continue;
                };
                let map = if sealed || aside {
                    0
                } else {
                    blocks(fs::metadata(self.layout().map(&digest)))
                };
                blobs.push(Found {
                    digest,
                    size: metadata.len(),
                    allocated: metadata.blocks() * 512 + map,
                    used: metadata.accessed().unwrap_or(SystemTime::UNIX_EPOCH),
                    sealed,
                    aside,
                    data: entry.path(),
                });
            }
        }
        Ok(blobs)
    }
}

fn blocks(metadata: io::Result<fs::Metadata>) -> u64 {
    metadata.map_or(0, |metadata| metadata.blocks() * 512)
}

fn list_dir(dir: &std::path::Path) -> Result<Vec<fs::DirEntry>, CacheError> {
    let entries = fs::read_dir(dir).map_err(CacheError::io("list", dir))?;
    Ok(entries.flatten().collect())
}
