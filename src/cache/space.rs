//! Room: what the cache takes, what must go, what is damaged.
//!
//! What is counted is what the files allocate (`st_blocks`): blobs, partial ones and their maps, what was made of them, what is taken
//! away and still read, what crashes left. Not so the index and the tags, a few KiB that stay. Each process keeps an estimate that it raises with each reservation and replaces by a scan of the
//! directory when the limit comes near or the estimate is old, so that several processes see each other's bytes.
//!
//! An eviction, in the order that never leaves an artifact in the index that is not whole:
//! 1. the cache's lock; 2. nobody else has the file open or mapped; 3. `index.json` without the artifacts that need the blob;
//! 4. the blob's file removed; 5. the map of a partial one. When 3 fails, nothing is removed.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::chunkmap::ChunkMap;
use super::disk::{self, Access};
use super::evict::{self, Candidate};
use super::{BlobInfo, Cache, CacheError, index, lock};
use crate::base::sync::Mutex;
use crate::base::{ByteRange, Digest, lock as guard};

/// An estimate older than this is replaced by a scan, unless there is so much room that it cannot have been filled meanwhile.
const FRESH: Duration = Duration::from_secs(1);
/// Bytes a second: faster than all processes together fill a cache.
const FASTEST: u64 = 16 << 30;
/// An estimate older than this is replaced in any case.
const OLD: Duration = Duration::from_secs(30);
/// After an eviction that freed too little, the next one waits this long: a full cache must not be scanned at each read.
const EVICT_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// With less room left than this, the estimate is not trusted.
const NEAR: u64 = 256 << 20;
/// So many processes may fill the cache, each as fast as this one, before one of them takes room that another has.
const PROCESSES: u64 = 4;
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
    /// It was damaged and is taken away, or the damaged chunks of it are.
    Removed,
}

#[derive(Debug)]
pub(super) struct Space {
    limit: u64,
    estimate: Mutex<Option<Estimate>>,
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

    /// Takes note of what was found to be allocated.
    fn found(&self, bytes: u64) {
        *guard(&self.estimate) = Some(Estimate {
            found: bytes,
            grown: 0,
            at: Instant::now(),
        });
    }

    /// Takes note of what was taken since.
    fn took(&self, bytes: u64) {
        if let Some(estimate) = &mut *guard(&self.estimate) {
            estimate.grown = estimate.grown.saturating_add(bytes);
        }
    }
}

/// What this process thinks is allocated.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    /// What a scan found.
    found: u64,
    /// What this process has taken since.
    grown: u64,
    at: Instant,
}

impl Estimate {
    fn bytes(self) -> u64 {
        self.found.saturating_add(self.grown)
    }

    /// How old it may be. A scan looks at every file, and whoever wants room waits for it.
    fn fresh(self, limit: u64) -> Duration {
        let room = limit.saturating_sub(self.bytes()).saturating_sub(NEAR);
        Duration::from_secs(room / FASTEST).clamp(FRESH, OLD)
    }

    /// Whether `bytes` more fit in any case, other processes having taken in the meantime several times what this one has.
    fn surely_fits(self, bytes: u64, limit: u64) -> bool {
        let taken = self.grown.saturating_add(bytes).saturating_mul(PROCESSES);
        self.found.saturating_add(taken).saturating_add(NEAR) <= limit
    }
}

/// One blob's files.
struct Found {
    digest: Digest,
    size: u64,
    allocated: u64,
    used: SystemTime,
    kind: Kind,
    data: PathBuf,
}

/// What a file in the cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Sealed,
    Partial,
    /// No blob, but something that was made of one: it takes room and may go, and is not listed.
    Aside,
    /// It was taken away and is still read.
    Removed,
}

/// What a look at the directory found.
struct Scan {
    found: Vec<Found>,
    /// Bytes of all else: what crashes left.
    rest: u64,
}

impl Scan {
    fn allocated(&self) -> u64 {
        self.found.iter().map(|found| found.allocated).sum::<u64>() + self.rest
    }
}

impl Found {
    fn is_open(&self) -> bool {
        disk::open(&self.data, Access::Read)
            .and_then(|file| lock::try_exclusive(&file))
            .is_ok_and(|alone| !alone)
    }
}

impl Cache {
    /// How full the cache is, as of a second ago at most.
    pub fn usage(&self) -> Usage {
        let space = &self.inner.space;
        let allocated = self.estimate(|_| FRESH).map_or(0, Estimate::bytes);
        let disk =
            rustix::fs::statvfs(self.dir()).map_or(u64::MAX, |stat| stat.f_bavail * stat.f_frsize);
        Usage {
            allocated,
            limit: space.limit,
            free: space.limit.saturating_sub(allocated).min(disk),
        }
    }

    /// What is allocated, as of `fresh` ago at most.
    fn estimate(&self, fresh: impl FnOnce(Estimate) -> Duration) -> Result<Estimate, CacheError> {
        let mut estimate = guard(&self.inner.space.estimate);
        match *estimate {
            Some(estimate) if estimate.at.elapsed() < fresh(estimate) => Ok(estimate),
            _ => {
                let new = Estimate {
                    found: self.scan()?.allocated(),
                    grown: 0,
                    at: Instant::now(),
                };
                *estimate = Some(new);
                Ok(new)
            }
        }
    }

    /// Has `allocate` take `bytes` more when they fit under the limit and on the disk, evicting what nobody uses.
    ///
    /// Far from the limit the estimate is good enough. Near it, look, decision and allocation happen under the lock that all
    /// processes respect, so that no two of them take the same room.
    pub(super) fn reserve(
        &self,
        bytes: u64,
        mut allocate: impl FnMut() -> Result<(), CacheError>,
    ) -> Result<(), CacheError> {
        let space = &self.inner.space;
        let _alone = guard(&space.reserving);
        let known = self
            .estimate(|known| known.fresh(space.limit))
            .inspect_err(|error| self.failed(error))?;
        if known.surely_fits(bytes, space.limit) {
            match allocate() {
                Err(CacheError::Full { .. }) => {}
                allocated => {
                    allocated.inspect_err(|error| self.failed(error))?;
                    space.took(bytes);
                    self.worked();
                    return Ok(());
                }
            }
        }
        let recently = |at: &Option<Instant>| at.is_some_and(|at| at.elapsed() < lock::PATIENCE);
        if recently(&guard(&space.stuck)) {
            return Err(CacheError::Full { wanted: bytes });
        }
        let reserved = self.locked(|| {
            let full = || CacheError::Full { wanted: bytes };
            let exhausted =
                || guard(&space.exhausted).is_some_and(|at| at.elapsed() < EVICT_AGAIN_AFTER);
            let scan = self.scan()?;
            let mut allocated = scan.allocated();
            if allocated.saturating_add(bytes) > space.limit {
                if exhausted() {
                    return Err(full());
                }
                let least = space.limit.saturating_sub(bytes);
                let target = least.saturating_sub(space.limit / SLACK);
                allocated = self.evict_from(scan, target, least);
                if allocated.saturating_add(bytes) > space.limit {
                    *guard(&space.exhausted) = Some(Instant::now());
                    return Err(full());
                }
            }
            let mut done = allocate();
            // The disk is full before the limit is reached. What nobody uses makes room there, too.
            if matches!(done, Err(CacheError::Full { .. })) && !exhausted() {
                let target = allocated.saturating_sub(bytes.max(allocated / SLACK));
                let left = self.evict_from(self.scan()?, target, u64::MAX);
                if left < allocated {
                    allocated = left;
                    done = allocate();
                }
                if done.is_err() {
                    *guard(&space.exhausted) = Some(Instant::now());
                    self.disk_is_full();
                }
            }
            done.inspect_err(|error| self.failed(error))?;
            self.worked();
            space.found(allocated.saturating_add(bytes));
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
        self.locked(|| Ok(self.evict_from(self.scan()?, target, u64::MAX)))
    }

    /// Evicts from what a scan found until `target` is reached; nothing once it shows that not even `least` can be, for a blob that
    /// does not fit in any case must not drive out all manifests. Under the lock.
    fn evict_from(&self, scan: Scan, target: u64, least: u64) -> u64 {
        let mut allocated = scan.allocated();
        let mut found = scan.found;
        let candidates: Vec<_> = found
            .iter()
            .map(|blob| Candidate {
                allocated: blob.allocated,
                used: blob.used,
            })
            .collect();
        let mut rest: u64 = candidates.iter().map(|one| one.allocated).sum();
        for at in evict::order(&candidates) {
            if allocated <= target || allocated.saturating_sub(rest) > least {
                break;
            }
            let found = &mut found[at];
            rest = rest.saturating_sub(found.allocated);
            match self.remove_unused(found) {
                Ok(true) => {
                    tracing::info!(digest = %found.digest, bytes = found.allocated, "evicted");
                    allocated = allocated.saturating_sub(found.allocated);
                }
                Ok(false) => {}
                // Others may go all the same.
                Err(error) => {
                    tracing::debug!(digest = %found.digest, %error, "cannot be evicted");
                }
            }
        }
        self.inner.space.found(allocated);
        allocated
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
                .found
                .into_iter()
                .filter(|found| found.digest == *digest && found.kind != Kind::Removed)
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
        let file = match disk::open(&found.data, Access::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(failed(error)),
        };
        if !lock::alone(&file).map_err(failed)? {
            return Ok(false);
        }
        if found.kind == Kind::Sealed {
            self.unpublish_users(&found.digest)?;
        }
        // Map before data: whoever finds the data gone and begins anew would take the map for his. Data without a map is begun anew too.
        if found.kind == Kind::Partial {
            let _ = disk::remove(&self.layout().map(&found.digest));
        }
        disk::remove(&found.data).map_err(failed)?;
        Ok(true)
    }

    /// Takes the artifacts that a blob belongs to out of the index. Under the lock.
    ///
    /// # Errors
    /// The index still names them, and nothing of them may go.
    pub(super) fn unpublish_users(&self, blob: &Digest) -> Result<(), CacheError> {
        let path = self.layout().index();
        let needle = blob.hex();
        let whole = |manifest: &Digest| {
            manifest != blob
                && self
                    .peek(manifest, LARGEST_MANIFEST)
                    .flatten()
                    .is_some_and(|bytes| {
                        !bytes
                            .windows(needle.len())
                            .any(|window| window == needle.as_bytes())
                    })
        };
        let kept = index::retain(&path, whole).or_else(|error| {
            tracing::debug!(%error, "the cache's index.json cannot be changed; it goes");
            // A full disk has no room for a new one, and must not keep what fills it. It is made again with the next artifact.
            disk::remove(&path)
        });
        kept.map_err(CacheError::io("write", &path))
    }

    /// All blobs, most recently used first.
    pub fn list(&self) -> Result<Vec<BlobInfo>, CacheError> {
        let mut blobs: Vec<_> = self
            .scan()?
            .found
            .into_iter()
            .filter(|found| matches!(found.kind, Kind::Sealed | Kind::Partial))
            .map(|found| BlobInfo {
                digest: found.digest,
                allocated: found.allocated,
                size: found.size,
                sealed: found.kind == Kind::Sealed,
                used: found.used,
                open: found.is_open(),
            })
            .collect();
        blobs.sort_by(|a, b| b.used.cmp(&a.used).then(a.digest.cmp(&b.digest)));
        Ok(blobs)
    }

    /// Evicts down to `target` bytes and removes what crashes left behind. Returns what is allocated then.
    pub fn gc(&self, target: u64) -> Result<u64, CacheError> {
        self.sweep();
        let allocated = self.evict(target)?;
        self.locked(|| {
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

    /// What is damaged goes, whoever has it open: they read on what they have, and whoever comes next gets it anew.
    fn verify_sealed(&self, info: &BlobInfo) -> Result<Verdict, CacheError> {
        Ok(match self.discard_wrong(&info.digest)? {
            true => Verdict::Removed,
            false => Verdict::Sound,
        })
    }

    fn verify_partial(&self, info: &BlobInfo) -> Result<Verdict, CacheError> {
        let (data, map) = (
            self.layout().data(&info.digest),
            self.layout().map(&info.digest),
        );
        let failed = |error| CacheError::io("read", &data)(error);
        let data = disk::open(&data, Access::Read).map_err(failed)?;
        let map = disk::open(&map, Access::Write).map_err(failed)?;
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
                    .check(present, |buffer, at| disk::read_exact(&data, buffer, at))
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

    fn scan(&self) -> Result<Scan, CacheError> {
        self.sweep_removed();
        let layout = self.layout();
        let mut scan = Scan {
            found: Vec::new(),
            rest: 0,
        };
        for (dir, kind) in [
            (layout.sealed_dir(), Kind::Sealed),
            (layout.partial_dir(), Kind::Partial),
            (layout.unpacked_dir(), Kind::Aside),
            (layout.notes_dir(), Kind::Aside),
            (layout.removed_dir(), Kind::Removed),
        ] {
            for entry in disk::list(&dir).map_err(CacheError::io("list", &dir))? {
                // Gone since the directory was listed: not here.
                let Ok(metadata) = entry.metadata() else {
                    continue;
                };
                let mut allocated = metadata.blocks() * 512;
                let (path, name) = (entry.path(), entry.file_name());
                let digest = name.to_str().and_then(|name| digest_of(name, kind));
                if kind == Kind::Partial {
                    match digest {
                        Some(_) => allocated += blocks(&path.with_extension("map")),
                        // Its blob counts it.
                        None if path.with_extension("data").exists() => continue,
                        None => {}
                    }
                }
                let Some(digest) = digest.filter(|_| metadata.is_file()) else {
                    scan.rest += allocated;
                    continue;
                };
                scan.found.push(Found {
                    digest,
                    size: metadata.len(),
                    allocated,
                    used: metadata.accessed().unwrap_or(SystemTime::UNIX_EPOCH),
                    kind,
                    data: path,
                });
            }
        }
        Ok(scan)
    }
}

/// Of which blob a file is, by its name; `None` for what is no blob's own.
fn digest_of(name: &str, kind: Kind) -> Option<Digest> {
    let hex = match kind {
        Kind::Sealed => name,
        Kind::Partial => name.strip_suffix(".data")?,
        Kind::Aside => name.split_once('.')?.0,
        Kind::Removed => name.split_once('-')?.0,
    };
    Digest::from_hex(hex).ok()
}

fn blocks(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_believed_for_no_longer_than_the_room_could_last() {
        let known = |found| Estimate {
            found,
            grown: 0,
            at: Instant::now(),
        };
        let fresh = |found, limit| known(found).fresh(limit);
        assert_eq!(fresh(0, 1 << 30), FRESH);
        assert_eq!(fresh(1 << 40, 1 << 30), FRESH, "over the limit");
        let ten = 10 * FASTEST + NEAR;
        assert_eq!(fresh(0, ten), Duration::from_secs(10));
        assert_eq!(fresh(7 * FASTEST, ten), Duration::from_secs(3));
        assert_eq!(fresh(0, u64::MAX), OLD);
    }
}
