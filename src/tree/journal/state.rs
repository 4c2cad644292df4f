//! What the records of a journal come to: what the kernel holds, what is open, what is shown. Pure.

use std::collections::BTreeMap;

use super::record::{Kept, Record, Stale};
use crate::base::Digest;
use crate::cache::Identity;
use crate::registry::Reference;

/// A node that the kernel holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) struct Told {
    pub(in crate::tree) node: Kept,
    /// How often it was told of it; never less than the kernel has counted.
    pub(in crate::tree) count: u64,
}

/// What is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) struct Opened {
    pub(in crate::tree) node: u64,
    /// The request that opened it: one that comes again was never answered.
    pub(in crate::tree) unique: u64,
    pub(in crate::tree) what: What,
}

/// What kind of thing is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) enum What {
    /// A file, with the backing id by which the kernel reads it, or 0.
    File { backing: i32 },
    /// A directory, with the names that it lists where they do not follow from what is shown.
    Directory { names: Option<Vec<String>> },
}

/// See the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub(in crate::tree) session: Vec<u8>,
    pub(in crate::tree) nodes: BTreeMap<u64, Told>,
    pub(in crate::tree) bindings: BTreeMap<Reference, Digest>,
    pub(in crate::tree) open: BTreeMap<u64, Opened>,
    pub(in crate::tree) highest_handle: u64,
    pub(in crate::tree) highest_backing: i32,
    /// What the kernel was not told yet, in the order in which it became due.
    pub(in crate::tree) owed: BTreeMap<u64, Vec<Stale>>,
    /// Blobs that the kernel has bytes of which nobody knew to be right, and the file of the cache that they came from.
    pub(in crate::tree) given: BTreeMap<Digest, Identity>,
    pub(in crate::tree) times: u64,
    pub(in crate::tree) reason: String,
}

impl State {
    /// What [`super::Journal::session`] was given last.
    pub fn session(&self) -> &[u8] {
        &self.session
    }

    /// How often the session was taken over.
    pub fn times(&self) -> u64 {
        self.times
    }

    /// Why it was, the last time.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Counts one more process that goes on from here.
    pub fn takes_over(&mut self, reason: &str) {
        self.apply(Record::TakenOver {
            reason: reason.to_owned(),
        });
    }

    /// One thing more has happened.
    pub(super) fn apply(&mut self, record: Record) {
        match record {
            Record::Session(bytes) => self.session = bytes,
            Record::TakenOver { reason } => {
                self.times += 1;
                self.reason = reason;
            }
            Record::Times { times, reason } => {
                self.times = times;
                self.reason = reason;
            }
            Record::Told { id, count, node } => {
                let told = self.nodes.entry(id).or_insert(Told { node, count: 0 });
                told.count = told.count.saturating_add(count);
            }
            Record::Again { id } => {
                if let Some(told) = self.nodes.get_mut(&id) {
                    told.count = told.count.saturating_add(1);
                }
            }
            Record::Forgot { id, count } => {
                if let Some(told) = self.nodes.get_mut(&id) {
                    told.count = told.count.saturating_sub(count);
                    if told.count == 0 {
                        self.nodes.remove(&id);
                    }
                }
            }
            Record::Bound { reference, digest } => drop(self.bindings.insert(reference, digest)),
            Record::Unbound { reference } => drop(self.bindings.remove(&reference)),
            Record::Opened {
                handle,
                node,
                unique,
                backing,
            } => {
                self.highest_backing = self.highest_backing.max(backing);
                self.opened(handle, node, unique, What::File { backing });
            }
            Record::Listed {
                handle,
                node,
                unique,
                names,
            } => self.opened(handle, node, unique, What::Directory { names }),
            Record::Closed { handle } => drop(self.open.remove(&handle)),
            Record::Owed { debt, what } => drop(self.owed.insert(debt, what)),
            Record::Settled { debt } => drop(self.owed.remove(&debt)),
            Record::Given {
                blob,
                file: Some(file),
            } => drop(self.given.insert(blob, file)),
            Record::Given { blob, file: None } => drop(self.given.remove(&blob)),
            Record::Highest { handle, backing } => {
                self.highest_handle = self.highest_handle.max(handle);
                self.highest_backing = self.highest_backing.max(backing);
            }
        }
    }

    fn opened(&mut self, handle: u64, node: u64, unique: u64, what: What) {
        self.highest_handle = self.highest_handle.max(handle);
        let opened = Opened { node, unique, what };
        self.open.insert(handle, opened);
    }

    /// The records that come to this, each thing once.
    pub(super) fn records(&self) -> impl Iterator<Item = Record> {
        let head = [
            Record::Session(self.session.clone()),
            Record::Times {
                times: self.times,
                reason: self.reason.clone(),
            },
            Record::Highest {
                handle: self.highest_handle,
                backing: self.highest_backing,
            },
        ];
        let bindings = self
            .bindings
            .iter()
            .map(|(reference, digest)| Record::Bound {
                reference: reference.clone(),
                digest: *digest,
            });
        let nodes = self.nodes.iter().map(|(id, told)| Record::Told {
            id: *id,
            count: told.count,
            node: told.node.clone(),
        });
        let open = self.open.iter().map(|(handle, opened)| {
            let (handle, node, unique) = (*handle, opened.node, opened.unique);
            match &opened.what {
                What::File { backing } => Record::Opened {
                    handle,
                    node,
                    unique,
                    backing: *backing,
                },
                What::Directory { names } => Record::Listed {
                    handle,
                    node,
                    unique,
                    names: names.clone(),
                },
            }
        });
        let owed = self.owed.iter().map(|(debt, what)| Record::Owed {
            debt: *debt,
            what: what.clone(),
        });
        let given = self.given.iter().map(|(blob, file)| Record::Given {
            blob: *blob,
            file: Some(*file),
        });
        let rest = bindings.chain(nodes).chain(open).chain(owed).chain(given);
        head.into_iter().chain(rest)
    }
}
