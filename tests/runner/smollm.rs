//! A published chat model from end to end: out of its package, into a registry, through a mount, to the tokens that transformers has.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::gguf;
use crate::support::mount::{Mount, ocifs};
use crate::support::process::{Output, run_command};
use crate::support::python::{environment, python};
use crate::support::registry::Registry;
use crate::support::{heavy, scratch};

/// Unoptimised inner loops on a loaded machine.
const LONG: Duration = Duration::from_secs(900);

const PROMPT: &str = "The capital of France is";
const COUNT: &str = "24";
/// What transformers 5.17 generates then, greedily, in f32.
const TOKENS: [u32; 24] = [
    7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33,
    34, 42, 33,
];

/// SmolLM2-135M-Instruct as a model directory with f16 weights in two files. Made once a run.
pub fn smollm() -> &'static Path {
    static MADE: OnceLock<TempDir> = OnceLock::new();
    let dir = MADE.get_or_init(|| {
        let dir = scratch("smollm");
        gguf::convert(&gguf::source(&environment()), dir.path(), "F16", 2);
        dir
    });
    dir.path()
}

pub fn with_runner(mut command: Command) -> Command {
    command.env("OCIFS_RUN", env!("CARGO_BIN_EXE_ocifs-run"));
    command
}

fn run(args: &[&str], cache: &str) -> Output {
    let mut all = vec!["run"];
    all.extend(args);
    if !cache.is_empty() {
        all.extend(["--cache-dir", cache]);
    }
    run_command(&mut with_runner(ocifs(all)), LONG)
}

#[test]
fn a_published_model_says_what_transformers_says() {
    let _alone = heavy();
    let registry = Registry::open();
    let reference = format!("{}/org/smollm2:v1", registry.host());
    run_command(
        &mut ocifs(["push", smollm().to_str().unwrap(), &reference]),
        LONG,
    )
    .ok();
    let cache = scratch("cache");
    let cache_dir = cache.path().to_str().unwrap();

    // Through a mount of its own, which is gone afterwards.
    let before = std::fs::read_to_string("/proc/self/mounts")
        .unwrap()
        .matches("ocifs")
        .count();
    let out = run(
        &[
            &reference, "--raw", "-p", PROMPT, "-n", COUNT, "--temp", "0", "--json",
        ],
        cache_dir,
    );
    let document: Value = serde_json::from_str(&out.ok()).unwrap();
    let wanted = python("greedy.py", [smollm().to_str().unwrap(), PROMPT, COUNT]).ok();
    let wanted: Value = serde_json::from_str(&wanted).unwrap();
    assert_eq!(document["promptTokens"], wanted["prompt"]);
    assert_eq!(document["tokens"], wanted["tokens"], "{document}");
    assert_eq!(document["tokens"], serde_json::json!(TOKENS));
    assert!(
        document["text"].as_str().unwrap().starts_with(" Paris."),
        "{document}"
    );
    assert!(
        document["loadBytes"].as_u64().unwrap() > 200_000_000
            && document["tokensPerSecond"].as_f64().unwrap() > 0.0
    );
    let after = std::fs::read_to_string("/proc/self/mounts")
        .unwrap()
        .matches("ocifs")
        .count();
    assert!(after <= before, "a mount was left");

    // Through one that is there: the text is streamed, the figures go to stderr.
    let mount = Mount::start::<&str>(cache.path(), []);
    let out = run(
        &[&reference, "--raw", "-p", PROMPT, "-n", "2", "--temp", "0"],
        "",
    );
    assert_eq!(out.ok(), " Paris.\n");
    let path = mount.path(&reference);
    let out = run(
        &[
            path.to_str().unwrap(),
            "--raw",
            "-p",
            PROMPT,
            "-n",
            "2",
            "--temp",
            "0",
            "--dtype",
            "f32",
        ],
        "",
    );
    assert_eq!(out.ok(), " Paris.\n");
    mount.unmount();
}

#[test]
fn a_chat_template_is_applied_unless_it_is_not_wanted() {
    let _alone = heavy();
    let dir = smollm().to_str().unwrap();
    let prompt = |args: &[&str]| -> usize {
        let mut all = vec![dir, "-p", "hi", "-n", "1", "--json"];
        all.extend(args);
        let document: Value = serde_json::from_str(&run(&all, "").ok()).unwrap();
        document["promptTokens"].as_array().unwrap().len()
    };
    let (raw, chat) = (prompt(&["--raw"]), prompt(&[]));
    assert!(raw <= 2 && chat > raw + 5, "{raw} {chat}");
    assert!(prompt(&["--system", "Talk like a pirate, and nothing else."]) != chat);
}

#[test]
fn a_seed_gives_the_same_text_and_messages_are_clear() {
    let _alone = heavy();
    let dir = smollm().to_str().unwrap();
    let text = |seed: &str| {
        run(
            &[
                dir, "--raw", "-p", "Once", "-n", "6", "--temp", "1.5", "--seed", seed,
            ],
            "",
        )
        .ok()
    };
    assert_eq!(text("7"), text("7"));
    assert_ne!(text("7"), text("8"));
    for (args, said) in [
        (vec![dir, "-p", "hi", "--ctx", "99999999"], "positions"),
        (
            vec![dir, "-p", "hi", "--device", "cuda:0"],
            "GPU 0 cannot be used",
        ),
        (vec![dir, "-p", "hi", "--device", "tpu"], "auto, cpu, cuda"),
        (vec!["/nowhere/at/all", "-p", "hi"], "/nowhere/at/all"),
    ] {
        let error = run(&args, "").failed();
        assert!(error.contains(said), "{args:?}: {error}");
    }
    let mut command = ocifs(["run", dir, "-p", "hi"]);
    command.env("OCIFS_RUN", "/nowhere/ocifs-run");
    let error = run_command(&mut command, LONG).failed();
    assert!(error.contains("/nowhere/ocifs-run"), "{error}");
}
