//! Readers that wait for a registry that says nothing any more: who is killed goes at once, who merely gets a signal reads on, and
//! a mount that is to end does not wait for them.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::mount::{Mount, is_mounted, run_ocifs};
use crate::support::process::wait;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch};

const SIZE: u64 = 24 << 20;
const CONTENT: u64 = 77;

/// How long a killed process may take to go.
const AT_ONCE: Duration = Duration::from_secs(3);

struct Bench {
    _registry: Registry,
    proxy: Proxy,
    mount: Mount,
    below: String,
    _cache: tempfile::TempDir,
}

impl Bench {
    /// A mount whose registry sends no byte of a blob.
    fn stalled() -> Self {
        let registry = Registry::open();
        let dir = scratch("weights");
        let file = dir.path().join("model.safetensors");
        Content::new(CONTENT).write(&file, SIZE);
        let layer = Layer::file(DOCKER_SAFETENSORS, &file).at("model.safetensors");
        Artifact::docker_v02()
            .layer(layer)
            .publish(&registry, "org/m:v1");
        let proxy = Proxy::start(registry.address());
        let cache = scratch("cache");
        let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
        let below = format!("{}/org/m:v1/model.safetensors", proxy.host());
        assert_eq!(mount.stat(&below).len(), SIZE);
        proxy.always("/blobs/", Fault::Stall(0));
        Self {
            _registry: registry,
            proxy,
            mount,
            below,
            _cache: cache,
        }
    }

    /// Starts a shell command with the file as `$0`, which is to wait.
    fn reader(&self, script: &str) -> Child {
        let mut child = Command::new("env")
            .args(["--default-signal", "bash", "-c", &format!("exec {script}")])
            .arg(self.mount.path(&self.below))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until_it_waits(&mut child, script);
        child
    }
}

/// Returns once the kernel says that the process waits for an answer of ours.
fn until_it_waits(child: &mut Child, script: &str) {
    eventually(PATIENCE, script, || {
        if let Some(status) = child.try_wait().unwrap() {
            let mut said = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut said)
                .unwrap();
            panic!("{script}: {status}, it was meant to wait: {said}");
        }
        let at = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap();
        ["request_wait_answer", "folio_wait_bit_common"]
            .contains(&at.as_str())
            .then_some(())
    });
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

const FAULT: &str = "python3 -c 'import mmap, sys
f = open(sys.argv[1], \"rb\")
m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
m.madvise(mmap.MADV_RANDOM)
print(m[9 << 20])' \"$0\"";

#[test]
fn a_reader_that_is_killed_goes_at_once() {
    let bench = Bench::stalled();
    for script in [
        "dd if=\"$0\" of=/dev/null bs=1M iflag=direct",
        "dd if=\"$0\" of=/dev/null bs=16M iflag=direct",
        "cat \"$0\"",
        FAULT,
    ] {
        for by in [Signal::KILL, Signal::TERM, Signal::QUIT] {
            let mut reader = bench.reader(script);
            let killed = Instant::now();
            signal(&reader, by);
            let ended = wait(&mut reader, AT_ONCE);
            // A fault and a buffered read wait for their page; the kernel lets only what kills without a core end that.
            if by == Signal::QUIT && ended.is_none() && !script.contains("direct") {
                signal(&reader, Signal::KILL);
                wait(&mut reader, AT_ONCE).expect("it goes when it is killed");
                continue;
            }
            let status = ended.unwrap_or_else(|| panic!("{script}: not gone by {by:?}"));
            assert!(!status.success(), "{script}");
            println!("{by:?} {:?} {script}", killed.elapsed());
        }
    }
    // What they waited for goes on, or begins anew: the next one gets it.
    bench.proxy.behave();
    let bytes = bench.mount.read(&bench.below);
    assert!(bytes == Content::new(CONTENT).bytes(0, SIZE as usize));
    bench.mount.unmount();
}

#[test]
fn whoever_waits_for_a_name_can_be_killed() {
    let bench = Bench::stalled();
    bench.proxy.always("/manifests/", Fault::Delay(PATIENCE));
    bench.proxy.always("/tags/", Fault::Delay(PATIENCE));
    let repository = bench.mount.path(&bench.below);
    let repository = repository.ancestors().nth(2).unwrap().join("other");
    for script in ["stat \"$0:v1\"", "cat \"$0:v2/config.json\""] {
        let mut asker = Command::new("env")
            .args(["--default-signal", "bash", "-c", &format!("exec {script}")])
            .arg(&repository)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until_it_waits(&mut asker, script);
        signal(&asker, Signal::KILL);
        wait(&mut asker, AT_ONCE).unwrap_or_else(|| panic!("{script}: not gone"));
    }
    bench.mount.unmount();
}

#[test]
fn a_signal_that_is_handled_disturbs_no_read() {
    let bench = Bench::stalled();
    // A profiler's timer, while a page is waited for: an error would be SIGBUS.
    let timed = FAULT.replace(
        "import mmap, sys\n",
        "import mmap, sys, signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.siginterrupt(signal.SIGALRM, True)\nsignal.setitimer(signal.ITIMER_REAL, .02, .02)\n",
    );
    assert_ne!(timed, FAULT);
    let direct = "python3 -c 'import mmap, os, sys, signal
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, True)
signal.setitimer(signal.ITIMER_REAL, .02, .02)
m = mmap.mmap(-1, 1 << 20)
f = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
assert os.preadv(f, [m], 9 << 20) == 1 << 20
print(m[0])' \"$0\"";
    let mut readers = [bench.reader(&timed), bench.reader(direct)];
    // One more, which is killed after many signals that it has survived.
    let mut doomed = bench.reader(direct);
    signal(&doomed, Signal::KILL);
    wait(&mut doomed, AT_ONCE).expect("it goes when it is killed");
    for reader in &mut readers {
        assert!(reader.try_wait().unwrap().is_none(), "it waits");
    }
    bench.proxy.behave();
    let expected = Content::new(CONTENT).bytes(9 << 20, 1)[0].to_string();
    for reader in readers {
        let output = reader.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said, expected, "{}: {error}", output.status);
    }
    bench.mount.unmount();
}

#[test]
fn a_daemon_that_is_told_twice_to_end_does_not_wait_for_readers() {
    let mut bench = Bench::stalled();
    let mut readers = [
        bench.reader("dd if=\"$0\" of=/dev/null bs=1M iflag=direct"),
        bench.reader("cat \"$0\""),
    ];
    let root = bench.mount.root().to_owned();
    bench.mount.signal(Signal::TERM);
    eventually(PATIENCE, "the mount is out of the tree", || {
        (!is_mounted(&root)).then_some(())
    });
    std::thread::sleep(Duration::from_millis(300));
    for reader in &mut readers {
        assert!(reader.try_wait().unwrap().is_none(), "readers may finish");
    }
    bench.mount.signal(Signal::TERM);
    for reader in &mut readers {
        let status = wait(reader, AT_ONCE).expect("the reader is told at once");
        assert!(!status.success());
    }
    let status = bench.mount.wait(AT_ONCE).expect("the daemon ends at once");
    assert!(status.success(), "{status}: {}", bench.mount.log());
}

#[test]
fn a_mount_that_is_taken_away_ends_with_its_last_reader() {
    for how in ["--lazy", "--force"] {
        let mut bench = Bench::stalled();
        let mut reader = bench.reader("dd if=\"$0\" of=/dev/null bs=1M iflag=direct");
        let root = bench.mount.root().to_owned();
        let point: &Path = &root;
        let told = Instant::now();
        // `--lazy` reports the daemon that still serves the reader, after a while.
        let umount = std::thread::spawn({
            let point = point.to_owned();
            move || run_ocifs(["umount".as_ref(), how.as_ref(), point.as_os_str()])
        });
        eventually(PATIENCE, "the mount is out of the tree", || {
            (!is_mounted(point)).then_some(())
        });
        assert!(told.elapsed() < AT_ONCE, "{how}: {:?}", told.elapsed());
        if how == "--lazy" {
            std::thread::sleep(Duration::from_millis(300));
            assert!(reader.try_wait().unwrap().is_none(), "what is open goes on");
            signal(&reader, Signal::KILL);
        }
        wait(&mut reader, AT_ONCE).unwrap_or_else(|| panic!("{how}: the reader is not gone"));
        let status = bench.mount.wait(AT_ONCE);
        let status = status.unwrap_or_else(|| panic!("{how}: the daemon is not gone"));
        assert!(status.success(), "{how} {status}: {}", bench.mount.log());
        drop(umount.join());
    }
}
