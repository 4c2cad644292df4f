//! Tables of contents: those of the specification's examples, and hostile ones.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::manifest::Manifest;

fn descriptor(size: u64, annotations: &[(&str, &str)]) -> Descriptor {
    Manifest::for_tests(&[("application/vnd.oci.image.layer.v1.tar", size, annotations)])
        .layers
        .remove(0)
}

fn zstd_table(entries: &Value) -> Result<Listing, String> {
    let json = json!({"version": 1, "entries": entries}).to_string();
    let compressed = zstd::encode_all(json.as_bytes(), 1).unwrap();
    let place = ByteRange::new(10_000, 10_000 + compressed.len() as u64);
    let toc = Toc::ZstdChunked(place, Digest::of(&compressed));
    parse(toc, place, &compressed)
}

fn digest(n: u8) -> String {
    Digest::from_bytes([n; 32]).to_string()
}

#[test]
fn annotations_lead_to_a_table_or_to_none() {
    let sum = digest(1);
    let key = |key: &str| format!("io.github.containers.zstd-chunked.{key}");
    let (position, checksum) = (key("manifest-position"), key("manifest-checksum"));
    let of = |text: &str| {
        super::of(&descriptor(
            1000,
            &[(position.as_str(), text), (checksum.as_str(), sum.as_str())],
        ))
    };
    assert_eq!(
        of("100:50:900:1"),
        Some(Toc::ZstdChunked(
            ByteRange::new(100, 150),
            Digest::from_bytes([1; 32])
        ))
    );
    for bad in [
        "100:50:900:2",
        "990:50:9:1",
        "1:2",
        "",
        "a:b:c:1",
        "1:0:0:1",
        "18446744073709551615:9:9:1",
    ] {
        assert_eq!(of(bad), None, "{bad}");
    }
    let bare = descriptor(1000, &[(position.as_str(), "100:50:900:1")]);
    assert_eq!(super::of(&bare), None, "a table that nobody vouches for");
    let stargz = [("containerd.io/snapshot/stargz/toc.digest", sum.as_str())];
    assert!(matches!(
        super::of(&descriptor(1000, &stargz)),
        Some(Toc::EStargz(_))
    ));
    assert_eq!(super::of(&descriptor(51, &stargz)), None);
}

#[test]
fn the_footer_of_estargz_tells_where_the_table_is() {
    // docs/estargz.md, "Footer".
    let mut footer = vec![
        0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0,
    ];
    footer.extend(b"00000000000002f0STARGZ");
    footer.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(footer.len() as u64, FOOTER);
    let layer = descriptor(1000, &[]);
    assert_eq!(table(&layer, &footer), Some(ByteRange::new(0x2f0, 949)));
    let mut behind = footer.clone();
    behind[16..32].copy_from_slice(b"00000000000003f0");
    assert_eq!(table(&layer, &behind), None);
    let mut other = footer.clone();
    other[12] = b'X';
    assert_eq!(table(&layer, &other), None);
    assert_eq!(table(&layer, &footer[..20]), None);
}

#[test]
fn entries_become_members_with_their_pieces() {
    let listing = zstd_table(&json!([
        {"type": "dir", "name": "models/"},
        {"type": "reg", "name": "./models/a", "size": 10, "offset": 100, "endOffset": 150, "digest": digest(1)},
        {"type": "reg", "name": "models/b", "size": 30, "offset": 200, "chunkSize": 20, "chunkDigest": digest(2)},
        {"type": "chunk", "name": "models/b", "offset": 300, "chunkOffset": 20, "chunkDigest": digest(3)},
        {"type": "reg", "name": "zeros", "size": 5, "offset": 0, "endOffset": 0, "chunkSize": 5, "chunkType": "zeros"},
        {"type": "symlink", "name": "link", "linkName": "models/a"},
        {"type": "hardlink", "name": "hard", "linkName": "models/a"},
        {"type": "reg", "name": "empty"},
        {"type": "reg", "name": ".prefetch.landmark", "size": 1, "offset": 9000, "digest": digest(9)},
        {"type": "char", "name": "dev/null"},
        {"type": "reg", "name": "../out", "size": 1, "offset": 9500, "digest": digest(4)},
    ]))
    .unwrap();
    let paths: Vec<&str> = listing.members.iter().map(|m| m.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "models", "models/a", "models/b", "zeros", "link", "hard", "empty"
        ]
    );
    let pieces = |n: usize| match &listing.members[n].item {
        Item::Chunked(chunks) => chunks
            .iter()
            .map(|c| (c.offset, c.size, c.at, c.len))
            .collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(pieces(1), [(0, 10, 100, 50)]);
    assert_eq!(pieces(2), [(0, 20, 200, 100), (20, 10, 300, 8700)]);
    assert_eq!(pieces(3), [(0, 5, 0, 0)]);
    assert_eq!(pieces(6), []);
    assert_eq!(listing.notes.len(), 1, "{:?}", listing.notes);
}

#[test]
fn tables_that_lie_are_refused_as_a_whole() {
    let file = |change: Value| {
        let mut entry = json!({"type": "reg", "name": "a", "size": 10, "offset": 100, "endOffset": 150, "digest": digest(1)});
        for (key, value) in change.as_object().unwrap() {
            entry[key] = value.clone();
        }
        zstd_table(&json!([entry]))
    };
    assert!(file(json!({})).is_ok());
    for bad in [
        json!({"digest": ""}),
        json!({"endOffset": 20_000}),
        json!({"endOffset": 100}),
        json!({"chunkSize": 5}),
        json!({"chunkOffset": 5}),
        json!({"size": u64::MAX}),
        json!({"innerOffset": u64::MAX}),
    ] {
        assert!(file(bad.clone()).is_err(), "{bad}");
    }
    let compressed = zstd::encode_all(&b"{\"entries\":[]}"[..], 1).unwrap();
    let place = ByteRange::new(0, 10);
    let wrong = parse(Toc::ZstdChunked(place, Digest::of(b"")), place, &compressed);
    assert!(wrong.unwrap_err().contains("should have"));
}

#[test]
fn a_table_of_millions_of_empty_entries_is_refused_while_it_is_read() {
    let json = format!(r#"{{"entries":[{}{{}}]}}"#, "{},".repeat(MOST_ENTRIES));
    let refused = list(json.as_bytes(), 0).unwrap_err();
    assert!(refused.contains("more than 500000 items"), "{refused}");
}

proptest! {
    #[test]
    fn no_table_makes_it_panic(
        entries in proptest::collection::vec((0_usize..4, any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..6),
    ) {
        let entries: Vec<Value> = entries.iter().map(|(kind, size, offset, chunk_offset, chunk_size)| json!({
            "type": (["reg", "chunk", "dir", "symlink"][*kind]), "name": "a", "linkName": "b", "digest": digest(1),
            "size": size, "offset": offset, "chunkOffset": chunk_offset, "chunkSize": chunk_size,
        })).collect();
        let _ = zstd_table(&json!(entries));
    }
}
