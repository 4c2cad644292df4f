//! The servers and scripts of these tests, each proved against a client or tool that they did not write.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_SAFETENSORS, Layer, MANIFEST, tar,
};
use crate::support::content::{Content, Tensor, digest, digest_file, write_safetensors};
use crate::support::process::run;
use crate::support::proxy::{Fault, Proxy};
use crate::support::python::python;
use crate::support::registry::{Access, Registry};
use crate::support::tokens::{PASSWORD, USER};
use crate::support::{http, scratch};

const SIZE: u64 = 300_000;

/// An artifact of one layer of `SIZE` bytes behind a proxy; the path of the blob and of the manifest.
fn behind_proxy(seed: u64) -> (Registry, Proxy, Vec<u8>, String, String) {
    let registry = Registry::open();
    let bytes = Content::new(seed).bytes(0, SIZE as usize);
    let artifact = Artifact::docker_v01().layer(Layer::bytes(DOCKER_SAFETENSORS, bytes.clone()));
    let published = artifact.publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    let blob = format!("/v2/org/m/blobs/{}", published.layers[0]);
    (
        registry,
        proxy,
        bytes,
        blob,
        "/v2/org/m/manifests/v1".to_owned(),
    )
}

#[test]
fn content_is_the_same_from_every_offset() {
    let content = Content::new(7);
    let whole = content.bytes(0, 10_000);
    for (offset, length) in [
        (0, 1),
        (1, 7),
        (7, 9),
        (8, 8),
        (4095, 2),
        (9_999, 1),
        (123, 4567),
    ] {
        assert_eq!(
            content.bytes(offset, length),
            whole[offset as usize..offset as usize + length]
        );
    }
    assert_ne!(Content::new(8).bytes(0, 100), whole[..100]);
}

#[test]
fn the_proxy_counts_what_curl_asks_and_gets() {
    let (_registry, proxy, bytes, blob, _) = behind_proxy(1);
    let url = format!("http://{}{blob}", proxy.host());
    assert_eq!(run("curl", ["-sS", &url]).ok_bytes(), bytes);
    assert_eq!(
        run("curl", ["-sS", "-r", "1000-1999", &url]).ok_bytes(),
        bytes[1000..2000]
    );
    assert_eq!(
        run("curl", ["-sSI", &url])
            .ok()
            .lines()
            .next()
            .unwrap()
            .trim(),
        "HTTP/1.1 200 OK"
    );
    proxy.settle();
    let records = proxy.records();
    let seen: Vec<_> = records
        .iter()
        .map(|r| (r.method.as_str(), r.range.as_deref(), r.status, r.sent))
        .collect();
    assert_eq!(
        seen,
        [
            ("GET", None, 200, SIZE),
            ("GET", Some("bytes=1000-1999"), 206, 1000),
            ("HEAD", None, 200, 0)
        ]
    );
    assert_eq!(
        (
            proxy.sent("/blobs/"),
            proxy.count("/manifests/"),
            proxy.peak()
        ),
        (SIZE + 1000, 0, 1)
    );
    proxy.reset();
    assert!(proxy.records().is_empty());
}

#[test]
fn skopeo_pushes_and_pulls_through_the_proxy() {
    let registry = Registry::open();
    let proxy = Proxy::start(registry.address());
    let layout = scratch("layout");
    let published = Artifact::docker_v01()
        .layer(Layer::bytes(
            DOCKER_SAFETENSORS,
            Content::new(2).bytes(0, 100_000),
        ))
        .write(layout.path(), "a");
    let (source, target) = (
        format!("oci:{}:a", layout.path().display()),
        format!("docker://{}/o/m:a", proxy.host()),
    );
    run(
        "skopeo",
        [
            "--insecure-policy",
            "copy",
            "-q",
            "--dest-tls-verify=false",
            &source,
            &target,
        ],
    )
    .ok();
    let raw = run(
        "skopeo",
        ["inspect", "--raw", "--tls-verify=false", &target],
    )
    .ok_bytes();
    assert_eq!(digest(&raw), published.digest);
    assert!(
        proxy
            .records()
            .iter()
            .any(|record| record.method == "PATCH"),
        "{:?}",
        proxy.records()
    );
}

#[test]
fn the_proxy_lies_as_it_is_told() {
    let (_registry, proxy, bytes, blob, manifest) = behind_proxy(3);
    let address = proxy.address();
    let range = [("Range", "bytes=1000-1999")];
    let accept = [("Accept", MANIFEST)];

    proxy.times(
        "/blobs/",
        1,
        Fault::Status(429, vec![("Retry-After".into(), "2".into())]),
    );
    let (head, _) = http::get(address, &blob, &[]).unwrap();
    assert_eq!((head.status(), head.get("retry-after")), (429, Some("2")));
    // Once means once.
    assert_eq!(http::get(address, &blob, &[]).unwrap().1, bytes);

    proxy.after("/blobs/", 1, 1, Fault::Status(503, vec![]));
    assert_eq!(http::get(address, &blob, &[]).unwrap().0.status(), 200);
    assert_eq!(http::get(address, &blob, &[]).unwrap().0.status(), 503);

    for cut in [Fault::Truncate(100_000), Fault::Reset(100_000)] {
        proxy.times("/blobs/", 1, cut.clone());
        assert!(http::get(address, &blob, &[]).is_err(), "{cut:?}");
        proxy.settle();
        assert_eq!(proxy.records().last().unwrap().sent, 100_000, "{cut:?}");
    }
    proxy.times("/blobs/", 1, Fault::Stall(100_000));
    let began = Instant::now();
    let stalled = http::get(address, &blob, &[]).unwrap_err();
    assert_eq!(stalled.kind(), std::io::ErrorKind::WouldBlock, "{stalled}");
    assert!(began.elapsed() > Duration::from_secs(9));

    proxy.times("/blobs/", 2, Fault::Corrupt(1500));
    let (_, part) = http::get(address, &blob, &range).unwrap();
    assert_eq!(
        (part[499], part[500], part[501]),
        (bytes[1499], !bytes[1500], bytes[1501])
    );
    let (_, whole) = http::get(address, &blob, &[]).unwrap();
    assert_eq!(whole.iter().zip(&bytes).filter(|(a, b)| a != b).count(), 1);
    assert_eq!(whole[1500], !bytes[1500]);

    proxy.times("/blobs/", 1, Fault::ShiftRange(4));
    let (head, part) = http::get(address, &blob, &range).unwrap();
    assert_eq!(
        head.get("content-range"),
        Some(format!("bytes 1004-2003/{SIZE}").as_str())
    );
    assert_eq!(part, bytes[1000..2000]);

    proxy.times("/blobs/", 1, Fault::ShiftBytes(4));
    let (head, part) = http::get(address, &blob, &range).unwrap();
    assert_eq!(
        head.get("content-range"),
        Some(format!("bytes 1000-1999/{SIZE}").as_str())
    );
    assert_eq!(part, bytes[996..1996]);

    proxy.times("/blobs/", 1, Fault::IgnoreRange);
    let (head, whole) = http::get(address, &blob, &range).unwrap();
    assert_eq!((head.status(), whole), (200, bytes.clone()));

    proxy.times("/blobs/", 1, Fault::Longer(10));
    assert_eq!(
        http::get(address, &blob, &[]).unwrap().1.len() as u64,
        SIZE + 10
    );

    proxy.times("/blobs/", 1, Fault::Throttle(200_000));
    let began = Instant::now();
    assert_eq!(http::get(address, &blob, &[]).unwrap().1, bytes);
    assert!(
        began.elapsed() > Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );

    proxy.times("/blobs/", 1, Fault::Delay(Duration::from_millis(700)));
    let began = Instant::now();
    http::get(address, &blob, &range).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(700));

    proxy.times(
        "/manifests/",
        1,
        Fault::Replace("text/html".into(), Arc::new(b"<html>".to_vec())),
    );
    let (head, body) = http::get(address, &manifest, &accept).unwrap();
    assert_eq!(
        (head.get("content-type"), body.as_slice()),
        (Some("text/html"), b"<html>".as_slice())
    );

    proxy.times("/manifests/", 1, Fault::Huge(5_000_000));
    assert_eq!(
        http::get(address, &manifest, &accept).unwrap().1.len(),
        5_000_000
    );

    proxy.always("/manifests/", Fault::RedirectLoop);
    let url = format!("http://{}{manifest}", proxy.host());
    assert!(
        run("curl", ["-sSL", "--max-redirs", "20", &url])
            .failed()
            .contains("redirects")
    );
    proxy.behave();

    proxy.always(
        "/manifests/",
        Fault::RedirectTo("http://127.0.0.1:1".into()),
    );
    let (head, _) = http::get(address, &manifest, &accept).unwrap();
    assert_eq!(
        head.get("location"),
        Some(format!("http://127.0.0.1:1{manifest}").as_str())
    );
    proxy.behave();
    assert_eq!(
        http::get(address, &manifest, &accept).unwrap().0.status(),
        200
    );
}

#[test]
fn docker_registry_with_passwords_over_tls_refuses_the_wrong_ones() {
    let registry = Registry::start(Access::Htpasswd);
    let artifact = Artifact::docker_v01().layer(Layer::bytes(DOCKER_SAFETENSORS, "weights"));
    let published = artifact.publish(&registry, "org/m:v1");
    let url = format!(
        "https://{}/v2/org/m/manifests/{}",
        registry.host(),
        published.digest
    );
    let ca = registry.ca().unwrap().to_str().unwrap();
    let status = |extra: &[&str]| {
        let mut args = vec![
            "-sS",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-H",
            "Accept: */*",
            "-H",
        ];
        let accept = format!("Accept: {MANIFEST}");
        args.extend([accept.as_str(), "--cacert", ca]);
        args.extend(extra);
        args.push(&url);
        run("curl", args).ok()
    };
    assert_eq!(status(&["-u", &format!("{USER}:{PASSWORD}")]), "200");
    assert_eq!(status(&["-u", &format!("{USER}:wrong")]), "401");
    assert_eq!(status(&[]), "401");
    // The CA is our own: who does not know it must not connect.
    assert!(
        run(
            "curl",
            [
                "-sS",
                "--cacert",
                "/etc/ssl/certs/ca-certificates.crt",
                &url
            ]
        )
        .failed()
        .contains("certificate")
    );
}

#[test]
fn docker_registry_with_tokens_wants_a_fresh_one() {
    let registry = Registry::start(Access::Token);
    let artifact = Artifact::docker_v01().layer(Layer::bytes(DOCKER_SAFETENSORS, "weights"));
    let published = artifact.publish(&registry, "org/m:v1");
    assert!(registry.tokens().issued() > 0);
    assert!(
        registry
            .tokens()
            .scopes()
            .iter()
            .any(|scope| scope == "repository:org/m:pull,push")
    );

    let target = format!("/v2/org/m/blobs/{}", published.layers[0]);
    let (head, _) = http::get(registry.address(), &target, &[]).unwrap();
    assert_eq!(head.status(), 401);
    let challenge = head.get("www-authenticate").unwrap();
    assert!(
        challenge.contains(&registry.tokens().realm())
            && challenge.contains("scope=\"repository:org/m:pull\"")
    );

    let token = |query: &str, headers: &[(&str, &str)]| {
        let (head, body) = http::get(registry.tokens().address(), query, headers).unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        (
            head.status(),
            format!("Bearer {}", body["token"].as_str().unwrap_or("")),
        )
    };
    let query = "/token?service=ocifs-test-registry&scope=repository%3Aorg%2Fm%3Apull";
    let (_, bearer) = token(query, &[]);
    let (head, body) =
        http::get(registry.address(), &target, &[("Authorization", &bearer)]).unwrap();
    assert_eq!(
        (head.status(), body.as_slice()),
        (200, b"weights".as_slice())
    );

    // Another repository's token, a wrong password, anonymous pulls forbidden.
    let (_, other) = token(
        "/token?service=ocifs-test-registry&scope=repository:org/other:pull",
        &[],
    );
    assert_eq!(
        http::get(registry.address(), &target, &[("Authorization", &other)])
            .unwrap()
            .0
            .status(),
        401
    );
    assert_eq!(
        token(query, &[("Authorization", "Basic YWxpY2U6d3Jvbmc=")]).0,
        401
    );
    assert_eq!(registry.tokens().refused(), 1);
    registry.tokens().set_anonymous(false);
    let (_, nobody) = token(query, &[]);
    assert_eq!(
        http::get(registry.address(), &target, &[("Authorization", &nobody)])
            .unwrap()
            .0
            .status(),
        401
    );
    registry.tokens().set_anonymous(true);

    registry
        .tokens()
        .set_lifetime(Duration::from_secs(3), Some(Duration::from_secs(300)));
    let (_, short) = token(query, &[]);
    assert_eq!(
        http::get(registry.address(), &target, &[("Authorization", &short)])
            .unwrap()
            .0
            .status(),
        200
    );
    std::thread::sleep(Duration::from_secs(5));
    let (head, _) = http::get(registry.address(), &target, &[("Authorization", &short)]).unwrap();
    assert_eq!(head.status(), 401);
    assert!(
        head.get("www-authenticate")
            .unwrap()
            .contains("invalid_token")
    );
}

#[test]
fn a_stopped_registry_refuses_connections() {
    let mut registry = Registry::open();
    assert_eq!(
        http::get(registry.address(), "/v2/", &[])
            .unwrap()
            .0
            .status(),
        200
    );
    registry.stop();
    let error = http::get(registry.address(), "/v2/", &[]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn skopeo_brings_artifacts_from_a_layout_unchanged() {
    let registry = Registry::open();
    let tar = tar([("config.json", b"{}".as_slice()), ("sub/x.txt", b"x")]);
    let published = Artifact::modelpack("cnai")
        .layer(
            Layer::bytes("application/vnd.cnai.model.weight.v1.raw", "w")
                .annotated("org.cnai.model.filepath", "w"),
        )
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, tar))
        .publish(&registry, "org/m:v1");
    let accept = [("Accept", MANIFEST)];
    let (head, body) = http::get(registry.address(), "/v2/org/m/manifests/v1", &accept).unwrap();
    assert_eq!(
        head.get("docker-content-digest"),
        Some(published.digest.as_str())
    );
    assert_eq!(body, published.manifest);
    assert_eq!(
        digest_file(&registry.blob_file(&published.layers[1])),
        published.layers[1]
    );
}

#[test]
fn our_tar_is_one_that_gnu_tar_reads() {
    let dir = scratch("tar");
    let archive = tar([("config.json", b"{}".as_slice()), ("sub/x.txt", &[7; 1000])]);
    fs::write(dir.path().join("a.tar"), archive).unwrap();
    run(
        "tar",
        [
            "-C",
            dir.path().to_str().unwrap(),
            "-xf",
            dir.path().join("a.tar").to_str().unwrap(),
        ],
    )
    .ok();
    assert_eq!(fs::read(dir.path().join("config.json")).unwrap(), b"{}");
    assert_eq!(fs::read(dir.path().join("sub/x.txt")).unwrap(), [7; 1000]);
}

#[test]
fn our_safetensors_are_ones_that_python_reads() {
    let dir = scratch("safetensors");
    let file = dir.path().join("a.safetensors");
    let tensors = [("a", 4096), ("b", 40), ("c", 8)].map(|(name, size)| Tensor {
        name: name.to_owned(),
        size,
    });
    let data = write_safetensors(&file, &tensors, Content::new(5));
    let wanted = digest(&Content::new(5).bytes(4096, 40));
    assert_eq!(data % 8, 0);
    let printed = python("read_tensor.py", [file.to_str().unwrap(), "b"]).ok();
    assert_eq!(format!("sha256:{}", printed.trim()), wanted);
}

#[test]
fn the_python_scripts_tell_a_wrong_model_from_a_right_one() {
    let dir = scratch("llama");
    let (right, wrong) = (dir.path().join("right"), dir.path().join("wrong"));
    python("make_llama.py", [right.to_str().unwrap(), "400KB"]).ok();
    run(
        "cp",
        ["-r", right.to_str().unwrap(), wrong.to_str().unwrap()],
    )
    .ok();
    let logits = |path: &std::path::Path| -> Value {
        serde_json::from_str(&python("logits.py", [path.to_str().unwrap()]).ok()).unwrap()
    };
    let compare = |a: &std::path::Path, b: &std::path::Path| python("compare_tensors.py", [a, b]);
    assert_eq!(logits(&right), logits(&wrong));
    assert!(
        compare(&right, &wrong)
            .ok()
            .trim()
            .parse::<usize>()
            .unwrap()
            > 10
    );

    let shard = fs::read_dir(&wrong)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let shard = shard
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .unwrap();
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 0x10;
    fs::write(&shard, bytes).unwrap();
    assert!(compare(&right, &wrong).failed().contains("AssertionError"));
    assert_ne!(logits(&right)["sha256"], logits(&wrong)["sha256"]);
}

#[test]
fn oras_pushes_to_open_and_token_registries() {
    let dir = scratch("oras");
    let config = dir.path().join("model-config.json");
    fs::write(
        &config,
        json!({"config": {"format": "safetensors"}}).to_string(),
    )
    .unwrap();
    fs::write(dir.path().join("a.safetensors"), "weights").unwrap();
    let file = format!(
        "{}:{DOCKER_SAFETENSORS}",
        dir.path().join("a.safetensors").display()
    );
    let config = format!(
        "{}:application/vnd.docker.ai.model.config.v0.1+json",
        config.display()
    );
    for access in [Access::Open, Access::Token] {
        let registry = Registry::start(access);
        registry.oras_push("org/m:v1", &config, &[&file]);
        let pulled = scratch("pulled");
        registry.skopeo_pull("org/m:v1", &format!("dir:{}", pulled.path().display()));
        let blob = digest(b"weights");
        assert_eq!(
            fs::read(pulled.path().join(&blob[7..])).unwrap(),
            b"weights"
        );
    }
}
