//! Which requests reach the disk, and what manifests are taken for.

use super::*;

#[test]
fn only_well_formed_names_reach_the_disk() {
    let digest = Digest::of(b"x");
    assert_eq!(route("/v2/").unwrap(), Route::Base);
    assert_eq!(
        route(&format!("/v2/a/blobs/{digest}")).unwrap(),
        Route::Blob { digest }
    );
    let route_of = |path: &str| route(path).unwrap();
    let expected = Route::Tag {
        repository: "a/blobs/b".into(),
        tag: "v1".into(),
    };
    assert_eq!(route_of("/v2/a/blobs/b/manifests/v1"), expected);
    assert_eq!(
        route_of("/v2/a/b/tags/list"),
        Route::Tags {
            repository: "a/b".into()
        }
    );
    for (path, code) in [
        ("/", "UNSUPPORTED"),
        ("/v1/", "UNSUPPORTED"),
        ("/v2x/a/tags/list", "UNSUPPORTED"),
        ("/v2/tags/list", "UNSUPPORTED"),
        ("/v2/a/tags/all", "UNSUPPORTED"),
        ("/v2/../../etc/manifests/passwd", "NAME_INVALID"),
        ("/v2/a/../manifests/v1", "NAME_INVALID"),
        ("/v2/a%2f..%2f/blobs/x", "NAME_INVALID"),
        ("/v2/a/blobs/../../etc/passwd", "UNSUPPORTED"),
        ("/v2/a/blobs/sha256:..", "DIGEST_INVALID"),
        ("/v2/a/blobs/v1", "DIGEST_INVALID"),
        ("/v2/a/manifests/-", "DIGEST_INVALID"),
    ] {
        assert_eq!(route(path).unwrap_err().code, code, "{path}");
    }
}

#[test]
fn a_manifest_tells_its_type() {
    let kind = |text: &str| media_type_inside(text.as_bytes());
    assert_eq!(kind(r#"{"mediaType":"a/b","layers":[]}"#).unwrap(), "a/b");
    assert!(kind(r#"{"manifests":[]}"#).unwrap().contains("index"));
    assert!(kind(r#"{"layers":[]}"#).unwrap().contains("manifest"));
    assert_eq!(
        kind(r#"{"architectures":["LlamaForCausalLM"]}"#),
        None,
        "a config.json is no manifest"
    );
    assert_eq!(kind("GGUF"), None);
}
