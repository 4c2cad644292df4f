//! What is known about each host that sends bytes: lanes for parts, what it usually takes, and pauses that it asked for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Client;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::lanes::Lanes;
use super::patience::Patience;
use crate::base::{Instant, lock};

/// The longest that a host is left alone on its word; then one request asks again. Limits per repository or per kind of
/// request ask for hours, and say nothing about the others.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Pieces that come sooner than this are not worth a lock.
const NOTABLE: Duration = Duration::from_millis(1);
/// Requests that fail together get new connections together.
const RENEW_AGAIN: Duration = Duration::from_secs(1);
/// Hosts that are remembered; those that nobody uses go when there are more.
const MOST: usize = 1024;

/// All hosts.
#[derive(Debug)]
pub(super) struct Hosts {
    most_lanes: usize,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
}

/// One host.
#[derive(Debug)]
pub(super) struct Host {
    /// As many permits as lanes, in order of arrival.
    permits: Arc<Semaphore>,
    state: Mutex<State>,
    /// Bytes of blobs that it has sent.
    delivered: AtomicU64,
    renewed: Mutex<Renewed>,
}

/// Clients for small requests that took the place of the common ones, whose connections to this host had died.
#[derive(Debug, Default)]
struct Renewed {
    last: Option<Instant>,
    clients: [Option<Client>; 2],
}

#[derive(Debug)]
struct State {
    lanes: Lanes,
    patience: Patience,
    /// Permits that exist.
    permits: usize,
    /// It asked to be left alone until then.
    pause: Option<Instant>,
}

/// The right to fetch a part from a host.
#[derive(Debug)]
pub struct Lane {
    host: Arc<Host>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Hosts {
    /// Never more than `most_lanes` lanes to one host.
    pub(super) fn new(most_lanes: usize) -> Self {
        Self {
            most_lanes,
            hosts: Mutex::default(),
        }
    }

    /// The host at `host[:port]`.
    pub(super) fn get(&self, address: &str) -> Arc<Host> {
        let mut hosts = lock(&self.hosts);
        if let Some(host) = hosts.get(address) {
            return Arc::clone(host);
        }
        if hosts.len() >= MOST {
            hosts.retain(|_, host| Arc::strong_count(host) > 1);
        }
        let lanes = Lanes::new(self.most_lanes);
        let permits = lanes.limit();
        let host = Arc::new(Host {
            permits: Arc::new(Semaphore::new(permits)),
            state: Mutex::new(State {
                lanes,
                patience: Patience::default(),
                permits,
                pause: None,
            }),
            delivered: AtomicU64::new(0),
            renewed: Mutex::default(),
        });
        hosts.insert(address.to_owned(), Arc::clone(&host));
        host
    }
}

impl Host {
    /// Waits for a lane.
    pub(super) async fn lane(self: Arc<Self>) -> Lane {
        let permits = Arc::clone(&self.permits);
        Lane {
            // The semaphore is never closed.
            permit: permits.acquire_owned().await.ok(),
            host: self,
        }
    }

    /// How large parts should be.
    pub(super) fn part_size(&self) -> u64 {
        lock(&self.state).lanes.part_size()
    }

    /// How long the host still wants to be left alone.
    pub(super) fn pause(&self) -> Option<Duration> {
        let until = lock(&self.state).pause?;
        let left = until.saturating_duration_since(Instant::now());
        Some(left).filter(|left| !left.is_zero())
    }

    /// The host answered 429 or 503, or took no connection.
    pub(super) fn refused(&self, retry_after: Option<Duration>) {
        let now = Instant::now();
        let mut state = lock(&self.state);
        state.lanes.refused(now);
        if let Some(asked) = retry_after {
            let until = now + asked.min(LONGEST_PAUSE);
            state.pause = Some(state.pause.map_or(until, |pause| pause.max(until)));
        }
        self.fit(&mut state);
    }

    /// It has sent `bytes` of a blob.
    pub(super) fn delivered(&self, bytes: u64) {
        self.delivered.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A body of `bytes` took so long to its first byte and from there to its last.
    pub(super) fn timed(&self, head: Duration, body: Duration, bytes: u64) {
        let mut state = lock(&self.state);
        state.lanes.timed(head, body, bytes);
        state.patience.body(body, bytes);
    }

    /// It took so long to answer.
    pub(super) fn answered(&self, took: Duration) {
        lock(&self.state).patience.head(took);
    }

    /// It took so long to the next piece of a body.
    pub(super) fn went_on(&self, took: Duration) {
        // Most pieces are there when they are asked for.
        if took >= NOTABLE {
            lock(&self.state).patience.gap(took);
        }
    }

    /// It has sent nothing for so long that its connection is given up.
    pub(super) fn stalled(&self) {
        lock(&self.state).patience.stalled();
    }

    /// How long to wait for its answer, at most `most`.
    pub(super) fn patience_for_head(&self, most: Duration) -> Duration {
        lock(&self.state).patience.for_head(most)
    }

    /// How long to wait for the next piece of a body, at most `most`.
    pub(super) fn patience_for_gap(&self, most: Duration) -> Duration {
        lock(&self.state).patience.for_gap(most)
    }

    /// From how long on a request for `bytes` bytes is slow.
    pub(super) fn slow(&self, bytes: u64) -> Duration {
        lock(&self.state).patience.slow(bytes)
    }

    /// The client of a kind for this host alone, if the common one's connections had died.
    pub(super) fn client(&self, kind: usize) -> Option<Client> {
        lock(&self.renewed).clients[kind].clone()
    }

    /// Puts a client without any connections in the place of the one of this kind.
    pub(super) fn renew(&self, kind: usize, make: impl FnOnce() -> Option<Client>) {
        let mut renewed = lock(&self.renewed);
        if renewed
            .last
            .is_none_or(|last| last.elapsed() >= RENEW_AGAIN)
            && let Some(client) = make()
        {
            renewed.last = Some(Instant::now());
            renewed.clients[kind] = Some(client);
        }
    }

    /// Makes the permits as many as the lanes; those in use are taken away when they come back.
    fn fit(&self, state: &mut State) {
        let limit = state.lanes.limit();
        if state.permits < limit {
            self.permits.add_permits(limit - state.permits);
            state.permits = limit;
        } else {
            state.permits -= self.permits.forget_permits(state.permits - limit);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let mut state = lock(&self.host.state);
        if self.host.permits.available_permits() == 0 {
            let delivered = self.host.delivered.load(Ordering::Relaxed);
            state.lanes.part(Instant::now(), delivered);
        } else {
            state.lanes.idle();
        }
        if state.permits > state.lanes.limit()
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
            state.permits -= 1;
        }
        self.host.fit(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[tokio::test]
    async fn refusals_take_lanes_away_as_they_come_back() {
        let hosts = Hosts::new(4);
        let host = hosts.get("a:1");
        let mut lanes = Vec::new();
        for _ in 0..4 {
            lanes.push(Arc::clone(&host).lane().now_or_never().unwrap());
        }
        assert!(
            Arc::clone(&host).lane().now_or_never().is_none(),
            "all are taken"
        );
        host.refused(None);
        drop(lanes.split_off(2));
        assert!(
            Arc::clone(&host).lane().now_or_never().is_none(),
            "two are left"
        );
        drop(lanes.pop());
        let again = Arc::clone(&host).lane().now_or_never();
        assert!(again.is_some());
        assert!(Arc::clone(&host).lane().now_or_never().is_none());
        assert!(
            Arc::clone(&hosts.get("b:1"))
                .lane()
                .now_or_never()
                .is_some(),
            "another host is not concerned"
        );
    }

    #[test]
    fn a_pause_is_the_longest_that_was_asked_for_within_reason() {
        let hosts = Hosts::new(4);
        let host = hosts.get("a");
        assert_eq!(host.pause(), None);
        host.refused(Some(Duration::from_secs(7)));
        host.refused(Some(Duration::from_secs(2)));
        host.refused(None);
        let pause = host.pause().unwrap();
        assert!(
            pause > Duration::from_secs(5) && pause <= Duration::from_secs(7),
            "{pause:?}"
        );
        host.refused(Some(Duration::from_secs(6 * 3600)));
        assert!(host.pause().unwrap() <= LONGEST_PAUSE);
        assert_eq!(hosts.get("b").pause(), None);
    }
}
