//! Attention: the queries of a step against all that the cache holds, grouped heads without repeating keys or values.

use std::cell::RefCell;
use std::ops::Range;

use super::kernels;
use super::rows::Heads;
use super::team::{Shared, Team};
use crate::runner::attention::Attention;

/// Queries that one task scores at a time.
const BLOCK: usize = 60;

/// Keys and values of one layer, `[kv_heads, room, width]` each.
#[derive(Debug)]
pub(in crate::runner) struct Kept {
    pub(in crate::runner) k: Vec<f32>,
    pub(in crate::runner) v: Vec<f32>,
}

impl Kept {
    /// Room for so many positions.
    pub(in crate::runner) fn new(heads: Heads, room: usize) -> Self {
        let size = heads.kv * room * heads.width;
        Self {
            k: vec![0.0; size],
            v: vec![0.0; size],
        }
    }

    /// Keeps the keys and values of some tokens, the first of which is at `position`.
    pub(in crate::runner) fn keep(
        &mut self,
        team: &Team<'_>,
        heads: Heads,
        qkv: &[f32],
        position: usize,
    ) {
        let Heads { query, kv, width } = heads;
        let room = self.k.len() / kv;
        for (kept, first) in [(&mut self.k, query), (&mut self.v, query + kv)] {
            let copy = |head: usize, kept: &mut [f32]| {
                let rows = kept[position * width..].chunks_exact_mut(width);
                for (row, qkv) in rows.zip(qkv.chunks_exact(heads.all())) {
                    row.copy_from_slice(&qkv[(first + head) * width..][..width]);
                }
            };
            if qkv.len() == heads.all() {
                // Too little to hand out.
                (0..kv).for_each(|head| copy(head, &mut kept[head * room..][..room]));
            } else {
                team.chunks(kept, room, copy);
            }
        }
    }
}

/// Some queries of one group of heads, their scores, and what they gather.
#[derive(Debug, Default)]
struct Work {
    queries: Vec<f32>,
    scores: Vec<f32>,
    gathered: Vec<f32>,
}

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

/// What each token of `qkv` attends to, `[s, heads * width]`; keys and values of all of them are kept.
pub(in crate::runner) fn attend(
    team: &Team<'_>,
    attention: &Attention,
    heads: Heads,
    qkv: &[f32],
    kept: &Kept,
    out: &mut [f32],
) {
    let Heads { query, kv, width } = heads;
    let (s, group) = (qkv.len() / heads.all(), query / kv);
    assert_eq!(out.len(), s * query * width);
    let steps = (BLOCK / group).max(1);
    let blocks = s.div_ceil(steps);
    let out = Shared::new(out);
    team.each(blocks * kv, |task| {
        // The last queries see the most: what takes longest is begun first.
        let (head, first) = (task % kv, (blocks - 1 - task / kv) * steps);
        let steps = first..(first + steps).min(s);
        WORK.with_borrow_mut(|work| {
            part(attention, heads, head, qkv, kept, steps.clone(), work);
            for (step, row) in steps.zip(work.gathered.chunks_exact(group * width)) {
                let at = (step * query + head * group) * width;
                // SAFETY: a task has steps of a group that no other has.
                unsafe { out.part(at..at + group * width) }.copy_from_slice(row);
            }
        });
    });
}

/// The output `[steps, group, width]` of some steps of one group of heads.
fn part(
    attention: &Attention,
    heads: Heads,
    head: usize,
    qkv: &[f32],
    kept: &Kept,
    steps: Range<usize>,
    work: &mut Work,
) {
    let (kernels, width, group) = (kernels::detected(), heads.width, heads.query / heads.kv);
    let (rows, room) = (steps.len() * group, kept.k.len() / heads.kv);
    let seen =
        attention.sees(attention.position + steps.start).start..attention.position + steps.end;
    let (length, there) = (
        seen.len(),
        head * room + seen.start * width..head * room + seen.end * width,
    );
    work.queries.clear();
    for step in steps.clone() {
        let at = step * heads.all() + head * group * width;
        work.queries.extend_from_slice(&qkv[at..][..group * width]);
    }
    work.scores.resize(rows * length, 0.0);
    work.gathered.resize(rows * width, 0.0);
    let (k, v) = (&kept.k[there.clone()], &kept.v[there]);
    // SAFETY: `scores` has `rows` rows of `length`, and is this task's own.
    unsafe {
        let scores = work.scores.as_mut_ptr();
        kernels::block(kernels, &work.queries, k, width, scores, length);
    }
    for (step, scores) in steps.zip(work.scores.chunks_exact_mut(group * length)) {
        let own = attention.sees(attention.position + step);
        let own = own.start - seen.start..own.end - seen.start;
        for scores in scores.chunks_exact_mut(length) {
            scores[..own.start].fill(0.0);
            scores[own.end..].fill(0.0);
            kernels::softmax(kernels, &mut scores[own.clone()], attention.scale);
        }
    }
    kernels::gather(kernels, &work.scores, length, v, width, &mut work.gathered);
}

#[cfg(test)]
mod tests {
    use super::super::team;
    use super::*;

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
            let heads = Heads {
                query: heads,
                kv: kv_heads,
                width: d,
            };
            let (qkv, mut kept) = (make(s * heads.all(), 37), Kept::new(heads, room));
            kept.k = make(kept.k.len(), 53);
            kept.v = make(kept.v.len(), 71);
            team::with(|team| kept.keep(team, heads, &qkv, position));
            let attention = Attention {
                position,
                window,
                scale: 0.2,
            };
            let q: Vec<f32> = qkv
                .chunks_exact(heads.all())
                .flat_map(|row| &row[..heads.query * d])
                .copied()
                .collect();
            let shape = (s, heads.query, kv_heads, room, d);
            let wanted = exact(&q, &kept.k, &kept.v, shape, &attention);
            let got = team::with(|team| {
                let mut got = vec![f32::NAN; s * heads.query * d];
                attend(team, &attention, heads, &qkv, &kept, &mut got);
                got
            });
            for (got, wanted) in got.iter().zip(wanted) {
                assert!(
                    (f64::from(*got) - wanted).abs() < 1e-5,
                    "{s} {heads:?} from {position}, {window:?}"
                );
            }
            // The last token's keys and values are where its queries were.
            let (row, at) = (&qkv[(s - 1) * heads.all()..], (position + s - 1) * d);
            assert_eq!(kept.k[at..at + d], row[heads.query * d..][..d]);
            let of_value = heads.query + heads.kv;
            assert_eq!(kept.v[at..at + d], row[of_value * d..][..d]);
        }
    }
}
