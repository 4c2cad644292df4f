//! The first bytes of a blob that nobody has seen, against one ranged request over a fresh connection.

use std::fs::File;
use std::time::Duration;

use crate::Bench;
use crate::common::models::Model;
use crate::common::mount::{self, Mount};
use crate::common::servers::Place;
use crate::common::table::{Bar, Table, Unit, median};
use crate::common::{either_first, seconds};
use crate::peers::curl_range;
use crate::readers::ranges;

/// Bytes that are wanted first.
const LENGTH: u64 = 64 << 10;

/// One figure a round, the median over the blobs: from a server on this machine, and from one at a distance.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let size = bench.options.scaled(512 << 20, 64 << 20);
    let model = Model::safetensors(&bench.dir, "shards", 16, size);
    for place in [Place::Loopback, Place::Distant] {
        measure_at(place, &model, bench, table);
    }
}

fn measure_at(place: Place, model: &Model, bench: &Bench, table: &mut Table) {
    let dir = &bench.dir;
    let server = bench.serve(model, place);
    let place = place.name();
    for _ in bench.rounds("first") {
        bench.settle();
        mount::forget(dir);
        let mount = Mount::start(&server, model, dir, &[]);
        // An engine lists the directory before it opens files.
        for blob in &model.blobs {
            std::fs::metadata(mount.file(&blob.name)).unwrap();
        }
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        for (turn, blob) in model.blobs.iter().enumerate() {
            let url = format!("http://{}{}", server.address, model.path(blob));
            let path = mount.file(&blob.name);
            let (curl, mounted) = either_first(
                turn,
                || curl_range(&url, LENGTH),
                || seconds(|| ranges(&File::open(&path).unwrap(), &[(0, LENGTH)])),
            );
            theirs.push(curl);
            ours.push(mounted);
            // Whatever the mount still does for this one does not belong to the next.
            std::thread::sleep(Duration::from_millis(50));
        }
        let (curl, mounted) = (median(&theirs), median(&ours));
        let what = "first 64 KiB of an unseen blob, time ÷ one curl range";
        table.ratio(place, what, Bar::at_most(1.5), mounted / curl);
        let unit = Unit::Milliseconds;
        table.add(unit, place, "first 64 KiB of an unseen blob", mounted * 1e3);
        table.add(
            unit,
            place,
            "one curl range of 64 KiB, fresh connection",
            curl * 1e3,
        );
        mount.stop();
    }
    mount::forget(dir);
}
