//! How long a host may say nothing before its connection is given up: a pure decision about what it did so far.
//!
//! A connection that died without a word (a link that went down, a NAT that forgot it) looks like a server that thinks. What tells
//! them apart is what the same host usually takes: several times that, and never less than some seconds. A host that is given up
//! wrongly gets twice as long the next time, up to a minute and the setting, so that a slow one is asked a few times in vain, not for ever.

use std::time::Duration;

/// So many times what was usual is unusual.
const TIMES: u32 = 8;
/// A connection is not given up sooner: networks lose packets, and TCP needs a second and more to send them again.
const LEAST: Duration = Duration::from_secs(4);
/// Having been given up makes it no longer: a network that is back should be noticed in time.
const LONGEST: Duration = Duration::from_secs(60);
/// A reader's request that takes so many times what its like took gets a second one beside it.
const SLOW_TIMES: f64 = 4.0;
/// But not sooner than this,
const SLOW_LEAST: Duration = Duration::from_secs(1);
/// and after this where nothing is known: the first packet of a connection may be lost, and once more after a second.
const SLOW_UNKNOWN: Duration = Duration::from_secs(3);
/// Bodies shorter than this say nothing about how long a byte takes.
const LONG: u64 = 64 << 10;

/// What a host was seen to take.
#[derive(Debug, Default)]
pub(super) struct Patience {
    head: Usual,
    gap: Usual,
    /// Smoothed time of a byte in seconds, on one connection.
    byte: Option<f64>,
    /// Times in a row that it was given up.
    stalls: u32,
}

/// The slowest of late, which fades as faster ones follow.
#[derive(Debug, Default)]
struct Usual(Option<Duration>);

impl Usual {
    fn saw(&mut self, took: Duration) {
        let before = self.0.unwrap_or_default();
        self.0 = Some(took.max(before - before / 32));
    }
}

impl Patience {
    /// The head of a response came `took` after its request.
    pub(super) fn head(&mut self, took: Duration) {
        self.head.saw(took);
        self.stalls = 0;
    }

    /// A piece of a body came so long after the one before.
    pub(super) fn gap(&mut self, took: Duration) {
        self.gap.saw(took);
        self.stalls = 0;
    }

    /// A body of `bytes` took so long.
    pub(super) fn body(&mut self, took: Duration, bytes: u64) {
        if bytes >= LONG {
            let now = took.as_secs_f64() / bytes as f64;
            let before = self.byte.unwrap_or(now);
            self.byte = Some(before + (now - before) / 8.0);
        }
    }

    /// It was given up.
    pub(super) fn stalled(&mut self) {
        self.stalls = self.stalls.saturating_add(1);
    }

    /// How long to wait for the head of a response, at most `most`.
    pub(super) fn for_head(&self, most: Duration) -> Duration {
        self.given(&self.head, most)
    }

    /// How long to wait for the next piece of a body, at most `most`.
    pub(super) fn for_gap(&self, most: Duration) -> Duration {
        // A server that streams has also to fetch: what it takes for a head it may take in the middle.
        let slower = Usual(
            self.gap
                .0
                .map(|gap| gap.max(self.head.0.unwrap_or_default())),
        );
        self.given(&slower, most)
    }

    fn given(&self, usual: &Usual, most: Duration) -> Duration {
        let Some(usual) = usual.0 else { return most };
        let patience = usual.saturating_mul(TIMES).max(LEAST);
        let doubled = patience.saturating_mul(1 << self.stalls.min(10));
        doubled.min(patience.max(LONGEST)).min(most)
    }

    /// When a request for `bytes` takes so long, it is slow for this host.
    pub(super) fn slow(&self, bytes: u64) -> Duration {
        let Some(head) = self.head.0 else {
            return SLOW_UNKNOWN;
        };
        let body = self.byte.unwrap_or_default() * bytes as f64;
        let expected = head.as_secs_f64() + body;
        Duration::try_from_secs_f64(expected * SLOW_TIMES)
            .unwrap_or(Duration::MAX)
            .max(SLOW_LEAST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_secs(30);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn an_unknown_host_gets_all_the_time_and_a_quick_one_some_seconds() {
        let mut patience = Patience::default();
        assert_eq!(
            (patience.for_head(MOST), patience.for_gap(MOST)),
            (MOST, MOST)
        );
        patience.head(ms(20));
        patience.gap(ms(1));
        assert_eq!(
            (patience.for_head(MOST), patience.for_gap(MOST)),
            (LEAST, LEAST)
        );
        assert_eq!(
            patience.for_head(ms(500)),
            ms(500),
            "the setting is the most"
        );
    }

    #[test]
    fn a_slow_host_gets_several_times_what_it_takes_and_fades() {
        let mut patience = Patience::default();
        patience.head(ms(1500));
        assert_eq!(patience.for_head(MOST), ms(12_000));
        patience.gap(ms(1));
        assert_eq!(
            patience.for_gap(MOST),
            ms(12_000),
            "what it thinks about a head it may think about later"
        );
        for _ in 0..100 {
            patience.head(ms(10));
        }
        assert_eq!(patience.for_head(MOST), LEAST);
    }

    #[test]
    fn a_host_that_is_given_up_in_vain_gets_ever_longer_up_to_the_setting() {
        let mut patience = Patience::default();
        patience.head(ms(100));
        let waits: Vec<_> = (0..5)
            .map(|_| {
                patience.stalled();
                patience.for_head(MOST).as_secs()
            })
            .collect();
        assert_eq!(waits, [8, 16, 30, 30, 30]);
        patience.head(ms(9000));
        assert_eq!(
            patience.for_head(MOST),
            MOST,
            "and then it is known to be slow"
        );
    }

    #[test]
    fn a_dark_network_is_looked_at_again_within_a_minute_whatever_the_setting() {
        let hour = Duration::from_secs(3600);
        let mut patience = Patience::default();
        patience.head(ms(100));
        let waits: Vec<_> = (0..6)
            .map(|_| {
                patience.stalled();
                patience.for_head(hour).as_secs()
            })
            .collect();
        assert_eq!(waits, [8, 16, 32, 60, 60, 60]);
        patience.head(Duration::from_secs(20));
        patience.stalled();
        assert_eq!(
            patience.for_head(hour).as_secs(),
            160,
            "a slow one keeps what it takes"
        );
    }

    #[test]
    fn a_request_is_slow_by_what_its_like_took() {
        let mut patience = Patience::default();
        assert_eq!(patience.slow(8 << 20), SLOW_UNKNOWN);
        patience.head(ms(50));
        assert_eq!(patience.slow(8 << 20), SLOW_LEAST);
        // 4 MB/s on one connection: 2 s for 8 MB.
        patience.body(Duration::from_secs(1), 4_000_000);
        assert_eq!(patience.slow(8_000_000), ms(8200));
        patience.body(Duration::from_secs(9), 100);
        assert_eq!(
            patience.slow(8_000_000),
            ms(8200),
            "a short body says nothing"
        );
    }
}
