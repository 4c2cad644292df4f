//! What an engine does: all tensors of a sharded model, by the safetensors library, over the limited link.

use std::path::Path;

use crate::Bench;
use crate::common::models::Model;
use crate::common::mount::{self, Mount};
use crate::common::servers::Place;
use crate::common::table::{Bar, Table, Unit};
use crate::common::{curl, in_turn};
use crate::peers;

/// Maps each shard and copies each tensor out, as loading to a device does; the clock starts after the imports.
const LOAD: &str = "
import pathlib, sys, time
import torch
from safetensors import safe_open
start = time.perf_counter()
size = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob('*.safetensors')):
    with safe_open(path, framework='pt') as shard:
        for key in shard.keys():
            tensor = shard.get_tensor(key).clone()
            size += tensor.numel() * tensor.element_size()
assert size == int(sys.argv[2]), size
print(time.perf_counter() - start)
";

#[derive(Clone, Copy)]
enum Turn {
    Download,
    Warm,
    Cold,
}

/// A cold load beside the longer of a mere download and a load from the disk's page cache.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let Some(python) = peers::python() else {
        table.leave_out(
            "cold load by safetensors",
            "the Python of tests/setup.sh is missing",
        );
        return;
    };
    let (dir, place) = (&bench.dir, Place::Limited.name());
    let size = bench.options.scaled(2 << 30, 256 << 20);
    let model = Model::safetensors(dir, "sharded", 4, size);
    let server = bench.serve(&model, Place::Limited);
    let tensors = size.to_string();
    let load =
        |from: &Path| peers::timed_by_python(&python, LOAD, &[&from.to_string_lossy(), &tensors]);
    for round in bench.rounds("engine") {
        let (mut download, mut warm, mut cold) = (0.0, 0.0, 0.0);
        for turn in in_turn(round, &[Turn::Download, Turn::Warm, Turn::Cold]) {
            bench.settle();
            match turn {
                Turn::Download => download = curl(&server, &model, dir),
                Turn::Warm => warm = load(&model.plain()),
                Turn::Cold => {
                    mount::forget(dir);
                    let mount = Mount::start(&server, &model, dir, &[]);
                    cold = load(mount.model());
                    mount.stop();
                    mount::forget(dir);
                }
            }
        }
        let ratio = cold / f64::max(download, warm);
        let what = "cold load by safetensors, time ÷ max(curl x4, warm load)";
        table.ratio(place, what, Bar::at_most(1.05), ratio);
        table.add(
            Unit::Seconds,
            place,
            "sharded model, curl x4 to files",
            download,
        );
        table.add(
            Unit::Seconds,
            place,
            "sharded model, cold load by safetensors",
            cold,
        );
        table.add(
            Unit::Seconds,
            "disk",
            "sharded model, warm load by safetensors",
            warm,
        );
    }
}
