//! What the fuzzer calls: the parsers of this layer, each with what must hold whatever it is given. A panic is a finding.

use std::collections::BTreeMap;

use super::chunked::{Chunk, covering};
use super::convention::{self, Role, Step};
use super::created::created;
use super::index::WeightMap;
use super::inflate::{self, Claimed, Compression};
use super::layout::{self, Layout, Source};
use super::manifest::{self, Descriptor, Document, Manifest, Platform};
use super::names::{self, MemberName};
use super::stamp::Stamp;
use super::tar::{self, Form, Item, Listing, Member, TarError, Walk};
use super::toc::{self, Toc};
use super::{links, plan, safetensors};
use crate::base::{ByteRange, Digest};

/// A manifest or an index, and what becomes of it: the steps of its convention, and the paths.
pub fn manifest(data: &[u8]) {
    match manifest::parse(data, "") {
        Ok(Document::Manifest(manifest)) => {
            lay_out(&manifest, b"{}");
            again(*manifest);
        }
        Ok(Document::Index(list)) => {
            if let Ok(chosen) = manifest::choose(&list, &Platform::default()) {
                assert!(list.contains(chosen));
            }
        }
        Err(reason) => assert!(reason.len() < 4096, "{reason}"),
    }
}

/// What is written is read as the same.
fn again(mut manifest: Manifest) {
    for descriptor in [&mut manifest.config]
        .into_iter()
        .chain(&mut manifest.layers)
    {
        descriptor.platform = None; // written as one text, for people
        if descriptor.media_type.is_empty() {
            descriptor.media_type = "a/b".to_owned();
        }
    }
    let text = serde_json::to_vec(&manifest).expect("keys are texts");
    let read = manifest::parse(&text, "");
    assert_eq!(read, Ok(Document::Manifest(Box::new(manifest))));
}

/// A config, read as that of each kind of artifact: nothing of it is trusted, not even to be JSON.
pub fn config(data: &[u8]) {
    let types = [
        (
            "application/vnd.kitops.modelkit.config.v1+json",
            "application/vnd.kitops.modelkit.model.v1.tar",
        ),
        (
            "application/vnd.kitops.modelkit.config.v1+json",
            "application/vnd.kitops.modelkit.modelpart.v1.tar+gzip",
        ),
        (
            "application/vnd.cncf.model.config.v1+json",
            "application/vnd.cncf.model.weight.v1.raw",
        ),
        (
            "application/vnd.docker.ai.model.config.v0.1+json",
            "application/vnd.docker.ai.safetensors",
        ),
        (
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.oci.image.layer.v1.tar+gzip",
        ),
        (
            "application/vnd.docker.container.image.v1+json",
            "application/vnd.ollama.image.model",
        ),
    ];
    for (config_type, layer_type) in types {
        let mut manifest = of_layers(config_type, &[layer_type, layer_type, "text/plain"]);
        plan::note_diff_ids(&mut manifest, data);
        lay_out(&manifest, data);
    }
}

fn of_layers(config_type: &str, layers: &[&str]) -> Manifest {
    let descriptor = |media_type: &str, n: usize| Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(&[n as u8]),
        size: 1000,
        annotations: BTreeMap::new(),
        artifact_type: None,
        platform: None,
        name: None,
        diff_id: None,
    };
    let layers = layers.iter().enumerate();
    Manifest {
        media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
        artifact_type: None,
        config: descriptor(config_type, 255),
        layers: layers
            .map(|(n, media_type)| descriptor(media_type, n))
            .collect(),
        annotations: BTreeMap::new(),
    }
}

fn lay_out(manifest: &Manifest, config: &[u8]) {
    let _ = created(manifest, config);
    let convention = convention::of(manifest);
    let steps = (convention.steps)(manifest, config);
    let mut layers: Vec<usize> = steps.iter().map(|step| step.layer).collect();
    layers.sort_unstable();
    assert!(
        layers.iter().copied().eq(0..manifest.layers.len()),
        "{}: each layer once: {layers:?}",
        convention.name
    );
    if let Some(extras) = convention.extras {
        for (path, _) in extras(manifest, config).files {
            assert_eq!(names::annotated(path).as_deref(), Ok(path));
        }
    }
    let is_tar = |step: &&Step| matches!(step.role, Role::Tar { .. });
    for told in [Ok(small_listing()), Err(TarError::NoTar)] {
        let tars = steps
            .iter()
            .filter(is_tar)
            .map(|step| (step.layer, told.clone()))
            .collect();
        let layout = layout::lay_out(manifest, &steps, &tars, None);
        check(&layout, &manifest.layers);
    }
}

fn small_listing() -> Listing {
    let member = |path: &str, item| Member {
        path: path.to_owned(),
        offset: 0,
        size: 0,
        stamp: Stamp::default(),
        item,
    };
    Listing {
        form: Form::Plain,
        members: vec![
            member("a/b", Item::File),
            member("a/c", Item::Symlink("b".to_owned())),
            member(".wh.d", Item::File),
            member("e", Item::HardLink("a/b".to_owned())),
        ],
        notes: Vec::new(),
        entries: 4,
    }
}

/// A model's paths stay in its directory, and each file in its layer.
fn check(layout: &Layout, layers: &[Descriptor]) {
    let mut above: Option<&str> = None;
    for (path, file) in &layout.files {
        check_path(path);
        if let Some(above) = above {
            assert!(
                !path
                    .strip_prefix(above)
                    .is_some_and(|rest| rest.starts_with('/')),
                "{path} lies below the file {above}"
            );
        }
        above = Some(path);
        match &file.source {
            Source::Layer { layer, offset } => {
                assert!(
                    offset
                        .checked_add(file.size)
                        .is_some_and(|end| end <= layers[*layer].size),
                    "{path}: {file:?}"
                );
            }
            Source::Unpacked { layer, .. } => assert!(*layer < layers.len()),
            Source::Chunks { layer, chunks } => {
                check_chunks(chunks, file.size, layers[*layer].size)
            }
            Source::Link(target) => check_target(path, target),
            Source::Made(_) => {}
        }
    }
}

fn check_path(path: &str) {
    assert!(
        !path.is_empty() && !path.chars().any(char::is_control),
        "{path:?}"
    );
    for part in path.split('/') {
        assert!(
            !part.is_empty() && part != "." && part != ".." && part.len() <= 255,
            "{path:?}"
        );
    }
    assert!(path.split('/').next() != Some(names::RESERVED), "{path:?}");
}

/// A link that is followed from its own place leads nowhere above the model.
fn check_target(path: &str, target: &str) {
    assert!(!target.starts_with('/'), "{path} -> {target}");
    let mut depth = path.split('/').count() - 1;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                assert!(depth > 0, "{path} -> {target}");
                depth -= 1;
            }
            _ => depth += 1,
        }
    }
}

/// Pieces are all of a file, and lie in the layer.
fn check_chunks(chunks: &[Chunk], size: u64, layer: u64) {
    let mut at = 0;
    for chunk in chunks {
        assert_eq!(chunk.offset, at);
        assert!(chunk.size > 0 && chunk.compressed().end() <= layer);
        at = at.checked_add(chunk.size).expect("sizes were added before");
    }
    assert_eq!(at, size);
    for range in [
        ByteRange::new(0, 1),
        ByteRange::new(size / 2, size),
        ByteRange::new(size, u64::MAX),
    ] {
        for chunk in covering(chunks, range) {
            assert!(ByteRange::at(chunk.offset, chunk.size).overlaps(range));
        }
    }
}

/// A tar: the walk by small windows finds what the walk by large ones finds; members lie in it, and their names in the model.
pub fn tar(data: &[u8]) {
    let small = walk(data, 512);
    let large = walk(data, 1 << 20);
    assert_eq!(small, large);
    let _ = tar::is_header(data);
    let Ok(listing) = small else { return };
    for member in &listing.members {
        check_path(&member.path);
        assert!(member.offset + member.size <= data.len() as u64);
    }
    place(&listing, data.len() as u64);
    let note = listing.to_note().expect("it can be written");
    assert_eq!(Listing::from_note(&note), Some(listing));
}

fn walk(data: &[u8], window: u64) -> Result<Listing, TarError> {
    let mut walk = Walk::new(data.len() as u64, window);
    let mut wanted = walk.begin();
    let mut rounds = 0;
    while let Some(range) = wanted {
        assert!(range.end() <= data.len() as u64 && !range.is_empty());
        rounds += 1;
        assert!(rounds <= 4 * (data.len() / 512 + 2), "it does not end");
        let piece = &data[range.start() as usize..range.end() as usize];
        wanted = walk.advance(range.start(), piece)?;
    }
    let _ = walk.only_file();
    Ok(walk.finish())
}

/// The listing as the layers of an image, over each other, and as one tar.
fn place(listing: &Listing, size: u64) {
    for config_type in [
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.cncf.model.config.v1+json",
    ] {
        let layer = match config_type.contains("image") {
            true => "application/vnd.oci.image.layer.v1.tar",
            false => "application/vnd.cncf.model.weight.v1.tar",
        };
        let mut manifest = of_layers(config_type, &[layer, layer]);
        for layer in &mut manifest.layers {
            layer.size = size.max(1000);
        }
        let steps = (convention::of(&manifest).steps)(&manifest, &[]);
        let tars: BTreeMap<_, _> = (0..2).map(|layer| (layer, Ok(listing.clone()))).collect();
        let layout = layout::lay_out(&manifest, &steps, &tars, None);
        check(&layout, &manifest.layers);
    }
}

/// A listing that was kept, as JSON and as the zstd frame that it is kept in.
pub fn note(data: &[u8]) {
    for listing in [
        Listing::from_note(data),
        zstd::encode_all(data, 1)
            .ok()
            .and_then(|note| Listing::from_note(&note)),
    ]
    .into_iter()
    .flatten()
    {
        let note = listing.to_note().expect("it can be written");
        assert_eq!(Listing::from_note(&note), Some(listing));
    }
}

/// A safetensors file from its first byte; the tensors lie in it, in order, and not over each other.
pub fn safetensors(data: &[u8]) {
    let size = data.len() as u64;
    let Ok(len) = safetensors::header_len(data, size) else {
        return;
    };
    let end = (safetensors::PREFIX + len) as usize;
    let json = &data[safetensors::PREFIX as usize..end];
    for file_size in [size, u64::MAX, end as u64] {
        let Ok(header) = safetensors::parse(json, file_size) else {
            continue;
        };
        let mut at = header.data_start;
        for tensor in &header.tensors {
            assert!(tensor.offset >= at && tensor.range().len() == tensor.size);
            at = tensor.range().end();
        }
        assert!(at <= file_size);
    }
}

/// A packaged index of tensors.
pub fn index(data: &[u8]) {
    let Ok(map) = WeightMap::parse(data) else {
        return;
    };
    for shard in map.tensors_per_shard().into_keys() {
        check_path(shard);
    }
}

/// The table of contents of a layer in pieces: the JSON itself, and what it is packed in.
pub fn toc(data: &[u8]) {
    const START: u64 = 1 << 30;
    if let Ok(listing) = toc::list(data, START) {
        for member in &listing.members {
            check_path(&member.path);
            if let Item::Chunked(chunks) = &member.item {
                check_chunks(chunks, member.size, START);
            }
        }
        let mut manifest = of_layers(
            "application/vnd.oci.image.config.v1+json",
            &["application/vnd.oci.image.layer.v1.tar+zstd"],
        );
        manifest.layers[0].size = START;
        let steps = (convention::of(&manifest).steps)(&manifest, &[]);
        let tars = BTreeMap::from([(0, Ok(listing))]);
        check(
            &layout::lay_out(&manifest, &steps, &tars, None),
            &manifest.layers,
        );
    }
    let place = ByteRange::new(0, data.len() as u64);
    let _ = toc::parse(
        Toc::ZstdChunked(place, Digest::of(data)),
        ByteRange::new(START, START + 1),
        data,
    );
    let _ = toc::last_tar(data);
    let mut layer = of_layers("", &["application/vnd.oci.image.layer.v1.tar+gzip"]);
    let layer = &mut layer.layers[0];
    if let Some(table) = toc::table(layer, data) {
        assert!(table.end() <= layer.size && !table.is_empty());
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let told = [
            ("io.github.containers.zstd-chunked.manifest-position", text),
            (
                "io.github.containers.zstd-chunked.manifest-checksum",
                "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
        ];
        layer.annotations = told
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        if let Some(Toc::ZstdChunked(place, _)) = toc::of(layer) {
            assert!(place.end() <= layer.size && !place.is_empty());
        }
    }
}

/// A compressed layer: never more than was allowed, whatever it claims.
pub fn compressed(data: &[u8]) {
    const LIMIT: u64 = 64 << 10;
    let _ = Claimed::of(data, data);
    let Some(compression) = Compression::of(data) else {
        return;
    };
    if let Ok(content) = inflate::whole(compression, data, LIMIT) {
        assert!(content.len() as u64 <= LIMIT);
    }
    let chunk = Chunk {
        offset: 0,
        size: LIMIT,
        at: 0,
        len: data.len() as u64,
        inner: 5,
        digest: Digest::of(b""),
    };
    let _ = chunk.open(data);
}

/// Names from annotations and tars.
pub fn names(data: &[u8]) {
    if let Ok(MemberName::Path(path)) = names::member(data) {
        check_path(&path);
        assert_eq!(
            names::member(path.as_bytes()),
            Ok(MemberName::Path(path.clone()))
        );
    }
    if let Ok(path) = names::directory(data) {
        check_path(&path);
    }
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(path) = names::annotated(text) {
        check_path(&path);
        assert_eq!(names::annotated(&path), Ok(path));
    }
    let _ = names::is_target(text);
}

/// Links in a model: lines of `path target`. None leads out, and each ends.
pub fn links(data: &[u8]) {
    let mut members = Vec::new();
    for line in String::from_utf8_lossy(data).lines() {
        let (path, target) = line.split_once(' ').unwrap_or((line, ""));
        let Ok(MemberName::Path(path)) = names::member(path.as_bytes()) else {
            continue;
        };
        let item = match target {
            "" => Item::File,
            "/" => Item::Directory,
            hard if hard.starts_with('=') => match names::member(&hard.as_bytes()[1..]) {
                Ok(MemberName::Path(target)) => Item::HardLink(target),
                _ => continue,
            },
            target if names::is_target(target) => Item::Symlink(target.to_owned()),
            _ => continue,
        };
        members.push(Member {
            path,
            offset: 0,
            size: 0,
            stamp: Stamp::default(),
            item,
        });
    }
    if let [first, .., last] = &members[..] {
        let _ = links::relative(&first.path, &last.path);
    }
    let entries = members.len();
    let listing = Listing {
        form: Form::Plain,
        members,
        notes: Vec::new(),
        entries,
    };
    place(&listing, 1000);
}
