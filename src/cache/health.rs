//! Whether the disk below the cache does what it should.
//!
//! Reads go on without it, so nobody would notice. What fails is said once in the log when it begins and once when it is over, and
//! for as long as it lasts `ocifs status` tells of it.

use std::io;
use std::time::{Duration, Instant};

use super::{Cache, CacheError};
use crate::base::lock as guard;
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicBool, Ordering};

/// A disk that fails now and then is as good as one that fails: it has to go well for so long.
const GOOD_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Health {
    troubled: AtomicBool,
    last: Mutex<Option<(Instant, String)>>,
}

impl Cache {
    /// What is wrong with the disk below the cache, for people; `None` as long as all is well.
    pub fn trouble(&self) -> Option<String> {
        let last = guard(&self.inner.health.last);
        last.as_ref().map(|(_, reason)| reason.clone())
    }

    /// Takes note of an error, if it is one of the disk and not of what was asked for. For whoever goes on without the cache.
    pub fn failed(&self, error: &CacheError) {
        let CacheError::Io { source, .. } = error else {
            return;
        };
        // Somebody else has kept a lock.
        if matches!(
            source.kind(),
            io::ErrorKind::TimedOut | io::ErrorKind::ResourceBusy
        ) {
            return;
        }
        self.troubled_by(format!("{error}: {source}"));
    }

    /// The disk is full, before the limit of the cache is reached.
    pub(super) fn disk_is_full(&self) {
        let dir = self.dir().display();
        self.troubled_by(format!(
            "the disk with {dir} is full before the cache has reached its limit; see --cache-size"
        ));
    }

    fn troubled_by(&self, reason: String) {
        let health = &self.inner.health;
        let mut last = guard(&health.last);
        if last.is_none() {
            tracing::warn!(reason, "the cache fails; reads go on without it");
        }
        *last = Some((Instant::now(), reason));
        health.troubled.store(true, Ordering::Release);
    }

    /// Takes note that something was written.
    pub(super) fn worked(&self) {
        let health = &self.inner.health;
        if !health.troubled.load(Ordering::Acquire) {
            return;
        }
        let mut last = guard(&health.last);
        if last
            .as_ref()
            .is_some_and(|(at, _)| at.elapsed() < GOOD_AFTER)
        {
            return;
        }
        *last = None;
        health.troubled.store(false, Ordering::Release);
        tracing::info!("the cache works again");
    }
}
