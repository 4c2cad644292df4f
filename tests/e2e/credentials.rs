//! Whose credentials a registry sees: files, helpers, tokens; and when they change.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use crate::support::helper::Helpers;
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::{Mount, ocifs};
use crate::support::process::{Output, run_command};
use crate::support::registry::{Access, Registry};
use crate::support::tokens::{PASSWORD, REFRESH, USER};
use crate::support::{PATIENCE, scratch};

fn auth(user: &str, password: &str) -> String {
    STANDARD.encode(format!("{user}:{password}"))
}

/// `ocifs pull` with this credential file into a cache of its own, saying all it can.
fn pull(registry: &Registry, auth_file: &Path, helpers: &Helpers) -> Output {
    let cache = scratch("cache");
    let mut command = ocifs(["pull", "--cache-dir"]);
    command
        .arg(cache.path())
        .arg("--auth-file")
        .arg(auth_file)
        .arg(format!("{}/org/m:v1", registry.host()))
        .env("OCIFS_LOG", "trace");
    if let Some(ca) = registry.ca() {
        command.arg("--ca-file").arg(ca);
    }
    helpers.give(&mut command);
    run_command(&mut command, PATIENCE)
}

/// Neither the secret nor any header that carries it was said anywhere.
#[track_caller]
fn assert_discreet(output: &Output) {
    let said = output.to_string();
    for secret in [PASSWORD, REFRESH, &auth(USER, PASSWORD), "r3fresh%26token"] {
        assert!(!said.contains(secret), "`{secret}` was said: {said}");
    }
}

#[test]
fn helpers_open_a_private_registry_for_ocifs_as_for_skopeo() {
    let model = SampleModel::new(300);
    let registry = Registry::start(Access::Htpasswd);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let helpers = Helpers::new();
    let host = registry.host();
    helpers.write_login("one", &host, USER, PASSWORD);
    let own = helpers.file(
        "own.json",
        &json!({"credHelpers": {&host: "one"}}).to_string(),
    );
    let all = helpers.file(
        "all.json",
        &json!({"credsStore": "one", "auths": {&host: {}}}).to_string(),
    );
    // The script is a helper for others too.
    let mut skopeo = std::process::Command::new("skopeo");
    skopeo
        .args(["inspect", "--raw", "--cert-dir"])
        .arg(registry.cert_dir());
    skopeo
        .arg(format!("docker://{host}/org/m:v1"))
        .env("REGISTRY_AUTH_FILE", &own);
    helpers.give(&mut skopeo);
    run_command(&mut skopeo, PATIENCE).ok();
    for file in [own, all] {
        let output = pull(&registry, &file, &helpers);
        assert_discreet(&output);
        output.ok();
    }
    assert!(
        helpers.log().iter().all(|line| line == "one get"),
        "{:?}",
        helpers.log()
    );

    // The host's own helper comes before the store for all, and an empty name means none.
    helpers.write("broken", "echo 'vault is locked'; exit 1");
    let both = json!({"credsStore": "broken", "credHelpers": {&host: "one"}});
    pull(
        &registry,
        &helpers.file("both.json", &both.to_string()),
        &helpers,
    )
    .ok();
    let none = json!({"credsStore": "broken", "credHelpers": {&host: ""}, "auths": {&host: {"auth": auth(USER, PASSWORD)}}});
    pull(
        &registry,
        &helpers.file("none.json", &none.to_string()),
        &helpers,
    )
    .ok();
    assert!(
        !helpers.log().contains(&"broken get".to_owned()),
        "{:?}",
        helpers.log()
    );

    // What the store lacks may be in the file itself.
    let plain = json!({"credsStore": "broken", "auths": {&host: {"auth": auth(USER, PASSWORD)}}});
    pull(
        &registry,
        &helpers.file("plain.json", &plain.to_string()),
        &helpers,
    )
    .ok();
    assert!(helpers.log().contains(&"broken get".to_owned()));
}

#[test]
fn helpers_that_fail_do_not_close_what_is_open_to_all() {
    let model = SampleModel::new(301);
    let registry = Registry::start(Access::Token);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let helpers = Helpers::new();
    let file = |name: &str| {
        let text = json!({"credsStore": name}).to_string();
        helpers.file(&format!("{name}.json"), &text)
    };
    helpers.write(
        "absent",
        "echo 'credentials not found in native keychain'; exit 1",
    );
    helpers.write("locked", "echo 'vault is locked'; exit 1");
    helpers.write(
        "garbage",
        &format!("echo 'Username: {USER} Secret: {PASSWORD}'"),
    );
    helpers.write("flood", &format!("yes {PASSWORD}"));
    helpers.write("hanging", "sleep 1000");
    let cases = [
        ("absent", None),
        ("locked", Some("vault is locked")),
        ("garbage", Some("does not answer in JSON")),
        ("flood", Some("more than 65536 bytes")),
        ("hanging", Some("did not end within")),
        ("missing", Some("no program docker-credential-missing")),
    ];
    for (name, _) in cases {
        let output = pull(&registry, &file(name), &helpers);
        assert_discreet(&output);
        output.ok();
    }
    registry.tokens().set_anonymous(false);
    for (name, said) in cases {
        let output = pull(&registry, &file(name), &helpers);
        assert_discreet(&output);
        assert_eq!(output.status.code(), Some(4), "{output}");
        if let Some(said) = said {
            assert!(output.stderr.contains(said), "{name}: {output}");
        }
    }
}

#[test]
fn identity_and_registry_tokens_open_what_a_login_opens() {
    let model = SampleModel::new(302);
    let registry = Registry::start(Access::Token);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let tokens = registry.tokens();
    tokens.set_anonymous(false);
    let helpers = Helpers::new();
    let host = registry.host();
    helpers.write_login("token", &host, "<token>", REFRESH);
    let entry = |entry: serde_json::Value| json!({"auths": {&host: entry}}).to_string();
    for (name, text, grant) in [
        (
            "identity",
            entry(json!({"auth": auth(USER, ""), "identitytoken": REFRESH})),
            Some("POST refresh_token"),
        ),
        (
            "helper",
            json!({"credHelpers": {&host: "token"}}).to_string(),
            Some("POST refresh_token"),
        ),
        (
            "login",
            entry(json!({"auth": auth(USER, PASSWORD)})),
            Some("GET"),
        ),
        (
            "registry",
            entry(json!({"registrytoken": tokens.mint("org/m")})),
            None,
        ),
    ] {
        let before = tokens.grants().len();
        let output = pull(&registry, &helpers.file(name, &text), &helpers);
        assert_discreet(&output);
        output.ok();
        let grants = tokens.grants().split_off(before);
        assert_eq!(
            grants.first().map(String::as_str),
            grant,
            "{name}: {grants:?}"
        );
    }
    for wrong in [
        entry(json!({"identitytoken": "other"})),
        entry(json!({"registrytoken": "other"})),
        entry(json!({"auth": auth(USER, "other")})),
        entry(json!({})),
    ] {
        let output = pull(&registry, &helpers.file("wrong", &wrong), &helpers);
        assert_eq!(output.status.code(), Some(4), "{wrong}: {output}");
        assert!(output.stderr.contains("login"), "{output}");
    }
}

#[test]
fn the_most_specific_entry_is_used() {
    let model = SampleModel::new(303);
    let registry = Registry::start(Access::Htpasswd);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let helpers = Helpers::new();
    let host = registry.host();
    let (right, wrong) = (
        json!({"auth": auth(USER, PASSWORD)}),
        json!({"auth": auth(USER, "wrong")}),
    );
    let key = |path: &str| format!("{host}{path}");
    for (good, bad) in [
        ("/org", ""),
        ("/org/m", "/org"),
        ("", "/orga"),
        ("", "/org/m/v1"),
    ] {
        let text = json!({"auths": {key(good): &right, key(bad): &wrong}}).to_string();
        pull(&registry, &helpers.file("auth.json", &text), &helpers).ok();
        let text = json!({"auths": {key(good): &wrong, key(bad): &right}}).to_string();
        let said = pull(&registry, &helpers.file("auth.json", &text), &helpers).failed();
        assert!(said.contains("does not accept the password"), "{said}");
    }
}

#[test]
fn a_mounted_secret_that_is_swapped_is_used_without_a_restart() {
    let model = SampleModel::new(304);
    let registry = Registry::start(Access::Htpasswd);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let secret = scratch("secret");
    // As the kubelet does it: `..data` is a link to a dated directory and is renamed over.
    let swap = |version: &str, password: &str| {
        let dated = secret.path().join(format!("..{version}"));
        fs::create_dir(&dated).unwrap();
        let text = json!({"auths": {registry.host(): {"auth": auth(USER, password)}}});
        fs::write(dated.join(".dockerconfigjson"), text.to_string()).unwrap();
        symlink(&dated, secret.path().join("..new")).unwrap();
        fs::rename(secret.path().join("..new"), secret.path().join("..data")).unwrap();
    };
    swap("1", PASSWORD);
    symlink(
        "..data/.dockerconfigjson",
        secret.path().join(".dockerconfigjson"),
    )
    .unwrap();
    let cache = scratch("cache");
    let flags = [
        "--prefetch".to_owned(),
        "none".to_owned(),
        "--ca-file".to_owned(),
        registry.ca().unwrap().to_str().unwrap().to_owned(),
        "--auth-file".to_owned(),
        secret.path().to_str().unwrap().to_owned(),
    ];
    let mount = Mount::start(cache.path(), flags);
    let below = format!("{}/org/m:v1", registry.host());
    let shard = |n: usize| format!("{below}/model-0000{n}-of-00003.safetensors");
    let wanted = model.v01_files();
    let name = |n: usize| &wanted[&format!("model-0000{n}-of-00003.safetensors")];
    assert!(&mount.read(&shard(1)) == name(1));
    // The registry's password changes before the secret does: denied, and no worse.
    registry.set_password("n3w");
    let error = mount.try_read(&shard(2)).expect_err("the old password");
    assert!(
        // EIO or EACCES.
        matches!(error.raw_os_error(), Some(5 | 13)),
        "{error}"
    );
    swap("2", "n3w");
    std::thread::sleep(Duration::from_millis(100));
    assert!(&mount.read(&shard(2)) == name(2));
    assert_same_files(&mount.files(&below), &wanted);
    let log = mount.log();
    assert!(!log.contains(PASSWORD) && !log.contains("n3w"), "{log}");
}
