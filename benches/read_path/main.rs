//! How fast bytes come through a mount, as ratios to what the wire, the disk and other file systems give in the same run.
//!
//! ```text
//! cargo bench --bench read_path                       all groups, 5 rounds
//! cargo bench --bench read_path -- --quick            small files, one round: a minute
//! cargo bench --bench read_path -- cold --rounds 3    one group
//! cargo bench --bench read_path -- --markdown         the rows that have a bar, as the README shows them
//! ```
//!
//! It needs root; `benches/setup.sh` installs the servers and peers on Debian. A peer that is missing is named at the end of the
//! table, with the rows that it would have given.
//!
//! # What is compared with what
//!
//! - **The wire** is four `curl` processes that write a quarter of the blob each to files beside the cache: what a pull with
//!   parallel ranges reaches with the same server, the same cores and the same disk.
//! - **The disk** is the same sealed file, read past the mount; so both sides have the same pages in memory.
//! - **Today** is the loop of engines' own loaders (`requests`, pieces of 8 KiB), rclone's mount and nbdkit's curl plug-in under
//!   nbdfuse.
//!
//! Every figure is one turn. Contestants of a group take turns within each round, in the opposite order in every other round, and
//! ratios are of two turns of the same round; the table has their medians with the lowest and the highest. Between turns outputs
//! are deleted, the disk is synchronised, and what the server sends is in the page cache for everybody. Groups make their models
//! when they begin and delete them when they end, so that the page cache never holds more than a few gigabytes.
//!
//! Servers are nginx on loopback, docker-registry on loopback, nginx behind a pair of virtual interfaces with a token bucket of
//! 4 Gbit/s in a network namespace of its own, and nginx behind a relay that holds every byte back for a millisecond.
//!
//! A missed bar is printed and is no failure: figures depend on the machine.

// A benchmark prints, and breaks a group off at the first thing that is wrong.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    missing_docs
)]

mod cold;
// The other benchmark uses all of it.
#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
mod engine;
mod first;
mod http;
mod memory;
mod metadata;
mod peers;
mod readers;
mod sealed;
mod shared;
mod sparse;
mod tars;

use std::cell::OnceCell;
use std::path::PathBuf;
use std::process::ExitCode;

use common::models::Model;
use common::options::Options;
use common::servers::{Place, Server};
use common::{Group, Plan, machine};

const GROUPS: [Group<Bench>; 11] = [
    (
        "cold",
        "first read of a blob, nginx on loopback, and the peers",
        cold::loopback,
    ),
    (
        "link",
        "first read of a blob over a link of 4 Gbit/s",
        cold::limited,
    ),
    (
        "registry",
        "first read of a blob from docker-registry",
        cold::registry,
    ),
    (
        "shared",
        "8 processes that map one cold blob",
        shared::measure,
    ),
    (
        "engine",
        "a cold sharded model loaded with safetensors in Python",
        engine::measure,
    ),
    (
        "sealed",
        "reads of a blob that is complete, against the file itself",
        sealed::measure,
    ),
    (
        "first",
        "the first bytes of blobs that nobody has seen",
        first::measure,
    ),
    (
        "sparse",
        "a header and a hundred places of a large blob",
        sparse::measure,
    ),
    (
        "memory",
        "64 readers of 16 blobs, with a small budget",
        memory::measure,
    ),
    (
        "metadata",
        "find over a model of 10,000 files",
        metadata::measure,
    ),
    (
        "tar",
        "a file inside an uncompressed tar layer",
        tars::measure,
    ),
];

/// What groups have in common.
struct Bench {
    options: Options,
    dir: PathBuf,
    single: OnceCell<Model>,
}

impl Bench {
    /// The model of one large file, made when it is first wanted.
    fn single(&self) -> &Model {
        let size = self.options.scaled(1 << 30, 256 << 20);
        let make = || Model::safetensors(&self.dir, "single", 1, size);
        self.single.get_or_init(make)
    }

    /// nginx with a model.
    fn serve(&self, model: &Model, place: Place) -> Server {
        model.warm();
        Server::nginx(&model.www(), &self.dir, place)
    }

    /// The rounds of a group, told on stderr as they begin.
    fn rounds(&self, group: &'static str) -> impl Iterator<Item = usize> + use<> {
        self.options.turns(group)
    }

    /// Lets the machine come to rest before somebody's turn.
    fn settle(&self) {
        machine::settle(&self.dir, self.options.scaled(200, 50));
    }
}

/// What is measured beside ocifs, and what asks each for its version.
const PROGRAMS: [(&str, &str); 4] = [
    ("nginx", "-v"),
    ("curl", "--version"),
    ("rclone", "version"),
    ("nbdkit", "--version"),
];

fn main() -> ExitCode {
    if readers::is_reader_process() {
        return ExitCode::SUCCESS;
    }
    let plan = Plan {
        name: "read_path",
        programs: &PROGRAMS,
        groups: &GROUPS,
        places: "bytes from",
    };
    common::run(&plan, |options, dir| Bench {
        options,
        dir: dir.to_owned(),
        single: OnceCell::new(),
    })
}
