//! `find` over a model of many files that the kernel has seen before.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::Bench;
use crate::common::models::Model;
use crate::common::mount::{self, Mount};
use crate::common::servers::Place;
use crate::common::table::{Bar, Table, Unit};
use crate::common::{either_first, seconds};

const FILES: usize = 10_000;

/// Against the same tree on the disk.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let dir = &bench.dir;
    let model = Model::of_many_files(dir, "files", FILES);
    let server = bench.serve(&model, Place::Loopback);
    for _ in bench.rounds("metadata") {
        bench.settle();
        mount::forget(dir);
        let mount = Mount::start(&server, &model, dir, &[]);
        let first = seconds(|| find(mount.model(), &["-size", "+0"]));
        let what = "find -size over 10,000 files, first time";
        table.add(
            Unit::Milliseconds,
            Place::Loopback.name(),
            what,
            first * 1e3,
        );
        find(&model.plain(), &["-size", "+0"]);
        let before = server.traffic();
        for (name, test) in [("find", &[][..]), ("find -size", &["-size", "+0"])] {
            for turn in 0..bench.options.scaled(8, 3) {
                let native = || seconds(|| find(&model.plain(), test));
                let ours = || seconds(|| find(mount.model(), test));
                let (disk, mounted) = either_first(turn, native, ours);
                let what = format!("{name} over 10,000 files, warm, time ÷ on the disk");
                table.ratio("disk", &what, Bar::at_most(3.0), mounted / disk);
                let what = format!("{name} over 10,000 files, warm");
                table.add(Unit::Milliseconds, "mount", &what, mounted * 1e3);
                table.add(Unit::Milliseconds, "disk", &what, disk * 1e3);
            }
        }
        let requests = server.traffic().since(before).requests;
        let what = "find over 10,000 files, warm";
        let place = Place::Loopback.name();
        table.add_with_bar(
            Unit::Requests,
            place,
            what,
            Bar::at_most(0.0),
            requests as f64,
        );
        mount.stop();
    }
    mount::forget(dir);
}

/// Lists all files; with a test that needs their attributes, looks at each.
fn find(tree: &Path, test: &[&str]) {
    let mut command = Command::new("find");
    // .oci is ours alone.
    command
        .arg(tree)
        .args(["-name", ".oci", "-prune", "-o", "-type", "f"]);
    let output = command.args(test).arg("-print").stderr(Stdio::inherit());
    let listed = output.output().unwrap().stdout;
    let lines = listed.iter().filter(|byte| **byte == b'\n').count();
    assert_eq!(lines, FILES);
}
