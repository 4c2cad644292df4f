//! CNCF ModelPack (modelpack/model-spec docs/spec.md), written by modelpack-client where it can, which is also asked what it
//! would unpack; the old spelling and odd paths by hand.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde_json::json;

use super::{Site, archive};
use crate::support::artifact::{Artifact, FILEPATH, Layer};
use crate::support::content::{Content, digest};
use crate::support::model::{Files, SampleModel, assert_same_files, read_tree};
use crate::support::mount::Mount;
use crate::support::proxy::Proxy;
use crate::support::python::module;
use crate::support::registry::Registry;
use crate::support::scratch;

/// A directory with one folder for each kind of layer, and the push of it in this encoding.
fn push(site: &Site, encoding: &str, source: &Path) -> String {
    for (folder, file, size) in [
        ("weights", "model-00001-of-00002.safetensors", 3_000_000),
        ("weights", "deep/model-00002-of-00002.safetensors", 700_001),
        ("config", "config.json", 300),
        ("config", "tokenizer/merges.txt", 40_000),
        ("docs", "README.md", 1000),
        ("code", "modeling.py", 5000),
        ("data", "train/a.jsonl", 100_000),
    ] {
        let path = source.join(folder).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        Content::new(size).write(&path, size);
    }
    let config = source.parent().unwrap().join("config.json");
    let text = json!({"descriptor": {"name": "m", "createdAt": "2025-10-05T12:34:56Z"}, "config": {"format": "safetensors"}});
    fs::write(&config, text.to_string()).unwrap();
    let target = format!(
        "{}/org/m:{}",
        site.registry.host(),
        encoding.replace('+', "-")
    );
    let mut args = vec!["--insecure".to_owned(), "push".to_owned(), target.clone()];
    args.extend(["--config".to_owned(), config.to_str().unwrap().to_owned()]);
    for (folder, kind) in [
        ("weights", "weight"),
        ("config", "weight.config"),
        ("docs", "doc"),
        ("code", "code"),
        ("data", "dataset"),
    ] {
        let path = source.join(folder);
        args.push("--layer".to_owned());
        args.push(format!(
            "{}:application/vnd.cncf.model.{kind}.v1.{encoding}",
            path.display()
        ));
    }
    module("modelpack_client", args).ok();
    target
}

#[test]
fn every_kind_in_every_encoding_is_what_its_own_client_unpacks() {
    let site = Site::new();
    for encoding in ["tar", "tar+gzip", "tar+zstd"] {
        let dir = scratch("modelpack");
        let source = dir.path().join("source");
        let shown = push(&site, encoding, &source);
        let found = site.mount.files(&shown);
        assert_same_files(&found, &read_tree(&source));
        let pulled = dir.path().join("pulled");
        module(
            "modelpack_client",
            ["--insecure", "pull", &shown, pulled.to_str().unwrap()],
        )
        .ok();
        assert_same_files(&found, &read_tree(&pulled));
    }
}

#[test]
fn raw_files_of_the_client_keep_their_names() {
    let site = Site::new();
    let model = SampleModel::new(301);
    let files = model.some(|name| !name.contains('/'));
    let dir = scratch("modelpack");
    let config = dir.path().join("config.json");
    fs::write(&config, r#"{"descriptor":{},"config":{}}"#).unwrap();
    let target = format!("{}/org/m:raw", site.registry.host());
    let mut args = vec!["--insecure".to_owned(), "push".to_owned(), target.clone()];
    args.extend(["--config".to_owned(), config.to_str().unwrap().to_owned()]);
    for name in files.keys() {
        args.push("--layer".to_owned());
        args.push(model.path().join(name).to_str().unwrap().to_owned());
    }
    module("modelpack_client", args).ok();
    assert_same_files(&site.mount.files(&target), &files);
}

#[test]
fn the_old_spelling_is_read_in_every_encoding() {
    let site = Site::new();
    let model = SampleModel::new(302);
    for (tag, compress) in [
        ("tar", None),
        ("tar+gzip", Some("gzip")),
        ("tar+zstd", Some("zstd")),
    ] {
        let layers = model.files().keys().map(|name| {
            let bytes = archive(model.path(), &[name], compress);
            let kind = if name.ends_with(".safetensors") {
                "weight"
            } else {
                "weight.config"
            };
            Layer::bytes(
                &format!("application/vnd.cnai.model.{kind}.v1.{tag}"),
                bytes,
            )
            // Where tar and annotation differ, the tar is right, as in modctl.
            .annotated("org.cnai.model.filepath", "elsewhere")
        });
        let artifact = Artifact::modelpack("cnai").layers(layers);
        let name = format!("org/m:{}", tag.replace('+', "-"));
        let shown = artifact.publish(&site.registry, &name).reference;
        assert_same_files(&site.mount.files(&shown), model.files());
    }
}

#[test]
fn paths_that_lead_out_are_refused_and_their_layers_still_there() {
    let site = Site::new();
    let raw = "application/vnd.cncf.model.weight.v1.raw";
    let artifact = Artifact::modelpack("cncf")
        .layer(Layer::bytes(raw, "good").at("sub/good.bin"))
        .layer(Layer::bytes(raw, "beside the packager's directory").at("../shared/config.json"))
        .layer(Layer::bytes(raw, "absolute").at("/etc/passwd"))
        .layer(Layer::bytes(raw, "out").at("a/../../../etc/shadow"))
        .layer(Layer::bytes(raw, "named by its metadata").annotated(
            "org.cncf.model.file.metadata+json",
            r#"{"name":"meta.txt","mode":420,"uid":0,"gid":0,"size":21,"mtime":"2025-01-01T00:00:00Z","typeflag":48}"#,
        ))
        .layer(Layer::bytes("application/vnd.kitops.modelkit.config.v1+json", "{}"));
    let shown = site.show(&artifact);
    let wanted: Files = [
        ("sub/good.bin", "good"),
        ("shared/config.json", "beside the packager's directory"),
        ("meta.txt", "named by its metadata"),
        ("Kitfile", "{}"),
    ]
    .into_iter()
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .collect();
    assert_same_files(&site.mount.files(&shown), &wanted);
    let hidden = site.mount.list(&format!("{shown}/.oci/blobs"));
    for text in ["absolute", "out"] {
        assert!(
            hidden.contains(&digest(text.as_bytes())),
            "{text} in {hidden:?}"
        );
    }
    let said = site.inspect(&shown);
    assert!(
        said.contains("it is absolute") && said.contains("leads out"),
        "{said}"
    );
}

/// The headers of a tar are a few small ranges. A daemon that is started again has them still.
#[test]
fn what_a_tar_holds_is_asked_for_once() {
    let registry = Registry::open();
    let source = scratch("tar");
    for n in 0..6 {
        let path = source.path().join(format!("part-{n}.bin"));
        Content::new(n).write(&path, 3_000_000);
    }
    let tar = archive(source.path(), &["."], None);
    let size = tar.len() as u64;
    let layer = Layer::bytes("application/vnd.cncf.model.weight.v1.tar", tar);
    let published = Artifact::modelpack("cncf")
        .layer(layer)
        .publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    let shown = format!("{}/org/m:v1", proxy.host());
    let cache = scratch("cache");
    let names: Vec<String> = [".oci".to_owned()]
        .into_iter()
        .chain((0..6).map(|n| format!("part-{n}.bin")))
        .collect();
    let blob = format!("/blobs/{}", published.layers[0]);
    let mount = || Mount::start(cache.path(), ["--prefetch", "none"]);
    let first = mount();
    assert_eq!(first.list(&shown), names);
    let (asked, sent) = (proxy.count(&blob), proxy.sent(&blob));
    assert!((1..=7).contains(&asked), "{:?}", proxy.records());
    assert!(sent < size / 10, "{sent} of {size}");
    first.unmount();
    proxy.reset();
    let second = mount();
    assert_eq!(second.list(&shown), names);
    assert_eq!(proxy.count(&blob), 0, "{:?}", proxy.records());
    assert_eq!(
        second.read(&format!("{shown}/part-3.bin")),
        Content::new(3).bytes(0, 3_000_000)
    );
    let sent = proxy.sent(&blob);
    assert!((2_700_000..3_600_000).contains(&sent), "{sent} for 3000000");
}

#[test]
fn times_and_programs_are_what_the_file_metadata_say() {
    let site = Site::new();
    let raw = "application/vnd.cncf.model.code.v1.raw";
    let with = |path: &str, mode: u32, mtime: &str| {
        let json = json!({"name": path, "mode": mode, "uid": 0, "gid": 0, "size": 1, "mtime": mtime, "typeflag": 48});
        Layer::bytes(raw, path)
            .at(path)
            .annotated("org.cncf.model.file.metadata+json", &json.to_string())
    };
    let artifact = Artifact::modelpack("cncf")
        .layer(with("run.sh", 0o755, "2024-02-29T12:00:00Z"))
        .layer(with("config.json", 0o600, "2024-02-29T14:00:00.5+01:00"))
        .layer(with("untold", 0o644, "0001-01-01T00:00:00Z"));
    let shown = site.show(&artifact);
    let told = |name: &str| {
        let metadata = fs::metadata(site.mount.path(&format!("{shown}/{name}"))).unwrap();
        (metadata.mode() & 0o7777, metadata.mtime())
    };
    assert_eq!(told("run.sh"), (0o555, 1_709_208_000));
    assert_eq!(told("config.json"), (0o444, 1_709_211_600));
    // The artifact's own, from its config.
    assert_eq!(told("untold"), (0o444, 1_759_667_696));
}

#[test]
fn a_layer_whose_type_lies_is_the_file_that_its_annotation_names() {
    let site = Site::new();
    let weights = Content::new(5).bytes(0, 100_000);
    let artifact = Artifact::modelpack("cncf").layer(
        Layer::bytes("application/vnd.cncf.model.weight.v1.tar", weights.clone())
            .annotated(FILEPATH, "model.bin"),
    );
    let shown = site.show(&artifact);
    assert_eq!(site.mount.read(&format!("{shown}/model.bin")), weights);
}
