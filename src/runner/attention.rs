//! Which positions a query sees, on any device.

/// Softmax(q · kᵀ · scale) · v with the causal mask.
#[derive(Clone, Copy, Debug)]
pub(in crate::runner) struct Attention {
    /// The first query's position; the cache holds all before it and the queries' own.
    pub(super) position: usize,
    /// How many positions back a query sees, itself included.
    pub(super) window: Option<usize>,
    /// What scores are multiplied with.
    pub(super) scale: f32,
}

impl Attention {
    /// The positions that a query at `position` sees.
    pub(super) fn sees(&self, position: usize) -> std::ops::Range<usize> {
        let first = self
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }
}
