//! What the kernel must be told to drop, and is owed until it was told.
//!
//! The kernel keeps pages, names and attributes for as long as we have said, so what makes them wrong and the kernel's hearing of it
//! must not be torn apart by a kill: the bytes that were wrong would be gone, the pages made from them would stay. The order is
//! 1. the debt is in the journal, by what it is about;
//! 2. what makes the kernel's copy wrong happens: the bytes of a blob are thrown away, a tag is bound to another digest;
//! 3. the kernel is told, by a thread of its own that owes nobody an answer ([`crate::mount`]);
//! 4. the debt is settled in the journal ([`Journal::settle`]).
//!
//! A kill before 2 has the kernel drop what was right, a kill before 4 has it drop twice; neither does harm. The process that goes on
//! pays what is left while it serves, by that same thread: what the kernel waits for meanwhile (a page that is being read, a
//! directory in which a name is being looked up) comes by an answer of that process. A journal that is resumed has the debts that were
//! left, whose numbers stay taken until they are settled.
//!
//! What another process does to a blob in a shared cache, this one finds out late, and may be killed before. So the journal also has which
//! file of the cache the kernel was given bytes of, while nobody knew them to be right. The process that goes on looks whether it is that
//! file still ([`super::restore`]); where it is another one, its pages become a debt before the journal has the new file.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::journal::{Journal, Record, Stale};
use super::node::NodeId;
use super::{DebtId, Invalidation};
use crate::base::{Digest, lock};
use crate::cache::Identity;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Debts {
    journal: Option<Arc<Journal>>,
    next: AtomicU64,
    events: Sender<Invalidation>,
    /// Of blobs whose bytes are thrown away, the oldest first: each is paid on the news that they were.
    blobs: Mutex<HashMap<Digest, VecDeque<DebtId>>>,
}

impl Debts {
    /// None yet, and where the kernel's thread hears of them.
    pub(super) fn new(journal: Option<Arc<Journal>>) -> (Self, Receiver<Invalidation>) {
        let (events, receiver) = channel();
        let debts = Self {
            journal,
            next: AtomicU64::new(1),
            events,
            blobs: Mutex::default(),
        };
        (debts, receiver)
    }

    /// Step 1.
    pub(super) fn owe(&self, what: Vec<Stale>) -> DebtId {
        let debt = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(journal) = &self.journal {
            journal.write(&Record::Owed { debt, what });
        }
        DebtId(debt)
    }

    /// Step 1 for all that is about to be wrong by these events; nothing where there are none.
    pub(super) fn owe_events(&self, events: &[Invalidation]) -> Option<DebtId> {
        let what: Vec<_> = events.iter().filter_map(stale).collect();
        (!what.is_empty()).then(|| self.owe(what))
    }

    /// Step 3, after which the kernel's thread sees to step 4.
    pub(super) fn pay(&self, debt: Option<DebtId>, events: impl IntoIterator<Item = Invalidation>) {
        events.into_iter().for_each(|event| self.send(event));
        // Without a journal nobody goes on from here.
        if let Some(debt) = debt.filter(|_| self.journal.is_some()) {
            self.send(Invalidation::Settled(debt));
        }
    }

    /// Steps 1 and 3, where what happened in between is known to the kernel alone.
    pub(super) fn tell(&self, events: Vec<Invalidation>) {
        let debt = self.owe_events(&events);
        self.pay(debt, events);
    }

    /// Step 1 for a blob whose bytes are about to be thrown away.
    pub(super) fn owe_blob(&self, blob: Digest) {
        let mut blobs = lock(&self.blobs);
        let debt = self.owe(vec![Stale::Blob(blob)]);
        blobs.entry(blob).or_default().push_back(debt);
    }

    /// The kernel is about to be given bytes of a blob from this file of the cache, which are not known to be right; `None` once all that
    /// it was given is. For the process that may have to go on from here: the file may have been thrown away by then.
    pub(super) fn gives(&self, blob: Digest, file: Option<Identity>) {
        if let Some(journal) = &self.journal {
            journal.write(&Record::Given { blob, file });
        }
    }

    /// The oldest debt about this blob, for whoever pays it now. That is one whose step 2 is done: for each there is news, in order.
    pub(super) fn next_of_blob(&self, blob: Digest) -> Option<DebtId> {
        let mut blobs = lock(&self.blobs);
        let debts = blobs.get_mut(&blob)?;
        let debt = debts.pop_front();
        if debts.is_empty() {
            blobs.remove(&blob);
        }
        debt
    }

    /// The blobs that there are debts about.
    pub(super) fn blobs(&self) -> Vec<Digest> {
        lock(&self.blobs).keys().copied().collect()
    }

    /// Has the debts of the process before this one, none of which is above this number.
    pub(super) fn above(&self, highest: u64) {
        self.next
            .fetch_max(highest.saturating_add(1), Ordering::Relaxed);
    }

    /// Whoever listened may be gone at the end of a mount: then the kernel holds nothing either.
    fn send(&self, event: Invalidation) {
        drop(self.events.send(event));
    }
}

/// What of an event a journal keeps.
fn stale(event: &Invalidation) -> Option<Stale> {
    Some(match event {
        Invalidation::Entry { parent, name } => Stale::Entry {
            parent: parent.0,
            name: name.clone(),
        },
        Invalidation::Attributes(node) => Stale::Attributes(node.0),
        Invalidation::Content(node) => Stale::Content(node.0),
        Invalidation::Settled(_) => return None,
    })
}

/// What the kernel is told of it; `files` are the nodes of a blob's files.
pub(super) fn events(
    what: &Stale,
    files: impl FnOnce(&Digest) -> Vec<NodeId>,
) -> Vec<Invalidation> {
    match what {
        Stale::Entry { parent, name } => vec![Invalidation::Entry {
            parent: NodeId(*parent),
            name: name.clone(),
        }],
        Stale::Attributes(node) => vec![Invalidation::Attributes(NodeId(*node))],
        Stale::Content(node) => vec![Invalidation::Content(NodeId(*node))],
        Stale::Blob(blob) => {
            let files = files(blob).into_iter();
            files.map(Invalidation::Content).collect()
        }
    }
}
