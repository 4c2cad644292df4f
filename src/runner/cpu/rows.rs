//! What is done to rows between products: norms, the rotation of positions, the gate of an MLP.

use super::kernels;
use super::team::Team;
use crate::runner::config::Activation;

/// Rows that a task has: enough to be worth handing out.
const ROWS: usize = 8;

/// x / rms(x) · weight of each row of `x`, into `out`.
pub(in crate::runner) fn norm(
    team: &Team<'_>,
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    team.chunks(out, ROWS * width, |task, out| {
        let x = &x[task * ROWS * width..];
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let scale = scale(x, epsilon);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        }
    });
}

/// The same in place.
pub(in crate::runner) fn norm_in_place(
    team: &Team<'_>,
    x: &mut [f32],
    weight: &[f32],
    epsilon: f32,
) {
    team.chunks(x, ROWS * weight.len(), |_, x| {
        for x in x.chunks_exact_mut(weight.len()) {
            norm_row(x, weight, epsilon);
        }
    });
}

fn norm_row(x: &mut [f32], weight: &[f32], epsilon: f32) {
    let scale = scale(x, epsilon);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// 1 / rms(x).
fn scale(x: &[f32], epsilon: f32) -> f32 {
    // In lanes, which any vector unit divides: one running sum would be a chain of additions.
    let mut sums = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    let mean = (sums.iter().sum::<f32>() + rest) / x.len() as f32;
    1.0 / (mean + epsilon).sqrt()
}

/// Adds rows of `y` to those of `x`.
pub(in crate::runner) fn add(team: &Team<'_>, x: &mut [f32], y: &[f32], width: usize) {
    team.chunks(x, ROWS * width, |task, x| {
        let y = &y[task * ROWS * width..];
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    });
}

/// Adds `bias` to each row of `x`.
pub(in crate::runner) fn add_bias(team: &Team<'_>, x: &mut [f32], bias: &[f32]) {
    team.chunks(x, ROWS * bias.len(), |_, x| {
        for x in x.chunks_exact_mut(bias.len()) {
            x.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
    });
}

/// How the heads of a token lie side by side: queries, keys, values.
#[derive(Clone, Copy, Debug)]
pub(in crate::runner) struct Heads {
    pub(in crate::runner) query: usize,
    pub(in crate::runner) kv: usize,
    pub(in crate::runner) width: usize,
}

impl Heads {
    /// Numbers of a token.
    pub(in crate::runner) fn all(&self) -> usize {
        (self.query + 2 * self.kv) * self.width
    }
}

/// What turns queries and keys.
#[derive(Clone, Copy, Debug)]
pub(in crate::runner) struct Rotation<'a> {
    pub(in crate::runner) heads: Heads,
    /// Weights of a norm of each head of queries.
    pub(in crate::runner) q_norm: Option<&'a [f32]>,
    /// Of each head of keys.
    pub(in crate::runner) k_norm: Option<&'a [f32]>,
    pub(in crate::runner) epsilon: f32,
    /// `width / 2` a row, from the first row's position on.
    pub(in crate::runner) cos: &'a [f32],
    pub(in crate::runner) sin: &'a [f32],
}

impl Rotation<'_> {
    /// Norms and turns queries and keys, in place.
    pub(in crate::runner) fn apply(&self, team: &Team<'_>, qkv: &mut [f32]) {
        let Heads { query, kv, width } = self.heads;
        let (all, half) = (self.heads.all(), width / 2);
        team.chunks(qkv, ROWS * all, |task, rows| {
            for (row, qkv) in (task * ROWS..).zip(rows.chunks_exact_mut(all)) {
                let (cos, sin) = (
                    &self.cos[row * half..][..half],
                    &self.sin[row * half..][..half],
                );
                let heads = qkv.chunks_exact_mut(width).take(query + kv);
                for (number, head) in heads.enumerate() {
                    let norm = if number < query {
                        self.q_norm
                    } else {
                        self.k_norm
                    };
                    if let Some(weight) = norm {
                        norm_row(head, weight, self.epsilon);
                    }
                    let (a, b) = head.split_at_mut(half);
                    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                    }
                }
            }
        });
    }
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + (0.797_884_6 * x * (1.0 + 0.044_715 * x * x)).tanh())
}

/// The gate's function, times what it gates: `[m, 2n]`, gate and up side by side, gives `[m, n]`.
pub(in crate::runner) fn gate(
    team: &Team<'_>,
    activation: Activation,
    gate_up: &[f32],
    n: usize,
    out: &mut [f32],
) {
    let kernels = kernels::detected();
    team.chunks(out, ROWS * n, |task, out| {
        let rows = gate_up[task * ROWS * 2 * n..].chunks_exact(2 * n);
        for (out, gate_up) in out.chunks_exact_mut(n).zip(rows) {
            let (gate, up) = gate_up.split_at(n);
            out.copy_from_slice(gate);
            match activation {
                Activation::Silu => kernels::silu(kernels, out, up),
                Activation::GeluTanh => out
                    .iter_mut()
                    .zip(up)
                    .for_each(|(gate, up)| *gate = gelu(*gate) * up),
            }
        }
    });
}
