//! Many readers of many blobs with a small memory budget.

use std::fs::File;

use crate::Bench;
use crate::common::models::Model;
use crate::common::mount::{self, Mount};
use crate::common::seconds;
use crate::common::servers::Place;
use crate::common::table::{Bar, Table, Unit};
use crate::readers::sequential;

const BLOBS: usize = 16;
const READERS_OF_EACH: usize = 4;
const BUDGET: u64 = 128 << 20;

/// The daemon's anonymous memory beyond the budget, with a cache that holds everything and with one that does not.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let (dir, place) = (&bench.dir, Place::Loopback.name());
    let size = bench.options.scaled(1 << 30, 256 << 20);
    let model = Model::safetensors(dir, "shards", BLOBS, size);
    let server = bench.serve(&model, Place::Loopback);
    let budget = format!("{}MiB", BUDGET >> 20);
    let mut flags = vec![];
    if mount::knows("--memory") {
        flags = vec!["--memory", &budget];
    } else {
        table.leave_out(
            "the memory budget of 128 MiB",
            "`ocifs mount` has no --memory; the default one was in force",
        );
    }
    let quarter = (size / 4).to_string();
    for _ in bench.rounds("memory") {
        for (name, limit) in [
            ("roomy cache", None),
            ("cache of a quarter", Some(&quarter)),
        ] {
            bench.settle();
            mount::forget(dir);
            let mut flags = flags.clone();
            if let Some(limit) = limit {
                flags.extend(["--cache-size", limit]);
            }
            let mount = Mount::start(&server, &model, dir, &flags);
            let before = server.traffic();
            let seconds = seconds(|| {
                std::thread::scope(|scope| {
                    for reader in 0..BLOBS * READERS_OF_EACH {
                        let blob = &model.blobs[reader % BLOBS];
                        let path = mount.file(&blob.name);
                        scope.spawn(move || {
                            assert_eq!(sequential(&File::open(path).unwrap()), blob.size);
                        });
                    }
                });
            });
            let peak = mount.peak_anonymous();
            let pulled = server.traffic().since(before).bytes;
            mount.stop();
            mount::forget(dir);
            let what = format!("64 readers on 16 blobs, {name}");
            let mib = |bytes: f64| bytes / f64::from(1 << 20);
            let above = mib(peak as f64 - BUDGET as f64);
            let row = format!("{what}, beyond the budget of 128 MiB");
            table.add_with_bar(Unit::AnonymousMib, place, &row, Bar::at_most(64.0), above);
            table.add(Unit::AnonymousMib, place, &what, mib(peak as f64));
            table.add(Unit::PulledMib, place, &what, mib(pulled as f64));
            table.add(Unit::Seconds, place, &what, seconds);
        }
    }
}
