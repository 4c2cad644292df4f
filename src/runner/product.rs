//! x · Wᵀ on the CPU, with the weights as the file has them (bf16, f16 or f32) and f32 activations.
//!
//! Generating is bound by memory: each token reads every weight once, so weights of 16 bits are widened in registers, and memory
//! delivers half of what it would with f32. A prompt is bound by arithmetic: rows of x are taken several at a time, in blocks that
//! stay in the second-level cache, so that each weight is widened once for all of them.

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::kernels::{self, Element, Kernels};

/// Rows of x that a block has: with 4096 columns, 1 MiB.
const BLOCK: usize = 64;
/// Rows of W that one task multiplies with, at least.
const ROWS: usize = 64;

/// x · Wᵀ as an operation on tensors.
pub(super) struct Product;

impl Product {
    /// x of shape `[m, k]` in f32 and W of shape `[n, k]` give `[m, n]`.
    pub(super) fn apply(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op2_no_bwd(weight, &Self)
    }
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((m, k), (n, kw)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let (Some((x0, x1)), Some((w0, w1))) = (lx.contiguous_offsets(), lw.contiguous_offsets())
        else {
            bail!("a product needs contiguous tensors");
        };
        if k != kw {
            bail!("a product of {k} columns with {kw}");
        }
        let x = &x.as_slice::<f32>()?[x0..x1];
        let mut out = vec![0.0; m * n];
        let kernels = kernels::detected();
        match w {
            CpuStorage::BF16(w) => product::<bf16>(kernels, x, &w[w0..w1], &mut out, k),
            CpuStorage::F16(w) => product::<f16>(kernels, x, &w[w0..w1], &mut out, k),
            CpuStorage::F32(w) => product::<f32>(kernels, x, &w[w0..w1], &mut out, k),
            _ => bail!("a product with weights of this dtype"),
        }
        Ok((CpuStorage::F32(out), (m, n).into()))
    }
}

/// `out[i][j] = x[i] · w[j]`, all of rows of `k`.
pub(super) fn product<W: Element>(kernels: Kernels, x: &[f32], w: &[W], out: &mut [f32], k: usize) {
    let (m, n) = (x.len() / k.max(1), w.len() / k.max(1));
    if m == 0 || n == 0 {
        return;
    }
    // Tasks enough for the threads to even out, not so many that handing them out costs.
    let threads = rayon::current_num_threads();
    let rows = n
        .div_ceil(threads * 4)
        .clamp(ROWS.min(n), 1024)
        .next_multiple_of(4);
    let out = Columns {
        start: out.as_mut_ptr(),
        columns: n,
    };
    w.par_chunks(rows * k).enumerate().for_each(|(task, w)| {
        let first = task * rows;
        for (block, x) in x.chunks(BLOCK * k).enumerate() {
            // SAFETY: a task writes the columns of its own rows of W only.
            unsafe { kernels::block(kernels, x, w, k, out.at(block * BLOCK, first), n) };
        }
    });
}

/// The output, of which each task writes its own columns.
#[derive(Clone, Copy)]
struct Columns {
    start: *mut f32,
    columns: usize,
}

// SAFETY: tasks write disjoint columns.
unsafe impl Sync for Columns {}
// SAFETY: as above.
unsafe impl Send for Columns {}

impl Columns {
    /// # Safety
    /// The row and column are within the output.
    unsafe fn at(&self, row: usize, column: usize) -> *mut f32 {
        // SAFETY: within the output, as the caller says.
        unsafe { self.start.add(row * self.columns + column) }
    }
}

#[cfg(test)]
mod tests {
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

    fn check<W: Element + Copy>(
        kernels: Kernels,
        narrow: impl Fn(f32) -> W,
        wide: impl Fn(W) -> f32,
    ) {
        // One row, odd rows, more than a block; columns of every remainder; few and many rows of W.
        for (m, n, k) in [
            (1, 1, 1),
            (1, 7, 33),
            (3, 130, 96),
            (5, 64, 31),
            (70, 37, 48),
            (130, 9, 100),
            (1, 300, 576),
        ] {
            let x = numbers(m * k, 1);
            let w: Vec<W> = numbers(n * k, 2).into_iter().map(&narrow).collect();
            let mut out = vec![f32::NAN; m * n];
            product(kernels, &x, &w, &mut out, k);
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k)
                        .map(|c| f64::from(x[i * k + c]) * f64::from(wide(w[j * k + c])))
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
            check(kernels, |x| x, |x| x);
            check(kernels, bf16::from_f32, bf16::to_f32);
            check(kernels, f16::from_f32, f16::to_f32);
        }
    }
}
