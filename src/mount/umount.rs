//! Taking a mount down from outside.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{MountError, control, point};

/// How hard to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Umount {
    /// Only what nobody uses.
    Normal,
    /// Out of the tree at once; what is open stays readable until it is closed.
    Lazy,
    /// Out of the tree at once, and every request under way fails: for a daemon or registry that hangs.
    Force,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmounted {
    /// The mount point.
    pub path: PathBuf,
    /// The daemon, when it was found and has not ended within the time allowed: something still uses the mount, as after
    /// [`Umount::Lazy`] or where it is bound elsewhere.
    pub still_running: Option<u32>,
}

/// Takes down the mount at `path` and waits up to `patience` for its daemon to end.
pub fn unmount(
    path: &Path,
    how: Umount,
    runtime_dir: &Path,
    patience: Duration,
) -> Result<Unmounted, MountError> {
    let mount = point::find(path)?;
    // Found before it is taken down, because the way to it goes through the mount's device number, which may be another one's after.
    let socket = control::Name::of(runtime_dir, &mount);
    let daemon =
        control::daemon(runtime_dir, &mount).and_then(|pid| Some((pid, open_process(pid)?)));
    let flags = match how {
        Umount::Normal => UnmountFlags::empty(),
        Umount::Lazy => UnmountFlags::DETACH,
        Umount::Force => UnmountFlags::FORCE | UnmountFlags::DETACH,
    };
    detach(&mount.path, flags)?;
    // Without a daemon, what keeps the mount sees at once that it is gone.
    let patience = match daemon {
        Some(_) => patience,
        None => patience.min(Duration::from_secs(5)),
    };
    let deadline = crate::base::Deadline::after(patience);
    let still_running = daemon
        .filter(|(_, process)| !ends_within(process, deadline.left()))
        .map(|(pid, _)| pid);
    // Whoever keeps the mount's descriptors goes after the daemon, or without one.
    if still_running.is_none() && socket.is_some_and(|socket| !socket.gone_by(deadline)) {
        tracing::info!("what kept the mount is still there");
    }
    Ok(Unmounted {
        path: mount.path,
        still_running,
    })
}

/// umount2(2), or fusermount3 where only that may.
pub(super) fn detach(path: &Path, flags: UnmountFlags) -> Result<(), MountError> {
    match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(MountError::Busy {
            path: path.to_owned(),
        }),
        Err(Errno::PERM) => by_fusermount(path, flags.contains(UnmountFlags::DETACH)),
        Err(error) => Err(MountError::Umount {
            path: path.to_owned(),
            source: error.into(),
        }),
    }
}

fn by_fusermount(path: &Path, lazy: bool) -> Result<(), MountError> {
    let failed = |source| MountError::Umount {
        path: path.to_owned(),
        source,
    };
    let mut command = Command::new("fusermount3");
    command
        .arg("-u")
        .args(lazy.then_some("-z"))
        .arg("--")
        .arg(path)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    let output = command.output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("busy") {
        return Err(MountError::Busy {
            path: path.to_owned(),
        });
    }
    Err(failed(io::Error::other(text.trim().to_owned())))
}

/// Whether the process with this number ends in time, or has ended.
pub fn process_ends(pid: u32, patience: Duration) -> bool {
    open_process(pid).is_none_or(|process| ends_within(&process, patience))
}

fn open_process(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Whether a process ends in time. A file descriptor is waited for, so that its number cannot become another's meanwhile.
pub(super) fn ends_within(process: &OwnedFd, patience: Duration) -> bool {
    let deadline = crate::base::Deadline::after(patience);
    loop {
        let left = deadline.left();
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_waited_for_and_no_longer_than_allowed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = open_process(child.id()).unwrap();
        assert!(!ends_within(&process, Duration::from_millis(20)));
        child.kill().unwrap();
        assert!(ends_within(&process, Duration::from_secs(10)));
        child.wait().unwrap();
        assert!(open_process(0).is_none());
    }

    #[test]
    fn what_is_not_mounted_is_said_so() {
        let directory = tempfile::tempdir().unwrap();
        let error = unmount(
            directory.path(),
            Umount::Normal,
            directory.path(),
            Duration::ZERO,
        )
        .unwrap_err();
        assert!(matches!(error, MountError::NotMounted { .. }), "{error}");
    }
}
