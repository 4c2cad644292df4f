//! Attention's weights, and what they gather.

use super::Kernels;

/// Writes `sum over j of weights[i][j] * v[j]` to row i of `out`: attention's output for some queries of one head.
///
/// `weights` has rows of `length`, `v` has `length` rows of `width`, and so has `out`, for each row of `weights`.
pub(in crate::runner) fn gather(
    kernels: Kernels,
    weights: &[f32],
    length: usize,
    v: &[f32],
    width: usize,
    out: &mut [f32],
) {
    let rows = weights.len() / length.max(1);
    assert!(
        v.len() >= length * width && out.len() == rows * width && weights.len() == rows * length
    );
    match kernels {
        Kernels::Plain => gather_columns(weights, length, v, width, out, 0),
        // SAFETY: the processor has it, or `kernels` would be another; the lengths were compared.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx2 => unsafe { x86::gather_avx2(weights, length, v, width, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx512 | Kernels::Amx => unsafe {
            x86::gather_avx512(weights, length, v, width, out)
        },
    }
}

/// The columns from `first` on, one row at a time.
fn gather_columns(
    weights: &[f32],
    length: usize,
    v: &[f32],
    width: usize,
    out: &mut [f32],
    first: usize,
) {
    for (weights, out) in weights
        .chunks_exact(length)
        .zip(out.chunks_exact_mut(width))
    {
        let out = &mut out[first..];
        out.fill(0.0);
        for (weight, v) in weights.iter().zip(v.chunks_exact(width)) {
            for (sum, value) in out.iter_mut().zip(&v[first..]) {
                *sum += weight * value;
            }
        }
    }
}

/// e^x within two units in the last place, for x up to 88; smaller than e^-87 is 0.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    // x = n·ln 2 + r with |r| ≤ ln 2 / 2; ln 2 in two parts, so that r is exact. Adding 1.5·2^23 rounds to an integer.
    let rounded = clamped * std::f32::consts::LOG2_E + 12_582_912.0;
    let n = rounded - 12_582_912.0;
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut sum = 1.987_569_1e-4_f32;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        sum = sum * r + coefficient;
    }
    let power = f32::from_bits(
        ((rounded.to_bits() as i32)
            .wrapping_sub(0x4b40_0000)
            .wrapping_add(127)
            << 23) as u32,
    );
    let value = (sum * r * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// Turns scores into weights that add up to 1, each multiplied with `scale` first.
pub(in crate::runner) fn softmax(kernels: Kernels, scores: &mut [f32], scale: f32) {
    match kernels {
        Kernels::Plain => softmax_row(scores, scale),
        // SAFETY: the processor has it, or `kernels` would be another.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx2 => unsafe { x86::softmax_avx2(scores, scale) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx512 | Kernels::Amx => unsafe { x86::softmax_avx512(scores, scale) },
    }
}

#[inline(always)]
fn softmax_row(scores: &mut [f32], scale: f32) {
    // In lanes of 16, which any vector unit divides: one running value would be a chain of additions.
    let mut most = [f32::NEG_INFINITY; 16];
    let chunks = scores.chunks_exact(16);
    let mut highest = chunks
        .remainder()
        .iter()
        .fold(f32::NEG_INFINITY, |most, score| most.max(*score));
    for chunk in chunks {
        for (most, score) in most.iter_mut().zip(chunk) {
            *most = if *score > *most { *score } else { *most };
        }
    }
    highest = most.iter().fold(highest, |most, score| most.max(*score));
    let mut sums = [0.0f32; 16];
    let mut chunks = scores.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for (sum, score) in sums.iter_mut().zip(chunk) {
            *score = exp((*score - highest) * scale);
            *sum += *score;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for score in chunks.into_remainder() {
        *score = exp((*score - highest) * scale);
        sum += *score;
    }
    let share = 1.0 / sum;
    for score in scores {
        *score *= share;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// `I` rows of weights times `J` vectors of columns, in registers.
    macro_rules! gather {
        ($tile:ident, $name:ident, $features:literal, $lanes:literal, $i:literal, $j:literal, $zero:ident, $set:ident, $load:ident, $store:ident, $fma:ident) => {
            #[inline(always)]
            unsafe fn $tile<const I: usize, const J: usize>(
                weights: *const f32,
                length: usize,
                v: *const f32,
                width: usize,
                out: *mut f32,
            ) {
                // SAFETY: I rows of weights, `length` rows of v and I rows of out have J vectors from where they point.
                unsafe {
                    let mut sums = [[$zero(); J]; I];
                    for row in 0..length {
                        let mut values = [$zero(); J];
                        for j in 0..J {
                            values[j] = $load(v.add(row * width + j * $lanes));
                        }
                        for i in 0..I {
                            let weight = $set(*weights.add(i * length + row));
                            for j in 0..J {
                                sums[i][j] = $fma(weight, values[j], sums[i][j]);
                            }
                        }
                    }
                    for i in 0..I {
                        for j in 0..J {
                            $store(out.add(i * width + j * $lanes), sums[i][j]);
                        }
                    }
                }
            }

            /// # Safety
            /// The processor has these features, and the lengths are as `super::gather` compares them.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(
                weights: &[f32],
                length: usize,
                v: &[f32],
                width: usize,
                out: &mut [f32],
            ) {
                let rows = weights.len() / length.max(1);
                let mut column = 0;
                while column + $lanes * $j <= width {
                    let mut i = 0;
                    // SAFETY: rows and columns are within what the caller has compared.
                    unsafe {
                        let v = v.as_ptr().add(column);
                        while i + $i <= rows {
                            let out = out.as_mut_ptr().add(i * width + column);
                            $tile::<$i, $j>(
                                weights.as_ptr().add(i * length),
                                length,
                                v,
                                width,
                                out,
                            );
                            i += $i;
                        }
                        while i < rows {
                            let out = out.as_mut_ptr().add(i * width + column);
                            $tile::<1, $j>(weights.as_ptr().add(i * length), length, v, width, out);
                            i += 1;
                        }
                    }
                    column += $lanes * $j;
                }
                if column < width {
                    super::gather_columns(weights, length, v, width, out, column);
                }
            }
        };
    }

    gather!(
        gather8,
        gather_avx2,
        "avx2,fma",
        8,
        3,
        2,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps
    );
    gather!(
        gather16,
        gather_avx512,
        "avx512f,avx2,fma",
        16,
        6,
        2,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps
    );

    /// The same lines of Rust, compiled for wider registers.
    macro_rules! widened {
        ($features:literal, $softmax:ident) => {
            /// # Safety
            /// The processor has these features.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $softmax(scores: &mut [f32], scale: f32) {
                super::softmax_row(scores, scale);
            }
        };
    }

    widened!("avx2,fma", softmax_avx2);
    widened!("avx512f,avx2,fma", softmax_avx512);
}

#[cfg(test)]
mod tests {
    use super::super::available;
    use super::*;

    #[test]
    fn exp_is_as_exact_as_softmax_needs() {
        for step in -8700..=880 {
            let x = step as f32 / 100.0 + 0.003;
            let exact = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!(
                (got / exact - 1.0).abs() < 4e-7 || x < -86.9,
                "{x}: {got} {exact}"
            );
        }
        assert_eq!(
            (exp(-200.0), exp(f32::NEG_INFINITY), exp(0.0)),
            (0.0, 0.0, 1.0)
        );
    }

    #[test]
    fn weights_add_up_and_gather_what_they_weigh() {
        for kernels in available() {
            for (rows, length, width) in
                [(1, 1, 1), (3, 17, 64), (7, 40, 48), (2, 5, 80), (13, 33, 7)]
            {
                let mut weights: Vec<f32> = (0..rows * length)
                    .map(|n| ((n * 37) % 19) as f32 - 9.0)
                    .collect();
                let scores = weights.clone();
                for row in weights.chunks_exact_mut(length) {
                    softmax(kernels, row, 0.5);
                }
                let v: Vec<f32> = (0..length * width)
                    .map(|n| ((n * 31) % 23) as f32 / 7.0)
                    .collect();
                let mut out = vec![f32::NAN; rows * width];
                gather(kernels, &weights, length, &v, width, &mut out);
                for i in 0..rows {
                    let exact: Vec<f64> = scores[i * length..][..length]
                        .iter()
                        .map(|s| (f64::from(*s) * 0.5).exp())
                        .collect();
                    let total: f64 = exact.iter().sum();
                    for c in 0..width {
                        let wanted: f64 = (0..length)
                            .map(|j| exact[j] / total * f64::from(v[j * width + c]))
                            .sum();
                        assert!(
                            (f64::from(out[i * width + c]) - wanted).abs() < 1e-5,
                            "{kernels:?} {rows}×{length}×{width}"
                        );
                    }
                }
            }
        }
    }
}
