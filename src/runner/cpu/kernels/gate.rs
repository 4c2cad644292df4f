//! The function of an MLP's gate.

use super::Kernels;
use super::attention::exp;

/// Writes `gate · sigmoid(gate) · up` to `gate`.
pub(in crate::runner) fn silu(kernels: Kernels, gate: &mut [f32], up: &[f32]) {
    match kernels {
        Kernels::Plain => silu_row(gate, up),
        // SAFETY: the processor has it, or `kernels` would be another.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx2 => unsafe { x86::silu_avx2(gate, up) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kernels::Avx512 | Kernels::Amx => unsafe { x86::silu_avx512(gate, up) },
    }
}

#[inline(always)]
fn silu_row(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    /// The same lines of Rust, compiled for wider registers.
    macro_rules! widened {
        ($features:literal, $silu:ident) => {
            /// # Safety
            /// The processor has these features.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $silu(gate: &mut [f32], up: &[f32]) {
                super::silu_row(gate, up);
            }
        };
    }

    widened!("avx2,fma", silu_avx2);
    widened!("avx512f,avx2,fma", silu_avx512);
}

#[cfg(test)]
mod tests {
    use super::super::available;
    use super::*;

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
