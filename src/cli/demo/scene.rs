//! The temporary directory of the demonstration, and the room that it needs.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use super::super::exit::Exit;
use super::super::explain::Failure;
use crate::base::ByteSize;

/// The model, the registry's copy and the cache's; and a little for the rest.
const COPIES: u64 = 3;
const MARGIN: u64 = 32 << 20;

/// A directory of our own that goes when this is dropped.
#[derive(Debug)]
pub(super) struct Scene {
    dir: PathBuf,
}

impl Scene {
    /// A new directory, for us alone, where there is room for a model of `size` bytes.
    pub(super) fn set(size: u64) -> Result<Self> {
        let base = std::env::temp_dir();
        let stat = rustix::fs::statvfs(&base)
            .with_context(|| format!("cannot look at {}", base.display()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let needed = size.saturating_mul(COPIES).saturating_add(MARGIN);
        if free < needed {
            let text = format!(
                "{} has {} free, the demonstration needs {}",
                base.display(),
                ByteSize(free),
                ByteSize(needed)
            );
            let hint = "give TMPDIR=DIR with more room, or a smaller --size";
            return Err(Failure::new(Exit::Failure, text).hint(hint).into());
        }
        let nanos = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.subsec_nanos());
        let dir = base.join(format!("ocifs-demo-{}-{nanos:x}", std::process::id()));
        // Fails when it exists: nobody else can have prepared it.
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        made.with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// The directory.
    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// A new directory in it.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Removes everything now, and says when that fails.
    pub(super) fn strike(self) -> io::Result<()> {
        fs::remove_dir_all(&self.dir)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot be removed");
        }
    }
}
