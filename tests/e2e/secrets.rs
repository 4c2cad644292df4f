//! Where passwords and tokens do not go: to other hosts, over lines that anybody can read, into anything that is said or left behind.

use std::ffi::OsString;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::json;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::certs::Certs;
use crate::support::content::Content;
use crate::support::helper::Helpers;
use crate::support::mount::{Mount, ocifs};
use crate::support::process::{Daemon, Output, run, run_command, run_with_input, wait};
use crate::support::registry::{Access, Registry};
use crate::support::tokens::{PASSWORD, REFRESH, USER};
use crate::support::{PATIENCE, eventually, free_address, scratch};

/// What signs an address of a content network.
const SIGNATURE: &str = "5ignature0fAnAddress";
/// A header for a mirror.
const HEADER: &str = "m1rrorHeader";
/// The password of a proxy.
const PROXY: &str = "pr0xyPassw0rd";

fn basic() -> String {
    STANDARD.encode(format!("{USER}:{PASSWORD}"))
}

/// nginx with these `server` blocks; it logs a request a line, its credentials and body included.
struct Nginx {
    dir: tempfile::TempDir,
    _daemon: Daemon,
}

impl Nginx {
    fn start(listens: SocketAddr, servers: impl FnOnce(&Path) -> String) -> Self {
        let dir = scratch("nginx");
        let at = dir.path().display();
        let servers = servers(dir.path());
        let config = format!(
            "user root; daemon off; worker_processes 1; pid {at}/pid; error_log {at}/errors;
             events {{ worker_connections 256; }}
             http {{
               log_format all '$server_port $request_method $uri [$http_authorization] $request_body'; access_log {at}/access all;
               client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;
               {servers}
             }}"
        );
        let file = dir.path().join("nginx.conf");
        fs::write(&file, config).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-c").arg(&file);
        let daemon = Daemon::start("nginx", &mut command, &dir.path().join("log"));
        eventually(PATIENCE, "nginx listens", || {
            TcpStream::connect(listens).ok()
        });
        Self {
            dir,
            _daemon: daemon,
        }
    }

    /// The requests so far that came to this server.
    fn requests(&self, at: SocketAddr) -> Vec<String> {
        let log = fs::read_to_string(self.dir.path().join("access")).unwrap_or_default();
        let start = format!("{} ", at.port());
        log.lines()
            .filter_map(|line| line.strip_prefix(&start))
            .map(str::to_owned)
            .collect()
    }
}

/// A registry with TLS and a login that sends whoever comes to two other servers, one with TLS and one without, in every way that it has.
#[test]
fn credentials_go_to_no_other_host_and_over_no_open_line() {
    let (front, other, open) = (free_address(), free_address(), free_address());
    let certs_dir = scratch("certs");
    let certs = Certs::make(certs_dir.path());
    let line = run("htpasswd", ["-mbn", USER, PASSWORD]).ok();
    let nginx = Nginx::start(front, |dir| {
        fs::write(dir.join("htpasswd"), line.trim()).unwrap();
        let (key, certificate) = (certs.key.display(), certs.certificate.display());
        let tls = format!("ssl_certificate {certificate}; ssl_certificate_key {key};");
        let login = format!(
            "auth_basic realm; auth_basic_user_file {}/htpasswd;",
            dir.display()
        );
        // What has a login and then redirects: `return` alone would come before the login.
        let sent = |name: &str, to: &str| {
            format!(
                "location /v2/org/{name}/ {{ {login} try_files /none @{name}; }}
                 location @{name} {{ return 307 {to}$request_uri; }}"
            )
        };
        let realm = |name: &str, realm: &str| {
            format!(
                "location /v2/org/{name}/ {{ add_header WWW-Authenticate 'Bearer realm=\"{realm}\",service=\"s\"' always; return 401; }}"
            )
        };
        let home = format!("https://localhost:{}", front.port());
        let away = format!("https://localhost:{}", other.port());
        format!(
            "server {{ listen {front} ssl; {tls} root {dir};
               {} {} {} {} {} {} {}
               location = /token-away {{ return 307 {away}/token; }}
               location = /token-post {{ if ($request_method = GET) {{ return 405; }} return 307 {away}/token; }}
             }}
             server {{ listen {other} ssl; {tls} root {dir};
               location /v2/org/there-and-back/ {{ return 307 {home}/v2/org/back/; }}
               location /v2/org/asks-again/ {{ {login} try_files /none =404; }}
               location / {{ return 404; }}
             }}
             server {{ listen {open}; location / {{ return 200 '{{}}'; }} }}",
            sent("to-open", &format!("http://{open}")),
            sent("to-other", &away),
            sent("there-and-back", &away),
            sent("asks-again", &away),
            realm("realm-open", &format!("http://{open}/token")),
            realm("realm-away", &format!("{home}/token-away")),
            realm("realm-post", &format!("{home}/token-post")),
            dir = dir.display(),
        )
    });
    let host = format!("localhost:{}", front.port());
    let auth = scratch("auth");
    let file = auth.path().join("auth.json");
    let login = json!({"auths": {&host: {"auth": basic()}}});
    fs::write(&file, login.to_string()).unwrap();
    let pull = |name: &str| {
        let cache = scratch("cache");
        let mut command = ocifs(["pull", "--ca-file"]);
        command
            .arg(&certs.ca)
            .args(["--cache-dir".as_ref(), cache.path().as_os_str()])
            .args(["--auth-file".as_ref(), file.as_os_str()])
            .arg(format!("{host}/org/{name}:v1"))
            .env("OCIFS_METADATA_TIMEOUT", "5s")
            .env("OCIFS_LOG", "trace");
        let output = run_command(&mut command, PATIENCE);
        let said = output.to_string();
        assert!(
            !said.contains(PASSWORD) && !said.contains(&basic()),
            "{said}"
        );
        output.failed()
    };
    for name in [
        "to-open",
        "to-other",
        "there-and-back",
        "asks-again",
        "realm-open",
        "realm-away",
        "realm-post",
    ] {
        let said = pull(name);
        if ["to-open", "realm-open"].contains(&name) {
            assert!(said.contains("plain HTTP"), "{name}: {said}");
        }
    }
    // The login was sent where it belongs, or nothing is proved.
    let home = nginx.requests(front);
    let authorized = |name: &str| {
        home.iter()
            .any(|request| request.contains(name) && request.contains(&basic()))
    };
    for name in [
        "to-open",
        "to-other",
        "there-and-back",
        "asks-again",
        "token-away",
        "token-post",
    ] {
        assert!(authorized(name), "{name}: {home:#?}");
    }
    // Whoever was sent away and back again comes without: the address was chosen by the other.
    assert!(!authorized("/v2/org/back/"), "{home:#?}");
    assert!(
        home.iter().any(|request| request.contains("/v2/org/back/")),
        "{home:#?}"
    );
    let away = nginx.requests(other);
    for name in ["to-other", "there-and-back", "asks-again", "/token"] {
        assert!(
            away.iter().any(|request| request.contains(name)),
            "{name}: {away:#?}"
        );
    }
    for request in &away {
        assert!(
            request.contains("[-]") && !request.contains(PASSWORD),
            "{request}"
        );
        assert!(!request.starts_with("POST"), "{request}");
    }
    assert_eq!(nginx.requests(open), [""; 0], "an open line");
}

/// Everything that could be seen of a run.
struct Seen {
    secrets: Vec<String>,
    looked: usize,
}

impl Seen {
    #[track_caller]
    fn check(&mut self, what: &str, text: &[u8]) {
        let text = String::from_utf8_lossy(text);
        for secret in &self.secrets {
            assert!(!text.contains(secret), "{what} has `{secret}`: {text}");
        }
        // All tokens of the token server are JSON Web Tokens, and begin so.
        let token = text.find("eyJ").filter(|at| {
            text[*at..].starts_with("eyJ0eXAi") || text[*at..].starts_with("eyJhbGci")
        });
        assert!(token.is_none(), "{what} has a token: {text}");
        self.looked += 1;
    }

    #[track_caller]
    fn output(&mut self, output: &Output) {
        self.check("stdout", &output.stdout);
        self.check("stderr", output.stderr.as_bytes());
    }

    /// The arguments and the environment of a process and of all that it started.
    fn processes(&mut self, root: u32) {
        let mut left = vec![root];
        while let Some(process) = left.pop() {
            for name in ["cmdline", "environ"] {
                let path = format!("/proc/{process}/{name}");
                let text = fs::read(&path).unwrap_or_default();
                self.check(&path, &text);
            }
            let tasks = fs::read_dir(format!("/proc/{process}/task"));
            for task in tasks.into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children"));
                let children = children.unwrap_or_default();
                left.extend(
                    children
                        .split_whitespace()
                        .filter_map(|id| id.parse::<u32>().ok()),
                );
            }
        }
    }

    /// All files below a directory.
    fn files(&mut self, dir: &Path) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if kind.is_dir() {
                self.files(&path);
            } else if kind.is_file() {
                self.check(&path.display().to_string(), &fs::read(&path).unwrap());
            }
        }
    }
}

#[test]
fn no_secret_is_said_or_left_at_any_level_of_logging() {
    let registry = Registry::start(Access::Token);
    registry.tokens().set_anonymous(false);
    let weights = Content::new(70).bytes(0, 300_000);
    let artifact = Artifact::docker_v02()
        .layer(Layer::bytes(DOCKER_SAFETENSORS, weights.clone()).at("model.safetensors"));
    artifact.publish(&registry, "org/m:v1");
    // Blobs are elsewhere, at addresses that are signed.
    let store = Registry::open();
    artifact.publish(&store, "org/m:v1");
    let front = free_address();
    let _nginx = Nginx::start(front, |_| {
        format!(
            "server {{ listen {front};
               location ~ ^/v2/org/m/blobs/ {{ return 307 http://{}$uri?X-Amz-Signature={SIGNATURE}; }}
               location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; client_max_body_size 0; }} }}",
            store.address(),
            registry.address(),
        )
    });
    let helpers = Helpers::new();
    let host = front.to_string();
    // A helper that notes what it is given.
    helpers.write_login("spy", &host, USER, PASSWORD);
    let script = fs::read_to_string(helpers.dir().join("docker-credential-spy")).unwrap();
    let spying = script.replacen("\nread server", "\nenv >>\"$DIR/env\"\nread server", 1);
    assert_ne!(spying, script);
    fs::write(helpers.dir().join("docker-credential-spy"), spying).unwrap();
    let login = helpers.file(
        "login.json",
        &json!({"auths": {&host: {"auth": basic()}}}).to_string(),
    );
    let identity = helpers.file(
        "identity.json",
        &json!({"auths": {&host: {"identitytoken": REFRESH}}}).to_string(),
    );
    let by_helper = helpers.file(
        "helper.json",
        &json!({"credHelpers": {&host: "spy"}}).to_string(),
    );
    let wrong = helpers.file(
        "wrong.json",
        &json!({"auths": {&host: {"auth": STANDARD.encode(format!("{USER}:{SIGNATURE}"))}}})
            .to_string(),
    );
    let broken = helpers.file(
        "broken.json",
        &format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"{}\" ]", basic()),
    );
    // A mirror that wants a header and is not there, so that all that is said of it is said.
    let hosts = helpers.dir().join("certs.d");
    let place = hosts.join(host.replace(':', "_") + "_");
    fs::create_dir_all(&place).unwrap();
    let mirror =
        format!("[host.\"http://127.0.0.1:1\".header]\n  authorization = \"Bearer {HEADER}\"\n");
    fs::write(place.join("hosts.toml"), mirror).unwrap();
    let mut seen = Seen {
        secrets: [
            PASSWORD,
            REFRESH,
            "r3fresh%26token",
            SIGNATURE,
            HEADER,
            PROXY,
        ]
        .map(str::to_owned)
        .into_iter()
        .chain([basic()])
        .collect(),
        looked: 0,
    };
    let reference = format!("{host}/org/m:v1");
    let model = scratch("model");
    fs::write(model.path().join("config.json"), "{}").unwrap();
    for level in ["error", "warn", "info", "debug", "trace"] {
        let run = |auth: &Path, args: &[&str]| {
            let cache = scratch("cache");
            let mut command = ocifs(args);
            command
                .arg("--auth-file")
                .arg(auth)
                .args(["--hosts-dir".as_ref(), hosts.as_os_str()])
                .env("OCIFS_METADATA_TIMEOUT", "20s")
                .env("OCIFS_LOG", level);
            if args[0] != "push" {
                command.arg("--cache-dir").arg(cache.path());
            }
            helpers.give(&mut command);
            run_command(&mut command, PATIENCE)
        };
        for auth in [&login, &identity, &by_helper, &wrong, &broken] {
            let output = run(auth, &["pull", &reference]);
            assert_eq!(
                output.status.success(),
                ![&wrong, &broken].contains(&auth),
                "{auth:?} {output}"
            );
            seen.output(&output);
        }
        for args in [
            &["ls", &reference][..],
            &["inspect", "--json", &reference],
            &["ls", "--json", &format!("{host}/org/absent:v1")],
        ] {
            seen.output(&run(&login, args));
        }
        let pushed = format!("{host}/org/pushed:{level}");
        let output = run(&login, &["push", model.path().to_str().unwrap(), &pushed]);
        seen.output(&output);
        // A proxy whose address has a password and that is not there.
        let mut command = ocifs(["pull", "registry.example/org/m:v1", "--cache-dir"]);
        let cache = scratch("cache");
        command
            .arg(cache.path())
            .env("OCIFS_METADATA_TIMEOUT", "2s")
            .env("https_proxy", format!("http://u:{PROXY}@127.0.0.1:1"))
            .env("OCIFS_LOG", level);
        let output = run_command(&mut command, PATIENCE);
        assert!(!output.status.success(), "{output}");
        seen.output(&output);
        for password in [PASSWORD, SIGNATURE] {
            let mut command = ocifs([
                "login",
                "--username",
                USER,
                "--password-stdin",
                "--auth-file",
            ]);
            command
                .arg(helpers.dir().join(format!("{level}.json")))
                .arg(&host)
                .env("OCIFS_LOG", level);
            let output = run_with_input(&mut command, format!("{password}\n").as_bytes(), PATIENCE);
            seen.output(&output);
        }
        // A mount, and all that can be asked of it.
        let (cache, runtime) = (scratch("cache"), scratch("runtime"));
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let flags = [
            "--auth-file".to_owned(),
            text(&by_helper),
            "--hosts-dir".to_owned(),
            text(&hosts),
        ];
        let mount = Mount::start_as(cache.path(), flags, |command| {
            helpers.give(command);
            command.env("OCIFS_RUNTIME_DIR", runtime.path());
            command.env("OCIFS_LOG", level);
        });
        assert!(mount.read(&format!("{reference}/model.safetensors")) == weights);
        seen.processes(mount.process());
        for args in [
            &["status", "--json"][..],
            &["status"],
            &["refresh", &reference],
        ] {
            let mut command = ocifs(args);
            command
                .env("OCIFS_RUNTIME_DIR", runtime.path())
                .env("OCIFS_LOG", level);
            seen.output(&run_command(&mut command, PATIENCE));
        }
        let log = mount.log();
        seen.check("the daemon's log", log.as_bytes());
        if level == "trace" {
            assert!(
                log.contains("request"),
                "the level is as loud as it gets: {log}"
            );
        }
        drop(mount);
        seen.files(cache.path());
        seen.files(runtime.path());
    }
    let given = fs::read(helpers.dir().join("env")).expect("the helper was run");
    seen.check("the helper's environment", &given);
    assert!(seen.looked > 200, "{}", seen.looked);
}

/// What a process has in memory are passwords and tokens: a core file would hold them, and whoever may trace it could read them.
#[test]
fn a_daemon_that_crashes_leaves_no_core() {
    let dir = scratch("core");
    let crash = |program: &[OsString]| {
        let mut command = Command::new("bash");
        command
            .args(["-c", "ulimit -c unlimited; exec \"$0\" \"$@\""])
            .args(program)
            .current_dir(dir.path());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_secs(2));
        let process = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(process, Signal::ABORT).unwrap();
        wait(&mut child, PATIENCE).expect("it ends")
    };
    // Another program does leave one here, or nothing is proved.
    let other = crash(&["sleep".into(), "100".into()]);
    assert!(
        other.core_dumped(),
        "{other}: no program leaves a core on this machine"
    );
    let (cache, point) = (dir.path().join("cache"), dir.path().join("point"));
    fs::create_dir(&point).unwrap();
    let program: Vec<OsString> = [
        PathBuf::from(env!("CARGO_BIN_EXE_ocifs")).into_os_string(),
        "mount".into(),
        "--foreground".into(),
        "--cache-dir".into(),
        cache.into(),
        point.clone().into(),
    ]
    .into();
    let ours = crash(&program);
    crate::support::mount::detach(&point);
    assert_eq!(ours.signal(), Some(6), "{ours}");
    assert!(!ours.core_dumped(), "{ours}");
}
