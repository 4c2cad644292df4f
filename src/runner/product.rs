//! x · Wᵀ on the CPU, with the weights as the file has them (bf16, f16 or f32) and f32 activations.
//!
//! Generating is bound by memory: each token reads every weight once, so weights of 16 bits are widened in registers, and memory
//! delivers half of what it would with f32. A prompt is bound by arithmetic: some rows of W are widened once for all of x and stay in the
//! second-level cache, while as many rows of x as the first-level cache holds are multiplied with each of them.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::kernels::{self, Element, Kernels};

/// Rows of x that a block has where W is not widened before.
const BLOCK: usize = 64;
/// Rows of x from which on W is.
const MANY: usize = 16;
/// Rows of W that are widened at a time: with 4096 columns, 1 MiB.
const WIDENED: usize = 64;
/// Bytes of x that a block has then, if that are six rows: a tile's.
const NEAR: usize = 32 << 10;
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
        if k != kw || k == 0 {
            bail!("a product of {k} columns with {kw}");
        }
        let x = &x.as_slice::<f32>()?[x0..x1];
        let mut out = Vec::with_capacity(m * n);
        let (kernels, room) = (kernels::detected(), &mut out.spare_capacity_mut()[..m * n]);
        match w {
            CpuStorage::BF16(w) => product::<bf16>(kernels, x, &w[w0..w1], room, k),
            CpuStorage::F16(w) => product::<f16>(kernels, x, &w[w0..w1], room, k),
            CpuStorage::F32(w) => product::<f32>(kernels, x, &w[w0..w1], room, k),
            _ => bail!("a product with weights of this dtype"),
        }
        // SAFETY: `product` has written every element.
        unsafe { out.set_len(m * n) };
        Ok((CpuStorage::F32(out), (m, n).into()))
    }
}

/// `out[i][j] = x[i] · w[j]`, all of rows of `k`; every element of `out` is written.
pub(super) fn product<W: Element>(
    kernels: Kernels,
    x: &[f32],
    w: &[W],
    out: &mut [MaybeUninit<f32>],
    k: usize,
) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!(out.len(), m * n);
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
        start: out.as_mut_ptr().cast(),
        columns: n,
    };
    if W::NARROW && m >= MANY {
        let block = (NEAR / (k * 4) / 6 * 6).clamp(6, 60);
        w.par_chunks(rows * k).enumerate().for_each(|(task, w)| {
            let mut wide = vec![0.0; w.len().min(WIDENED * k)];
            for (part, w) in w.chunks(WIDENED * k).enumerate() {
                let (first, wide) = (task * rows + part * WIDENED, &mut wide[..w.len()]);
                kernels::widen(kernels, w, wide);
                for (at, x) in x.chunks(block * k).enumerate() {
                    // SAFETY: a task writes the columns of its own rows of W only.
                    unsafe { kernels::block(kernels, x, wide, k, out.at(at * block, first), n) };
                }
            }
        });
        return;
    }
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
            (31, 140, 64),
            (200, 66, 1536),
            (1, 300, 576),
        ] {
            let x = numbers(m * k, 1);
            let w: Vec<W> = numbers(n * k, 2).into_iter().map(&narrow).collect();
            let mut out = vec![MaybeUninit::new(f32::NAN); m * n];
            product(kernels, &x, &w, &mut out, k);
            // SAFETY: all of it was written before the product was, which writes all of it.
            let out: Vec<f32> = out
                .into_iter()
                .map(|y| unsafe { y.assume_init() })
                .collect();
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
