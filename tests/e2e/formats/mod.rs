//! Golden artifacts: each packaging convention, written by its own tools where they can be had and else as its
//! specification says, mounted, and compared with the source directory name by name and byte by byte.

mod chunked;
mod compressed;
mod docker;
mod image;
mod index;
mod kitops;
mod loaders;
mod modelpack;
mod ollama;
mod oras;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::artifact::Artifact;
use crate::support::mount::{Mount, run_ocifs};
use crate::support::process::{run_command, run_with_input};
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

    /// That nothing of a model is shown, because its content is not what its digests say.
    fn assert_wrong(&self, reference: &str) {
        let said = self.inspect(reference);
        assert!(said.contains("has digest"), "{said}");
        let shown = self.mount.try_list(reference);
        assert!(
            shown.as_ref().map_or(true, |names| names == &[".oci"]),
            "{shown:?}"
        );
    }

    /// What `ocifs inspect` prints.
    fn inspect(&self, reference: &str) -> String {
        let cache = self.cache.path().to_str().unwrap();
        run_ocifs(["inspect", "--cache-dir", cache, reference]).ok()
    }
}

/// What GNU tar makes of these members of `dir`, compressed by a program of this name.
fn archive(dir: &Path, members: &[&str], program: Option<&str>) -> Vec<u8> {
    let mut command = Command::new("tar");
    // Sorted, so that the same directory is the same archive; pax and GNU names as they come.
    command
        .args(["--sort=name", "--owner=0", "--group=0", "-cf", "-", "-C"])
        .arg(dir)
        .args(members);
    let tar = run_command(&mut command, Duration::from_secs(120)).ok_bytes();
    match program {
        Some(program) => compressed(&tar, program),
        None => tar,
    }
}

/// What `gzip` or `zstd` makes of these bytes.
fn compressed(bytes: &[u8], program: &str) -> Vec<u8> {
    let mut command = Command::new(program);
    command.args(["-c", "-1"]);
    run_with_input(&mut command, bytes, Duration::from_secs(120)).ok_bytes()
}
