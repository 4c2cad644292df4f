//! ORAS artifacts, podman's, RHEL AI's: titles, folders, and types that lie.

use std::fs;

use serde_json::json;

use super::{Site, archive, compressed};
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::{Content, digest};
use crate::support::model::{Files, SampleModel, assert_same_files, read_tree};
use crate::support::scratch;

const TITLE: &str = "org.opencontainers.image.title";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

#[test]
fn folders_and_files_that_oras_pushed_are_the_source() {
    let dir = scratch("oras");
    let model = SampleModel::new(321);
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let tree = dir.path().join("model");
    crate::support::process::run(
        "cp",
        ["-r", model.path().to_str().unwrap(), tree.to_str().unwrap()],
    )
    .ok();
    fs::write(path("README.md"), "read me").unwrap();
    fs::write(path("config"), "{}").unwrap();
    let site = Site::new();
    site.registry.oras_push(
        "org/m:v1",
        &format!("{}:application/vnd.unknown.config.v1+json", path("config")),
        &[tree.to_str().unwrap(), &path("README.md")],
    );
    let found = site
        .mount
        .files(&format!("{}/org/m:v1", site.registry.host()));
    fs::remove_file(path("config")).unwrap();
    assert_same_files(&found, &read_tree(dir.path()));
}

/// oras-go `content/file`: the annotation says that it is a folder, the tar's names begin with the title.
#[test]
fn folders_with_the_unpack_annotation_go_where_their_title_says() {
    let site = Site::new();
    let model = SampleModel::new(322);
    let dir = scratch("oras-go");
    let (inner, outer) = (dir.path().join("top/inner"), dir.path());
    fs::create_dir_all(inner.parent().unwrap()).unwrap();
    crate::support::process::run(
        "cp",
        [
            "-r",
            model.path().to_str().unwrap(),
            inner.to_str().unwrap(),
        ],
    )
    .ok();
    let folder = |title: &str, tar: Vec<u8>| {
        Layer::bytes(
            "application/vnd.oci.image.layer.v1.tar+gzip",
            compressed(&tar, "gzip"),
        )
        .annotated(TITLE, title)
        .annotated("io.deis.oras.content.unpack", "true")
        .annotated("io.deis.oras.content.digest", &digest(&tar))
    };
    let wanted = read_tree(outer);
    for (tag, tar) in [
        ("go", archive(outer, &["top/inner"], None)),
        ("python", archive(&outer.join("top"), &["inner"], None)),
        ("bare", archive(&inner, &["."], None)),
    ] {
        let artifact = Artifact::new(EMPTY, &json!({})).layer(folder("top/inner", tar));
        let shown = artifact
            .publish(&site.registry, &format!("org/m:{tag}"))
            .reference;
        assert_same_files(&site.mount.files(&shown), &wanted);
    }
}

/// InstructLab's download: an artifact whose layers are files of the model, named by title, in folders too.
#[test]
fn titles_are_names_and_may_hold_folders() {
    let site = Site::new();
    let model = SampleModel::new(323);
    let layers = model.files().keys().map(|name| {
        Layer::file("application/octet-stream", model.path().join(name)).annotated(TITLE, name)
    });
    let shown = site.show(
        &Artifact::new("application/vnd.oci.image.config.v1+json", &json!({})).layers(layers),
    );
    assert_same_files(&site.mount.files(&shown), model.files());
}

#[test]
fn types_that_lie_are_found_out_by_the_bytes() {
    let site = Site::new();
    let dir = scratch("lies");
    let weights = Content::new(7).bytes(0, 200_000);
    fs::create_dir(dir.path().join("models")).unwrap();
    fs::write(dir.path().join("models/model.joblib"), &weights).unwrap();
    let tar = archive(dir.path(), &["models/model.joblib"], None);
    let gguf = [b"GGUF".to_vec(), weights.clone()].concat();
    let artifact = Artifact::new(EMPTY, &json!({}))
        // ORAS's default type on a plain file, one that is shorter than a header too.
        .layer(Layer::bytes(TAR, gguf.clone()).annotated(TITLE, "model.gguf"))
        .layer(Layer::bytes(TAR, "{}").annotated(TITLE, "config.json"))
        // A tar under the title of the file in it.
        .layer(Layer::bytes(TAR, compressed(&tar, "zstd")).annotated(TITLE, "model.joblib"))
        // An archive that is meant to be one.
        .layer(Layer::bytes(TAR, tar.clone()).annotated(TITLE, "archive.tar"));
    let shown = site.show(&artifact);
    let wanted: Files = [
        ("model.gguf", gguf),
        ("config.json", b"{}".to_vec()),
        ("models/model.joblib", weights),
        ("archive.tar", tar),
    ]
    .into_iter()
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .collect();
    assert_same_files(&site.mount.files(&shown), &wanted);
}

#[test]
fn an_unknown_convention_shows_names_and_says_what_it_did_not_understand() {
    let site = Site::new();
    let artifact = Artifact::new("application/vnd.example.config.v3+json", &json!({"any": 1}))
        .layer(Layer::bytes("application/vnd.example.weights", "w").annotated(TITLE, "w.bin"))
        .layer(Layer::bytes("application/vnd.example.tokens", "t").at("tok/t.json"))
        .layer(Layer::bytes("application/vnd.example.secret", "s"));
    let shown = site.show(&artifact);
    let found = site.mount.files(&shown);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["tok/t.json", "w.bin"]);
    let blobs = site.mount.list(&format!("{shown}/.oci/blobs"));
    assert_eq!(blobs, [digest(b"s")]);
    let said = site.inspect(&shown);
    for part in [
        "OCI artifact",
        "vnd.example.config.v3+json",
        "vnd.example.secret",
        "it has no name",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
}
