//! The chat, as a person at a terminal has it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Signal, ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::smollm::{smollm, with_runner};
use crate::support::mount::ocifs;
use crate::support::process::run_command;
use crate::support::registry::Registry;
use crate::support::{heavy, scratch};

/// Unoptimised inner loops on a loaded machine.
const LONG: Duration = Duration::from_secs(900);

/// A program whose controlling terminal is ours.
struct Terminal {
    child: Child,
    keys: File,
    pieces: Receiver<Vec<u8>>,
    shown: String,
    /// What comes before was expected already.
    from: usize,
}

impl Terminal {
    fn start(mut command: Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let end = || OwnedFd::from(slave.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: only system calls are made between fork and exec.
        unsafe {
            command.pre_exec(move || {
                setsid()?;
                Ok(ioctl_tiocsctty(&slave)?)
            });
        }
        let child = command.spawn().unwrap();
        // The command holds the other end of the terminal, whose last close is the end of what it shows.
        drop(command);
        let keys = File::from(master);
        let mut screen = keys.try_clone().unwrap();
        let (sender, pieces) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = screen.read(&mut buffer) {
                if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            keys,
            pieces,
            shown: String::new(),
            from: 0,
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `what` holds for what is shown after the last that was expected, which it gives back.
    fn until(&mut self, name: &str, what: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + LONG;
        while !what(&self.shown[self.from..]) {
            let left = end.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(left) {
                Ok(piece) => self.shown += &String::from_utf8_lossy(&piece),
                Err(_) => panic!("no {name}: {}", self.shown),
            }
        }
        let new = self.shown[self.from..].to_owned();
        self.from = self.shown.len();
        new
    }

    fn prompt(&mut self) -> String {
        self.until("prompt", |new| new.ends_with("> "))
    }

    fn end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = rustix::process::kill_process(
                rustix::process::Pid::from_child(&self.child),
                Signal::TERM,
            );
            let _ = self.child.wait();
        }
    }
}

/// Two turns, an answer that is broken off, another one, and the end.
fn talk(mut terminal: Terminal) {
    terminal.prompt();
    terminal.press("What is the capital of France?\n");
    let first = terminal.prompt();
    assert!(
        first.contains("Paris") && first.contains("tokens/s"),
        "{first}"
    );

    // The terminal shows it while it comes: there is something before the answer is over.
    terminal.press("Tell me a very long story about a fox.\n");
    let streamed = terminal.until("answer", |new| {
        new.split_once("fox.\r\n")
            .is_some_and(|(_, answer)| answer.len() > 10)
    });
    assert!(
        !streamed.contains("tokens/s"),
        "it came at once: {streamed}"
    );
    terminal.press("\x03");
    let stopped = terminal.prompt();
    assert!(stopped.contains("stopped: "), "{stopped}");

    // Without an answer to stop, Ctrl-C ends nothing either; what was typed is gone.
    terminal.press("never mind\x03");
    let hint = terminal.prompt();
    assert!(hint.contains("Ctrl-D"), "{hint}");
    terminal.press("\n");
    terminal.prompt();
    terminal.press("What did I ask you first?\n");
    let last = terminal.prompt();
    assert!(
        last.contains("tokens/s") && !last.contains("stopped"),
        "{last}"
    );

    terminal.press("\x04");
    let status = terminal.end();
    assert!(status.success(), "{status}");
}

#[test]
fn a_chat_streams_and_survives_an_interrupt() {
    let _alone = heavy();
    let dir = smollm().to_str().unwrap();
    let command = ocifs(["run", dir, "--temp", "0", "-n", "60", "--device", "cpu"]);
    talk(Terminal::start(with_runner(command)));
}

#[test]
fn an_interrupt_leaves_a_chat_its_mount() {
    let _alone = heavy();
    let registry = Registry::open();
    let reference = format!("{}/org/smollm2:v1", registry.host());
    let push = ["push", smollm().to_str().unwrap(), &reference];
    run_command(&mut ocifs(push), LONG).ok();
    let cache = scratch("cache");
    let cache = cache.path().to_str().unwrap();
    let command = ocifs([
        "run",
        &reference,
        "--cache-dir",
        cache,
        "--temp",
        "0",
        "-n",
        "60",
        "--device",
        "cpu",
    ]);
    let before = mounts();
    talk(Terminal::start(with_runner(command)));
    assert!(mounts() <= before, "a mount was left");
}

fn mounts() -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.matches("ocifs").count()
}
