//! Layers with a table of contents: zstd:chunked as buildah writes it, eStargz as its specification says.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::Site;
use super::image::Buildah;
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::Content;
use crate::support::model::{assert_same_files, read_tree};
use crate::support::mount::Mount;
use crate::support::proxy::{Fault, Proxy};
use crate::support::python::python;
use crate::support::scratch;

const LARGE: u64 = 24_000_000;

/// A model with a large file and small ones.
fn source() -> tempfile::TempDir {
    let dir = scratch("chunked");
    fs::create_dir_all(dir.path().join("models/deep")).unwrap();
    Content::new(1).write(&dir.path().join("models/weights.bin"), LARGE);
    Content::new(2).write(&dir.path().join("models/deep/small.bin"), 10_000);
    fs::write(dir.path().join("models/config.json"), "{}").unwrap();
    fs::write(dir.path().join("models/empty"), "").unwrap();
    dir
}

fn estargz(dir: &Path, diff_id: Option<&str>) -> Artifact {
    let out = scratch("layer");
    let layer = out.path().join("layer");
    let args = [dir.to_str().unwrap(), layer.to_str().unwrap(), "1000000"];
    let printed = python("make_estargz.py", args).ok();
    let (toc, tar) = printed.trim().split_once(' ').unwrap();
    let diff_id = diff_id.unwrap_or(tar);
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}});
    let layer = Layer::bytes(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        fs::read(layer).unwrap(),
    );
    Artifact::new("application/vnd.oci.image.config.v1+json", &config)
        .layer(layer.annotated("containerd.io/snapshot/stargz/toc.digest", toc))
}

/// Reads a little of a large layer and then all, behind a proxy that counts.
fn assert_lazy(site: &Site, name: &str, source: &Path) {
    let proxy = Proxy::start(site.registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let shown = format!("{}/{name}", proxy.host());
    assert_eq!(mount.read(&format!("{shown}/models/config.json")), b"{}");
    let at = LARGE - 3_000_000;
    let end = mount.read_at(&format!("{shown}/models/weights.bin"), at, 1000);
    assert_eq!(end, Content::new(1).bytes(at, 1000));
    proxy.settle();
    let sent = proxy.sent("/blobs/");
    assert!(sent < LARGE / 4, "{sent} bytes were sent for a few");
    assert_same_files(&mount.files(&shown), &read_tree(source));
    let weights = format!("{shown}/models/weights.bin");
    assert_eq!(
        mount.xattr(&weights, "user.ocifs.verified").as_deref(),
        Some("true")
    );
    assert_eq!(
        mount.xattr(&weights, "user.ocifs.cached"),
        Some(LARGE.to_string())
    );
}

#[test]
fn zstd_chunked_layers_of_buildah_are_lazy() {
    let (site, dir) = (Site::new(), source());
    let buildah = Buildah::new();
    let container = buildah.run(&["from", "scratch"]);
    buildah.run(&["copy", &container, dir.path().to_str().unwrap(), "/"]);
    buildah.run(&["commit", "-q", "--rm", &container, "localhost/car"]);
    let target = format!("docker://{}/org/car:v1", site.registry.host());
    buildah.run(&[
        "push",
        "-q",
        "--tls-verify=false",
        "--compression-format",
        "zstd:chunked",
        "localhost/car",
        &target,
    ]);
    assert_lazy(&site, "org/car:v1", dir.path());
}

#[test]
fn estargz_layers_are_lazy() {
    let (site, dir) = (Site::new(), source());
    estargz(dir.path(), None).publish(&site.registry, "org/car:v1");
    assert_lazy(&site, "org/car:v1", dir.path());
}

#[test]
fn a_wrong_byte_is_found_before_it_is_served() {
    let (site, dir) = (Site::new(), source());
    let published = estargz(dir.path(), None).publish(&site.registry, "org/car:v1");
    let proxy = Proxy::start(site.registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let shown = format!("{}/org/car:v1", proxy.host());
    assert_eq!(mount.read(&format!("{shown}/models/config.json")), b"{}");
    let blob = format!("/v2/org/car/blobs/{}", published.layers[0]);
    proxy.always(&blob, Fault::Corrupt(LARGE / 2));
    let weights = format!("{shown}/models/weights.bin");
    let mut failed = 0;
    for at in (0..LARGE).step_by(1_000_000) {
        match mount.try_read_at(&weights, at, 1000) {
            Ok(bytes) => assert_eq!(bytes, Content::new(1).bytes(at, 1000), "{at}"),
            Err(_) => failed += 1,
        }
    }
    assert!((1..=4).contains(&failed), "{failed} pieces failed");
}

/// A table that does not have the digest that the manifest tells is not believed; the layer is a compressed tar still.
#[test]
fn a_table_that_nobody_vouches_for_is_not_used() {
    let (site, dir) = (Site::new(), source());
    let out = scratch("layer");
    let layer = out.path().join("layer");
    python(
        "make_estargz.py",
        [
            dir.path().to_str().unwrap(),
            layer.to_str().unwrap(),
            "1000000",
        ],
    )
    .ok();
    let wrong = crate::support::content::digest(b"another table");
    let layer = Layer::bytes(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        fs::read(layer).unwrap(),
    );
    let artifact = Artifact::new("application/vnd.oci.image.config.v1+json", &json!({}))
        .layer(layer.annotated("containerd.io/snapshot/stargz/toc.digest", &wrong));
    let shown = site.show(&artifact);
    let mut found = site.mount.files(&shown);
    assert!(
        found.remove("stargz.index.json").is_some(),
        "it is a file like another"
    );
    assert_same_files(&found, &read_tree(dir.path()));
}
