//! The `ocifs-run` command: loads a model directory and generates text, or serves it over HTTP.
//!
//! It knows nothing of registries and mounts; `ocifs run` gives it a path. Text goes to stdout, everything else to stderr.

mod chat;

use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use ocifs::base::ByteSize;
use ocifs::cli::generate::Generate;
use ocifs::runner::engine::{Engine, Finish, Options, Outcome, Progress, Request};
use ocifs::runner::sample::Sampling;
use ocifs::runner::server::Server;
use ocifs::runner::{DType, device, load};
use serde_json::json;
use tracing_subscriber::EnvFilter;

/// Loads a model directory and generates text, or serves it.
#[derive(Debug, Parser)]
#[command(name = "ocifs-run", version, max_term_width = 110)]
struct Cli {
    /// The model: a directory with config.json, tokenizer.json and safetensors files.
    #[arg(value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    generate: Generate,
    /// Take the prompt from FILE, a JSON list of token ids.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "listen"])]
    prompt_tokens: Option<PathBuf>,
    /// Generate N times and tell of the last one, from its first token on: what is done once is over by then.
    #[arg(long, value_name = "N", requires = "prompt_tokens")]
    repeat: Option<usize>,
    /// Generate nothing: write the logits after each token of the prompt to FILE, little-endian f32, a row a token.
    #[arg(long, value_name = "FILE", requires = "prompt_tokens")]
    logits: Option<PathBuf>,
    /// For --logits: give the model N tokens at a time; 1 is the way that text is generated. [default: 512]
    #[arg(long, value_name = "N", requires = "logits")]
    piece: Option<usize>,
}

/// Requests that wait for a server, if nobody says how many.
const QUEUE: usize = 64;

/// What one step of a prompt frees the next one takes again: given back to the kernel each time, all of it would be faulted in anew.
#[cfg(target_env = "gnu")]
fn keep_memory() {
    // SAFETY: before any other thread begins.
    unsafe {
        // The largest threshold that glibc takes.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 << 20);
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_memory() {}

fn main() -> ExitCode {
    keep_memory();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let filter = std::env::var("OCIFS_LOG")
        .ok()
        .and_then(|filter| EnvFilter::try_new(filter).ok());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|| EnvFilter::new("warn")))
        .with_writer(io::stderr)
        .with_target(false)
        .try_init();
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        // A reader that has gone is no failure.
        Err(error)
            if error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// A line on stderr.
fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

fn run(cli: &Cli) -> Result<u8> {
    let options = options(&cli.generate)?;
    // An address that cannot be had is told before a minute of loading.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let server = match cli.generate.listen {
        Some(address) => Some(
            runtime
                .block_on(Server::bind(address))
                .with_context(|| format!("cannot listen on {address}"))?,
        ),
        None => None,
    };
    let prompt = match (&cli.prompt_tokens, server.is_some()) {
        (Some(path), _) => Prompt::Tokens(tokens(path)?),
        (None, true) => Prompt::Nothing,
        (None, false) => prompt(&cli.generate)?,
    };
    let started = Instant::now();
    let mut engine = Engine::open(&cli.model, &options)?;
    let ready = started.elapsed();
    say(&loaded(&engine, ready));
    if let Some(server) = server {
        let name = cli
            .generate
            .name
            .clone()
            .unwrap_or_else(|| directory_name(&cli.model));
        say(&format!("serving {name} on http://{}/v1", server.addr()));
        runtime.block_on(server.run(
            engine,
            name,
            cli.generate.queue.unwrap_or(QUEUE),
            interrupted(),
        ));
        return Ok(0);
    }
    let sampling = sampling(&cli.generate, engine.defaults());
    match (prompt, &cli.logits) {
        (Prompt::Tokens(tokens), Some(path)) => {
            write_logits(&mut engine, &tokens, cli.piece.unwrap_or(512), path)
        }
        (Prompt::Tokens(tokens), None) => {
            let warm_up = Request {
                prompt: tokens.clone(),
                most: cli.generate.tokens,
                sampling: sampling.clone(),
                ignore_ends: cli.generate.ignore_end,
                ..Request::default()
            };
            for _ in 1..cli.repeat.unwrap_or(1) {
                engine.generate(&warm_up, |_| ControlFlow::Continue(()))?;
                engine.forget();
            }
            once(&mut engine, &cli.generate, sampling, tokens, ready)
        }
        (Prompt::Text(text), _) => {
            let tokens = encode(&engine, &cli.generate, &text)?;
            once(&mut engine, &cli.generate, sampling, tokens, ready)
        }
        (Prompt::Nothing, _) => chat::run(&mut engine, &cli.generate, &sampling, &runtime),
    }
}

/// What to go on from.
enum Prompt {
    /// Nothing: a person is asked.
    Nothing,
    Text(String),
    Tokens(Vec<u32>),
}

fn tokens(path: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no JSON list of token ids", path.display()))
}

fn write_logits(engine: &mut Engine, tokens: &[u32], piece: usize, path: &Path) -> Result<u8> {
    let rows = engine.logits(tokens, piece)?;
    let bytes: Vec<u8> = rows
        .into_iter()
        .flatten()
        .flat_map(f32::to_le_bytes)
        .collect();
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(0)
}

fn encode(engine: &Engine, generate: &Generate, prompt: &str) -> Result<Vec<u32>> {
    let Some(template) = engine.template().filter(|_| !generate.raw) else {
        return Ok(engine.text().tokens(prompt, true)?);
    };
    let mut messages: Vec<_> = generate
        .system
        .iter()
        .map(|text| json!({ "role": "system", "content": text }))
        .collect();
    messages.push(json!({ "role": "user", "content": prompt }));
    Ok(engine
        .text()
        .tokens(&template.render(&messages, None)?, false)?)
}

fn options(generate: &Generate) -> Result<Options> {
    let choice = generate
        .device
        .as_deref()
        .unwrap_or("auto")
        .parse::<device::Choice>();
    let dtype = match generate.dtype.as_deref().unwrap_or("auto") {
        "auto" => None,
        "bf16" => Some(DType::BF16),
        "f16" => Some(DType::F16),
        "f32" => Some(DType::F32),
        other => bail!("--dtype {other}: not one of auto, bf16, f16, f32"),
    };
    Ok(Options {
        device: device::open(choice.map_err(|error| anyhow::anyhow!("--device: {error}"))?)?,
        dtype,
        room: generate.ctx,
        workers: generate.readers.unwrap_or(load::WORKERS),
    })
}

fn prompt(generate: &Generate) -> Result<Prompt> {
    match generate.prompt.as_deref() {
        Some(typed) if typed != "-" => Ok(Prompt::Text(typed.to_owned())),
        None if generate.is_chat() => Ok(Prompt::Nothing),
        _ => {
            let mut text = String::new();
            io::stdin()
                .lock()
                .read_to_string(&mut text)
                .context("cannot read the prompt from standard input")?;
            Ok(Prompt::Text(text))
        }
    }
}

fn sampling(generate: &Generate, defaults: &Sampling) -> Sampling {
    let any = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    Sampling {
        temperature: generate.temp.unwrap_or(defaults.temperature),
        top_p: generate.top_p.unwrap_or(defaults.top_p),
        top_k: generate.top_k.unwrap_or(defaults.top_k),
        repetition_penalty: generate
            .repetition_penalty
            .unwrap_or(defaults.repetition_penalty),
        seed: generate.seed.unwrap_or(any),
        ..defaults.clone()
    }
}

fn loaded(engine: &Engine, ready: Duration) -> String {
    let (decoder, stats) = (engine.decoder(), engine.loaded());
    format!(
        "loaded {} of weights in {:.2} s ({:.2} GB/s), ready in {:.2} s: {} in {:?} on {}, room for {} tokens",
        ByteSize(stats.bytes),
        stats.time.as_secs_f64(),
        stats.bytes as f64 / 1e9 / stats.time.as_secs_f64().max(1e-9),
        ready.as_secs_f64(),
        decoder.config().model_type,
        decoder.dtype(),
        if decoder.device().is_cuda() {
            "a GPU"
        } else {
            "the CPU"
        },
        engine.room(),
    )
}

/// Answers one prompt.
fn once(
    engine: &mut Engine,
    generate: &Generate,
    sampling: Sampling,
    prompt: Vec<u32>,
    ready: Duration,
) -> Result<u8> {
    let request = Request {
        prompt,
        most: generate.tokens,
        sampling,
        stops: generate.stop.clone(),
        ignore_ends: generate.ignore_end,
    };
    let (mut out, mut text, mut failed) = (io::stdout().lock(), String::new(), None);
    let outcome = engine.generate(&request, |progress| {
        if let Progress::Text(piece) = progress {
            if generate.json {
                text.push_str(piece);
            } else if let Err(error) = out.write_all(piece.as_bytes()).and_then(|()| out.flush()) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if generate.json {
        let document = document(engine, &request, &outcome, &text, ready);
        serde_json::to_writer_pretty(&mut out, &document).map_err(io::Error::from)?;
    }
    writeln!(out)?;
    say(&summary(&outcome));
    Ok(0)
}

fn summary(outcome: &Outcome) -> String {
    if outcome.tokens.is_empty() {
        return format!("{} prompt tokens, no token", outcome.prompt_tokens);
    }
    let prompt = outcome.prompt_tokens - outcome.reused;
    format!(
        "{} prompt tokens, first token after {:.0} ms ({:.0} tokens/s), {} tokens at {:.1} tokens/s",
        outcome.prompt_tokens,
        outcome.first.as_secs_f64() * 1e3,
        prompt as f64 / outcome.first.as_secs_f64().max(1e-9),
        outcome.tokens.len(),
        outcome.rate(),
    )
}

fn document(
    engine: &Engine,
    request: &Request,
    outcome: &Outcome,
    text: &str,
    ready: Duration,
) -> serde_json::Value {
    let stats = engine.loaded();
    json!({
        "text": text,
        "finish": match outcome.finish { Finish::Stop => "stop", Finish::Length => "length", Finish::Dropped => "dropped" },
        "promptTokens": request.prompt,
        "tokens": outcome.tokens,
        "seed": request.sampling.seed,
        "model": engine.decoder().config().model_type,
        "device": if engine.decoder().device().is_cuda() { "cuda" } else { "cpu" },
        "dtype": format!("{:?}", engine.decoder().dtype()),
        "loadBytes": stats.bytes,
        "loadSeconds": stats.time.as_secs_f64(),
        "readySeconds": ready.as_secs_f64(),
        "firstTokenSeconds": outcome.first.as_secs_f64(),
        "tokensPerSecond": outcome.rate(),
    })
}

fn directory_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    full.file_name().map_or_else(
        || "model".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
