//! The daemon is killed between the moment at which something that the kernel keeps becomes wrong and the moment at which the kernel is
//! told so: the next daemon tells it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer, Published};
use crate::support::content::Content;
use crate::support::held::Held;
use crate::support::mount::ocifs;
use crate::support::process::run_command;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch, within};

const SIZE: u64 = (6 << 20) + 123;
/// The byte that comes wrong.
const WRONG: u64 = 3 << 20;
/// How long the kernel may keep what is wrong, once somebody is there who knows.
const SOON: Duration = Duration::from_secs(20);

/// The thread of a daemon that tells the kernel what to drop, stopped as a debugger stops it.
struct Stopped(libc::pid_t);

impl Stopped {
    fn of(daemon: u32) -> Self {
        let tasks = fs::read_dir(format!("/proc/{daemon}/task")).unwrap();
        let notifier = tasks.flatten().map(|task| task.path()).find(|task| {
            fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "ocifs-notify")
        });
        let notifier = notifier.expect("it has such a thread");
        let thread = notifier.file_name().unwrap().to_str().unwrap();
        let this = Self(thread.parse().unwrap());
        for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
            // SAFETY: neither request reads or writes memory of this process.
            let done = unsafe { libc::ptrace(request, this.0, 0, 0) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        }
        this.wait();
        this
    }

    /// Until it stops or ends.
    fn wait(&self) {
        // SAFETY: no status is asked for.
        let waited = unsafe { libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) };
        assert_eq!(waited, self.0, "{}", std::io::Error::last_os_error());
    }

    /// After its process was killed: who traces a thread has to see it go before the process can.
    fn reap(self) {
        self.wait();
    }
}

struct Bench {
    held: Held,
    proxy: Proxy,
    registry: Registry,
    published: Published,
    content: Content,
    cache: tempfile::TempDir,
}

impl Bench {
    /// A model of one weight file whose pages the kernel keeps, and never reads without the daemon.
    fn new(seed: u64) -> Self {
        Self::with(seed, &["-o", "passthrough=no"])
    }

    fn with(seed: u64, flags: &[&str]) -> Self {
        let (registry, content) = (Registry::open(), Content::new(seed));
        let published = weights("model.safetensors", content.bytes(0, SIZE as usize))
            .publish(&registry, "org/m:v1");
        let (proxy, cache) = (Proxy::start(registry.address()), scratch("cache"));
        let held = Held::start(cache.path(), flags);
        Self {
            held,
            proxy,
            registry,
            published,
            content,
            cache,
        }
    }

    fn model(&self) -> PathBuf {
        self.held.path(&format!("{}/org/m:v1", self.proxy.host()))
    }

    fn file(&self) -> PathBuf {
        self.model().join("model.safetensors")
    }
}

fn weights(name: &str, bytes: Vec<u8>) -> Artifact {
    Artifact::docker_v02().layer(Layer::bytes(DOCKER_SAFETENSORS, bytes).at(name))
}

#[test]
fn pages_of_a_blob_that_turned_out_wrong_do_not_outlive_the_daemon_that_knew() {
    let bench = Bench::new(51);
    let blob = &bench.published.layers[0];
    bench.proxy.always(blob, Fault::Corrupt(WRONG));
    let path = bench.file();
    let stopped = Stopped::of(bench.held.daemon());
    let at = |file: &File| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, WRONG).map(|()| byte[0])
    };
    let (file, wrong) = within(PATIENCE, "read early", {
        let path = path.clone();
        move || {
            let file = File::open(&path).unwrap();
            let early = at(&file).unwrap();
            // All of it, for it to be found wrong. That may happen before this ends.
            let _ = fs::read(&path);
            (file, early)
        }
    });
    let right = bench.content.bytes(WRONG, 1)[0];
    assert_eq!(wrong, !right, "served before it is known to be wrong");
    let wrongs = || bench.held.status()["wrong"].as_array().unwrap().len();
    eventually(PATIENCE, "it is found wrong, and wrong again", || {
        (wrongs() == 2).then_some(())
    });
    assert_eq!(at(&file).unwrap(), wrong, "the kernel was not told");
    bench.proxy.behave();
    bench.held.kill_daemon();
    stopped.reap();
    // From the descriptor that was open all the while, and from a new one.
    let found = within(PATIENCE, "read again", move || {
        eventually(SOON, "the wrong byte goes", || {
            (at(&file).ok()? != wrong).then_some(())
        });
        eventually(SOON, "the right byte comes", || {
            (at(&file).ok()? == right).then_some(())
        });
        fs::read(&path).unwrap()
    });
    assert!(found == bench.content.bytes(0, SIZE as usize));
    assert_eq!(bench.held.times(), 1);
    bench.held.umount().ok();
    bench.held.assert_gone();
}

#[test]
fn pages_of_a_blob_that_another_process_threw_away_do_not_outlive_a_daemon_that_had_not_noticed() {
    let flags = ["-o", "passthrough=no", "--prefetch", "none"];
    let bench = Bench::with(53, &flags);
    let blob = &bench.published.layers[0];
    bench.proxy.always(blob, Fault::Corrupt(WRONG));
    let path = bench.file();
    let byte = |file: &File| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, WRONG).map(|()| byte[0])
    };
    let (file, wrong) = within(PATIENCE, "read early", move || {
        let file = File::open(&path).unwrap();
        let early = byte(&file).unwrap();
        (file, early)
    });
    let right = bench.content.bytes(WRONG, 1)[0];
    assert_eq!(wrong, !right, "served before it is known to be wrong");
    bench.proxy.behave();
    let mut pull = ocifs(["pull", "--cache-dir"]);
    pull.arg(bench.cache.path());
    let said = run_command(
        pull.arg(format!("{}/org/m:v1", bench.proxy.host())),
        PATIENCE,
    );
    assert!(said.stderr.contains("the content is wrong"), "{said}");
    said.ok();
    assert_eq!(byte(&file).unwrap(), wrong, "the daemon has not noticed");
    bench.held.kill_daemon();
    // From the kernel's memory, for which nobody is asked.
    within(PATIENCE, "read again", move || {
        eventually(SOON, "the right byte comes", || {
            (byte(&file).unwrap() == right).then_some(())
        });
    });
    assert_eq!(bench.held.times(), 1);
    bench.held.umount().ok();
    bench.held.assert_gone();
}

#[test]
fn names_of_a_tag_that_has_moved_do_not_outlive_the_daemon_that_moved_it() {
    let bench = Bench::new(52);
    let path = bench.file();
    let stat = |path: PathBuf| within(PATIENCE, "stat", move || fs::metadata(path));
    assert_eq!(stat(path.clone()).unwrap().len(), SIZE);
    let new = bench.model().join("new.safetensors");
    stat(new.clone()).expect_err("there is none yet");
    weights("model.safetensors", vec![7; 4321])
        .layer(Layer::bytes(DOCKER_SAFETENSORS, vec![8; 321]).at("new.safetensors"))
        .publish(&bench.registry, "org/m:v1");
    let stopped = Stopped::of(bench.held.daemon());
    let reference = format!("{}/org/m:v1", bench.proxy.host());
    // Every mount of the machine is told, and some may be in trouble.
    let said = run_command(ocifs(["refresh"]).arg(&reference), PATIENCE);
    let line = format!("{}: {reference} is sha256:", bench.held.root().display());
    assert!(
        String::from_utf8_lossy(&said.stdout).contains(&line),
        "{said}"
    );
    assert_eq!(stat(path.clone()).unwrap().len(), SIZE, "not told");
    bench.held.kill_daemon();
    stopped.reap();
    eventually(SOON, "what the tag shows now is seen", || {
        let sizes = [&path, &new].map(|path| stat(path.clone()).map(|found| found.len()).ok());
        (sizes == [Some(4321), Some(321)]).then_some(())
    });
    bench.held.umount().ok();
    bench.held.assert_gone();
}
