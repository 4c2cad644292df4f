//! What the cache does with files, one function for each system call that can fail.
//!
//! All of this layer opens, reads and changes files through these. Each call is a step at which the disk may fail or the process
//! be killed; the tests of this layer make it fail or stop at every one of them (`faults.rs`). Elsewhere a step is its
//! system call and nothing else.
//!
//! What is opened is a regular file, and no symbolic link leads to it: whoever else may write to the directory cannot have us
//! read or write a file outside of it, nor wait for a pipe.

use std::fs::{self, DirEntry, File, Metadata};
use std::io::{self, IoSlice, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// A step, for whoever injects faults: what is about to be done.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "only tests look at what is done")]
pub(super) enum Step<'a> {
    Open(&'a Path, Access),
    List(&'a Path),
    MakeDir(&'a Path),
    Read(&'a File, u64),
    Write(&'a File, u64, &'a [IoSlice<'a>]),
    SetLen(&'a File, u64),
    Allocate(&'a File),
    Sync(&'a File),
    Lost(&'a File),
    SyncDir(&'a Path),
    Rename(&'a Path, &'a Path),
    Remove(&'a Path),
}

/// Does one step.
#[inline]
fn step<T>(what: Step<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    {
        super::faults::before(&what)?;
        let created = super::faults::is_new(&what);
        let done = act()?;
        super::faults::after(&what, created);
        Ok(done)
    }
    #[cfg(not(test))]
    {
        let _ = what;
        act()
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// To be read.
    Read,
    /// To be read and written; it is there.
    Write,
    /// To be read and written; made, for its owner alone, when it is not there.
    Make,
    /// As [`Access::Make`], and it must not be there.
    New,
}

/// Opens a regular file.
///
/// # Errors
/// Those of openat2(2), ELOOP for a symbolic link among them; [`io::ErrorKind::InvalidInput`] for what is no file.
pub(super) fn open(path: &Path, access: Access) -> io::Result<File> {
    open_and_look(path, access).map(|(file, _)| file)
}

/// Opens a regular file, and what it was when it was opened.
///
/// # Errors
/// As [`open`].
pub(super) fn open_and_look(path: &Path, access: Access) -> io::Result<(File, Metadata)> {
    let flags = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
        Access::Make => OFlags::RDWR | OFlags::CREATE,
        Access::New => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
    };
    // Without `NONBLOCK` a pipe would be waited for. Files do not heed it.
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    step(Step::Open(path, access), || {
        let file = File::from(without_links(path, flags)?);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ));
        }
        Ok((file, metadata))
    })
}

fn without_links(path: &Path, flags: OFlags) -> rustix::io::Result<rustix::fd::OwnedFd> {
    /// Linux before 5.6, and sandboxes that do not know the call.
    static OLD: AtomicBool = AtomicBool::new(false);
    let mode = if flags.contains(OFlags::CREATE) {
        Mode::RUSR | Mode::WUSR
    } else {
        Mode::empty()
    };
    loop {
        let opened = if OLD.load(Ordering::Relaxed) {
            rustix::fs::openat(CWD, path, flags, mode)
        } else {
            rustix::fs::openat2(CWD, path, flags, mode, ResolveFlags::NO_SYMLINKS)
        };
        match opened {
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::NOSYS) if !OLD.load(Ordering::Relaxed) => OLD.store(true, Ordering::Relaxed),
            Err(Errno::PERM) if !OLD.load(Ordering::Relaxed) => {
                let plain = rustix::fs::openat(CWD, path, flags, mode);
                if plain.is_ok() {
                    OLD.store(true, Ordering::Relaxed);
                }
                return plain;
            }
            opened => return opened,
        }
    }
}

/// What is in a directory.
pub(super) fn list(dir: &Path) -> io::Result<Vec<DirEntry>> {
    step(Step::List(dir), || {
        Ok(fs::read_dir(dir)?.flatten().collect())
    })
}

/// Makes one directory, for its owner alone; `false` when it is there.
pub(super) fn make_dir(dir: &Path) -> io::Result<bool> {
    step(Step::MakeDir(dir), || {
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    })
}

/// Reads exactly as many bytes as `buffer` has.
pub(super) fn read_exact(file: &File, buffer: &mut [u8], at: u64) -> io::Result<()> {
    step(Step::Read(file, at), || file.read_exact_at(buffer, at))
}

/// Reads into what `buffer` has room for; how many bytes.
pub(super) fn read_some(file: &File, buffer: &mut Vec<u8>, at: u64) -> io::Result<usize> {
    step(Step::Read(file, at), || {
        loop {
            match rustix::io::pread(file, rustix::buffer::spare_capacity(buffer), at) {
                Err(Errno::INTR) => {}
                count => return Ok(count?),
            }
        }
    })
}

/// A file's content when it is a regular file of at most `limit` bytes; [`io::ErrorKind::FileTooLarge`] else.
pub(super) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open(path, Access::Read)?;
    step(Step::Read(&file, 0), || {
        let mut content = Vec::new();
        // It may grow while it is read.
        (&file)
            .take(limit.saturating_add(1))
            .read_to_end(&mut content)?;
        if content.len() as u64 > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(content)
    })
}

/// Writes all of `bytes`.
pub(super) fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    write_pieces(file, &mut [IoSlice::new(bytes)], at)
}

/// Writes all pieces one behind the other, by as few system calls as it takes.
pub(super) fn write_pieces(
    file: &File,
    mut pieces: &mut [IoSlice<'_>],
    mut at: u64,
) -> io::Result<()> {
    /// `IOV_MAX` on Linux.
    const MOST: usize = 1024;
    // A slice without bytes at the front would look like a disk that takes none.
    IoSlice::advance_slices(&mut pieces, 0);
    while !pieces.is_empty() {
        let now = &pieces[..pieces.len().min(MOST)];
        let count = step(Step::Write(file, at, now), || {
            loop {
                match rustix::io::pwritev(file, now, at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Err(Errno::INTR) => {}
                    count => return Ok(count?),
                }
            }
        })?;
        at += count as u64;
        IoSlice::advance_slices(&mut pieces, count);
    }
    Ok(())
}

/// Makes the file so long. Never shorter than what somebody may have mapped.
pub(super) fn set_len(file: &File, len: u64) -> io::Result<()> {
    step(Step::SetLen(file, len), || file.set_len(len))
}

/// Takes room for a range; `false` where the file system cannot, and writing finds out.
pub(super) fn allocate(file: &File, from: u64, len: u64) -> io::Result<bool> {
    step(Step::Allocate(file), || {
        loop {
            match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, from, len) {
                Ok(()) => return Ok(true),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    })
}

/// Makes a file's bytes and length durable.
pub(super) fn sync(file: &File) -> io::Result<()> {
    step(Step::Sync(file), || file.sync_data())
}

/// Has the kernel begin to write the file's bytes to the disk. Promises nothing and finds no error: [`sync`] does.
pub(super) fn begin_sync(file: &File) {
    // SAFETY: the descriptor is open for as long as `file` lives, and no memory is passed.
    unsafe {
        libc::sync_file_range(
            std::os::fd::AsRawFd::as_raw_fd(file),
            0,
            0, // to its end
            libc::SYNC_FILE_RANGE_WRITE,
        );
    }
}

/// Whether the kernel has failed to write bytes of the file to the disk since this was asked last: it may forget them, and will read
/// what the disk had before. Waits for nothing but the first page.
pub(super) fn has_lost_bytes(file: &File) -> bool {
    step(Step::Lost(file), || {
        // SAFETY: the descriptor is open for as long as `file` lives, and no memory is passed.
        let told = unsafe {
            libc::sync_file_range(
                std::os::fd::AsRawFd::as_raw_fd(file),
                0,
                1,
                libc::SYNC_FILE_RANGE_WAIT_BEFORE,
            )
        };
        if told == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    })
    // Not every file system knows the call.
    .is_err_and(|error| {
        is_full(&error) || matches!(error.raw_os_error(), Some(libc::EIO | libc::EROFS))
    })
}

/// Reads a little of a file of `len` bytes from the disk itself, whatever is in memory; well where the file system knows no such reads.
pub(super) fn probe(file: &File, len: u64) -> io::Result<()> {
    /// What such reads are multiples of, on every disk in use.
    const BLOCK: usize = 4096;
    step(Step::Read(file, 0), || {
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
        let direct = match rustix::fs::openat(CWD, again, flags, Mode::empty()) {
            Ok(direct) => direct,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut buffer = [0; 2 * BLOCK];
        let skip = buffer.as_ptr().align_offset(BLOCK);
        let block = &mut buffer[skip..skip + BLOCK];
        let at = len.saturating_sub(1) / BLOCK as u64 * BLOCK as u64;
        loop {
            match rustix::io::pread(&direct, &mut *block, at) {
                Err(Errno::INTR) => {}
                Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    })
}

/// Makes renames, removals and new names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    step(Step::SyncDir(dir), || File::open(dir)?.sync_all())
}

/// Gives a file another name, in the place of whatever had that.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step(Step::Rename(from, to), || fs::rename(from, to))
}

/// Takes a file's name away. That there is none is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    step(Step::Remove(path), || match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
}

/// Whether the disk is full, or the share of it that we may use.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
