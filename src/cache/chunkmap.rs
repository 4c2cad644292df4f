//! Which chunks of a partial blob are there, on disk and in memory.
//!
//! The file, little-endian:
//! ```text
//!    0   8  magic "OCIFSMAP"
//!    8   4  version, 1
//!   12   4  chunk size in bytes, a power of two
//!   16   8  blob size in bytes
//!   24  32  SHA-256 of the blob
//!   56   4  state: 0 partial, 1 sealed, 2 discarded
//!   60   4  CRC-32C of bytes 0..56
//!   64      one u32 for each chunk: 0 when it is absent, else the CRC-32C of its bytes (0 is written as 1)
//! ```
//! The order that keeps it true: 1. the chunk's bytes are written to the data file, 2. its checksum is written here,
//! 3. the chunk counts as present. A crash of the process loses nothing, for the kernel has both. A crash of the machine
//! may keep 2 and lose 1: the checksum finds that. So a chunk that this process did not write itself is checked
//! against its checksum before its first use, and counts as absent if it fails.
//!
//! The file is read and written by system calls, never mapped: a full or broken disk must be an error here, not SIGBUS.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use super::disk;
use super::lock::Claim;
use crate::base::sync::atomic::{AtomicU32, AtomicU64, Ordering, zeros};
use crate::base::{ByteRange, Digest};

const MAGIC: &[u8; 8] = b"OCIFSMAP";
const VERSION: u32 = 1;
const HEADER: u64 = 64;
const STATE: u64 = 56;
const SLOT: u64 = 4;

/// The chunk size of blobs up to 16 GiB. A random read of 64 KiB touches five of these at most, so that a sparse
/// reader pulls little more than it asks for.
const SMALLEST_CHUNK: u32 = 16 << 10;
/// Larger blobs get larger chunks, so that a map never takes more than 4 MiB of memory and disk.
const MOST_CHUNKS: u64 = 1 << 20;

/// What has become of a partial blob, as all processes see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It is on its way.
    Partial,
    /// Its data file has become a sealed blob.
    Sealed,
    /// Its content was wrong; the files are gone.
    Discarded,
}

/// The chunks of one partial blob.
#[derive(Debug)]
pub(super) struct ChunkMap {
    file: Arc<File>,
    chunk: u32,
    size: u64,
    slots: Box<[AtomicU32]>,
    /// A bit for each chunk whose bytes this process wrote or has checked.
    trusted: Box<[AtomicU64]>,
}

/// The chunk size for a blob of `size` bytes.
pub(super) fn chunk_size(size: u64) -> u32 {
    let mut chunk = SMALLEST_CHUNK;
    while size.div_ceil(u64::from(chunk)) > MOST_CHUNKS && chunk < 1 << 30 {
        chunk *= 2;
    }
    chunk
}

fn header(digest: &Digest, size: u64) -> [u8; HEADER as usize] {
    let mut bytes = [0; HEADER as usize];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&chunk_size(size).to_le_bytes());
    bytes[16..24].copy_from_slice(&size.to_le_bytes());
    bytes[24..56].copy_from_slice(digest.as_bytes());
    let sum = crc32c::crc32c(&bytes[..56]);
    bytes[60..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// What is stored for a chunk with these bytes.
fn stored(sum: u32) -> u32 {
    sum.max(1)
}

impl ChunkMap {
    /// Reads the map of a blob; `None` when the file is not a map of exactly that blob, or
    /// what it is of was sealed or thrown away.
    pub(super) fn load(file: File, digest: &Digest, size: u64) -> io::Result<Option<Self>> {
        let chunk = chunk_size(size);
        let count = usize::try_from(size.div_ceil(u64::from(chunk)))
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        let length = HEADER + count as u64 * SLOT;
        if file.metadata()?.len() != length {
            return Ok(None);
        }
        let mut bytes = vec![0; length as usize];
        disk::read_exact(&file, &mut bytes, 0)?;
        let expected = header(digest, size);
        if bytes[..HEADER as usize] != expected {
            return Ok(None);
        }
        let slots = bytes[HEADER as usize..]
            .chunks_exact(SLOT as usize)
            .map(|slot| AtomicU32::new(u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]])))
            .collect();
        Ok(Some(Self::of(file, size, slots)))
    }

    /// Makes `file` the empty map of a blob. The caller has the blob's exclusive lock.
    pub(super) fn reset(file: File, digest: &Digest, size: u64) -> io::Result<Self> {
        if file.metadata()?.len() > 0 {
            disk::set_len(&file, 0)?;
        }
        let count = size.div_ceil(u64::from(chunk_size(size)));
        disk::set_len(&file, HEADER + count * SLOT)?;
        disk::write(&file, &header(digest, size), 0)?;
        let count = usize::try_from(count).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(Self::of(file, size, zeros(count)))
    }

    fn of(file: File, size: u64, slots: Box<[AtomicU32]>) -> Self {
        let words = slots.len().div_ceil(64);
        Self {
            file: Arc::new(file),
            chunk: chunk_size(size),
            size,
            slots,
            trusted: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Bytes in a chunk; the last one may have fewer.
    pub(super) fn chunk(&self) -> u64 {
        u64::from(self.chunk)
    }

    /// The chunk numbers that `range` touches.
    fn chunks(&self, range: ByteRange) -> std::ops::Range<usize> {
        let range = range.intersect(ByteRange::new(0, self.size));
        if range.is_empty() {
            return 0..0;
        }
        let chunk = self.chunk();
        (range.start() / chunk) as usize..range.end().div_ceil(chunk) as usize
    }

    fn range(&self, index: usize) -> ByteRange {
        ByteRange::at(index as u64 * self.chunk(), self.chunk())
            .intersect(ByteRange::new(0, self.size))
    }

    /// Whether every chunk of `range` is there.
    pub(super) fn has(&self, range: ByteRange) -> bool {
        self.chunks(range)
            .all(|index| self.slots[index].load(Ordering::Acquire) != 0)
    }

    /// What of `range` is not there: whole chunks, in order, neighbours merged.
    pub(super) fn missing(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut gaps: Vec<ByteRange> = Vec::new();
        for index in self.chunks(range) {
            if self.slots[index].load(Ordering::Acquire) != 0 {
                continue;
            }
            let gap = self.range(index);
            match gaps.last_mut() {
                Some(last) if last.end() == gap.start() => {
                    *last = ByteRange::new(last.start(), gap.end())
                }
                _ => gaps.push(gap),
            }
        }
        gaps
    }

    /// Bytes of `range` that are there.
    pub(super) fn present(&self, range: ByteRange) -> u64 {
        self.chunks(range)
            .filter(|&index| self.slots[index].load(Ordering::Acquire) != 0)
            .map(|index| self.range(index).intersect(range).len())
            .sum()
    }

    /// Learns what other processes have added to `range`, and what became of the blob.
    pub(super) fn refresh(&self, range: ByteRange) -> io::Result<State> {
        let chunks = self.chunks(range);
        let mut bytes = vec![0; chunks.len() * SLOT as usize];
        let at = HEADER + chunks.start as u64 * SLOT;
        disk::read_exact(&self.file, &mut bytes, at)?;
        for (index, slot) in chunks.zip(bytes.chunks_exact(SLOT as usize)) {
            let value = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
            if value != 0 {
                // Only absent → present: what this process has dropped as damaged is zero on disk too.
                let _ = self.slots[index].compare_exchange(
                    0,
                    value,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
            }
        }
        self.state()
    }

    /// Whether `file` says that what it is the map of was found wrong. One that cannot be read says nothing.
    pub(super) fn is_discarded(file: &File) -> bool {
        Self::state_in(file).is_ok_and(|state| state == State::Discarded)
    }

    fn state(&self) -> io::Result<State> {
        Self::state_in(&self.file)
    }

    fn state_in(file: &File) -> io::Result<State> {
        let mut bytes = [0; 4];
        disk::read_exact(file, &mut bytes, STATE)?;
        Ok(match u32::from_le_bytes(bytes) {
            1 => State::Sealed,
            2 => State::Discarded,
            _ => State::Partial,
        })
    }

    /// Tells the other processes what became of the blob.
    pub(super) fn set_state(&self, state: State) -> io::Result<()> {
        let value: u32 = match state {
            State::Partial => 0,
            State::Sealed => 1,
            State::Discarded => 2,
        };
        disk::write(&self.file, &value.to_le_bytes(), STATE)
    }

    /// Step 2 and 3 for consecutive chunks from `first` with these CRC-32C sums, whose bytes are in the data file.
    /// A failure to write is returned, but the chunks count as present in this process all the same.
    pub(super) fn mark(&self, first: usize, sums: &[u32]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(sums.len() * SLOT as usize);
        for &sum in sums {
            bytes.extend_from_slice(&stored(sum).to_le_bytes());
        }
        let written = disk::write(&self.file, &bytes, HEADER + first as u64 * SLOT);
        for (index, &sum) in (first..).zip(sums) {
            self.trusted[index / 64].fetch_or(1 << (index % 64), Ordering::Release);
            self.slots[index].store(stored(sum), Ordering::Release);
        }
        written
    }

    /// Checks the chunks of `range` that were not checked or written by this process yet, reading each with `read`.
    /// Those that fail count as absent from now on; `false` when there was one. `range` must be there.
    pub(super) fn check(
        &self,
        range: ByteRange,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut buffer = Vec::new();
        let mut sound = true;
        for index in self.chunks(range) {
            if self.trusted[index / 64].load(Ordering::Acquire) & (1 << (index % 64)) != 0 {
                continue;
            }
            let expected = self.slots[index].load(Ordering::Acquire);
            let bytes = self.range(index);
            buffer.resize(bytes.len() as usize, 0);
            read(&mut buffer, bytes.start())?;
            if expected == stored(crc32c::crc32c(&buffer)) {
                self.trusted[index / 64].fetch_or(1 << (index % 64), Ordering::Release);
            } else {
                sound = false;
                self.slots[index].store(0, Ordering::Release);
                let at = HEADER + index as u64 * SLOT;
                disk::write(&self.file, &[0; SLOT as usize], at)?;
            }
        }
        Ok(sound)
    }

    /// Counts all chunks as absent in this process.
    pub(super) fn forget(&self) {
        for slot in &self.slots {
            slot.store(0, Ordering::Release);
        }
    }

    /// Claims the chunks of `range` for fetching, against other processes.
    pub(super) fn claim(&self, range: ByteRange) -> io::Result<Option<Claim>> {
        let chunks = self.chunks(range);
        Claim::take(&self.file, chunks.start as u64, chunks.len().max(1) as u64)
    }

    /// Claims all chunks for one stream, against other processes and against the claims of this one: those belong to one
    /// open file description, which knows no count, and the first to end would open a hole in the claim of the whole.
    pub(super) fn claim_all(&self) -> io::Result<Option<Claim>> {
        let again = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = File::options().read(true).write(true).open(again)?;
        Claim::take(&Arc::new(file), 0, self.slots.len().max(1) as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn map(size: u64) -> (ChunkMap, File, Digest) {
        let file = tempfile::tempfile().unwrap();
        let digest = Digest::of(b"x");
        let copy = file.try_clone().unwrap();
        (ChunkMap::reset(file, &digest, size).unwrap(), copy, digest)
    }

    #[test]
    fn the_format_is_pinned() {
        let (map, file, _) = map(40_000);
        map.mark(1, &[0xAABB_CCDD, 0]).unwrap();
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut &file, &mut bytes).ok();
        let mut all = vec![0; 76];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 76);
        let mut expected = b"OCIFSMAP\x01\0\0\0\0\x40\0\0\x40\x9c\0\0\0\0\0\0".to_vec();
        expected.extend_from_slice(Digest::of(b"x").as_bytes());
        expected.extend_from_slice(&[0; 4]);
        let sum = crc32c::crc32c(&expected[..56]).to_le_bytes();
        expected.extend_from_slice(&sum);
        expected.extend_from_slice(b"\0\0\0\0\xdd\xcc\xbb\xaa\x01\0\0\0");
        assert_eq!(all, expected, "another format needs another version");
    }

    #[test]
    fn what_is_made_is_what_is_read_back() {
        let (map, file, digest) = map(40_000);
        let read = ChunkMap::load(file, &digest, 40_000).unwrap().unwrap();
        let whole = ByteRange::new(0, 40_000);
        assert_eq!(map.missing(whole), [whole]);
        assert_eq!(read.missing(whole), [whole]);
        assert_eq!((map.chunk, map.size), (read.chunk, read.size));
        assert_eq!(map.slots.len(), read.slots.len());
        assert_eq!(map.trusted.len(), read.trusted.len());
    }

    #[test]
    fn a_map_of_another_blob_or_a_damaged_one_is_none() {
        let (map, file, digest) = map(40_000);
        drop(map);
        let load = |digest: &Digest, size| {
            ChunkMap::load(file.try_clone().unwrap(), digest, size).unwrap()
        };
        assert!(load(&digest, 40_000).is_some());
        assert!(load(&Digest::of(b"y"), 40_000).is_none());
        assert!(load(&digest, 40_001).is_none());
        for offset in 0..HEADER {
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
            assert!(load(&digest, 40_000).is_none(), "{offset}");
            file.write_all_at(&byte, offset).unwrap();
        }
        file.set_len(75).unwrap();
        assert!(load(&digest, 40_000).is_none());
    }

    #[test]
    fn gaps_are_whole_chunks_cut_at_the_end() {
        let (map, ..) = map(40_000);
        map.mark(1, &[7]).unwrap();
        let whole = ByteRange::new(0, 40_000);
        assert_eq!(
            map.missing(whole),
            [ByteRange::new(0, 16384), ByteRange::new(32768, 40_000)]
        );
        assert_eq!(map.present(ByteRange::new(16000, 17000)), 1000 - 384);
        assert!(map.has(ByteRange::new(16384, 32768)));
        assert!(!map.has(ByteRange::new(16384, 32769)));
        assert!(
            map.has(ByteRange::new(50_000, 60_000)),
            "nothing there to be missing"
        );
    }

    #[test]
    fn another_process_sees_what_was_marked_and_checks_it() {
        let (map, file, digest) = map(40_000);
        let other = ChunkMap::load(file, &digest, 40_000).unwrap().unwrap();
        let content = vec![5u8; 40_000];
        map.mark(0, &[crc32c::crc32c(&content[..16384]), 1234])
            .unwrap();
        let whole = ByteRange::new(0, 40_000);
        assert_eq!(other.missing(whole), [whole]);
        assert_eq!(other.refresh(whole).unwrap(), State::Partial);
        assert_eq!(other.missing(whole), [ByteRange::new(32768, 40_000)]);
        let read = |buffer: &mut [u8], at: u64| {
            buffer.copy_from_slice(&content[at as usize..][..buffer.len()]);
            Ok(())
        };
        assert!(other.check(ByteRange::new(0, 16384), read).unwrap());
        assert!(!other.check(ByteRange::new(0, 32768), read).unwrap());
        assert_eq!(
            other.missing(ByteRange::new(0, 32768)),
            [ByteRange::new(16384, 32768)]
        );
        other.set_state(State::Sealed).unwrap();
        assert_eq!(map.refresh(whole).unwrap(), State::Sealed);
    }

    #[test]
    fn a_map_stays_small_however_large_the_blob() {
        assert_eq!(chunk_size(0), 16 << 10);
        assert_eq!(chunk_size(16 << 30), 16 << 10);
        assert_eq!(chunk_size((16 << 30) + 1), 32 << 10);
        for size in [1 << 40, 1 << 50] {
            assert!(size / u64::from(chunk_size(size)) <= MOST_CHUNKS.max(size >> 30));
        }
    }
}
