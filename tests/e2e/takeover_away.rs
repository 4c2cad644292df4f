//! The daemon is killed while no registry can be reached: what is cached is there as before, and who needs more waits for it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer, Published};
use crate::support::content::Content;
use crate::support::freeze::Freezer;
use crate::support::held::Held;
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch, within};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB + 5;
const SEED: u64 = 61;

struct Bench {
    held: Held,
    freezer: Freezer,
    published: Published,
    cache: tempfile::TempDir,
    _registry: Registry,
}

impl Bench {
    fn new() -> Self {
        let (registry, cache) = (Registry::open(), scratch("cache"));
        let bytes = Content::new(SEED).bytes(0, SIZE as usize);
        let layer = Layer::bytes(DOCKER_SAFETENSORS, bytes).at("model.safetensors");
        let published = Artifact::docker_v02()
            .layer(layer)
            .publish(&registry, "org/m:v1");
        let freezer = Freezer::start(registry.address());
        let held = Held::start(cache.path(), ["--prefetch", "none"]);
        Self {
            held,
            freezer,
            published,
            cache,
            _registry: registry,
        }
    }

    fn file(&self) -> PathBuf {
        let model = format!("{}/org/m:v1", self.freezer.host());
        self.held.path(&model).join("model.safetensors")
    }

    /// Nothing comes from the registry, and no connection to it is of use.
    fn away(&self, away: bool) {
        self.freezer.close(away);
        match away {
            true => self.freezer.freeze(),
            false => self.freezer.reset(),
        }
    }
}

fn right(file: &File, at: u64) {
    let mut bytes = vec![0; 100_000];
    file.read_exact_at(&mut bytes, at).unwrap();
    assert!(bytes == Content::new(SEED).bytes(at, bytes.len()));
}

/// Opens the node itself, without any name. That it takes long is no reason to give up.
fn reopened(file: &File) -> File {
    patiently(|| File::open(format!("/proc/self/fd/{}", file.as_raw_fd())))
}

/// Tries again while there is hope.
fn patiently<T>(mut what: impl FnMut() -> io::Result<T>) -> T {
    loop {
        match what() {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            done => return done.unwrap(),
        }
    }
}

#[test]
fn what_is_cached_needs_no_registry_after_a_take_over() {
    let bench = Bench::new();
    let path = bench.file();
    let file = within(PATIENCE, "read", move || {
        let file = File::open(path).unwrap();
        right(&file, 8 * MIB);
        file
    });
    bench.away(true);
    let killed = Instant::now();
    bench.held.kill_daemon();
    let path = bench.file();
    let file = within(PATIENCE, "read on", move || {
        // What the kernel has of it is no proof.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        right(&file, 8 * MIB);
        right(&reopened(&file), 8 * MIB);
        right(&File::open(&path).unwrap(), 8 * MIB);
        let model = path.parent().unwrap();
        assert_eq!(
            fs::metadata(model.join(".oci/manifest.json"))
                .unwrap()
                .len(),
            fs::read(model.join(".oci/manifest.json")).unwrap().len() as u64
        );
        file
    });
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    // What is not cached is waited for.
    let waiting = std::thread::spawn(move || right(&file, 20 * MIB));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!waiting.is_finished());
    bench.away(false);
    within(PATIENCE, "read the rest", move || waiting.join().unwrap());
    bench.held.umount().ok();
    bench.held.assert_gone();
}

#[test]
fn who_has_a_file_open_whose_manifest_is_gone_waits_for_it() {
    let bench = Bench::new();
    let path = bench.file();
    let (file, names) = within(PATIENCE, "read", move || {
        let file = File::open(&path).unwrap();
        right(&file, 8 * MIB);
        (file, fs::read_dir(path.parent().unwrap()).unwrap())
    });
    let manifest = bench.published.digest.replace("sha256:", "blobs/sha256/");
    fs::remove_file(bench.cache.path().join(manifest)).unwrap();
    bench.away(true);
    bench.held.kill_daemon();
    let killed = Instant::now();
    eventually(PATIENCE, "it is taken over", || {
        (bench.held.times() == 1).then_some(())
    });
    assert!(
        killed.elapsed() < Duration::from_secs(10),
        "nothing waits for the registry that need not"
    );
    let again = file.try_clone().unwrap();
    let reads = std::thread::spawn(move || right(&again, 8 * MIB + 4096 * 100));
    let opens = std::thread::spawn(move || right(&reopened(&file), 16 * MIB));
    let lists = std::thread::spawn(move || {
        let names = names.map(|entry| entry.map(|entry| entry.file_name()));
        names.collect::<io::Result<Vec<_>>>()
    });
    std::thread::sleep(Duration::from_secs(3));
    assert!(!reads.is_finished() && !opens.is_finished());
    bench.away(false);
    within(PATIENCE, "all go on", move || {
        reads.join().unwrap();
        opens.join().unwrap();
        match lists.join().unwrap() {
            Ok(names) => assert!(names.len() >= 2, "{names:?}"),
            // As a lookup that takes long. Whoever lists cannot go on after that.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}"),
        }
    });
    bench.held.umount().ok();
    bench.held.assert_gone();
}
