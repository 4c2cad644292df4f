//! Registries that lie: right bytes or a clear error within a deadline, never a hang, and nothing wrong is ever kept.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tempfile::TempDir;

use crate::support::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_SAFETENSORS, Layer, MANIFEST, Published, tar,
};
use crate::support::content::Content;
use crate::support::mount::{Mount, run_ocifs};
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::{Access, Registry};
use crate::support::{PATIENCE, eventually, scratch, within};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB + 4321;
/// How long a read may take with one stalled answer on the way.
const LONG: Duration = Duration::from_secs(150);

/// A model of one weight file and a config tar, behind a proxy that lies.
struct Site {
    registry: Registry,
    proxy: Proxy,
    published: Published,
    content: Content,
    cache: TempDir,
}

fn site(seed: u64) -> Site {
    let content = Content::new(seed);
    let registry = Registry::open();
    let archive = tar([("config.json", b"{\"honest\": true}".as_slice())]);
    let published = Artifact::docker_v01()
        .layer(
            Layer::bytes(DOCKER_SAFETENSORS, content.bytes(0, SIZE as usize))
                .at("model.safetensors"),
        )
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive))
        .publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    Site {
        registry,
        proxy,
        published,
        content,
        cache: scratch("cache"),
    }
}

impl Site {
    /// Reads wait for a minute in all: long enough for every fault that passes.
    fn mount(&self) -> Mount {
        Mount::start(self.cache.path(), ["--read-timeout", "60s"])
    }

    fn reference(&self) -> String {
        format!("{}/org/m:v1", self.proxy.host())
    }

    fn weights(&self) -> String {
        format!("{}/model.safetensors", self.reference())
    }

    fn read_weights(&self, mount: &Mount) -> io::Result<Vec<u8>> {
        let path = mount.path(&self.weights());
        within(LONG, "read the weights", move || std::fs::read(path))
    }

    fn right(&self) -> Vec<u8> {
        self.content.bytes(0, SIZE as usize)
    }

    fn sealed(&self, layer: usize) -> PathBuf {
        self.cache
            .path()
            .join("blobs/sha256")
            .join(&self.published.layers[layer]["sha256:".len()..])
    }

    fn pull(&self) -> crate::support::process::Output {
        run_ocifs([
            "pull",
            "--cache-dir",
            self.cache.path().to_str().unwrap(),
            &self.reference(),
        ])
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

    /// Weights come right although the fault is met `times` times.
    fn survives(self, times: usize, fault: Fault) {
        let what = format!("{fault:?}");
        let mount = self.mount();
        self.proxy.times(&self.published.layers[0], times, fault);
        let found = self
            .read_weights(&mount)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(found == self.right(), "{what}: wrong bytes");
        eventually(PATIENCE, "the blob is sealed", || {
            self.sealed(0).exists().then_some(())
        });
        mount.unmount();
        self.verify();
    }

    /// Looking the model up fails soon, nothing is shown, and `pull` says why.
    fn refuses(self, path: &str, fault: Fault, reason: &[&str]) {
        self.proxy.always(path, fault.clone());
        let mount = self.mount();
        let config = format!("{}/config.json", self.reference());
        let error = mount
            .try_read(&config)
            .expect_err("a manifest that is not one");
        assert!(
            [
                Some(Errno::IO.raw_os_error()),
                Some(Errno::NOENT.raw_os_error())
            ]
            .contains(&error.raw_os_error()),
            "{error}"
        );
        let said = self.pull().failed().to_lowercase();
        assert!(
            reason.iter().any(|word| said.contains(word)),
            "{fault:?}: {said}"
        );
        assert!(said.contains("org/m"), "{said}");
        // An honest registry is believed again, at the latest when the failure is forgotten.
        self.proxy.behave();
        self.pull().ok();
        eventually(PATIENCE, "the model is there", || {
            mount.try_read(&config).ok()
        });
        mount.unmount();
        self.verify();
    }
}

#[test]
fn a_manifest_of_another_digest_is_refused() {
    let site = site(70);
    let other = String::from_utf8(site.published.manifest.clone())
        .unwrap()
        .replace("model.safetensors", "other.safetensors");
    site.refuses(
        "/manifests/",
        Fault::Replace(MANIFEST.into(), Arc::new(other.into_bytes())),
        &["digest"],
    );
}

#[test]
fn a_manifest_asked_for_by_digest_is_checked_too() {
    let site = site(71);
    let other = String::from_utf8(site.published.manifest.clone())
        .unwrap()
        .replace("model.safetensors", "other.safetensors");
    site.proxy.always(
        "/manifests/",
        Fault::Replace(MANIFEST.into(), Arc::new(other.into_bytes())),
    );
    let mount = site.mount();
    let reference = format!("{}/org/m@{}", site.proxy.host(), site.published.digest);
    for name in ["other.safetensors", "config.json", ".oci/manifest.json"] {
        assert!(
            mount.try_read(&format!("{reference}/{name}")).is_err(),
            "{name}"
        );
    }
    assert!(mount.log().contains("digest"), "{}", mount.log());
}

#[test]
fn html_in_place_of_a_manifest_is_refused() {
    let page = b"<!doctype html><title>Log in to continue</title>".to_vec();
    let site = site(72);
    site.refuses(
        "/manifests/",
        Fault::Replace("text/html".into(), Arc::new(page)),
        &["digest", "html", "json", "manifest"],
    );
}

#[test]
fn a_manifest_of_a_hundred_megabytes_is_refused_before_it_has_come() {
    let site = site(73);
    site.proxy.always("/manifests/", Fault::Huge(100 * MIB));
    let mount = site.mount();
    assert!(
        mount
            .try_read(&format!("{}/config.json", site.reference()))
            .is_err()
    );
    let said = site.pull().failed();
    assert!(
        said.contains("large") || said.contains("bytes") || said.contains("MiB"),
        "{said}"
    );
    // What the sockets hold may be sent in vain, and each try again.
    let most = site
        .proxy
        .records()
        .iter()
        .map(|record| record.sent)
        .max()
        .unwrap_or(0);
    assert!(most < 32 * MIB, "{most} bytes were read");
}

#[test]
fn endless_redirects_of_a_manifest_are_refused() {
    site(74).refuses("/manifests/", Fault::RedirectLoop, &["redirect"]);
}

#[test]
fn endless_redirects_of_a_blob_end_in_an_error() {
    let site = site(75);
    let mount = site.mount();
    assert_eq!(
        mount.read(&format!("{}/config.json", site.reference())),
        b"{\"honest\": true}"
    );
    site.proxy
        .always(&site.published.layers[0], Fault::RedirectLoop);
    let error = site.read_weights(&mount).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(Errno::IO.raw_os_error()),
        "{error}"
    );
    assert!(mount.log().contains("redirect"), "{}", mount.log());
    site.proxy.settle();
    assert!(
        site.proxy.records().len() < 300,
        "{} requests",
        site.proxy.records().len()
    );
    site.proxy.behave();
    eventually(PATIENCE, "it is read again", || {
        site.read_weights(&mount)
            .ok()
            .filter(|found| *found == site.right())
    });
}

#[test]
fn a_server_that_ignores_ranges_is_read_in_one_stream() {
    let site = site(76);
    site.proxy.always("/blobs/", Fault::IgnoreRange);
    let mount = site.mount();
    assert!(site.read_weights(&mount).unwrap() == site.right());
    site.proxy.settle();
    let sent = site.proxy.sent(&site.published.layers[0]);
    assert!(sent <= 2 * SIZE, "{sent} bytes were sent for {SIZE}");
    mount.unmount();
    site.verify();
}

#[test]
fn a_server_that_ignores_ranges_serves_the_middle_too() {
    let site = site(77);
    site.proxy.always("/blobs/", Fault::IgnoreRange);
    let mount = Mount::start(site.cache.path(), ["--prefetch", "none"]);
    for offset in [SIZE - 100, 10 * MIB, 5, 20 * MIB] {
        assert!(
            mount.read_at(&site.weights(), offset, 100) == site.content.bytes(offset, 100),
            "{offset}"
        );
    }
}

#[test]
fn short_bodies_are_gone_on_with() {
    site(78).survives(3, Fault::Truncate(MIB));
}

#[test]
fn reset_connections_are_gone_on_with() {
    site(79).survives(3, Fault::Reset(MIB + 77));
}

#[test]
fn bodies_that_are_always_short_still_come_to_an_end() {
    site(80).survives(usize::MAX, Fault::Truncate(3 * MIB));
}

#[test]
fn a_stalled_body_is_given_up_and_asked_for_again() {
    site(81).survives(1, Fault::Stall(MIB));
}

#[test]
fn a_registry_that_never_sends_a_byte_ends_in_an_error() {
    let site = site(90);
    let mount = Mount::start(site.cache.path(), ["--read-timeout", "10s"]);
    assert_eq!(mount.stat(&site.weights()).len(), SIZE);
    site.proxy
        .always(&site.published.layers[0], Fault::Stall(0));
    let began = Instant::now();
    let error = mount.try_read_at(&site.weights(), 0, 4096).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(Errno::IO.raw_os_error()),
        "{error}"
    );
    assert!(
        began.elapsed() < Duration::from_secs(40),
        "{:?}",
        began.elapsed()
    );
    // Whatever waits is told, and the mount goes down in good order.
    mount.unmount();
}

#[test]
fn bodies_that_are_too_long_do_no_harm() {
    site(82).survives(2, Fault::Longer(1000));
}

#[test]
fn another_range_than_was_asked_for_is_never_taken_for_it() {
    site(83).survives(2, Fault::ShiftRange(4096));
}

#[test]
fn another_range_than_was_asked_for_every_time_is_an_error() {
    let site = site(84);
    site.proxy
        .always(&site.published.layers[0], Fault::ShiftRange(4096));
    let mount = site.mount();
    match site.read_weights(&mount) {
        Ok(found) => assert!(found == site.right(), "wrong bytes"),
        Err(error) => assert_eq!(
            error.raw_os_error(),
            Some(Errno::IO.raw_os_error()),
            "{error}"
        ),
    }
}

/// Wrong content: served as it comes until it is known to be wrong; then errors, and nothing of it is kept.
fn wrong_content(seed: u64, fault: Fault) {
    let site = site(seed);
    site.proxy.always(&site.published.layers[0], fault);
    let mount = site.mount();
    // Whether this read still succeeds depends on who is faster.
    let _ = site.read_weights(&mount);
    let error = eventually(LONG, "reads fail", || {
        mount.try_read_at(&site.weights(), 0, 4096).err()
    });
    assert_eq!(
        error.raw_os_error(),
        Some(Errno::IO.raw_os_error()),
        "{error}"
    );
    // From then on, also for bytes that the kernel had in its cache, which it drops one after the other.
    let fails = |offset| mount.try_read_at(&site.weights(), offset, 4096).is_err();
    let offsets = [0, MIB, SIZE / 2, SIZE - 4096];
    eventually(PATIENCE, "reads fail everywhere", || {
        offsets.into_iter().rev().all(fails).then_some(())
    });
    assert!(offsets.into_iter().all(fails));
    assert!(
        !site.sealed(0).exists(),
        "content that does not have its digest was sealed"
    );
    assert_eq!(
        mount
            .xattr(&site.weights(), "user.ocifs.verified")
            .as_deref(),
        Some("false")
    );
    assert!(
        mount.log().contains(&site.published.layers[0]),
        "the log names the blob: {}",
        mount.log()
    );
    // The other files are none the worse.
    assert_eq!(
        mount.read(&format!("{}/config.json", site.reference())),
        b"{\"honest\": true}"
    );
    site.verify();
    let said = site.pull().failed();
    assert!(said.contains("digest"), "{said}");
    assert!(!site.sealed(0).exists());
    mount.unmount();
    site.verify();

    // Nothing of it was kept: an honest registry makes it right.
    site.proxy.behave();
    let mount = site.mount();
    assert!(site.read_weights(&mount).unwrap() == site.right());
    eventually(PATIENCE, "the blob is sealed", || {
        site.sealed(0).exists().then_some(())
    });
    mount.unmount();
    site.verify();
}

#[test]
fn a_wrong_byte_is_found_and_never_sealed() {
    wrong_content(85, Fault::Corrupt(SIZE / 3));
}

#[test]
fn bytes_from_elsewhere_in_the_blob_are_found_and_never_sealed() {
    wrong_content(86, Fault::ShiftBytes(4));
}

#[test]
fn a_damaged_config_tar_is_not_unpacked() {
    let site = site(87);
    // Inside the config's text.
    site.proxy
        .always(&site.published.layers[1], Fault::Corrupt(514));
    let mount = site.mount();
    let config = format!("{}/config.json", site.reference());
    assert!(mount.try_read(&config).is_err());
    assert!(!site.sealed(1).exists());
    site.proxy.behave();
    mount.unmount();
    let mount = site.mount();
    assert_eq!(mount.read(&config), b"{\"honest\": true}");
    mount.unmount();
    site.verify();
}

#[test]
fn a_redirect_to_another_host_carries_no_credentials() {
    let registry = Registry::start(Access::Token);
    let bytes = Content::new(88).bytes(0, 100_000);
    let artifact = Artifact::docker_v02()
        .layer(Layer::bytes(DOCKER_SAFETENSORS, bytes.clone()).at("model.safetensors"));
    let published = artifact.publish(&registry, "org/m:v1");
    // The other host has the same blob and wants no token.
    let store = Registry::open();
    artifact.publish(&store, "org/m:v1");
    let (front, back) = (
        Proxy::start(registry.address()),
        Proxy::start(store.address()),
    );
    front.always(
        "/blobs/",
        Fault::RedirectTo(format!("http://{}", back.host())),
    );
    registry.tokens().set_anonymous(false);
    let auth = scratch("auth");
    let credentials = std::fs::read_to_string(registry.auth_file())
        .unwrap()
        .replace(&registry.host(), &front.host());
    std::fs::write(auth.path().join("auth.json"), credentials).unwrap();
    let cache = scratch("cache");
    let mount = Mount::start(
        cache.path(),
        [
            "--auth-file",
            auth.path().join("auth.json").to_str().unwrap(),
        ],
    );
    assert!(mount.read(&format!("{}/org/m:v1/model.safetensors", front.host())) == bytes);
    assert!(
        front.records().iter().any(|record| record.authorized),
        "{:?}",
        front.records()
    );
    assert!(back.count(&published.layers[0]) > 0);
    assert!(
        back.records().iter().all(|record| !record.authorized),
        "{:?}",
        back.records()
    );
}

#[test]
fn blobs_damaged_in_the_registry_itself_are_found() {
    let site = site(89);
    let file = site.registry.blob_file(&site.published.layers[0]);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[12_345_678] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let said = site.pull().failed();
    assert!(said.contains("digest"), "{said}");
    assert!(!site.sealed(0).exists());
    site.verify();
}
