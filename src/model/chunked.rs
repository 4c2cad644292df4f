//! Files in pieces that are compressed each by itself, with a digest of each: what eStargz and zstd:chunked make of a layer.

use std::collections::VecDeque;
use std::io::Read as _;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::fetch::on_disk;
use super::inflate::Compression;
use crate::base::{ByteRange, Digest, lock};
use crate::blob::{BlobError, Blobs, LazyBlob, Memory};

/// Bytes of pieces that are kept, all files together: a sequential reader comes back to the same piece many times. No more than the
/// eighth part of the memory that ocifs may use.
const KEPT: u64 = 64 << 20;
/// Pieces that are opened at a time: each takes a core, and memory for its bytes.
const AT_ONCE: usize = 4;

/// One piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Chunk {
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// How long it is there.
    pub(super) size: u64,
    /// Where its compressed bytes begin in the layer.
    pub(super) at: u64,
    /// How many there are at most; none for a piece of zeros.
    pub(super) len: u64,
    /// Where it begins in what they are when they are decompressed.
    pub(super) inner: u64,
    /// The digest of the piece as it is in the file.
    pub(super) digest: Digest,
}

/// Pieces of a file that `range` touches.
pub(super) fn covering(chunks: &[Chunk], range: ByteRange) -> &[Chunk] {
    let first = chunks.partition_point(|chunk| chunk.offset + chunk.size <= range.start());
    let end = chunks.partition_point(|chunk| chunk.offset < range.end());
    &chunks[first.min(end)..end]
}

impl Chunk {
    /// Where its compressed bytes are.
    pub(super) fn compressed(&self) -> ByteRange {
        ByteRange::at(self.at, self.len)
    }

    /// Decompresses and checks it. The error is for people.
    pub(super) fn open(&self, compressed: &[u8]) -> Result<Bytes, String> {
        let bad = |error: std::io::Error| format!("a chunk cannot be decompressed: {error}");
        let format = Compression::of(compressed).ok_or("a chunk is not compressed")?;
        let mut decoder = format.decoder(compressed).map_err(bad)?;
        let skipped = std::io::copy(&mut (&mut decoder).take(self.inner), &mut std::io::sink());
        let mut piece = Vec::new();
        // More may follow than the chunk: its size says where it ends.
        let read = skipped.and_then(|_| decoder.take(self.size).read_to_end(&mut piece));
        read.map_err(bad)?;
        let actual = Digest::of(&piece);
        if actual != self.digest {
            return Err(format!(
                "a chunk has digest {actual} and should have {}",
                self.digest
            ));
        }
        Ok(piece.into())
    }

    /// Appends what a piece has of `range`.
    pub(super) fn give(&self, piece: Option<&[u8]>, range: ByteRange, content: &mut BytesMut) {
        let inside = ByteRange::at(self.offset, self.size).intersect(range);
        let cut = |at: u64| usize::try_from(at - self.offset).unwrap_or(usize::MAX);
        match piece {
            Some(piece) => {
                content.extend_from_slice(&piece[cut(inside.start())..cut(inside.end())])
            }
            None => content.resize(content.len() + inside.len() as usize, 0),
        }
    }

    /// Whether it is zeros that are stored nowhere.
    pub(super) fn is_zeros(&self) -> bool {
        self.len == 0
    }
}

/// Pieces that were read lately; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Pieces {
    blobs: Blobs,
    kept: Arc<Mutex<VecDeque<Piece>>>,
    turns: Arc<Semaphore>,
}

#[derive(Debug)]
struct Piece {
    digest: Digest,
    bytes: Bytes,
    _room: Memory,
}

impl Pieces {
    pub(super) fn new(blobs: Blobs) -> Self {
        Self {
            blobs,
            kept: Arc::default(),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    fn get(&self, digest: &Digest) -> Option<Bytes> {
        let mut kept = lock(&self.kept);
        let at = kept.iter().position(|piece| piece.digest == *digest)?;
        let piece = kept.remove(at)?;
        let bytes = piece.bytes.clone();
        kept.push_back(piece);
        Some(bytes)
    }

    /// Keeps a piece if there is memory for it.
    fn keep(&self, digest: Digest, bytes: Bytes) {
        let (len, most) = (bytes.len() as u64, KEPT.min(self.blobs.config().memory / 8));
        let mut kept = lock(&self.kept);
        let used = |kept: &VecDeque<Piece>| {
            let lens = kept.iter().map(|piece| piece.bytes.len() as u64);
            lens.sum::<u64>()
        };
        while used(&kept) + len > most && kept.pop_front().is_some() {}
        if len <= most
            && let Some(room) = self.blobs.try_room(len)
        {
            kept.push_back(Piece {
                digest,
                bytes,
                _room: room,
            });
        }
    }
}

/// A file in pieces.
#[derive(Debug)]
pub struct ChunkedFile {
    blob: Arc<LazyBlob>,
    chunks: Arc<[Chunk]>,
    pieces: Pieces,
}

impl ChunkedFile {
    pub(super) fn new(blob: Arc<LazyBlob>, chunks: Arc<[Chunk]>, pieces: Pieces) -> Self {
        Self {
            blob,
            chunks,
            pieces,
        }
    }

    /// The layer.
    pub fn blob(&self) -> &Arc<LazyBlob> {
        &self.blob
    }

    /// Bytes of the file whose compressed form is in the cache.
    pub fn cached(&self) -> u64 {
        let here = |chunk: &&Chunk| {
            chunk.is_zeros() || self.blob.cached_in(chunk.compressed()) == chunk.len
        };
        self.chunks
            .iter()
            .filter(here)
            .map(|chunk| chunk.size)
            .sum()
    }

    /// The bytes of `range`, which lies within the file; each piece is checked before anything of it is given.
    pub async fn read(&self, range: ByteRange) -> Result<Bytes, BlobError> {
        let mut content = BytesMut::new();
        for chunk in covering(&self.chunks, range) {
            if chunk.is_zeros() {
                chunk.give(None, range, &mut content);
                continue;
            }
            let piece = match self.pieces.get(&chunk.digest) {
                Some(piece) => piece,
                None => self.fetch(*chunk).await?,
            };
            chunk.give(Some(&piece), range, &mut content);
        }
        Ok(content.freeze())
    }

    async fn fetch(&self, chunk: Chunk) -> Result<Bytes, BlobError> {
        // Never closed.
        let _turn = self.pieces.turns.acquire().await.ok();
        // Whoever had the turn before may have opened the same piece.
        if let Some(piece) = self.pieces.get(&chunk.digest) {
            return Ok(piece);
        }
        let compressed = self.blob.read(chunk.compressed()).await?;
        let bad = |reason| BlobError::Undecodable {
            digest: self.blob.digest(),
            reason,
            lasting: true,
        };
        let opened = on_disk(move || chunk.open(&compressed)).await;
        let piece = opened
            .unwrap_or_else(|| Err("ocifs failed to decompress a chunk".into()))
            .map_err(bad)?;
        self.pieces.keep(chunk.digest, piece.clone());
        Ok(piece)
    }
}
