//! Filling a blob on its way: bytes, then checksum, chunk by chunk (step 2 of its life, `entry.rs`).

use std::io::IoSlice;
use std::sync::Arc;

use bytes::Bytes;

use super::CacheError;
use super::chunkmap::ChunkMap;
use super::disk;
use super::entry::Entry;
use crate::base::ByteRange;

/// Fills a range of a partial blob from front to back. Chunks become present as they are completed.
#[derive(Debug)]
pub struct Writer {
    entry: Arc<Entry>,
    at: u64,
    end: u64,
    /// CRC-32C of the current chunk so far.
    sum: u32,
    /// Whether the current chunk was there when we came to it: its bytes are not written again.
    skip: bool,
}

impl Writer {
    /// What it fills.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// The offset that the next byte goes to.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Up to where bytes are present once those before `at` are written: whole chunks.
    pub fn whole(&self, at: u64) -> u64 {
        if at == self.entry.size {
            at
        } else {
            at / self.entry.chunk() * self.entry.chunk()
        }
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// What the disk says; [`CacheError::Full`] when it is full. The writer is of no use then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), CacheError> {
        let entry = Arc::clone(&self.entry);
        let map = entry.map.as_ref().ok_or_else(|| entry.gone())?;
        let chunk = map.chunk();
        let room = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let mut rest = &bytes[..bytes.len().min(room)];
        // Bytes that are to be written but are not yet, and the sums of the chunks that they complete.
        let mut from = self.at;
        let mut pending: &[u8] = &[];
        let mut all = rest;
        let mut sums = Vec::new();
        while !rest.is_empty() {
            let index = self.at / chunk;
            let chunk_end = ((index + 1) * chunk).min(entry.size);
            if self.at == index * chunk {
                self.sum = 0;
                self.skip = map.has(ByteRange::new(self.at, chunk_end));
            }
            let take = usize::try_from(chunk_end - self.at)
                .unwrap_or(usize::MAX)
                .min(rest.len());
            if self.skip {
                entry.store(map, from, &[pending], &mut sums)?;
                rest = &rest[take..];
                all = rest;
                self.at += take as u64;
                from = self.at;
                pending = &[];
                continue;
            }
            self.sum = crc32c::crc32c_append(self.sum, &rest[..take]);
            rest = &rest[take..];
            pending = &all[..all.len() - rest.len()];
            self.at += take as u64;
            if self.at == chunk_end {
                sums.push(self.sum);
            }
        }
        entry.store(map, from, &[pending], &mut sums)
    }

    /// Writes the next bytes, which came in pieces, by one system call where nothing of them is here yet.
    ///
    /// # Errors
    /// As [`Writer::push`].
    pub fn push_pieces(&mut self, pieces: &[Bytes]) -> Result<(), CacheError> {
        let entry = Arc::clone(&self.entry);
        let map = entry.map.as_ref().ok_or_else(|| entry.gone())?;
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        let range = ByteRange::at(self.at, len);
        let plain = range == range.align(map.chunk(), entry.size)
            && range.end() <= self.end
            && map.missing(range) == [range];
        if !plain {
            return pieces.iter().try_for_each(|piece| self.push(piece));
        }
        let mut sums = Vec::with_capacity((len / map.chunk()) as usize + 1);
        let (mut sum, mut at) = (0, range.start());
        for piece in pieces {
            let mut rest: &[u8] = piece;
            while !rest.is_empty() {
                let chunk_end = ((at / map.chunk() + 1) * map.chunk()).min(range.end());
                let take = ((chunk_end - at) as usize).min(rest.len());
                sum = crc32c::crc32c_append(sum, &rest[..take]);
                (rest, at) = (&rest[take..], at + take as u64);
                if at == chunk_end {
                    sums.push(std::mem::take(&mut sum));
                }
            }
        }
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| &piece[..]).collect();
        entry.store(map, range.start(), &pieces, &mut sums)?;
        self.at = range.end();
        self.sum = 0;
        Ok(())
    }
}

impl Entry {
    /// Makes room on disk for `range`, on chunk boundaries, and gives the means to fill it.
    ///
    /// # Errors
    /// [`CacheError::Full`] when neither eviction nor the disk gives the room.
    pub fn writer(self: &Arc<Self>, range: ByteRange) -> Result<Writer, CacheError> {
        let map = self.map.as_ref().ok_or_else(|| self.gone())?;
        debug_assert_eq!(
            range,
            range.align(map.chunk(), self.size),
            "parts lie on chunk boundaries"
        );
        let absent: u64 = map.missing(range).iter().map(|gap| gap.len()).sum();
        self.cache.reserve(absent, || self.allocate(range))?;
        Ok(Writer {
            entry: Arc::clone(self),
            at: range.start(),
            end: range.end(),
            sum: 0,
            skip: false,
        })
    }

    fn allocate(&self, range: ByteRange) -> Result<(), CacheError> {
        match disk::allocate(&self.data, range.start(), range.len()) {
            Ok(_) => Ok(()),
            Err(error) if disk::is_full(&error) => Err(CacheError::Full {
                wanted: range.len(),
            }),
            Err(error) => Err(CacheError::io("allocate", &self.path())(error)),
        }
    }

    /// Writes `pieces` from `from` on and marks the chunks that end within them, whose sums are `sums`.
    fn store(
        &self,
        map: &ChunkMap,
        from: u64,
        pieces: &[&[u8]],
        sums: &mut Vec<u32>,
    ) -> Result<(), CacheError> {
        if pieces.iter().all(|piece| piece.is_empty()) {
            return Ok(());
        }
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        disk::write_pieces(&self.data, &mut slices, from).map_err(|error| {
            if disk::is_full(&error) {
                return CacheError::Full {
                    wanted: pieces.iter().map(|piece| piece.len() as u64).sum(),
                };
            }
            CacheError::io("write", &self.path())(error)
        })?;
        if !sums.is_empty() {
            let first = usize::try_from(from / map.chunk()).unwrap_or(usize::MAX);
            if let Err(error) = map.mark(first, sums) {
                // This process can go on; after a restart the chunks are fetched again.
                tracing::warn!(digest = %self.digest, %error, "cannot note which bytes of a blob are here");
            }
            sums.clear();
        }
        Ok(())
    }
}
