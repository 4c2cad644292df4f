//! What the readers of all blobs are doing now, for those who give way to them.

use std::time::Duration;

use crate::base::Instant;
use crate::base::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Whether readers wait, and when one was last served.
#[derive(Debug)]
pub(super) struct Readers {
    start: Instant,
    /// Milliseconds after `start`; 0 before the first read.
    last: AtomicU64,
    waiting: AtomicUsize,
}

impl Readers {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            last: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A read was asked for.
    pub(super) fn note(&self) {
        self.last.store(self.now().max(1), Ordering::Relaxed);
    }

    /// One more waits, or stops waiting.
    pub(super) fn wait(&self, begins: bool) {
        if begins {
            self.waiting.fetch_add(1, Ordering::Relaxed);
        } else {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.note();
        }
    }

    /// Whether one waits, or has read within `span`.
    pub(super) fn active_within(&self, span: Duration) -> bool {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let last = self.last.load(Ordering::Relaxed);
        let since = self.now().saturating_sub(last);
        last > 0 && since < u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_counts_while_it_waits_and_for_a_while_after() {
        let readers = Readers::new();
        let (long, none) = (Duration::from_secs(3600), Duration::ZERO);
        assert!(!readers.active_within(long), "nobody has read yet");
        readers.wait(true);
        assert!(readers.active_within(none));
        readers.wait(false);
        assert!(!readers.active_within(none));
        assert!(readers.active_within(long));
        let other = Readers::new();
        other.note();
        assert!(other.active_within(long));
    }
}
