//! A mount in the background, with its holder: what `ocifs mount` makes, found and killed by process id.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open,
};
use serde_json::Value;
use tempfile::TempDir;

use super::mount::{detach, is_mounted, ocifs};
use super::process::{Output, run_command};
use super::{PATIENCE, eventually};

/// Taken down, and its processes killed, when dropped.
pub struct Held {
    point: PathBuf,
    holder: u32,
    /// Where its socket and its log are.
    runtime: PathBuf,
    socket: Socket,
    _dir: TempDir,
}

impl Held {
    /// With these flags beside `--cache-dir`, by the program under test.
    pub fn start<S: AsRef<OsStr>>(cache: &Path, flags: impl IntoIterator<Item = S>) -> Self {
        Self::start_as(ocifs(["mount"]), cache, flags)
    }

    /// By a command that ends in `mount`.
    pub fn start_as<S: AsRef<OsStr>>(
        command: Command,
        cache: &Path,
        flags: impl IntoIterator<Item = S>,
    ) -> Self {
        Self::start_in(Path::new("/run/ocifs"), command, cache, flags)
    }

    /// The same, with its socket and its log in `runtime`.
    pub fn start_in<S: AsRef<OsStr>>(
        runtime: &Path,
        mut command: Command,
        cache: &Path,
        flags: impl IntoIterator<Item = S>,
    ) -> Self {
        command.env("OCIFS_RUNTIME_DIR", runtime);
        let dir = super::scratch("held");
        let point = dir.path().join("models");
        fs::create_dir(&point).unwrap();
        command.arg("--cache-dir").arg(cache).args(flags);
        run_command(command.arg(&point), PATIENCE).ok();
        let mut held = Self {
            holder: 0,
            socket: Socket::of(runtime, &point),
            runtime: runtime.to_owned(),
            point,
            _dir: dir,
        };
        held.holder = number(&held.status()["keeper"]["pid"]);
        held
    }

    pub fn root(&self) -> &Path {
        &self.point
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.point.join(below)
    }

    pub fn holder(&self) -> u32 {
        self.holder
    }

    /// What `ocifs status` tells.
    #[track_caller]
    pub fn status(&self) -> Value {
        status_in(&self.runtime, &self.point)
    }

    /// What the daemon says its process is.
    #[track_caller]
    pub fn daemon(&self) -> u32 {
        number(&self.status()["pid"])
    }

    /// How often the mount was taken over.
    #[track_caller]
    pub fn times(&self) -> u64 {
        let status = self.status();
        let times = &status["takenOver"]["times"];
        times.as_u64().unwrap_or_else(|| panic!("{status}"))
    }

    /// Kills the daemon that runs now, as `kill -9` does, however far it is; its number.
    #[track_caller]
    pub fn kill_daemon(&self) -> u32 {
        let started = || self.started();
        let daemon = eventually(PATIENCE, "the holder starts a daemon", started);
        kill(daemon, Signal::KILL);
        daemon
    }

    /// The FUSE device that the holder keeps, opened no second time.
    pub fn device(&self) -> OwnedFd {
        device_of(self.holder)
    }

    /// The daemon that the holder has started, however far that one is.
    fn started(&self) -> Option<u32> {
        let children = format!("/proc/{0}/task/{0}/children", self.holder);
        let children = fs::read_to_string(&children).expect("the holder runs");
        // A dead one may not have gone yet; and between fork and exec a new one is a copy of the holder still.
        children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .find(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                line.starts_with(b"ocifs\0mount\0") && is_alive(*pid)
            })
    }

    /// Kills holder and daemon, and clears the dead mount away.
    #[allow(dead_code, reason = "for the soak")]
    pub fn kill(self) {
        drop(self);
    }

    /// The memory of its own that the daemon has now, in bytes; nothing between two daemons.
    #[allow(dead_code, reason = "for the soak")]
    pub fn own_memory(&self) -> u64 {
        let status = self.started().map(|pid| format!("/proc/{pid}/status"));
        let status = status.and_then(|path| fs::read_to_string(path).ok());
        let line = status.iter().flat_map(|status| status.lines());
        let mut line = line.filter_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.next().and_then(|rest| rest.split_whitespace().next());
        kib.map_or(0, |kib| kib.parse::<u64>().unwrap() * 1024)
    }

    pub fn umount(&self) -> Output {
        run_command(ocifs(["umount"]).arg(&self.point), PATIENCE)
    }

    /// Nothing is left of it: no process, no mount, no socket.
    #[track_caller]
    pub fn assert_gone(&self) {
        assert!(!is_mounted(&self.point), "still mounted");
        eventually(Duration::from_secs(20), "its processes end", || {
            processes(&self.point).is_empty().then_some(())
        });
        assert!(
            !self.socket.is_there(),
            "{} is left",
            self.socket.path.display()
        );
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let name = self.point.to_str().unwrap().trim_matches('/');
        let path = self.runtime.join(format!("{}.log", name.replace('/', "-")));
        if std::thread::panicking() {
            let log = fs::read_to_string(&path).unwrap_or_default();
            eprintln!("---- log of {} ----\n{log}\n----", self.point.display());
        }
        let _ = fs::remove_file(path);
        // The holder first, so that nobody follows.
        for pid in [self.holder].into_iter().chain(processes(&self.point)) {
            if processes(&self.point).contains(&pid) {
                kill(pid, Signal::KILL);
            }
        }
        detach(&self.point);
        if self.socket.is_there() {
            let _ = fs::remove_file(&self.socket.path);
        }
    }
}

/// What `ocifs status` tells of the mount there.
#[track_caller]
pub fn status_of(point: &Path) -> Value {
    status_in(Path::new("/run/ocifs"), point)
}

#[track_caller]
fn status_in(runtime: &Path, point: &Path) -> Value {
    let end = Instant::now() + PATIENCE;
    loop {
        let mut command = ocifs(["status", "--json"]);
        command.arg(point).env("OCIFS_RUNTIME_DIR", runtime);
        let said = run_command(&mut command, PATIENCE).ok();
        let mut status: Value = serde_json::from_str(&said).expect("--json prints JSON");
        let status = status["mounts"][0].take();
        if status["error"].is_null() {
            return status;
        }
        // One that is killed while it is asked does not answer.
        assert!(Instant::now() < end, "the daemon does not answer: {status}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
pub fn number(value: &Value) -> u32 {
    let number = value.as_u64().and_then(|number| number.try_into().ok());
    number.unwrap_or_else(|| panic!("{value}"))
}

/// The FUSE device that a holder keeps, opened no second time.
pub fn device_of(holder: u32) -> OwnedFd {
    let opened = fs::read_dir(format!("/proc/{holder}/fd")).unwrap();
    let device = opened.flatten().find(|entry| {
        fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("/dev/fuse"))
    });
    let number = device.expect("it keeps one").file_name();
    let number = number.to_str().unwrap().parse().unwrap();
    let pid = Pid::from_raw(holder.try_into().unwrap()).unwrap();
    let holder = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    pidfd_getfd(holder, number, PidfdGetfdFlags::empty()).unwrap()
}

/// A mount's control socket. Its name is used again by other mounts, and so would be its inode's number if it were not kept open.
struct Socket {
    path: PathBuf,
    open: OwnedFd,
}

impl Socket {
    fn of(runtime: &Path, point: &Path) -> Self {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let point = point.to_str().unwrap();
        let line = table
            .lines()
            .rfind(|line| line.split(' ').nth(4) == Some(point))
            .expect("it is mounted");
        let device = line.split(' ').nth(2).unwrap().replace(':', "-");
        let path = runtime.join(format!("{device}.sock"));
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = rustix::fs::open(&path, flags, Mode::empty()).expect("the control socket");
        Self { path, open }
    }

    /// Whether it has its name still.
    fn is_there(&self) -> bool {
        let was = rustix::fs::fstat(&self.open).unwrap().st_ino;
        fs::symlink_metadata(&self.path).is_ok_and(|now| now.ino() == was)
    }
}

/// Processes that have the mount point among their arguments and run.
pub fn processes(point: &Path) -> Vec<u32> {
    let wanted = point.as_os_str().as_encoded_bytes();
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(b"ocifs\0")
                && line.split(|byte| *byte == 0).any(|part| part == wanted)
                && is_alive(*pid)
        })
        .collect()
}

/// Whether a process runs, a zombie not counted.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some(Some('Z' | 'X') | None))
}

pub fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).expect("a process");
    let _ = kill_process(pid, signal);
}
