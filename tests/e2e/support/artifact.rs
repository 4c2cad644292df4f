//! Artifacts of any shape: an OCI layout written layer by layer, as packagers of the field would or would not do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::content;
use super::registry::Registry;

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const DOCKER_CONFIG_V01: &str = "application/vnd.docker.ai.model.config.v0.1+json";
pub const DOCKER_CONFIG_V02: &str = "application/vnd.docker.ai.model.config.v0.2+json";
pub const DOCKER_SAFETENSORS: &str = "application/vnd.docker.ai.safetensors";
pub const DOCKER_CONFIG_TAR: &str = "application/vnd.docker.ai.vllm.config.tar";
pub const DOCKER_LICENSE: &str = "application/vnd.docker.ai.license";
pub const DOCKER_FILE: &str = "application/vnd.docker.ai.model.file";
pub const FILEPATH: &str = "org.cncf.model.filepath";

/// One layer of an artifact.
#[derive(Clone)]
pub struct Layer {
    media_type: String,
    annotations: BTreeMap<String, String>,
    source: Source,
}

#[derive(Clone)]
enum Source {
    Bytes(Vec<u8>),
    File(PathBuf),
}

impl Layer {
    pub fn bytes(media_type: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            media_type: media_type.to_owned(),
            annotations: BTreeMap::new(),
            source: Source::Bytes(bytes.into()),
        }
    }

    pub fn file(media_type: &str, path: impl Into<PathBuf>) -> Self {
        Self {
            media_type: media_type.to_owned(),
            annotations: BTreeMap::new(),
            source: Source::File(path.into()),
        }
    }

    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// With the path annotation of Docker and ModelPack.
    pub fn at(self, path: &str) -> Self {
        self.annotated(FILEPATH, path)
    }

    /// Puts the blob in a layout and returns its descriptor.
    fn store(&self, layout: &Path) -> Value {
        let (digest, size) = match &self.source {
            Source::Bytes(bytes) => (store(layout, bytes), bytes.len() as u64),
            Source::File(file) => {
                let digest = content::digest_file(file);
                let target = blob_path(layout, &digest);
                if !target.exists() && fs::hard_link(file, &target).is_err() {
                    fs::copy(file, &target).unwrap();
                }
                (digest, fs::metadata(file).unwrap().len())
            }
        };
        let mut descriptor = json!({"mediaType": self.media_type, "digest": digest, "size": size});
        if !self.annotations.is_empty() {
            descriptor["annotations"] = json!(self.annotations);
        }
        descriptor
    }
}

/// An artifact to be.
#[derive(Clone)]
pub struct Artifact {
    config_type: String,
    config: Vec<u8>,
    media_type: String,
    artifact_type: Option<String>,
    annotations: BTreeMap<String, String>,
    layers: Vec<Layer>,
}

/// An artifact that a registry or layout has.
#[derive(Clone, Debug)]
pub struct Published {
    /// `HOST/REPOSITORY:TAG`, empty for a layout.
    pub reference: String,
    /// The manifest's digest.
    pub digest: String,
    pub manifest: Vec<u8>,
    /// The digests of the layers, in order.
    pub layers: Vec<String>,
}

impl Artifact {
    pub fn new(config_type: &str, config: &Value) -> Self {
        Self {
            config_type: config_type.to_owned(),
            config: config.to_string().into_bytes(),
            media_type: MANIFEST.to_owned(),
            artifact_type: None,
            annotations: BTreeMap::new(),
            layers: Vec::new(),
        }
    }

    /// Docker's format until February 2026: safetensors layers and a config tar.
    pub fn docker_v01() -> Self {
        Self::docker(DOCKER_CONFIG_V01)
    }

    /// Docker's format since: a layer a file.
    pub fn docker_v02() -> Self {
        Self::docker(DOCKER_CONFIG_V02)
    }

    fn docker(config_type: &str) -> Self {
        Self::new(
            config_type,
            &json!({
                "config": {"format": "safetensors", "architecture": "llama"},
                "descriptor": {"created": "2025-10-05T12:34:56Z"},
                "rootfs": {"type": "rootfs", "diff_ids": []},
            }),
        )
    }

    /// CNCF ModelPack; `spelling` is `cncf`, or `cnai` as before June 2025.
    pub fn modelpack(spelling: &str) -> Self {
        let mut artifact = Self::new(
            &format!("application/vnd.{spelling}.model.config.v1+json"),
            &json!({"descriptor": {"createdAt": "2025-10-05T12:34:56Z", "name": "m"}, "config": {"format": "safetensors"}, "modelfs": {"type": "layers", "diffIds": []}}),
        );
        artifact.artifact_type = Some(format!("application/vnd.{spelling}.model.manifest.v1+json"));
        artifact
    }

    /// Under another manifest type than OCI's.
    pub fn of_type(mut self, media_type: &str) -> Self {
        self.media_type = media_type.to_owned();
        self
    }

    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    pub fn layers(mut self, layers: impl IntoIterator<Item = Layer>) -> Self {
        self.layers.extend(layers);
        self
    }

    /// Adds it under `tag` to the layout at `dir`, which is made when it is missing.
    pub fn write(&self, dir: &Path, tag: &str) -> Published {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let config = store(dir, &self.config);
        let layers: Vec<Value> = self.layers.iter().map(|layer| layer.store(dir)).collect();
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": {"mediaType": self.config_type, "digest": config, "size": self.config.len()},
            "layers": layers,
        });
        if let Some(artifact_type) = &self.artifact_type {
            manifest["artifactType"] = json!(artifact_type);
        }
        if !self.annotations.is_empty() {
            manifest["annotations"] = json!(self.annotations);
        }
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let digest = store(dir, &manifest);

        let index_file = dir.join("index.json");
        let mut index: Value = match fs::read(&index_file) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
            Err(_) => json!({"schemaVersion": 2, "manifests": []}),
        };
        index["manifests"].as_array_mut().unwrap().push(json!({
            "mediaType": self.media_type, "digest": digest, "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }));
        fs::write(index_file, index.to_string()).unwrap();
        let layers = layers
            .iter()
            .map(|layer| layer["digest"].as_str().unwrap().to_owned())
            .collect();
        Published {
            reference: String::new(),
            digest,
            manifest,
            layers,
        }
    }

    /// Pushes it by `skopeo` from a layout; `name` is `REPOSITORY:TAG`.
    pub fn publish(&self, registry: &Registry, name: &str) -> Published {
        let layout = super::scratch("layout");
        let mut published = self.write(layout.path(), "pushed");
        let source = format!("oci:{}:pushed", layout.path().display());
        if self.media_type == MANIFEST {
            registry.skopeo_push(&source, name);
        } else {
            // A layout holds OCI's manifests only, so the blobs go as one and the manifest by itself.
            let layout = super::scratch("layout");
            let twin = self.clone().of_type(MANIFEST);
            twin.write(layout.path(), "pushed");
            registry.skopeo_push(&format!("oci:{}:pushed", layout.path().display()), name);
            put_manifest(registry, name, &self.media_type, &published.manifest);
        }
        published.reference = format!("{}/{name}", registry.host());
        published
    }
}

/// Puts a manifest of any type at `name`, `repository:tag`; what it names is there already.
pub fn put_manifest(registry: &Registry, name: &str, media_type: &str, manifest: impl AsRef<[u8]>) {
    let dir = super::scratch("manifest");
    let file = dir.path().join("manifest");
    fs::write(&file, manifest).unwrap();
    let (repository, tag) = name.split_once(':').unwrap();
    let header = format!("Content-Type: {media_type}");
    let data = format!("@{}", file.display());
    let url = format!("http://{}/v2/{repository}/manifests/{tag}", registry.host());
    let args = ["-sS", "--fail", "-X", "PUT", "-H", &header];
    let args = args.into_iter().chain(["--data-binary", &data, &url]);
    super::process::run("curl", args).ok();
}

fn blob_path(layout: &Path, digest: &str) -> PathBuf {
    layout
        .join("blobs/sha256")
        .join(digest.strip_prefix("sha256:").unwrap())
}

fn store(layout: &Path, bytes: &[u8]) -> String {
    let digest = content::digest(bytes);
    fs::write(blob_path(layout, &digest), bytes).unwrap();
    digest
}

/// A tar archive of regular files.
pub fn tar<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, bytes) in files {
        tar_entry(&mut archive, name, b'0', "", bytes.len() as u64, bytes);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// Appends one ustar entry, whatever its name, kind and announced size (POSIX.1-2017, pax, "ustar Interchange Format").
pub fn tar_entry(archive: &mut Vec<u8>, name: &str, kind: u8, link: &str, size: u64, bytes: &[u8]) {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        // GNU's base-256 form.
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..148].copy_from_slice(b"14670000000\0");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive.extend_from_slice(&header);
    archive.extend_from_slice(bytes);
    archive.resize(archive.len().next_multiple_of(512), 0);
}
