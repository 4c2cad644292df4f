//! Kits whose model is that of another artifact: the files of that one's model stand beside the kit's own. Pure.
//!
//! What a tag said when a kit was first opened here stays what it says for that kit: the kit's own digest stands for all that is shown
//! below it, and what it stands for never changes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::layout::{MOST_FILES, ancestors};
use super::manifest::{Descriptor, Manifest};
use super::notes::quote;
use super::plan::{Plan, PlannedFile};
use crate::base::Digest;
use crate::registry::{Reference, Repository};

/// The longest chain of kits (kitops `pkg/lib/constants/consts.go`).
const LONGEST_CHAIN: usize = 10;

/// An artifact whose model another one shows as its own.
#[derive(Clone, Debug)]
pub(super) struct Base {
    /// Where its blobs are.
    pub(super) repository: Repository,
    /// Its manifest, with the layers of the model alone.
    pub(super) manifest: Box<Manifest>,
}

/// What is remembered of a kit: which artifact it was whose model it names.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pin {
    /// As the kit names it.
    pub(super) reference: String,
    /// What that was.
    pub(super) digest: Digest,
}

impl Plan {
    /// The layer of this number: its own come first, then those of its bases.
    pub(super) fn layer(&self, layer: usize) -> &Descriptor {
        let bases = self.bases.iter().map(|base| &base.manifest.layers);
        let mut at = layer;
        for layers in [&self.manifest.layers].into_iter().chain(bases) {
            match layers.get(at) {
                Some(found) => return found,
                None => at -= layers.len(),
            }
        }
        unreachable!("files are of layers that there are")
    }

    fn layers(&self) -> usize {
        let bases = self.bases.iter().map(|base| base.manifest.layers.len());
        self.manifest.layers.len() + bases.sum::<usize>()
    }

    /// Why an artifact named by `reference` cannot be the next base of a kit of this repository.
    pub(super) fn refuses(&self, repository: &Repository, reference: &Reference) -> Option<String> {
        if self.bases.len() >= LONGEST_CHAIN {
            return Some(format!(
                "its model is behind more than {LONGEST_CHAIN} further kits"
            ));
        }
        // A kit from elsewhere must not make this machine ask its own ports.
        if reference.repository().is_loopback() && !repository.is_loopback() {
            return Some(format!(
                "its model is that of {reference}, on the packager's own machine"
            ));
        }
        None
    }

    /// Takes in the files of another artifact's model, where its own leave room, and goes on to the one that it names itself.
    pub(super) fn take_in(&mut self, reference: &Reference, base: Plan) {
        let first = self.layers();
        self.notes.push(format!(
            "its model is that of {reference}, which is {}",
            base.digest
        ));
        let prefixed = |text: &String| format!("{reference}: {text}");
        self.notes.extend(base.notes.iter().map(prefixed));
        if self.problem.is_none() {
            self.problem = base.problem.as_ref().map(prefixed);
        }
        let own = std::mem::take(&mut self.files);
        let mut files: BTreeMap<String, PlannedFile> = own
            .into_iter()
            .map(|file| (file.path.clone(), file))
            .collect();
        for mut file in base.files {
            if is_taken(&files, &file.path) {
                self.notes.push(format!(
                    "left out {} of {reference}: its place is taken",
                    quote(&file.path)
                ));
                continue;
            }
            file.source.shift(first);
            files.insert(file.path.clone(), file);
        }
        self.empty.extend(base.empty);
        self.empty.sort_unstable();
        self.empty.dedup();
        self.empty.retain(|directory| !is_taken(&files, directory));
        self.files = files.into_values().collect();
        if self.files.len() > MOST_FILES {
            self.problem = Some(format!(
                "it has more than {MOST_FILES} files with its bases"
            ));
        }
        self.bases.push(Base {
            repository: reference.repository().clone(),
            manifest: base.manifest,
        });
        self.names = base.names;
    }
}

/// Whether there is a file at a path, above it or below it.
fn is_taken(files: &BTreeMap<String, PlannedFile>, path: &str) -> bool {
    let below = format!("{path}/");
    let next = files.range(below.clone()..).next();
    files.contains_key(path)
        || ancestors(path).any(|above| files.contains_key(above))
        || next.is_some_and(|(next, _)| next.starts_with(&below))
}
