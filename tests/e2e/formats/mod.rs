//! Golden artifacts: each packaging convention, written by its own tools where they can be had and else as its
//! specification says, mounted, and compared with the source directory name by name and byte by byte.

mod docker;

use tempfile::TempDir;

use crate::support::artifact::Artifact;
use crate::support::mount::{Mount, run_ocifs};
use crate::support::registry::Registry;
use crate::support::scratch;

/// A registry and a mount.
struct Site {
    registry: Registry,
    cache: TempDir,
    mount: Mount,
}

impl Site {
    fn new() -> Self {
        Self::with([])
    }

    /// With these flags for the mount.
    fn with<const N: usize>(flags: [&str; N]) -> Self {
        let registry = Registry::open();
        let cache = scratch("cache");
        let mount = Mount::start(cache.path(), flags);
        Self {
            registry,
            cache,
            mount,
        }
    }

    /// Publishes an artifact by skopeo and returns its directory below the mount.
    fn show(&self, artifact: &Artifact) -> String {
        artifact.publish(&self.registry, "org/m:v1").reference
    }

    /// What `ocifs inspect` prints.
    fn inspect(&self, reference: &str) -> String {
        let cache = self.cache.path().to_str().unwrap();
        run_ocifs(["inspect", "--cache-dir", cache, reference]).ok()
    }
}
