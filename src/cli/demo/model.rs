//! Makes a Llama-style model of random weights: complete, sharded, loadable by engines.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::tokenizer::{Bpe, SPECIAL};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 2816;
const HEADS: usize = 16;
const KV_HEADS: usize = 4;
const HEAD: usize = HIDDEN / HEADS;
/// Weight files.
const SHARDS: usize = 4;
/// Bytes of a bf16 number.
const WIDTH: usize = 2;

/// What was made.
#[derive(Debug)]
pub(super) struct Made {
    /// Transformer blocks.
    pub(super) layers: usize,
    /// Numbers in all tensors.
    pub(super) parameters: u64,
    /// Bytes of the weight files.
    pub(super) weight_bytes: u64,
    /// The tensor that the demonstration reads.
    pub(super) sample: String,
}

/// A tensor to be written.
#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// A norm's weight is 1; the rest is random.
    norm: bool,
}

impl Tensor {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> usize {
        self.elements() * WIDTH
    }
}

/// Writes a model of at least `size` bytes into `dir`; `going` is asked now and then whether to go on.
pub(super) fn make(dir: &Path, size: u64, going: &dyn Fn() -> bool) -> io::Result<Made> {
    let bpe = Bpe::train();
    // A multiple of 64 keeps matrix kernels aligned; the ids at the end stand for nothing.
    let vocabulary = bpe.len().next_multiple_of(64);
    let block: usize = block_tensors(0).iter().map(Tensor::bytes).sum();
    let layers = usize::try_from(size)
        .unwrap_or(usize::MAX)
        .div_ceil(block)
        .clamp(2, 2000);
    let tensors = tensors(layers, vocabulary);
    let total: usize = tensors.iter().map(Tensor::bytes).sum();

    let mut weights = Weights::new(0x006f_6369_6673);
    let mut weight_map = Map::new();
    let mut weight_bytes = 0;
    for (at, shard) in split(&tensors, total.div_ceil(SHARDS)).iter().enumerate() {
        let name = format!("model-{:05}-of-{SHARDS:05}.safetensors", at + 1);
        weight_bytes += write_shard(&dir.join(&name), shard, &mut weights, going)?;
        weight_map.extend(
            shard
                .iter()
                .map(|tensor| (tensor.name.clone(), json!(name))),
        );
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    for (name, document) in [
        ("model.safetensors.index.json", index),
        ("config.json", config(layers, vocabulary)),
        (
            "generation_config.json",
            json!({ "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": false }),
        ),
        ("tokenizer.json", bpe.json()),
        ("tokenizer_config.json", tokenizer_config()),
        (
            "special_tokens_map.json",
            json!({ "bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2] }),
        ),
    ] {
        fs::write(dir.join(name), serde_json::to_vec_pretty(&document)?)?;
    }
    let readme = "# A model that `ocifs demo` made\n\nA Llama of random weights. It loads, and it has nothing to say.\n";
    fs::write(dir.join("README.md"), readme)?;
    Ok(Made {
        layers,
        parameters: (total / WIDTH) as u64,
        weight_bytes,
        sample: format!("model.layers.{}.mlp.up_proj.weight", layers / 2),
    })
}

fn config(layers: usize, vocabulary: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 2048,
        "mlp_bias": false,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": vocabulary,
    })
}

fn tokenizer_config() -> Value {
    let added: Map<String, Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            let token = json!({ "content": token, "lstrip": false, "normalized": false, "rstrip": false,
                                "single_word": false, "special": true });
            (id.to_string(), token)
        })
        .collect();
    json!({
        "added_tokens_decoder": added,
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": false,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

fn tensors(layers: usize, vocabulary: usize) -> Vec<Tensor> {
    let mut tensors = vec![matrix("model.embed_tokens", vocabulary, HIDDEN)];
    tensors.extend((0..layers).flat_map(block_tensors));
    tensors.push(norm("model.norm"));
    tensors.push(matrix("lm_head", vocabulary, HIDDEN));
    tensors
}

fn block_tensors(layer: usize) -> Vec<Tensor> {
    let name = |part: &str| format!("model.layers.{layer}.{part}");
    vec![
        norm(&name("input_layernorm")),
        matrix(&name("self_attn.q_proj"), HEADS * HEAD, HIDDEN),
        matrix(&name("self_attn.k_proj"), KV_HEADS * HEAD, HIDDEN),
        matrix(&name("self_attn.v_proj"), KV_HEADS * HEAD, HIDDEN),
        matrix(&name("self_attn.o_proj"), HIDDEN, HEADS * HEAD),
        norm(&name("post_attention_layernorm")),
        matrix(&name("mlp.gate_proj"), INTERMEDIATE, HIDDEN),
        matrix(&name("mlp.up_proj"), INTERMEDIATE, HIDDEN),
        matrix(&name("mlp.down_proj"), HIDDEN, INTERMEDIATE),
    ]
}

fn matrix(name: &str, rows: usize, columns: usize) -> Tensor {
    Tensor {
        name: format!("{name}.weight"),
        shape: vec![rows, columns],
        norm: false,
    }
}

fn norm(name: &str) -> Tensor {
    Tensor {
        name: format!("{name}.weight"),
        shape: vec![HIDDEN],
        norm: true,
    }
}

/// Splits tensors, in their order, into [`SHARDS`] files of about `share` bytes.
fn split(tensors: &[Tensor], share: usize) -> Vec<Vec<Tensor>> {
    let mut shards = vec![Vec::new(); SHARDS];
    let mut before = 0;
    for tensor in tensors {
        let shard = (before / share).min(SHARDS - 1);
        before += tensor.bytes();
        shards[shard].push(tensor.clone());
    }
    shards
}

/// Writes one safetensors file: the header's length, the header padded to 8 bytes, the tensors. Returns its size.
fn write_shard(
    path: &Path,
    tensors: &[Tensor],
    weights: &mut Weights,
    going: &dyn Fn() -> bool,
) -> io::Result<u64> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.bytes();
        let entry = json!({ "dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut buffer = Vec::with_capacity(1 << 20);
    for tensor in tensors {
        let mut left = tensor.elements();
        while left > 0 {
            if !going() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let count = left.min((1 << 20) / WIDTH);
            buffer.clear();
            match tensor.norm {
                true => buffer.extend(std::iter::repeat_n(bf16(1.0), count).flatten()),
                false => weights.fill(&mut buffer, count),
            }
            file.write_all(&buffer)?;
            left -= count;
        }
    }
    file.flush()?;
    Ok((8 + header.len() + end) as u64)
}

/// A stream of normally distributed bf16 numbers: the same seed, the same numbers.
struct Weights {
    state: u64,
    table: Box<[[u8; 2]]>,
}

impl Weights {
    /// Deviation of the weights: what Llama's initialisation uses.
    const DEVIATION: f32 = 0.02;

    fn new(seed: u64) -> Self {
        let mut weights = Self {
            state: seed,
            table: Box::new([]),
        };
        let draw = |weights: &mut Self| {
            // The sum of twelve uniform numbers in 0..1 has mean 6 and deviation 1, and no far outliers.
            let sum: f32 = (0..12)
                .map(|_| (weights.next() >> 40) as f32 / (1u64 << 24) as f32)
                .sum();
            bf16((sum - 6.0) * Self::DEVIATION)
        };
        weights.table = (0..1 << 16).map(|_| draw(&mut weights)).collect();
        weights
    }

    /// The next 64 bits (SplitMix64, Steele et al., "Fast splittable pseudorandom number generators").
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&mut self, buffer: &mut Vec<u8>, count: usize) {
        for _ in 0..count.div_ceil(4) {
            let bits = self.next();
            for part in 0..4 {
                buffer.extend_from_slice(&self.table[(bits >> (part * 16)) as usize & 0xffff]);
            }
        }
        buffer.truncate(count * WIDTH);
    }
}

/// The upper half of a float: bf16 by truncation, little-endian.
fn bf16(value: f32) -> [u8; 2] {
    ((value.to_bits() >> 16) as u16).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_complete_and_the_same_each_time() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let made = make(one.path(), 1, &|| true).unwrap();
        make(two.path(), 1, &|| true).unwrap();
        assert_eq!(made.layers, 2);
        let digest = |dir: &Path| {
            crate::pack::pack(dir, &crate::pack::Options::default(), &|_| true)
                .unwrap()
                .digest
        };
        assert_eq!(digest(one.path()), digest(two.path()));

        let index: Value = serde_json::from_slice(
            &fs::read(one.path().join("model.safetensors.index.json")).unwrap(),
        )
        .unwrap();
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), 3 + 2 * 9);
        let mut sum = 0;
        for shard in 1..=SHARDS {
            let name = format!("model-{shard:05}-of-{SHARDS:05}.safetensors");
            let bytes = fs::read(one.path().join(&name)).unwrap();
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
            let (mut last, mut count) = (0, 0);
            for (tensor, entry) in header
                .iter()
                .filter(|(tensor, _)| *tensor != "__metadata__")
            {
                assert_eq!(map[tensor], name.as_str());
                last = last.max(entry["data_offsets"][1].as_u64().unwrap());
                count += 1;
            }
            assert!(count > 0, "{name} is empty");
            assert_eq!(last as usize, bytes.len() - 8 - length);
            sum += last;
        }
        assert_eq!(sum, index["metadata"]["total_size"].as_u64().unwrap());
        assert_eq!(sum / 2, made.parameters);
        assert!(map.contains_key(&made.sample));
    }

    #[test]
    fn weights_are_finite_and_look_normal() {
        let mut bytes = Vec::new();
        Weights::new(1).fill(&mut bytes, 100_001);
        assert_eq!(bytes.len(), 200_002);
        let values = bytes
            .chunks(2)
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16));
        let values: Vec<f32> = values.collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let deviation = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        assert!(values.iter().all(|value| value.is_finite()));
        assert!(
            mean.abs() < 0.001 && (deviation - 0.02).abs() < 0.001,
            "{mean} {deviation}"
        );
    }

    #[test]
    fn making_stops_when_told() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            make(dir.path(), 1, &|| false).unwrap_err().kind(),
            io::ErrorKind::Interrupted
        );
    }
}
