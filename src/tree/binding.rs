//! Which version of a model a reference shows, and when that may change.
//!
//! A tag is bound to a digest when it is first looked up. An engine that imports for minutes between reading the config and
//! the weights must not see two versions, so a binding stays while anything below it is open, and for `tag_ttl` after the
//! last time that anything below it was looked up.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::journal::{Journal, Record};
use super::node::Place;
use super::shown::Shown;
use crate::base::{Digest, lock};
use crate::registry::Reference;

/// More bindings than this are not kept: the one that was unused for longest is let go, and made again when needed.
const LIMIT: usize = 4096;

/// What a reference shows.
#[derive(Debug)]
pub(super) struct Binding {
    pub(super) reference: Reference,
    pub(super) shown: Arc<Shown>,
    /// Handles that are open below it.
    opens: AtomicUsize,
    made: Instant,
    /// Last use, in milliseconds after `made`.
    used: AtomicU64,
}

/// A binding, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundModel {
    /// The reference as it was looked up.
    pub reference: Reference,
    /// The digest that it shows.
    pub digest: Digest,
    /// Handles that are open below it.
    pub open: usize,
    /// For how long it was not used.
    pub idle: Duration,
}

/// Whether a tag may be asked for again. A digest may not, whatever happens.
fn may_move(pinned: bool, open: usize, idle: Duration, tag_ttl: Duration) -> bool {
    !pinned && open == 0 && idle >= tag_ttl
}

impl Binding {
    pub(super) fn new(reference: Reference, shown: Arc<Shown>) -> Arc<Self> {
        Arc::new(Self {
            reference,
            shown,
            opens: AtomicUsize::new(0),
            made: Instant::now(),
            used: AtomicU64::new(0),
        })
    }

    /// Something below it was looked up.
    pub(super) fn touch(&self) {
        let now = u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.used.fetch_max(now, Ordering::Relaxed);
    }

    fn idle(&self) -> Duration {
        self.made
            .elapsed()
            .saturating_sub(Duration::from_millis(self.used.load(Ordering::Relaxed)))
    }

    /// Whether the tag may be asked for again now.
    pub(super) fn may_move(&self, tag_ttl: Duration) -> bool {
        may_move(
            self.reference.digest().is_some(),
            self.opens.load(Ordering::Acquire),
            self.idle(),
            tag_ttl,
        )
    }

    fn summary(&self) -> BoundModel {
        BoundModel {
            reference: self.reference.clone(),
            digest: self.shown.digest(),
            open: self.opens.load(Ordering::Acquire),
            idle: self.idle(),
        }
    }
}

/// Holds the bindings of an open handle where they are.
#[derive(Debug)]
pub(super) struct Hold(Vec<Arc<Binding>>);

impl Drop for Hold {
    fn drop(&mut self) {
        for binding in &self.0 {
            binding.touch();
            binding.opens.fetch_sub(1, Ordering::Release);
        }
    }
}

/// All bindings of a tree, by reference.
#[derive(Debug)]
pub(super) struct Bindings {
    map: Mutex<HashMap<Reference, Arc<Binding>>>,
    journal: Option<Arc<Journal>>,
}

impl Bindings {
    /// None yet. Those that are made and dropped are written to `journal`.
    pub(super) fn new(journal: Option<Arc<Journal>>) -> Self {
        Self {
            map: Mutex::default(),
            journal,
        }
    }

    fn map(&self) -> MutexGuard<'_, HashMap<Reference, Arc<Binding>>> {
        lock(&self.map)
    }

    /// Under the lock, so that records of a reference are in the order of what happened to it.
    fn write(&self, record: impl FnOnce() -> Record) {
        if let Some(journal) = &self.journal {
            journal.write(&record());
        }
    }

    fn drop_from(
        &self,
        map: &mut HashMap<Reference, Arc<Binding>>,
        reference: &Reference,
    ) -> Option<Arc<Binding>> {
        let dropped = map.remove(reference)?;
        self.write(|| Record::Unbound {
            reference: reference.clone(),
        });
        Some(dropped)
    }

    /// What a reference shows.
    pub(super) fn get(&self, reference: &Reference) -> Option<Arc<Binding>> {
        self.map().get(reference).cloned()
    }

    /// Makes `binding` what its reference shows; what it showed before, and another binding that was let go for room.
    pub(super) fn set(
        &self,
        binding: &Arc<Binding>,
    ) -> (Option<Arc<Binding>>, Option<Arc<Binding>>) {
        let mut map = self.map();
        let mut dropped = None;
        if map.len() >= LIMIT && !map.contains_key(&binding.reference) {
            let idlest = map
                .values()
                .filter(|other| other.opens.load(Ordering::Acquire) == 0)
                .max_by_key(|other| other.idle());
            if let Some(reference) = idlest.map(|other| other.reference.clone()) {
                dropped = self.drop_from(&mut map, &reference);
            }
        }
        self.write(|| Record::Bound {
            reference: binding.reference.clone(),
            digest: binding.shown.digest(),
        });
        let old = map.insert(binding.reference.clone(), binding.clone());
        (old, dropped)
    }

    /// Unbinds a reference.
    pub(super) fn remove(&self, reference: &Reference) -> Option<Arc<Binding>> {
        self.drop_from(&mut self.map(), reference)
    }

    /// Every bound reference.
    pub(super) fn references(&self) -> Vec<Reference> {
        self.map().keys().cloned().collect()
    }

    /// Every place where an artifact is shown.
    pub(super) fn places(&self, digest: Digest) -> Vec<Place> {
        let map = self.map();
        let showing = map
            .values()
            .filter(|binding| binding.shown.digest() == digest);
        showing
            .flat_map(|binding| Place::all(&binding.reference))
            .collect()
    }

    /// Every binding, for people.
    pub(super) fn summary(&self) -> Vec<BoundModel> {
        let mut all: Vec<_> = self
            .map()
            .values()
            .map(|binding| binding.summary())
            .collect();
        all.sort_by(|a, b| a.reference.cmp(&b.reference));
        all
    }

    /// Holds what shows the artifact and was used within `tag_ttl`, for a handle on one of its files.
    ///
    /// A file belongs to all tags of its digest and the kernel does not say by which one it was reached. It was
    /// reached by one that was used just now; a tag that nobody looked at for `tag_ttl` stays free to move, however
    /// long an engine reads the same files under another one.
    pub(super) fn hold_artifact(&self, digest: Digest, tag_ttl: Duration) -> Hold {
        let map = self.map();
        let used = map
            .values()
            .filter(|binding| binding.shown.digest() == digest && !binding.may_move(tag_ttl));
        Self::hold(used.cloned().collect())
    }

    /// Holds nothing.
    pub(super) fn hold_none() -> Hold {
        Self::hold(Vec::new())
    }

    /// Holds one binding.
    pub(super) fn hold_one(binding: Arc<Binding>) -> Hold {
        Self::hold(vec![binding])
    }

    fn hold(bindings: Vec<Arc<Binding>>) -> Hold {
        for binding in &bindings {
            binding.opens.fetch_add(1, Ordering::AcqRel);
            binding.touch();
        }
        Hold(bindings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_moves_only_when_nobody_could_notice() {
        let ttl = Duration::from_secs(900);
        for (pinned, open, idle, expected) in [
            (false, 0, 900, true),
            (false, 0, 899, false),
            (false, 1, 10_000, false),
            (true, 0, 10_000, false),
        ] {
            assert_eq!(
                may_move(pinned, open, Duration::from_secs(idle), ttl),
                expected,
                "{pinned} {open} {idle}"
            );
        }
        assert!(
            may_move(false, 0, Duration::ZERO, Duration::ZERO),
            "a TTL of zero asks every time"
        );
    }
}
