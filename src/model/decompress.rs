//! From the compressed bytes of a layer, as they come, to its uncompressed form: one blocking run that hashes, bounds and hands on.

use std::io::{self, BufRead, Read};
use std::sync::{Arc, Mutex};

use bytes::{Buf as _, Bytes};
use tokio::sync::{mpsc, watch};

use super::inflate::{Compression, is_bomb};
use super::unpacked::{Progress, Unpacked};
use crate::base::{ByteSize, Digest, Hasher, lock};
use crate::blob::BlobError;
use crate::cache::{CacheError, Entry, Unpacker};

/// Uncompressed bytes that are handed on at a time.
const STEP: usize = 1 << 20;

/// Why a layer was not decompressed to its end.
#[derive(Debug)]
pub(super) enum Stopped {
    /// It cannot be had, or is wrong.
    Failed(BlobError),
    /// The cache takes no more of it.
    NotKept(CacheError),
    /// Nobody wants it any more.
    Left,
}

impl Unpacked {
    /// Decompresses into the cache. Blocks on the disk and on what feeds it. Looks back no further than `window`.
    pub(super) fn decompress(
        &self,
        mut unpacker: Unpacker,
        feed: Feed,
        window: u64,
        progress: &watch::Sender<Progress>,
    ) -> Result<Entry, Stopped> {
        let (uncompressed, _) = self.decompress_to(feed, window, &mut |bytes| {
            unpacker.push(bytes).map_err(Stopped::NotKept)?;
            progress.send_modify(|now| now.at += bytes.len() as u64);
            Ok(())
        })?;
        unpacker.finish(&uncompressed).map_err(Stopped::NotKept)
    }

    /// Decompresses, and hands on what comes out. Digest and size of it when all of it came and was right.
    pub(super) fn decompress_to(
        &self,
        mut feed: Feed,
        window: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<(), Stopped>,
    ) -> Result<(Digest, u64), Stopped> {
        let digest = self.blob.digest();
        let bad = |reason: String| {
            Stopped::Failed(BlobError::Undecodable {
                digest,
                reason,
                lasting: true,
            })
        };
        let failed = Arc::clone(&feed.failed);
        // What the registry could not deliver is not the stream's fault.
        let cause = |error: io::Error| {
            lock(&failed).take().map_or_else(
                || bad(format!("it cannot be decompressed: {error}")),
                Stopped::Failed,
            )
        };
        // Where the digest of the uncompressed bytes is known, it decides; else that of the layer does.
        feed.hasher = self.diff_id.is_none().then(Hasher::new);
        let start = feed.fill_buf().map_err(&cause)?;
        let format = Compression::of(start)
            .ok_or_else(|| bad("it is compressed neither with gzip nor with zstd".into()))?;
        let mut hasher = Hasher::new();
        let mut made = 0_u64;
        let mut buffer = vec![0; STEP];
        {
            let mut decoder = format.decoder_within(&mut feed, window).map_err(&cause)?;
            loop {
                let count = fill(&mut decoder, &mut buffer).map_err(&cause)?;
                if count == 0 {
                    break;
                }
                hasher.update(&buffer[..count]);
                made += count as u64;
                // The whole layer is the bound on what was taken: looser than what was, and not to be passed by a bomb.
                if is_bomb(self.blob.size(), made) {
                    return Err(bad(format!(
                        "it has more than {} uncompressed and {} compressed, which no model has",
                        ByteSize(made),
                        ByteSize(self.blob.size())
                    )));
                }
                take(&buffer[..count])?;
            }
        }
        let compressed = feed.finish().map_err(&cause)?;
        let uncompressed = hasher.finish();
        let corrupt = |expected: Digest, actual: Digest| {
            (expected != actual).then_some(BlobError::Corrupt {
                digest: expected,
                actual,
            })
        };
        let wrong = match (self.diff_id, compressed) {
            (Some(diff_id), _) => corrupt(diff_id, uncompressed),
            (None, Some(compressed)) => corrupt(digest, compressed),
            (None, None) => None,
        };
        match wrong {
            Some(error) => Err(Stopped::Failed(error)),
            None => Ok((uncompressed, made)),
        }
    }
}

/// Reads until the buffer is full or the stream has ended.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match source.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

/// The compressed bytes as they come, as a blocking reader.
pub(super) struct Feed {
    source: mpsc::Receiver<Result<Bytes, BlobError>>,
    piece: Bytes,
    hasher: Option<Hasher>,
    failed: Arc<Mutex<Option<BlobError>>>,
}

impl Feed {
    /// A reader of these pieces.
    pub(super) fn new(source: mpsc::Receiver<Result<Bytes, BlobError>>) -> Self {
        Self {
            source,
            piece: Bytes::new(),
            hasher: None,
            failed: Arc::default(),
        }
    }

    /// Takes what the decoder left; gives the digest of all.
    fn finish(mut self) -> io::Result<Option<Digest>> {
        if self.hasher.is_some() {
            loop {
                let left = self.fill_buf()?.len();
                if left == 0 {
                    break;
                }
                self.consume(left);
            }
        }
        Ok(self.hasher.map(Hasher::finish))
    }
}

impl BufRead for Feed {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.piece.is_empty() {
            match self.source.blocking_recv() {
                Some(Ok(piece)) => {
                    self.piece = piece;
                }
                Some(Err(error)) => {
                    let said = error.to_string();
                    *lock(&self.failed) = Some(error);
                    return Err(io::Error::other(said));
                }
                None => {}
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, count: usize) {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&self.piece[..count]);
        }
        self.piece.advance(count);
    }
}

impl Read for Feed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let here = self.fill_buf()?;
        let count = here.len().min(buffer.len());
        buffer[..count].copy_from_slice(&here[..count]);
        self.consume(count);
        Ok(count)
    }
}
