//! What the fuzzer calls. A panic is a finding.

use super::layout::Index;
use super::names::{RefName, is_repository, is_tag};
use super::range::{Wanted, wanted};
use super::respond::{Route, media_type_inside, route, tags};

/// A client's request: path, query and `Range`, a line each.
pub fn request(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let (path, query) = (
        lines.next().unwrap_or_default(),
        lines.next().unwrap_or_default(),
    );
    match route(path) {
        Ok(Route::Tag { repository, tag }) => assert!(is_repository(&repository) && is_tag(&tag)),
        Ok(Route::Tags { repository } | Route::Manifest { repository, .. }) => {
            assert!(is_repository(&repository));
            let index = Index::parse(
                br#"{"manifests":[{"digest":"sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
                "annotations":{"org.opencontainers.image.ref.name":"v1"}}]}"#,
            );
            let _ = tags(&index.expect("it is one"), &repository, query, false);
        }
        Ok(Route::Base | Route::Blob { .. }) | Err(_) => {}
    }
    for size in [0, 1, 1000, u64::MAX] {
        if let Wanted::Part(range) = wanted(lines.next(), size) {
            assert!(!range.is_empty() && range.end() <= size);
        }
    }
}

/// A layout's `index.json`, its names, and a manifest that no index describes.
pub fn layout(data: &[u8]) {
    if let Ok(index) = Index::parse(data) {
        for tag in index.tags("org/model") {
            assert!(index.tag("org/model", tag).is_some());
        }
    }
    let _ = media_type_inside(data);
    let text = String::from_utf8_lossy(data);
    if let Some(name) = RefName::parse(&text) {
        assert!(is_tag(&name.tag));
        if let Some(repository) = &name.repository {
            assert!(is_repository(repository) && name.serves(repository));
        }
    }
}
