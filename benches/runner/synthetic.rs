//! A Llama of random numbers, for what depends on its size alone.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde_json::{Value, json};

const VOCABULARY: usize = 49_152;
const HIDDEN: usize = 2048;
const INNER: usize = 5632;
const HEADS: usize = 32;
const KV_HEADS: usize = 4;

/// Makes a model directory with `layers` layers of 44 million parameters each, beside 100 million of its embedding, and a tokenizer of
/// two words.
pub(crate) fn write(dir: &Path, layers: usize) {
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [],
        "model": { "type": "WordLevel", "vocab": { "a": 0, "b": 1 }, "unk_token": "b" },
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "vocab_size": VOCABULARY, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();

    let kv = HIDDEN / HEADS * KV_HEADS;
    let mut tensors = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![VOCABULARY, HIDDEN],
        ),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.k_proj", vec![kv, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.v_proj", vec![kv, HIDDEN]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    // transformers writes tensors by the alphabet: layers.1, layers.10, layers.2.
    tensors.sort();
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<usize>();
        header.insert(
            name,
            json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }),
        );
        at = end;
    }
    let header = Value::Object(header).to_string();
    let file = File::create(dir.join("model.safetensors")).unwrap();
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(header.as_bytes()).unwrap();
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    assert_eq!(at % 8, 0);
    for _ in 0..at / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Four numbers of either sign between 1/128 and 1/32: no model's, and none that overflows.
        let numbers = state & 0x80ff_80ff_80ff_80ff | 0x3c00_3c00_3c00_3c00;
        out.write_all(&numbers.to_le_bytes()).unwrap();
    }
    out.flush().unwrap();
}
