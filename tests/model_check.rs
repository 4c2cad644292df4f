//! Runs the model check of the concurrent core (`tests/model`), which is a program of its own.

// Helpers outside of `#[test]` functions are test code too.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::process::Command;

#[test]
fn the_concurrent_core_keeps_its_promises_in_every_order_of_steps_that_is_tried() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--locked", "--quiet", "--example", "model_check"]);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = cargo.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{failed}");
    println!("{said}");
}
