//! Waits that end when the kernel says that whoever waits is about to die.
//!
//! The kernel sends INTERRUPT for any signal. Only those that end the process end a wait here: an answer of EINTR to a page fault
//! is SIGBUS for a program that merely had a timer go off, and one to open(2) or fread(3) is an error that few programs expect
//! of a file. It is the rule of a network file system's hard mounts: killable, not interruptible.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use crate::base::lock;

/// An INTERRUPT may overtake its request, which another thread has read and not come to yet. So many are remembered.
const EARLY: usize = 128;

/// How often is looked whether a process that a signal has reached is dying by now: the kernel tells of the first signal only.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The requests that wait, by number.
#[derive(Debug, Default)]
pub(super) struct Interrupts(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<u64, Arc<Notify>>,
    early: VecDeque<u64>,
}

/// A request that waits, until this is dropped.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    interrupts: &'a Interrupts,
    unique: u64,
    signal: Arc<Notify>,
}

impl Interrupts {
    /// A signal came for whoever waits for the request.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut state = lock(&self.0);
        if let Some(signal) = state.waiting.get(&unique) {
            return signal.notify_one();
        }
        if state.early.len() >= EARLY {
            state.early.pop_front();
        }
        state.early.push_back(unique);
    }

    /// A request begins to wait.
    pub(super) fn wait(&self, unique: u64) -> Waiting<'_> {
        let signal = Arc::new(Notify::new());
        let mut state = lock(&self.0);
        if let Some(at) = state.early.iter().position(|early| *early == unique) {
            state.early.remove(at);
            signal.notify_one();
        }
        state.waiting.insert(unique, Arc::clone(&signal));
        Waiting {
            interrupts: self,
            unique,
            signal,
        }
    }
}

impl Waiting<'_> {
    /// Returns when the thread `pid`, which waits for the request, is about to die.
    pub(super) async fn killed(&self, pid: u32) {
        self.signal.notified().await;
        while !is_dying(pid) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.interrupts.0).waiting.remove(&self.unique);
    }
}

/// Whether a signal is pending for a thread that will end it. Of one that cannot be seen from here, in another pid namespace,
/// it is not believed.
fn is_dying(pid: u32) -> bool {
    pid != 0
        && fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| is_ending(&status))
}

/// Whether this `/proc/PID/status` (proc_pid_status(5)) tells of a pending signal that ends the process.
fn is_ending(status: &str) -> bool {
    let set = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(value.strip_prefix(':')?.trim(), 16).ok()
    };
    let bit = |signal: i32| 1_u64 << (signal - 1);
    let pending = set("SigPnd").unwrap_or(0) | set("ShdPnd").unwrap_or(0);
    // A signal that kills is made SIGKILL for each thread at once, but for those that dump core (`complete_signal` in
    // kernel/signal.c).
    if pending & bit(libc::SIGKILL) != 0 {
        return true;
    }
    let harmless = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    let survived = harmless
        .into_iter()
        .fold(0, |set, signal| set | bit(signal));
    let [Some(blocked), Some(ignored), Some(caught)] = ["SigBlk", "SigIgn", "SigCgt"].map(set)
    else {
        return false;
    };
    pending & !survived & !blocked & !ignored & !caught != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(pending: u64, shared: u64, blocked: u64, ignored: u64, caught: u64) -> String {
        format!(
            "Name:\tcat\nState:\tD (disk sleep)\nSigQ:\t0/1\nSigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\n\
             SigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\nCapInh:\t0\n"
        )
    }

    #[test]
    fn a_signal_ends_a_process_unless_it_is_handled() {
        let bit = |signal: i32| 1_u64 << (signal - 1);
        let (kill, quit, alarm, child) = (bit(9), bit(3), bit(14), bit(17));
        assert!(is_ending(&status(kill, 0, 0, 0, 0)));
        assert!(is_ending(&status(kill, 0, u64::MAX, u64::MAX, u64::MAX)));
        assert!(is_ending(&status(0, quit, 0, 0, 0)));
        assert!(!is_ending(&status(0, quit, 0, 0, quit)), "caught");
        assert!(!is_ending(&status(0, quit, 0, quit, 0)), "ignored");
        assert!(!is_ending(&status(0, quit, quit, 0, 0)), "blocked");
        assert!(!is_ending(&status(0, alarm, 0, 0, alarm)));
        assert!(!is_ending(&status(0, child, 0, 0, 0)));
        assert!(!is_ending(&status(0, 0, 0, 0, 0)));
        assert!(!is_ending("") && !is_ending("SigPnd:\tx\nShdPnd\n"));
        assert!(!is_dying(0) && !is_dying(std::process::id()));
        assert!(!is_dying(u32::MAX));
    }

    #[tokio::test]
    async fn an_interrupt_may_come_before_its_request() {
        let interrupts = Interrupts::default();
        let heard = |waiting: Waiting<'_>| {
            let signal = Arc::clone(&waiting.signal);
            drop(waiting);
            async move {
                tokio::time::timeout(Duration::from_millis(20), signal.notified())
                    .await
                    .is_ok()
            }
        };
        interrupts.interrupt(7);
        assert!(heard(interrupts.wait(7)).await);
        assert!(!heard(interrupts.wait(7)).await, "it is used up");
        let waiting = interrupts.wait(8);
        interrupts.interrupt(8);
        assert!(heard(waiting).await);
        for unique in 100..100 + 2 * EARLY as u64 {
            interrupts.interrupt(unique);
        }
        assert_eq!(lock(&interrupts.0).early.len(), EARLY);
        assert!(lock(&interrupts.0).waiting.is_empty());
    }
}
