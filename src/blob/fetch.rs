//! A request from its begin to its end: permit, claim, bytes into the cache.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use tokio::sync::SemaphorePermit;

use super::BlobError;
use super::budget::Reservation;
use super::flight::{Flight, Urgency};
use super::hedge::{Answer, Feed};
use super::lazy::{Hold, LazyBlob};
use super::plan;
use crate::base::rt::{aside, sleep, timeout, timeout_at};
use crate::base::sync::atomic::Ordering;
use crate::base::{Begun, ByteRange, Chain, Deadline, Instant, begin, lock, start};
use crate::cache::{CacheError, Claim, Writer};
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

/// What a stream that only passes through memory keeps there. It runs ahead of its readers by half of it.
const RING: u64 = 16 << 20;
/// What a request takes while it runs: the HTTP client's buffer and what is gathered from it.
const IN_FLIGHT: u64 = 768 << 10;
/// A cache that had no room is asked again after this.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Such a stream is given up when its readers pause for so long.
const IDLE: Duration = Duration::from_secs(5);

/// Bytes for the cache are gathered until there are so many, or a reader waits for them: each write costs a system call for
/// the data and one for the chunk map, and a slow link gives a few KiB at a time.
const GATHER: u64 = 256 << 10;
/// Bytes that have come in more pieces than these are not handed on as they are: a message to the kernel has no room for so many.
const MOST_PIECES: usize = 64;
/// Gathered bytes are written after this long: other processes may wait for them, and a kill would lose them.
const LINGER: Duration = Duration::from_millis(10);

/// Whether what a request brings may be kept, and the claim that others respect, for as long as it is.
#[derive(Debug)]
struct Keep {
    allowed: bool,
    _claim: Option<Claim>,
}

impl Keep {
    fn new(claim: Option<Option<Claim>>) -> Self {
        Self {
            allowed: claim.is_some(),
            _claim: claim.flatten(),
        }
    }

    /// Nothing more is kept, so nobody else need wait for it.
    fn give_up(&mut self) {
        *self = Self::new(None);
    }
}

/// Where the bytes of a request go.
#[derive(Debug)]
struct Sink<'a> {
    target: Target,
    keep: &'a mut Keep,
    gathered: Gathered,
    /// The memory that the request takes; given back before more is waited for.
    room: Option<Reservation>,
    end: u64,
}

#[derive(Debug)]
enum Target {
    Cache(Writer),
    Memory { at: u64 },
}

/// Bytes that have come and are not written yet.
#[derive(Debug, Default)]
struct Gathered {
    pieces: Vec<Bytes>,
    len: u64,
    since: Option<Instant>,
}

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
            Urgency::Window => drop(runtime.spawn(work)),
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

    /// Moves what comes into the sink, whose position tells how far it came.
    async fn pour(
        &self,
        flight: &Flight,
        feed: &mut Feed<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<Poured, RegistryError> {
        loop {
            if flight.whole && matches!(sink.target, Target::Memory { .. }) {
                flight.pass();
                if !self.write(flight, sink).await {
                    return Ok(Poured::NoRoom);
                }
                let wanted = flight.wanted(sink.position(), self.ring() / 2);
                if timeout(IDLE, wanted).await.is_err() {
                    return Ok(Poured::Idle);
                }
            }
            let next = match sink.gathered.since {
                None => feed.next().await,
                Some(since) => {
                    let until = since + LINGER;
                    match timeout_at(until, feed.next()).await {
                        Ok(next) => next,
                        Err(_) if self.write(flight, sink).await => continue,
                        Err(_) => return Ok(Poured::NoRoom),
                    }
                }
            };
            let bytes = match next {
                Ok(Some(bytes)) => bytes,
                end if self.write(flight, sink).await => return end.map(|_| Poured::All),
                _ => return Ok(Poured::NoRoom),
            };
            sink.gathered.push(bytes);
            let awaited = flight.is_awaited(sink.position());
            if awaited && sink.hand(flight) {
                // Whoever got them passes them on before this goes on.
                yield_now().await;
            }
            let due = awaited || sink.gathered.len >= GATHER;
            if due && !self.write(flight, sink).await {
                return Ok(Poured::NoRoom);
            }
        }
    }

    /// Writes what was gathered to the cache, whole chunks of it, or hands it to memory; so, too, once the cache fails.
    /// `false` when there is no memory for it either.
    async fn write(&self, flight: &Flight, sink: &mut Sink<'_>) -> bool {
        if let Target::Cache(writer) = &mut sink.target {
            let start = writer.position();
            let pieces = sink
                .gathered
                .take(writer.whole(start + sink.gathered.len) - start);
            if pieces.is_empty() {
                return true;
            }
            let len = pieces.iter().map(|piece| piece.len() as u64).sum();
            let Err(error) = beside(len, || writer.push_pieces(&pieces)) else {
                flight.advance(writer.whole(writer.position()));
                return true;
            };
            tracing::debug!(digest = %self.digest, error = %Chain(&error), "the cache takes no more; reading on without it");
            if matches!(error, CacheError::Io { .. }) {
                let entry = Arc::clone(writer.entry());
                self.distrust(&entry, &error);
            }
            sink.gathered.put_back(pieces);
            // The part of a chunk that was written before is not marked, so its readers ask for it again.
            sink.target = Target::Memory { at: start };
            sink.keep.give_up();
            sink.room = None;
            let rest = ByteRange::new(start, sink.end);
            let Some(room) = self.memory(flight, rest).await else {
                return false;
            };
            sink.room = Some(room);
        }
        let Target::Memory { at } = &mut sink.target else {
            return true;
        };
        if sink.gathered.len > 0 {
            let bytes = sink.gathered.concat();
            let start = *at;
            *at += bytes.len() as u64;
            self.remember(flight, start, bytes);
            flight.advance(*at);
        }
        true
    }

    /// Keeps bytes in memory, those that readers of a passing stream have asked for.
    fn remember(&self, flight: &Flight, start: u64, mut bytes: Bytes) {
        if flight.whole && start < flight.from {
            let before = usize::try_from(flight.from - start).unwrap_or(usize::MAX);
            bytes = bytes.split_off(before.min(bytes.len()));
        }
        let start = start.max(flight.from);
        if !bytes.is_empty() {
            lock(&self.state).overlay.push(flight.id, start, bytes);
        }
    }

    /// Bytes that a passing stream keeps in memory.
    fn ring(&self) -> u64 {
        RING.min(self.shared.budget.limit() / 4)
    }

    /// Gets memory for the bytes of `range`, which is the overlay's from then on, and for bringing them.
    async fn memory(&self, flight: &Flight, range: ByteRange) -> Option<Reservation> {
        let kept = if flight.whole {
            self.ring()
        } else {
            range.len()
        };
        let bytes = kept + IN_FLIGHT.min(range.len());
        let mut room = if flight.is_boosted() {
            self.shared.room(bytes, Urgency::Demand).await
        } else {
            // Nobody waits for it yet; where memory is scarce it had better be asked for in small pieces.
            self.shared.try_room(bytes, flight.urgency)?
        };
        let kept = room.split(kept);
        lock(&self.state)
            .overlay
            .begin(flight.id, kept, flight.whole);
        Some(room)
    }

    async fn sink<'a>(
        &self,
        flight: &Flight,
        hold: &Hold,
        range: ByteRange,
        keep: &'a mut Keep,
    ) -> Result<Sink<'a>, BlobError> {
        let allowed = keep.allowed;
        let sink = |target, room, keep| Sink {
            target,
            keep,
            gathered: Gathered::default(),
            room: Some(room),
            end: range.end(),
        };
        let entry = hold.entry().filter(|_| allowed && !self.had_no_room());
        if let Some(entry) = entry {
            let bytes = IN_FLIGHT.min(range.len());
            let room = self.room_for(flight, bytes).await;
            match beside(range.len(), || entry.writer(range)) {
                Ok(writer) => return Ok(sink(Target::Cache(writer), room, keep)),
                Err(error) => {
                    tracing::debug!(digest = %self.digest, %range, error = %Chain(&error), "not kept");
                    let mut state = lock(&self.state);
                    if state.no_room.is_none_or(|at| at.elapsed() >= LONGEST_PAUSE) {
                        tracing::info!(digest = %self.digest, error = %Chain(&error), "served without being kept");
                    }
                    state.no_room = Some(Instant::now());
                }
            }
        }
        keep.give_up();
        // What fills the cache is of no use in memory.
        if flight.urgency == Urgency::Fill {
            return Err(self.no_room());
        }
        match self.memory(flight, range).await {
            Some(room) => {
                let at = range.start();
                Ok(sink(Target::Memory { at }, room, keep))
            }
            None => {
                lock(&self.state).prefetcher.cut(range.start());
                Err(self.no_room())
            }
        }
    }

    /// Memory to bring bytes: in the queue of readers from when one of them waits.
    async fn room_for(&self, flight: &Flight, bytes: u64) -> Reservation {
        tokio::select! {
            biased;
            room = self.shared.room(bytes, flight.urgency_now()) => room,
            // Not until then: what a reader waits for would stay in the queue of what is fetched ahead, which may get nothing for long.
            () = flight.boosted(), if !flight.is_boosted() => {
                self.shared.room(bytes, Urgency::Demand).await
            }
        }
    }

    /// Whether the cache had no room for the blob just now.
    fn had_no_room(&self) -> bool {
        let last = lock(&self.state).no_room;
        last.is_some_and(|at| at.elapsed() < ASK_AGAIN_AFTER)
    }

    fn no_room(&self) -> BlobError {
        BlobError::NoRoom {
            digest: self.digest,
            size: self.size,
        }
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

/// Does what may wait for the disk on behalf of `bytes` bytes. For many, the runtime's other tasks move to another thread meanwhile;
/// for few, that would cost more than it saves.
fn beside<T>(bytes: u64, work: impl FnOnce() -> T) -> T {
    if bytes < GATHER { work() } else { aside(work) }
}

/// The right to make a request, given back when it is dropped.
#[expect(dead_code, reason = "held, never read")]
enum Permit<'a> {
    Demand(SemaphorePermit<'a>),
    Part(Lane),
    None,
}

/// Lets whoever was woken go first.
async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

enum Claimed {
    /// `None` where no claims are to be had.
    Mine(Option<Claim>),
    /// Somebody else holds it and brings nothing.
    Others,
    /// Another process has brought everything.
    Done,
}

enum Poured {
    /// The body to its end.
    All,
    /// Nobody wanted more of it.
    Idle,
    /// The cache failed, and there is no memory.
    NoRoom,
}

enum Brought {
    All,
    /// The server sent the whole blob instead.
    Whole(BodyStream),
}

impl Sink<'_> {
    /// Gives what has come and is to be written to those who want nothing else; whether there was one.
    fn hand(&self, flight: &Flight) -> bool {
        match &self.target {
            Target::Cache(writer) if self.gathered.pieces.len() <= MOST_PIECES => {
                flight.hand(writer.position(), &self.gathered.pieces)
            }
            _ => false,
        }
    }

    /// The offset of the next byte to come.
    fn position(&self) -> u64 {
        let at = match &self.target {
            Target::Cache(writer) => writer.position(),
            Target::Memory { at } => *at,
        };
        at + self.gathered.len
    }
}

impl Gathered {
    fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.since.get_or_insert_with(Instant::now);
            self.len += bytes.len() as u64;
            self.pieces.push(bytes);
        }
    }

    /// Puts what was taken before the rest again.
    fn put_back(&mut self, mut taken: Vec<Bytes>) {
        self.len += taken.iter().map(|piece| piece.len() as u64).sum::<u64>();
        taken.append(&mut self.pieces);
        self.pieces = taken;
    }

    /// All of it in memory of its own: a small piece of the client's buffer would keep all of that.
    fn concat(&mut self) -> Bytes {
        let all = std::mem::take(self);
        all.pieces.concat().into()
    }

    /// The first `len` bytes of it. What is left begins to linger anew when the next piece comes.
    fn take(&mut self, len: u64) -> Vec<Bytes> {
        let mut taken = Vec::with_capacity(self.pieces.len());
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let mut rest = Vec::new();
        for mut piece in self.pieces.drain(..) {
            let first = piece.split_to(left.min(piece.len()));
            left -= first.len();
            self.len -= first.len() as u64;
            for (part, list) in [(first, &mut taken), (piece, &mut rest)] {
                if !part.is_empty() {
                    list.push(part);
                }
            }
        }
        self.pieces = rest;
        self.since = None;
        taken
    }
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
