//! Large bodies: connections of their own, which HTTP is spoken on them, and pauses that a host asks for.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_RANGE, RANGE};
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use crate::base::{ByteRange, Digest};
use crate::registry::testing::{
    AUTHORITY, CERTIFICATE, KEY, Reply, Request as Asked, Server, config, content, impatient,
    registry, reply, soon,
};
use crate::registry::{BlobBody, HttpVersion, Registry, RegistryConfig, RegistryError, Repository};

const MIB: usize = 1 << 20;
/// More than the kernel is asked to gather, and not a multiple of anything.
const SIZE: usize = 8 * MIB + 12_345;

static BLOB: LazyLock<(Vec<u8>, Digest)> = LazyLock::new(|| content(SIZE));

fn serve_blob(request: &Asked) -> Reply {
    let (first, last) = request.range();
    reply(206, &BLOB.0[first..=last])
        .header("Content-Range", format!("bytes {first}-{last}/{SIZE}"))
}

async fn start(
    registry: &Registry,
    repository: &Repository,
    range: ByteRange,
) -> Result<BlobBody, RegistryError> {
    registry
        .blob(repository, &BLOB.1, SIZE as u64, range, soon())
        .await
}

/// The bytes up to the end or an error.
async fn drain(body: BlobBody) -> (Vec<u8>, Option<RegistryError>) {
    let BlobBody::Range(mut body) = body else {
        panic!("a range was asked for")
    };
    let mut bytes = Vec::new();
    loop {
        match body.next().await {
            Ok(Some(piece)) => bytes.extend_from_slice(&piece),
            Ok(None) => return (bytes, None),
            Err(error) => return (bytes, Some(error)),
        }
    }
}

/// Reads the blob in parts of 2 MiB, all at a time.
async fn read_parts(registry: &Registry, repository: &Repository) {
    let size = SIZE as u64;
    let parts = (0..size).step_by(2 * MIB).map(|at| async move {
        let range = ByteRange::new(at, (at + 2 * MIB as u64).min(size));
        let (bytes, error) = drain(start(registry, repository, range).await.unwrap()).await;
        assert!(error.is_none(), "{error:?}");
        assert!(
            bytes == BLOB.0[at as usize..range.end() as usize],
            "{range}"
        );
    });
    futures_util::future::join_all(parts).await;
}

#[tokio::test]
async fn parts_have_connections_that_are_used_again() {
    let server = Server::start(serve_blob);
    let registry = registry();
    let repository = server.repository();
    // The probe, and reqwest's connection.
    let few = start(&registry, &repository, ByteRange::new(0, 10)).await;
    assert_eq!(drain(few.unwrap()).await.0, BLOB.0[..10]);
    assert_eq!(server.accepted(), 2);
    // Four parts of 2 MiB; the last 12345 bytes are no large body.
    read_parts(&registry, &repository).await;
    assert_eq!(server.accepted(), 6);
    for _ in 0..3 {
        read_parts(&registry, &server.repository()).await;
    }
    assert_eq!(server.accepted(), 6);
    assert_eq!(server.seen().len(), 21);
    assert!(
        server
            .seen()
            .iter()
            .all(|seen| seen.header("host") == server.address)
    );
}

#[tokio::test]
async fn connections_that_the_server_closes_are_not_an_error() {
    // Without a word, behind a whole answer: whether the client sees it before or after its next request is chance.
    let silently = Server::start(|request| serve_blob(request).then_close());
    let politely = Server::start(|request| serve_blob(request).header("Connection", "close"));
    for server in [silently, politely] {
        let registry = registry();
        for _ in 0..5 {
            read_parts(&registry, &server.repository()).await;
        }
        assert_eq!(server.seen().len(), 25, "none was asked for twice");
        assert!(server.accepted() > 25);
    }
}

#[tokio::test]
async fn bytes_do_not_lie_in_the_kernel_while_it_waits_for_more() {
    let range = ByteRange::new(0, 4 * MIB as u64);
    for came in [1, 1000, 100_000, 300_000, 3 * MIB] {
        let server = Server::start(move |_| {
            reply(206, &BLOB.0[..came])
                .length(4 * MIB as u64)
                .header("Content-Range", format!("bytes 0-{}/{SIZE}", 4 * MIB - 1))
                .then_stall()
        });
        let body = start(&impatient(), &server.repository(), range).await;
        let (bytes, error) = drain(body.unwrap()).await;
        assert!(
            matches!(error, Some(RegistryError::Timeout { .. })),
            "{error:?}"
        );
        assert_eq!(bytes.len(), came);
    }
}

#[tokio::test]
async fn a_part_that_nobody_reads_on_closes_its_connection() {
    let server = Server::start(serve_blob);
    let registry = registry();
    let range = ByteRange::new(0, 8 * MIB as u64);
    for _ in 0..3 {
        let BlobBody::Range(mut body) =
            start(&registry, &server.repository(), range).await.unwrap()
        else {
            panic!("a range was asked for")
        };
        assert!(body.next().await.unwrap().is_some());
    }
    let (bytes, error) = drain(start(&registry, &server.repository(), range).await.unwrap()).await;
    assert!(error.is_none() && bytes == BLOB.0[..8 * MIB]);
}

/// A TLS server by hyper that speaks these protocols; the HTTP version and connection of each request.
struct Modern {
    address: String,
    seen: Arc<Mutex<Vec<(Version, usize)>>>,
}

impl Modern {
    async fn start(protocols: &[&str]) -> Self {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
        let certificate = CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        tls.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<(Version, usize)>>> = Arc::default();
        let server = Self {
            address,
            seen: Arc::clone(&seen),
        };
        tokio::spawn(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
                tokio::spawn(async move {
                    // The probe and refused handshakes end here.
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let service = service_fn(move |request: Request<Incoming>| {
                        seen.lock().unwrap().push((request.version(), number));
                        async move { Ok::<_, Infallible>(modern_answer(&request)) }
                    });
                    let io = TokioIo::new(stream);
                    // Clients hang up when they like.
                    if http2 {
                        let builder =
                            hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = builder.serve_connection(io, service).await;
                    } else {
                        let builder = hyper::server::conn::http1::Builder::new();
                        let _ = builder.serve_connection(io, service).await;
                    }
                });
            }
        });
        server
    }

    fn repository(&self) -> Repository {
        Repository::new(&self.address, "org/model").unwrap()
    }

    /// The versions of large requests and how many connections they had.
    fn spoken(&self) -> (Vec<Version>, usize) {
        let mut seen = self.seen.lock().unwrap().clone();
        seen.sort_by_key(|(_, number)| *number);
        let versions = seen.iter().map(|(version, _)| *version).collect();
        seen.dedup_by_key(|(_, number)| *number);
        (versions, seen.len())
    }
}

fn modern_answer(request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let range = request.headers()[RANGE].to_str().unwrap();
    let (first, last) = range
        .strip_prefix("bytes=")
        .unwrap()
        .split_once('-')
        .unwrap();
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    Response::builder()
        .status(206)
        .header(CONTENT_RANGE, format!("bytes {first}-{last}/{SIZE}"))
        .body(Full::new(Bytes::from_static(&BLOB.0[first..=last])))
        .unwrap()
}

fn speaking(http: HttpVersion) -> (Registry, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, AUTHORITY).unwrap();
    let registry = Registry::new(RegistryConfig {
        ca_files: vec![file],
        http,
        ..config()
    });
    (registry.unwrap(), dir)
}

/// Four parts at a time, three times; the versions and connections that the server saw.
async fn spoken(protocols: &[&str], http: HttpVersion) -> (Vec<Version>, usize) {
    let server = Modern::start(protocols).await;
    let (registry, _dir) = speaking(http);
    let repository = server.repository();
    for _ in 0..3 {
        let parts = (0..4).map(|part| {
            let range = ByteRange::at(part * 2 * MIB as u64, 2 * MIB as u64);
            let (registry, repository) = (&registry, &repository);
            async move {
                let body = start(registry, repository, range).await.unwrap();
                let (bytes, error) = drain(body).await;
                assert!(error.is_none(), "{error:?}");
                assert!(bytes == BLOB.0[range.start() as usize..range.end() as usize]);
            }
        });
        futures_util::future::join_all(parts).await;
    }
    server.spoken()
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_come_over_several_connections_where_both_versions_are_spoken() {
    let both = ["h2", "http/1.1"];
    let found = spoken(&both, HttpVersion::Auto).await;
    assert_eq!(found, (vec![Version::HTTP_11; 12], 4));
    let found = spoken(&both, HttpVersion::Http1).await;
    assert_eq!(found, (vec![Version::HTTP_11; 12], 4));
    let (versions, _) = spoken(&both, HttpVersion::Http2).await;
    assert_eq!(versions, [Version::HTTP_2; 12]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_one_version_is_asked_in_that_one() {
    let (versions, connections) = spoken(&["h2"], HttpVersion::Auto).await;
    assert_eq!(versions, [Version::HTTP_2; 12]);
    assert!(connections <= 4, "{connections}");
    for http in [HttpVersion::Auto, HttpVersion::Http2] {
        let (versions, _) = spoken(&["http/1.1"], http).await;
        assert_eq!(versions, [Version::HTTP_11; 12]);
        let (versions, _) = spoken(&[], http).await;
        assert_eq!(versions, [Version::HTTP_11; 12], "without ALPN");
    }
}

/// A way to a server whose first connection that has carried so many bytes carries no more, and says so to nobody; its address.
async fn dying_way(server: String, after: usize) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let died = Arc::new(std::sync::atomic::AtomicBool::new(false));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let upstream = tokio::net::TcpStream::connect(&server).await.unwrap();
            let died = Arc::clone(&died);
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = upstream.into_split();
                let up =
                    tokio::spawn(
                        async move { tokio::io::copy(&mut from_client, &mut to_server).await },
                    );
                let mut piece = vec![0; 16 << 10];
                let mut carried = 0;
                while let Ok(count @ 1..) = from_server.read(&mut piece).await {
                    carried += count;
                    if carried > after && !died.swap(true, Ordering::Relaxed) {
                        up.abort();
                        std::future::pending::<()>().await;
                    }
                    if to_client.write_all(&piece[..count]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_of_http2_that_dies_without_a_word_costs_seconds() {
    let server = Modern::start(&["h2"]).await;
    let way = dying_way(server.address.clone(), MIB).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, AUTHORITY).unwrap();
    // Neither this nor the setting for a stall ends it: what is known of the host does, and the connection's own pings.
    let registry = Registry::new(RegistryConfig {
        ca_files: vec![file],
        stall_timeout: Duration::from_secs(600),
        ..config()
    })
    .unwrap();
    let repository = Repository::new(&way, "org/model").unwrap();
    let deadline = crate::base::Deadline::after(Duration::from_secs(300));
    let (begun, mut all, mut cut) = (Instant::now(), Vec::new(), 0);
    while all.len() < 4 * MIB {
        let range = ByteRange::new(all.len() as u64, 4 * MIB as u64);
        let body = registry
            .blob(&repository, &BLOB.1, SIZE as u64, range, deadline)
            .await
            .unwrap();
        let (bytes, error) = drain(body).await;
        all.extend_from_slice(&bytes);
        cut += usize::from(error.is_some_and(|error| error.is_transient()));
    }
    let took = begun.elapsed();
    assert!(all == BLOB.0[..4 * MIB]);
    assert!(cut > 0 && took < Duration::from_secs(40), "{cut}, {took:?}");
    let (versions, connections) = server.spoken();
    assert!(versions.iter().all(|version| *version == Version::HTTP_2));
    assert!(connections >= 2, "the dead one is not used for ever");
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_said_to_be_one() {
    let server = Modern::start(&["h2", "http/1.1"]).await;
    let range = ByteRange::new(0, 2 * MIB as u64);
    let error = start(&registry(), &server.repository(), range)
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::Tls { .. }) && error.to_string().contains("--ca-file"),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_host_asks_for_a_pause_all_requests_to_it_wait() {
    const PAUSE: Duration = Duration::from_secs(2);
    let times: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let (count, seen) = (AtomicUsize::new(0), Arc::clone(&times));
    let server = Server::start(move |request| {
        seen.lock().unwrap().push(Instant::now());
        match count.fetch_add(1, Ordering::Relaxed) {
            0 => reply(429, "").header("Retry-After", PAUSE.as_secs()),
            _ => serve_blob(request),
        }
    });
    let other = Server::start(serve_blob);
    let registry = registry();
    let part = ByteRange::new(0, 2 * MIB as u64);
    let read = async |server: &Server, range: ByteRange| {
        let body = start(&registry, &server.repository(), range).await.unwrap();
        let (bytes, error) = drain(body).await;
        assert!(error.is_none() && bytes == BLOB.0[range.start() as usize..range.end() as usize]);
        Instant::now()
    };
    let others = async {
        while times.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        // A part, a reader's bytes, and another host.
        let free = read(&other, part).await;
        let both = futures_util::future::join(
            read(&server, part),
            read(&server, ByteRange::new(5000, 5100)),
        );
        both.await;
        free
    };
    let (_, free) = futures_util::future::join(read(&server, part), others).await;
    let times = times.lock().unwrap().clone();
    assert_eq!(times.len(), 4);
    assert!(
        times[1..]
            .iter()
            .all(|time| *time - times[0] >= PAUSE - Duration::from_millis(100)),
        "{times:?}"
    );
    assert!(free - times[0] < PAUSE, "another host is not concerned");
}

#[tokio::test]
async fn refusals_leave_fewer_lanes() {
    let server = Server::start(|_| reply(429, ""));
    let registry = registry();
    let repository = server.repository();
    let lane = async || {
        let lane = registry.lane(&repository, &BLOB.1);
        tokio::time::timeout(Duration::from_millis(50), lane)
            .await
            .ok()
    };
    let mut lanes = Vec::new();
    while let Some(lane) = lane().await {
        lanes.push(lane);
    }
    assert_eq!(lanes.len(), 4);
    let deadline = crate::base::Deadline::after(Duration::from_millis(600));
    let range = ByteRange::new(0, 2 * MIB as u64);
    let refused = registry
        .blob(&server.repository(), &BLOB.1, SIZE as u64, range, deadline)
        .await;
    assert!(refused.unwrap_err().is_transient());
    lanes.truncate(2);
    assert!(lane().await.is_none(), "two of four are left");
    lanes.truncate(1);
    assert!(lane().await.is_some());
}
