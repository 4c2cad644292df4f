//! A session: the introduction, the threads that take requests, the end.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::watch;

use super::activity::Activity;
use super::device::{Device, Notifier, READ_BUFFER};
use super::init::{self, Negotiated, Step, Wanted};
use super::interrupt::Interrupts;
use super::reply::Reply;
use super::request::{Forgets, Header, Message, Operation};

/// The file system that a session serves. Its methods are called from several threads at a time and never wait: what takes
/// time goes elsewhere, together with its reply.
pub trait Handler: Send + Sync + 'static {
    /// Answers a request, or sees to it that it will be.
    fn handle(&self, node: u64, operation: Operation<'_>, reply: Reply);

    /// The kernel forgets nodes.
    fn forget(&self, nodes: Forgets<'_>);
}

/// What the threads and replies of a session share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) device: Arc<Device>,
    pub(super) interrupts: Interrupts,
    pub(super) phase: watch::Sender<Phase>,
    pub(super) counts: Counts,
    /// Of each thread that takes requests.
    threads: Box<[Activity]>,
    /// Answers that are owed.
    pub(super) owed: AtomicUsize,
}

impl Link {
    fn replies(&self) -> usize {
        self.owed.load(Ordering::Relaxed)
    }
}

/// How many requests came, by kind, and how many failed, by error.
#[derive(Clone, Debug)]
pub struct Counts(Arc<Numbers>);

#[derive(Debug)]
struct Numbers {
    kinds: [AtomicU64; KINDS],
    errors: [AtomicU64; ERRORS],
}

/// Kinds of requests that are counted: more than the protocol has.
const KINDS: usize = 64;
/// Errors that are counted: more than Linux has.
const ERRORS: usize = 160;

impl Counts {
    fn new() -> Self {
        Self(Arc::new(Numbers {
            kinds: [const { AtomicU64::new(0) }; KINDS],
            errors: [const { AtomicU64::new(0) }; ERRORS],
        }))
    }

    pub(super) fn failed(&self, errno: i32) {
        let errno = usize::try_from(errno).unwrap_or(usize::MAX);
        if let Some(count) = self.0.errors.get(errno) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn count(&self, kind: u32) {
        let kind = usize::try_from(kind).unwrap_or(usize::MAX);
        if let Some(count) = self.0.kinds.get(kind) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Number (`enum fuse_opcode`) and count of each kind that came.
    pub fn all(&self) -> BTreeMap<u32, u64> {
        numbered(&self.0.kinds)
    }

    /// Number (errno(3)) and count of each error that was answered with.
    pub fn errors(&self) -> BTreeMap<u32, u64> {
        numbered(&self.0.errors)
    }
}

/// Those that are not 0, by their place.
fn numbered(counts: &[AtomicU64]) -> BTreeMap<u32, u64> {
    let counts = counts.iter().map(|count| count.load(Ordering::Relaxed));
    (0..).zip(counts).filter(|(_, count)| *count > 0).collect()
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Requests are answered.
    Serving,
    /// Requests that would have to wait get EIO.
    Hurried,
    /// Requests are left to the process that goes on from here.
    HandedOver,
    /// The mount is gone.
    Ended,
}

impl Phase {
    /// Whether a request may wait.
    pub(super) fn waits(self) -> bool {
        matches!(self, Self::Serving | Self::HandedOver)
    }
}

/// A connection to the kernel on which both sides know each other.
#[derive(Debug)]
pub struct Session {
    device: Arc<Device>,
    negotiated: Negotiated,
}

impl Session {
    /// Waits for the kernel's introduction on the device of a new mount, and answers it.
    ///
    /// # Errors
    /// When the kernel is too old or says something else, or the mount goes meanwhile.
    pub fn start(device: OwnedFd, wanted: Wanted) -> io::Result<Self> {
        let device = Device::new(device);
        let mut buffer = vec![0; READ_BUFFER];
        loop {
            let length = device
                .receive(&mut buffer)?
                .ok_or(io::ErrorKind::NotConnected)?;
            let parsed = Header::parse(&buffer[..length]);
            let message = parsed.and_then(|(header, body)| Ok((header, header.message(body)?)));
            let (header, Message::Init(kernel)) = message.map_err(io::Error::other)? else {
                return Err(io::Error::other("the kernel did not introduce itself"));
            };
            match init::negotiate(&kernel, wanted) {
                Step::Again => {
                    device.answer(header.unique, 0, init::version_only().as_slice());
                }
                Step::Refused => {
                    device.answer(header.unique, -Errno::PROTO.raw_os_error(), &[]);
                    let version = format!(
                        "this kernel speaks version {}.{} of the FUSE protocol; 7.31 (Linux 5.4) is the least",
                        kernel.major, kernel.minor
                    );
                    return Err(io::Error::new(io::ErrorKind::Unsupported, version));
                }
                Step::Agreed(negotiated) => {
                    let answer = init::answer(&kernel, wanted, &negotiated);
                    device.answer(header.unique, 0, answer.as_slice());
                    return Ok(Self::resume_on(device, negotiated));
                }
            }
        }
    }

    /// Goes on with a session that another process has begun, on the same open device. What that one had read and not answered
    /// comes again after [`Notifier::resend`], where [`Negotiated::resend`] says so.
    pub fn resume(device: OwnedFd, negotiated: Negotiated) -> Self {
        Self::resume_on(Device::new(device), negotiated)
    }

    fn resume_on(device: Device, negotiated: Negotiated) -> Self {
        Self {
            device: Arc::new(device),
            negotiated,
        }
    }

    /// What was agreed.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// The device, for whoever keeps it open for the next process.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.descriptor()
    }

    /// For what the kernel must be told.
    pub fn notifier(&self) -> Notifier {
        Notifier(Arc::clone(&self.device))
    }

    /// Answers requests on `threads` threads until the mount is gone.
    ///
    /// All read from one descriptor: no speed is lost by that, while a request that was read from a clone of it
    /// (`FUSE_DEV_IOC_CLONE`) could not be taken over by another process.
    ///
    /// # Errors
    /// When there are no threads to be had.
    pub fn serve(self, handler: impl Handler, threads: usize) -> io::Result<Serving> {
        let threads = threads.max(1);
        let link = Arc::new(Link {
            threads: (0..threads).map(|_| Activity::default()).collect(),
            device: self.device,
            interrupts: Interrupts::default(),
            phase: watch::Sender::new(Phase::Serving),
            counts: Counts::new(),
            owed: AtomicUsize::new(0),
        });
        let (handler, left) = (Arc::new(handler), Arc::new(AtomicUsize::new(threads)));
        let failure = watch::Sender::new(None);
        for number in 0..threads {
            let (link, handler) = (Arc::clone(&link), Arc::clone(&handler));
            let (left, failure) = (Arc::clone(&left), failure.clone());
            let work = move || {
                if let Err(error) = serve(&link, handler.as_ref(), &link.threads[number]) {
                    tracing::error!(%error, "the connection to the kernel broke");
                    failure.send_replace(error.raw_os_error());
                }
                drop(handler);
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    link.phase.send_replace(Phase::Ended);
                }
            };
            thread::Builder::new()
                .name(format!("ocifs-fuse-{number}"))
                .spawn(work)?;
        }
        Ok(Serving {
            link,
            failure: failure.subscribe(),
        })
    }
}

/// A session that is being served.
#[derive(Debug)]
pub struct Serving {
    link: Arc<Link>,
    failure: watch::Receiver<Option<i32>>,
}

impl Serving {
    /// Returns when the mount is gone.
    ///
    /// # Errors
    /// When it ended because the connection broke.
    pub async fn ended(&self) -> io::Result<()> {
        let mut phase = self.link.phase.subscribe();
        let _ = phase.wait_for(|phase| *phase == Phase::Ended).await;
        match *self.failure.borrow() {
            Some(number) => Err(io::Error::from_raw_os_error(number)),
            None => Ok(()),
        }
    }

    /// What the kernel has asked.
    pub fn counts(&self) -> &Counts {
        &self.link.counts
    }

    /// What each thread that takes requests does.
    pub fn threads(&self) -> &[Activity] {
        &self.link.threads
    }

    /// Answers EIO to all who wait, and to all who would have to from now on.
    pub fn hurry(&self) {
        self.link.phase.send_if_modified(|phase| {
            let serving = phase.waits();
            if serving {
                *phase = Phase::Hurried;
            }
            serving
        });
    }

    /// Takes no more requests, and waits up to `patience` for answers that are under way. What is not answered then, or was read a
    /// moment ago, comes to the next process once more. The process must end without another answer: one that is dropped is EIO.
    pub async fn hand_over(&self, patience: Duration) {
        const LOOK_EVERY: Duration = Duration::from_millis(5);
        self.link.phase.send_if_modified(|phase| {
            let serving = *phase == Phase::Serving;
            if serving {
                *phase = Phase::HandedOver;
            }
            serving
        });
        let end = tokio::time::Instant::now() + patience;
        while self.link.replies() > 0 && tokio::time::Instant::now() < end {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Takes requests until the mount is gone.
fn serve(link: &Arc<Link>, handler: &impl Handler, activity: &Activity) -> io::Result<()> {
    // Written to, so that every page is there: the kernel gives EIO to whoever asked when it must fetch one for a process that is
    // being killed (`fuse_dev_do_read` in fs/fuse/dev.c).
    let mut buffer = vec![1; READ_BUFFER];
    while let Some(length) = link.device.receive(&mut buffer)? {
        // What was read just now is left to the next process. To return would say that the session has ended.
        while *link.phase.borrow() == Phase::HandedOver {
            thread::park();
        }
        let bytes = &buffer[..length];
        let _busy = activity.begin();
        // A fault in one answer must not take the thread from all others. The reply, dropped on the way out, is EIO.
        if catch_unwind(AssertUnwindSafe(|| dispatch(link, handler, bytes))).is_err() {
            tracing::error!("a request could not be answered");
        }
    }
    Ok(())
}

fn dispatch(link: &Arc<Link>, handler: &impl Handler, bytes: &[u8]) {
    let Ok((header, body)) = Header::parse(bytes) else {
        tracing::error!(length = bytes.len(), "the kernel sent no request");
        return;
    };
    link.counts.count(header.opcode);
    let reply = || Reply::new(Arc::clone(link), header.unique, header.pid);
    match header.message(body) {
        Ok(Message::Ask(operation)) => handler.handle(header.node, operation, reply()),
        Ok(Message::Forget(nodes)) => handler.forget(nodes),
        Ok(Message::Interrupt { unique }) => link.interrupts.interrupt(unique),
        // The mount is read-only, so the kernel lets few of these through.
        Ok(Message::Change) => reply().error(Errno::ROFS),
        // The kernel remembers that, and does without or in its own way.
        Ok(Message::Other) => reply().error(Errno::NOSYS),
        Ok(Message::Destroy) => reply().done(),
        Ok(Message::Unasked) => {}
        Ok(Message::Init(_)) => reply().error(Errno::IO),
        Err(error) => {
            tracing::error!(?header, %error, "the kernel sent a request that is not understood");
            reply().error(Errno::IO);
        }
    }
}
