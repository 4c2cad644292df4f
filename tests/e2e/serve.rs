//! `ocifs serve`: a layout or the cache as a read-only registry that other clients read.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::support::artifact::MANIFEST;
use crate::support::content::digest_file;
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, ocifs, run_ocifs};
use crate::support::process::{Daemon, run};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, free_address, http, scratch};

/// A running `ocifs serve`.
fn serve(layout: &Path, log: &Path) -> (SocketAddr, Daemon) {
    let address = free_address();
    let mut command = ocifs(["serve", "--listen", &address.to_string()]);
    command.arg(layout);
    let mut daemon = Daemon::start("ocifs serve", &mut command, log);
    eventually(PATIENCE, "ocifs serve listens", || {
        assert!(daemon.is_running(), "ocifs serve ended: {}", daemon.log());
        TcpStream::connect(address).ok()
    });
    (address, daemon)
}

#[test]
fn a_layout_is_served_to_curl_skopeo_and_a_mount() {
    let dir = scratch("serve");
    let layout = dir.path().join("layout");
    let model = SampleModel::new(130);
    let published = model.docker_v02().write(&layout, "v1");
    let (address, _daemon) = serve(&layout, &dir.path().join("log"));

    // An entry with a bare tag is served under any repository.
    let repository = "org/m";
    let blob = format!(
        "http://{address}/v2/{repository}/blobs/{}",
        published.layers[5]
    );
    let whole = run("curl", ["-sSf", &blob]).ok_bytes();
    assert_eq!(crate::support::content::digest(&whole), published.layers[5]);
    assert_eq!(
        run("curl", ["-sSf", "-r", "3-9", &blob]).ok_bytes(),
        whole[3..10]
    );
    assert_eq!(
        run("curl", ["-sSf", "-r", "10-", &blob]).ok_bytes(),
        whole[10..]
    );
    assert_eq!(
        run("curl", ["-sSf", "-r", "-7", &blob]).ok_bytes(),
        whole[whole.len() - 7..]
    );
    let behind = format!("{}-", whole.len());
    assert_eq!(
        run(
            "curl",
            [
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-r",
                &behind,
                &blob
            ]
        )
        .ok(),
        "416"
    );
    assert_eq!(
        run(
            "curl",
            [
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-X",
                "PUT",
                &blob
            ]
        )
        .ok()
        .chars()
        .next(),
        Some('4')
    );
    let outside = format!("http://{address}/v2/../../../etc/passwd");
    assert_eq!(
        run(
            "curl",
            [
                "-sS",
                "--path-as-is",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                &outside
            ]
        )
        .ok()
        .chars()
        .next(),
        Some('4')
    );
    let (head, body) = http::get(
        address,
        &format!("/v2/{repository}/manifests/v1"),
        &[("Accept", MANIFEST)],
    )
    .unwrap();
    assert_eq!(
        head.get("docker-content-digest"),
        Some(published.digest.as_str())
    );
    assert_eq!(body, published.manifest);

    let copy = scratch("copy");
    let (source, target) = (
        format!("docker://{address}/{repository}:v1"),
        format!("dir:{}", copy.path().display()),
    );
    run(
        "skopeo",
        [
            "--insecure-policy",
            "copy",
            "-q",
            "--src-tls-verify=false",
            &source,
            &target,
        ],
    )
    .ok();
    for layer in &published.layers {
        assert_eq!(
            &digest_file(&copy.path().join(&layer["sha256:".len()..])),
            layer
        );
    }

    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    assert_same_files(
        &mount.files(&format!("{address}/{repository}:v1")),
        model.files(),
    );
}

#[test]
fn a_cache_is_served_to_the_next_machine() {
    let registry = Registry::open();
    let model = SampleModel::new(131);
    let reference = model
        .docker_v01(false)
        .publish(&registry, "org/m:v1")
        .reference;
    let (first, second, log) = (scratch("cache"), scratch("cache"), scratch("log"));
    run_ocifs([
        "pull",
        "--cache-dir",
        first.path().to_str().unwrap(),
        &reference,
    ])
    .ok();
    let (address, mut daemon) = serve(first.path(), &log.path().join("log"));
    let mount = Mount::start::<&str>(second.path(), []);
    assert_same_files(
        &mount.files(&format!("{address}/org/m:v1")),
        &model.v01_files(),
    );
    daemon.signal(rustix::process::Signal::TERM);
    assert!(
        daemon
            .wait(Duration::from_secs(10))
            .expect("it ends on SIGTERM")
            .success()
    );
}
