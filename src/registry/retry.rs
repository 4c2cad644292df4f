//! When a failed request is tried again: a pure decision.

use std::time::{Duration, SystemTime};

use super::RegistryError;

/// How often a request is tried, beside what its deadline allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tries {
    /// As often as the deadline allows: somebody reads bytes, and an error would end him.
    UntilDeadline,
    /// The same, but a server that takes no connection is given up soon: somebody looks up a name, and a registry that is gone must
    /// not cost him the whole deadline.
    Lookup,
    /// So often.
    AtMost(u32),
}

impl Tries {
    /// Whether a failure of try number `attempt` (counted from 1) was the last one.
    pub(super) fn are_over(self, error: &RegistryError, attempt: u32) -> bool {
        match self {
            Self::UntilDeadline => false,
            Self::Lookup => {
                matches!(error, RegistryError::Connect { .. }) && attempt >= CONNECT_TRIES
            }
            Self::AtMost(most) => attempt >= most,
        }
    }
}

/// Connections that a lookup tries: with the pauses between them less than a second.
const CONNECT_TRIES: u32 = 3;
/// The first pause; each further one doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause of our own; a server's Retry-After may ask for more.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Tries for a name that does not resolve: a typing error must not hold a lookup until its deadline.
const DNS_TRIES: u32 = 3;

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Try again after this pause.
    Wait(Duration),
    /// The failure is final.
    GiveUp,
    /// It would be tried again, but the pause goes beyond the deadline.
    OutOfTime,
}

/// Whether a request that was answered with this status may succeed later.
pub(super) fn is_transient_status(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// Decides about the failure of try number `attempt` (counted from 1) with `left` until the deadline.
///
/// `jitter` in `0.0..1.0` spreads the pauses of many clients over half of their length.
pub(super) fn decide(error: &RegistryError, attempt: u32, left: Duration, jitter: f64) -> Decision {
    if !error.is_transient() || matches!(error, RegistryError::Dns { .. }) && attempt >= DNS_TRIES {
        return Decision::GiveUp;
    }
    let doubled = FIRST_PAUSE
        .saturating_mul(1 << attempt.saturating_sub(1).min(10))
        .min(LONGEST_PAUSE);
    let own = doubled.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0));
    let pause = error.retry_after().map_or(own, |asked| asked.max(own));
    if pause >= left {
        Decision::OutOfTime
    } else {
        Decision::Wait(pause)
    }
}

/// A Retry-After header's value: seconds or an HTTP date (RFC 9110, section 10.2.3).
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    // A day is beyond every deadline; larger numbers are cut so that nothing overflows.
    const LONGEST: Duration = Duration::from_secs(24 * 3600);
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        return Some(
            value
                .parse()
                .map_or(LONGEST, Duration::from_secs)
                .min(LONGEST),
        );
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(
        date.duration_since(now)
            .unwrap_or(Duration::ZERO)
            .min(LONGEST),
    )
}

/// A number in `0.0..1.0`, different each time; for jitter, not for secrets.
pub(super) fn jitter() -> f64 {
    use std::hash::{BuildHasher, Hasher};
    #[cfg(test)]
    if super::testing::script::is_playing() {
        return 0.5;
    }
    let random = std::hash::RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16, retry_after: Option<u64>) -> RegistryError {
        RegistryError::from_status("x", "h", status, retry_after.map(Duration::from_secs), b"")
    }

    #[test]
    fn pauses_double_up_to_a_limit_and_final_failures_end_it() {
        let minute = Duration::from_secs(60);
        let pause = |attempt| decide(&status(503, None), attempt, minute, 1.0);
        assert_eq!(pause(1), Decision::Wait(Duration::from_millis(250)));
        assert_eq!(pause(2), Decision::Wait(Duration::from_millis(500)));
        assert_eq!(pause(7), Decision::Wait(LONGEST_PAUSE));
        assert_eq!(pause(u32::MAX), Decision::Wait(LONGEST_PAUSE));
        assert_eq!(
            decide(&status(503, None), 1, minute, 0.0),
            Decision::Wait(Duration::from_millis(125))
        );
        for final_status in [400, 401, 403, 404, 405, 416, 501] {
            assert_eq!(
                decide(&status(final_status, None), 1, minute, 0.5),
                Decision::GiveUp,
                "{final_status}"
            );
        }
    }

    #[test]
    fn the_server_may_ask_for_longer_but_not_beyond_the_deadline() {
        let wait = |left| decide(&status(429, Some(7)), 1, Duration::from_secs(left), 0.5);
        assert_eq!(wait(60), Decision::Wait(Duration::from_secs(7)));
        assert_eq!(wait(7), Decision::OutOfTime);
        assert_eq!(
            decide(&status(503, Some(0)), 1, Duration::from_secs(9), 1.0),
            Decision::Wait(FIRST_PAUSE)
        );
        assert_eq!(
            decide(&status(503, None), 1, Duration::ZERO, 0.5),
            Decision::OutOfTime
        );
    }

    #[test]
    fn a_lookup_gives_up_a_server_that_takes_no_connection_and_a_read_does_not() {
        let gone = RegistryError::Connect {
            host: "h".into(),
            source: std::sync::Arc::new(std::io::Error::from(
                std::io::ErrorKind::ConnectionRefused,
            )),
        };
        assert!(!Tries::Lookup.are_over(&gone, 2) && Tries::Lookup.are_over(&gone, 3));
        assert!(!Tries::Lookup.are_over(&status(503, None), 1000));
        assert!(!Tries::UntilDeadline.are_over(&gone, u32::MAX));
        assert!(!Tries::AtMost(2).are_over(&gone, 1) && Tries::AtMost(2).are_over(&gone, 2));
    }

    #[test]
    fn retry_after_in_seconds_and_as_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        let read = |value| retry_after(value, now);
        assert_eq!(read("0"), Some(Duration::ZERO));
        assert_eq!(read(" 120 "), Some(Duration::from_secs(120)));
        assert_eq!(
            read("99999999999999999999999"),
            Some(Duration::from_secs(86_400))
        );
        assert_eq!(
            read("Sun, 06 Nov 1994 08:50:37 GMT"),
            Some(Duration::from_secs(60))
        );
        assert_eq!(read("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        for value in ["", "-1", "soon", "1.5", "Sun, 99 Foo 1994"] {
            assert_eq!(read(value), None, "{value}");
        }
    }

    #[test]
    fn jitter_stays_in_its_range_and_varies() {
        let drawn: Vec<f64> = (0..100).map(|_| jitter()).collect();
        assert!(drawn.iter().all(|x| (0.0..1.0).contains(x)));
        assert!(drawn.iter().any(|x| (x - drawn[0]).abs() > 1e-6));
    }
}
