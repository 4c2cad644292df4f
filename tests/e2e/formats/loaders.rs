//! The engines' own loaders on the directory that each convention becomes: transformers for safetensors, llama.cpp for GGUF.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Site, archive};
use crate::loaders::llama;
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::digest;
use crate::support::heavy;
use crate::support::mount::run_ocifs;
use crate::support::process::run;
use crate::support::python::{environment, python};
use crate::support::scratch;

/// What transformers computes with the model in each of these directories.
fn logits(directories: &[PathBuf]) -> Vec<Value> {
    let printed = python("logits.py", directories).ok();
    let lines: Vec<Value> = printed
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), directories.len(), "{printed}");
    lines
}

#[test]
fn transformers_loads_the_model_of_every_convention() {
    let _heavy = heavy();
    let (dir, files) = llama("400KB");
    let source = dir.path();
    let site = Site::new();
    let whole = |program| archive(source, &["."], program);
    let title = "org.opencontainers.image.title";
    let gzip = whole(Some("gzip"));
    let parent = scratch("car");
    let models = parent.path().join("models");
    run(
        "cp",
        ["-r", source.to_str().unwrap(), models.to_str().unwrap()],
    )
    .ok();
    let kitfile =
        json!({"manifestVersion": "1.0.0", "model": {"path": ".", "digest": digest(&gzip)}});
    let image = json!({"architecture": "amd64", "os": "linux"});
    let cases = [
        (
            "modelpack-zstd",
            "",
            Artifact::modelpack("cncf").layer(Layer::bytes(
                "application/vnd.cncf.model.weight.v1.tar+zstd",
                whole(Some("zstd")),
            )),
        ),
        (
            "modelpack-tar",
            "",
            Artifact::modelpack("cnai").layer(Layer::bytes(
                "application/vnd.cnai.model.weight.v1.tar",
                whole(None),
            )),
        ),
        (
            "kit",
            "",
            Artifact::new("application/vnd.kitops.modelkit.config.v1+json", &kitfile).layer(
                Layer::bytes(
                    "application/vnd.kitops.modelkit.model.v1.tar+gzip",
                    gzip.clone(),
                ),
            ),
        ),
        (
            "oras",
            "",
            Artifact::new("application/vnd.oci.empty.v1+json", &json!({})).layers(
                files.keys().map(|name| {
                    let tar = "application/vnd.oci.image.layer.v1.tar";
                    Layer::file(tar, source.join(name)).annotated(title, name)
                }),
            ),
        ),
        (
            "modelcar",
            "models",
            Artifact::new("application/vnd.oci.image.config.v1+json", &image).layer(Layer::bytes(
                "application/vnd.oci.image.layer.v1.tar+gzip",
                archive(parent.path(), &["models"], Some("gzip")),
            )),
        ),
    ];
    let mut directories = vec![source.to_owned()];
    for (tag, below, artifact) in cases {
        let shown = artifact
            .publish(&site.registry, &format!("org/m:{tag}"))
            .reference;
        directories.push(site.mount.path(&shown).join(below));
    }
    let found = logits(&directories);
    assert_eq!(found[0]["sha256"].as_str().map(str::len), Some(64));
    for (directory, logits) in directories.iter().zip(&found) {
        assert_eq!(logits, &found[0], "{}", directory.display());
    }
}

/// The tokens that llama.cpp generates from each of these files.
fn generated(files: &[PathBuf]) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/py/generate.mjs");
    let modules = environment().join("node_modules");
    assert!(
        modules.exists(),
        "{} is missing; tests/setup.sh makes it",
        modules.display()
    );
    let mut args = vec![script, modules];
    args.extend(files.iter().cloned());
    let node = environment().join("venv/bin/node");
    run(node.to_str().unwrap(), args)
        .ok()
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn llama_cpp_generates_from_the_gguf_of_every_convention() {
    let _heavy = heavy();
    let dir = scratch("gguf");
    let source = dir.path().join("source.gguf");
    python("make_gguf.py", [&source]).ok();
    let bytes = fs::read(&source).unwrap();
    let site = Site::new();
    let docker = Artifact::new(
        "application/vnd.docker.ai.model.config.v0.1+json",
        &json!({}),
    );
    let cases = [
        (
            "docker",
            docker.layer(Layer::bytes(
                "application/vnd.docker.ai.gguf.v3",
                bytes.clone(),
            )),
        ),
        (
            "modelpack",
            Artifact::modelpack("cncf").layer(
                Layer::bytes("application/vnd.cncf.model.weight.v1.raw", bytes.clone())
                    .at("model.gguf"),
            ),
        ),
        (
            "ollama",
            Artifact::new("application/vnd.docker.container.image.v1+json", &json!({})).layer(
                Layer::bytes("application/vnd.ollama.image.model", bytes.clone()),
            ),
        ),
    ];
    let mut files = vec![source];
    for (tag, artifact) in cases {
        let shown = artifact
            .publish(&site.registry, &format!("org/m:{tag}"))
            .reference;
        files.push(site.mount.path(&shown).join("model.gguf"));
    }
    // And what `push` makes of it: the config tells what the header tells.
    let pushed = format!("{}/org/m:pushed", site.registry.host());
    fs::write(dir.path().join("README.md"), "---\nlicense: mit\n---\n").unwrap();
    let format = ["--format", "modelpack"];
    run_ocifs(
        [
            &["push"][..],
            &format,
            &[dir.path().to_str().unwrap(), &pushed],
        ]
        .concat(),
    )
    .ok();
    files.push(site.mount.path(&pushed).join("source.gguf"));
    let cache = site.cache.path().to_str().unwrap();
    let shown = run_ocifs(["inspect", "--json", "--cache-dir", cache, &pushed]).ok();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["config"]["descriptor"]["family"], "llama");
    assert_eq!(shown["config"]["descriptor"]["licenses"], json!(["MIT"]));
    assert_eq!(shown["config"]["config"]["precision"], "f32");
    // 2 × 300 × 64 of the vocabulary, and twice 4 × 64² + 3 × 64 × 128 + 2 × 64, and 64.
    assert_eq!(shown["config"]["config"]["paramSize"], "120.6K");
    assert_eq!(
        shown["manifest"]["annotations"]["org.opencontainers.image.licenses"],
        "MIT"
    );

    let found = generated(&files);
    assert_eq!(found.len(), files.len(), "{found:?}");
    assert!(found[0].split(',').count() > 8, "{found:?}");
    assert!(found.iter().all(|tokens| *tokens == found[0]), "{found:#?}");
}
