//! A catalogue that is a map in memory and counts who asks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{Catalogue, TreeError};
use crate::base::Digest;
use crate::model::{Content, File, Model};
use crate::registry::{Reference, Repository, Tag};

/// A file with this content.
pub(super) fn file(path: &str, content: &str) -> File {
    let bytes = Bytes::copy_from_slice(content.as_bytes());
    File {
        path: path.to_owned(),
        size: bytes.len() as u64,
        digest: Some(Digest::of(&bytes)),
        media_type: Some("application/octet-stream".to_owned()),
        modified: None,
        executable: false,
        content: Content::Inline(bytes),
    }
}

/// A model whose digest is that of `name`.
pub(super) fn model(name: &[u8], files: &[(&str, &str)]) -> Arc<Model> {
    let created = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let files = files
        .iter()
        .map(|(path, content)| file(path, content))
        .collect();
    Arc::new(Model::of_files(
        Digest::of(name),
        created,
        files,
        vec![file("manifest.json", "{}")],
    ))
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Fake {
    tags: Mutex<BTreeMap<String, Digest>>,
    models: Mutex<BTreeMap<(String, Digest), Arc<Model>>>,
    /// The error that every question gets.
    pub(super) broken: Mutex<Option<TreeError>>,
    /// What `known` tells.
    pub(super) known: Mutex<Vec<Reference>>,
    /// How long an answer takes.
    pub(super) delay: Mutex<Duration>,
    resolves: AtomicUsize,
    opens: AtomicUsize,
    lists: AtomicUsize,
}

impl Fake {
    /// Publishes a model under a tag, as `host/path:tag`.
    pub(super) fn push(&self, reference: &str, model: &Arc<Model>) {
        let reference: Reference = reference.parse().unwrap();
        self.models.lock().unwrap().insert(
            (reference.repository().to_string(), model.digest),
            model.clone(),
        );
        self.tags
            .lock()
            .unwrap()
            .insert(reference.to_string(), model.digest);
    }

    /// Takes a tag away.
    pub(super) fn untag(&self, reference: &str) {
        self.tags.lock().unwrap().remove(reference);
    }

    /// Tags resolved, models opened, repositories listed.
    pub(super) fn asked(&self) -> (usize, usize, usize) {
        let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
        (
            count(&self.resolves),
            count(&self.opens),
            count(&self.lists),
        )
    }

    async fn trouble(&self) -> Result<(), TreeError> {
        let delay = *self.delay.lock().unwrap();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.broken.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

impl Catalogue for Fake {
    fn resolve<'a>(
        &'a self,
        reference: &'a Reference,
        _fresh: bool,
    ) -> BoxFuture<'a, Result<Digest, TreeError>> {
        async move {
            self.resolves.fetch_add(1, Ordering::SeqCst);
            self.trouble().await?;
            let name = reference.to_string();
            self.tags
                .lock()
                .unwrap()
                .get(&name)
                .copied()
                .ok_or(TreeError::NotFound { what: name })
        }
        .boxed()
    }

    fn open<'a>(
        &'a self,
        repository: &'a Repository,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Arc<Model>, TreeError>> {
        async move {
            self.opens.fetch_add(1, Ordering::SeqCst);
            self.trouble().await?;
            let found = self
                .models
                .lock()
                .unwrap()
                .get(&(repository.to_string(), *digest))
                .cloned();
            found.ok_or_else(|| TreeError::not_found(digest.to_string()))
        }
        .boxed()
    }

    fn tags<'a>(
        &'a self,
        repository: &'a Repository,
        _patience: Duration,
    ) -> BoxFuture<'a, Vec<Tag>> {
        async move {
            self.lists.fetch_add(1, Ordering::SeqCst);
            if self.trouble().await.is_err() {
                return Vec::new();
            }
            let prefix = format!("{repository}:");
            let tags = self.tags.lock().unwrap();
            tags.keys()
                .filter_map(|name| name.strip_prefix(&prefix)?.parse().ok())
                .collect()
        }
        .boxed()
    }

    fn known(&self) -> Vec<Reference> {
        self.known.lock().unwrap().clone()
    }
}
