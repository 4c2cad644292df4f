//! Under a service manager that keeps descriptors, as systemd does: a small one here speaks sd_notify(3) and sd_listen_fds(3) from the
//! other side.

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use crate::support::content::Content;
use crate::support::held::status_of;
use crate::support::mount::{detach, is_mounted, ocifs};
use crate::support::process::{run_command, wait};
use crate::support::{PATIENCE, scale, scratch, within};
use crate::takeover::{Published, Readers, some_time};

/// The manager, its one service, and the service's mount.
struct Manager {
    socket: UnixDatagram,
    kept: Vec<(String, OwnedFd)>,
    /// Everything that was said, descriptors left out.
    heard: Vec<String>,
    child: Option<Child>,
    /// After how long without a word the service would be killed.
    watchdog: Option<Duration>,
    cache: TempDir,
    dir: TempDir,
}

impl Manager {
    fn new() -> Self {
        let dir = scratch("manager");
        fs::create_dir(dir.path().join("models")).unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        Self {
            socket,
            kept: Vec::new(),
            heard: Vec::new(),
            child: None,
            watchdog: None,
            cache: scratch("cache"),
            dir,
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("models")
    }

    /// Starts the service with what is kept, and waits until it is ready.
    fn start(&mut self, args: &[String]) {
        let mut command = ocifs(["mount", "--foreground", "--cache-dir"]);
        command.arg(self.cache.path()).args(args).arg(self.root());
        // systemd passes descriptors from 3 on and names the process, which is known only there.
        let mut shell = Command::new("bash");
        let log = self.dir.path().join("log");
        let mut names = Vec::new();
        let mut script = String::new();
        for (at, (name, descriptor)) in self.kept.iter().enumerate() {
            let copy = Stdio::from(descriptor.try_clone().unwrap());
            match at {
                0 => shell.stdin(copy),
                1 => shell.stdout(copy),
                _ => shell.stderr(copy),
            };
            script += &format!("exec {}<&{at}; ", at + 3);
            names.push(name.as_str());
        }
        script += "exec </dev/null >>\"$LOG\" 2>&1; export LISTEN_PID=$$ WATCHDOG_PID=$$; exec \"$0\" \"$@\"";
        shell.arg("-c").arg(script).arg(command.get_program());
        shell.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        shell
            .env("NOTIFY_SOCKET", self.dir.path().join("notify"))
            .env("LOG", log);
        if let Some(limit) = self.watchdog {
            shell.env("WATCHDOG_USEC", limit.as_micros().to_string());
        }
        if !names.is_empty() {
            assert_eq!(names.len(), 3, "{names:?}");
            shell
                .env("LISTEN_FDS", names.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
        } else {
            shell.stdin(Stdio::null());
        }
        self.child = Some(shell.spawn().unwrap());
        // It has the descriptors as well.
        drop(shell);
        self.until("READY=1");
    }

    /// Hears what is said until a line comes.
    fn until(&mut self, line: &str) {
        let end = Instant::now() + PATIENCE;
        self.socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        loop {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            let heard = self.hear();
            if heard.iter().any(|heard| heard == line) {
                return;
            }
            assert!(Instant::now() < end, "{line} is not said: {}", self.log());
            let silent = heard.is_empty() && ended.is_some();
            assert!(!silent, "{ended:?}: {}", self.log());
        }
    }

    /// The lines of the next message.
    fn hear(&mut self) -> Vec<String> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 4096];
        let data = &mut [IoSliceMut::new(&mut text)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let Ok(message) = recvmsg(self.socket.as_fd(), data, &mut beside, flags) else {
            return Vec::new();
        };
        let text = String::from_utf8(text[..message.bytes].to_vec()).unwrap();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let name = || {
            let name = lines.iter().find_map(|line| line.strip_prefix("FDNAME="));
            name.expect("a descriptor has a name").to_owned()
        };
        let descriptors = beside.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(all) => all.collect(),
            _ => Vec::new(),
        });
        // Those of a BARRIER are closed by being dropped.
        for descriptor in descriptors {
            if lines[0] == "FDSTORE=1" {
                self.kept.push((name(), descriptor));
            }
        }
        if lines[0] == "FDSTOREREMOVE=1" {
            let name = name();
            self.kept.retain(|(kept, _)| *kept != name);
        }
        self.heard.extend(lines.iter().cloned());
        lines
    }

    fn signal(&mut self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    /// The service's end.
    fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            self.socket
                .set_read_timeout(Some(Duration::from_millis(20)))
                .unwrap();
            self.hear();
            let child = self.child.as_mut().unwrap();
            if let Some(status) = wait(child, Duration::from_millis(10)) {
                self.child = None;
                while !self.hear().is_empty() {}
                return status;
            }
            assert!(Instant::now() < end, "it does not end: {}", self.log());
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn kept(&self, name: &str) -> File {
        let kept = self.kept.iter().find(|(kept, _)| kept == name);
        kept.unwrap().1.try_clone().unwrap().into()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- log of the service ----\n{}\n----", self.log());
        }
        self.kept.clear();
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = wait(child, PATIENCE);
        }
        detach(&self.root());
    }
}

fn read_at(path: &Path, at: u64) -> Vec<u8> {
    let path = path.to_owned();
    within(PATIENCE, "read", move || {
        let mut bytes = vec![0; 50_000];
        File::open(path)
            .unwrap()
            .read_exact_at(&mut bytes, at)
            .unwrap();
        bytes
    })
}

#[test]
fn a_service_that_is_killed_goes_on_with_the_descriptors_that_the_manager_keeps() {
    let published = Published::new();
    let args = published.registry.ocifs_args();
    let mut manager = Manager::new();
    manager.start(&args);
    let names: Vec<_> = manager.kept.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["ocifs-journal", "ocifs-control", "ocifs-device"]);
    assert!(manager.heard.contains(&"BARRIER=1".to_owned()));
    let model = manager
        .root()
        .join(format!("{}/org/m:v1", published.registry.host()));
    let modes = [
        ("read", "warm.safetensors"),
        ("mmap", "cold.safetensors"),
        ("direct", "warm.safetensors"),
        ("names", "cold.safetensors"),
    ];
    let mut readers = Readers::start(&published, &model, &modes);
    let kills = scale(14_u32, 200);
    for round in 0..kills {
        some_time(round);
        readers.check();
        manager.signal(Signal::KILL);
        assert!(!manager.ended().success());
        // A kill in the middle of a record: what is not whole does not count.
        let journal = manager.kept("ocifs-journal");
        let end = journal.metadata().unwrap().len();
        journal
            .write_all_at(&[20, 0, 0, 0, 1, 2, 3, 4, 8, 9], end)
            .unwrap();
        manager.start(&args);
    }
    let status = status_of(&manager.root());
    assert_eq!(status["takenOver"]["times"], kills);
    assert_eq!(status["keeper"]["by"], "service manager");
    let said = manager
        .heard
        .iter()
        .rfind(|line| line.starts_with("STATUS="));
    assert!(
        said.is_some_and(|line| line.contains("taken over")),
        "{said:?}"
    );

    // To restart is to end with a code of its own and to be started again.
    let mut restart = ocifs(["restart"]);
    restart.arg(manager.root());
    let restart = std::thread::spawn(move || run_command(&mut restart, PATIENCE));
    assert_eq!(manager.ended().code(), Some(75));
    manager.start(&args);
    restart.join().unwrap().ok();
    readers.stop();

    manager.signal(Signal::TERM);
    assert!(manager.ended().success());
    assert!(manager.heard.contains(&"STOPPING=1".to_owned()));
    assert!(!is_mounted(&manager.root()));
}

/// `WatchdogSec=`: as long as the service goes on it says so; one that is stopped does not, and the next one does again.
#[test]
fn the_manager_hears_that_a_service_goes_on_and_kills_one_that_does_not() {
    let published = Published::new();
    let args = published.registry.ocifs_args();
    let mut manager = Manager::new();
    let limit = Duration::from_secs(1);
    manager.watchdog = Some(limit);
    manager.start(&args);
    let goes_on = |manager: &mut Manager| {
        for _ in 0..4 {
            let begun = Instant::now();
            manager.until("WATCHDOG=1");
            assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
        }
    };
    goes_on(&mut manager);
    let path = manager.root().join(format!(
        "{}/org/m:v1/warm.safetensors",
        published.registry.host()
    ));
    assert!(read_at(&path, 7) == Content::new(21).bytes(7, 50_000));
    manager.signal(Signal::STOP);
    while !manager.hear().is_empty() {}
    let begun = Instant::now();
    while begun.elapsed() < limit {
        assert_eq!(manager.hear(), [] as [String; 0], "it is stopped");
    }
    manager.signal(Signal::ABORT);
    manager.signal(Signal::KILL);
    assert!(!manager.ended().success());
    manager.start(&args);
    goes_on(&mut manager);
    assert!(read_at(&path, 9) == Content::new(21).bytes(9, 50_000));
    manager.signal(Signal::TERM);
    assert!(manager.ended().success());
}

#[test]
fn a_session_that_cannot_be_gone_on_with_is_ended_and_the_service_mounts_anew() {
    let published = Published::new();
    let args = published.registry.ocifs_args();
    let mut manager = Manager::new();
    manager.start(&args);
    let file = manager.root().join(format!(
        "{}/org/m:v1/warm.safetensors",
        published.registry.host()
    ));
    let path = file.clone();
    let old = within(PATIENCE, "open", move || File::open(path).unwrap());
    assert!(read_at(&file, 99) == Content::new(21).bytes(99, 50_000));
    manager.signal(Signal::KILL);
    manager.ended();
    manager
        .kept("ocifs-journal")
        .write_all_at(&[0xff; 24], 0)
        .unwrap();
    manager.start(&args);
    assert_eq!(manager.kept.len(), 3, "of the new mount");
    within(PATIENCE, "read what was open", move || {
        let at = 8 << 20;
        assert!(old.read_exact_at(&mut [0; 4096], at).is_err());
    });
    assert!(read_at(&file, 5) == Content::new(21).bytes(5, 50_000));
    assert!(
        manager.log().contains("cannot be gone on with"),
        "{}",
        manager.log()
    );

    // Unmounted while nobody serves: the next one ends at once, and well.
    manager.signal(Signal::KILL);
    manager.ended();
    run_command(ocifs(["umount"]).arg(manager.root()), PATIENCE);
    assert!(!is_mounted(&manager.root()));
    manager.start(&args);
    assert!(manager.ended().success(), "{}", manager.log());
}

#[test]
fn a_manager_that_is_away_is_no_reason_not_to_mount() {
    let mut command = ocifs(["mount", "--foreground", "--cache-dir"]);
    let (cache, dir) = (scratch("cache"), scratch("mount"));
    command.arg(cache.path()).arg(dir.path());
    command
        .env("NOTIFY_SOCKET", dir.path().with_extension("nowhere"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    crate::support::eventually(PATIENCE, "it is mounted", || {
        is_mounted(dir.path()).then_some(())
    });
    run_command(ocifs(["umount"]).arg(dir.path()), PATIENCE).ok();
    assert!(wait(&mut child, PATIENCE).unwrap().success());
}

/// The mount that `ocifs run` makes for itself is not the service that `ocifs run` may be.
#[test]
fn a_run_in_a_service_says_nothing_to_the_manager_and_gives_it_nothing() {
    let published = Published::new();
    let (dir, cache) = (scratch("service"), scratch("cache"));
    let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let runner = dir.path().join("runner");
    let script = "#!/bin/sh\n[ \"$1\" = --version ] || exec cat \"$1/warm.safetensors\"\n";
    fs::write(&runner, script).unwrap();
    fs::set_permissions(&runner, PermissionsExt::from_mode(0o755)).unwrap();
    let mut run = ocifs(["run", "--cache-dir"]);
    run.arg(cache.path());
    run.arg(format!("{}/org/m:v1", published.registry.host()));
    run.env("OCIFS_RUN", &runner);
    run.env("NOTIFY_SOCKET", dir.path().join("notify"));
    let said = run_command(&mut run, PATIENCE).ok_bytes();
    assert!(said == fs::read(published.file("warm.safetensors")).unwrap());
    let heard = socket.recv(&mut [0; 4096]);
    assert!(heard.is_err(), "{} bytes were said", heard.unwrap());
}
