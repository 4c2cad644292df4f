//! The runner and its peers, all asked in the same way.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::common::environment;
use crate::common::servers::run;

/// How a request went.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Answer {
    /// Seconds to the first token.
    pub(crate) first: f64,
    /// Tokens a second after it.
    pub(crate) rate: f64,
    pub(crate) tokens: Vec<u32>,
}

/// Somebody who generates text.
pub(crate) enum Engine {
    /// A new `ocifs-run` for each request: it warms itself up.
    Ours { model: PathBuf, prompt: PathBuf },
    /// A process that answers line by line.
    Peer(Peer),
}

impl Engine {
    pub(crate) fn ask(&mut self, prompt: &[u32], tokens: usize) -> Answer {
        match self {
            Self::Ours {
                model,
                prompt: file,
            } => {
                std::fs::write(&*file, json!(prompt).to_string()).unwrap();
                let said = ours(model, file, tokens, &["--repeat", "2"]);
                let number = |name: &str| said[name].as_f64().unwrap();
                Answer {
                    first: number("firstTokenSeconds"),
                    rate: number("tokensPerSecond"),
                    tokens: serde_json::from_value(said["tokens"].clone()).unwrap(),
                }
            }
            Self::Peer(peer) => peer.ask(prompt, tokens),
        }
    }
}

/// The likeliest token after each of a prompt's, as `ocifs-run` computes it.
pub(crate) fn our_choices(model: &Path, prompt: &[u32], dir: &Path) -> Vec<u32> {
    let (file, logits) = (dir.join("prompt.json"), dir.join("logits"));
    std::fs::write(&file, json!(prompt).to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs-run"));
    command.arg(model).arg("--prompt-tokens").arg(&file);
    run(command
        .arg("--logits")
        .arg(&logits)
        .args(["--device", "cpu"]));
    let bytes = std::fs::read(logits).unwrap();
    let numbers: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    let rows = numbers.chunks_exact(numbers.len() / prompt.len());
    rows.map(ocifs::runner::sample::likeliest).collect()
}

/// What `ocifs-run` says about a run on a prompt in a file.
pub(crate) fn ours(model: &Path, prompt: &Path, tokens: usize, more: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs-run"));
    command.arg(model).arg("--prompt-tokens").arg(prompt);
    command.args(["-n", &tokens.to_string(), "--temp", "0", "--ignore-end"]);
    command.args(["--device", "cpu", "--json"]).args(more);
    serde_json::from_str(&run(&mut command)).unwrap()
}

/// A process that loads a model, says how long that took, and answers a line of JSON with another.
pub(crate) struct Peer {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Seconds that it took to load the model.
    pub(crate) load: f64,
}

fn candle_program() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_ocifs")).with_file_name("ocifs-bench-candle")
}

impl Peer {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut peer = Self {
            requests: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
            load: 0.0,
        };
        peer.load = peer.read()["load"].as_f64().unwrap();
        peer
    }

    /// transformers; `None` where `benches/setup.sh` has not run.
    pub(crate) fn transformers(model: &Path, dtype: &str) -> Option<Self> {
        let python = environment("OCIFS_BENCH_ENV", "ocifs-benches").join("venv/bin/python3");
        let mut command = Command::new(&python);
        command.arg("-B").arg(script("transformers_peer.py"));
        python
            .exists()
            .then(|| Self::start(command.arg(model).arg(dtype)))
    }

    /// candle-transformers; `None` where it was not built.
    pub(crate) fn candle(model: &Path, dtype: &str) -> Option<Self> {
        let mut command = Command::new(candle_program());
        Self::has_candle().then(|| Self::start(command.arg(model).arg(dtype)))
    }

    /// Whether candle-transformers was built.
    pub(crate) fn has_candle() -> bool {
        candle_program().exists()
    }

    /// llama.cpp; `None` where `tests/setup.sh` has not run.
    pub(crate) fn llama(file: &Path) -> Option<Self> {
        let environment = environment("OCIFS_TEST_ENV", "ocifs-tests");
        let node = environment.join("venv/bin/node");
        let modules = environment.join("node_modules");
        let mut command = Command::new(&node);
        command.arg(script("llama_peer.mjs")).arg(&modules);
        node.exists().then(|| Self::start(command.arg(file)))
    }

    fn ask(&mut self, prompt: &[u32], tokens: usize) -> Answer {
        let request = json!({ "prompt": prompt, "tokens": tokens });
        writeln!(self.requests, "{request}").unwrap();
        serde_json::from_value(self.read()).unwrap()
    }

    /// transformers' likeliest token after each of a prompt's.
    pub(crate) fn choices(&mut self, prompt: &[u32]) -> Vec<u32> {
        let request = json!({ "prompt": prompt, "tokens": 0 });
        writeln!(self.requests, "{request}").unwrap();
        serde_json::from_value(self.read()).unwrap()
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("benches/runner")
        .join(name)
}
