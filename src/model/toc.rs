//! Tables of contents of layers that are compressed piece by piece: eStargz and zstd:chunked. Pure.
//!
//! Sources: stargz-snapshotter `docs/estargz.md`; containers/storage `pkg/chunked/internal` for zstd:chunked. A table is only used when
//! the layer's descriptor, and thereby the manifest, tells its digest: then a piece is as trustworthy as the manifest.

use std::io::Read as _;
use std::sync::Arc;

use serde::{Deserialize, Deserializer};

use super::bounded;
use super::chunked::Chunk;
use super::inflate::{self, Compression};
use super::manifest::Descriptor;
use super::names::{self, MemberName};
use super::notes::{Notes, quote};
use super::stamp::Stamp;
use super::tar::{Form, Item, Listing, Member};
use crate::base::{ByteRange, Digest};

/// The largest table, compressed and uncompressed.
const LARGEST: u64 = 64 << 20;
const LARGEST_JSON: u64 = 256 << 20;
/// The largest piece, compressed or not: it is held in memory.
const LARGEST_CHUNK: u64 = 64 << 20;
/// Most entries.
const MOST_ENTRIES: usize = 500_000;
/// Notes about what was left out.
const MOST_NOTES: usize = 20;

/// The length of eStargz's footer.
const FOOTER: u64 = 51;
/// The name of the table in eStargz's last tar.
const TABLE: &str = "stargz.index.json";

/// Where the table of a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Toc {
    /// At the place that eStargz's footer tells; the digest is that of the JSON.
    EStargz(Digest),
    /// At this place; the digest is that of the compressed JSON.
    ZstdChunked(ByteRange, Digest),
}

/// What the descriptor says of a table.
pub(super) fn of(layer: &Descriptor) -> Option<Toc> {
    if let Some(digest) = layer.annotation("containerd.io/snapshot/stargz/toc.digest") {
        return (layer.size > FOOTER).then_some(Toc::EStargz(digest.parse().ok()?));
    }
    ["io.github.containers.", "io.containers."]
        .iter()
        .find_map(|prefix| {
            let told = |key: &str| layer.annotation(&format!("{prefix}zstd-chunked.{key}"));
            // `offset:length:uncompressed length:type`, and type 1 is the table that both formats share.
            let position = told("manifest-position")?;
            let digest = told("manifest-checksum")?.parse().ok()?;
            let parts: Vec<u64> = position
                .split(':')
                .map(|part| part.parse().ok())
                .collect::<Option<_>>()?;
            let [offset, len, _, 1] = parts[..] else {
                return None;
            };
            let end = offset.checked_add(len)?;
            let fits = len > 0 && len <= LARGEST && end <= layer.size;
            fits.then(|| Toc::ZstdChunked(ByteRange::new(offset, end), digest))
        })
}

/// Where eStargz's footer is.
pub(super) fn footer(layer: &Descriptor) -> ByteRange {
    ByteRange::new(layer.size - FOOTER, layer.size)
}

/// Where the table is that a footer tells of: an empty gzip member whose extra field is `SG`, 22, and then the offset of the table in 16
/// hexadecimal digits and `STARGZ`.
pub(super) fn table(layer: &Descriptor, footer: &[u8]) -> Option<ByteRange> {
    const HEADER: usize = 16;
    let extra = footer.get(HEADER..HEADER + 22)?;
    let known = footer.get(..4)? == [0x1f, 0x8b, 8, 4]
        && footer.get(10..HEADER)? == [26, 0, b'S', b'G', 22, 0]
        && extra.ends_with(b"STARGZ");
    let offset = std::str::from_utf8(&extra[..16]).ok()?;
    let offset = u64::from_str_radix(offset, 16).ok()?;
    let end = layer.size - FOOTER;
    let fits = known && offset < end && end - offset <= LARGEST;
    fits.then(|| ByteRange::new(offset, end))
}

#[derive(Deserialize)]
struct Table {
    #[serde(deserialize_with = "entries")]
    entries: Vec<Entry>,
}

/// At most [`MOST_ENTRIES`]: an empty entry is two characters of JSON and a hundred times that in memory.
fn entries<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Entry>, D::Error> {
    bounded::list(deserializer, MOST_ENTRIES)
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    name: String,
    link_name: String,
    size: u64,
    offset: u64,
    end_offset: u64,
    inner_offset: u64,
    digest: String,
    chunk_offset: u64,
    chunk_size: u64,
    chunk_digest: String,
    chunk_type: String,
    mode: i64,
    modtime: String,
}

/// What a table lists. The error is for people.
pub(super) fn parse(toc: Toc, place: ByteRange, compressed: &[u8]) -> Result<Listing, String> {
    let json = match toc {
        Toc::ZstdChunked(_, digest) => {
            check(digest, Digest::of(compressed))?;
            inflate::whole(Compression::Zstd, compressed, LARGEST_JSON)
                .map_err(|error| format!("it cannot be decompressed: {error}"))?
        }
        Toc::EStargz(digest) => {
            let json = last_tar(compressed)?;
            check(digest, Digest::of(&json))?;
            json
        }
    };
    list(&json, place.start())
}

/// What the JSON of a table lists; `end` is where the last piece ends at the latest.
pub(super) fn list(json: &[u8], end: u64) -> Result<Listing, String> {
    let table: Table = serde_json::from_slice(json)
        .map_err(|error| format!("it cannot be understood: {error}"))?;
    members(&table.entries, end)
}

fn check(expected: Digest, actual: Digest) -> Result<(), String> {
    if expected == actual {
        return Ok(());
    }
    Err(format!("it has digest {actual} and should have {expected}"))
}

/// The table in the tar that ends an eStargz layer.
pub(super) fn last_tar(compressed: &[u8]) -> Result<Vec<u8>, String> {
    let bad = |error: std::io::Error| format!("it cannot be read: {error}");
    let tar = Compression::Gzip.decoder(compressed).map_err(bad)?;
    let mut archive = tar::Archive::new(tar.take(LARGEST_JSON));
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        if entry.path_bytes().as_ref() == TABLE.as_bytes() {
            let mut json = Vec::new();
            entry.read_to_end(&mut json).map_err(bad)?;
            return Ok(json);
        }
    }
    Err(format!("there is no {TABLE}"))
}

/// Entries as members.
fn members(entries: &[Entry], end: u64) -> Result<Listing, String> {
    let mut starts: Vec<u64> = entries
        .iter()
        .filter(|entry| matches!(entry.kind.as_str(), "reg" | "chunk"))
        .map(|entry| entry.offset)
        .collect();
    starts.sort_unstable();
    starts.dedup();
    let mut members = Vec::new();
    let mut notes = Notes::new(MOST_NOTES);
    let mut at = 0;
    while let Some(entry) = entries.get(at) {
        at += 1;
        // The pieces after the first stand behind their file.
        let more = entries[at..]
            .iter()
            .take_while(|entry| entry.kind == "chunk")
            .count();
        let pieces = &entries[at - 1..at + more];
        at += more;
        let item = match entry.kind.as_str() {
            "reg" => Item::Chunked(chunks(entry, pieces, &starts, end)?),
            "dir" => Item::Directory,
            "symlink" if names::is_target(&entry.link_name) => {
                Item::Symlink(entry.link_name.clone())
            }
            "hardlink" => match names::member(entry.link_name.as_bytes()) {
                Ok(MemberName::Path(target)) => Item::HardLink(target),
                _ => {
                    notes.add(format!("left out {}: a bad hard link", quote(&entry.name)));
                    continue;
                }
            },
            // Devices and pipes, and eStargz's own landmarks are of no use here.
            _ => continue,
        };
        let name = entry.name.trim_start_matches('/');
        let path = if item == Item::Directory {
            names::directory(name.as_bytes())
        } else {
            match names::member(name.as_bytes()) {
                Ok(MemberName::Path(path)) => Ok(path),
                Ok(MemberName::Directory) => continue,
                Err(why) => Err(why),
            }
        };
        match path {
            Ok(path) if is_landmark(&path) => {}
            Ok(path) => members.push(Member {
                path,
                offset: 0,
                size: entry.size,
                stamp: match item {
                    Item::Chunked(_) => Stamp::of_text(&entry.modtime, (entry.mode & 0o777) as u32),
                    _ => Stamp::default(),
                },
                item,
            }),
            Err(_) if item == Item::Directory => {}
            Err(why) => notes.add(format!("left out {}: {why}", quote(&entry.name))),
        }
    }
    Ok(Listing {
        form: Form::Chunked,
        entries: members.len(),
        members,
        notes: notes.into_lines(),
    })
}

/// Files that eStargz adds at the top to say what to prefetch.
fn is_landmark(path: &str) -> bool {
    matches!(path, ".prefetch.landmark" | ".no.prefetch.landmark")
}

/// The pieces of a file, which must be all of it.
fn chunks(
    file: &Entry,
    pieces: &[Entry],
    starts: &[u64],
    end: u64,
) -> Result<Arc<[Chunk]>, String> {
    let bad = |why: &str| format!("{}: {why}", quote(&file.name));
    let mut chunks = Vec::with_capacity(pieces.len());
    let mut offset = 0;
    if file.size == 0 {
        return Ok(Arc::default());
    }
    for piece in pieces {
        let size = match piece.chunk_size {
            0 => file.size.saturating_sub(piece.chunk_offset),
            size => size,
        };
        let zeros = piece.chunk_type == "zeros";
        let next = starts.partition_point(|start| *start <= piece.offset);
        let stop = match piece.end_offset {
            0 => starts.get(next).copied().unwrap_or(end),
            stop => stop,
        };
        let len = if zeros {
            0
        } else {
            stop.checked_sub(piece.offset)
                .filter(|len| *len > 0 && stop <= end)
                .ok_or_else(|| bad("a chunk lies outside the layer"))?
        };
        if piece.chunk_offset != offset || size == 0 {
            return Err(bad("its chunks have gaps"));
        }
        let inner = piece.inner_offset;
        // Zeros take no memory until they are read, and a read is short.
        if size.max(len).saturating_add(inner) > LARGEST_CHUNK && !zeros {
            return Err(bad("a chunk has more than 64 MiB"));
        }
        let digest = match piece.chunk_digest.as_str() {
            "" => &file.digest,
            digest => digest,
        };
        let digest = match digest.parse() {
            Ok(digest) => digest,
            Err(_) if zeros => Digest::of(b""),
            Err(_) => return Err(bad("a chunk has no digest")),
        };
        chunks.push(Chunk {
            offset,
            size,
            at: piece.offset,
            len,
            inner,
            digest,
        });
        offset = offset
            .checked_add(size)
            .ok_or_else(|| bad("its size overflows"))?;
    }
    if offset != file.size {
        return Err(bad("its chunks are not all of it"));
    }
    Ok(chunks.into())
}

#[cfg(test)]
#[path = "toc_tests.rs"]
mod tests;
