//! One budget of memory for everything under way: bytes being received, bytes that the cache does not take, replies.
//!
//! Only accounting: who wants memory reserves it first, and gives it back by dropping the reservation. Waiting is in order
//! of arrival, readers before what is fetched ahead, which gets no more than half. One reservation is always granted
//! when nothing else is reserved, so that no read is too large. To wait while one holds a reservation is to risk that
//! everybody does; nobody here does so but with bytes that [`super::overlay`] gives up again.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::flight::Urgency;
use crate::base::lock;
use crate::base::sync::Mutex;

/// Memory that may be in use, in bytes; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    /// Of what is used, what stays so for as long as some work takes.
    standing: u64,
    most: u64,
    readers: VecDeque<Waiter>,
    others: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    grant: oneshot::Sender<Reservation>,
}

/// Bytes of a [`Budget`] that belong to somebody until this is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    inner: Arc<Inner>,
    bytes: u64,
}

/// A [`Reservation`] that is kept for long: to the others it is as if there were so much less memory.
#[derive(Debug)]
pub(super) struct Standing(Reservation);

impl Budget {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                limit,
                state: Mutex::default(),
            }),
        }
    }

    /// Bytes in all.
    pub(super) fn limit(&self) -> u64 {
        self.inner.limit
    }

    /// Bytes that are reserved, and the most that ever were.
    pub(super) fn used(&self) -> (u64, u64) {
        let state = lock(&self.inner.state);
        (state.used, state.most)
    }

    /// Reserves `bytes` if they are to be had at once and nobody waits who comes first.
    pub(super) fn try_reserve(&self, bytes: u64, urgency: Urgency) -> Option<Reservation> {
        let mut state = lock(&self.inner.state);
        let first =
            state.readers.is_empty() && (urgency == Urgency::Demand || state.others.is_empty());
        (first && self.inner.take(&mut state, bytes, urgency))
            .then(|| self.inner.reservation(bytes))
    }

    /// Reserves `bytes`, and waits until they are to be had.
    pub(super) async fn reserve(&self, bytes: u64, urgency: Urgency) -> Reservation {
        if let Some(reservation) = self.try_reserve(bytes, urgency) {
            return reservation;
        }
        let (grant, granted) = oneshot::channel();
        {
            let mut state = lock(&self.inner.state);
            let queue = match urgency {
                Urgency::Demand => &mut state.readers,
                Urgency::Window | Urgency::Fill => &mut state.others,
            };
            queue.push_back(Waiter { bytes, grant });
        }
        // What was given back between the two looks.
        self.inner.grant();
        match granted.await {
            Ok(reservation) => reservation,
            Err(_) => unreachable!("waiters leave the queue with a grant or when they give up"),
        }
    }
}

impl Inner {
    /// Takes `bytes` if they fit.
    fn take(&self, state: &mut State, bytes: u64, urgency: Urgency) -> bool {
        let limit = self.limit.saturating_sub(state.standing);
        let limit = match urgency {
            Urgency::Demand => limit,
            Urgency::Window | Urgency::Fill => limit / 2,
        };
        let used = state.used - state.standing;
        let fits = used == 0 || used.saturating_add(bytes) <= limit;
        if fits {
            state.used += bytes;
            state.most = state.most.max(state.used);
        }
        fits
    }

    fn reservation(self: &Arc<Self>, bytes: u64) -> Reservation {
        Reservation {
            inner: Arc::clone(self),
            bytes,
        }
    }

    /// Serves those who wait, as far as there is something.
    fn grant(self: &Arc<Self>) {
        let mut granted = Vec::new();
        {
            let mut state = lock(&self.state);
            state.readers.retain(|waiter| !waiter.grant.is_closed());
            state.others.retain(|waiter| !waiter.grant.is_closed());
            while let Some(first) = state.readers.front().map(|waiter| waiter.bytes)
                && self.take(&mut state, first, Urgency::Demand)
            {
                granted.extend(state.readers.pop_front());
            }
            while state.readers.is_empty()
                && let Some(first) = state.others.front().map(|waiter| waiter.bytes)
                && self.take(&mut state, first, Urgency::Window)
            {
                granted.extend(state.others.pop_front());
            }
        }
        for waiter in granted {
            // Whoever gave up gets a reservation that is dropped at once.
            drop(waiter.grant.send(self.reservation(waiter.bytes)));
        }
    }
}

impl Reservation {
    /// Cuts `bytes` of it off as a reservation of their own.
    pub(super) fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.inner.reservation(bytes)
    }

    /// Makes two one.
    pub(super) fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Keeps it for long.
    pub(super) fn stand(self) -> Standing {
        lock(&self.inner.state).standing += self.bytes;
        Standing(self)
    }

    /// Bytes that it holds.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        lock(&self.0.inner.state).standing -= self.0.bytes;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            lock(&self.inner.state).used -= self.bytes;
            self.inner.grant();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn what_is_dropped_goes_to_readers_first_and_in_order() {
        let budget = Budget::new(100);
        let all = budget.try_reserve(100, Urgency::Demand).unwrap();
        assert!(budget.try_reserve(1, Urgency::Demand).is_none());
        let mut ahead = pin!(budget.reserve(10, Urgency::Window));
        let mut large = pin!(budget.reserve(80, Urgency::Demand));
        let mut small = pin!(budget.reserve(30, Urgency::Demand));
        assert!(ahead.as_mut().now_or_never().is_none());
        assert!(large.as_mut().now_or_never().is_none());
        assert!(small.as_mut().now_or_never().is_none());
        drop(all);
        let large = large.now_or_never().unwrap();
        assert!(small.as_mut().now_or_never().is_none(), "110 are too many");
        drop(large);
        let small = small.now_or_never().unwrap();
        let ahead = ahead.now_or_never().unwrap();
        assert_eq!(budget.used(), (40, 100));
        drop((small, ahead));
        assert_eq!(budget.used().0, 0);
    }

    #[test]
    fn what_is_fetched_ahead_leaves_half_to_readers() {
        let budget = Budget::new(100);
        let ahead = budget.try_reserve(50, Urgency::Window).unwrap();
        assert!(budget.try_reserve(1, Urgency::Fill).is_none());
        assert!(budget.try_reserve(50, Urgency::Demand).is_some());
        drop(ahead);
    }

    #[test]
    fn what_stands_leaves_the_others_their_shares_of_the_rest() {
        let budget = Budget::new(100);
        let standing = budget.try_reserve(60, Urgency::Demand).unwrap().stand();
        assert!(
            budget.try_reserve(21, Urgency::Window).is_some(),
            "it goes alone"
        );
        let ahead = budget.try_reserve(20, Urgency::Window).unwrap();
        assert!(budget.try_reserve(1, Urgency::Fill).is_none());
        let reader = budget.try_reserve(20, Urgency::Demand).unwrap();
        assert!(budget.try_reserve(1, Urgency::Demand).is_none());
        assert_eq!(budget.used(), (100, 100));
        drop((ahead, reader));
        // A read that is larger than the rest goes alone too.
        let large = budget.try_reserve(90, Urgency::Demand).unwrap();
        drop((standing, large));
        assert!(budget.try_reserve(100, Urgency::Demand).is_some());
        assert_eq!(budget.used().0, 0);
    }

    #[test]
    fn a_read_larger_than_the_budget_goes_alone() {
        let budget = Budget::new(100);
        let small = budget.try_reserve(1, Urgency::Demand).unwrap();
        let mut huge = pin!(budget.reserve(1000, Urgency::Demand));
        assert!(huge.as_mut().now_or_never().is_none());
        assert!(
            budget.try_reserve(1, Urgency::Demand).is_none(),
            "nobody overtakes it for ever"
        );
        drop(small);
        let huge = huge.now_or_never().unwrap();
        assert!(budget.try_reserve(1, Urgency::Demand).is_none());
        drop(huge);
        assert!(budget.try_reserve(1, Urgency::Demand).is_some());
    }

    #[test]
    fn who_gives_up_holds_nobody_up() {
        let budget = Budget::new(100);
        let most = budget.try_reserve(90, Urgency::Demand).unwrap();
        let mut second = pin!(budget.reserve(10, Urgency::Demand));
        {
            let mut first = pin!(budget.reserve(50, Urgency::Demand));
            assert!(first.as_mut().now_or_never().is_none());
            assert!(second.as_mut().now_or_never().is_none());
        }
        let bit = budget.inner.reservation(0);
        drop(bit);
        let mut third = pin!(budget.reserve(0, Urgency::Demand));
        assert!(third.as_mut().now_or_never().is_some());
        assert!(second.now_or_never().is_some(), "10 are free");
        drop(most);
        assert_eq!(budget.used().0, 0);
    }

    #[test]
    fn parts_of_a_reservation_are_given_back_one_by_one() {
        let budget = Budget::new(100);
        let mut all = budget.try_reserve(60, Urgency::Demand).unwrap();
        let mut some = all.split(25);
        some.join(all.split(5));
        assert_eq!((all.bytes(), some.bytes()), (30, 30));
        drop(some);
        assert_eq!(budget.used().0, 30);
        drop(all);
        assert_eq!(budget.used().0, 0);
    }
}
