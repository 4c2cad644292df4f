//! x · Wᵀ on the CPU, with the weights as the file has them (bf16, f16 or f32) and f32 activations.
//!
//! Generating is bound by memory: each token reads every weight once, so weights of 16 bits are widened in registers, and memory
//! delivers half of what it would with f32. A prompt is bound by arithmetic: what has to be done to W before it is multiplied is done once for
//! all rows of x.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::kernels::{self, Element, Kernels};

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
            CpuStorage::BF16(w) => product_bf16(kernels, x, &w[w0..w1], room, k),
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
        .next_multiple_of(32);
    let out = Columns {
        start: out.as_mut_ptr().cast(),
        columns: n,
    };
    w.par_chunks(rows * k).enumerate().for_each(|(task, w)| {
        // SAFETY: a task writes the columns of its own rows of W only.
        unsafe { kernels::block(kernels, x, w, k, out.at(0, task * rows), n) };
    });
}

/// As [`product`], with AMX where there are rows enough for it.
fn product_bf16(kernels: Kernels, x: &[f32], w: &[bf16], out: &mut [MaybeUninit<f32>], k: usize) {
    #[cfg(target_arch = "x86_64")]
    if kernels == Kernels::Amx && x.len() >= kernels::amx::ROWS / 2 * k {
        return product_amx(x, w, out, k);
    }
    product(kernels, x, w, out, k);
}

#[cfg(target_arch = "x86_64")]
fn product_amx(x: &[f32], w: &[bf16], out: &mut [MaybeUninit<f32>], k: usize) {
    use kernels::amx;
    /// Blocks of W that a task has, and so times that what it reads of x is used.
    const BLOCKS: usize = 4;
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!(out.len(), m * n);
    let mut tiles = vec![0; amx::packed(m, k)];
    x.par_chunks(amx::ROWS * k)
        .zip(tiles.par_chunks_exact_mut(amx::packed(1, k)))
        // SAFETY: AMX is usable, or `kernels` would be another.
        .for_each(|(x, tiles)| unsafe { amx::pack(x, k, tiles) });
    let threads = rayon::current_num_threads();
    // As many tasks for each thread, of as many rows.
    let tasks = n.div_ceil(amx::ROWS * BLOCKS).next_multiple_of(threads);
    let rows = n.div_ceil(tasks).next_multiple_of(amx::ROWS);
    let out = Columns {
        start: out.as_mut_ptr().cast(),
        columns: n,
    };
    w.par_chunks(rows * k).enumerate().for_each(|(task, w)| {
        // SAFETY: as above; a task writes the columns of its own rows of W only.
        unsafe { amx::block(&tiles, w, (m, k), out.at(0, task * rows), n) };
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
        product: fn(Kernels, &[f32], &[W], &mut [MaybeUninit<f32>], usize),
        narrow: impl Fn(f32) -> W,
        wide: impl Fn(W) -> f32,
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
            check(kernels, product, |x| x, |x| x);
            check(kernels, product_bf16, bf16::from_f32, bf16::to_f32);
            check(kernels, product, f16::from_f32, f16::to_f32);
        }
    }
}
