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
//! Servers are nginx on loopback, docker-registry on loopback, and nginx behind a pair of virtual interfaces with a token bucket of
//! 4 Gbit/s in a network namespace of its own.
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
mod engine;
mod first;
mod http;
mod machine;
mod memory;
mod metadata;
mod models;
mod mount;
mod options;
mod peers;
mod readers;
mod sealed;
mod servers;
mod shared;
mod sparse;
mod table;
mod tars;

use std::cell::OnceCell;
use std::fs::{self, File};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use models::Model;
use options::Options;
use rustix::fs::{FlockOperation, flock};
use servers::{Place, Server};
use table::Table;

/// A group of rows: its name, what it is about, and what measures it.
type Group = (&'static str, &'static str, fn(&Bench, &mut Table));

const GROUPS: [Group; 11] = [
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
        let rounds = self.options.rounds;
        (1..=rounds).inspect(move |round| eprintln!("{group}: round {round} of {rounds}"))
    }

    /// Lets the machine come to rest before somebody's turn.
    fn settle(&self) {
        machine::settle(&self.dir, self.options.scaled(200, 50));
    }
}

/// The directory of models, caches and outputs, for one run at a time. It is emptied at the end, and before the next begin if a run
/// was killed.
struct Workplace {
    dir: PathBuf,
    _lock: File,
}

impl Workplace {
    fn take() -> Option<Self> {
        let below = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let lock = File::create(below.join("read_path.lock")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
        let dir = below.join("read_path");
        for point in ["models", "peer"] {
            let mut umount = Command::new("umount");
            umount.arg("-l").arg(dir.join(point)).stderr(Stdio::null());
            let _ = umount.status();
        }
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Some(Self { dir, _lock: lock })
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The contestants of a round in their order: in the opposite one in every other round.
fn in_turn<T: Clone>(round: usize, contestants: &[T]) -> Vec<T> {
    let mut order = contestants.to_vec();
    if round.is_multiple_of(2) {
        order.reverse();
    }
    order
}

fn main() -> ExitCode {
    if readers::is_reader_process() {
        return ExitCode::SUCCESS;
    }
    let known: Vec<(&str, &str)> = GROUPS
        .iter()
        .map(|(name, about, _)| (*name, *about))
        .collect();
    let options = match Options::parse(std::env::args().skip(1), &known) {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "the benchmark mounts, makes network namespaces and empties caches: it needs root"
        );
        return ExitCode::from(2);
    }
    let Some(workplace) = Workplace::take() else {
        eprintln!("another run of the benchmark is under way");
        return ExitCode::FAILURE;
    };
    machine::print_header(&workplace.dir, &options);
    let bench = Bench {
        options,
        dir: workplace.dir.clone(),
        single: OnceCell::new(),
    };
    let start = Instant::now();
    let mut table = Table::default();
    let mut broken = false;
    for (name, _, measure) in GROUPS {
        if !bench.options.wants(name) {
            continue;
        }
        // What the other groups have measured is worth printing all the same.
        let begin = Instant::now();
        let job = AssertUnwindSafe(|| measure(&bench, &mut table));
        if std::panic::catch_unwind(job).is_err() {
            table.leave_out(
                &format!("group {name}"),
                "broke off; the reason is on stderr",
            );
            broken = true;
        }
        eprintln!("{name}: {:.0} s", begin.elapsed().as_secs_f64());
    }
    if bench.options.markdown {
        table.print_markdown();
    } else {
        table.print();
    }
    println!("{:.0} s in all", start.elapsed().as_secs_f64());
    if broken {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
