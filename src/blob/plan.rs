//! Which requests bring in what is missing. Pure.

use crate::base::ByteRange;

/// The unit of parts. A Go registry pays milliseconds of processor time for each request, whatever its size; beyond twice
/// this, a failed request costs more than a further one saves. What is asked for at a time is a part or two of them, by what the
/// registry client has measured.
pub(super) const PART: u64 = 8 << 20;

/// What of `gaps` nobody is fetching yet, in requests of at most `part` bytes.
///
/// `gaps` and `flying` are in any order; cuts lie on multiples of `part`, so that neighbours ask for the same parts. A size
/// that is a multiple of another one has cuts that are cuts of the other as well, so it may change at any time.
pub(super) fn requests(gaps: &[ByteRange], flying: &[ByteRange], part: u64) -> Vec<ByteRange> {
    let mut wanted = Vec::new();
    for &gap in gaps {
        let mut rest = vec![gap];
        for &flight in flying {
            rest = rest
                .into_iter()
                .flat_map(|piece| without(piece, flight))
                .collect();
        }
        wanted.extend(rest.into_iter().flat_map(|piece| parts(piece, part)));
    }
    wanted
}

/// `gaps`, in order, grown to whole units of a blob of `size` bytes; what touches is one.
///
/// Memory holds pieces of any length, but a chunk of the cache becomes present only when all of it is written in one go.
pub(super) fn aligned(gaps: Vec<ByteRange>, unit: u64, size: u64) -> Vec<ByteRange> {
    let mut all: Vec<ByteRange> = Vec::with_capacity(gaps.len());
    for gap in gaps {
        let gap = gap.align(unit, size);
        match all.last_mut() {
            Some(last) if gap.start() <= last.end() => {
                *last = ByteRange::new(last.start(), last.end().max(gap.end()));
            }
            _ => all.push(gap),
        }
    }
    all
}

/// What is left of `range` without `hole`.
fn without(range: ByteRange, hole: ByteRange) -> impl Iterator<Item = ByteRange> {
    let (before, after) = if range.overlaps(hole) {
        (
            ByteRange::new(
                range.start(),
                hole.start().clamp(range.start(), range.end()),
            ),
            ByteRange::new(hole.end().clamp(range.start(), range.end()), range.end()),
        )
    } else {
        (range, ByteRange::new(range.end(), range.end()))
    };
    [before, after]
        .into_iter()
        .filter(|piece| !piece.is_empty())
}

/// `range` cut at multiples of `part`.
pub(super) fn parts(range: ByteRange, part: u64) -> impl Iterator<Item = ByteRange> {
    let first = range.start() / part;
    let last = range.end().div_ceil(part);
    (first..last)
        .map(move |index| ByteRange::at(index * part, part).intersect(range))
        .filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gaps_are_grown_to_whole_units_and_joined() {
        let range = ByteRange::new;
        assert_eq!(
            aligned(
                vec![range(5, 10), range(10, 12), range(17, 20), range(95, 99)],
                8,
                99
            ),
            [range(0, 24), range(88, 99)]
        );
        assert_eq!(aligned(vec![], 8, 99), []);
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end)
    }

    #[test]
    fn what_flies_is_not_asked_for_again() {
        let mib = 1 << 20;
        assert_eq!(
            requests(&[range(0, 4 * mib)], &[range(mib, 2 * mib)], PART),
            [range(0, mib), range(2 * mib, 4 * mib)]
        );
        assert_eq!(requests(&[range(0, mib)], &[range(0, 9 * mib)], PART), []);
        assert_eq!(
            requests(&[range(7 * mib, 9 * mib)], &[], PART),
            [range(7 * mib, 8 * mib), range(8 * mib, 9 * mib)]
        );
        // Parts of another size are under way.
        assert_eq!(
            requests(&[range(0, 40 * mib)], &[range(8 * mib, 16 * mib)], 2 * PART),
            [
                range(0, 8 * mib),
                range(16 * mib, 32 * mib),
                range(32 * mib, 40 * mib)
            ]
        );
    }

    proptest! {
        #[test]
        fn requests_and_flights_cover_the_gaps_exactly_once(
            gaps in proptest::collection::vec((0u64..500, 0u64..100), 0..4),
            flying in proptest::collection::vec((0u64..600, 0u64..100), 0..4),
            double in proptest::bool::ANY,
        ) {
            let part = if double { 2 * PART } else { PART };
            // In units of a quarter part, so that cuts matter.
            let unit = PART / 4;
            let mut at = 0;
            let gaps: Vec<_> = gaps.into_iter().map(|(skip, len)| {
                let gap = ByteRange::at((at + skip) * unit, len * unit);
                at += skip + len;
                gap
            }).collect();
            let flying: Vec<_> = flying.into_iter().map(|(start, len)| ByteRange::at(start * unit, len * unit)).collect();
            let asked = requests(&gaps, &flying, part);
            for unit_at in (0..1200).map(|index| ByteRange::at(index * unit, unit)) {
                let wanted = gaps.iter().any(|gap| gap.contains(unit_at));
                let flies = flying.iter().any(|flight| flight.contains(unit_at));
                let count = asked.iter().filter(|range| range.contains(unit_at)).count();
                prop_assert_eq!(count, usize::from(wanted && !flies));
            }
            prop_assert!(asked.iter().all(|range| range.len() <= part && !range.is_empty()));
        }
    }
}
