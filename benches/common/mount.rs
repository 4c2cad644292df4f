//! ocifs under measurement.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::machine::{self, Watch};
use super::models::{Blob, Model};
use super::servers::{Server, run};

/// For a mount to come up.
const START: Duration = Duration::from_secs(30);

/// For a blob that was read to be verified.
const PATIENCE: Duration = Duration::from_secs(300);

/// A mount of a server, with a model that was looked up.
#[derive(Debug)]
pub(crate) struct Mount {
    daemon: Child,
    point: PathBuf,
    model: PathBuf,
    watch: Watch,
}

impl Mount {
    /// Mounts below `dir` with the cache in `dir/cache`, which may hold something from earlier, and looks the model up.
    pub(crate) fn start(server: &Server, model: &Model, dir: &Path, flags: &[&str]) -> Self {
        let point = dir.join("models");
        fs::create_dir_all(&point).unwrap();
        let outside = fs::metadata(&point).unwrap().dev();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs"));
        command
            .args(["mount", "--foreground", "--plain-http", &server.address])
            .arg("--cache-dir")
            .arg(cache(dir))
            .args(flags)
            .arg(&point)
            .stderr(File::create(dir.join("mount.log")).unwrap());
        let daemon = command.spawn().unwrap();
        let mut mount = Self {
            watch: Watch::start(daemon.id()),
            daemon,
            model: point.join(format!("{}/{}", server.address, model.reference())),
            point,
        };
        let start = Instant::now();
        while fs::metadata(&mount.point).unwrap().dev() == outside {
            let ended = mount.daemon.try_wait().unwrap();
            let waiting = ended.is_none() && start.elapsed() < START;
            let log = fs::read_to_string(dir.join("mount.log"));
            assert!(waiting, "the mount does not come up: {log:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        let listed = fs::read_dir(&mount.model).unwrap().count();
        assert!(listed > 0, "the model is not shown");
        mount
    }

    /// The model's directory.
    pub(crate) fn model(&self) -> &Path {
        &self.model
    }

    /// A weight file's path.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.model.join(name)
    }

    /// Waits until a file of the model is verified, and its blob sealed.
    pub(crate) fn wait_until_verified(&self, name: &str) {
        let start = Instant::now();
        let mut value = [0; 16];
        loop {
            let got = rustix::fs::getxattr(self.file(name), "user.ocifs.verified", &mut value[..]);
            if &value[..got.unwrap()] == b"true" {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{name} is never verified");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Processor seconds of the daemon so far.
    pub(crate) fn processor(&self) -> f64 {
        machine::processor(self.daemon.id())
    }

    /// Processor seconds of the daemon so far that went into SHA-256, as it says itself.
    pub(crate) fn hashing(&self) -> f64 {
        let status = run(Command::new(env!("CARGO_BIN_EXE_ocifs"))
            .args(["status", "--json"])
            .arg(&self.point));
        let status: Value = serde_json::from_str(&status).unwrap();
        status["mounts"][0]["hashing"]["cpuSeconds"]
            .as_f64()
            .unwrap()
    }

    /// The most anonymous memory that the daemon had resident at once, in bytes.
    pub(crate) fn peak_anonymous(&self) -> u64 {
        self.watch.peak_anonymous()
    }

    /// Bytes that the daemon has written so far, replies to the kernel among them.
    pub(crate) fn written(&self) -> u64 {
        machine::written(self.daemon.id())
    }

    pub(crate) fn stop(mut self) {
        run(Command::new(env!("CARGO_BIN_EXE_ocifs"))
            .arg("umount")
            .arg(&self.point));
        self.daemon.wait().unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // After a failure; a mount that was stopped is gone.
        if matches!(self.daemon.try_wait(), Ok(None)) {
            let _ = Command::new(env!("CARGO_BIN_EXE_ocifs"))
                .args(["umount", "--force"])
                .arg(&self.point)
                .status();
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
    }
}

/// The cache directory of mounts below `dir`.
pub(crate) fn cache(dir: &Path) -> PathBuf {
    dir.join("cache")
}

/// A blob's file in a cache that has it whole.
pub(crate) fn sealed(dir: &Path, blob: &Blob) -> PathBuf {
    let hex = blob.digest.trim_start_matches("sha256:");
    cache(dir).join("blobs/sha256").join(hex)
}

/// Empties the cache.
pub(crate) fn forget(dir: &Path) {
    let _ = fs::remove_dir_all(cache(dir));
}

/// Whether `ocifs mount` has this option.
pub(crate) fn knows(option: &str) -> bool {
    let help = run(Command::new(env!("CARGO_BIN_EXE_ocifs")).args(["mount", "--help"]));
    help.contains(option)
}
