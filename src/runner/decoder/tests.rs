//! A step of slices beside one of tensors.

use std::path::Path;

use serde_json::Value;

use super::*;
use crate::runner::config;

/// Writes safetensors files; the integration tests' own.
#[allow(dead_code, unreachable_pub, missing_debug_implementations)]
#[path = "../../../tests/runner/weights.rs"]
mod weights;

use weights::{Raw, values, write_shards};

/// A family's tiny model, as the integration tests compare it with transformers, with weights of bf16.
fn tiny(golden: &Path) -> Decoder {
    let document: Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let tensors: Vec<Raw> = document["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tensor| {
            let name = tensor[0].as_str().unwrap().to_owned();
            let shape: Vec<usize> = serde_json::from_value(tensor[1].clone()).unwrap();
            let bytes = values(&name, shape.iter().product())
                .into_iter()
                .flat_map(|value| half::bf16::from_f32(value * 0.5).to_le_bytes())
                .collect();
            Raw {
                name,
                dtype: "BF16",
                shape,
                bytes,
            }
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), &tensors, 1);
    let text = document["config"].to_string();
    let config = config::parse(text.as_bytes(), golden).unwrap();
    let shards = Shards::open(dir.path()).unwrap();
    Decoder::load(config, &shards, &Device::Cpu, None, 1)
        .unwrap()
        .0
}

#[test]
fn slices_and_tensors_give_the_same_logits() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runner/goldens");
    let mut count = 0;
    for golden in std::fs::read_dir(goldens).unwrap() {
        let golden = golden.unwrap().path();
        let decoder = tiny(&golden);
        let tokens: Vec<u32> = (0..50).map(|at| at * 31 % 96).collect();
        for (piece, wanted) in [(50, Logits::All), (20, Logits::Last), (1, Logits::Last)] {
            let mut caches = [
                decoder.cache(50).unwrap(),
                decoder.cache_of_tensors(50).unwrap(),
            ];
            for (number, tokens) in tokens.chunks(piece).enumerate() {
                let [ours, plain] = caches.each_mut().map(|cache| {
                    let logits = decoder.forward(tokens, number * piece, cache, wanted);
                    logits.unwrap().to_vec2::<f32>().unwrap()
                });
                assert_eq!(ours.len(), plain.len());
                for (ours, plain) in ours.iter().flatten().zip(plain.iter().flatten()) {
                    assert!(
                        (ours - plain).abs() < 1e-4,
                        "{}, pieces of {piece}: {ours} {plain}",
                        golden.display()
                    );
                }
            }
        }
        count += 1;
    }
    assert!(count > 8);
}
