//! Docker's model format: every layer type of docker/model-spec (spec.md, config.md) and of model-runner's `types/config.go`,
//! under the names and in the order of model-runner's `internal/bundle/unpack.go`.

use std::fs;

use serde_json::json;

use super::Site;
use crate::support::artifact::{Artifact, DOCKER_CONFIG_V01, DOCKER_CONFIG_V02, Layer};
use crate::support::content::{Content, digest};
use crate::support::model::{Files, assert_same_files, read_tree};
use crate::support::process::run;
use crate::support::scratch;

fn layer(kind: &str, bytes: impl Into<Vec<u8>>) -> Layer {
    Layer::bytes(&format!("application/vnd.docker.ai.{kind}"), bytes)
}

fn gguf(seed: u64) -> Vec<u8> {
    [b"GGUF".to_vec(), Content::new(seed).bytes(0, 300_000)].concat()
}

/// `config.md` of docker/model-spec: the format of a GGUF model.
fn artifact(config_type: &str, format: &str) -> Artifact {
    Artifact::new(
        config_type,
        &json!({
            "config": {"format": format, "quantization": "Q4_K_M", "parameters": "1.1 B", "architecture": "llama"},
            "descriptor": {"created": "2025-03-01T00:00:00Z"},
            "rootfs": {"type": "rootfs", "diff_ids": []},
        }),
    )
}

fn files<const N: usize>(files: [(&str, Vec<u8>); N]) -> Files {
    files
        .into_iter()
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .collect()
}

#[test]
fn one_gguf_with_all_that_may_stand_beside_it() {
    let site = Site::new();
    let shown = site.show(
        &artifact(DOCKER_CONFIG_V01, "gguf")
            .layer(layer("gguf.v3", gguf(1)))
            .layer(layer("mmproj", gguf(2)))
            .layer(layer("gguf.v3.lora", gguf(3)))
            .layer(layer("chat.template.jinja", "{{ messages }}"))
            .layer(layer("license", "MIT"))
            .layer(layer("license", "and Apache")),
    );
    let wanted = files([
        ("model.gguf", gguf(1)),
        ("model.mmproj", gguf(2)),
        ("lora.gguf", gguf(3)),
        ("template.jinja", b"{{ messages }}".to_vec()),
        ("LICENSE", b"MIT".to_vec()),
        ("LICENSE-2", b"and Apache".to_vec()),
    ]);
    assert_same_files(&site.mount.files(&shown), &wanted);
}

#[test]
fn a_split_gguf_is_numbered_in_layer_order_as_llama_cpp_wants() {
    let site = Site::new();
    let parts = (1..=3).map(|part| layer("gguf.v3", gguf(part)));
    let shown = site.show(&artifact(DOCKER_CONFIG_V01, "gguf").layers(parts));
    let wanted = files([
        ("model-00001-of-00003.gguf", gguf(1)),
        ("model-00002-of-00003.gguf", gguf(2)),
        ("model-00003-of-00003.gguf", gguf(3)),
    ]);
    assert_same_files(&site.mount.files(&shown), &wanted);
}

#[test]
fn directory_tars_lie_over_config_tar_and_weights_and_files_below_all() {
    let dir = scratch("docker");
    let path = |name: &str| dir.path().join(name);
    let tar = |name: &str, parts: &[&str]| {
        let mut args = vec!["--format=gnu", "-C", dir.path().to_str().unwrap(), "-cf"];
        let archive = path(name).to_str().unwrap().to_owned();
        args.push(&archive);
        args.extend(parts);
        run("tar", args).ok();
        fs::read(path(name)).unwrap()
    };
    fs::write(path("config.json"), "from the config tar").unwrap();
    fs::write(path("tokenizer.json"), "{}").unwrap();
    let config = tar("config.tar", &["config.json", "tokenizer.json"]);
    fs::write(path("config.json"), "from the directory tar").unwrap();
    fs::create_dir_all(path("text_encoder/deep")).unwrap();
    fs::write(path("text_encoder/config.json"), "{\"nested\":1}").unwrap();
    fs::write(path("text_encoder/deep/w.bin"), gguf(9)).unwrap();
    std::os::unix::fs::symlink("config.json", path("text_encoder/link")).unwrap();
    let folder = tar("folder.tar", &["text_encoder", "config.json"]);
    let site = Site::new();
    let shown = site.show(
        &artifact(DOCKER_CONFIG_V01, "safetensors")
            .layer(layer("model.file", "a file").at("modeling.py"))
            .layer(layer("model.file", "too late").at("tokenizer.json"))
            .layer(layer("dir.tar", folder))
            .layer(layer("vllm.config.tar", config))
            .layer(layer("safetensors", gguf(1)).at("model.safetensors")),
    );
    let wanted = files([
        ("model.safetensors", gguf(1)),
        ("config.json", b"from the directory tar".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("text_encoder/config.json", b"{\"nested\":1}".to_vec()),
        ("text_encoder/deep/w.bin", gguf(9)),
        ("modeling.py", b"a file".to_vec()),
    ]);
    assert_same_files(&site.mount.files(&shown), &wanted);
    // What had to give way is still there.
    let hidden = site.mount.list(&format!("{shown}/.oci/blobs"));
    assert!(hidden.contains(&digest(b"too late")), "{hidden:?}");
}

#[test]
fn a_dduf_has_the_name_that_the_packager_gave() {
    let site = Site::new();
    let named =
        artifact(DOCKER_CONFIG_V01, "diffusers").layer(layer("dduf", gguf(4)).at("flux.dduf"));
    let shown = site.show(&named);
    assert_same_files(&site.mount.files(&shown), &files([("flux.dduf", gguf(4))]));
    let nameless = artifact(DOCKER_CONFIG_V01, "diffusers").layer(layer("dduf", gguf(4)));
    let shown = nameless.publish(&site.registry, "org/m:v2").reference;
    assert_same_files(&site.mount.files(&shown), &files([("model.dduf", gguf(4))]));
}

#[test]
fn the_second_version_shows_each_layer_at_its_path_and_leaves_out_what_has_none() {
    let site = Site::new();
    let shown = site.show(
        &artifact(DOCKER_CONFIG_V02, "gguf")
            .layer(layer("gguf.v3", gguf(1)).at("Q4/model-00001-of-00002.gguf"))
            .layer(layer("gguf.v3", gguf(2)).at("Q4/model-00002-of-00002.gguf"))
            .layer(layer("mmproj", gguf(3)).at("mmproj.gguf"))
            .layer(layer("chat.template.jinja", "{{}}").at("chat_template.jinja"))
            .layer(layer("license", "MIT").at("docs/LICENSE"))
            .layer(layer("dduf", gguf(5)).at("a.dduf"))
            .layer(layer("model.file", "print()").at("../code/run.py"))
            .layer(layer("model.file", "nameless")),
    );
    let wanted = files([
        ("Q4/model-00001-of-00002.gguf", gguf(1)),
        ("Q4/model-00002-of-00002.gguf", gguf(2)),
        ("mmproj.gguf", gguf(3)),
        ("chat_template.jinja", b"{{}}".to_vec()),
        ("docs/LICENSE", b"MIT".to_vec()),
        ("a.dduf", gguf(5)),
        ("code/run.py", b"print()".to_vec()),
    ]);
    assert_same_files(&site.mount.files(&shown), &wanted);
    let hidden = site.mount.list(&format!("{shown}/.oci/blobs"));
    assert_eq!(hidden, [digest(b"nameless")]);
    let said = site.inspect(&shown);
    assert!(said.contains("it has no name"), "{said}");
}

/// Pushed by oras, which knows nothing of models: layer types by hand, titles beside them, no paths.
#[test]
fn titles_that_oras_adds_do_not_disturb_the_rules() {
    let dir = scratch("oras");
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("q4.gguf"), gguf(1)).unwrap();
    fs::write(path("LICENSE.txt"), "MIT").unwrap();
    let config = r#"{"config":{"format":"gguf"},"descriptor":{"created":"2025-03-01T00:00:00Z"},"rootfs":{"type":"rootfs","diff_ids":[]}}"#;
    fs::write(path("config"), config).unwrap();
    let site = Site::new();
    site.registry.oras_push(
        "org/m:v1",
        &format!("{}:{DOCKER_CONFIG_V01}", path("config")),
        &[
            &format!("{}:application/vnd.docker.ai.gguf.v3", path("q4.gguf")),
            &format!("{}:application/vnd.docker.ai.license", path("LICENSE.txt")),
        ],
    );
    let shown = format!("{}/org/m:v1", site.registry.host());
    let source = read_tree(dir.path());
    let wanted = files([
        ("model.gguf", source["q4.gguf"].clone()),
        ("LICENSE", source["LICENSE.txt"].clone()),
    ]);
    assert_same_files(&site.mount.files(&shown), &wanted);
}
