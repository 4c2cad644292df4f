//! kill -9 at random moments of cold reads, hundreds of times: after each one a new daemon shows every byte right, and what had come before
//! is not fetched again.

use std::fs;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer, Published};
use crate::support::content::{Content, digest_file};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{heavy, scale, scratch};

const SIZE: u64 = (2 << 20) + 12_345;
/// Blobs of the model; when all were read the cache is emptied, and they are cold again.
const BLOBS: u64 = 20;
/// A cold read takes a tenth of a second.
const RATE: u64 = 20 << 20;

fn content(blob: u64) -> Content {
    Content::new(7000 + blob)
}

fn is_right(blob: u64, bytes: &[u8]) -> bool {
    bytes == content(blob).bytes(0, SIZE as usize)
}

struct Site {
    _registry: Registry,
    proxy: Proxy,
    published: Published,
}

impl Site {
    fn new() -> Self {
        let registry = Registry::open();
        let layers = (0..BLOBS).map(|blob| {
            let bytes = content(blob).bytes(0, SIZE as usize);
            Layer::bytes(DOCKER_SAFETENSORS, bytes).at(&format!("w{blob}"))
        });
        let published = Artifact::docker_v02()
            .layers(layers)
            .publish(&registry, "org/m:v1");
        let proxy = Proxy::start(registry.address());
        proxy.always("/blobs/", Fault::Throttle(RATE));
        Self {
            _registry: registry,
            proxy,
            published,
        }
    }

    fn file(&self, blob: u64) -> String {
        format!("{}/org/m:v1/w{blob}", self.proxy.host())
    }

    /// Begins to read a file; the read ends with an error when its daemon is killed.
    fn reader(&self, mount: &Mount, blob: u64) -> JoinHandle<std::io::Result<Vec<u8>>> {
        let path = mount.path(&self.file(blob));
        std::thread::spawn(move || fs::read(path))
    }

    /// Bytes of blobs that were sent beyond what they have.
    fn sent_again(&self) -> u64 {
        self.proxy.settle();
        let again = |layer: &String| self.proxy.sent(layer).saturating_sub(SIZE);
        self.published.layers.iter().map(again).sum()
    }

    /// All is sealed or can be, with the right bytes.
    fn check(&self, cache: &Path) {
        let dir = cache.to_str().unwrap();
        run_ocifs(["cache", "verify", "--cache-dir", dir]).ok();
        for entry in fs::read_dir(cache.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert_eq!(digest_file(&path), format!("sha256:{name}"));
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }
}

#[test]
fn hundreds_of_kills_cost_no_byte() {
    let _heavy = heavy();
    let site = Site::new();
    let seed = std::env::var("OCIFS_TEST_SEED").map_or(0x5eed, |seed| seed.parse().unwrap());
    let mut random = Random(seed);
    let (mut kills, mut again, mut cut) = (0_u64, 0, 0_u64);
    let began = Instant::now();
    while kills < scale(200, 5000) {
        let cache = scratch("cache");
        site.proxy.reset();
        for blob in 0..=BLOBS {
            let mount = Mount::start::<&str>(cache.path(), []);
            if blob > 0 {
                let bytes = mount.read(&site.file(blob - 1));
                assert!(
                    is_right(blob - 1, &bytes),
                    "blob {} of kill {kills}",
                    blob - 1
                );
            }
            if blob == BLOBS {
                mount.unmount();
                break;
            }
            // One of two processes on the cache is killed now and then; the other must not notice.
            let other = (blob % 5 == 4).then(|| {
                let other = Mount::start::<&str>(cache.path(), []);
                let reader = site.reader(&other, blob);
                (other, reader)
            });
            let reader = site.reader(&mount, blob);
            std::thread::sleep(Duration::from_millis(random.below(120)));
            mount.kill();
            kills += 1;
            match reader.join().unwrap() {
                Ok(bytes) => assert!(is_right(blob, &bytes), "blob {blob} of kill {kills}"),
                Err(_) => cut += 1,
            }
            if let Some((other, reader)) = other {
                let bytes = reader.join().unwrap().expect("its daemon lives");
                assert!(is_right(blob, &bytes), "blob {blob} beside kill {kills}");
                other.kill();
                kills += 1;
            }
        }
        again += site.sent_again();
        site.check(cache.path());
    }
    println!(
        "{kills} kills in {:?}, {cut} in the middle of a read, 0 wrong bytes, {} KiB fetched again for each (seed {seed})",
        began.elapsed(),
        again / kills / 1024
    );
    assert!(cut > kills / 4, "only {cut} kills met a read");
    // What was under way between the registry and the disk, the part that was begun at most.
    assert!(again / kills < SIZE / 2, "{again} bytes");
}
