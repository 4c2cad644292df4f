//! What goes on behind readers: completing the model that one of them wants, and naming in the cache what is whole.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures_util::{StreamExt as _, stream};
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;

use super::{Model, Models};
use crate::base::{Digest, lock};
use crate::blob::{Event, Prefetch};

/// Blobs of one model that are fetched or hashed: on a busy machine hashing falls behind the wire, which must not stand still for
/// it, but what is not sealed cannot be evicted either.
const UNDECIDED: usize = 8;

impl Models {
    /// Looks after models until the process ends: with [`Prefetch::Model`], once a reader wants all of a weight file, the rest
    /// of its model is completed in manifest order; and what has become whole is entered in the cache's `index.json`.
    pub async fn tend(self) {
        let mut events = self.blobs().events();
        let completing: Arc<Mutex<HashSet<Digest>>> = Arc::default();
        loop {
            match events.recv().await {
                Ok(Event::Wanted(blob)) if self.blobs().config().prefetch == Prefetch::Model => {
                    for model in self.with_blob(blob) {
                        if lock(&completing).insert(model.digest) {
                            let completing = Arc::clone(&completing);
                            tokio::spawn(async move {
                                complete(&model).await;
                                lock(&completing).remove(&model.digest);
                            });
                        }
                    }
                }
                Ok(Event::Sealed(_)) => self.publish_completed().await,
                // Too much happened at once; what was missed is found with the next event of the same model.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// The models in use that have this blob.
    fn with_blob(&self, digest: Digest) -> Vec<Arc<Model>> {
        let mut models = self.in_use();
        models.retain(|model| model.blobs.iter().any(|blob| blob.digest() == digest));
        models
    }
}

async fn complete(model: &Model) {
    let (begun, had) = (Instant::now(), cached(model));
    // Every repository that shows it; the first is the one that it was read by.
    let repository = model
        .blobs
        .first()
        .and_then(|blob| blob.repositories().into_iter().next());
    let repository = repository
        .map(|repository| repository.to_string())
        .unwrap_or_default();
    tracing::info!(repository, digest = %model.digest, bytes = model.size(), cached = had, "a model is being read; the rest of it is fetched");
    // One blob at a time asks for its parts, in the order of the manifest (the semaphore is fair): an engine reads one shard after the
    // other, and who gets half of the next one early gets the present one late.
    let turns = Semaphore::new(1);
    stream::iter(&model.blobs)
        .for_each_concurrent(UNDECIDED, |blob| {
            let turns = &turns;
            async move {
                let fetched = blob.fill(turns.acquire().await).await;
                let completed = match &fetched {
                    Ok(_hold) => blob.complete().await,
                    Err(error) => Err(error.clone()),
                };
                if let Err(error) = completed {
                    tracing::warn!(digest = %blob.digest(), %error, "cannot be completed in the background");
                }
            }
        })
        .await;
    if model.is_complete() {
        let (seconds, fetched) = (
            begun.elapsed().as_secs_f64(),
            model.size().saturating_sub(had),
        );
        let megabytes_per_second = (fetched as f64 / 1e6 / seconds.max(1e-3)).round();
        let seconds = (seconds * 10.0).round() / 10.0;
        tracing::info!(repository, digest = %model.digest, bytes = model.size(), fetched, seconds, megabytes_per_second, "a model is complete and verified");
    }
}

/// Bytes of a model that are here.
fn cached(model: &Model) -> u64 {
    model.blobs.iter().map(|blob| blob.cached()).sum()
}
