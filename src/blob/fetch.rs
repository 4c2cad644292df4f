//! A request from its begin to its end: permit, claim, as many answers as it takes.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::join;
use tokio::sync::SemaphorePermit;

use super::BlobError;
use super::flight::{Flight, Urgency};
use super::hedge::{Answer, Feed};
use super::hold::Hold;
use super::lazy::LazyBlob;
use super::plan;
use super::sink::{Keep, Poured};
use crate::base::rt::{sleep, timeout_at};
use crate::base::sync::atomic::Ordering;
use crate::base::{Begun, ByteRange, Chain, Deadline, Instant, begin, lock, start};
use crate::cache::Claim;
use crate::registry::{BlobBody, BodyStream, Lane, RegistryError};

/// How often to look whether another process has brought what it is fetching.
const OTHERS_POLL: Duration = Duration::from_millis(10);
/// Who has a claim and brings nothing for so long may be stopped; the claim is then disregarded.
const OTHERS_PATIENCE: Duration = Duration::from_secs(20);
/// How long filling in the background waits for readers before it brings one part all the same.
const YIELD: Duration = Duration::from_secs(1);
/// The first pause after a body was cut off; doubled each time without a byte in between.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

impl LazyBlob {
    /// Runs a flight that has been entered in the blob's list. One that a reader waits for is begun, for the reader to go on with.
    pub(super) fn fly(self: &Arc<Self>, flight: Arc<Flight>) -> Option<Begun> {
        let landing = Landing {
            blob: Arc::clone(self),
            flight,
        };
        let urgency = landing.flight.urgency;
        let foreground = (urgency != Urgency::Fill).then(|| self.shared.foreground());
        let runtime = self.shared.runtime.clone();
        let work = async move {
            let _foreground = foreground;
            let hold = landing.blob.hold();
            let result = landing.blob.request(&landing.flight, &hold).await;
            if let Err(error) = &result {
                tracing::debug!(error = %Chain(error), "request failed");
            }
            landing.end(result);
        };
        match urgency {
            // A reader waits for this one, so the request leaves before another thread has woken.
            Urgency::Demand => return begin(&runtime, work),
            // It takes its place behind those that were asked for before, which threads of the runtime would begin in any order.
            Urgency::Fill => start(&runtime, work),
            Urgency::Window => {
                runtime.spawn(work);
            }
        }
        None
    }

    async fn request(self: &Arc<Self>, flight: &Flight, hold: &Hold) -> Result<(), BlobError> {
        let _permit = self.permit(flight).await;
        if flight.whole {
            return self.stream(flight, hold, None).await;
        }
        let claim = match self.claim(flight, hold).await {
            Claimed::Mine(claim) => Some(claim),
            Claimed::Others => None,
            Claimed::Done => return Ok(()),
        };
        // Two processes that write the same chunk could write different bytes, one of them after the other has hashed.
        let mut keep = Keep::new(claim);
        // Another process may have brought some of it before the claim was ours.
        let gaps = self.missing(hold, flight.range);
        for gap in gaps {
            flight.advance(gap.start());
            match self.bring(flight, hold, gap, None, &mut keep).await? {
                Brought::All => {}
                Brought::Whole(body) => return self.switch_to_stream(body, flight.range.start()),
            }
        }
        flight.advance(flight.range.end());
        Ok(())
    }

    /// How large the parts are that this blob is fetched in.
    pub(super) fn part_size(&self) -> u64 {
        let first = lock(&self.repositories).first().cloned();
        first.map_or(plan::PART, |repository| {
            self.shared.registry.part_size(&repository, &self.digest)
        })
    }

    /// Waits for a connection: demand has its own, filling gives way to readers that wait.
    async fn permit(&self, flight: &Flight) -> Permit<'_> {
        let background = async {
            let place = match flight.urgency {
                Urgency::Fill => self.place_to_fill().await,
                _ => None,
            };
            let first = lock(&self.repositories).first().cloned();
            let Some(repository) = first else {
                return Permit::None;
            };
            let mut lane = pin!(self.shared.registry.lane(&repository, &self.digest));
            // The place is left when the wait for a lane has begun.
            let at_once = poll_fn(|cx| Poll::Ready(lane.as_mut().poll(cx))).await;
            drop(place);
            Permit::Part(match at_once {
                Poll::Ready(lane) => lane,
                Poll::Pending => lane.await,
            })
        };
        let demand = async {
            flight.boosted().await;
            match self.shared.demands.acquire().await {
                Ok(permit) => Permit::Demand(permit),
                Err(_) => Permit::None,
            }
        };
        tokio::select! {
            biased;
            permit = demand => permit,
            permit = background => permit,
        }
    }

    /// Waits behind the parts that were to be filled before, and then for readers.
    async fn place_to_fill(&self) -> Option<SemaphorePermit<'_>> {
        let until = Instant::now() + YIELD;
        let place = self.shared.fills.acquire().await.ok();
        let mut foreground = self.shared.foreground.subscribe();
        let _ = timeout_at(until, foreground.wait_for(|count| *count == 0)).await;
        place
    }

    /// Gets the right to fetch the flight's range, or sees another process bring it.
    async fn claim(&self, flight: &Flight, hold: &Hold) -> Claimed {
        let Some(entry) = hold.entry() else {
            return Claimed::Mine(None);
        };
        let mut seen = 0;
        let mut moved = Deadline::after(OTHERS_PATIENCE);
        loop {
            let claim = if flight.whole {
                entry.claim_all()
            } else {
                entry.claim(flight.range)
            };
            match claim {
                Ok(Some(claim)) => return Claimed::Mine(Some(claim)),
                // Sealed meanwhile: nothing is missing. Else the cache is broken, and fetching twice is the lesser evil.
                Err(_) => return Claimed::Mine(None),
                Ok(None) => {}
            }
            sleep(OTHERS_POLL).await;
            match self.missing(hold, flight.range).first() {
                None => return Claimed::Done,
                Some(gap) => flight.advance(gap.start()),
            }
            let present = entry.present(flight.range);
            if present > seen {
                seen = present;
                moved = Deadline::after(OTHERS_PATIENCE);
            } else if moved.passed() {
                tracing::warn!(digest = %self.digest, range = %flight.range, "another process, or another request of this one, holds this range and brings nothing");
                return Claimed::Others;
            }
        }
    }

    /// Fetches `range`, through as many requests as it takes while bytes keep coming.
    async fn bring(
        &self,
        flight: &Flight,
        hold: &Hold,
        range: ByteRange,
        mut body: Option<BodyStream>,
        keep: &mut Keep,
    ) -> Result<Brought, BlobError> {
        let mut pause = FIRST_PAUSE;
        // Of what was wrong nothing comes again over a connection that may have brought it.
        let mut fresh = self.doubted.load(Ordering::Acquire);
        let mut deadline = Deadline::after(self.shared.config.read_timeout);
        let mut asked = None;
        let mut sink = if body.is_none() && flight.is_boosted() {
            // A reader waits: the server works while the cache is made ready for the answer.
            let mut feed = Feed::ask(self, flight, range, deadline, fresh);
            let sink = self.sink(flight, hold, range, keep);
            let (answer, sink) = join(self.head(&mut feed), sink).await;
            asked = Some((feed, answer));
            sink?
        } else {
            self.sink(flight, hold, range, keep).await?
        };
        while sink.position() < range.end() {
            let rest = ByteRange::new(sink.position(), range.end());
            let before = sink.position();
            let mut feed = match body.take() {
                Some(body) => Feed::of(self, flight, before, body),
                None => {
                    let (feed, answer) = match asked.take() {
                        Some(asked) => asked,
                        None => {
                            let mut feed = Feed::ask(self, flight, rest, deadline, fresh);
                            let answer = self.head(&mut feed).await;
                            (feed, answer)
                        }
                    };
                    match answer {
                        Ok(Answer::Range) => feed,
                        Ok(Answer::Whole(body)) if flight.whole => {
                            Feed::of(self, flight, before, body)
                        }
                        Ok(Answer::Whole(body)) => return Ok(Brought::Whole(body)),
                        // It has tried until the deadline, or there is no point in trying.
                        Err(error) => return Err(self.fetch_error(rest, error)),
                    }
                }
            };
            let failure = self.pour(flight, &mut feed, &mut sink).await;
            if sink.position() > before {
                pause = FIRST_PAUSE;
                deadline = Deadline::after(self.shared.config.read_timeout);
            }
            match failure {
                Ok(Poured::Idle) => {
                    tracing::debug!(digest = %self.digest, at = sink.position(), "nobody reads on; ending the stream");
                    return Ok(Brought::All);
                }
                Ok(Poured::NoRoom) => return Err(self.no_room()),
                Ok(Poured::All) | Err(_) => {}
            }
            if let Err(error) = failure {
                if !error.is_transient() || deadline.passed() {
                    return Err(self.fetch_error(rest, error));
                }
                tracing::info!(digest = %self.digest, at = sink.position(), error = %Chain(&error), "a body was cut off; asking for the rest");
                fresh = true;
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        Ok(Brought::All)
    }

    async fn head(&self, feed: &mut Feed<'_>) -> Result<Answer, RegistryError> {
        let asked = Instant::now();
        let answer = feed.head().await;
        self.shared.link.answered(asked.elapsed());
        answer
    }

    /// Asks the first repository that has the blob.
    pub(super) async fn ask(
        &self,
        range: ByteRange,
        deadline: Deadline,
        fresh: bool,
    ) -> Result<BlobBody, RegistryError> {
        let mut last = None;
        let (registry, digest, size) = (&self.shared.registry, &self.digest, self.size);
        for repository in self.repositories() {
            let answer = match fresh {
                false => {
                    registry
                        .blob(&repository, digest, size, range, deadline)
                        .await
                }
                true => {
                    registry
                        .blob_afresh(&repository, digest, size, range, deadline)
                        .await
                }
            };
            match answer {
                Ok(body) => return Ok(body),
                Err(error) => {
                    let elsewhere =
                        error.is_not_found() || matches!(error, RegistryError::Denied { .. });
                    // What the first repository says is what the user asked about.
                    let error = last.take().unwrap_or(error);
                    if !elsewhere {
                        return Err(error);
                    }
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| unreachable!("a blob is opened with a repository")))
    }

    fn fetch_error(&self, range: ByteRange, error: RegistryError) -> BlobError {
        BlobError::Fetch {
            digest: self.digest,
            range,
            source: Arc::new(error),
        }
    }

    /// The server ignores ranges: one stream now serves everybody. The readers of the flight that found out look again
    /// and join it.
    fn switch_to_stream(self: &Arc<Self>, body: BodyStream, from: u64) -> Result<(), BlobError> {
        let mut state = lock(&self.state);
        state.no_ranges = true;
        if state.flights.iter().any(|flight| flight.whole) {
            return Ok(()); // and this body is dropped, its connection with it
        }
        tracing::info!(digest = %self.digest, "the registry ignores ranges; reading the blob as one stream");
        let flight = Flight::whole(self.size, Urgency::Demand, from);
        state.flights.push(Arc::clone(&flight));
        drop(state);
        let landing = Landing {
            blob: Arc::clone(self),
            flight,
        };
        self.shared.runtime.spawn(async move {
            let hold = landing.blob.hold();
            let result = landing
                .blob
                .stream(&landing.flight, &hold, Some(body))
                .await;
            landing.end(result);
        });
        Ok(())
    }

    /// Brings the whole blob from its first byte, unless another process does.
    async fn stream(
        &self,
        flight: &Flight,
        hold: &Hold,
        body: Option<BodyStream>,
    ) -> Result<(), BlobError> {
        let claim = if self.had_no_room() {
            // Nobody else could see what only passes through memory.
            None
        } else {
            match self.claim(flight, hold).await {
                Claimed::Mine(claim) => Some(claim),
                Claimed::Others => None,
                Claimed::Done => return Ok(()),
            }
        };
        self.filling.store(true, Ordering::Release);
        let mut keep = Keep::new(claim);
        self.bring(flight, hold, flight.range, body, &mut keep)
            .await
            .map(|_| ())
    }
}

/// The right to make a request, given back when it is dropped.
#[expect(dead_code, reason = "held, never read")]
enum Permit<'a> {
    Demand(SemaphorePermit<'a>),
    Part(Lane),
    None,
}

enum Claimed {
    /// `None` where no claims are to be had.
    Mine(Option<Claim>),
    /// Somebody else holds it and brings nothing.
    Others,
    /// Another process has brought everything.
    Done,
}

enum Brought {
    All,
    /// The server sent the whole blob instead.
    Whole(BodyStream),
}

/// Takes a flight off the blob's list and wakes whoever waits for it, also when its task is cancelled or panics.
struct Landing {
    blob: Arc<LazyBlob>,
    flight: Arc<Flight>,
}

impl Landing {
    fn end(self, result: Result<(), BlobError>) {
        self.leave();
        self.flight.end(result);
        self.blob.hash_soon();
    }

    /// First off the list, so that whoever wakes up does not find it there again.
    fn leave(&self) {
        let mut state = lock(&self.blob.state);
        state
            .flights
            .retain(|flight| !Arc::ptr_eq(flight, &self.flight));
        state.overlay.end(self.flight.id);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.leave();
        self.flight.end(Err(BlobError::Deadline {
            digest: self.blob.digest,
            range: self.flight.range,
        }));
    }
}
