//! The step of a decoder on the CPU: rows of f32 between products, in memory taken once for all layers, by threads that stay for all of it.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::experts::choose;
use super::{Decoder, Layer, Linear, Logits, Mlp, angles};
use crate::runner::attention::Attention;
use crate::runner::cpu::attention::{Kept, attend};
use crate::runner::cpu::rows::{self, Heads, Rotation};
use crate::runner::cpu::team::{self, Team};
use crate::runner::cpu::{Matrix, Products};
use crate::runner::error::Result;

/// What a layer has seen, and its rotation.
#[derive(Debug)]
pub(super) struct LayerCache {
    kept: Kept,
    /// Cosine and sine, `[room, head_dim / 2]` each; layers with the same frequencies share them.
    angles: Arc<Angles>,
}

type Angles = (Vec<f32>, Vec<f32>);

impl Decoder {
    /// Room for `room` positions.
    pub(super) fn slices(&self, room: usize) -> Vec<LayerCache> {
        let mut tables: Vec<(&[f32], Arc<Angles>)> = Vec::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let known = tables
                .iter()
                .find(|(frequencies, _)| *frequencies == layer.frequencies.as_slice());
            let angles = match known {
                Some((_, angles)) => angles.clone(),
                None => {
                    let angles = Arc::new(angles(&layer.frequencies, room));
                    tables.push((&layer.frequencies, angles.clone()));
                    angles
                }
            };
            layers.push(LayerCache {
                kept: Kept::new(self.heads(), room),
                angles,
            });
        }
        layers
    }

    fn heads(&self) -> Heads {
        Heads {
            query: self.config.heads,
            kv: self.config.kv_heads,
            width: self.config.head_dim,
        }
    }

    /// The logits after `tokens`, which have room and are in the vocabulary.
    pub(super) fn step_of_slices(
        &self,
        tokens: &[u32],
        position: usize,
        layers: &mut [LayerCache],
        wanted: Logits,
    ) -> Result<Tensor> {
        let (rows, logits) = team::with(|team| {
            let mut step = Step {
                decoder: self,
                team,
                products: Products::new(team),
                position,
                room: Room::default(),
            };
            step.compute(tokens, layers, wanted)
        })?;
        let shape = (rows, self.config.vocabulary);
        Ok(Tensor::from_vec(logits, shape, &Device::Cpu)?)
    }
}

/// Rows between the products of a layer, which the next layer overwrites.
#[derive(Debug, Default)]
struct Room {
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
}

struct Step<'a> {
    decoder: &'a Decoder,
    team: &'a Team<'a>,
    products: Products<'a>,
    /// The first token's.
    position: usize,
    room: Room,
}

impl Step<'_> {
    /// How many rows of logits there are, and these.
    fn compute(
        &mut self,
        tokens: &[u32],
        layers: &mut [LayerCache],
        wanted: Logits,
    ) -> Result<(usize, Vec<f32>)> {
        let (decoder, hidden) = (self.decoder, self.decoder.config.hidden);
        let mut x = self.embed(tokens)?;
        let (mut normed, mut y) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        for (number, (layer, cache)) in decoder.layers.iter().zip(layers).enumerate() {
            self.norm(&x, &layer.attention_norm, &mut normed)?;
            self.attend(layer, cache, &normed, &mut y)?;
            if number + 1 == decoder.layers.len() && wanted == Logits::Last {
                // Nobody sees any more what the others say.
                for rows in [&mut x, &mut y] {
                    rows.drain(..rows.len() - hidden);
                }
                normed.truncate(hidden);
            }
            self.post_norm(layer.attention_post_norm.as_ref(), &mut y)?;
            rows::add(self.team, &mut x, &y, hidden);
            self.norm(&x, &layer.mlp_norm, &mut normed)?;
            self.mlp(&layer.mlp, &normed, &mut y)?;
            self.post_norm(layer.mlp_post_norm.as_ref(), &mut y)?;
            rows::add(self.team, &mut x, &y, hidden);
        }
        self.norm(&x, &decoder.norm, &mut normed)?;
        let count = x.len() / hidden;
        let mut logits = vec![0.0; count * decoder.config.vocabulary];
        self.product(&normed, &decoder.head, &mut logits)?;
        Ok((count, logits))
    }

    fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let (storage, layout) = self.decoder.embedding.storage_and_layout();
        let (embedding, hidden) = (Matrix::of(&storage, layout)?, self.decoder.config.hidden);
        let mut x = vec![0.0; tokens.len() * hidden];
        for (token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            embedding.read(*token as usize * hidden, x);
        }
        if let Some(scale) = self.decoder.embedding_scale {
            x.iter_mut().for_each(|x| *x *= scale as f32);
        }
        Ok(x)
    }

    fn attend(
        &mut self,
        layer: &Layer,
        cache: &mut LayerCache,
        x: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        let (config, heads) = (&self.decoder.config, self.decoder.heads());
        let count = x.len() / config.hidden;
        let mut qkv = std::mem::take(&mut self.room.qkv);
        qkv.resize(count * heads.all(), 0.0);
        self.linear(x, &layer.qkv, &mut qkv)?;
        let first = self.position * (heads.width / 2);
        let norms = [&layer.q_norm, &layer.k_norm].map(|norm| norm.as_ref().map(floats));
        let [q_norm, k_norm] = norms;
        let (q_norm, k_norm) = (q_norm.transpose()?, k_norm.transpose()?);
        let rotation = Rotation {
            heads,
            q_norm: q_norm.as_deref(),
            k_norm: k_norm.as_deref(),
            epsilon: config.epsilon as f32,
            cos: &cache.angles.0[first..],
            sin: &cache.angles.1[first..],
        };
        rotation.apply(self.team, &mut qkv);
        cache.kept.keep(self.team, heads, &qkv, self.position);
        let attention = Attention {
            position: self.position,
            window: layer.window,
            scale: config.scale as f32,
        };
        let mut attended = std::mem::take(&mut self.room.attended);
        attended.resize(count * heads.query * heads.width, 0.0);
        attend(
            self.team,
            &attention,
            heads,
            &qkv,
            &cache.kept,
            &mut attended,
        );
        self.linear(&attended, &layer.output, out)?;
        (self.room.qkv, self.room.attended) = (qkv, attended);
        Ok(())
    }

    fn mlp(&mut self, mlp: &Mlp, x: &[f32], out: &mut [f32]) -> Result<()> {
        let hidden = self.decoder.config.hidden;
        match mlp {
            Mlp::Dense { gate_up, down } => {
                let double = gate_up.weight.dim(0)?;
                let mut both = std::mem::take(&mut self.room.gate_up);
                both.resize(x.len() / hidden * double, 0.0);
                self.linear(x, gate_up, &mut both)?;
                let gated = self.gate(&both, double / 2);
                self.linear(&gated, down, out)?;
                (self.room.gate_up, self.room.gated) = (both, gated);
            }
            Mlp::Sparse {
                experts,
                router,
                gate_up,
                down,
            } => {
                let mut logits = vec![0.0; x.len() / hidden * experts.count];
                self.product(x, router, &mut logits)?;
                let ((_, double, _), n) = (gate_up.dims3()?, experts.intermediate);
                let ((gates, of_gates), (downs, of_downs)) =
                    (gate_up.storage_and_layout(), down.storage_and_layout());
                let (gates, downs) = (Matrix::of(&gates, of_gates)?, Matrix::of(&downs, of_downs)?);
                out.fill(0.0);
                for (expert, (rows, weights)) in choose(experts, &logits).into_iter().enumerate() {
                    if rows.is_empty() {
                        continue;
                    }
                    let row = |row: &u32| *row as usize * hidden..(*row as usize + 1) * hidden;
                    let some: Vec<f32> = rows.iter().flat_map(|at| &x[row(at)]).copied().collect();
                    let (gate, down) = (
                        gates.part(expert * double * hidden..(expert + 1) * double * hidden),
                        downs.part(expert * hidden * n..(expert + 1) * hidden * n),
                    );
                    let mut both = vec![0.0; rows.len() * double];
                    self.products.product(&some, gate, hidden, &mut both);
                    let gated = self.gate(&both, n);
                    let mut said = some;
                    self.products.product(&gated, down, n, &mut said);
                    self.room.gated = gated;
                    for ((at, weight), said) in
                        rows.iter().zip(weights).zip(said.chunks_exact(hidden))
                    {
                        let out = out[row(at)].iter_mut();
                        out.zip(said).for_each(|(out, said)| *out += weight * said);
                    }
                }
            }
        }
        Ok(())
    }

    /// The gated half of `both`, in the room for it.
    fn gate(&mut self, both: &[f32], n: usize) -> Vec<f32> {
        let mut gated = std::mem::take(&mut self.room.gated);
        gated.resize(both.len() / 2, 0.0);
        rows::gate(
            self.team,
            self.decoder.config.activation,
            both,
            n,
            &mut gated,
        );
        gated
    }

    fn norm(&self, x: &[f32], weight: &Tensor, out: &mut [f32]) -> Result<()> {
        let epsilon = self.decoder.config.epsilon as f32;
        rows::norm(self.team, x, &floats(weight)?, epsilon, out);
        Ok(())
    }

    fn post_norm(&self, weight: Option<&Tensor>, x: &mut [f32]) -> Result<()> {
        if let Some(weight) = weight {
            let epsilon = self.decoder.config.epsilon as f32;
            rows::norm_in_place(self.team, x, &floats(weight)?, epsilon);
        }
        Ok(())
    }

    fn linear(&mut self, x: &[f32], linear: &Linear, out: &mut [f32]) -> Result<()> {
        self.product(x, &linear.weight, out)?;
        if let Some(bias) = &linear.bias {
            rows::add_bias(self.team, out, &floats(bias)?);
        }
        Ok(())
    }

    fn product(&mut self, x: &[f32], weight: &Tensor, out: &mut [f32]) -> Result<()> {
        let (storage, layout) = weight.storage_and_layout();
        let k = weight.dim(1)?;
        self.products
            .product(x, Matrix::of(&storage, layout)?, k, out);
        Ok(())
    }
}

/// The numbers of a norm or a bias, which are f32 on the CPU, and few.
fn floats(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_vec1()
}
