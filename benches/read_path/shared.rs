//! Several processes that map the same cold blob over the limited link, as the ranks of a tensor-parallel engine do.

use crate::Bench;
use crate::common::in_turn;
use crate::common::mount::{self, Mount};
use crate::common::servers::Place;
use crate::common::table::{Bar, Table, Unit};
use crate::readers::processes;

const RANKS: usize = 8;

/// Their time beside that of one, and what the server sent for them.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let (model, dir) = (bench.single(), &bench.dir);
    let (blob, place) = (&model.blobs[0], Place::Limited.name());
    let server = bench.serve(model, Place::Limited);
    for round in bench.rounds("shared") {
        let (mut one, mut all) = (0.0, 0.0);
        for count in in_turn(round, &[1, RANKS]) {
            bench.settle();
            mount::forget(dir);
            let mount = Mount::start(&server, model, dir, &[]);
            let before = server.traffic();
            let seconds = processes(&mount.file(&blob.name), count);
            mount.wait_until_verified(&blob.name);
            let pulled = server.traffic().since(before).bytes;
            mount.stop();
            mount::forget(dir);
            let what = format!("cold mmap by {count} processes, last byte of the last");
            table.add(Unit::Seconds, place, &what, seconds);
            if count == 1 {
                one = seconds;
            } else {
                all = seconds;
                let what = format!("cold mmap by {RANKS} processes, bytes from the server ÷ size");
                let ratio = pulled as f64 / blob.size as f64;
                table.ratio(place, &what, Bar::at_most(1.0), ratio);
            }
        }
        let what = format!("cold mmap by {RANKS} processes, time ÷ by one");
        table.ratio(place, &what, Bar::at_most(1.1), all / one);
    }
}
