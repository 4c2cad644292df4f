//! Manifests: OCI image manifests, Docker's schema 2, and indexes of them (image-spec manifest.md, image-index.md).

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::base::Digest;

use super::notes::quote;

/// Most layers of a manifest and most manifests of an index.
const MOST_DESCRIPTORS: usize = 20_000;
/// Longest annotation key or value in bytes; longer ones are not kept.
const LONGEST_ANNOTATION: usize = 64 << 10;
/// Sizes are signed 64-bit numbers in the specification.
const LARGEST: u64 = i64::MAX as u64;

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What a manifest says, as far as it matters here. `urls` and `data` of descriptors are not looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Its own media type.
    pub media_type: String,
    /// Its `artifactType`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The config.
    pub config: Descriptor,
    /// The layers, in order.
    pub layers: Vec<Descriptor>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// One descriptor (image-spec descriptor.md).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type, empty when there is none.
    pub media_type: String,
    /// The digest.
    pub digest: Digest,
    /// The size in bytes.
    pub size: u64,
    /// The annotations.
    pub annotations: BTreeMap<String, String>,
    /// The `artifactType` of a manifest in an index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// `os/architecture` of a manifest in an index, with its variant where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// The `name` that Ollama's manifests give layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The digest of the layer's uncompressed form, where the config tells it.
    #[serde(skip)]
    pub diff_id: Option<Digest>,
}

impl Descriptor {
    /// The annotation under this key, unless it is empty.
    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }
}

/// What the bytes behind a digest are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Document {
    /// A manifest.
    Manifest(Box<Manifest>),
    /// The manifests of an index.
    Index(Vec<Descriptor>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: Option<u64>,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: Option<String>,
    digest: Digest,
    size: u64,
    annotations: Option<BTreeMap<String, String>>,
    artifact_type: Option<String>,
    platform: Option<RawPlatform>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

impl RawDescriptor {
    fn into_descriptor(self) -> Descriptor {
        Descriptor {
            media_type: self.media_type.unwrap_or_default(),
            digest: self.digest,
            size: self.size,
            annotations: bounded(self.annotations),
            artifact_type: self.artifact_type.filter(|text| !text.is_empty()),
            platform: self.platform.map(|platform| {
                let RawPlatform {
                    os,
                    architecture,
                    variant,
                } = platform;
                match variant.as_str() {
                    "" => format!("{os}/{architecture}"),
                    variant => format!("{os}/{architecture}/{variant}"),
                }
            }),
            name: self
                .name
                .filter(|name| !name.is_empty() && name.len() <= LONGEST_ANNOTATION),
            diff_id: None,
        }
    }
}

fn bounded(annotations: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let mut annotations = annotations.unwrap_or_default();
    annotations
        .retain(|key, value| key.len() <= LONGEST_ANNOTATION && value.len() <= LONGEST_ANNOTATION);
    annotations
}

/// Parses a manifest or an index; `media_type` is what the registry called it, for those that don't say themselves.
///
/// The error is a reason for people.
pub(super) fn parse(bytes: &[u8], media_type: &str) -> Result<Document, String> {
    let raw: RawDocument = serde_json::from_slice(bytes)
        .map_err(|error| format!("its manifest can't be understood: {error}"))?;
    if raw.schema_version == Some(1) {
        return Err("its manifest has Docker's schema 1, which ocifs does not read; push it again with a newer tool".into());
    }
    match (raw.config, raw.layers, raw.manifests) {
        (Some(config), layers, None) => {
            let media_type = raw.media_type.unwrap_or_else(|| media_type.to_owned());
            let manifest = Manifest {
                media_type: if media_type.is_empty() { OCI_MANIFEST.to_owned() } else { media_type },
                artifact_type: raw.artifact_type.filter(|text| !text.is_empty()),
                config: config.into_descriptor(),
                layers: descriptors(layers.unwrap_or_default())?,
                annotations: bounded(raw.annotations),
            };
            check_sizes(&manifest)?;
            Ok(Document::Manifest(Box::new(manifest)))
        }
        (None, None, Some(manifests)) => Ok(Document::Index(descriptors(manifests)?)),
        // One document that is both could be read as either by different tools (image-spec, "mediaType").
        (_, _, Some(_)) => Err("its manifest has both `manifests` and `layers` or `config`, which contradict each other".into()),
        (None, _, None) => Err("its manifest has neither a `config` nor `manifests`".into()),
    }
}

fn descriptors(raw: Vec<RawDescriptor>) -> Result<Vec<Descriptor>, String> {
    if raw.len() > MOST_DESCRIPTORS {
        return Err(format!(
            "its manifest lists {} blobs, more than {MOST_DESCRIPTORS}",
            raw.len()
        ));
    }
    Ok(raw
        .into_iter()
        .map(RawDescriptor::into_descriptor)
        .collect())
}

/// Sizes must add up, and one digest has one size: blobs are kept by digest.
fn check_sizes(manifest: &Manifest) -> Result<(), String> {
    let mut sizes = HashMap::new();
    let mut total = 0_u64;
    for descriptor in [&manifest.config].into_iter().chain(&manifest.layers) {
        total = total
            .checked_add(descriptor.size)
            .filter(|total| *total <= LARGEST)
            .ok_or("the sizes in its manifest add up to more than 2^63 bytes")?;
        let size = *sizes.entry(descriptor.digest).or_insert(descriptor.size);
        if size != descriptor.size {
            let digest = descriptor.digest;
            return Err(format!(
                "its manifest gives {digest} two sizes, {size} and {}",
                descriptor.size
            ));
        }
    }
    Ok(())
}

/// Which manifest of an index is shown where several are for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `os/architecture`, or `os/architecture/variant`.
    name: String,
    /// Whether somebody asked for it; then no other will do.
    asked: bool,
}

impl Platform {
    /// The one that was asked for: `linux/arm64`, `linux/arm/v7`.
    ///
    /// # Errors
    /// When it is not of that form.
    pub fn asked(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let good = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        if !(2..=3).contains(&parts.len()) || !parts.iter().all(good) {
            return Err(format!(
                "`{text}` is no platform; write it as linux/amd64 or linux/arm/v7"
            ));
        }
        Ok(Self {
            name: text.to_owned(),
            asked: true,
        })
    }

    /// Whether a descriptor is for it. Without a variant any will do.
    fn is(&self, descriptor: &Descriptor) -> bool {
        descriptor.platform.as_deref().is_some_and(|platform| {
            platform
                .strip_prefix(self.name.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }
}

impl Default for Platform {
    /// This machine's, in Go's words, as everywhere in OCI.
    fn default() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self {
            name: format!("linux/{architecture}"),
            asked: false,
        }
    }
}

/// Picks the manifest of an index that is shown: the only one, else the model among them, else that of the platform.
///
/// Build attestations are never picked. Where nobody asked for a platform and this machine's is not there, linux/amd64's is
/// shown: a model is the same for all. The error is a reason for people.
pub(super) fn choose<'a>(
    manifests: &'a [Descriptor],
    platform: &Platform,
) -> Result<&'a Descriptor, String> {
    let candidates: Vec<&Descriptor> = manifests
        .iter()
        .filter(|d| matches!(d.media_type.as_str(), "" | OCI_MANIFEST | DOCKER_MANIFEST))
        .filter(|d| !d.annotations.contains_key("vnd.docker.reference.type"))
        .collect();
    // The image-spec lets the first match win.
    if let Some(first) = candidates.iter().find(|d| platform.asked && platform.is(d)) {
        return Ok(first);
    }
    let other = |only: &Descriptor| platform.asked && only.platform.is_some();
    if let [only] = candidates[..]
        && !other(only)
    {
        return Ok(only);
    }
    let models: Vec<&Descriptor> = candidates.iter().copied().filter(|d| is_model(d)).collect();
    if let [only] = models[..]
        && !other(only)
    {
        return Ok(only);
    }
    let pool = if models.is_empty() {
        &candidates
    } else {
        &models
    };
    let of = |wanted: &Platform| pool.iter().find(|d| wanted.is(d)).copied();
    let fallback = Platform {
        name: "linux/amd64".to_owned(),
        asked: false,
    };
    if let Some(first) = of(platform).or_else(|| of(&fallback).filter(|_| !platform.asked)) {
        return Ok(first);
    }
    if manifests.is_empty() {
        return Err("its index lists no manifest".into());
    }
    let listed: Vec<String> = manifests
        .iter()
        .take(8)
        .map(|d| {
            let what = d
                .artifact_type
                .as_deref()
                .or(d.platform.as_deref())
                .unwrap_or(&d.media_type);
            format!("{} ({})", d.digest, quote(what))
        })
        .collect();
    Err(format!(
        "its index lists {} manifests, and neither is one of them alone a model nor for {}: {}{}; name one of them by its digest, or a platform by --platform",
        manifests.len(),
        platform.name,
        listed.join(", "),
        if manifests.len() > listed.len() {
            ", …"
        } else {
            ""
        },
    ))
}

fn is_model(descriptor: &Descriptor) -> bool {
    let prefixes = [
        "application/vnd.cncf.model.",
        "application/vnd.cnai.model.",
        "application/vnd.docker.ai.",
        "application/vnd.kitops.",
    ];
    let of_type = descriptor
        .artifact_type
        .as_deref()
        .is_some_and(|text| prefixes.iter().any(|prefix| text.starts_with(prefix)));
    of_type
        || descriptor
            .annotations
            .keys()
            .any(|key| key.starts_with("org.cncf.model.") || key.starts_with("org.cnai.model."))
}

/// Media type, size, annotations.
#[cfg(test)]
pub(super) type LayerForTests<'a> = (&'a str, u64, &'a [(&'a str, &'a str)]);

#[cfg(test)]
impl Manifest {
    /// A manifest with an empty config and these layers: media type, size, annotations.
    pub(super) fn for_tests(layers: &[LayerForTests<'_>]) -> Self {
        let layers = layers
            .iter()
            .enumerate()
            .map(|(n, (media_type, size, annotations))| Descriptor {
                media_type: (*media_type).to_owned(),
                digest: Digest::of(&n.to_le_bytes()),
                size: *size,
                annotations: annotations
                    .iter()
                    .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                    .collect(),
                artifact_type: None,
                platform: None,
                name: None,
                diff_id: None,
            });
        Self {
            media_type: OCI_MANIFEST.into(),
            artifact_type: None,
            config: Descriptor {
                media_type: "application/vnd.oci.empty.v1+json".into(),
                digest: Digest::of(b"{}"),
                size: 2,
                annotations: BTreeMap::new(),
                artifact_type: None,
                platform: None,
                name: None,
                diff_id: None,
            },
            layers: layers.collect(),
            annotations: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
