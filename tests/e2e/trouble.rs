//! Servers and networks that say nothing: reads that go on elsewhere, and mirrors that lie.
//!
//! The longest silence that is allowed (`stall-timeout`) is set to longer than any test waits: only what ocifs has learned of the
//! server can end it in time.

use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer, Published};
use crate::support::content::Content;
use crate::support::freeze::Freezer;
use crate::support::mount::{Mount, ocifs, run_ocifs};
use crate::support::process::run_command;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch, within};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB + 4321;
const SILENT: [&str; 4] = ["-o", "stall-timeout=1h", "--read-timeout", "10min"];

struct Site {
    registry: Registry,
    published: Published,
    content: Content,
    cache: TempDir,
}

fn site(seed: u64) -> Site {
    let content = Content::new(seed);
    let registry = Registry::open();
    let weights = Layer::bytes(DOCKER_SAFETENSORS, content.bytes(0, SIZE as usize));
    let published = Artifact::docker_v02()
        .layer(weights.at("model.safetensors"))
        .publish(&registry, "org/m:v1");
    Site {
        registry,
        published,
        content,
        cache: scratch("cache"),
    }
}

impl Site {
    fn mount(&self, further: &[&str]) -> Mount {
        let flags: Vec<_> = SILENT.iter().chain(further).collect();
        Mount::start(self.cache.path(), flags)
    }

    /// Reads all of it piece by piece.
    fn read(&self, mount: &Mount, host: &str) {
        let path = mount.path(&format!("{host}/org/m:v1/model.safetensors"));
        let found = within(PATIENCE * 2, "read the weights", move || {
            std::fs::read(path)
        });
        assert!(found.unwrap() == self.content.bytes(0, SIZE as usize));
    }
}

/// What `ocifs status --json` says of the one mount.
fn status(mount: &Mount) -> Value {
    let mut command = ocifs(["status", "--json"]);
    command.arg(mount.root());
    let text = run_command(&mut command, PATIENCE).ok();
    let all: Value = serde_json::from_str(&text).unwrap();
    all["mounts"][0].clone()
}

#[test]
fn a_silent_answer_of_a_quick_server_is_given_up_after_seconds() {
    let site = site(700);
    let proxy = Proxy::start(site.registry.address());
    let mount = site.mount(&[]);
    let below = format!("{}/org/m:v1/model.safetensors", proxy.host());
    // It has shown what it usually takes.
    assert!(mount.read_at(&below, 0, 4096) == site.content.bytes(0, 4096));
    proxy.times("/blobs/", 1, Fault::Stall(0));
    proxy.after("/blobs/", 1, 1, Fault::Stall(MIB));
    site.read(&mount, &proxy.host());
    mount.unmount();
}

#[test]
fn a_readers_part_that_trickles_is_asked_for_a_second_time() {
    let site = site(701);
    let proxy = Proxy::start(site.registry.address());
    let mount = site.mount(&["--prefetch", "none"]);
    let below = format!("{}/org/m:v1/model.safetensors", proxy.host());
    assert!(mount.read_at(&below, 0, 4096) == site.content.bytes(0, 4096));
    // A megabyte would take a quarter of an hour, and never be silent.
    proxy.times("/blobs/", 1, Fault::Throttle(1000));
    let found = mount.read_at(&below, 8 * MIB, MIB as usize);
    assert!(found == site.content.bytes(8 * MIB, MIB as usize));
    assert!(status(&mount)["hedges"].as_u64() >= Some(1));
    mount.unmount();
}

#[test]
fn kept_connections_that_died_without_a_word_cost_one_wait() {
    let site = site(702);
    let way = Freezer::start(site.registry.address());
    let mount = site.mount(&["--prefetch", "none"]);
    let below = format!("{}/org/m:v1/model.safetensors", way.host());
    // Several connections are kept, of both kinds.
    std::thread::scope(|scope| {
        for at in 0..4 {
            let (mount, below) = (&mount, &below);
            scope.spawn(move || mount.read_at(below, at * 5 * MIB, 2 * MIB as usize));
        }
    });
    let before = way.made();
    way.freeze();
    for offset in [3 * MIB, 8 * MIB, 13 * MIB, 18 * MIB] {
        let found = mount.read_at(&below, offset, MIB as usize + 4096);
        assert!(found == site.content.bytes(offset, MIB as usize + 4096));
    }
    // A tag that was not asked for yet: its question goes another way than parts do.
    let missing = format!("{}/org/m:v2", way.host());
    let error = mount.try_stat(&missing).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
    assert!(way.made() > before);
    mount.unmount();
}

#[test]
fn kept_connections_that_answer_with_a_reset_are_no_failure() {
    let site = site(703);
    let way = Freezer::start(site.registry.address());
    let mount = site.mount(&["--prefetch", "none"]);
    let below = format!("{}/org/m:v1/model.safetensors", way.host());
    for large in [4096, 2 * MIB as usize] {
        assert!(mount.read_at(&below, 0, large) == site.content.bytes(0, large));
    }
    way.reset();
    way.freeze();
    for (offset, length) in [(4 * MIB, 4096), (8 * MIB, 2 * MIB as usize)] {
        assert!(mount.read_at(&below, offset, length) == site.content.bytes(offset, length));
    }
    let log = mount.log();
    assert!(!log.contains("will be tried again"), "{log}");
    mount.unmount();
}

#[test]
fn a_network_that_swallows_everything_for_a_while_is_outlived() {
    let site = site(704);
    let way = Freezer::start(site.registry.address());
    let mount = site.mount(&["-o", "connect-timeout=5s"]);
    let below = format!("{}/org/m:v1/model.safetensors", way.host());
    assert!(mount.read_at(&below, 0, 4096) == site.content.bytes(0, 4096));
    way.close(true);
    way.freeze();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| site.read(&mount, &way.host()));
        std::thread::sleep(Duration::from_secs(15));
        way.close(false);
        reader.join().unwrap();
    });
    mount.unmount();
}

#[test]
fn lookups_end_in_time_while_the_network_swallows_everything() {
    let site = site(705);
    let way = Freezer::start(site.registry.address());
    way.close(true);
    let mount = site.mount(&["-o", "metadata-timeout=4s"]);
    for below in ["org/m:v1", "org/m:v1/model.safetensors", "org/m"] {
        let path = format!("{}/{below}", way.host());
        // Within a minute, as all helpers here; the setting says four seconds.
        let _ = mount.try_stat(&path);
        let _ = mount.try_list(&path);
        let _ = mount.try_read_at(&path, 0, 10);
    }
    way.close(false);
    eventually(PATIENCE, "the model is found", || {
        mount.try_stat(&format!("{}/org/m:v1", way.host())).ok()
    });
    mount.unmount();
}

fn mirrored(site: &Site, faults: &[Fault]) -> (Proxy, Proxy, TempDir) {
    let (origin, mirror) = (
        Proxy::start(site.registry.address()),
        Proxy::start(site.registry.address()),
    );
    for fault in faults {
        mirror.always("/blobs/", fault.clone());
    }
    let dir = scratch("hosts");
    let place = dir.path().join(origin.host().replace(':', "_") + "_");
    std::fs::create_dir_all(&place).unwrap();
    let text = format!("[host.\"http://{}\"]", mirror.host());
    std::fs::write(place.join("hosts.toml"), text).unwrap();
    (origin, mirror, dir)
}

#[test]
fn a_lying_mirror_is_found_out_named_and_left_for_the_registry() {
    let site = site(706);
    let (origin, mirror, dir) = mirrored(&site, &[Fault::Corrupt(SIZE / 3)]);
    let mount = site.mount(&["--hosts-dir", dir.path().to_str().unwrap()]);
    let below = format!("{}/org/m:v1/model.safetensors", origin.host());
    // The first read may have got the wrong byte: nobody can know before all of it is here.
    let path = mount.path(&below);
    let first = within(PATIENCE, "read", move || std::fs::read(path)).unwrap();
    assert!(first.len() as u64 == SIZE);
    eventually(PATIENCE, "it is verified", || {
        let verified = mount.xattr(&below, "user.ocifs.verified");
        (verified.as_deref() == Some("true")).then_some(())
    });
    // No page of the wrong copy is left in the kernel.
    eventually(PATIENCE, "it is read right", || {
        (mount.read(&below) == site.content.bytes(0, SIZE as usize)).then_some(())
    });
    site.read(&mount, &origin.host());
    let status = status(&mount);
    let wrong = &status["wrong"][0];
    assert_eq!(wrong["digest"], site.published.layers[0], "{status}");
    assert_eq!(wrong["lasting"], false, "{status}");
    let from = wrong["from"].to_string();
    assert!(from.contains(&mirror.host()), "{from}");
    let log = mount.log();
    let said = log.lines().any(|line| {
        line.contains("is wrong")
            && line.contains(&mirror.host())
            && line.contains(&site.published.layers[0])
    });
    assert!(said, "{log}");
    origin.settle();
    assert!(origin.sent("/blobs/") >= SIZE, "it came from the registry");
    mount.unmount();
    let cache = site.cache.path().to_str().unwrap();
    run_ocifs(["cache", "verify", "--cache-dir", cache]).ok();
}

#[test]
fn strict_readers_never_see_what_a_lying_mirror_sent() {
    let site = site(707);
    let (origin, mirror, dir) = mirrored(&site, &[Fault::Corrupt(SIZE / 3)]);
    let hosts = dir.path().to_str().unwrap();
    let mount = site.mount(&["--hosts-dir", hosts, "--verify", "strict"]);
    site.read(&mount, &origin.host());
    mirror.settle();
    assert!(mirror.sent("/blobs/") > 0);
    mount.unmount();
    // And nothing at all when the registry lies as well.
    let cache = scratch("cache");
    origin.always(&site.published.layers[0], Fault::Corrupt(SIZE / 3));
    let mount = Mount::start(cache.path(), ["--hosts-dir", hosts, "--verify", "strict"]);
    let below = format!("{}/org/m:v1/model.safetensors", origin.host());
    for offset in [0, SIZE / 3, SIZE - 10] {
        let error = mount.try_read_at(&below, offset, 10).unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::IO.raw_os_error())
        );
    }
    let status = status(&mount);
    assert_eq!(
        status["wrong"].as_array().unwrap().last().unwrap()["lasting"],
        true,
        "{status}"
    );
    mount.unmount();
}
