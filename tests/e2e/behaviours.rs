//! What registries may do on the way of a blob: addresses that expire, tokens that do, storage elsewhere, answers as they come.

use std::fs;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use serde_json::json;
use tempfile::TempDir;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::{Content, digest};
use crate::support::http::{Head, Listener, get, response};
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::process::{Daemon, run, run_with_input};
use crate::support::proxy::{Fault, Proxy};
use crate::support::python;
use crate::support::registry::{Access, Registry};
use crate::support::{PATIENCE, eventually, free_address, heavy, scratch};

const MIB: u64 = 1 << 20;

fn weights(size: u64, seed: u64) -> Artifact {
    let bytes = Content::new(seed).bytes(0, size as usize);
    Artifact::docker_v02().layer(Layer::bytes(DOCKER_SAFETENSORS, bytes).at("model.safetensors"))
}

/// nginx as a content network: each address carries its end and a keyed hash of it (`secure_link`), and whoever sends credentials along
/// is refused, as by S3.
struct Expiring {
    address: SocketAddr,
    _daemon: Daemon,
    dir: TempDir,
}

impl Expiring {
    const KEY: &str = "of no use outside this test";

    /// Of the files below `root`, at `rate` bytes a second for each connection.
    fn start(root: &Path, rate: &str) -> Self {
        let dir = scratch("cdn");
        let at = dir.path().display();
        let address = free_address();
        let config = format!(
            "user root; daemon off; worker_processes 1; pid {at}/pid; error_log {at}/errors;
             events {{ worker_connections 256; }}
             http {{
               log_format all '$status $body_bytes_sent $uri'; access_log {at}/access all;
               client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;
               server {{
                 listen {address}; root {root}; limit_rate {rate};
                 secure_link $arg_md5,$arg_expires; secure_link_md5 \"$secure_link_expires$uri {key}\";
                 if ($http_authorization) {{ return 400; }}
                 if ($secure_link = \"\") {{ return 403; }}
                 if ($secure_link = \"0\") {{ return 403; }}
               }}
             }}",
            root = root.display(),
            key = Self::KEY,
        );
        let file = dir.path().join("nginx.conf");
        fs::write(&file, config).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-c").arg(&file);
        let daemon = Daemon::start("nginx", &mut command, &dir.path().join("log"));
        eventually(PATIENCE, "nginx listens", || {
            TcpStream::connect(address).ok()
        });
        Self {
            address,
            _daemon: daemon,
            dir,
        }
    }

    /// An address that is good for `life`, signed by `openssl`.
    fn sign(address: SocketAddr, path: &str, life: Duration) -> String {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        let expires = (now + life).as_secs();
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-md5", "-binary"]);
        let text = format!("{expires}{path} {}", Self::KEY);
        let hash = run_with_input(&mut openssl, text.as_bytes(), PATIENCE).ok_bytes();
        use base64::Engine;
        let hash = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(hash);
        format!("http://{address}{path}?md5={hash}&expires={expires}")
    }

    /// How many requests had this status.
    fn count(&self, status: u16) -> usize {
        let log = fs::read_to_string(self.dir.path().join("access")).unwrap_or_default();
        let start = format!("{status} ");
        log.lines().filter(|line| line.starts_with(&start)).count()
    }
}

/// A registry that sends whoever wants a blob to a content network; everything else is the real registry's.
struct Front {
    listener: Listener,
    redirects: Arc<AtomicUsize>,
}

impl Front {
    fn start(registry: &Registry, cdn: SocketAddr, life: Duration) -> Self {
        let (upstream, redirects) = (registry.address(), Arc::new(AtomicUsize::new(0)));
        let counted = redirects.clone();
        let serve = move |mut stream: TcpStream| -> std::io::Result<()> {
            let mut reader = BufReader::new(stream.try_clone()?);
            while let Some(mut head) = Head::read(&mut reader) {
                if let (true, Some((_, hex))) = (
                    head.method() == "GET",
                    head.target().split_once("/blobs/sha256:"),
                ) {
                    counted.fetch_add(1, Ordering::Relaxed);
                    let path = format!("/{}/{hex}/data", &hex[..2]);
                    let location = Expiring::sign(cdn, &path, life);
                    stream.write_all(&response(307, &[("Location", &location)], b""))?;
                    continue;
                }
                head.set("Connection", "close");
                let mut upstream = TcpStream::connect(upstream)?;
                upstream.write_all(&head.encode())?;
                std::io::copy(&mut upstream, &mut stream)?;
                return stream.shutdown(std::net::Shutdown::Both);
            }
            Ok(())
        };
        Self {
            listener: Listener::start(move |stream, _| drop(serve(stream))),
            redirects,
        }
    }

    fn redirects(&self) -> usize {
        self.redirects.load(Ordering::Relaxed)
    }
}

#[test]
fn an_address_that_expires_is_renewed_in_the_middle_of_a_file() {
    let _alone = heavy();
    let size = 40 * MIB;
    let registry = Registry::start(Access::Token);
    registry.tokens().set_anonymous(false);
    let published = weights(size, 350).publish(&registry, "org/m:v1");
    let file = registry.blob_file(&published.layers[0]);
    let cdn = Expiring::start(file.ancestors().nth(3).unwrap(), "1500k");
    let life = Duration::from_secs(2);
    // nginx itself: good, expired, forged, with credentials.
    let path = file.strip_prefix(file.ancestors().nth(3).unwrap()).unwrap();
    let url = |life| Expiring::sign(cdn.address, &format!("/{}", path.display()), life);
    let status = |url: &str, headers: &[(&str, &str)]| {
        let target = url.split_once(&cdn.address.to_string()).unwrap().1;
        let headers: Vec<_> = headers
            .iter()
            .copied()
            .chain([("Range", "bytes=0-9")])
            .collect();
        get(cdn.address, target, &headers).unwrap().0.status()
    };
    let good = url(Duration::from_secs(60));
    assert_eq!(status(&good, &[]), 206);
    assert_eq!(status(&good, &[("Authorization", "Basic x")]), 400);
    assert_eq!(status(&good.replace("md5=", "md5=x"), &[]), 403);
    let expired = url(Duration::ZERO);
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(status(&expired, &[]), 403);

    let front = Front::start(&registry, cdn.address, life);
    let auth = scratch("auth");
    let host = front.listener.address.to_string();
    let text = fs::read_to_string(registry.auth_file())
        .unwrap()
        .replace(&registry.host(), &host);
    fs::write(auth.path().join("auth.json"), text).unwrap();
    let flags = [
        "--auth-file".to_owned(),
        auth.path().join("auth.json").to_str().unwrap().to_owned(),
    ];
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), flags);
    let below = format!("{host}/org/m:v1/model.safetensors");
    let (refused, denied) = (cdn.count(403), cdn.count(400));
    let began = std::time::Instant::now();
    assert!(mount.read(&below) == Content::new(350).bytes(0, size as usize));
    let took = began.elapsed();
    assert!(
        took > life * 2,
        "it was over before an address expired: {took:?}"
    );
    let (renewed, refused) = (front.redirects(), cdn.count(403) - refused);
    assert!(renewed >= 2, "{renewed} addresses in {took:?}");
    assert!(refused > 0, "no address expired in {took:?}");
    // One refusal and one renewal each time, for all parts that are under way at once.
    let lives = took.as_secs() as usize / 2 + 2;
    assert!(
        renewed <= 16 * lives && refused <= 16 * lives,
        "{renewed} addresses, {refused} refusals in {took:?}"
    );
    assert_eq!(cdn.count(400), denied, "nobody sends credentials along");
    mount.verified(&below);
}

#[test]
fn tokens_that_expire_all_the_time_do_not_disturb_a_long_read() {
    let _alone = heavy();
    let size = 36 * MIB;
    let registry = Registry::start(Access::Token);
    weights(size, 351).publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    proxy.always("/blobs/", Fault::Throttle(MIB));
    // Said to live for minutes and dead in two seconds: a 401 is what tells.
    registry
        .tokens()
        .set_lifetime(Duration::from_secs(2), Some(Duration::from_secs(300)));
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), registry.ocifs_args());
    let began = std::time::Instant::now();
    let found = mount.read(&format!("{}/org/m:v1/model.safetensors", proxy.host()));
    assert!(found == Content::new(351).bytes(0, size as usize));
    assert!(
        began.elapsed() > Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    let refused = proxy
        .records()
        .iter()
        .filter(|record| record.status == 401)
        .count();
    assert!(refused >= 2, "{refused} refusals in {:?}", began.elapsed());
    assert!(registry.tokens().issued() >= 2);
}

/// docker-registry that keeps blobs in S3 (moto, whose bucket is in its memory) and sends clients there by pre-signed addresses.
#[test]
fn blobs_in_s3_come_from_there() {
    let storage = free_address();
    let dir = scratch("s3");
    let mut command = python::module_command("moto.server");
    command.args(["-H", "127.0.0.1", "-p", &storage.port().to_string()]);
    for (name, _) in std::env::vars_os() {
        // Whoever runs the tests may have an account.
        if name.to_string_lossy().starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    let _moto = Daemon::start("moto", &mut command, &dir.path().join("log"));
    eventually(PATIENCE, "moto answers", || {
        let bucket = format!("http://{storage}/models");
        let curl = run("curl", ["-s", "-f", "-X", "PUT", &bucket]);
        curl.status.success().then_some(())
    });
    let registry = Registry::start_with(Access::Open, |_| {
        let s3 = json!({
            "region": "us-east-1", "bucket": "models", "regionendpoint": format!("http://{storage}"), "accesskey": "a",
            "secretkey": "s", "secure": false, "v4auth": true,
        });
        json!({"storage": {"filesystem": null, "s3": s3}})
    });
    let size = 20 * MIB;
    let published = weights(size, 352).publish(&registry, "org/m:v1");
    let blob = format!("/v2/org/m/blobs/{}", published.layers[0]);
    let (head, _) = get(registry.address(), &blob, &[]).unwrap();
    let location = head.get("location").unwrap_or_default();
    assert!(
        head.status() == 307 && location.contains("X-Amz-Signature="),
        "{head:?}"
    );
    let proxy = Proxy::start(registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let below = format!("{}/org/m:v1/model.safetensors", proxy.host());
    assert!(mount.read_at(&below, 7 * MIB, 100_000) == Content::new(352).bytes(7 * MIB, 100_000));
    assert!(mount.read(&below) == Content::new(352).bytes(0, size as usize));
    let signed = proxy.count(&published.layers[0]);
    assert!(
        (1..=3).contains(&signed),
        "a kept address serves all parts: {:?}",
        proxy.records()
    );
    assert!(
        proxy.sent("/blobs/") < MIB,
        "the bytes do not come through the registry"
    );
    // An address is signed for the method that it was asked with: what a HEAD is told is of no use for a GET.
    let records = proxy.records();
    let mut of_blobs = records
        .iter()
        .filter(|record| record.path.contains("/blobs/"));
    assert!(of_blobs.all(|record| record.method == "GET"), "{records:?}");
}

/// A registry of its own kind: everything in chunks and without lengths, no digests in headers, no Accept-Ranges, HEAD unknown, open ranges
/// refused, relative redirects.
#[test]
fn a_registry_that_says_as_little_as_it_may_is_understood() {
    let model = SampleModel::new(353);
    let layout = scratch("layout");
    let published = model.docker_v02().write(layout.path(), "v1");
    let blobs = layout.path().join("blobs/sha256");
    let manifest = published.digest.clone();
    let open_ranges = Arc::new(Mutex::new(Vec::new()));
    let seen = open_ranges.clone();
    let serve = move |mut stream: TcpStream| -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(head) = Head::read(&mut reader) {
            let target = head.target().to_owned();
            let wanted = match target.rsplit_once('/') {
                _ if head.method() != "GET" => {
                    stream.write_all(&response(405, &[], b""))?;
                    continue;
                }
                Some((before, "v1")) if before.ends_with("/manifests") => manifest.clone(),
                Some((before, name)) if before.ends_with("/blobs") => {
                    let location = format!("../../../store/{name}");
                    stream.write_all(&response(302, &[("Location", &location)], b""))?;
                    continue;
                }
                Some((_, name)) => name.to_owned(),
                None => String::new(),
            };
            let Ok(bytes) = fs::read(blobs.join(wanted.trim_start_matches("sha256:"))) else {
                stream.write_all(&response(404, &[], b""))?;
                continue;
            };
            let mut first = "HTTP/1.1 200 OK\r\n".to_owned();
            let mut part = bytes.as_slice();
            if let Some(range) = head
                .get("range")
                .and_then(|range| range.strip_prefix("bytes="))
            {
                let (start, end) = range.split_once('-').unwrap_or((range, ""));
                let (Ok(start), Ok(end)) = (start.parse::<usize>(), end.parse::<usize>()) else {
                    seen.lock().unwrap().push(range.to_owned());
                    stream.write_all(&response(416, &[], b""))?;
                    continue;
                };
                let end = end.min(bytes.len() - 1);
                first = format!(
                    "HTTP/1.1 206 Part\r\nContent-Range: bytes {start}-{end}/{}\r\n",
                    bytes.len()
                );
                part = &bytes[start..=end];
            }
            write!(stream, "{first}Transfer-Encoding: chunked\r\n\r\n")?;
            for piece in part.chunks(33_333) {
                write!(stream, "{:x}\r\n", piece.len())?;
                stream.write_all(piece)?;
                stream.write_all(b"\r\n")?;
            }
            stream.write_all(b"0\r\n\r\n")?;
        }
        Ok(())
    };
    let listener = Listener::start(move |stream, _| drop(serve(stream)));
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    let below = format!("{}/org/m:v1", listener.address);
    assert_same_files(&mount.files(&below), model.files());
    assert_eq!(
        mount.xattr(&below, "user.oci.digest").as_deref(),
        Some(published.digest.as_str())
    );
    assert_eq!(
        digest(&mount.read(&format!("{below}/.oci/manifest.json"))),
        published.digest
    );
    assert!(open_ranges.lock().unwrap().is_empty(), "{open_ranges:?}");
}

#[test]
fn manifests_are_fetched_once_and_never_by_listing() {
    let model = SampleModel::new(354);
    let registry = Registry::open();
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    let gets = || {
        let records = proxy.records();
        let is_get = |record: &&crate::support::proxy::Record| {
            record.method == "GET" && record.path.contains("/manifests/")
        };
        records.iter().filter(is_get).count()
    };
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--tag-ttl", "1s"]);
    let host = proxy.host();
    // Listings of all kinds, of what is there and of what is not.
    for below in ["", &host, &format!("{host}/org"), &format!("{host}/org/m")] {
        mount.list(below);
    }
    assert_eq!(gets(), 0, "{:?}", proxy.records());
    for round in 0..3 {
        assert_same_files(
            &mount.files(&format!("{host}/org/m:v1")),
            &model.v01_files(),
        );
        assert_eq!(gets(), 1, "round {round}: {:?}", proxy.records());
        std::thread::sleep(Duration::from_millis(1300));
    }
    let heads = proxy
        .records()
        .iter()
        .filter(|record| record.method == "HEAD")
        .count();
    assert!(
        heads >= 2,
        "the tag was asked again, by what is not counted: {:?}",
        proxy.records()
    );
    // Another process with the same cache, too.
    let cache_dir = cache.path().to_str().unwrap();
    run_ocifs([
        "pull",
        "--cache-dir",
        cache_dir,
        &format!("{host}/org/m:v1"),
    ])
    .ok();
    assert_eq!(gets(), 1, "{:?}", proxy.records());
    mount.unmount();
}
