//! Bytes of a data file that are handed on without a copy: as a piece of a mapping, for the kernel to copy from.
//!
//! A disk that fails under a mapping is SIGBUS for whoever touches it. So nobody here does: a [`Mapped`] is an address and a length
//! that can be given to writev(2), where the same failure is an error. The file never becomes shorter (`entry.rs`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use bytes::Bytes;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::base::ByteRange;

/// Bytes of a blob.
#[derive(Clone, Debug)]
pub enum Data {
    /// In memory of ours.
    Owned(Bytes),
    /// The same in several places, one behind the other.
    Pieces(Vec<Bytes>),
    /// In a mapped file.
    Mapped(Mapped),
}

impl Data {
    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        match self {
            Self::Owned(bytes) => bytes.len() as u64,
            Self::Pieces(pieces) => pieces.iter().map(|piece| piece.len() as u64).sum(),
            Self::Mapped(mapped) => mapped.range.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<Bytes> for Data {
    fn from(bytes: Bytes) -> Self {
        Self::Owned(bytes)
    }
}

/// A range of a mapped file, all of it present and sound.
#[derive(Clone, Debug)]
pub struct Mapped {
    map: Arc<Map>,
    range: ByteRange,
}

/// A whole file, mapped read-only and shared.
#[derive(Debug)]
pub(super) struct Map {
    at: NonNull<libc::c_void>,
    len: usize,
    page: usize,
}

// SAFETY: the mapping is of the process, not of a thread, and nothing is ever read from it or written to it by us.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Maps the first `len` bytes of a file, which are there and stay there.
    pub(super) fn new(file: &File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a mapping at an address of the kernel's choice replaces nothing.
        let at = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        Ok(Self {
            at: NonNull::new(at).ok_or(io::ErrorKind::OutOfMemory)?,
            len,
            page: rustix::param::page_size(),
        })
    }

    /// A range of the file, once it is in memory.
    ///
    /// # Errors
    /// When it cannot be brought there: EFAULT for a disk that fails, or EINVAL on Linux before 5.14.
    pub(super) fn range(self: &Arc<Self>, range: ByteRange) -> io::Result<Mapped> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let start = usize::try_from(range.start()).map_err(|_| outside())?;
        let end = usize::try_from(range.end()).map_err(|_| outside())?;
        if end > self.len {
            return Err(outside());
        }
        let first = start / self.page * self.page;
        // Brought in here, a page that cannot be read can still be had from elsewhere. In the write it would be too late: the
        // kernel answers EIO to the request in our place (`fuse_dev_do_write` in fs/fuse/dev.c).
        // SAFETY: the range lies in the mapping, and the advice changes nothing of what is there.
        unsafe {
            let at = self.at.as_ptr().byte_add(first);
            rustix::mm::madvise(at, end - first, Advice::LinuxPopulateRead)?;
        }
        Ok(Mapped {
            map: Arc::clone(self),
            range,
        })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: this was mapped in `new`, and each `Mapped` that has its address keeps it.
        let unmapped = unsafe { rustix::mm::munmap(self.at.as_ptr(), self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

impl Mapped {
    /// How many bytes there are.
    pub fn len(&self) -> usize {
        // It was checked to lie in the mapping.
        self.range.len() as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Writes `header` and then the bytes to `to`, by one writev(2); what that returns.
    ///
    /// # Errors
    /// Those of writev(2); EFAULT when the disk has failed since.
    pub fn write_behind(&self, to: BorrowedFd<'_>, header: &[u8]) -> io::Result<usize> {
        let parts = [
            libc::iovec {
                iov_base: header.as_ptr().cast_mut().cast(),
                iov_len: header.len(),
            },
            libc::iovec {
                // SAFETY: the range was checked to lie in the mapping.
                iov_base: unsafe { self.map.at.as_ptr().byte_add(self.range.start() as usize) },
                iov_len: self.len(),
            },
        ];
        loop {
            // SAFETY: both parts are mapped for as long as the call takes, and it only reads them.
            let written = unsafe { libc::writev(to.as_raw_fd(), parts.as_ptr(), 2) };
            match usize::try_from(written) {
                Ok(written) => return Ok(written),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;

    use super::*;

    fn file(len: usize) -> (File, Vec<u8>) {
        let content: Vec<u8> = (0..len).map(|at| ((at * 7) >> 3) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        (file, content)
    }

    #[test]
    fn a_range_is_written_behind_a_header() {
        let (file, content) = file(200_001);
        let map = Arc::new(Map::new(&file, 200_001).unwrap());
        for range in [
            ByteRange::new(0, 1),
            ByteRange::new(4095, 70_000),
            ByteRange::new(196_608, 200_001),
            ByteRange::new(0, 200_001),
        ] {
            let mut to = tempfile::tempfile().unwrap();
            let mapped = map.range(range).unwrap();
            let length = 3 + mapped.len();
            assert_eq!(mapped.write_behind(to.as_fd(), b"abc").unwrap(), length);
            let mut bytes = Vec::new();
            io::Seek::rewind(&mut to).unwrap();
            to.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes[..3], *b"abc");
            assert_eq!(
                bytes[3..],
                content[range.start() as usize..range.end() as usize]
            );
        }
        assert!(map.range(ByteRange::new(0, 200_002)).is_err());
        assert!(map.range(ByteRange::new(u64::MAX - 1, u64::MAX)).is_err());
    }

    #[test]
    fn bytes_that_cannot_be_read_are_an_error_and_no_signal() {
        let (file, _) = file(100_000);
        let map = Arc::new(Map::new(&file, 100_000).unwrap());
        let before = map.range(ByteRange::new(50_000, 100_000)).unwrap();
        // What a cache file never does; it is how a test gets pages that fail.
        file.set_len(8192).unwrap();
        let error = map.range(ByteRange::new(50_000, 100_000)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        let to = tempfile::tempfile().unwrap();
        let written = before.write_behind(to.as_fd(), b"");
        assert!(
            written.as_ref().is_ok_and(|written| *written == 0)
                || written
                    .as_ref()
                    .is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT)),
            "{written:?}"
        );
        assert!(map.range(ByteRange::new(0, 8192)).is_ok());
    }
}
