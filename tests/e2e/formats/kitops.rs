//! KitOps ModelKits as `kit pack` makes them (kitops `pkg/artifact/kitfile.go`, `pkg/lib/filesystem`); there is no `kit` to be
//! had here, so manifests and Kitfiles are by hand, layers by tar, gzip and zstd.

use std::fs;

use serde_json::{Value, json};

use super::{Site, archive};
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::{Content, digest};
use crate::support::model::{assert_same_files, read_tree};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::proxy::Proxy;
use crate::support::registry::Registry;
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

/// A kit in one registry whose model is that of a kit in another: the model's files, lazily, from where they are.
#[test]
fn a_kit_shows_the_model_of_the_kit_that_it_names() {
    let site = Site::new();
    let elsewhere = Registry::open();
    let proxy = Proxy::start(elsewhere.address());
    let dir = source();
    let (model, lora) = (
        archive(dir.path(), &["models/base"], None),
        archive(dir.path(), &["models/lora"], Some("gzip")),
    );
    let data = archive(dir.path(), &["data/set"], None);
    let kitfile = json!({"manifestVersion": "1.0.0", "model": {
        "path": "models/base", "digest": digest(&model),
        "parts": [{"path": "models/lora", "digest": digest(&lora)}],
    }, "datasets": [{"path": "data/set", "digest": digest(&data)}]});
    let base = Artifact::new(CONFIG, &kitfile)
        .layer(Layer::bytes(&kind("model.v1.tar"), model))
        .layer(Layer::bytes(&kind("modelpart.v1.tar+gzip"), lora))
        .layer(Layer::bytes(&kind("dataset.v1.tar"), data));
    base.publish(&elsewhere, "jozu/base:v1");

    let code = archive(dir.path(), &["src"], None);
    let path = format!("{}/jozu/base:v1", proxy.host());
    let kitfile = json!({"manifestVersion": "1.0.0", "model": {"path": path},
        "code": [{"path": "src", "digest": digest(&code)}]});
    let kit = Artifact::new(CONFIG, &kitfile).layer(Layer::bytes(&kind("code.v1.tar"), code));
    let shown = site.show(&kit);
    let names: Vec<String> = site.mount.files(&shown).into_keys().collect();
    assert_eq!(
        names,
        [
            "Kitfile",
            "models/base/model.safetensors",
            "models/lora/adapter.safetensors",
            "src/train.py"
        ]
    );
    let mut wanted = read_tree(dir.path());
    wanted.retain(|name, _| name.starts_with("models/") || name.starts_with("src/"));
    let mut found = site.mount.files(&shown);
    found.remove("Kitfile");
    assert_same_files(&found, &wanted);
    let said = site.inspect(&shown);
    assert!(
        said.contains(&format!("its model is that of {path}")),
        "{said}"
    );

    // The whole of it is pulled, and is there without either registry.
    let cache = scratch("cache");
    let cache_dir = cache.path().to_str().unwrap();
    run_ocifs(["pull", "--cache-dir", cache_dir, &shown]).ok();
    drop((elsewhere, proxy));
    let mount = Mount::start(cache.path(), ["--offline"]);
    let mut found = mount.files(&shown);
    found.remove("Kitfile");
    assert_same_files(&found, &wanted);
}

/// Without its base a kit has no model: an engine gets an error, a person the reason.
#[test]
fn a_kit_whose_base_is_missing_says_so() {
    let site = Site::new();
    let path = format!("{}/jozu/nothing:v1", site.registry.host());
    let kitfile = json!({"manifestVersion": "1.0.0", "model": {"path": path}});
    let shown = site.show(&Artifact::new(CONFIG, &kitfile));
    let said = site.inspect(&shown);
    assert!(
        said.contains(&format!("its model is that of {path}")),
        "{said}"
    );
    assert!(site.mount.try_list(&shown).is_err());
}
