//! What readers of a mount get from the daemon. What the kernel reads itself (passthrough, its page cache) is not seen here.

use std::time::Duration;

use crate::base::meter::{Counter, Durations};

/// Counts reads.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes that were here when they were asked for.
    pub(super) cached: Counter,
    /// Bytes that a reader had to wait for.
    pub(super) fetched: Counter,
    /// How long readers waited for those.
    pub(super) waits: Durations,
    /// Reads that failed.
    pub(super) failed: Counter,
}

impl Meter {
    /// Bytes that were answered with at once, because they were here.
    pub fn cached(&self) -> u64 {
        self.cached.get()
    }

    /// Bytes that were answered with after waiting for a registry.
    pub fn fetched(&self) -> u64 {
        self.fetched.get()
    }

    /// How long the answers of [`fetched`](Self::fetched) were waited for.
    pub fn waits(&self) -> &Durations {
        &self.waits
    }

    /// Reads that were answered with an error.
    pub fn failed(&self) -> u64 {
        self.failed.get()
    }

    /// A read is answered: with so many bytes, or an error; after `waited`, or at once.
    pub(super) fn read(&self, bytes: Option<u64>, waited: Option<Duration>) {
        match (bytes, waited) {
            (None, _) => self.failed.add(1),
            (Some(bytes), None) => self.cached.add(bytes),
            (Some(bytes), Some(waited)) => {
                self.fetched.add(bytes);
                self.waits.observe(waited);
            }
        }
    }
}
