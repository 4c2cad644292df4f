//! A weight file inside an uncompressed tar layer. The kernel cannot be handed a file that begins in the middle of another, so there is
//! no passthrough for it: the daemon answers each first read, and the kernel keeps what it got.

use std::fs::File;

use crate::Bench;
use crate::cold::Cold;
use crate::common::models::Model;
use crate::common::mount::{self, Mount};
use crate::common::servers::Place;
use crate::common::table::{Bar, Table, Unit};
use crate::common::{curl, either_first, in_turn, seconds};
use crate::readers::WAYS;

const NAME: &str = "model.safetensors";
const TURNS: usize = 5;

/// Cold against the wire, warm against the same file on the disk.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let (dir, place) = (&bench.dir, Place::Loopback.name());
    let size = bench.options.scaled(512 << 20, 128 << 20);
    let model = Model::in_a_tar(dir, "tarred", size);
    let server = bench.serve(&model, Place::Loopback);
    for round in bench.rounds("tar") {
        let (mut wire, mut ours) = (0.0, 0.0);
        for is_ours in in_turn(round, &[false, true]) {
            bench.settle();
            if is_ours {
                let cold = Cold::measure(&server, &model, dir, NAME, WAYS[0].1);
                cold.add_costs(table, place, "in a tar, cold read()", size, [Bar::NONE; 2]);
                ours = cold.last_byte;
            } else {
                wire = curl(&server, &model, dir);
                table.add(Unit::Seconds, place, "the tar, curl x4 to files", wire);
            }
        }
        let what = "in a tar, cold read(), speed ÷ curl x4 to files";
        table.ratio(place, what, Bar::NONE, wire / ours);
    }
    let mount = Mount::start(&server, &model, dir, &[]);
    let native = File::open(model.plain().join(NAME)).unwrap();
    let file = File::open(mount.file(NAME)).unwrap();
    for (way, read) in &WAYS[..2] {
        read(&file);
        mount.wait_until_verified(NAME);
        read(&native);
        read(&file);
        for turn in 0..TURNS {
            let (disk, mounted) = either_first(
                turn,
                || seconds(|| read(&native)),
                || seconds(|| read(&file)),
            );
            let what = format!("in a tar, warm {way}, no passthrough possible, speed ÷ native");
            table.ratio("disk", &what, Bar::NONE, disk / mounted);
        }
    }
    drop(file);
    mount.stop();
    mount::forget(dir);
}
