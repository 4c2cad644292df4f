//! What is counted while it happens, for whoever watches.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows. All of them together are no snapshot of one moment.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long something took, sorted by size.
#[derive(Debug, Default)]
pub struct Durations {
    buckets: [Counter; Self::BOUNDS.len() + 1],
    nanoseconds: Counter,
}

impl Durations {
    /// Upper bounds of all buckets but the last, which has none; in seconds.
    pub const BOUNDS: [f64; 7] = [0.001, 0.003, 0.01, 0.03, 0.1, 1.0, 10.0];

    /// Takes note of one.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = Self::BOUNDS.iter().take_while(|bound| seconds > **bound);
        self.buckets[bucket.count()].add(1);
        self.nanoseconds
            .add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// How many there were in each bucket, the one without a bound last.
    pub fn counts(&self) -> [u64; Self::BOUNDS.len() + 1] {
        std::array::from_fn(|at| self.buckets[at].get())
    }

    /// All of them together, in seconds.
    pub fn sum(&self) -> f64 {
        self.nanoseconds.get() as f64 / 1e9
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        let durations = Durations::default();
        for millis in [0, 1, 2, 10, 100, 60_000] {
            durations.observe(Duration::from_millis(millis));
        }
        assert_eq!(durations.counts(), [2, 1, 1, 0, 1, 0, 0, 1]);
        assert!((durations.sum() - 60.113).abs() < 1e-9);
    }
}
