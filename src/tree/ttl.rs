//! A small map whose entries are forgotten after a while.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Remembers values for `ttl`, at most `limit` of them: when it is full, the oldest goes first. Time is an argument,
/// so that it is the caller's.
#[derive(Debug)]
pub(super) struct TtlMap<K, V> {
    ttl: Duration,
    limit: usize,
    entries: HashMap<K, (Instant, V)>,
}

impl<K: Hash + Eq + Clone, V: Clone> TtlMap<K, V> {
    /// An empty map; `limit` is at least one.
    pub(super) fn new(ttl: Duration, limit: usize) -> Self {
        Self {
            ttl,
            limit: limit.max(1),
            entries: HashMap::new(),
        }
    }

    /// The value, when it was put less than `ttl` ago.
    pub(super) fn get(&self, key: &K, now: Instant) -> Option<V> {
        let (since, value) = self.entries.get(key)?;
        (now.saturating_duration_since(*since) < self.ttl).then(|| value.clone())
    }

    /// Remembers a value from `now` on.
    pub(super) fn put(&mut self, key: K, value: V, now: Instant) {
        if self.entries.len() >= self.limit && !self.entries.contains_key(&key) {
            let ttl = self.ttl;
            self.entries
                .retain(|_, (since, _)| now.saturating_duration_since(*since) < ttl);
            if self.entries.len() >= self.limit
                && let Some(oldest) = self
                    .entries
                    .iter()
                    .min_by_key(|(_, (since, _))| *since)
                    .map(|(key, _)| key.clone())
            {
                self.entries.remove(&oldest);
            }
        }
        self.entries.insert(key, (now, value));
    }

    /// Forgets a key.
    pub(super) fn remove(&mut self, key: &K) {
        self.entries.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_end_with_their_time_and_the_oldest_makes_room() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut map = TtlMap::new(Duration::from_secs(5), 2);
        map.put("a", 1, at(0));
        assert_eq!(map.get(&"a", at(4)), Some(1));
        assert_eq!(map.get(&"a", at(5)), None);
        map.put("b", 2, at(1));
        map.put("c", 3, at(2));
        assert_eq!(
            (
                map.get(&"a", at(2)),
                map.get(&"b", at(2)),
                map.get(&"c", at(2))
            ),
            (None, Some(2), Some(3))
        );
        map.put("c", 4, at(3));
        assert_eq!(
            (map.get(&"b", at(3)), map.get(&"c", at(3))),
            (Some(2), Some(4))
        );
        map.remove(&"c");
        assert_eq!(map.get(&"c", at(3)), None);
        assert!(map.entries.len() <= 2);
    }
}
