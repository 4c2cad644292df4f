//! The gate of an MLP, its function and the product with what it gates in one pass: `[m, 2n]`, gate and up side by side, gives `[m, n]`.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, bail};
use rayon::prelude::*;

use super::config::Activation;
use super::kernels;

/// The operation.
pub(super) struct Gate(pub(super) Activation);

impl Gate {
    pub(super) fn apply(&self, gate_up: &Tensor) -> candle_core::Result<Tensor> {
        gate_up.apply_op1_no_bwd(self)
    }
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + (0.797_884_6 * x * (1.0 + 0.044_715 * x * x)).tanh())
}

impl CustomOp1 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (m, double) = layout.shape().dims2()?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a gate needs a contiguous tensor");
        };
        let (x, n) = (&x.as_slice::<f32>()?[start..end], double / 2);
        let kernels = kernels::detected();
        let mut out = vec![0.0; m * n];
        let row = |(out, x): (&mut [f32], &[f32])| {
            let (gate, up) = x.split_at(n);
            out.copy_from_slice(gate);
            match self.0 {
                Activation::Silu => kernels::silu(kernels, out, up),
                Activation::GeluTanh => out
                    .iter_mut()
                    .zip(up)
                    .for_each(|(gate, up)| *gate = gelu(*gate) * up),
            }
        };
        if m > 1 {
            out.par_chunks_exact_mut(n)
                .zip(x.par_chunks_exact(double))
                .for_each(row);
        } else {
            row((&mut out, x));
        }
        Ok((CpuStorage::F32(out), (m, n).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        super::cuda::gate(self.0, x, layout)
    }
}
