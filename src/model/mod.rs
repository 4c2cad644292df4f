//! Models: reference → manifest → files.
//!
//! The way of an artifact through this layer:
//!
//! ```text
//! reference ─ answers ─▶ digest ─ fetch ─▶ manifest ─ convention ─▶ steps ─ layout ─▶ paths ─▶ Model
//!                                             tar layers ─ tar, toc ─────────┤
//!                                             nameless shards ─ safetensors, shards, index
//! ```
//!
//! A file's bytes are a range of a lazy blob; of a layer that is compressed as a whole, a range of what it is decompressed to
//! (`unpacked`, once, into the cache; where that has no room, `passing`); of one that is compressed piece by piece, such pieces (`chunked`).
//!
//! What decides is pure and tested by itself: `manifest`, `convention`, `names`, `tar`, `toc`, `safetensors`, `shards`, `index`,
//! `layout`, `overlay`, `links`, `bases`, `answers`. What acts is in `plan` and `weights` (in which order to read what, over the small trait of
//! `fetch`) and in `models` (sharing, deadlines, what is remembered; `assemble` opens the blobs). No byte of a weight is read to build a model, beyond the headers of
//! safetensors layers that have no name or no index.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::base::{ByteRange, Deadline, Digest};
use crate::blob::{BlobError, Hold, LazyBlob, Verified};
use crate::cache::{self, Data};
use crate::registry::RegistryError;

mod access;
mod answers;
mod assemble;
mod background;
mod bases;
mod bounded;
mod chunked;
mod contents;
mod convention;
mod created;
mod decompress;
mod fetch;
mod flight;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod inflate;
mod layout;
mod links;
mod manifest;
mod models;
mod names;
mod notes;
mod overlay;
mod passing;
mod plan;
mod plans;
mod safetensors;
mod shards;
mod stamp;
mod tar;
mod toc;
mod unpacked;
mod weights;

pub use access::{Access, Pattern};
pub use chunked::ChunkedFile;
pub use manifest::{Descriptor, Manifest, Platform};
pub use models::Models;
pub use safetensors::{Header, Malformed, Tensor};
pub use unpacked::{Unpacked, UnpackedHold};

/// How references are resolved.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// How long what a tag points at is believed without asking again.
    pub tag_ttl: Duration,
    /// The time that a lookup, an open or a listing may take in all.
    pub metadata_timeout: Duration,
    /// Which image of an index is shown.
    pub platform: Platform,
    /// Which repositories may be read.
    pub access: Access,
}

/// What can go wrong between a reference and its files. Cheap to clone: every waiter gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ModelError {
    /// The registry could not deliver the manifest or config.
    #[error("{reference}")]
    Registry {
        /// What was opened.
        reference: String,
        /// The cause.
        #[source]
        source: Arc<RegistryError>,
    },
    /// A blob could not be read.
    #[error("{reference}")]
    Blob {
        /// What was opened.
        reference: String,
        /// The cause.
        #[source]
        source: BlobError,
    },
    /// The artifact is not one that can be shown as a directory.
    #[error("{reference}: {reason}")]
    Unusable {
        /// What was opened.
        reference: String,
        /// Why.
        reason: String,
    },
    /// It is not in the cache and `--offline` forbids to ask for it.
    #[error(
        "{reference} is not in the cache, and ocifs is offline; run `ocifs pull` while the registry can be reached"
    )]
    Offline {
        /// What was opened.
        reference: String,
    },
    /// A rule of ours forbids to read it.
    #[error("{reference}: the settings `allow` and `deny` keep it from being read here")]
    Forbidden {
        /// What was opened.
        reference: String,
    },
    /// It is still being fetched.
    #[error("{reference}: no answer within {timeout:?}; its fetch goes on, try again")]
    Timeout {
        /// What was opened.
        reference: String,
        /// How long was waited.
        timeout: Duration,
    },
}

impl ModelError {
    /// Whether the registry said that there is no such repository, tag or manifest.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Registry { source, .. } if source.is_not_found())
    }

    /// Whether it may go better the next time with nothing changed where the artifact is.
    fn may_pass(&self) -> bool {
        match self {
            Self::Registry { source, .. } => source.is_transient(),
            Self::Unusable { .. } | Self::Forbidden { .. } => false,
            Self::Blob { .. } | Self::Offline { .. } | Self::Timeout { .. } => true,
        }
    }

    /// Whether the registry has the manifest but not a blob that it names: damage there, not a wrong name here.
    pub fn lacks_blob(&self) -> bool {
        matches!(self, Self::Blob { source: BlobError::Fetch { source, .. }, .. } if source.is_not_found())
    }
}

/// One artifact as a directory: immutable once made.
///
/// It refers to its blobs without holding them in the cache: [`File::hold`] does, while somebody reads.
#[derive(Debug)]
pub struct Model {
    /// The digest that it was opened by: the manifest's, or that of an index that lists the manifest.
    pub digest: Digest,
    /// The manifest's own digest.
    pub manifest_digest: Digest,
    /// The manifest's size in bytes.
    pub manifest_size: u64,
    /// What the manifest says.
    pub manifest: Manifest,
    /// The packaging convention, for people: `Docker model v0.1`, `ModelPack`, ….
    pub packaging: &'static str,
    /// Creation time as the artifact tells it, else the epoch.
    pub created: SystemTime,
    /// Files by path (sorted, unique, no path is a prefix directory of another): what an engine sees.
    pub files: Vec<File>,
    /// Symbolic links among the files, sorted by path; none has a file's path or lies below one.
    pub links: Vec<Link>,
    /// Directories with nothing in them, which the packager meant to be there.
    pub empty_directories: Vec<String>,
    /// What `.oci/` shows: `manifest.json`, `config.json`, `blobs/<digest>`; paths relative to `.oci/`. Beside these
    /// `index.json`, when an index lists the manifest.
    pub oci: Vec<File>,
    /// The config and the layers in manifest order, each blob once.
    pub blobs: Vec<Arc<LazyBlob>>,
    /// What was not understood, for `inspect` and the log.
    pub notes: Vec<String>,
    /// Why the artifact is of no use as a directory; [`Models::open`] then fails and [`Models::inspect`] does not.
    pub problem: Option<String>,
}

impl Model {
    /// A directory of these files, which no registry has: for catalogues of another kind.
    pub fn of_files(digest: Digest, created: SystemTime, files: Vec<File>, oci: Vec<File>) -> Self {
        let config = Descriptor {
            media_type: String::new(),
            digest,
            size: 0,
            annotations: BTreeMap::new(),
            artifact_type: None,
            platform: None,
            name: None,
            diff_id: None,
        };
        let manifest = Manifest {
            media_type: String::new(),
            artifact_type: None,
            config,
            layers: Vec::new(),
            annotations: BTreeMap::new(),
        };
        Self {
            digest,
            manifest_digest: digest,
            manifest_size: 0,
            manifest,
            packaging: "files",
            created,
            files,
            links: Vec::new(),
            empty_directories: Vec::new(),
            oci,
            blobs: Vec::new(),
            notes: Vec::new(),
            problem: None,
        }
    }

    /// Whether all blobs are complete and have their digests.
    pub fn is_complete(&self) -> bool {
        self.blobs
            .iter()
            .all(|blob| blob.verified() == Verified::Yes)
    }

    /// The bytes of all blobs, each counted once.
    pub fn size(&self) -> u64 {
        self.blobs
            .iter()
            .fold(0, |sum, blob| sum.saturating_add(blob.size()))
    }

    /// The file with this path.
    pub fn file(&self, path: &str) -> Option<&File> {
        self.files
            .binary_search_by(|file| file.path.as_str().cmp(path))
            .ok()
            .map(|n| &self.files[n])
    }
}

/// A symbolic link in a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its path, as a file's.
    pub path: String,
    /// What it says: relative, over real directories, to a file or directory of the model.
    pub target: String,
}

/// One file of a model.
#[derive(Clone, Debug)]
pub struct File {
    /// `/`-separated, relative, sanitised.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// The blob that it is (part of); `None` for one that ocifs made.
    pub digest: Option<Digest>,
    /// The layer's media type; `None` for one that ocifs made.
    pub media_type: Option<String>,
    /// When it was changed, where the artifact tells that of single files.
    pub modified: Option<SystemTime>,
    /// Whether the artifact says that it is a program.
    pub executable: bool,
    /// Where its bytes are.
    pub content: Content,
}

/// Where a file's bytes are.
#[derive(Clone, Debug)]
pub enum Content {
    /// In a lazy blob from this offset.
    Blob {
        /// The blob.
        blob: Arc<LazyBlob>,
        /// The first byte's offset in it.
        offset: u64,
    },
    /// In the uncompressed form of a compressed layer, from this offset.
    Unpacked {
        /// The layer.
        layer: Arc<Unpacked>,
        /// The first byte's offset in the uncompressed form.
        offset: u64,
    },
    /// In pieces of a blob that are compressed and verified each by itself.
    Chunked(Arc<ChunkedFile>),
    /// In memory.
    Inline(Bytes),
}

/// Keeps a file's bytes in the cache while it is read.
#[derive(Clone, Debug)]
pub enum FileHold {
    /// Of a blob.
    Blob(Hold),
    /// Of the uncompressed form of a layer.
    Unpacked(UnpackedHold),
}

impl FileHold {
    /// The cache's entry of the blob that the file lies in, where it lies in one that is sealed and can be read from the disk.
    pub fn readable(&self) -> Option<Arc<cache::Entry>> {
        match self {
            Self::Blob(hold) => hold.readable(),
            Self::Unpacked(_) => None,
        }
    }
}

/// What the safetensors header of a file could not be read for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TensorsError {
    /// Its bytes could not be had.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// It is something else.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl File {
    /// Keeps the file's bytes from being evicted while it is read; `None` for a file in memory.
    pub fn hold(&self) -> Option<FileHold> {
        match &self.content {
            Content::Blob { blob, .. } => Some(FileHold::Blob(blob.hold())),
            Content::Unpacked { layer, .. } => Some(FileHold::Unpacked(layer.hold())),
            Content::Chunked(file) => Some(FileHold::Blob(file.blob().hold())),
            Content::Inline(_) => None,
        }
    }

    /// Bytes of it that are local.
    pub fn cached(&self) -> u64 {
        let range = |offset| ByteRange::at(offset, self.size);
        let cached = match &self.content {
            Content::Blob { blob, offset } => blob.cached_in(range(*offset)),
            Content::Unpacked { layer, offset } => layer.cached_in(range(*offset)),
            Content::Chunked(file) => file.cached(),
            Content::Inline(bytes) => bytes.len() as u64,
        };
        cached.min(self.size)
    }

    /// Whether more of it may become local at any time, because somebody reads it or has it fetched.
    pub fn is_growing(&self) -> bool {
        match &self.content {
            Content::Blob { blob, .. } => blob.is_held(),
            Content::Chunked(file) => file.blob().is_held(),
            Content::Unpacked { .. } => true,
            Content::Inline(_) => false,
        }
    }

    /// Whether every byte of it that is read is known to be right.
    pub fn is_verified(&self) -> bool {
        match &self.content {
            Content::Blob { blob, .. } => blob.verified() == Verified::Yes,
            Content::Unpacked { layer, .. } => layer.verified() == Verified::Yes,
            Content::Chunked(_) | Content::Inline(_) => true,
        }
    }

    /// Whether it is exactly one blob, from its first byte to its last.
    pub fn is_whole_blob(&self) -> bool {
        matches!(&self.content, Content::Blob { blob, offset: 0 } if blob.size() == self.size)
    }

    /// Whether it is exactly one blob, and that is complete and verified.
    pub fn is_sealed(&self) -> bool {
        self.is_whole_blob()
            && matches!(&self.content, Content::Blob { blob, .. } if blob.verified() == Verified::Yes)
    }

    /// The bytes of `range` (cut at the file's end) for the kernel to copy, if they can be had without waiting.
    pub fn try_share(&self, range: ByteRange) -> Option<Result<Data, BlobError>> {
        let range = self.cut(range);
        match &self.content {
            _ if range.is_empty() => Some(Ok(Bytes::new().into())),
            Content::Inline(bytes) => Some(Ok(slice(bytes, range).into())),
            Content::Blob { blob, offset } => blob.try_share(shifted(range, *offset)),
            Content::Unpacked { layer, offset } => layer
                .try_read(shifted(range, *offset))
                .map(|result| result.map(Data::Owned)),
            Content::Chunked(_) => None,
        }
    }

    /// The bytes of `range` for the kernel to copy, cut at the file's end; never short before it.
    pub async fn share(&self, range: ByteRange) -> Result<Data, BlobError> {
        let range = self.cut(range);
        match &self.content {
            _ if range.is_empty() => Ok(Bytes::new().into()),
            Content::Inline(bytes) => Ok(slice(bytes, range).into()),
            Content::Blob { blob, offset } => blob.share(shifted(range, *offset)).await,
            Content::Unpacked { .. } | Content::Chunked(_) => {
                self.read(range).await.map(Data::Owned)
            }
        }
    }

    /// The bytes of `range`, cut at the file's end; never short before it.
    pub async fn read(&self, range: ByteRange) -> Result<Bytes, BlobError> {
        let range = self.cut(range);
        match &self.content {
            _ if range.is_empty() => Ok(Bytes::new()),
            Content::Inline(bytes) => Ok(slice(bytes, range)),
            Content::Blob { blob, offset } => blob.read(shifted(range, *offset)).await,
            Content::Unpacked { layer, offset } => layer.read(shifted(range, *offset)).await,
            Content::Chunked(file) => file.read(range).await,
        }
    }

    /// The bytes of `range`, cut at the file's end, and nothing fetched beside them: for looking into a file.
    pub async fn peek(&self, range: ByteRange, deadline: Deadline) -> Result<Bytes, BlobError> {
        let range = self.cut(range);
        match &self.content {
            _ if range.is_empty() => Ok(Bytes::new()),
            Content::Inline(bytes) => Ok(slice(bytes, range)),
            Content::Blob { blob, offset } => blob.peek(shifted(range, *offset), deadline).await,
            Content::Unpacked { layer, offset } => layer.read(shifted(range, *offset)).await,
            Content::Chunked(file) => file.read(range).await,
        }
    }

    /// The tensors of a safetensors file, from its header alone.
    pub async fn tensors(&self, deadline: Deadline) -> Result<Header, TensorsError> {
        let start = self
            .peek(ByteRange::at(0, safetensors::PREFIX), deadline)
            .await?;
        let len = safetensors::header_len(&start, self.size)?;
        let json = self
            .peek(ByteRange::at(safetensors::PREFIX, len), deadline)
            .await?;
        Ok(safetensors::parse(&json, self.size)?)
    }

    fn cut(&self, range: ByteRange) -> ByteRange {
        range.intersect(ByteRange::new(0, self.size))
    }
}

fn shifted(range: ByteRange, offset: u64) -> ByteRange {
    ByteRange::at(offset.saturating_add(range.start()), range.len())
}

/// `range` of bytes in memory, which a file's size bounds.
fn slice(bytes: &Bytes, range: ByteRange) -> Bytes {
    let cut = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
    bytes.slice(cut(range.start())..cut(range.end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reads_are_cut_at_the_end_of_the_file() {
        let content = safetensors::file_for_tests(&[("a", 3)]);
        let size = content.len() as u64;
        let file = File {
            path: "a".into(),
            size,
            digest: None,
            media_type: None,
            modified: None,
            executable: false,
            content: Content::Inline(content.clone().into()),
        };
        for (start, end) in [
            (0, 5),
            (0, u64::MAX),
            (size - 1, size + 1),
            (size, size + 1),
            (u64::MAX, u64::MAX),
            (3, 3),
        ] {
            let range = ByteRange::new(start, end);
            let expected = &content[start.min(size) as usize..end.min(size) as usize];
            assert_eq!(file.read(range).await.unwrap(), expected, "{range}");
            let Some(Ok(Data::Owned(shared))) = file.try_share(range) else {
                panic!("{range}: it is in memory");
            };
            assert_eq!(shared, expected, "{range}");
        }
        let tensors = file
            .tensors(Deadline::after(Duration::from_secs(1)))
            .await
            .unwrap()
            .tensors;
        assert_eq!(
            (tensors[0].name.as_str(), tensors[0].range()),
            ("a", ByteRange::new(size - 3, size))
        );
    }
}
