//! Where the tree asks about models: the only way from here to a registry.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::TreeError;
use crate::base::Digest;
use crate::model::Model;
use crate::registry::{Reference, Repository, Tag};

/// What the tree needs to know about models. [`crate::model::Models`] is one.
///
/// Every method ends by a deadline of its own, in seconds: the kernel cannot interrupt who waits for it.
pub trait Catalogue: Send + Sync + 'static {
    /// The digest that a tagged reference shows now. With `fresh` the registry is asked whatever is remembered.
    fn resolve<'a>(
        &'a self,
        reference: &'a Reference,
        fresh: bool,
    ) -> BoxFuture<'a, Result<Digest, TreeError>>;

    /// The model with this manifest digest.
    fn open<'a>(
        &'a self,
        repository: &'a Repository,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Arc<Model>, TreeError>>;

    /// The repository's tags by `patience` from now, as far as they can be had.
    fn tags<'a>(
        &'a self,
        repository: &'a Repository,
        patience: Duration,
    ) -> BoxFuture<'a, Vec<Tag>>;

    /// Every reference that was ever resolved, as far as it is remembered; asks nobody.
    fn known(&self) -> Vec<Reference>;
}
