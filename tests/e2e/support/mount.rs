//! The `ocifs` command, and mounts that go with their guard.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::model::{Files, read_tree};
use super::process::{Daemon, Output, run_command};
use super::{PATIENCE, eventually, within};

/// The `ocifs` command in an environment without settings, credentials and proxies of whoever runs the tests.
pub fn ocifs<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        let upper = name.to_ascii_uppercase();
        if upper.starts_with("OCIFS_") || upper.starts_with("XDG_") || upper.ends_with("_PROXY") {
            command.env_remove(&*name);
        }
    }
    command
        .env_remove("DOCKER_CONFIG")
        .env_remove("REGISTRY_AUTH_FILE")
        .env("HOME", "/nonexistent")
        .args(args);
    command
}

/// Runs an `ocifs` command to its end.
pub fn run_ocifs<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    run_command(&mut ocifs(args), Duration::from_secs(180))
}

/// A mount of its own, in the foreground; taken down and its daemon ended when dropped.
pub struct Mount {
    daemon: Daemon,
    point: PathBuf,
    _dir: TempDir,
}

impl Mount {
    /// With these flags beside `--cache-dir`.
    pub fn start<S: AsRef<OsStr>>(cache: &Path, flags: impl IntoIterator<Item = S>) -> Self {
        Self::start_as(cache, flags, |_| {})
    }

    /// The same, with the command changed before it is run: its environment, say.
    pub fn start_as<S: AsRef<OsStr>>(
        cache: &Path,
        flags: impl IntoIterator<Item = S>,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let dir = super::scratch("mount");
        let point = dir.path().join("models");
        fs::create_dir(&point).unwrap();
        let mut command = ocifs(["mount", "--foreground", "--cache-dir"]);
        command.arg(cache).args(flags).arg(&point);
        change(&mut command);
        let mut daemon = Daemon::start("ocifs mount", &mut command, &dir.path().join("log"));
        let up = eventually(PATIENCE, "the mount comes up", || {
            if is_mounted(&point) {
                return Some(true);
            }
            (!daemon.is_running()).then_some(false)
        });
        assert!(up, "ocifs mount ended at once: {}", daemon.log());
        Self {
            daemon,
            point,
            _dir: dir,
        }
    }

    /// The mount point.
    pub fn root(&self) -> &Path {
        &self.point
    }

    /// A path in the mount, by a reference or anything else below the root.
    pub fn path(&self, below: &str) -> PathBuf {
        self.point.join(below)
    }

    /// The daemon's process id.
    pub fn process(&self) -> u32 {
        self.daemon.pid().as_raw_nonzero().get().cast_unsigned()
    }

    /// What the daemon said.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Does `work` while the daemon is stopped, as if it hung.
    pub fn while_stopped<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.daemon.signal(rustix::process::Signal::STOP);
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            within(PATIENCE, what, work)
        }));
        self.daemon.signal(rustix::process::Signal::CONT);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The most memory that the daemon ever had, in bytes; pages of files that it maps are counted.
    pub fn peak_memory(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// The memory of its own that the daemon has now, in bytes: no pages of files.
    pub fn own_memory(&self) -> u64 {
        self.memory("RssAnon:")
    }

    /// A line of proc_pid_status(5) that is in kB.
    fn memory(&self, name: &str) -> u64 {
        let pid = self.daemon.pid().as_raw_nonzero();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with(name))
            .expect("a running process has it");
        line.split_whitespace()
            .nth(1)
            .and_then(|number| number.parse::<u64>().ok())
            .expect("kB")
            * 1024
    }

    /// A whole file, or the error, within a minute.
    pub fn try_read(&self, below: &str) -> io::Result<Vec<u8>> {
        let path = self.path(below);
        within(PATIENCE, &format!("read {below}"), move || fs::read(path))
    }

    /// A whole file.
    #[track_caller]
    pub fn read(&self, below: &str) -> Vec<u8> {
        self.try_read(below)
            .unwrap_or_else(|error| panic!("{below}: {error}"))
    }

    /// `length` bytes from `offset`, or the error, within a minute.
    pub fn try_read_at(&self, below: &str, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let path = self.path(below);
        within(PATIENCE, &format!("read {below} at {offset}"), move || {
            let mut bytes = vec![0; length];
            fs::File::open(path)?.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
    }

    /// `length` bytes from `offset`.
    #[track_caller]
    pub fn read_at(&self, below: &str, offset: u64, length: usize) -> Vec<u8> {
        self.try_read_at(below, offset, length)
            .unwrap_or_else(|error| panic!("{below} at {offset}: {error}"))
    }

    /// Every file of a model directory, `.oci` left out.
    pub fn files(&self, below: &str) -> Files {
        let path = self.path(below);
        within(PATIENCE, &format!("read all of {below}"), move || {
            read_tree(&path)
        })
    }

    /// The sorted names in a directory, or the error.
    pub fn try_list(&self, below: &str) -> io::Result<Vec<String>> {
        let path = self.path(below);
        within(PATIENCE, &format!("list {below}"), move || {
            let mut names = Vec::new();
            for entry in fs::read_dir(path)? {
                names.push(entry?.file_name().into_string().expect("names are UTF-8"));
            }
            names.sort();
            Ok(names)
        })
    }

    /// The sorted names in a directory.
    #[track_caller]
    pub fn list(&self, below: &str) -> Vec<String> {
        self.try_list(below)
            .unwrap_or_else(|error| panic!("{below}: {error}"))
    }

    /// `lstat`, or the error.
    pub fn try_stat(&self, below: &str) -> io::Result<fs::Metadata> {
        let path = self.path(below);
        within(PATIENCE, &format!("stat {below}"), move || {
            fs::symlink_metadata(path)
        })
    }

    /// `lstat`.
    #[track_caller]
    pub fn stat(&self, below: &str) -> fs::Metadata {
        self.try_stat(below)
            .unwrap_or_else(|error| panic!("{below}: {error}"))
    }

    /// Waits until a file is known to be right, which is found out behind its last read.
    pub fn verified(&self, below: &str) {
        eventually(PATIENCE, "it is verified", || {
            let verified = self.xattr(below, "user.ocifs.verified");
            (verified.as_deref() == Some("true")).then_some(())
        });
    }

    /// An extended attribute as text; `None` when there is no such attribute.
    pub fn xattr(&self, below: &str, name: &str) -> Option<String> {
        let (path, name) = (self.path(below), name.to_owned());
        within(PATIENCE, &format!("xattr of {below}"), move || {
            let mut value = vec![0_u8; 4096];
            match rustix::fs::getxattr(&path, name.as_str(), &mut value[..]) {
                Ok(length) => {
                    Some(String::from_utf8(value[..length].to_vec()).expect("attributes are text"))
                }
                Err(rustix::io::Errno::NODATA) => None,
                Err(error) => panic!("{}: {name}: {error}", path.display()),
            }
        })
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        self.daemon.signal(signal);
    }

    /// Waits for the daemon's end.
    pub fn wait(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        self.daemon.wait(limit)
    }

    /// Kills the daemon as `kill -9` does and clears the dead mount away.
    pub fn kill(mut self) {
        self.daemon.kill();
        detach(&self.point);
    }

    /// Takes the mount down as a user does; the daemon must end well.
    #[track_caller]
    pub fn unmount(mut self) {
        run_command(ocifs(["umount"]).arg(&self.point), PATIENCE).ok();
        assert!(
            !is_mounted(&self.point),
            "still mounted after `ocifs umount`"
        );
        let status = self
            .daemon
            .wait(PATIENCE)
            .expect("the daemon ends after `ocifs umount`");
        assert!(
            status.success(),
            "the daemon ended with {status}: {}",
            self.daemon.log()
        );
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The daemon first: a mount whose daemon is dead cannot hang who detaches it.
        self.daemon.kill();
        detach(&self.point);
    }
}

/// Whether something is mounted there. Read from the kernel's table: asking the mount itself may hang.
pub fn is_mounted(point: &Path) -> bool {
    let point = point.to_str().expect("temporary paths are UTF-8");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(point))
}

/// The file system type of the mount there.
pub fn mount_type(point: &Path) -> Option<String> {
    let point = point.to_str().expect("temporary paths are UTF-8");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some(point))?;
    line.split(" - ")
        .nth(1)?
        .split(' ')
        .next()
        .map(str::to_owned)
}

/// Detaches whatever is mounted there, busy or dead.
pub fn detach(point: &Path) {
    for _ in 0..10 {
        if !is_mounted(point) {
            return;
        }
        let mut command = Command::new("umount");
        command
            .arg("-l")
            .arg(point)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if !command.status().is_ok_and(|status| status.success()) {
            let mut command = Command::new("fusermount3");
            drop(
                command
                    .args(["-u", "-z"])
                    .arg(point)
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status(),
            );
        }
    }
}
