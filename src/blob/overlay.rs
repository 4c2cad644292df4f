//! Bytes that the cache has no room for, kept in memory for whoever asked for them.
//!
//! Each request brings its bytes with memory of the budget for them. They stay until the memory is wanted for something
//! else: then those that were read go first, and after them those that nobody came for in a while.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::budget::Reservation;
use crate::base::{ByteRange, Instant};

/// Bytes that came or were read so recently are not given up: a reader may be on its way to them.
pub(super) const FRESH: Duration = Duration::from_millis(500);

/// Pieces of a blob, by the request that brought them.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    sources: Vec<Source>,
}

#[derive(Debug)]
struct Source {
    id: u64,
    room: Reservation,
    /// A stream that goes on and on: its oldest pieces make room for its newest.
    ring: bool,
    ended: bool,
    pieces: VecDeque<Piece>,
    held: u64,
    touched: Instant,
}

#[derive(Debug)]
struct Piece {
    range: ByteRange,
    bytes: Bytes,
    /// Bytes of it that were read, those read twice counted twice.
    read: u64,
}

impl Source {
    /// Drops the piece at `index`; its memory is free unless the stream goes on with it.
    fn drop_piece(&mut self, index: usize) -> u64 {
        let Some(piece) = self.pieces.remove(index) else {
            return 0;
        };
        self.held -= piece.range.len();
        if self.ring && !self.ended {
            return 0;
        }
        let freed = self.room.split(piece.range.len());
        freed.bytes()
    }
}

impl Overlay {
    /// A request begins to bring bytes, at most as many as `room` holds, or a `ring` of the last of them.
    pub(super) fn begin(&mut self, id: u64, room: Reservation, ring: bool) {
        if let Some(source) = self.sources.iter_mut().find(|source| source.id == id) {
            source.room.join(room);
            source.ended = false;
            return;
        }
        self.sources.push(Source {
            id,
            room,
            ring,
            ended: false,
            pieces: VecDeque::new(),
            held: 0,
            touched: Instant::now(),
        });
    }

    /// The request brings nothing more.
    pub(super) fn end(&mut self, id: u64) {
        if let Some(source) = self.sources.iter_mut().find(|source| source.id == id) {
            source.ended = true;
            let unused = source.room.bytes().saturating_sub(source.held);
            drop(source.room.split(unused));
        }
        self.sweep();
    }

    fn sweep(&mut self) {
        self.sources
            .retain(|source| !source.ended || !source.pieces.is_empty());
    }

    /// Keeps `bytes`, which begin at `start`, of the request `id`.
    pub(super) fn push(&mut self, id: u64, start: u64, bytes: Bytes) {
        let Some(source) = self.sources.iter_mut().find(|source| source.id == id) else {
            return;
        };
        let range = ByteRange::at(start, bytes.len() as u64);
        source.touched = Instant::now();
        source.held += range.len();
        source.pieces.push_back(Piece {
            range,
            bytes,
            read: 0,
        });
        while source.ring && source.held > source.room.bytes() {
            source.drop_piece(0);
        }
    }

    /// Takes note that `range` was read.
    pub(super) fn note_read(&mut self, range: ByteRange) {
        for source in &mut self.sources {
            for piece in &mut source.pieces {
                let read = piece.range.intersect(range).len();
                if read > 0 {
                    piece.read += read;
                    source.touched = Instant::now();
                }
            }
        }
    }

    /// Gives up pieces that were read until `wanted` bytes are free; returns how many are.
    pub(super) fn drop_read(&mut self, wanted: u64) -> u64 {
        let mut freed = 0;
        for source in &mut self.sources {
            let mut index = 0;
            while freed < wanted && index < source.pieces.len() {
                if source.pieces[index].read >= source.pieces[index].range.len() && !source.ring {
                    freed += source.drop_piece(index);
                } else {
                    index += 1;
                }
            }
        }
        self.sweep();
        freed
    }

    /// Gives up what nobody came for in a while until `wanted` bytes are free; returns how many are.
    pub(super) fn drop_stale(&mut self, wanted: u64) -> u64 {
        let mut freed = 0;
        for source in &mut self.sources {
            if source.touched.elapsed() < FRESH || (source.ring && !source.ended) {
                continue;
            }
            while freed < wanted && !source.pieces.is_empty() {
                freed += source.drop_piece(0);
            }
        }
        self.sweep();
        freed
    }

    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.sources.iter().flat_map(|source| &source.pieces)
    }

    /// What of `gaps` is not here either.
    pub(super) fn missing(&self, gaps: Vec<ByteRange>) -> Vec<ByteRange> {
        if self.is_empty() {
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
                    let starts = self.pieces().map(|piece| piece.range.start());
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
        self.pieces()
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
        self.sources.is_empty()
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::budget::Budget;
    use crate::blob::flight::Urgency;

    const MIB: u64 = 1 << 20;

    fn mib() -> Bytes {
        Bytes::from(vec![0; MIB as usize])
    }

    #[test]
    fn holes_are_what_no_piece_covers() {
        let budget = Budget::new(100);
        let mut overlay = Overlay::default();
        overlay.begin(0, budget.try_reserve(8, Urgency::Demand).unwrap(), false);
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
        overlay.clear();
        assert_eq!(budget.used().0, 0);
    }

    #[test]
    fn a_stream_keeps_its_last_bytes_and_its_memory_until_it_ends() {
        let budget = Budget::new(100 * MIB);
        let mut overlay = Overlay::default();
        overlay.begin(
            1,
            budget.try_reserve(16 * MIB, Urgency::Demand).unwrap(),
            true,
        );
        for index in 0..100 {
            overlay.push(1, index * MIB, mib());
        }
        assert_eq!(overlay.read(83 * MIB, u64::MAX), None);
        assert!(overlay.read(84 * MIB, u64::MAX).is_some());
        assert_eq!(budget.used().0, 16 * MIB);
        assert_eq!(overlay.drop_read(MIB) + overlay.drop_stale(MIB), 0);
        overlay.end(1);
        assert_eq!(budget.used().0, 16 * MIB);
        overlay.clear();
        assert_eq!(budget.used().0, 0);
    }

    #[test]
    fn what_was_read_goes_first_and_what_just_came_stays() {
        let budget = Budget::new(100 * MIB);
        let mut overlay = Overlay::default();
        overlay.begin(
            1,
            budget.try_reserve(4 * MIB, Urgency::Demand).unwrap(),
            false,
        );
        for index in 0..3 {
            overlay.push(1, index * MIB, mib());
        }
        overlay.note_read(ByteRange::new(MIB, 2 * MIB));
        overlay.note_read(ByteRange::new(0, MIB / 2));
        assert_eq!(overlay.drop_read(100 * MIB), MIB);
        assert_eq!(budget.used().0, 3 * MIB);
        assert!(overlay.read(MIB, u64::MAX).is_none());
        assert!(overlay.read(0, u64::MAX).is_some());
        assert_eq!(overlay.drop_stale(100 * MIB), 0, "it just came");
        overlay.end(1);
        assert_eq!(budget.used().0, 2 * MIB, "what did not come is given back");
        std::thread::sleep(FRESH);
        assert_eq!(overlay.drop_stale(1), MIB);
        assert_eq!(overlay.drop_stale(100 * MIB), MIB);
        assert!(overlay.is_empty());
        assert_eq!(budget.used().0, 0);
    }
}
