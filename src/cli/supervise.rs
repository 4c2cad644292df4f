//! Who watches over a mount's daemon, as the environment tells: systemd, a holder of ours, or nobody. And the entry of the holder
//! itself, which comes before everything else so that there is nothing of everything else in it.

use std::ffi::OsString;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::mount::{self, Keeper, Kept, Left, Plan, SessionRecord, Tries};
use crate::tree::{JOURNAL_FORMAT, Journal, State};

/// The first argument of the holder. `ocifs holder --check FORMAT` ends well when this program can take over a journal of that
/// format; `ocifs holder POINT mount …` holds.
pub(super) const HOLDER: &str = "holder";
const CHECK: &str = "--check";

/// By this a holder's daemon finds its descriptors: `name=number,…`.
const HELD: &str = "OCIFS_HELD";
/// By this it hears why the one before it ended.
const WHY: &str = "OCIFS_HELD_WHY";
/// When the holder gives up: DEATHS/SECONDS.
const TRIES: &str = "OCIFS_HOLDER_TRIES";

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START`).
const LISTEN_FDS_START: RawFd = 3;
/// More are not believed.
const LISTEN_FDS_MOST: RawFd = 64;

/// How long a program may take to say whether it can take over.
const CHECK_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the holder if that is what was started.
pub(super) fn holder(arguments: &[OsString]) -> Option<ExitCode> {
    let [_, first, rest @ ..] = arguments else {
        return None;
    };
    if first != HOLDER {
        return None;
    }
    let code = match rest {
        [check, format] if check == CHECK => {
            u8::from(format.to_str() != Some(JOURNAL_FORMAT.to_string().as_str()))
        }
        [point, daemon @ ..] => mount::hold(&Plan {
            arguments: daemon.to_vec(),
            point: Some(point.into()),
            tries: std::env::var(TRIES)
                .ok()
                .and_then(|text| tries(&text))
                .unwrap_or_default(),
            variable: HELD,
            why: WHY,
        }),
        [] => 2,
    };
    Some(code.into())
}

/// Keeps a mount that is started for this process alone from the manager whose service this process may be: it would take the mount
/// for the service, which it is not.
pub(super) fn without_manager(command: &mut Command) {
    for name in [
        "NOTIFY_SOCKET",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    ] {
        command.env_remove(name);
    }
}

fn tries(text: &str) -> Option<Tries> {
    let (deaths, seconds) = text.split_once('/')?;
    Some(Tries {
        deaths: deaths.parse().ok()?,
        within: Duration::from_secs(seconds.parse().ok()?),
    })
}

/// Who watches over this process, and what the one before it has left.
#[derive(Debug, Default)]
pub(super) struct Supervision {
    pub(super) keeper: Option<Arc<Keeper>>,
    /// How often the service manager wants to hear that this process goes on.
    pub(super) watchdog: Option<Duration>,
    left: Option<Left>,
    why: String,
}

/// A session to go on with.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) left: Left,
    pub(super) journal: Arc<Journal>,
    pub(super) state: State,
    pub(super) record: SessionRecord,
}

impl Supervision {
    /// As the environment tells, from which it is then taken: it is not for programs that are started from here. To be called
    /// while there is one thread.
    pub(super) fn of_process() -> Self {
        let read = |name: &str| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
            // SAFETY: no other thread is there that could look at the environment.
            unsafe { std::env::remove_var(name) };
            Some(value)
        };
        let held = read(HELD);
        let why = read(WHY).and_then(|why| why.into_string().ok());
        let notify = read("NOTIFY_SOCKET");
        let watchdog = ["WATCHDOG_USEC", "WATCHDOG_PID"].map(read);
        let listen = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].map(read);
        if let Some(held) = held {
            return Self::of_holder(&held.to_string_lossy(), why.unwrap_or_default());
        }
        let Some(address) = notify else {
            return Self::default();
        };
        let keeper = match Keeper::manager(&address) {
            Ok(keeper) => Some(Arc::new(keeper)),
            Err(error) => {
                tracing::warn!(%error, ?address, "the service manager cannot be reached");
                None
            }
        };
        let [pid, count, names] = listen.map(|value| value?.into_string().ok());
        let kept = passed(pid, count, names, std::process::id());
        let [limit, pid] = watchdog.map(|value| value?.into_string().ok());
        Self {
            keeper,
            watchdog: half_of_watchdog(limit, pid, std::process::id()),
            left: Left::from_kept(kept.into_iter().map(open)),
            why: "the process before it ended".to_owned(),
        }
    }

    fn of_holder(held: &str, why: String) -> Self {
        let (mut keeper, mut kept) = (None, Vec::new());
        for (name, descriptor) in pairs(held).map(open) {
            if name != HOLDER {
                kept.push((name, descriptor));
                continue;
            }
            match Keeper::holder(descriptor) {
                Ok(holder) => keeper = Some(Arc::new(holder)),
                Err(error) => tracing::warn!(%error, "the holder cannot be reached"),
            }
        }
        Self {
            keeper,
            watchdog: None,
            left: Left::from_kept(kept),
            why,
        }
    }

    /// The session that the process before this one has left, if there is one that can be gone on with. One that cannot is
    /// ended: its readers get errors.
    pub(super) fn taken(&mut self) -> Option<Taken> {
        let left = self.left.take()?;
        let resumed = (|| {
            let (journal, state) = Journal::resume(left.journal.try_clone()?)?;
            let record = SessionRecord::parse(state.session())?;
            anyhow::Ok((journal, state, record))
        })();
        match resumed {
            Ok((journal, mut state, record)) => {
                journal.taken_over(&self.why);
                state.takes_over(&self.why);
                Some(Taken {
                    left,
                    journal: Arc::new(journal),
                    state,
                    record,
                })
            }
            Err(error) => {
                tracing::error!(
                    "the mount of the process before this one cannot be gone on with, and is ended: {error:#}"
                );
                if let Some(keeper) = &self.keeper {
                    keeper.forget();
                }
                None
            }
        }
    }

    /// A journal, where somebody is there to keep it.
    pub(super) fn journal(&self) -> Option<Arc<Journal>> {
        self.keeper.as_ref()?;
        match Journal::new() {
            Ok(journal) => Some(Arc::new(journal)),
            Err(error) => {
                tracing::warn!(%error, "should this process die, the mount ends with it");
                None
            }
        }
    }
}

/// Has the keeper start the program that stands at our path now, once this process has ended.
///
/// # Errors
/// When nobody would start it, or it could not go on from here.
pub(super) fn prepare_restart(keeper: Option<&Keeper>) -> Result<PathBuf> {
    let Some(keeper) = keeper else {
        bail!(
            "nobody would start another process: it was mounted with --foreground, not as a service"
        );
    };
    if let Kept::HolderGone(pid) = keeper.who() {
        bail!("nobody would start another process: the holder, process {pid}, has ended");
    }
    let exe = std::env::current_exe().context("cannot tell which program this is")?;
    let program = path_of(&exe);
    let check = [HOLDER, CHECK, &JOURNAL_FORMAT.to_string()].map(OsString::from);
    if !mount::can_take_over(&program, &check, CHECK_PATIENCE) {
        bail!(
            "{} cannot take over from this version of ocifs ({}); unmount and mount again",
            program.display(),
            env!("CARGO_PKG_VERSION")
        );
    }
    Ok(program)
}

/// Where a program was started from; the kernel marks the name of one that was replaced or removed (proc_pid_exe(5)).
fn path_of(exe: &Path) -> PathBuf {
    let text = exe.to_string_lossy();
    match text.strip_suffix(" (deleted)") {
        Some(path) if !exe.exists() => path.into(),
        _ => exe.to_owned(),
    }
}

fn pairs(held: &str) -> impl Iterator<Item = (String, RawFd)> {
    held.split(',').filter_map(|pair| {
        let (name, number) = pair.split_once('=')?;
        let number = number.parse().ok().filter(|number| *number > 2)?;
        Some((name.to_owned(), number))
    })
}

/// Names and numbers of the descriptors that the service manager has passed, as sd_listen_fds_with_names(3) reads them.
fn passed(
    pid: Option<String>,
    count: Option<String>,
    names: Option<String>,
    own: u32,
) -> Vec<(String, RawFd)> {
    let ours = pid.and_then(|pid| pid.parse().ok()) == Some(own);
    let count = count.and_then(|count| count.parse::<RawFd>().ok());
    let count = count
        .filter(|count| ours && (0..=LISTEN_FDS_MOST).contains(count))
        .unwrap_or(0);
    let names = names.unwrap_or_default();
    let names = names.split(':').map(str::to_owned);
    names
        .zip(LISTEN_FDS_START..LISTEN_FDS_START + count)
        .collect()
}

/// Half of the time after which the service manager kills who says nothing, as sd_watchdog_enabled(3) has it.
fn half_of_watchdog(limit: Option<String>, pid: Option<String>, own: u32) -> Option<Duration> {
    let ours = pid.is_none_or(|pid| pid.parse() == Ok(own));
    let limit: u64 = limit?.parse().ok()?;
    (ours && limit > 1).then(|| Duration::from_micros(limit / 2))
}

fn open((name, number): (String, RawFd)) -> (String, OwnedFd) {
    // SAFETY: it was passed to this process for it to use, under a variable that is read once. Should that have lied and the
    // number be of nobody's, then the first use says so.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    (name, descriptor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_found_as_both_keepers_pass_them() {
        let all: Vec<_> = pairs("ocifs-device=4,holder=7,x=2,y,z=-1,=9").collect();
        assert_eq!(
            all,
            [
                ("ocifs-device".to_owned(), 4),
                ("holder".to_owned(), 7),
                (String::new(), 9)
            ]
        );
        let text = |text: &str| Some(text.to_owned());
        let ask = |pid: &str, count: &str| passed(text(pid), text(count), text("a:b"), 42);
        assert_eq!(ask("42", "2"), [("a".to_owned(), 3), ("b".to_owned(), 4)]);
        assert_eq!(ask("42", "1"), [("a".to_owned(), 3)]);
        for (pid, count) in [("41", "2"), ("42", "-1"), ("42", "1000"), ("", "2")] {
            assert!(ask(pid, count).is_empty(), "{pid} {count}");
        }
        assert!(passed(None, None, None, 42).is_empty());
    }

    #[test]
    fn the_watchdog_is_for_this_process_or_for_nobody() {
        let ask = |limit: Option<&str>, pid: Option<&str>| {
            half_of_watchdog(limit.map(str::to_owned), pid.map(str::to_owned), 42)
        };
        let half = Some(Duration::from_secs(1));
        assert_eq!(ask(Some("2000000"), Some("42")), half);
        assert_eq!(ask(Some("2000000"), None), half);
        assert_eq!(ask(Some("2000000"), Some("41")), None);
        for limit in [None, Some("0"), Some("-1"), Some("x")] {
            assert_eq!(ask(limit, Some("42")), None, "{limit:?}");
        }
    }

    #[test]
    fn the_holder_is_told_from_commands() {
        let run = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
            holder(&arguments)
        };
        assert!(run(&["ocifs", "mount", "/m"]).is_none());
        assert!(run(&["ocifs"]).is_none());
        let format = JOURNAL_FORMAT.to_string();
        let well = format!("{:?}", Some(ExitCode::SUCCESS));
        assert_eq!(
            format!("{:?}", run(&["ocifs", "holder", "--check", &format])),
            well
        );
        assert_ne!(
            format!("{:?}", run(&["ocifs", "holder", "--check", "0"])),
            well
        );
        let five = Tries {
            deaths: 5,
            within: Duration::from_secs(30),
        };
        assert_eq!(tries("5/30"), Some(five));
        assert_eq!(tries("5"), None);
    }

    #[test]
    fn a_program_that_was_replaced_is_found_at_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ocifs");
        let deleted = dir.path().join("ocifs (deleted)");
        assert_eq!(path_of(&deleted), path);
        assert_eq!(path_of(&path), path);
        std::fs::write(&deleted, "").unwrap();
        assert_eq!(path_of(&deleted), deleted, "a name like any other");
    }
}
