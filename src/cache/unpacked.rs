//! The uncompressed form of a compressed layer, while it is made and afterwards.
//!
//! Its life, and the order that keeps every crash harmless:
//! 1. `unpacked/<hex of the layer>.tar` is made, and the exclusive flock(2) on it taken: one process makes it.
//! 2. It only grows, from front to back. Its length is what may be read, by other processes too.
//! 3. When the layer has ended and its digest was right: a. cut to its length, which gives back only what was reserved behind it;
//!    b. fdatasync; c. under the cache's lock, rename to `blobs/sha256/<hex>` under the digest of the uncompressed bytes, unless they are
//!    there; d. fsync of the directory; e. the note that says which blob the layer became. From then on it is a sealed blob like any
//!    other, evicted and verified as such.
//! 4. When anything fails, the file is removed. So is one that nobody has locked, for that was left by a crash; it is never
//!    shortened, for somebody may be reading it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::disk::{self, Access, sync_dir};
use super::entry::{self, Entry};
use super::lock;
use super::notes::NoteKind;
use super::{Cache, CacheError};
use crate::base::{ByteRange, Digest};

/// Room is taken in steps of this many bytes.
const STEP: u64 = 16 << 20;

/// The note on a layer: which blob it became.
#[derive(Serialize, Deserialize)]
struct Became {
    digest: Digest,
    size: u64,
}

/// Who makes the uncompressed form of a layer.
#[derive(Debug)]
pub enum Unpacking {
    /// We do.
    Ours(Unpacker),
    /// Another process does.
    Others(Growing),
}

/// A file that grows from front to back; clones share it.
#[derive(Clone, Debug)]
pub struct Growing {
    file: Arc<File>,
    path: PathBuf,
}

impl Growing {
    /// Up to where it can be read.
    pub fn len(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    /// Whether nothing can be read yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of a range that lies before [`Self::len`].
    pub fn read(&self, range: ByteRange) -> Result<Bytes, CacheError> {
        let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
        let mut buffer = vec![0; len];
        disk::read_exact(&self.file, &mut buffer, range.start())
            .map_err(CacheError::io("read", &self.path))?;
        Ok(buffer.into())
    }

    /// Whether whoever made it has ended, well or not. Only for a file that another process makes.
    pub fn is_left(&self) -> bool {
        let left = lock::try_exclusive(&self.file).unwrap_or(true);
        if left {
            // Only asked: whoever goes on takes the lock for himself.
            let _ = rustix::fs::flock(&*self.file, rustix::fs::FlockOperation::Unlock);
        }
        left
    }
}

/// Writes the uncompressed form of a layer. Dropped before it is finished, it leaves nothing.
#[derive(Debug)]
pub struct Unpacker {
    cache: Cache,
    layer: Digest,
    growing: Growing,
    at: u64,
    reserved: u64,
    finished: bool,
}

impl Cache {
    /// The sealed uncompressed form of a layer, when it is here.
    pub fn unpacked(&self, layer: &Digest) -> Option<Entry> {
        let (digest, size) = self.unpacked_as(layer)?;
        Entry::open_sealed(self, &digest, size).ok().flatten()
    }

    /// Digest and size of a layer's uncompressed form, when it was ever made; it may have been evicted.
    pub fn unpacked_as(&self, layer: &Digest) -> Option<(Digest, u64)> {
        let note = self.note(NoteKind::Unpacked, layer)?;
        let became: Became = serde_json::from_slice(&note).ok()?;
        Some((became.digest, became.size))
    }

    /// Takes note of what a layer's uncompressed form is, for [`Cache::unpacked_as`].
    pub fn note_unpacked(&self, layer: &Digest, digest: &Digest, size: u64) {
        let became = Became {
            digest: *digest,
            size,
        };
        let note = serde_json::to_vec(&became).unwrap_or_default();
        self.set_note(NoteKind::Unpacked, layer, &note);
    }

    /// Begins to make the uncompressed form of a layer, unless another process is at it.
    pub fn unpack(&self, layer: &Digest) -> Result<Unpacking, CacheError> {
        let path = self
            .layout()
            .unpacked_dir()
            .join(format!("{}.tar", layer.hex()));
        let failed = || CacheError::io("open", &path);
        // Every pass but the last saw another process begin or end.
        for _ in 0..100 {
            let file = disk::open(&path, Access::Make).map_err(failed())?;
            let alone = lock::try_exclusive(&file).map_err(failed())?;
            let open = file.metadata().map_err(failed())?;
            let named = names(&path, &file);
            let growing = Growing {
                file: Arc::new(file),
                path: path.clone(),
            };
            match (alone, named) {
                (_, false) => {}
                (false, true) => return Ok(Unpacking::Others(growing)),
                (true, true) if open.len() > 0 => {
                    // Left by a crash.
                    disk::remove(&path).map_err(CacheError::io("remove", &path))?;
                }
                (true, true) => {
                    return Ok(Unpacking::Ours(Unpacker {
                        cache: self.clone(),
                        layer: *layer,
                        growing,
                        at: 0,
                        reserved: 0,
                        finished: false,
                    }));
                }
            }
        }
        Err(failed()(io::ErrorKind::ResourceBusy.into()))
    }
}

impl Unpacker {
    /// What is written, for readers.
    pub fn growing(&self) -> Growing {
        self.growing.clone()
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`CacheError::Full`] when neither eviction nor the disk gives the room.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), CacheError> {
        let end = self.at.saturating_add(bytes.len() as u64);
        while end > self.reserved {
            let (file, from) = (Arc::clone(&self.growing.file), self.reserved);
            let allocate = || match disk::allocate(&file, from, STEP) {
                Ok(_) => Ok(()),
                Err(error) if disk::is_full(&error) => Err(CacheError::Full { wanted: STEP }),
                Err(error) => Err(CacheError::io("allocate", &self.growing.path)(error)),
            };
            self.cache.reserve(STEP, allocate)?;
            self.reserved += STEP;
        }
        let written = disk::write(&self.growing.file, bytes, self.at);
        written.map_err(|error| {
            if disk::is_full(&error) {
                return CacheError::Full {
                    wanted: bytes.len() as u64,
                };
            }
            CacheError::io("write", &self.growing.path)(error)
        })?;
        self.at = end;
        Ok(())
    }

    /// All was written, and the layer's own digest is right; `digest` is that of what was written. Seals it.
    pub fn finish(mut self, digest: &Digest) -> Result<Entry, CacheError> {
        let (path, size) = (self.growing.path.clone(), self.at);
        let sealed = self.cache.layout().sealed(digest);
        let file = &self.growing.file;
        // What was allocated beyond the end is given back.
        disk::set_len(file, size).map_err(CacheError::io("cut", &path))?;
        disk::sync(file).map_err(CacheError::io("sync", &path))?;
        self.cache.locked(|| {
            // The same bytes may be here already, compressed in another way, and be in use.
            if self.cache.is_sealed_as(digest, size) {
                return Ok(());
            }
            disk::rename(&path, &sealed).map_err(CacheError::io("rename", &path))?;
            self.finished = true;
            // From exclusive to shared: from here on it is a blob in use.
            lock::shared(file, lock::PATIENCE).map_err(CacheError::io("lock", &sealed))
        })?;
        let dir = self.cache.layout().sealed_dir();
        sync_dir(&dir).map_err(CacheError::io("sync", &dir))?;
        self.cache.note_unpacked(&self.layer, digest, size);
        let entry = Entry::open_sealed(&self.cache, digest, size)?;
        entry.ok_or_else(|| CacheError::Absent {
            what: digest.to_string(),
        })
    }
}

impl Drop for Unpacker {
    fn drop(&mut self) {
        if !self.finished && names(&self.growing.path, &self.growing.file) {
            let _ = disk::remove(&self.growing.path);
        }
    }
}

/// Whether `path` still leads to this file.
pub(super) fn names(path: &Path, file: &File) -> bool {
    file.metadata().is_ok_and(|open| entry::names(path, &open))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cache::CacheConfig;

    fn cache(dir: &std::path::Path, limit: u64) -> Cache {
        Cache::open(CacheConfig {
            dir: dir.to_owned(),
            limit,
        })
        .unwrap()
    }

    fn ours(unpacking: Unpacking) -> Unpacker {
        match unpacking {
            Unpacking::Ours(unpacker) => unpacker,
            Unpacking::Others(_) => panic!("another process?"),
        }
    }

    #[test]
    fn what_was_unpacked_is_a_sealed_blob_that_the_layer_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 1 << 30);
        let (layer, content) = (Digest::of(b"compressed"), b"uncompressed".as_slice());
        assert!(cache.unpacked(&layer).is_none());
        let mut unpacker = ours(cache.unpack(&layer).unwrap());
        unpacker.push(&content[..2]).unwrap();
        let Unpacking::Others(growing) = cache.unpack(&layer).unwrap() else {
            panic!("one makes it");
        };
        assert_eq!((growing.len(), growing.is_left()), (2, false));
        unpacker.push(&content[2..]).unwrap();
        assert_eq!(growing.read(ByteRange::new(0, 12)).unwrap(), content);
        assert!(cache.usage().allocated >= STEP, "what grows is counted");

        let digest = Digest::of(content);
        let entry = unpacker.finish(&digest).unwrap();
        assert!(entry.is_sealed());
        assert_eq!(
            entry.read(ByteRange::new(0, 12)).unwrap().as_deref(),
            Some(content)
        );
        assert_eq!(
            cache.evict(0).unwrap() / 4096,
            1,
            "it is in use, its note went"
        );
        drop((entry, growing));
        cache.set_note(
            NoteKind::Unpacked,
            &layer,
            &serde_json::to_vec(&Became { digest, size: 12 }).unwrap(),
        );
        assert!(cache.unpacked(&layer).is_some());
        cache.remove(&digest).unwrap();
        assert!(cache.unpacked(&layer).is_none());
        assert_eq!(cache.unpacked_as(&layer), Some((digest, 12)));
    }

    #[test]
    fn what_a_crash_left_is_begun_anew_and_what_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 1 << 30);
        let layer = Digest::of(b"compressed");
        let path = dir
            .path()
            .join(format!("ocifs/unpacked/{}.tar", layer.hex()));
        fs::write(&path, "half").unwrap();
        let left = Growing {
            file: Arc::new(File::open(&path).unwrap()),
            path: path.clone(),
        };
        let unpacker = ours(cache.unpack(&layer).unwrap());
        assert_eq!(unpacker.growing().len(), 0);
        assert_eq!(left.len(), 4, "whoever reads it may go on");
        drop(unpacker);
        assert!(!path.exists());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 40 << 20);
        let mut unpacker = ours(cache.unpack(&Digest::of(b"bomb")).unwrap());
        let piece = vec![0; 1 << 20];
        let refused = (0..100).find_map(|_| unpacker.push(&piece).err());
        assert!(matches!(refused, Some(CacheError::Full { .. })));
        assert!(unpacker.growing().len() <= 40 << 20);
    }
}
