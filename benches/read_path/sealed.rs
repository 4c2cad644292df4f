//! Reads of a blob that is complete, against the same file read past the mount.

use std::fs::File;
use std::path::Path;

use crate::Bench;
use crate::common::models::{Blob, Model};
use crate::common::mount::{self, Mount};
use crate::common::servers::{Place, Server};
use crate::common::table::{Bar, Table, Unit};
use crate::common::{either_first, seconds};
use crate::readers::{self, mapped, places, ranges, sequential};

/// A way to read a file.
trait Read: Fn(&File) -> u64 {}

impl<T: Fn(&File) -> u64> Read for T {}

/// Turns of each side within a round: these reads are short.
const TURNS: usize = 5;

/// With passthrough and without.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let (model, dir) = (bench.single(), &bench.dir);
    let blob = &model.blobs[0];
    let server = bench.serve(model, Place::Loopback);
    mount::forget(dir);
    let mount = Mount::start(&server, model, dir, &[]);
    sequential(&File::open(mount.file(&blob.name)).unwrap());
    mount.wait_until_verified(&blob.name);
    mount.stop();
    for _ in bench.rounds("sealed") {
        bench.settle();
        passed_through(&server, model, blob, dir, table);
        through_the_daemon(&server, model, blob, dir, table);
    }
    mount::forget(dir);
}

/// The kernel reads the cache's file itself.
fn passed_through(server: &Server, model: &Model, blob: &Blob, dir: &Path, table: &mut Table) {
    let large = places(blob.size, 64 << 10, 4000);
    let small = places(blob.size, 4 << 10, 40_000);
    let reads: [(&str, f64, &dyn Read); 4] = [
        ("read()", 0.97, &sequential),
        ("mmap", 0.97, &mapped),
        ("random 64 KiB", 0.92, &|file| ranges(file, &large)),
        ("random 4 KiB", 0.80, &|file| ranges(file, &small)),
    ];
    let mount = Mount::start(server, model, dir, &[]);
    let native = File::open(mount::sealed(dir, blob)).unwrap();
    let ours = File::open(mount.file(&blob.name)).unwrap();
    for (name, bar, read) in reads {
        let what = format!("sealed {name}, passthrough, speed ÷ native");
        let bar = Bar::at_least(bar).aim(1.0);
        read(&native);
        read(&ours);
        for turn in 0..TURNS {
            let (disk, mounted) = either_first(
                turn,
                || seconds(|| read(&native)),
                || seconds(|| read(&ours)),
            );
            table.ratio("disk", &what, bar, disk / mounted);
        }
    }
    drop(ours);
    mount.stop();
}

/// The daemon answers; what it has answered once, the kernel keeps.
fn through_the_daemon(server: &Server, model: &Model, blob: &Blob, dir: &Path, table: &mut Table) {
    for (name, bar, aim, read) in [
        ("read()", 0.75, 0.85, sequential as readers::Read),
        ("mmap", 0.50, 0.60, mapped),
    ] {
        let mount = Mount::start(server, model, dir, &["-o", "passthrough=no"]);
        let native = File::open(mount::sealed(dir, blob)).unwrap();
        // Every read has an open of its own, as it would have in an engine that is started again.
        let ours = || seconds(|| read(&File::open(mount.file(&blob.name)).unwrap()));
        let disk = || seconds(|| read(&native));
        let first = disk() / ours();
        let what = format!("sealed {name}, without passthrough, first read, speed ÷ native");
        table.ratio("disk", &what, Bar::NONE, first);
        let before = mount.written();
        let mut pairs = Vec::new();
        for turn in 0..TURNS {
            pairs.push(either_first(turn, disk, ours));
        }
        let replied = (mount.written() - before) as f64 / TURNS as f64;
        // Where the daemon was asked again it was not a warm read, and the figure of another row.
        let state = if replied < blob.size as f64 / 1000.0 {
            "warm"
        } else {
            "second read, NOT warm"
        };
        let what = format!("sealed {name}, without passthrough, {state}, speed ÷ native");
        for (disk, mounted) in pairs {
            let bar = Bar::at_least(bar).aim(aim);
            table.ratio("disk", &what, bar, disk / mounted);
        }
        let what = format!("sealed {name}, without passthrough, second read, sent by the daemon");
        let mib = replied / f64::from(1 << 20);
        table.add_with_bar(Unit::PulledMib, "daemon", &what, Bar::at_most(0.1), mib);
        mount.stop();
    }
}
