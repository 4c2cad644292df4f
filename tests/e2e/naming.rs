//! What an artifact looks like as a directory: every packaging convention, one flat tree with the right names.

use serde_json::Value;

use crate::support::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_LICENSE, DOCKER_SAFETENSORS, Layer, tar,
};
use crate::support::content::{Content, Tensor, write_safetensors};
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::registry::Registry;
use crate::support::scratch;

/// Publishes an artifact and mounts it: the directory's path below the root.
fn mounted(artifact: &Artifact) -> (Registry, tempfile::TempDir, Mount, String) {
    let registry = Registry::open();
    let published = artifact.publish(&registry, "org/m:v1");
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    (registry, cache, mount, published.reference)
}

#[test]
fn docker_v01_with_names_is_the_source_directory() {
    let model = SampleModel::new(1);
    let (_registry, _cache, mount, reference) = mounted(&model.docker_v01(true));
    assert_same_files(&mount.files(&reference), &model.v01_files());
}

#[test]
fn docker_v01_without_names_gets_them_from_the_packaged_index() {
    let model = SampleModel::new(2);
    let (_registry, _cache, mount, reference) = mounted(&model.docker_v01(false));
    assert_same_files(&mount.files(&reference), &model.v01_files());
}

#[test]
fn names_from_an_index_are_proved_by_the_headers_not_by_the_order() {
    // The same shards, in the opposite order of what the index's names suggest.
    let model = SampleModel::new(3);
    let files = model.v01_files();
    let shards = (1..=3).rev().map(|shard| {
        let name = format!("model-0000{shard}-of-00003.safetensors");
        Layer::file(DOCKER_SAFETENSORS, model.path().join(name))
    });
    let others = files
        .iter()
        .filter(|(name, _)| !name.ends_with(".safetensors"));
    let archive = tar(others.map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    let artifact = Artifact::docker_v01()
        .layers(shards)
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive));
    let (_registry, _cache, mount, reference) = mounted(&artifact);
    assert_same_files(&mount.files(&reference), &files);
}

#[test]
fn a_nameless_shard_that_the_index_does_not_know_takes_no_name_of_it() {
    // A `consolidated.safetensors` sorts before the shards; its tensors are none of the index's.
    let model = SampleModel::new(4);
    let dir = scratch("consolidated");
    let odd = dir.path().join("consolidated.safetensors");
    write_safetensors(
        &odd,
        &[Tensor {
            name: "all.of.it".to_owned(),
            size: 4000,
        }],
        Content::new(44),
    );
    let files = model.v01_files();
    let shards = files.keys().filter(|name| name.ends_with(".safetensors"));
    let others = files
        .iter()
        .filter(|(name, _)| !name.ends_with(".safetensors"));
    let archive = tar(others.map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    let artifact = Artifact::docker_v01()
        .layer(Layer::file(DOCKER_SAFETENSORS, &odd))
        .layers(shards.map(|name| Layer::file(DOCKER_SAFETENSORS, model.path().join(name))))
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive));
    let (_registry, _cache, mount, reference) = mounted(&artifact);
    let found = mount.files(&reference);
    for (name, bytes) in &files {
        assert!(found.get(name) == Some(bytes), "{name}");
    }
    // Where it went is for the tree to decide; nothing is dropped.
    let wanted = std::fs::read(&odd).unwrap();
    let oci = mount.list(&format!("{reference}/.oci"));
    let hidden = if oci.contains(&"blobs".to_owned()) {
        mount.list(&format!("{reference}/.oci/blobs"))
    } else {
        vec![]
    };
    let shown = found.values().any(|bytes| *bytes == wanted);
    assert!(
        shown || hidden.len() == 1,
        "the odd shard is neither among {:?} nor {hidden:?}",
        found.keys()
    );
}

#[test]
fn a_single_nameless_layer_is_model_safetensors() {
    let model = SampleModel::new(5);
    let shard = model.path().join("model-00001-of-00003.safetensors");
    let archive = tar([("config.json", b"{}".as_slice())]);
    let artifact = Artifact::docker_v01()
        .layer(Layer::file(DOCKER_SAFETENSORS, &shard))
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive));
    let (_registry, _cache, mount, reference) = mounted(&artifact);
    let found = mount.files(&reference);
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        ["config.json", "model.safetensors"]
    );
    assert!(found["model.safetensors"] == std::fs::read(&shard).unwrap());
}

#[test]
fn an_index_is_made_for_shards_that_came_without_one() {
    let model = SampleModel::new(6);
    let names = |files: &crate::support::model::Files| {
        files
            .keys()
            .filter(|name| name.ends_with(".safetensors"))
            .cloned()
            .collect::<Vec<_>>()
    };
    let source = model.v01_files();
    let wanted: Value = serde_json::from_slice(&source["model.safetensors.index.json"]).unwrap();
    for named in [true, false] {
        let layers = names(&source).into_iter().map(|name| {
            let layer = Layer::file(DOCKER_SAFETENSORS, model.path().join(&name));
            if named { layer.at(&name) } else { layer }
        });
        let archive = tar([("config.json", b"{}".as_slice())]);
        let artifact = Artifact::docker_v01()
            .layers(layers)
            .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive));
        let (_registry, _cache, mount, reference) = mounted(&artifact);
        let found = mount.files(&reference);
        assert_eq!(names(&found), names(&source), "named: {named}");
        let index: Value = serde_json::from_slice(&found["model.safetensors.index.json"]).unwrap();
        assert_eq!(index["weight_map"], wanted["weight_map"], "named: {named}");
        assert_eq!(
            index["metadata"]["total_size"], wanted["metadata"]["total_size"],
            "named: {named}"
        );
    }
}

#[test]
fn docker_v02_and_both_spellings_of_modelpack_keep_their_folders() {
    let model = SampleModel::new(7);
    let registry = Registry::open();
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    for (tag, artifact) in [
        ("v02", model.docker_v02()),
        ("cncf", model.modelpack("cncf")),
        ("cnai", model.modelpack("cnai")),
    ] {
        let published = artifact.publish(&registry, &format!("org/m:{tag}"));
        assert_same_files(&mount.files(&published.reference), model.files());
    }
}

#[test]
fn layers_of_unknown_type_are_shown_by_digest_and_never_dropped() {
    let model = SampleModel::new(8);
    let artifact = model
        .docker_v01(true)
        .layer(Layer::bytes(DOCKER_LICENSE, "All rights given."))
        .layer(Layer::bytes(
            "application/vnd.example.unheard-of",
            "a secret recipe",
        ));
    let (_registry, _cache, mount, reference) = mounted(&artifact);
    let blobs = format!("{reference}/.oci/blobs");
    let unknown = mount
        .list(&blobs)
        .into_iter()
        .find(|name| mount.read(&format!("{blobs}/{name}")) == b"a secret recipe");
    let unknown = unknown.expect("the unknown layer is under .oci/blobs");
    assert_eq!(unknown, crate::support::content::digest(b"a secret recipe"));
    let licence = b"All rights given.".to_vec();
    assert!(
        mount
            .files(&reference)
            .values()
            .any(|bytes| *bytes == licence),
        "the licence is a file"
    );
}

#[test]
fn an_artifact_without_any_usable_file_says_so() {
    let artifact = Artifact::new("application/vnd.example.config", &serde_json::json!({})).layer(
        Layer::bytes(
            "application/vnd.example.unheard-of",
            "nothing that an engine could read",
        ),
    );
    let (_registry, cache, mount, reference) = mounted(&artifact);
    // What there is can be looked into, and nothing stands in the way of a crawler.
    assert_eq!(
        mount.try_list(&reference).expect("it is a directory"),
        [".oci"]
    );
    let (repository, _) = reference.rsplit_once(':').unwrap();
    let around = mount.path(repository.rsplit_once('/').unwrap().0);
    let found = std::process::Command::new("find")
        .arg(around)
        .output()
        .unwrap();
    assert!(found.status.success(), "{found:?}");
    let said = String::from_utf8_lossy(&found.stdout);
    assert!(said.contains(":v1/.oci/blobs/sha256:"), "{said}");
    let output = run_ocifs([
        "inspect",
        "--cache-dir",
        cache.path().to_str().unwrap(),
        &reference,
    ]);
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        output.stderr
    )
    .to_lowercase();
    assert!(said.contains("no ") && said.contains("file"), "{said}");
}

#[test]
fn inspect_shows_files_and_tensors_from_the_headers_alone() {
    let model = SampleModel::new(9);
    let registry = Registry::open();
    let proxy = crate::support::proxy::Proxy::start(registry.address());
    let published = model.docker_v02().publish(&registry, "org/m:v1");
    let cache = scratch("cache");
    let reference = format!("{}/org/m:v1", proxy.host());
    let output = run_ocifs([
        "inspect",
        "--json",
        "--tensors",
        "--cache-dir",
        cache.path().to_str().unwrap(),
        &reference,
    ])
    .ok();
    let shown: Value = serde_json::from_str(&output).expect("--json prints JSON");
    let text = shown.to_string();
    assert!(text.contains(&published.digest), "the artifact's digest");
    for name in model.files().keys() {
        assert!(text.contains(name.as_str()), "{name}");
    }
    for tensor in ["layers.1.part0", "layers.3.part2", "F32"] {
        assert!(text.contains(tensor), "{tensor}");
    }
    proxy.settle();
    let weights: u64 = model
        .files()
        .iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .map(|(_, b)| b.len() as u64)
        .sum();
    assert!(
        proxy.sent("/blobs/") < weights / 2,
        "{} bytes were sent",
        proxy.sent("/blobs/")
    );
}
