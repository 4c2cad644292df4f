//! x · Wᵀ, with the weights as the file has them (bf16, f16 or f32) and f32 activations.
//!
//! Generating is bound by memory: each token reads every weight once, so weights of 16 bits are widened in registers, and memory
//! delivers half of what it would with f32. A prompt is bound by arithmetic: what has to be done to W before it is multiplied is done once for
//! all rows of x.

use candle_core::{CpuStorage, Layout, Storage, bail};
use half::{bf16, f16};

use super::kernels::{self, Element, Kernels};
use super::team::{Shared, Team};

/// Rows of weights.
#[derive(Clone, Copy, Debug)]
pub(in crate::runner) enum Matrix<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> Matrix<'a> {
    /// A tensor's elements.
    pub(in crate::runner) fn of(
        storage: &'a Storage,
        layout: &Layout,
    ) -> candle_core::Result<Self> {
        let (Storage::Cpu(storage), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            bail!("a product needs contiguous weights in memory");
        };
        Ok(match storage {
            CpuStorage::F32(w) => Self::F32(&w[start..end]),
            CpuStorage::F16(w) => Self::F16(&w[start..end]),
            CpuStorage::BF16(w) => Self::BF16(&w[start..end]),
            _ => bail!("a product with weights of this dtype"),
        })
    }

    /// Writes elements from `at` on to `out`.
    pub(in crate::runner) fn read(&self, at: usize, out: &mut [f32]) {
        fn widen<W: Element>(w: &[W], at: usize, out: &mut [f32]) {
            let w = &w[at..at + out.len()];
            out.iter_mut().zip(w).for_each(|(out, w)| *out = w.wide());
        }
        match self {
            Self::F32(w) => widen(w, at, out),
            Self::F16(w) => widen(w, at, out),
            Self::BF16(w) => widen(w, at, out),
        }
    }

    /// Some of its elements.
    pub(in crate::runner) fn part(&self, range: std::ops::Range<usize>) -> Self {
        match self {
            Self::F32(w) => Self::F32(&w[range]),
            Self::F16(w) => Self::F16(&w[range]),
            Self::BF16(w) => Self::BF16(&w[range]),
        }
    }
}

/// Products of a team, and memory that they use one after the other.
#[derive(Debug)]
pub(in crate::runner) struct Products<'a> {
    team: &'a Team<'a>,
    kernels: Kernels,
    /// x as AMX wants it.
    tiles: Vec<u16>,
}

impl<'a> Products<'a> {
    /// With the best that this machine has.
    pub(in crate::runner) fn new(team: &'a Team<'a>) -> Self {
        Self::with(team, kernels::detected())
    }

    fn with(team: &'a Team<'a>, kernels: Kernels) -> Self {
        Self {
            team,
            kernels,
            tiles: Vec::new(),
        }
    }

    /// `out[i][j] = x[i] · w[j]`, x and W of rows of `k`.
    pub(in crate::runner) fn product(
        &mut self,
        x: &[f32],
        w: Matrix<'_>,
        k: usize,
        out: &mut [f32],
    ) {
        match w {
            Matrix::F32(w) => self.typed(x, w, k, out),
            Matrix::F16(w) => self.typed(x, w, k, out),
            #[cfg(target_arch = "x86_64")]
            Matrix::BF16(w)
                if self.kernels == Kernels::Amx && x.len() >= kernels::amx::ROWS / 2 * k =>
            {
                self.amx(x, w, k, out);
            }
            Matrix::BF16(w) => self.typed(x, w, k, out),
        }
    }

    fn typed<W: Element>(&self, x: &[f32], w: &[W], k: usize, out: &mut [f32]) {
        let (m, n) = (x.len() / k, w.len() / k);
        assert_eq!(out.len(), m * n);
        // Tasks enough for the threads to even out, not so many that handing them out costs; of as many rows as are multiplied at a time.
        let rows = n
            .div_ceil(self.team.threads() * 8)
            .min(1024)
            .next_multiple_of(kernels::together(m));
        let (kernels, out) = (self.kernels, Shared::new(out));
        self.team.each(n.div_ceil(rows), |task| {
            let first = task * rows;
            let w = &w[first * k..((first + rows) * k).min(w.len())];
            // SAFETY: a task writes the columns of its own rows of W only.
            unsafe { kernels::block(kernels, x, w, k, out.at(first), n) };
        });
    }

    #[cfg(target_arch = "x86_64")]
    fn amx(&mut self, x: &[f32], w: &[bf16], k: usize, out: &mut [f32]) {
        use kernels::amx;
        let (m, n) = (x.len() / k, w.len() / k);
        assert_eq!(out.len(), m * n);
        let needed = amx::packed(m, k);
        self.tiles.resize(self.tiles.len().max(needed), 0);
        let tiles = &mut self.tiles[..needed];
        self.team.chunks(tiles, amx::packed(1, k), |block, tiles| {
            let first = block * amx::ROWS * k;
            let x = &x[first..(first + amx::ROWS * k).min(x.len())];
            // SAFETY: AMX is usable, or `kernels` would be another.
            unsafe { amx::pack(x, k, tiles) };
        });
        // A task reads all of x: few have to, but each thread two.
        let threads = self.team.threads();
        let tasks = n.div_ceil(amx::group(k)).max(2 * threads);
        let rows = n
            .div_ceil(tasks.next_multiple_of(threads))
            .next_multiple_of(amx::ROWS);
        let out = Shared::new(out);
        self.team.each(n.div_ceil(rows), |task| {
            let first = task * rows;
            let w = &w[first * k..((first + rows) * k).min(w.len())];
            // SAFETY: as above; a task writes the columns of its own rows of W only.
            unsafe { amx::block(tiles, w, (m, k), out.at(first), n) };
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::team;
    use super::*;

    /// Numbers that look random, the same everywhere.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn check<W: Element>(
        kernels: Kernels,
        narrow: impl Fn(f32) -> W,
        matrix: impl Fn(&[W]) -> Matrix<'_> + Sync,
    ) {
        // One row, odd rows, more than a block; columns of every remainder, and more than are multiplied at a time; few and many rows
        // of W.
        for (m, n, k) in [
            (1, 1, 1),
            (1, 7, 33),
            (3, 130, 96),
            (5, 64, 31),
            (70, 37, 48),
            (130, 9, 100),
            (31, 140, 64),
            (200, 66, 1536),
            (34, 70, 2100),
            (1, 300, 576),
        ] {
            let x = numbers(m * k, 1);
            let w: Vec<W> = numbers(n * k, 2).into_iter().map(&narrow).collect();
            let mut out = vec![f32::NAN; m * n];
            team::with(|team| {
                Products::with(team, kernels).product(&x, matrix(&w), k, &mut out);
            });
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k)
                        .map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c].wide()))
                        .sum();
                    let got = f64::from(out[i * n + j]);
                    assert!(
                        (got - exact).abs() < 1e-4,
                        "{kernels:?} {m}×{n}×{k} at {i},{j}: {got} {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_kernel_that_this_machine_has_gives_the_product() {
        for kernels in kernels::available() {
            check(kernels, |x| x, |w| Matrix::F32(w));
            check(kernels, bf16::from_f32, |w| Matrix::BF16(w));
            check(kernels, f16::from_f32, |w| Matrix::F16(w));
        }
    }
}
