//! Registries that are busy, and tokens that expire: a read waits and succeeds.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_SAFETENSORS, Layer, Published, tar,
};
use crate::support::certs::Certs;
use crate::support::content::Content;
use crate::support::mount::Mount;
use crate::support::process::Daemon;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::{Access, Registry};
use crate::support::{PATIENCE, eventually, free_address, scratch};

const SIZE: u64 = 9_000_000;

fn publish(registry: &Registry, seed: u64) -> Published {
    Artifact::docker_v01()
        .layer(
            Layer::bytes(
                DOCKER_SAFETENSORS,
                Content::new(seed).bytes(0, SIZE as usize),
            )
            .at("model.safetensors"),
        )
        .layer(Layer::bytes(
            DOCKER_CONFIG_TAR,
            tar([("config.json", b"{}".as_slice())]),
        ))
        .publish(registry, "org/m:v1")
}

fn busy(status: u16, seconds: u64) -> Fault {
    Fault::Status(
        status,
        vec![("Retry-After".to_owned(), seconds.to_string())],
    )
}

#[test]
fn a_busy_registry_is_asked_again_when_it_said_so() {
    let registry = Registry::open();
    let published = publish(&registry, 120);
    let proxy = Proxy::start(registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let weights = format!("{}/org/m:v1/model.safetensors", proxy.host());
    proxy.times("/manifests/", 1, busy(429, 1));
    let began = Instant::now();
    assert_eq!(mount.stat(&weights).len(), SIZE);
    assert!(
        began.elapsed() >= Duration::from_millis(900),
        "{:?}",
        began.elapsed()
    );

    for (round, fault) in [
        busy(429, 2),
        busy(503, 2),
        Fault::Status(502, vec![]),
        Fault::Status(500, vec![]),
    ]
    .into_iter()
    .enumerate()
    {
        let offset = round as u64 * 2_000_000;
        let waits = matches!(&fault, Fault::Status(_, headers) if !headers.is_empty());
        proxy.times(&published.layers[0], 1, fault.clone());
        let began = Instant::now();
        assert!(
            mount.read_at(&weights, offset, 1000) == Content::new(120).bytes(offset, 1000),
            "{fault:?}"
        );
        if waits {
            assert!(
                began.elapsed() >= Duration::from_millis(1900),
                "{fault:?}: asked again after {:?}",
                began.elapsed()
            );
        }
    }
    let refused = proxy
        .records()
        .iter()
        .filter(|record| record.status >= 429)
        .count();
    assert_eq!(refused, 5, "every fault was met");
}

#[test]
fn several_refusals_in_a_row_are_waited_out() {
    let registry = Registry::open();
    let published = publish(&registry, 121);
    let proxy = Proxy::start(registry.address());
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    proxy.times(&published.layers[0], 5, Fault::Status(503, vec![]));
    let found = mount.read(&format!("{}/org/m:v1/model.safetensors", proxy.host()));
    assert!(found == Content::new(121).bytes(0, SIZE as usize));
}

#[test]
fn what_is_not_found_is_not_asked_for_again_and_again() {
    let registry = Registry::open();
    let published = publish(&registry, 122);
    let proxy = Proxy::start(registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    proxy.always(&published.layers[0], Fault::Status(404, vec![]));
    let began = Instant::now();
    assert!(
        mount
            .try_read_at(
                &format!("{}/org/m:v1/model.safetensors", proxy.host()),
                0,
                1000
            )
            .is_err()
    );
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    assert!(
        proxy.count(&published.layers[0]) <= 10,
        "{:?}",
        proxy.records()
    );
}

#[test]
fn a_token_that_expires_in_the_middle_is_renewed() {
    let registry = Registry::start(Access::Token);
    publish(&registry, 123);
    let cache = scratch("cache");
    let mut flags = registry.ocifs_args();
    flags.extend(["--prefetch".to_owned(), "none".to_owned()]);
    let mount = Mount::start(cache.path(), flags);
    let weights = format!("{}/org/m:v1/model.safetensors", registry.host());
    // Accepted for three seconds, whatever is said: the client learns of it by a 401.
    registry
        .tokens()
        .set_lifetime(Duration::from_secs(3), Some(Duration::from_secs(300)));
    assert!(mount.read_at(&weights, 0, 1000) == Content::new(123).bytes(0, 1000));
    let before = registry.tokens().issued();
    std::thread::sleep(Duration::from_secs(5));
    assert!(mount.read_at(&weights, 4_000_000, 1000) == Content::new(123).bytes(4_000_000, 1000));
    let after = registry.tokens().issued();
    assert!(after > before, "the token had not expired");
    assert!(
        after - before <= 2,
        "{} tokens for one read",
        after - before
    );

    // Said in time: renewed without a refusal. Two spellings of the lifetime that need no 401.
    registry
        .tokens()
        .set_lifetime(Duration::from_secs(300), None);
    std::thread::sleep(Duration::from_secs(5));
    assert!(mount.read_at(&weights, 8_000_000, 1000) == Content::new(123).bytes(8_000_000, 1000));
}

#[test]
fn many_readers_share_one_token() {
    let registry = Registry::start(Access::Token);
    publish(&registry, 124);
    registry.tokens().set_anonymous(false);
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), registry.ocifs_args());
    let weights = format!("{}/org/m:v1/model.safetensors", registry.host());
    let before = registry.tokens().issued();
    std::thread::scope(|scope| {
        for index in 0..16 {
            let (mount, weights) = (&mount, &weights);
            scope.spawn(move || {
                let offset = index * 500_000;
                assert!(
                    mount.read_at(weights, offset, 5000) == Content::new(124).bytes(offset, 5000)
                );
            });
        }
    });
    let issued = registry.tokens().issued() - before;
    assert!((1..=3).contains(&issued), "{issued} tokens");
}

#[test]
fn a_slow_registry_is_waited_for() {
    let registry = Registry::open();
    publish(&registry, 125);
    let proxy = Proxy::start(registry.address());
    proxy.always("/v2/", Fault::Delay(Duration::from_millis(800)));
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    let found = mount.read(&format!("{}/org/m:v1/model.safetensors", proxy.host()));
    assert!(found == Content::new(125).bytes(0, SIZE as usize));
}

/// nginx before a registry.
struct Nginx {
    address: SocketAddr,
    log: PathBuf,
    _daemon: Daemon,
    dir: TempDir,
}

/// A request that nginx has answered.
#[derive(Debug)]
struct Answered {
    /// Seconds of the clock.
    begun: f64,
    connection: String,
    protocol: String,
    status: u16,
    sent: u64,
    target: String,
}

impl Nginx {
    /// `http` and `server` are lines of those blocks of its configuration; with `tls` it speaks HTTP/2 as well.
    fn before(registry: &Registry, tls: bool, http: &str, server: &str) -> Self {
        let dir = scratch("nginx");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let mut listen = String::new();
        if tls {
            let certs = Certs::make(dir.path());
            listen = format!(
                "ssl http2; ssl_certificate {}; ssl_certificate_key {}",
                certs.certificate.display(),
                certs.key.display()
            );
        }
        let address = free_address();
        let config = format!(
            "daemon off; worker_processes 1; user root; pid {pid}; error_log {errors}; events {{}} \
             http {{ log_format all '$msec $request_time $connection $server_protocol $status $body_bytes_sent $uri'; \
             access_log {log} all; client_max_body_size 0; proxy_buffering off; proxy_http_version 1.1; \
             proxy_set_header Host $http_host; {http} \
             server {{ listen {address} {listen}; location / {{ {server} proxy_pass http://{behind}; }} }} }}",
            pid = path("pid"),
            errors = path("errors"),
            log = path("access"),
            behind = registry.address(),
        );
        fs::write(dir.path().join("nginx.conf"), config).unwrap();
        let mut command = Command::new("nginx");
        command.args([
            "-c",
            &path("nginx.conf"),
            "-p",
            &path(""),
            "-e",
            &path("errors"),
        ]);
        let daemon = Daemon::start("nginx", &mut command, &dir.path().join("output"));
        eventually(PATIENCE, "nginx answers", || {
            TcpStream::connect(address).is_ok().then_some(())
        });
        Self {
            address,
            log: dir.path().join("access"),
            _daemon: daemon,
            dir,
        }
    }

    fn host(&self) -> String {
        format!("localhost:{}", self.address.port())
    }

    /// Everything answered so far, in the order of the beginnings.
    fn answered(&self) -> Vec<Answered> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let mut all: Vec<Answered> = log
            .lines()
            .map(|line| {
                let words: Vec<&str> = line.split(' ').collect();
                let ended: f64 = words[0].parse().unwrap();
                let took: f64 = words[1].parse().unwrap();
                Answered {
                    begun: ended - took,
                    connection: words[2].to_owned(),
                    protocol: words[3].to_owned(),
                    status: words[4].parse().unwrap(),
                    sent: words[5].parse().unwrap(),
                    target: words[6].to_owned(),
                }
            })
            .collect();
        all.sort_by(|a, b| a.begun.total_cmp(&b.begun));
        all
    }
}

fn publish_large(registry: &Registry, seed: u64, size: usize) {
    Artifact::docker_v01()
        .layer(
            Layer::bytes(DOCKER_SAFETENSORS, Content::new(seed).bytes(0, size))
                .at("model.safetensors"),
        )
        .publish(registry, "org/m:v1");
}

#[test]
fn a_rate_limit_of_nginx_is_kept_by_all_requests_together() {
    const LARGE: usize = 60_000_000;
    let registry = Registry::open();
    publish_large(&registry, 126, LARGE);
    let nginx = Nginx::before(
        &registry,
        false,
        "limit_req_zone $server_addr zone=all:1m rate=3r/s; limit_req_status 429; \
         map $status $wait { 429 1; default ''; }",
        "limit_req zone=all burst=1 nodelay; add_header Retry-After $wait always;",
    );
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    let weights = format!("{}/org/m:v1/model.safetensors", nginx.host());
    let found = mount.read(&weights);
    assert!(found == Content::new(126).bytes(0, LARGE));
    let answered = nginx.answered();
    let refused: Vec<f64> = answered
        .iter()
        .filter(|answer| answer.status == 429)
        .map(|answer| answer.begun)
        .collect();
    assert!(!refused.is_empty(), "the limit was met");
    // Each refusal holds back whoever is not on the way already; one that asks again may be refused again.
    for at in refused {
        let during = |answer: &&Answered| answer.begun > at + 0.4 && answer.begun < at + 0.9;
        assert_eq!(answered.iter().filter(during).count(), 0, "{answered:?}");
    }
}

#[test]
fn parts_have_connections_of_their_own_where_http2_is_spoken() {
    const LARGE: usize = 60_000_000;
    let registry = Registry::open();
    publish_large(&registry, 127, LARGE);
    for (http, parts_by) in [("auto", "HTTP/1.1"), ("1.1", "HTTP/1.1"), ("2", "HTTP/2.0")] {
        let nginx = Nginx::before(&registry, true, "", "");
        let cache = scratch("cache");
        let authority = nginx.dir.path().join("ca.crt").display().to_string();
        let mount = Mount::start(
            cache.path(),
            ["--ca-file", &authority, "-o", &format!("http={http}")],
        );
        let found = mount.read(&format!("{}/org/m:v1/model.safetensors", nginx.host()));
        assert!(found == Content::new(127).bytes(0, LARGE));
        let answered = nginx.answered();
        let parts: Vec<_> = answered
            .iter()
            .filter(|answer| answer.sent > 4 << 20)
            .collect();
        assert!(parts.len() >= 4, "{http}: {answered:?}");
        assert!(
            parts.iter().all(|answer| answer.protocol == parts_by),
            "{http}: {answered:?}"
        );
        let mut connections: Vec<_> = parts.iter().map(|answer| &answer.connection).collect();
        connections.sort();
        connections.dedup();
        if http == "2" {
            assert_eq!(connections.len(), 1);
        } else {
            assert!(
                (2..=16).contains(&connections.len()),
                "{http}: {answered:?}"
            );
        }
        let light = if http == "1.1" {
            "HTTP/1.1"
        } else {
            "HTTP/2.0"
        };
        assert!(
            answered
                .iter()
                .filter(|answer| answer.target.contains("/manifests/"))
                .all(|answer| answer.protocol == light),
            "{http}: {answered:?}"
        );
    }
}
