//! `config.json` as the decoder needs it. What the decoder would compute wrongly is refused here, by name and reason.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::{Error, Result};
use super::rope::Rope;

/// What differs between families beyond what their tensors show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama, Mistral, Qwen2, Qwen3, and what has the same shape.
    Llama,
    /// Qwen3 with a mixture of experts in (some of) its layers.
    Qwen3Moe,
    /// Gemma 3, text only.
    Gemma3,
}

/// The gate's function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

/// The experts of a mixture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many see each token.
    pub chosen: usize,
    /// Rows of an expert's gate.
    pub intermediate: usize,
    /// Whether the weights of the chosen ones are made to add up to 1.
    pub normalise: bool,
}

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// How many positions back a token sees, itself included; `None`: all.
    pub window: Option<usize>,
    /// Its positions.
    pub rope: Rope,
    /// Whether its MLP is a mixture of experts.
    pub sparse: bool,
}

/// A decoder's dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `model_type` as written.
    pub model_type: String,
    /// What it needs beyond the common shape.
    pub family: Family,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the gate.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Epsilon of the norms.
    pub epsilon: f64,
    /// What scores are multiplied with.
    pub scale: f64,
    /// The gate's function.
    pub activation: Activation,
    /// Most positions that the model was made for.
    pub positions: usize,
    /// Whether the output layer may be the embedding.
    pub tied: bool,
    /// Its experts, if it has layers with such.
    pub experts: Option<Experts>,
    /// Each layer.
    pub layers: Vec<LayerConfig>,
    /// Tokens that end a text, from this file.
    pub ends: Vec<u32>,
}

const MODEL_TYPES: &[(&str, Family)] = &[
    ("llama", Family::Llama),
    ("mistral", Family::Llama),
    ("qwen2", Family::Llama),
    ("qwen3", Family::Llama),
    ("qwen3_moe", Family::Qwen3Moe),
    ("gemma3_text", Family::Gemma3),
];

/// Reads `config.json`; `path` is for messages.
///
/// # Errors
/// `Malformed` for what is no such file, `Unsupported` for what would run wrongly.
pub fn parse(text: &[u8], path: &Path) -> Result<Config> {
    let value: Value = serde_json::from_slice(text)
        .map_err(|error| Error::malformed(path, format!("not JSON: {error}")))?;
    let Value::Object(fields) = &value else {
        return Err(Error::malformed(path, "not a JSON object"));
    };
    Reader { fields, path }.config()
}

fn unsupported<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::Unsupported(reason.into()))
}

struct Reader<'a> {
    fields: &'a Map<String, Value>,
    path: &'a Path,
}

impl Reader<'_> {
    /// A field that is there; null counts as absent, as for transformers.
    fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    fn wrong<T>(&self, name: &str, wanted: &str) -> Result<T> {
        Err(Error::malformed(
            self.path,
            format!("`{name}` is not {wanted}"),
        ))
    }

    fn size_or(&self, name: &str, absent: Option<usize>) -> Result<usize> {
        /// More of anything is a lie, and products of three of them still fit.
        const MOST: u64 = 1 << 21;
        match (self.get(name), absent) {
            (Some(value), _) => match value.as_u64() {
                Some(number) if (1..=MOST).contains(&number) => Ok(number as usize),
                _ => self.wrong(name, "a number from 1 to 2097152"),
            },
            (None, Some(absent)) => Ok(absent),
            (None, None) => Err(Error::malformed(self.path, format!("`{name}` is missing"))),
        }
    }

    fn size(&self, name: &str) -> Result<usize> {
        self.size_or(name, None)
    }

    fn number_or(&self, name: &str, absent: f64) -> Result<f64> {
        match self.get(name) {
            None => Ok(absent),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() => Ok(number),
                _ => self.wrong(name, "a number"),
            },
        }
    }

    fn flag(&self, name: &str, absent: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(absent),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => self.wrong(name, "true or false"),
        }
    }

    fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong(name, "a string"),
        }
    }

    fn config(&self) -> Result<Config> {
        let Some(model_type) = self.text("model_type")? else {
            return unsupported("config.json names no `model_type`");
        };
        let Some((_, family)) = MODEL_TYPES.iter().find(|(name, _)| *name == model_type) else {
            let known: Vec<&str> = MODEL_TYPES.iter().map(|(name, _)| *name).collect();
            return unsupported(format!(
                "its model_type is `{model_type}`; known are {}",
                known.join(", ")
            ));
        };
        self.refuse_what_would_run_wrongly()?;
        let (heads, hidden) = (self.size("num_attention_heads")?, self.size("hidden_size")?);
        let kv_heads = self.size_or("num_key_value_heads", Some(heads))?;
        let head_dim = match self.get("head_dim") {
            Some(_) => self.size("head_dim")?,
            None if *family == Family::Gemma3 => 256,
            None if hidden % heads == 0 => hidden / heads,
            None => return self.wrong("hidden_size", "a multiple of `num_attention_heads`"),
        };
        if heads % kv_heads != 0 {
            return self.wrong("num_attention_heads", "a multiple of `num_key_value_heads`");
        }
        if head_dim % 2 != 0 {
            return self.wrong("head_dim", "even");
        }
        let gemma = *family == Family::Gemma3;
        let scale = if gemma {
            self.number_or("query_pre_attn_scalar", 256.0)?
        } else {
            head_dim as f64
        };
        let positions = self.size_or(
            "max_position_embeddings",
            Some(if gemma { 131_072 } else { 2048 }),
        )?;
        Ok(Config {
            model_type: model_type.to_owned(),
            family: *family,
            vocabulary: self.size("vocab_size")?,
            hidden,
            intermediate: self.size("intermediate_size")?,
            heads,
            kv_heads,
            head_dim,
            epsilon: self.number_or("rms_norm_eps", 1e-6)?,
            scale: scale.powf(-0.5),
            activation: self.activation(gemma)?,
            positions,
            tied: self.flag("tie_word_embeddings", gemma)?,
            experts: self.experts(*family)?,
            layers: self.layers(*family, model_type, head_dim, positions)?,
            ends: ends(self.get("eos_token_id")),
        })
    }

    fn refuse_what_would_run_wrongly(&self) -> Result<()> {
        if let Some(method) = self.get("quantization_config") {
            let method = method.get("quant_method").and_then(Value::as_str);
            return unsupported(format!(
                "its weights are quantised ({}), which the runner does not decode",
                method.unwrap_or("quantization_config")
            ));
        }
        if self.number_or("partial_rotary_factor", 1.0)? != 1.0 {
            return unsupported("only a part of each head is rotated (partial_rotary_factor)");
        }
        for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if self.get(field).is_some() {
                return unsupported(format!("its logits are capped ({field})"));
            }
        }
        if self.number_or("pretraining_tp", 1.0)? != 1.0 {
            return unsupported("its products are split (pretraining_tp)");
        }
        Ok(())
    }

    fn activation(&self, gemma: bool) -> Result<Activation> {
        let (name, absent) = if gemma {
            ("hidden_activation", "gelu_pytorch_tanh")
        } else {
            ("hidden_act", "silu")
        };
        match self.text(name)?.unwrap_or(absent) {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            other => unsupported(format!("its activation is `{other}`")),
        }
    }

    fn experts(&self, family: Family) -> Result<Option<Experts>> {
        if family != Family::Qwen3Moe {
            return Ok(None);
        }
        let experts = Experts {
            // transformers 5 writes the second name.
            count: match self.get("num_experts") {
                Some(_) => self.size("num_experts")?,
                None => self.size("num_local_experts")?,
            },
            chosen: self.size("num_experts_per_tok")?,
            intermediate: self.size("moe_intermediate_size")?,
            normalise: self.flag("norm_topk_prob", false)?,
        };
        if experts.chosen > experts.count {
            return self.wrong("num_experts_per_tok", "at most `num_experts`");
        }
        Ok(Some(experts))
    }

    fn layers(
        &self,
        family: Family,
        model_type: &str,
        head_dim: usize,
        positions: usize,
    ) -> Result<Vec<LayerConfig>> {
        let count = self.size("num_hidden_layers")?;
        if count > 1024 {
            return self.wrong("num_hidden_layers", "at most 1024");
        }
        let windows = self.windows(family, model_type, count)?;
        let (full, sliding) = self.ropes(family, head_dim, positions)?;
        let step = self.size_or("decoder_sparse_step", Some(1))?;
        let dense: Vec<u64> = match self.get("mlp_only_layers") {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
            _ => Vec::new(),
        };
        Ok(windows
            .into_iter()
            .enumerate()
            .map(|(index, window)| LayerConfig {
                rope: if family == Family::Gemma3 && window.is_some() {
                    sliding.clone()
                } else {
                    full.clone()
                },
                window,
                sparse: family == Family::Qwen3Moe
                    && !dense.contains(&(index as u64))
                    && (index + 1).is_multiple_of(step),
            })
            .collect())
    }

    fn windows(
        &self,
        family: Family,
        model_type: &str,
        count: usize,
    ) -> Result<Vec<Option<usize>>> {
        let used = match model_type {
            "llama" => false,
            "mistral" | "gemma3_text" => true,
            _ => self.flag("use_sliding_window", false)?,
        };
        let window = match (used, self.get("sliding_window")) {
            (true, Some(_)) => Some(self.size("sliding_window")?),
            (true, None) if family == Family::Gemma3 => Some(4096),
            _ => None,
        };
        if let Some(value) = self.get("layer_types") {
            let Some(list) = value.as_array().filter(|list| list.len() == count) else {
                return self.wrong("layer_types", "a list with an entry for each layer");
            };
            return list
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Ok(None),
                    Some("sliding_attention") if window.is_some() => Ok(window),
                    _ => unsupported(format!("it has layers of type {kind}")),
                })
                .collect();
        }
        // Without a list, each family has its own rule for which layers slide.
        let pattern = self.size_or("sliding_window_pattern", Some(6))?;
        let first = self.number_or("max_window_layers", 28.0)?;
        Ok((0..count)
            .map(|index| match (family, model_type) {
                (Family::Gemma3, _) => window.filter(|_| (index + 1) % pattern != 0),
                (_, "mistral") => window,
                _ => window.filter(|_| index as f64 >= first),
            })
            .collect())
    }

    /// The rotation of layers that see everything, and of those with a window.
    fn ropes(&self, family: Family, head_dim: usize, positions: usize) -> Result<(Rope, Rope)> {
        let theta = self.number_or(
            "rope_theta",
            if family == Family::Gemma3 { 1e6 } else { 1e4 },
        )?;
        let local = self.number_or("rope_local_base_freq", 1e4)?;
        // transformers 5 writes `rope_parameters`, with theta in it, and for Gemma 3 one for each kind of layer.
        let parameters = self
            .get("rope_parameters")
            .or_else(|| self.get("rope_scaling"));
        let by_kind = |kind: &str| {
            parameters
                .and_then(|all| all.get(kind))
                .filter(|one| one.is_object())
        };
        let read = |one: Option<&Value>, theta| Rope::parse(one, theta, head_dim, positions);
        match (by_kind("full_attention"), by_kind("sliding_attention")) {
            (Some(full), Some(sliding)) => {
                Ok((read(Some(full), theta)?, read(Some(sliding), local)?))
            }
            (Some(full), None) => Ok((read(Some(full), theta)?, read(None, local)?)),
            _ => Ok((read(parameters, theta)?, read(None, local)?)),
        }
    }
}

/// A token id, or a list of such, as `eos_token_id` is written.
pub(super) fn ends(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 512, "hidden_size": 96, "intermediate_size": 192,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": [1, 2],
        })
    }

    fn read(value: &Value) -> Result<Config> {
        parse(value.to_string().as_bytes(), Path::new("config.json"))
    }

    fn with(name: &str, value: Value) -> Value {
        let mut config = llama();
        config[name] = value;
        config
    }

    #[test]
    fn what_is_absent_is_as_transformers_has_it() {
        let config = read(&llama()).unwrap();
        assert_eq!(
            (config.head_dim, config.kv_heads, config.positions),
            (24, 2, 2048)
        );
        assert_eq!(
            (config.epsilon, config.tied, config.ends),
            (1e-6, false, vec![1, 2])
        );
        assert!(
            config
                .layers
                .iter()
                .all(|layer| layer.window.is_none() && !layer.sparse)
        );
    }

    #[test]
    fn theta_counts_in_each_of_its_places() {
        let theta = |value: &Value| read(value).unwrap().layers[0].rope.clone();
        let top = theta(&with("rope_theta", json!(5e5)));
        assert_eq!(
            top,
            theta(&with(
                "rope_parameters",
                json!({"rope_theta": 5e5, "rope_type": "default"})
            ))
        );
        assert_ne!(top, theta(&llama()));
    }

    #[test]
    fn what_would_run_wrongly_is_refused_by_name() {
        for (name, value, said) in [
            ("model_type", json!("phi3"), "phi3"),
            (
                "quantization_config",
                json!({"quant_method": "gptq"}),
                "gptq",
            ),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            (
                "final_logit_softcapping",
                json!(30.0),
                "final_logit_softcapping",
            ),
            ("hidden_act", json!("relu"), "relu"),
            (
                "rope_scaling",
                json!({"rope_type": "yarn", "factor": 4.0}),
                "yarn",
            ),
            (
                "rope_scaling",
                json!({"type": "dynamic", "factor": 4.0}),
                "dynamic",
            ),
            (
                "layer_types",
                json!([
                    "full_attention",
                    "full_attention",
                    "linear_attention",
                    "full_attention"
                ]),
                "linear_attention",
            ),
        ] {
            let error = read(&with(name, value)).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{name}: {error}");
            assert!(error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_malformed() {
        for (name, value) in [
            ("hidden_size", json!(0)),
            ("hidden_size", json!(1u64 << 40)),
            ("hidden_size", json!("96")),
            ("hidden_size", json!(97)),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(7)),
            ("layer_types", json!(["full_attention"])),
            ("rms_norm_eps", json!("small")),
        ] {
            assert!(
                matches!(
                    read(&with(name, value.clone())),
                    Err(Error::Malformed { .. })
                ),
                "{name}: {value}"
            );
        }
        assert!(parse(b"[]", Path::new("config.json")).is_err());
        assert!(parse(b"{", Path::new("config.json")).is_err());
    }

    #[test]
    fn published_configs_of_the_same_shape_are_read() {
        // DeepSeek-R1-Distill-Llama-8B and -Qwen-1.5B, Yi-6B, TinyLlama-1.1B, without what nobody reads.
        let r1_llama = json!({
            "model_type": "llama", "attention_bias": false, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": false, "vocab_size": 128256,
        });
        let r1_qwen = json!({
            "model_type": "qwen2", "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
            "max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000, "sliding_window": 4096,
            "tie_word_embeddings": false, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936,
        });
        let yi = json!({
            "model_type": "llama", "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 5000000.0,
            "tie_word_embeddings": false, "vocab_size": 64000,
        });
        let tiny = json!({
            "model_type": "llama", "attention_bias": false, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 5632, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22,
            "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 10000.0,
            "tie_word_embeddings": false, "vocab_size": 32000,
        });
        for (value, width, theta, last) in [
            // The slowest pair turns 8 times slower than without `rope_scaling`.
            (r1_llama, 128, 500_000.0, 8.0),
            (r1_qwen, 128, 10_000.0, 1.0),
            (yi, 128, 5_000_000.0, 1.0),
            (tiny, 64, 10_000.0, 1.0),
        ] {
            let config = read(&value).unwrap();
            assert_eq!(config.head_dim, width);
            assert_eq!(
                config.ends,
                [value["eos_token_id"].as_u64().unwrap() as u32]
            );
            assert!(!config.tied);
            assert!(config.layers.iter().all(|layer| layer.window.is_none()));
            let frequencies = &config.layers[0].rope.frequencies;
            let slowest = f64::powf(theta, 2.0 / width as f64 - 1.0) / last;
            assert_eq!(frequencies[0], 1.0);
            assert!((f64::from(*frequencies.last().unwrap()) / slowest - 1.0).abs() < 1e-6);
        }
        let several = json!([128001, 128008, 128009]);
        assert_eq!(ends(Some(&several)), [128_001, 128_008, 128_009]);
    }

    #[test]
    fn windows_are_where_each_family_has_them() {
        let windows = |value: &Value| -> Vec<Option<usize>> {
            read(value)
                .unwrap()
                .layers
                .iter()
                .map(|layer| layer.window)
                .collect()
        };
        let mut config = with("sliding_window", json!(32));
        assert_eq!(windows(&config), [None; 4], "Llama has none");
        config["model_type"] = json!("mistral");
        assert_eq!(windows(&config), [Some(32); 4]);
        config["model_type"] = json!("qwen2");
        assert_eq!(windows(&config), [None; 4], "use_sliding_window is off");
        config["use_sliding_window"] = json!(true);
        config["max_window_layers"] = json!(2);
        assert_eq!(windows(&config), [None, None, Some(32), Some(32)]);
        config["model_type"] = json!("gemma3_text");
        config["sliding_window_pattern"] = json!(2);
        assert_eq!(windows(&config), [Some(32), None, Some(32), None]);
    }
}
