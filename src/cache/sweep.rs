//! What goes: files that somebody still reads, and what crashes left behind.
//!
//! A file that is taken away while somebody has it open or mapped keeps its room on the disk, and without a name nobody would count it. So
//! it goes in two steps:
//! 1. under the cache's lock it is renamed to `removed/<hex>-<inode number>`, where it counts, and leads nobody to it;
//! 2. it is removed once nobody else has it open: that is looked for by whoever needs room, asks how full the cache is, or opens it.
//!
//! Whoever takes away what nobody uses removes it at once. A kill at any point leaves what the next one finds.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::Cache;
use super::disk::{self, Access};
use super::layout::is_temporary;
use super::lock;
use super::unpacked::names;

impl Cache {
    /// Takes the name away of a file that somebody has open. Under the lock; `file` is that file.
    pub(super) fn take_away(&self, path: &Path, file: &File) -> io::Result<()> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let aside = format!("{name}-{}", file.metadata()?.ino());
        let moved = disk::rename(path, &self.layout().removed_dir().join(aside));
        match moved {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            // Better that it is not counted than that it is believed.
            Err(_) => disk::remove(path),
            Ok(()) => Ok(()),
        }
    }

    /// Removes what was taken away and nobody has open any more.
    pub(super) fn sweep_removed(&self) {
        each(&self.layout().removed_dir(), |path| {
            remove_left(path, lock::alone)
        });
    }

    /// Removes all that crashes left behind, and leaves what it cannot remove to the next one.
    pub(super) fn sweep(&self) {
        self.sweep_removed();
        for dir in self.layout().replaced_in() {
            each(&dir, |path| match is_temporary(path) {
                true => remove_left(path, lock::try_exclusive),
                false => Ok(()),
            });
        }
        each(&self.layout().unpacked_dir(), |path| {
            remove_left(path, lock::try_exclusive)
        });
        each(&self.layout().partial_dir(), sweep_map);
        each(&self.layout().partial_dir(), sweep_data);
    }
}

/// Removes a file that nobody has locked: who makes one has it locked from its first moment on, or finds that its name is gone.
///
/// The lock is kept until the name is gone, so that nobody begins to use the file in between. The name may have passed to another
/// file before it was locked: names are used again, by processes of one number in several containers, and for one layer.
fn remove_left(path: &Path, lock: impl FnOnce(&File) -> io::Result<bool>) -> io::Result<()> {
    let file = disk::open(path, Access::Read)?;
    if lock(&file)? && names(path, &file) {
        disk::remove(path)?;
    }
    Ok(())
}

/// Removes a map that belongs to nothing: one that stayed when its blob was sealed, evicted or thrown away.
///
/// Whoever begins the blob anew makes the data file first and would take the map for his. So the data file is made here, too, and
/// locked, which he waits for and then finds it gone.
fn sweep_map(path: &Path) -> io::Result<()> {
    let data = path.with_extension("data");
    let orphan = path.extension().is_some_and(|extension| extension == "map")
        && fs::symlink_metadata(&data).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    if !orphan {
        return Ok(());
    }
    let Ok(mine) = disk::open(&data, Access::New) else {
        return Ok(());
    };
    // Whoever was faster with the lock uses it.
    if lock::try_exclusive(&mine)? {
        disk::remove(path)?;
        disk::remove(&data)?;
    }
    Ok(())
}

/// Removes data without a map, of which nothing counts as present: a power cut may keep one removal and lose the other. Whoever has just
/// made it and not locked it yet finds it gone, and begins again.
fn sweep_data(path: &Path) -> io::Result<()> {
    let is_missing = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
    let orphan = path
        .extension()
        .is_some_and(|extension| extension == "data")
        && fs::symlink_metadata(path.with_extension("map")).is_err_and(is_missing);
    if !orphan {
        return Ok(());
    }
    remove_left(path, lock::try_exclusive)
}

/// Does something to each file in a directory; what fails for one is no reason to leave the others.
fn each(dir: &Path, mut act: impl FnMut(&Path) -> io::Result<()>) {
    for entry in disk::list(dir).unwrap_or_default() {
        if let Err(error) = act(&entry.path()) {
            tracing::debug!(path = %entry.path().display(), %error, "not swept");
        }
    }
}
