//! A header and a hundred places of a large blob: what is pulled for them, and how long they take.

use std::fs::File;
use std::time::{Duration, Instant};

use crate::common::mount::{self, Mount};
use crate::common::servers::Place;
use crate::common::table::{Bar, Table, Unit};
use crate::common::{in_turn, seconds};
use crate::readers::{places, ranges};
use crate::{Bench, http};

/// How an engine that looks at a few tensors is set up: the row's name, the flags, and the bar for pulled ÷ wanted.
const MODES: [(&str, &[&str], f64); 2] = [
    ("--prefetch none", &["--prefetch", "none"], 1.5),
    ("default", &[], 2.0),
];

/// Against the same ranges over one raw connection, to a server on this machine and to one at a distance.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    // The link counts bytes while they are under way, which no access log does.
    for place in [Place::Counted, Place::Distant] {
        measure_at(place, bench, table);
    }
}

fn measure_at(place: Place, bench: &Bench, table: &mut Table) {
    let (model, dir) = (bench.single(), &bench.dir);
    let blob = &model.blobs[0];
    let server = bench.serve(model, place);
    let mut wanted = vec![(0, 1 << 20)];
    wanted.extend(places(blob.size, 64 << 10, 100));
    let bytes: u64 = wanted.iter().map(|(_, length)| length).sum();
    let turns: Vec<Option<usize>> = [None, Some(0), Some(1)].into();
    for round in bench.rounds("sparse") {
        let mut raw = 0.0;
        let mut ours = [0.0; MODES.len()];
        for turn in in_turn(round, &turns) {
            bench.settle();
            let Some(mode) = turn else {
                let job = || http::ranges(&server.address, &model.path(blob), &wanted);
                raw = seconds(job);
                continue;
            };
            let flags = MODES[mode].1;
            mount::forget(dir);
            let mount = Mount::start(&server, model, dir, flags);
            let before = (place == Place::Counted).then(|| (server.crossed(), server.traffic()));
            let start = Instant::now();
            ours[mode] = seconds(|| ranges(&File::open(mount.file(&blob.name)).unwrap(), &wanted));
            if let Some((crossed, traffic)) = before {
                // What comes in the background counts as well: all of the first second.
                std::thread::sleep(Duration::from_secs(1).saturating_sub(start.elapsed()));
                let pulled = server.crossed() - crossed;
                let requests = server.traffic().since(traffic).requests;
                add_pulled(table, mode, pulled as f64, bytes as f64, requests);
            }
            mount.stop();
        }
        let place = place.name();
        table.add(
            Unit::Milliseconds,
            place,
            "1 MiB + 100 x 64 KiB, raw keep-alive HTTP",
            raw * 1e3,
        );
        for (mode, seconds) in ours.into_iter().enumerate() {
            let name = MODES[mode].0;
            let what = format!("1 MiB + 100 x 64 KiB, time ÷ raw keep-alive HTTP, {name}");
            table.ratio(place, &what, Bar::at_most(2.0), seconds / raw);
            let what = format!("1 MiB + 100 x 64 KiB, {name}");
            table.add(Unit::Milliseconds, place, &what, seconds * 1e3);
        }
    }
    mount::forget(dir);
}

/// What a mode pulled within a second for bytes that were wanted, and by how many requests.
fn add_pulled(table: &mut Table, mode: usize, pulled: f64, wanted: f64, requests: u64) {
    let (place, (name, _, bar)) = (Place::Counted.name(), MODES[mode]);
    let what = format!("1 MiB + 100 x 64 KiB, pulled in 1 s ÷ wanted, {name}");
    table.ratio(place, &what, Bar::at_most(bar), pulled / wanted);
    let what = format!("1 MiB + 100 x 64 KiB, {name}");
    table.add(Unit::Requests, place, &what, requests as f64);
    table.add(Unit::PulledMib, place, &what, pulled / f64::from(1 << 20));
}
