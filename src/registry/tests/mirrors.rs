//! Mirrors: who is asked, for what, with whose credentials, and when one is left for the next.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::base::{ByteRange, Deadline, Digest};
use crate::registry::testing::{
    Reply, Request, Server, config, content, hang_up, reply, serve_blob, soon,
};
use crate::registry::{BlobBody, Registry, RegistryConfig, RegistryError};

const MANIFEST: &[u8] = br#"{"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;
const SIZE: usize = 200_000;

/// An honest registry with one manifest, tagged `v1`, and one blob.
fn honest(request: &Request) -> Reply {
    let (blob, digest) = content(SIZE);
    let manifest = Digest::of(MANIFEST);
    let path = request.target.split('?').next().unwrap();
    if path.ends_with("/manifests/v1") || path.ends_with(&format!("/manifests/{manifest}")) {
        reply(200, MANIFEST).header("Docker-Content-Digest", manifest)
    } else if path.ends_with(&format!("/blobs/{digest}")) {
        serve_blob(&blob, request)
    } else {
        missing()
    }
}

fn missing() -> Reply {
    reply(404, r#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#).header("Content-Type", "application/json")
}

/// A client with this text in `hosts.toml` of a registry, and these credentials.
fn client(origin: &Server, hosts: &str, auths: &str) -> (Registry, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), origin, hosts);
    let auth = dir.path().join("auth.json");
    std::fs::write(&auth, format!(r#"{{"auths":{{{auths}}}}}"#)).unwrap();
    let config = RegistryConfig {
        auth_files: Some(vec![auth]),
        hosts_dir: Some(dir.path().to_owned()),
        ..config()
    };
    (Registry::new(config).unwrap(), dir)
}

fn write(dir: &Path, origin: &Server, hosts: &str) {
    let place = dir.join(origin.address.replace(':', "_") + "_");
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(place.join("hosts.toml"), hosts).unwrap();
}

/// Some bytes of the blob, or the error.
async fn read(registry: &Registry, origin: &Server, start: u64) -> Result<Vec<u8>, RegistryError> {
    let (_, digest) = content(SIZE);
    let range = ByteRange::new(start, SIZE as u64);
    let repository = origin.repository();
    let body = registry
        .blob(&repository, &digest, SIZE as u64, range, soon())
        .await?;
    let BlobBody::Range(mut stream) = body else {
        panic!("no range")
    };
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

async fn resolve(registry: &Registry, origin: &Server) -> Result<Digest, RegistryError> {
    let resolved = registry.resolve(&origin.reference("v1"), soon()).await?;
    Ok(resolved.digest)
}

async fn manifest(registry: &Registry, origin: &Server) -> Result<Bytes, RegistryError> {
    let digest = Digest::of(MANIFEST);
    let manifest = registry
        .manifest(&origin.repository(), &digest, soon())
        .await?;
    Ok(manifest.bytes)
}

#[tokio::test]
async fn mirrors_are_asked_in_order_for_what_they_are_good_for() {
    let origin = Server::start(honest);
    let first = Server::start(|_| missing());
    let second = Server::start(honest);
    let hosts = format!(
        "[host.\"http://{}\"]\n[host.\"http://{}/some/root\"]\ncapabilities = [\"pull\"]\noverride_path = true",
        first.address, second.address
    );
    let (registry, _dir) = client(&origin, &hosts, "");
    assert_eq!(
        resolve(&registry, &origin).await.unwrap(),
        Digest::of(MANIFEST)
    );
    assert_eq!(manifest(&registry, &origin).await.unwrap(), MANIFEST);
    assert_eq!(
        read(&registry, &origin, 5).await.unwrap(),
        content(SIZE).0[5..]
    );
    // What a tag points at is not the second's to say.
    let targets = |server: &Server| -> Vec<String> {
        let seen = server.seen();
        seen.iter()
            .map(|request| format!("{} {}", request.method, request.target))
            .collect()
    };
    let (digest, blob) = (Digest::of(MANIFEST), content(SIZE).1);
    let ns = format!("?ns={}", origin.address.replace(':', "%3A"));
    assert_eq!(
        targets(&first),
        [
            format!("HEAD /v2/org/model/manifests/v1{ns}"),
            format!("GET /v2/org/model/manifests/{digest}{ns}"),
            format!("GET /v2/org/model/blobs/{blob}{ns}"),
        ]
    );
    assert_eq!(
        targets(&second),
        [
            format!("GET /some/root/org/model/manifests/{digest}{ns}"),
            format!("GET /some/root/org/model/blobs/{blob}{ns}"),
        ]
    );
    assert_eq!(targets(&origin), ["HEAD /v2/org/model/manifests/v1"]);
    // The first is not asked for every part of what it does not have.
    read(&registry, &origin, 9).await.unwrap();
    assert_eq!((first.seen().len(), second.seen().len()), (3, 3));
}

#[tokio::test]
async fn whatever_is_wrong_with_a_mirror_the_next_server_is_asked() {
    type Wrong = fn(&Request) -> Reply;
    let wrongs: [(&str, Wrong); 9] = [
        ("busy", |_| reply(503, "")),
        ("limited", |_| reply(429, "").header("Retry-After", 3600)),
        ("closed", |_| {
            reply(401, "").header("WWW-Authenticate", "Basic realm=x")
        }),
        ("forbidden", |_| reply(403, "")),
        ("mute", |_| hang_up()),
        ("a page", |_| reply(200, "<html>welcome</html>")),
        ("another range", |_| {
            reply(206, "xx").header("Content-Range", "bytes 0-1/2")
        }),
        ("a loop", |_| reply(302, "").header("Location", "/v2/again")),
        ("other content", |request| match request.method.as_str() {
            "HEAD" => reply(500, ""),
            _ => reply(200, "{}"),
        }),
    ];
    for (name, wrong) in wrongs {
        let origin = Server::start(honest);
        let mirror = Server::start(wrong);
        let (registry, _dir) = client(
            &origin,
            &format!("[host.\"http://{}\"]", mirror.address),
            "",
        );
        let began = Instant::now();
        assert_eq!(
            manifest(&registry, &origin).await.unwrap(),
            MANIFEST,
            "{name}"
        );
        assert_eq!(
            read(&registry, &origin, 0).await.unwrap(),
            content(SIZE).0,
            "{name}"
        );
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "{name}: nobody waits for a mirror"
        );
        assert!(!mirror.seen().is_empty(), "{name}: it was asked");
    }
    // Nobody listens; and the registry's own refusal is the one that is told.
    let origin = Server::start(|_| missing());
    let (registry, _dir) = client(&origin, "[host.\"http://127.0.0.1:1\"]", "");
    let error = resolve(&registry, &origin).await.unwrap_err();
    assert!(error.is_not_found(), "{error:?}");
}

#[tokio::test]
async fn a_mirror_that_hangs_leaves_time_for_the_next() {
    let origin = Server::start(honest);
    let mirror = Server::start(|_| reply(200, "").then_stall().length(7));
    let (registry, _dir) = client(
        &origin,
        &format!("[host.\"http://{}\"]", mirror.address),
        "",
    );
    let digest = Digest::of(MANIFEST);
    let deadline = Deadline::after(Duration::from_secs(4));
    let repository = origin.repository();
    registry
        .manifest(&repository, &digest, deadline)
        .await
        .unwrap();
    // And is not waited for again at once.
    let began = Instant::now();
    registry
        .manifest(&repository, &digest, soon())
        .await
        .unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(mirror.seen().len(), 1);
}

#[tokio::test]
async fn a_mirror_that_dies_in_the_middle_of_a_body_is_left_and_comes_back() {
    let origin = Server::start(honest);
    let dying = Arc::new(AtomicBool::new(true));
    let dies = dying.clone();
    let mirror = Server::start(move |request| {
        let answer = honest(request);
        if !dies.load(Ordering::Relaxed) {
            return answer;
        }
        let (first, last) = request.range();
        reply(206, &content(SIZE).0[first..first + 1000])
            .header("Content-Range", format!("bytes {first}-{last}/{SIZE}"))
            .length((last + 1 - first) as u64)
            .then_close()
    });
    let (registry, _dir) = client(
        &origin,
        &format!("[host.\"http://{}\"]", mirror.address),
        "",
    );
    let error = read(&registry, &origin, 0).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    assert_eq!(origin.seen().len(), 0);
    // As the blob layer does: the rest is asked for again, and at once.
    assert_eq!(
        read(&registry, &origin, 1000).await.unwrap(),
        content(SIZE).0[1000..]
    );
    assert_eq!((origin.seen().len(), mirror.seen().len()), (1, 1));
    dying.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(
        read(&registry, &origin, 7).await.unwrap(),
        content(SIZE).0[7..]
    );
    assert_eq!(
        (origin.seen().len(), mirror.seen().len()),
        (1, 2),
        "it is well again"
    );
}

#[tokio::test]
async fn without_the_registry_a_mirror_that_failed_is_asked_all_the_same() {
    let origin = Server::start(|_| reply(503, ""));
    let failed = AtomicBool::new(false);
    let mirror = Server::start(move |request| match failed.swap(true, Ordering::Relaxed) {
        false => reply(502, ""),
        true => honest(request),
    });
    let (registry, _dir) = client(
        &origin,
        &format!("[host.\"http://{}\"]", mirror.address),
        "",
    );
    let began = Instant::now();
    assert_eq!(manifest(&registry, &origin).await.unwrap(), MANIFEST);
    assert!(
        began.elapsed() < Duration::from_millis(900),
        "it is still resting: {:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn credentials_and_headers_go_to_the_server_that_they_are_for() {
    let wants = |login: &'static str| {
        move |request: &Request| match request.header("authorization") {
            authorization if authorization == login => honest(request),
            _ => reply(401, "").header("WWW-Authenticate", "Basic realm=x"),
        }
    };
    let elsewhere = Server::start(honest);
    let away = format!("http://{}", elsewhere.address);
    let origin = Server::start(wants("Basic YTpi")); // a:b
    let mirror = Server::start(move |request| match wants("Basic Yzpk")(request) {
        // c:d
        answer
            if request.target.contains("/blobs/")
                && !request.header("authorization").is_empty() =>
        {
            let _ = answer;
            reply(307, "").header("Location", format!("{away}{}", request.target))
        }
        answer => answer,
    });
    let open = Server::start(|_| missing());
    let hosts = format!(
        "[host.\"http://{}\"]\n[host.\"http://{1}\"]\n[host.\"http://{1}\".header]\nX-Token = \"s3cret\"\n",
        open.address, mirror.address
    );
    let auths = format!(
        r#""{}":{{"auth":"YTpi"}},"{}":{{"auth":"Yzpk"}}"#,
        origin.address, mirror.address
    );
    let (registry, _dir) = client(&origin, &hosts, &auths);
    resolve(&registry, &origin).await.unwrap();
    manifest(&registry, &origin).await.unwrap();
    assert_eq!(read(&registry, &origin, 0).await.unwrap(), content(SIZE).0);
    assert_eq!(origin.seen().len(), 0, "the mirror has it all");
    for request in open.seen().iter().chain(&elsewhere.seen()) {
        assert_eq!(request.header("authorization"), "", "{request:?}");
        assert_eq!(request.header("x-token"), "", "{request:?}");
    }
    assert!(!elsewhere.seen().is_empty());
    for request in mirror.seen() {
        assert!(
            ["", "Basic Yzpk"].contains(&request.header("authorization")),
            "{request:?}"
        );
        assert_eq!(request.header("x-token"), "s3cret");
    }
    // Without an entry of its own a mirror is asked anonymously, whatever the registry's is.
    let auths = format!(r#""{}":{{"auth":"YTpi"}}"#, origin.address);
    let (registry, _dir) = client(&origin, &hosts, &auths);
    let before = mirror.seen().len();
    manifest(&registry, &origin).await.unwrap();
    assert!(
        mirror.seen()[before..]
            .iter()
            .all(|request| request.header("authorization").is_empty())
    );
    assert_eq!(
        origin.seen().last().unwrap().header("authorization"),
        "Basic YTpi"
    );
    assert!(
        origin
            .seen()
            .iter()
            .all(|request| request.header("x-token").is_empty())
    );
}

#[tokio::test]
async fn files_are_read_anew_and_broken_ones_are_not_passed_over() {
    let origin = Server::start(honest);
    let mirror = Server::start(honest);
    let (registry, dir) = client(&origin, "[host.\"http://x\"", "");
    let error = manifest(&registry, &origin).await.unwrap_err();
    assert!(error.to_string().contains("hosts.toml:1"), "{error}");
    assert!(!error.is_transient() && origin.seen().is_empty());
    write(dir.path(), &origin, "");
    manifest(&registry, &origin).await.unwrap();
    assert_eq!(origin.seen().len(), 1);
    write(
        dir.path(),
        &origin,
        &format!("[host.\"http://{}\"]", mirror.address),
    );
    tokio::time::sleep(Duration::from_millis(5100)).await;
    manifest(&registry, &origin).await.unwrap();
    assert_eq!((origin.seen().len(), mirror.seen().len()), (1, 1));
}

#[tokio::test]
async fn the_registry_itself_may_be_elsewhere() {
    // As a site writes it that may not reach the registry at all.
    let named = Server::start(|_| reply(500, ""));
    let inner = Server::start(honest);
    let (registry, _dir) = client(
        &named,
        &format!("server = \"http://{}/hub\"", inner.address),
        "",
    );
    resolve(&registry, &named).await.unwrap();
    assert_eq!(read(&registry, &named, 0).await.unwrap(), content(SIZE).0);
    assert!(named.seen().is_empty());
    assert!(
        inner
            .seen()
            .iter()
            .all(|request| request.target.starts_with("/hub/v2/org/model/")
                && request.target.contains("?ns="))
    );
}

/// Spegel as its documentation sets containerd up (docs/GETTING_STARTED.md, "containerd"; charts/spegel values
/// `dialTimeout`): a mirror on the node that has what some node has pulled, 404 for the rest, and needs `ns`.
/// Scripted after that; not run against the real one.
#[tokio::test]
async fn spegel_as_documented() {
    let origin = Server::start(honest);
    let spegel = Server::start(|request| {
        let known = request.target.contains("?ns=127.0.0.1");
        match request.target.contains("/manifests/v1") {
            false if known => honest(request),
            _ => reply(404, ""),
        }
    });
    let hosts = format!(
        "server = 'http://{}'\n\n[host.'http://{}']\ncapabilities = ['pull', 'resolve']\ndial_timeout = '200ms'\n\n\
         [host.'http://127.0.0.1:1']\ncapabilities = ['pull', 'resolve']\ndial_timeout = '200ms'\n",
        origin.address, spegel.address
    );
    let (registry, _dir) = client(&origin, &hosts, "");
    resolve(&registry, &origin).await.unwrap();
    assert_eq!(manifest(&registry, &origin).await.unwrap(), MANIFEST);
    assert_eq!(
        read(&registry, &origin, 3).await.unwrap(),
        content(SIZE).0[3..]
    );
    assert_eq!(
        origin.seen().len(),
        1,
        "the tag alone, which Spegel did not know"
    );
}

/// Dragonfly's dfdaemon as its client writes it for containerd (dragonfly-client-init, container_runtime/containerd.rs): the upstream
/// in `X-Dragonfly-Registry`, else in `ns`. Scripted after that; not run against the real one.
#[tokio::test]
async fn dragonfly_as_documented() {
    let origin = Server::start(honest);
    let upstream = format!("http://{}", origin.address);
    let expected = upstream.clone();
    let dfdaemon =
        Server::start(
            move |request| match request.header("x-dragonfly-registry") == expected {
                true => honest(request),
                false => reply(502, ""),
            },
        );
    let hosts = format!(
        "server = \"{upstream}\"\n\n[host.\"http://{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n\n\
         [host.\"http://{0}\".header]\nX-Dragonfly-Registry = [\"{upstream}\"]\n",
        dfdaemon.address
    );
    let (registry, _dir) = client(&origin, &hosts, "");
    resolve(&registry, &origin).await.unwrap();
    manifest(&registry, &origin).await.unwrap();
    assert_eq!(read(&registry, &origin, 0).await.unwrap(), content(SIZE).0);
    assert!(origin.seen().is_empty());
}
