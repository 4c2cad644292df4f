//! Ollama's manifests, as ollama `server/images.go` reads them, on a registry like theirs: Docker's manifest type, no `/v2/`.

use serde_json::json;

use super::Site;
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::Content;
use crate::support::model::{Files, assert_same_files};
use crate::support::mount::Mount;
use crate::support::proxy::Proxy;
use crate::support::scratch;

fn layer(kind: &str, bytes: impl Into<Vec<u8>>) -> Layer {
    Layer::bytes(&format!("application/vnd.ollama.image.{kind}"), bytes)
}

fn gguf(seed: u64) -> Vec<u8> {
    [b"GGUF".to_vec(), Content::new(seed).bytes(0, 300_000)].concat()
}

fn model() -> Artifact {
    Artifact::new(
        "application/vnd.docker.container.image.v1+json",
        &json!({"model_format": "gguf", "model_family": "llama", "model_type": "8B", "file_type": "Q4_0", "rootfs": {"type": "layers", "diff_ids": []}}),
    )
    .of_type("application/vnd.docker.distribution.manifest.v2+json")
    .layer(layer("model", gguf(1)))
    .layer(layer("projector", gguf(2)))
    .layer(layer("adapter", gguf(3)))
    .layer(layer("template", "{{ .Prompt }}"))
    .layer(layer("system", "You are kind."))
    .layer(layer("params", r#"{"stop":["<|eot|>"]}"#))
    .layer(layer("messages", "[]"))
    .layer(layer("license", "MIT"))
    .layer(layer("license", "and more"))
}

/// What `ollama show --modelfile` says of such a model, with the files beside it in place of its store's (ollama `docs/modelfile.md`).
const MODELFILE: &str = "FROM ./model.gguf
FROM ./mmproj.gguf
ADAPTER ./adapter.gguf
TEMPLATE {{ .Prompt }}
SYSTEM You are kind.
PARAMETER stop <|eot|>
LICENSE MIT
LICENSE and more
";

fn wanted() -> Files {
    [
        ("model.gguf", gguf(1)),
        ("mmproj.gguf", gguf(2)),
        ("adapter.gguf", gguf(3)),
        ("template", b"{{ .Prompt }}".to_vec()),
        ("system", b"You are kind.".to_vec()),
        ("params", br#"{"stop":["<|eot|>"]}"#.to_vec()),
        ("messages", b"[]".to_vec()),
        ("LICENSE", b"MIT".to_vec()),
        ("LICENSE-2", b"and more".to_vec()),
        ("Modelfile", MODELFILE.into()),
    ]
    .into_iter()
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .collect()
}

#[test]
fn layers_have_names_that_llama_cpp_and_ollamas_users_know() {
    let site = Site::new();
    let shown = site.show(&model());
    assert_same_files(&site.mount.files(&shown), &wanted());
    assert!(site.inspect(&shown).contains("Ollama model"));
}

#[test]
fn what_a_modelfile_cannot_say_is_not_said_wrong() {
    let site = Site::new();
    let model = Artifact::new(
        "application/vnd.docker.container.image.v1+json",
        &json!({"model_format": "gguf"}),
    )
    .layer(layer("model", gguf(1)))
    .layer(layer("template", "one \"\"\"\ntwo"));
    let shown = site.show(&model);
    let names: Vec<String> = site.mount.files(&shown).into_keys().collect();
    assert_eq!(names, ["model.gguf", "template"]);
    let said = site.inspect(&shown);
    assert!(said.contains("there is no Modelfile"), "{said}");
}

#[test]
fn nobody_asks_for_the_version_that_their_registry_does_not_tell() {
    let site = Site::new();
    model().publish(&site.registry, "library/llama3:8b");
    let proxy = Proxy::start(site.registry.address());
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    let shown = format!("{}/library/llama3:8b", proxy.host());
    assert_same_files(&mount.files(&shown), &wanted());
    assert_eq!(
        proxy
            .records()
            .iter()
            .filter(|record| record.path == "/v2/")
            .count(),
        0
    );
}
