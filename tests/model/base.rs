//! `crate::base` as the core knows it, with shuttle's locks, tasks and clock.

#[path = "../../src/base/chain.rs"]
mod chain;
#[path = "../../src/base/deadline.rs"]
mod deadline;
#[path = "../../src/base/digest.rs"]
mod digest;
#[path = "../../src/base/meter.rs"]
pub(crate) mod meter;
#[path = "../../src/base/range.rs"]
mod range;
#[path = "../../src/base/start.rs"]
mod start;

pub use chain::Chain;
pub use deadline::Deadline;
pub use digest::{Digest, DigestError, Hasher};
pub use range::ByteRange;
pub use rt::Instant;
pub use start::{Begun, begin, start};
pub use sync::lock;

/// See `src/base/sync.rs`.
pub mod sync {
    use std::sync::PoisonError;

    pub use shuttle::sync::{Condvar, Mutex, MutexGuard};

    pub mod atomic {
        pub use shuttle::sync::atomic::{
            AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
        };

        pub fn zeros(count: usize) -> Box<[AtomicU32]> {
            (0..count).map(|_| AtomicU32::new(0)).collect()
        }
    }

    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See `src/base/rt.rs`. The clock moves on a little whenever somebody looks at it and by what is slept.
pub mod rt {
    use std::cell::Cell;
    use std::future::Future;
    use std::ops::{Add, Sub};
    use std::pin::pin;
    use std::task::Poll;
    use std::time::Duration;

    use shuttle::future::yield_now;
    use shuttle::rand::Rng as _;

    thread_local! {
        static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// Waits as long as this or longer end only with what is waited for: that nobody is woken then shows as a deadlock.
    const FOR_EVER: Duration = Duration::from_secs(60);

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Instant(Duration);

    impl Instant {
        pub fn now() -> Self {
            NOW.set(NOW.get() + Duration::from_micros(10));
            Self(NOW.get())
        }

        pub fn elapsed(&self) -> Duration {
            Self::now().saturating_duration_since(*self)
        }

        pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
            self.0.saturating_sub(earlier.0)
        }
    }

    impl Add<Duration> for Instant {
        type Output = Self;
        fn add(self, span: Duration) -> Self {
            Self(self.0 + span)
        }
    }

    impl Sub<Instant> for Instant {
        type Output = Duration;
        fn sub(self, earlier: Self) -> Duration {
            self.saturating_duration_since(earlier)
        }
    }

    impl Sub<Duration> for Instant {
        type Output = Self;
        fn sub(self, span: Duration) -> Self {
            Self(self.0.saturating_sub(span))
        }
    }

    #[derive(Clone, Debug)]
    pub struct Handle;

    pub struct Entered;

    impl Handle {
        pub fn current() -> Self {
            Self
        }

        pub fn enter(&self) -> Entered {
            Entered
        }

        pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
            drop(shuttle::future::spawn(task));
        }

        pub fn spawn_blocking(&self, work: impl FnOnce() + Send + 'static) {
            drop(shuttle::thread::spawn(work));
        }
    }

    fn pass(span: Duration) {
        NOW.set(NOW.get() + span);
    }

    pub async fn sleep(span: Duration) {
        for _ in 0..shuttle::rand::thread_rng().gen_range(1..4) {
            yield_now().await;
        }
        pass(span);
    }

    #[derive(Debug)]
    pub struct Elapsed;

    pub async fn timeout<T>(span: Duration, work: impl Future<Output = T>) -> Result<T, Elapsed> {
        if span >= FOR_EVER {
            return Ok(work.await);
        }
        let mut work = pin!(work);
        let mut left = shuttle::rand::thread_rng().gen_range(1..30);
        loop {
            let now = std::future::poll_fn(|cx| {
                Poll::Ready(match work.as_mut().poll(cx) {
                    Poll::Ready(done) => Some(done),
                    Poll::Pending => None,
                })
            });
            if let Some(done) = now.await {
                return Ok(done);
            }
            left -= 1;
            if left == 0 {
                pass(span);
                return Err(Elapsed);
            }
            yield_now().await;
        }
    }

    pub async fn timeout_at<T>(
        until: Instant,
        work: impl Future<Output = T>,
    ) -> Result<T, Elapsed> {
        timeout(until.saturating_duration_since(Instant::now()), work).await
    }

    pub fn aside<T>(work: impl FnOnce() -> T) -> T {
        work()
    }

    pub fn pause(span: Duration) {
        pass(span);
        shuttle::thread::yield_now();
    }

    /// So that whoever brings bytes hashes them.
    pub fn hashing_threads() -> usize {
        0
    }
}
