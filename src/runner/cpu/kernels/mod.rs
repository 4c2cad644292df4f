//! The inner loops of the CPU, for AVX-512, AVX2 and any processor; which of them is decided when the program runs.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
mod attention;
mod dots;
mod element;
mod gate;
mod panels;
#[cfg(target_arch = "x86_64")]
mod transpose;

use std::sync::OnceLock;

pub(super) use attention::{gather, softmax};
pub(super) use element::Element;
pub(super) use gate::silu;

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
    /// AMX for bf16 as well.
    #[cfg(target_arch = "x86_64")]
    Amx,
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
            if amx::usable() {
                found.push(Kernels::Amx);
            }
        }
    }
    found
}

/// The best that this machine has.
pub(super) fn detected() -> Kernels {
    static DETECTED: OnceLock<Kernels> = OnceLock::new();
    *DETECTED.get_or_init(|| available().last().copied().unwrap_or(Kernels::Plain))
}

/// Rows of x from which on to turn W over costs less than sums across lanes do.
const MANY: usize = 16;

/// Rows of W that are multiplied at a time with `m` rows of x; more are best a multiple of it.
pub(super) fn together(m: usize) -> usize {
    if m < MANY { 4 } else { 32 }
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
        if x.len() >= MANY * k && w.len() >= 8 * k {
            panels::block(kernels, x, w, k, out, stride);
        } else {
            dots::block(kernels, x, w, k, out, stride);
        }
    }
}
