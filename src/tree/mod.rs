//! The tree: which names there are, and what each of them is. No network code, no FUSE type.
//!
//! ```text
//! lookup(parent, name)
//!   names      what can this name be?            pure; most names end here, without network
//!   binding    which version does this tag show? one answer for everybody, held while in use
//!   shown      a model's files as directories    built once per binding
//!   table      node ids                          derived from the path, so that they survive a restart
//! open(node)
//!   modes      through us or past us?            the first open of a node decides
//! opendir(node)
//!   listing    what is known, and what is shown  never asks for a manifest
//! restore(state)
//!   journal    what the kernel was told          so that another process can go on
//!   absent     what of it cannot be had yet    who asks for that waits
//!   debts      what it must be told to drop      noted before it is due, until it was told
//! ```
//!
//! Registries are reached through [`Catalogue`] alone, so everything here is tested with one that is a map in memory.
//! Whatever can be answered at once has a `try_…` method that never waits; its async twin asks the registry.

mod absent;
mod attr;
mod binding;
mod catalogue;
mod config;
mod debts;
mod error;
mod file_like;
mod files;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod handles;
mod journal;
mod list;
mod listing;
mod models;
mod modes;
mod names;
mod namespace;
mod node;
mod resolver;
mod restore;
mod shown;
mod table;
mod ttl;
mod view;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod namespace_tests;
#[cfg(test)]
mod oracle_tests;
#[cfg(test)]
mod restore_tests;

pub use crate::cache::{Data, Mapped};
pub use attr::{Attr, Kind, Space};
pub use binding::BoundModel;
pub use catalogue::Catalogue;
pub use config::TreeConfig;
pub use error::TreeError;
pub use handles::{HandleId, OpenFile};
pub use journal::{FORMAT as JOURNAL_FORMAT, Journal, State};
pub use namespace::Tree;
pub use node::NodeId;
pub use restore::Restored;
pub use view::{DebtId, DirEntry, Entry, Invalidation, Opened, Way};
