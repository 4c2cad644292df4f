//! A soak: readers of all kinds, faults of all kinds and kills at random moments, all at once, for as long as is asked for.
//!
//! `cargo test --test soak -- --soak 10m [--seed N]`; without `--soak` forty seconds. Every other kill is of the daemon alone, so that the
//! holder starts the next one; the others are of both, and the cache is mounted anew. What must hold is the same however long it
//! takes: no wrong byte ever, no error but where both were killed, no operation without an end, the cache within its limit, the daemon within its
//! memory. At the end it prints what was survived.

// Helpers of a test program.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::exit
)]
#![allow(dead_code, unreachable_pub, missing_debug_implementations)]

#[path = "../e2e/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer, tar};
use support::content::Content;
use support::held::Held;
use support::mount::ocifs;
use support::process::{run_command, run_with_input};
use support::proxy::{Fault, Proxy};
use support::registry::Registry;
use support::{PATIENCE, eventually, scratch, within};

/// The cache's limit: three quarters of what would be kept, and more than what may be open at once with the uncompressed forms of
/// layers, which cannot stream through.
const CACHE: u64 = 112 << 20;
const MEMORY: u64 = 64 << 20;
/// No single operation takes longer, whatever happens to it.
const LONGEST: Duration = Duration::from_secs(240);
/// Models of one file each, and how large the largest is.
const MODELS: u64 = 14;
const LARGEST: u64 = 12 << 20;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// One file that is read: where, and what is in it.
#[derive(Clone)]
struct Expected {
    below: String,
    seed: u64,
    /// Where in the content of the seed the file begins.
    from: u64,
    size: u64,
}

/// What is known to all threads.
struct World {
    registry: Mutex<Registry>,
    proxy: Proxy,
    files: Vec<Expected>,
    cache: tempfile::TempDir,
    runtime: tempfile::TempDir,
    /// The mount point, and how often the mount was ended or made: odd while there is none.
    mounted: RwLock<(PathBuf, u64)>,
    /// How often the daemon alone was killed.
    daemons: AtomicU64,
    over: AtomicBool,
    counts: Mutex<BTreeMap<String, u64>>,
    bytes: AtomicU64,
    largest_cache: AtomicU64,
    largest_memory: AtomicU64,
}

impl World {
    fn new() -> Self {
        let registry = Registry::open();
        let proxy = Proxy::start(registry.address());
        let mut files = Vec::new();
        for n in 0..MODELS {
            let size = 300_000 + n * (LARGEST - 300_000) / (MODELS - 1) + n;
            let bytes = Content::new(n).bytes(0, size as usize);
            let (artifact, name) = match n % 3 {
                // A blob, a member of a tar, and one of a compressed tar.
                0 => (
                    Artifact::docker_v02()
                        .layer(Layer::bytes(DOCKER_SAFETENSORS, bytes).at("data")),
                    "data",
                ),
                1 => (image(tar([("data", &bytes[..])]), false), "data"),
                _ => (image(tar([("data", &bytes[..])]), true), "data"),
            };
            artifact.publish(&registry, &format!("org/m{n}:v1"));
            files.push(Expected {
                below: format!("{}/org/m{n}:v1/{name}", proxy.host()),
                seed: n,
                from: 0,
                size,
            });
        }
        Self {
            registry: Mutex::new(registry),
            proxy,
            files,
            cache: scratch("soak-cache"),
            runtime: scratch("soak-runtime"),
            mounted: RwLock::new((PathBuf::new(), 1)),
            daemons: AtomicU64::new(0),
            over: AtomicBool::new(false),
            counts: Mutex::default(),
            bytes: AtomicU64::new(0),
            largest_cache: AtomicU64::new(0),
            largest_memory: AtomicU64::new(0),
        }
    }

    fn count(&self, what: impl Into<String>) {
        *self.counts.lock().unwrap().entry(what.into()).or_insert(0) += 1;
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Sleeps, not beyond the end.
    fn sleep(&self, span: Duration) {
        let end = Instant::now() + span;
        while !self.is_over() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn mount(&self, random: &mut Random) -> Held {
        let prefetch = ["none", "blob", "model"][random.below(3) as usize];
        let (size, memory) = (CACHE.to_string(), MEMORY.to_string());
        let mut flags: Vec<String> = [
            "--cache-size",
            &size,
            "--memory",
            &memory,
            "--prefetch",
            prefetch,
            "--read-timeout",
            "200s",
            "-o",
            "stall-timeout=2s,connect-timeout=2s,metadata-timeout=60s",
        ]
        .map(str::to_owned)
        .into();
        if random.below(3) == 0 {
            flags.extend(["-o".to_owned(), "passthrough=false".to_owned()]);
        }
        if random.below(4) == 0 {
            flags.extend(["--verify".to_owned(), "strict".to_owned()]);
        }
        let mut command = ocifs(["mount"]);
        // More deaths than a daemon may have that is in order.
        command.env("OCIFS_HOLDER_TRIES", "100/10");
        let mount = Held::start_in(self.runtime.path(), command, self.cache.path(), flags);
        let mut mounted = self.mounted.write().unwrap();
        assert!(mounted.1 % 2 == 1, "there was none");
        *mounted = (mount.root().to_owned(), mounted.1 + 1);
        mount
    }

    /// Does something with a mount that is there; an error is only right if the daemon was killed meanwhile.
    fn attempt(
        &self,
        what: &str,
        action: impl FnOnce(PathBuf) -> io::Result<u64> + Send + 'static,
    ) {
        let (root, epoch) = self.mounted.read().unwrap().clone();
        if epoch % 2 == 1 {
            std::thread::sleep(Duration::from_millis(20));
            return;
        }
        match within(LONGEST, what, move || action(root)) {
            Ok(bytes) => {
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
                self.count(format!("done: {what}"));
            }
            Err(error) => {
                // The kill comes first, then it is told.
                std::thread::sleep(Duration::from_millis(500));
                let now = self.mounted.read().unwrap().1;
                assert_ne!(now, epoch, "{what}: {error}, and the mount is the same");
                self.count("cut off by a kill of both");
            }
        }
    }
}

fn image(layer: Vec<u8>, compressed: bool) -> Artifact {
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}});
    let (kind, layer) = match compressed {
        true => {
            let packed = run_with_input(Command::new("gzip").args(["-1", "-c"]), &layer, PATIENCE);
            (
                "application/vnd.oci.image.layer.v1.tar+gzip",
                packed.ok_bytes(),
            )
        }
        false => ("application/vnd.oci.image.layer.v1.tar", layer),
    };
    Artifact::new("application/vnd.oci.image.config.v1+json", &config)
        .layer(Layer::bytes(kind, layer))
}

impl Expected {
    fn check(&self, bytes: &[u8], offset: u64) {
        let right = Content::new(self.seed).bytes(self.from + offset, bytes.len());
        assert!(bytes == right, "{}: wrong bytes at {offset}", self.below);
    }
}

/// All of a file in order.
fn read_all(root: &Path, file: &Expected) -> io::Result<u64> {
    let mut open = File::open(root.join(&file.below))?;
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let count = open.read(&mut piece)?;
        if count == 0 {
            assert_eq!(at, file.size, "{}: it ends too early", file.below);
            return Ok(at);
        }
        file.check(&piece[..count], at);
        at += count as u64;
    }
}

/// Pieces of a file at random.
fn read_pieces(root: &Path, file: &Expected, mut random: Random, direct: bool) -> io::Result<u64> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let open = File::options()
        .read(true)
        .custom_flags(flags)
        .open(root.join(&file.below))?;
    let mut total = 0;
    for _ in 0..20 {
        let offset = random.below(file.size) / 4096 * 4096;
        let mut piece = vec![0; 4096 * (1 + random.below(64) as usize) + 4096];
        // What is read past the kernel's pages may want memory that begins as a page does.
        let skip = piece.as_ptr().align_offset(4096);
        let length = piece.len() - 4096;
        let place = &mut piece[skip..skip + length];
        let count = open.read_at(place, offset)?;
        let wanted = (file.size - offset).min(length as u64);
        file.check(&place[..count], offset);
        // What came before an error counts (read(2)): right across a kill, and then alone.
        if (count as u64) < wanted {
            let text = format!("{count} of {wanted} bytes at {offset}");
            return Err(io::Error::other(text));
        }
        total += count as u64;
    }
    Ok(total)
}

/// All of a file by a mapping, in a process of its own: what goes wrong there is a signal.
fn map(root: &Path, file: &Expected) -> io::Result<u64> {
    let mut command = support::python::command("mmap_digest.py");
    command.arg(root.join(&file.below));
    let output = run_command(&mut command, LONGEST);
    if !output.status.success() {
        return Err(io::Error::other(output.to_string()));
    }
    let right =
        support::content::digest(&Content::new(file.seed).bytes(file.from, file.size as usize));
    let text = output.ok();
    let hex = right.strip_prefix("sha256:").unwrap();
    assert!(
        text.contains(hex),
        "{}: a mapping has wrong bytes: {text}",
        file.below
    );
    Ok(file.size)
}

/// What is asked beside reads: listings, attributes, and what cannot be changed.
fn look(root: &Path, file: &Expected) -> io::Result<u64> {
    let path = root.join(&file.below);
    let found = fs::metadata(&path)?;
    assert_eq!(found.size(), file.size);
    let names = fs::read_dir(path.parent().unwrap())?.collect::<io::Result<Vec<_>>>()?;
    assert!(names.iter().any(|entry| entry.file_name() == "data"));
    let mut value = [0_u8; 100];
    rustix::fs::getxattr(&path, "user.oci.digest", &mut value[..])?;
    assert!(File::options().write(true).open(&path).is_err());
    let open = File::open(&path)?;
    rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed)?;
    assert!(open.as_raw_fd() > 2);
    Ok(0)
}

fn reader(world: &World, mut random: Random) {
    while !world.is_over() {
        let file = world.files[random.below(world.files.len() as u64) as usize].clone();
        let kind = random.below(10);
        let pieces = Random(random.next());
        let what = ["in order", "pieces", "direct", "mapping", "look"];
        match kind {
            0..=2 => world.attempt(what[0], move |root| read_all(&root, &file)),
            3..=4 => world.attempt(what[1], move |root| {
                read_pieces(&root, &file, pieces, false)
            }),
            5..=6 => world.attempt(what[2], move |root| read_pieces(&root, &file, pieces, true)),
            7 => world.attempt(what[3], move |root| map(&root, &file)),
            _ => world.attempt(what[4], move |root| look(&root, &file)),
        }
    }
}

/// One fault after another, each for a few requests.
fn troubler(world: &World, mut random: Random) {
    while !world.is_over() {
        let times = 1 + random.below(4) as usize;
        let at = random.below(2 << 20);
        let (name, path, fault) = match random.below(12) {
            0 => ("reset", "/blobs/", Fault::Reset(at)),
            1 => ("truncated", "/blobs/", Fault::Truncate(at)),
            2 => ("stalled", "/blobs/", Fault::Stall(at)),
            3 => (
                "delayed",
                "/blobs/",
                Fault::Delay(Duration::from_millis(random.below(1500))),
            ),
            4 => ("status 503", "/", Fault::Status(503, vec![])),
            5 => (
                "status 429",
                "/blobs/",
                Fault::Status(429, vec![("Retry-After".into(), "1".into())]),
            ),
            6 => ("status 500", "/blobs/", Fault::Status(500, vec![])),
            7 => ("range ignored", "/blobs/", Fault::IgnoreRange),
            // No answer but what is asked for again: one that lies about its range is an error where nobody asks twice.
            8 => ("status 502", "/blobs/", Fault::Status(502, vec![])),
            9 => ("narrow", "/blobs/", Fault::Throttle(1 << 20)),
            10 => (
                "manifest delayed",
                "/manifests/",
                Fault::Delay(Duration::from_millis(random.below(1500))),
            ),
            _ => {
                let mut registry = world.registry.lock().unwrap();
                registry.stop();
                world.sleep(Duration::from_millis(random.below(2500)));
                registry.restart();
                world.count("fault: registry restarted");
                continue;
            }
        };
        world.proxy.times(path, times, fault);
        world.count(format!("fault: {name}"));
        world.sleep(Duration::from_millis(200 + random.below(1500)));
        if random.below(4) == 0 {
            world.proxy.behave();
        }
    }
    world.proxy.behave();
}

/// Commands that people and timers run beside a mount.
fn operator(world: &World, mut random: Random) {
    while !world.is_over() {
        world.sleep(Duration::from_millis(500 + random.below(2000)));
        let epoch = world.mounted.read().unwrap().1;
        let daemons = world.daemons.load(Ordering::SeqCst);
        let cache = world.cache.path().to_str().unwrap().to_owned();
        let reference = world.files[random.below(MODELS) as usize]
            .below
            .trim_end_matches("/data")
            .to_owned();
        let args: Vec<&str> = match random.below(5) {
            0 | 1 => vec!["status", "--json"],
            2 => vec!["refresh", &reference],
            3 => vec![
                "cache",
                "gc",
                "--cache-dir",
                &cache,
                "--cache-size",
                "112MiB",
            ],
            _ => vec!["cache", "ls", "--cache-dir", &cache],
        };
        let output = run_command(
            ocifs(&args).env("OCIFS_RUNTIME_DIR", world.runtime.path()),
            LONGEST,
        );
        let what = args[..2]
            .iter()
            .filter(|word| !word.contains('/') && !word.starts_with('-'))
            .copied()
            .collect::<Vec<_>>()
            .join(" ");
        if output.status.success() {
            world.count(format!("command: {what}"));
        } else {
            let code = output.status.code();
            assert!(code.is_some_and(|code| code != 101), "{output}");
            // `refresh` says that the registry cannot be reached just now; others fail only where the daemon was killed.
            std::thread::sleep(Duration::from_millis(500));
            let killed = world.mounted.read().unwrap().1 != epoch
                || epoch % 2 == 1
                || world.daemons.load(Ordering::SeqCst) != daemons;
            assert!(killed || args[0] == "refresh", "{output}");
            world.count(format!("command refused: {what}"));
        }
        let used = allocated(world.cache.path());
        world.largest_cache.fetch_max(used, Ordering::Relaxed);
    }
}

/// What a directory takes on the disk, in bytes.
fn allocated(dir: &Path) -> u64 {
    let mut total = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(found) = fs::symlink_metadata(entry.path()) else {
            continue; // it went meanwhile
        };
        total += found.blocks() * 512;
        if found.is_dir() {
            total += allocated(&entry.path());
        }
    }
    total
}

/// Kills the daemon again and again, every other time with its holder, and mounts anew then; gives the last mount.
fn killer(world: &World, mut random: Random) -> Held {
    let mut mount = world.mount(&mut random);
    loop {
        for _ in 0..1 + random.below(10) {
            world.sleep(Duration::from_millis(500));
            let memory = mount.own_memory();
            world.largest_memory.fetch_max(memory, Ordering::Relaxed);
        }
        if world.is_over() {
            return mount;
        }
        if random.below(2) == 0 {
            mount.kill_daemon();
            world.daemons.fetch_add(1, Ordering::SeqCst);
            world.count("kills of the daemon");
            continue;
        }
        {
            let mut mounted = world.mounted.write().unwrap();
            mounted.1 += 1;
        }
        mount.kill();
        world.count("kills of both");
        mount = world.mount(&mut random);
    }
}

fn soak(span: Duration, seed: u64) {
    let world = World::new();
    let mut random = Random(seed);
    let mut seeds = || Random(random.next());
    let begun = Instant::now();
    let mount = std::thread::scope(|scope| {
        let killer_random = seeds();
        let killer = scope.spawn(|| killer(&world, killer_random));
        let mut others = Vec::new();
        for _ in 0..4 {
            let random = seeds();
            others.push(scope.spawn(|| reader(&world, random)));
        }
        let (one, two) = (seeds(), seeds());
        others.push(scope.spawn(|| troubler(&world, one)));
        others.push(scope.spawn(|| operator(&world, two)));
        // Whoever panics ends it for all.
        while begun.elapsed() < span
            && !killer.is_finished()
            && others.iter().all(|thread| !thread.is_finished())
        {
            std::thread::sleep(Duration::from_millis(100));
        }
        world.over.store(true, Ordering::Relaxed);
        let mut failed = None;
        for thread in others {
            failed = thread.join().err().or(failed);
        }
        let mount = killer.join();
        if let Some(panic) = failed {
            std::panic::resume_unwind(panic);
        }
        mount.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    // In peace, all of it is right, and the mount goes as it came.
    world.proxy.behave();
    for file in world.files.clone() {
        world.attempt("at the end", move |root| read_all(&root, &file));
    }
    // Whoever looks at mounts on this machine may be in it for a moment.
    let gone = |root: &Path| {
        run_command(ocifs(["umount"]).arg(root), LONGEST)
            .status
            .success()
    };
    let root = mount.root().to_owned();
    eventually(PATIENCE, "the mount is taken down", || {
        gone(&root).then_some(())
    });
    mount.assert_gone();
    drop(mount);
    let verified = run_command(
        ocifs(["cache", "verify", "--cache-dir"]).arg(world.cache.path()),
        LONGEST,
    );
    assert!(verified.status.success(), "{verified}");
    let counts = world.counts.lock().unwrap();
    let of = |start: &str| -> u64 {
        let all = counts.iter().filter(|(name, _)| name.starts_with(start));
        all.map(|(_, count)| count).sum()
    };
    println!("soak: {:?}, seed {seed}", begun.elapsed());
    for (what, count) in &*counts {
        println!("soak:   {count:>7}  {what}");
    }
    let mib = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed) >> 20;
    println!(
        "soak: survived {} kills, {} of them of the daemon alone, and {} faults; {} operations read {} MiB, every byte right; \
         {} were cut off by the end of a mount; \
         the cache took {} MiB of {} at most, the daemon {} MiB of memory",
        of("kills"),
        of("kills of the daemon"),
        of("fault:"),
        of("done:"),
        mib(&world.bytes),
        of("cut off"),
        mib(&world.largest_cache),
        CACHE >> 20,
        mib(&world.largest_memory),
    );
    assert!(
        of("done: at the end") == MODELS && of("kills") > 0 && of("fault:") > 0,
        "{counts:?}"
    );
    // Parts that are under way come on top, 8 MiB each.
    assert!(world.largest_cache.load(Ordering::Relaxed) <= CACHE + (64 << 20));
    assert!(world.largest_memory.load(Ordering::Relaxed) <= MEMORY + (64 << 20));
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        Some(
            args.get(at + 1)
                .unwrap_or_else(|| panic!("{name} needs a value"))
                .clone(),
        )
    };
    if args.iter().any(|arg| arg == "--list") {
        println!("soak: test");
        return;
    }
    // What `cargo test NAME` gives to all test programs.
    let filters: Vec<&String> = args
        .iter()
        .enumerate()
        .filter(|(at, arg)| {
            let is_value = *at > 0 && args[at - 1].starts_with("--");
            !is_value && !arg.starts_with('-')
        })
        .map(|(_, arg)| arg)
        .collect();
    if !filters.is_empty()
        && !filters
            .iter()
            .any(|filter| "soak".contains(filter.as_str()))
    {
        return;
    }
    let asked = value("--soak").map(|text| {
        ocifs::config::duration(&text).unwrap_or_else(|error| panic!("--soak: {error}"))
    });
    let span = asked.unwrap_or(Duration::from_secs(support::scale(40, 600)));
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let seed = value("--seed").map_or(now.as_nanos() as u64, |text| {
        text.parse().expect("--seed takes a number")
    });
    println!("soak: for {span:?}, seed {seed}");
    soak(span, seed);
}
