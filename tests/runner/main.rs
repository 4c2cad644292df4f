//! The runner against what it did not make: transformers, the safetensors crate, a published model, a registry, OpenAI's client.
//!
//! `tests/run.sh` installs what these tests need and runs them; on a machine that lacks something they fail and say what.

// Helpers outside of `#[test]` functions are test code too.
#![allow(clippy::unwrap_used, clippy::print_stderr)]
// A test binary has no public interface, and its guards are not worth printing.
#![allow(unreachable_pub, missing_debug_implementations)]

// The other test binary uses all of it.
#[allow(dead_code)]
#[path = "../e2e/support/mod.rs"]
mod support;

mod apart;
mod chat;
mod gguf;
mod goldens;
mod http;
mod loading;
mod smollm;
mod weights;
