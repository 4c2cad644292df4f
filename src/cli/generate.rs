//! What may be typed to make a model speak: the options that `ocifs run` passes on to `ocifs-run`, the program that has the engine.

// The comments on fields are help texts.
#![allow(rustdoc::broken_intra_doc_links)]

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::net::SocketAddr;

use clap::Args;

/// How to load a model, and what to do with it.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub struct Generate {
    /// Go on from TEXT (`-`: from standard input), print the answer and end. [default: a chat on a terminal, else standard input]
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Begin a chat with TEXT as the system's message.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Generate at most N tokens. [default: as many as there is room for]
    #[arg(short = 'n', long = "tokens", value_name = "N")]
    pub tokens: Option<usize>,
    /// Divide logits by T before a token is drawn; 0 always takes the likeliest. [default: what generation_config.json says, else 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = from_zero)]
    pub temp: Option<f64>,
    /// Draw from the likeliest tokens that together have probability P. [default: what generation_config.json says, else 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = share)]
    pub top_p: Option<f64>,
    /// Draw from the K likeliest tokens; 0 from all. [default: what generation_config.json says, else 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Make tokens that were seen less likely by this factor. [default: what generation_config.json says, else 1]
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true, value_parser = factor)]
    pub repetition_penalty: Option<f64>,
    /// Draw the same tokens as another run with this seed did. [default: another one each time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// End the text before WORD; repeatable.
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Give the prompt to the model as it is, without the chat template.
    #[arg(long)]
    pub raw: bool,
    /// Go on after the model has ended its text, as measurements do.
    #[arg(long)]
    pub ignore_end: bool,
    /// Keep room for N tokens, prompt and answer together. [default: what the model was made for, at most 8192]
    #[arg(long, value_name = "N")]
    pub ctx: Option<usize>,
    /// Compute with weights of this type: auto (as in the files), bf16, f16, f32. [default: auto]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<String>,
    /// Run on auto (the first GPU, else the CPU), cpu, cuda or cuda:N. [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Read weights with N reads at a time. [default: 16]
    #[arg(long, value_name = "N")]
    pub readers: Option<usize>,
    /// Print one JSON document with the text, its tokens and the statistics instead of the text.
    #[arg(long)]
    pub json: bool,
    /// Serve the model over HTTP on ADDRESS:PORT, as clients of OpenAI's API expect it.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["prompt", "system", "raw", "json", "stop", "tokens", "ignore_end"])]
    pub listen: Option<SocketAddr>,
    /// Let at most N requests wait; further ones are refused. [default: 64]
    #[arg(long, value_name = "N", requires = "listen")]
    pub queue: Option<usize>,
    /// Call the model NAME in answers. [default: the reference, or the directory's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

impl Generate {
    /// Whether a person is to be asked: nothing else says what to answer, and there is a terminal to ask on.
    pub fn is_chat(&self) -> bool {
        self.prompt.is_none() && self.listen.is_none() && std::io::stdin().is_terminal()
    }

    /// The same options as arguments.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut all = Vec::new();
        // With `=`, so that no value is taken for an option.
        let mut option = |name: &str, value: Option<String>| {
            all.extend(value.map(|value| OsString::from(format!("--{name}={value}"))))
        };
        option("prompt", self.prompt.clone());
        option("system", self.system.clone());
        option("tokens", self.tokens.map(|n| n.to_string()));
        option("temp", self.temp.map(|n| n.to_string()));
        option("top-p", self.top_p.map(|n| n.to_string()));
        option("top-k", self.top_k.map(|n| n.to_string()));
        option(
            "repetition-penalty",
            self.repetition_penalty.map(|n| n.to_string()),
        );
        option("seed", self.seed.map(|n| n.to_string()));
        for word in &self.stop {
            option("stop", Some(word.clone()));
        }
        option("ctx", self.ctx.map(|n| n.to_string()));
        option("dtype", self.dtype.clone());
        option("device", self.device.clone());
        option("readers", self.readers.map(|n| n.to_string()));
        option("listen", self.listen.map(|address| address.to_string()));
        option("queue", self.queue.map(|n| n.to_string()));
        option("name", self.name.clone());
        for (name, given) in [
            ("raw", self.raw),
            ("ignore-end", self.ignore_end),
            ("json", self.json),
        ] {
            all.extend(given.then(|| OsString::from(format!("--{name}"))));
        }
        all
    }
}

fn number(text: &str, holds: impl Fn(f64) -> bool, what: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if holds(number) => Ok(number),
        _ => Err(format!("not a number {what}")),
    }
}

fn from_zero(text: &str) -> Result<f64, String> {
    number(text, |n| (0.0..=100.0).contains(&n), "from 0 to 100")
}

fn share(text: &str) -> Result<f64, String> {
    number(text, |n| n > 0.0 && n <= 1.0, "above 0, up to 1")
}

fn factor(text: &str) -> Result<f64, String> {
    number(text, |n| n > 0.0 && n <= 100.0, "above 0, up to 100")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        generate: Generate,
    }

    #[test]
    fn numbers_that_choose_nothing_sensible_are_refused() {
        for typed in [
            ["--temp", "-1"],
            ["--temp", "NaN"],
            ["--top-p", "7"],
            ["--top-p", "0"],
            ["--repetition-penalty", "0"],
            ["--repetition-penalty", "inf"],
        ] {
            let error = Alone::try_parse_from(std::iter::once("x").chain(typed)).err();
            assert!(
                error.unwrap().to_string().contains("not a number"),
                "{typed:?}"
            );
        }
    }

    #[test]
    fn what_is_passed_on_is_what_was_typed() {
        for typed in [
            vec![],
            vec![
                "-p",
                "-5 is --what?",
                "-n",
                "7",
                "--temp",
                "0.25",
                "--top-p",
                "0.9",
                "--top-k",
                "40",
                "--seed",
                "3",
                "--raw",
                "--json",
            ],
            vec![
                "--prompt", "", "--system", "a b", "--stop", "x", "--stop", "-y=z", "--ctx", "9",
                "--dtype", "f32", "--device", "cuda:1",
            ],
            vec![
                "--listen",
                "127.0.0.1:0",
                "--queue",
                "3",
                "--name",
                "n",
                "--readers",
                "2",
            ],
            vec!["--ignore-end", "--repetition-penalty", "1.1"],
        ] {
            let first = Alone::try_parse_from(std::iter::once("x").chain(typed.iter().copied()))
                .unwrap()
                .generate;
            let again = Alone::try_parse_from(
                std::iter::once(OsString::from("x")).chain(first.arguments()),
            )
            .unwrap()
            .generate;
            assert_eq!(first, again, "{typed:?}");
        }
    }
}
