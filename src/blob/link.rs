//! What the links to the registries have shown so far: how soon they answer, how much they carry.

use std::time::Duration;

use crate::base::sync::Mutex;
use crate::base::{Instant, lock};

/// The rate is measured over this.
const SPAN: Duration = Duration::from_millis(200);

/// Time to the head of a response and bytes in a second, all registries together.
#[derive(Debug, Default)]
pub(super) struct Link(Mutex<Measured>);

#[derive(Debug, Default)]
struct Measured {
    latency: Duration,
    rate: u64,
    span: Option<(Instant, u64)>,
}

impl Link {
    /// A request got its answer's head after `latency`.
    pub(super) fn answered(&self, latency: Duration) {
        let mut measured = lock(&self.0);
        measured.latency = match measured.latency {
            Duration::ZERO => latency,
            before => (before * 7 + latency) / 8,
        };
    }

    /// So many bytes came just now.
    pub(super) fn came(&self, bytes: u64) {
        let now = Instant::now();
        let mut measured = lock(&self.0);
        let (since, so_far) = measured.span.unwrap_or((now, 0));
        let (bytes, lasted) = (so_far + bytes, now - since);
        if lasted < SPAN {
            measured.span = Some((since, bytes));
            return;
        }
        let rate = (bytes as f64 / lasted.as_secs_f64()) as u64;
        // Readers pause more often than links become slower.
        measured.rate = rate.max(measured.rate - measured.rate / 8);
        measured.span = Some((now, 0));
    }

    /// Latency and rate; zero before anything came.
    pub(super) fn measured(&self) -> (Duration, u64) {
        let measured = lock(&self.0);
        (measured.latency, measured.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_is_counted_over_a_span() {
        let link = Link::default();
        assert_eq!(link.measured(), (Duration::ZERO, 0));
        link.answered(Duration::from_millis(80));
        link.answered(Duration::from_millis(160));
        assert_eq!(link.measured().0, Duration::from_millis(90));
        link.came(1 << 20);
        assert_eq!(link.measured().1, 0, "not for long enough");
        std::thread::sleep(SPAN);
        link.came(1 << 20);
        let rate = link.measured().1;
        assert!((1..=10 << 20).contains(&rate), "{rate}");
    }
}
