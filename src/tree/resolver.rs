//! From a reference to what it shows: the acting half of [`super::binding`].
//!
//! Whoever wants the same reference waits for the same answer. The asking is a task of its own: a waiter whose time
//! is up goes away with [`TreeError::Timeout`], the answer still arrives, and the next try finds it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::Semaphore;

use super::binding::{Binding, Bindings};
use super::debts::Debts;
use super::journal::Journal;
use super::names::{self, Name};
use super::node::{Folder, Node, Place};
use super::shown::Shown;
use super::table::NodeTable;
use super::ttl::TtlMap;
use super::{Catalogue, Invalidation, TreeError};
use crate::base::{Chain, Digest, lock};
use crate::registry::Reference;

/// How many references are asked for at a time, so that a crawler does not occupy every connection.
const CONCURRENT: usize = 16;

/// How many failures are remembered.
const FAILURES: usize = 10_000;

/// A reason is logged once per reference in this time.
const COMPLAINT_TTL: Duration = Duration::from_secs(60);

type Answer = Result<Arc<Binding>, TreeError>;

/// An answer under way, for everybody who waits for it.
type Flight = Shared<BoxFuture<'static, Answer>>;

/// Binds references to models. Cheap to clone; clones share everything.
#[derive(Clone)]
pub(super) struct Resolver(Arc<Inner>);

struct Inner {
    catalogue: Arc<dyn Catalogue>,
    bindings: Bindings,
    table: Arc<NodeTable>,
    debts: Arc<Debts>,
    tag_ttl: Duration,
    patience: Duration,
    permits: Semaphore,
    /// Answers under way, by reference and by whether the registry must be asked.
    flights: Mutex<HashMap<(Reference, bool), Flight>>,
    failures: Mutex<TtlMap<Reference, TreeError>>,
    complaints: Mutex<TtlMap<Reference, ()>>,
    /// What the process before this one showed and could not be had yet. It stays what is shown.
    promised: Mutex<HashMap<Reference, Digest>>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver")
            .field("bindings", &self.0.bindings)
            .finish_non_exhaustive()
    }
}

impl Resolver {
    pub(super) fn new(
        catalogue: Arc<dyn Catalogue>,
        table: Arc<NodeTable>,
        debts: Arc<Debts>,
        tag_ttl: Duration,
        failure_ttl: Duration,
        patience: Duration,
        journal: Option<Arc<Journal>>,
    ) -> Self {
        Self(Arc::new(Inner {
            catalogue,
            bindings: Bindings::new(journal),
            table,
            debts,
            tag_ttl,
            patience,
            permits: Semaphore::new(CONCURRENT),
            flights: Mutex::default(),
            failures: Mutex::new(TtlMap::new(failure_ttl, FAILURES)),
            complaints: Mutex::new(TtlMap::new(COMPLAINT_TTL, FAILURES)),
            promised: Mutex::default(),
        }))
    }

    pub(super) fn catalogue(&self) -> &dyn Catalogue {
        self.0.catalogue.as_ref()
    }

    pub(super) fn bindings(&self) -> &Bindings {
        &self.0.bindings
    }

    /// What the reference shows, when that is known and need not be asked for again; or a recent failure.
    pub(super) fn try_bind(&self, reference: &Reference) -> Option<Answer> {
        match self.0.bindings.get(reference) {
            Some(binding) if binding.may_move(self.0.tag_ttl) => None,
            Some(binding) => {
                binding.touch();
                Some(Ok(binding))
            }
            None => lock(&self.0.failures)
                .get(reference, Instant::now())
                .map(Err),
        }
    }

    /// What the reference shows; asks for it where that is not known. Needs a tokio runtime.
    pub(super) async fn bind(&self, reference: &Reference) -> Answer {
        match self.try_bind(reference) {
            Some(answer) => answer,
            None => self.wait(reference, false).await,
        }
    }

    /// Asks the registry what the reference shows now, and shows that, whatever is open.
    pub(super) async fn refresh(&self, reference: &Reference) -> Answer {
        lock(&self.0.failures).remove(reference);
        self.wait(reference, true).await
    }

    async fn wait(&self, reference: &Reference, fresh: bool) -> Answer {
        let flight = self.flight(reference, fresh);
        match tokio::time::timeout(self.0.patience, flight).await {
            Ok(answer) => answer,
            Err(_) => {
                let error = TreeError::Timeout {
                    what: reference.to_string(),
                    source: None,
                };
                self.complain(reference, &error);
                Err(error)
            }
        }
    }

    fn flight(&self, reference: &Reference, fresh: bool) -> Flight {
        let key = (reference.clone(), fresh);
        // The task takes itself out of the map under the same lock, so it cannot do so before it is in.
        let mut flights = lock(&self.0.flights);
        if let Some(flight) = flights.get(&key) {
            return flight.clone();
        }
        let (this, reference) = (self.clone(), reference.clone());
        let task = tokio::spawn(async move {
            let answer = this.settle(&reference, fresh).await;
            lock(&this.0.flights).remove(&(reference, fresh));
            answer
        });
        let (this, landing) = (self.clone(), key.clone());
        let flight = async move {
            task.await.unwrap_or_else(|failure| {
                lock(&this.0.flights).remove(&landing);
                Err(TreeError::Unreachable {
                    what: landing.0.to_string(),
                    source: Arc::new(failure),
                })
            })
        }
        .boxed()
        .shared();
        flights.insert(key, flight.clone());
        flight
    }

    /// Asks, and makes the answer what everybody sees.
    async fn settle(&self, reference: &Reference, fresh: bool) -> Answer {
        let before = self.0.bindings.get(reference);
        match self.ask(reference, fresh, before.as_ref()).await {
            Ok(shown) => Ok(self.adopt(reference, fresh, before, shown)),
            Err(error) => {
                self.complain(reference, &error);
                match before {
                    // A registry that is down, or a new version that is no good, takes nothing away.
                    Some(binding) if !fresh && !matches!(error, TreeError::NotFound { .. }) => {
                        binding.touch();
                        Ok(binding)
                    }
                    before => {
                        if matches!(error, TreeError::NotFound { .. }) && before.is_some() {
                            let stale = self.stale(reference, before.as_deref(), None);
                            let debt = self.0.debts.owe_events(&stale);
                            self.0.bindings.remove(reference);
                            self.0.debts.pay(debt, stale);
                        }
                        if error.is_final() {
                            lock(&self.0.failures).put(
                                reference.clone(),
                                error.clone(),
                                Instant::now(),
                            );
                        }
                        Err(error)
                    }
                }
            }
        }
    }

    /// The model that the reference shows now; `None` when that is what it showed before.
    async fn ask(
        &self,
        reference: &Reference,
        fresh: bool,
        before: Option<&Arc<Binding>>,
    ) -> Result<Option<Arc<Shown>>, TreeError> {
        let _permit = self
            .0
            .permits
            .acquire()
            .await
            .expect("the semaphore is never closed");
        let promised = || lock(&self.0.promised).get(reference).copied();
        let known = reference.digest().copied();
        let digest = match known.or_else(|| promised().filter(|_| !fresh)) {
            Some(digest) => digest,
            None => self.0.catalogue.resolve(reference, fresh).await?,
        };
        if before.is_some_and(|before| before.shown.digest() == digest) {
            return Ok(None);
        }
        let model = self
            .0
            .catalogue
            .open(reference.repository(), &digest)
            .await?;
        let shown = Shown::new(reference.repository().clone(), model);
        Ok(Some(Arc::new(shown)))
    }

    fn adopt(
        &self,
        reference: &Reference,
        fresh: bool,
        before: Option<Arc<Binding>>,
        shown: Option<Arc<Shown>>,
    ) -> Arc<Binding> {
        lock(&self.0.failures).remove(reference);
        let now = self.0.bindings.get(reference);
        let shown = match (shown, before, now) {
            (None, Some(before), _) => {
                before.touch();
                return before;
            }
            // Somebody else was faster, by a refresh. All must see one version, so it is that one.
            (_, before, Some(now))
                if !fresh
                    && before
                        .as_ref()
                        .is_none_or(|before| !Arc::ptr_eq(before, &now)) =>
            {
                return now;
            }
            // A handle was opened while the registry was asked: its reader must not see two versions.
            (_, Some(before), _) if !fresh && !before.may_move(self.0.tag_ttl) => return before,
            (Some(shown), ..) => shown,
            (None, None, _) => unreachable!("nothing was shown before, so something is shown now"),
        };
        lock(&self.0.promised).remove(reference);
        let binding = Binding::new(reference.clone(), shown);
        let expected = self.0.bindings.get(reference);
        let stale = self.stale(reference, expected.as_deref(), Some(&binding));
        let debt = self.0.debts.owe_events(&stale);
        let (old, dropped) = self.0.bindings.set(&binding);
        if let Some(dropped) = &dropped {
            let stale = self.stale(&dropped.reference, Some(dropped), None);
            self.0.debts.tell(stale);
        }
        if let Some(old) = &old {
            tracing::info!(%reference, from = %old.shown.digest(), to = %binding.shown.digest(), "the tag has moved");
        }
        self.0.debts.pay(debt, stale);
        // Somebody else may have bound it in between.
        if old.as_ref().map(Arc::as_ptr) != expected.as_ref().map(Arc::as_ptr) {
            let stale = self.stale(reference, old.as_deref(), Some(&binding));
            self.0.debts.tell(stale);
        }
        binding
    }

    /// Shows what the process before this one showed, which is in the journal already.
    pub(super) fn restore(&self, reference: &Reference, shown: Arc<Shown>) {
        self.0.bindings.set(&Binding::new(reference.clone(), shown));
    }

    /// The same where it cannot be had yet: whoever asks for the reference gets this digest or an error.
    pub(super) fn promise(&self, reference: &Reference, digest: Digest) {
        lock(&self.0.promised).insert(reference.clone(), digest);
    }

    /// Which of the names that the kernel holds mean something else once the reference shows `new` and not `old`.
    fn stale(
        &self,
        reference: &Reference,
        old: Option<&Binding>,
        new: Option<&Binding>,
    ) -> Vec<Invalidation> {
        let mut stale = Vec::new();
        let table = &self.0.table;
        // Where nothing was shown, the kernel holds nothing; else it may have asked for names of the new version in vain.
        let versions = || old.into_iter().chain(old.and(new));
        for place in Place::all(reference) {
            let paths: BTreeSet<_> = versions().flat_map(|one| one.shown.directories()).collect();
            for path in paths {
                let parent = table.id(&place.directory(path));
                if !table.holds(parent) {
                    continue;
                }
                let names: BTreeSet<_> = versions()
                    .flat_map(|one| one.shown.list(path))
                    .map(|(name, _)| name)
                    .collect();
                for name in names {
                    stale.push(Invalidation::Entry {
                        parent,
                        name: name.to_owned(),
                    });
                }
                stale.push(Invalidation::Content(parent));
            }
            // In a repository's own directory a directory of `:latest` takes the place of a namespace of that name.
            let (Place::Latest(repository), Some(new)) = (&place, new) else {
                continue;
            };
            let folder = Folder::from(repository);
            let parent = table.id(&Node::Folder(folder.clone()));
            for (name, _) in new.shown.list("") {
                if names::below(name) == Name::Component
                    && let Some(child) = folder.child(name)
                    && table.holds(table.id(&Node::Folder(child)))
                {
                    stale.push(Invalidation::Entry {
                        parent,
                        name: name.to_owned(),
                    });
                }
            }
        }
        stale
    }

    /// Logs a failure, once per reference and minute.
    fn complain(&self, reference: &Reference, error: &TreeError) {
        let now = Instant::now();
        let mut complaints = lock(&self.0.complaints);
        if complaints.get(reference, now).is_some() {
            return;
        }
        complaints.put(reference.clone(), (), now);
        drop(complaints);
        match error {
            TreeError::NotFound { .. } => tracing::debug!(%reference, "not found"),
            _ => tracing::warn!(%reference, reason = %Chain(&error), "cannot be shown"),
        }
    }
}
