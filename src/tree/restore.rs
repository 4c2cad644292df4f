//! Going on where another process was killed, from its journal.
//!
//! Everything that the kernel may name is there again before the first request is answered: nodes, open handles, what references
//! show. What is in the artifacts comes from the cache, in which their manifests and headers are; the registry is not asked what a
//! tag points at. Where an artifact cannot be had at once, all else goes on, it is tried again until it can, and who asks for what is
//! in it waits ([`super::absent`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _};

use super::binding::Bindings;
use super::handles::{HandleId, OpenDirectory, OpenFile};
use super::journal::{Kept, Opened, State, What};
use super::namespace::Tree;
use super::node::{Node, NodeId};
use super::shown::Shown;
use super::{DebtId, TreeError, absent, debts};
use crate::base::{Chain, Digest, lock};
use crate::registry::Repository;

/// How many artifacts are opened at a time.
const CONCURRENT: usize = 16;

/// How long nothing is served for artifacts that cannot be had at once.
const AT_FIRST: Duration = Duration::from_secs(1);

/// How long is waited before an artifact that could not be had is tried again: at first, and at most.
const AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];

/// An artifact and where it can be had.
pub(super) type Source = (Repository, Digest);

/// Those that could be had.
type Had = HashMap<Source, Arc<Shown>>;

/// Those that could not, and why, where that is known.
type Missing = HashMap<Source, Option<TreeError>>;

/// What the layer above must take over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Nodes that the kernel reads in our place, how many handles each has, and by which backing id.
    pub backings: BTreeMap<NodeId, (usize, i32)>,
    /// The highest backing id that was ever used.
    pub highest_backing: i32,
    /// Nodes that the kernel holds.
    pub nodes: usize,
    /// Artifacts that could not be had yet.
    pub missing: usize,
}

impl Tree {
    /// Takes over what another process has told the kernel. To be called once, before the first request. Needs a tokio runtime.
    pub async fn restore(&self, state: State) -> Restored {
        self.0.handles.above(state.highest_handle);
        self.0
            .debts
            .above(state.owed.keys().next_back().copied().unwrap_or(0));
        let mut restored = Restored {
            highest_backing: state.highest_backing,
            nodes: state.nodes.len(),
            ..Restored::default()
        };
        for (handle, opened) in &state.open {
            lock(&self.0.unanswered).insert(opened.unique, HandleId(*handle));
            let What::File { backing } = opened.what else {
                continue;
            };
            let node = NodeId(opened.node);
            self.0.modes.adopt(node, backing > 0);
            self.adopt_file(*handle, node, None);
            if backing > 0 {
                let entry = restored.backings.entry(node).or_insert((0, backing));
                entry.0 += 1;
            }
        }
        for (id, told) in &state.nodes {
            if let Some(node) = plain(&told.node) {
                self.0.table.adopt(NodeId(*id), node, told.count);
            }
        }
        for (reference, digest) in &state.bindings {
            self.0.resolver.promise(reference, *digest);
        }
        let sources: HashSet<Source> = state.sources().collect();
        let patience = AT_FIRST.min(self.0.config.patience);
        let (had, missing) = self.shown(sources, patience).await;
        self.adopt(&state, &had);
        self.keep_absent(&state, &missing);
        self.pay_debts(&state, &missing);
        restored.missing = missing.len();
        if !missing.is_empty() {
            tokio::spawn(self.clone().retry(state, missing));
        }
        restored
    }

    /// Opens artifacts, for as long as `patience`; those that cannot be had.
    async fn shown(
        &self,
        sources: impl IntoIterator<Item = Source>,
        patience: Duration,
    ) -> (Had, Missing) {
        let end = tokio::time::Instant::now() + patience;
        let open = |source: Source| async move {
            let (repository, digest) = &source;
            let opened = self.0.resolver.catalogue().open(repository, digest);
            let shown = match tokio::time::timeout_at(end, opened).await {
                Ok(Ok(model)) => Ok(Arc::new(Shown::new(repository.clone(), model))),
                Ok(Err(error)) => {
                    tracing::warn!(%repository, %digest, reason = %Chain(&error), "what the kernel holds of it cannot be had yet");
                    Err(Some(error))
                }
                Err(_) => {
                    tracing::warn!(%repository, %digest, "what the kernel holds of it takes long to be had");
                    Err(None)
                }
            };
            (source, shown)
        };
        let mut opened = stream::iter(sources).map(open).buffer_unordered(CONCURRENT);
        let (mut had, mut missing) = (HashMap::new(), HashMap::new());
        while let Some((source, shown)) = opened.next().await {
            match shown {
                Ok(shown) => drop(had.insert(source, shown)),
                Err(error) => drop(missing.insert(source, error)),
            }
        }
        (had, missing)
    }

    /// Adopts what is of the artifacts that could be had.
    fn adopt(&self, state: &State, had: &Had) {
        let shown = |repository: &Repository, digest: &Digest| {
            had.get(&(repository.clone(), *digest)).cloned()
        };
        for (reference, digest) in &state.bindings {
            if let Some(shown) = shown(reference.repository(), digest)
                && self.0.resolver.bindings().get(reference).is_none()
            {
                self.0.resolver.restore(reference, shown);
            }
        }
        for (id, told) in &state.nodes {
            if let Kept::File {
                repository,
                digest,
                path,
                direct,
            } = &told.node
                && let Some(shown) = shown(repository, digest)
            {
                let (path, direct) = (path.clone(), *direct);
                let node = Node::File {
                    shown,
                    path,
                    direct,
                };
                self.0.table.adopt(NodeId(*id), node, told.count);
            }
        }
        for (handle, opened) in &state.open {
            self.adopt_handle(*handle, opened);
        }
        had.values().for_each(|shown| look_at_given(state, shown));
    }

    /// Has the kernel told of what the process before this one owed. Which files a blob is in is not known of an artifact that is
    /// missing: all of its are dropped.
    fn pay_debts(&self, state: &State, missing: &Missing) {
        let files = state.files();
        let of_missing = files
            .filter(|(_, source)| missing.contains_key(source))
            .map(|(node, _)| node);
        for (debt, what) in &state.owed {
            let files = |blob: &Digest| {
                let known = self.files_of(blob).into_iter();
                known.chain(of_missing.clone()).collect()
            };
            let events = what.iter().flat_map(|stale| debts::events(stale, files));
            self.0.debts.pay(Some(DebtId(*debt)), events);
        }
    }

    /// Has those wait who ask for what is of artifacts that are missing: files, and directories that are open.
    fn keep_absent(&self, state: &State, missing: &Missing) {
        let directories = state.open.values().filter_map(|opened| {
            let told = state.nodes.get(&opened.node)?;
            let (What::Directory { names: None }, Kept::Directory { place, .. }) =
                (&opened.what, &told.node)
            else {
                return None;
            };
            let digest = state.bindings.get(&place.reference())?;
            let source = (place.repository().clone(), *digest);
            Some((NodeId(opened.node), (absent::What::Listing, source)))
        });
        let files = state.files();
        let files = files.map(|(node, source)| (node, (absent::What::File, source)));
        let nodes = files.chain(directories);
        let nodes = nodes.filter(|(_, (_, source))| missing.contains_key(source));
        let refused = missing.iter().filter_map(|(source, error)| {
            let error = error.as_ref().filter(|error| error.is_final())?;
            Some((source.clone(), error.clone()))
        });
        self.0.absent.are(nodes.collect(), refused.collect());
    }

    fn adopt_handle(&self, handle: u64, opened: &Opened) {
        let (id, at) = (HandleId(handle), NodeId(opened.node));
        let Ok(node) = self.0.table.get(at) else {
            return;
        };
        match &opened.what {
            // Closed meanwhile, while its artifact was waited for.
            What::File { .. } if !self.0.handles.is_open(id) => {}
            What::File { .. } => {
                if let Node::File { shown, path, .. } = node {
                    self.adopt_file(handle, at, Some((shown, path)));
                }
            }
            What::Directory { .. } if self.0.handles.is_open(id) => {}
            What::Directory { names } => {
                let place = match &node {
                    Node::Directory { place, .. } => Some(place.reference()),
                    _ => None,
                };
                let binding = place.and_then(|place| self.0.resolver.bindings().get(&place));
                let hold = binding.clone().map(Bindings::hold_one);
                let entries = match names {
                    Some(names) => OnceLock::from(self.named(&node, names)),
                    None if binding.is_none() => return,
                    None => OnceLock::new(),
                };
                let directory = OpenDirectory {
                    id: at,
                    node,
                    binding,
                    entries,
                    hold,
                };
                self.0.handles.adopt_directory(id, directory);
            }
        }
    }

    fn adopt_file(&self, handle: u64, node: NodeId, file: Option<(Arc<Shown>, String)>) {
        let bindings = self.0.resolver.bindings();
        let hold = match &file {
            Some((shown, _)) => bindings.hold_artifact(shown.digest(), self.0.config.tag_ttl),
            None => Bindings::hold_none(),
        };
        let file = file.and_then(|(shown, path)| OpenFile::new(shown, &path).ok());
        let handle = HandleId(handle);
        self.0.handles.adopt_file(handle, node, file, hold);
    }

    /// Tries again until everything could be had: soon while somebody waits, else less and less often.
    async fn retry(self, state: State, mut missing: Missing) {
        let [first, longest] = AGAIN;
        let mut pause = first;
        while !missing.is_empty() {
            tokio::time::sleep(first).await;
            let rest = pause.saturating_sub(first);
            pause = match tokio::time::timeout(rest, self.0.absent.wanted()).await {
                Ok(()) => first,
                Err(_) => (pause * 2).min(longest),
            };
            let had;
            (had, missing) = self
                .shown(missing.into_keys(), self.0.config.patience)
                .await;
            self.adopt(&state, &had);
            self.keep_absent(&state, &missing);
        }
    }
}

impl State {
    /// Files and the artifacts that they are of.
    fn files(&self) -> impl Iterator<Item = (NodeId, Source)> + Clone {
        self.nodes.iter().filter_map(|(id, told)| match &told.node {
            Kept::File {
                repository, digest, ..
            } => Some((NodeId(*id), (repository.clone(), *digest))),
            _ => None,
        })
    }

    /// The artifacts that files are of, and those that references show.
    fn sources(&self) -> impl Iterator<Item = Source> {
        let files = self.files().map(|(_, source)| source);
        let shown = self.bindings.iter();
        files.chain(shown.map(|(reference, digest)| (reference.repository().clone(), *digest)))
    }
}

/// Has the blobs looked at of which the kernel was given bytes that nobody knew to be right. Another process may have found them wrong and
/// thrown them away, and the one before this one was killed before it noticed: then the cache has another file by now, and opening
/// that tells of it. The kernel does not ask for what it has in memory, so a reader of that would not have us open anything.
fn look_at_given(state: &State, shown: &Shown) {
    let blobs = shown.model().blobs.iter();
    let given = blobs.filter(|blob| state.given.contains_key(&blob.digest()));
    given.for_each(|blob| drop(blob.hold()));
}

/// The node, where it takes no artifact to have it.
fn plain(kept: &Kept) -> Option<Node> {
    Some(match kept.clone() {
        Kept::Host(host) => Node::Host(host),
        Kept::Folder(folder) => Node::Folder(folder),
        Kept::Directory { place, path } => Node::Directory { place, path },
        Kept::Link {
            directory,
            name,
            target,
        } => Node::Link {
            directory,
            name,
            target,
        },
        Kept::File { .. } => return None,
    })
}
