//! KitOps ModelKits as `kit pack` makes them (kitops `pkg/artifact/kitfile.go`, `pkg/lib/filesystem`); there is no `kit` to be
//! had here, so manifests and Kitfiles are by hand, layers by tar, gzip and zstd.

use std::fs;

use serde_json::{Value, json};

use super::{Site, archive};
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::{Content, digest};
use crate::support::model::{assert_same_files, read_tree};
use crate::support::scratch;

const CONFIG: &str = "application/vnd.kitops.modelkit.config.v1+json";

fn kind(kind: &str) -> String {
    format!("application/vnd.kitops.modelkit.{kind}")
}

fn source() -> tempfile::TempDir {
    let dir = scratch("kit");
    for (path, size) in [
        ("models/base/model.safetensors", 400_000),
        ("models/lora/adapter.safetensors", 60_000),
        ("src/train.py", 2000),
        ("data/set/train.csv", 90_000),
        ("docs/README.md", 700),
    ] {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        Content::new(size).write(&path, size);
    }
    dir
}

/// With digests in the Kitfile, as today, names in the tars are from the top; each layer is compressed in its own way.
#[test]
fn todays_kits_are_their_source_with_the_kitfile_at_the_top() {
    let dir = source();
    let tar = |path: &str, how| archive(dir.path(), &[path], how);
    let parts = [
        ("model.v1.tar", tar("models/base", None)),
        ("modelpart.v1.tar+gzip", tar("models/lora", Some("gzip"))),
        ("code.v1.tar+gzip", tar("src", Some("gzip"))),
        ("dataset.v1.tar+zstd", tar("data/set", Some("zstd"))),
        ("docs.v1.tar", tar("docs/README.md", None)),
    ];
    let info = |n: usize, path: &str| json!({"path": path, "digest": digest(&parts[n].1)});
    let mut model = info(0, "models/base");
    model["name"] = json!("base");
    model["parts"] = json!([info(1, "models/lora")]);
    let kitfile = json!({
        "manifestVersion": "1.0.0",
        "package": {"name": "kit", "authors": ["a"]},
        "model": model,
        "code": [info(2, "src")],
        "datasets": [info(3, "data/set")],
        "docs": [info(4, "docs/README.md")],
    });
    let layers = parts
        .iter()
        .map(|(name, bytes)| Layer::bytes(&kind(name), bytes.clone()));
    let site = Site::new();
    let shown = site.show(&Artifact::new(CONFIG, &kitfile).layers(layers));
    let mut found = site.mount.files(&shown);
    let shown_kitfile: Value =
        serde_json::from_slice(&found.remove("Kitfile").expect("a Kitfile")).unwrap();
    assert_eq!(shown_kitfile, kitfile);
    assert_same_files(&found, &read_tree(dir.path()));
    assert!(site.inspect(&shown).contains("KitOps ModelKit"));
}

/// Without digests, as before: names in a tar are relative to the folder of its entry's path.
#[test]
fn older_kits_put_their_tars_where_the_kitfile_says() {
    let dir = source();
    let tar = |folder: &str, name: &str| archive(&dir.path().join(folder), &[name], Some("gzip"));
    let layers = [
        ("model.v1.tar+gzip", tar("models", "base")),
        ("modelpart.v1.tar+gzip", tar("models", "lora")),
        ("code.v1.tar+gzip", tar("", "src")),
        ("dataset.v1.tar+gzip", tar("data", "set")),
        ("docs.v1.tar+gzip", tar("docs", "README.md")),
    ];
    let kitfile = json!({
        "manifestVersion": "1.0.0",
        "model": {"path": "./models/base", "parts": [{"path": "models/lora/"}]},
        "code": [{"path": "src"}],
        "datasets": [{"path": "data/set"}],
        "docs": [{"path": "docs/README.md"}],
    });
    let layers = layers
        .into_iter()
        .map(|(name, bytes)| Layer::bytes(&kind(name), bytes));
    let site = Site::new();
    let shown = site.show(&Artifact::new(CONFIG, &kitfile).layers(layers));
    let mut found = site.mount.files(&shown);
    assert!(found.remove("Kitfile").is_some());
    assert_same_files(&found, &read_tree(dir.path()));
}

#[test]
fn a_kit_whose_model_is_another_kits_says_which() {
    let dir = source();
    let code = archive(dir.path(), &["src"], None);
    let kitfile = json!({
        "manifestVersion": "1.0.0",
        "model": {"path": "ghcr.io/jozu/llama3:8b"},
        "code": [{"path": "src", "digest": digest(&code)}],
    });
    let site = Site::new();
    let shown =
        site.show(&Artifact::new(CONFIG, &kitfile).layer(Layer::bytes(&kind("code.v1.tar"), code)));
    let names: Vec<String> = site.mount.files(&shown).into_keys().collect();
    assert_eq!(names, ["Kitfile", "src/train.py"]);
    let said = site.inspect(&shown);
    assert!(said.contains("`ghcr.io/jozu/llama3:8b`"), "{said}");
}
