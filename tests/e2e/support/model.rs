//! A small model directory, and the artifacts that packagers make of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_FILE, DOCKER_LICENSE, DOCKER_SAFETENSORS, Layer, tar,
};
use super::content::{Content, Tensor, write_safetensors};

/// Files by path, as a directory should show them.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A model directory with three shards and their index, tokenizer files, a licence and a folder.
pub struct SampleModel {
    dir: TempDir,
    files: Files,
}

/// Bytes of a shard's tensors.
const TENSOR: u64 = 100_000;

impl SampleModel {
    /// Equal seeds make equal weights.
    pub fn new(seed: u64) -> Self {
        let dir = super::scratch("model");
        let mut weight_map = serde_json::Map::new();
        for shard in 1..=3 {
            let name = format!("model-0000{shard}-of-00003.safetensors");
            let tensors: Vec<Tensor> = (0..shard)
                .map(|index| Tensor {
                    name: format!("layers.{shard}.part{index}"),
                    size: TENSOR * (index + 1),
                })
                .collect();
            write_safetensors(
                &dir.path().join(&name),
                &tensors,
                Content::new(seed * 100 + shard),
            );
            for tensor in tensors {
                weight_map.insert(tensor.name, name.clone().into());
            }
        }
        let index =
            serde_json::json!({"metadata": {"total_size": TENSOR * 10}, "weight_map": weight_map});
        fs::create_dir_all(dir.path().join("onnx/deep")).unwrap();
        for (name, text) in [
            (
                "config.json",
                format!(r#"{{"architectures": ["LlamaForCausalLM"], "seed": {seed}}}"#),
            ),
            ("generation_config.json", "{}".to_owned()),
            ("model.safetensors.index.json", index.to_string()),
            (
                "tokenizer.json",
                format!(r#"{{"version": "1.0", "model": "{}"}}"#, "x".repeat(70_000)),
            ),
            ("merges.txt", "#version: 0.2\na b\n".to_owned()),
            ("LICENSE", "Do as you like.\n".to_owned()),
            ("onnx/deep/model.onnx", "o".repeat(5000)),
            ("onnx/config.json", r#"{"nested": true}"#.to_owned()),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let files = read_tree(dir.path());
        Self { dir, files }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// All files.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The files that `keep` wants.
    pub fn some(&self, keep: impl Fn(&str) -> bool) -> Files {
        self.files
            .iter()
            .filter(|(name, _)| keep(name))
            .map(|(name, bytes)| (name.clone(), bytes.clone()))
            .collect()
    }

    /// The files that [`Self::docker_v01`] packages.
    pub fn v01_files(&self) -> Files {
        self.some(|name| !name.contains('/') && name != "LICENSE")
    }

    fn layers(
        &self,
        keep: impl Fn(&str) -> bool,
        layer: impl Fn(&str, &Path) -> Layer,
    ) -> Vec<Layer> {
        self.files
            .keys()
            .filter(|name| keep(name))
            .map(|name| layer(name, &self.dir.path().join(name)))
            .collect()
    }

    /// Docker's v0.1: shards in byte order, then one tar of the other files of the top folder.
    pub fn docker_v01(&self, named: bool) -> Artifact {
        let shards = self.layers(
            |name| name.ends_with(".safetensors"),
            |name, path| {
                let layer = Layer::file(DOCKER_SAFETENSORS, path);
                if named { layer.at(name) } else { layer }
            },
        );
        let others = self.some(|name| {
            !name.contains('/') && name != "LICENSE" && !name.ends_with(".safetensors")
        });
        let archive = tar(others
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
        Artifact::docker_v01()
            .layers(shards)
            .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive))
    }

    /// Docker's v0.2: a layer a file, folders kept.
    pub fn docker_v02(&self) -> Artifact {
        let layers = self.layers(
            |_| true,
            |name, path| {
                let media_type = match name {
                    "LICENSE" => DOCKER_LICENSE,
                    _ if name.ends_with(".safetensors") => DOCKER_SAFETENSORS,
                    _ => DOCKER_FILE,
                };
                Layer::file(media_type, path).at(name)
            },
        );
        Artifact::docker_v02().layers(layers)
    }

    /// ModelPack's raw layers; `spelling` is `cncf` or `cnai`.
    pub fn modelpack(&self, spelling: &str) -> Artifact {
        let layers = self.layers(
            |_| true,
            |name, path| {
                let kind = match name {
                    "LICENSE" => "doc",
                    _ if name.ends_with(".safetensors") => "weight",
                    _ => "weight.config",
                };
                Layer::file(
                    &format!("application/vnd.{spelling}.model.{kind}.v1.raw"),
                    path,
                )
                .annotated(&format!("org.{spelling}.model.filepath"), name)
            },
        );
        Artifact::modelpack(spelling).layers(layers)
    }
}

/// Every file below a directory, but for `.oci` at its top. Anything but files and directories is a failure.
pub fn read_tree(root: &Path) -> Files {
    let mut files = Files::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(root.join(&folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
        for entry in entries {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().expect("names are UTF-8");
            if folder.is_empty() && name == ".oci" {
                continue;
            }
            let path = if folder.is_empty() {
                name
            } else {
                format!("{folder}/{name}")
            };
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(path);
            } else {
                assert!(kind.is_file(), "{path} is neither a file nor a directory");
                let bytes =
                    fs::read(entry.path()).unwrap_or_else(|error| panic!("{path}: {error}"));
                files.insert(path, bytes);
            }
        }
    }
    files
}

/// Compares names and bytes, and says which differ rather than printing megabytes.
#[track_caller]
pub fn assert_same_files(found: &Files, wanted: &Files) {
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(wanted));
    for (name, bytes) in wanted {
        let other = &found[name];
        let first = bytes.iter().zip(other).position(|(a, b)| a != b);
        assert!(
            bytes == other,
            "{name}: {} bytes, should be {}; first difference at {first:?}",
            other.len(),
            bytes.len()
        );
    }
}
