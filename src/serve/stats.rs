//! What a server sent, counted per blob.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::base::{Digest, lock};

/// Counts of one blob or of several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// GET requests that were answered with content (200 or 206).
    pub requests: u64,
    /// Body bytes handed to the connection.
    pub bytes: u64,
}

/// A handle on a server's counts; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Stats(Arc<Mutex<HashMap<Digest, Count>>>);

impl Stats {
    /// What was sent of one blob.
    pub fn blob(&self, digest: &Digest) -> Count {
        self.with(|blobs| blobs.get(digest).copied().unwrap_or_default())
    }

    /// What was sent of all blobs; manifests are not counted.
    pub fn total(&self) -> Count {
        self.with(|blobs| {
            blobs.values().fold(Count::default(), |sum, count| Count {
                requests: sum.requests + count.requests,
                bytes: sum.bytes + count.bytes,
            })
        })
    }

    pub(super) fn request(&self, digest: Digest) {
        self.with(|blobs| blobs.entry(digest).or_default().requests += 1);
    }

    pub(super) fn sent(&self, digest: Digest, bytes: u64) {
        self.with(|blobs| blobs.entry(digest).or_default().bytes += bytes);
    }

    fn with<T>(&self, act: impl FnOnce(&mut HashMap<Digest, Count>) -> T) -> T {
        act(&mut lock(&self.0))
    }
}
