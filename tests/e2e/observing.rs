//! What a mount tells about itself, checked with what others read it by; and which of it may be read at all.

use std::io::Read as _;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::held::Held;
use crate::support::http;
use crate::support::model::SampleModel;
use crate::support::mount::{Mount, ocifs, run_ocifs};
use crate::support::process::{Output, run_command, run_with_input, wait};
use crate::support::python;
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, free_address, scratch};

const MIB: u64 = 1 << 20;

/// What Prometheus' own parser makes of a mount's metrics.
fn metrics(address: std::net::SocketAddr) -> (Value, String) {
    let (head, body) = http::get(address, "/metrics", &[]).unwrap();
    assert_eq!(head.status(), 200);
    assert_eq!(
        head.get("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let mut parser = python::command("parse_metrics.py");
    let samples = run_with_input(&mut parser, &body, PATIENCE).ok();
    (
        serde_json::from_str(&samples).unwrap(),
        String::from_utf8(body).unwrap(),
    )
}

/// What it said when it failed with this exit code.
#[track_caller]
fn fails(code: i32, output: Output) -> String {
    assert_eq!(output.status.code(), Some(code), "{output}");
    output.failed()
}

#[test]
fn metrics_log_and_status_tell_of_a_read_and_name_no_model() {
    let registry = Registry::open();
    let (weights, cache) = (scratch("weights"), scratch("cache"));
    let file = weights.path().join("model.safetensors");
    Content::new(71).write(&file, 40 * MIB);
    let artifact = Artifact::docker_v02()
        .layer(Layer::file(DOCKER_SAFETENSORS, &file).at("model.safetensors"))
        .layer(Layer::bytes("application/octet-stream", vec![7; 5000]).at("config.json"));
    let published = artifact.publish(&registry, "quiet/name:v1");
    let address = free_address();
    let flag = format!("--metrics={address}");
    let mount = Mount::start(cache.path(), [flag.as_str(), "--log-format=json"]);
    let reference = format!("{}/quiet/name:v1", registry.host());

    let (before, _) = metrics(address);
    assert_eq!(before["ocifs_registry_received_bytes_total"], 0.0);
    assert_eq!(before["ocifs_read_wait_seconds_count"], 0.0);
    assert_eq!(
        mount.read(&format!("{reference}/model.safetensors")).len() as u64,
        40 * MIB
    );
    assert!(mount.try_stat(&format!("{reference}/absent.json")).is_err());
    let complete = eventually(PATIENCE, "the model is complete", || {
        let log = mount.log();
        log.contains("a model is complete and verified")
            .then_some(log)
    });

    let (after, text) = metrics(address);
    let number = |name: &str| {
        after[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {after}"))
    };
    // The kernel asks for every byte of the file once; each comes at once or after a wait.
    let read = number("ocifs_read_bytes_total{source=cache}")
        + number("ocifs_read_bytes_total{source=registry}");
    assert!(
        read >= 40.0 * MIB as f64 && read < 41.0 * MIB as f64,
        "{read}"
    );
    let received = number("ocifs_registry_received_bytes_total");
    assert!(
        received >= 40.0 * MIB as f64 && received < 42.0 * MIB as f64,
        "{received}"
    );
    assert!(number("ocifs_read_wait_seconds_count") > 0.0);
    assert!(number("ocifs_registry_requests_total{outcome=2xx}") >= 5.0);
    assert_eq!(number("ocifs_registry_requests_total{outcome=5xx}"), 0.0);
    assert!(number("ocifs_fuse_requests_total{operation=read}") >= 40.0);
    assert!(number("ocifs_fuse_requests_total{operation=lookup}") >= 4.0);
    assert_eq!(number("ocifs_read_failures_total"), 0.0);
    assert!(number("ocifs_blobs{state=verified}") >= 2.0);
    assert!(number("ocifs_cache_allocated_bytes") >= 40.0 * MIB as f64);
    assert_eq!(number("ocifs_cache_healthy"), 1.0);
    assert!(number("ocifs_references{state=idle}") + number("ocifs_references{state=open}") >= 1.0);
    for secret in [
        "quiet",
        &published.layers[0][7..],
        "sha256",
        &registry.host(),
    ] {
        assert!(!text.contains(secret), "{secret} is in {text}");
    }
    let (health, body) = http::get(address, "/health", &[]).unwrap();
    assert_eq!(
        (health.status(), body.as_slice()),
        (200, b"ok\n".as_slice())
    );
    assert_eq!(http::get(address, "/else", &[]).unwrap().0.status(), 404);

    // Every line of the log is a document, and the last one about the model says how it came.
    let lines: Vec<Value> = complete
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let told = |text: &str| {
        let line = lines.iter().find(|line| {
            line["message"]
                .as_str()
                .is_some_and(|message| message.contains(text))
        });
        line.unwrap_or_else(|| panic!("{text}: {lines:?}")).clone()
    };
    let end = told("a model is complete and verified");
    // The config is a blob of it too.
    let bytes = end["bytes"].as_u64().unwrap();
    assert!(
        (40 * MIB + 5000..40 * MIB + 6000).contains(&bytes),
        "{bytes}"
    );
    assert!(end["seconds"].as_f64().unwrap() >= 0.0 && end["megabytes_per_second"].is_number());
    assert_eq!(end["digest"], published.digest);
    assert_eq!(
        told("a model is being read")["repository"],
        format!("{}/quiet/name", registry.host())
    );
}

#[test]
fn an_address_that_is_taken_is_told_before_anything_is_mounted() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (dir, cache) = (scratch("point"), scratch("cache"));
    let flag = format!("--metrics={}", taken.local_addr().unwrap());
    let output = run_ocifs([
        "mount",
        "--foreground",
        "--cache-dir",
        cache.path().to_str().unwrap(),
        &flag,
        dir.path().to_str().unwrap(),
    ]);
    let said = fails(7, output);
    assert!(
        said.contains("for metrics") && said.contains("in use"),
        "{said}"
    );
}

#[test]
fn metrics_go_on_with_the_process_that_takes_over_and_a_mount_for_all_is_warned_of() {
    let cache = scratch("cache");
    let address = free_address();
    let flag = format!("--metrics={address}");
    let held = Held::start(cache.path(), [flag.as_str(), "--allow-other"]);
    let (first, _) = metrics(address);
    assert_eq!(first["ocifs_takeovers"], 0.0);
    held.kill_daemon();
    let second = eventually(PATIENCE, "the next process has metrics", || {
        http::get(address, "/metrics", &[]).ok()?;
        Some(metrics(address).0)
    });
    assert_eq!(second["ocifs_takeovers"], 1.0);
    // Whoever may read with root's credentials, and that no rule bounds what, is said where one looks.
    assert_eq!(held.status()["openToAll"], true);
    let shown = run_ocifs(["status", held.root().to_str().unwrap()]).ok();
    assert!(
        shown.contains("every local user can read") && shown.contains("`allow` bounds it"),
        "{shown}"
    );
}

#[test]
fn a_mount_says_more_and_less_while_it_runs_and_remembers_its_troubles() {
    let registry = Registry::open();
    let model = SampleModel::new(72);
    model.docker_v02().publish(&registry, "org/m:v1");
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), [""; 0]);
    let point = mount.root().to_str().unwrap().to_owned();
    assert!(!mount.log().contains("DEBUG"), "{}", mount.log());
    let set = run_ocifs(["log", "debug,ocifs=trace", &point]).ok();
    assert!(set.contains("debug,ocifs=trace"), "{set}");
    mount.read(&format!("{}/org/m:v1/config.json", registry.host()));
    assert!(mount.log().contains("TRACE"), "{}", mount.log());
    run_ocifs(["log", "off", &point]).ok();
    let quiet = mount.log();
    mount.read(&format!("{}/org/m:v1/tokenizer.json", registry.host()));
    assert_eq!(mount.log(), quiet, "nothing is logged");
    let wrong = fails(1, run_ocifs(["log", "ocifs=loud", &point]));
    assert!(wrong.contains("no filter"), "{wrong}");

    // A registry that is gone makes a warning, which status shows though it was not logged.
    let gone = free_address();
    assert!(mount.try_stat(&format!("{gone}/org/m:v1")).is_err());
    let status = run_ocifs(["status", "--json", &point]).ok();
    let status: Value = serde_json::from_str(&status).unwrap();
    let mount_status = &status["mounts"][0];
    assert!(
        mount_status["reads"]["cachedBytes"].is_u64(),
        "{mount_status}"
    );
    let troubles = mount_status["troubles"].as_array().unwrap();
    assert!(
        troubles.iter().any(|one| {
            let text = one["text"].as_str().unwrap();
            one["level"] == "warning" && text.contains(&gone.to_string())
        }),
        "{mount_status}"
    );
    assert_eq!(mount_status["openToAll"], false);
}

#[test]
fn a_journal_that_is_not_there_is_told_and_nothing_is_lost() {
    let there = std::path::Path::new("/run/systemd/journal/socket").exists();
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--log-format=journal", "--offline"]);
    let log = mount.log();
    // Where there is one, all of it goes there.
    assert_eq!(log.contains("journal is not there"), !there, "{log}");
    assert_eq!(log.contains("mounted"), !there, "{log}");
}

#[test]
fn status_is_shown_again_until_it_is_interrupted() {
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--offline"]);
    let mut command = ocifs(["status", "--watch=100ms", mount.root().to_str().unwrap()]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(wait(&mut child, PATIENCE).is_some_and(|status| status.success()));
    let mut shown = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut shown)
        .unwrap();
    let times = shown.matches(mount.root().to_str().unwrap()).count();
    assert!(times >= 3, "{shown}");
    assert!(
        shown.contains("B/s)"),
        "rates from the second time on: {shown}"
    );
    assert!(!shown.contains('\u{1b}'), "no terminal, no commands to it");
    let too_short = fails(2, run_ocifs(["status", "--watch=1ms"]));
    assert!(too_short.contains("100ms"), "{too_short}");
}

#[test]
fn what_the_rules_do_not_allow_is_denied_by_tag_and_digest_and_is_not_listed() {
    let registry = Registry::open();
    let model = SampleModel::new(73);
    let published = model.docker_v02().publish(&registry, "open/m:v1");
    model.docker_v02().publish(&registry, "open/secret-m:v1");
    model.docker_v02().publish(&registry, "closed/m:v1");
    let cache = scratch("cache");
    let host = registry.host();
    // All of them are in the cache before: rules are for what is cached too.
    for name in ["open/m", "open/secret-m", "closed/m"] {
        let reference = format!("{host}/{name}:v1");
        run_ocifs([
            "pull",
            "--cache-dir",
            cache.path().to_str().unwrap(),
            &reference,
        ])
        .ok();
    }
    let allow = format!("--allow={host}/open");
    let mount = Mount::start(
        cache.path(),
        [allow.as_str(), "--deny=**/secret-*", "--offline"],
    );
    assert!(
        !mount
            .read(&format!("{host}/open/m:v1/config.json"))
            .is_empty()
    );
    let denied = |below: String| {
        let error = mount.try_stat(&below).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{below}: {error}");
    };
    denied(format!("{host}/closed/m:v1"));
    denied(format!("{host}/open/secret-m:v1"));
    denied(format!("{host}/closed/m@{}", published.digest));
    assert!(
        mount
            .try_stat(&format!("{host}/open/m@{}", published.digest))
            .is_ok()
    );
    assert!(
        mount
            .list(&format!("{host}/open/m"))
            .contains(&"@v1".to_owned())
    );
    let namespace = mount.list(&format!("{host}/open"));
    assert!(
        namespace.iter().any(|name| name.starts_with('m')),
        "{namespace:?}"
    );
    assert!(
        namespace.iter().all(|name| !name.contains("secret")),
        "{namespace:?}"
    );
    assert!(
        mount.list(&host).iter().all(|name| name != "closed"),
        "{:?}",
        mount.list(&host)
    );

    let wrong = fails(
        2,
        run_ocifs(["mount", "--allow=ghcr.io/x:v1", "/nonexistent"]),
    );
    assert!(
        wrong.contains("--allow") && wrong.contains("not for tags"),
        "{wrong}"
    );
}

#[test]
fn settings_are_told_with_their_origin_also_those_of_a_mount_that_runs() {
    let dir = scratch("config");
    let file = dir.path().join("config.toml");
    std::fs::write(&file, "cache-size = \"300MiB\"\ntag-ttl = \"1m\"\n").unwrap();
    let cache = scratch("cache");
    let config = format!("--config={}", file.display());
    let mount = Mount::start(cache.path(), [config.as_str(), "--tag-ttl=2m"]);
    let told = run_ocifs(["config", "--of", mount.root().to_str().unwrap(), "--json"]).ok();
    let rows: Vec<Value> = serde_json::from_str(&told).unwrap();
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap().clone();
    assert_eq!(row("cache-size")["from"], format!("{}:1", file.display()));
    assert_eq!(row("cache-size")["value"], "300MiB");
    assert_eq!(
        (
            row("tag-ttl")["from"].as_str(),
            row("tag-ttl")["value"].as_str()
        ),
        (Some("--tag-ttl"), Some("2m"))
    );
    assert_eq!(row("verify")["from"], Value::Null);

    std::fs::write(&file, "offline = true\n\nchache-size = \"1G\"\n").unwrap();
    let wrong = fails(2, run_ocifs(["config", &config]));
    assert!(
        wrong.contains("config.toml:3") && wrong.contains("did you mean `cache-size`"),
        "{wrong}"
    );

    // The template is a configuration that says nothing, and every page of the manual is sound for another formatter.
    std::fs::write(&file, run_ocifs(["config", "--template"]).ok()).unwrap();
    run_ocifs(["config", &config]).ok();
    let pages = dir.path().join("man");
    run_ocifs(["man", "--dir", pages.to_str().unwrap()]).ok();
    for section in ["man1", "man5"] {
        for page in std::fs::read_dir(pages.join(section)).unwrap() {
            let page = page.unwrap().path();
            let mut lint = std::process::Command::new("mandoc");
            let said = run_command(
                lint.args(["-T", "lint", "-W", "error"]).arg(&page),
                PATIENCE,
            )
            .ok();
            assert_eq!(said, "", "{}", page.display());
        }
    }
    for shell in ["bash", "zsh", "fish"] {
        let text = run_ocifs(["completions", shell]).ok();
        assert!(
            text.contains("cache-size") && text.contains("prefetch"),
            "{shell}"
        );
        let path = dir.path().join(shell);
        std::fs::write(&path, text).unwrap();
        if shell == "bash" {
            let mut check = std::process::Command::new("bash");
            run_command(check.arg("-n").arg(&path), PATIENCE).ok();
        }
    }
}
