//! How fast bytes come through a mount, as ratios to what the wire and the disk give in the same run.
//!
//! `cargo bench --bench read_path` needs root, nginx, curl and iproute2 (Debian: `nginx-light curl iproute2`), and for the row of
//! the old loader the Python environment of `tests/setup.sh`. `-- --quick` takes a smaller file and one round.
//!
//! Peers and ocifs take turns within each round, so that a busy machine slows both; figures are medians over the
//! rounds with the lowest and highest. The limited link is a pair of virtual interfaces with a token bucket of 4 Gbit/s between
//! two network namespaces.

// A benchmark prints, and stops at the first thing that is missing.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    missing_docs
)]

mod measure;
mod servers;

use std::fs::{self, File};
use std::path::Path;
use std::time::Instant;

use measure::{Mount, Row, Rows, curl, mapped, old_loader, random, sequential};
use servers::{Origin, Place};

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (size, rounds) = if quick { (256 << 20, 1) } else { (1 << 30, 3) };
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let origin = Origin::make(dir.path(), size);
    println!(
        "{} MiB, {rounds} rounds, {} cores",
        size >> 20,
        std::thread::available_parallelism().unwrap()
    );
    let mut rows = Rows::default();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for place in [Place::Loopback, Place::LimitedLink] {
            cold(&origin, place, dir.path(), &mut rows);
        }
        sealed(&origin, dir.path(), &mut rows);
        sparse(&origin, dir.path(), &mut rows);
    }
    rows.print();
}

/// The first read of a blob that nobody has.
fn cold(origin: &Origin, place: Place, dir: &Path, rows: &mut Rows) {
    let server = origin.serve(place);
    let wire = curl(&server, dir, 4);
    rows.add(Row::new(place, "curl x4 to files", "seconds"), wire);
    for (name, read) in [("read()", sequential as fn(&File) -> u64), ("mmap", mapped)] {
        let cache = dir.join("cache");
        let mount = Mount::start(&server, &cache, &[]);
        let start = Instant::now();
        let file = File::open(mount.file()).unwrap();
        assert_eq!(read(&file), origin.size());
        let seconds = start.elapsed().as_secs_f64();
        mount.wait_until_verified();
        let verified = start.elapsed().as_secs_f64();
        let gigabytes = origin.size() as f64 / 1e9;
        rows.add(
            Row::new(place, &format!("cold {name} ÷ curl x4, speed"), "ratio"),
            wire / seconds,
        );
        rows.add(
            Row::new(place, &format!("cold {name}, last byte"), "seconds"),
            seconds,
        );
        rows.add(
            Row::new(
                place,
                &format!("cold {name}, verified and sealed"),
                "seconds",
            ),
            verified,
        );
        rows.add(
            Row::new(place, &format!("cold {name}, daemon"), "core-s/GB"),
            mount.processor() / gigabytes,
        );
        rows.add(
            Row::new(place, &format!("cold {name}, daemon's peak memory"), "MiB"),
            mount.peak_memory() as f64 / f64::from(1 << 20),
        );
        drop(file);
        mount.stop();
        fs::remove_dir_all(&cache).unwrap();
    }
    if let Some(loader) = old_loader(&server, dir) {
        rows.add(Row::new(place, "requests, 8 KiB pieces", "seconds"), loader);
    }
}

/// Reads of a blob that is complete, against the same file on the disk, both in the page cache.
fn sealed(origin: &Origin, dir: &Path, rows: &mut Rows) {
    let server = origin.serve(Place::Loopback);
    let cache = dir.join("cache");
    let mount = Mount::start(&server, &cache, &[]);
    sequential(&File::open(mount.file()).unwrap());
    mount.wait_until_verified();
    mount.stop();
    for (way, flags) in [
        ("passthrough", &[][..]),
        ("through the daemon", &["-o", "passthrough=no"][..]),
    ] {
        let mount = Mount::start(&server, &cache, flags);
        let native = File::open(origin.sealed_in(&cache)).unwrap();
        let ours = File::open(mount.file()).unwrap();
        for (name, read) in [
            ("read()", sequential as fn(&File) -> u64),
            ("mmap", mapped),
            ("random 64 KiB", |file| random(file, 64 << 10, 4000)),
            ("random 4 KiB", |file| random(file, 4 << 10, 40_000)),
        ] {
            let time = |file: &File| {
                let start = Instant::now();
                read(file);
                start.elapsed().as_secs_f64()
            };
            // Once each before anything counts.
            time(&native);
            time(&ours);
            let (disk, mounted) = (time(&native), time(&ours));
            rows.add(
                Row::new(
                    Place::Loopback,
                    &format!("sealed {name}, {way} ÷ native, speed"),
                    "ratio",
                ),
                disk / mounted,
            );
        }
        drop(ours);
        mount.stop();
    }
    fs::remove_dir_all(&cache).unwrap();
}

/// A header and a hundred places: what is pulled beside what is wanted.
fn sparse(origin: &Origin, dir: &Path, rows: &mut Rows) {
    for (name, flags) in [
        ("--prefetch none", &["--prefetch", "none"][..]),
        ("default", &[][..]),
    ] {
        let server = origin.serve(Place::Loopback);
        let cache = dir.join("cache");
        let mount = Mount::start(&server, &cache, flags);
        let file = File::open(mount.file()).unwrap();
        let before = server.sent();
        let wanted = measure::header(&file) + random(&file, 64 << 10, 100);
        let pulled = server.sent() - before;
        rows.add(
            Row::new(
                Place::Loopback,
                &format!("1 MiB + 100 random 64 KiB, pulled ÷ wanted, {name}"),
                "ratio",
            ),
            pulled as f64 / wanted as f64,
        );
        drop(file);
        mount.stop();
        fs::remove_dir_all(&cache).unwrap();
    }
}
