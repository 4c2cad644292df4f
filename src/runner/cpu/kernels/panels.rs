//! Many rows of x times rows of W: some rows of W are widened and turned over first, so that lanes lie across them and no sum has to be
//! taken across lanes.

use std::cell::RefCell;

use super::{Element, Kernels};

/// Columns of x and W that are multiplied before the next ones: a panel of them stays in the second-level cache, and the rows of x
/// that are multiplied with it nearly in the first.
const DEPTH: usize = 1024;

thread_local! {
    /// A panel: `[depth][width]`.
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// As [`super::block`].
pub(super) unsafe fn block<W: Element>(
    kernels: Kernels,
    x: &[f32],
    w: &[W],
    k: usize,
    out: *mut f32,
    stride: usize,
) {
    let width = match kernels {
        Kernels::Plain => 8,
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx2 => 16,
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx512 | Kernels::Amx => 32,
    };
    PANEL.with_borrow_mut(|panel| {
        panel.resize(panel.len().max(DEPTH.min(k) * width), 0.0);
        for (number, w) in w.chunks(width * k).enumerate() {
            for first in (0..k).step_by(DEPTH) {
                let columns = first..(first + DEPTH).min(k);
                let part = Part {
                    x,
                    k,
                    columns,
                    width: w.len() / k,
                    stride,
                };
                // SAFETY: `out` is as the caller says, and has `part.width` more columns from there.
                unsafe {
                    let out = out.add(number * width);
                    match kernels {
                        Kernels::Plain => {
                            turn::<W, 8>(w, &part, panel);
                            plain(&part, panel, out);
                        }
                        #[cfg(target_arch = "x86_64")]
                        Kernels::Avx2 => {
                            x86::turn_avx2(w, &part, panel);
                            x86::multiply_avx2(&part, panel, out);
                        }
                        #[cfg(target_arch = "x86_64")]
                        Kernels::Avx512 | Kernels::Amx => {
                            x86::turn_avx512(w, &part, panel);
                            x86::multiply_avx512(&part, panel, out);
                        }
                    }
                }
            }
        }
    });
}

/// What is multiplied at a time: all rows of x, some of its columns, and the rows of W that a panel holds.
struct Part<'a> {
    x: &'a [f32],
    k: usize,
    columns: std::ops::Range<usize>,
    width: usize,
    stride: usize,
}

/// Fills a panel of `N` rows of W; of rows that W does not have, with zeros.
#[inline(always)]
fn turn<W: Element, const N: usize>(w: &[W], part: &Part<'_>, panel: &mut [f32]) {
    for (row, column) in part.columns.clone().zip(panel.chunks_exact_mut(N)) {
        for (j, value) in column.iter_mut().enumerate() {
            *value = if j < part.width {
                w[j * part.k + row].wide()
            } else {
                0.0
            };
        }
    }
}

unsafe fn plain(part: &Part<'_>, panel: &[f32], out: *mut f32) {
    for (i, x) in part.x.chunks_exact(part.k).enumerate() {
        let mut sums = [0.0f32; 8];
        for (x, w) in x[part.columns.clone()].iter().zip(panel.chunks_exact(8)) {
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum += x * w;
            }
        }
        // SAFETY: row i of `out` has these columns.
        unsafe { store(part, &sums, out.add(i * part.stride)) };
    }
}

/// Writes the columns that W has, or adds to them what comes after the first columns of x.
#[inline(always)]
unsafe fn store(part: &Part<'_>, sums: &[f32], out: *mut f32) {
    // SAFETY: as the caller says.
    let out = unsafe { std::slice::from_raw_parts_mut(out, part.width) };
    if part.columns.start == 0 {
        out.copy_from_slice(&sums[..part.width]);
    } else {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::Element;
    use super::super::transpose::transpose;
    use super::Part;

    /// `I` rows of x times a panel of two vectors, in registers.
    macro_rules! multiply {
        ($tile:ident, $name:ident, $features:literal, $lanes:literal, $most:literal, $zero:ident, $load:ident, $set:ident, $store:ident, $add:ident, $fma:ident) => {
            #[inline(always)]
            unsafe fn $tile<const I: usize>(
                part: &Part<'_>,
                first: usize,
                panel: *const f32,
                out: *mut f32,
            ) {
                // SAFETY: x has rows `first` to `first + I` of k columns, the panel two vectors for each of the part's columns, and
                // `out` the part's columns in each of those rows.
                unsafe {
                    let x = part.x.as_ptr().add(first * part.k + part.columns.start);
                    let mut sums = [[$zero(); 2]; I];
                    for row in 0..part.columns.len() {
                        let w = panel.add(row * 2 * $lanes);
                        let (low, high) = ($load(w), $load(w.add($lanes)));
                        for i in 0..I {
                            let x = $set(*x.add(i * part.k + row));
                            sums[i][0] = $fma(x, low, sums[i][0]);
                            sums[i][1] = $fma(x, high, sums[i][1]);
                        }
                    }
                    for i in 0..I {
                        let out = out.add((first + i) * part.stride);
                        if part.width < 2 * $lanes {
                            let mut row = [0.0f32; 2 * $lanes];
                            $store(row.as_mut_ptr(), sums[i][0]);
                            $store(row.as_mut_ptr().add($lanes), sums[i][1]);
                            super::store(part, &row, out);
                            continue;
                        }
                        for half in 0..2 {
                            let at = out.add(half * $lanes);
                            if part.columns.start > 0 {
                                sums[i][half] = $add(sums[i][half], $load(at));
                            }
                            $store(at, sums[i][half]);
                        }
                    }
                }
            }

            /// # Safety
            /// The processor has these features; `panel` and `out` are as `super::block` makes them.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(part: &Part<'_>, panel: &[f32], out: *mut f32) {
                let rows = part.x.len() / part.k;
                let (mut at, panel) = (0, panel.as_ptr());
                // SAFETY: rows of x and `out`.
                unsafe {
                    while at + $most <= rows {
                        $tile::<$most>(part, at, panel, out);
                        at += $most;
                    }
                    while at + 4 <= rows {
                        $tile::<4>(part, at, panel, out);
                        at += 4;
                    }
                    while at < rows {
                        $tile::<1>(part, at, panel, out);
                        at += 1;
                    }
                }
            }
        };
    }

    // As many sums as the registers hold beside what is loaded: 12 of 16, 24 of 32.
    multiply!(
        tile8,
        multiply_avx2,
        "avx2,fma",
        8,
        6,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_set1_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_fmadd_ps
    );
    multiply!(
        tile16,
        multiply_avx512,
        "avx512f,avx2,fma",
        16,
        12,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_fmadd_ps
    );

    /// # Safety
    /// The processor has these features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn turn_avx2<W: Element>(w: &[W], part: &Part<'_>, panel: &mut [f32]) {
        super::turn::<W, 16>(w, part, panel);
    }

    /// # Safety
    /// The processor has these features.
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(super) unsafe fn turn_avx512<W: Element>(w: &[W], part: &Part<'_>, panel: &mut [f32]) {
        let whole = part.columns.len() / 16 * 16;
        if part.width < 32 {
            super::turn::<W, 32>(w, part, panel);
            return;
        }
        for half in 0..2 {
            for column in (0..whole).step_by(16) {
                // SAFETY: W has 32 rows, each 16 elements from there; the panel has 32 numbers for each of these columns.
                unsafe {
                    let mut rows = [_mm512_setzero_si512(); 16];
                    for (j, row) in rows.iter_mut().enumerate() {
                        let at = (half * 16 + j) * part.k + part.columns.start + column;
                        *row = _mm512_castps_si512(W::sixteen(w.as_ptr().add(at)));
                    }
                    for (i, row) in transpose(rows).into_iter().enumerate() {
                        let at = (column + i) * 32 + half * 16;
                        _mm512_storeu_si512(panel.as_mut_ptr().add(at).cast(), row);
                    }
                }
            }
        }
        let rest = Part {
            columns: part.columns.start + whole..part.columns.end,
            ..*part
        };
        super::turn::<W, 32>(w, &rest, &mut panel[whole * 32..]);
    }
}
