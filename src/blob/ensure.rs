//! What is missing of a range, and the requests that bring it.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;

use super::BlobError;
use super::flight::{Flight, Urgency};
use super::hold::Hold;
use super::lazy::LazyBlob;
use super::plan;
use crate::base::rt::timeout_at;
use crate::base::{Begun, ByteRange, Chain, Deadline, lock};
use crate::cache::Cache;

/// Whole streams of one blob at a time, where the server ignores ranges and the cache has no room: a reader each.
const STREAMS: usize = 3;
/// A request that somebody else began may fail for his reasons; a reader that joined it tries this often himself.
const OWN_TRIES: u32 = 2;

impl LazyBlob {
    /// What of `range` has to be fetched.
    pub(super) fn missing(&self, hold: &Hold, range: ByteRange) -> Vec<ByteRange> {
        if range.is_empty() {
            return Vec::new();
        }
        let gaps = match hold.entry() {
            Some(entry) => {
                let gaps = entry.missing(range);
                if gaps.is_empty() {
                    return gaps;
                }
                // Another process may have brought it.
                if let Err(error) = entry.refresh(range) {
                    tracing::debug!(digest = %self.digest, error = %Chain(&error), "cannot look at the chunk map");
                }
                if entry.is_discarded() {
                    // Another process found it wrong. Whoever holds the blob next begins it anew.
                    self.shared.will_discard(self.digest);
                    self.abandon(&entry);
                }
                entry.missing(range)
            }
            None => vec![range.align(Cache::chunk(self.size), self.size)],
        };
        let gaps = lock(&self.state).overlay.missing(gaps);
        plan::aligned(gaps, Cache::chunk(self.size), self.size)
    }

    /// Has `range` fetched, and returns when all of it is here. The bytes of `wants` may be returned before, as they came.
    pub(super) async fn ensure(
        self: &Arc<Self>,
        hold: &Hold,
        range: ByteRange,
        wants: Option<ByteRange>,
        urgency: Urgency,
        mut deadline: Deadline,
    ) -> Result<Option<Vec<Bytes>>, BlobError> {
        let mut tries = 0;
        let mut passed: Option<(Arc<Flight>, ByteRange)> = None;
        loop {
            self.check()?;
            let gaps = self.missing(hold, range);
            let Some(&gap) = gaps.first() else {
                return Ok(None);
            };
            if self.shared.config.offline {
                return Err(BlobError::Offline {
                    digest: self.digest,
                    range,
                });
            }
            let late = || BlobError::Deadline {
                digest: self.digest,
                range,
            };
            if deadline.passed() {
                return Err(late());
            }
            let (flight, mut begun) = self.launch(&gaps, urgency);
            if urgency == Urgency::Demand {
                flight.want(gap.end());
            }
            let _waiting = (urgency == Urgency::Demand).then(|| {
                flight.boost();
                self.shared.foreground()
            });
            let arrived = gap.end().min(flight.range.end());
            // A flight that is past the gap and has not filled it will not: the cache failed under it.
            let in_vain = passed
                .as_ref()
                .is_some_and(|(last, at)| Arc::ptr_eq(last, &flight) && *at == gap);
            loop {
                let (at, ended) = flight.progress();
                if let Some(Err(error)) = &ended {
                    tries += 1;
                    let no_room = matches!(error, BlobError::NoRoom { .. });
                    // What a prefetch could not keep, a reader still gets through memory.
                    if if no_room {
                        urgency == Urgency::Fill
                    } else {
                        tries >= OWN_TRIES
                    } {
                        return Err(error.clone());
                    }
                }
                if ended.is_some() || (at >= arrived && !in_vain) {
                    break;
                }
                let until = if in_vain { u64::MAX } else { arrived };
                let wants = wants.filter(|wants| !in_vain && flight.range.contains(*wants));
                let arrival = arrival(&flight, until, wants, &mut begun);
                let came = timeout_at(deadline.instant(), arrival).await;
                if let Ok(Some(pieces)) = came {
                    return Ok(Some(pieces));
                }
                if came.is_err() {
                    // The one stream has to come past everything before; while it moves there is hope.
                    if !flight.whole || flight.progress().0 == at {
                        return Err(late());
                    }
                    deadline = Deadline::after(self.shared.config.read_timeout);
                }
            }
            passed = Some((flight, gap));
        }
    }

    /// Begins what is needed for `gaps` beyond what is under way; returns the flight that brings the first byte, and what the caller
    /// may do of it while it waits.
    pub(super) fn launch(
        self: &Arc<Self>,
        gaps: &[ByteRange],
        urgency: Urgency,
    ) -> (Arc<Flight>, Option<Begun>) {
        // What lies in one part is one request, however large the parts are.
        let small = |gap: &ByteRange| gap.start() / plan::PART == (gap.end() - 1) / plan::PART;
        let part = match gaps.iter().all(small) {
            true => plan::PART,
            false => self.part_size(),
        };
        let mut state = lock(&self.state);
        let mut begun = Vec::new();
        let first = gaps[0].start();
        if state.no_ranges {
            let streams = || state.flights.iter().filter(|flight| flight.whole);
            let under_way = match streams().find(|flight| flight.brings(first)) {
                None if streams().count() >= STREAMS => streams().next(), // it ends when its readers pause
                found => found,
            };
            if let Some(stream) = under_way {
                return (Arc::clone(stream), None);
            }
            begun.push(Flight::whole(self.size, urgency, first));
        } else {
            let flying: Vec<_> = state.flights.iter().map(|flight| flight.range).collect();
            let requests = plan::requests(gaps, &flying, part).into_iter();
            begun.extend(requests.map(|range| Flight::new(range, urgency)));
        }
        state.flights.extend(begun.iter().cloned());
        let covers = |flight: &&Arc<Flight>| flight.range.contains(ByteRange::at(first, 1));
        let new = begun.iter().find(covers);
        let bringer = new
            .or_else(|| state.flights.iter().find(covers))
            .map(Arc::clone);
        drop(state);
        let bringer = bringer
            .unwrap_or_else(|| unreachable!("what is missing and not under way was begun above"));
        let mut own = None;
        for flight in begun {
            let first = Arc::ptr_eq(&flight, &bringer);
            let begun = self.fly(flight);
            if first {
                own = begun;
            }
        }
        (bringer, own)
    }
}

/// Waits as [`Flight::arrival`] does, and does the flight's work meanwhile if that was begun here: its bytes then reach the reader
/// without another thread.
async fn arrival(
    flight: &Flight,
    until: u64,
    wants: Option<ByteRange>,
    begun: &mut Option<Begun>,
) -> Option<Vec<Bytes>> {
    let mut arrival = pin!(flight.arrival(until, wants));
    let mut first = true;
    poll_fn(|cx| {
        // What is waited for is said first, so that the work knows of it.
        if std::mem::take(&mut first)
            && let Poll::Ready(came) = arrival.as_mut().poll(cx)
        {
            return Poll::Ready(came);
        }
        if let Some(work) = begun
            && Pin::new(work).poll(cx).is_ready()
        {
            *begun = None;
        }
        arrival.as_mut().poll(cx)
    })
    .await
}
