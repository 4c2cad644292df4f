//! [`Models`] as the tree's catalogue: nothing but names of methods and kinds of errors.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::{Catalogue, State, Tree, TreeError};
use crate::base::{Deadline, Digest};
use crate::blob::{BlobError, Blobs, Event, Notice};
use crate::model::{Model, ModelError, Models};
use crate::registry::{Reference, RegistryError, Repository, Tag};

impl Catalogue for Models {
    fn resolve<'a>(
        &'a self,
        reference: &'a Reference,
        fresh: bool,
    ) -> BoxFuture<'a, Result<Digest, TreeError>> {
        async move {
            let digest = if fresh {
                self.refresh(reference).await
            } else {
                Models::resolve(self, reference).await
            };
            digest.map_err(kind)
        }
        .boxed()
    }

    fn open<'a>(
        &'a self,
        repository: &'a Repository,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Arc<Model>, TreeError>> {
        async move {
            match Models::open(self, repository, digest).await {
                // What has no file for an engine still has a manifest, a config and blobs to look into. An error would
                // also end every `find` and every glob that comes by.
                Err(ModelError::Unusable { reference, reason }) => {
                    let model = self.inspect(repository, digest).await.map_err(kind)?;
                    if !model.files.is_empty() {
                        return Err(kind(ModelError::Unusable { reference, reason }));
                    }
                    tracing::warn!(%reference, reason, "only `.oci` is shown");
                    Ok(model)
                }
                model => model.map_err(kind),
            }
        }
        .boxed()
    }

    fn tags<'a>(
        &'a self,
        repository: &'a Repository,
        patience: Duration,
    ) -> BoxFuture<'a, Vec<Tag>> {
        Models::tags(self, repository, Deadline::after(patience)).boxed()
    }

    fn known(&self) -> Vec<Reference> {
        Models::known(self)
    }
}

impl Tree {
    /// Has the kernel drop what it keeps of blobs that turn out wrong, and take over those that are sealed, until the process
    /// ends. From the call on, and not only once the result is awaited, nothing of a blob is thrown away that the kernel is not owed to
    /// be told of. `before` is what [`Tree::restore`] will be given, if anything: what blobs are here now is compared with it.
    pub fn follow(self, blobs: &Blobs, before: Option<&State>) -> impl Future<Output = ()> + use<> {
        // Not the tree: it has the blobs, by its catalogue, and must not end here, where one of them is locked.
        let debts = Arc::downgrade(&self.0.debts);
        blobs.witness(move |blob, notice| {
            let Some(debts) = debts.upgrade() else {
                return;
            };
            match notice {
                Notice::Discards => debts.owe_blob(blob),
                Notice::Gives(file) => debts.gives(blob, Some(file)),
                Notice::Proves => debts.gives(blob, None),
            }
        });
        if let Some(before) = before {
            blobs.were_given(before.given.iter().map(|(blob, file)| (*blob, *file)));
        }
        self.hear(blobs.events())
    }

    async fn hear(self, mut events: Receiver<Event>) {
        loop {
            match events.recv().await {
                Ok(Event::Corrupt(blob) | Event::Replaced(blob)) => self.drop_content(blob),
                Ok(Event::Sealed(blob)) => self.promote(blob),
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => {
                    tracing::debug!(missed, "blobs come and go faster than the kernel is told");
                    self.drop_all_content();
                }
                Err(RecvError::Closed) => return,
            }
        }
    }
}

/// What a user of the file system should take an error of the layers below for.
fn kind(error: ModelError) -> TreeError {
    let (what, registry) = match &error {
        ModelError::Unusable { reference, .. } => {
            return TreeError::Unusable {
                what: reference.clone(),
                source: Arc::new(error),
            };
        }
        ModelError::Forbidden { reference } => {
            return TreeError::Forbidden {
                what: reference.clone(),
            };
        }
        ModelError::Timeout { reference, .. } => {
            return TreeError::Timeout {
                what: reference.clone(),
                source: Some(Arc::new(error)),
            };
        }
        ModelError::Offline { reference } => (reference.clone(), None),
        ModelError::Registry { reference, source } => (reference.clone(), Some(source)),
        ModelError::Blob {
            reference,
            source: BlobError::Deadline { .. },
        } => {
            return TreeError::Timeout {
                what: reference.clone(),
                source: Some(Arc::new(error)),
            };
        }
        ModelError::Blob {
            reference,
            source: BlobError::Fetch { source, .. },
        } => (reference.clone(), Some(source)),
        ModelError::Blob { reference, .. } => (reference.clone(), None),
    };
    match registry.map(Arc::as_ref) {
        // A manifest without its blobs is damage in the registry: the name is right, and shown in listings.
        Some(RegistryError::NotFound { .. }) if error.is_not_found() => {
            TreeError::NotFound { what }
        }
        Some(RegistryError::Denied { .. }) => TreeError::Denied {
            what,
            source: Arc::new(error),
        },
        Some(RegistryError::Deadline { .. } | RegistryError::Timeout { .. }) => {
            TreeError::Timeout {
                what,
                source: Some(Arc::new(error)),
            }
        }
        _ => TreeError::Unreachable {
            what,
            source: Arc::new(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Chain;

    #[test]
    fn each_failure_below_is_what_a_user_would_call_it() {
        let what = || "r.example/m:v1".to_owned();
        let registry = |source| ModelError::Registry {
            reference: what(),
            source: Arc::new(source),
        };
        assert!(matches!(
            kind(registry(RegistryError::NotFound { what: what() })),
            TreeError::NotFound { .. }
        ));
        let lacking = ModelError::Blob {
            reference: what(),
            source: BlobError::Fetch {
                digest: Digest::of(b""),
                range: crate::base::ByteRange::new(0, 1),
                source: Arc::new(RegistryError::NotFound { what: what() }),
            },
        };
        assert!(
            matches!(kind(lacking), TreeError::Unreachable { .. }),
            "a missing blob does not make the model's name wrong"
        );
        let unusable = ModelError::Unusable {
            reference: what(),
            reason: "an image".into(),
        };
        let unusable = kind(unusable);
        assert!(
            Chain(&unusable).to_string().contains("an image"),
            "{}",
            Chain(&unusable)
        );
        assert!(matches!(unusable, TreeError::Unusable { .. }));
    }
}
