//! The process that stays when a daemon dies: it keeps the daemon's descriptors and starts the next one.
//!
//! `ocifs mount` starts it, it starts the daemon, and it does as good as nothing else: one thread, no runtime, no settings, so that
//! there is little that could go wrong with it and little that the out-of-memory killer would want from it. The kernel aborts a FUSE
//! connection when the last descriptor of it is closed; the one kept here is what keeps readers waiting instead of failing.
//!
//! - A daemon that ends well ends the mount, and the holder with it.
//! - A daemon that dies before it was ever up is a mount that failed.
//! - A daemon that dies later is followed by another one at once; one that was told to restart, by one of the program that
//!   stands at its path now. Should that one not come up, the program that the holder itself is of is taken again.
//! - Too many deaths in a short time, and the descriptors are closed: readers get an error instead of waiting for ever.
//! - A mount that goes while no daemon runs ends the holder.
//! - SIGTERM and SIGINT are passed on to the daemon; while there is none, the mount is taken out of the tree here.
//!
//! # When a dead daemon does not go
//! A thread of a killed daemon may be inside of a notification, which waits for a directory's lock as long as a lookup in that
//! directory waits for an answer; and the process is not at its end before all of its threads are. Its main thread is, though,
//! and that is looked for: the next daemon answers the lookup, and the old one goes. (systemd does not look for it: there such a daemon
//! is followed only once it has gone.)
//!
//! Should the holder itself be killed, the daemon goes on, and says in its status that nobody would follow it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mount::UnmountFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::control::{self, Identity};
use super::daemon::Ready;
use super::ending::{Ending, Next, Tries, next, pause};
use super::keeper::{CONTROL, DEVICE};
use super::{point, umount};
use crate::base::Deadline;

/// The file that runs.
const SELF: &str = "/proc/self/exe";

/// How long a daemon may take to come up: less than whoever started us waits, who cannot end it.
const UP_BY: Duration = Duration::from_secs(50);

/// A program that is being installed cannot run while somebody writes it; whoever asks for it waits no longer than this.
const WRITTEN_BY: Duration = Duration::from_secs(2);

/// How often is looked whether a daemon is dead that does not go.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The longest message that is heard, in bytes.
const MESSAGE: usize = 8192;

/// The most descriptors that are kept: more than a daemon gives.
const KEPT: usize = 8;

/// What is to be held.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's arguments.
    pub arguments: Vec<OsString>,
    /// Where the mount is, to take it down while there is no daemon; its full path.
    pub point: Option<PathBuf>,
    /// When to give up.
    pub tries: Tries,
    /// The variable by which a daemon finds the descriptors: names and numbers, `name=number,…`.
    pub variable: &'static str,
    /// The variable that tells it why the one before has ended.
    pub why: &'static str,
}

/// Holds until there is nothing to hold any more; the exit code.
pub fn hold(plan: &Plan) -> u8 {
    match Holder::new(plan) {
        Ok(mut holder) => holder.run(),
        Err(error) => {
            say(&format!("cannot hold the mount: {error}"));
            1
        }
    }
}

struct Holder<'a> {
    plan: &'a Plan,
    /// Where relative paths of the arguments begin.
    directory: PathBuf,
    program: PathBuf,
    kept: Vec<(String, OwnedFd)>,
    /// The minor number of the mount's device, once it is up.
    minor: Option<u32>,
    /// The control socket's path and what it was when the daemon gave it.
    socket: Option<(PathBuf, Identity)>,
    signals: OwnedFd,
    told_to_end: bool,
    deaths: Vec<Instant>,
    /// Why the last daemon ended.
    reason: String,
    /// Dead daemons that have not gone yet.
    remains: Vec<Child>,
}

/// A daemon that runs.
struct Daemon {
    child: Child,
    process: OwnedFd,
    socket: OwnedFd,
    ready: bool,
    /// Its end of the socket is open.
    speaks: bool,
    /// It said that it ends, and the mount with it.
    ending: bool,
    restart: Option<PathBuf>,
    since: Instant,
}

impl<'a> Holder<'a> {
    fn new(plan: &'a Plan) -> io::Result<Self> {
        Ok(Self {
            plan,
            directory: std::env::current_dir().unwrap_or_else(|_| "/".into()),
            program: SELF.into(),
            kept: Vec::new(),
            minor: None,
            socket: None,
            signals: signals()?,
            told_to_end: false,
            deaths: Vec::new(),
            reason: String::new(),
            remains: Vec::new(),
        })
    }

    fn run(&mut self) -> u8 {
        // The first daemon says by our stdout how it went.
        let mut stdout = match Ready::adopt() {
            Ok(ready) => Some(Stdio::from(ready)),
            Err(_) => None,
        };
        loop {
            let started = self.start(stdout.take().unwrap_or_else(Stdio::null));
            let mut daemon = match started {
                Ok(daemon) => daemon,
                Err(error) => {
                    say(&format!("cannot start {}: {error}", self.program.display()));
                    self.reason = format!("it could not be started: {error}");
                    self.program = SELF.into();
                    match self.after(false, false) {
                        Next::Start => continue,
                        _ => return 1,
                    }
                }
            };
            let status = self.attend(&mut daemon);
            self.remains.push(daemon.child);
            self.reap();
            self.reason = reason(status);
            let restart = daemon.restart.is_some();
            if let Some(program) = daemon.restart {
                (self.program, self.reason) = (program, "it was told to restart".into());
            } else if !daemon.ready {
                // One that does not come up is not tried again: ours did.
                self.program = SELF.into();
            }
            // One that ends before it was up has done nothing, whatever it says.
            let well = daemon.ready && status.success();
            match self.after(well, restart) {
                Next::Start => {}
                _ => return u8::try_from(status.code().unwrap_or(1)).unwrap_or(1),
            }
        }
    }

    /// Starts a daemon, with a socket to us and with what is kept.
    fn start(&self, stdout: Stdio) -> io::Result<Daemon> {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        let inherited: Vec<_> = self
            .kept
            .iter()
            .map(|(name, descriptor)| (name.as_str(), descriptor))
            .chain([("holder", &theirs)])
            .collect();
        let names: Vec<_> = inherited
            .iter()
            .map(|(name, descriptor)| format!("{name}={}", descriptor.as_raw_fd()))
            .collect();
        let mut command = Command::new(&self.program);
        command
            .arg0("ocifs")
            .args(&self.plan.arguments)
            .env(self.plan.variable, names.join(","))
            .env(self.plan.why, &self.reason)
            .stdin(Stdio::null())
            .stdout(stdout);
        if self.directory.is_dir() {
            command.current_dir(&self.directory);
        }
        // SAFETY: the calls change nothing but the mask of the new process, and may be made there (signal-safety(7)).
        unsafe {
            command.pre_exec(|| {
                let mut none: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut none);
                match libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        // There is one thread here, so nobody else starts a program meanwhile.
        let inherit = |flags| {
            let mut all = inherited.iter();
            all.try_for_each(|(_, descriptor)| fcntl_setfd(descriptor, flags))
        };
        inherit(FdFlags::empty())?;
        let child = command.spawn();
        inherit(FdFlags::CLOEXEC)?;
        let child = child?;
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Daemon {
            child,
            process,
            socket: ours,
            ready: false,
            speaks: true,
            ending: false,
            restart: None,
            since: Instant::now(),
        })
    }

    /// Does what the daemon asks for until it ends.
    fn attend(&mut self, daemon: &mut Daemon) -> ExitStatus {
        loop {
            let mut polled = vec![
                PollFd::new(&daemon.process, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            if daemon.speaks {
                polled.push(PollFd::new(&daemon.socket, PollFlags::IN));
            }
            let count = poll(&mut polled, Some(&timespec(LOOK_EVERY)));
            let happened = |at: usize| {
                let one: Option<&PollFd<'_>> = polled.get(at);
                one.is_some_and(|one| !one.revents().is_empty())
            };
            let (mut ended, signal, spoke) = (happened(0), happened(1), happened(2));
            let stuck = count == Ok(0) && !daemon.ending && is_dying(daemon.child.id());
            ended |= stuck;
            if !daemon.ready && !ended && daemon.since.elapsed() > UP_BY {
                say("the daemon does not come up; it is killed");
                let _ = daemon.child.kill();
                daemon.since = Instant::now();
            }
            // What it said last is heard before its end.
            if spoke || ended {
                while self.hear(daemon) {}
            }
            if signal && self.heard_signal() {
                self.told_to_end = true;
                self.pass_on(daemon);
            }
            if count == Ok(0) {
                self.reap();
            }
            if stuck {
                say("the daemon is dead, and does not go while the kernel waits for an answer");
                return ExitStatus::from_raw(libc::SIGKILL);
            }
            if ended {
                return daemon
                    .child
                    .wait()
                    .unwrap_or_else(|_| ExitStatus::from_raw(1 << 8));
            }
        }
    }

    /// Lets go of dead daemons that have gone by now, so that nothing is left of them.
    fn reap(&mut self) {
        self.remains
            .retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    /// Passes on that the mount is to end, once there is somebody who listens for it.
    fn pass_on(&self, daemon: &Daemon) {
        if self.told_to_end && (daemon.ready || self.kept.is_empty()) {
            let _ = kill_process(Pid::from_child(&daemon.child), Signal::TERM);
        }
    }

    /// Hears one message; whether there may be more.
    fn hear(&mut self, daemon: &mut Daemon) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; MESSAGE];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let data = &mut [IoSliceMut::new(&mut text)];
        let length = match recvmsg(&daemon.socket, data, &mut beside, flags) {
            Ok(message) => message.bytes,
            Err(Errno::INTR) => return true,
            Err(_) => return false,
        };
        if length == 0 {
            daemon.speaks = false;
            return false;
        }
        let descriptor = beside.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut all) => all.next(),
            _ => None,
        });
        let lines = || text[..length].split(|byte| *byte == b'\n');
        let value = |name: &[u8]| lines().find_map(|line| line.strip_prefix(name));
        if value(b"FDSTORE=1").is_some()
            && let (Some(name), Some(descriptor)) = (value(b"FDNAME="), descriptor)
        {
            self.keep(String::from_utf8_lossy(name).into_owned(), descriptor);
        }
        if value(b"FDSTOREREMOVE=1").is_some()
            && let Some(name) = value(b"FDNAME=")
        {
            self.kept.retain(|(known, _)| known.as_bytes() != name);
        }
        if value(b"READY=1").is_some() {
            daemon.ready = true;
            let point = self.plan.point.as_deref();
            let mount = || point.and_then(|point| point::find(point).ok());
            self.minor = self.minor.or_else(|| mount().map(|mount| mount.minor));
            super::daemon::leave_session();
            // No directory is kept busy by standing in it.
            let _ = std::env::set_current_dir("/");
            self.pass_on(daemon);
        }
        daemon.ending |= value(b"STOPPING=1").is_some();
        if let Some(program) = value(b"X_OCIFS_RESTART=") {
            daemon.restart = Some(OsString::from_vec(program.to_vec()).into());
        }
        true
    }

    fn keep(&mut self, name: String, descriptor: OwnedFd) {
        if name == CONTROL {
            self.socket = control::named(descriptor.as_fd());
        }
        // It comes last, and whoever mounts has not heard yet that the mount is up.
        if name == DEVICE {
            super::daemon::leave_session();
        }
        self.kept.retain(|(known, _)| *known != name);
        if self.kept.len() < KEPT {
            self.kept.push((name, descriptor));
        }
    }

    /// A signal to end.
    fn heard_signal(&self) -> bool {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        matches!(rustix::io::read(&self.signals, &mut info), Ok(length) if length > 0)
    }

    /// What follows a daemon that has ended, done as far as it is not to start another one.
    fn after(&mut self, well: bool, restart: bool) -> Next {
        if !restart {
            let now = Instant::now();
            self.deaths
                .retain(|at| now.duration_since(*at) < self.plan.tries.within);
            self.deaths.push(now);
        }
        let mut ending = Ending {
            was_held: self.device().is_some(),
            restart,
            well,
            mounted: self.is_mounted(Duration::ZERO),
            told_to_end: self.told_to_end,
            deaths: self.deaths.len(),
        };
        let mut decided = next(ending, self.plan.tries);
        if decided == Next::Start && !restart {
            say(&format!(
                "the daemon died ({}); the next one takes over",
                self.reason
            ));
            // What happens meanwhile counts.
            ending.mounted = self.is_mounted(pause(self.deaths.len()));
            self.told_to_end |= self.heard_signal();
            ending.told_to_end = self.told_to_end;
            decided = next(ending, self.plan.tries);
        }
        match decided {
            Next::Start => return decided,
            Next::End => {}
            Next::TakeDown => self.take_down(),
            Next::GiveUp => {
                say(&format!(
                    "the daemon died {} times in {:?}, at last because {}: the mount is given up, and its readers get errors",
                    self.deaths.len(),
                    self.plan.tries.within,
                    self.reason
                ));
                self.abort();
            }
        }
        self.clean(decided);
        decided
    }

    fn device(&self) -> Option<&OwnedFd> {
        let device = self.kept.iter().find(|(name, _)| name == DEVICE);
        device.map(|(_, descriptor)| descriptor)
    }

    /// Whether the connection is there, looked at for as long as `wait`: the kernel says at once when it is not
    /// (`fuse_dev_poll` in fs/fuse/dev.c).
    fn is_mounted(&self, wait: Duration) -> bool {
        let Some(device) = self.device() else {
            std::thread::sleep(wait);
            return true;
        };
        let mut polled = [PollFd::new(device, PollFlags::empty())];
        let _ = poll(&mut polled, Some(&timespec(wait)));
        !polled[0].revents().contains(PollFlags::ERR)
    }

    fn take_down(&self) {
        let Some(path) = &self.plan.point else {
            return;
        };
        if point::find(path).is_ok()
            && let Err(error) = umount::detach(path, UnmountFlags::DETACH)
        {
            say(&format!("{error}"));
        }
    }

    /// Ends the connection, whoever else has the device open: a daemon that was killed keeps it while a thread of it waits in the
    /// kernel for what only an answer would bring. The mount stays where it is, so that its readers see that it is dead. Root ends it by
    /// umount(2), others by the file that the kernel has for whoever mounts. Where neither is to be had, as in a container
    /// without fusectl, the connection ends with the last descriptor.
    fn abort(&self) {
        let Some(path) = &self.plan.point else {
            return;
        };
        if let Some(minor) = self.minor
            && fs::write(control_file(minor), "1").is_ok()
        {
            return;
        }
        // Another mount may hide ours by now, and is nobody's to end here.
        if !point::find(path).is_ok_and(|top| self.minor.is_none_or(|minor| top.minor == minor)) {
            return;
        }
        // What is open is busy, so `umount_begin` (fs/fuse/inode.c) ends the connection and nothing is unmounted.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(_busy) = rustix::fs::open(path, flags, rustix::fs::Mode::empty()) else {
            return;
        };
        if let Err(error) = rustix::mount::unmount(path, UnmountFlags::FORCE)
            && error != Errno::BUSY
        {
            say(&format!(
                "the connection cannot be ended ({error}): its readers wait until all of the dead daemon is gone"
            ));
        }
    }

    /// Leaves nothing behind: the control socket of a daemon that could not remove it, and, where all is well, the log.
    fn clean(&mut self, decided: Next) {
        if let Some((path, identity)) = self.socket.take() {
            control::remove(&path, identity);
        }
        self.kept.clear();
        if decided == Next::TakeDown
            && let Ok(log) = fs::read_link("/proc/self/fd/2")
            && log.extension().is_some_and(|extension| extension == "log")
        {
            let _ = fs::remove_file(log);
        }
    }
}

/// What ends a connection when it is written to: in fusectl, by the minor number of the mount's device (fs/fuse/control.c). It belongs
/// to whoever mounted.
fn control_file(minor: u32) -> PathBuf {
    format!("/sys/fs/fuse/connections/{minor}/abort").into()
}

/// Whether the main thread of a process is dead (proc_pid_stat(5)). The process may have others yet.
fn is_dying(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may hold anything.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes());
    matches!(state, Some([b'Z' | b'X', ..]))
}

/// How a daemon ended, for people.
fn reason(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("killed by signal {signal}"),
        (None, Some(code)) => format!("it ended with code {code}"),
        (None, None) => "it ended".to_owned(),
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// SIGTERM and SIGINT from now on as something to read.
fn signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero set is a valid one to be emptied, and the calls only read and write that set.
    let (descriptor, blocked) = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        let blocked = libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        (libc::signalfd(-1, &raw const set, flags), blocked)
    };
    if descriptor < 0 || blocked < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was opened just now, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Says something in the log that the daemon writes to as well.
fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "holder: {text}");
}

/// Whether `program` is one that can take over from this one.
pub fn can_take_over(program: &Path, check: &[OsString], patience: Duration) -> bool {
    let mut command = Command::new(program);
    command
        .args(check)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let deadline = Deadline::after(patience.min(WRITTEN_BY));
    let mut child = loop {
        match command.spawn() {
            Ok(child) => break child,
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                if deadline.passed() {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(_) => return false,
        }
    };
    let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
        .is_ok_and(|process| umount::ends_within(&process, patience));
    if !ended {
        let _ = child.kill();
    }
    child.wait().is_ok_and(|status| ended && status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_main_thread_is_seen_while_another_one_goes_on() {
        let mut child = Command::new("python3")
            .arg("-c")
            .arg(format!(
                "import ctypes, threading, time\n\
                 threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n\
                 time.sleep(.3)\n\
                 ctypes.CDLL(None).syscall(ctypes.c_long({}), ctypes.c_long(0))\n",
                libc::SYS_exit
            ))
            .spawn()
            .unwrap();
        assert!(!is_dying(child.id()));
        let end = Instant::now() + Duration::from_secs(60);
        while !is_dying(child.id()) {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(matches!(child.try_wait(), Ok(None)), "it has not ended");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_dying(child.id()) && !is_dying(std::process::id()));
    }

    #[test]
    fn a_program_that_cannot_take_over_is_told() {
        let check = |program: &str, argument: &str| {
            let arguments = ["-c".into(), argument.into()];
            can_take_over(Path::new(program), &arguments, Duration::from_secs(20))
        };
        assert!(check("/bin/sh", "exit 0"));
        assert!(!check("/bin/sh", "exit 2"));
        assert!(!check("/nonexistent", ""));

        // One that is still being written is waited for.
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::copy("/bin/sh", &program).unwrap();
        let writer = fs::File::options().append(true).open(&program).unwrap();
        let ends = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(writer);
        });
        assert!(check(program.to_str().unwrap(), "exit 0"));
        ends.join().unwrap();

        let slow = ["-c".into(), "exec sleep 60".into()];
        let patience = Duration::from_millis(50);
        assert!(!can_take_over(Path::new("/bin/sh"), &slow, patience));
    }
}
