//! Which requests bring in what is missing. Pure.

use crate::base::ByteRange;

/// The largest range that one request asks for. A Go registry pays milliseconds of processor time for each request, whatever
/// its size; beyond this, a failed request costs more than a further one saves.
pub(super) const PART: u64 = 8 << 20;

/// What of `gaps` nobody is fetching yet, in requests of at most [`PART`] bytes.
///
/// `gaps` and `flying` are in any order; cuts lie on multiples of [`PART`], so that neighbours ask for the same parts.
pub(super) fn requests(gaps: &[ByteRange], flying: &[ByteRange]) -> Vec<ByteRange> {
    let mut wanted = Vec::new();
    for &gap in gaps {
        let mut rest = vec![gap];
        for &flight in flying {
            rest = rest
                .into_iter()
                .flat_map(|piece| without(piece, flight))
                .collect();
        }
        wanted.extend(rest.into_iter().flat_map(parts));
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

/// `range` cut at multiples of [`PART`].
pub(super) fn parts(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let first = range.start() / PART;
    let last = range.end().div_ceil(PART);
    (first..last)
        .map(move |part| ByteRange::at(part * PART, PART).intersect(range))
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
            requests(&[range(0, 4 * mib)], &[range(mib, 2 * mib)]),
            [range(0, mib), range(2 * mib, 4 * mib)]
        );
        assert_eq!(requests(&[range(0, mib)], &[range(0, 9 * mib)]), []);
        assert_eq!(
            requests(&[range(7 * mib, 9 * mib)], &[]),
            [range(7 * mib, 8 * mib), range(8 * mib, 9 * mib)]
        );
    }

    proptest! {
        #[test]
        fn requests_and_flights_cover_the_gaps_exactly_once(
            gaps in proptest::collection::vec((0u64..500, 0u64..100), 0..4),
            flying in proptest::collection::vec((0u64..600, 0u64..100), 0..4),
        ) {
            // In units of a quarter part, so that cuts matter.
            let unit = PART / 4;
            let mut at = 0;
            let gaps: Vec<_> = gaps.into_iter().map(|(skip, len)| {
                let gap = ByteRange::at((at + skip) * unit, len * unit);
                at += skip + len;
                gap
            }).collect();
            let flying: Vec<_> = flying.into_iter().map(|(start, len)| ByteRange::at(start * unit, len * unit)).collect();
            let asked = requests(&gaps, &flying);
            for unit_at in (0..1200).map(|index| ByteRange::at(index * unit, unit)) {
                let wanted = gaps.iter().any(|gap| gap.contains(unit_at));
                let flies = flying.iter().any(|flight| flight.contains(unit_at));
                let count = asked.iter().filter(|range| range.contains(unit_at)).count();
                prop_assert_eq!(count, usize::from(wanted && !flies));
            }
            prop_assert!(asked.iter().all(|range| range.len() <= PART && !range.is_empty()));
        }
    }
}
