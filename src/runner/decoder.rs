//! The decoder: tokens in, logits out. One for all families, its parts read off the tensors.
//!
//! On the CPU activations are f32 whatever the weights are; on a GPU they have the weights' dtype, except where sums need more.

use candle_core::{DType, Device, IndexOp, Tensor};

use super::attention::Attention;
use super::config::{Activation, Config, Experts, Family};
use super::error::{Error, Result};
use super::gate::Gate;
use super::load::{self, LoadStats};
use super::product::Product;
use super::shards::Shards;
use super::weights::{LayerPlan, LinearPlan, Loaded, MlpPlan, plan};

/// A loaded model.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    device: Device,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    /// What embeddings are multiplied with.
    embedding_scale: Option<f64>,
}

#[derive(Debug)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

#[derive(Debug)]
enum Mlp {
    Dense {
        gate_up: Linear,
        down: Linear,
    },
    Sparse {
        experts: Experts,
        router: Tensor,
        gate_up: Tensor,
        down: Tensor,
    },
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    qkv: Linear,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    output: Linear,
    attention_post_norm: Option<Tensor>,
    mlp_norm: Tensor,
    mlp: Mlp,
    mlp_post_norm: Option<Tensor>,
    window: Option<usize>,
    frequencies: Vec<f32>,
}

/// Keys and values of the positions that a decoder has seen, in memory taken once for all of them.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    room: usize,
}

#[derive(Debug)]
struct LayerCache {
    /// `[kv_heads, room, head_dim]`.
    k: Tensor,
    v: Tensor,
    /// `[room, head_dim / 2]`, of the layer's rotation.
    cos: Tensor,
    sin: Tensor,
}

impl Cache {
    /// How many positions fit.
    pub fn room(&self) -> usize {
        self.room
    }
}

/// Which positions' logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last one's: what comes next.
    Last,
    /// All: one row a token.
    All,
}

impl Decoder {
    /// Loads the model that `shards` hold. `dtype`: of the matrices; `None`: as in the files.
    ///
    /// # Errors
    /// When tensors are missing, left over or of another shape, when reading fails, or there is not enough memory.
    pub fn load(
        config: Config,
        shards: &Shards,
        device: &Device,
        dtype: Option<DType>,
        workers: usize,
    ) -> Result<(Self, LoadStats)> {
        let plan = plan(&config, shards)?;
        let (tensors, stats) = load::load(shards, &plan.wanted, device, workers)?;
        let dtype = dtype.or_else(|| matrix_dtype(&tensors[plan.embedding], device));
        let parts = Parts {
            loaded: Loaded(tensors),
            config: &config,
            device,
            dtype,
        };
        let embedding = parts.matrix(plan.embedding)?;
        let layers = plan
            .layers
            .iter()
            .zip(0..)
            .map(|(layer, number)| parts.layer(layer, number))
            .collect::<Result<Vec<Layer>>>()?;
        let norm = parts.norm(plan.norm)?;
        let head = plan
            .head
            .map_or_else(|| Ok(embedding.clone()), |slot| parts.matrix(slot))?;
        let embedding_scale = (config.family == Family::Gemma3).then(|| {
            // transformers has this number in the embedding's own dtype.
            let scale = (config.hidden as f64).sqrt();
            if embedding.dtype() == DType::BF16 {
                half::bf16::from_f64(scale).to_f64()
            } else {
                scale
            }
        });
        drop(parts);
        Ok((
            Self {
                config,
                device: device.clone(),
                embedding,
                layers,
                norm,
                head,
                embedding_scale,
            },
            stats,
        ))
    }

    /// Its dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The dtype of its matrices.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// Room for `room` positions.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn cache(&self, room: usize) -> Result<Cache> {
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
                    let (cos, sin) = self.angles(&layer.frequencies, room)?;
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
        Ok(Cache { layers, room })
    }

    fn angles(&self, frequencies: &[f32], room: usize) -> Result<(Tensor, Tensor)> {
        let angles: Vec<f32> = (0..room)
            .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let table = |of: fn(f32) -> f32| {
            Tensor::from_vec(
                angles.iter().map(|angle| of(*angle)).collect::<Vec<f32>>(),
                (room, frequencies.len()),
                &self.device,
            )
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }

    /// The logits, f32 rows, after `tokens` that stand at `position` and later; `cache` holds all before.
    ///
    /// # Errors
    /// When a token is not in the vocabulary, or the cache has no room.
    pub fn forward(
        &self,
        tokens: &[u32],
        position: usize,
        cache: &mut Cache,
        wanted: Logits,
    ) -> Result<Tensor> {
        if self.device.is_cpu() {
            // On a thread of the pool: to hand each of a hundred small products to it from outside takes as long as some of them.
            return rayon::scope(|_| self.compute(tokens, position, cache, wanted));
        }
        self.compute(tokens, position, cache, wanted)
    }

    fn compute(
        &self,
        tokens: &[u32],
        position: usize,
        cache: &mut Cache,
        wanted: Logits,
    ) -> Result<Tensor> {
        if tokens.is_empty() || position + tokens.len() > cache.room {
            return Err(Error::Request(format!(
                "{} tokens at {position} do not fit into {}",
                tokens.len(),
                cache.room
            )));
        }
        if let Some(token) = tokens
            .iter()
            .find(|token| **token as usize >= self.config.vocabulary)
        {
            return Err(Error::Request(format!(
                "token {token} is not one of the model's {}",
                self.config.vocabulary
            )));
        }
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
        for (number, (layer, cache)) in self.layers.iter().zip(&cache.layers).enumerate() {
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
            let heads = super::cuda::Heads {
                query: self.config.heads,
                kv: self.config.kv_heads,
                width: self.config.head_dim,
            };
            let norms = layer.q_norm.as_ref().zip(layer.k_norm.as_ref());
            let q = super::cuda::rotate(
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
                .forward(&super::cuda::attend(&attention, &q, &cache.k, &cache.v)?)?);
        }
        let (s, d) = (x.dim(0)?, self.config.head_dim);
        let (heads, kv) = (self.config.heads, self.config.kv_heads);
        let part = |from: usize, count: usize| -> candle_core::Result<Tensor> {
            qkv.narrow(1, from * d, count * d)?
                .contiguous()?
                .reshape((1, s, count, d))
        };
        let rotated = |x: Tensor, norm: &Option<Tensor>| -> candle_core::Result<Tensor> {
            let x = match norm {
                Some(norm) => candle_nn::ops::rms_norm(&x, norm, self.config.epsilon as f32)?,
                None => x,
            };
            let (cos, sin) = (
                cache.cos.narrow(0, position, s)?,
                cache.sin.narrow(0, position, s)?,
            );
            candle_nn::rotary_emb::rope_thd(&x, &cos, &sin)
        };
        let (q, k, v) = (
            rotated(part(0, heads)?, &layer.q_norm)?,
            rotated(part(heads, kv)?, &layer.k_norm)?,
            part(heads + kv, kv)?,
        );
        cache
            .k
            .slice_set(&k.squeeze(0)?.transpose(0, 1)?.contiguous()?, 1, position)?;
        cache
            .v
            .slice_set(&v.squeeze(0)?.transpose(0, 1)?.contiguous()?, 1, position)?;
        Ok(layer
            .output
            .forward(&attention.apply(&q.squeeze(0)?, &cache.k, &cache.v)?)?)
    }
}

/// The dtype of the matrices if nobody asks for one.
fn matrix_dtype(embedding: &Tensor, device: &Device) -> Option<DType> {
    match (embedding.dtype(), device.is_cpu()) {
        (DType::F32 | DType::BF16 | DType::F16, _) => None,
        (_, true) => Some(DType::F32),
        (_, false) => Some(DType::BF16),
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
                down.forward(&Gate(activation).apply(&gate_up.forward(x)?)?)
            }
            Self::Sparse {
                experts,
                router,
                gate_up,
                down,
            } => {
                let logits = ops::product(x, router)?
                    .to_dtype(DType::F32)?
                    .to_vec2::<f32>()?;
                let mut y = x.zeros_like()?;
                for (expert, (rows, weights)) in choose(experts, &logits).into_iter().enumerate() {
                    if rows.is_empty() {
                        continue;
                    }
                    let count = rows.len();
                    let rows = Tensor::from_vec(rows, count, x.device())?;
                    let weights =
                        Tensor::from_vec(weights, (count, 1), x.device())?.to_dtype(x.dtype())?;
                    let inner = Gate(activation).apply(&ops::product(
                        &x.index_select(&rows, 0)?,
                        &gate_up.i(expert)?,
                    )?)?;
                    let outer = ops::product(&inner, &down.i(expert)?)?.broadcast_mul(&weights)?;
                    y = y.index_add(&rows, &outer, 0)?;
                }
                Ok(y)
            }
        }
    }
}

/// For each expert: the rows that it sees, and with which weights.
fn choose(experts: &Experts, logits: &[Vec<f32>]) -> Vec<(Vec<u32>, Vec<f32>)> {
    let mut chosen = vec![(Vec::new(), Vec::new()); experts.count];
    for (row, logits) in (0..).zip(logits) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
        let mut order: Vec<usize> = (0..experts.count).collect();
        order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
        order.truncate(experts.chosen);
        let among: f32 = if experts.normalise {
            order.iter().map(|at| weights[*at]).sum()
        } else {
            weights.iter().sum()
        };
        for at in order {
            chosen[at].0.push(row);
            chosen[at].1.push(weights[at] / among);
        }
    }
    chosen
}

/// What is done differently on the CPU and on a GPU.
mod ops {
    use candle_core::{Result, Tensor};

    use super::Product;

    pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() {
            return Product::apply(x, weight);
        }
        #[cfg(feature = "cuda")]
        if x.dim(0)? == 1 {
            return super::super::cuda::gemv(x, weight);
        }
        x.matmul(&weight.t()?)
    }

    pub(super) fn norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::super::cuda::norm(x, weight, epsilon);
        }
        candle_nn::ops::rms_norm(x, weight, epsilon)
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
            return super::super::cuda::add_norm(x, y, weight, epsilon);
        }
        let sum = (x + y)?;
        let normed = norm(&sum, weight, epsilon)?;
        Ok((sum, normed))
    }
}

/// Loaded tensors on their way into the decoder.
struct Parts<'a> {
    loaded: Loaded,
    config: &'a Config,
    device: &'a Device,
    dtype: Option<DType>,
}

impl Parts<'_> {
    fn matrix(&self, slot: usize) -> Result<Tensor> {
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
    fn norm(&self, slot: usize) -> Result<Tensor> {
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

    fn layer(&self, plan: &LayerPlan, number: usize) -> Result<Layer> {
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
