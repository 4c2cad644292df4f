//! Tests of the tar walk: ordinary, hostile and random tars.

use std::time::Instant;

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, content) in files {
        builder
            .append_data(
                &mut header(EntryType::Regular, content.len() as u64),
                name,
                *content,
            )
            .unwrap();
    }
    builder.into_inner().unwrap()
}

/// A header under a name that `Builder` would refuse.
fn raw(name: &[u8], kind: EntryType, size: u64) -> Vec<u8> {
    let mut header = header(kind, size);
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn contents(tar: &[u8]) -> Vec<(String, Vec<u8>)> {
    let (listing, _) = list(tar, 512).unwrap();
    listing
        .members
        .iter()
        .filter(|m| m.item == Item::File)
        .map(|m| {
            (
                m.path.clone(),
                tar[m.offset as usize..][..m.size as usize].to_vec(),
            )
        })
        .collect()
}

#[test]
fn members_are_found_whatever_their_names_need() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let mut builder = Builder::new(Vec::new());
    builder
        .append_data(
            &mut header(EntryType::Regular, 2),
            "config.json",
            &b"{}"[..],
        )
        .unwrap();
    builder
        .append_data(&mut header(EntryType::Directory, 0), "sub/", &b""[..])
        .unwrap();
    builder
        .append_data(&mut header(EntryType::Regular, 600), &long, &[7; 600][..])
        .unwrap();
    builder
        .append_pax_extensions([("path", &b"./pax/name"[..])])
        .unwrap();
    builder
        .append_data(&mut header(EntryType::Regular, 3), "short", &b"abc"[..])
        .unwrap();
    builder
        .append_data(&mut header(EntryType::Regular, 0), "empty", &b""[..])
        .unwrap();
    let tar = builder.into_inner().unwrap();
    let expected = [
        ("config.json", &b"{}"[..]),
        (&long, &[7; 600]),
        ("pax/name", b"abc"),
        ("empty", b""),
    ];
    let expected: Vec<_> = expected
        .iter()
        .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()))
        .collect();
    assert_eq!(contents(&tar), expected);
    // The end mark may be missing.
    assert_eq!(contents(&tar[..tar.len() - 1024]), expected);
    assert_eq!(list(&[], 512).unwrap().0.members, []);
}

#[test]
fn a_large_member_is_passed_over_without_reading_it() {
    let tar = tar_of(&[("weights", &vec![1; 10 << 20]), ("config.json", b"{}")]);
    let mut walk = Walk::new(tar.len() as u64, 16 << 10);
    let mut wanted = walk.begin();
    let mut moved = 0;
    while let Some(range) = wanted {
        moved += range.len();
        wanted = walk
            .advance(
                range.start(),
                &tar[range.start() as usize..range.end() as usize],
            )
            .unwrap();
    }
    assert_eq!(walk.finish().members.len(), 2);
    assert!(moved <= 32 << 10, "{moved} bytes");
}

#[test]
fn many_small_members_take_few_windows() {
    let names: Vec<String> = (0..2000).map(|n| n.to_string()).collect();
    let files: Vec<(&str, &[u8])> = names
        .iter()
        .map(|name| (name.as_str(), &b"x"[..]))
        .collect();
    let (listing, windows) = list(&tar_of(&files), 16 << 10).unwrap();
    assert_eq!(listing.members.len(), 2000);
    assert!(windows < 10, "{windows} windows");
}

#[test]
fn nothing_but_files_inside_gets_in() {
    let mut tar = Vec::new();
    for name in [
        &b"/etc/passwd"[..],
        b"../../etc/passwd",
        b"a/../../b",
        b"\xff\xfe",
        b".oci/manifest.json",
        b"a\nb",
    ] {
        tar.extend(raw(name, EntryType::Regular, 0));
    }
    for kind in [
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Char,
        EntryType::Block,
        EntryType::Fifo,
        EntryType::new(b'Z'),
    ] {
        tar.extend(raw(b"special", kind, 0));
    }
    tar.extend(raw(b"good", EntryType::Regular, 0));
    let (listing, _) = list(&tar, 512).unwrap();
    assert_eq!(
        listing.members,
        [Member {
            path: "good".into(),
            offset: tar.len() as u64,
            size: 0,
            item: Item::File,
            stamp: Stamp::default(),
        }]
    );
    assert_eq!(listing.notes.len(), 12, "{:#?}", listing.notes);
    for (note, why) in listing.notes.iter().zip([
        "absolute",
        "`..`",
        "`..`",
        "UTF-8",
        "own directory",
        "control",
        "symbolic",
    ]) {
        assert!(note.contains(why), "{note}");
    }
}

#[test]
fn notes_are_bounded() {
    let tar: Vec<u8> = (0..1000)
        .flat_map(|_| raw(b"x", EntryType::Fifo, 0))
        .collect();
    let notes = list(&tar, 4096).unwrap().0.notes;
    assert_eq!((notes.len(), notes[20].as_str()), (21, "and 980 more"));
}

#[test]
fn sparse_files_are_left_out_and_what_follows_is_found() {
    let mut gnu = header(EntryType::GNUSparse, 512);
    gnu.as_gnu_mut().unwrap().name[..6].copy_from_slice(b"sparse");
    let set = |field: &mut [u8; 12], value: u64| {
        field[..11].copy_from_slice(format!("{value:011o}").as_bytes())
    };
    let fields = gnu.as_gnu_mut().unwrap();
    set(&mut fields.realsize, 1 << 20);
    set(&mut fields.sparse[0].offset, (1 << 20) - 512);
    set(&mut fields.sparse[0].numbytes, 512);
    fields.isextended = [1];
    gnu.set_cksum();
    let mut tar = gnu.as_bytes().to_vec();
    tar.extend([0; 512]); // a further map block, empty
    tar.extend([1; 512]);
    tar.extend(tar_of(&[("after", b"abc")]));
    let (listing, _) = list(&tar, 512).unwrap();
    assert!(listing.notes[0].contains("sparse"), "{:?}", listing.notes);
    assert_eq!(contents(&tar), [("after".to_owned(), b"abc".to_vec())]);

    let mut builder = Builder::new(Vec::new());
    builder
        .append_pax_extensions([("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.name", b"x")])
        .unwrap();
    builder
        .append_data(
            &mut header(EntryType::Regular, 3),
            "GNUSparseFile.0/x",
            &b"1\n0"[..],
        )
        .unwrap();
    builder
        .append_data(&mut header(EntryType::Regular, 1), "after", &b"y"[..])
        .unwrap();
    assert_eq!(
        contents(&builder.into_inner().unwrap()),
        [("after".to_owned(), b"y".to_vec())]
    );
}

#[test]
fn lies_and_damage_are_errors() {
    let good = tar_of(&[("a", b"abc"), ("b", b"abc")]);
    let mut wrong_sum = good.clone();
    wrong_sum[1024] ^= 1;
    assert!(matches!(
        list(&wrong_sum, 512),
        Err(TarError::Damaged { at: 1024, .. })
    ));
    let mut lie = raw(b"a", EntryType::Regular, 1 << 40);
    lie.extend([0; 4096]);
    assert!(matches!(list(&lie, 512), Err(TarError::Lies { end, .. }) if end == (1 << 40) + 512));
    let mut wrapping = header(EntryType::Regular, u64::MAX - 100);
    wrapping.set_cksum();
    assert!(list(wrapping.as_bytes(), 512).is_err());
    assert!(matches!(
        list(&good[..1538], 512),
        Err(TarError::Lies { end: 1539, .. })
    ));
    assert!(matches!(
        list(&good[..1500], 512),
        Err(TarError::Damaged { at: 1024, .. })
    ));
    assert!(matches!(
        list(b"<html>not found</html>", 512),
        Err(TarError::NoTar)
    ));
    assert_eq!(list(&[1; 4096], 512), Err(TarError::NoTar));
    assert_eq!(
        list(&[0x1f, 0x8b, 8, 0], 512),
        Err(TarError::Compressed(Compression::Gzip))
    );
    // A long name that is announced with 4 GiB.
    let mut name = raw(b"././@LongLink", EntryType::GNULongName, 4 << 30);
    name.resize(8 << 20, b'x');
    assert!(matches!(list(&name, 512), Err(TarError::TooLarge(_))));
}

#[test]
fn links_and_directories_are_members_without_bytes() {
    let mut builder = Builder::new(Vec::new());
    let mut add = |kind, name: &str, link: Option<&str>| {
        let mut header = header(kind, 0);
        match link {
            Some(link) => builder.append_link(&mut header, name, link).unwrap(),
            None => builder.append_data(&mut header, name, &b""[..]).unwrap(),
        }
    };
    let long = format!("{}/x", "d".repeat(150));
    add(EntryType::Directory, "d/", None);
    add(EntryType::Regular, "d/file", None);
    add(EntryType::Link, "hard", Some("./d/file"));
    add(EntryType::Symlink, "soft", Some("../../etc/passwd"));
    add(EntryType::Symlink, "long", Some(&long));
    add(EntryType::Link, "out", Some("../x"));
    let (listing, _) = list(&builder.into_inner().unwrap(), 512).unwrap();
    let found: Vec<(&str, Item)> = listing
        .members
        .iter()
        .map(|member| (member.path.as_str(), member.item.clone()))
        .collect();
    assert_eq!(
        found,
        [
            ("d", Item::Directory),
            ("d/file", Item::File),
            ("hard", Item::HardLink("d/file".into())),
            ("soft", Item::Symlink("../../etc/passwd".into())),
            ("long", Item::Symlink(long)),
        ]
    );
    assert!(
        listing.notes[0].contains("hard link"),
        "{:?}",
        listing.notes
    );
    assert_eq!(
        Listing::from_note(&listing.to_note().unwrap()),
        Some(listing)
    );
}

#[test]
fn what_links_say_counts_as_names_do() {
    let mut builder = Builder::new(Vec::new());
    let target = "a/".repeat(2000);
    for n in 0..MOST_NAME_BYTES / target.len() + 1 {
        let mut header = header(EntryType::Symlink, 0);
        builder
            .append_link(&mut header, format!("l{n}"), &target)
            .unwrap();
    }
    let tar = builder.into_inner().unwrap();
    assert_eq!(
        list(&tar, 1 << 20),
        Err(TarError::TooLarge("16 MiB of names"))
    );
}

#[test]
fn a_million_members_end_soon() {
    let started = Instant::now();
    let tar = raw(b"x", EntryType::Regular, 0).repeat(1_000_000);
    assert_eq!(
        list(&tar, 1 << 20).unwrap_err(),
        TarError::TooLarge("100000 members")
    );
    assert!(started.elapsed().as_secs() < 30, "{:?}", started.elapsed());
}

proptest! {
    #[test]
    fn random_bytes_neither_panic_nor_lead_outside(
        blocks in proptest::collection::vec((any::<Option<u8>>(), 0_u64..3000, proptest::collection::vec(any::<u8>(), 0..30)), 0..8),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        window in 512_u64..5000,
    ) {
        let mut tar = Vec::new();
        for (kind, size, name) in &blocks {
            tar.extend(raw(name, EntryType::new(kind.unwrap_or(b'0')), *size));
            tar.resize((tar.len() + *size as usize).next_multiple_of(512), b'1');
        }
        for (at, byte) in flips {
            if !tar.is_empty() {
                let at = at.index(tar.len());
                tar[at] = byte;
            }
        }
        if let Ok((listing, _)) = list(&tar, window) {
            for member in &listing.members {
                prop_assert!(member.offset + member.size <= tar.len() as u64);
                prop_assert!(!member.path.split('/').any(|c| ["", ".", "..", "\0"].contains(&c)));
            }
            // What is found does not depend on the windows.
            prop_assert_eq!(Ok(listing.members), list(&tar, 1 << 20).map(|(listing, _)| listing.members));
        }
    }
}
