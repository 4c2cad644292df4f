//! candle-transformers' Llama under measurement: `ocifs-bench-candle DIR DTYPE` loads a directory as its examples do, from a map of the
//! files, and prints how long that took; then it answers requests, a line of JSON each, with the likeliest tokens.

use std::error::Error;
use std::io::{BufRead as _, Write as _};
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Request {
    prompt: Vec<u32>,
    tokens: usize,
}

#[derive(Serialize)]
struct Answer {
    /// Seconds to the first token.
    first: f64,
    /// Tokens a second after it.
    rate: f64,
    tokens: Vec<u32>,
}

struct Model {
    llama: Llama,
    config: Config,
    dtype: DType,
}

impl Model {
    fn load(dir: &Path, dtype: DType) -> std::result::Result<Self, Box<dyn Error>> {
        let config: LlamaConfig = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
        let config = config.into_config(false);
        let files = [dir.join("model.safetensors")];
        // SAFETY: nobody changes the file while the benchmark runs.
        let weights = unsafe { VarBuilder::from_mmaped_safetensors(&files, dtype, &Device::Cpu)? };
        Ok(Self {
            llama: Llama::load(weights, &config)?,
            config,
            dtype,
        })
    }

    fn answer(&self, request: &Request) -> Result<Answer> {
        let mut cache = Cache::new(true, self.dtype, &self.config, &Device::Cpu)?;
        let mut next = |tokens: &[u32], position| -> Result<u32> {
            let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
            let logits = self.llama.forward(&tokens, position, &mut cache)?;
            logits.squeeze(0)?.argmax(0)?.to_scalar()
        };
        let start = Instant::now();
        let mut tokens = vec![next(&request.prompt, 0)?];
        let first = start.elapsed().as_secs_f64();
        while tokens.len() < request.tokens {
            let position = request.prompt.len() + tokens.len() - 1;
            tokens.push(next(&tokens[tokens.len() - 1..], position)?);
        }
        let rest = start.elapsed().as_secs_f64() - first;
        Ok(Answer {
            first,
            rate: (tokens.len() - 1) as f64 / rest,
            tokens,
        })
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, dtype] = &arguments[..] else {
        return Err("usage: ocifs-bench-candle DIR f32|f16|bf16".into());
    };
    let start = Instant::now();
    let model = Model::load(Path::new(dir), dtype.parse()?)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{{\"load\": {}}}", start.elapsed().as_secs_f64())?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let answer = model.answer(&serde_json::from_str(&line?)?)?;
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}
