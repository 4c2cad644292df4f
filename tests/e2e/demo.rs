//! `ocifs demo`: the whole way on one machine, with nothing left behind.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use crate::support::heavy;
use crate::support::mount::ocifs;
use crate::support::process::run_command;
use crate::support::scratch;

fn mounts() -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table
        .lines()
        .filter(|line| line.contains("fuse.ocifs"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_demo_shows_the_whole_way_and_leaves_nothing() {
    let _heavy = heavy();
    // Everything temporary goes where it can be seen.
    let temporary = scratch("demo");
    let mut command = ocifs(["demo"]);
    command
        .env("TMPDIR", temporary.path())
        .env("HOME", temporary.path());
    let output = run_command(&mut command, Duration::from_secs(300)).ok();
    for word in ["config.json", "safetensors", "MiB"] {
        assert!(output.contains(word), "{word} in {output}");
    }
    let left: Vec<_> = fs::read_dir(temporary.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "{left:?} is left behind");
    let ours: Vec<_> = mounts()
        .into_iter()
        .filter(|line| line.contains(temporary.path().to_str().unwrap()))
        .collect();
    assert!(ours.is_empty(), "{ours:?}");
}
