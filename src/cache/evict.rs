//! Which blobs go when room is needed. Pure.

use std::time::SystemTime;

/// Blobs up to this size are what offline starts and listings need (manifests, configs, tokenizers), and there is little to
/// gain from them: they go last.
const SMALL: u64 = 1 << 20;

/// What the choice rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Allocated bytes.
    pub(super) allocated: u64,
    /// Last use.
    pub(super) used: SystemTime,
}

/// The order in which to try `candidates` (as positions in it): least recently used first, small ones behind all others.
/// The caller stops when enough is free and passes over those in use.
pub(super) fn order(candidates: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len())
        .filter(|&at| candidates[at].allocated > 0)
        .collect();
    order.sort_by_key(|&at| (candidates[at].allocated <= SMALL, candidates[at].used));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn least_recently_used_first_and_small_ones_last() {
        let at = |second, allocated| Candidate {
            allocated,
            used: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
        };
        let blobs = [
            at(5, 9 << 30),
            at(1, 4096),
            at(3, 2 << 20),
            at(0, 0),
            at(2, SMALL),
            at(4, SMALL + 1),
        ];
        assert_eq!(order(&blobs), [2, 5, 0, 1, 4]);
    }
}
