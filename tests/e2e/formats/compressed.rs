//! Compressed layers: unpacked once, read while they are, bounded, verified, and whole after a crash.

use std::fs;
use std::time::{Duration, Instant};

use super::{Site, archive, compressed};
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::{Content, digest};
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::process::run;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scale, scratch};

const GZIP: &str = "application/vnd.cncf.model.weight.v1.tar+gzip";
const ZSTD: &str = "application/vnd.cncf.model.weight.v1.tar+zstd";

fn sample(seed: u64, program: &str) -> (SampleModel, Artifact) {
    let model = SampleModel::new(seed);
    let all = archive(model.path(), &["."], Some(program));
    let media_type = if program == "gzip" { GZIP } else { ZSTD };
    (
        model,
        Artifact::modelpack("cncf").layer(Layer::bytes(media_type, all)),
    )
}

/// Bytes of what was unpacked that lie in a cache, sealed and on their way.
fn unpacked_files(cache: &std::path::Path) -> usize {
    fs::read_dir(cache.join("ocifs/unpacked")).unwrap().count()
}

#[test]
fn what_was_unpacked_outlives_the_daemon_and_the_registry() {
    for program in ["gzip", "zstd"] {
        let mut registry = Registry::open();
        let cache = scratch("cache");
        let (model, artifact) = sample(311, program);
        let shown = artifact.publish(&registry, "org/m:v1").reference;
        let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
        assert_same_files(&mount.files(&shown), model.files());
        let shard = format!("{shown}/model-00003-of-00003.safetensors");
        assert_eq!(
            mount.xattr(&shard, "user.ocifs.verified").as_deref(),
            Some("true")
        );
        let size = model.files()["model-00003-of-00003.safetensors"].len();
        assert_eq!(
            mount.xattr(&shard, "user.ocifs.cached"),
            Some(size.to_string())
        );
        mount.unmount();
        registry.stop();
        let mount = Mount::start(cache.path(), ["--offline"]);
        assert_same_files(&mount.files(&shown), model.files());
        assert_eq!(unpacked_files(cache.path()), 0, "nothing is left over");
        let args = [
            "cache",
            "verify",
            "--cache-dir",
            cache.path().to_str().unwrap(),
        ];
        run_ocifs(args).ok();
    }
}

#[test]
fn early_members_are_read_while_the_stream_is_still_coming() {
    // The listing is known from before and the bytes are evicted.
    let registry = Registry::open();
    let proxy = Proxy::start(registry.address());
    let dir = scratch("source");
    let (early, late) = (Content::new(1), Content::new(2));
    early.write(&dir.path().join("a.bin"), 1_000_000);
    late.write(&dir.path().join("b.bin"), 30_000_000);
    let layer = Layer::bytes(GZIP, archive(dir.path(), &["a.bin", "b.bin"], Some("gzip")));
    let artifact = Artifact::modelpack("cncf").layer(layer);
    let published = artifact.publish(&registry, "org/m:v1");
    let shown = format!("{}/org/m:v1", proxy.host());
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    assert_eq!(mount.list(&shown), [".oci", "a.bin", "b.bin"]);
    mount.unmount();
    for sealed in fs::read_dir(cache.path().join("blobs/sha256"))
        .unwrap()
        .flatten()
    {
        if sealed.metadata().unwrap().len() > 100_000 {
            fs::remove_file(sealed.path()).unwrap();
        }
    }

    let mount = Mount::start::<&str>(cache.path(), []);
    let blob = format!("/v2/org/m/blobs/{}", published.layers[0]);
    proxy.always(&blob, Fault::Throttle(4_000_000));
    let started = Instant::now();
    assert_eq!(
        mount.read_at(&format!("{shown}/a.bin"), 0, 500_000),
        early.bytes(0, 500_000)
    );
    let first = started.elapsed();
    let end = mount.read_at(&format!("{shown}/b.bin"), 29_000_000, 1000);
    assert_eq!(end, late.bytes(29_000_000, 1000));
    let all = started.elapsed();
    assert!(
        first * 2 < all,
        "the first bytes came after {first:?}, the last after {all:?}"
    );
}

#[test]
fn a_layer_of_one_large_file_is_read_while_it_is_first_unpacked() {
    let registry = Registry::open();
    let proxy = Proxy::start(registry.address());
    let dir = scratch("source");
    let content = Content::new(5);
    content.write(&dir.path().join("weights.bin"), 40_000_000);
    fs::write(dir.path().join("small.bin"), "beside it").unwrap();
    // As Go's writers end a tar: with two blocks and nothing behind them.
    let go = |members: &[&str]| {
        let mut args = vec![
            "--blocking-factor=1",
            "-cf",
            "-",
            "-C",
            dir.path().to_str().unwrap(),
        ];
        args.extend(members);
        run("tar", args).ok_bytes()
    };
    let tar = go(&["weights.bin"]);
    // With the size in its header, as `zstd FILE` and most libraries write it.
    let file = dir.path().join("layer.tar");
    fs::write(&file, &tar).unwrap();
    let zstd = run("zstd", ["-q", "-c", "-1", file.to_str().unwrap()]).ok_bytes();
    for (tag, media_type, bytes) in [("gz", GZIP, compressed(&tar, "gzip")), ("zst", ZSTD, zstd)] {
        let artifact = Artifact::modelpack("cncf").layer(Layer::bytes(media_type, bytes));
        let published = artifact.publish(&registry, &format!("org/m:{tag}"));
        let cache = scratch("cache");
        let mount = Mount::start::<&str>(cache.path(), []);
        proxy.always(
            &format!("/v2/org/m/blobs/{}", published.layers[0]),
            Fault::Throttle(8_000_000),
        );
        let file = format!("{}/org/m:{tag}/weights.bin", proxy.host());
        let started = Instant::now();
        assert_eq!(mount.read_at(&file, 0, 500_000), content.bytes(0, 500_000));
        let first = started.elapsed();
        assert_eq!(
            mount.xattr(&file, "user.ocifs.verified").as_deref(),
            Some("false")
        );
        assert_eq!(
            mount.read_at(&file, 39_999_000, 1000),
            content.bytes(39_999_000, 1000)
        );
        let all = started.elapsed();
        assert!(
            first * 2 < all,
            "{tag}: the first bytes came after {first:?}, the last after {all:?}"
        );
        mount.verified(&file);
    }
    // Two files are told from one, however small the second and whoever wrote the tar.
    let two = ["weights.bin", "small.bin"];
    for (tag, tar) in [
        ("two", go(&two)),
        ("padded", archive(dir.path(), &two, None)),
    ] {
        let artifact =
            Artifact::modelpack("cncf").layer(Layer::bytes(GZIP, compressed(&tar, "gzip")));
        let shown = artifact
            .publish(&registry, &format!("org/m:{tag}"))
            .reference;
        let cache = scratch("cache");
        let mount = Mount::start::<&str>(cache.path(), []);
        assert_eq!(mount.list(&shown), [".oci", "small.bin", "weights.bin"]);
    }
}

#[test]
fn strict_verification_serves_nothing_of_a_layer_before_all_of_it_is_right() {
    let registry = Registry::open();
    let (model, artifact) = sample(315, "zstd");
    let shown = artifact.publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--verify", "strict"]);
    assert_same_files(&mount.files(&shown), model.files());
}

#[test]
fn a_killed_daemon_leaves_nothing_that_is_believed() {
    let registry = Registry::open();
    let proxy = Proxy::start(registry.address());
    let dir = scratch("source");
    let content = Content::new(3);
    content.write(&dir.path().join("w.bin"), 20_000_000);
    let layer = Layer::bytes(ZSTD, archive(dir.path(), &["w.bin"], Some("zstd")));
    let published = Artifact::modelpack("cncf")
        .layer(layer)
        .publish(&registry, "org/m:v1");
    let shown = format!("{}/org/m:v1", proxy.host());
    let cache = scratch("cache");
    let blob = format!("/v2/org/m/blobs/{}", published.layers[0]);
    proxy.always(&blob, Fault::Throttle(4_000_000));
    let mount = Mount::start::<&str>(cache.path(), []);
    let reader = {
        let path = mount.path(&shown);
        std::thread::spawn(move || drop(fs::read_dir(path)))
    };
    eventually(PATIENCE, "it begins to unpack", || {
        let mut files = fs::read_dir(cache.path().join("ocifs/unpacked"))
            .unwrap()
            .flatten();
        files
            .any(|file| file.metadata().unwrap().len() > 0)
            .then_some(())
    });
    mount.kill();
    reader.join().unwrap();
    proxy.behave();
    let mount = Mount::start::<&str>(cache.path(), []);
    assert_eq!(
        mount.read(&format!("{shown}/w.bin")),
        content.bytes(0, 20_000_000)
    );
    assert_eq!(unpacked_files(cache.path()), 0);
}

#[test]
fn two_mounts_unpack_a_layer_once() {
    let registry = Registry::open();
    let (model, artifact) = sample(312, "zstd");
    let shown = artifact.publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let mounts = [(); 2].map(|()| Mount::start::<&str>(cache.path(), []));
    std::thread::scope(|scope| {
        for mount in &mounts {
            scope.spawn(|| assert_same_files(&mount.files(&shown), model.files()));
        }
    });
    let unpacked: usize = mounts
        .iter()
        .map(|mount| mount.log().matches("unpacked a layer").count())
        .sum();
    assert!(unpacked <= 1, "{unpacked}");
}

#[test]
fn a_bomb_and_what_does_not_fit_are_refused_with_a_reason() {
    let registry = Registry::open();
    let dir = scratch("bomb");
    let sparse = fs::File::create(dir.path().join("zeros.bin")).unwrap();
    sparse.set_len(scale(1 << 30, 8 << 30)).unwrap();
    // zstd makes a few kilobytes of it: thousands to one.
    let bomb = archive(dir.path(), &["zeros.bin"], Some("zstd"));
    assert!(bomb.len() < 1 << 20);
    let shown = Artifact::modelpack("cncf")
        .layer(Layer::bytes(ZSTD, bomb))
        .publish(&registry, "org/bomb:v1")
        .reference;
    let cache = scratch("cache");
    let inspect = |cache: &std::path::Path, shown: &str, more: &[&str]| {
        let mut args = vec!["inspect", "--cache-dir", cache.to_str().unwrap()];
        args.extend(more);
        args.push(shown);
        run_ocifs(args)
    };
    let said = inspect(cache.path(), &shown, &[]).ok();
    assert!(said.contains("which no model has"), "{said}");
    assert_eq!(unpacked_files(cache.path()), 0);

    // What is not kept cannot be checked before it is read.
    let content = Content::new(4);
    content.write(&dir.path().join("w.bin"), 80_000_000);
    let large = archive(dir.path(), &["w.bin"], Some("gzip"));
    let shown = Artifact::modelpack("cncf")
        .layer(Layer::bytes(GZIP, large.clone()))
        .publish(&registry, "org/large:v1")
        .reference;
    let small = scratch("cache");
    let flags = ["--cache-size", "100MB", "--verify", "strict"];
    let mount = Mount::start(small.path(), flags);
    let error = mount.try_read(&format!("{shown}/w.bin")).unwrap_err();
    let log = mount.log();
    assert!(log.contains("--cache-size"), "{error}: {log}");
    let root = mount.root().to_str().unwrap().to_owned();
    let status = run_ocifs(["status", &root]).ok();
    for word in ["--verify strict", "--cache-size", &digest(&large)] {
        assert!(status.contains(word), "{word} is not told: {status}");
    }
    assert_eq!(unpacked_files(small.path()), 0);
}

/// Bytes of it are decompressed for each reader and go by; the limit holds, and so does the digest.
#[test]
fn a_layer_that_the_cache_has_no_room_for_is_read_all_the_same() {
    let registry = Registry::open();
    let dir = scratch("source");
    let (large, small) = (Content::new(41), Content::new(42));
    const LARGE: usize = 90_000_000;
    large.write(&dir.path().join("a.bin"), LARGE as u64);
    small.write(&dir.path().join("b.bin"), 3_000_000);
    for (program, media_type) in [("gzip", GZIP), ("zstd", ZSTD)] {
        let layer = Layer::bytes(
            media_type,
            archive(dir.path(), &["a.bin", "b.bin"], Some(program)),
        );
        let shown = Artifact::modelpack("cncf")
            .layer(layer)
            .publish(&registry, &format!("org/{program}:v1"))
            .reference;
        let cache = scratch("cache");
        let flags = [
            "--cache-size",
            "64MiB",
            "--memory",
            "64MB",
            "--prefetch",
            "none",
        ];
        let mount = Mount::start(cache.path(), flags);
        assert_eq!(mount.list(&shown), [".oci", "a.bin", "b.bin"]);
        let path = format!("{shown}/a.bin");
        assert!(mount.read(&path) == large.bytes(0, LARGE), "{program}");
        assert!(mount.read(&format!("{shown}/b.bin")) == small.bytes(0, 3_000_000));
        assert_eq!(
            mount.xattr(&path, "user.ocifs.verified").as_deref(),
            Some("false")
        );
        // Several at a time, in order and not.
        std::thread::scope(|scope| {
            for reader in 0..3 {
                let (mount, path, large) = (&mount, &path, &large);
                scope.spawn(move || {
                    for at in [70_000_000, 20_000_000, 75_000_000, 1_000] {
                        let at = at + reader * 1_000_003;
                        let found = mount.read_at(path, at, 300_000);
                        assert!(found == large.bytes(at, 300_000), "{program}: {at}");
                    }
                });
            }
        });
        let left: u64 = walk(cache.path());
        assert!(left <= 76_000_000, "{left}");
        assert!(mount.log().contains("not kept"), "{}", mount.log());
        let memory = mount.own_memory();
        assert!(memory < 128 << 20, "{memory}");
        mount.unmount();
        // What it holds is remembered.
        let mount = Mount::start(cache.path(), flags);
        let found = mount.read_at(&format!("{shown}/b.bin"), 5, 1000);
        assert!(found == small.bytes(5, 1000));
        mount.unmount();
    }
}

/// Bytes that a directory takes.
fn walk(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = fs::read_dir(dir).unwrap().flatten();
    let each = entries.map(|entry| {
        let found = entry.metadata().unwrap();
        found.blocks() * 512
            + if found.is_dir() {
                walk(&entry.path())
            } else {
                0
            }
    });
    each.sum()
}

#[test]
fn a_stream_that_is_damaged_or_not_what_its_config_says_is_refused() {
    let site = Site::new();
    let model = SampleModel::new(313);
    let tar = archive(model.path(), &["."], None);
    let good = compressed(&tar, "gzip");
    let cut = good[..good.len() - 20].to_vec();
    let shown = Artifact::modelpack("cncf")
        .layer(Layer::bytes(GZIP, cut))
        .publish(&site.registry, "org/cut:v1")
        .reference;
    let said = site.inspect(&shown);
    assert!(said.contains("cannot be decompressed"), "{said}");

    let wrong = serde_json::json!({
        "descriptor": {}, "config": {},
        "modelfs": {"type": "layers", "diffIds": [crate::support::content::digest(b"something else")]},
    });
    let shown = Artifact::new("application/vnd.cncf.model.config.v1+json", &wrong)
        .layer(Layer::bytes(GZIP, good))
        .publish(&site.registry, "org/wrong:v1")
        .reference;
    site.assert_wrong(&shown);
}

#[test]
fn a_layer_that_is_evicted_is_unpacked_again() {
    let registry = Registry::open();
    let (model, artifact) = sample(314, "gzip");
    let shown = artifact.publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let dir = cache.path().to_str().unwrap().to_owned();
    let mount = Mount::start::<&str>(cache.path(), []);
    assert_same_files(&mount.files(&shown), model.files());
    std::thread::sleep(Duration::from_millis(1100));
    run_ocifs(["cache", "gc", "--cache-dir", &dir, "--to", "0"]).ok();
    // The kernel keeps what it has read; a new mount does not.
    drop(mount);
    let mount = Mount::start::<&str>(cache.path(), []);
    assert_same_files(&mount.files(&shown), model.files());
}
