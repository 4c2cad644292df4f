//! Image indexes with platforms, and what refers to a manifest.

use std::fs;

use serde_json::{Value, json};

use super::Site;
use crate::support::artifact::{Artifact, Layer, Published, put_manifest};
use crate::support::content::digest;
use crate::support::model::SampleModel;
use crate::support::mount::{Mount, run_ocifs};
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::scratch;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Puts a manifest or index under a tag, as any client does.
fn put(registry: &Registry, repository: &str, tag: &str, media_type: &str, manifest: &Value) {
    let name = format!("{repository}:{tag}");
    put_manifest(registry, &name, media_type, manifest.to_string());
}

fn entry(published: &Published, more: Value) -> Value {
    let mut entry = json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": published.digest,
        "size": published.manifest.len(),
    });
    for (key, value) in more.as_object().unwrap() {
        entry[key] = value.clone();
    }
    entry
}

#[test]
fn the_image_of_the_platform_that_was_asked_for_is_shown() {
    let registry = Registry::open();
    let image = |arch: &str, variant: &str| {
        let dir = scratch("image");
        fs::create_dir(dir.path().join("models")).unwrap();
        fs::write(
            dir.path().join("models/arch.txt"),
            format!("{arch}{variant}"),
        )
        .unwrap();
        let layer = super::archive(dir.path(), &["models"], Some("gzip"));
        let config = json!({"architecture": arch, "os": "linux"});
        let artifact = Artifact::new("application/vnd.oci.image.config.v1+json", &config).layer(
            Layer::bytes("application/vnd.oci.image.layer.v1.tar+gzip", layer),
        );
        let published = artifact.publish(&registry, &format!("org/car:{arch}{variant}"));
        let mut platform = json!({"os": "linux", "architecture": arch});
        if !variant.is_empty() {
            platform["variant"] = json!(variant);
        }
        entry(&published, json!({ "platform": platform }))
    };
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [
        image("amd64", ""), image("arm64", ""), image("arm", "v7"),
    ]});
    put(&registry, "org/car", "v1", INDEX, &index);
    let shown = format!("{}/org/car:v1", registry.host());
    for (flags, wanted) in [
        (&["--platform", "linux/arm64"][..], "arm64"),
        (&["--platform", "linux/arm/v7"], "armv7"),
        (&["-o", "platform=linux/amd64"], "amd64"),
    ] {
        let cache = scratch("cache");
        let mount = Mount::start(cache.path(), flags);
        let read = mount.read(&format!("{shown}/models/arch.txt"));
        assert_eq!(String::from_utf8(read).unwrap(), wanted);
        assert_eq!(
            mount.read(&format!("{shown}/.oci/index.json")),
            index.to_string().as_bytes()
        );
    }
    let cache = scratch("cache");
    let dir = cache.path().to_str().unwrap();
    let said = run_ocifs([
        "ls",
        "--cache-dir",
        dir,
        "--platform",
        "linux/s390x",
        &shown,
    ])
    .failed();
    assert!(
        said.contains("linux/s390x") && said.contains("linux/arm64"),
        "{said}"
    );
    let said = run_ocifs(["ls", "--cache-dir", dir, "--platform", "linux", &shown]).failed();
    assert!(said.contains("is no platform"), "{said}");
}

#[test]
fn referrers_are_listed_by_the_api_or_by_the_tag_that_takes_its_place() {
    let site = Site::new();
    let model = SampleModel::new(341);
    let published = model.docker_v02().publish(&site.registry, "org/m:v1");
    let inspect = |reference: &str| -> Value {
        let cache = site.cache.path().to_str().unwrap();
        serde_json::from_str(
            &run_ocifs(["inspect", "--json", "--cache-dir", cache, reference]).ok(),
        )
        .unwrap()
    };
    assert_eq!(inspect(&published.reference)["referrers"], json!([]));

    // Debian's registry has no API: a signature is found by the tag.
    let signature = Artifact::new("application/vnd.oci.empty.v1+json", &json!({}))
        .layer(Layer::bytes(
            "application/vnd.dev.sigstore.bundle.v0.3+json",
            "{}",
        ))
        .publish(&site.registry, "org/m:signature");
    let kind = json!({"artifactType": "application/vnd.dev.sigstore.bundle.v0.3+json"});
    let index =
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry(&signature, kind)]});
    let tag = published.digest.replace(':', "-");
    put(&site.registry, "org/m", &tag, INDEX, &index);
    let found = inspect(&published.reference);
    assert_eq!(found["referrers"][0]["digest"], signature.digest.as_str());
    assert_eq!(
        found["referrers"][0]["artifactType"],
        "application/vnd.dev.sigstore.bundle.v0.3+json"
    );
    let said = site.inspect(&published.reference);
    assert!(
        said.contains("referrers") && said.contains("sigstore.bundle"),
        "{said}"
    );

    // Where the API is, its answer counts.
    let proxy = Proxy::start(site.registry.address());
    let other = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(b"other"), "size": 7, "artifactType": "application/spdx+json",
    }]});
    proxy.always(
        &format!("/referrers/{}", published.digest),
        Fault::Replace(INDEX.to_owned(), other.to_string().into_bytes().into()),
    );
    let found = inspect(&format!("{}/org/m:v1", proxy.host()));
    assert_eq!(found["referrers"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        found["referrers"][0]["artifactType"],
        "application/spdx+json"
    );

    // What cannot be listed is no reason not to show the model.
    proxy.always("/referrers/", Fault::Status(500, vec![]));
    let cache = scratch("cache");
    let args = [
        "inspect",
        "--cache-dir",
        cache.path().to_str().unwrap(),
        &format!("{}/org/m:v1", proxy.host()),
    ];
    assert!(run_ocifs(args).ok().contains("config.json"));
}
