//! Trouble of a real network between two machines: loss, resets, a narrow line, a line that is cut and comes back, a registry that is
//! started anew, and a network that swallows everything.
//!
//! The machines are network namespaces; packets are dropped and connections reset by nftables and by `ss -K`, the line is narrowed by
//! a token bucket, and cut by taking the link down. (The kernel of the test machines has no netem, so nothing is delayed here.)

use std::fs::File;
use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::mount::{Mount, is_mounted};
use crate::support::netns::{Machine, Network};
use crate::support::process::{Daemon, run_command, wait};
use crate::support::{PATIENCE, eventually, scale, scratch, within};

/// Five seconds of the narrow line.
const SIZE: u64 = 24 << 20;
const LINE: &str = "40mbit";

/// How long a read may take whatever happens to it.
const LIMIT: Duration = Duration::from_secs(240);

/// A registry on one machine, a mount on another, and a narrow line between them.
struct Site {
    // In the order in which they are taken down.
    mount: Mount,
    registry: Mutex<Option<Daemon>>,
    registry_dir: tempfile::TempDir,
    origin: Machine,
    node: Machine,
    _cache: tempfile::TempDir,
    _network: Network,
}

impl Site {
    fn new(tags: &[(&str, u64)], flags: &[&str]) -> Self {
        let mut network = Network::new();
        let (origin, node) = (network.machine(), network.machine());
        let registry_dir = scratch("origin");
        let registry = origin.registry(registry_dir.path());
        for (tag, seed) in tags {
            let bytes = Content::new(*seed).bytes(0, SIZE as usize);
            let layer = Layer::bytes(DOCKER_SAFETENSORS, bytes).at("data");
            let artifact = Artifact::docker_v02().layer(layer);
            origin.publish(&artifact, &format!("org/m:{tag}"));
        }
        origin.narrow(LINE);
        let cache = scratch("cache");
        let host = format!("{}:5000", origin.address);
        let plain = ["--plain-http", &host];
        let args = plain.into_iter().chain(flags.iter().copied());
        let mount = Mount::start_as(cache.path(), args, |command| node.wrap(command));
        Self {
            mount,
            registry: Mutex::new(Some(registry)),
            registry_dir,
            origin,
            node,
            _cache: cache,
            _network: network,
        }
    }

    fn below(&self, tag: &str) -> String {
        format!("{}:5000/org/m:{tag}/data", self.origin.address)
    }

    /// Reads a file to its end, checks it, and says how far it is meanwhile.
    fn read(&self, tag: &str, seed: u64, done: &AtomicU64) {
        let mut file = File::open(self.mount.path(&self.below(tag))).unwrap();
        let mut piece = vec![0; 1 << 20];
        let begun = Instant::now();
        loop {
            let at = done.load(Ordering::Relaxed);
            let count = file.read(&mut piece).unwrap_or_else(|error| {
                panic!(
                    "{tag}: {error} at {at} after {:?}: {}",
                    begun.elapsed(),
                    self.mount.log()
                )
            });
            if count == 0 {
                break;
            }
            assert!(
                piece[..count] == Content::new(seed).bytes(at, count),
                "{tag}: wrong bytes at {at}"
            );
            done.store(at + count as u64, Ordering::Relaxed);
        }
        assert_eq!(done.load(Ordering::Relaxed), SIZE, "{tag}");
    }

    /// Reads a file while `trouble` does what it does, once a part of the file is there; gives what `trouble` gives.
    fn read_through<T: Send>(
        &self,
        tag: &str,
        seed: u64,
        trouble: impl FnOnce(&AtomicBool) -> T + Send,
    ) -> T {
        let (done, over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let trouble = scope.spawn(|| {
                eventually(PATIENCE, "the read has begun", || {
                    (done.load(Ordering::Relaxed) > SIZE / 8).then_some(())
                });
                assert!(
                    done.load(Ordering::Relaxed) < SIZE,
                    "{tag}: the trouble comes too late"
                );
                trouble(&over)
            });
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.read(tag, seed, &done);
            }));
            over.store(true, Ordering::Relaxed);
            let given = trouble.join();
            if let Err(panic) = ended {
                std::panic::resume_unwind(panic);
            }
            given.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

#[test]
fn reads_end_with_the_right_bytes_whatever_the_network_does() {
    let tags = [
        ("loss", 900),
        ("resets", 901),
        ("killed", 902),
        ("down", 903),
        ("restart", 904),
    ];
    // A stall is noticed sooner than by default, so that the test is short; what is done about it is the same.
    let site = Site::new(
        &tags,
        &[
            "--prefetch",
            "none",
            "-o",
            "stall-timeout=3s,connect-timeout=3s",
        ],
    );
    let seed = |tag: &str| tags.iter().find(|(name, _)| *name == tag).unwrap().1;

    // Every twentieth packet is lost, in both directions.
    site.node.rules(
        "chain in { type filter hook input priority 0; numgen random mod 100 < 5 counter drop; }
         chain out { type filter hook output priority 0; numgen random mod 100 < 5 counter drop; }",
    );
    site.read_through("loss", seed("loss"), |_| ());
    assert!(site.node.counted() > 20, "packets were lost");

    // Every five hundredth packet of the registry resets its connection.
    site.node.rules(
        "chain in { type filter hook input priority 0;
           tcp sport 5000 numgen random mod 500 == 0 counter reject with tcp reset; }",
    );
    site.read_through("resets", seed("resets"), |_| ());
    assert!(site.node.counted() > 2, "connections were reset");
    site.node.rules("");

    // All sockets to the registry are destroyed, again and again.
    let killed = site.read_through("killed", seed("killed"), |over| {
        let mut killed = 0;
        for _ in 0..scale(5, 50) {
            if over.load(Ordering::Relaxed) {
                break;
            }
            let said = site
                .node
                .run("ss", &["-H", "-K", "-t", "dport", "=", ":5000"]);
            killed += said.lines().count();
            std::thread::sleep(Duration::from_millis(300));
        }
        killed
    });
    assert!(killed > 0, "sockets were destroyed");

    // The line is cut for a while.
    site.read_through("down", seed("down"), |over| {
        site.node.link(false);
        std::thread::sleep(Duration::from_secs(scale(6, 30)));
        assert!(
            !over.load(Ordering::Relaxed),
            "nothing came over a line that was cut"
        );
        site.node.link(true);
    });

    // The registry ends in the middle, and is back after a while.
    site.read_through("restart", seed("restart"), |over| {
        let mut registry = site.registry.lock().unwrap();
        registry.take().expect("it runs").kill();
        std::thread::sleep(Duration::from_secs(scale(3, 30)));
        assert!(
            !over.load(Ordering::Relaxed),
            "nothing came from a registry that had ended"
        );
        *registry = Some(site.origin.registry(site.registry_dir.path()));
    });
    site.mount.unmount();
}

/// Starts a reader that gets part of a file and then waits for a network that swallows everything.
fn stuck(site: &Site) -> Child {
    let below = site.below("v1");
    assert!(site.mount.read_at(&below, 0, 4096) == Content::new(910).bytes(0, 4096));
    site.node.rules(
        "chain in { type filter hook input priority 0; counter drop; }
         chain out { type filter hook output priority 0; counter drop; }",
    );
    let mut reader = Command::new("cat")
        .arg(site.mount.path(&below))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually(PATIENCE, "the reader waits", || {
        assert!(reader.try_wait().unwrap().is_none(), "it was meant to wait");
        let at = std::fs::read_to_string(format!("/proc/{}/wchan", reader.id())).unwrap();
        ["request_wait_answer", "folio_wait_bit_common"]
            .contains(&at.as_str())
            .then_some(())
    });
    reader
}

#[test]
fn a_mount_whose_network_swallows_everything_can_be_taken_down_and_its_readers_killed() {
    const SOON: Duration = Duration::from_secs(20);
    for how in ["-f", "-l"] {
        let site = Site::new(&[("v1", 910)], &["--prefetch", "none"]);
        let mut killed = stuck(&site);
        killed.kill().unwrap();
        wait(&mut killed, SOON).expect("a reader that is killed goes");
        let mut reader = stuck(&site);
        let root = site.mount.root().to_owned();
        let mut umount = Command::new("umount");
        umount.arg(how).arg(&root);
        let output = run_command(&mut umount, SOON);
        // With a reader inside, `-f` aborts the connection first and may then find the mount busy for a moment.
        if !output.status.success() {
            assert_eq!(how, "-f", "{output}");
            let mut again = Command::new("umount");
            again.arg("-f").arg(&root);
            eventually(SOON, "umount -f", || {
                let ended = run_command(&mut again, SOON).status.success();
                (ended || !is_mounted(&root)).then_some(())
            });
        }
        assert!(!is_mounted(&root), "umount {how}");
        if how == "-f" {
            // The connection is gone: the reader is told.
            let status = wait(&mut reader, SOON).expect("the reader is told");
            assert!(!status.success());
        } else {
            assert!(reader.try_wait().unwrap().is_none(), "what is open goes on");
            reader.kill().unwrap();
            wait(&mut reader, SOON).expect("a reader that is killed goes");
        }
        let Site { mut mount, .. } = site;
        mount.wait(SOON).expect("the daemon ends with its mount");
    }
}

/// Names that nobody resolves, and a server that takes connections and says nothing: what is looked up there ends in time, is not said to be
/// missing, and keeps nobody waiting who looks elsewhere.
#[test]
fn lookups_end_in_time_where_neither_names_nor_handshakes_are_answered() {
    let site = Site::new(&[("v1", 930)], &["-o", "metadata-timeout=3s"]);
    // The other machine passes nothing on, and tells nobody.
    let origin = site.origin.address.to_string();
    site.node
        .run("ip", &["route", "add", "default", "via", &origin]);
    site.node.rules(
        "chain in { type filter hook input priority 0; udp dport 53 drop; tcp dport 53 drop; }",
    );
    let silent =
        "import socket, time; s = socket.create_server(('0.0.0.0', 5001)); time.sleep(600)";
    let mut silent = site
        .origin
        .command("python3")
        .args(["-c", silent])
        .spawn()
        .unwrap();
    for below in [
        "registry.example/org/m:v1".to_owned(),
        format!("{origin}:5001/org/m:v1"),
    ] {
        let (path, begun) = (site.mount.path(&below), Instant::now());
        let waiting = std::thread::spawn(move || std::fs::metadata(path).unwrap_err());
        std::thread::sleep(Duration::from_millis(300));
        assert!(site.mount.read_at(&site.below("v1"), 5, 4096) == Content::new(930).bytes(5, 4096));
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{below}: others wait"
        );
        let error = waiting.join().unwrap();
        assert!(
            begun.elapsed() < Duration::from_secs(8),
            "{below}: {:?}",
            begun.elapsed()
        );
        assert_ne!(
            error.kind(),
            std::io::ErrorKind::NotFound,
            "{below}: {error}"
        );
    }
    silent.kill().unwrap();
    silent.wait().unwrap();
    site.mount.unmount();
}

/// A line so narrow that a part takes as long as a stall would: slow is not dead.
#[test]
fn a_narrow_line_is_no_stall() {
    let site = Site::new(
        &[("v1", 920)],
        &["--prefetch", "none", "-o", "stall-timeout=2s"],
    );
    site.origin.narrow("8mbit");
    let length = scale(3 << 20, 24 << 20);
    let path = site.mount.path(&site.below("v1"));
    let bytes = within(LIMIT, "read over a narrow line", move || {
        let mut bytes = vec![0; length];
        File::open(path).unwrap().read_exact(&mut bytes).unwrap();
        bytes
    });
    assert!(bytes == Content::new(920).bytes(0, length));
    let log = site.mount.log();
    assert!(!log.contains("sent nothing"), "{log}");
    site.mount.unmount();
}
