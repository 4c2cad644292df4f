//! Ranged reads: redirects, lies, cuts and stalls.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::base::ByteRange;
use crate::registry::testing::{
    Reply, Server, content, hang_up, impatient, registry, registry_with, reply, serve_blob, soon,
};
use crate::registry::{BlobBody, BodyStream, Registry, RegistryError};

const SIZE: usize = 100_000;
const RANGE: ByteRange = ByteRange::new(1000, 3000);

async fn read(registry: &Registry, server: &Server) -> Result<BlobBody, RegistryError> {
    registry
        .blob(
            &server.repository(),
            &content(SIZE).1,
            SIZE as u64,
            RANGE,
            soon(),
        )
        .await
}

/// The bytes until the end or the error.
async fn drain(mut body: BodyStream) -> (Vec<u8>, Option<RegistryError>) {
    let mut bytes = Vec::new();
    loop {
        match body.next().await {
            Ok(Some(piece)) => bytes.extend_from_slice(&piece),
            Ok(None) => return (bytes, None),
            Err(error) => {
                assert!(
                    matches!(body.next().await, Ok(None)),
                    "an error is said once"
                );
                return (bytes, Some(error));
            }
        }
    }
}

async fn range(registry: &Registry, server: &Server) -> (Vec<u8>, Option<RegistryError>) {
    match read(registry, server).await.unwrap() {
        BlobBody::Range(body) => drain(body).await,
        BlobBody::Whole(_) => panic!("a range was asked for"),
    }
}

fn wanted() -> Vec<u8> {
    content(SIZE).0[1000..3000].to_vec()
}

#[tokio::test]
async fn a_range_is_asked_for_closed_and_comes_exactly() {
    let (blob, digest) = content(SIZE);
    let server = Server::start(move |request| serve_blob(&blob, request));
    let (bytes, error) = range(&registry(), &server).await;
    assert!(error.is_none() && bytes == wanted());
    let request = &server.seen()[0];
    assert_eq!(request.header("range"), "bytes=1000-2999");
    assert_eq!(request.target, format!("/v2/org/model/blobs/{digest}"));
    // What lies outside the blob is refused without a request.
    for outside in [ByteRange::new(0, SIZE as u64 + 1), ByteRange::new(5, 5)] {
        registry()
            .blob(&server.repository(), &digest, SIZE as u64, outside, soon())
            .await
            .unwrap_err();
    }
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_server_that_ignores_ranges_sends_the_whole() {
    for chunked in [false, true] {
        let server = Server::start(move |_| {
            let whole = reply(200, content(SIZE).0);
            if chunked { whole.chunked() } else { whole }
        });
        let BlobBody::Whole(body) = read(&registry(), &server).await.unwrap() else {
            panic!("200 is the whole blob")
        };
        let (bytes, error) = drain(body).await;
        assert!(error.is_none() && bytes == content(SIZE).0);
    }
    let server = Server::start(|_| reply(200, vec![0; SIZE - 1]));
    let error = read(&registry(), &server).await.unwrap_err();
    assert!(error.to_string().contains("99999"), "{error}");
}

#[tokio::test]
async fn answers_to_another_question_are_refused() {
    let answers: [fn() -> Reply; 5] = [
        || reply(206, vec![0; 2000]).header("Content-Range", "bytes 0-1999/100000"),
        || reply(206, vec![0; 2000]).header("Content-Range", "bytes 1000-2999/100001"),
        || reply(206, vec![0; 2000]),
        || reply(206, "--x").header("Content-Type", "multipart/byteranges; boundary=x"),
        || reply(204, ""),
    ];
    for answer in answers {
        let server = Server::start(move |_| answer());
        let error = read(&registry(), &server).await.unwrap_err();
        assert!(
            matches!(error, RegistryError::OtherBytes { .. }),
            "{error:?}"
        );
        assert!(!error.is_transient());
        assert_eq!(server.seen().len(), 2, "asked once more, and no more");
    }
}

#[tokio::test]
async fn one_answer_to_another_question_is_asked_for_again_over_another_connection() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| match count.fetch_add(1, Ordering::Relaxed) {
        1 => reply(206, vec![0; 2000]).header("Content-Range", "bytes 0-1999/100000"),
        _ => serve_blob(&content(SIZE).0, request),
    });
    let registry = registry();
    for requests in [1, 3] {
        let (bytes, error) = range(&registry, &server).await;
        assert!(error.is_none() && bytes == wanted());
        assert_eq!(server.seen().len(), requests);
    }
    assert!(server.accepted() >= 2);
}

#[tokio::test]
async fn bodies_that_end_early_run_over_or_stall_are_transient_errors() {
    let head = |body: Vec<u8>| reply(206, body).header("Content-Range", "bytes 1000-2999/100000");
    let cut = Server::start(move |_| head(wanted()[..700].to_vec()).length(2000).then_close());
    let (bytes, error) = range(&registry(), &cut).await;
    assert_eq!(bytes, wanted()[..700]);
    assert!(
        matches!(error, Some(RegistryError::Interrupted { .. })),
        "{error:?}"
    );

    let chunked_short = Server::start(move |_| head(wanted()[..700].to_vec()).chunked());
    let (bytes, error) = range(&registry(), &chunked_short).await;
    assert_eq!(bytes, wanted()[..700]);
    assert!(error.unwrap().to_string().contains("1300 bytes early"));

    let stalled = Server::start(move |_| head(wanted()[..700].to_vec()).length(2000).then_stall());
    let start = Instant::now();
    let (bytes, error) = range(&impatient(), &stalled).await;
    assert_eq!(bytes, wanted()[..700]);
    assert!(
        matches!(error, Some(RegistryError::Timeout { .. })),
        "{error:?}"
    );
    assert!(start.elapsed() < Duration::from_secs(5));

    let over = Server::start(move |_| head(content(SIZE).0[1000..3100].to_vec()).chunked());
    let (bytes, error) = range(&registry(), &over).await;
    assert!(wanted().starts_with(&bytes));
    assert!(error.unwrap().is_transient());

    let endless = Server::start(move |_| head(Vec::new()).then_endless());
    assert!(range(&registry(), &endless).await.1.unwrap().is_transient());
}

#[tokio::test]
async fn a_shorter_range_than_asked_for_is_taken_and_said() {
    let server = Server::start(|_| {
        reply(206, &wanted()[..500]).header("Content-Range", "bytes 1000-1499/100000")
    });
    let (bytes, error) = range(&registry(), &server).await;
    assert_eq!(bytes, wanted()[..500]);
    assert!(error.unwrap().is_transient());
}

#[tokio::test]
async fn the_body_of_a_416_is_never_waited_for() {
    let server = Server::start(|_| {
        reply(416, "{\"errors\":[]}")
            .length(100_000)
            .header("Content-Range", "bytes */9")
            .then_stall()
    });
    let start = Instant::now();
    let error = read(&registry(), &server).await.unwrap_err();
    assert!(
        !error.is_transient() && error.to_string().contains("416"),
        "{error}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn resets_before_the_head_are_tried_again() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| match count.fetch_add(1, Ordering::Relaxed) {
        0 => hang_up(),
        1 => reply(500, ""),
        _ => serve_blob(&content(SIZE).0, request),
    });
    let (bytes, error) = range(&registry(), &server).await;
    assert!(error.is_none() && bytes == wanted());
    assert_eq!(server.seen().len(), 3);
}

/// A store as S3 is: a signature that expires in the URL, and no patience with an Authorization header.
fn store() -> Server {
    Server::start(|request| {
        if !request.header("authorization").is_empty() || !request.header("cookie").is_empty() {
            return reply(400, "<Error>only one auth mechanism allowed</Error>");
        }
        if !request.target.contains("signature=") || request.target.contains("expired") {
            return reply(403, "<Error>expired</Error>");
        }
        serve_blob(&content(SIZE).0, request)
    })
}

#[tokio::test]
async fn redirects_are_followed_without_credentials_and_kept() {
    let store = store();
    let location = format!("http://{}/blob?signature=secret", store.address);
    let server = Server::start(move |request| match request.header("authorization") {
        "Basic YTpi" => reply(307, "").header("Location", &location),
        _ => reply(401, "").header("WWW-Authenticate", "Basic realm=x"),
    });
    let (registry, _dir) = registry_with(&format!(r#""{}":{{"auth":"YTpi"}}"#, server.address));
    for _ in 0..3 {
        let (bytes, error) = range(&registry, &server).await;
        assert!(error.is_none() && bytes == wanted());
    }
    // A 401 and a redirect for the first read; the others know where to go.
    assert_eq!(server.seen().len(), 2);
    assert_eq!(store.seen().len(), 3);
    assert_eq!(
        server.accepted(),
        2,
        "the probe and one connection for both"
    );
}

/// S3 and Google's storage sign the method with the address.
#[tokio::test]
async fn an_address_for_head_is_not_used_for_get() {
    let store = Server::start(|request| {
        match request
            .target
            .contains(&format!("method={}", request.method))
        {
            true if request.method == "HEAD" => reply(200, ""),
            true => serve_blob(&content(SIZE).0, request),
            false => reply(403, "<Error><Code>SignatureDoesNotMatch</Code></Error>"),
        }
    });
    let address = store.address.clone();
    let server = Server::start(move |request| {
        let location = format!("http://{address}/blob?method={}", request.method);
        reply(307, "").header("Location", location)
    });
    let registry = registry();
    let (_, digest) = content(SIZE);
    for _ in 0..2 {
        let exists = registry.exists(&server.repository(), &digest, soon()).await;
        assert!(exists.unwrap());
        range(&registry, &server).await;
    }
    let methods: Vec<String> = server
        .seen()
        .into_iter()
        .map(|request| request.method)
        .collect();
    assert_eq!(
        methods,
        ["HEAD", "GET", "HEAD"],
        "the address for GET is kept"
    );
}

#[tokio::test]
async fn a_kept_address_that_expired_is_looked_up_once_more() {
    let store = store();
    let address = store.address.clone();
    let given = AtomicUsize::new(0);
    let server = Server::start(move |_| {
        let query = if given.fetch_add(1, Ordering::Relaxed) == 2 {
            "signature=expired"
        } else {
            "signature=good"
        };
        reply(302, "").header("Location", format!("http://{address}/blob?{query}"))
    });
    let registry = registry();
    let (_, digest) = content(SIZE);
    range(&registry, &server).await;
    assert_eq!((server.seen().len(), store.seen().len()), (1, 1));
    let key = (server.repository(), digest);
    let expired = format!("http://{}/blob?signature=expired", store.address)
        .parse()
        .unwrap();
    registry.client.ways.plain().kept.keep(key.clone(), expired);
    assert!(range(&registry, &server).await.1.is_none());
    assert_eq!((server.seen().len(), store.seen().len()), (2, 3));
    // When the new address is refused as well, that is the answer.
    let expired = format!("http://{}/blob?signature=expired", store.address)
        .parse()
        .unwrap();
    registry.client.ways.plain().kept.keep(key, expired);
    let error = read(&registry, &server).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::Denied { status: 403, .. }),
        "{error:?}"
    );
    assert!(!error.to_string().contains("signature"), "{error}");
    assert_eq!((server.seen().len(), store.seen().len()), (3, 5));
}

#[tokio::test]
async fn relative_redirects_keep_the_credentials() {
    let server =
        Server::start(
            |request| match (request.header("authorization"), request.target.as_str()) {
                ("", _) => reply(401, "").header("WWW-Authenticate", "Basic realm=x"),
                (_, "/storage/blob") => serve_blob(&content(SIZE).0, request),
                _ => reply(307, "").header("Location", "/storage/blob"),
            },
        );
    let (registry, _dir) = registry_with(&format!(r#""{}":{{"auth":"YTpi"}}"#, server.address));
    for _ in 0..2 {
        assert_eq!(range(&registry, &server).await.0, wanted());
    }
    let targets: Vec<String> = server
        .seen()
        .into_iter()
        .map(|request| request.target)
        .collect();
    assert_eq!(
        targets.len(),
        4,
        "401, redirect, and the address itself twice: {targets:?}"
    );
    assert_eq!(server.count("/storage/blob"), 2);
}

#[tokio::test]
async fn loops_and_broken_redirects_end() {
    let round = Server::start(|request| reply(302, "").header("Location", &request.target));
    let error = read(&registry(), &round).await.unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { .. }), "{error:?}");
    assert_eq!(round.seen().len(), 11);
    for location in [
        "",
        "http://",
        "http://192.0.2.1/x",
        "file:///etc/passwd",
        "http://u:p@127.0.0.1/x",
    ] {
        let server = Server::start(move |_| match location {
            "" => reply(302, ""),
            location => reply(302, "").header("Location", location),
        });
        let error = read(&registry(), &server).await.unwrap_err();
        assert!(matches!(error, RegistryError::Redirect { .. }), "{error:?}");
    }
}
