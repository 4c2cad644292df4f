//! The bundled runner beside what else generates text on a CPU, and how fast it loads through a mount: ratios within the same run, of
//! the same files.
//!
//! ```text
//! benches/setup.sh runner                             once: the peers
//! cargo bench --features runner --bench runner        all groups, 5 rounds
//! cargo bench --features runner --bench runner -- --quick
//! cargo bench --features runner --bench runner -- --markdown load cold
//! ```
//!
//! It needs root and what `tests/setup.sh` and `benches/setup.sh` install. A peer that is missing is named at the end of the table.
//!
//! # What is compared with what
//!
//! - **Generating**: SmolLM2-135M-Instruct in bf16, one file for everybody but llama.cpp, which has the same numbers as a GGUF file.
//!   ocifs-run keeps the weights in bf16 and computes in f32, as llama.cpp does; transformers and candle-transformers get the types that their
//!   rows name. All cores for each, the likeliest token for all, everyone warmed up, and one after the other in turn.
//! - **Loading**: a Llama of 0.6 billion random parameters, from a mount whose blob is sealed beside the same file past the mount, and from a
//!   mount with an empty cache behind a link of 4 Gbit/s, beside four `curl`s (the wire) and candle's load from a memory map.
//!
//! - **Choosing**: at how many positions of real texts the likeliest token is that of transformers in f32, for us and for transformers in bf16.
//!
//! Figures are as each program has measured itself: what comes before, starting Python for instance, does not count.

// A benchmark prints, and breaks a group off at the first thing that is wrong.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    missing_docs
)]

mod choice;
// The other benchmark uses all of it.
#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
#[allow(unreachable_pub)]
#[path = "../../tests/runner/gguf.rs"]
mod gguf;
mod loads;
mod peers;
mod speed;
mod synthetic;
#[allow(dead_code, unreachable_pub, missing_debug_implementations)]
#[path = "../../tests/runner/weights.rs"]
mod weights;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use common::options::Options;
use common::{Group, Plan, environment};

const GROUPS: [Group<Bench>; 4] = [
    (
        "choice",
        "how often rounding changes the likeliest token",
        choice::measure,
    ),
    (
        "speed",
        "a prompt of 512 tokens, and tokens after a short one",
        speed::measure,
    ),
    (
        "load",
        "a model's load from a sealed mount, against the file itself",
        loads::sealed,
    ),
    (
        "cold",
        "a model's first load over a link of 4 Gbit/s",
        loads::cold,
    ),
];

/// What groups have in common.
struct Bench {
    options: Options,
    dir: PathBuf,
    /// SmolLM2-135M-Instruct with weights of bf16: the directory, and a GGUF file with the same numbers beside it.
    smollm: PathBuf,
}

impl Bench {
    fn begin(options: Options, dir: &Path) -> Self {
        let smollm = dir.join("smollm2");
        std::fs::create_dir_all(&smollm).unwrap();
        let source = gguf::source(&environment("OCIFS_TEST_ENV", "ocifs-tests"));
        gguf::convert(&source, &smollm, "BF16", 1);
        Self {
            options,
            dir: dir.to_owned(),
            smollm,
        }
    }
}

fn main() -> ExitCode {
    let plan = Plan {
        name: "runner",
        programs: &[("nginx", "-v"), ("curl", "--version")],
        groups: &GROUPS,
        places: "of",
    };
    common::run(&plan, Bench::begin)
}
