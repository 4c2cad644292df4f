//! The step of a decoder as operations on tensors: on a GPU, and in tests on the CPU, where it is what the step of slices is compared with.

use candle_core::{DType, IndexOp, Tensor};

use super::experts::choose;
use super::{Decoder, Layer, Linear, Logits, Mlp, angles};
use crate::runner::attention::Attention;
use crate::runner::config::Activation;
#[cfg(feature = "cuda")]
use crate::runner::cuda;
use crate::runner::error::Result;

#[derive(Debug)]
pub(super) struct LayerCache {
    /// `[kv_heads, room, head_dim]`.
    k: Tensor,
    v: Tensor,
    /// `[room, head_dim / 2]`, of the layer's rotation.
    cos: Tensor,
    sin: Tensor,
}

impl Decoder {
    /// Room for `room` positions.
    pub(super) fn tensors(&self, room: usize) -> Result<Vec<LayerCache>> {
        let dtype = if self.device.is_cpu() {
            DType::F32
        } else {
            self.dtype()
        };
        let shape = (self.config.kv_heads, room, self.config.head_dim);
        let mut tables: Vec<(&[f32], Tensor, Tensor)> = Vec::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let known = tables
                .iter()
                .find(|(frequencies, ..)| *frequencies == layer.frequencies.as_slice());
            let (cos, sin) = match known {
                Some((_, cos, sin)) => (cos.clone(), sin.clone()),
                None => {
                    let (cos, sin) = angles(&layer.frequencies, room);
                    let shape = (room, layer.frequencies.len());
                    let (cos, sin) = (
                        Tensor::from_vec(cos, shape, &self.device)?,
                        Tensor::from_vec(sin, shape, &self.device)?,
                    );
                    tables.push((&layer.frequencies, cos.clone(), sin.clone()));
                    (cos, sin)
                }
            };
            let (k, v) = (
                Tensor::zeros(shape, dtype, &self.device)?,
                Tensor::zeros(shape, dtype, &self.device)?,
            );
            layers.push(LayerCache { k, v, cos, sin });
        }
        Ok(layers)
    }

    /// The logits after `tokens`, which have room and are in the vocabulary.
    pub(super) fn step_of_tensors(
        &self,
        tokens: &[u32],
        position: usize,
        layers: &[LayerCache],
        wanted: Logits,
    ) -> Result<Tensor> {
        let ids = Tensor::new(tokens, &self.device)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        if self.device.is_cpu() {
            x = x.to_dtype(DType::F32)?;
        }
        if let Some(scale) = self.embedding_scale {
            x = (x * scale)?;
        }
        let epsilon = self.config.epsilon as f32;
        let mut normed = ops::norm(&x, &self.layers[0].attention_norm, epsilon)?;
        for (number, (layer, cache)) in self.layers.iter().zip(layers).enumerate() {
            let mut y = self.attend(layer, cache, &normed, position)?;
            if let Some(norm) = &layer.attention_post_norm {
                y = ops::norm(&y, norm, epsilon)?;
            }
            (x, normed) = ops::add_norm(&x, &y, &layer.mlp_norm, epsilon)?;
            let mut y = layer.mlp.forward(&normed, self.config.activation)?;
            if let Some(norm) = &layer.mlp_post_norm {
                y = ops::norm(&y, norm, epsilon)?;
            }
            let next = self
                .layers
                .get(number + 1)
                .map_or(&self.norm, |next| &next.attention_norm);
            (x, normed) = ops::add_norm(&x, &y, next, epsilon)?;
        }
        if wanted == Logits::Last {
            normed = normed.i(tokens.len() - 1..)?.contiguous()?;
        }
        Ok(ops::product(&normed, &self.head)?.to_dtype(DType::F32)?)
    }

    fn attend(
        &self,
        layer: &Layer,
        cache: &LayerCache,
        x: &Tensor,
        position: usize,
    ) -> Result<Tensor> {
        let qkv = layer.qkv.forward(x)?;
        let attention = Attention {
            position,
            window: layer.window,
            scale: self.config.scale as f32,
        };
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            let heads = cuda::Heads {
                query: self.config.heads,
                kv: self.config.kv_heads,
                width: self.config.head_dim,
            };
            let norms = layer.q_norm.as_ref().zip(layer.k_norm.as_ref());
            let q = cuda::rotate(
                &qkv,
                norms,
                &cache.cos,
                &cache.sin,
                &cache.k,
                &cache.v,
                heads,
                position,
                self.config.epsilon as f32,
            )?;
            return Ok(layer
                .output
                .forward(&cuda::attend(&attention, &q, &cache.k, &cache.v)?)?);
        }
        let (s, d) = (x.dim(0)?, self.config.head_dim);
        let (heads, kv) = (self.config.heads, self.config.kv_heads);
        let part = |from: usize, count: usize| -> candle_core::Result<Tensor> {
            qkv.narrow(1, from * d, count * d)?.reshape((s, count, d))
        };
        let rotated = |x: Tensor, norm: &Option<Tensor>| -> candle_core::Result<Tensor> {
            let x = match norm {
                Some(norm) => plain::norm(&x, norm, self.config.epsilon as f32)?,
                None => x,
            };
            plain::rotate(
                &x,
                &cache.cos.narrow(0, position, s)?,
                &cache.sin.narrow(0, position, s)?,
            )
        };
        let (q, k, v) = (
            rotated(part(0, heads)?, &layer.q_norm)?,
            rotated(part(heads, kv)?, &layer.k_norm)?,
            part(heads + kv, kv)?,
        );
        for (kept, new) in [(&cache.k, k), (&cache.v, v)] {
            kept.slice_set(&new.transpose(0, 1)?.contiguous()?, 1, position)?;
        }
        let attended = plain::attend(&attention, &q, &cache.k, &cache.v)?;
        Ok(layer.output.forward(&attended)?)
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = ops::product(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

impl Mlp {
    fn forward(&self, x: &Tensor, activation: Activation) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense { gate_up, down } => {
                down.forward(&ops::gate(activation, &gate_up.forward(x)?)?)
            }
            Self::Sparse {
                experts,
                router,
                gate_up,
                down,
            } => {
                let logits = ops::product(x, router)?
                    .to_dtype(DType::F32)?
                    .flatten_all()?
                    .to_vec1::<f32>()?;
                let mut y = x.zeros_like()?;
                for (expert, (rows, weights)) in choose(experts, &logits).into_iter().enumerate() {
                    if rows.is_empty() {
                        continue;
                    }
                    let count = rows.len();
                    let rows = Tensor::from_vec(rows, count, x.device())?;
                    let weights =
                        Tensor::from_vec(weights, (count, 1), x.device())?.to_dtype(x.dtype())?;
                    let inner = ops::gate(
                        activation,
                        &ops::product(&x.index_select(&rows, 0)?, &gate_up.i(expert)?)?,
                    )?;
                    let outer = ops::product(&inner, &down.i(expert)?)?.broadcast_mul(&weights)?;
                    y = y.index_add(&rows, &outer, 0)?;
                }
                Ok(y)
            }
        }
    }
}

/// What a GPU has a kernel of its own for.
mod ops {
    use candle_core::{Result, Tensor};

    use super::plain;
    use crate::runner::config::Activation;
    #[cfg(feature = "cuda")]
    use crate::runner::{cuda, gate::Gate};

    pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() && x.dim(0)? == 1 {
            return cuda::gemv(x, weight);
        }
        x.matmul(&weight.to_dtype(x.dtype())?.t()?)
    }

    pub(super) fn gate(activation: Activation, gate_up: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if gate_up.device().is_cuda() {
            return Gate(activation).apply(gate_up);
        }
        plain::gate(activation, gate_up)
    }

    pub(super) fn norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::norm(x, weight, epsilon);
        }
        plain::norm(x, weight, epsilon)
    }

    /// x + y, and its norm.
    pub(super) fn add_norm(
        x: &Tensor,
        y: &Tensor,
        weight: &Tensor,
        epsilon: f32,
    ) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::add_norm(x, y, weight, epsilon);
        }
        let sum = (x + y)?;
        let normed = norm(&sum, weight, epsilon)?;
        Ok((sum, normed))
    }
}

/// The same by the operations that any device has: slow, and short enough to be seen to be right.
mod plain {
    use candle_core::{D, Result, Tensor};

    use crate::runner::attention::Attention;
    use crate::runner::config::Activation;

    pub(super) fn norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = (mean + f64::from(epsilon))?.sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(weight)
    }

    pub(super) fn gate(activation: Activation, gate_up: &Tensor) -> Result<Tensor> {
        let both = gate_up.chunk(2, 1)?;
        let gate = match activation {
            Activation::Silu => both[0].silu()?,
            Activation::GeluTanh => both[0].gelu()?,
        };
        gate * &both[1]
    }

    /// `[s, heads, width]` by `[s, width / 2]`.
    pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
        let half = x.dim(2)? / 2;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let right = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        Tensor::cat(&[left, right], 2)
    }

    /// Queries `[s, heads, width]` over caches `[kv_heads, room, width]`: `[s, heads * width]`.
    pub(super) fn attend(
        attention: &Attention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let ((s, heads, width), kv) = (q.dims3()?, k.dim(0)?);
        let (group, length) = (heads / kv, attention.position + s);
        let (k, v) = (k.narrow(1, 0, length)?, v.narrow(1, 0, length)?);
        let mask: Vec<f32> = (0..s)
            .flat_map(|step| {
                let sees = attention.sees(attention.position + step);
                (0..length).map(move |at| match sees.contains(&at) {
                    true => 0.0,
                    false => f32::NEG_INFINITY,
                })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (s, length), q.device())?;
        let q = q
            .reshape((s, kv, group, width))?
            .permute((1, 2, 0, 3))?
            .contiguous()?
            .reshape((kv, group * s, width))?;
        let scores = (q.matmul(&k.transpose(1, 2)?)? * f64::from(attention.scale))?;
        let scores = scores
            .reshape((kv, group, s, length))?
            .broadcast_add(&mask)?;
        let weights = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
            .exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        weights
            .reshape((kv, group * s, length))?
            .matmul(&v)?
            .reshape((kv, group, s, width))?
            .permute((2, 0, 1, 3))?
            .reshape((s, heads * width))
    }
}
