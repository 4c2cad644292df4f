//! Single flight: callers that ask for the same thing at the same time share one piece of work.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use crate::base::lock;
use futures_util::FutureExt;
use futures_util::future::Shared;

type Running<V> = Shared<Pin<Box<dyn Future<Output = Option<V>> + Send>>>;

/// Work that is going on, by key. The work runs on the runtime, so it goes on when those who wait for it give up.
pub(super) struct Flights<K, V> {
    running: Arc<Mutex<HashMap<K, Running<V>>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self {
            running: Arc::default(),
        }
    }
}

impl<K, V> fmt::Debug for Flights<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flights")
    }
}

/// Takes the key out when the work ends, by a panic too.
struct Landing<K: Eq + Hash, V> {
    key: Option<K>,
    running: Arc<Mutex<HashMap<K, Running<V>>>>,
}

impl<K: Eq + Hash, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            lock(&self.running).remove(&key);
        }
    }
}

impl<K, V> Flights<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the work that goes on under `key`, or starts it. `None` if it panicked or the runtime is going down.
    pub(super) async fn join<W>(&self, key: K, work: impl FnOnce() -> W) -> Option<V>
    where
        W: Future<Output = V> + Send + 'static,
    {
        let flight = {
            let mut running = lock(&self.running);
            match running.get(&key) {
                Some(flight) => flight.clone(),
                None => {
                    let landing = Landing {
                        key: Some(key.clone()),
                        running: Arc::clone(&self.running),
                    };
                    let work = work();
                    let task = tokio::spawn(async move {
                        let _landing = landing;
                        work.await
                    });
                    let flight: Running<V> = task.map(Result::ok).boxed().shared();
                    running.insert(key, flight.clone());
                    flight
                }
            }
        };
        flight.await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn the_work_is_done_once_and_outlives_who_started_it() {
        let flights = Flights::default();
        let count = Arc::new(AtomicUsize::new(0));
        let work = || {
            let count = Arc::clone(&count);
            async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                count.fetch_add(1, Ordering::Relaxed)
            }
        };
        let impatient =
            tokio::time::timeout(Duration::from_millis(50), flights.join("a", work)).await;
        assert!(impatient.is_err());
        let both =
            futures_util::future::join(flights.join("a", work), flights.join("a", work)).await;
        assert_eq!(both, (Some(0), Some(0)));
        assert_eq!(flights.join("a", work).await, Some(1));
        assert!(flights.running.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_panic_is_an_absence_and_the_next_may_try() {
        let flights = Flights::default();
        assert_eq!(
            flights
                .join(1, async || -> u8 { panic!("expected by the test") })
                .await,
            None
        );
        assert_eq!(flights.join(1, async || 7_u8).await, Some(7));
    }
}
