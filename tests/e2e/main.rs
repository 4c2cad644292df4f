//! ocifs from end to end: the real binary, real mounts, real registries and clients that ocifs did not write.
//!
//! `tests/run.sh` installs what these tests need and runs them; on a machine that lacks something they fail and say what.
//! `OCIFS_TEST_SCALE=full` makes the numbers larger. Every test starts its own servers on free loopback ports, in its
//! own temporary directories, and ends by process id what it started, also when it panics.

// Helpers outside of `#[test]` functions are test code too.
#![allow(clippy::unwrap_used, clippy::print_stderr)]
// A test binary has no public interface, and its guards are not worth printing.
#![allow(unreachable_pub, missing_debug_implementations)]

mod support;

mod any_fault;
mod behaviours;
mod cache;
mod crash;
mod credentials;
mod demo;
mod disk;
mod errno;
mod fio;
mod formats;
mod helpers;
mod hostile;
mod killed;
mod lies;
mod loaders;
mod login;
mod metadata;
mod mirrors;
mod naming;
mod network;
mod observing;
mod offline;
mod packages;
mod passthrough;
mod proxies;
mod push;
mod ranges;
mod recipes;
mod retries;
mod secrets;
mod serve;
mod sharing;
mod systemd;
mod takeover;
mod takeover_away;
mod takeover_ends;
mod takeover_manager;
mod takeover_stale;
mod tools;
mod tree;
mod trouble;
mod users;
