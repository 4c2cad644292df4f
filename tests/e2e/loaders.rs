//! Real loaders on the mount: python's safetensors and transformers, against the local directory.

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_FILE, DOCKER_SAFETENSORS, Layer, tar,
};
use crate::support::model::{Files, read_tree};
use crate::support::mount::Mount;
use crate::support::python::python;
use crate::support::registry::Registry;
use crate::support::{heavy, scratch};

/// A random Llama and its tokenizer, saved by transformers in shards of at most `shard`.
pub(crate) fn llama(shard: &str) -> (TempDir, Files) {
    let dir = scratch("llama");
    python("make_llama.py", [dir.path().to_str().unwrap(), shard]).ok();
    let files = read_tree(dir.path());
    (dir, files)
}

fn is_shard(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// Docker's v0.1 with shards in byte order, with or without names, and all else in the tar.
fn docker_v01(dir: &Path, files: &Files, named: bool) -> Artifact {
    let shards = files.keys().filter(|name| is_shard(name)).map(|name| {
        let layer = Layer::file(DOCKER_SAFETENSORS, dir.join(name));
        if named { layer.at(name) } else { layer }
    });
    let others = files.iter().filter(|(name, _)| !is_shard(name));
    let archive = tar(others.map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    Artifact::docker_v01()
        .layers(shards)
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive))
}

/// A layer a file, named.
fn docker_v02(dir: &Path, files: &Files) -> Artifact {
    let layers = files.keys().map(|name| {
        Layer::file(
            if is_shard(name) {
                DOCKER_SAFETENSORS
            } else {
                DOCKER_FILE
            },
            dir.join(name),
        )
        .at(name)
    });
    Artifact::docker_v02().layers(layers)
}

/// Loads from the mount and from the source, in every way, and compares.
fn assert_loads(source: &Path, artifact: &Artifact) {
    let registry = Registry::open();
    let reference = artifact.publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    let mounted = mount.path(&reference);
    let logits = |path: &Path| -> Value {
        serde_json::from_str(&python("logits.py", [path]).ok()).expect("JSON")
    };
    // First the engine's way: nothing is cached yet.
    let found = logits(&mounted);
    let wanted = logits(source);
    assert_eq!(found, wanted);
    assert!(
        wanted["sha256"]
            .as_str()
            .is_some_and(|text| text.len() == 64),
        "{wanted}"
    );
    python("compare_tensors.py", [source, mounted.as_path()]).ok();
    mount.unmount();

    // And the same from a cold mount, tensors first.
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let tensors = python(
        "compare_tensors.py",
        [source, mount.path(&reference).as_path()],
    )
    .ok();
    assert!(tensors.trim().parse::<usize>().unwrap() > 10, "{tensors}");
}

#[test]
fn transformers_loads_a_single_file_model() {
    let _heavy = heavy();
    let (dir, files) = llama("10GB");
    assert_eq!(
        files
            .keys()
            .filter(|name| is_shard(name))
            .collect::<Vec<_>>(),
        ["model.safetensors"]
    );
    assert_loads(dir.path(), &docker_v02(dir.path(), &files));
}

#[test]
fn transformers_loads_a_sharded_model_with_names() {
    let _heavy = heavy();
    let (dir, files) = llama("400KB");
    assert!(files.keys().filter(|name| is_shard(name)).count() > 2);
    assert_loads(dir.path(), &docker_v01(dir.path(), &files, true));
}

#[test]
fn transformers_loads_a_sharded_model_without_names_by_its_index() {
    let _heavy = heavy();
    let (dir, files) = llama("400KB");
    assert!(files.contains_key("model.safetensors.index.json"));
    assert_loads(dir.path(), &docker_v01(dir.path(), &files, false));
}

#[test]
fn transformers_loads_shards_whose_index_ocifs_made() {
    let _heavy = heavy();
    let (dir, mut files) = llama("400KB");
    files.remove("model.safetensors.index.json");
    assert_loads(dir.path(), &docker_v01(dir.path(), &files, false));
}
