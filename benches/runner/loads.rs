//! How long a model's load takes through a mount.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::models::Model;
use crate::common::mount::{self, Mount};
use crate::common::servers::{Place, Server};
use crate::common::table::{Bar, Table, Unit};
use crate::common::{curl, either_first, in_turn, machine};
use crate::peers::{self, Peer};
use crate::{Bench, synthetic};

const WEIGHTS: &str = "model.safetensors";
/// Loads of each side within a round, where a load is short.
const TURNS: usize = 3;

/// The model, and a prompt to load it for.
fn prepare(bench: &Bench) -> (Model, PathBuf) {
    let layers = bench.options.scaled(12, 4);
    let model = Model::of_files(&bench.dir, "random", |dir| {
        synthetic::write(dir, layers);
    });
    let prompt = bench.dir.join("prompt.json");
    fs::write(&prompt, "[1, 2, 3]").unwrap();
    (model, prompt)
}

/// Seconds that ocifs-run took to have all weights in place, and until it could begin with the prompt.
fn load(dir: &Path, prompt: &Path) -> (f64, f64) {
    let said: Value = peers::ours(dir, prompt, 1, &[]);
    let number = |name: &str| said[name].as_f64().unwrap();
    (number("loadSeconds"), number("readySeconds"))
}

/// A sealed blob through the mount, and its file past it: the same pages.
pub(crate) fn sealed(bench: &Bench, table: &mut Table) {
    const PLACE: &str = "0.6B, disk";
    let (model, prompt) = prepare(bench);
    let dir = &bench.dir;
    model.warm();
    let server = Server::nginx(&model.www(), dir, Place::Loopback);
    mount::forget(dir);
    let mount = Mount::start(&server, &model, dir, &[]);
    machine::warm(&mount.file(WEIGHTS));
    mount.wait_until_verified(WEIGHTS);
    let native = dir.join("native");
    fs::create_dir_all(&native).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(mount.file(name), native.join(name)).unwrap();
    }
    let blob = model.blobs.iter().find(|blob| blob.name == WEIGHTS);
    symlink(mount::sealed(dir, blob.unwrap()), native.join(WEIGHTS)).unwrap();
    load(&native, &prompt);
    for _ in bench.options.turns("load") {
        machine::settle(dir, 50);
        for turn in 0..TURNS {
            let (disk, mounted) = either_first(
                turn,
                || load(&native, &prompt).0,
                || load(mount.model(), &prompt).0,
            );
            table.ratio(
                PLACE,
                "load from a sealed mount, speed ÷ from the file itself",
                Bar::at_least(0.95),
                disk / mounted,
            );
            table.add(Unit::Seconds, PLACE, "load, the file itself", disk);
            table.add(Unit::Seconds, PLACE, "load, sealed mount", mounted);
        }
        if let Some(candle) = Peer::candle(mount.model(), "bf16") {
            table.add(
                Unit::Seconds,
                PLACE,
                "candle's load, sealed mount",
                candle.load,
            );
        }
    }
    mount.stop();
    mount::forget(dir);
    fs::remove_dir_all(native).unwrap();
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Contestant {
    Curl,
    Ours,
    Candle,
    /// As above, from a mount that fetches what is read and nothing else: what a loader asks for is then all that keeps the link busy.
    OursAlone,
    CandleAlone,
}

/// A mount with an empty cache, behind the limited link.
pub(crate) fn cold(bench: &Bench, table: &mut Table) {
    const PLACE: &str = "0.6B, 4 Gbit/s";
    let (model, prompt) = prepare(bench);
    let dir = &bench.dir;
    model.warm();
    let server = Server::nginx(&model.www(), dir, Place::Limited);
    let contestants = [
        Contestant::Curl,
        Contestant::Ours,
        Contestant::Candle,
        Contestant::OursAlone,
        Contestant::CandleAlone,
    ];
    for round in bench.options.turns("cold") {
        let (mut wire, mut ready) = (0.0, 0.0);
        let (mut ours, mut ours_alone, mut candle, mut candle_alone) = (0.0, 0.0, None, None);
        for contestant in in_turn(round, &contestants) {
            machine::settle(dir, 200);
            let flags: &[&str] = match contestant {
                Contestant::Curl => {
                    wire = curl(&server, &model, dir);
                    continue;
                }
                Contestant::Ours | Contestant::Candle => &[],
                Contestant::OursAlone | Contestant::CandleAlone => &["--prefetch", "none"],
            };
            let candles = matches!(contestant, Contestant::Candle | Contestant::CandleAlone);
            if candles && !Peer::has_candle() {
                continue;
            }
            mount::forget(dir);
            let mount = Mount::start(&server, &model, dir, flags);
            let candle_load = || Peer::candle(mount.model(), "bf16").map(|peer| peer.load);
            match contestant {
                Contestant::Curl => {}
                Contestant::Ours => (ours, ready) = load(mount.model(), &prompt),
                Contestant::Candle => candle = candle_load(),
                Contestant::OursAlone => ours_alone = load(mount.model(), &prompt).0,
                Contestant::CandleAlone => candle_alone = candle_load(),
            }
            // With --prefetch none nothing completes a blob of which a loader has left something out.
            if flags.is_empty() {
                mount.wait_until_verified(WEIGHTS);
            }
            mount.stop();
        }
        mount::forget(dir);
        table.ratio(
            PLACE,
            "first load, time ÷ curl x4 to files",
            Bar::at_most(1.1),
            ours / wire,
        );
        table.add(Unit::Seconds, PLACE, "curl x4 to files", wire);
        table.add(Unit::Seconds, PLACE, "first load", ours);
        table.add(
            Unit::Seconds,
            PLACE,
            "first load, until a prompt can begin",
            ready,
        );
        table.ratio(
            PLACE,
            "first load with --prefetch none, time ÷ curl x4 to files",
            Bar::SHOWN,
            ours_alone / wire,
        );
        let (Some(candle), Some(candle_alone)) = (candle, candle_alone) else {
            table.leave_out("candle's first load", "benches/setup.sh makes it");
            continue;
        };
        table.ratio(
            PLACE,
            "first load, speed ÷ candle's from a map",
            Bar::at_least(2.0),
            candle / ours,
        );
        table.add(Unit::Seconds, PLACE, "candle's first load", candle);
        table.ratio(
            PLACE,
            "first load with --prefetch none, speed ÷ candle's from a map",
            Bar::SHOWN,
            candle_alone / ours_alone,
        );
        table.add(
            Unit::Seconds,
            PLACE,
            "candle's first load with --prefetch none",
            candle_alone,
        );
    }
}
