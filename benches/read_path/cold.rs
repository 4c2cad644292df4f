//! The first read of a blob that nobody has: against the wire, against what users have today, and what it costs.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use crate::Bench;
use crate::common::machine::{children_processor, own_processor};
use crate::common::models::Model;
use crate::common::mount::{self, Mount};
use crate::common::servers::{Place, Server, Traffic};
use crate::common::table::{Bar, Table, Unit};
use crate::common::{curl, in_turn, installed};
use crate::peers::{self, Peer};
use crate::readers::{Read, WAYS};

/// One cold read through a mount.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cold {
    /// Seconds from `open` to the last byte.
    pub(crate) last_byte: f64,
    /// Seconds from `open` until the blob is verified and sealed.
    pub(crate) sealed: f64,
    reader: f64,
    daemon: f64,
    hashing: f64,
    traffic: Traffic,
    anonymous: u64,
}

impl Cold {
    /// Reads the file `name` of a fresh mount with an empty cache, and waits until its blob is sealed.
    pub(crate) fn measure(
        server: &Server,
        model: &Model,
        dir: &Path,
        name: &str,
        read: Read,
    ) -> Self {
        mount::forget(dir);
        let mount = Mount::start(server, model, dir, &[]);
        let (before, idle, own) = (server.traffic(), mount.processor(), own_processor());
        let start = Instant::now();
        let file = File::open(mount.file(name)).unwrap();
        let size = file.metadata().unwrap().len();
        assert_eq!(read(&file), size);
        let last_byte = start.elapsed().as_secs_f64();
        let reader = own_processor() - own;
        mount.wait_until_verified(name);
        let sealed = start.elapsed().as_secs_f64();
        let cold = Self {
            last_byte,
            sealed,
            reader,
            daemon: mount.processor() - idle,
            hashing: mount.hashing(),
            traffic: server.traffic().since(before),
            anonymous: mount.peak_anonymous(),
        };
        drop(file);
        mount.stop();
        mount::forget(dir);
        cold
    }

    /// Rows of what it cost; `bars` are those of the daemon without and with SHA-256.
    pub(crate) fn add_costs(
        &self,
        table: &mut Table,
        place: &'static str,
        what: &str,
        size: u64,
        bars: [Bar; 2],
    ) {
        let per_gb = size as f64 / 1e9;
        let cpu = Unit::CoreSecondsPerGb;
        let without = (self.daemon - self.hashing) / per_gb;
        table.add_with_bar(
            cpu,
            place,
            &format!("{what}: daemon without SHA-256"),
            bars[0],
            without,
        );
        let with = self.daemon / per_gb;
        table.add_with_bar(
            cpu,
            place,
            &format!("{what}: daemon with SHA-256"),
            bars[1],
            with,
        );
        table.add(cpu, place, &format!("{what}: reader"), self.reader / per_gb);
        table.add(Unit::Requests, place, what, self.traffic.requests as f64);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        table.add(Unit::PulledMib, place, what, mib(self.traffic.bytes));
        table.add(Unit::AnonymousMib, place, what, mib(self.anonymous));
        table.add(
            Unit::Seconds,
            place,
            &format!("{what}, last byte"),
            self.last_byte,
        );
        table.add(
            Unit::Seconds,
            place,
            &format!("{what}, sealed"),
            self.sealed,
        );
    }
}

/// Who has a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    Curl,
    /// One of [`WAYS`].
    Ocifs(usize),
    OldLoader,
    /// rclone with this `--vfs-cache-mode`.
    Rclone(&'static str),
    Nbdfuse,
}

impl Contestant {
    fn name(self) -> String {
        match self {
            Self::Curl => "curl x4 to files".to_owned(),
            Self::Ocifs(way) => format!("cold {}", WAYS[way].0),
            Self::OldLoader => "old loader's loop".to_owned(),
            Self::Rclone(cache) => format!("rclone mount, vfs cache {cache}"),
            Self::Nbdfuse => "nbdkit curl + nbdfuse".to_owned(),
        }
    }
}

/// nginx on loopback, with all peers.
pub(crate) fn loopback(bench: &Bench, table: &mut Table) {
    let mut contestants = vec![Contestant::Curl];
    contestants.extend((0..WAYS.len()).map(Contestant::Ocifs));
    let mut add = |program: &str, is_there: bool, peers: &[Contestant]| {
        for peer in peers {
            if is_there {
                contestants.push(*peer);
            } else {
                table.leave_out(&peer.name(), &format!("{program} is missing"));
            }
        }
    };
    let python = peers::python().is_some();
    add(
        "the Python of tests/setup.sh",
        python,
        &[Contestant::OldLoader],
    );
    let rclone = [Contestant::Rclone("off"), Contestant::Rclone("full")];
    add("rclone", installed("rclone"), &rclone);
    let nbd = installed("nbdkit") && installed("nbdfuse");
    add("nbdkit or nbdfuse", nbd, &[Contestant::Nbdfuse]);
    let server = bench.serve(bench.single(), Place::Loopback);
    rounds(bench, table, "cold", Place::Loopback, &server, &contestants);
}

/// nginx behind the limited link.
pub(crate) fn limited(bench: &Bench, table: &mut Table) {
    let contestants = [Contestant::Curl, Contestant::Ocifs(0), Contestant::Ocifs(1)];
    let server = bench.serve(bench.single(), Place::Limited);
    rounds(bench, table, "link", Place::Limited, &server, &contestants);
}

/// docker-registry on loopback.
pub(crate) fn registry(bench: &Bench, table: &mut Table) {
    let storage = bench.dir.join("registry");
    let Some(server) = Server::registry(&storage) else {
        table.leave_out(
            "cold reads from docker-registry",
            "docker-registry is missing",
        );
        return;
    };
    bench.single().push(&server);
    let contestants = [Contestant::Curl, Contestant::Ocifs(0), Contestant::Ocifs(1)];
    rounds(
        bench,
        table,
        "registry",
        Place::Registry,
        &server,
        &contestants,
    );
    drop(server);
    std::fs::remove_dir_all(storage).unwrap();
}

fn rounds(
    bench: &Bench,
    table: &mut Table,
    group: &'static str,
    place: Place,
    server: &Server,
    contestants: &[Contestant],
) {
    let (model, dir) = (bench.single(), &bench.dir);
    let blob = &model.blobs[0];
    for round in bench.rounds(group) {
        let mut times = Vec::new();
        for contestant in in_turn(round, contestants) {
            bench.settle();
            let before = children_processor() + own_processor();
            let seconds = match contestant {
                Contestant::Curl => curl(server, model, dir),
                Contestant::OldLoader => {
                    peers::old_loader(&peers::python().unwrap(), server, model, dir)
                }
                Contestant::Rclone(cache) => {
                    Peer::rclone(server, dir, cache).read(&blob.name, blob.size)
                }
                Contestant::Nbdfuse => {
                    Peer::nbdfuse(server, model, dir).read(&blob.name, blob.size)
                }
                Contestant::Ocifs(way) => {
                    let cold = Cold::measure(server, model, dir, &blob.name, WAYS[way].1);
                    let what = contestant.name();
                    if (place, way) == (Place::Loopback, 0) {
                        let what = format!("{what}, time until sealed ÷ to the last byte");
                        let bar = Bar::at_most(2.0);
                        table.ratio(place.name(), &what, bar, cold.sealed / cold.last_byte);
                    }
                    let bars = match place {
                        // The bars are for readers that go forwards.
                        Place::Loopback if way < 2 => [Bar::at_most(1.3), Bar::at_most(2.3)],
                        _ => [Bar::NONE; 2],
                    };
                    cold.add_costs(table, place.name(), &what, blob.size, bars);
                    cold.last_byte
                }
            };
            if !matches!(contestant, Contestant::Ocifs(_)) {
                table.add(Unit::Seconds, place.name(), &contestant.name(), seconds);
                // Its start and end included, and the reader's part where there is one.
                let spent = children_processor() + own_processor() - before;
                let per_gb = spent / (blob.size as f64 / 1e9);
                let what = format!("{}: all of it", contestant.name());
                table.add(Unit::CoreSecondsPerGb, place.name(), &what, per_gb);
            }
            times.push((contestant, seconds));
        }
        compare(table, place, &times);
    }
}

/// The ratios of one round.
fn compare(table: &mut Table, place: Place, times: &[(Contestant, f64)]) {
    let time = |wanted| {
        let found = times.iter().find(|(contestant, _)| *contestant == wanted);
        found.map(|(_, seconds)| *seconds)
    };
    let (wire, ours) = (
        time(Contestant::Curl).unwrap(),
        time(Contestant::Ocifs(0)).unwrap(),
    );
    for (contestant, seconds) in times {
        let bar = match (contestant, place) {
            (Contestant::Curl, _) => continue,
            (Contestant::Ocifs(_), Place::Limited) => Bar::at_least(0.95).aim(0.98),
            (Contestant::Ocifs(0), Place::Loopback) => Bar::at_least(0.6).aim(0.9),
            _ => Bar::NONE,
        };
        let what = format!("{}, speed ÷ curl x4 to files", contestant.name());
        table.ratio(place.name(), &what, bar, wire / seconds);
    }
    for (contestant, seconds) in times {
        let bar = match contestant {
            Contestant::Curl | Contestant::Ocifs(_) => continue,
            Contestant::OldLoader => Bar::at_most(0.45).aim(0.33),
            Contestant::Rclone(_) | Contestant::Nbdfuse => Bar::NONE,
        };
        let what = format!("cold read(), time ÷ {}", contestant.name());
        table.ratio(place.name(), &what, bar, ours / seconds);
    }
}
