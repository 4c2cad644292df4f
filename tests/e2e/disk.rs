//! Disks that are full, die, lose power or are tampered with below a running daemon, and the limit of the cache: reads give the right
//! bytes all the same.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::artifact::{Artifact, DOCKER_FILE, DOCKER_SAFETENSORS, Layer, Published};
use crate::support::content::{Content, digest_file};
use crate::support::mount::{Mount, detach, run_ocifs};
use crate::support::process::run;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, heavy, scale, scratch};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The kernel must not read cache files by itself where a test is about what the daemon reads.
const NO_PASSTHROUGH: [&str; 2] = ["-o", "passthrough=no"];

/// A model of weight files of one size, behind a proxy.
struct Model {
    _registry: Registry,
    proxy: Proxy,
    published: Published,
    seed: u64,
    size: u64,
    count: u64,
}

impl Model {
    fn new(seed: u64, count: u64, size: u64) -> Self {
        let registry = Registry::open();
        let layers = (0..count).map(|file| {
            let bytes = Content::new(seed + file).bytes(0, size as usize);
            Layer::bytes(DOCKER_SAFETENSORS, bytes).at(&format!("w{file}"))
        });
        let published = Artifact::docker_v02()
            .layers(layers)
            .layer(Layer::bytes(DOCKER_FILE, "{}").at("config.json"))
            .publish(&registry, "org/m:v1");
        Self {
            proxy: Proxy::start(registry.address()),
            _registry: registry,
            published,
            seed,
            size,
            count,
        }
    }

    fn file(&self, file: u64) -> String {
        format!("{}/org/m:v1/w{file}", self.proxy.host())
    }

    fn bytes(&self, file: u64) -> Vec<u8> {
        Content::new(self.seed + file).bytes(0, self.size as usize)
    }

    #[track_caller]
    fn read(&self, mount: &Mount, file: u64) {
        assert!(mount.read(&self.file(file)) == self.bytes(file), "{file}");
    }

    #[track_caller]
    fn read_all(&self, mount: &Mount) {
        (0..self.count).for_each(|file| self.read(mount, file));
    }

    fn sealed(&self, cache: &Path, file: u64) -> PathBuf {
        let hex = &self.published.layers[file as usize]["sha256:".len()..];
        cache.join("blobs/sha256").join(hex)
    }

    fn until_sealed(&self, cache: &Path, file: u64) {
        eventually(PATIENCE, "the blob is sealed", || {
            self.sealed(cache, file).exists().then_some(())
        });
    }
}

/// A file system of its own, taken down with its guard.
struct FileSystem {
    at: PathBuf,
    dir: TempDir,
}

impl FileSystem {
    fn tmpfs(options: &str) -> Self {
        let dir = scratch("disk");
        let at = dir.path().join("disk");
        fs::create_dir(&at).unwrap();
        let disk = Self { at, dir };
        disk.mount([
            "-t",
            "tmpfs",
            "-o",
            &format!("mode=0700,{options}"),
            "tmpfs",
        ]);
        disk
    }

    /// ext4 in a file.
    fn ext4(size: u64) -> Self {
        let dir = scratch("disk");
        let at = dir.path().join("disk");
        fs::create_dir(&at).unwrap();
        let disk = Self { at, dir };
        let image = File::create(disk.image()).unwrap();
        image.set_len(size).unwrap();
        run(
            "mkfs.ext4",
            ["-q".as_ref(), "-F".as_ref(), disk.image().as_os_str()],
        )
        .ok();
        disk.mount(["-o".as_ref(), "loop".as_ref(), disk.image().as_os_str()]);
        disk
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn mount<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) {
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        run("mount", args.chain([self.at.clone().into_os_string()])).ok();
    }

    fn unmount(&self) {
        run("umount", [&self.at]).ok();
    }

    /// From now on nothing can be read from it or written to it: `EXT4_IOC_SHUTDOWN`, with the journal written or not.
    fn die(&self, with_journal: bool) {
        const SHUTDOWN: libc::Ioctl = 0x8004_587D_u32 as libc::Ioctl;
        let how: u32 = if with_journal { 1 } else { 2 };
        let dir = File::open(&self.at).unwrap();
        // SAFETY: the descriptor is open, and the kernel reads one `u32`.
        let done = unsafe { libc::ioctl(dir.as_raw_fd(), SHUTDOWN, &raw const how) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Where the cache goes.
    fn cache(&self) -> PathBuf {
        self.at.join("cache")
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        detach(&self.at);
    }
}

fn status(mount: &Mount) -> Value {
    let answer = run_ocifs(["status", "--json", mount.root().to_str().unwrap()]).ok();
    serde_json::from_str::<Value>(&answer).unwrap()["mounts"][0].clone()
}

fn warnings(mount: &Mount) -> usize {
    mount.log().matches("the cache fails").count()
}

#[test]
fn a_disk_that_is_full_at_any_point_makes_reads_slower_and_not_wrong() {
    let _heavy = heavy();
    let model = Model::new(8000, 3, MIB + 4321);
    let (mut refused, mut full, mut fitted) = (0, 0, 0);
    // From a disk that cannot take the empty cache to one that takes all, in bytes and in files.
    let bytes = (0..scale(14, 60)).map(|step| format!("size={}k", 12 + step * scale(300, 70)));
    let files =
        (0..scale(8, 30)).map(|step| format!("size=64m,nr_inodes={}", 5 + step * scale(4, 1)));
    for options in bytes.chain(files) {
        let disk = FileSystem::tmpfs(&options);
        let cache = disk.cache();
        let dir = cache.to_str().unwrap();
        // Whether there is room for a cache at all.
        let made = run_ocifs(["cache", "ls", "--cache-dir", dir]);
        if !made.status.success() {
            let said = made.failed();
            assert!(said.contains("No space left"), "{options}: {said}");
            refused += 1;
            continue;
        }
        let mount = Mount::start(&cache, NO_PASSTHROUGH);
        for _ in 0..2 {
            model.read_all(&mount);
        }
        let sealed = (0..model.count).filter(|file| model.sealed(&cache, *file).exists());
        if (sealed.count() as u64) < model.count && warnings(&mount) > 0 {
            full += 1;
            assert_eq!(warnings(&mount), 1, "{options}: {}", mount.log());
            let trouble = status(&mount)["cache"]["trouble"].clone();
            assert!(trouble.is_string(), "{options}: {trouble}");
        } else {
            fitted += 1;
        }
        mount.kill();
        // What is there is right, whatever was cut off.
        for entry in fs::read_dir(cache.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert_eq!(digest_file(&path), format!("sha256:{name}"), "{options}");
        }
        // With room again it goes on from there.
        run(
            "mount",
            [
                "-o",
                "remount,size=64m,nr_inodes=1000",
                disk.at.to_str().unwrap(),
            ],
        )
        .ok();
        let mount = Mount::start(&cache, NO_PASSTHROUGH);
        model.read_all(&mount);
        (0..model.count).for_each(|file| model.until_sealed(&cache, file));
        mount.unmount();
        run_ocifs(["cache", "verify", "--cache-dir", dir]).ok();
    }
    println!("{refused} disks too small for an empty cache, {full} filled up, {fitted} had room");
    assert!(full > 3 && fitted > 0, "{full} {fitted}");
}

#[test]
fn a_disk_that_dies_below_the_cache_is_done_without_and_used_again_when_it_is_back() {
    let _heavy = heavy();
    let model = Model::new(8100, 4, 3 * MIB + 77);
    let disk = FileSystem::ext4(64 * MIB);
    let cache = disk.cache();
    let mount = Mount::start(
        &cache,
        NO_PASSTHROUGH.into_iter().chain(["--prefetch", "none"]),
    );
    // One whole, one in part and mapped for replies, two not at all.
    model.read(&mount, 0);
    let part = MIB as usize + 100;
    let head = mount.read_at(&model.file(1), 0, part);
    assert!(head == model.bytes(1)[..part]);
    let held = File::open(mount.path(&model.file(1))).unwrap();
    disk.die(false);
    for _ in 0..2 {
        model.read_all(&mount);
    }
    let mut bytes = vec![0; model.size as usize];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == model.bytes(1));
    assert_eq!(warnings(&mount), 1, "{}", mount.log());
    let trouble = status(&mount)["cache"]["trouble"].clone();
    assert!(trouble.is_string(), "{trouble}");
    // A new disk comes in its place.
    detach(&disk.at);
    disk.mount(["-t", "tmpfs", "-o", "mode=0700,size=64m", "tmpfs"]);
    run_ocifs(["cache", "ls", "--cache-dir", cache.to_str().unwrap()]).ok();
    eventually(PATIENCE, "the cache is used again", || {
        // What the page cache has is none of the daemon's doing.
        for file in 2..4 {
            let file = File::open(mount.path(&model.file(file))).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        mount.read_at(&model.file(3), 0, 4096);
        model.read(&mount, 2);
        let back = status(&mount)["cache"]["trouble"].is_null();
        (back && model.sealed(&cache, 2).exists()).then_some(())
    });
    model.read_all(&mount);
    drop(held);
    mount.unmount();
}

/// Handles that the kernel reads without us are told of their disk by the kernel; whoever opens the same file after it has failed is
/// served from the registry, beside them.
#[test]
fn what_is_opened_after_the_disk_has_died_comes_from_the_registry() {
    let model = Model::new(8250, 2, 3 * MIB + 4321);
    let disk = FileSystem::ext4(64 * MIB);
    let cache = disk.cache();
    let mount = Mount::start(&cache, ["--prefetch", "none"]);
    if status(&mount)["passthrough"] != true {
        println!("this kernel has no passthrough");
        return;
    }
    for file in 0..model.count {
        model.read(&mount, file);
        model.until_sealed(&cache, file);
        mount.verified(&model.file(file));
    }
    let open = |file: u64| File::open(mount.path(&model.file(file))).unwrap();
    let old = open(0);
    assert_eq!(
        mount.xattr(&model.file(0), "user.ocifs.served").as_deref(),
        Some("passthrough")
    );
    // What the kernel has of the cache's files in memory goes, so that the disk is asked.
    for file in 0..model.count {
        let sealed = File::open(model.sealed(&cache, file)).unwrap();
        sealed.sync_all().unwrap();
        rustix::fs::fadvise(&sealed, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    disk.die(false);
    let mut bytes = vec![0; model.size as usize];
    let error = old.read_exact_at(&mut bytes, 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    // A disk that worked a moment ago is believed to.
    std::thread::sleep(Duration::from_millis(300));
    // Twice, and with the first ones held open.
    let new: Vec<_> = (0..2).flat_map(|_| [open(0), open(1)]).collect();
    for (at, file) in new.iter().enumerate() {
        bytes.fill(0);
        file.read_exact_at(&mut bytes, 0)
            .unwrap_or_else(|error| panic!("{at}: {error}: {}", mount.log()));
        assert!(bytes == model.bytes(at as u64 % 2), "{at}");
    }
    model.read_all(&mount);
    assert!(old.read_exact_at(&mut bytes, 0).is_err());
    drop((old, new));
    model.read_all(&mount);
    mount.unmount();
}

#[test]
fn power_cuts_lose_no_sealed_blob_and_bring_no_wrong_byte() {
    let _heavy = heavy();
    let model = Model::new(8200, 6, MIB + 5);
    model.proxy.always("/blobs/", Fault::Throttle(30 * MIB));
    let disk = FileSystem::ext4(64 * MIB);
    let cache = disk.cache();
    let (mut kept, cuts) = (0, scale(10, 200));
    for cut in 0..cuts {
        let mount = Mount::start(&cache, NO_PASSTHROUGH);
        let first = cut % model.count;
        model.read(&mount, first);
        model.until_sealed(&cache, first);
        // The others are under way in the background.
        std::thread::sleep(Duration::from_millis(cut * 37 % 250));
        let sealed: Vec<_> = (0..model.count)
            .filter(|file| model.sealed(&cache, *file).exists())
            .collect();
        // The last one may have its name already and not be safe yet.
        std::thread::sleep(Duration::from_millis(20));
        disk.die(false);
        mount.kill();
        disk.unmount();
        disk.mount(["-o".as_ref(), "loop".as_ref(), disk.image().as_os_str()]);
        assert!(sealed.contains(&first));
        assert!(
            model.sealed(&cache, first).exists(),
            "cut {cut}: a sealed blob is lost"
        );
        for entry in fs::read_dir(cache.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert_eq!(digest_file(&path), format!("sha256:{name}"), "cut {cut}");
            kept += 1;
        }
        let mount = Mount::start(&cache, NO_PASSTHROUGH);
        model.read_all(&mount);
        mount.unmount();
        if cut % model.count == model.count - 1 {
            fs::remove_dir_all(&cache).unwrap();
        }
    }
    println!("{cuts} power cuts, {kept} sealed blobs after them, all right");
}

#[test]
fn a_cache_file_that_somebody_truncates_ends_no_daemon() {
    let model = Model::new(8300, 3, 4 * MIB);
    let cache = scratch("cache");
    let cache = cache.path();
    let flags = NO_PASSTHROUGH.into_iter().chain(["--prefetch", "none"]);
    let mount = Mount::start(cache, flags);
    model.read(&mount, 0);
    model.until_sealed(cache, 0);
    let held = File::open(mount.path(&model.file(0))).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    // Of the first two files the cache's copies are cut off while replies come out of their mappings. What they get is what somebody
    // makes of it, an error at worst; nobody waits for ever, and the third one is as ever.
    let readers: Vec<_> = (0..6)
        .map(|reader| {
            let (file, stop) = (reader % 3, Arc::clone(&stop));
            let (path, expected) = (mount.path(&model.file(file)), model.bytes(file));
            std::thread::spawn(move || {
                let mut reads = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    let opened = File::open(&path).unwrap();
                    // What the page cache has is none of the daemon's doing.
                    rustix::fs::fadvise(&opened, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    let mut bytes = vec![0; expected.len()];
                    let read = opened.read_exact_at(&mut bytes, 0);
                    assert!(file < 2 || (read.is_ok() && bytes == expected), "{read:?}");
                    reads += 1;
                }
                reads
            })
        })
        .collect();
    let cut: Vec<String> = model.published.layers[..2]
        .iter()
        .map(|layer| layer["sha256:".len()..].to_owned())
        .collect();
    for round in (0..40).rev() {
        std::thread::sleep(Duration::from_millis(25));
        for hex in &cut {
            for path in [
                cache.join("blobs/sha256").join(hex),
                cache.join("ocifs/partial").join(format!("{hex}.data")),
            ] {
                let file = File::options().write(true).open(path);
                let _ = file.and_then(|file| file.set_len(round * 90_000));
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    let reads = readers.into_iter().map(|reader| reader.join().unwrap());
    println!("{} reads beside 40 truncations", reads.sum::<u64>());
    drop(held);
    model.read(&mount, 2);
    mount.unmount();
    let verify = ["cache", "verify", "--cache-dir", cache.to_str().unwrap()];
    run_ocifs(verify);
    let mount = Mount::start(cache, NO_PASSTHROUGH);
    model.read_all(&mount);
    mount.unmount();
    run_ocifs(verify).ok();
}

/// Bytes that a cache takes on its disk: its files', and those of files that have lost their name and that somebody has open or mapped.
fn taken(cache: &Path) -> u64 {
    let mut sum = 0;
    let mut folders = vec![cache.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            // Files come and go beneath us.
            let Ok(found) = entry.metadata() else {
                continue;
            };
            if found.is_dir() {
                folders.push(entry.path());
            } else {
                sum += found.blocks() * 512;
            }
        }
    }
    let mut nameless = std::collections::BTreeMap::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        for kind in ["fd", "map_files"] {
            for link in fs::read_dir(process.path().join(kind))
                .into_iter()
                .flatten()
                .flatten()
            {
                let Ok(target) = fs::read_link(link.path()) else {
                    continue;
                };
                let gone = target.to_string_lossy().ends_with(" (deleted)");
                if target.starts_with(cache) && gone {
                    let found = fs::metadata(link.path());
                    nameless
                        .extend(found.map(|found| ((found.dev(), found.ino()), found.blocks())));
                }
            }
        }
    }
    sum + nameless.values().sum::<u64>() * 512
}

#[test]
fn the_limit_holds_with_deleted_files_large_blobs_and_two_processes() {
    let _heavy = heavy();
    let limit = 64 * MIB;
    let (small, large) = (
        Model::new(8400, 8, 14 * MIB),
        Model::new(8500, 1, 100 * MIB),
    );
    // Wrong bytes: what came of them goes while readers have it open.
    small
        .proxy
        .times(&small.published.layers[2], 1, Fault::Corrupt(5 * MIB));
    let cache = scratch("cache");
    let flags = ["--cache-size".to_owned(), limit.to_string()];
    let mounts = [
        Mount::start(cache.path(), &flags),
        Mount::start(cache.path(), &flags),
    ];
    let stop = Arc::new(AtomicBool::new(false));
    let sampler = {
        let (stop, cache) = (Arc::clone(&stop), cache.path().canonicalize().unwrap());
        std::thread::spawn(move || {
            let (mut peak, mut samples) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                peak = peak.max(taken(&cache));
                samples += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            (peak, samples)
        })
    };
    std::thread::scope(|scope| {
        for (turn, mount) in mounts.iter().enumerate() {
            let (small, large) = (&small, &large);
            scope.spawn(move || {
                let mut mapped = Vec::new();
                for round in 0..2 {
                    for file in 0..small.count {
                        let file = (file + turn as u64 * 3 + round) % small.count;
                        // The kernel maps it, and it is closed, as engines do it.
                        if file.is_multiple_of(3) {
                            mapped
                                .push(mapping(&mount.path(&small.file(file)), small.size as usize));
                        }
                        match mount.try_read(&small.file(file)) {
                            Ok(bytes) => assert!(file == 2 || bytes == small.bytes(file), "{file}"),
                            Err(error) => assert!(file == 2, "{file}: {error}"),
                        }
                    }
                    large.read(mount, 0);
                    mapped.truncate(1);
                }
            });
        }
    });
    stop.store(true, Ordering::Relaxed);
    let (peak, samples) = sampler.join().unwrap();
    println!(
        "{} KiB at most in {samples} samples, the limit is {} KiB",
        peak / KIB,
        limit / KIB
    );
    assert!(samples > 20);
    // The parts under way take their room under the lock; beside blobs there are maps, the index, tags.
    assert!(peak <= limit + 8 * MIB, "{} MiB", peak / MIB);
    mounts.into_iter().for_each(Mount::unmount);
}

/// A mapping of a file that is closed, with each page looked at.
fn mapping(path: &Path, size: usize) -> Mapping {
    let file = File::open(path).unwrap();
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    Mapping { at, size }
}

struct Mapping {
    at: *mut libc::c_void,
    size: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped, and nobody uses it any more.
        unsafe { libc::munmap(self.at, self.size) };
    }
}

#[test]
fn verify_takes_away_what_rotted_while_it_is_mounted_and_open() {
    let model = Model::new(8600, 2, 3 * MIB);
    let cache = scratch("cache");
    let dir = cache.path().to_str().unwrap();
    let mount = Mount::start(cache.path(), NO_PASSTHROUGH);
    model.read_all(&mount);
    (0..2).for_each(|file| model.until_sealed(cache.path(), file));
    let held = File::open(mount.path(&model.file(0))).unwrap();
    let file = File::options()
        .write(true)
        .open(model.sealed(cache.path(), 0))
        .unwrap();
    file.write_all_at(b"rotten", 2 * MIB).unwrap();
    drop(file);
    let said = run_ocifs(["cache", "verify", "--cache-dir", dir]).failed();
    assert!(said.contains("damaged, removed"), "{said}");
    assert!(!model.sealed(cache.path(), 0).exists());
    // Whoever has it open reads on; nothing was cut off below him.
    let mut bytes = vec![0; MIB as usize];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == model.bytes(0)[..MIB as usize]);
    drop(held);
    eventually(PATIENCE, "it is fetched again", || {
        (mount.read(&model.file(0)) == model.bytes(0)).then_some(())
    });
    mount.unmount();
    let mount = Mount::start(cache.path(), NO_PASSTHROUGH);
    model.read_all(&mount);
    mount.unmount();
    run_ocifs(["cache", "verify", "--cache-dir", dir]).ok();
    let removed = fs::read_dir(cache.path().join("ocifs/removed"))
        .unwrap()
        .count();
    assert_eq!(removed, 0, "what nobody reads any more is gone");
}

#[test]
fn a_cache_of_somebody_else_is_refused_or_harmless() {
    let model = Model::new(8700, 2, 3 * MIB);
    let pull = |dir: &Path| {
        let reference = format!("{}/org/m:v1", model.proxy.host());
        run_ocifs(["pull", "--cache-dir", dir.to_str().unwrap(), &reference])
    };
    let around = scratch("around");
    let made = |name: &str| {
        let dir = around.path().join(name);
        pull(&dir).ok();
        dir
    };
    let secret = around.path().join("secret");
    fs::write(&secret, "a secret of the host").unwrap();
    // Refused, and why.
    let open = made("open");
    chmod(&open, 0o777);
    let said = pull(&open).failed();
    assert!(said.contains("chmod o-w"), "{said}");
    let foreign = made("foreign");
    std::os::unix::fs::chown(foreign.join("blobs/sha256"), Some(12_345), None).unwrap();
    let said = pull(&foreign).failed();
    assert!(said.contains("belongs to user 12345"), "{said}");
    let linked = made("linked");
    fs::remove_dir_all(linked.join("ocifs/partial")).unwrap();
    std::os::unix::fs::symlink(around.path(), linked.join("ocifs/partial")).unwrap();
    let said = pull(&linked).failed();
    assert!(said.contains("must be a directory"), "{said}");

    // Harmless: pipes, devices, links and nonsense in the place of every file.
    let dir = around.path().join("hostile");
    run_ocifs(["cache", "ls", "--cache-dir", dir.to_str().unwrap()]).ok();
    let hex: Vec<_> = model
        .published
        .layers
        .iter()
        .map(|layer| layer[7..].to_owned())
        .collect();
    let fifo = |path: PathBuf| run("mkfifo", [path]).ok();
    fifo(dir.join("blobs/sha256").join(&hex[0]));
    std::os::unix::fs::symlink(
        &secret,
        dir.join("ocifs/partial").join(format!("{}.data", hex[1])),
    )
    .unwrap();
    fifo(dir.join("ocifs/partial").join(format!("{}.map", hex[1])));
    run(
        "mknod",
        [
            dir.join("ocifs/notes")
                .join(format!("{}.listing", hex[0]))
                .to_str()
                .unwrap(),
            "c",
            "1",
            "5",
        ],
    )
    .ok();
    fifo(dir.join("ocifs/notes").join(format!("{}.unpacked", hex[1])));
    fifo(dir.join("ocifs/removed").join(format!("{}-1", hex[0])));
    fifo(dir.join("ocifs/unpacked").join(format!("{}.tar", hex[0])));
    fifo(dir.join("ocifs/.tmp-1-1"));
    for name in 0..3 {
        fifo(
            dir.join("ocifs/tags")
                .join(format!("{}.json", hex[0].replace('a', &name.to_string()))),
        );
    }
    for index in [
        "[".repeat(1_000_000),
        format!(
            "{{\"manifests\":{}{}}}",
            "[".repeat(200_000),
            "]".repeat(200_000)
        ),
        "{\"manifests\":[{\"digest\":\"sha256:../../../../secret\"}]}".to_owned(),
    ] {
        fs::write(dir.join("index.json"), index).unwrap();
        let mount = Mount::start(&dir, NO_PASSTHROUGH);
        model.read_all(&mount);
        assert!(mount.peak_memory() < 700 * MIB);
        mount.unmount();
        run_ocifs(["cache", "ls", "--cache-dir", dir.to_str().unwrap()]).ok();
        run_ocifs(["cache", "gc", "--cache-dir", dir.to_str().unwrap()]).ok();
    }
    File::create(dir.join("index.json"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let mount = Mount::start(&dir, NO_PASSTHROUGH);
    model.read_all(&mount);
    mount.unmount();
    assert_eq!(fs::read(&secret).unwrap(), b"a secret of the host");

    // A chunk map that vouches for everything, over a file of zeros; and others of every wrong length.
    let dir = made("lies");
    for (file, hex) in hex.iter().enumerate() {
        let partial = dir.join("ocifs/partial");
        let data = partial.join(format!("{hex}.data"));
        fs::rename(model.sealed(&dir, file as u64), &data).unwrap();
        File::options()
            .write(true)
            .open(&data)
            .unwrap()
            .write_all_at(&[0; 100_000], 50_000)
            .unwrap();
        fs::write(
            partial.join(format!("{hex}.map")),
            map_that_lies(hex, model.size),
        )
        .unwrap();
    }
    let mount = Mount::start(&dir, NO_PASSTHROUGH);
    model.read_all(&mount);
    mount.kill();
    for length in [0, 1, 63, 64, 65, 1 << 20, 1 << 40] {
        for hex in &hex {
            let map = dir.join("ocifs/partial").join(format!("{hex}.map"));
            File::create(&map).unwrap().set_len(length).unwrap();
            let _ = fs::rename(
                dir.join("blobs/sha256").join(hex),
                map.with_extension("data"),
            );
        }
        let mount = Mount::start(&dir, NO_PASSTHROUGH);
        model.read_all(&mount);
        mount.kill();
    }
}

fn chmod(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A map as `cache/chunkmap.rs` draws it, which says of each chunk that it is there, with a checksum that is made up.
fn map_that_lies(hex: &str, size: u64) -> Vec<u8> {
    let mut map = b"OCIFSMAP\x01\0\0\0\0\x40\0\0".to_vec();
    map.extend(size.to_le_bytes());
    map.extend((0..32).map(|at| u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).unwrap()));
    let sum = crc32c(&map);
    map.extend([0; 4]);
    map.extend(sum.to_le_bytes());
    map.extend([0xAB; 4].repeat(size.div_ceil(16 << 10) as usize));
    map
}

/// CRC-32C, bit by bit (RFC 3720, appendix B.4).
fn crc32c(bytes: &[u8]) -> u32 {
    let bit = |sum: u32, _| (sum >> 1) ^ (0x82F6_3B78 & (sum & 1).wrapping_neg());
    !bytes
        .iter()
        .fold(!0, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), bit))
}

/// A control group for one process with a limit of memory, in whichever hierarchy this machine has the memory controller.
struct Group {
    dir: PathBuf,
    events: PathBuf,
}

impl Group {
    fn new(limit: u64) -> Self {
        let name = format!("ocifs-test-{}", std::process::id());
        let (old, new) = (
            Path::new("/sys/fs/cgroup/memory"),
            Path::new("/sys/fs/cgroup"),
        );
        let (dir, file, events) = if old.join("memory.limit_in_bytes").exists() {
            (
                old.join(name),
                "memory.limit_in_bytes",
                "memory.oom_control",
            )
        } else {
            // The controller is handed down where it is not yet.
            let _ = fs::write(new.join("cgroup.subtree_control"), "+memory");
            (new.join(name), "memory.max", "memory.events")
        };
        fs::create_dir(&dir).expect("the memory controller of control groups, version 1 or 2");
        fs::write(dir.join(file), limit.to_string()).expect("a limit can be set");
        // What is swapped out is not taken.
        let _ = fs::write(dir.join("memory.swap.max"), "0");
        let events = dir.join(events);
        Self { dir, events }
    }

    fn procs(&self) -> std::ffi::CString {
        std::ffi::CString::new(self.dir.join("cgroup.procs").to_str().unwrap()).unwrap()
    }

    /// How many of its processes were killed for want of memory.
    fn killed(&self) -> u64 {
        let events = fs::read_to_string(&self.events).unwrap();
        let line = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "));
        line.expect("it counts them").trim().parse().unwrap()
    }

    /// The most that it ever took, page cache included.
    fn peak(&self) -> u64 {
        ["memory.max_usage_in_bytes", "memory.peak"]
            .iter()
            .find_map(|name| fs::read_to_string(self.dir.join(name)).ok())
            .map_or(0, |text| text.trim().parse().unwrap())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty once its process is gone.
        for _ in 0..100 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn sixty_four_readers_in_a_group_of_the_budget_and_a_little_are_served() {
    use std::os::unix::process::CommandExt as _;

    let _heavy = heavy();
    const EACH: u64 = 12 * MIB;
    let memory = 64 * MIB;
    // Raw weights, and layers that are compressed.
    let raw = Model::new(8800, 10, EACH);
    let content = |layer: u64| {
        // Half of it repeats, so that compressing it is worth something.
        let half = Content::new(8900 + layer).bytes(0, EACH as usize / 2);
        [half.clone(), half].concat()
    };
    let registry = Registry::open();
    let layers = (0..6_u64).map(|layer| {
        let bytes = content(layer);
        let name = format!("c{layer}");
        let tar = crate::support::artifact::tar([(name.as_str(), &bytes[..])]);
        let (kind, packed) = match layer % 2 {
            0 => ("application/vnd.cncf.model.weight.v1.tar+gzip", gzip(&tar)),
            _ => (
                "application/vnd.cncf.model.weight.v1.tar+zstd",
                zstd::encode_all(&tar[..], 1).unwrap(),
            ),
        };
        Layer::bytes(kind, packed)
    });
    let packed = Artifact::modelpack("cncf")
        .layers(layers)
        .publish(&registry, "org/packed:v1");
    let group = Group::new(memory + 64 * MIB);
    let cache = scratch("cache");
    let flags = [
        "--memory".to_owned(),
        memory.to_string(),
        "--cache-size".to_owned(),
        (1024 * MIB).to_string(),
        // What the compressed layers hold is known when they are unpacked, beside all else on few cores.
        "-o".to_owned(),
        "metadata-timeout=60s".to_owned(),
    ];
    let procs = group.procs();
    let mut mount = Mount::start_as(cache.path(), flags, |command| {
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(move || {
                let file = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                // Zero is whoever writes it.
                match libc::write(file, c"0".as_ptr().cast(), 1) {
                    1 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
    });
    let readers: Vec<_> = (0..64_u64)
        .map(|reader| {
            let (path, expected) = match reader % 4 {
                3 => {
                    let layer = reader / 4 % 6;
                    let path = mount.path(&format!("{}/c{layer}", packed.reference));
                    (path, content(layer))
                }
                _ => (mount.path(&raw.file(reader % 10)), raw.bytes(reader % 10)),
            };
            std::thread::spawn(move || {
                let file =
                    File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let mut bytes = vec![0; MIB as usize];
                // Each begins somewhere else.
                for step in 0..EACH / MIB {
                    let at = (step + reader) % (EACH / MIB) * MIB;
                    file.read_exact_at(&mut bytes, at).unwrap();
                    let expected = &expected[at as usize..][..bytes.len()];
                    assert!(bytes == expected, "{} {at}", path.display());
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(group.killed(), 0, "killed for want of memory");
    assert!(mount.wait(Duration::ZERO).is_none(), "the daemon lives");
    println!(
        "{} MiB at most, of {}",
        group.peak() / MIB,
        (memory + 64 * MIB) / MIB
    );
    mount.unmount();
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
