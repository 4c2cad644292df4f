//! Uploads.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::base::Digest;
use crate::registry::testing::{
    Reply, Request, Server, config, content, registry, registry_with, reply, soon,
};
use crate::registry::{Pushed, Reference, Registry, RegistryConfig, RegistryError};

const SIZE: usize = 3_000_000;

/// A registry that keeps what it is given; `door` may answer first.
fn keeper(door: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) -> Server {
    let kept: Arc<Mutex<Vec<String>>> = Arc::default();
    Server::start(move |request| {
        if let Some(reply) = door(request) {
            return reply;
        }
        let digest = Digest::of(&request.body).to_string();
        match request.method.as_str() {
            "HEAD"
                if kept
                    .lock()
                    .unwrap()
                    .iter()
                    .any(|kept| request.target.ends_with(kept)) =>
            {
                reply(200, "")
            }
            "HEAD" => reply(404, ""),
            "POST" => reply(202, "").header("Location", "/upload/1?state=x"),
            "PUT" if request.target.contains("/manifests/") => reply(201, ""),
            "PUT"
                if request
                    .target
                    .ends_with(&format!("digest={}", digest.replace(':', "%3A"))) =>
            {
                kept.lock().unwrap().push(digest);
                reply(201, "").header("Location", "/done")
            }
            _ => reply(400, ""),
        }
    })
}

async fn push(
    registry: &Registry,
    server: &Server,
    progress: Arc<AtomicU64>,
) -> Result<Pushed, RegistryError> {
    let (bytes, digest) = content(SIZE);
    let open = move || {
        let bytes = bytes.clone();
        async move { Ok(std::io::Cursor::new(bytes)) }
    };
    let progress = move |n| progress.store(n, Ordering::Relaxed);
    let repository = server.repository();
    let push = registry.push_blob(&repository, &digest, SIZE as u64, open, progress, soon());
    fn sendable<T: Send>(future: T) -> T {
        future
    }
    sendable(push).await
}

#[tokio::test]
async fn blobs_go_up_once() {
    let server = keeper(|_| None);
    let registry = registry();
    let progress = Arc::new(AtomicU64::new(0));
    assert_eq!(
        push(&registry, &server, progress.clone()).await.unwrap(),
        Pushed::Sent
    );
    assert_eq!(progress.load(Ordering::Relaxed), SIZE as u64);
    assert_eq!(
        push(&registry, &server, progress).await.unwrap(),
        Pushed::Existed
    );
    let methods: Vec<String> = server
        .seen()
        .into_iter()
        .map(|request| request.method)
        .collect();
    assert_eq!(methods, ["HEAD", "POST", "PUT", "HEAD"]);
    assert!(
        registry
            .exists(&server.repository(), &content(SIZE).1, soon())
            .await
            .unwrap()
    );
    assert!(
        !registry
            .exists(&server.repository(), &Digest::of(b"other"), soon())
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn a_push_gets_a_token_for_pushing() {
    let server = keeper(|request| {
        if request.target.starts_with("/token") {
            let push = request
                .target
                .contains("scope=repository%3Aorg%2Fmodel%3Apull%2Cpush");
            return Some(reply(
                200,
                format!(r#"{{"token":"{}"}}"#, if push { "push" } else { "pull" }),
            ));
        }
        let realm = format!("http://{}/token", request.header("host"));
        let challenge = format!(r#"Bearer realm="{realm}",scope="repository:org/model:pull""#);
        (request.header("authorization") != "Bearer push")
            .then(|| reply(401, "").header("WWW-Authenticate", challenge))
    });
    assert_eq!(
        push(&registry(), &server, Arc::default()).await.unwrap(),
        Pushed::Sent
    );
    assert_eq!(server.count("/token"), 1);
    assert!(server.seen().iter().all(|request| request.target != "/v2/"));
}

#[tokio::test]
async fn what_everybody_may_read_may_need_a_login_to_write() {
    for told in [true, false] {
        let server = keeper(move |request| {
            if request.target == "/v2/" {
                return Some(if told {
                    reply(401, "").header("WWW-Authenticate", "Basic")
                } else {
                    reply(200, "")
                });
            }
            let write = matches!(request.method.as_str(), "POST" | "PUT");
            (write && request.header("authorization") != "Basic YTpi").then(|| reply(401, ""))
        });
        let (with_login, _dir) =
            registry_with(&format!(r#""{}":{{"auth":"YTpi"}}"#, server.address));
        assert_eq!(
            push(&with_login, &server, Arc::default()).await.unwrap(),
            Pushed::Sent,
            "{told}"
        );
        let other = keeper(|request| (request.method != "HEAD").then(|| reply(401, "")));
        let error = push(&registry(), &other, Arc::default()).await.unwrap_err();
        assert!(matches!(error, RegistryError::Denied { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn an_upload_that_failed_begins_anew() {
    let tries = AtomicUsize::new(0);
    let server = keeper(move |request| {
        (request.method == "PUT" && tries.fetch_add(1, Ordering::Relaxed) == 0)
            .then(|| reply(503, ""))
    });
    assert_eq!(
        push(&registry(), &server, Arc::default()).await.unwrap(),
        Pushed::Sent
    );
    assert_eq!(server.count("/upload/1"), 2);
}

#[tokio::test]
async fn a_missing_project_is_not_a_missing_blob() {
    let server = keeper(|request| {
        (request.method == "POST").then(|| reply(404, r#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#))
    });
    let error = push(&registry(), &server, Arc::default())
        .await
        .unwrap_err();
    assert!(!error.is_not_found() && !error.is_transient(), "{error:?}");
    assert!(error.to_string().contains("created"), "{error}");
}

#[tokio::test]
async fn content_that_is_not_as_announced_is_a_local_error() {
    let server = keeper(|_| None);
    for (announced, said) in [(5u64, "more than the 5"), (50, "fewer than the 50")] {
        let open = || async { Ok(std::io::Cursor::new(b"0123456789".to_vec())) };
        let error = registry()
            .push_blob(
                &server.repository(),
                &Digest::of(b"0123456789"),
                announced,
                open,
                |_| {},
                soon(),
            )
            .await
            .unwrap_err();
        assert!(
            matches!(error, RegistryError::Source { .. }) && error.to_string().contains(said),
            "{error:?}"
        );
    }
    let open = || async { Err::<std::io::Cursor<Vec<u8>>, _>(std::io::Error::other("gone")) };
    let error = registry()
        .push_blob(
            &server.repository(),
            &Digest::of(b"x"),
            1,
            open,
            |_| {},
            soon(),
        )
        .await
        .unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
}

#[tokio::test]
async fn manifests_go_up_by_tag_and_by_digest() {
    let server = keeper(|_| None);
    let (bytes, media_type) = (
        bytes::Bytes::from_static(b"{}"),
        "application/vnd.oci.image.manifest.v1+json",
    );
    let digest = Digest::of(&bytes);
    let registry = registry();
    let tagged = registry
        .push_manifest(&server.reference("v1"), media_type, bytes.clone(), soon())
        .await
        .unwrap();
    let pinned = Reference::pinned(server.repository(), digest);
    // This registry sends no Location.
    assert_eq!(
        registry
            .push_manifest(&pinned, media_type, bytes.clone(), soon())
            .await
            .unwrap(),
        tagged
    );
    let seen = server.seen();
    assert_eq!(seen[0].target, "/v2/org/model/manifests/v1");
    assert_eq!(seen[1].target, format!("/v2/org/model/manifests/{digest}"));
    assert_eq!(seen[0].header("content-type"), media_type);
    let other = Reference::pinned(server.repository(), Digest::of(b"other"));
    let error = registry
        .push_manifest(&other, media_type, bytes, soon())
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::WrongDigest { .. }),
        "{error:?}"
    );
}

/// A client with this `hosts.toml` for the registry at `address`.
fn by_hosts(address: &str, hosts: &str) -> (Registry, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join(address);
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(place.join("hosts.toml"), hosts).unwrap();
    let config = RegistryConfig {
        hosts_dir: Some(dir.path().to_owned()),
        ..config()
    };
    (Registry::new(config).unwrap(), dir)
}

#[tokio::test]
async fn uploads_go_to_the_first_host_that_takes_them_with_what_is_meant_for_it() {
    let (registry_itself, cache, store) = (keeper(|_| None), keeper(|_| None), keeper(|_| None));
    let (own, of_cache, of_store) = (&registry_itself, &cache.address, &store.address);
    let pulls = format!("[host.\"http://{of_cache}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
    let takes = format!(
        "[host.\"http://{of_store}\"]\ncapabilities = [\"push\"]\n[host.\"http://{of_store}\".header]\nx-site = \"a\"\n"
    );
    for (hosts, taker) in [
        (format!("{pulls}{takes}"), &store),
        (format!("[header]\nx-site = \"a\"\n{pulls}"), own),
    ] {
        let (registry, _dir) = by_hosts(&own.address, &hosts);
        let before = [own, &cache, &store].map(|server| server.seen().len());
        assert_eq!(
            push(&registry, own, Arc::default()).await.unwrap(),
            Pushed::Sent
        );
        let manifest = bytes::Bytes::from_static(b"{}");
        let reference = own.reference("v1");
        registry
            .push_manifest(&reference, "application/json", manifest, soon())
            .await
            .unwrap();
        for (server, before) in [own, &cache, &store].into_iter().zip(before) {
            let seen = server.seen().split_off(before);
            let methods: Vec<&str> = seen.iter().map(|request| request.method.as_str()).collect();
            if std::ptr::eq(server, taker) {
                assert_eq!(methods, ["HEAD", "POST", "PUT", "PUT"]);
                assert!(seen.iter().all(|request| request.header("x-site") == "a"));
            } else {
                assert!(methods.is_empty(), "{methods:?}");
            }
        }
    }
}

#[tokio::test]
async fn an_upload_elsewhere_carries_no_credentials_and_no_headers() {
    let elsewhere = keeper(|_| None);
    let address = elsewhere.address.clone();
    let server = keeper(move |request| {
        (request.method == "POST").then(|| {
            reply(202, "").header("Location", format!("http://{address}/upload/9?signature=x"))
        })
    });
    let hosts = "[header]\nx-site = \"a\"\nauthorization = \"Basic YTpi\"\n";
    let (registry, _dir) = by_hosts(&server.address, hosts);
    assert_eq!(
        push(&registry, &server, Arc::default()).await.unwrap(),
        Pushed::Sent
    );
    let seen = elsewhere.seen();
    assert_eq!(seen.len(), 1);
    assert!(
        seen[0]
            .target
            .starts_with("/upload/9?signature=x&digest=sha256%3A")
    );
    for name in ["x-site", "authorization"] {
        assert_eq!(seen[0].header(name), "");
        assert_ne!(server.seen()[0].header(name), "");
    }
    let length = seen[0].header("content-length").to_owned();
    assert_eq!(length, SIZE.to_string(), "some stores take nothing else");
}

#[tokio::test]
async fn a_token_that_ends_during_an_upload_is_renewed() {
    let tokens = AtomicUsize::new(0);
    let puts = AtomicUsize::new(0);
    let server = keeper(move |request| {
        if request.target.starts_with("/token") {
            let n = tokens.fetch_add(1, Ordering::Relaxed);
            return Some(reply(200, format!(r#"{{"token":"t{n}"}}"#)));
        }
        let over = request.method == "PUT" && puts.fetch_add(1, Ordering::Relaxed) == 0;
        let realm = format!("http://{}/token", request.header("host"));
        (over || request.header("authorization").is_empty()).then(|| {
            reply(401, "").header("WWW-Authenticate", format!(r#"Bearer realm="{realm}""#))
        })
    });
    assert_eq!(
        push(&registry(), &server, Arc::default()).await.unwrap(),
        Pushed::Sent
    );
    assert_eq!(server.count("/token"), 2);
}
