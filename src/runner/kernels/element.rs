//! The types of weights, and how they become f32.

use half::{bf16, f16};

use super::Kernels;

/// An element of a weight.
pub(in crate::runner) trait Element: Copy + Send + Sync {
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

/// Writes the values of `w` to `out`.
pub(in crate::runner) fn widen<W: Element>(kernels: Kernels, w: &[W], out: &mut [f32]) {
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Element;

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
}
