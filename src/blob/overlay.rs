//! Bytes that the cache has no room for, kept in memory just long enough for whoever asked for them.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::base::ByteRange;

/// The most that one blob keeps. A reader waits for at most a few of the kernel's 1 MiB requests at a time.
const LIMIT: u64 = 64 << 20;
/// The most that is kept of one source, so that a fast one does not push out what a slow one's reader comes to next.
const LIMIT_OF_ONE: u64 = 16 << 20;

/// Pieces of a blob, the oldest dropped when there are too many.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    pieces: VecDeque<Piece>,
    held: u64,
}

#[derive(Debug)]
struct Piece {
    range: ByteRange,
    bytes: Bytes,
    source: u64,
}

impl Overlay {
    /// Keeps `bytes`, which begin at `start`; `source` tells requests apart that run at the same time.
    pub(super) fn push(&mut self, source: u64, start: u64, bytes: Bytes) {
        let range = ByteRange::at(start, bytes.len() as u64);
        self.held += range.len();
        self.pieces.push_back(Piece {
            range,
            bytes,
            source,
        });
        let of_one = |piece: &&Piece| piece.source == source;
        let mut own: u64 = self
            .pieces
            .iter()
            .filter(of_one)
            .map(|p| p.range.len())
            .sum();
        while own > LIMIT_OF_ONE
            && let Some(at) = self.pieces.iter().position(|piece| of_one(&piece))
            && let Some(oldest) = self.pieces.remove(at)
        {
            self.held -= oldest.range.len();
            own -= oldest.range.len();
        }
        while self.held > LIMIT
            && let Some(oldest) = self.pieces.pop_front()
        {
            self.held -= oldest.range.len();
        }
    }

    /// What of `gaps` is not here either.
    pub(super) fn missing(&self, gaps: Vec<ByteRange>) -> Vec<ByteRange> {
        if self.pieces.is_empty() {
            return gaps;
        }
        gaps.into_iter().flat_map(|gap| self.holes(gap)).collect()
    }

    fn holes(&self, gap: ByteRange) -> Vec<ByteRange> {
        let mut holes = Vec::new();
        let mut at = gap.start();
        while at < gap.end() {
            match self.at(at) {
                Some(piece) => at = piece.range.end(),
                None => {
                    let starts = self.pieces.iter().map(|piece| piece.range.start());
                    let next = starts
                        .filter(|&start| start > at)
                        .min()
                        .unwrap_or(gap.end())
                        .min(gap.end());
                    holes.push(ByteRange::new(at, next));
                    at = next;
                }
            }
        }
        holes
    }

    fn at(&self, offset: u64) -> Option<&Piece> {
        self.pieces
            .iter()
            .find(|piece| piece.range.start() <= offset && offset < piece.range.end())
    }

    /// Bytes from `offset` on, as many as one piece has, at most to `end`.
    pub(super) fn read(&self, offset: u64, end: u64) -> Option<Bytes> {
        let piece = self.at(offset)?;
        let from = usize::try_from(offset - piece.range.start()).ok()?;
        let to = usize::try_from(end.min(piece.range.end()) - piece.range.start()).ok()?;
        Some(piece.bytes.slice(from..to))
    }

    /// Whether nothing is kept.
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_what_no_piece_covers() {
        let mut overlay = Overlay::default();
        overlay.push(0, 10, Bytes::from_static(b"abcde"));
        overlay.push(0, 20, Bytes::from_static(b"xyz"));
        assert_eq!(
            overlay.missing(vec![ByteRange::new(5, 30)]),
            [
                ByteRange::new(5, 10),
                ByteRange::new(15, 20),
                ByteRange::new(23, 30)
            ]
        );
        assert_eq!(overlay.read(12, 100).as_deref(), Some(&b"cde"[..]));
        assert_eq!(overlay.read(12, 13).as_deref(), Some(&b"c"[..]));
        assert_eq!(overlay.read(15, 16), None);
    }

    #[test]
    fn memory_is_bounded() {
        let mut overlay = Overlay::default();
        for index in 0..100 {
            overlay.push(1, index << 20, Bytes::from(vec![0; 1 << 20]));
        }
        assert!(overlay.held <= LIMIT_OF_ONE);
        assert_eq!(overlay.read(0, 1), None);
        overlay.push(2, 1 << 40, Bytes::from_static(b"slow"));
        for source in 3..5 {
            for index in 200..300 {
                overlay.push(source, index << 20, Bytes::from(vec![0; 1 << 20]));
            }
        }
        assert!(overlay.held <= LIMIT);
        assert!(
            overlay.read(1 << 40, u64::MAX).is_some(),
            "the fast leave the slow alone"
        );
        assert!(overlay.read(99 << 20, u64::MAX).is_some());
    }
}
