//! A registry that is gone takes nothing cached away.

use std::time::{Duration, Instant};

use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch};

#[test]
fn a_cached_model_is_mounted_without_its_registry() {
    let mut registry = Registry::open();
    let model = SampleModel::new(110);
    let other = SampleModel::new(111)
        .docker_v02()
        .publish(&registry, "org/other:v1")
        .reference;
    let published = model.docker_v01(false).publish(&registry, "org/m:v1");
    let cache = scratch("cache");
    run_ocifs([
        "pull",
        "--cache-dir",
        cache.path().to_str().unwrap(),
        &published.reference,
    ])
    .ok();
    registry.stop();

    let by_digest = format!(
        "{}@{}",
        published.reference.strip_suffix(":v1").unwrap(),
        published.digest
    );
    let by_link = format!("{}/@v1", published.reference.strip_suffix(":v1").unwrap());
    // Told so, and found out.
    for flags in [&["--offline"][..], &[], &["--tag-ttl", "0"]] {
        let mount = Mount::start(cache.path(), flags);
        for form in [&published.reference, &by_digest, &by_link] {
            assert_same_files(&mount.files(form), &model.v01_files());
        }
        let began = Instant::now();
        assert!(
            mount.try_list(&other).is_err(),
            "a model that was never here"
        );
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{:?}",
            began.elapsed()
        );
        mount.unmount();
    }
}

#[test]
fn bytes_that_are_not_here_are_an_error_offline_and_come_later() {
    let registry = Registry::open();
    let model = SampleModel::new(112);
    let reference = model.docker_v02().publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let config = format!("{reference}/config.json");
    let weights = format!("{reference}/model-00003-of-00003.safetensors");
    assert_eq!(mount.read(&config), model.files()["config.json"]);
    mount.unmount();

    let mount = Mount::start(cache.path(), ["--offline"]);
    assert_eq!(mount.read(&config), model.files()["config.json"]);
    assert_eq!(
        mount.stat(&weights).len(),
        model.files()["model-00003-of-00003.safetensors"].len() as u64
    );
    let error = mount.try_read(&weights).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error()),
        "{error}"
    );
    mount.unmount();

    let mount = Mount::start::<&str>(cache.path(), []);
    assert_same_files(&mount.files(&reference), model.files());
}

#[test]
fn a_registry_that_comes_back_is_used_again() {
    let mut registry = Registry::open();
    let model = SampleModel::new(113);
    let reference = model.docker_v02().publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    assert_eq!(
        mount.read(&format!("{reference}/config.json")),
        model.files()["config.json"]
    );
    registry.stop();
    assert_eq!(
        mount.read(&format!("{reference}/config.json")),
        model.files()["config.json"]
    );
    registry.restart();
    eventually(PATIENCE * 2, "the rest is read", || {
        mount
            .try_read(&format!("{reference}/tokenizer.json"))
            .ok()
            .filter(|bytes| *bytes == model.files()["tokenizer.json"])
    });
    assert_same_files(&mount.files(&reference), model.files());
}
