//! One cache for several processes, and a daemon that is killed in the middle of a download.

use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer, Published};
use crate::support::content::{Content, digest, digest_file};
use crate::support::mount::{Mount, ocifs, run_ocifs};
use crate::support::process::wait;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, heavy, scale, scratch, within};

const MIB: u64 = 1 << 20;

/// One file of many megabytes behind a proxy.
struct Site {
    _registry: Registry,
    proxy: Proxy,
    published: Published,
    size: u64,
    cache: TempDir,
}

fn site(seed: u64) -> Site {
    let size = scale(160, 1024) * MIB + 12_345;
    let dir = scratch("weights");
    let file = dir.path().join("model.safetensors");
    Content::new(seed).write(&file, size);
    let registry = Registry::open();
    let artifact = Artifact::docker_v02()
        .layer(Layer::file(DOCKER_SAFETENSORS, &file).at("model.safetensors"));
    let published = artifact.publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    Site {
        _registry: registry,
        proxy,
        published,
        size,
        cache: scratch("cache"),
    }
}

impl Site {
    fn digest(&self) -> &str {
        &self.published.layers[0]
    }

    fn reference(&self) -> String {
        format!("{}/org/m:v1", self.proxy.host())
    }

    fn file(&self) -> String {
        format!("{}/model.safetensors", self.reference())
    }

    fn sealed(&self) -> std::path::PathBuf {
        self.cache
            .path()
            .join("blobs/sha256")
            .join(&self.digest()["sha256:".len()..])
    }

    /// The digest of what a mount shows.
    fn digest_through(&self, mount: &Mount) -> String {
        let path = mount.path(&self.file());
        within(Duration::from_secs(180), "read the file", move || {
            digest_file(&path)
        })
    }

    fn verify(&self) {
        run_ocifs([
            "cache",
            "verify",
            "--cache-dir",
            self.cache.path().to_str().unwrap(),
        ])
        .ok();
    }
}

#[test]
fn two_mounts_and_a_pull_fetch_everything_once_between_them() {
    let _heavy = heavy();
    let site = site(60);
    // Slow enough that all three are at it together.
    site.proxy.always("/blobs/", Fault::Throttle(20 * MIB));
    let first = Mount::start::<&str>(site.cache.path(), []);
    let second = Mount::start::<&str>(site.cache.path(), []);
    let mut pull = ocifs(["pull", "--cache-dir"]);
    pull.arg(site.cache.path())
        .arg(site.reference())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut pull = pull.spawn().unwrap();
    let (a, b) = std::thread::scope(|scope| {
        let other = scope.spawn(|| site.digest_through(&second));
        (site.digest_through(&first), other.join().unwrap())
    });
    let status = wait(&mut pull, Duration::from_secs(180));
    let _ = pull.kill();
    assert_eq!((a.as_str(), b.as_str()), (site.digest(), site.digest()));
    assert!(status.expect("the pull ends").success());
    site.proxy.settle();
    let sent = site.proxy.sent(site.digest());
    assert!(
        sent >= site.size && sent <= site.size + 32 * MIB,
        "{sent} bytes were sent for {}",
        site.size
    );
    assert_eq!(digest_file(&site.sealed()), site.digest());
    first.unmount();
    second.unmount();
    site.verify();
}

#[test]
fn a_killed_download_goes_on_where_it_was() {
    let _heavy = heavy();
    let site = site(61);
    site.proxy.always("/blobs/", Fault::Throttle(8 * MIB));
    let mount = Mount::start::<&str>(site.cache.path(), []);
    let path = mount.path(&site.file());
    // Ends with an error or never when the daemon is killed; nobody waits for it.
    let _reader = std::thread::spawn(move || std::fs::read(path));
    eventually(Duration::from_secs(120), "a third has come", || {
        (site.proxy.sent(site.digest()) > site.size / 3).then_some(())
    });
    mount.kill();
    site.proxy.settle();
    let before = site.proxy.sent(site.digest());
    assert!(before < site.size, "it was not killed in the middle");
    assert!(!site.sealed().exists());
    site.verify();

    site.proxy.behave();
    let mount = Mount::start::<&str>(site.cache.path(), []);
    let kept: u64 = mount
        .xattr(&site.file(), "user.ocifs.cached")
        .unwrap()
        .parse()
        .unwrap();
    // Chunks that were under way are lost, and what the sockets held.
    assert!(
        kept + 24 * MIB >= before,
        "{kept} of {before} bytes were kept"
    );
    assert_eq!(site.digest_through(&mount), site.digest());
    site.proxy.settle();
    let sent = site.proxy.sent(site.digest());
    assert!(
        sent <= site.size + 32 * MIB,
        "{sent} bytes were sent for {}, {before} before the kill",
        site.size
    );
    eventually(PATIENCE, "the blob is sealed", || {
        site.sealed().exists().then_some(())
    });
    assert_eq!(digest_file(&site.sealed()), site.digest());
    mount.unmount();
    site.verify();
}

#[test]
fn kills_at_any_moment_leave_a_cache_that_serves_right_bytes() {
    let _heavy = heavy();
    let site = site(62);
    let content = Content::new(62);
    site.proxy.always("/blobs/", Fault::Throttle(30 * MIB));
    let mut random = 1_u64;
    for round in 0..scale(6, 40) {
        let mount = Mount::start::<&str>(site.cache.path(), []);
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let offset = (random >> 20) % (site.size - 100_000);
        assert!(
            mount.read_at(&site.file(), offset, 100_000) == content.bytes(offset, 100_000),
            "round {round}"
        );
        std::thread::sleep(Duration::from_millis(random >> 55));
        mount.kill();
    }
    site.proxy.behave();
    let mount = Mount::start::<&str>(site.cache.path(), []);
    assert_eq!(site.digest_through(&mount), site.digest());
    // Hashing gives way to readers, and ends with the mount.
    eventually(PATIENCE, "the blob is sealed", || {
        site.sealed().exists().then_some(())
    });
    mount.unmount();
    site.verify();
    assert_eq!(
        digest(&std::fs::read(site.sealed()).unwrap()),
        site.digest()
    );
}

#[test]
fn a_remounted_cache_answers_without_the_registry() {
    let site = site(63);
    let cache = site.cache.path().to_str().unwrap();
    run_ocifs(["pull", "--cache-dir", cache, &site.reference()]).ok();
    site.proxy.reset();
    let mount = Mount::start::<&str>(site.cache.path(), []);
    assert_eq!(site.digest_through(&mount), site.digest());
    site.proxy.settle();
    assert_eq!(site.proxy.count("/blobs/"), 0, "{:?}", site.proxy.records());
}

#[test]
fn an_interrupted_pull_says_so_in_one_line_and_the_next_goes_on() {
    let (files, kept) = (scratch("weights"), scratch("cache"));
    let layers = [1_u64, 2].map(|n| {
        let file = files.path().join(n.to_string());
        Content::new(n).write(&file, 60 * MIB);
        Layer::file(DOCKER_SAFETENSORS, &file).at(&format!("{n}.safetensors"))
    });
    let registry = Registry::open();
    let published = Artifact::docker_v02()
        .layers(layers)
        .publish(&registry, "org/m:v1");
    let reference = &published.reference;
    let cache = kept.path().to_str().unwrap();
    for round in 0..16_u64 {
        let fresh = scratch("cache");
        let own = match round {
            0..14 => fresh.path().to_str().unwrap(),
            _ => cache,
        };
        let arguments = ["pull", "--cache-dir", own, reference];
        // Each time at another point of the download, in the middle of requests and of writes.
        let mut child = ocifs(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ocifs starts");
        std::thread::sleep(Duration::from_millis(120 + 20 * round));
        let pid = rustix::process::Pid::from_child(&child);
        // It may be done already.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let status = wait(&mut child, PATIENCE).expect("a pull ends when it is told to");
        let mut said = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
        assert!(!said.contains("panicked"), "round {round}: {said}");
        if status.success() {
            continue;
        }
        // Before the handlers are in place a signal ends it as it ends any program.
        assert!(
            matches!(status.code(), Some(130) | None),
            "{status}: {said}"
        );
    }
    let whole = ["pull", "--cache-dir", cache, reference];
    run_ocifs(whole).ok();
    for layer in &published.layers {
        let sealed = kept.path().join("blobs/sha256").join(&layer[7..]);
        assert_eq!(digest_file(&sealed), *layer);
    }
}
