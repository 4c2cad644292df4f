//! Models over a real cache, real blobs and a real registry client, against a small registry on loopback.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};

use super::*;
use crate::base::ByteRange;
use crate::blob::{BlobConfig, Prefetch};
use crate::cache::{Cache, CacheConfig};
use crate::model::safetensors::file_for_tests as safetensors_file;
use crate::registry::{HttpVersion, Registry, RegistryConfig};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const SHARD: &str = "application/vnd.docker.ai.safetensors";

/// What the registry has, and who asked for what.
#[derive(Default)]
struct Content {
    blobs: Mutex<BTreeMap<Digest, Bytes>>,
    tags: Mutex<BTreeMap<String, Digest>>,
    /// `METHOD path` and the bytes sent.
    log: Mutex<Vec<(String, usize)>>,
    denies: AtomicBool,
}

impl Content {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let status = |status| Response::builder().status(status);
        let path = request.uri().path();
        let (kind, name) = path.rsplit_once('/').unwrap_or_default();
        let by_tag = lock(&self.tags).get(name).copied();
        let digest = by_tag.or_else(|| name.parse().ok());
        let found =
            digest.and_then(|digest| Some((digest, lock(&self.blobs).get(&digest)?.clone())));
        if self.denies.load(Ordering::Relaxed) {
            return status(StatusCode::FORBIDDEN).body(Full::default()).unwrap();
        }
        let Some((digest, bytes)) = found else {
            return status(StatusCode::NOT_FOUND).body(Full::default()).unwrap();
        };
        let range = request
            .headers()
            .get("range")
            .and_then(|value| value.to_str().ok()?.strip_prefix("bytes="));
        if let Some((first, last)) = range.and_then(|range| range.split_once('-')) {
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            return status(StatusCode::PARTIAL_CONTENT)
                .header(
                    "content-range",
                    format!("bytes {first}-{last}/{}", bytes.len()),
                )
                .body(Full::new(bytes.slice(first..=last)))
                .unwrap();
        }
        let media_type = if kind.ends_with("/manifests") {
            MANIFEST
        } else {
            "application/octet-stream"
        };
        status(StatusCode::OK)
            .header("content-type", media_type)
            .header("docker-content-digest", digest.to_string())
            .body(Full::new(bytes))
            .unwrap()
    }

    fn add(&self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        lock(&self.blobs).insert(digest, bytes);
        digest
    }

    fn layer(&self, media_type: &str, bytes: impl Into<Bytes>) -> Value {
        let bytes = bytes.into();
        json!({"mediaType": media_type, "size": bytes.len(), "digest": self.add(bytes)})
    }

    fn push(&self, tag: &str, layers: &[Value]) -> Digest {
        let config = r#"{"descriptor":{"created":"2025-10-03T01:02:03Z"}}"#;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.docker.ai.model.config.v0.1+json",
                "digest": self.add(config),
                "size": config.len(),
            },
            "layers": layers,
        });
        let digest = self.add(manifest.to_string());
        lock(&self.tags).insert(tag.to_owned(), digest);
        digest
    }

    fn requests(&self, part: &str) -> usize {
        lock(&self.log)
            .iter()
            .filter(|(line, _)| line.contains(part))
            .count()
    }

    fn sent(&self, part: &str) -> usize {
        lock(&self.log)
            .iter()
            .filter(|(line, _)| line.contains(part))
            .map(|(_, sent)| sent)
            .sum()
    }
}

/// A registry on a free port; the repository in it.
async fn registry() -> (Arc<Content>, Repository) {
    let content = Arc::new(Content::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let repository =
        Repository::new(&listener.local_addr().unwrap().to_string(), "org/model").unwrap();
    let served = Arc::clone(&content);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let served = Arc::clone(&served);
            let service = service_fn(move |request: Request<Incoming>| {
                let response = served.answer(&request);
                let sent = match *request.method() {
                    Method::HEAD => 0,
                    _ => usize::try_from(hyper::body::Body::size_hint(response.body()).lower())
                        .unwrap(),
                };
                lock(&served.log).push((
                    format!("{} {}", request.method(), request.uri().path()),
                    sent,
                ));
                async move { Ok::<_, Infallible>(response) }
            });
            let stream = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(stream, service),
            );
        }
    });
    (content, repository)
}

fn models(dir: &Path, tag_ttl: Duration, offline: bool) -> Models {
    let blobs = BlobConfig {
        prefetch: Prefetch::None,
        offline,
        ..BlobConfig::default()
    };
    models_over(dir, tag_ttl, blobs)
}

fn models_over(dir: &Path, tag_ttl: Duration, blobs: BlobConfig) -> Models {
    let cache = Cache::open(CacheConfig {
        dir: dir.to_owned(),
        limit: 1 << 30,
    })
    .unwrap();
    let registry = Registry::new(RegistryConfig {
        plain_http: Vec::new(),
        ca_files: Vec::new(),
        auth_files: None,
        hosts_dir: None,
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_secs(5),
        http: HttpVersion::Auto,
        max_connections: LANES,
    });
    let blobs = BlobConfig {
        read_timeout: Duration::from_secs(10),
        ..blobs
    };
    let blobs = Blobs::new(cache, registry.unwrap(), blobs);
    Models::new(
        blobs,
        ModelConfig {
            tag_ttl,
            metadata_timeout: Duration::from_secs(10),
            platform: crate::model::Platform::default(),
            access: crate::model::Access::default(),
        },
    )
}

fn reference(repository: &Repository, tag: &str) -> Reference {
    Reference::tagged(repository.clone(), tag.parse().unwrap())
}

/// Parts that are fetched at a time.
const LANES: usize = 4;
const LONG: Duration = Duration::from_secs(600);

/// Two nameless shards of 4 MiB each.
fn push_shards(content: &Content, tag: &str) -> (Digest, [Vec<u8>; 2]) {
    let shards = [
        safetensors_file(&[("a", 4 << 20)]),
        safetensors_file(&[("b", 4 << 20)]),
    ];
    let layers = shards.clone().map(|shard| content.layer(SHARD, shard));
    (content.push(tag, &layers), shards)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_resolved_and_built_once_and_moves_headers_only() {
    let (content, repository) = registry().await;
    let (digest, shards) = push_shards(&content, "v1");
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path(), LONG, false);
    let v1 = reference(&repository, "v1");
    let resolved = futures_util::future::join_all((0..8).map(|_| models.resolve(&v1))).await;
    assert!(
        resolved
            .iter()
            .all(|resolved| *resolved.as_ref().unwrap() == digest)
    );
    let opened =
        futures_util::future::join_all((0..8).map(|_| models.open(&repository, &digest))).await;
    let model = opened[0].as_ref().unwrap();
    assert!(
        opened
            .iter()
            .all(|other| Arc::ptr_eq(model, other.as_ref().unwrap()))
    );
    let manifests = content.requests("/manifests/");
    assert!(manifests <= 2, "{manifests} requests");
    let sent = content.sent(&Digest::of(&shards[0]).to_string());
    assert!(
        sent <= 512 << 10,
        "{sent} bytes of the first shard were sent"
    );

    let file = model.file("model-00002-of-00002.safetensors").unwrap();
    let range = ByteRange::new(100, 100_000);
    assert_eq!(file.read(range).await.unwrap(), shards[1][100..100_000]);
    let made = model
        .file("model.safetensors.index.json")
        .unwrap()
        .read(ByteRange::new(0, u64::MAX))
        .await
        .unwrap();
    assert!(serde_json::from_slice::<Value>(&made).unwrap()["weight_map"]["b"].is_string());

    drop(opened);
    models.open(&repository, &digest).await.unwrap();
    assert_eq!(
        content.requests("/manifests/"),
        manifests,
        "a plan outlives its model"
    );
    assert_eq!(models.known(), [v1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_is_in_the_layout_of_a_published_model() {
    let (content, repository) = registry().await;
    let layers = [
        content.layer(SHARD, safetensors_file(&[("a", 64)])),
        content.layer(SHARD, Vec::new()),
    ];
    let digest = content.push("v1", &layers);
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path(), LONG, false);
    let v1 = reference(&repository, "v1");
    models.resolve(&v1).await.unwrap();
    let model = models.inspect(&repository, &digest).await.unwrap();
    for blob in &model.blobs {
        blob.complete().await.unwrap();
    }
    assert!(models.publish_if_complete(&v1, &model).await);
    for layer in &model.manifest.layers {
        let path = dir
            .path()
            .join("blobs/sha256")
            .join(&layer.digest.to_string()[7..]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), layer.size);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_model_is_published_and_needs_no_registry() {
    let (content, repository) = registry().await;
    let (digest, shards) = push_shards(&content, "v1");
    let dir = tempfile::tempdir().unwrap();
    let v1 = reference(&repository, "v1");
    {
        let models = models(dir.path(), LONG, false);
        models.resolve(&v1).await.unwrap();
        let model = models.open(&repository, &digest).await.unwrap();
        assert!(!models.publish_if_complete(&v1, &model).await);
        for blob in &model.blobs {
            blob.complete().await.unwrap();
        }
        models.publish_completed().await;
        let published = models.blobs().cache().published();
        assert_eq!((published.len(), published[0].digest), (1, digest));
        assert_eq!(published[0].name, v1.to_string());
    }
    let before = lock(&content.log).len();
    let models = models(dir.path(), LONG, true);
    assert_eq!(models.resolve(&v1).await.unwrap(), digest);
    let model = models.open(&repository, &digest).await.unwrap();
    let file = model.file("model-00001-of-00002.safetensors").unwrap();
    assert_eq!(
        file.read(ByteRange::new(0, u64::MAX)).await.unwrap(),
        shards[0]
    );
    assert_eq!(models.known(), std::slice::from_ref(&v1));
    assert_eq!(
        models.tags(&repository, Deadline::after(LONG)).await,
        [v1.tag().unwrap().clone()]
    );
    let other = reference(&repository, "v2");
    assert!(matches!(
        models.resolve(&other).await,
        Err(ModelError::Offline { .. })
    ));
    let unknown = Digest::of(b"unknown");
    assert!(matches!(
        models.open(&repository, &unknown).await,
        Err(ModelError::Offline { .. })
    ));
    assert_eq!(lock(&content.log).len(), before, "offline means offline");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_a_model_comes_shard_by_shard() {
    // More than is asked for at a time.
    const SIZE: u64 = 224 << 20;
    let (content, repository) = registry().await;
    let shards = ["a", "b"].map(|name| safetensors_file(&[(name, SIZE)]));
    let layers = shards.clone().map(|shard| content.layer(SHARD, shard));
    let digest = content.push("v1", &layers);
    let dir = tempfile::tempdir().unwrap();
    let models = models_over(dir.path(), LONG, BlobConfig::default());
    let tended = tokio::spawn(models.clone().tend());
    let model = models.open(&repository, &digest).await.unwrap();
    let file = model.file("model-00001-of-00002.safetensors").unwrap();
    let _hold = file.hold();
    // Enough to show that a reader wants everything, and no more, for what he asks for comes first.
    for at in 0..24 {
        file.read(ByteRange::at(at << 20, 1 << 20)).await.unwrap();
    }
    while !model.is_complete() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tended.abort();
    // Requests for headers are small.
    let log = lock(&content.log).clone();
    let parts = |shard: &Vec<u8>| {
        let digest = Digest::of(shard).to_string();
        let asked = log
            .iter()
            .enumerate()
            .filter(move |(_, (line, sent))| line.contains(&digest) && *sent >= 2 << 20)
            .map(|(at, _)| at);
        asked.collect::<Vec<_>>()
    };
    let [before, behind] = shards.each_ref().map(parts);
    assert!(before.len() > 2 * LANES && behind.len() > 2 * LANES);
    // Those that left together may have come in any order, and the reader may have asked for one more.
    let late = before.iter().filter(|at| **at > behind[0]);
    assert!(late.count() <= LANES, "{before:?} {behind:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_remembered_until_asked_for_expressly() {
    let (content, repository) = registry().await;
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path(), LONG, false);
    let v1 = reference(&repository, "v1");
    assert!(models.resolve(&v1).await.unwrap_err().is_not_found());
    let asked = lock(&content.log).len();
    assert!(models.resolve(&v1).await.unwrap_err().is_not_found());
    assert_eq!(lock(&content.log).len(), asked);
    let (digest, _) = push_shards(&content, "v1");
    assert_eq!(models.refresh(&v1).await.unwrap(), digest);
    assert_eq!(models.resolve(&v1).await.unwrap(), digest);
    let unknown = Digest::of(b"unknown");
    assert!(
        models
            .open(&repository, &unknown)
            .await
            .unwrap_err()
            .is_not_found()
    );
    let asked = lock(&content.log).len();
    assert!(
        models
            .open(&repository, &unknown)
            .await
            .unwrap_err()
            .is_not_found()
    );
    assert_eq!(lock(&content.log).len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_gives_no_answer_leaves_the_last_known_digest() {
    let (content, repository) = registry().await;
    let (digest, _) = push_shards(&content, "v1");
    let dir = tempfile::tempdir().unwrap();
    let v1 = reference(&repository, "v1");
    let first = models(dir.path(), Duration::ZERO, false);
    assert_eq!(first.resolve(&v1).await.unwrap(), digest);
    content.denies.store(true, Ordering::Relaxed);
    assert_eq!(first.resolve(&v1).await.unwrap(), digest);
    // Another process, which knows the tag from the cache.
    assert_eq!(
        models(dir.path(), LONG, false).resolve(&v1).await.unwrap(),
        digest
    );
    assert!(first.refresh(&v1).await.is_err());
    assert!(first.resolve(&reference(&repository, "v2")).await.is_err());
    content.denies.store(false, Ordering::Relaxed);
    let (moved, _) = (content.push("v1", &[content.layer(SHARD, "x")]), ());
    assert_eq!(first.refresh(&v1).await.unwrap(), moved);
    assert_eq!(first.resolve(&v1).await.unwrap(), moved);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_without_files_can_be_inspected_but_not_opened() {
    let (content, repository) = registry().await;
    let digest = content.push("v1", &[content.layer("application/x-unknown", "something")]);
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path(), LONG, false);
    assert!(matches!(
        models.open(&repository, &digest).await,
        Err(ModelError::Unusable { .. })
    ));
    let model = models.inspect(&repository, &digest).await.unwrap();
    let blob = model
        .oci
        .iter()
        .find(|file| file.path.starts_with("blobs/sha256:"))
        .unwrap();
    assert_eq!(
        blob.read(ByteRange::new(0, 100)).await.unwrap(),
        "something"
    );
    assert_eq!(model.manifest.layers.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_is_not_what_its_digest_says_is_an_error() {
    let (content, repository) = registry().await;
    let (digest, _) = push_shards(&content, "v1");
    let config = Digest::of(br#"{"descriptor":{"created":"2025-10-03T01:02:03Z"}}"#);
    let wrong = r#"{"descriptor":{"created":"2025-10-03T01:02:04Z"}}"#;
    lock(&content.blobs).insert(config, Bytes::from_static(wrong.as_bytes()));
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path(), LONG, false);
    let error = models.open(&repository, &digest).await.unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Blob {
                source: crate::blob::BlobError::Corrupt { .. },
                ..
            }
        ),
        "{error:?}"
    );
}

/// A kit whose model is at `path`, with these layers; gives its digest.
fn push_kit(content: &Content, tag: &str, path: &str, layers: &[Value]) -> Digest {
    let config = json!({"manifestVersion": "1.0.0", "model": {"path": path}}).to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.kitops.modelkit.config.v1+json",
            "size": config.len(),
            "digest": content.add(config),
        },
        "layers": layers,
    });
    let digest = content.add(manifest.to_string());
    lock(&content.tags).insert(tag.to_owned(), digest);
    digest
}

/// A layer of a kit with one file.
fn kit_layer(content: &Content, kind: &str, path: &str, bytes: &[u8]) -> Value {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, path, bytes).unwrap();
    let kind = format!("application/vnd.kitops.modelkit.{kind}.v1.tar");
    content.layer(&kind, tar.into_inner().unwrap())
}

fn paths(model: &Model) -> Vec<&str> {
    model.files.iter().map(|file| file.path.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_kits_is_one_model_and_stays_what_it_was() {
    let (content, repository) = registry().await;
    let (other, elsewhere) = registry().await;
    let root = |bytes: &[u8]| {
        let layers = [
            kit_layer(&other, "model", "m/model.bin", bytes),
            kit_layer(&other, "modelpart", "m/part.bin", b"part"),
            kit_layer(&other, "code", "not-of-the-model.py", b"code"),
        ];
        push_kit(&other, "v1", "m", &layers)
    };
    root(b"first");
    let own = kit_layer(&content, "modelpart", "m/part.bin", b"another part");
    push_kit(
        &content,
        "middle",
        &format!("{elsewhere}:v1"),
        std::slice::from_ref(&own),
    );
    let code = kit_layer(&content, "code", "src/run.py", b"run");
    let digest = push_kit(&content, "top", &format!("{repository}:middle"), &[code]);

    let dir = tempfile::tempdir().unwrap();
    let wanted = ["Kitfile", "m/model.bin", "m/part.bin", "src/run.py"];
    let read = async |model: &Model, path: &str| {
        let file = model.file(path).unwrap();
        file.read(ByteRange::new(0, u64::MAX)).await.unwrap()
    };
    {
        let models = models(dir.path(), LONG, false);
        let model = models.open(&repository, &digest).await.unwrap();
        assert_eq!(paths(&model), wanted);
        assert_eq!(read(&model, "m/model.bin").await, "first");
        assert_eq!(
            read(&model, "m/part.bin").await,
            "another part",
            "the nearer kit's"
        );
        let notes = model.notes.join("\n");
        assert!(
            notes.contains(&format!("is that of {elsewhere}:v1")),
            "{notes}"
        );
        // Config and code of its own, the part of the kit between, model and part of the first.
        assert_eq!(model.blobs.len(), 5);
        // Another repository with the same kit is not asked for what is not the kit's.
        let further = Repository::new(repository.host(), "org/copy").unwrap();
        models.open(&further, &digest).await.unwrap();
        for blob in &model.blobs {
            blob.complete().await.unwrap();
        }
        assert!(model.is_complete());
    }
    // The tag moves, but what the kit's digest shows here does not, over a restart and without any registry too.
    root(b"second");
    for offline in [false, true] {
        let models = models(dir.path(), LONG, offline);
        let model = models.open(&repository, &digest).await.unwrap();
        assert_eq!(paths(&model), wanted);
        assert_eq!(read(&model, "m/model.bin").await, "first");
    }
    // Where nothing is known of the kit, the tag is what it is now.
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path(), LONG, false);
    let model = models.open(&repository, &digest).await.unwrap();
    assert_eq!(read(&model, "m/model.bin").await, "second");
}

#[tokio::test(flavor = "multi_thread")]
async fn chains_that_do_not_end_say_so_and_what_is_pushed_later_is_found() {
    let (content, repository) = registry().await;
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path(), LONG, false);
    let problem = async |digest: &Digest| {
        let model = models.inspect(&repository, digest).await.unwrap();
        model.problem.clone()
    };
    push_kit(&content, "a", &format!("{repository}:b"), &[]);
    let b = push_kit(&content, "b", &format!("{repository}:a"), &[]);
    let said = problem(&b).await.unwrap();
    assert!(said.contains("in a circle"), "{said}");

    let layer = kit_layer(&content, "model", "model.bin", b"model");
    push_kit(&content, "chain-0", "model.bin", &[layer]);
    let mut last = b;
    for n in 1..=11 {
        let path = format!("{repository}:chain-{}", n - 1);
        last = push_kit(&content, &format!("chain-{n}"), &path, &[]);
        let said = problem(&last).await;
        match n {
            11 => assert!(said.unwrap().contains("more than 10"), "{n}"),
            _ => assert_eq!(said, None, "{n}"),
        }
    }

    // Something without a model, something that is not there yet.
    let code = kit_layer(&content, "code", "a.py", b"a");
    push_kit(&content, "code-only", "", &[code]);
    let digest = push_kit(&content, "x", &format!("{repository}:code-only"), &[]);
    assert!(problem(&digest).await.unwrap().contains("code-only"));
    let digest = push_kit(&content, "y", &format!("{repository}:later"), &[]);
    let said = problem(&digest).await.unwrap();
    assert!(said.contains("later"), "{said}");
    let layer = kit_layer(&content, "model", "model.bin", b"model");
    push_kit(&content, "later", "model.bin", &[layer]);
    // That a tag is not there is remembered for some seconds.
    let found = async {
        while problem(&digest).await.is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), found)
        .await
        .unwrap();
    assert_ne!(last, digest);
}
