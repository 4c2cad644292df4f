//! Registries that are busy, and tokens that expire: a read waits and succeeds.

use std::time::{Duration, Instant};

use crate::support::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_SAFETENSORS, Layer, Published, tar,
};
use crate::support::content::Content;
use crate::support::mount::Mount;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::{Access, Registry};
use crate::support::scratch;

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
