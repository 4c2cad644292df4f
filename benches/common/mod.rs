//! What the benchmarks share: the command line, the machine, servers and links, mounts, models that are served, and the table.

pub(crate) mod machine;
pub(crate) mod models;
pub(crate) mod mount;
pub(crate) mod options;
pub(crate) mod relay;
pub(crate) mod servers;
pub(crate) mod table;

use std::any::Any;
use std::fs::{self, File};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use rustix::fs::{FlockOperation, flock};

use models::Model;
use options::Options;
use servers::Server;
use table::Table;

/// The directory of models, caches and outputs, for one run at a time. It is emptied at the end, and before the next begin if a run
/// was killed.
pub(crate) struct Workplace {
    pub(crate) dir: PathBuf,
    _lock: File,
}

impl Workplace {
    fn take(name: &str) -> Option<Self> {
        let below = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let lock = File::create(below.join(format!("{name}.lock"))).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
        let dir = below.join(name);
        for point in ["models", "peer"] {
            let mut umount = Command::new("umount");
            umount.arg("-l").arg(dir.join(point)).stderr(Stdio::null());
            let _ = umount.status();
        }
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Some(Self { dir, _lock: lock })
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A group of rows: its name, what it is about, and what measures it.
pub(crate) type Group<B> = (&'static str, &'static str, fn(&B, &mut Table));

/// What one benchmark has of its own.
pub(crate) struct Plan<'a, B> {
    /// As `cargo bench --bench` calls it.
    pub(crate) name: &'a str,
    /// Programs whose versions a reader of the figures must know, each with the argument that asks for it.
    pub(crate) programs: &'a [(&'a str, &'a str)],
    pub(crate) groups: &'a [Group<B>],
    /// The title of the table's second column.
    pub(crate) places: &'a str,
}

/// Runs a benchmark from its command line to its table; `begin` makes what the groups have in common.
pub(crate) fn run<B>(plan: &Plan<'_, B>, begin: impl FnOnce(Options, &Path) -> B) -> ExitCode {
    let Plan {
        name,
        programs,
        groups,
        places,
    } = plan;
    let known: Vec<(&str, &str)> = groups
        .iter()
        .map(|(name, about, _)| (*name, *about))
        .collect();
    let options = match Options::parse(name, std::env::args().skip(1), &known) {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "the benchmark mounts, makes network namespaces and empties caches: it needs root"
        );
        return ExitCode::from(2);
    }
    let Some(workplace) = Workplace::take(name) else {
        eprintln!("another run of the benchmark is under way");
        return ExitCode::FAILURE;
    };
    machine::print_header(&workplace.dir, &options, programs);
    let start = Instant::now();
    let bench = begin(options.clone(), &workplace.dir);
    let mut table = Table::default();
    let mut broken = false;
    for (name, _, measure) in *groups {
        if !options.wants(name) {
            continue;
        }
        // What the other groups have measured is worth printing all the same.
        let begin = Instant::now();
        let job = AssertUnwindSafe(|| measure(&bench, &mut table));
        let ended: Result<(), Box<dyn Any + Send>> = std::panic::catch_unwind(job);
        if ended.is_err() {
            table.leave_out(
                &format!("group {name}"),
                "broke off; the reason is on stderr",
            );
            broken = true;
        }
        eprintln!("{name}: {:.0} s", begin.elapsed().as_secs_f64());
    }
    drop(bench);
    if options.markdown {
        table.print_markdown(places);
    } else {
        table.print();
    }
    println!("{:.0} s in all", start.elapsed().as_secs_f64());
    if broken {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// The contestants of a round in their order: in the opposite one in every other round.
pub(crate) fn in_turn<T: Clone>(round: usize, contestants: &[T]) -> Vec<T> {
    let mut order = contestants.to_vec();
    if round.is_multiple_of(2) {
        order.reverse();
    }
    order
}

/// Both, the first first in every other turn.
pub(crate) fn either_first(
    turn: usize,
    one: impl FnOnce() -> f64,
    other: impl FnOnce() -> f64,
) -> (f64, f64) {
    if turn.is_multiple_of(2) {
        let first = one();
        (first, other())
    } else {
        let second = other();
        (one(), second)
    }
}

/// Seconds that something takes.
pub(crate) fn seconds<T>(job: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    std::hint::black_box(job());
    start.elapsed().as_secs_f64()
}

/// Whether a program can be started.
pub(crate) fn installed(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok()
}

/// A directory with what `tests/setup.sh` or `benches/setup.sh` installs for one user: the one that the variable names, else `name` in the user's
/// cache.
pub(crate) fn environment(variable: &str, name: &str) -> PathBuf {
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), Into::into);
    std::env::var_os(variable).map_or_else(|| cache.join(name), PathBuf::from)
}

/// Seconds that four curls take for all of a model, to files: a quarter of the only blob each, or whole blobs in turn.
pub(crate) fn curl(server: &Server, model: &Model, dir: &Path) -> f64 {
    const PARTS: usize = 4;
    let mut commands = Vec::new();
    for part in 0..PARTS {
        let mut command = Command::new("curl");
        command.arg("-sf");
        if let [blob] = &model.blobs[..] {
            let (part, parts) = (part as u64, PARTS as u64);
            let (first, end) = (blob.size * part / parts, blob.size * (part + 1) / parts);
            command.args(["-r", &format!("{first}-{}", end - 1)]);
        }
        let mut blobs: Vec<_> = model.blobs.iter().skip(part).step_by(PARTS).collect();
        if model.blobs.len() == 1 {
            blobs = vec![&model.blobs[0]];
        }
        for (at, blob) in blobs.into_iter().enumerate() {
            command.arg("-o").arg(dir.join(format!("curl-{part}-{at}")));
            command.arg(format!("http://{}{}", server.address, model.path(blob)));
        }
        commands.push(command);
    }
    let seconds = seconds(|| {
        let start = |command: &mut Command| command.spawn().expect("curl is installed");
        let children: Vec<Child> = commands.iter_mut().map(start).collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
    });
    let mut size = 0;
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("curl-") {
            size += entry.metadata().unwrap().len();
            fs::remove_file(entry.path()).unwrap();
        }
    }
    assert_eq!(size, model.size());
    seconds
}
