//! The concurrent core under every order of its steps that chance finds: a model check with `shuttle`.
//!
//! The blob core and the cache are compiled here once more from their own files, with the locks, atomics, tasks and timers of
//! `base::sync` and `base::rt` exchanged for those that a scheduler of ours drives: it decides at each of them who goes on, and a
//! reader that nobody wakes is a deadlock that it reports. The cache works on real files; the registry is a few lines.
//!
//! A few seeds are tried, the same ones each time; `OCIFS_MODEL_SEEDS=100` tries so many, `OCIFS_TEST_SCALE=full` fifty.
//! `SHUTTLE_RANDOM_SEED`, as a failure prints it, repeats a schedule.

#![allow(clippy::unwrap_used, clippy::print_stdout)]
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    unused_imports
)]

#[path = "../../src/blob/mod.rs"]
mod blob;
#[path = "../../src/cache/mod.rs"]
mod cache;

mod base;
mod registry;
mod scenarios;

fn main() {
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    for (name, scenario) in scenarios::ALL {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())) {
            scenarios::check(name, scenario);
        }
    }
}
