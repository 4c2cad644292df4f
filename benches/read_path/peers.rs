//! The peers: what users have today, and what the wire gives.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::models::Model;
use crate::common::servers::{Server, run};
use crate::common::{environment, seconds};
use crate::readers;

/// Seconds from the begin of a fresh connection to the last of the first `length` bytes, by curl's own clock: its start does not count.
pub(crate) fn curl_range(url: &str, length: u64) -> f64 {
    let mut command = Command::new("curl");
    command.args(["-sf", "-o", "/dev/null", "-w", "%{time_total}"]);
    command.args(["-r", &format!("0-{}", length - 1), url]);
    run(&mut command).parse().unwrap()
}

/// The Python of `tests/setup.sh`.
pub(crate) fn python() -> Option<PathBuf> {
    let tests = environment("OCIFS_TEST_ENV", "ocifs-tests");
    Some(tests.join("venv/bin/python3")).filter(|python| python.exists())
}

/// Runs a program of Python that prints seconds, by its own clock: what it imports does not count.
pub(crate) fn timed_by_python(python: &Path, program: &str, arguments: &[&str]) -> f64 {
    let output = run(Command::new(python).args(["-c", program]).args(arguments));
    output.trim().parse().unwrap()
}

/// Seconds that the download loop of an engine's own loader takes for the only blob: one stream, pieces of 8 KiB, to a file.
pub(crate) fn old_loader(python: &Path, server: &Server, model: &Model, dir: &Path) -> f64 {
    const LOOP: &str = "
import requests, sys, time
start = time.perf_counter()
with requests.get(sys.argv[1], stream=True) as response, open(sys.argv[2], 'wb') as out:
    response.raise_for_status()
    for piece in response.iter_content(chunk_size=8192):
        out.write(piece)
print(time.perf_counter() - start)
";
    let out = dir.join("loader");
    let blob = &model.blobs[0];
    let url = format!("http://{}{}", server.address, model.path(blob));
    let seconds = timed_by_python(python, LOOP, &[&url, &out.to_string_lossy()]);
    assert_eq!(fs::metadata(&out).unwrap().size(), blob.size);
    fs::remove_file(out).unwrap();
    seconds
}

/// Another file system with a model's plain files.
#[derive(Debug)]
pub(crate) struct Peer {
    daemon: Child,
    point: PathBuf,
    cache: PathBuf,
}

impl Peer {
    /// rclone's HTTP backend; `cache` is its `--vfs-cache-mode`.
    pub(crate) fn rclone(server: &Server, dir: &Path, cache: &str) -> Self {
        let mut command = Command::new("rclone");
        command
            .args(["mount", ":http:"])
            .arg(point(dir))
            .args(["--read-only", "--config", "/dev/null", "--http-url"])
            .arg(format!("http://{}/plain/", server.address))
            .args(["--vfs-cache-mode", cache, "--cache-dir"])
            .arg(dir.join("peer-cache"));
        Self::start(command, dir)
    }

    /// nbdkit's curl plug-in with the only blob, under nbdfuse.
    pub(crate) fn nbdfuse(server: &Server, model: &Model, dir: &Path) -> Self {
        let blob = &model.blobs[0];
        let mut command = Command::new("nbdfuse");
        command
            .arg("-r")
            .arg(point(dir).join(&blob.name))
            .args(["[", "nbdkit", "-f", "-r", "curl"])
            .arg(format!("url=http://{}{}", server.address, model.path(blob)))
            .arg("]");
        Self::start(command, dir)
    }

    fn start(mut command: Command, dir: &Path) -> Self {
        let point = point(dir);
        fs::create_dir_all(&point).unwrap();
        let outside = fs::metadata(&point).unwrap().dev();
        let daemon = command.stderr(Stdio::null()).spawn().unwrap();
        let mut peer = Self {
            daemon,
            point,
            cache: dir.join("peer-cache"),
        };
        let start = Instant::now();
        while fs::metadata(&peer.point).unwrap().dev() == outside {
            let ended = peer.daemon.try_wait().unwrap();
            assert!(ended.is_none(), "{command:?} ended: {ended:?}");
            let waited = start.elapsed();
            assert!(waited < Duration::from_secs(20), "{command:?}: no mount");
            std::thread::sleep(Duration::from_millis(10));
        }
        peer
    }

    /// Opens a file, reads it from front to back and checks that all of it came; in seconds.
    pub(crate) fn read(&self, name: &str, size: u64) -> f64 {
        seconds(|| {
            let file = File::open(self.point.join(name)).unwrap();
            assert_eq!(readers::sequential(&file), size);
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let umount = || Command::new("umount").arg(&self.point).status();
        if !umount().is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("-l").arg(&self.point).status();
        }
        let _ = self.daemon.wait();
        let _ = fs::remove_dir_all(&self.cache);
    }
}

fn point(dir: &Path) -> PathBuf {
    dir.join("peer")
}
