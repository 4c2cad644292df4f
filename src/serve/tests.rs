//! The server as clients see it, over a real socket.

use std::path::PathBuf;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::*;
use crate::base::Digest;

struct Running {
    addr: SocketAddr,
    stats: Stats,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

fn layout(dir: &Path, blobs: &[&[u8]], entries: serde_json::Value) {
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    for blob in blobs {
        std::fs::write(path_of(dir, &Digest::of(blob)), blob).unwrap();
    }
    let index = json!({ "schemaVersion": 2, "manifests": entries });
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
}

fn path_of(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

fn entry(manifest: &[u8], name: &str) -> serde_json::Value {
    json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": Digest::of(manifest),
        "size": manifest.len(),
        "annotations": { "org.opencontainers.image.ref.name": name },
    })
}

async fn start(dir: &Path) -> Running {
    let server = Server::bind(dir, "127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    let (addr, stats) = (server.addr(), server.stats());
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(server.run(async move {
        let _ = stopped.await;
    }));
    Running {
        addr,
        stats,
        stop,
        task,
    }
}

struct Answer {
    status: u16,
    headers: hyper::HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

/// One request on a connection of its own, sent and read as text: nothing of the server's own code.
async fn ask(addr: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all((head + "\r\n").as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let end = bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .expect("a response head");
    let text = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let mut headers = hyper::HeaderMap::new();
    for (name, value) in lines.map(|line| line.split_once(": ").unwrap()) {
        headers.append(
            hyper::header::HeaderName::from_bytes(name.as_bytes()).unwrap(),
            value.parse().unwrap(),
        );
    }
    Answer {
        status,
        headers,
        body: bytes[end + 4..].to_vec(),
    }
}

#[tokio::test]
async fn blobs_are_served_whole_and_in_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let blob: Vec<u8> = (0..1_000_003u32).map(|i| (i * 7 % 251) as u8).collect();
    layout(dir.path(), &[&blob], json!([]));
    let running = start(dir.path()).await;
    let digest = Digest::of(&blob);
    let path = format!("/v2/any/name/blobs/{digest}");

    let whole = ask(running.addr, "GET", &path, &[]).await;
    assert_eq!((whole.status, whole.body == blob), (200, true));
    assert_eq!(whole.header("content-length"), "1000003");
    assert_eq!(whole.header("docker-content-digest"), digest.to_string());
    assert_eq!(whole.header("accept-ranges"), "bytes");
    assert_eq!(
        running.stats.total(),
        Count {
            requests: 1,
            bytes: 1_000_003
        }
    );

    let part = ask(
        running.addr,
        "GET",
        &path,
        &[("Range", "bytes=262100-262200")],
    )
    .await;
    assert_eq!(
        (part.status, &part.body[..]),
        (206, &blob[262_100..262_201])
    );
    assert_eq!(part.header("content-range"), "bytes 262100-262200/1000003");
    assert_eq!(
        running.stats.blob(&digest),
        Count {
            requests: 2,
            bytes: 1_000_003 + 101
        }
    );

    let tail = ask(running.addr, "GET", &path, &[("Range", "bytes=-3")]).await;
    assert_eq!((tail.status, &tail.body[..]), (206, &blob[1_000_000..]));
    let behind = ask(running.addr, "GET", &path, &[("Range", "bytes=1000003-")]).await;
    assert_eq!(
        (behind.status, behind.header("content-range")),
        (416, "bytes */1000003")
    );

    let head = ask(running.addr, "HEAD", &path, &[("Range", "bytes=0-1")]).await;
    assert_eq!(
        (head.status, head.header("content-length"), head.body.len()),
        (200, "1000003", 0)
    );
    let tag = whole.header("etag").to_owned();
    let same = ask(
        running.addr,
        "GET",
        &path,
        &[("If-None-Match", &format!("\"x\", {tag}"))],
    )
    .await;
    assert_eq!((same.status, same.body.len()), (304, 0));
    let other = ask(
        running.addr,
        "GET",
        &path,
        &[("Range", "bytes=0-1"), ("If-Range", "\"x\"")],
    )
    .await;
    assert_eq!((other.status, other.body.len()), (200, blob.len()));
    let range = ask(
        running.addr,
        "GET",
        &path,
        &[("Range", "bytes=0-1"), ("If-Range", &tag)],
    )
    .await;
    assert_eq!((range.status, range.body.len()), (206, 2));
}

#[tokio::test]
async fn manifests_and_tags_follow_the_index_when_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (
        br#"{"layers":[1]}"#.as_slice(),
        br#"{"layers":[2],"mediaType":"a/b"}"#.as_slice(),
    );
    layout(
        dir.path(),
        &[one, two],
        json!([entry(one, "x.io/org/m:v1")]),
    );
    let running = start(dir.path()).await;
    let get = |path: &'static str| ask(running.addr, "GET", path, &[]);

    let first = get("/v2/org/m/manifests/v1").await;
    assert_eq!((first.status, &first.body[..]), (200, one));
    assert_eq!(
        first.header("content-type"),
        "application/vnd.oci.image.manifest.v1+json"
    );
    assert_eq!(get("/v2/x.io/org/m/manifests/v1").await.status, 200);
    assert_eq!(get("/v2/m/manifests/v1").await.status, 404);
    let by_digest = ask(
        running.addr,
        "GET",
        &format!("/v2/org/m/manifests/{}", Digest::of(two)),
        &[],
    )
    .await;
    assert_eq!(
        (by_digest.status, by_digest.header("content-type")),
        (200, "a/b")
    );

    let entries: Vec<_> = ["a", "b", "c"]
        .map(|tag| entry(two, &format!("org/m:{tag}")))
        .into();
    layout(dir.path(), &[], json!(entries));
    assert_eq!(get("/v2/org/m/manifests/v1").await.status, 404);
    let page = get("/v2/org/m/tags/list?n=2").await;
    assert_eq!(
        page.header("link"),
        "</v2/org/m/tags/list?n=2&last=b>; rel=\"next\""
    );
    let rest: serde_json::Value =
        serde_json::from_slice(&get("/v2/org/m/tags/list?n=2&last=b").await.body).unwrap();
    assert_eq!(rest, json!({ "name": "org/m", "tags": ["c"] }));
}

#[tokio::test]
async fn what_is_refused_says_so_as_the_spec_asks() {
    let dir = tempfile::tempdir().unwrap();
    layout(dir.path(), &[], json!([]));
    std::fs::write(dir.path().join("secret"), "s").unwrap();
    // A fifo in a blob's place must neither hang nor be served.
    let fifo = Digest::of(b"fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path_of(dir.path(), &fifo),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let running = start(dir.path()).await;
    for (method, path, status, code) in [
        (
            "POST",
            "/v2/a/blobs/uploads/".to_owned(),
            405,
            "UNSUPPORTED",
        ),
        (
            "DELETE",
            "/v2/a/manifests/v1".to_owned(),
            405,
            "UNSUPPORTED",
        ),
        (
            "GET",
            "/v2/a/manifests/v1".to_owned(),
            404,
            "MANIFEST_UNKNOWN",
        ),
        ("GET", "/v2/a/tags/list".to_owned(), 404, "NAME_UNKNOWN"),
        ("GET", format!("/v2/a/blobs/{fifo}"), 404, "BLOB_UNKNOWN"),
        (
            "GET",
            "/v2/a/blobs/sha256:../../../secret".to_owned(),
            404,
            "UNSUPPORTED",
        ),
        (
            "GET",
            "/v2/../secret/manifests/v1".to_owned(),
            400,
            "NAME_INVALID",
        ),
    ] {
        let answer = ask(running.addr, method, &path, &[]).await;
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        let seen = body["errors"][0]["code"].as_str().unwrap();
        assert_eq!((answer.status, seen), (status, code), "{method} {path}");
    }
    assert_eq!(ask(running.addr, "GET", "/v2/", &[]).await.status, 200);
}

#[tokio::test]
async fn stopping_lets_a_running_response_end() {
    let dir = tempfile::tempdir().unwrap();
    // More than the socket buffers of both sides hold, so that the response is running when the stop comes.
    let blob = vec![7; 24 << 20];
    layout(dir.path(), &[&blob], json!([]));
    let running = start(dir.path()).await;
    let mut stream = TcpStream::connect(running.addr).await.unwrap();
    let head = format!(
        "GET /v2/a/blobs/{} HTTP/1.1\r\nHost: x\r\n\r\n",
        Digest::of(&blob)
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut first = [0; 100];
    stream.read_exact(&mut first).await.unwrap();
    assert!(
        running.stats.total().bytes < blob.len() as u64,
        "memory is bounded: not all is read ahead"
    );
    running.stop.send(()).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    running.task.await.unwrap();
    assert!(first.len() + rest.len() > blob.len());
    assert!(TcpStream::connect(running.addr).await.is_err());
}

#[tokio::test]
async fn what_is_no_layout_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let addr = "127.0.0.1:0".parse().unwrap();
    assert!(
        Server::bind(dir.path(), addr)
            .await
            .unwrap_err()
            .to_string()
            .contains("oci-layout")
    );
    let nowhere = Server::bind(&dir.path().join("nowhere"), addr).await;
    let said = nowhere.unwrap_err().to_string();
    assert!(said.contains("no such directory"), "{said}");
    layout(dir.path(), &[], json!([]));
    std::fs::write(dir.path().join("index.json"), "<html>").unwrap();
    assert!(Server::bind(dir.path(), addr).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_pulls_what_a_packager_wrote() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(source.path().join("model.bin"), vec![3; 3 << 20]).unwrap();
    std::fs::write(source.path().join("config.json"), "{}").unwrap();
    let options = crate::pack::Options::default();
    let package = crate::pack::pack(source.path(), &options, &|_| true).unwrap();
    let dir = out.path().join("layout");
    crate::pack::layout::write(&package, &dir, "x.io/org/m:v1", &|_| true).unwrap();
    let running = start(&dir).await;
    let (from, to) = (
        format!("docker://{}/org/m:v1", running.addr),
        format!("dir:{}/copy", out.path().display()),
    );
    let copied = tokio::task::spawn_blocking(move || {
        let arguments = ["copy", "-q", "--src-tls-verify=false", &from, &to];
        std::process::Command::new("skopeo")
            .args(arguments)
            .output()
            .unwrap()
    });
    let copied = copied.await.unwrap();
    let said = String::from_utf8_lossy(&copied.stderr);
    assert!(copied.status.success(), "{said}");
    let manifest = std::fs::read(out.path().join("copy/manifest.json")).unwrap();
    assert_eq!(Digest::of(&manifest), package.digest);
    let total = running.stats.total();
    assert_eq!((total.requests, total.bytes), (3, package.size()));
}
