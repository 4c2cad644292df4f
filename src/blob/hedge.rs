//! One body, or two that race for the same bytes.
//!
//! A request for what a reader waits for that takes several times what its like took gets a second one beside it, over another
//! connection, for what is still missing. Whichever brings a byte first wins it; the first one is dropped when the second has
//! caught up with it. One connection that lost its route, or a server that lost its mind, then costs a reader little.
//!
//! Readers are never more than a small part of the load away from what they would be without this: each request of a reader pays for
//! a twentieth of a second one, and no more than [`MOST_SAVED`] are saved up. So of a server that is slow to everybody no more than
//! 5 % are asked twice.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;

use super::flight::Flight;
use super::lazy::LazyBlob;
use crate::base::rt::sleep;
use crate::base::sync::Mutex;
use crate::base::sync::atomic::Ordering;
use crate::base::{ByteRange, Chain, Deadline, Instant, lock};
use crate::registry::{BlobBody, BodyStream, RegistryError};

/// So many requests of readers pay for a second one.
const PRICE: u32 = 20;
/// Second requests that may be made one after the other.
const MOST_SAVED: u32 = 4;
/// A request is looked at for the first time after this.
const LOOK: Duration = Duration::from_secs(1);

/// What second requests may still be made.
#[derive(Debug)]
pub(super) struct Purse(Mutex<u32>);

impl Default for Purse {
    fn default() -> Self {
        Self(Mutex::new(PRICE * MOST_SAVED))
    }
}

impl Purse {
    /// A reader's request was made.
    pub(super) fn pay_in(&self) {
        let mut saved = lock(&self.0);
        *saved = (*saved + 1).min(PRICE * MOST_SAVED);
    }

    /// Pays for a second request, if that can be afforded.
    fn take(&self) -> bool {
        let mut saved = lock(&self.0);
        let enough = *saved >= PRICE;
        if enough {
            *saved -= PRICE;
        }
        enough
    }
}

type Asking<'a> = Pin<Box<dyn Future<Output = Result<BlobBody, RegistryError>> + Send + 'a>>;

/// One request, from when it is made.
enum Racer<'a> {
    Asked {
        from: u64,
        answer: Asking<'a>,
    },
    /// Its body; the next byte of it is the one at `at`.
    Running {
        at: u64,
        body: BodyStream,
    },
}

/// What a racer did.
enum Did {
    Answered(Result<BlobBody, RegistryError>),
    Brought(Result<Option<Bytes>, RegistryError>),
}

impl Racer<'_> {
    /// May be dropped and called again at any time.
    async fn goes_on(racer: &mut Option<Self>) -> Did {
        match racer {
            Some(Racer::Asked { answer, .. }) => Did::Answered(answer.as_mut().await),
            Some(Racer::Running { body, .. }) => Did::Brought(body.next().await),
            None => std::future::pending().await,
        }
    }
}

/// The bytes of a range, in order, from whoever brings them first.
pub(super) struct Feed<'a> {
    blob: &'a LazyBlob,
    flight: &'a Flight,
    deadline: Deadline,
    start: u64,
    /// The next byte to hand out, and the one behind the last.
    at: u64,
    end: u64,
    first: Option<Racer<'a>>,
    second: Option<Racer<'a>>,
    begun: Instant,
    /// When to look whether a second request is needed; `None`: not any more.
    look: Option<Instant>,
    /// What the one of two that is gone failed with.
    failed: Option<RegistryError>,
}

/// How a request was answered.
pub(super) enum Answer {
    /// As it was asked: [`Feed::next`] has the bytes.
    Range,
    /// With the whole blob from its first byte.
    Whole(BodyStream),
}

impl<'a> Feed<'a> {
    /// Asks for `range`; over a connection that carried nothing before when `fresh` is asked for.
    pub(super) fn ask(
        blob: &'a LazyBlob,
        flight: &'a Flight,
        range: ByteRange,
        deadline: Deadline,
        fresh: bool,
    ) -> Self {
        let begun = Instant::now();
        if flight.is_boosted() {
            blob.shared.purse.pay_in();
        }
        Self {
            first: Some(Racer::Asked {
                from: range.start(),
                answer: Box::pin(blob.ask(range, deadline, fresh)),
            }),
            second: None,
            look: (!flight.whole).then(|| begun + LOOK),
            failed: None,
            start: range.start(),
            at: range.start(),
            end: range.end(),
            begun,
            deadline,
            flight,
            blob,
        }
    }

    /// The body of a whole blob, of which the bytes before `at` are known.
    pub(super) fn of(blob: &'a LazyBlob, flight: &'a Flight, at: u64, body: BodyStream) -> Self {
        Self {
            first: {
                blob.comes_from(body.source());
                Some(Racer::Running { at: 0, body })
            },
            second: None,
            look: None,
            failed: None,
            start: at,
            at,
            end: flight.range.end(),
            begun: Instant::now(),
            deadline: Deadline::after(Duration::ZERO),
            flight,
            blob,
        }
    }

    /// Waits for the head of an answer.
    pub(super) async fn head(&mut self) -> Result<Answer, RegistryError> {
        loop {
            match self.step().await {
                (Did::Answered(Ok(BlobBody::Whole(body))), _) => return Ok(Answer::Whole(body)),
                (Did::Answered(Ok(BlobBody::Range(body))), second) => {
                    self.runs(second, body);
                    return Ok(Answer::Range);
                }
                (Did::Answered(Err(error)), second) => self.fails(second, error)?,
                (Did::Brought(_), _) => unreachable!("nobody runs before the first answer"),
            }
        }
    }

    /// The next bytes; `None` behind the last. May be dropped and called again at any time.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            match self.step().await {
                (Did::Answered(Ok(BlobBody::Range(body))), second) => self.runs(second, body),
                // Of two servers one knows no ranges: the other is the better one, and if that has failed, so has the race.
                (Did::Answered(Ok(BlobBody::Whole(_))), second) => {
                    *self.slot(second) = None;
                    if let Some(error) = self.failed.take() {
                        return Err(error);
                    }
                }
                (Did::Answered(Err(error)) | Did::Brought(Err(error)), second) => {
                    self.fails(second, error)?;
                }
                (Did::Brought(Ok(None)), _) => return Ok(None),
                (Did::Brought(Ok(Some(bytes))), second) => {
                    if let Some(bytes) = self.brought(second, bytes) {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    fn slot(&mut self, second: bool) -> &mut Option<Racer<'a>> {
        if second {
            &mut self.second
        } else {
            &mut self.first
        }
    }

    /// What happens next, and whether the second request did it.
    async fn step(&mut self) -> (Did, bool) {
        loop {
            let Some(look) = self.look.filter(|_| self.second.is_none()) else {
                return tokio::select! {
                    biased;
                    did = Racer::goes_on(&mut self.second) => (did, true),
                    did = Racer::goes_on(&mut self.first) => (did, false),
                };
            };
            let left = look.saturating_duration_since(Instant::now());
            let did = tokio::select! {
                biased;
                did = Racer::goes_on(&mut self.first) => Some(did),
                () = sleep(left) => None,
            };
            match did {
                Some(did) => return (did, false),
                None => self.look_at_it(),
            }
        }
    }

    /// Makes a second request if the first is slow and somebody waits for it.
    fn look_at_it(&mut self) {
        let now = Instant::now();
        let slow = self.blob.slow(self.end - self.at);
        let due = self.begun + slow;
        if !self.flight.is_boosted() || now < due {
            self.look = Some(due.max(now + LOOK));
            return;
        }
        // It may be a large part on a slow link, where a second request would only take its share of that.
        let (came, left) = (self.at - self.start, self.end - self.at);
        if came > 0 && (now - self.begun).mul_f64(left as f64 / came as f64) < slow {
            self.look = Some(now + LOOK);
            return;
        }
        if self.deadline.left() < LOOK || !self.blob.shared.purse.take() {
            self.look = Some(now + LOOK);
            return;
        }
        self.look = None;
        let rest = ByteRange::new(self.at, self.end);
        tracing::info!(digest = %self.blob.digest, range = %rest, after = ?self.begun.elapsed(), "slow; asking a second time beside it");
        self.blob.shared.hedges.fetch_add(1, Ordering::Relaxed);
        self.second = Some(Racer::Asked {
            from: rest.start(),
            answer: Box::pin(self.blob.ask(rest, self.deadline, true)),
        });
    }

    fn runs(&mut self, second: bool, body: BodyStream) {
        self.blob.comes_from(body.source());
        let slot = self.slot(second);
        if let Some(Racer::Asked { from, .. }) = slot {
            let at = *from;
            *slot = Some(Racer::Running { at, body });
        }
    }

    /// An error counts when nobody else is left in the race.
    fn fails(&mut self, second: bool, error: RegistryError) -> Result<(), RegistryError> {
        *self.slot(second) = None;
        if self.first.is_none() && self.second.is_none() {
            return Err(error);
        }
        tracing::debug!(digest = %self.blob.digest, second, error = %Chain(&error), "one of two requests failed");
        self.failed = Some(error);
        Ok(())
    }

    /// What of a racer's bytes nobody has brought before.
    fn brought(&mut self, second: bool, mut bytes: Bytes) -> Option<Bytes> {
        let next = self.at;
        self.blob.came(bytes.len() as u64);
        let Some(Racer::Running { at, .. }) = self.slot(second) else {
            return None;
        };
        let start = *at;
        *at += bytes.len() as u64;
        let end = *at;
        if end <= next {
            return None;
        }
        // A racer begins where the other one was at the latest, so there is no gap.
        let known = usize::try_from(next - start).unwrap_or(usize::MAX);
        self.at = end;
        if second {
            self.first = None;
        }
        Some(bytes.split_off(known))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_requests_are_a_twentieth_of_the_first_ones() {
        let purse = Purse::default();
        let taken = (0..100).filter(|_| purse.take()).count();
        assert_eq!(taken, MOST_SAVED as usize, "what is saved up at first");
        let mut taken = 0;
        for _ in 0..1000 {
            purse.pay_in();
            taken += usize::from(purse.take());
        }
        assert_eq!(taken, 50);
        for _ in 0..1000 {
            purse.pay_in();
        }
        let taken = (0..100).filter(|_| purse.take()).count();
        assert_eq!(taken, MOST_SAVED as usize, "no more is saved");
    }
}
