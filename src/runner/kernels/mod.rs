//! The inner loops of the CPU, for AVX-512, AVX2 and any processor; which of them is decided when the program runs.

mod attention;
mod dots;
mod element;
mod gate;

use std::sync::OnceLock;

pub(super) use attention::{gather, softmax};
pub(super) use dots::block;
pub(super) use element::{Element, widen};
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
