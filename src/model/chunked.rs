//! Files in pieces that are compressed each by itself, with a digest of each: what eStargz and zstd:chunked make of a layer.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::inflate::Compression;
use crate::base::{ByteRange, Digest};
use crate::blob::{BlobError, LazyBlob};

/// One piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Chunk {
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// How long it is there.
    pub(super) size: u64,
    /// Where its compressed bytes begin in the layer.
    pub(super) at: u64,
    /// How many there are at most.
    pub(super) len: u64,
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

    /// Appends what the piece has of `range`, after it was decompressed and checked. The error is for people.
    pub(super) fn give(
        &self,
        compressed: &[u8],
        range: ByteRange,
        content: &mut BytesMut,
    ) -> Result<(), String> {
        let piece = open(self, compressed)?;
        let inside = ByteRange::at(self.offset, self.size).intersect(range);
        let cut = |at: u64| usize::try_from(at - self.offset).unwrap_or(usize::MAX);
        content.extend_from_slice(&piece[cut(inside.start())..cut(inside.end())]);
        Ok(())
    }
}

/// Decompresses and checks one piece.
fn open(chunk: &Chunk, compressed: &[u8]) -> Result<Vec<u8>, String> {
    let format = Compression::of(compressed).ok_or("a chunk is not compressed as it should be")?;
    let mut piece = Vec::new();
    // More may follow in the range than the chunk: its size says where it ends.
    let decoder = format
        .decoder(compressed)
        .map_err(|error| error.to_string())?;
    std::io::Read::read_to_end(&mut std::io::Read::take(decoder, chunk.size), &mut piece)
        .map_err(|error| format!("a chunk cannot be decompressed: {error}"))?;
    let actual = Digest::of(&piece);
    if actual != chunk.digest {
        return Err(format!(
            "a chunk has digest {actual} and should have {}",
            chunk.digest
        ));
    }
    Ok(piece)
}

/// A file in pieces.
#[derive(Debug)]
pub struct ChunkedFile {
    blob: Arc<LazyBlob>,
    chunks: Arc<[Chunk]>,
}

impl ChunkedFile {
    pub(super) fn new(blob: Arc<LazyBlob>, chunks: Arc<[Chunk]>) -> Self {
        Self { blob, chunks }
    }

    /// The layer.
    pub fn blob(&self) -> &Arc<LazyBlob> {
        &self.blob
    }

    /// Bytes of the file whose compressed form is in the cache.
    pub fn cached(&self) -> u64 {
        let here =
            |chunk: &&Chunk| self.blob.cached_in(ByteRange::at(chunk.at, chunk.len)) == chunk.len;
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
            let compressed = self.blob.read(chunk.compressed()).await?;
            chunk
                .give(&compressed, range, &mut content)
                .map_err(|reason| BlobError::Undecodable {
                    digest: self.blob.digest(),
                    reason,
                    lasting: true,
                })?;
        }
        Ok(content.freeze())
    }
}
