//! The Python environment of `tests/setup.sh` and the scripts in `tests/py`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::process::{Output, run_command};

/// What `tests/setup.sh` made: `OCIFS_TEST_ENV`, else where it puts it.
pub fn environment() -> PathBuf {
    std::env::var_os("OCIFS_TEST_ENV")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into()));
            cache
                .unwrap_or_else(|| home().join(".cache"))
                .join("ocifs-tests")
        })
}

fn interpreter() -> PathBuf {
    let python = environment().join("venv/bin/python3");
    assert!(
        python.exists(),
        "{} is missing; tests/setup.sh makes it",
        python.display()
    );
    python
}

/// The command that runs `tests/py/SCRIPT`.
pub fn command(script: &str) -> Command {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/py")
        .join(script);
    let mut command = Command::new(interpreter());
    // `-B`: nothing is written beside the scripts.
    command
        .arg("-B")
        .arg(file)
        .env("HF_HUB_OFFLINE", "1")
        .env("TOKENIZERS_PARALLELISM", "false");
    command
}

/// Runs `tests/py/SCRIPT` with these arguments.
pub fn python<S: AsRef<OsStr>>(script: &str, args: impl IntoIterator<Item = S>) -> Output {
    run_command(command(script).args(args), Duration::from_secs(400))
}

/// The command that runs a module of the environment, as `python -m MODULE`.
pub fn module_command(name: &str) -> Command {
    let mut command = Command::new(interpreter());
    command.arg("-B").arg("-m").arg(name);
    command
}

/// Runs a module of the environment, as `python -m MODULE`.
pub fn module<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Output {
    let limit = Duration::from_secs(120);
    run_command(module_command(name).args(args), limit)
}
