//! A token server as registries name it in their challenge (distribution's token authentication specification).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::http::{Head, Listener, copy_chunked, response};
use super::process::{run, run_with_input};

/// The only user.
pub const USER: &str = "alice";
/// Her password.
pub const PASSWORD: &str = "s3cret";

/// A refresh token of hers, as an identity provider gives it.
pub const REFRESH: &str = "r3fresh&token";

/// The registry accepts a token for this long after it has expired.
pub const LEEWAY: Duration = Duration::from_secs(60);

struct Shared {
    key: PathBuf,
    /// The certificate in base64, for the `x5c` header.
    certificate: String,
    /// Seconds that a token is accepted for, the registry's leeway included.
    lifetime: AtomicU64,
    /// What `expires_in` says, 0: nothing.
    claimed: AtomicU64,
    anonymous: AtomicBool,
    issued: AtomicUsize,
    refused: AtomicUsize,
    scopes: Mutex<Vec<String>>,
    grants: Mutex<Vec<String>>,
}

/// The token server; ends when dropped.
pub struct Tokens {
    listener: Listener,
    shared: Arc<Shared>,
    /// What the registry must trust.
    pub bundle: PathBuf,
}

impl Tokens {
    /// Issuer as the registry must be told.
    pub const ISSUER: &'static str = "ocifs-test-tokens";
    /// Service as the registry must be told.
    pub const SERVICE: &'static str = "ocifs-test-registry";

    /// Starts it with key and certificate in `dir`: tokens for five minutes, anonymous pulls allowed.
    pub fn start(dir: &Path) -> Self {
        let key = dir.join("token.key");
        let bundle = dir.join("token.crt");
        run(
            "openssl",
            [
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=ocifs test tokens",
                "-keyout",
                key.to_str().unwrap(),
                "-out",
                bundle.to_str().unwrap(),
            ],
        )
        .ok();
        let pem = std::fs::read_to_string(&bundle).unwrap();
        let certificate = pem
            .lines()
            .filter(|line| !line.starts_with("-----"))
            .collect();
        let shared = Arc::new(Shared {
            key,
            certificate,
            lifetime: AtomicU64::new(300),
            claimed: AtomicU64::new(300),
            anonymous: AtomicBool::new(true),
            issued: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            scopes: Mutex::default(),
            grants: Mutex::default(),
        });
        let state = shared.clone();
        Self {
            listener: Listener::start(move |stream, _| state.serve(stream)),
            shared,
            bundle,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.address
    }

    /// The realm for the challenge.
    pub fn realm(&self) -> String {
        format!("http://{}/token", self.listener.address)
    }

    /// A token with which the user may pull from and push to a repository.
    pub fn mint(&self, repository: &str) -> String {
        let access =
            json!([{"type": "repository", "name": repository, "actions": ["pull", "push"]}]);
        self.shared.sign(USER, Self::SERVICE, 0, &access)
    }

    /// From now on tokens are accepted for `lifetime` and said to be so for `claimed` (`None`: not said).
    pub fn set_lifetime(&self, lifetime: Duration, claimed: Option<Duration>) {
        self.shared
            .lifetime
            .store(lifetime.as_secs(), Ordering::Relaxed);
        self.shared
            .claimed
            .store(claimed.map_or(0, |time| time.as_secs()), Ordering::Relaxed);
    }

    /// Whether those without credentials may pull.
    pub fn set_anonymous(&self, allowed: bool) {
        self.shared.anonymous.store(allowed, Ordering::Relaxed);
    }

    /// Tokens issued so far.
    pub fn issued(&self) -> usize {
        self.shared.issued.load(Ordering::Relaxed)
    }

    /// Requests with wrong credentials so far.
    pub fn refused(&self) -> usize {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// The method of every request, with the `grant_type` of its form.
    pub fn grants(&self) -> Vec<String> {
        self.shared.grants.lock().unwrap().clone()
    }

    /// Every scope that was asked for.
    pub fn scopes(&self) -> Vec<String> {
        self.shared.scopes.lock().unwrap().clone()
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        let Ok(mut writer) = stream.try_clone() else {
            return;
        };
        let mut reader = BufReader::new(stream);
        while let Some(head) = Head::read(&mut reader) {
            let Ok(form) = body(&mut reader, &head) else {
                return;
            };
            let form = String::from_utf8_lossy(&form).into_owned();
            let (status, body) = self.token(&head, &form);
            let headers: &[(&str, &str)] = match status {
                401 => &[
                    ("Content-Type", "application/json"),
                    ("WWW-Authenticate", "Basic realm=\"tokens\""),
                ],
                _ => &[("Content-Type", "application/json")],
            };
            if writer
                .write_all(&response(status, headers, body.to_string().as_bytes()))
                .is_err()
            {
                return;
            }
        }
    }

    /// GET with a query, or the OAuth2 POST with a form.
    fn token(&self, head: &Head, form: &str) -> (u16, Value) {
        let query = head.target().split_once('?').map_or("", |(_, query)| query);
        let fields: Vec<(String, String)> = query
            .split('&')
            .chain(form.split('&'))
            .filter_map(|field| field.split_once('='))
            .map(|(name, value)| (name.to_owned(), unescape(value)))
            .collect();
        let field = |name: &str| {
            fields
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, value)| value.as_str())
        };
        let basic = head
            .get("authorization")
            .and_then(|value| value.strip_prefix("Basic "))
            .map(|value| {
                let plain = STANDARD.decode(value).unwrap_or_default();
                String::from_utf8_lossy(&plain).into_owned()
            });
        let password = field("username")
            .zip(field("password"))
            .map(|(user, word)| format!("{user}:{word}"));
        let refresh = field("refresh_token").map(|token| match token {
            REFRESH => format!("{USER}:{PASSWORD}"),
            _ => String::new(),
        });
        let grant = field("grant_type").unwrap_or_default();
        self.grants
            .lock()
            .unwrap()
            .push(format!("{} {grant}", head.method()).trim().to_owned());
        let user = match basic.or(password).or(refresh) {
            Some(pair) if pair == format!("{USER}:{PASSWORD}") => Some(USER),
            Some(_) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return (
                    401,
                    json!({"errors": [{"code": "UNAUTHORIZED", "message": "wrong user or password"}]}),
                );
            }
            None => None,
        };
        let mut access = Vec::new();
        for (_, value) in fields.iter().filter(|(name, _)| name == "scope") {
            for scope in value.split(' ') {
                self.scopes.lock().unwrap().push(scope.to_owned());
                // `repository:NAME:ACTIONS`, and NAME may hold a colon (a host's port) of its own.
                let (Some((kind, rest)), Some((_, actions))) =
                    (scope.split_once(':'), scope.rsplit_once(':'))
                else {
                    continue;
                };
                let Some(name) = rest
                    .strip_suffix(actions)
                    .and_then(|name| name.strip_suffix(':'))
                else {
                    continue;
                };
                let granted: Vec<_> = actions
                    .split(',')
                    .filter(|action| {
                        user.is_some()
                            || (*action == "pull" && self.anonymous.load(Ordering::Relaxed))
                    })
                    .collect();
                access.push(json!({"type": kind, "name": name, "actions": granted}));
            }
        }
        let serial = self.issued.fetch_add(1, Ordering::Relaxed);
        let token = self.sign(
            user.unwrap_or(""),
            field("service").unwrap_or(""),
            serial,
            &Value::from(access),
        );
        let mut answer = json!({"token": token, "access_token": token});
        let claimed = self.claimed.load(Ordering::Relaxed);
        if claimed > 0 {
            answer["expires_in"] = claimed.into();
        }
        (200, answer)
    }

    /// A JSON Web Token, RS256 (RFC 7519), signed by `openssl`.
    fn sign(&self, subject: &str, audience: &str, serial: usize, access: &Value) -> String {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [self.certificate]});
        let claims = json!({
            "iss": Tokens::ISSUER, "sub": subject, "aud": audience, "jti": format!("{serial}"),
            "iat": now - 120, "nbf": now - 120,
            "exp": now + self.lifetime.load(Ordering::Relaxed) - LEEWAY.as_secs(),
            "access": access,
        });
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-sha256", "-sign"]).arg(&self.key);
        let signature = run_with_input(&mut openssl, signed.as_bytes(), super::PATIENCE).ok_bytes();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// A request's body, of announced length or in chunks, as skopeo sends its form.
fn body(reader: &mut impl BufRead, head: &Head) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if !head.is_chunked() {
        let length = head.length().unwrap_or(0).min(1 << 16);
        reader.take(length).read_to_end(&mut body)?;
        return Ok(body);
    }
    let mut raw = Vec::new();
    copy_chunked(reader, &mut raw)?;
    let mut rest = raw.as_slice();
    loop {
        let mut size = String::new();
        rest.read_line(&mut size)?;
        match usize::from_str_radix(size.trim(), 16) {
            Ok(size) if size > 0 && rest.len() >= size + 2 => {
                body.extend_from_slice(&rest[..size]);
                rest = &rest[size + 2..];
            }
            _ => return Ok(body),
        }
    }
}

/// Percent-decoding as forms have it.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                u8::from_str_radix(&String::from_utf8_lossy(&digits), 16).unwrap_or(b'?')
            }
            other => other,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
