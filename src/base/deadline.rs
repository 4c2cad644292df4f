//! The moment by which an operation must have ended, shared by all its retries.

use std::time::Duration;

use super::Instant;

/// A point in time that bounds an operation and everything it calls: one budget, however many retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline `span` from now.
    pub fn after(span: Duration) -> Self {
        Self(Instant::now() + span)
    }

    /// What is left; zero when it has passed.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }

    /// The moment.
    pub fn instant(self) -> Instant {
        self.0
    }
}
