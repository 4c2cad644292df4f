//! A TCP stream that wakes us once for many segments.
//!
//! A link of 4 Gbit/s hands a reader of a large body 64 KiB at a time, and each of them costs a wake-up, two system calls and a
//! way through the layers above. While much of a body is to come, SO_RCVLOWAT (socket(7)) makes the kernel wait until there is
//! more. Three rules keep that from being felt: never more than what is certain to come; nothing for short bodies; and
//! when it takes longer than [`PATIENCE`], what is there is taken at once and less is waited for from then on.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Bytes that the kernel gathers before it wakes us: what a fast link brings in a millisecond.
const MOST: u32 = 256 << 10;
/// Less than this is not worth a system call.
const LEAST: u32 = 32 << 10;
/// How long bytes may lie in the kernel for the sake of more.
pub(super) const PATIENCE: Duration = Duration::from_millis(10);

/// What both ends of a connection know: the task that reads it, and the reader of the body.
#[derive(Debug)]
pub(super) struct Gauge {
    stream: Arc<TcpStream>,
    /// Bytes that came since the request was sent, with head and TLS framing: never fewer than those of the body.
    received: AtomicU64,
    /// Bytes of the body, as far as announced.
    announced: AtomicU64,
    /// What to gather.
    step: AtomicU32,
    /// What the kernel was told.
    told: AtomicU32,
}

impl Gauge {
    /// A request goes out: whatever comes first is wanted at once.
    pub(super) fn begin(&self) {
        self.received.store(0, Ordering::Relaxed);
        self.announced.store(0, Ordering::Relaxed);
        let step = self.step.load(Ordering::Relaxed);
        self.step
            .store((step * 2).clamp(LEAST, MOST), Ordering::Relaxed);
        self.tell(1);
    }

    /// Whether anything came since [`Self::begin`].
    pub(super) fn heard(&self) -> bool {
        self.received.load(Ordering::Relaxed) > 0
    }

    /// The head came: the body has `length` bytes.
    pub(super) fn expect(&self, length: u64) {
        self.announced.store(length, Ordering::Relaxed);
        self.adjust();
    }

    /// Whether bytes may lie in the kernel unseen.
    pub(super) fn gathers(&self) -> bool {
        self.told.load(Ordering::Relaxed) > 1
    }

    /// [`PATIENCE`] is over: takes what is there, and gathers less.
    pub(super) fn relax(&self) {
        let step = self.step.load(Ordering::Relaxed) / 4;
        self.step
            .store(if step < LEAST { 0 } else { step }, Ordering::Relaxed);
        // The kernel looks at what it has when the mark moves (tcp_set_rcvlowat).
        self.tell(1);
    }

    fn adjust(&self) {
        let left = self
            .announced
            .load(Ordering::Relaxed)
            .saturating_sub(self.received.load(Ordering::Relaxed));
        let step = self.step.load(Ordering::Relaxed);
        let gather = step > 0 && left >= u64::from(step);
        self.tell(if gather { step } else { 1 });
    }

    fn tell(&self, mark: u32) {
        if self.told.swap(mark, Ordering::Relaxed) != mark {
            set_low_mark(&self.stream, mark);
        }
    }
}

/// Sets SO_RCVLOWAT. A kernel that refuses wakes us more often, no more.
fn set_low_mark(stream: &TcpStream, mark: u32) {
    use std::os::fd::AsRawFd as _;
    let value = libc::c_int::try_from(mark).unwrap_or(1);
    // SAFETY: the descriptor is open while `stream` is borrowed, and the kernel reads the four bytes of `value`.
    let _ = unsafe {
        libc::setsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
}

/// The stream itself.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Arc<TcpStream>,
    gauge: Arc<Gauge>,
}

impl Wire {
    pub(super) fn new(stream: TcpStream) -> Self {
        let stream = Arc::new(stream);
        let gauge = Arc::new(Gauge {
            stream: Arc::clone(&stream),
            received: AtomicU64::new(0),
            announced: AtomicU64::new(0),
            step: AtomicU32::new(MOST),
            told: AtomicU32::new(1),
        });
        Self { stream, gauge }
    }

    pub(super) fn gauge(&self) -> Arc<Gauge> {
        Arc::clone(&self.gauge)
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read_buf(buffer) {
                Ok(read) => {
                    self.gauge
                        .received
                        .fetch_add(read as u64, Ordering::Relaxed);
                    self.gauge.adjust();
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(
            rustix::net::shutdown(self.stream.as_fd(), rustix::net::Shutdown::Write)
                .map_err(io::Error::from),
        )
    }
}
