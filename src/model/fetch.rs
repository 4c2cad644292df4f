//! What building a model needs from below, and how blobs and registry provide it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::base::{ByteRange, Deadline, Digest, lock};
use crate::blob::{BlobError, Blobs, Hold, LazyBlob};
use crate::registry::{Reference, Repository};

use super::ModelError;
use super::chunked;
use super::layout::{Placed, Source};
use super::manifest::{Descriptor, Manifest, Platform};
use super::tar::{Form, Listing};
use super::unpacked::{Unpacked, UnpackedLayers};
use crate::cache::NoteKind;

/// Largest manifest that is read back from the cache; the registry client has its own bound.
pub(super) const LARGEST_MANIFEST: u64 = 16 << 20;

/// A blob by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlobId {
    /// Its digest.
    pub(super) digest: Digest,
    /// Its size in bytes.
    pub(super) size: u64,
}

/// Where the bytes of one repository come from.
pub(super) trait Fetch: Sync {
    /// What is opened, for messages.
    fn what(&self, digest: &Digest) -> String;
    /// Which image of an index is shown.
    fn platform(&self) -> Platform {
        Platform::default()
    }
    /// A manifest, checked against its digest, and the media type that the registry gave it (may be empty).
    fn manifest(
        &self,
        digest: Digest,
    ) -> impl Future<Output = Result<(Bytes, String), ModelError>> + Send;
    /// Makes a blob complete and verified; gives whether it is, which it is not where the cache has no room for it.
    fn complete(&self, blob: BlobId) -> impl Future<Output = Result<bool, ModelError>> + Send;
    /// The bytes of a range within the blob and nothing more.
    fn peek(
        &self,
        blob: BlobId,
        range: ByteRange,
    ) -> impl Future<Output = Result<Bytes, ModelError>> + Send;
    /// Makes the uncompressed form of a compressed layer whole and verified; gives its size.
    fn unpack(&self, layer: &Descriptor) -> impl Future<Output = Result<u64, ModelError>> + Send;
    /// Bytes of the uncompressed form of a layer.
    fn peek_unpacked(
        &self,
        layer: &Descriptor,
        range: ByteRange,
    ) -> impl Future<Output = Result<Bytes, ModelError>> + Send;
    /// What is known of a layer from before.
    fn recall(&self, layer: &Descriptor) -> impl Future<Output = Option<Listing>> + Send;
    /// Remembers what a verified layer holds.
    fn remember(&self, layer: &Digest, listing: &Listing) -> impl Future<Output = ()> + Send;
}

/// Bytes of a file that is laid out, wherever they are; `range` lies within it and is not empty.
pub(super) async fn peek_file<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    file: &Placed,
    range: ByteRange,
) -> Result<Bytes, ModelError> {
    let at = |offset: u64| ByteRange::at(offset.saturating_add(range.start()), range.len());
    match &file.source {
        Source::Layer { layer, offset } => fetch.peek(manifest.blob(*layer), at(*offset)).await,
        Source::Unpacked { layer, offset } => {
            fetch
                .peek_unpacked(&manifest.layers[*layer], at(*offset))
                .await
        }
        Source::Chunks { layer, chunks } => {
            let blob = manifest.blob(*layer);
            let mut content = BytesMut::new();
            for chunk in chunked::covering(chunks, range) {
                if chunk.is_zeros() {
                    chunk.give(None, range, &mut content);
                    continue;
                }
                let compressed = fetch.peek(blob, chunk.compressed()).await?;
                let piece = chunk
                    .open(&compressed)
                    .map_err(|reason| ModelError::Unusable {
                        reference: fetch.what(&blob.digest),
                        reason,
                    })?;
                chunk.give(Some(&piece), range, &mut content);
            }
            Ok(content.freeze())
        }
        Source::Made(bytes) => Ok(bytes.slice(range.start() as usize..range.end() as usize)),
        Source::Link(_) => Ok(Bytes::new()),
    }
}

/// A verified blob as a whole; the caller has looked at its size.
pub(super) async fn whole<F: Fetch>(fetch: &F, blob: BlobId) -> Result<Bytes, ModelError> {
    fetch.complete(blob).await?;
    let bytes = fetch.peek(blob, ByteRange::new(0, blob.size)).await?;
    let actual = Digest::of(&bytes);
    if actual != blob.digest {
        let source = BlobError::Corrupt {
            digest: blob.digest,
            actual,
        };
        return Err(ModelError::Blob {
            reference: fetch.what(&blob.digest),
            source,
        });
    }
    Ok(bytes)
}

/// [`Fetch`] from the cache, else the registry. Holds what it opened, so that nothing is evicted between two looks into it.
#[derive(Debug)]
pub(super) struct Remote {
    blobs: Blobs,
    repository: Repository,
    /// What a manifest may take.
    manifest_timeout: Duration,
    open: Mutex<HashMap<Digest, Hold>>,
    layers: UnpackedLayers,
    platform: Platform,
}

impl Remote {
    /// The blobs of `repository`, whose manifests may take `manifest_timeout` each.
    pub(super) fn new(
        blobs: Blobs,
        layers: UnpackedLayers,
        repository: Repository,
        manifest_timeout: Duration,
        platform: Platform,
    ) -> Self {
        Self {
            layers,
            platform,
            blobs,
            repository,
            manifest_timeout,
            open: Mutex::default(),
        }
    }

    fn lazy(&self, blob: BlobId) -> Arc<LazyBlob> {
        let open = || {
            self.blobs
                .open(blob.digest, blob.size, &self.repository)
                .hold()
        };
        Arc::clone(
            lock(&self.open)
                .entry(blob.digest)
                .or_insert_with(open)
                .blob(),
        )
    }

    fn unpacked(&self, layer: &Descriptor) -> Arc<Unpacked> {
        self.layers.open(&self.lazy(layer.blob()), layer.diff_id)
    }

    fn blob_error(&self, blob: BlobId, source: BlobError) -> ModelError {
        ModelError::Blob {
            reference: self.what(&blob.digest),
            source,
        }
    }
}

impl Fetch for Remote {
    fn what(&self, digest: &Digest) -> String {
        Reference::pinned(self.repository.clone(), *digest).to_string()
    }

    fn platform(&self) -> Platform {
        self.platform.clone()
    }

    async fn manifest(&self, digest: Digest) -> Result<(Bytes, String), ModelError> {
        let cache = self.blobs.cache().clone();
        if let Some(bytes) = on_disk(move || cache.get(&digest, LARGEST_MANIFEST))
            .await
            .flatten()
        {
            return Ok((bytes, String::new()));
        }
        if self.blobs.config().offline {
            return Err(ModelError::Offline {
                reference: self.what(&digest),
            });
        }
        let deadline = Deadline::after(self.manifest_timeout);
        let fetched = self
            .blobs
            .registry()
            .manifest(&self.repository, &digest, deadline)
            .await;
        let manifest = fetched.map_err(|error| ModelError::Registry {
            reference: self.what(&digest),
            source: Arc::new(error),
        })?;
        let (cache, bytes) = (self.blobs.cache().clone(), manifest.bytes.clone());
        on_disk(move || cache.put(&digest, &bytes)).await;
        Ok((manifest.bytes, manifest.media_type))
    }

    async fn complete(&self, blob: BlobId) -> Result<bool, ModelError> {
        // The empty config `{}` (image-spec manifest.md, "Guidance for an Empty Descriptor") is known without asking.
        const EMPTY: &[u8] = b"{}";
        if blob.digest == Digest::of(EMPTY) {
            let cache = self.blobs.cache().clone();
            on_disk(move || cache.put(&blob.digest, EMPTY)).await;
        }
        let lazy = self.lazy(blob);
        match lazy.complete().await {
            Ok(()) => Ok(true),
            Err(BlobError::NoRoom { .. }) => Ok(false),
            Err(source) => Err(self.blob_error(blob, source)),
        }
    }

    async fn peek(&self, blob: BlobId, range: ByteRange) -> Result<Bytes, ModelError> {
        let lazy = self.lazy(blob);
        let deadline = Deadline::after(self.blobs.config().read_timeout);
        lazy.peek(range, deadline)
            .await
            .map_err(|source| self.blob_error(blob, source))
    }

    async fn unpack(&self, layer: &Descriptor) -> Result<u64, ModelError> {
        // Its size alone is enough to look into it; its bytes come when they are looked at.
        let (cache, digest) = (self.blobs.cache().clone(), layer.digest);
        let known = on_disk(move || cache.unpacked_as(&digest)).await.flatten();
        if let Some((known, size)) = known
            && layer.diff_id.is_none_or(|diff_id| diff_id == known)
        {
            return Ok(size);
        }
        let unpacked = self.unpacked(layer).complete().await;
        unpacked.map_err(|source| self.blob_error(layer.blob(), source))
    }

    async fn peek_unpacked(
        &self,
        layer: &Descriptor,
        range: ByteRange,
    ) -> Result<Bytes, ModelError> {
        let read = self.unpacked(layer).read(range).await;
        read.map_err(|source| self.blob_error(layer.blob(), source))
    }

    async fn recall(&self, layer: &Descriptor) -> Option<Listing> {
        let (cache, layer, diff_id) = (self.blobs.cache().clone(), layer.digest, layer.diff_id);
        let recall = move || {
            let note = cache.note(NoteKind::Listing, &layer)?;
            let listing = Listing::from_note(&note)?;
            // What is known of a layer holds for whoever says the same of it.
            let same = |diff_id| {
                cache
                    .unpacked_as(&layer)
                    .is_some_and(|(known, _)| known == diff_id)
            };
            (listing.form != Form::Compressed || diff_id.is_none_or(same)).then_some(listing)
        };
        on_disk(recall).await.flatten()
    }

    async fn remember(&self, layer: &Digest, listing: &Listing) {
        let (cache, layer, listing) = (self.blobs.cache().clone(), *layer, listing.clone());
        on_disk(move || {
            if let Some(note) = listing.to_note() {
                cache.set_note(NoteKind::Listing, &layer, &note);
            }
        })
        .await;
    }
}

/// Runs a short piece of disk work off the async threads; `None` if it panicked or the runtime is going down.
pub(super) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}
