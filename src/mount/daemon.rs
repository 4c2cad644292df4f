//! Going to the background: a second process of the same program, and a pipe by which it says that the mount is up.
//!
//! The first process does not fork: it may have threads. It starts `/proc/self/exe` again with arguments of the caller's, whose stdout
//! is the pipe, and waits. The second calls [`Ready::adopt`] first and then, when the mount is up or cannot be,
//! [`Ready::signal`] or [`Ready::fail`]. Should it end without either, the pipe closes and the first one says so.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::base::Deadline;

/// What the second process writes when the mount is up.
const UP: &[u8] = b"ok\n";

/// The longest error text that is read, in bytes.
const TEXT_MAX: u64 = 64 << 10;

/// Starts this program again with `args`, apart from the terminal, its messages going to `log` or nowhere. Returns its
/// process id when it has called [`Ready::signal`], or the text of [`Ready::fail`]. It is stopped when it says nothing for
/// `patience`.
pub fn spawn_detached(
    args: impl IntoIterator<Item = OsString>,
    log: Option<File>,
    patience: Duration,
) -> Result<u32, String> {
    // The file that runs, even where a newer one has its name by now.
    start(Path::new("/proc/self/exe"), args, log, patience)
}

fn start(
    program: &Path,
    args: impl IntoIterator<Item = OsString>,
    log: Option<File>,
    patience: Duration,
) -> Result<u32, String> {
    let failed = |error: io::Error| format!("cannot start the daemon: {error}");
    let (mut reader, writer) = io::pipe().map_err(failed)?;
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(log.map_or_else(Stdio::null, Stdio::from));
    if program == Path::new("/proc/self/exe") {
        command.arg0("ocifs");
    }
    let mut child = command.spawn().map_err(failed)?;
    // The command holds the writing end; while it does, the pipe would never close.
    drop(command);
    let answer = read_answer(&mut reader, patience);
    match answer {
        Ok(text) if text.starts_with(UP) => Ok(child.id()),
        Ok(text) if text.is_empty() => Err(format!(
            "the daemon ended before the mount was up ({})",
            ending(&mut child)
        )),
        Ok(text) => {
            let _ = child.wait();
            Err(String::from_utf8_lossy(&text).trim().to_owned())
        }
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(format!("the daemon did not bring the mount up: {error}"))
        }
    }
}

fn ending(child: &mut Child) -> String {
    child
        .wait()
        .map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Reads until the line that says that all is well, or the end.
fn read_answer(reader: &mut PipeReader, patience: Duration) -> io::Result<Vec<u8>> {
    let deadline = Deadline::after(patience);
    let mut text = Vec::new();
    loop {
        let left = deadline.left();
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(
            &mut [PollFd::new(&reader.as_fd(), PollFlags::IN)],
            Some(&timeout),
        ) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("nothing heard for {patience:?}"),
                ));
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let mut piece = [0; 4096];
        let length = reader.read(&mut piece)?;
        text.extend_from_slice(&piece[..length]);
        if length == 0 || text == UP || text.len() as u64 > TEXT_MAX {
            return Ok(text);
        }
    }
}

/// Leaves the session of the terminal, once the mount is made and not before: below an automount point only processes of the group
/// that mounts may look at the mount point, everybody else waits for the mount (`autofs_oz_mode` in fs/autofs/autofs_i.h).
pub(super) fn leave_session() {
    // Fails only for the leader of a group, which a process that was started from here is not; then there is no terminal to leave.
    let _ = rustix::process::setsid();
}

/// The second process's end of the pipe.
#[derive(Debug)]
pub struct Ready(PipeWriter);

impl From<Ready> for Stdio {
    /// The pipe, for a third process that is to say how it went.
    fn from(ready: Ready) -> Self {
        ready.0.into()
    }
}

impl Ready {
    /// Takes the pipe from stdout, which becomes /dev/null. To be called before anything is written to stdout.
    pub fn adopt() -> io::Result<Self> {
        let pipe = io::stdout().as_fd().try_clone_to_owned()?;
        let null = OpenOptions::new().write(true).open("/dev/null")?;
        // SAFETY: both descriptors are open, and replacing what number 1 stands for breaks no owner: the standard library
        // treats it as borrowed for ever.
        if unsafe { libc::dup2(null.as_raw_fd(), libc::STDOUT_FILENO) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(PipeWriter::from(pipe)))
    }

    /// The mount is up: the first process returns. From here on no directory is kept busy by standing in it, and no terminal's end is
    /// this process's.
    pub fn signal(mut self) -> io::Result<()> {
        leave_session();
        std::env::set_current_dir("/")?;
        self.0.write_all(UP)
    }

    /// The mount cannot be: the first process prints `text`.
    pub fn fail(mut self, text: &str) -> io::Result<()> {
        self.0.write_all(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, patience: Duration) -> Result<u32, String> {
        start(
            Path::new("/bin/sh"),
            ["-c".into(), script.into()],
            None,
            patience,
        )
    }

    #[test]
    fn the_first_process_hears_how_it_went() {
        let long = Duration::from_secs(20);
        assert!(run("echo ok", long).is_ok());
        assert_eq!(
            run("echo /models cannot be mounted on: no; exit 1", long).unwrap_err(),
            "/models cannot be mounted on: no"
        );
        let ended = run("exit 3", long).unwrap_err();
        assert!(ended.contains("exit status: 3"), "{ended}");
        let hung = run("exec sleep 60", Duration::from_millis(50)).unwrap_err();
        assert!(hung.contains("nothing heard"), "{hung}");
        let missing = start(Path::new("/nonexistent"), [], None, long).unwrap_err();
        assert!(missing.contains("cannot start"), "{missing}");
    }
}
