//! Resolving tags, fetching manifests, listing tags.

use std::time::{Duration, Instant};

use crate::base::{Deadline, Digest};
use crate::registry::testing::{AUTHORITY, Server, config, impatient, registry, reply, soon};
use crate::registry::{Registry, RegistryConfig, RegistryError};

const MANIFEST: &str =
    r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;

fn digest() -> Digest {
    Digest::of(MANIFEST.as_bytes())
}

#[tokio::test]
async fn a_head_with_a_digest_is_enough() {
    let server = Server::start(|_| reply(200, "").header("Docker-Content-Digest", digest()));
    let resolved = registry()
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
    assert_eq!((resolved.digest, resolved.manifest), (digest(), None));
    let seen = server.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        (seen[0].method.as_str(), seen[0].target.as_str()),
        ("HEAD", "/v2/org/model/manifests/v1")
    );
    assert_eq!(seen[0].header("accept-encoding"), "identity");
    assert!(seen[0].header("user-agent").starts_with("ocifs/"));
    assert!(
        seen[0]
            .header("accept")
            .contains("application/vnd.oci.image.index.v1+json")
    );
    assert_eq!(seen[0].header("authorization"), "");
}

#[tokio::test]
async fn registries_that_know_no_head_are_asked_by_get() {
    for head_status in [200, 400, 404, 405, 501] {
        let server = Server::start(move |request| match request.method.as_str() {
            "HEAD" => reply(head_status, ""),
            _ => reply(200, MANIFEST)
                .header("Content-Type", "application/vnd.oci.image.manifest.v1+json"),
        });
        let resolved = registry()
            .resolve(&server.reference("v1"), soon())
            .await
            .unwrap();
        assert_eq!(resolved.manifest.unwrap().bytes, MANIFEST, "{head_status}");
        assert_eq!(resolved.digest, digest());
    }
}

#[tokio::test]
async fn a_missing_tag_is_not_found_by_one_request() {
    let server = Server::start(|_| reply(404, "").header("Content-Type", "application/json"));
    let error = registry()
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap_err();
    assert!(error.is_not_found(), "{error}");
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_manifest_with_another_digest_is_refused() {
    let server = Server::start(|request| match request.method.as_str() {
        "HEAD" => reply(405, ""),
        _ => reply(200, "{}").header("Docker-Content-Digest", digest()),
    });
    let registry = registry();
    let by_tag = registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap_err();
    let by_digest = registry
        .manifest(&server.repository(), &digest(), soon())
        .await
        .unwrap_err();
    for error in [by_tag, by_digest] {
        assert!(
            matches!(error, RegistryError::WrongDigest { expected, .. } if expected == digest()),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_page_in_place_of_a_manifest_is_named() {
    let server = Server::start(|_| {
        reply(200, "<!DOCTYPE html><p>Sign in").header("Content-Type", "text/html; charset=utf-8")
    });
    let error = registry()
        .manifest(&server.repository(), &digest(), soon())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("text/html"), "{error}");
}

#[tokio::test]
async fn a_manifest_without_end_is_given_up_early() {
    let endless = Server::start(|_| reply(200, "{").then_endless());
    let announced = Server::start(|_| reply(200, "{").length(100 << 20).then_stall());
    let lying = Server::start(|_| reply(200, vec![b' '; 100 << 20]).length(10).then_close());
    for server in [&endless, &announced] {
        let start = Instant::now();
        let error = registry()
            .manifest(&server.repository(), &digest(), soon())
            .await
            .unwrap_err();
        assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    // What lies behind the announced length is never looked at.
    let error = registry()
        .manifest(&lying.repository(), &digest(), soon())
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn too_many_requests_are_retried_when_the_server_says() {
    let server = {
        let count = std::sync::atomic::AtomicUsize::new(0);
        Server::start(
            move |_| match count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                0 => reply(429, r#"{"errors":[{"code":"TOOMANYREQUESTS"}]}"#)
                    .header("Retry-After", 1),
                1 => reply(503, ""),
                2 => reply(200, "").length(100).then_close(),
                _ => reply(200, "").header("Docker-Content-Digest", digest()),
            },
        )
    };
    let start = Instant::now();
    registry()
        .manifest(&server.repository(), &digest(), soon())
        .await
        .unwrap_err();
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.seen().len(), 4);
}

#[tokio::test]
async fn a_pause_beyond_the_deadline_is_not_waited_for() {
    let server = Server::start(|_| reply(429, "").header("Retry-After", 3600));
    let start = Instant::now();
    let error = registry()
        .resolve(
            &server.reference("v1"),
            Deadline::after(Duration::from_secs(5)),
        )
        .await
        .unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(3));
    let RegistryError::Deadline {
        last: Some(last), ..
    } = &error
    else {
        panic!("{error:?}")
    };
    assert!(
        matches!(**last, RegistryError::RateLimited { .. }),
        "{last}"
    );
    assert_eq!(error.retry_after(), Some(Duration::from_secs(3600)));
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn the_deadline_bounds_a_server_that_never_answers() {
    let server = Server::start(|_| {
        std::thread::sleep(Duration::from_secs(10));
        reply(200, "")
    });
    let start = Instant::now();
    let error = impatient()
        .resolve(
            &server.reference("v1"),
            Deadline::after(Duration::from_secs(3)),
        )
        .await
        .unwrap_err();
    assert!(
        matches!(&error, RegistryError::Deadline { last: Some(last), .. } if matches!(**last, RegistryError::Timeout { .. })),
        "{error:?}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn nobody_listens() {
    let address = {
        let server = Server::start(|_| reply(200, ""));
        server.address.clone()
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    let reference = format!("{address}/m:v1").parse().unwrap();
    let error = registry()
        .resolve(&reference, Deadline::after(Duration::from_secs(600)))
        .await
        .unwrap_err();
    assert!(matches!(&error, RegistryError::Connect { .. }), "{error:?}");
}

#[tokio::test]
async fn tags_come_in_pages_and_stay_bounded() {
    let server = Server::start(|request| {
        let page: usize = request
            .target
            .rsplit_once("last=")
            .map_or(0, |(_, n)| n.parse().unwrap());
        reply(
            200,
            format!(r#"{{"name":"org/model","tags":["t{page}a","t{page}b","not a tag"]}}"#),
        )
        .header(
            "Link",
            format!(
                "</v2/org/model/tags/list?n=2&last={}>; rel=\"next\"",
                page + 1
            ),
        )
    });
    let tags = registry()
        .tags(&server.repository(), 5, soon())
        .await
        .unwrap();
    let tags: Vec<&str> = tags.iter().map(|tag| tag.as_str()).collect();
    assert_eq!(tags, ["t0a", "t0b", "t1a", "t1b", "t2a"]);
    assert_eq!(server.seen().len(), 3);
    registry()
        .tags(&server.repository(), usize::MAX, soon())
        .await
        .unwrap();
    assert_eq!(server.seen().len(), 3 + 100);
}

#[tokio::test]
async fn tags_never_lead_to_another_server() {
    let elsewhere = Server::start(|_| reply(200, r#"{"tags":["evil"]}"#));
    let link = format!(
        "<http://{}/v2/org/model/tags/list?last=x>; rel=next",
        elsewhere.address
    );
    let server = Server::start(move |_| reply(200, r#"{"tags":null}"#).header("Link", &link));
    assert!(
        registry()
            .tags(&server.repository(), 5, soon())
            .await
            .unwrap()
            .is_empty()
    );
    assert!(elsewhere.seen().is_empty());
}

fn trusting() -> (Registry, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, AUTHORITY).unwrap();
    (
        Registry::new(RegistryConfig {
            ca_files: vec![file],
            ..config()
        })
        .unwrap(),
        dir,
    )
}

#[tokio::test]
async fn tls_with_an_own_authority_on_loopback() {
    let server = Server::start_tls(|_| reply(200, "").header("Docker-Content-Digest", digest()));
    let (trusting, _dir) = trusting();
    assert_eq!(
        trusting
            .resolve(&server.reference("v1"), soon())
            .await
            .unwrap()
            .digest,
        digest()
    );
    // Without the authority it is an error at once, and never taken for plain HTTP.
    let error = registry()
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::Tls { .. }) && error.to_string().contains("--ca-file"),
        "{error:?}"
    );
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn from_tls_nothing_leads_to_plain_http() {
    let plain = Server::start(|_| reply(200, MANIFEST));
    // Another loopback name of the same server would be allowed: an address that is not loopback is not.
    let server = Server::start_tls(|_| reply(307, "").header("Location", "http://192.0.2.1/m"));
    let (trusting, _dir) = trusting();
    let error = trusting
        .manifest(&server.repository(), &digest(), soon())
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::Redirect { .. }) && error.to_string().contains("plain HTTP"),
        "{error:?}"
    );
    assert!(plain.seen().is_empty());
}

#[tokio::test]
async fn a_loopback_server_may_change_to_tls_and_back() {
    let found = |_: &_| reply(200, "").header("Docker-Content-Digest", digest());
    let server = Server::start(found);
    let reference = server.reference("v1");
    let (trusting, _dir) = trusting();
    trusting.resolve(&reference, soon()).await.unwrap();
    let address = server.address.clone();
    drop(server);
    let server = Server::start_tls_at(&address, found);
    trusting.resolve(&reference, soon()).await.unwrap();
    drop(server);
    let _server = Server::start_at(&address, found);
    trusting.resolve(&reference, soon()).await.unwrap();
}

#[tokio::test]
async fn a_loopback_server_that_waits_for_an_empty_line_is_plain() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = format!("{}/m:v1", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.unwrap() > 0
                {
                }
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nDocker-Content-Digest: {}\r\nContent-Length: 0\r\n\r\n",
                    digest()
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
        }
    });
    let registry = registry();
    registry.resolve(&reference, soon()).await.unwrap();
    let start = Instant::now();
    registry.resolve(&reference, soon()).await.unwrap();
    assert!(
        start.elapsed() < Duration::from_millis(950),
        "asked once: {:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn a_busy_tls_server_on_loopback_is_found_out_later() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::start_tls(|_| reply(200, "").header("Docker-Content-Digest", digest()));
    let behind = server.address.clone();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = format!("{}/m:v1", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    tokio::spawn(async move {
        let (_busy, _) = listener.accept().await.unwrap();
        let (mut plain, _) = listener.accept().await.unwrap();
        let mut request = [0; 4];
        plain.read_exact(&mut request).await.unwrap();
        assert_eq!(&request, b"HEAD");
        let answer =
            b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";
        plain.write_all(answer).await.unwrap();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tokio::net::TcpStream::connect(&behind).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
        }
    });
    let (trusting, _dir) = trusting();
    let resolved = trusting.resolve(&reference, soon()).await.unwrap();
    assert_eq!(resolved.digest, digest());
}

#[tokio::test]
async fn files_of_authorities_are_checked_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    for content in [
        "",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "\u{0}",
    ] {
        std::fs::write(&file, content).unwrap();
        let error = Registry::new(RegistryConfig {
            ca_files: vec![file.clone()],
            ..config()
        })
        .unwrap_err();
        assert!(matches!(error, RegistryError::CaFile { .. }), "{error}");
    }
}
