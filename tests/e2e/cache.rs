//! The cache directory: a layout that other tools read, with a limit.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::artifact::{Artifact, DOCKER_FILE, DOCKER_SAFETENSORS, Layer, Published};
use crate::support::content::{Content, digest, digest_file};
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::process::{Output, run};
use crate::support::proxy::Proxy;
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch};

const MIB: u64 = 1 << 20;

fn cache_command(cache: &Path, command: &str, more: &[&str]) -> Output {
    let mut args = vec!["cache", command, "--cache-dir", cache.to_str().unwrap()];
    args.extend(more);
    run_ocifs(args)
}

fn sealed(cache: &Path, digest: &str) -> PathBuf {
    cache.join("blobs/sha256").join(&digest["sha256:".len()..])
}

/// Allocated bytes of all files.
fn allocated(dir: &Path) -> u64 {
    let mut sum = 0;
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            // Files come and go beneath us.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                folders.push(entry.path());
            } else {
                sum += meta.blocks() * 512;
            }
        }
    }
    sum
}

/// Waits until the cache is within its limit and stays so; the limit counts allocated bytes.
fn assert_within(dir: &Path, limit: u64) {
    let end = std::time::Instant::now() + PATIENCE;
    // Directories and the files that ocifs keeps for itself.
    while allocated(dir) > limit + MIB {
        let now = allocated(dir);
        assert!(
            std::time::Instant::now() < end,
            "{now} bytes are allocated, the limit is {limit}"
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Makes a sealed blob look as if it was last used so many hours ago. A blob's access time is its last use.
fn age(file: &Path, hours: u64) {
    let then = std::time::SystemTime::now() - std::time::Duration::from_secs(hours * 3600);
    File::open(file)
        .unwrap()
        .set_times(fs::FileTimes::new().set_accessed(then))
        .unwrap();
}

#[test]
fn a_pulled_artifact_is_one_that_skopeo_finds_in_the_cache() {
    let registry = Registry::open();
    let model = SampleModel::new(90);
    let published = model.docker_v01(false).publish(&registry, "org/m:v1");
    let cache = scratch("cache");
    run_ocifs([
        "pull",
        "--cache-dir",
        cache.path().to_str().unwrap(),
        &published.reference,
    ])
    .ok();
    let source = format!("oci:{}:{}", cache.path().display(), published.reference);
    let raw = run("skopeo", ["inspect", "--raw", &source]).ok_bytes();
    assert_eq!(digest(&raw), published.digest);

    let copy = scratch("copy");
    let target = format!("dir:{}", copy.path().display());
    run(
        "skopeo",
        ["--insecure-policy", "copy", "-q", &source, &target],
    )
    .ok();
    for layer in &published.layers {
        assert_eq!(
            &digest_file(&copy.path().join(&layer["sha256:".len()..])),
            layer
        );
    }
    let layout: Value =
        serde_json::from_slice(&fs::read(cache.path().join("oci-layout")).unwrap()).unwrap();
    assert_eq!(layout["imageLayoutVersion"], "1.0.0");
}

#[test]
fn a_new_cache_is_for_its_owner_alone() {
    let registry = Registry::open();
    let reference = SampleModel::new(96)
        .docker_v02()
        .publish(&registry, "org/m:v1")
        .reference;
    let dir = scratch("cache");
    let cache = dir.path().join("made/by/ocifs");
    run_ocifs(["pull", "--cache-dir", cache.to_str().unwrap(), &reference]).ok();
    // It holds what credentials were needed for.
    assert_eq!(fs::metadata(&cache).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn an_artifact_that_was_read_whole_through_a_mount_is_in_the_index_and_a_partial_one_is_not() {
    let registry = Registry::open();
    let model = SampleModel::new(91);
    let whole = model.docker_v02().publish(&registry, "org/whole:v1");
    let partial = SampleModel::new(92)
        .docker_v02()
        .publish(&registry, "org/partial:v1");
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    assert_same_files(&mount.files(&whole.reference), model.files());
    mount.read(&format!("{}/config.json", partial.reference));
    let source =
        |published: &Published| format!("oci:{}:{}", cache.path().display(), published.reference);
    eventually(PATIENCE, "skopeo finds it", || {
        run("skopeo", ["inspect", "--raw", &source(&whole)])
            .status
            .success()
            .then_some(())
    });
    run("skopeo", ["inspect", "--raw", &source(&partial)]).failed();
    mount.unmount();
    cache_command(cache.path(), "verify", &[]).ok();
}

#[test]
fn verify_finds_a_damaged_blob() {
    let registry = Registry::open();
    let published = SampleModel::new(93)
        .docker_v02()
        .publish(&registry, "org/m:v1");
    let cache = scratch("cache");
    run_ocifs([
        "pull",
        "--cache-dir",
        cache.path().to_str().unwrap(),
        &published.reference,
    ])
    .ok();
    cache_command(cache.path(), "verify", &[]).ok();
    let file = sealed(cache.path(), &published.layers[0]);
    let length = fs::metadata(&file).unwrap().len();
    // Sealed files are read-only, which does not stop root, nor a failing disk.
    let mut permissions = fs::metadata(&file).unwrap().permissions();
    #[allow(clippy::permissions_set_readonly_false)] // in a directory that only we can enter
    permissions.set_readonly(false);
    fs::set_permissions(&file, permissions).unwrap();
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .write_all_at(b"\xFF\xFE", length / 2)
        .unwrap();
    let said = cache_command(cache.path(), "verify", &[]).failed();
    assert!(
        said.contains(&published.layers[0]["sha256:".len()..]),
        "{said}"
    );
}

#[test]
fn ls_lists_what_rm_and_gc_remove() {
    let registry = Registry::open();
    let keep = SampleModel::new(94)
        .docker_v02()
        .publish(&registry, "org/keep:v1");
    let gone = SampleModel::new(95)
        .docker_v02()
        .publish(&registry, "org/gone:v1");
    let cache = scratch("cache");
    for reference in [&keep.reference, &gone.reference] {
        run_ocifs([
            "pull",
            "--cache-dir",
            cache.path().to_str().unwrap(),
            reference,
        ])
        .ok();
    }
    let listed = cache_command(cache.path(), "ls", &["--json"]).ok();
    let listed: Value = serde_json::from_str(&listed).expect("--json prints JSON");
    assert!(listed.to_string().contains(&gone.layers[0]), "{listed}");
    let unique = gone
        .layers
        .iter()
        .find(|digest| !keep.layers.contains(digest))
        .unwrap();
    let shared = gone
        .layers
        .iter()
        .find(|digest| keep.layers.contains(digest))
        .expect("the models share their licence");

    cache_command(cache.path(), "rm", &[&gone.reference]).ok();
    cache_command(cache.path(), "gc", &[]).ok();
    assert!(
        !sealed(cache.path(), unique).exists(),
        "rm and gc leave the blob"
    );
    assert!(
        sealed(cache.path(), shared).exists(),
        "a blob that another artifact needs is gone"
    );
    run(
        "skopeo",
        [
            "inspect",
            "--raw",
            &format!("oci:{}:{}", cache.path().display(), keep.reference),
        ],
    )
    .ok();
    run(
        "skopeo",
        [
            "inspect",
            "--raw",
            &format!("oci:{}:{}", cache.path().display(), gone.reference),
        ],
    )
    .failed();
    cache_command(cache.path(), "verify", &[]).ok();
}

/// Models of one weight file of 32 MiB each, behind a proxy.
struct Models {
    _registry: Registry,
    proxy: Proxy,
    published: Vec<Published>,
    cache: TempDir,
}

const WEIGHTS: u64 = 32 * MIB;

impl Models {
    fn new(count: u64) -> Self {
        let registry = Registry::open();
        let published = (0..count)
            .map(|index| {
                Artifact::docker_v02()
                    .layer(
                        Layer::bytes(
                            DOCKER_SAFETENSORS,
                            Content::new(1000 + index).bytes(0, WEIGHTS as usize),
                        )
                        .at("w"),
                    )
                    .layer(Layer::bytes(DOCKER_FILE, "{}").at("config.json"))
                    .publish(&registry, &format!("org/m{index}:v1"))
            })
            .collect();
        let proxy = Proxy::start(registry.address());
        Self {
            _registry: registry,
            proxy,
            published,
            cache: scratch("cache"),
        }
    }

    fn weights(&self, index: usize) -> String {
        format!("{}/org/m{index}:v1/w", self.proxy.host())
    }

    /// Where the weights are once they are complete.
    fn sealed(&self, index: usize) -> PathBuf {
        sealed(self.cache.path(), &self.published[index].layers[0])
    }

    fn is_sealed(&self, index: usize) -> bool {
        self.sealed(index).exists()
    }

    fn read(&self, mount: &Mount, index: usize) {
        assert!(
            mount.read(&self.weights(index))
                == Content::new(1000 + index as u64).bytes(0, WEIGHTS as usize),
            "{index}"
        );
    }

    fn read_and_seal(&self, mount: &Mount, index: usize) {
        self.read(mount, index);
        eventually(PATIENCE, "the blob is sealed", || {
            self.is_sealed(index).then_some(())
        });
    }
}

#[test]
fn the_least_recently_used_blobs_go_first() {
    let models = Models::new(4);
    // Room for two and a half.
    let limit = WEIGHTS * 5 / 2;
    let mount = Mount::start(
        models.cache.path(),
        ["--cache-size".to_owned(), limit.to_string()],
    );
    models.read_and_seal(&mount, 0);
    models.read_and_seal(&mount, 1);
    assert_within(models.cache.path(), limit);
    // The first is used again, so the second is the one to go.
    age(&models.sealed(0), 5);
    age(&models.sealed(1), 4);
    models.read(&mount, 0);
    models.read_and_seal(&mount, 2);
    assert_within(models.cache.path(), limit);
    eventually(PATIENCE, "the second goes", || {
        (!models.is_sealed(1)).then_some(())
    });
    assert!(models.is_sealed(0) && models.is_sealed(2));
    models.read_and_seal(&mount, 3);
    assert_within(models.cache.path(), limit);
    // Whatever went is fetched again.
    for index in 0..4 {
        models.read(&mount, index);
    }
    mount.unmount();
    assert_within(models.cache.path(), limit);
    cache_command(models.cache.path(), "verify", &[]).ok();
}

#[test]
fn an_open_file_outlives_the_eviction_of_all_others() {
    let models = Models::new(4);
    let limit = WEIGHTS * 5 / 2;
    let mount = Mount::start(
        models.cache.path(),
        ["--cache-size".to_owned(), limit.to_string()],
    );
    models.read_and_seal(&mount, 0);
    let held = File::open(mount.path(&models.weights(0))).unwrap();
    for index in 1..4 {
        models.read(&mount, index);
    }
    assert_within(models.cache.path(), limit);
    assert!(models.is_sealed(0), "what is open was evicted");
    models.proxy.reset();
    let mut bytes = vec![0; WEIGHTS as usize];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == Content::new(1000).bytes(0, WEIGHTS as usize));
    assert_eq!(models.proxy.sent(&models.published[0].layers[0]), 0);
    drop(held);
    mount.unmount();
}

#[test]
fn a_blob_larger_than_the_cache_is_still_readable() {
    // The smallest limit that there is, and half as much again.
    let (limit, size) = (64 * MIB, 96 * MIB);
    let content = Content::new(2000);
    let registry = Registry::open();
    let published = Artifact::docker_v02()
        .layer(Layer::bytes(DOCKER_SAFETENSORS, content.bytes(0, size as usize)).at("w"))
        .publish(&registry, "org/m:v1");
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--cache-size".to_owned(), limit.to_string()]);
    let file = format!("{}/w", published.reference);
    for _ in 0..2 {
        assert!(mount.read(&file) == content.bytes(0, size as usize));
        assert_within(cache.path(), limit);
    }
    mount.unmount();
    assert!(!sealed(cache.path(), &published.layers[0]).exists());
    cache_command(cache.path(), "verify", &[]).ok();
}

#[test]
fn sixty_four_readers_of_sixteen_blobs_that_do_not_fit_take_little_memory() {
    const EACH: u64 = 16 * MIB;
    let (limit, memory) = (64 * MIB, 16 * MIB);
    let registry = Registry::open();
    let content = |blob: u64| Content::new(3000 + blob);
    let artifact = (0..16).fold(Artifact::docker_v02(), |artifact, blob| {
        let bytes = content(blob).bytes(0, EACH as usize);
        artifact.layer(Layer::bytes(DOCKER_SAFETENSORS, bytes).at(&format!("w{blob}")))
    });
    let published = artifact.publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(
        cache.path(),
        [
            "--cache-size".to_owned(),
            limit.to_string(),
            "--memory".to_owned(),
            memory.to_string(),
        ],
    );
    let model = mount.path(&format!("{}/org/m:v1", proxy.host()));
    let readers: Vec<_> = (0..64)
        .map(|reader| {
            let (blob, part) = (reader % 16, reader / 16);
            let path = model.join(format!("w{blob}"));
            std::thread::spawn(move || {
                let file = File::open(path).unwrap();
                let quarter = EACH / 4;
                let mut bytes = vec![0; 256 << 10];
                for at in (part * quarter..(part + 1) * quarter).step_by(bytes.len()) {
                    file.read_exact_at(&mut bytes, at).unwrap();
                    assert!(bytes == content(blob).bytes(at, bytes.len()), "{blob} {at}");
                }
            })
        })
        .collect();
    let mut peak = 0;
    while !readers.iter().all(|reader| reader.is_finished()) {
        peak = mount.own_memory().max(peak);
        std::thread::sleep(Duration::from_millis(5));
    }
    for reader in readers {
        reader.join().unwrap();
    }
    assert!(peak > 0 && peak <= memory + 64 * MIB, "{} MiB", peak / MIB);
    assert_within(cache.path(), limit);
    drop(published);
    mount.unmount();
}
