//! The decoder: tokens in, logits out. One for all families, its parts read off the tensors.
//!
//! On the CPU activations are f32 whatever the weights are, and a step goes through slices ([`slices`]); on a GPU they have the weights'
//! dtype, except where sums need more, and a step goes through tensors ([`tensors`]). That both compute the same is tested on the CPU.

mod experts;
mod parts;
mod slices;
#[cfg(any(test, feature = "cuda"))]
mod tensors;

use candle_core::{DType, Device, Tensor};

use super::config::{Config, Experts, Family};
use super::error::{Error, Result};
use super::load::{self, LoadStats};
use super::shards::Shards;
use super::weights::{Loaded, plan};
use parts::Parts;

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
    layers: Layers,
    room: usize,
}

#[derive(Debug)]
enum Layers {
    Slices(Vec<slices::LayerCache>),
    #[cfg(any(test, feature = "cuda"))]
    Tensors(Vec<tensors::LayerCache>),
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
        #[cfg(feature = "cuda")]
        if !self.device.is_cpu() {
            return self.cache_of_tensors(room);
        }
        Ok(Cache {
            layers: Layers::Slices(self.slices(room)),
            room,
        })
    }

    #[cfg(any(test, feature = "cuda"))]
    fn cache_of_tensors(&self, room: usize) -> Result<Cache> {
        Ok(Cache {
            layers: Layers::Tensors(self.tensors(room)?),
            room,
        })
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
        match &mut cache.layers {
            Layers::Slices(layers) => self.step_of_slices(tokens, position, layers, wanted),
            #[cfg(any(test, feature = "cuda"))]
            Layers::Tensors(layers) => self.step_of_tensors(tokens, position, layers, wanted),
        }
    }
}

/// Cosine and sine of each position's angles, `[room, frequencies]`.
fn angles(frequencies: &[f32], room: usize) -> (Vec<f32>, Vec<f32>) {
    let angles: Vec<f32> = (0..room)
        .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
        .collect();
    let table = |of: fn(f32) -> f32| angles.iter().map(|angle| of(*angle)).collect();
    (table(f32::cos), table(f32::sin))
}

/// The dtype of the matrices if nobody asks for one.
fn matrix_dtype(embedding: &Tensor, device: &Device) -> Option<DType> {
    match (embedding.dtype(), device.is_cpu()) {
        (DType::F32 | DType::BF16 | DType::F16, _) => None,
        (_, true) => Some(DType::F32),
        (_, false) => Some(DType::BF16),
    }
}

#[cfg(test)]
mod tests;
