//! Each family against transformers: a tiny model with the weights that it had there, its logits and its greedy tokens.

use std::path::Path;

use ocifs::runner::config::{self, Config};
use ocifs::runner::decoder::{Decoder, Logits};
use ocifs::runner::device::{self, Choice};
use ocifs::runner::sample::likeliest;
use ocifs::runner::shards::Shards;
use ocifs::runner::{DType, Error};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::scratch;
use crate::weights::{Raw, values, write_shards};

/// How far a logit may be from transformers', in f32.
const CLOSE: f32 = 1e-4;

pub struct Golden {
    pub name: String,
    pub document: Value,
}

pub fn all() -> Vec<Golden> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runner/goldens");
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| Golden {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            document: serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap(),
        })
        .collect()
}

impl Golden {
    fn tokens(&self, field: &str) -> Vec<u32> {
        self.document[field]
            .as_array()
            .unwrap()
            .iter()
            .map(|token| token.as_u64().unwrap() as u32)
            .collect()
    }

    /// The model directory, with weights of this dtype in so many files.
    pub fn write(&self, dtype: &'static str, shards: usize) -> TempDir {
        let dir = scratch("golden");
        std::fs::write(
            dir.path().join("config.json"),
            self.document["config"].to_string(),
        )
        .unwrap();
        let gemma = self.name.starts_with("gemma");
        let tensors: Vec<Raw> = self.document["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|tensor| {
                let name = tensor[0].as_str().unwrap().to_owned();
                let shape: Vec<usize> = tensor[1]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|size| size.as_u64().unwrap() as usize)
                    .collect();
                let norm = name.ends_with("norm.weight");
                let numbers = values(&name, shape.iter().product())
                    .into_iter()
                    .map(|number| match norm {
                        true if gemma => number,
                        true => number + 1.0,
                        false => number * 0.25,
                    });
                let bytes = match dtype {
                    "F32" => numbers.flat_map(f32::to_le_bytes).collect(),
                    "BF16" => numbers
                        .flat_map(|number| half::bf16::from_f32(number).to_le_bytes())
                        .collect(),
                    other => panic!("{other}"),
                };
                Raw {
                    name,
                    dtype,
                    shape,
                    bytes,
                }
            })
            .collect();
        write_shards(dir.path(), &tensors, shards);
        dir
    }
}

fn read_config(dir: &Path) -> Result<Config, Error> {
    let path = dir.join("config.json");
    config::parse(&std::fs::read(&path).unwrap(), &path)
}

fn load(dir: &Path, dtype: Option<DType>) -> Result<Decoder, Error> {
    let device = device::open(Choice::Cpu)?;
    Ok(Decoder::load(read_config(dir)?, &Shards::open(dir)?, &device, dtype, 4)?.0)
}

/// The logits after each token, given in pieces of `piece`.
fn logits(decoder: &Decoder, tokens: &[u32], piece: usize) -> Vec<Vec<f32>> {
    let mut cache = decoder.cache(tokens.len()).unwrap();
    let mut rows = Vec::new();
    for piece in tokens.chunks(piece) {
        let at = rows.len();
        rows.extend(
            decoder
                .forward(piece, at, &mut cache, Logits::All)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap(),
        );
    }
    rows
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

#[test]
fn every_family_computes_what_transformers_does() {
    let all = all();
    let names: Vec<&str> = all.iter().map(|golden| golden.name.as_str()).collect();
    // Those that end in `_5` are of transformers 5, which spells rope settings and experts differently.
    for family in [
        "llama",
        "llama3",
        "llama_linear_bias",
        "mistral",
        "qwen2",
        "llama3_5",
        "qwen3_5",
        "qwen3_moe_5",
        "gemma3_5",
    ] {
        assert!(names.contains(&family), "{names:?}");
    }
    for golden in all {
        let prompt = golden.tokens("prompt");
        for shards in [1, 3] {
            let dir = golden.write("F32", shards);
            let decoder =
                load(dir.path(), None).unwrap_or_else(|error| panic!("{}: {error}", golden.name));
            // The whole prompt at once, in uneven pieces, and token by token as it is when text is generated.
            for piece in [64, 7, 1] {
                let rows = logits(&decoder, &prompt, piece);
                for (at, wanted) in golden.document["positions"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .zip(golden.document["logits"].as_array().unwrap())
                {
                    let wanted: Vec<f32> = wanted
                        .as_array()
                        .unwrap()
                        .iter()
                        .map(|x| x.as_f64().unwrap() as f32)
                        .collect();
                    let got = &rows[at.as_u64().unwrap() as usize];
                    let distance = furthest(got, &wanted);
                    assert!(
                        distance <= CLOSE,
                        "{} at {at}, pieces of {piece}: {distance}",
                        golden.name
                    );
                }
            }
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for golden in all() {
        let dir = golden.write("F32", 1);
        let decoder = load(dir.path(), None).unwrap();
        let (prompt, wanted) = (golden.tokens("prompt"), golden.tokens("greedy"));
        let mut cache = decoder.cache(prompt.len() + wanted.len()).unwrap();
        let (mut next, mut at, mut got) = (prompt, 0, Vec::new());
        while got.len() < wanted.len() {
            let row = decoder
                .forward(&next, at, &mut cache, Logits::Last)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap()
                .remove(0);
            at += next.len();
            got.push(likeliest(&row));
            next = vec![got[got.len() - 1]];
        }
        assert_eq!(got, wanted, "{}", golden.name);
    }
}

#[test]
fn weights_of_16_bits_give_what_their_values_give_in_f32() {
    for golden in all() {
        let dir = golden.write("BF16", 2);
        let prompt = golden.tokens("prompt");
        let (kept, widened) = (
            load(dir.path(), None).unwrap(),
            load(dir.path(), Some(DType::F32)).unwrap(),
        );
        assert_eq!((kept.dtype(), widened.dtype()), (DType::BF16, DType::F32));
        for (kept, widened) in logits(&kept, &prompt, 64)
            .iter()
            .zip(logits(&widened, &prompt, 64))
        {
            assert!(furthest(kept, &widened) <= CLOSE, "{}", golden.name);
        }
    }
}

#[test]
fn a_model_that_would_run_wrongly_is_refused_by_name() {
    let all = all();
    let golden = all.iter().find(|golden| golden.name == "llama").unwrap();
    let refused = |change: &dyn Fn(&mut Golden), said: &str| {
        let mut changed = Golden {
            name: golden.name.clone(),
            document: golden.document.clone(),
        };
        change(&mut changed);
        let dir = changed.write("F32", 1);
        let error = load(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    };
    let tensors = |golden: &mut Golden, change: &dyn Fn(&mut Vec<Value>)| {
        change(golden.document["tensors"].as_array_mut().unwrap())
    };
    refused(
        &|golden| {
            tensors(golden, &|all| {
                all.push(serde_json::json!(["model.layers.0.self_attn.sinks", [4]]))
            })
        },
        "sinks",
    );
    refused(
        &|golden| {
            tensors(golden, &|all| {
                all.retain(|one| one[0] != "model.layers.1.mlp.up_proj.weight")
            })
        },
        "layers.1.mlp.up_proj.weight",
    );
    refused(
        &|golden| tensors(golden, &|all| all.retain(|one| one[0] != "lm_head.weight")),
        "lm_head.weight",
    );
    refused(
        &|golden| golden.document["config"]["num_hidden_layers"] = 2.into(),
        "layers.2",
    );
    refused(
        &|golden| golden.document["config"]["intermediate_size"] = 100.into(),
        "shape",
    );
    refused(
        &|golden| golden.document["config"]["model_type"] = "gpt_neox".into(),
        "gpt_neox",
    );
}
