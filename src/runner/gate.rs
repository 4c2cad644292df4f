//! The gate of an MLP on a GPU, its function and the product with what it gates in one pass: `[m, 2n]`, gate and up side by side, gives `[m, n]`.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, bail};

use super::config::Activation;

/// The operation.
pub(super) struct Gate(pub(super) Activation);

impl Gate {
    pub(super) fn apply(&self, gate_up: &Tensor) -> candle_core::Result<Tensor> {
        gate_up.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("a GPU's gate has no tensor of the CPU")
    }

    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        super::cuda::gate(self.0, x, layout)
    }
}
