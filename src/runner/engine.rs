//! A loaded model that answers one request after the other, and keeps the keys and values of what it has seen for the next one.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use serde_json::Value;

use super::config;
use super::decoder::{Cache, Decoder, Logits};
use super::error::{Error, Result};
use super::load::LoadStats;
use super::sample::{Sampler, Sampling};
use super::shards::Shards;
use super::template::Template;
use super::text::{Stops, Stream, Text};

/// Tokens of a prompt that go through the model at a time; between two such pieces a request can be given up.
const PIECE: usize = 512;
/// Positions that there is room for, if nobody says how many: enough for a chat, and a gigabyte at most for an 8B model.
const ROOM: usize = 8192;

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it runs.
    pub device: Device,
    /// The dtype of its matrices; `None`: as in the files.
    pub dtype: Option<DType>,
    /// Positions to have room for; `None`: what the model was made for, at most 8192.
    pub room: Option<usize>,
    /// Most reads at a time.
    pub workers: usize,
}

/// One request.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; `None`: as many as there is room for.
    pub most: Option<usize>,
    /// How to choose them.
    pub sampling: Sampling,
    /// Words before which the text ends.
    pub stops: Vec<String>,
    /// Go on after an end token, as a measurement does.
    pub ignore_ends: bool,
}

/// What happens during a request.
#[derive(Debug)]
pub enum Progress<'a> {
    /// A piece of the prompt is done, or a token added no text yet.
    Working,
    /// The text goes on.
    Text(&'a str),
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop word came.
    Stop,
    /// No more tokens were asked for, or there was no more room.
    Length,
    /// Whoever asked no longer wants it.
    Dropped,
}

/// How a request went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The generated tokens, an end token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them whose keys and values were still there.
    pub reused: usize,
    /// Until the first token was chosen.
    pub first: Duration,
    /// All of it.
    pub total: Duration,
}

impl Outcome {
    /// Tokens a second after the first one.
    pub fn rate(&self) -> f64 {
        let time = (self.total - self.first).as_secs_f64();
        if time > 0.0 {
            self.tokens.len().saturating_sub(1) as f64 / time
        } else {
            0.0
        }
    }
}

/// A model and all that belongs to it.
#[derive(Debug)]
pub struct Engine {
    decoder: Decoder,
    text: Arc<Text>,
    template: Option<Arc<Template>>,
    ends: Vec<u32>,
    defaults: Sampling,
    cache: Cache,
    /// The tokens whose keys and values the cache holds.
    seen: Vec<u32>,
    loaded: LoadStats,
}

impl Engine {
    /// Loads the model in `dir`.
    ///
    /// # Errors
    /// When something is missing, malformed, or would run wrongly.
    pub fn open(dir: &Path, options: &Options) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound if dir.is_dir() => no_model(dir),
            _ => Error::io(&path, error),
        })?;
        let config = config::parse(&text, &path)?;
        let shards = Shards::open(dir)?;
        let room = match options.room {
            Some(room) if room > config.positions => {
                return Err(Error::Request(format!(
                    "the model was made for {} positions, not {room}",
                    config.positions
                )));
            }
            Some(room) if room < 2 => {
                return Err(Error::Request(
                    "there has to be room for a token and an answer, 2 in all".to_owned(),
                ));
            }
            Some(room) => room,
            None => config.positions.min(ROOM),
        };
        let mut ends = config.ends.clone();
        // Weights first: the small files come from the same disk or registry, and nothing waits for them longer than for these.
        let (decoder, loaded) = Decoder::load(
            config,
            &shards,
            &options.device,
            options.dtype,
            options.workers,
        )?;
        let (text, template) = (
            Arc::new(Text::open(dir)?),
            Template::open(dir)?.map(Arc::new),
        );
        let generation = generation_config(dir)?;
        ends.extend(config::ends(generation.get("eos_token_id")));
        ends.extend(super::template::end_token(dir).and_then(|token| text.id(&token)));
        let cache = decoder.cache(room)?;
        Ok(Self {
            defaults: defaults(&generation),
            cache,
            seen: Vec::new(),
            decoder,
            text,
            template,
            ends,
            loaded,
        })
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Its tokenizer.
    pub fn text(&self) -> &Arc<Text> {
        &self.text
    }

    /// Its chat template, if it has one.
    pub fn template(&self) -> Option<&Arc<Template>> {
        self.template.as_ref()
    }

    /// How its makers say that tokens be chosen.
    pub fn defaults(&self) -> &Sampling {
        &self.defaults
    }

    /// How many positions there is room for.
    pub fn room(&self) -> usize {
        self.cache.room()
    }

    /// What loading took.
    pub fn loaded(&self) -> LoadStats {
        self.loaded
    }

    /// Forgets what was seen: the next prompt is computed from its first token on.
    pub fn forget(&mut self) {
        self.seen.clear();
    }

    /// The logits after each token of `tokens`, rows of the vocabulary's size, computed `piece` tokens at a time. Forgets what was
    /// seen.
    ///
    /// # Errors
    /// As for [`Decoder::forward`].
    pub fn logits(&mut self, tokens: &[u32], piece: usize) -> Result<Vec<Vec<f32>>> {
        self.seen.clear();
        let mut rows = Vec::with_capacity(tokens.len());
        for piece in tokens.chunks(piece.max(1)) {
            let at = rows.len();
            rows.extend(
                self.decoder
                    .forward(piece, at, &mut self.cache, Logits::All)?
                    .to_vec2::<f32>()?,
            );
        }
        Ok(rows)
    }

    /// Generates; `progress` is told of each step and ends it by breaking.
    ///
    /// # Errors
    /// When the prompt is empty or too long, or the device fails.
    pub fn generate(
        &mut self,
        request: &Request,
        mut progress: impl FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<Outcome> {
        let started = Instant::now();
        let prompt = &request.prompt;
        let room = self.cache.room();
        if prompt.is_empty() {
            return Err(Error::Request("the prompt is empty".to_owned()));
        }
        if prompt.len() >= room {
            return Err(Error::Request(format!(
                "the prompt has {} tokens, and there is room for {room}, the answer included",
                prompt.len()
            )));
        }
        // The last token's logits are needed, so it is computed again even if it was seen.
        let reused = prompt
            .iter()
            .zip(&self.seen)
            .take_while(|(a, b)| a == b)
            .count()
            .min(prompt.len() - 1);
        self.seen.truncate(reused);
        let mut outcome = Outcome {
            tokens: Vec::new(),
            finish: Finish::Length,
            prompt_tokens: prompt.len(),
            reused,
            first: Duration::ZERO,
            total: Duration::ZERO,
        };
        let most = request.most.unwrap_or(usize::MAX).min(room - prompt.len());
        let dropped = if most == 0 {
            false
        } else {
            self.answer(request, most, started, &mut outcome, &mut progress)?
        };
        if dropped {
            outcome.finish = Finish::Dropped;
        }
        outcome.total = started.elapsed();
        Ok(outcome)
    }

    /// Whether it was given up.
    fn answer(
        &mut self,
        request: &Request,
        most: usize,
        started: Instant,
        outcome: &mut Outcome,
        progress: &mut impl FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<bool> {
        let prompt = &request.prompt;
        let mut logits = Vec::new();
        while self.seen.len() < prompt.len() {
            let piece = &prompt[self.seen.len()..prompt.len().min(self.seen.len() + PIECE)];
            logits = self.step(piece)?;
            if progress(Progress::Working).is_break() {
                return Ok(true);
            }
        }
        let mut sampler = Sampler::new(request.sampling.clone());
        let (mut stream, mut stops) = (Stream::default(), Stops::new(&request.stops));
        loop {
            let token = sampler.next(&mut logits, prompt, &outcome.tokens);
            if outcome.tokens.is_empty() {
                outcome.first = started.elapsed();
            }
            outcome.tokens.push(token);
            if self.ends.contains(&token) && !request.ignore_ends {
                outcome.finish = Finish::Stop;
                break;
            }
            let (shown, stopped) = stops.push(&stream.push(&self.text, token)?);
            let told = progress(if shown.is_empty() {
                Progress::Working
            } else {
                Progress::Text(&shown)
            });
            if stopped {
                outcome.finish = Finish::Stop;
                return Ok(false);
            }
            if told.is_break() {
                return Ok(true);
            }
            if outcome.tokens.len() == most {
                break;
            }
            logits = self.step(&[token])?;
        }
        // What was held back, as a character or as the beginning of a stop word.
        let (mut rest, stopped) = stops.push(&stream.finish(&self.text)?);
        if stopped {
            outcome.finish = Finish::Stop;
        } else {
            rest += &stops.finish();
        }
        Ok(!rest.is_empty() && progress(Progress::Text(&rest)).is_break())
    }

    /// The logits after the last of some tokens that follow what was seen.
    fn step(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let logits =
            self.decoder
                .forward(tokens, self.seen.len(), &mut self.cache, Logits::Last)?;
        self.seen.extend_from_slice(tokens);
        Ok(logits.flatten_all()?.to_vec1()?)
    }
}

/// What is said of a directory without `config.json`.
fn no_model(dir: &Path) -> Error {
    let gguf = std::fs::read_dir(dir).is_ok_and(|entries| {
        let mut names = entries.flatten().map(|entry| entry.file_name());
        names.any(|name| name.to_string_lossy().ends_with(".gguf"))
    });
    let (dir, instead) = (
        dir.display(),
        if gguf {
            "; of GGUF files, which llama.cpp reads, it knows nothing"
        } else {
            ""
        },
    );
    Error::Unsupported(format!(
        "{dir} has no config.json, which the runner needs beside safetensors files{instead}"
    ))
}

fn generation_config(dir: &Path) -> Result<Value> {
    let path = dir.join("generation_config.json");
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|error| Error::malformed(&path, error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(Error::io(&path, error)),
    }
}

/// As transformers reads it: without `do_sample` the likeliest token is taken.
fn defaults(generation: &Value) -> Sampling {
    let number = |name: &str| generation.get(name).and_then(Value::as_f64);
    let samples = generation
        .get("do_sample")
        .and_then(Value::as_bool)
        .unwrap_or(false);
    Sampling {
        temperature: if samples {
            number("temperature").unwrap_or(1.0)
        } else {
            0.0
        },
        top_p: number("top_p").unwrap_or(1.0),
        top_k: generation.get("top_k").and_then(Value::as_u64).unwrap_or(0) as usize,
        repetition_penalty: number("repetition_penalty")
            .filter(|penalty| *penalty > 0.0)
            .unwrap_or(1.0),
        ..Sampling::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_maker_says_how_tokens_are_chosen() {
        // As DeepSeek-R1's distilled models have it.
        let said = defaults(&json!({"do_sample": true, "temperature": 0.6, "top_p": 0.95}));
        assert_eq!((said.temperature, said.top_p, said.top_k), (0.6, 0.95, 0));
        let said = defaults(&json!({"do_sample": true, "top_k": 20, "repetition_penalty": 1.05}));
        assert_eq!(
            (said.temperature, said.top_k, said.repetition_penalty),
            (1.0, 20, 1.05)
        );
        // A temperature without `do_sample` is not used.
        assert_eq!(defaults(&json!({"temperature": 0.6})).temperature, 0.0);
        assert_eq!(defaults(&Value::Null).temperature, 0.0);
    }
}
