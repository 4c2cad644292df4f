//! From a manifest digest to a plan of the model: which paths there are and which bytes of which blob each one is.
//!
//! A plan holds no blob open, so it can be kept while the cache evicts what it speaks of.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::base::Digest;

use super::ModelError;
use super::bases::Base;
use super::contents::list_tars;
use super::convention::{self, Composed};
use super::created::created;
use super::fetch::{BlobId, Fetch, whole};
use super::layout::{Placed, Source};
use super::manifest::{self, Descriptor, Document, Manifest};
use super::notes::quote;
use super::stamp::Stamp;
use super::weights;
use crate::registry::Reference;

/// Largest config that is read.
const LARGEST_CONFIG: u64 = 16 << 20;
/// Most bytes of layers that a file is made of.
const LARGEST_TEXTS: u64 = 1 << 20;
/// Requests for metadata of one model at a time.
const AT_ONCE: usize = 16;

/// A model without its blobs.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The digest that was asked for: the manifest's, or that of an index that lists it.
    pub(super) digest: Digest,
    /// The manifest's digest and size.
    pub(super) manifest_id: BlobId,
    /// The manifest.
    pub(super) manifest: Box<Manifest>,
    /// The packaging convention's name.
    pub(super) packaging: &'static str,
    /// Creation time.
    pub(super) created: SystemTime,
    /// The files, sorted by path.
    pub(super) files: Vec<PlannedFile>,
    /// Directories with nothing in them.
    pub(super) empty: Vec<String>,
    /// The files below `.oci`.
    pub(super) oci: Vec<PlannedFile>,
    /// Notes.
    pub(super) notes: Vec<String>,
    /// Why the artifact is of no use as a directory.
    pub(super) problem: Option<String>,
    /// The artifact whose model is shown as its own, which is still to be taken in.
    pub(super) names: Option<Reference>,
    /// Those that were taken in.
    pub(super) bases: Vec<Base>,
}

/// What of an artifact is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    All,
    /// The model alone, which another artifact shows as its own.
    Model,
}

/// One file of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedFile {
    /// Its path.
    pub(super) path: String,
    /// Its size.
    pub(super) size: u64,
    /// The digest of the blob that it is (part of), or of its own content; `None` for one that ocifs made.
    pub(super) digest: Option<Digest>,
    /// The media type of that blob.
    pub(super) media_type: Option<String>,
    /// Where its bytes are.
    pub(super) source: Source,
    /// What its packager told of it.
    pub(super) stamp: Stamp,
}

impl Plan {
    /// Something like the memory that it takes, in files.
    pub(super) fn weight(&self) -> usize {
        64 + self.files.len() + self.empty.len() + self.oci.len() + self.manifest.layers.len()
    }
}

impl Part {
    /// Leaves the layers of this part.
    fn cut(self, manifest: &mut Manifest) {
        if self == Self::Model {
            manifest
                .layers
                .retain(|layer| convention::is_of_model(&layer.media_type));
        }
    }
}

impl Manifest {
    /// The layer as a blob.
    pub(super) fn blob(&self, layer: usize) -> BlobId {
        self.layers[layer].blob()
    }
}

impl Descriptor {
    /// What it describes, as a blob.
    pub(super) fn blob(&self) -> BlobId {
        BlobId {
            digest: self.digest,
            size: self.size,
        }
    }
}

/// Builds the plan of what `digest` names.
pub(super) async fn build<F: Fetch>(
    fetch: &F,
    digest: Digest,
    part: Part,
) -> Result<Plan, ModelError> {
    let document = read_manifest(fetch, digest).await?;
    let Chosen {
        manifest_id,
        manifest,
        bytes,
        index,
    } = document;
    let mut manifest = manifest;
    let convention = convention::of(&manifest);
    let (config, steps, tars) = if convention.needs_config || has_compressed(&manifest) {
        let config = config(fetch, &manifest).await?;
        let known = config.as_deref().unwrap_or_default();
        note_diff_ids(&mut manifest, known);
        part.cut(&mut manifest);
        let steps = (convention.steps)(&manifest, known);
        let tars = list_tars(fetch, &manifest, &steps).await?;
        (config, steps, tars)
    } else {
        part.cut(&mut manifest);
        let steps = (convention.steps)(&manifest, &[]);
        let (config, tars) = futures_util::future::try_join(
            config(fetch, &manifest),
            list_tars(fetch, &manifest, &steps),
        )
        .await?;
        (config, steps, tars)
    };
    let mut layout = weights::lay_out(fetch, &manifest, &steps, &tars).await?;

    let created = created(&manifest, config.as_deref().unwrap_or_default());
    let mut names = None;
    let mut composed = None;
    if let Some(extras) = convention.extras {
        let extras = extras(&manifest, config.as_deref().unwrap_or_default());
        if part == Part::All {
            for (path, content) in extras.files {
                layout.add_made(path, content);
            }
        }
        layout.notes.extend(extras.notes);
        names = extras.base;
        composed = extras.composed;
    }
    if let Some(composed) = composed
        && layout.taken(composed.name).is_none()
    {
        let known = config.as_deref().unwrap_or_default();
        match compose(fetch, &manifest, known, &composed).await? {
            Ok(text) => layout.add_made(composed.name, text.into()),
            Err(why) => layout
                .notes
                .add(format!("there is no {}: {why}", composed.name)),
        }
    }
    let mut oci = vec![made(
        "manifest.json",
        bytes,
        manifest_id.digest,
        &manifest.media_type,
    )];
    if let Some(bytes) = index {
        oci.push(made("index.json", bytes, digest, ""));
    }
    match config {
        Ok(bytes) => oci.push(made(
            "config.json",
            bytes,
            manifest.config.digest,
            &manifest.config.media_type,
        )),
        Err(note) => layout.notes.add(note),
    }
    oci.extend(hidden_blobs(&manifest, &layout.hidden));
    oci.sort_by(|a, b| a.path.cmp(&b.path));
    let empty = layout.empty_directories();
    let files: Vec<PlannedFile> = layout
        .files
        .into_iter()
        .map(|(path, placed)| planned(&manifest, path, placed))
        .collect();
    let problem = layout
        .problem
        .or_else(|| (files.is_empty() && names.is_none()).then(|| nothing_usable(&manifest)));
    let notes = layout.notes.into_lines();
    Ok(Plan {
        digest,
        manifest_id,
        manifest,
        packaging: convention.name,
        created,
        files,
        empty,
        oci,
        notes,
        problem,
        names,
        bases: Vec::new(),
    })
}

fn planned(manifest: &Manifest, path: String, placed: Placed) -> PlannedFile {
    let layer = placed.source.layer().map(|layer| &manifest.layers[layer]);
    PlannedFile {
        path,
        size: placed.size,
        digest: layer.map(|layer| layer.digest),
        media_type: layer.map(|layer| layer.media_type.clone()),
        source: placed.source,
        stamp: placed.stamp,
    }
}

fn made(path: &str, bytes: Bytes, digest: Digest, media_type: &str) -> PlannedFile {
    PlannedFile {
        path: path.to_owned(),
        size: bytes.len() as u64,
        digest: Some(digest),
        media_type: Some(media_type)
            .filter(|text| !text.is_empty())
            .map(str::to_owned),
        source: Source::Made(bytes),
        stamp: Stamp::default(),
    }
}

/// Whether a layer says that it is compressed: then the digest of what it holds is worth waiting for.
fn has_compressed(manifest: &Manifest) -> bool {
    manifest.layers.iter().any(|layer| {
        [".gzip", "+gzip", "+zstd"]
            .iter()
            .any(|suffix| layer.media_type.ends_with(suffix))
    })
}

/// Notes the digests of the layers' uncompressed forms: those of an image config (image-spec config.md, `rootfs.diff_ids`), of
/// ModelPack's (`modelfs.diffIds`), and what ORAS says of a folder that it packed.
pub(super) fn note_diff_ids(manifest: &mut Manifest, config: &[u8]) {
    #[derive(serde::Deserialize, Default)]
    #[serde(default)]
    struct Config {
        rootfs: Layers,
        modelfs: Layers,
    }
    #[derive(serde::Deserialize, Default)]
    #[serde(default)]
    struct Layers {
        #[serde(alias = "diffIds")]
        diff_ids: Vec<String>,
    }
    let config: Config = serde_json::from_slice(config).unwrap_or_default();
    let told = [config.rootfs.diff_ids, config.modelfs.diff_ids]
        .into_iter()
        .find(|ids| ids.len() == manifest.layers.len());
    for (n, layer) in manifest.layers.iter_mut().enumerate() {
        let of_config = told.as_ref().and_then(|ids| ids[n].parse().ok());
        let of_oras = || {
            layer
                .annotation("io.deis.oras.content.digest")?
                .parse()
                .ok()
        };
        layer.diff_id = of_config.or_else(of_oras);
    }
}

/// `blobs/<digest>` for each hidden layer; layers with one digest are one file.
fn hidden_blobs(manifest: &Manifest, hidden: &BTreeSet<usize>) -> Vec<PlannedFile> {
    let by_digest: BTreeMap<Digest, usize> = hidden
        .iter()
        .rev()
        .map(|n| (manifest.layers[*n].digest, *n))
        .collect();
    let file = |(digest, layer): (Digest, usize)| {
        let placed = Placed::whole(layer, &manifest.layers[layer]);
        planned(manifest, format!("blobs/{digest}"), placed)
    };
    by_digest.into_iter().map(file).collect()
}

/// Says what an artifact without any file is made of, and what to try.
fn nothing_usable(manifest: &Manifest) -> String {
    const MOST_TYPES: usize = 6;
    let mut types: BTreeMap<&str, usize> = BTreeMap::new();
    for layer in &manifest.layers {
        *types.entry(&layer.media_type).or_insert(0) += 1;
    }
    let mut listed: Vec<String> = types
        .iter()
        .take(MOST_TYPES)
        .map(|(media_type, count)| format!("{count} of type {}", quote(media_type)))
        .collect();
    if types.len() > MOST_TYPES {
        listed.push(format!("{} further types", types.len() - MOST_TYPES));
    }
    let layers = if listed.is_empty() {
        "no layers".to_owned()
    } else {
        format!("layers: {}", listed.join(", "))
    };
    let artifact = manifest
        .artifact_type
        .as_deref()
        .map(|text| format!("artifact type {}, ", quote(text)));
    let why = "a layer is shown when it is of a model format or has a name, by an annotation \
               `org.opencontainers.image.title` or `org.cncf.model.filepath`";
    format!(
        "there is no file in it that ocifs can show ({}config type {}, {layers}); {why}",
        artifact.unwrap_or_default(),
        quote(&manifest.config.media_type),
    )
}

/// The manifest behind a digest.
struct Chosen {
    manifest_id: BlobId,
    manifest: Box<Manifest>,
    bytes: Bytes,
    /// The index that it was chosen from.
    index: Option<Bytes>,
}

/// Reads a manifest; an index is followed once.
async fn read_manifest<F: Fetch>(fetch: &F, digest: Digest) -> Result<Chosen, ModelError> {
    let unusable = |digest: &Digest, reason| ModelError::Unusable {
        reference: fetch.what(digest),
        reason,
    };
    let (bytes, media_type) = fetch.manifest(digest).await?;
    let (chosen, index) =
        match manifest::parse(&bytes, &media_type).map_err(|reason| unusable(&digest, reason))? {
            Document::Manifest(manifest) => {
                let manifest_id = BlobId {
                    digest,
                    size: bytes.len() as u64,
                };
                return Ok(Chosen {
                    manifest_id,
                    manifest,
                    bytes,
                    index: None,
                });
            }
            Document::Index(manifests) => {
                let chosen = manifest::choose(&manifests, &fetch.platform())
                    .map_err(|reason| unusable(&digest, reason))?;
                (chosen.digest, bytes)
            }
        };
    let (bytes, media_type) = fetch.manifest(chosen).await?;
    match manifest::parse(&bytes, &media_type).map_err(|reason| unusable(&chosen, reason))? {
        Document::Manifest(manifest) => {
            let manifest_id = BlobId {
                digest: chosen,
                size: bytes.len() as u64,
            };
            Ok(Chosen {
                manifest_id,
                manifest,
                bytes,
                index: Some(index),
            })
        }
        Document::Index(_) => Err(unusable(
            &digest,
            "its index lists a further index; name a manifest by its digest".into(),
        )),
    }
}

/// The config's bytes, or a note on why they are not to be had. A registry without the config does no harm to the files.
async fn config<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
) -> Result<Result<Bytes, String>, ModelError> {
    let config = &manifest.config;
    if config.size > LARGEST_CONFIG {
        return Ok(Err(format!(
            "the config has {} bytes and is not read (limit {LARGEST_CONFIG})",
            config.size
        )));
    }
    match whole(fetch, config.blob()).await {
        Ok(bytes) => Ok(Ok(bytes)),
        Err(error) if error.lacks_blob() => Ok(Err(format!(
            "the registry does not have the config {}",
            config.digest
        ))),
        Err(error) => Err(error),
    }
}

/// Makes a file of what layers say, whole and verified. That they are not here and cannot be asked for takes the file alone.
async fn compose<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    config: &[u8],
    composed: &Composed,
) -> Result<Result<String, String>, ModelError> {
    let layers = composed.layers.iter();
    let size: u64 = layers.clone().map(|n| manifest.layers[*n].size).sum();
    if size > LARGEST_TEXTS {
        let why = format!("its texts have {size} bytes (limit {LARGEST_TEXTS})");
        return Ok(Err(why));
    }
    let texts = layers.map(async |n| whole(fetch, manifest.blob(*n)).await);
    match gather(texts.collect()).await {
        Ok(texts) => Ok((composed.make)(manifest, config, &texts)),
        Err(error) if error.lacks_blob() || matches!(error, ModelError::Offline { .. }) => {
            Ok(Err("one of its texts cannot be had".to_owned()))
        }
        Err(error) => Err(error),
    }
}

/// Runs these futures, some at once; their results in order.
pub(super) async fn gather<T>(
    futures: Vec<impl Future<Output = Result<T, ModelError>>>,
) -> Result<Vec<T>, ModelError> {
    stream::iter(futures).buffered(AT_ONCE).try_collect().await
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
