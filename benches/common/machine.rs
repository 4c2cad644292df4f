//! The machine: what it is, how it comes to rest, and what processes took of it.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::options::Options;

/// One line of what a command prints first; what is missing is said to be so.
fn first_line(program: &str, arguments: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(arguments).output() else {
        return format!("no {program}");
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines().next().unwrap_or(program).trim().to_owned()
}

/// What a reader of the figures must know about where they were taken; `programs` with the argument that asks each for its version.
pub(crate) fn print_header(dir: &Path, options: &Options, programs: &[(&str, &str)]) {
    let field = |path: &str, name: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(':'));
        value.map_or_else(|| "?".to_owned(), |(_, value)| value.trim().to_owned())
    };
    // What a program says about itself: name and version, without the libraries that it was built with.
    let version = |(program, argument): &(&str, &str)| {
        let line = first_line(program, &[argument]);
        line.split(' ').take(3).collect::<Vec<_>>().join(" ")
    };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!(
        "ocifs {}, {} cores ({}), memory {}, Linux {}, {} below the cache and the peers' files, load {}",
        env!("CARGO_PKG_VERSION"),
        std::thread::available_parallelism().unwrap(),
        field("/proc/cpuinfo", "model name"),
        field("/proc/meminfo", "MemTotal"),
        release.trim(),
        file_system(dir),
        load.split(' ').next().unwrap_or("?"),
    );
    println!(
        "{}",
        programs.iter().map(version).collect::<Vec<_>>().join("; ")
    );
    println!(
        "{}, {} rounds; readers, daemons and servers share the cores",
        options.scaled("full size", "quick: small files, figures are rough"),
        options.rounds
    );
}

/// The type of the file system that a directory is on, as the mount table has it.
fn file_system(dir: &Path) -> String {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = text.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        Some((fields.nth(1)?, fields.next()?))
    });
    let dir = dir.canonicalize().unwrap();
    let on = mounts.filter(|(point, _)| dir.starts_with(point));
    let deepest = on.max_by_key(|(point, _)| point.len());
    deepest.map_or("?", |(_, kind)| kind).to_owned()
}

/// Lets the disk and the page cache come to rest, so that nobody pays for what the one before left behind.
pub(crate) fn settle(dir: &Path, milliseconds: u64) {
    let _ = rustix::fs::syncfs(File::open(dir).unwrap());
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// Brings a file into the page cache, as the server's side of every comparison is.
pub(crate) fn warm(file: &Path) {
    std::io::copy(&mut File::open(file).unwrap(), &mut std::io::sink()).unwrap();
}

/// Processor seconds of the calling thread so far.
pub(crate) fn own_processor() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Processor seconds of a process so far, all its threads together.
pub(crate) fn processor(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    ticks(&stat, 11)
}

/// Seconds in user and in system mode: two fields of proc_pid_stat(5) in ticks of 1/100 s, the first being the given one behind the
/// name, which may hold spaces.
fn ticks(stat: &str, first: usize) -> f64 {
    let rest = stat.rsplit(')').next().unwrap();
    let fields = rest.split_whitespace().skip(first).take(2);
    fields
        .map(|field| field.parse::<f64>().unwrap())
        .sum::<f64>()
        / 100.0
}

/// Processor seconds of all processes that this one started and waited for, and of those that they waited for.
pub(crate) fn children_processor() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    ticks(&stat, 13)
}

/// Bytes that a process has passed to write(2) and its kin so far, replies to the kernel's FUSE requests among them
/// (`wchar` of proc_pid_io(5)).
pub(crate) fn written(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.unwrap().parse().unwrap()
}

/// Looks at a process every few milliseconds until it is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    done: AtomicBool,
    anonymous: AtomicU64,
}

impl Watch {
    /// Watches the memory of `pid`.
    pub(crate) fn start(pid: u32) -> Self {
        const EVERY: Duration = Duration::from_millis(10);
        let seen = Arc::new(Seen::default());
        let theirs = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            while !theirs.done.load(Ordering::Relaxed) {
                let anonymous = anonymous(pid).unwrap_or(0);
                theirs.anonymous.fetch_max(anonymous, Ordering::Relaxed);
                std::thread::sleep(EVERY);
            }
        });
        Self {
            seen,
            thread: Some(thread),
        }
    }

    /// The most anonymous memory that was resident at once, in bytes.
    pub(crate) fn peak_anonymous(&self) -> u64 {
        self.seen.anonymous.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.seen.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `RssAnon` of proc_pid_status(5), in bytes.
fn anonymous(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}
