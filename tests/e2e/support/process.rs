//! Programs with a deadline, and daemons that end with their guard.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// What a program said.
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
    shown: String,
}

impl Output {
    /// Its standard output, after it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        String::from_utf8(self.ok_bytes()).expect("output is UTF-8")
    }

    /// Its standard output as bytes, after it succeeded.
    #[track_caller]
    pub fn ok_bytes(self) -> Vec<u8> {
        assert!(self.status.success(), "{self}");
        self.stdout
    }

    /// Its standard output and error, after it failed by an exit code of its own (no signal, no panic).
    #[track_caller]
    pub fn failed(self) -> String {
        assert!(
            !self.status.success(),
            "succeeded, should have failed: {self}"
        );
        assert!(
            self.status.code().is_some_and(|code| code != 101),
            "crashed: {self}"
        );
        format!("{}{}", String::from_utf8_lossy(&self.stdout), self.stderr)
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let stdout = String::from_utf8_lossy(&self.stdout);
        write!(
            f,
            "{}: {}\nstdout: {}\nstderr: {}",
            self.shown,
            self.status,
            tail(&stdout),
            tail(&self.stderr)
        )
    }
}

/// The last part of a long text.
pub fn tail(text: &str) -> &str {
    const KEPT: usize = 6000;
    let mut start = text.len().saturating_sub(KEPT);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// Runs a program found by name; `args` are its arguments.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Output {
    run_command(Command::new(program).args(args), super::PATIENCE)
}

/// Runs a command; kills it and panics when it takes longer than `limit`.
pub fn run_command(command: &mut Command, limit: Duration) -> Output {
    run_with_input(command, &[], limit)
}

/// Runs a command with `input` on its standard input.
pub fn run_with_input(command: &mut Command, input: &[u8], limit: Duration) -> Output {
    let shown = format!("{command:?}");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match spawn(command) {
        Ok(child) => child,
        Err(error) => {
            panic!("cannot run {shown}: {error}; tests/setup.sh installs what the tests need")
        }
    };
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let input = input.to_vec();
    // A program that does not read its input to the end is free to do so.
    let feed = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    let err = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stderr.read_to_end(&mut bytes).map(|_| bytes)
    });
    let Some(status) = wait(&mut child, limit) else {
        drop(child.kill());
        // Not `wait`: a process in an uninterruptible read of a hung mount ends only with the mount.
        panic!("{shown}: took longer than {limit:?}");
    };
    drop(feed.join());
    let stdout = out.join().unwrap().unwrap_or_default();
    let stderr = err.join().unwrap().unwrap_or_default();
    Output {
        status,
        stdout,
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        shown,
    }
}

/// Starts a command. A program that a test has just written may still be open in a child of another test, between its fork(2) and
/// its exec(2): that is over in a moment.
fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let end = Instant::now() + super::PATIENCE;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Waits for a child at most `limit`.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("the child can be waited for") {
            return Some(status);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A server or mount that runs beside the test. Its log is shown when the test fails, and it ends with this guard.
pub struct Daemon {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a command in a process group of its own; what it says goes to the file `log`.
    pub fn start(name: &'static str, command: &mut Command, log: &Path) -> Self {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("a log file");
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .process_group(0);
        let child = match spawn(command) {
            Ok(child) => child,
            Err(error) => panic!(
                "cannot start {command:?}: {error}; tests/setup.sh installs what the tests need"
            ),
        };
        Self {
            name,
            child,
            log: log.to_owned(),
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it said so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("the child can be waited for")
            .is_none()
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        wait(&mut self.child, limit)
    }

    /// Sends a signal to this process alone.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("our child can be signalled");
    }

    /// Kills it and what it started, and waits for its end.
    pub fn kill(&mut self) {
        if self.is_running() {
            // The group exists for as long as its leader has not been waited for.
            let _ = kill_process_group(self.pid(), Signal::KILL);
            let _ = self.wait(super::PATIENCE);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!(
                "---- log of {} ----\n{}\n----",
                self.name,
                tail(&self.log())
            );
        }
    }
}
