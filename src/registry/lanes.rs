//! How many parts to fetch from a host at a time, and how large: a pure decision about what was measured.
//!
//! Nobody can know beforehand whether a host gives each connection a share of its own, or all of them together one; so it is
//! tried. A throughput is measured over a span in which all lanes were busy. Now and then the number is doubled for such a span, and
//! what gains clearly stays. Where more was clearly worse (a server that runs out of processor time), fewer are tried the same
//! way. Trials that bring nothing become rare. A refusal (429, 503 with Retry-After, no connection) halves the number at once;
//! from then on it grows by single steps, and stays below where it was refused.

use std::time::Duration;

use crate::base::Instant;

/// Lanes to a host of which nothing is known.
pub(super) const FIRST: usize = 4;
/// More than this brings nothing on any link that was measured, and registries limit it.
pub(super) const MOST: usize = 16;
/// The unit of a request for a part, and its double.
const PART: u64 = 8 << 20;

/// What a trial has to gain to be kept, and to lose to count as harm.
const CLEAR: f64 = 1.10;
/// The shortest span that is measured.
const SPAN: Duration = Duration::from_millis(400);
/// Trials take no more than this part of the time, also on links where a span lasts for minutes.
const RARELY: u32 = 10;
/// The pause behind the first trial in vain; each further one doubles it.
const FIRST_HOLD: Duration = Duration::from_secs(2);
const LONGEST_HOLD: Duration = Duration::from_secs(60);
/// The pause behind a refusal.
const REFUSED_HOLD: Duration = Duration::from_secs(10);
/// Refusals that come together are one: those of all lanes of that moment.
const ONE_REFUSAL: Duration = Duration::from_secs(1);
/// How long a refusal is remembered.
const REFUSED_MEMORY: Duration = Duration::from_secs(300);

/// What is known about one host.
#[derive(Debug)]
pub(super) struct Lanes {
    limit: usize,
    most: usize,
    span: Option<Span>,
    /// What `limit` was before the trial under way, and what it gave.
    trial: Option<(usize, f64)>,
    /// The last trial upwards did harm: try downwards.
    fewer: bool,
    hold: Duration,
    hold_until: Option<Instant>,
    /// When it was refused last, and with how many lanes.
    refused: Option<(Instant, usize)>,
    pace: Pace,
}

/// What is being measured.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: Instant,
    delivered: u64,
    parts: usize,
}

/// How requests for parts spend their time.
#[derive(Debug, Default)]
struct Pace {
    /// Smoothed time from request to head, seconds.
    head: f64,
    /// Smoothed time of a byte on one connection, seconds.
    byte: f64,
    measured: bool,
    double: bool,
}

impl Lanes {
    /// For a host of which nothing is known, never more than `most` (at least 1) lanes.
    pub(super) fn new(most: usize) -> Self {
        let most = most.clamp(1, MOST);
        Self {
            limit: FIRST.min(most),
            most,
            span: None,
            trial: None,
            fewer: false,
            hold: FIRST_HOLD,
            hold_until: None,
            refused: None,
            pace: Pace::default(),
        }
    }

    /// Requests for parts that may be under way now.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// A lane is free and nobody wants it: what is measured now says nothing about the host.
    pub(super) fn idle(&mut self) {
        self.span = None;
        if let Some((before, _)) = self.trial.take() {
            self.limit = before.min(self.most);
        }
    }

    /// A part ended while all lanes were busy; the host has sent `delivered` bytes in all.
    pub(super) fn part(&mut self, now: Instant, delivered: u64) {
        let Some(span) = &mut self.span else {
            // The first part to end opens the span, so that those of another number of lanes are over.
            self.span = Some(Span {
                start: now,
                delivered,
                parts: 0,
            });
            return;
        };
        span.parts += 1;
        let elapsed = now.saturating_duration_since(span.start);
        if elapsed < SPAN || span.parts < self.limit {
            return;
        }
        let rate = delivered.saturating_sub(span.delivered) as f64 / elapsed.as_secs_f64();
        self.span = None;
        self.measured(now, rate, elapsed);
    }

    fn measured(&mut self, now: Instant, rate: f64, elapsed: Duration) {
        if let Some((before, rate_before)) = self.trial.take() {
            if rate >= rate_before * CLEAR {
                self.hold = FIRST_HOLD;
                self.fewer = false;
                self.span = None;
                tracing::debug!(lanes = self.limit, rate, rate_before, "more pays");
                return;
            }
            self.fewer = self.limit > before && rate * CLEAR <= rate_before;
            self.limit = before;
            if !self.fewer {
                self.hold_until = Some(now + self.hold.max(elapsed * RARELY));
                self.hold = (self.hold * 2).min(LONGEST_HOLD);
            }
            return;
        }
        if self.hold_until.is_some_and(|until| now < until) {
            return;
        }
        let next = self.next(now);
        if next != self.limit {
            self.trial = Some((self.limit, rate));
            self.limit = next;
        }
    }

    /// The number to try next.
    fn next(&mut self, now: Instant) -> usize {
        if std::mem::take(&mut self.fewer) {
            return (self.limit / 2).max(1);
        }
        let remembered = self
            .refused
            .filter(|(at, _)| now.saturating_duration_since(*at) < REFUSED_MEMORY);
        match remembered {
            Some((_, lanes)) => (self.limit + 1)
                .min(lanes.saturating_sub(1))
                .max(self.limit),
            None => (self.limit * 2).min(self.most),
        }
    }

    /// The host refused a request: too many, or too busy.
    pub(super) fn refused(&mut self, now: Instant) {
        let together = |(at, _): (Instant, usize)| now.saturating_duration_since(at) < ONE_REFUSAL;
        if self.refused.is_some_and(together) {
            return;
        }
        self.refused = Some((now, self.limit));
        self.limit = (self.limit / 2).max(1);
        self.trial = None;
        self.fewer = false;
        self.span = None;
        self.hold = FIRST_HOLD;
        self.hold_until = Some(now + REFUSED_HOLD);
    }

    /// A part took `head` to its first byte and `body` for its `bytes`.
    pub(super) fn timed(&mut self, head: Duration, body: Duration, bytes: u64) {
        self.pace.timed(head, body, bytes);
    }

    /// The size of the parts to ask for: [`PART`] or twice that.
    pub(super) fn part_size(&self) -> u64 {
        if self.pace.double { 2 * PART } else { PART }
    }
}

impl Pace {
    /// A Go registry pays milliseconds of processor time for a request, and a distant one a round trip. Where that is a good
    /// part of a request's time, half as many requests are made; where it is not, smaller parts are lost with a connection.
    fn timed(&mut self, head: Duration, body: Duration, bytes: u64) {
        if bytes < PART / 2 {
            return;
        }
        let (head, byte) = (head.as_secs_f64(), body.as_secs_f64() / bytes as f64);
        if self.measured {
            self.head += (head - self.head) / 8.0;
            self.byte += (byte - self.byte) / 8.0;
        } else {
            (self.head, self.byte, self.measured) = (head, byte, true);
        }
        let share = self.head / (self.byte * PART as f64);
        self.double = share > if self.double { 0.05 } else { 0.10 };
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
