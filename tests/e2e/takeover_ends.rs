//! However a mount's daemon and holder end, and in whatever order: nothing is left, nobody hangs, and status tells the truth.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::support::artifact::{Artifact, DOCKER_FILE, Layer};
use crate::support::held::{Held, device_of, is_alive, kill, processes};
use crate::support::model::SampleModel;
use crate::support::mount::{is_mounted, ocifs};
use crate::support::process::{run_command, wait};
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch, within};

struct Bench {
    held: Held,
    below: String,
    _registry: Registry,
    _cache: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let registry = Registry::open();
        let model = SampleModel::new(40);
        let published = model.docker_v02().publish(&registry, "org/m:v1");
        let below = published.reference;
        let cache = scratch("cache");
        let held = Held::start(cache.path(), registry.ocifs_args());
        let this = Self {
            held,
            below,
            _registry: registry,
            _cache: cache,
        };
        this.reads();
        this
    }

    fn reads(&self) {
        let path = self.held.path(&self.below).join("config.json");
        let bytes = within(PATIENCE, "read", move || fs::read(path).unwrap());
        assert!(!bytes.is_empty());
    }

    /// The daemon is dead, and nobody has started the next one.
    fn without_daemon(&self) {
        kill(self.held.holder(), Signal::STOP);
        let daemon = self.held.kill_daemon();
        eventually(PATIENCE, "the daemon is dead", || {
            (!is_alive(daemon)).then_some(())
        });
    }
}

fn ended(held: &Held) {
    eventually(PATIENCE, "the mount ends", || {
        (!is_mounted(held.root())).then_some(())
    });
    held.assert_gone();
    let logs = fs::read_dir("/run/ocifs").unwrap().flatten();
    let name = held
        .root()
        .to_str()
        .unwrap()
        .trim_matches('/')
        .replace('/', "-");
    let log = logs
        .map(|entry| entry.file_name())
        .find(|file| file.to_string_lossy().trim_end_matches(".log") == name);
    assert_eq!(log, None, "a log that nobody needs");
}

#[test]
fn sigterm_to_the_holder_or_the_daemon_ends_the_mount() {
    for to_holder in [true, false] {
        let bench = Bench::new();
        let (holder, daemon) = (bench.held.holder(), bench.held.daemon());
        assert!(is_alive(holder) && is_alive(daemon));
        kill(if to_holder { holder } else { daemon }, Signal::TERM);
        ended(&bench.held);
    }
}

#[test]
fn sigterm_to_a_holder_without_a_daemon_ends_the_mount() {
    let bench = Bench::new();
    kill(bench.held.holder(), Signal::STOP);
    bench.held.kill_daemon();
    kill(bench.held.holder(), Signal::TERM);
    kill(bench.held.holder(), Signal::CONT);
    ended(&bench.held);
}

#[test]
fn umount_ends_the_holder_while_there_is_no_daemon() {
    let bench = Bench::new();
    bench.without_daemon();
    let point = bench.held.root().to_owned();
    let umount = std::thread::spawn(move || run_command(ocifs(["umount"]).arg(&point), PATIENCE));
    eventually(PATIENCE, "it is unmounted", || {
        (!is_mounted(bench.held.root())).then_some(())
    });
    kill(bench.held.holder(), Signal::CONT);
    umount.join().unwrap().ok();
    bench.held.assert_gone();
}

#[test]
fn umount_in_the_middle_of_a_take_over_is_a_good_end() {
    for _ in 0..4 {
        let bench = Bench::new();
        bench.held.kill_daemon();
        bench.held.umount().ok();
        bench.held.assert_gone();
    }
}

#[test]
fn without_its_holder_a_daemon_goes_on_and_says_so() {
    let bench = Bench::new();
    kill(bench.held.holder(), Signal::KILL);
    eventually(PATIENCE, "status tells", || {
        let status = bench.held.status();
        let by = status["keeper"]["by"].as_str().unwrap().to_owned();
        by.contains("the holder has ended").then_some(())
    });
    bench.reads();
    let mut restart = ocifs(["restart"]);
    let said = run_command(restart.arg(bench.held.root()), PATIENCE).failed();
    assert!(said.contains("holder"), "{said}");
    bench.reads();
    bench.held.umount().ok();
    ended(&bench.held);
}

#[test]
fn a_daemon_and_its_holder_that_die_both_are_cleared_away() {
    for by_umount in [true, false] {
        let bench = Bench::new();
        let path = bench.held.path(&bench.below).join("config.json");
        let open = within(PATIENCE, "open", move || File::open(path).unwrap());
        // The kernel keeps what it was told of the root for a while. It is no sign of life.
        let root = bench.held.root().to_owned();
        within(PATIENCE, "stat", move || fs::metadata(root).unwrap());
        kill(bench.held.holder(), Signal::KILL);
        for daemon in processes(bench.held.root()) {
            kill(daemon, Signal::KILL);
        }
        eventually(PATIENCE, "the mount is dead", || {
            let error = rustix::fs::statfs(bench.held.root()).err()?;
            (error == rustix::io::Errno::NOTCONN).then_some(())
        });
        within(PATIENCE, "read", move || {
            drop(open.read_exact_at(&mut [0], 0));
        });
        if !by_umount {
            let mut again = ocifs(["mount", "--cache-dir"]);
            again.arg(bench._cache.path()).arg(bench.held.root());
            run_command(&mut again, PATIENCE).ok();
            bench.reads();
        }
        bench.held.umount().ok();
        bench.held.assert_gone();
    }
}

#[test]
fn a_mount_that_cannot_come_up_leaves_no_holder() {
    let dir = scratch("held");
    let point = dir.path().join("models");
    fs::create_dir(&point).unwrap();
    fs::write(point.join("something"), "").unwrap();
    let cache = scratch("cache");
    let mut command = ocifs(["mount", "--cache-dir"]);
    let said = run_command(command.arg(cache.path()).arg(&point), PATIENCE).failed();
    assert!(said.contains("not empty"), "{said}");
    eventually(Duration::from_secs(20), "nothing runs", || {
        processes(&point).is_empty().then_some(())
    });
}

#[test]
fn a_holder_is_small() {
    let bench = Bench::new();
    let status = fs::read_to_string(format!("/proc/{}/status", bench.held.holder())).unwrap();
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.unwrap().split_whitespace().next().unwrap().to_owned();
        number.parse::<u64>().unwrap()
    };
    assert_eq!(value("Threads:"), 1);
    // Mostly what the dynamic linker writes into.
    assert!(value("RssAnon:") < 4096, "{status}");
    assert!(value("VmData:") < 1024, "{status}");
    bench.held.umount().ok();
    ended(&bench.held);
}

/// In a mount namespace of its own, where fusectl is mounted and everybody may open /dev/fuse, as on most machines.
#[test]
fn a_user_s_mount_that_is_given_up_ends_though_a_dead_daemon_has_its_device_open() {
    let registry = Registry::open();
    let published = Artifact::docker_v02()
        .layer(Layer::bytes(DOCKER_FILE, vec![1; 1 << 20]).at("w.bin"))
        .publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    let layer = &published.layers[0];
    proxy.always(layer, Fault::Stall(0));
    let dir = scratch("user");
    fs::copy(env!("CARGO_BIN_EXE_ocifs"), dir.path().join("ocifs")).unwrap();
    let script = r#"
        cd "$0"; mkdir models cache run; mknod fuse c 10 229
        chown 65534:65534 . models cache run; chmod 666 fuse; chmod 755 .
        mount --bind fuse /dev/fuse && mount -t fusectl fusectl /sys/fs/fuse/connections || exit 90
        user() {
            setpriv --reuid=65534 --regid=65534 --clear-groups env -i PATH="$PATH" HOME=/nonexistent \
                OCIFS_RUNTIME_DIR="$0/run" OCIFS_HOLDER_TRIES=1/600 "$@"
        }
        user ./ocifs mount --cache-dir cache --prefetch none "$0/models" || exit 91
        user cat "models/$1" >/dev/null; echo "it ended: $?"
        umount --lazy models
    "#;
    let mut child = Command::new("unshare")
        .args(["--mount", "--propagation", "slave", "bash", "-c", script])
        .arg(dir.path())
        .arg(format!("{}/org/m:v1/w.bin", proxy.host()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let point = dir.path().join("models");
    let role = |pid: u32, role: &str| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split('\0').nth(1) == Some(role)
    };
    let find = |wanted: &str| processes(&point).into_iter().find(|pid| role(*pid, wanted));
    let asked = || proxy.count(layer) > 0;
    let both = || Some((find("holder")?, find("mount")?)).filter(|_| asked());
    let mut said = String::new();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let (holder, daemon) = eventually(PATIENCE, "somebody reads", both);
        // As a killed daemon has it open while one of its threads waits in the kernel.
        let _stuck = device_of(holder);
        kill(daemon, Signal::KILL);
        wait(&mut child, PATIENCE).expect("the reader hangs")
    }));
    for pid in processes(&point) {
        kill(pid, Signal::KILL);
    }
    if ended.is_err() {
        let _ = child.kill();
    }
    let _ = child.stderr.take().unwrap().read_to_string(&mut said);
    let mut out = String::new();
    let _ = child.stdout.take().unwrap().read_to_string(&mut out);
    let status = ended.unwrap_or_else(|_| panic!("{out} {said}"));
    assert!(
        status.success() && out.contains("it ended: 1"),
        "{out} {said}"
    );
}
