//! End-to-end tests of building: hand-written manifests and blobs behind a fetcher in memory.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

use serde_json::{Value, json};

use super::*;
use crate::base::ByteRange;
use crate::blob::BlobError;
use crate::model::inflate::Compression;
use crate::model::safetensors::file_for_tests as safetensors_file;
use crate::model::tar::Listing;
use crate::model::weights::FIRST_READ;

/// Where blobs and manifests are, and what of them was asked for.
#[derive(Default)]
struct Memory {
    content: HashMap<Digest, Bytes>,
    /// Bytes by peeks of each blob that is not complete.
    peeked: Mutex<HashMap<Digest, u64>>,
    completed: Mutex<BTreeSet<Digest>>,
    notes: Mutex<HashMap<Digest, Vec<u8>>>,
    /// Nothing can be completed.
    is_full: bool,
}

impl Fetch for Memory {
    fn what(&self, digest: &Digest) -> String {
        format!("example.com/model@{digest}")
    }

    async fn manifest(&self, digest: Digest) -> Result<(Bytes, String), ModelError> {
        self.bytes(digest).map(|bytes| (bytes, String::new()))
    }

    async fn complete(&self, blob: BlobId) -> Result<bool, ModelError> {
        self.bytes(blob.digest)?;
        if !self.is_full {
            self.completed.lock().unwrap().insert(blob.digest);
        }
        Ok(!self.is_full)
    }

    async fn peek(&self, blob: BlobId, range: ByteRange) -> Result<Bytes, ModelError> {
        tokio::task::yield_now().await;
        let bytes = self.bytes(blob.digest)?;
        assert!(
            !range.is_empty() && range.end() <= blob.size,
            "{range} of {}",
            blob.size
        );
        if !self.completed.lock().unwrap().contains(&blob.digest) {
            *self.peeked.lock().unwrap().entry(blob.digest).or_insert(0) += range.len();
        }
        Ok(bytes.slice(range.start() as usize..range.end() as usize))
    }

    async fn unpack(&self, layer: &Descriptor) -> Result<u64, ModelError> {
        Ok(self.uncompressed(layer)?.len() as u64)
    }

    async fn peek_unpacked(
        &self,
        layer: &Descriptor,
        range: ByteRange,
    ) -> Result<Bytes, ModelError> {
        let bytes = self.uncompressed(layer)?;
        Ok(bytes.slice(range.start() as usize..range.end() as usize))
    }

    async fn recall(&self, layer: &Descriptor) -> Option<Listing> {
        let note = self.notes.lock().unwrap().get(&layer.digest).cloned()?;
        Some(Listing::from_note(&note).unwrap())
    }

    async fn remember(&self, layer: &Digest, listing: &Listing) {
        let note = listing.to_note().unwrap();
        self.notes.lock().unwrap().insert(*layer, note);
    }
}

impl Memory {
    fn uncompressed(&self, layer: &Descriptor) -> Result<Bytes, ModelError> {
        let bytes = self.bytes(layer.digest)?;
        let unpacked = Compression::of(&bytes)
            .map(|format| crate::model::inflate::whole(format, &bytes, 1 << 30))
            .and_then(Result::ok);
        unpacked.map(Bytes::from).ok_or_else(|| ModelError::Blob {
            reference: self.what(&layer.digest),
            source: BlobError::Undecodable {
                digest: layer.digest,
                reason: "it cannot be decompressed".into(),
                lasting: true,
            },
        })
    }

    fn bytes(&self, digest: Digest) -> Result<Bytes, ModelError> {
        self.content
            .get(&digest)
            .cloned()
            .ok_or_else(|| ModelError::Offline {
                reference: digest.to_string(),
            })
    }

    fn add(&mut self, content: impl Into<Bytes>) -> Digest {
        let content = content.into();
        let digest = Digest::of(&content);
        self.content.insert(digest, content);
        digest
    }

    /// Adds a layer and gives its descriptor.
    fn layer(
        &mut self,
        media_type: &str,
        path: Option<(&str, &str)>,
        content: impl Into<Bytes>,
    ) -> Value {
        let content = content.into();
        let mut layer =
            json!({"mediaType": media_type, "size": content.len(), "digest": self.add(content)});
        if let Some((key, path)) = path {
            layer["annotations"] = json!({key: path});
        }
        layer
    }

    fn manifest_of(&mut self, config_type: &str, config: &'static str, layers: &[Value]) -> Digest {
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": config_type, "digest": self.add(config), "size": config.len()},
            "layers": layers,
        });
        self.add(manifest.to_string())
    }

    fn peeked(&self, content: &[u8]) -> u64 {
        self.peeked
            .lock()
            .unwrap()
            .get(&Digest::of(content))
            .copied()
            .unwrap_or(0)
    }

    /// The content of a file, as a reader would see it.
    fn read(&self, plan: &Plan, path: &str) -> Bytes {
        let file = plan
            .files
            .iter()
            .chain(&plan.oci)
            .find(|file| file.path == path)
            .unwrap_or_else(|| panic!("{path}"));
        match &file.source {
            Source::Made(bytes) => bytes.clone(),
            Source::Layer { layer, offset } => {
                let blob = &self.content[&plan.manifest.layers[*layer].digest];
                blob.slice(*offset as usize..(*offset + file.size) as usize)
            }
            Source::Unpacked { layer, offset } => {
                let bytes = self.uncompressed(&plan.manifest.layers[*layer]).unwrap();
                bytes.slice(*offset as usize..(*offset + file.size) as usize)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn tar_file(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn paths(files: &[PlannedFile]) -> Vec<&str> {
    files.iter().map(|file| file.path.as_str()).collect()
}

const V01: &str = "application/vnd.docker.ai.model.config.v0.1+json";
const V02: &str = "application/vnd.docker.ai.model.config.v0.2+json";
const SHARD: &str = "application/vnd.docker.ai.safetensors";
const CONFIG_TAR: &str = "application/vnd.docker.ai.vllm.config.tar";
const FILEPATH: &str = "org.cncf.model.filepath";
const CREATED: &str =
    r#"{"config":{"format":"safetensors"},"descriptor":{"created":"2025-10-03T01:02:03Z"}}"#;

/// Two shards of some size, so that reading a weight would show.
fn shards() -> [Vec<u8>; 2] {
    [
        safetensors_file(&[("a", 300_000), ("b", 5)]),
        safetensors_file(&[("c", 400_000)]),
    ]
}

fn index() -> Vec<u8> {
    let map = json!({"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"});
    json!({"metadata": {"total_size": 700_005}, "weight_map": map})
        .to_string()
        .into_bytes()
}

#[tokio::test]
async fn nameless_shards_get_the_names_of_the_index_in_the_config_tar() {
    let [one, two] = shards();
    let tar = tar_file(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", &index()),
    ]);
    // In layer order, against it, and after a file that the index does not know.
    let consolidated = safetensors_file(&[("everything", 9)]);
    for weights in [
        vec![&one, &two],
        vec![&two, &one],
        vec![&consolidated, &one, &two],
    ] {
        let mut memory = Memory::default();
        let mut layers: Vec<Value> = weights
            .iter()
            .map(|bytes| memory.layer(SHARD, None, (*bytes).clone()))
            .collect();
        layers.push(memory.layer(CONFIG_TAR, None, tar.clone()));
        let digest = memory.manifest_of(V01, CREATED, &layers);
        let plan = build(&memory, digest, Part::All).await.unwrap();
        assert_eq!(memory.read(&plan, "model-00001-of-00002.safetensors"), one);
        assert_eq!(memory.read(&plan, "model-00002-of-00002.safetensors"), two);
        assert_eq!(memory.read(&plan, "model.safetensors.index.json"), index());
        assert_eq!(memory.read(&plan, "config.json"), "{}");
        assert_eq!(plan.files.len(), weights.len() + 2);
        assert_eq!(plan.notes.len(), weights.len() - 2, "{:?}", plan.notes);
        assert_eq!(plan.problem, None);
        assert_eq!(plan.packaging, "Docker model v0.1");
        assert_eq!(
            plan.created
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap()
                .as_secs(),
            1_759_453_323
        );
        assert_eq!(paths(&plan.oci), ["config.json", "manifest.json"]);
        assert_eq!(memory.read(&plan, "manifest.json"), memory.content[&digest]);
        assert!(memory.peeked(&one) <= FIRST_READ && memory.peeked(&two) <= FIRST_READ);
    }
}

#[tokio::test]
async fn nameless_shards_without_an_index_get_plain_names_and_an_index() {
    let [one, two] = shards();
    let mut memory = Memory::default();
    let layers = [
        memory.layer(SHARD, None, one),
        memory.layer(SHARD, None, two),
        memory.layer(CONFIG_TAR, None, tar_file(&[("config.json", b"{}")])),
        memory.layer("application/vnd.docker.ai.license", None, "MIT"),
    ];
    let digest = memory.manifest_of(V01, CREATED, &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    let expected = [
        "LICENSE",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ];
    assert_eq!(paths(&plan.files), expected);
    let made: Value =
        serde_json::from_slice(&memory.read(&plan, "model.safetensors.index.json")).unwrap();
    assert_eq!(made, serde_json::from_slice::<Value>(&index()).unwrap());
    let file = plan.files.last().unwrap();
    assert_eq!(
        (file.digest, &file.media_type, file.size > 0),
        (None, &None, true)
    );
}

#[tokio::test]
async fn a_single_nameless_layer_needs_no_header() {
    let mut memory = Memory::default();
    let [one, _] = shards();
    let layers = [memory.layer(SHARD, None, one.clone())];
    let digest = memory.manifest_of(V01, "{}", &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert_eq!(paths(&plan.files), ["model.safetensors"]);
    assert_eq!(memory.peeked(&one), 0);
    assert_eq!(plan.created, SystemTime::UNIX_EPOCH);
}

#[tokio::test]
async fn named_layers_keep_their_names_and_are_not_looked_into() {
    let [one, two] = shards();
    let mut memory = Memory::default();
    let tar = tar_file(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", &index()),
    ]);
    let layers = [
        memory.layer(
            SHARD,
            Some((FILEPATH, "model-00001-of-00002.safetensors")),
            one.clone(),
        ),
        memory.layer(
            SHARD,
            Some((FILEPATH, "model-00002-of-00002.safetensors")),
            two.clone(),
        ),
        memory.layer(CONFIG_TAR, None, tar),
    ];
    let digest = memory.manifest_of(V01, "{}", &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert_eq!(memory.read(&plan, "model-00002-of-00002.safetensors"), two);
    assert_eq!((memory.peeked(&one), memory.peeked(&two)), (0, 0));
    assert!(plan.notes.is_empty());
}

#[tokio::test]
async fn v02_and_both_spellings_of_modelpack_keep_nested_paths() {
    let [one, two] = shards();
    for (config, weight, other, key, name) in [
        (
            V02,
            SHARD,
            "application/vnd.docker.ai.model.file",
            FILEPATH,
            "Docker model",
        ),
        (
            "application/vnd.cncf.model.config.v1+json",
            "application/vnd.cncf.model.weight.v1.raw",
            "application/vnd.cncf.model.weight.config.v1.raw",
            FILEPATH,
            "ModelPack",
        ),
        (
            "application/vnd.cnai.model.config.v1+json",
            "application/vnd.cnai.model.weight.v1.raw",
            "application/vnd.cnai.model.doc.v1.raw",
            "org.cnai.model.filepath",
            "ModelPack",
        ),
    ] {
        let mut memory = Memory::default();
        let layers = [
            memory.layer(weight, Some((key, "x-1.safetensors")), one.clone()),
            memory.layer(weight, Some((key, "x-2.safetensors")), two.clone()),
            memory.layer(
                weight,
                Some((key, "text_encoder/model.safetensors")),
                two.clone(),
            ),
            memory.layer(other, Some((key, "../shared/config.json")), "{}"),
            memory.layer(other, Some((key, "/etc/passwd")), "root"),
            memory.layer(other, None, "no name"),
            memory.layer(other, Some((key, "shared")), "a file where a directory is"),
        ];
        let digest = memory.manifest_of(config, "{}", &layers);
        let plan = build(&memory, digest, Part::All).await.unwrap();
        assert_eq!(plan.packaging, name);
        let expected = [
            "model.safetensors.index.json",
            "shared/config.json",
            "text_encoder/model.safetensors",
            "x-1.safetensors",
            "x-2.safetensors",
        ];
        assert_eq!(paths(&plan.files), expected);
        assert_eq!(plan.notes.len(), 3, "{:?}", plan.notes);
        for content in ["root", "no name", "a file where a directory is"] {
            let path = format!("blobs/{}", Digest::of(content.as_bytes()));
            assert_eq!(memory.read(&plan, &path), content);
        }
        let made: Value =
            serde_json::from_slice(&memory.read(&plan, "model.safetensors.index.json")).unwrap();
        assert_eq!(
            made["weight_map"],
            json!({"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"})
        );
    }
}

#[tokio::test]
async fn members_of_weight_tars_are_found_by_small_ranges() {
    let [one, two] = shards();
    let mut memory = Memory::default();
    let tar = "application/vnd.cncf.model.weight.v1.tar";
    let (first, second) = (
        tar_file(&[("m-1.safetensors", &one)]),
        tar_file(&[("m-2.safetensors", &two), ("d/x", b"x")]),
    );
    let layers = [
        memory.layer(tar, None, first.clone()),
        memory.layer(tar, Some((FILEPATH, "ignored")), second),
    ];
    let digest = memory.manifest_of("application/vnd.cncf.model.config.v1+json", "{}", &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert_eq!(
        paths(&plan.files),
        [
            "d/x",
            "m-1.safetensors",
            "m-2.safetensors",
            "model.safetensors.index.json"
        ]
    );
    assert_eq!(memory.read(&plan, "m-2.safetensors"), two);
    assert_eq!(memory.read(&plan, "d/x"), "x");
    assert!(
        memory.peeked(&first) <= 4 * FIRST_READ,
        "{}",
        memory.peeked(&first)
    );
}

#[tokio::test]
async fn what_has_no_usable_file_says_so_and_can_be_inspected() {
    let mut memory = Memory::default();
    let layers = [
        memory.layer("application/vnd.example.v1", None, "one"),
        memory.layer("application/vnd.example.v1", None, "two"),
    ];
    let digest = memory.manifest_of("application/vnd.example.config.v1+json", "{}", &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert!(plan.files.is_empty());
    let problem = plan.problem.as_deref().unwrap();
    assert!(
        problem.contains("vnd.example.config.v1+json") && problem.contains("2 of type"),
        "{problem}"
    );
    assert_eq!(plan.oci.len(), 4);
    let empty = memory.manifest_of("application/vnd.oci.empty.v1+json", "{}", &[]);
    assert!(
        build(&memory, empty, Part::All)
            .await
            .unwrap()
            .problem
            .unwrap()
            .contains("no layers")
    );
}

#[tokio::test]
async fn an_index_is_followed_once() {
    let mut memory = Memory::default();
    let layer = memory.layer(
        "text/plain",
        Some(("org.opencontainers.image.title", "a.txt")),
        "hello",
    );
    let child = memory.manifest_of("application/vnd.oci.empty.v1+json", "{}", &[layer]);
    let index_of = |memory: &mut Memory, child: Digest| {
        let size = memory.content[&child].len();
        let entry = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": child, "size": size});
        memory.add(json!({"schemaVersion": 2, "manifests": [entry]}).to_string())
    };
    let index = index_of(&mut memory, child);
    let plan = build(&memory, index, Part::All).await.unwrap();
    assert_eq!((plan.digest, plan.manifest_id.digest), (index, child));
    assert_eq!(paths(&plan.files), ["a.txt"]);
    assert_eq!(
        paths(&plan.oci),
        ["config.json", "index.json", "manifest.json"]
    );
    let nested = index_of(&mut memory, index);
    assert!(matches!(
        build(&memory, nested, Part::All).await,
        Err(ModelError::Unusable { .. })
    ));
}

#[tokio::test]
async fn a_config_tar_replaces_files_openly_and_nothing_is_lost() {
    let mut memory = Memory::default();
    let layers = [
        memory.layer(
            CONFIG_TAR,
            None,
            tar_file(&[("config.json", b"1"), ("LICENSE", b"of the tar")]),
        ),
        memory.layer(
            CONFIG_TAR,
            None,
            tar_file(&[("config.json", b"2"), ("extra.json", b"3")]),
        ),
        memory.layer("application/vnd.docker.ai.license", None, "of the layer"),
        memory.layer(SHARD, None, safetensors_file(&[("a", 1)])),
    ];
    let digest = memory.manifest_of(V01, "{}", &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert_eq!(
        paths(&plan.files),
        ["LICENSE", "config.json", "extra.json", "model.safetensors"]
    );
    assert_eq!(memory.read(&plan, "config.json"), "1");
    assert_eq!(memory.read(&plan, "LICENSE"), "of the tar");
    assert_eq!(
        memory.read(&plan, &format!("blobs/{}", Digest::of(b"of the layer"))),
        "of the layer"
    );
    assert_eq!(plan.notes.len(), 2, "{:?}", plan.notes);
}

#[tokio::test]
async fn hostile_config_tars_end_soon_and_spoil_the_model_openly() {
    let member = {
        let mut header = ::tar::Header::new_gnu();
        header.set_path("x").unwrap();
        header.set_size(0);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let lie = {
        let mut header = ::tar::Header::new_gnu();
        header.set_path("config.json").unwrap();
        header.set_size(1 << 40);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    for (tar, reason) in [
        (member.repeat(200_000), "100000 members"),
        (lie, "claims bytes up to"),
        (b"\x1f\x8b compressed".to_vec(), "decompressed"),
        (vec![1; 4096], "no tar"),
    ] {
        let mut memory = Memory::default();
        let layers = [
            memory.layer(SHARD, None, safetensors_file(&[("a", 1)])),
            memory.layer(CONFIG_TAR, None, tar.clone()),
        ];
        let digest = memory.manifest_of(V01, "{}", &layers);
        let started = Instant::now();
        let plan = build(&memory, digest, Part::All).await.unwrap();
        assert!(
            plan.problem.as_deref().unwrap().contains(reason),
            "{:?}",
            plan.problem
        );
        assert_eq!(
            memory.read(&plan, &format!("blobs/{}", Digest::of(&tar))),
            tar
        );
        assert!(started.elapsed().as_secs() < 20);
    }
}

#[tokio::test]
async fn malformed_shards_are_shown_without_an_index() {
    let mut memory = Memory::default();
    let [one, _] = shards();
    let tar = tar_file(&[("model.safetensors.index.json", &index())]);
    let layers = [
        memory.layer(SHARD, None, one),
        memory.layer(SHARD, None, vec![0xff; 100]),
        memory.layer(SHARD, None, ""),
    ];
    let digest = memory.manifest_of(V01, "{}", &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert_eq!(plan.files.len(), 3);
    assert!(
        plan.notes[0].contains("no model.safetensors.index.json is made"),
        "{:?}",
        plan.notes
    );
    let with_index = [&layers[..], &[memory.layer(CONFIG_TAR, None, tar)]].concat();
    let digest = memory.manifest_of(V01, "{}", &with_index);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert!(paths(&plan.files).contains(&"model-00001-of-00002.safetensors"));
    assert!(paths(&plan.files).contains(&"model-00002-of-00003.safetensors"));
}

#[tokio::test]
async fn what_cannot_be_fetched_is_an_error_and_not_another_tree() {
    let [one, two] = shards();
    let mut memory = Memory::default();
    let layers = [
        memory.layer(SHARD, None, one),
        memory.layer(SHARD, None, two.clone()),
    ];
    let digest = memory.manifest_of(V01, "{}", &layers);
    memory.content.remove(&Digest::of(&two));
    assert!(matches!(
        build(&memory, digest, Part::All).await,
        Err(ModelError::Offline { .. })
    ));
    assert!(matches!(
        build(&memory, Digest::of(b"not there"), Part::All).await,
        Err(ModelError::Offline { .. })
    ));
    let html = memory.add("<html>");
    assert!(matches!(
        build(&memory, html, Part::All).await,
        Err(ModelError::Unusable { .. })
    ));
}

#[tokio::test]
async fn a_cache_without_room_makes_no_other_tree() {
    let [one, two] = shards();
    let mut memory = Memory {
        is_full: true,
        ..Memory::default()
    };
    let tar = tar_file(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", &index()),
    ]);
    let layers = [
        memory.layer(SHARD, None, one),
        memory.layer(SHARD, None, two),
        memory.layer(CONFIG_TAR, None, tar),
    ];
    let digest = memory.manifest_of(V01, "{}", &layers);
    let plan = build(&memory, digest, Part::All).await.unwrap();
    assert!(paths(&plan.files).contains(&"model-00002-of-00002.safetensors"));
    assert_eq!(memory.read(&plan, "config.json"), "{}");
}

#[tokio::test]
async fn many_tars_of_many_entries_end_soon() {
    let fifo = {
        let mut header = ::tar::Header::new_gnu();
        header.set_path("x").unwrap();
        header.set_entry_type(::tar::EntryType::Fifo);
        header.set_size(0);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let mut memory = Memory::default();
    let layer = memory.layer(
        "application/vnd.docker.ai.dir.tar",
        None,
        fifo.repeat(10_000),
    );
    let digest = memory.manifest_of(V01, "{}", &vec![layer; 5_000]);
    let started = Instant::now();
    let plan = build(&memory, digest, Part::All).await.unwrap();
    let problem = plan.problem.unwrap();
    assert!(problem.contains("200000"), "{problem}");
    assert!(started.elapsed().as_secs() < 60);
}
