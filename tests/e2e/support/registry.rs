//! Debian's docker-registry on a loopback port: open, with passwords over TLS, or with bearer tokens.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::certs::Certs;
use super::process::{Daemon, run};
use super::python::python;
use super::tokens::{PASSWORD, Tokens, USER};

/// How a registry wants to be spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Plain HTTP, everybody may do everything.
    Open,
    /// TLS with a certificate of our own CA, and HTTP Basic.
    Htpasswd,
    /// Plain HTTP and bearer tokens: everybody may pull, the user may push.
    Token,
}

/// A running registry and all that belongs to it.
pub struct Registry {
    access: Access,
    address: SocketAddr,
    daemon: Daemon,
    certs: Option<Certs>,
    tokens: Option<Tokens>,
    /// What its configuration has beside, by section.
    extra: Value,
    dir: TempDir,
}

impl Registry {
    pub fn open() -> Self {
        Self::start(Access::Open)
    }

    pub fn start(access: Access) -> Self {
        Self::start_with(access, |_| json!({}))
    }

    /// A pull-through cache of the registry at this address.
    pub fn pull_through(upstream: SocketAddr) -> Self {
        let url = format!("http://{upstream}");
        Self::start_with(Access::Open, |_| json!({"proxy": {"remoteurl": url}}))
    }

    /// With these sections in its configuration, by name, where `null` takes a default away; `extra` gets the registry's directory.
    pub fn start_with(access: Access, extra: impl FnOnce(&Path) -> Value) -> Self {
        let dir = super::scratch("registry");
        let certs = (access == Access::Htpasswd).then(|| Certs::make(dir.path()));
        let tokens = (access == Access::Token).then(|| Tokens::start(dir.path()));
        if access == Access::Htpasswd {
            let line = run("htpasswd", ["-Bbn", USER, PASSWORD]).ok();
            fs::write(dir.path().join("htpasswd"), line.trim()).unwrap();
        }
        let extra = extra(dir.path());
        let credentials = json!({"auth": STANDARD.encode(format!("{USER}:{PASSWORD}"))});
        let mut attempts = 0;
        let (address, daemon) = loop {
            let address = super::free_address();
            if let Some(daemon) =
                launch(dir.path(), address, certs.as_ref(), tokens.as_ref(), &extra)
            {
                break (address, daemon);
            }
            attempts += 1;
            let log = fs::read_to_string(dir.path().join("log")).unwrap_or_default();
            assert!(attempts < 5, "docker-registry does not start: {log}");
        };
        let registry = Self {
            access,
            address,
            daemon,
            certs,
            tokens,
            extra,
            dir,
        };
        let hosts = json!({"auths": {registry.host(): credentials, registry.address.to_string(): credentials}});
        fs::write(registry.auth_file(), hosts.to_string()).unwrap();
        registry
    }

    /// `127.0.0.1:PORT`, or `localhost:PORT` where the certificate's name must match.
    pub fn host(&self) -> String {
        match self.access {
            Access::Htpasswd => format!("localhost:{}", self.address.port()),
            Access::Open | Access::Token => self.address.to_string(),
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn tokens(&self) -> &Tokens {
        self.tokens
            .as_ref()
            .expect("the registry was started with Access::Token")
    }

    /// A docker-style credentials file for the user.
    pub fn auth_file(&self) -> PathBuf {
        self.dir.path().join("auth.json")
    }

    /// What `ocifs` must be told to reach this registry as the user.
    pub fn ocifs_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        if let Some(certs) = &self.certs {
            args.extend([
                "--ca-file".to_owned(),
                certs.ca.to_str().unwrap().to_owned(),
            ]);
        }
        if self.access != Access::Open {
            args.extend([
                "--auth-file".to_owned(),
                self.auth_file().to_str().unwrap().to_owned(),
            ]);
        }
        args
    }

    /// A certificate file to trust, where there is one.
    pub fn ca(&self) -> Option<&Path> {
        self.certs.as_ref().map(|certs| certs.ca.as_path())
    }

    /// What it trusts and shows, where it speaks TLS.
    pub fn certs(&self) -> &Certs {
        self.certs.as_ref().expect("the registry speaks TLS")
    }

    /// `skopeo copy` from anywhere into this registry.
    pub fn skopeo_push(&self, source: &str, name: &str) {
        let mut args = vec![
            "--insecure-policy".to_owned(),
            "copy".to_owned(),
            "-q".to_owned(),
        ];
        args.extend(self.skopeo_options("dest-"));
        args.extend([
            source.to_owned(),
            format!("docker://{}/{name}", self.host()),
        ]);
        run("skopeo", args).ok();
    }

    /// Pushes files by oras (PyPI): `config` and `files` are `PATH:MEDIATYPE`. Not for passwords over TLS: oras takes the
    /// realm of a Basic challenge for the address of a token server.
    pub fn oras_push(&self, name: &str, config: &str, files: &[&str]) {
        let repository = name.split(':').next().unwrap();
        let token = self
            .tokens
            .as_ref()
            .map_or(String::new(), |tokens| tokens.mint(repository));
        let mut args = vec![self.host(), name.to_owned(), token, config.to_owned()];
        args.extend(files.iter().map(|file| (*file).to_owned()));
        python("push_oras.py", args).ok();
    }

    /// `skopeo copy` from this registry to anywhere.
    pub fn skopeo_pull(&self, name: &str, target: &str) {
        let mut args = vec![
            "--insecure-policy".to_owned(),
            "copy".to_owned(),
            "-q".to_owned(),
        ];
        args.extend(self.skopeo_options("src-"));
        args.extend([
            format!("docker://{}/{name}", self.host()),
            target.to_owned(),
        ]);
        run("skopeo", args).ok();
    }

    fn skopeo_options(&self, side: &str) -> Vec<String> {
        let mut options = Vec::new();
        match &self.certs {
            Some(_) => options.push(format!("--{side}cert-dir={}", self.cert_dir().display())),
            None => options.push(format!("--{side}tls-verify=false")),
        }
        match self.access {
            Access::Open => options.push(format!("--{side}no-creds")),
            Access::Htpasswd | Access::Token => {
                options.push(format!("--{side}creds={USER}:{PASSWORD}"))
            }
        }
        options
    }

    /// Gives the user another password (with [`Access::Htpasswd`]); the running registry takes it from now on.
    pub fn set_password(&self, password: &str) {
        let line = run("htpasswd", ["-Bbn", USER, password]).ok();
        fs::write(self.dir.path().join("htpasswd"), line.trim()).unwrap();
    }

    /// The directory with its certificate authority, as skopeo's `--cert-dir` wants it.
    pub fn cert_dir(&self) -> PathBuf {
        let dir = self.dir.path().join("skopeo-certs");
        fs::create_dir_all(&dir).unwrap();
        fs::copy(
            self.ca().expect("the registry speaks TLS"),
            dir.join("ca.crt"),
        )
        .unwrap();
        dir
    }

    /// The directory that it keeps everything in.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The file that holds a blob, to look at or to damage.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a SHA-256 digest");
        self.dir
            .path()
            .join("data/docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }

    /// Ends it: connections are refused from now on.
    pub fn stop(&mut self) {
        self.daemon.kill();
    }

    /// Starts it again on the same port, after [`Self::stop`].
    pub fn restart(&mut self) {
        self.daemon = launch(
            self.dir.path(),
            self.address,
            self.certs.as_ref(),
            self.tokens.as_ref(),
            &self.extra,
        )
        .expect("the port is still free");
    }

    /// Lines of its access log that contain `text`.
    pub fn log_lines(&self, text: &str) -> usize {
        self.daemon
            .log()
            .lines()
            .filter(|line| line.contains(text))
            .count()
    }
}

/// Starts the process; `None` when it ends at once, as it does when somebody else took the port.
fn launch(
    dir: &Path,
    address: SocketAddr,
    certs: Option<&Certs>,
    tokens: Option<&Tokens>,
    extra: &Value,
) -> Option<Daemon> {
    let mut config = json!({
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": dir.join("data")}, "delete": {"enabled": true}},
        "http": {"addr": address.to_string(), "secret": "of no use outside this test", "relativeurls": true},
    });
    if let Some(certs) = certs {
        config["http"]["tls"] = json!({"certificate": certs.certificate, "key": certs.key});
        config["auth"] =
            json!({"htpasswd": {"realm": "basic-realm", "path": dir.join("htpasswd")}});
    }
    if let Some(tokens) = tokens {
        config["auth"] = json!({"token": {
            "realm": tokens.realm(), "service": Tokens::SERVICE, "issuer": Tokens::ISSUER, "rootcertbundle": tokens.bundle,
        }});
    }
    for (section, value) in extra.as_object().expect("sections by name") {
        match config[section].as_object_mut() {
            Some(there) => {
                there.extend(value.as_object().expect("a section").clone());
                there.retain(|_, value| !value.is_null());
            }
            None => config[section] = value.clone(),
        }
    }
    // YAML is a superset of JSON.
    let file = dir.join("config.yml");
    fs::write(&file, config.to_string()).unwrap();
    let mut command = Command::new("docker-registry");
    command
        .arg("serve")
        .arg(&file)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default());
    let mut daemon = Daemon::start("docker-registry", &mut command, &dir.join("log"));
    super::eventually(
        Duration::from_secs(30),
        "docker-registry listens or ends",
        || {
            if !daemon.is_running() {
                return Some(false);
            }
            TcpStream::connect(address).ok().map(|_| true)
        },
    );
    // Somebody else may have answered on that port while ours ended.
    std::thread::sleep(Duration::from_millis(50));
    daemon.is_running().then_some(daemon)
}
