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
//!     ├── notes/<hex>.<kind>       what was found out about a verified layer (`notes.rs`)
//!     └── removed/<hex>-<n>        what is to go and is still read by somebody: it counts until nobody does (`sweep.rs`)
//! ```
//!
//! Files that are replaced as a whole are written under a temporary name in the same directory and renamed.
//! Temporary names begin with `.tmp-`; one left by a crash is removed when the cache is opened, or when room is needed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::disk::{self, Access, sync_dir};
use super::{CacheError, lock};
use crate::base::Digest;

/// The version of `ocifs/` that this program reads and writes.
pub(super) const VERSION: &str = "1\n";
/// The OCI image layout version (image-spec, image-layout.md).
const OCI_LAYOUT: &str = "{\"imageLayoutVersion\":\"1.0.0\"}";
const EMPTY_INDEX: &str = "{\"schemaVersion\":2,\"manifests\":[]}";
/// A version file has a few bytes.
const LONGEST_VERSION: u64 = 64;
/// What the names of temporary files begin with.
const TEMPORARY: &str = ".tmp-";
/// The permission bit that lets anybody write.
const WORLD_WRITABLE: u32 = 0o002;

/// The paths of one cache directory.
#[derive(Debug)]
pub(super) struct Layout {
    /// As it was named.
    dir: PathBuf,
    /// The same without symbolic links, for none is followed below.
    root: PathBuf,
}

impl Layout {
    /// Opens or makes the directory; refuses one that holds something else or another version, and one that somebody else can
    /// change as he likes.
    ///
    /// 1. The directory and those below it are made, each durable before the next. `ocifs` comes first: whoever else opens the
    ///    directory at this moment sees by it that the rest is ours.
    /// 2. `oci-layout` and an empty `index.json` are written, then `version`: a directory with that has everything else.
    pub(super) fn open(dir: &Path) -> Result<Self, CacheError> {
        let unusable = |reason: &str| CacheError::Unusable {
            path: dir.to_owned(),
            reason: reason.to_owned(),
        };
        make_dirs(dir).map_err(CacheError::io("create", dir))?;
        let root = dir.canonicalize().map_err(CacheError::io("look at", dir))?;
        let layout = Self {
            dir: dir.to_owned(),
            root,
        };
        layout.is_trusted(&layout.root)?;
        match disk::read(&layout.version(), LONGEST_VERSION) {
            Ok(version) if version == VERSION.as_bytes() => {}
            Ok(version) => {
                return Err(unusable(&format!(
                    "its format is version {:?}, this program has {:?}; use another directory",
                    String::from_utf8_lossy(&version).trim(),
                    VERSION.trim()
                )));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let entries = disk::list(&layout.root).map_err(CacheError::io("list", dir))?;
                let used = entries
                    .iter()
                    .any(|entry| !is_temporary(&entry.path()) && entry.file_name() != "lost+found");
                let ours = layout.root.join("ocifs").is_dir();
                if used && !ours {
                    return Err(unusable(
                        "it holds files that are not a cache; name an empty directory",
                    ));
                }
            }
            Err(error) => return Err(CacheError::io("read", &layout.version())(error)),
        }
        for sub in [
            layout.root.join("ocifs"),
            layout.partial_dir(),
            layout.tags_dir(),
            layout.unpacked_dir(),
            layout.notes_dir(),
            layout.removed_dir(),
            layout.root.join("blobs"),
            layout.sealed_dir(),
        ] {
            make_dirs(&sub).map_err(CacheError::io("create", &sub))?;
            layout.is_trusted(&sub)?;
        }
        layout.write_if_missing(&layout.root.join("oci-layout"), OCI_LAYOUT)?;
        layout.write_if_missing(&layout.index(), EMPTY_INDEX)?;
        layout.write_if_missing(&layout.version(), VERSION)?;
        Ok(layout)
    }

    /// Refuses a directory whose content somebody else decides on: another user's, or one that anybody may write to. A group that
    /// may was let in on purpose.
    fn is_trusted(&self, path: &Path) -> Result<(), CacheError> {
        let refused = |reason: String| CacheError::Unusable {
            path: path.to_owned(),
            reason,
        };
        let found = fs::symlink_metadata(path).map_err(CacheError::io("look at", path))?;
        if !found.is_dir() {
            return Err(refused("it must be a directory, and no link to one".into()));
        }
        let (owner, me) = (found.uid(), rustix::process::geteuid().as_raw());
        if owner != me && owner != 0 {
            return Err(refused(format!(
                "it belongs to user {owner}, who can change what ocifs (user {me}) reads there; name a directory of your own"
            )));
        }
        if found.mode() & WORLD_WRITABLE != 0 {
            return Err(refused(
                "anybody may write to it, and so decide what ocifs reads; take that away with `chmod o-w`".into(),
            ));
        }
        Ok(())
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
        self.root.join("index.json")
    }

    fn version(&self) -> PathBuf {
        self.root.join("ocifs/version")
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("ocifs/lock")
    }

    pub(super) fn sealed_dir(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(super) fn partial_dir(&self) -> PathBuf {
        self.root.join("ocifs/partial")
    }

    pub(super) fn tags_dir(&self) -> PathBuf {
        self.root.join("ocifs/tags")
    }

    pub(super) fn unpacked_dir(&self) -> PathBuf {
        self.root.join("ocifs/unpacked")
    }

    pub(super) fn removed_dir(&self) -> PathBuf {
        self.root.join("ocifs/removed")
    }

    /// Where files are replaced as a whole, so where a crash can leave a temporary one.
    pub(super) fn replaced_in(&self) -> [PathBuf; 5] {
        [
            self.root.clone(),
            self.root.join("ocifs"),
            self.tags_dir(),
            self.notes_dir(),
            self.sealed_dir(),
        ]
    }

    pub(super) fn notes_dir(&self) -> PathBuf {
        self.root.join("ocifs/notes")
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

/// Makes a directory and those above it, each durable before the next.
fn make_dirs(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let above = match dir.parent() {
        None => return disk::make_dir(dir).map(drop),
        Some(above) if above.as_os_str().is_empty() => Path::new("."),
        Some(above) => above,
    };
    make_dirs(above)?;
    if disk::make_dir(dir)? {
        sync_dir(above)?;
    }
    Ok(())
}

/// Writes `content` to `path` so that a reader, whenever it looks, sees the old file or the new one, and a crash
/// leaves one of the two:
/// 1. a temporary file is made in the same directory, and locked: one that nobody has locked was left by a crash
/// 2. the content is written to it, 3. fsync, 4. rename, 5. fsync of the directory.
pub(super) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let (file, temporary) = temporary(dir)?;
    let written = disk::write(&file, content, 0)
        .and_then(|()| disk::sync(&file))
        .and_then(|()| disk::rename(&temporary, path));
    if written.is_err() {
        let _ = disk::remove(&temporary);
    }
    written?;
    sync_dir(dir)
}

/// A new file of a name that nobody else has, locked.
fn temporary(dir: &Path) -> io::Result<(File, PathBuf)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    // Who had the process id before may have left some.
    for _ in 0..1000 {
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{TEMPORARY}{}-{unique}", std::process::id()));
        match disk::open(&path, Access::New) {
            // Whoever sweeps may have been faster; it takes the name away then.
            Ok(file) if lock::try_exclusive(&file)? && file.metadata()?.nlink() > 0 => {
                return Ok((file, path));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// Whether this is the name of a temporary file.
pub(super) fn is_temporary(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes()))
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
