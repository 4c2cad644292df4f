//! Loaded tensors on their way into the decoder.

use candle_core::{DType, Device, Tensor};

use super::{Layer, Linear, Mlp};
use crate::runner::config::{Config, Family};
use crate::runner::error::{Error, Result};
use crate::runner::weights::{LayerPlan, LinearPlan, Loaded, MlpPlan};

/// The tensors, and what they are to become.
pub(super) struct Parts<'a> {
    pub(super) loaded: Loaded,
    pub(super) config: &'a Config,
    pub(super) device: &'a Device,
    pub(super) dtype: Option<DType>,
}

impl Parts<'_> {
    pub(super) fn matrix(&self, slot: usize) -> Result<Tensor> {
        let tensor = self.loaded.get(slot);
        Ok(match self.dtype {
            Some(dtype) => tensor.to_dtype(dtype)?,
            None => tensor,
        })
    }

    /// A bias has the dtype of the product that it is added to.
    fn bias(&self, slot: usize, matrix: &Tensor) -> Result<Tensor> {
        let dtype = if self.device.is_cpu() {
            DType::F32
        } else {
            matrix.dtype()
        };
        Ok(self.loaded.get(slot).to_dtype(dtype)?)
    }

    /// The weights of a norm, in f32; Gemma's are what is added to 1.
    pub(super) fn norm(&self, slot: usize) -> Result<Tensor> {
        let weight = self.loaded.get(slot).to_dtype(DType::F32)?;
        Ok(if self.config.family == Family::Gemma3 {
            (weight + 1.0)?
        } else {
            weight
        })
    }

    fn maybe_norm(&self, slot: Option<usize>) -> Result<Option<Tensor>> {
        slot.map(|slot| self.norm(slot)).transpose()
    }

    fn linear(&self, plan: &LinearPlan) -> Result<Linear> {
        let weight = self.matrix(plan.weight)?;
        let bias = plan.bias.map(|slot| self.bias(slot, &weight)).transpose()?;
        Ok(Linear { weight, bias })
    }

    pub(super) fn layer(&self, plan: &LayerPlan, number: usize) -> Result<Layer> {
        let config = &self.config.layers[number];
        Ok(Layer {
            attention_norm: self.norm(plan.attention_norm)?,
            qkv: self.linear(&plan.qkv)?,
            q_norm: self.maybe_norm(plan.q_norm)?,
            k_norm: self.maybe_norm(plan.k_norm)?,
            output: self.linear(&plan.output)?,
            attention_post_norm: self.maybe_norm(plan.attention_post_norm)?,
            mlp_norm: self.norm(plan.mlp_norm)?,
            mlp: self.mlp(&plan.mlp)?,
            mlp_post_norm: self.maybe_norm(plan.mlp_post_norm)?,
            window: config.window,
            frequencies: config.rope.frequencies.clone(),
        })
    }

    fn mlp(&self, plan: &MlpPlan) -> Result<Mlp> {
        Ok(match (plan, &self.config.experts) {
            (
                MlpPlan::Sparse {
                    router,
                    gate_up,
                    down,
                },
                Some(experts),
            ) => Mlp::Sparse {
                experts: experts.clone(),
                router: self.matrix(*router)?,
                gate_up: self.matrix(*gate_up)?,
                down: self.matrix(*down)?,
            },
            (MlpPlan::Dense { gate_up, down }, _) => Mlp::Dense {
                gate_up: self.linear(gate_up)?,
                down: self.linear(down)?,
            },
            (MlpPlan::Sparse { .. }, None) => {
                return Err(Error::Unsupported(
                    "it has experts that config.json does not name".to_owned(),
                ));
            }
        })
    }
}
