//! The fuzz targets, each for a second or so from its corpus: that they build with this toolchain, and that nothing is found at once.
//!
//! `fuzz/run.sh --seconds 600` looks for longer.

use std::path::Path;
use std::process::Command;

#[test]
fn no_parser_of_outside_bytes_fails_in_a_short_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seconds = match std::env::var("OCIFS_TEST_SCALE").as_deref() {
        Ok("full") => "30",
        _ => "1",
    };
    let output = Command::new(root.join("fuzz/run.sh"))
        .args(["--seconds", seconds])
        // What is built fast is enough for so short a run.
        .env("OCIFS_FUZZ_OPT", "0")
        .output()
        .expect("fuzz/run.sh can be run");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    let last = said.lines().last().unwrap_or_default();
    println!("{last}");
    assert!(last.contains("31 targets, 0 failed"), "{said}\n{errors}");
}
