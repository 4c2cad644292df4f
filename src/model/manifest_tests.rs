//! Manifests and indexes as registries have them, and as they should not be.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn digest(n: u8) -> String {
    Digest::from_bytes([n; 32]).to_string()
}

fn read(value: &Value) -> Result<Document, String> {
    parse(value.to_string().as_bytes(), "")
}

#[test]
fn it_is_written_with_the_names_that_the_specification_has() {
    let Document::Manifest(manifest) = read(&example()).unwrap() else {
        panic!("it is a manifest");
    };
    let written = serde_json::to_value(&manifest).unwrap();
    assert_eq!(
        written["config"]["mediaType"],
        example()["config"]["mediaType"]
    );
    assert!(written.get("artifactType").is_none() && written.get("media_type").is_none());
}

/// The example manifest of the OCI loader that was proposed to vLLM, with digests filled in.
fn example() -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.docker.ai.model.config.v0.1+json",
            "digest": digest(1),
            "size": 465
        },
        "layers": [
            {"mediaType": "application/vnd.docker.ai.safetensors", "digest": digest(2), "size": 3_968_658_944_u64},
            {"mediaType": "application/vnd.docker.ai.safetensors", "digest": digest(3), "size": 2_203_268_048_u64},
            {"mediaType": "application/vnd.docker.ai.vllm.config.tar", "digest": digest(4), "size": 11_530_752}
        ]
    })
}

#[test]
fn the_documented_example_is_read() {
    let Ok(Document::Manifest(manifest)) = read(&example()) else {
        panic!()
    };
    assert_eq!(
        manifest.config.media_type,
        "application/vnd.docker.ai.model.config.v0.1+json"
    );
    assert_eq!(manifest.layers.len(), 3);
    assert_eq!(manifest.layers[1].size, 2_203_268_048);
    assert_eq!(manifest.layers[2].digest, Digest::from_bytes([4; 32]));
}

#[test]
fn unknown_fields_are_ignored_and_nulls_are_absences() {
    let mut value = example();
    value["layers"][0]["urls"] = json!(["http://169.254.169.254/"]);
    value["layers"][0]["data"] = json!("AAAA");
    value["layers"][0]["annotations"] = Value::Null;
    value["annotations"] = Value::Null;
    value["subject"] = json!({"digest": "sha256:xx"});
    assert!(read(&value).is_ok());
}

#[test]
fn what_contradicts_itself_or_overflows_is_refused() {
    let change = |change: &dyn Fn(&mut Value)| {
        let mut value = example();
        change(&mut value);
        read(&value).unwrap_err()
    };
    assert!(change(&|v| v["layers"][0]["size"] = json!(-1)).contains("-1"));
    assert!(change(&|v| v["layers"][0]["size"] = json!(i64::MAX)).contains("2^63"));
    assert!(change(&|v| v["layers"][0]["size"] = json!(u64::MAX)).contains("2^63"));
    assert!(change(&|v| v["layers"][0]["size"] = json!(1.5)).contains("can't be understood"));
    assert!(change(&|v| v["layers"][0]["digest"] = json!("sha512:00")).contains("sha512"));
    assert!(
        change(&|v| v["layers"][0]["digest"] = v["layers"][1]["digest"].clone())
            .contains("two sizes")
    );
    assert!(change(&|v| v["manifests"] = json!([])).contains("both"));
    assert!(change(&|v| v["config"] = Value::Null).contains("neither"));
    assert!(change(&|v| v["schemaVersion"] = json!(1)).contains("schema 1"));
    let layer = example()["layers"][0].clone();
    assert!(change(&|v| v["layers"] = json!(vec![layer.clone(); 20_001])).contains("20001"));
    assert!(parse(b"<html>", "").is_err());
    assert!(parse("[".repeat(100_000).as_bytes(), "").is_err());
}

#[test]
fn overlong_annotations_are_not_kept() {
    let mut value = example();
    value["layers"][0]["annotations"] = json!({"a": "x".repeat(70_000), "b": "y", "c": ""});
    let Ok(Document::Manifest(manifest)) = read(&value) else {
        panic!()
    };
    assert_eq!(manifest.layers[0].annotations.len(), 2);
    assert_eq!(manifest.layers[0].annotation("b"), Some("y"));
    assert_eq!(manifest.layers[0].annotation("c"), None);
}

fn entry(n: u8, change: Value) -> Value {
    let mut value = json!({"mediaType": OCI_MANIFEST, "digest": digest(n), "size": 7});
    for (key, part) in change.as_object().unwrap() {
        value[key] = part.clone();
    }
    value
}

fn choice(entries: Vec<Value>) -> Result<u8, String> {
    let Document::Index(manifests) = read(&json!({"schemaVersion": 2, "manifests": entries}))?
    else {
        panic!()
    };
    let amd64 = Platform {
        name: "linux/amd64".into(),
        asked: false,
    };
    choose(&manifests, &amd64).map(|d| d.digest.as_bytes()[0])
}

#[test]
fn the_right_manifest_of_an_index_is_picked() {
    let platform = |arch: &str| json!({"platform": {"os": "linux", "architecture": arch}});
    let model = json!({"artifactType": "application/vnd.cncf.model.manifest.v1+json"});
    let attestation = json!({
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"}
    });
    assert_eq!(choice(vec![entry(1, json!({}))]), Ok(1));
    assert_eq!(choice(vec![entry(1, platform("arm64"))]), Ok(1));
    assert_eq!(
        choice(vec![
            entry(1, attestation.clone()),
            entry(2, platform("arm64"))
        ]),
        Ok(2)
    );
    assert_eq!(
        choice(vec![entry(1, platform("amd64")), entry(2, model.clone())]),
        Ok(2)
    );
    assert_eq!(
        choice(vec![
            entry(1, platform("arm64")),
            entry(2, platform("amd64"))
        ]),
        Ok(2)
    );
    assert_eq!(
        choice(vec![entry(1, json!({"mediaType": DOCKER_MANIFEST}))]),
        Ok(1)
    );
    let nested = json!({"mediaType": "application/vnd.oci.image.index.v1+json"});
    for unclear in [
        vec![],
        vec![entry(1, nested)],
        vec![entry(1, platform("arm64")), entry(2, platform("s390x"))],
        vec![entry(1, model.clone()), entry(2, model)],
    ] {
        assert!(choice(unclear.clone()).is_err(), "{unclear:?}");
    }
    let many = (0..200).map(|n| entry(n, platform("arm64"))).collect();
    assert!(choice(many).unwrap_err().len() < 2000);
}

#[test]
fn a_platform_that_was_asked_for_is_that_or_none() {
    let platform = |os: &str, arch: &str, variant: &str| json!({"platform": {"os": os, "architecture": arch, "variant": variant}});
    let entries = json!({"schemaVersion": 2, "manifests": [
        entry(1, platform("linux", "amd64", "")),
        entry(2, platform("linux", "arm", "v6")),
        entry(3, platform("linux", "arm", "v7")),
        entry(4, platform("linux", "arm64", "v8")),
    ]});
    let Ok(Document::Index(manifests)) = read(&entries) else {
        panic!()
    };
    let chosen = |text: &str| {
        let platform = Platform::asked(text).unwrap();
        choose(&manifests, &platform).map(|d| d.digest.as_bytes()[0])
    };
    assert_eq!(chosen("linux/arm64"), Ok(4));
    assert_eq!(chosen("linux/arm/v7"), Ok(3));
    assert_eq!(chosen("linux/arm"), Ok(2));
    assert!(chosen("linux/s390x").unwrap_err().contains("linux/s390x"));
    assert!(chosen("windows/amd64").is_err());
    let only = std::slice::from_ref(&manifests[0]);
    assert!(choose(only, &Platform::asked("linux/arm64").unwrap()).is_err());
    // Who did not ask gets what there is.
    let unasked = Platform {
        name: "linux/riscv64".into(),
        asked: false,
    };
    assert_eq!(
        choose(&manifests, &unasked).map(|d| d.digest.as_bytes()[0]),
        Ok(1)
    );
    for bad in ["", "linux", "linux/", "a/b/c/d", "linux/ä"] {
        assert!(Platform::asked(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes, "");
    }
}
