//! Which tensors of the files become which parts of the decoder. Nothing that a file has is left out without a reason.

use std::collections::HashSet;

use candle_core::Tensor;

use super::config::{Config, Experts, Family};
use super::error::{Error, Result};
use super::load::Wanted;
use super::shards::Shards;

/// A tensor that was asked for: its number in the list.
type Slot = usize;

/// Where the parts of a decoder will be among the loaded tensors.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) wanted: Vec<Wanted>,
    pub(super) embedding: Slot,
    pub(super) norm: Slot,
    /// `None`: the embedding.
    pub(super) head: Option<Slot>,
    pub(super) layers: Vec<LayerPlan>,
}

/// A matrix and what is added to its product.
#[derive(Debug)]
pub(super) struct LinearPlan {
    pub(super) weight: Slot,
    pub(super) bias: Option<Slot>,
}

#[derive(Debug)]
pub(super) struct LayerPlan {
    pub(super) attention_norm: Slot,
    pub(super) qkv: LinearPlan,
    pub(super) q_norm: Option<Slot>,
    pub(super) k_norm: Option<Slot>,
    pub(super) output: LinearPlan,
    pub(super) attention_post_norm: Option<Slot>,
    pub(super) mlp_norm: Slot,
    pub(super) mlp: MlpPlan,
    pub(super) mlp_post_norm: Option<Slot>,
}

#[derive(Debug)]
pub(super) enum MlpPlan {
    Dense {
        gate_up: LinearPlan,
        down: LinearPlan,
    },
    Sparse {
        router: Slot,
        gate_up: Slot,
        down: Slot,
    },
}

/// What belongs to a decoder of `config`, checked against what `shards` have.
///
/// # Errors
/// When the files have a tensor that nothing here reads: a model with such would run wrongly.
pub(super) fn plan(config: &Config, shards: &Shards) -> Result<Plan> {
    let prefix = ["model.", "", "language_model.model."]
        .into_iter()
        .find(|prefix| {
            shards
                .get(&format!("{prefix}embed_tokens.weight"))
                .is_some()
        })
        .ok_or_else(|| {
            Error::Unsupported("it has no tensor `model.embed_tokens.weight`".to_owned())
        })?;
    let mut planner = Planner {
        shards,
        wanted: Vec::new(),
    };
    let (h, v) = (config.hidden, config.vocabulary);
    let embedding = planner.one(&format!("{prefix}embed_tokens.weight"), &[v, h]);
    let norm = planner.one(&format!("{prefix}norm.weight"), &[h]);
    let head = if config.tied {
        None
    } else {
        Some(planner.one("lm_head.weight", &[v, h]))
    };
    let layers = (0..config.layers.len())
        .map(|number| {
            planner.layer(
                config,
                &format!("{prefix}layers.{number}."),
                config.layers[number].sparse,
            )
        })
        .collect();
    let plan = Plan {
        wanted: planner.wanted,
        embedding,
        norm,
        head,
        layers,
    };
    let used: HashSet<&str> = plan
        .wanted
        .iter()
        .flat_map(|want| &want.parts)
        .map(String::as_str)
        .collect();
    let mut unused: Vec<&str> = shards
        .names()
        .filter(|name| !used.contains(name) && !name.ends_with("rotary_emb.inv_freq"))
        .filter(|name| !config.tied || *name != "lm_head.weight")
        .collect();
    unused.sort_unstable();
    match unused.first() {
        None => Ok(plan),
        Some(name) => Err(Error::Unsupported(format!(
            "it has a tensor `{name}`{}, which a {} of the known shape has not",
            if unused.len() > 1 {
                format!(" and {} more", unused.len() - 1)
            } else {
                String::new()
            },
            config.model_type
        ))),
    }
}

struct Planner<'a> {
    shards: &'a Shards,
    wanted: Vec<Wanted>,
}

impl Planner<'_> {
    fn joined(&mut self, parts: Vec<String>, shape: &[usize]) -> Slot {
        self.wanted.push(Wanted {
            parts,
            shape: shape.to_vec(),
        });
        self.wanted.len() - 1
    }

    fn one(&mut self, name: &str, shape: &[usize]) -> Slot {
        self.joined(vec![name.to_owned()], shape)
    }

    fn maybe(&mut self, name: &str, shape: &[usize]) -> Option<Slot> {
        self.shards
            .get(name)
            .is_some()
            .then(|| self.one(name, shape))
    }

    /// Matrices that are multiplied with the same rows, as one; with biases if the first has one.
    fn linear(&mut self, base: &str, names: &[&str], rows: usize, columns: usize) -> LinearPlan {
        let all = |suffix: &str| {
            names
                .iter()
                .map(|name| format!("{base}{name}.{suffix}"))
                .collect::<Vec<_>>()
        };
        let weight = self.joined(all("weight"), &[rows, columns]);
        let biased = self
            .shards
            .get(&format!("{base}{}.bias", names[0]))
            .is_some();
        LinearPlan {
            weight,
            bias: biased.then(|| self.joined(all("bias"), &[rows])),
        }
    }

    fn layer(&mut self, config: &Config, base: &str, sparse: bool) -> LayerPlan {
        let (h, d) = (config.hidden, config.head_dim);
        let gemma = config.family == Family::Gemma3;
        let norm =
            |planner: &mut Self, name: &str| planner.one(&format!("{base}{name}.weight"), &[h]);
        LayerPlan {
            attention_norm: norm(self, "input_layernorm"),
            qkv: self.linear(
                base,
                &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                (config.heads + 2 * config.kv_heads) * d,
                h,
            ),
            q_norm: self.maybe(&format!("{base}self_attn.q_norm.weight"), &[d]),
            k_norm: self.maybe(&format!("{base}self_attn.k_norm.weight"), &[d]),
            output: self.linear(base, &["self_attn.o_proj"], h, config.heads * d),
            attention_post_norm: gemma.then(|| norm(self, "post_attention_layernorm")),
            mlp_norm: norm(
                self,
                if gemma {
                    "pre_feedforward_layernorm"
                } else {
                    "post_attention_layernorm"
                },
            ),
            mlp: match config.experts.as_ref().filter(|_| sparse) {
                Some(experts) => self.sparse(experts, base, h),
                None => MlpPlan::Dense {
                    gate_up: self.linear(
                        base,
                        &["mlp.gate_proj", "mlp.up_proj"],
                        2 * config.intermediate,
                        h,
                    ),
                    down: self.linear(base, &["mlp.down_proj"], h, config.intermediate),
                },
            },
            mlp_post_norm: gemma.then(|| norm(self, "post_feedforward_layernorm")),
        }
    }

    fn sparse(&mut self, experts: &Experts, base: &str, h: usize) -> MlpPlan {
        let (count, rows) = (experts.count, experts.intermediate);
        let name = |expert: usize, part: &str| format!("{base}mlp.experts.{expert}.{part}.weight");
        let gates = (0..count)
            .flat_map(|expert| [name(expert, "gate_proj"), name(expert, "up_proj")])
            .collect();
        let downs = (0..count).map(|expert| name(expert, "down_proj")).collect();
        MlpPlan::Sparse {
            router: self.one(&format!("{base}mlp.gate.weight"), &[count, h]),
            gate_up: self.joined(gates, &[count, 2 * rows, h]),
            down: self.joined(downs, &[count, h, rows]),
        }
    }
}

/// The loaded tensors; a clone of one shares its memory.
pub(super) struct Loaded(pub(super) Vec<Tensor>);

impl Loaded {
    pub(super) fn get(&self, slot: Slot) -> Tensor {
        self.0[slot].clone()
    }
}
