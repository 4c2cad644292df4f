//! The way to a registry: forward proxies by the environment, plain HTTP by list, IPv6 literals.

use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::forward::{Forward, on_ipv6};
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, ocifs};
use crate::support::process::{Output, run_command};
use crate::support::registry::{Access, Registry};
use crate::support::{PATIENCE, free_address, scratch};

/// `ocifs pull` with these variables and flags into a cache of its own, saying all it can.
fn pull(reference: &str, flags: &[String], variables: &[(&str, &str)]) -> Output {
    let cache = scratch("cache");
    let mut command = ocifs(["pull", "--cache-dir"]);
    command.arg(cache.path()).args(flags).arg(reference);
    command.envs(variables.iter().copied());
    command.env("OCIFS_LOG", "trace");
    // A server that is asked directly by mistake is not waited for.
    command
        .env("OCIFS_CONNECT_TIMEOUT", "1s")
        .env("OCIFS_METADATA_TIMEOUT", "4s");
    run_command(&mut command, PATIENCE)
}

#[test]
fn tls_goes_through_a_tunnel_and_plain_http_by_absolute_targets() {
    let model = SampleModel::new(340);
    let (secure, plain) = (Registry::start(Access::Htpasswd), Registry::open());
    model.docker_v01(true).publish(&secure, "org/m:v1");
    model.docker_v01(true).publish(&plain, "org/m:v1");
    let names = [
        ("registry.test:443", secure.address()),
        ("plain.test:5000", plain.address()),
    ];
    let proxy = Forward::start(&names, None);
    let auth = scratch("auth");
    let file = auth.path().join("auth.json");
    let text = std::fs::read_to_string(secure.auth_file()).unwrap();
    std::fs::write(&file, text.replace(&secure.host(), "registry.test")).unwrap();
    let mut flags = secure.ocifs_args();
    flags[3] = file.to_str().unwrap().to_owned();
    // Both spellings; the lower one is what most tools take.
    for variable in ["https_proxy", "HTTPS_PROXY", "ALL_PROXY"] {
        let before = proxy.asked().len();
        pull(
            "registry.test/org/m:v1",
            &flags,
            &[(variable, &proxy.url())],
        )
        .ok();
        let asked = proxy.asked().split_off(before);
        assert!(
            !asked.is_empty() && asked.iter().all(|line| line == "CONNECT registry.test:443"),
            "{asked:?}"
        );
    }
    let plain_http = ["--plain-http".to_owned(), "plain.test".to_owned()];
    for variable in ["http_proxy", "ALL_PROXY"] {
        let before = proxy.asked().len();
        pull(
            "plain.test:5000/org/m:v1",
            &plain_http,
            &[(variable, &proxy.url())],
        )
        .ok();
        let asked = proxy.asked().split_off(before);
        assert!(
            asked.iter().any(|line| line == "GET plain.test:5000"),
            "{asked:?}"
        );
        assert!(
            asked.iter().all(|line| line.ends_with(" plain.test:5000")),
            "{asked:?}"
        );
    }
    // A mount of many parts as well, and what curl gets that way is the same.
    let cache = scratch("cache");
    let mount = Mount::start_as(cache.path(), &flags, |command| {
        command.env("HTTPS_PROXY", proxy.url());
    });
    assert_same_files(&mount.files("registry.test/org/m:v1"), &model.v01_files());
    let mut curl = Command::new("curl");
    curl.args([
        "-s",
        "-f",
        "-u",
        "alice:s3cret",
        "-H",
        "Accept: application/vnd.oci.image.manifest.v1+json",
    ]);
    curl.arg("--cacert")
        .arg(secure.ca().unwrap())
        .arg("https://registry.test/v2/org/m/manifests/v1");
    curl.env("https_proxy", proxy.url());
    let manifest = run_command(&mut curl, PATIENCE).ok_bytes();
    assert!(mount.read("registry.test/org/m:v1/.oci/manifest.json") == manifest);
    // Loopback is never asked through a proxy, and a name that is not on the list never in the clear.
    let before = proxy.asked().len();
    pull(
        &format!("{}/org/m:v1", plain.host()),
        &[],
        &[("http_proxy", &proxy.url())],
    )
    .ok();
    let error = pull(
        "plain.test:5000/org/m:v1",
        &[],
        &[("ALL_PROXY", &proxy.url())],
    )
    .failed();
    let asked = proxy.asked().split_off(before);
    assert!(
        asked.iter().all(|line| line == "CONNECT plain.test:5000"),
        "{asked:?}: {error}"
    );
}

/// Large files come in parts, each through a tunnel of its own over HTTP/1.1, or all through one where HTTP/2 is asked for.
#[test]
fn parts_of_large_files_go_through_tunnels_of_their_own() {
    const SIZE: usize = 64 << 20;
    let registry = Registry::start(Access::Htpasswd);
    let weights = Content::new(345);
    Artifact::docker_v02()
        .layer(Layer::bytes(DOCKER_SAFETENSORS, weights.bytes(0, SIZE)).at("model.safetensors"))
        .publish(&registry, "org/m:v1");
    let proxy = Forward::start(&[("registry.test:443", registry.address())], None);
    let auth = scratch("auth");
    let file = auth.path().join("auth.json");
    let text = std::fs::read_to_string(registry.auth_file()).unwrap();
    std::fs::write(&file, text.replace(&registry.host(), "registry.test")).unwrap();
    let mut tunnels = Vec::new();
    for http in ["auto", "2"] {
        let mut flags = registry.ocifs_args();
        flags[3] = file.to_str().unwrap().to_owned();
        flags.extend(["-o".to_owned(), format!("http={http}")]);
        let before = proxy.asked().len();
        let cache = scratch("cache");
        let mount = Mount::start_as(cache.path(), &flags, |command| {
            command.env("HTTPS_PROXY", proxy.url());
        });
        let below = "registry.test/org/m:v1/model.safetensors";
        assert!(mount.read(below) == weights.bytes(0, SIZE), "{http}");
        mount.verified(below);
        mount.unmount();
        let asked = proxy.asked().split_off(before);
        let tunnel = "CONNECT registry.test:443";
        assert!(asked.iter().all(|line| line == tunnel), "{asked:?}");
        tunnels.push(asked.len());
    }
    assert!(tunnels[0] >= 3 && tunnels[0] <= 40, "{tunnels:?}");
    assert!(tunnels[1] < tunnels[0], "{tunnels:?}");
}

#[test]
fn no_proxy_names_what_is_asked_directly() {
    let model = SampleModel::new(341);
    let registry = Registry::open();
    model.docker_v01(true).publish(&registry, "org/m:v1");
    // Addresses of the documentation's network, where nobody is: only the proxy can reach them.
    let names = [
        ("plain.test:5000", registry.address()),
        ("192.0.2.7:5000", registry.address()),
    ];
    let proxy = Forward::start(&names, None);
    for (host, no_proxy, direct) in [
        ("plain.test:5000", "", false),
        ("plain.test:5000", "other.test,ain.test", false),
        ("plain.test:5000", "plain.test", true),
        ("plain.test:5000", "other, .test", true),
        ("plain.test:5000", "test", true),
        ("plain.test:5000", "*", true),
        ("192.0.2.7:5000", "192.0.3.0/24,192.0.2.8", false),
        ("192.0.2.7:5000", "192.0.2.7", true),
        ("192.0.2.7:5000", "10.0.0.0/8,192.0.2.0/24", true),
    ] {
        let before = proxy.asked().len();
        let flags = ["--plain-http".to_owned(), host.to_owned()];
        let variables = [
            ("http_proxy", proxy.url()),
            ("no_proxy", no_proxy.to_owned()),
        ];
        let variables: Vec<_> = variables
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let output = pull(&format!("{host}/org/m:v1"), &flags, &variables);
        let asked = proxy.asked().len() > before;
        assert_eq!(asked, !direct, "{host} with NO_PROXY={no_proxy}: {output}");
        assert_eq!(
            output.status.code(),
            Some(if direct { 5 } else { 0 }),
            "{host} with NO_PROXY={no_proxy}: {output}"
        );
    }
}

/// The proxy's login is in the environment, and nowhere else.
#[track_caller]
fn assert_discreet(output: &Output, login: &str) {
    let stdout = String::from_utf8_lossy(&output.stdout);
    for said in [&output.stderr, &*stdout] {
        assert!(
            !said.contains("h0use") && !said.contains(&login[6..]),
            "{said}"
        );
    }
}

#[test]
fn a_proxy_that_wants_a_login_gets_it_and_nobody_else_does() {
    let model = SampleModel::new(342);
    let (secure, plain) = (Registry::start(Access::Htpasswd), Registry::open());
    model.docker_v01(true).publish(&plain, "org/m:v1");
    let login = format!("Basic {}", STANDARD.encode("bob:h0use"));
    let names = [
        ("plain.test:5000", plain.address()),
        ("registry.test:443", secure.address()),
    ];
    let proxy = Forward::start(&names, Some(&login));
    let url = proxy.url().replace("http://", "http://bob:h0use@");
    let flags = ["--plain-http".to_owned(), "plain.test:5000".to_owned()];
    let output = pull("plain.test:5000/org/m:v1", &flags, &[("http_proxy", &url)]);
    assert_discreet(&output, &login);
    output.ok();
    let refused = pull(
        "plain.test:5000/org/m:v1",
        &flags,
        &[("http_proxy", &proxy.url())],
    );
    assert!(!refused.status.success(), "{refused}");
    // Through the tunnel the registry answers, and wants a login of its own.
    let output = pull(
        "registry.test/org/m:v1",
        &secure.ocifs_args()[..2],
        &[("https_proxy", &url)],
    );
    assert_eq!(output.status.code(), Some(4), "{output}");
    assert_discreet(&output, &login);
    // A proxy that is away is named as what cannot be reached.
    let nobody = format!("http://{}", free_address());
    let output = pull("registry.test/org/m:v1", &[], &[("https_proxy", &nobody)]);
    assert_eq!(output.status.code(), Some(5), "{output}");
}

#[test]
fn an_address_of_ipv6_is_a_host() {
    let model = SampleModel::new(343);
    let registry = Registry::open();
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let host = format!("[::1]:{}", on_ipv6(registry.address()));
    pull(&format!("{host}/org/m:v1"), &[], &[]).ok();
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    assert_same_files(
        &mount.files(&format!("{host}/org/m:v1")),
        &model.v01_files(),
    );
}
