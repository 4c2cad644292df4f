//! Locks between processes that share a cache.
//!
//! - flock(2) shared on a blob's data file: somebody uses the blob; whoever would evict it asks for the exclusive one.
//!   The lock belongs to the open file, so it goes when its holder dies, however that happens.
//! - Open-file-description locks (fcntl(2), `F_OFD_SETLK`) on a blob's chunk map, a byte for a chunk: somebody is fetching
//!   these chunks. Also gone with the holder.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::base::Deadline;

/// How long a lock is waited for. Whoever works under one takes milliseconds, but may have been stopped (SIGSTOP, a
/// debugger, a frozen container), and then a read must go on without the cache.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// The longest pause between two looks at a lock that somebody else has.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// Waits for a shared lock on `file`, at most for `patience`: [`io::ErrorKind::TimedOut`].
pub(super) fn shared(file: &File, patience: Duration) -> io::Result<()> {
    within(file, FlockOperation::NonBlockingLockShared, patience)
}

/// Waits for the exclusive lock on `file`, at most for `patience`: [`io::ErrorKind::TimedOut`].
pub(super) fn exclusive(file: &File, patience: Duration) -> io::Result<()> {
    within(file, FlockOperation::NonBlockingLockExclusive, patience)
}

/// flock(2) knows no timeout, so the lock is asked for again and again.
fn within(file: &File, operation: FlockOperation, patience: Duration) -> io::Result<()> {
    let deadline = Deadline::after(patience);
    let mut pause = Duration::from_micros(50);
    loop {
        match retry(|| flock(file, operation)) {
            Err(rustix::io::Errno::WOULDBLOCK) if deadline.passed() => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("another process has kept the lock for {patience:?}"),
                ));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                crate::base::rt::pause(pause.min(deadline.left()));
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            result => return Ok(result?),
        }
    }
}

/// Takes the exclusive lock on `file` if nobody else has one.
pub(super) fn try_exclusive(file: &File) -> io::Result<bool> {
    match retry(|| flock(file, FlockOperation::NonBlockingLockExclusive)) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether nobody else has `file` open or mapped, in any process; it has the exclusive lock on it then.
///
/// Who maps a file may have closed it, as engines do, and the kernel reads sealed blobs in our place: no lock tells of those. A lease for
/// writing is granted only to who is alone (fcntl(2)); it is given back at once. Where there are none, the lock has to do.
pub(super) fn alone(file: &File) -> io::Result<bool> {
    /// `F_SETSIG` of asm-generic/fcntl.h.
    const F_SETSIG: libc::c_int = 10;
    if !try_exclusive(file)? {
        return Ok(false);
    }
    let fd = file.as_raw_fd();
    // Somebody who opens the file in this moment makes the kernel send a signal: one that does nothing unless it is asked for.
    // SAFETY: the descriptor is open for as long as `file` lives, and no memory is passed.
    let leased = unsafe {
        libc::fcntl(fd, F_SETSIG, libc::SIGURG);
        libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK)
    };
    if leased == 0 {
        // SAFETY: as above.
        unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    Ok(!matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EBUSY)
    ))
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The sole right, among all processes, to fetch some chunks of a blob. Given back when dropped.
#[derive(Debug)]
pub struct Claim {
    file: Arc<File>,
    start: u64,
    len: u64,
}

impl Claim {
    /// Claims `len` chunks from `start`; `None` when another open of the map has claimed one of them.
    pub(super) fn take(file: &Arc<File>, start: u64, len: u64) -> io::Result<Option<Self>> {
        match set(file, libc::F_WRLCK, start, len) {
            Ok(()) => Ok(Some(Self {
                file: Arc::clone(file),
                start,
                len,
            })),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = set(&self.file, libc::F_UNLCK, self.start, self.len);
    }
}

fn set(file: &File, kind: libc::c_int, start: u64, len: u64) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: libc::off_t::try_from(start).map_err(|_| io::ErrorKind::InvalidInput)?,
        l_len: libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?,
        l_pid: 0, // the kernel demands zero for this kind of lock
    };
    loop {
        // SAFETY: the descriptor is open for as long as `file` lives, and `lock` is a valid flock structure that the
        // kernel only reads.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_kept_is_waited_for_only_so_long() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (
            File::open(file.path()).unwrap(),
            File::open(file.path()).unwrap(),
        );
        let moment = Duration::from_millis(30);
        shared(&a, moment).unwrap();
        shared(&b, moment).unwrap();
        let error = exclusive(&b, moment).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let holder = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(a);
        });
        exclusive(&b, Duration::from_secs(20)).unwrap();
        holder.join().unwrap();
    }

    #[test]
    fn claims_of_two_opens_exclude_each_other_and_end_with_their_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            Arc::new(
                File::options()
                    .read(true)
                    .write(true)
                    .open(file.path())
                    .unwrap(),
            )
        };
        let (a, b) = (open(), open());
        let claim = Claim::take(&a, 10, 5).unwrap().unwrap();
        assert!(Claim::take(&b, 14, 1).unwrap().is_none());
        assert!(Claim::take(&b, 15, 5).unwrap().is_some());
        drop(claim);
        let claim = Claim::take(&b, 0, 20).unwrap().unwrap();
        assert!(Claim::take(&a, 10, 5).unwrap().is_none());
        drop(b);
        // The claim keeps the open file, and with it the lock.
        assert!(Claim::take(&a, 10, 5).unwrap().is_none());
        drop(claim);
        assert!(Claim::take(&a, 10, 5).unwrap().is_some());
    }
}
