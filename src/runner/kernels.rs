//! The inner loops of the CPU, for AVX-512, AVX2 and any processor; which of them is decided when the program runs.

use std::sync::OnceLock;

use half::{bf16, f16};

/// Which instructions are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernels {
    /// None in particular.
    Plain,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512F as well.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// All that this machine has, the best last.
pub(super) fn available() -> Vec<Kernels> {
    #[allow(unused_mut)]
    let mut found = vec![Kernels::Plain];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        found.push(Kernels::Avx2);
        if is_x86_feature_detected!("avx512f") {
            found.push(Kernels::Avx512);
        }
    }
    found
}

/// The best that this machine has.
pub(super) fn detected() -> Kernels {
    static DETECTED: OnceLock<Kernels> = OnceLock::new();
    *DETECTED.get_or_init(|| available().last().copied().unwrap_or(Kernels::Plain))
}

/// An element of a weight.
pub(super) trait Element: Copy + Send + Sync {
    /// Whether it is widened when it is loaded.
    const NARROW: bool;
    /// Its value.
    fn wide(self) -> f32;
    /// The values of the 8 elements from `at`.
    ///
    /// # Safety
    /// 8 elements can be read, and the processor has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(at: *const Self) -> std::arch::x86_64::__m256;
    /// The values of the 16 elements from `at`.
    ///
    /// # Safety
    /// 16 elements can be read, and the processor has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(at: *const Self) -> std::arch::x86_64::__m512;
}

impl Element for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(at: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: as the caller says.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(at) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(at: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: as the caller says.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(at) }
    }
}

impl Element for bf16 {
    const NARROW: bool = true;

    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(at: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: as the caller says. bf16 is the upper half of an f32.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(at.cast()),
            )))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(at: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: as the caller says.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                _mm256_loadu_si256(at.cast()),
            )))
        }
    }
}

impl Element for f16 {
    const NARROW: bool = true;

    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(at: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: as the caller says.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(at: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: as the caller says.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
}

/// Writes `x[i] · w[j]` to `out[i * stride + j]`, for all rows of `k` elements of both.
///
/// # Safety
/// `out` can be written at all these places, and nobody else does so; the processor has the `kernels`.
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
            Kernels::Avx512 => x86::block_avx512(x, w, k, out, stride),
        }
    }
}

/// Writes the values of `w` to `out`.
pub(super) fn widen<W: Element>(kernels: Kernels, w: &[W], out: &mut [f32]) {
    assert_eq!(w.len(), out.len());
    match kernels {
        Kernels::Plain => out.iter_mut().zip(w).for_each(|(out, w)| *out = w.wide()),
        // SAFETY: the processor has it, or `kernels` would be another; the lengths were compared.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx2 => unsafe { x86::widen_avx2(w, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx512 => unsafe { x86::widen_avx512(w, out) },
    }
}

/// Writes `sum over j of weights[i][j] * v[j]` to row i of `out`: attention's output for some queries of one head.
///
/// `weights` has rows of `length`, `v` has `length` rows of `width`, and so has `out`, for each row of `weights`.
pub(super) fn gather(
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
        Kernels::Avx512 => unsafe { x86::gather_avx512(weights, length, v, width, out) },
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
pub(super) fn softmax(kernels: Kernels, scores: &mut [f32], scale: f32) {
    match kernels {
        Kernels::Plain => softmax_row(scores, scale),
        // SAFETY: the processor has it, or `kernels` would be another.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx2 => unsafe { x86::softmax_avx2(scores, scale) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx512 => unsafe { x86::softmax_avx512(scores, scale) },
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

/// Writes `gate · sigmoid(gate) · up` to `gate`.
pub(super) fn silu(kernels: Kernels, gate: &mut [f32], up: &[f32]) {
    match kernels {
        Kernels::Plain => silu_row(gate, up),
        // SAFETY: the processor has it, or `kernels` would be another.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx2 => unsafe { x86::silu_avx2(gate, up) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx512 => unsafe { x86::silu_avx512(gate, up) },
    }
}

#[inline(always)]
fn silu_row(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
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
                            let w = W::$load(w.add(j * k + at));
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

    macro_rules! widen {
        ($name:ident, $features:literal, $lanes:literal, $load:ident, $store:ident) => {
            /// # Safety
            /// The processor has these features, and `out` is as long as `w`.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name<W: Element>(w: &[W], out: &mut [f32]) {
                let whole = w.len() - w.len() % $lanes;
                for at in (0..whole).step_by($lanes) {
                    // SAFETY: within both.
                    unsafe { $store(out.as_mut_ptr().add(at), W::$load(w.as_ptr().add(at))) };
                }
                for (out, w) in out[whole..].iter_mut().zip(&w[whole..]) {
                    *out = w.wide();
                }
            }
        };
    }

    widen!(widen_avx2, "avx2,fma,f16c", 8, eight, _mm256_storeu_ps);
    widen!(
        widen_avx512,
        "avx512f,avx2,fma,f16c",
        16,
        sixteen,
        _mm512_storeu_ps
    );

    /// The same lines of Rust, compiled for wider registers.
    macro_rules! widened {
        ($features:literal, $softmax:ident, $silu:ident) => {
            /// # Safety
            /// The processor has these features.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $softmax(scores: &mut [f32], scale: f32) {
                super::softmax_row(scores, scale);
            }

            /// # Safety
            /// The processor has these features.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $silu(gate: &mut [f32], up: &[f32]) {
                super::silu_row(gate, up);
            }
        };
    }

    widened!("avx2,fma", softmax_avx2, silu_avx2);
    widened!("avx512f,avx2,fma", softmax_avx512, silu_avx512);
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn the_gate_is_silu() {
        for kernels in available() {
            let mut gate: Vec<f32> = (-40..40).map(|n| n as f32 / 3.0).collect();
            let wanted: Vec<f64> = gate
                .iter()
                .map(|g| f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * 2.0)
                .collect();
            let up = vec![2.0; gate.len()];
            silu(kernels, &mut gate, &up);
            for (got, wanted) in gate.iter().zip(wanted) {
                assert!((f64::from(*got) - wanted).abs() < 1e-5);
            }
        }
    }
}
