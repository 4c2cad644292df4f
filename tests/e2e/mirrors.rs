//! Mirrors, by containerd's `hosts.toml`: real pull-through caches, certificates, mirrors that die.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, ocifs};
use crate::support::netns::{Machine, Network};
use crate::support::process::{Daemon, run, run_command};
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::{Access, Registry};
use crate::support::{PATIENCE, eventually, heavy, scale, scratch, within};

/// Writes `hosts.toml` for a registry.
fn hosts(dir: &Path, registry: &str, text: &str) {
    let place = dir.join(registry.replace(':', "_") + "_");
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("hosts.toml"), text).unwrap();
}

fn flags(dir: &Path) -> Vec<String> {
    vec!["--hosts-dir".to_owned(), dir.to_str().unwrap().to_owned()]
}

/// A model with one file of weights.
fn weights(size: u64, seed: u64) -> Artifact {
    let bytes = Content::new(seed).bytes(0, size as usize);
    Artifact::docker_v02().layer(Layer::bytes(DOCKER_SAFETENSORS, bytes).at("model.safetensors"))
}

/// docker-registry 2.8 pulls a blob that it lacks twice, for whoever asks and for itself (registry/proxy/proxyblobstore.go): how much
/// is measured by a client that asks once for each blob as a whole.
#[test]
fn a_pull_through_cache_costs_the_registry_what_one_plain_client_costs() {
    let model = SampleModel::new(320);
    let origin = Registry::open();
    let published = model.docker_v01(true).publish(&origin, "org/m:v1");
    let through = || {
        let counted = Proxy::start(origin.address());
        let mirror = Registry::pull_through(counted.address());
        (counted, mirror)
    };
    let (by_curl, mirror) = through();
    for layer in &published.layers {
        let blob = format!("http://{}/v2/org/m/blobs/{layer}", mirror.host());
        run("curl", ["-s", "-f", "-o", "/dev/null", &blob]).ok();
        by_curl.settle();
    }
    let (counted, mirror) = through();
    let dir = scratch("hosts");
    // Nodes know the registry by a name that leads nowhere: whatever they get is the mirror's.
    let name = "origin.test:5000";
    hosts(
        dir.path(),
        name,
        &format!("[host.\"http://{}\"]", mirror.host()),
    );
    for node in 0..3 {
        let cache = scratch("cache");
        let mount = Mount::start(cache.path(), flags(dir.path()));
        assert_same_files(
            &mount.files(&format!("{name}/org/m:v1")),
            &model.v01_files(),
        );
        mount.unmount();
        counted.settle();
        for layer in &published.layers {
            let (sent, plain) = (counted.sent(layer), by_curl.sent(layer));
            let size = fs::metadata(origin.blob_file(layer)).unwrap().len();
            assert!(plain >= size, "curl came by {layer}");
            assert_eq!(sent, plain, "node {node}, {layer}: {:?}", counted.records());
        }
    }
}

#[test]
fn a_mirror_that_dies_in_the_middle_of_a_file_is_not_noticed() {
    let _alone = heavy();
    let size = scale(48 << 20, 200 << 20);
    let (origin, mut mirror) = (Registry::open(), Registry::open());
    let artifact = weights(size, 321);
    artifact.publish(&origin, "org/m:v1");
    artifact.publish(&mirror, "org/m:v1");
    let (at_origin, at_mirror) = (
        Proxy::start(origin.address()),
        Proxy::start(mirror.address()),
    );
    let dir = scratch("hosts");
    hosts(
        dir.path(),
        &at_origin.host(),
        &format!("[host.\"http://{}\"]", at_mirror.host()),
    );
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), flags(dir.path()));
    at_mirror.always("/blobs/", Fault::Throttle(4 << 20));
    let below = format!("{}/org/m:v1/model.safetensors", at_origin.host());
    let path = mount.path(&below);
    let reader =
        std::thread::spawn(move || within(PATIENCE * 2, "the read", move || fs::read(path)));
    eventually(PATIENCE, "the mirror has sent a part", || {
        (at_mirror.sent("/blobs/") > 6 << 20).then_some(())
    });
    assert_eq!(
        at_origin.sent("/blobs/"),
        0,
        "the registry is not asked while the mirror delivers"
    );
    mirror.stop();
    at_mirror.behave();
    at_mirror.always("/", Fault::Reset(0));
    let found = reader.join().unwrap().expect("the read goes on");
    assert!(found == Content::new(321).bytes(0, size as usize));
    at_origin.settle();
    let rest = at_origin.sent("/blobs/");
    assert!(
        rest > 0 && rest < size - (5 << 20),
        "the registry sent {rest} of {size}"
    );
    let log = mount.log();
    assert!(log.contains("mirror left for the next server"), "{log}");
    mount.verified(&below);
}

#[test]
fn client_certificates_are_shown_to_the_server_that_asks_for_them() {
    let model = SampleModel::new(322);
    let registry = Registry::start_with(Access::Htpasswd, |dir| {
        let tls = json!({"certificate": dir.join("server.crt"), "key": dir.join("server.key"), "clientcas": [dir.join("ca.crt")]});
        json!({"http": {"tls": tls}})
    });
    let certs = registry.certs();
    let (certificate, key) = certs.client("client");
    let host = registry.host();
    // skopeo shows it as well, and is refused without.
    let skopeo_dir = scratch("skopeo");
    fs::copy(&certs.ca, skopeo_dir.path().join("ca.crt")).unwrap();
    let layout = scratch("layout");
    model.docker_v01(true).write(layout.path(), "m");
    let push = || {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "-q", "--dest-cert-dir"]);
        skopeo
            .arg(skopeo_dir.path())
            .arg(format!("oci:{}:m", layout.path().display()));
        skopeo
            .arg(format!("docker://{host}/org/m:v1"))
            .env("REGISTRY_AUTH_FILE", registry.auth_file());
        run_command(&mut skopeo, PATIENCE)
    };
    push().failed();
    fs::copy(&certificate, skopeo_dir.path().join("client.cert")).unwrap();
    fs::copy(&key, skopeo_dir.path().join("client.key")).unwrap();
    push().ok();

    let pull = |dir: &Path| {
        let cache = scratch("cache");
        let mut command = ocifs(["pull", "--cache-dir"]);
        command.arg(cache.path()).args(flags(dir));
        command.arg("--auth-file").arg(registry.auth_file());
        command.arg(format!("{host}/org/m:v1"));
        run_command(&mut command, PATIENCE)
    };
    let text = |name: &Path| name.to_str().unwrap().to_owned();
    let ca = text(&certs.ca);
    let pair = format!(
        "client = [[\"{}\", \"{}\"]]",
        text(&certificate),
        text(&key)
    );
    // Of another authority: a server that names its own is not shown it.
    let others = scratch("others");
    let (other, other_key) = (others.path().join("cert"), others.path().join("key"));
    #[rustfmt::skip]
    run("openssl", [
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=somebody",
        "-keyout", &text(&other_key), "-out", &text(&other),
    ]).ok();
    let several = format!(
        "client = [[\"{}\", \"{}\"], [\"{}\", \"{}\"]]",
        text(&other),
        text(&other_key),
        text(&certificate),
        text(&key)
    );
    let dir = scratch("hosts");
    for (good, toml) in [
        (false, format!("ca = \"{ca}\"")),
        (false, pair.clone()),
        (true, format!("ca = \"{ca}\"\n{pair}")),
        (true, format!("skip_verify = true\n{pair}")),
        (true, format!("ca = \"{ca}\"\n{several}")),
        // As a mirror of itself.
        (
            true,
            format!("[host.\"https://{host}\"]\nca = \"{ca}\"\n{pair}"),
        ),
    ] {
        hosts(dir.path(), &host, &toml);
        let output = pull(dir.path());
        assert_eq!(output.status.success(), good, "{toml}: {output}");
    }
    // An upload shows it too, to the registry and to a host that stands in for it.
    let both = scratch("auth");
    let auth = fs::read(registry.auth_file()).unwrap();
    let auth: serde_json::Value = serde_json::from_slice(&auth).unwrap();
    let login = &auth["auths"][&host];
    let elsewhere = host.replace("localhost", "127.0.0.1");
    assert_ne!(host, elsewhere);
    let names = [&host, &elsewhere];
    let auths: serde_json::Map<_, _> = names
        .into_iter()
        .map(|name| (name.clone(), login.clone()))
        .collect();
    fs::write(
        both.path().join("auth.json"),
        json!({"auths": auths}).to_string(),
    )
    .unwrap();
    let push = |toml: &str, tag: &str| {
        hosts(dir.path(), &host, toml);
        let mut command = ocifs(["push"]);
        command
            .args(flags(dir.path()))
            .arg("--auth-file")
            .arg(both.path());
        command
            .arg(model.path())
            .arg(format!("{host}/org/pushed:{tag}"));
        run_command(&mut command, PATIENCE)
    };
    push(&format!("ca = \"{ca}\""), "none").failed();
    push(&format!("ca = \"{ca}\"\n{several}"), "own").ok();
    push(
        &format!(
            "[host.\"https://{elsewhere}\"]\ncapabilities = [\"push\"]\nca = \"{ca}\"\n{pair}"
        ),
        "elsewhere",
    )
    .ok();

    // docker's way: certificates in the registry's directory.
    let dir = scratch("certs.d");
    let place = dir.path().join(&host);
    fs::create_dir(&place).unwrap();
    for entry in fs::read_dir(skopeo_dir.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), place.join(entry.file_name())).unwrap();
    }
    pull(dir.path()).ok();
    let said = pull(scratch("none").path()).failed();
    assert!(said.contains("certificate"), "{said}");
}

/// nginx as a cache of the registry on another machine: what several ask for at once it fetches once.
fn cache_on(machine: &Machine, dir: &Path, upstream: &Machine) -> Daemon {
    let (dir_text, address) = (dir.display(), machine.address);
    let config = format!(
        "user root; daemon off; worker_processes 1; pid {dir_text}/pid; error_log {dir_text}/log;
         events {{ worker_connections 256; }}
         http {{
           access_log off; client_body_temp_path {dir_text}/body; fastcgi_temp_path {dir_text}/f; uwsgi_temp_path {dir_text}/u;
           scgi_temp_path {dir_text}/s; proxy_temp_path {dir_text}/temp;
           proxy_cache_path {dir_text}/cache keys_zone=blobs:1m max_size=4g inactive=1h;
           server {{
             listen {address}:5000;
             location / {{
               proxy_pass http://{}:5000; proxy_http_version 1.1;
               proxy_cache blobs; proxy_cache_key $uri; proxy_cache_valid 200 1h;
               proxy_cache_lock on; proxy_cache_lock_timeout 1h; proxy_cache_lock_age 1h;
             }}
           }}
         }}",
        upstream.address
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config).unwrap();
    let mut command = machine.command("nginx");
    command.arg("-c").arg(&file);
    machine.listening(Daemon::start("nginx", &mut command, &dir.join("log")))
}

/// Four nodes, a mirror and a registry, each on a machine of its own, and the kernel counts what the registry's machine sends.
#[test]
fn four_nodes_of_one_mirror_cost_the_registry_one_model_and_its_death_nothing() {
    let _alone = heavy();
    let size: u64 = scale(24 << 20, 256 << 20);
    let mut network = Network::new();
    let (origin, mirror) = (network.machine(), network.machine());
    let (origin_dir, mirror_dir, dir) = (scratch("origin"), scratch("mirror"), scratch("hosts"));
    let _registry = origin.registry(origin_dir.path());
    origin.publish(&weights(size, 330), "org/m:v1");
    origin.publish(&weights(size, 331), "org/m:v2");
    let mut cache = cache_on(&mirror, mirror_dir.path(), &origin);
    let name = format!("{}:5000", origin.address);
    hosts(
        dir.path(),
        &name,
        &format!("[host.\"http://{}:5000\"]", mirror.address),
    );
    let caches: Vec<_> = (0..4).map(|_| scratch("cache")).collect();
    let before = origin.sent();
    let nodes: Vec<Mount> = caches
        .iter()
        .map(|cache| {
            let node = network.machine();
            let mut flags = flags(dir.path());
            flags.extend([
                "--plain-http".to_owned(),
                name.clone(),
                "--prefetch".to_owned(),
                "none".to_owned(),
            ]);
            Mount::start_as(cache.path(), flags, |command| node.wrap(command))
        })
        .collect();
    let file = |tag: &str| format!("{name}/org/m:{tag}/model.safetensors");
    let all_read = |tag: &str, wanted: Content| {
        std::thread::scope(|scope| {
            for node in &nodes {
                let file = file(tag);
                scope.spawn(move || assert!(node.read(&file) == wanted.bytes(0, size as usize)));
            }
        });
    };
    all_read("v1", Content::new(330));
    let sent = origin.sent() - before;
    // Frames cost a few hundredths, manifests and acknowledgements some kilobytes.
    assert!(
        sent >= size && sent < size + size / 10,
        "the registry's machine sent {sent} bytes for {size}"
    );

    // The mirror dies while all four read another model.
    let wanted = Content::new(331);
    for node in &nodes {
        assert!(node.read_at(&file("v2"), 0, 4096) == wanted.bytes(0, 4096));
    }
    cache.kill();
    all_read("v2", wanted);
    let log = nodes[0].log();
    assert!(log.contains("mirror left for the next server"), "{log}");
    for node in nodes {
        node.unmount();
    }
}
