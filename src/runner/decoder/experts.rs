//! Which experts see which tokens.

use crate::runner::config::Experts;

/// For each expert: the rows that it sees, and with which weights. `logits` has a row of all experts for each token.
pub(super) fn choose(experts: &Experts, logits: &[f32]) -> Vec<(Vec<u32>, Vec<f32>)> {
    let mut chosen = vec![(Vec::new(), Vec::new()); experts.count];
    for (row, logits) in (0..).zip(logits.chunks_exact(experts.count)) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
        let mut order: Vec<usize> = (0..experts.count).collect();
        order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
        order.truncate(experts.chosen);
        let among: f32 = if experts.normalise {
            order.iter().map(|at| weights[*at]).sum()
        } else {
            weights.iter().sum()
        };
        for at in order {
            chosen[at].0.push(row);
            chosen[at].1.push(weights[at] / among);
        }
    }
    chosen
}
