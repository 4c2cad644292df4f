//! The cache directory: where everything is, and which version of it this is.
//!
//! ```text
//! DIR/                             0700
//! ├── oci-layout                   {"imageLayoutVersion":"1.0.0"}: ordinary OCI tools can read the rest
//! ├── index.json                   the artifacts that are whole, by reference (`index.rs`)
//! ├── blobs/sha256/<hex>           sealed blobs: complete, and their digest was right
//! └── ocifs/
//!     ├── version                  "1\n": of everything in this directory
//!     ├── lock                     flock(2): exclusive while index.json changes or blobs are evicted
//!     ├── partial/<hex>.data       a blob on its way: sparse, of its final length
//!     ├── partial/<hex>.map        which chunks of it are there (`chunkmap.rs`)
//!     ├── tags/<hex>.json          what a tag was last known to point at (`tags.rs`)
//!     ├── unpacked/<hex>.tar       a compressed layer on its way to its uncompressed form (`unpacked.rs`)
//!     └── notes/<hex>.<kind>       what was found out about a verified layer (`notes.rs`)
//! ```
//!
//! Files that are replaced as a whole are written under a temporary name in the same directory and renamed.
//! Temporary names begin with `.tmp-`; one left by a crash is removed when the cache is opened and it is old.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::CacheError;
use crate::base::Digest;

/// The version of `ocifs/` that this program reads and writes.
pub(super) const VERSION: &str = "1\n";
/// The OCI image layout version (image-spec, image-layout.md).
const OCI_LAYOUT: &str = "{\"imageLayoutVersion\":\"1.0.0\"}";
const EMPTY_INDEX: &str = "{\"schemaVersion\":2,\"manifests\":[]}";
/// A temporary file older than this belongs to nobody any more.
const STALE_TEMPORARY: Duration = Duration::from_secs(3600);

/// The paths of one cache directory.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Opens or makes the directory; refuses one that holds something else or another version.
    pub(super) fn open(dir: &Path) -> Result<Self, CacheError> {
        let layout = Self {
            dir: dir.to_owned(),
        };
        let unusable = |reason: &str| CacheError::Unusable {
            path: dir.to_owned(),
            reason: reason.to_owned(),
        };
        match fs::read_to_string(layout.version()) {
            Ok(version) if version == VERSION => {}
            Ok(version) => {
                return Err(unusable(&format!(
                    "its format is version {:?}, this program has {:?}; use another directory",
                    version.trim(),
                    VERSION.trim()
                )));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let used = match fs::read_dir(dir) {
                    Ok(mut entries) => entries.any(|entry| {
                        entry.map_or(true, |entry| {
                            !is_temporary(&entry.path()) && entry.file_name() != "lost+found"
                        })
                    }),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                    Err(error) => return Err(CacheError::io("list", dir)(error)),
                };
                let ours = dir.join("ocifs").is_dir();
                if used && !ours {
                    return Err(unusable(
                        "it holds files that are not a cache; name an empty directory",
                    ));
                }
            }
            Err(error) => return Err(CacheError::io("read", &layout.version())(error)),
        }
        // `ocifs` first: whoever else opens the directory at this moment sees by it that the rest is ours.
        for sub in [
            dir.to_owned(),
            layout.partial_dir(),
            layout.tags_dir(),
            layout.unpacked_dir(),
            layout.notes_dir(),
            layout.sealed_dir(),
        ] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&sub)
                .map_err(CacheError::io("create", &sub))?;
        }
        layout.write_if_missing(&dir.join("oci-layout"), OCI_LAYOUT)?;
        layout.write_if_missing(&layout.index(), EMPTY_INDEX)?;
        // Last: a directory with a version file has everything else.
        layout.write_if_missing(&layout.version(), VERSION)?;
        for sub in [
            layout.dir.clone(),
            layout.partial_dir(),
            layout.tags_dir(),
            layout.notes_dir(),
            layout.sealed_dir(),
        ] {
            remove_stale_temporaries(&sub);
        }
        Ok(layout)
    }

    fn write_if_missing(&self, path: &Path, content: &str) -> Result<(), CacheError> {
        if path.exists() {
            return Ok(());
        }
        replace(path, content.as_bytes()).map_err(CacheError::io("write", path))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn index(&self) -> PathBuf {
        self.dir.join("index.json")
    }

    fn version(&self) -> PathBuf {
        self.dir.join("ocifs/version")
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.dir.join("ocifs/lock")
    }

    pub(super) fn sealed_dir(&self) -> PathBuf {
        self.dir.join("blobs/sha256")
    }

    pub(super) fn partial_dir(&self) -> PathBuf {
        self.dir.join("ocifs/partial")
    }

    pub(super) fn tags_dir(&self) -> PathBuf {
        self.dir.join("ocifs/tags")
    }

    pub(super) fn unpacked_dir(&self) -> PathBuf {
        self.dir.join("ocifs/unpacked")
    }

    pub(super) fn notes_dir(&self) -> PathBuf {
        self.dir.join("ocifs/notes")
    }

    pub(super) fn sealed(&self, digest: &Digest) -> PathBuf {
        self.sealed_dir().join(digest.hex())
    }

    pub(super) fn data(&self, digest: &Digest) -> PathBuf {
        self.partial_dir().join(format!("{}.data", digest.hex()))
    }

    pub(super) fn map(&self, digest: &Digest) -> PathBuf {
        self.partial_dir().join(format!("{}.map", digest.hex()))
    }
}

/// Writes `content` to `path` so that a reader, whenever it looks, sees the old file or the new one, and a crash
/// leaves one of the two: 1. temporary file, 2. fsync, 3. rename, 4. fsync of the directory.
pub(super) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = dir.join(format!(".tmp-{}-{unique}", std::process::id()));
    let written = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_data()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written?;
    sync_dir(dir)
}

/// Makes renames and removals in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn is_temporary(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b".tmp-"))
}

fn remove_stale_temporaries(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let now = SystemTime::now();
    for entry in entries
        .flatten()
        .filter(|entry| is_temporary(&entry.path()))
    {
        let age = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .map(|at| now.duration_since(at));
        if matches!(age, Ok(Ok(age)) if age > STALE_TEMPORARY) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_somebody_else_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "precious").unwrap();
        assert!(matches!(
            Layout::open(dir.path()),
            Err(CacheError::Unusable { .. })
        ));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn several_may_make_the_directory_at_once() {
        for _ in 0..100 {
            let dir = tempfile::tempdir().unwrap();
            let start = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        start.wait();
                        Layout::open(dir.path()).unwrap();
                    });
                }
            });
        }
    }

    #[test]
    fn another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Layout::open(dir.path()).unwrap();
        Layout::open(dir.path()).unwrap();
        fs::write(dir.path().join("ocifs/version"), "2\n").unwrap();
        assert!(matches!(
            Layout::open(dir.path()),
            Err(CacheError::Unusable { .. })
        ));
    }

    #[test]
    fn making_the_directory_may_be_interrupted_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("ocifs")).unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        Layout::open(dir.path()).unwrap();
        assert_eq!(
            fs::read_to_string(dir.path().join("oci-layout")).unwrap(),
            OCI_LAYOUT
        );
    }
}
