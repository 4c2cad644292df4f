//! Layers and facts to config and manifest, per packaging convention.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::classify::{docker_type, modelpack_type};
use super::scan::SourceFile;
use super::weights::{Facts, people};
use super::{Blob, Format, MANIFEST_TYPE, Options, Package, Source, Timestamp};
use crate::base::{ByteSize, Digest};

const FILE_PATH: &str = "org.cncf.model.filepath";
const FILE_METADATA: &str = "org.cncf.model.file.metadata+json";
const FILE_UNTESTED: &str = "org.cncf.model.file.mediatype.untested";
/// The manifest's type and the config's (modelpack/model-spec, docs/spec.md).
const MODELPACK_ARTIFACT: &str = "application/vnd.cncf.model.manifest.v1+json";
const MODELPACK_CONFIG: &str = "application/vnd.cncf.model.config.v1+json";

/// A raw layer that is one file.
pub(super) fn file_layer(file: &SourceFile, digest: Digest, options: &Options) -> Blob {
    let media_type = match options.format {
        Format::Docker | Format::DockerV01 => docker_type(&file.path),
        Format::ModelPack => modelpack_type(&file.path),
    };
    let annotations = if options.format == Format::DockerV01 && options.nameless {
        Vec::new()
    } else {
        let metadata = json!({
            "name": file.path.rsplit('/').next().unwrap_or(&file.path),
            "mode": 0o644,
            "uid": 0,
            "gid": 0,
            "size": file.size,
            "mtime": options.created.unwrap_or(Timestamp::EPOCH).to_string(),
            // tar's flag of a regular file.
            "typeflag": b'0',
        });
        vec![
            (FILE_PATH, file.path.clone()),
            (FILE_METADATA, metadata.to_string()),
            (FILE_UNTESTED, "false".to_owned()),
        ]
    };
    Blob {
        digest,
        size: file.size,
        media_type: media_type.to_owned(),
        name: file.path.clone(),
        source: Source::File(file.source.clone()),
        annotations,
    }
}

/// The config tar of Docker's v0.1 format.
pub(super) fn archive_layer(tar: Bytes) -> Blob {
    memory(
        "vllm.config.tar",
        "application/vnd.docker.ai.vllm.config.tar",
        tar,
    )
}

fn memory(name: &str, media_type: &str, bytes: Bytes) -> Blob {
    Blob {
        digest: Digest::of(&bytes),
        size: bytes.len() as u64,
        media_type: media_type.to_owned(),
        name: name.to_owned(),
        source: Source::Memory(bytes),
        annotations: Vec::new(),
    }
}

/// Adds config and manifest to the layers.
pub(super) fn package(
    layers: Vec<Blob>,
    facts: &Facts,
    options: &Options,
    notes: Vec<String>,
) -> Package {
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.digest).collect();
    let (config_type, config, artifact_type) = match options.format {
        Format::Docker => (
            "application/vnd.docker.ai.model.config.v0.2+json",
            docker_config(facts, options, &diff_ids),
            None,
        ),
        Format::DockerV01 => (
            "application/vnd.docker.ai.model.config.v0.1+json",
            docker_config(facts, options, &diff_ids),
            None,
        ),
        Format::ModelPack => (
            MODELPACK_CONFIG,
            modelpack_config(facts, options, &diff_ids),
            Some(MODELPACK_ARTIFACT),
        ),
    };
    let config = memory("config", config_type, Bytes::from(config.to_string()));
    let mut manifest = Map::new();
    manifest.insert("schemaVersion".to_owned(), json!(2));
    manifest.insert("mediaType".to_owned(), json!(MANIFEST_TYPE));
    if let Some(artifact_type) = artifact_type {
        manifest.insert("artifactType".to_owned(), json!(artifact_type));
    }
    manifest.insert("config".to_owned(), descriptor(&config));
    manifest.insert("layers".to_owned(), layers.iter().map(descriptor).collect());
    // The predefined annotations of the image-spec (annotations.md); several licences are no SPDX expression.
    let licence = match &facts.licences[..] {
        [only] => Some(Value::from(only.as_str())),
        _ => None,
    };
    let created = options
        .created
        .map(|created| Value::from(created.to_string()));
    let annotations = present([
        ("org.opencontainers.image.created", created),
        ("org.opencontainers.image.licenses", licence),
    ]);
    if annotations.as_object().is_some_and(|map| !map.is_empty()) {
        manifest.insert("annotations".to_owned(), annotations);
    }
    let manifest = Bytes::from(Value::Object(manifest).to_string());
    Package {
        digest: Digest::of(&manifest),
        manifest,
        artifact_type,
        config,
        layers,
        notes,
    }
}

fn descriptor(blob: &Blob) -> Value {
    let mut descriptor =
        json!({ "mediaType": blob.media_type, "digest": blob.digest, "size": blob.size });
    if !blob.annotations.is_empty() {
        let annotations: Map<String, Value> = blob
            .annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), json!(value)))
            .collect();
        descriptor["annotations"] = Value::Object(annotations);
    }
    descriptor
}

/// The config as docker/model-runner reads it (pkg/distribution/types/config.go).
fn docker_config(facts: &Facts, options: &Options, diff_ids: &[Digest]) -> Value {
    let config = present([
        ("format", facts.format.map(Value::from)),
        (
            "quantization",
            facts
                .quantization
                .clone()
                .or_else(|| facts.precision.clone())
                .map(Value::from),
        ),
        (
            "parameters",
            facts.parameters.map(|count| Value::from(people(count))),
        ),
        ("architecture", facts.architecture.clone().map(Value::from)),
        (
            "size",
            Some(Value::from(ByteSize(facts.weight_bytes).to_string())),
        ),
        (
            "context_size",
            facts
                .context_size
                .filter(|size| i32::try_from(*size).is_ok())
                .map(Value::from),
        ),
    ]);
    json!({
        "config": config,
        "descriptor": present([("created", options.created.map(|created| Value::from(created.to_string())))]),
        "rootfs": { "type": "rootfs", "diff_ids": diff_ids },
    })
}

/// The config of ModelPack (modelpack/model-spec, specs-go/v1/config.go).
fn modelpack_config(facts: &Facts, options: &Options, diff_ids: &[Digest]) -> Value {
    json!({
        "descriptor": present([
            ("createdAt", options.created.map(|created| Value::from(created.to_string()))),
            ("family", facts.architecture.clone().map(Value::from)),
            ("licenses", (!facts.licences.is_empty()).then(|| Value::from(facts.licences.clone()))),
        ]),
        "modelfs": { "type": "layers", "diffIds": diff_ids },
        "config": present([
            ("architecture", facts.architecture.as_ref().map(|_| Value::from("transformer"))),
            ("format", facts.format.map(Value::from)),
            ("paramSize", facts.parameters.map(|count| Value::from(people(count)))),
            ("precision", facts.precision.as_ref().map(|precision| Value::from(precision.to_ascii_lowercase()))),
            ("quantization", facts.quantization.clone().map(Value::from)),
        ]),
    })
}

fn present<const N: usize>(fields: [(&str, Option<Value>); N]) -> Value {
    fields
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect::<Map<_, _>>()
        .into()
}
