//! `ocifs login` and `logout`: what they write others read, and what others write they read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::helper::Helpers;
use crate::support::model::SampleModel;
use crate::support::mount::ocifs;
use crate::support::process::{Output, run_command, run_with_input};
use crate::support::python;
use crate::support::registry::{Access, Registry};
use crate::support::tokens::{PASSWORD, REFRESH, USER};
use crate::support::{PATIENCE, scratch};

/// `ocifs login --password-stdin` as the user with this password.
fn login(
    registry: &Registry,
    file: &Path,
    user: &str,
    password: &str,
    helpers: &Helpers,
) -> Output {
    let mut command = ocifs(["login", "--username", user, "--password-stdin"]);
    command
        .arg("--auth-file")
        .arg(file)
        .arg(registry.host())
        .env("OCIFS_LOG", "trace");
    if let Some(ca) = registry.ca() {
        command.arg("--ca-file").arg(ca);
    }
    helpers.give(&mut command);
    let output = run_with_input(&mut command, format!("{password}\n").as_bytes(), PATIENCE);
    assert!(!output.to_string().contains(password), "{output}");
    output
}

fn logout(registry: &Registry, file: &Path, helpers: &Helpers) -> Output {
    let mut command = ocifs(["logout", "--auth-file"]);
    command.arg(file).arg(registry.host());
    helpers.give(&mut command);
    run_command(&mut command, PATIENCE)
}

/// `ocifs ls` with this credential file.
fn ls(registry: &Registry, file: &Path, helpers: &Helpers) -> Output {
    let cache = scratch("cache");
    let mut command = ocifs(["ls", "--cache-dir"]);
    command
        .arg(cache.path())
        .arg("--auth-file")
        .arg(file)
        .arg(format!("{}/org/m:v1", registry.host()));
    if let Some(ca) = registry.ca() {
        command.arg("--ca-file").arg(ca);
    }
    helpers.give(&mut command);
    run_command(&mut command, PATIENCE)
}

/// skopeo with this credential file; `None` for the registry's certificate where it has one.
fn skopeo(registry: &Registry, file: &Path, helpers: &Helpers, args: &[&str], at: &str) -> Output {
    let mut command = Command::new("skopeo");
    command.args(args);
    match registry.ca() {
        Some(_) => command.arg("--cert-dir").arg(registry.cert_dir()),
        None => command.arg("--tls-verify=false"),
    };
    command.arg(at).env("REGISTRY_AUTH_FILE", file);
    helpers.give(&mut command);
    run_command(&mut command, PATIENCE)
}

fn skopeo_reads(registry: &Registry, file: &Path, helpers: &Helpers) -> Output {
    let at = format!("docker://{}/org/m:v1", registry.host());
    skopeo(registry, file, helpers, &["inspect", "--raw"], &at)
}

#[test]
fn a_login_is_proved_and_then_serves_ocifs_and_skopeo() {
    let model = SampleModel::new(310);
    for access in [Access::Htpasswd, Access::Token] {
        let registry = Registry::start(access);
        model.docker_v01(true).publish(&registry, "org/m:v1");
        if access == Access::Token {
            registry.tokens().set_anonymous(false);
        }
        let helpers = Helpers::new();
        let file = helpers.dir().join("new/config.json");
        let wrong = login(&registry, &file, USER, "wr0ng", &helpers);
        assert_eq!(wrong.status.code(), Some(4), "{wrong}");
        assert!(
            wrong.stderr.contains("not the password of `alice`"),
            "{wrong}"
        );
        assert!(!file.exists(), "a refused login is not kept");
        skopeo_reads(&registry, &file, &helpers).failed();

        let said = login(&registry, &file, USER, PASSWORD, &helpers).ok();
        assert!(
            said.contains("logged in") && said.contains("config.json"),
            "{said}"
        );
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        skopeo_reads(&registry, &file, &helpers).ok();
        ls(&registry, &file, &helpers).ok();

        logout(&registry, &file, &helpers).ok();
        skopeo_reads(&registry, &file, &helpers).failed();
        ls(&registry, &file, &helpers).failed();
        assert_eq!(logout(&registry, &file, &helpers).status.code(), Some(3));
    }
}

#[test]
fn what_skopeo_writes_ocifs_reads_and_changes_without_loss() {
    let model = SampleModel::new(311);
    let registry = Registry::start(Access::Htpasswd);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let helpers = Helpers::new();
    let other = json!({"auths": {"other.io": {"auth": "YTox", "email": "a@b"}}, "credHelpers": {"gcr.io": "gcloud"},
        "HttpHeaders": {"X-Meta": "1"}, "psFormat": "table", "experimental": [1, 2.5, null]});
    let file = helpers.file("auth.json", &other.to_string());
    let host = registry.host();
    let skopeo_login = ["login", "-u", USER, "-p", PASSWORD];
    skopeo(&registry, &file, &helpers, &skopeo_login, &host).ok();
    ls(&registry, &file, &helpers).ok();
    let read = || serde_json::from_slice::<Value>(&fs::read(&file).unwrap()).unwrap();
    let by_skopeo = read();
    assert!(by_skopeo["auths"][&host]["auth"].is_string(), "{by_skopeo}");
    logout(&registry, &file, &helpers).ok();
    ls(&registry, &file, &helpers).failed();
    login(&registry, &file, USER, PASSWORD, &helpers).ok();
    // The same entry as skopeo's, and nothing else of the file has changed.
    assert_eq!(read(), by_skopeo);
    // skopeo itself drops what it does not know; ocifs may not.
    let file = helpers.file("docker.json", &other.to_string());
    login(&registry, &file, USER, PASSWORD, &helpers).ok();
    let mut expected = other;
    expected["auths"][&host] = by_skopeo["auths"][&host].clone();
    assert_eq!(
        serde_json::from_slice::<Value>(&fs::read(&file).unwrap()).unwrap(),
        expected
    );
    let mut skopeo = Command::new("skopeo");
    skopeo
        .args(["logout", &host])
        .env("REGISTRY_AUTH_FILE", &file);
    run_command(&mut skopeo, PATIENCE).ok();
    ls(&registry, &file, &helpers).failed();
}

#[test]
fn a_helper_keeps_the_password_out_of_the_file() {
    let model = SampleModel::new(312);
    let registry = Registry::start(Access::Htpasswd);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    let helpers = Helpers::new();
    helpers.write_keeper("keeper");
    let host = registry.host();
    let file = helpers.file(
        "config.json",
        &json!({"credHelpers": {&host: "keeper"}}).to_string(),
    );
    let said = login(&registry, &file, USER, PASSWORD, &helpers).ok();
    assert!(said.contains("docker-credential-keeper"), "{said}");
    let text: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(
        text,
        json!({"credHelpers": {&host: "keeper"}, "auths": {&host: {}}})
    );
    ls(&registry, &file, &helpers).ok();
    skopeo_reads(&registry, &file, &helpers).ok();
    logout(&registry, &file, &helpers).ok();
    ls(&registry, &file, &helpers).failed();
    assert_eq!(logout(&registry, &file, &helpers).status.code(), Some(3));
    // What skopeo gives to the helper is ours too.
    skopeo(
        &registry,
        &file,
        &helpers,
        &["login", "-u", USER, "-p", PASSWORD],
        &host,
    )
    .ok();
    ls(&registry, &file, &helpers).ok();
    let verbs = ["store", "get", "erase"].map(|verb| format!("keeper {verb}"));
    assert!(
        verbs.iter().all(|verb| helpers.log().contains(verb)),
        "{:?}",
        helpers.log()
    );

    helpers.write("keeper", "cat >/dev/null; echo 'vault is locked'; exit 1");
    let before = fs::read(&file).unwrap();
    let output = login(&registry, &file, USER, PASSWORD, &helpers);
    assert!(output.stderr.contains("vault is locked"), "{output}");
    assert_eq!(fs::read(&file).unwrap(), before);
}

#[test]
fn an_identity_token_is_kept_as_such() {
    let model = SampleModel::new(313);
    let registry = Registry::start(Access::Token);
    model.docker_v01(true).publish(&registry, "org/m:v1");
    registry.tokens().set_anonymous(false);
    let helpers = Helpers::new();
    let file = helpers.dir().join("config.json");
    let wrong = login(&registry, &file, "<token>", "n0token", &helpers);
    assert_eq!(wrong.status.code(), Some(4), "{wrong}");
    login(&registry, &file, "<token>", REFRESH, &helpers).ok();
    ls(&registry, &file, &helpers).ok();
    skopeo_reads(&registry, &file, &helpers).ok();
}

#[test]
fn a_login_that_another_file_hides_is_told() {
    let registry = Registry::start(Access::Htpasswd);
    let (podman, docker) = (scratch("podman"), scratch("docker"));
    fs::create_dir(podman.path().join("containers")).unwrap();
    let login = || {
        let mut command = ocifs(["login", "-u", USER, "--password-stdin", "--ca-file"]);
        command.arg(registry.ca().unwrap()).arg(registry.host());
        command
            .env("XDG_RUNTIME_DIR", podman.path())
            .env("HOME", docker.path());
        let output = run_with_input(&mut command, PASSWORD.as_bytes(), PATIENCE);
        assert!(output.status.success(), "{output}");
        output.stderr
    };
    assert!(!login().contains("warning"));
    assert!(docker.path().join(".docker/config.json").exists());
    let other = json!({"auths": {registry.host(): {"auth": "Ym9iOm90aGVy"}}});
    fs::write(
        podman.path().join("containers/auth.json"),
        other.to_string(),
    )
    .unwrap();
    let said = login();
    assert!(said.contains("another login"), "{said}");
    // A directory that is named is meant alone, by docker and by podman.
    let mut command = ocifs(["ls", "--ca-file"]);
    command
        .arg(registry.ca().unwrap())
        .arg(format!("{}/org/m:v1", registry.host()));
    command
        .env("XDG_RUNTIME_DIR", podman.path())
        .env("DOCKER_CONFIG", docker.path().join(".docker"));
    let output = run_command(&mut command, PATIENCE);
    assert!(
        !output.stderr.contains("denied"),
        "the login is right, the model is not there: {output}"
    );
}

#[test]
fn at_a_terminal_the_password_is_asked_for_and_not_shown() {
    let registry = Registry::start(Access::Htpasswd);
    let helpers = Helpers::new();
    let file = helpers.dir().join("config.json");
    let at_terminal = |answers: &str| {
        let login = ocifs(["login", "--auth-file", file.to_str().unwrap(), "--ca-file"]);
        let mut command = python::command("terminal.py");
        command
            .arg(login.get_program())
            .args(login.get_args())
            .arg(registry.ca().unwrap())
            .arg(registry.host());
        run_with_input(&mut command, answers.as_bytes(), PATIENCE)
    };
    // A mistake is taken back on the way.
    let output = at_terminal(&format!(
        "Username: \t{USER}\\n\nPassword: \tx\\x7f{PASSWORD}\\r\n"
    ));
    let shown = output.ok();
    assert!(
        shown.contains("logged in") && shown.contains("[echo on]"),
        "{shown}"
    );
    assert!(
        !shown.contains(PASSWORD) && !shown.contains("s3c"),
        "{shown}"
    );
    let kept = fs::read(&file).unwrap();
    let interrupted = at_terminal(&format!("Username: \t{USER}\\n\nPassword: \thalf\\x03\n"));
    assert_eq!(interrupted.status.code(), Some(130), "{interrupted}");
    let shown = interrupted.failed();
    assert!(
        shown.contains("[echo on]") && !shown.contains("half"),
        "{shown}"
    );
    assert_eq!(fs::read(&file).unwrap(), kept);
    // Without a terminal nobody is asked.
    let mut command = ocifs(["login", "-u", USER, "--auth-file"]);
    command.arg(&file).arg(registry.host());
    let output = run_command(&mut command, PATIENCE);
    assert_eq!(output.status.code(), Some(2), "{output}");
    assert!(output.stderr.contains("--password-stdin"), "{output}");
}
