//! Only the bytes that are needed are asked for, counted at the registry on a model of half a gigabyte.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::support::artifact::{
    Artifact, DOCKER_CONFIG_TAR, DOCKER_FILE, DOCKER_SAFETENSORS, Layer, Published, tar,
};
use crate::support::content::{Content, Tensor, digest, digest_file, write_safetensors};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::proxy::Proxy;
use crate::support::python::python;
use crate::support::registry::Registry;
use crate::support::{heavy, scale, scratch};

const MIB: u64 = 1 << 20;
/// Bytes of a tensor.
const TENSOR: u64 = 4 * MIB;

/// Shards of 128 MiB in a registry, by name (`org/named`) and without (`org/nameless`).
struct Big {
    registry: Registry,
    proxy: Proxy,
    named: Published,
    nameless: Published,
    shards: Vec<PathBuf>,
    /// The longest header, its length prefix included.
    header: u64,
    _dir: TempDir,
}

const PER_SHARD: u64 = 32;

fn big() -> Big {
    let dir = scratch("big");
    let count = scale(4, 32);
    let (mut shards, mut weight_map, mut header) = (Vec::new(), serde_json::Map::new(), 0);
    for shard in 0..count {
        let name = format!("model-{:05}-of-{count:05}.safetensors", shard + 1);
        let tensors: Vec<Tensor> = (0..PER_SHARD)
            .map(|index| Tensor {
                name: format!("layers.{}.weight", shard * PER_SHARD + index),
                size: TENSOR,
            })
            .collect();
        header = header.max(write_safetensors(
            &dir.path().join(&name),
            &tensors,
            Content::new(shard),
        ));
        weight_map.extend(
            tensors
                .into_iter()
                .map(|tensor| (tensor.name, name.clone().into())),
        );
        shards.push(dir.path().join(name));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map}).to_string();
    let others = [
        ("config.json", b"{\"big\": true}".as_slice()),
        ("model.safetensors.index.json", index.as_bytes()),
    ];
    let registry = Registry::open();
    let nameless = Artifact::docker_v01()
        .layers(
            shards
                .iter()
                .map(|path| Layer::file(DOCKER_SAFETENSORS, path)),
        )
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, tar(others)))
        .publish(&registry, "org/nameless:v1");
    let named = Artifact::docker_v02()
        .layers(shards.iter().map(|path| {
            Layer::file(DOCKER_SAFETENSORS, path).at(path.file_name().unwrap().to_str().unwrap())
        }))
        .layers(others.map(|(name, bytes)| Layer::bytes(DOCKER_FILE, bytes).at(name)))
        .publish(&registry, "org/named:v1");
    let proxy = Proxy::start(registry.address());
    Big {
        registry,
        proxy,
        named,
        nameless,
        shards,
        header,
        _dir: dir,
    }
}

impl Big {
    /// Body bytes of each shard that the registry sent since the last reset.
    fn sent(&self) -> Vec<u64> {
        self.proxy.settle();
        self.named.layers[..self.shards.len()]
            .iter()
            .map(|digest| self.proxy.sent(digest))
            .collect()
    }

    fn shard_name(&self, shard: usize) -> &str {
        self.shards[shard].file_name().unwrap().to_str().unwrap()
    }
}

#[test]
fn only_what_is_needed_of_half_a_gigabyte_is_asked_for() {
    let _heavy = heavy();
    let big = big();
    assert_eq!(
        big.named.layers[0], big.nameless.layers[0],
        "both references share their shards"
    );
    let host = big.proxy.host();
    let (named, nameless) = (
        format!("{host}/org/named:v1"),
        format!("{host}/org/nameless:v1"),
    );

    // Named layers: nothing of a weight file for names, sizes and the config, whatever the prefetch.
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    for _ in 0..2 {
        assert_eq!(
            mount.list(&named).len(),
            big.shards.len() + 3,
            "{:?}",
            mount.list(&named)
        );
        assert_eq!(
            mount.read(&format!("{named}/config.json")),
            b"{\"big\": true}"
        );
        crate::support::process::run("ls", ["-lR", mount.path(&named).to_str().unwrap()]).ok();
    }
    assert!(
        big.sent().iter().all(|&bytes| bytes == 0),
        "{:?}",
        big.sent()
    );
    let manifests = big
        .proxy
        .records()
        .into_iter()
        .filter(|r| r.method == "GET" && r.path.contains("/manifests/"));
    assert_eq!(manifests.count(), 1, "{:?}", big.proxy.records());
    mount.unmount();

    // Nameless ones: the header of each, to prove its name. One small read may cover the prefix and the header.
    let cache = scratch("cache");
    big.proxy.reset();
    let mount = Mount::start::<&str>(cache.path(), []);
    assert_eq!(mount.list(&nameless).len(), big.shards.len() + 3);
    assert_eq!(
        mount.read(&format!("{nameless}/config.json")),
        b"{\"big\": true}"
    );
    assert_eq!(
        mount
            .stat(&format!("{nameless}/{}", big.shard_name(0)))
            .len(),
        big.shards[0].metadata().unwrap().len()
    );
    let limit = big.header.next_multiple_of(64 << 10) + (64 << 10);
    assert!(
        big.sent().iter().all(|&bytes| bytes > 0 && bytes <= limit),
        "{:?}, limit {limit}",
        big.sent()
    );
    mount.unmount();

    // One tensor through the real loader, without prefetch.
    let cache = scratch("cache");
    big.proxy.reset();
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let (shard, tensor) = (2, 17);
    let file = mount.path(&format!("{named}/{}", big.shard_name(shard)));
    let name = format!("layers.{}.weight", shard as u64 * PER_SHARD + tensor);
    let found = python("read_tensor.py", [file.to_str().unwrap(), &name]).ok();
    let wanted = digest(&Content::new(shard as u64).bytes(tensor * TENSOR, TENSOR as usize));
    assert_eq!(format!("sha256:{}", found.trim()), wanted);
    let sent = big.sent();
    let total: u64 = sent.iter().sum();
    assert!((TENSOR..=6 * MIB).contains(&total), "{sent:?}");
    assert_eq!(sent[shard], total, "only that shard was touched: {sent:?}");
    // The next reader of the same tensor needs nobody.
    big.proxy.reset();
    python("read_tensor.py", [file.to_str().unwrap(), &name]).ok();
    assert!(
        big.sent().iter().all(|&bytes| bytes == 0),
        "{:?}",
        big.sent()
    );
    mount.unmount();

    // And then all of it: every byte once, in few requests.
    let cache = scratch("cache");
    big.proxy.reset();
    let mount = Mount::start::<&str>(cache.path(), []);
    for shard in 0..big.shards.len() {
        let file = mount.path(&format!("{named}/{}", big.shard_name(shard)));
        let found = crate::support::within(
            std::time::Duration::from_secs(180),
            "read a shard",
            move || digest_file(&file),
        );
        assert_eq!(found, big.named.layers[shard]);
    }
    let sent = big.sent();
    for (shard, &bytes) in sent.iter().enumerate() {
        let size = big.shards[shard].metadata().unwrap().len();
        assert!(
            bytes >= size && bytes <= size + size / 20,
            "shard {shard} of {size} bytes: {bytes} were sent"
        );
    }
    let requests = big.proxy.count("/blobs/") as u64;
    let total: u64 = sent.iter().sum();
    assert!(
        requests <= total / MIB,
        "{requests} requests for {total} bytes"
    );
    mount.unmount();
    run_ocifs([
        "cache",
        "verify",
        "--cache-dir",
        cache.path().to_str().unwrap(),
    ])
    .ok();
    // The registry saw the same requests as the proxy: nobody went around it.
    assert!(big.registry.log_lines("GET") >= requests as usize);
}
