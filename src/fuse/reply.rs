//! Answers, each to be given once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::answer::{Attr, Entry, Listing, Opened, StatFs};
use super::device::Backing;
use super::request::Header;
use super::session::Link;
use super::wire::Wire;

/// The answer that a request waits for. It can be given from any thread, at any time; one that is dropped is EIO.
#[derive(Debug)]
pub struct Reply {
    link: Arc<Link>,
    unique: u64,
    pid: u32,
    given: bool,
}

/// Bytes that the kernel alone looks at, because looking at them may fail in a way that a program does not survive.
pub trait Payload {
    /// How many bytes there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes `header` and then the bytes to `device`, by one writev(2).
    fn write_behind(&self, device: BorrowedFd<'_>, header: &[u8]) -> io::Result<usize>;
}

impl Reply {
    pub(super) fn new(link: Arc<Link>, unique: u64, pid: u32) -> Self {
        link.owed.fetch_add(1, Ordering::Relaxed);
        Self {
            link,
            unique,
            pid,
            given: false,
        }
    }

    /// Which request this answers: the same number when the request is sent once more.
    pub fn unique(&self) -> u64 {
        self.unique & !Header::RESENT
    }

    /// Whether the request was sent before, to a process that did not answer it.
    pub fn is_resent(&self) -> bool {
        self.unique & Header::RESENT != 0
    }

    fn give(mut self, error: i32, body: &[u8]) {
        self.given = true;
        self.link.device.answer(self.unique, error, body);
    }

    fn give_wire(self, wire: &Wire) {
        self.give(0, wire.as_slice());
    }

    /// It failed.
    pub fn error(self, error: Errno) {
        self.link.counts.failed(error.raw_os_error());
        self.give(-error.raw_os_error(), &[]);
    }

    /// It is done.
    pub fn done(self) {
        self.give(0, &[]);
    }

    /// Answers READ, READLINK, GETXATTR or LISTXATTR with these bytes.
    pub fn bytes(self, bytes: &[u8]) {
        self.give(0, bytes);
    }

    /// Answers READ with these bytes, one behind the other.
    pub fn pieces(mut self, pieces: &[impl AsRef<[u8]>]) {
        self.given = true;
        self.link.device.answer_pieces(self.unique, pieces);
    }

    /// Answers READ.
    pub fn payload(mut self, payload: &impl Payload) {
        self.given = true;
        let write = |device: BorrowedFd<'_>, header: &[u8]| payload.write_behind(device, header);
        self.link
            .device
            .answer_by(self.unique, payload.len(), write);
    }

    /// Answers LOOKUP.
    pub fn entry(self, entry: &Entry) {
        self.give_wire(&entry.answer());
    }

    /// Answers LOOKUP: there is no such name, and the kernel need not ask again for `ttl`.
    pub fn missing(self, ttl: Duration) {
        self.give_wire(&Entry::missing(ttl));
    }

    /// Answers GETATTR; the attributes hold for `ttl`.
    pub fn attr(self, attr: &Attr, ttl: Duration) {
        self.give_wire(&attr.answer(ttl));
    }

    /// Answers OPEN or OPENDIR.
    pub fn opened(self, opened: &Opened) {
        self.give_wire(&opened.answer());
    }

    /// Answers READDIR or READDIRPLUS.
    pub fn listing(self, listing: &Listing) {
        self.give(0, listing.as_slice());
    }

    /// Answers STATFS.
    pub fn statfs(self, statfs: &StatFs) {
        self.give_wire(&statfs.answer());
    }

    /// Answers GETXATTR or LISTXATTR that asked for the size alone.
    pub fn xattr_size(self, size: u32) {
        let mut wire = Wire::with_capacity(8);
        wire.u32(size).u32(0);
        self.give_wire(&wire);
    }

    /// Gives the kernel a file to read in our place.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ELOOP when file systems are stacked too deep below `file`.
    pub fn open_backing(&self, file: impl AsFd) -> io::Result<Backing> {
        Backing::open(&self.link.device, file.as_fd())
    }

    /// Waits for `work`, whose result comes back with the reply. Should whoever asked be killed meanwhile, or the session end, then
    /// the work is dropped where it is, the answer given, and `None` returned. Needs a tokio runtime.
    pub async fn wait<T>(self, work: impl Future<Output = T>) -> Option<(Self, T)> {
        let link = Arc::clone(&self.link);
        let waiting = link.interrupts.wait(self.unique);
        let mut phase = link.phase.subscribe();
        tokio::select! {
            biased;
            result = work => Some((self, result)),
            () = waiting.killed(self.pid) => {
                self.error(Errno::INTR);
                None
            }
            _ = phase.wait_for(|phase| !phase.waits()) => None,
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.given {
            self.link
                .device
                .answer(self.unique, -Errno::IO.raw_os_error(), &[]);
        }
        self.link.owed.fetch_sub(1, Ordering::Relaxed);
    }
}
