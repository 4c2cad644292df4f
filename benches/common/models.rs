//! The models that are served: made of pseudo-random bytes, packaged, and laid out as nginx serves them.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use ocifs::base::Hasher;
use serde_json::{Value, json};

use super::machine;
use super::servers::{Server, run};

/// A weight file, or a tar that holds some.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    /// The name of its file in the model, or of the tar.
    pub(crate) name: String,
    pub(crate) digest: String,
    pub(crate) size: u64,
}

/// An artifact `bench/<name>:v1`. Its files go when it is dropped.
#[derive(Debug)]
pub(crate) struct Model {
    name: &'static str,
    dir: PathBuf,
    /// Files of at least 1 MiB, in the order of the layers.
    pub(crate) blobs: Vec<Blob>,
}

impl Model {
    /// `shards` safetensors files of `size` bytes together. Several come with an index, so that nobody has to read their headers
    /// to list them.
    pub(crate) fn safetensors(dir: &Path, name: &'static str, shards: usize, size: u64) -> Self {
        let model = Self::begin(dir, name);
        let plain = model.plain();
        let shard_size = size / shards as u64;
        let mut index = serde_json::Map::new();
        for shard in 1..=shards {
            let file = match shards {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{shard:05}-of-{shards:05}.safetensors"),
            };
            for tensor in write_weights(&plain.join(&file), shard as u64, shard_size) {
                index.insert(tensor, json!(file));
            }
        }
        if shards > 1 {
            let index = json!({ "metadata": { "total_size": size }, "weight_map": index });
            let file = plain.join("model.safetensors.index.json");
            fs::write(file, index.to_string()).unwrap();
        }
        model.package()
    }

    /// Whatever files `write` makes in the directory that it is given.
    pub(crate) fn of_files(dir: &Path, name: &'static str, write: impl FnOnce(&Path)) -> Self {
        let model = Self::begin(dir, name);
        write(&model.plain());
        model.package()
    }

    /// One safetensors file of about `size` bytes in an uncompressed tar layer, as ModelPack has it.
    pub(crate) fn in_a_tar(dir: &Path, name: &'static str, size: u64) -> Self {
        let model = Self::begin(dir, name);
        let weights = model.plain().join("model.safetensors");
        write_weights(&weights, 1, size);
        let tar = model.dir.join("weights.tar");
        let mut builder = tar::Builder::new(BufWriter::new(File::create(&tar).unwrap()));
        builder
            .append_path_with_name(&weights, "model.safetensors")
            .unwrap();
        builder.into_inner().unwrap().flush().unwrap();
        model.modelpack("weight", &tar)
    }

    /// A small weight file's worth of `count` small files in folders of a hundred, in a tar layer.
    pub(crate) fn of_many_files(dir: &Path, name: &'static str, count: usize) -> Self {
        let model = Self::begin(dir, name);
        let tar = model.dir.join("files.tar");
        let mut builder = tar::Builder::new(BufWriter::new(File::create(&tar).unwrap()));
        for at in 0..count {
            let path = format!("part-{:03}/vocabulary-{at:05}.json", at / 100);
            let content = format!("{{\"part\":{at}}}\n");
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder
                .append_data(&mut header, &path, content.as_bytes())
                .unwrap();
            let plain = model.plain().join(path);
            fs::create_dir_all(plain.parent().unwrap()).unwrap();
            fs::write(plain, content).unwrap();
        }
        builder.into_inner().unwrap().flush().unwrap();
        model.modelpack("doc", &tar)
    }

    fn begin(dir: &Path, name: &'static str) -> Self {
        let model = Self {
            name,
            dir: dir.join(name),
            blobs: Vec::new(),
        };
        fs::create_dir_all(model.plain()).unwrap();
        for sub in ["manifests", "blobs"] {
            fs::create_dir_all(model.published().join(sub)).unwrap();
        }
        model
    }

    /// Its files as an ordinary directory, which is also what the peers are served.
    pub(crate) fn plain(&self) -> PathBuf {
        self.www().join("plain")
    }

    /// What a server serves: the distribution API below `v2/`, ordinary files below `plain/`.
    pub(crate) fn www(&self) -> PathBuf {
        self.dir.join("www")
    }

    fn published(&self) -> PathBuf {
        self.www().join(format!("v2/bench/{}", self.name))
    }

    /// Its reference without the host.
    pub(crate) fn reference(&self) -> String {
        format!("bench/{}:v1", self.name)
    }

    /// Where a blob is on every registry.
    pub(crate) fn path(&self, blob: &Blob) -> String {
        format!("/v2/bench/{}/blobs/{}", self.name, blob.digest)
    }

    /// The bytes of all its blobs.
    pub(crate) fn size(&self) -> u64 {
        self.blobs.iter().map(|blob| blob.size).sum()
    }

    /// Brings what is served into the page cache.
    pub(crate) fn warm(&self) {
        for blob in &self.blobs {
            machine::warm(&self.published().join("blobs").join(&blob.digest));
        }
    }

    /// Uploads it to a registry.
    pub(crate) fn push(&self, server: &Server) {
        let reference = format!("{}/{}", server.address, self.reference());
        run(Command::new(env!("CARGO_BIN_EXE_ocifs"))
            .arg("push")
            .arg(self.plain())
            .arg(reference));
    }

    /// Packages the plain files with the binary itself.
    fn package(mut self) -> Self {
        let layout = self.dir.join("layout");
        run(Command::new(env!("CARGO_BIN_EXE_ocifs"))
            .arg("push")
            .arg(self.plain())
            .arg(format!("oci:{}:{}", layout.display(), self.reference())));
        let index: Value =
            serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let blobs = layout.join("blobs/sha256");
        let manifest = fs::read(blobs.join(digest.trim_start_matches("sha256:"))).unwrap();
        for entry in fs::read_dir(&blobs).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("sha256:{}", path.file_name().unwrap().to_str().unwrap());
            fs::rename(&path, self.published().join("blobs").join(name)).unwrap();
        }
        fs::remove_dir_all(layout).unwrap();
        let parsed: Value = serde_json::from_slice(&manifest).unwrap();
        for layer in parsed["layers"].as_array().unwrap() {
            let blob = Blob {
                name: layer["annotations"]["org.cncf.model.filepath"]
                    .as_str()
                    .unwrap()
                    .to_owned(),
                digest: layer["digest"].as_str().unwrap().to_owned(),
                size: layer["size"].as_u64().unwrap(),
            };
            // One copy on the disk and in the page cache serves as blob and as plain file.
            let plain = self.plain().join(&blob.name);
            fs::remove_file(&plain).unwrap();
            let published = self.published().join("blobs").join(&blob.digest);
            fs::hard_link(published, plain).unwrap();
            if blob.size >= 1 << 20 {
                self.blobs.push(blob);
            }
        }
        self.tag(&manifest, digest);
        self
    }

    /// A ModelPack artifact of one tar layer.
    fn modelpack(mut self, kind: &str, tar: &Path) -> Self {
        let layer = self.add_blob(tar);
        let config = self.dir.join("config");
        fs::write(
            &config,
            json!({ "descriptor": {}, "modelfs": {} }).to_string(),
        )
        .unwrap();
        let config = self.add_blob(&config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.cncf.model.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.cncf.model.config.v1+json",
                "digest": config.digest,
                "size": config.size,
            },
            "layers": [{
                "mediaType": format!("application/vnd.cncf.model.{kind}.v1.tar"),
                "digest": layer.digest,
                "size": layer.size,
            }],
        });
        let manifest = manifest.to_string().into_bytes();
        self.tag(&manifest, &digest(&manifest));
        self.blobs.push(layer);
        self
    }

    /// Moves a file to where blobs are published.
    fn add_blob(&self, file: &Path) -> Blob {
        let content = fs::read(file).unwrap();
        let digest = digest(&content);
        fs::rename(file, self.published().join("blobs").join(&digest)).unwrap();
        Blob {
            name: file.file_name().unwrap().to_str().unwrap().to_owned(),
            digest,
            size: content.len() as u64,
        }
    }

    fn tag(&self, manifest: &[u8], digest: &str) {
        for name in ["v1", digest] {
            fs::write(self.published().join("manifests").join(name), manifest).unwrap();
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn digest(content: &[u8]) -> String {
    let mut hasher = Hasher::new();
    hasher.update(content);
    hasher.finish().to_string()
}

/// Writes a safetensors file of at most `size` bytes of tensors, each of up to 16 MiB of pseudo-random numbers; returns their names.
fn write_weights(path: &Path, seed: u64, size: u64) -> Vec<String> {
    const TENSOR: u64 = 16 << 20;
    let mut header = serde_json::Map::new();
    let mut names = Vec::new();
    let mut end = 0;
    while end < size {
        let (start, length) = (end, TENSOR.min(size - end) & !1);
        end = start + length;
        let name = format!("layers.{seed:02}.{:03}.weight", names.len());
        let tensor = json!({ "dtype": "F16", "shape": [length / 2], "data_offsets": [start, end] });
        header.insert(name.clone(), tensor);
        names.push(name);
    }
    let header = Value::Object(header).to_string();
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).unwrap());
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(header.as_bytes()).unwrap();
    let mut state = 0x2545_F491_4F6C_DD1D_u64 ^ (seed << 32);
    for _ in 0..end / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes()).unwrap();
    }
    out.write_all(&vec![0; (end % 8) as usize]).unwrap();
    out.flush().unwrap();
    names
}
