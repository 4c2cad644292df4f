//! Attention on the CPU: the queries of a step against all that the cache holds, grouped heads without repeating keys or values.

use candle_core::{CpuStorage, CustomOp3, Layout, Shape, Tensor, bail};
use rayon::prelude::*;

use super::kernels;

/// Queries that one task scores at a time.
const BLOCK: usize = 60;

/// Softmax(q · kᵀ · scale) · v with the causal mask.
pub(super) struct Attention {
    /// The first query's position; the cache holds all before it and the queries' own.
    pub(super) position: usize,
    /// How many positions back a query sees, itself included.
    pub(super) window: Option<usize>,
    /// What scores are multiplied with.
    pub(super) scale: f32,
}

impl Attention {
    /// Queries `[s, heads, d]` against caches `[kv_heads, room, d]` give `[s, heads * d]`. All f32.
    pub(super) fn apply(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        q.apply_op3_no_bwd(k, v, self)
    }

    /// The positions that a query at `position` sees.
    pub(super) fn sees(&self, position: usize) -> std::ops::Range<usize> {
        let first = self
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((s, heads, d), (kv_heads, room, _)) = (lq.shape().dims3()?, lk.shape().dims3()?);
        let (Some((q0, q1)), Some((k0, k1)), Some((v0, v1))) = (
            lq.contiguous_offsets(),
            lk.contiguous_offsets(),
            lv.contiguous_offsets(),
        ) else {
            bail!("attention needs contiguous tensors");
        };
        if lk.shape() != lv.shape()
            || heads % kv_heads != 0
            || self.position + s > room
            || lk.dims()[2] != d
        {
            bail!(
                "attention over {room} positions, of {s} queries from {}",
                self.position
            );
        }
        let (q, k, v) = (
            &q.as_slice::<f32>()?[q0..q1],
            &k.as_slice::<f32>()?[k0..k1],
            &v.as_slice::<f32>()?[v0..v1],
        );
        let group = heads / kv_heads;
        let steps = (BLOCK / group).max(1);
        let tasks: Vec<(usize, usize)> = (0..kv_heads)
            .flat_map(|head| (0..s).step_by(steps).map(move |first| (head, first)))
            .collect();
        let parts: Vec<Vec<f32>> = tasks
            .par_iter()
            .map(|&(head, first)| {
                let (k, v) = (
                    &k[head * room * d..][..room * d],
                    &v[head * room * d..][..room * d],
                );
                self.part(
                    q,
                    k,
                    v,
                    first..(first + steps).min(s),
                    Heads {
                        first: head * group,
                        group,
                        all: heads,
                        width: d,
                    },
                )
            })
            .collect();
        let mut out = vec![0.0; s * heads * d];
        for ((head, first), part) in tasks.into_iter().zip(parts) {
            for (step, rows) in part.chunks_exact(group * d).enumerate() {
                let at = ((first + step) * heads + head * group) * d;
                out[at..][..group * d].copy_from_slice(rows);
            }
        }
        Ok((CpuStorage::F32(out), (s, heads * d).into()))
    }
}

/// The query heads that share a key head.
struct Heads {
    first: usize,
    group: usize,
    all: usize,
    width: usize,
}

impl Attention {
    /// The output `[steps, group, d]` of some steps of one group of heads.
    fn part(
        &self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        steps: std::ops::Range<usize>,
        heads: Heads,
    ) -> Vec<f32> {
        let (kernels, d, group) = (kernels::detected(), heads.width, heads.group);
        let rows = steps.len() * group;
        let mut queries = Vec::with_capacity(rows * d);
        for step in steps.clone() {
            queries.extend_from_slice(&q[(step * heads.all + heads.first) * d..][..group * d]);
        }
        let seen = self.sees(self.position + steps.start).start..self.position + steps.end;
        let (length, k, v) = (
            seen.len(),
            &k[seen.start * d..seen.end * d],
            &v[seen.start * d..seen.end * d],
        );
        let mut scores = vec![0.0; rows * length];
        // SAFETY: `scores` has `rows` rows of `length`, and is this task's own.
        unsafe { kernels::block(kernels, &queries, k, d, scores.as_mut_ptr(), length) };
        for (step, scores) in steps.zip(scores.chunks_exact_mut(group * length)) {
            let own = self.sees(self.position + step);
            for scores in scores.chunks_exact_mut(length) {
                scores[..own.start - seen.start].fill(0.0);
                scores[own.end - seen.start..].fill(0.0);
                kernels::softmax(
                    kernels,
                    &mut scores[own.start - seen.start..own.end - seen.start],
                    self.scale,
                );
            }
        }
        let mut out = vec![0.0; rows * d];
        kernels::gather(kernels, &scores, length, v, d, &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// What the operation is by definition, in f64.
    fn exact(
        q: &[f32],
        k: &[f32],
        v: &[f32],
        shape: (usize, usize, usize, usize, usize),
        attention: &Attention,
    ) -> Vec<f64> {
        let (s, heads, kv_heads, room, d) = shape;
        let mut out = Vec::new();
        for i in 0..s {
            for h in 0..heads {
                let base = h / (heads / kv_heads) * room * d;
                let last = attention.position + i;
                let weights: Vec<f64> = (0..=last)
                    .map(|j| {
                        if attention.window.is_some_and(|window| last - j >= window) {
                            return 0.0;
                        }
                        let dot: f64 = (0..d)
                            .map(|c| {
                                f64::from(q[(i * heads + h) * d + c])
                                    * f64::from(k[base + j * d + c])
                            })
                            .sum();
                        (dot * f64::from(attention.scale)).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for c in 0..d {
                    out.push(
                        weights
                            .iter()
                            .enumerate()
                            .map(|(j, w)| w / total * f64::from(v[base + j * d + c]))
                            .sum(),
                    );
                }
            }
        }
        out
    }

    #[test]
    fn every_query_sees_what_it_may() {
        let device = Device::Cpu;
        for (s, heads, kv_heads, position, window) in [
            (1, 4, 2, 0, None),
            (1, 6, 2, 70, None),
            (90, 4, 1, 0, None),
            (33, 3, 3, 9, Some(5)),
            (100, 4, 2, 30, Some(40)),
            (1, 2, 1, 50, Some(8)),
        ] {
            let (room, d) = (position + s + 3, 24);
            let make = |count: usize, step: usize| -> Vec<f32> {
                (0..count)
                    .map(|n| ((n * step) % 101) as f32 / 50.0 - 1.0)
                    .collect()
            };
            let (q, k, v) = (
                make(s * heads * d, 37),
                make(kv_heads * room * d, 53),
                make(kv_heads * room * d, 71),
            );
            let attention = Attention {
                position,
                window,
                scale: 0.2,
            };
            let wanted = exact(&q, &k, &v, (s, heads, kv_heads, room, d), &attention);
            let tensor = |data: &[f32], shape: (usize, usize, usize)| {
                Tensor::from_slice(data, shape, &device).unwrap()
            };
            let got = attention
                .apply(
                    &tensor(&q, (s, heads, d)),
                    &tensor(&k, (kv_heads, room, d)),
                    &tensor(&v, (kv_heads, room, d)),
                )
                .unwrap();
            let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
            for (got, wanted) in got.iter().zip(wanted) {
                assert!(
                    (f64::from(*got) - wanted).abs() < 1e-5,
                    "{s} {heads}/{kv_heads} from {position}, {window:?}"
                );
            }
        }
    }
}
