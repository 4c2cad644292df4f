//! Two programs: `ocifs` has nothing of the engine, and says why an engine does not start.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::mount::ocifs;
use crate::support::process::run_command;
use crate::support::scratch;

const PATIENCE: Duration = Duration::from_secs(120);

fn said(program: &str, args: &[&str]) -> String {
    let dir = env!("CARGO_MANIFEST_DIR");
    run_command(Command::new(program).args(args).current_dir(dir), PATIENCE).ok()
}

#[test]
fn the_daemon_has_nothing_of_the_engine() {
    let (daemon, engine) = (env!("CARGO_BIN_EXE_ocifs"), env!("CARGO_BIN_EXE_ocifs-run"));
    // Both are of one build, in which the library has the engine: what is not called is not linked.
    assert!(said("nm", &[engine]).contains("candle_core"));
    assert!(!said("nm", &[daemon]).contains("candle_core"));
    let linked = said("readelf", &["-d", daemon]);
    let libraries: Vec<&str> = linked
        .lines()
        .filter_map(|line| {
            Some(
                line.split_once("Shared library: [")?
                    .1
                    .trim_end_matches(']'),
            )
        })
        .collect();
    let usual = [
        "libc.",
        "libm.",
        "libgcc_s.",
        "ld-linux",
        "libdl.",
        "libpthread.",
    ];
    assert!(!libraries.is_empty());
    for library in libraries {
        assert!(
            usual.iter().any(|usual| library.starts_with(usual)),
            "ocifs links {library}"
        );
    }
    // Nor does a build without features compile any of it.
    let tree = |more: &[&str]| {
        let mut args = vec![
            "tree",
            "--locked",
            "--offline",
            "--prefix",
            "none",
            "-e",
            "normal,build",
        ];
        args.extend(more);
        said(env!("CARGO"), &args)
    };
    for name in ["candle-core ", "tokenizers ", "minijinja "] {
        assert!(tree(&["--features", "runner"]).contains(name), "{name}");
        assert!(!tree(&[]).contains(name), "{name}");
    }
    assert!(!tree(&["--features", "runner"]).contains("cudarc "));
}

#[test]
fn an_engine_that_lacks_libraries_says_which() {
    let dir = scratch("lacking");
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    let gcc = |args: &[&str]| {
        run_command(Command::new("gcc").args(args).current_dir(&dir), PATIENCE).ok();
    };
    let names = ["libcuda.so.1", "libcublas.so.13"];
    for (name, function) in names.into_iter().zip(["cuInit", "cublasCreate"]) {
        write(
            "library.c",
            &format!("int {function}(void) {{ return 0; }}"),
        );
        let soname = format!("-Wl,-soname,{name}");
        gcc(&["-shared", "-fPIC", &soname, "-o", name, "library.c"]);
    }
    write(
        "engine.c",
        "int cuInit(void); int cublasCreate(void); int main(void) { return cuInit() + cublasCreate(); }",
    );
    gcc(&["-o", "engine", "engine.c", names[0], names[1]]);
    let run = |libraries: &Path| {
        let mut command = ocifs(["run", dir.path().to_str().unwrap(), "-p", "hi"]);
        command.env("OCIFS_RUN", dir.path().join("engine"));
        command.env("LD_LIBRARY_PATH", libraries);
        run_command(&mut command, PATIENCE)
    };
    run(dir.path()).ok();
    let error = run(Path::new("/nowhere")).failed();
    assert!(
        error.contains("does not start: libcuda.so.1 and libcublas.so.13 are missing"),
        "{error}"
    );
    assert!(error.contains("LD_LIBRARY_PATH"), "{error}");
}
