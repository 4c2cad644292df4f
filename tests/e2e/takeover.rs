//! The daemon is killed again and again, under readers of every kind: none sees a wrong byte, an error or a lost name.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::{Content, digest_file};
use crate::support::held::{Held, kill};
use crate::support::mount::ocifs;
use crate::support::process::{run, wait};
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, python, scale, scratch, within};

const WARM: u64 = (12 << 20) + 77;
const COLD: u64 = (40 << 20) + 1;

/// What the mounts of these tests show, and its truth.
pub struct Published {
    pub registry: Registry,
    dir: TempDir,
}

impl Published {
    /// `org/m:v1` with `warm` and `cold`, two weight files.
    pub fn new() -> Self {
        let dir = scratch("weights");
        let registry = Registry::open();
        let this = Self { registry, dir };
        let layer = |name: &str, seed, size| {
            let file = this.file(name);
            Content::new(seed).write(&file, size);
            Layer::file(DOCKER_SAFETENSORS, file).at(name)
        };
        Artifact::docker_v02()
            .layer(layer("warm.safetensors", 21, WARM))
            .layer(layer("cold.safetensors", 22, COLD))
            .publish(&this.registry, "org/m:v1");
        this
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A reader of a file in a model directory, until [`Readers::stop`].
    fn reader(&self, mode: &str, model: &Path, name: &str, stop: &Path) -> Child {
        let truth = self.file(name);
        python::command("reader.py")
            .arg(mode)
            .arg(model.join(name))
            .arg(digest_file(&truth).trim_start_matches("sha256:"))
            .arg(fs::metadata(&truth).unwrap().len().to_string())
            .arg(stop)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

/// Programs that read until they are told to stop.
pub struct Readers {
    children: Vec<(String, Child)>,
    stop: TempDir,
}

impl Readers {
    /// One of each mode and file.
    pub fn start(published: &Published, model: &Path, modes: &[(&str, &str)]) -> Self {
        let stop = scratch("stop");
        let children = modes.iter().map(|(mode, name)| {
            let child = published.reader(mode, model, name, &stop.path().join("now"));
            (format!("{mode} {name}"), child)
        });
        Self {
            children: children.collect(),
            stop,
        }
    }

    /// None has failed so far.
    pub fn check(&mut self) {
        for (what, child) in &mut self.children {
            if let Some(status) = child.try_wait().unwrap() {
                let mut said = String::new();
                let stderr = child.stderr.as_mut().unwrap();
                let _ = stderr.read_to_string(&mut said);
                panic!("{what}: {status}: {said}");
            }
        }
    }

    /// Each has read everything at least once, and nothing but what is right.
    pub fn stop(mut self) {
        self.check();
        fs::write(self.stop.path().join("now"), "").unwrap();
        for (what, mut child) in std::mem::take(&mut self.children) {
            wait(&mut child, 2 * PATIENCE).unwrap_or_else(|| panic!("{what} hangs"));
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{what}: {said}");
            let count = String::from_utf8_lossy(&output.stdout);
            let count: u32 = count.trim().parse().unwrap();
            assert!(count > 0, "{what} has read nothing");
            eprintln!("{what}: {count} times");
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        for (_, child) in &mut self.children {
            let _ = child.kill();
            let _ = wait(child, Duration::from_secs(5));
        }
    }
}

/// Not the same moment twice.
pub fn some_time(round: u32) {
    let millis = u64::from(round.wrapping_mul(2_654_435_761) >> 23);
    std::thread::sleep(Duration::from_millis(20 + millis));
}

/// `ocifs mount` with a holder that does not give up.
fn patient() -> std::process::Command {
    let mut command = ocifs(["mount"]);
    command.env("OCIFS_HOLDER_TRIES", "1000/1");
    command
}

#[test]
fn readers_through_the_daemon_do_not_notice_that_it_is_killed() {
    let published = Published::new();
    let proxy = Proxy::start(published.registry.address());
    proxy.always("/blobs/", Fault::Throttle(4 << 20));
    let cache = scratch("cache");
    let flags = ["-o", "passthrough=no"];
    let held = Held::start_as(patient(), cache.path(), flags);
    let model = held.path(&format!("{}/org/m:v1", proxy.host()));
    let modes = [
        ("read", "warm.safetensors"),
        ("direct", "warm.safetensors"),
        ("mmap", "warm.safetensors"),
        ("names", "warm.safetensors"),
        ("read", "cold.safetensors"),
        ("mmap", "cold.safetensors"),
    ];
    let mut readers = Readers::start(&published, &model, &modes);
    let kills = scale(24_u32, 400);
    for round in 0..kills {
        some_time(round);
        readers.check();
        held.kill_daemon();
        // Mostly it comes up, now and then it is killed before.
        if round % 4 != 0 {
            held.daemon();
        }
    }
    println!("{kills} kills, {} take-overs", held.times());
    proxy.behave();
    readers.stop();
    held.umount().ok();
    held.assert_gone();
}

#[test]
fn what_is_read_past_the_daemon_is_opened_and_read_on_while_it_is_killed() {
    let published = Published::new();
    let cache = scratch("cache");
    let args = published.registry.ocifs_args();
    let pull = format!("{}/org/m:v1", published.registry.host());
    let mut command = ocifs(["pull", "--cache-dir"]);
    command.arg(cache.path()).args(&args).arg(&pull);
    crate::support::process::run_command(&mut command, 2 * PATIENCE).ok();
    let held = Held::start_as(patient(), cache.path(), &args);
    let model = held.path(&pull);
    let (warm, cold) = (
        model.join("warm.safetensors"),
        model.join("cold.safetensors"),
    );
    let right = |file: &File, at: u64| {
        let mut bytes = vec![0; 100_000];
        file.read_exact_at(&mut bytes, at).unwrap();
        assert!(bytes == Content::new(21).bytes(at, bytes.len()));
    };
    let file = warm.clone();
    let first = within(PATIENCE, "open", move || File::open(file).unwrap());
    let modes = [
        ("read", "warm.safetensors"),
        ("mmap", "warm.safetensors"),
        ("direct", "cold.safetensors"),
        ("names", "cold.safetensors"),
    ];
    let mut readers = Readers::start(&published, &model, &modes);
    for round in 0..scale(14_u32, 200) {
        some_time(round);
        readers.check();
        // While nobody serves, what is open is read all the same.
        kill(held.holder(), Signal::STOP);
        held.kill_daemon();
        right(&first, u64::from(round) * 1001);
        kill(held.holder(), Signal::CONT);
        // The node is open past the daemon, so whoever joins must be given the same backing file, or gets EIO.
        let file = warm.clone();
        let joined = within(PATIENCE, "open beside", move || File::open(file).unwrap());
        right(&joined, 7);
    }
    readers.stop();
    assert_eq!(held.times(), u64::from(scale(14_u32, 200)));
    right(&first, WARM - 100_000);
    drop(first);
    // All closed: opened anew, still past the daemon.
    for path in [warm, cold] {
        let file = within(PATIENCE, "open", move || File::open(path).unwrap());
        let daemon = held.daemon();
        kill(daemon, Signal::STOP);
        let read = std::panic::catch_unwind(|| {
            within(PATIENCE, "read while it is stopped", move || {
                let mut bytes = vec![0; 1 << 20];
                file.read_exact_at(&mut bytes, 4 << 20).unwrap();
                (bytes, file)
            })
        });
        kill(daemon, Signal::CONT);
        let (bytes, _) = read.unwrap();
        let right = [21, 22].map(|seed| Content::new(seed).bytes(4 << 20, bytes.len()));
        assert!(right.contains(&bytes));
    }
    held.umount().ok();
    held.assert_gone();
}

#[test]
fn what_was_shown_stays_shown_though_the_tag_moves_and_the_registry_goes() {
    let Published { registry, dir } = Published::new();
    let cache = scratch("cache");
    let held = Held::start(cache.path(), registry.ocifs_args());
    let below = format!("{}/org/m:v1", registry.host());
    let model = held.path(&below);
    let (old, names) = {
        let model = model.clone();
        within(PATIENCE, "read", move || {
            let bytes = fs::read(model.join("warm.safetensors")).unwrap();
            let mut list = fs::read_dir(&model).unwrap();
            // In the middle of a listing.
            let first = list.next().unwrap().unwrap().file_name();
            assert!(bytes == Content::new(21).bytes(0, WARM as usize));
            (
                File::open(model.join("cold.safetensors")).unwrap(),
                (first, list),
            )
        })
    };
    kill(held.holder(), Signal::STOP);
    held.kill_daemon();
    let file = dir.path().join("new");
    Content::new(23).write(&file, 1 << 20);
    let layer = Layer::file(DOCKER_SAFETENSORS, &file).at("other.safetensors");
    Artifact::docker_v02()
        .layer(layer)
        .publish(&registry, "org/m:v1");
    kill(held.holder(), Signal::CONT);
    let rest = within(PATIENCE, "list on", move || {
        let (first, list) = names;
        let mut all = vec![first];
        all.extend(list.map(|entry| entry.unwrap().file_name()));
        all.sort();
        all
    });
    assert_eq!(rest, [".oci", "cold.safetensors", "warm.safetensors"]);
    // The old version, from the registry, by digest.
    within(PATIENCE, "read on", move || {
        let mut bytes = vec![0; 100_000];
        old.read_exact_at(&mut bytes, COLD - 100_000).unwrap();
        assert!(bytes == Content::new(22).bytes(COLD - 100_000, 100_000));
    });
    assert!(!model.join("other.safetensors").exists());
    // And without a registry, what is cached.
    drop(registry);
    held.kill_daemon();
    let bytes = within(PATIENCE, "read what is cached", move || {
        fs::read(model.join("warm.safetensors")).unwrap()
    });
    assert!(bytes == Content::new(21).bytes(0, WARM as usize));
    assert_eq!(held.times(), 2);
    held.umount().ok();
    held.assert_gone();
}

#[test]
fn another_program_takes_over_on_purpose_under_readers() {
    let published = Published::new();
    let (cache, bin) = (scratch("cache"), scratch("bin"));
    let program = bin.path().join("ocifs");
    let install = |more: &[u8]| {
        let mut bytes = fs::read(env!("CARGO_BIN_EXE_ocifs")).unwrap();
        bytes.extend_from_slice(more);
        let file = bin.path().join("built");
        fs::write(&file, &bytes).unwrap();
        replace(&program, &file);
        bytes.len() as u64
    };
    let version = |held: &Held| {
        let exe = format!("/proc/{}/exe", held.daemon());
        fs::metadata(exe).unwrap().len()
    };
    let first = install(b"");
    let mut command = std::process::Command::new(&program);
    command.env("HOME", "/nonexistent").arg("mount");
    let args = published.registry.ocifs_args();
    let held = Held::start_as(command, cache.path(), &args);
    let model = held.path(&format!("{}/org/m:v1", published.registry.host()));
    let modes = [
        ("read", "warm.safetensors"),
        ("mmap", "cold.safetensors"),
        ("names", "warm.safetensors"),
    ];
    let readers = Readers::start(&published, &model, &modes);
    assert_eq!(version(&held), first);
    let restart = || {
        let mut command = ocifs(["restart"]);
        crate::support::process::run_command(command.arg(held.root()), PATIENCE)
    };
    for more in [&b"2"[..], b"twenty"] {
        some_time(more.len() as u32);
        let installed = install(more);
        let before = held.daemon();
        let said = restart().ok();
        assert!(said.contains(&before.to_string()), "{said}");
        assert_ne!(held.daemon(), before);
        assert_eq!(version(&held), installed);
        let why = held.status()["takenOver"]["why"].to_string();
        assert!(why.contains("restart"), "{why}");
    }
    // A program that cannot take over is refused, and the daemon stays.
    let before = held.daemon();
    replace(&program, Path::new("/bin/false"));
    let said = restart().failed();
    assert!(said.contains("cannot take over"), "{said}");
    assert_eq!(held.daemon(), before);
    // One that says that it can, and then does not, is followed by the holder's own.
    replace(&program, Path::new("/bin/true"));
    restart().ok();
    assert_eq!(version(&held), first);
    readers.stop();
    held.umount().ok();
    held.assert_gone();
}

/// Puts a copy of `file` in the place of a program that may run. By a process that has no others to start: what is open for writing here is so in
/// the children of other tests until they execute something, and cannot be run meanwhile (ETXTBSY in execve(2)).
fn replace(program: &Path, file: &Path) {
    let new = program.with_extension("new");
    let (mode, from) = (OsStr::new("--mode=755"), file.as_os_str());
    run("install", [mode, from, new.as_os_str()]).ok();
    fs::rename(&new, program).unwrap();
}

#[test]
fn who_waits_through_a_take_over_can_be_killed_at_once() {
    let published = Published::new();
    let proxy = Proxy::start(published.registry.address());
    let cache = scratch("cache");
    let held = Held::start_as(patient(), cache.path(), ["--prefetch", "none"]);
    let file = held.path(&format!("{}/org/m:v1/cold.safetensors", proxy.host()));
    let path = file.clone();
    within(PATIENCE, "stat", move || fs::metadata(path).unwrap());
    proxy.always("/blobs/", Fault::Stall(0));
    for script in [
        "exec dd if=\"$0\" of=/dev/null bs=1M skip=20 iflag=direct",
        "exec tail -c 1000000 \"$0\"",
    ] {
        let mut reader = std::process::Command::new("bash")
            .args(["-c", script])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually(PATIENCE, script, || {
            let at = fs::read_to_string(format!("/proc/{}/wchan", reader.id())).unwrap();
            ["request_wait_answer", "folio_wait_bit_common"]
                .contains(&at.as_str())
                .then_some(())
        });
        for _ in 0..2 {
            held.kill_daemon();
            held.daemon();
        }
        // It was sent again, and waits: as long as its number is known, a signal reaches it.
        assert!(reader.try_wait().unwrap().is_none(), "it waits");
        std::thread::sleep(Duration::from_millis(300));
        reader.kill().unwrap();
        wait(&mut reader, Duration::from_secs(10)).unwrap_or_else(|| panic!("{script} hangs"));
    }
    proxy.behave();
    held.umount().ok();
    held.assert_gone();
}

#[test]
fn a_daemon_that_keeps_dying_is_given_up_with_an_error_and_the_point_can_be_mounted_again() {
    let published = Published::new();
    let proxy = Proxy::start(published.registry.address());
    let cache = scratch("cache");
    let mut command = ocifs(["mount"]);
    command.env("OCIFS_HOLDER_TRIES", "3/600");
    let held = Held::start_as(command, cache.path(), ["--prefetch", "none"]);
    let file = held.path(&format!("{}/org/m:v1/cold.safetensors", proxy.host()));
    let path = file.clone();
    let open = within(PATIENCE, "open", move || File::open(path).unwrap());
    proxy.always("/blobs/", Fault::Stall(0));
    let reader = std::thread::spawn(move || {
        let mut byte = [0];
        open.read_exact_at(&mut byte, 20 << 20)
    });
    for _ in 0..2 {
        held.kill_daemon();
        held.daemon();
    }
    assert!(!reader.is_finished(), "it waits");
    // As a killed daemon has it open while one of its threads waits in the kernel.
    let _stuck = held.device();
    held.kill_daemon();
    let end = Instant::now() + PATIENCE;
    while !reader.is_finished() {
        assert!(Instant::now() < end, "the reader hangs");
        std::thread::sleep(Duration::from_millis(20));
    }
    reader.join().unwrap().expect_err("nothing came");
    eventually(PATIENCE, "the holder ends", || {
        (!crate::support::held::is_alive(held.holder())).then_some(())
    });
    let error = rustix::fs::statfs(held.root()).unwrap_err();
    assert_eq!(error, rustix::io::Errno::NOTCONN);
    // Mounted anew at the same place.
    proxy.behave();
    let mut command = ocifs(["mount", "--cache-dir"]);
    command.arg(cache.path()).arg(held.root());
    crate::support::process::run_command(&mut command, PATIENCE).ok();
    let bytes = within(PATIENCE, "read", move || fs::read(file).unwrap());
    assert!(bytes == Content::new(22).bytes(0, COLD as usize));
    held.umount().ok();
    held.assert_gone();
}
