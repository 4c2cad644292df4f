//! The device: one open /dev/fuse, from which requests are read and to which answers are written.

use std::fs::File;
use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::abi::{self, IN_HEADER, OUT_HEADER, notify};
use super::wire::Wire;

/// Bytes of a read buffer: more than any request that comes, so that what sets the size is how many nodes are forgotten at once.
pub(super) const READ_BUFFER: usize = 32 << 10;

const _: () = assert!(READ_BUFFER >= abi::MIN_READ_BUFFER + IN_HEADER);

/// One connection to the kernel.
#[derive(Debug)]
pub(super) struct Device(File);

/// Whether a message reached the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It did.
    Yes,
    /// Nobody waits for it any more.
    Unwanted,
    /// The kernel could not read the message, and has answered EIO in our place.
    Failed,
}

impl Device {
    pub(super) fn new(device: OwnedFd) -> Self {
        Self(device.into())
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Waits for a request and puts it into `buffer`, of [`READ_BUFFER`] bytes; its length, or `None` when the mount is gone.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(length) => return Ok(Some(length)),
                // ENOENT: whoever asked was interrupted before we came to it.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
                // Unmounted; aborted (`fuse_dev_do_read` in fs/fuse/dev.c).
                Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// `struct fuse_out_header` in front of `length` bytes.
    pub(super) fn header(unique: u64, error: i32, length: usize) -> [u8; OUT_HEADER] {
        let total = u32::try_from(OUT_HEADER + length).unwrap_or(u32::MAX);
        let mut header = [0; OUT_HEADER];
        header[..4].copy_from_slice(&total.to_ne_bytes());
        header[4..8].copy_from_slice(&error.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        header
    }

    /// Answers a request.
    pub(super) fn answer(&self, unique: u64, error: i32, body: &[u8]) -> Sent {
        let header = Self::header(unique, error, body.len());
        // One message is one write (`fuse_dev_do_write`): it goes as a whole or not at all.
        let written = (&self.0).write_vectored(&[IoSlice::new(&header), IoSlice::new(body)]);
        sent(unique, written)
    }

    /// Answers a request with bytes that lie in several places. There are fewer of them than a message may have (`UIO_MAXIOV` of
    /// writev(2)).
    pub(super) fn answer_pieces(&self, unique: u64, pieces: &[impl AsRef<[u8]>]) -> Sent {
        let length = pieces.iter().map(|piece| piece.as_ref().len()).sum();
        let header = Self::header(unique, 0, length);
        let body = pieces.iter().map(|piece| IoSlice::new(piece.as_ref()));
        let message: Vec<_> = std::iter::once(IoSlice::new(&header)).chain(body).collect();
        sent(unique, (&self.0).write_vectored(&message))
    }

    /// Answers a request with bytes that `write` puts behind the header that it is given, in one writev(2).
    pub(super) fn answer_by(
        &self,
        unique: u64,
        length: usize,
        write: impl FnOnce(BorrowedFd<'_>, &[u8]) -> io::Result<usize>,
    ) -> Sent {
        let header = Self::header(unique, 0, length);
        sent(unique, write(self.0.as_fd(), &header))
    }

    /// Tells the kernel something that it did not ask for.
    fn tell(&self, code: i32, body: &[u8]) -> io::Result<()> {
        let header = Self::header(0, code, body.len());
        let message = [IoSlice::new(&header), IoSlice::new(body)];
        (&self.0).write_vectored(&message).map(drop)
    }
}

fn sent(unique: u64, written: io::Result<usize>) -> Sent {
    let Err(error) = written else {
        return Sent::Yes;
    };
    match error.raw_os_error() {
        // Interrupted or aborted meanwhile; unmounted.
        Some(libc::ENOENT | libc::ENODEV | libc::EPERM) => Sent::Unwanted,
        _ => {
            tracing::error!(unique, %error, "the kernel did not take an answer");
            Sent::Failed
        }
    }
}

/// Tells the kernel to drop what it keeps. A clone of it holds the device open.
///
/// The kernel takes a directory's lock, or waits for a page under way, before it returns from here. So this must never be called
/// from a thread that owes answers.
#[derive(Clone, Debug)]
pub struct Notifier(pub(super) Arc<Device>);

impl Notifier {
    /// A name in a directory means something else now. ENOENT when the kernel does not hold it.
    pub fn entry(&self, parent: u64, name: &str) -> io::Result<()> {
        let length = u32::try_from(name.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut wire = Wire::with_capacity(17 + name.len());
        wire.u64(parent).u32(length).u32(0);
        wire.bytes(name.as_bytes()).bytes(&[0]);
        self.0.tell(notify::INVAL_ENTRY, wire.as_slice())
    }

    /// The attributes of a node have changed.
    pub fn attributes(&self, node: u64) -> io::Result<()> {
        // A negative offset: no pages (`fuse_reverse_inval_inode` in fs/fuse/inode.c).
        self.inode(node, -1)
    }

    /// Nothing that is kept of a file's content, or of a directory's entries, is right.
    pub fn content(&self, node: u64) -> io::Result<()> {
        self.inode(node, 0)
    }

    fn inode(&self, node: u64, offset: i64) -> io::Result<()> {
        let mut wire = Wire::with_capacity(24);
        wire.u64(node).i64(offset).i64(0); // no length: to the end
        self.0.tell(notify::INVAL_INODE, wire.as_slice())
    }

    /// Has the kernel send all requests once more that were read and not answered: for a process that takes a session over, before
    /// it reads any itself. Those come with the highest bit of [`super::Header::unique`] set.
    ///
    /// This waits for nothing: the kernel moves them from one list to another under spinlocks (`fuse_resend` in fs/fuse/dev.c).
    ///
    /// # Errors
    /// When the mount is gone.
    pub fn resend(&self) -> io::Result<()> {
        self.0.tell(notify::RESEND, &[])
    }

    /// A backing file that a process before this one gave the kernel.
    pub fn backing(&self, id: i32) -> Backing {
        Backing {
            device: Arc::clone(&self.0),
            id,
        }
    }
}

/// A file that the kernel has from us to read in our place, until this is dropped and nothing is open on it.
#[derive(Debug)]
pub struct Backing {
    device: Arc<Device>,
    id: i32,
}

impl Backing {
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ELOOP when file systems are stacked too deep below `file`.
    pub(super) fn open(device: &Arc<Device>, file: BorrowedFd<'_>) -> io::Result<Self> {
        let mut map = [0_u8; 16];
        map[..4].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
        // SAFETY: the request reads a `struct fuse_backing_map`, which `map` is, and both descriptors are open.
        let id = unsafe {
            libc::ioctl(
                device.0.as_raw_fd(),
                abi::IOC_BACKING_OPEN as libc::Ioctl,
                map.as_ptr(),
            )
        };
        if id < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            device: Arc::clone(device),
            id,
        })
    }

    /// Its number, never 0: for [`super::Opened::backing`].
    pub fn id(&self) -> i32 {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the request reads a number, which `id` is, and the descriptor is open.
        let closed = unsafe {
            libc::ioctl(
                self.device.0.as_raw_fd(),
                abi::IOC_BACKING_CLOSE as libc::Ioctl,
                &raw const self.id,
            )
        };
        if closed < 0 {
            let error = io::Error::last_os_error();
            tracing::debug!(%error, id = self.id, "a backing file was not given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn messages_are_laid_out_as_in_fuse_h() {
        let (mut kernel, daemon) = std::os::unix::net::UnixStream::pair().unwrap();
        let device = Arc::new(Device::new(daemon.into()));
        let mut heard = |length: usize| {
            let mut bytes = vec![0; length];
            kernel.read_exact(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(device.answer(7, 0, b"abc"), Sent::Yes);
        assert_eq!(heard(19), b"\x13\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0abc");
        assert_eq!(device.answer(7, -libc::EIO, b""), Sent::Yes);
        assert_eq!(heard(16), b"\x10\0\0\0\xfb\xff\xff\xff\x07\0\0\0\0\0\0\0");
        let notifier = Notifier(device.clone());
        notifier.entry(5, "ab").unwrap();
        assert_eq!(
            heard(35),
            b"\x23\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0ab\0"
        );
        notifier.attributes(5).unwrap();
        assert_eq!(heard(40)[4..8], [2, 0, 0, 0]);
        notifier.content(5).unwrap();
        assert_eq!(heard(40)[16..], [&[5][..], &[0; 23]].concat());
        notifier.resend().unwrap();
        assert_eq!(heard(16), b"\x10\0\0\0\x07\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(abi::IOC_BACKING_OPEN, 0x4010_e501);
        assert_eq!(abi::IOC_BACKING_CLOSE, 0x4004_e502);
    }
}
