//! Artifacts pushed by others are mounted right, and artifacts pushed by ocifs are right for others.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::support::artifact::{DOCKER_CONFIG_TAR, DOCKER_CONFIG_V01, DOCKER_SAFETENSORS, tar};
use crate::support::content::{digest, digest_file};
use crate::support::model::{Files, SampleModel, assert_same_files, read_tree};
use crate::support::mount::{Mount, ocifs};
use crate::support::process::{Output, run, run_command};
use crate::support::proxy::{Fault, Proxy, Record};
use crate::support::python::module;
use crate::support::registry::{Access, Registry};
use crate::support::{PATIENCE, eventually, scratch};

/// Runs `ocifs push` with what the registry needs.
fn push(registry: &Registry, model: &Path, reference: &str, flags: &[&str]) -> Output {
    let mut command = ocifs(["push"]);
    command
        .args(registry.ocifs_args())
        .args(flags)
        .arg(model)
        .arg(reference);
    run_command(&mut command, PATIENCE)
}

/// Mounts the registry's `org/m:v1` and compares with what it should hold.
fn assert_mounted(registry: &Registry, wanted: &Files) {
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), registry.ocifs_args());
    assert_same_files(
        &mount.files(&format!("{}/org/m:v1", registry.host())),
        wanted,
    );
    mount.unmount();
}

/// Pulls `org/m:v1` by skopeo and checks every blob of it: the manifest, and the files of the layers by path.
fn skopeo_pulls(registry: &Registry) -> (Value, Files) {
    let dir = scratch("pulled");
    registry.skopeo_pull("org/m:v1", &format!("dir:{}", dir.path().display()));
    let manifest: Value =
        serde_json::from_slice(&fs::read(dir.path().join("manifest.json")).unwrap()).unwrap();
    let mut files = Files::new();
    for layer in manifest["layers"].as_array().unwrap() {
        let name = layer["digest"].as_str().unwrap();
        let blob = dir.path().join(&name["sha256:".len()..]);
        assert_eq!(digest_file(&blob), name);
        assert_eq!(layer["size"], fs::metadata(&blob).unwrap().len());
        if let Some(path) = layer["annotations"]["org.cncf.model.filepath"].as_str() {
            files.insert(path.to_owned(), fs::read(&blob).unwrap());
        }
    }
    (manifest, files)
}

fn own_push(access: Access) {
    let model = SampleModel::new(40);
    let registry = Registry::start(access);
    push(
        &registry,
        model.path(),
        &format!("{}/org/m:v1", registry.host()),
        &[],
    )
    .ok();
    let (manifest, files) = skopeo_pulls(&registry);
    assert_eq!(
        manifest["config"]["mediaType"],
        "application/vnd.docker.ai.model.config.v0.2+json"
    );
    assert_same_files(&files, model.files());
    assert_mounted(&registry, model.files());
}

#[test]
fn own_push_to_an_open_registry() {
    own_push(Access::Open);
}

#[test]
fn own_push_to_a_registry_with_passwords_over_tls() {
    own_push(Access::Htpasswd);
}

#[test]
fn own_push_to_a_registry_with_tokens() {
    own_push(Access::Token);
}

fn skopeo_push(access: Access) {
    let model = SampleModel::new(41);
    let registry = Registry::start(access);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    assert_mounted(&registry, &model.v01_files());
}

#[test]
fn pushed_by_skopeo_to_an_open_registry() {
    skopeo_push(Access::Open);
}

#[test]
fn pushed_by_skopeo_to_a_registry_with_passwords_over_tls() {
    skopeo_push(Access::Htpasswd);
}

#[test]
fn pushed_by_skopeo_to_a_registry_with_tokens() {
    skopeo_push(Access::Token);
}

/// As the packager of Docker's v0.1 does it, by oras: nameless shards in order, the rest in a tar.
fn oras_push(access: Access) {
    let model = SampleModel::new(42);
    let wanted = model.v01_files();
    let dir = scratch("oras");
    let others = wanted
        .iter()
        .filter(|(name, _)| !name.ends_with(".safetensors"));
    let archive = tar(others.map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    fs::write(dir.path().join("vllm-config.tar"), archive).unwrap();
    fs::write(
        dir.path().join("model-config.json"),
        json!({"config": {"format": "safetensors"}}).to_string(),
    )
    .unwrap();
    let mut files: Vec<String> = wanted
        .keys()
        .filter(|name| name.ends_with(".safetensors"))
        .map(|name| format!("{}:{DOCKER_SAFETENSORS}", model.path().join(name).display()))
        .collect();
    files.push(format!(
        "{}:{DOCKER_CONFIG_TAR}",
        dir.path().join("vllm-config.tar").display()
    ));
    let config = format!(
        "{}:{DOCKER_CONFIG_V01}",
        dir.path().join("model-config.json").display()
    );
    let registry = Registry::start(access);
    registry.oras_push(
        "org/m:v1",
        &config,
        &files.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    assert_mounted(&registry, &wanted);
}

#[test]
fn pushed_by_oras_to_an_open_registry() {
    oras_push(Access::Open);
}

#[test]
fn pushed_by_oras_to_a_registry_with_tokens() {
    oras_push(Access::Token);
}

#[test]
fn wrong_credentials_are_told_apart_from_a_missing_model() {
    let model = SampleModel::new(43);
    let registry = Registry::start(Access::Htpasswd);
    let reference = model.docker_v02().publish(&registry, "org/m:v1").reference;
    let wrong = scratch("wrong");
    let auth = json!({"auths": {registry.host(): {"auth": "YWxpY2U6d3Jvbmc="}}});
    fs::write(wrong.path().join("auth.json"), auth.to_string()).unwrap();
    let cache = scratch("cache");
    let mut command = ocifs(["pull", "--cache-dir"]);
    command
        .arg(cache.path())
        .arg("--ca-file")
        .arg(registry.ca().unwrap());
    command
        .arg("--auth-file")
        .arg(wrong.path().join("auth.json"))
        .arg(&reference);
    let said = run_command(&mut command, PATIENCE).failed();
    assert!(said.contains("401") || said.contains("denie"), "{said}");
    assert!(
        !said.contains("wrong\"") && !said.contains("YWxpY2U6d3Jvbmc="),
        "a secret is shown: {said}"
    );

    let mut command = ocifs(["pull", "--cache-dir"]);
    command
        .arg(cache.path())
        .args(registry.ocifs_args())
        .arg(format!("{}/org/m:absent", registry.host()));
    let said = run_command(&mut command, PATIENCE).failed();
    assert!(said.contains("not found"), "{said}");

    // Whose CA is not known is not spoken to.
    let mut command = ocifs(["pull", "--cache-dir"]);
    command
        .arg(cache.path())
        .arg("--auth-file")
        .arg(registry.auth_file())
        .arg(&reference);
    let said = run_command(&mut command, PATIENCE).failed().to_lowercase();
    assert!(
        said.contains("certificate") || said.contains("issuer"),
        "{said}"
    );
}

#[test]
fn every_format_that_push_writes_is_the_same_directory_again() {
    let model = SampleModel::new(44);
    let registry = Registry::open();
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--tag-ttl", "0"]);
    // Docker's v0.1 has the files of the top folder, and no licence among the files of its tar.
    for (tag, flags, all) in [
        ("docker", &["--format", "docker"][..], true),
        ("modelpack", &["--format", "modelpack"], true),
        ("v01", &["--format", "docker-v0.1"], false),
        (
            "nameless",
            &["--format", "docker-v0.1", "--nameless"],
            false,
        ),
    ] {
        let reference = format!("{}/org/m:{tag}", registry.host());
        push(&registry, model.path(), &reference, flags).ok();
        let mut found = mount.files(&reference);
        if all {
            assert_same_files(&found, model.files());
        } else {
            found.retain(|name, _| !name.to_uppercase().contains("LICENSE"));
            assert_same_files(&found, &model.v01_files());
        }
    }
}

#[test]
fn modelpack_client_unpacks_what_push_wrote() {
    let model = SampleModel::new(45);
    let registry = Registry::open();
    let reference = format!("{}/org/m:v1", registry.host());
    push(
        &registry,
        model.path(),
        &reference,
        &["--format", "modelpack"],
    )
    .ok();
    let target = scratch("modelpack");
    module(
        "modelpack_client",
        [
            "--insecure",
            "pull",
            &reference,
            target.path().to_str().unwrap(),
        ],
    )
    .ok();
    assert_same_files(&read_tree(target.path()), model.files());
}

#[test]
fn a_second_push_sends_no_blob_again() {
    let model = SampleModel::new(46);
    let registry = Registry::open();
    let proxy = Proxy::start(registry.address());
    push(
        &registry,
        model.path(),
        &format!("{}/org/m:v1", proxy.host()),
        &[],
    )
    .ok();
    proxy.settle();
    let uploads = |proxy: &Proxy| {
        let records = proxy.records();
        records
            .iter()
            .filter(|record| ["POST", "PUT", "PATCH"].contains(&record.method.as_str()))
            .count()
    };
    assert!(
        uploads(&proxy) >= model.files().len(),
        "{:?}",
        proxy.records()
    );
    proxy.reset();
    push(
        &registry,
        model.path(),
        &format!("{}/org/m:v2", proxy.host()),
        &[],
    )
    .ok();
    proxy.settle();
    assert_eq!(uploads(&proxy), 1, "the manifest: {:?}", proxy.records());
    let received: u64 = proxy.records().iter().map(|record| record.received).sum();
    assert!(received < 16 << 10, "{received} bytes for a manifest");
    assert_mounted(&registry, model.files());
}

#[test]
fn a_push_that_was_killed_goes_on_with_what_is_missing() {
    const ARRIVED: usize = 4;
    let model = SampleModel::new(49);
    let registry = Registry::open();
    let proxy = Proxy::start(registry.address());
    let reference = format!("{}/org/m:v1", proxy.host());
    // docker-registry's upload addresses carry their state: some arrive, the rest hangs.
    proxy.after("_state=", ARRIVED, usize::MAX, Fault::Delay(PATIENCE));
    let mut command = ocifs(["push"]);
    command
        .args(registry.ocifs_args())
        .arg(model.path())
        .arg(&reference);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let arrived = || {
        let records = proxy.records();
        let put = |record: &&Record| record.method == "PUT" && record.status == 201;
        records.iter().filter(put).count()
    };
    eventually(PATIENCE, "some blobs", || {
        (arrived() == ARRIVED).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    // Another way to the same registry: on the first one there is somebody still who waits.
    let proxy = Proxy::start(registry.address());
    let reference = format!("{}/org/m:v1", proxy.host());
    let done = push(&registry, model.path(), &reference, &["--json"]).ok();
    proxy.settle();
    let done: Value = serde_json::from_str(&done).unwrap();
    let (sent, existed) = (
        done["sent"].as_u64().unwrap(),
        done["existed"].as_u64().unwrap(),
    );
    assert!(existed > 0 && sent > 0, "{done}");
    assert_eq!(sent + existed, done["size"].as_u64().unwrap());
    let puts: Vec<Record> = proxy
        .records()
        .into_iter()
        .filter(|record| record.method == "PUT" && record.path.contains("/blobs/"))
        .collect();
    let blobs = 1 + done["layers"].as_u64().unwrap() as usize;
    assert!(puts.len() <= blobs - ARRIVED, "{} of {blobs}", puts.len());
    assert_eq!(puts.iter().map(|put| put.received).sum::<u64>(), sent);
    assert_mounted(&registry, model.files());
}

#[test]
fn push_into_a_layout_is_one_that_skopeo_reads() {
    let model = SampleModel::new(47);
    let dir = scratch("layout");
    let layout = format!("oci:{}:v1", dir.path().join("layout").display());
    run_command(ocifs(["push"]).arg(model.path()).arg(&layout), PATIENCE).ok();
    let raw = run("skopeo", ["inspect", "--raw", &layout]).ok_bytes();
    let registry = Registry::open();
    registry.skopeo_push(&layout, "org/m:v1");
    let manifest = registry.blob_file(&digest(&raw));
    assert_eq!(fs::read(manifest).unwrap(), raw);
    assert_mounted(&registry, model.files());
}

#[test]
fn the_same_directory_pushed_twice_has_the_same_digest() {
    let model = SampleModel::new(48);
    let dir = scratch("layout");
    let digests: Vec<String> = ["a", "b"]
        .iter()
        .map(|name| {
            let layout = format!("oci:{}:v1", dir.path().join(name).display());
            run_command(ocifs(["push"]).arg(model.path()).arg(&layout), PATIENCE).ok();
            digest(&run("skopeo", ["inspect", "--raw", &layout]).ok_bytes())
        })
        .collect();
    assert_eq!(digests[0], digests[1]);
}
