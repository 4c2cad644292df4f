//! Byte ranges, half-open everywhere but on the wire (`registry::range` converts).

use std::fmt;

/// The bytes `start..end` of something; `start <= end` always holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The range `start..end`; one whose end lies before its start is empty at `start`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            end: if end < start { start } else { end },
        }
    }

    /// `len` bytes from `start`; an end past `u64::MAX` is cut there.
    pub const fn at(start: u64, len: u64) -> Self {
        Self {
            start,
            end: start.saturating_add(len),
        }
    }

    /// The first byte's offset.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The offset behind the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// The number of bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no byte in it.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The bytes that are in both; empty when there are none.
    pub fn intersect(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Whether they have a byte in common.
    pub fn overlaps(self, other: Self) -> bool {
        !self.intersect(other).is_empty()
    }

    /// Whether every byte of `other` is in this range.
    pub const fn contains(self, other: Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// The smallest range on multiples of `unit` that holds this one, cut at `limit`.
    ///
    /// # Panics
    /// When `unit` is zero.
    pub fn align(self, unit: u64, limit: u64) -> Self {
        if self.is_empty() {
            return self;
        }
        let end = self.end.div_ceil(unit).saturating_mul(unit).min(limit);
        Self::new(self.start / unit * unit, end)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_covers_and_stops_at_the_limit() {
        assert_eq!(ByteRange::new(5, 6).align(4, 100), ByteRange::new(4, 8));
        assert_eq!(ByteRange::new(4, 8).align(4, 100), ByteRange::new(4, 8));
        assert_eq!(ByteRange::new(97, 99).align(8, 99), ByteRange::new(96, 99));
        assert_eq!(ByteRange::new(7, 7).align(4, 100), ByteRange::new(7, 7));
        assert_eq!(
            ByteRange::new(0, u64::MAX).align(8, u64::MAX).end(),
            u64::MAX
        );
    }

    #[test]
    fn an_inverted_or_overflowing_range_is_cut_not_wrapped() {
        assert!(ByteRange::new(9, 3).is_empty());
        assert_eq!(ByteRange::at(u64::MAX - 1, 10).len(), 1);
        assert!(!ByteRange::new(0, 5).overlaps(ByteRange::new(5, 9)));
        assert!(ByteRange::new(0, 5).contains(ByteRange::new(5, 5)));
    }
}
