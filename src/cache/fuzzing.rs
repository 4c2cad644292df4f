//! What the fuzzer calls. A panic is a finding.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use super::chunkmap::{ChunkMap, chunk_size};
use crate::base::{ByteRange, Digest};

/// The chunk map of a blob that somebody else has written: the blob's size, then slots, behind a header that is right or not.
pub fn chunk_map(data: &[u8]) {
    let Some((size, rest)) = data.split_first_chunk::<8>() else {
        return;
    };
    let size = u64::from_le_bytes(*size) >> 16;
    let digest = Digest::of(b"blob");
    let count = size.div_ceil(u64::from(chunk_size(size)));
    assert!(count <= 1 << 20 || chunk_size(size) == 1 << 30);
    let Ok(memory) = rustix::fs::memfd_create("map", rustix::fs::MemfdFlags::CLOEXEC) else {
        return;
    };
    let file = File::from(memory);
    if count <= 4096 {
        // A right one with strange slots, then with whatever header came.
        let map = file.try_clone().expect("a descriptor is left");
        ChunkMap::reset(map, &digest, size).expect("memory takes it");
        let slots = rest.get(64..).unwrap_or_default();
        let slots = &slots[..slots.len().min(count as usize * 4)];
        file.write_all_at(slots, 64).expect("memory takes it");
        let map = file.try_clone().expect("a descriptor is left");
        if let Ok(Some(map)) = ChunkMap::load(map, &digest, size) {
            for range in [
                ByteRange::new(0, size),
                ByteRange::new(size / 2, u64::MAX),
                ByteRange::at(size, 1),
            ] {
                let within = range.intersect(ByteRange::new(0, size));
                let missing = map.missing(range);
                assert!(
                    missing
                        .iter()
                        .all(|gap| gap.end() <= size && !gap.is_empty())
                );
                assert_eq!(map.has(range), missing.is_empty());
                let gone: u64 = missing.iter().map(|gap| gap.intersect(within).len()).sum();
                assert_eq!(map.present(range) + gone, within.len());
                let _ = map.refresh(range);
            }
        }
    }
    file.set_len(0).expect("memory takes it");
    file.write_all_at(rest, 0).expect("memory takes it");
    let _ = ChunkMap::load(file, &digest, size);
}
