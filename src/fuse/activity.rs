//! Whether a thread goes on: it says when it begins something and when it is done, and others look.

use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What times count from.
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What one thread does; clones are of the same thread.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<AtomicU64>);

/// It does something until this is dropped.
#[derive(Debug)]
pub struct Busy<'a>(&'a Activity);

fn now() -> u64 {
    // Never 0, which is what an idle thread says.
    u64::try_from(BEGIN.elapsed().as_millis())
        .unwrap_or(u64::MAX)
        .saturating_add(1)
}

impl Activity {
    /// The thread begins something.
    pub fn begin(&self) -> Busy<'_> {
        self.0.store(now(), Ordering::Relaxed);
        Busy(self)
    }

    /// For how long it has been at the same thing; zero when it is at nothing. Exact to a millisecond.
    pub fn busy_for(&self) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => Duration::from_millis(now().saturating_sub(since)),
        }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Relaxed);
    }
}
