//! Rows of x times rows of W: a tile of both in registers, with the lanes along the rows.

use super::{Element, Kernels};

/// As [`super::block`].
pub(super) unsafe fn block<W: Element>(
    kernels: Kernels,
    x: &[f32],
    w: &[W],
    k: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: as the caller says.
    unsafe {
        match kernels {
            Kernels::Plain => plain(x, w, k, out, stride),
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx2 => x86::block_avx2(x, w, k, out, stride),
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx512 | Kernels::Amx => x86::block_avx512(x, w, k, out, stride),
        }
    }
}

unsafe fn plain<W: Element>(x: &[f32], w: &[W], k: usize, out: *mut f32, stride: usize) {
    for (j, w) in w.chunks_exact(k).enumerate() {
        for (i, x) in x.chunks_exact(k).enumerate() {
            // Eight sums, so that the additions do not wait for each other.
            let mut sums = [0.0f32; 8];
            let (xs, ws) = (x.chunks_exact(8), w.chunks_exact(8));
            let rest: f32 = xs
                .remainder()
                .iter()
                .zip(ws.remainder())
                .map(|(x, w)| x * w.wide())
                .sum();
            for (x, w) in xs.zip(ws) {
                for lane in 0..8 {
                    sums[lane] += x[lane] * w[lane].wide();
                }
            }
            // SAFETY: as the caller says.
            unsafe { *out.add(i * stride + j) = sums.iter().sum::<f32>() + rest };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Element;

    /// Bytes of W that are asked for before they are read, where each is read once: the processor itself looks no further than the end of a page of
    /// memory.
    const AHEAD: usize = 8192;

    /// A tile of `I` rows of x and `J` rows of W, in registers.
    macro_rules! tile {
        ($name:ident, $lanes:literal, $load:ident, $zero:ident, $loadx:ident, $fma:ident, $sum:ident, $sum4:ident) => {
            #[inline(always)]
            unsafe fn $name<W: Element, const I: usize, const J: usize>(
                x: *const f32,
                w: *const W,
                k: usize,
                out: *mut f32,
                stride: usize,
            ) {
                // SAFETY: `x` has I rows and `w` J rows of k elements; `out` is as the caller says.
                unsafe {
                    let mut sums = [[$zero(); I]; J];
                    let mut at = 0;
                    while at + $lanes <= k {
                        let mut xs = [$zero(); I];
                        for i in 0..I {
                            xs[i] = $loadx(x.add(i * k + at));
                        }
                        for j in 0..J {
                            let w = w.add(j * k + at);
                            if I == 1 {
                                _mm_prefetch::<_MM_HINT_T1>(w.cast::<i8>().wrapping_add(AHEAD));
                            }
                            let w = W::$load(w);
                            for i in 0..I {
                                sums[j][i] = $fma(xs[i], w, sums[j][i]);
                            }
                        }
                        at += $lanes;
                    }
                    // Lanes are added up for four sums at once where there are four: one by one it takes longer than short rows do.
                    if J == 4 && at == k {
                        for i in 0..I {
                            let four = $sum4(sums[0][i], sums[1][i], sums[2][i], sums[3][i]);
                            _mm_storeu_ps(out.add(i * stride), four);
                        }
                        return;
                    }
                    for j in 0..J {
                        for i in 0..I {
                            let mut sum = $sum(sums[j][i]);
                            for rest in at..k {
                                sum += *x.add(i * k + rest) * (*w.add(j * k + rest)).wide();
                            }
                            *out.add(i * stride + j) = sum;
                        }
                    }
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn sum8(lanes: __m256) -> f32 {
        // SAFETY: AVX2 is there, or the caller would not be.
        unsafe {
            let four = _mm_add_ps(
                _mm256_castps256_ps128(lanes),
                _mm256_extractf128_ps::<1>(lanes),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn sum16(lanes: __m512) -> f32 {
        // SAFETY: AVX-512F is there, or the caller would not be.
        unsafe { _mm512_reduce_add_ps(lanes) }
    }

    /// The sums of the lanes of each, in order.
    #[inline(always)]
    unsafe fn sum8x4(a: __m256, b: __m256, c: __m256, d: __m256) -> __m128 {
        // SAFETY: AVX2 is there, or the caller would not be.
        unsafe {
            let ab = _mm256_castps_pd(_mm256_add_ps(
                _mm256_unpacklo_ps(a, b),
                _mm256_unpackhi_ps(a, b),
            ));
            let cd = _mm256_castps_pd(_mm256_add_ps(
                _mm256_unpacklo_ps(c, d),
                _mm256_unpackhi_ps(c, d),
            ));
            let all = _mm256_add_ps(
                _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
            );
            _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all))
        }
    }

    /// The sums of the lanes of each, in order.
    #[inline(always)]
    unsafe fn sum16x4(a: __m512, b: __m512, c: __m512, d: __m512) -> __m128 {
        // SAFETY: AVX-512F is there, or the caller would not be.
        unsafe {
            let ab = _mm512_castps_pd(_mm512_add_ps(
                _mm512_unpacklo_ps(a, b),
                _mm512_unpackhi_ps(a, b),
            ));
            let cd = _mm512_castps_pd(_mm512_add_ps(
                _mm512_unpacklo_ps(c, d),
                _mm512_unpackhi_ps(c, d),
            ));
            let all = _mm512_add_ps(
                _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
            );
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(all)));
            let half = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
            _mm_add_ps(
                _mm256_castps256_ps128(half),
                _mm256_extractf128_ps::<1>(half),
            )
        }
    }

    tile!(
        tile8,
        8,
        eight,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_fmadd_ps,
        sum8,
        sum8x4
    );
    tile!(
        tile16,
        16,
        sixteen,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_fmadd_ps,
        sum16,
        sum16x4
    );

    macro_rules! block {
        ($name:ident, $features:literal, $tile:ident, $i:literal, $j:literal) => {
            /// # Safety
            /// As `super::block`.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name<W: Element>(
                x: &[f32],
                w: &[W],
                k: usize,
                out: *mut f32,
                stride: usize,
            ) {
                let (m, n) = (x.len() / k, w.len() / k);
                let (mut j, x, w) = (0, x.as_ptr(), w.as_ptr());
                // SAFETY: every tile lies within the m rows of x, the n rows of w, and so of `out`.
                unsafe {
                    while j + $j <= n {
                        let mut i = 0;
                        while i + $i <= m {
                            $tile::<W, $i, $j>(
                                x.add(i * k),
                                w.add(j * k),
                                k,
                                out.add(i * stride + j),
                                stride,
                            );
                            i += $i;
                        }
                        while i < m {
                            $tile::<W, 1, $j>(
                                x.add(i * k),
                                w.add(j * k),
                                k,
                                out.add(i * stride + j),
                                stride,
                            );
                            i += 1;
                        }
                        j += $j;
                    }
                    while j < n {
                        for i in 0..m {
                            $tile::<W, 1, 1>(
                                x.add(i * k),
                                w.add(j * k),
                                k,
                                out.add(i * stride + j),
                                stride,
                            );
                        }
                        j += 1;
                    }
                }
            }
        };
    }

    // As many sums as the registers hold beside what is loaded: 12 of 16, 24 of 32.
    block!(block_avx2, "avx2,fma,f16c", tile8, 3, 4);
    block!(block_avx512, "avx512f,avx2,fma,f16c", tile16, 6, 4);
}
