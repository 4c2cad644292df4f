//! Credentials from docker's `config.json` and podman's `auth.json` (containers-auth.json(5)).

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;

use base64::Engine as _;

use crate::base::Secret;

/// What we can prove to a registry or its token server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Credentials {
    /// A user name and a password.
    Basic {
        /// The user's name.
        username: String,
        /// The password or access token.
        password: Secret,
    },
    /// `identitytoken`: a refresh token for the token server.
    Identity(Secret),
    /// `registrytoken`: a bearer token, used as it is.
    Registry(Secret),
}

/// Longest credential file that is read, in bytes.
const LONGEST_FILE: u64 = 1 << 20;

/// The files that podman and docker look into, in order: `REGISTRY_AUTH_FILE`, `$XDG_RUNTIME_DIR/containers/auth.json`,
/// `$XDG_CONFIG_HOME/containers/auth.json`, `$DOCKER_CONFIG/config.json`, with their defaults. `env` reads a variable.
pub fn default_auth_files(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let dir = |name: &str| {
        env(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = dir("HOME");
    let under_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let runtime = dir("XDG_RUNTIME_DIR")
        .map(|dir| dir.join("containers"))
        .unwrap_or_else(|| {
            PathBuf::from(format!(
                "/run/containers/{}",
                rustix::process::getuid().as_raw()
            ))
        });
    [
        dir("REGISTRY_AUTH_FILE"),
        Some(runtime.join("auth.json")),
        dir("XDG_CONFIG_HOME")
            .or_else(|| under_home(".config"))
            .map(|dir| dir.join("containers/auth.json")),
        dir("DOCKER_CONFIG")
            .or_else(|| under_home(".docker"))
            .map(|dir| dir.join("config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The credentials for a repository in the first file that has some. Files are read each time: a login needs no restart.
pub(super) async fn find(files: &[PathBuf], host: &str, path: &str) -> Option<Credentials> {
    for file in files {
        let text = match read_bounded(file).await {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                tracing::warn!(file = %file.display(), %error, "credential file cannot be read, going on without it");
                continue;
            }
        };
        match serde_json::from_slice::<AuthFile>(&text) {
            Ok(parsed) => {
                if let Some(found) = parsed.lookup(host, path) {
                    return Some(found);
                }
            }
            // serde_json's message may quote the text: say where, not what.
            Err(error) => tracing::warn!(
                file = %file.display(),
                line = error.line(),
                "credential file is not in docker's JSON format, going on without it"
            ),
        }
    }
    None
}

async fn read_bounded(file: &std::path::Path) -> std::io::Result<Vec<u8>> {
    use tokio::io::AsyncReadExt;
    let mut text = Vec::new();
    tokio::fs::File::open(file)
        .await?
        .take(LONGEST_FILE + 1)
        .read_to_end(&mut text)
        .await?;
    if text.len() as u64 > LONGEST_FILE {
        return Err(std::io::Error::other("longer than 1 MiB"));
    }
    Ok(text)
}

/// A credential file. `credsStore` and `credHelpers` are read so that a user can be told about them.
#[derive(serde::Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: HashMap<String, Entry>,
    #[serde(default, rename = "credsStore")]
    creds_store: Option<String>,
    #[serde(default, rename = "credHelpers")]
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl AuthFile {
    /// The most specific entry: `host/a/b`, `host/a`, `host`, then legacy keys such as `https://host/v1/`.
    fn lookup(&self, host: &str, path: &str) -> Option<Credentials> {
        let exact = keys(host, path)
            .into_iter()
            .filter_map(|key| self.auths.get(&key));
        let mut legacy: Vec<_> = self
            .auths
            .iter()
            .filter(|(key, _)| hub(legacy_host(key)) == hub(host))
            .collect();
        // Of several the first by name, so that it is the same one each time.
        legacy.sort_unstable_by_key(|(key, _)| *key);
        let legacy = legacy.into_iter().map(|(_, entry)| entry);
        let found = exact.chain(legacy).find_map(Entry::credentials);
        if found.is_none() {
            // Credential helpers would be asked here, before the plain entries.
            let helper = self.cred_helpers.get(host).or(self.creds_store.as_ref());
            if let Some(helper) = helper {
                tracing::debug!(
                    host,
                    helper,
                    "credential helpers are not asked; only plain `auths` entries are used"
                );
            }
        }
        found
    }
}

/// `host/a/b`, `host/a`, `host`.
fn keys(host: &str, path: &str) -> Vec<String> {
    let mut key = format!("{host}/{path}");
    let mut keys = vec![key.clone()];
    while key.len() > host.len() {
        key.truncate(key.rfind('/').unwrap_or(0).max(host.len()));
        keys.push(key.clone());
    }
    keys
}

/// The host of a key that is a URL or ends in an API version, the way `docker login` wrote keys; else the key itself.
fn legacy_host(key: &str) -> &str {
    let (bare, is_url) = match key.split_once("://") {
        Some((_, bare)) => (bare, true),
        None => (key, false),
    };
    match bare.split_once('/') {
        Some((host, rest)) if is_url || matches!(rest.trim_end_matches('/'), "" | "v1" | "v2") => {
            host
        }
        _ => bare,
    }
}

/// Docker Hub's several names as one.
fn hub(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    }
}

impl Entry {
    fn credentials(&self) -> Option<Credentials> {
        let given = |field: &Option<String>| field.clone().filter(|text| !text.is_empty());
        if let Some(token) = given(&self.identitytoken) {
            return Some(Credentials::Identity(Secret::new(token)));
        }
        if let Some(token) = given(&self.registrytoken) {
            return Some(Credentials::Registry(Secret::new(token)));
        }
        let (username, password) = match given(&self.auth).and_then(|auth| decode(&auth)) {
            Some(pair) => pair,
            None => (given(&self.username)?, given(&self.password)?),
        };
        // docker's helpers mark a refresh token by this user name.
        if username == "<token>" {
            return Some(Credentials::Identity(Secret::new(password)));
        }
        Some(Credentials::Basic {
            username,
            password: Secret::new(password),
        })
    }
}

/// `base64(user:password)`, padded or not.
fn decode(auth: &str) -> Option<(String, String)> {
    use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let text = String::from_utf8(LENIENT.decode(auth.trim()).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    let password = password.trim_matches('\0');
    (!username.is_empty()).then(|| (username.to_owned(), password.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Basic {
            username: username.into(),
            password: Secret::new(password),
        })
    }

    fn lookup(json: &str, host: &str, path: &str) -> Option<Credentials> {
        serde_json::from_str::<AuthFile>(json)
            .unwrap()
            .lookup(host, path)
    }

    #[test]
    fn the_most_specific_key_wins() {
        // a:1, b:2, c:3, d:4
        let json = r#"{"auths":{"quay.io":{"auth":"YTox"},"quay.io/org":{"auth":"Yjoy"},"quay.io/org/m":{"auth":"Yzoz"},
            "other.io/org":{"auth":"ZDo0"}}}"#;
        assert_eq!(lookup(json, "quay.io", "x"), basic("a", "1"));
        assert_eq!(lookup(json, "quay.io", "organic/m"), basic("a", "1"));
        assert_eq!(lookup(json, "quay.io", "org/x"), basic("b", "2"));
        assert_eq!(lookup(json, "quay.io", "org/m"), basic("c", "3"));
        assert_eq!(lookup(json, "other.io", "org/x"), basic("d", "4"));
        assert_eq!(lookup(json, "other.io", "x"), None);
        assert_eq!(lookup(json, "io", "x"), None);
    }

    #[test]
    fn legacy_keys_name_their_host() {
        let hub = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"YTox"}}}"#;
        assert_eq!(lookup(hub, "docker.io", "ai/x"), basic("a", "1"));
        assert_eq!(lookup(hub, "index.docker.io.evil.org", "ai/x"), None);
        for key in [
            "https://h:5000",
            "http://h:5000/v2/",
            "https://h:5000/any/path",
            "h:5000/v1/",
            "h:5000/",
            "h:5000",
        ] {
            let json = format!(r#"{{"auths":{{"{key}":{{"auth":"YTox"}}}}}}"#);
            assert_eq!(lookup(&json, "h:5000", "x"), basic("a", "1"), "{key}");
            assert_eq!(lookup(&json, "h", "x"), None, "{key}");
            assert_eq!(lookup(&json, "h:5001", "x"), None, "{key}");
        }
    }

    #[test]
    fn all_kinds_of_entries() {
        for (entry, expected) in [
            (r#"{"username":"u","password":"p:w"}"#, basic("u", "p:w")),
            (
                r#"{"auth":"YTox","identitytoken":"t"}"#,
                Some(Credentials::Identity(Secret::new("t"))),
            ),
            (
                r#"{"registrytoken":"t"}"#,
                Some(Credentials::Registry(Secret::new("t"))),
            ),
            (
                r#"{"username":"<token>","password":"t"}"#,
                Some(Credentials::Identity(Secret::new("t"))),
            ),
            (r#"{"auth":"YTpiOmM="}"#, basic("a", "b:c")),
            (r#"{"auth":"YTpiOmM"}"#, basic("a", "b:c")),
            (r#"{"auth":"!!!"}"#, None),
            (r#"{"auth":""}"#, None),
            ("{}", None),
        ] {
            assert_eq!(
                lookup(
                    &format!(r#"{{"auths":{{"h.io":{entry}}},"credsStore":"desktop"}}"#),
                    "h.io",
                    "x"
                ),
                expected,
                "{entry}"
            );
        }
    }

    #[test]
    fn the_places_of_the_files() {
        let env = |name: &str| match name {
            "HOME" => Some("/home/u".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/7".into()),
            _ => None,
        };
        let expected = [
            "/run/user/7/containers/auth.json",
            "/home/u/.config/containers/auth.json",
            "/home/u/.docker/config.json",
        ];
        assert_eq!(default_auth_files(env), expected.map(PathBuf::from));
        let all = |name: &str| Some(format!("/{name}").into());
        let expected = [
            "/REGISTRY_AUTH_FILE",
            "/XDG_RUNTIME_DIR/containers/auth.json",
            "/XDG_CONFIG_HOME/containers/auth.json",
            "/DOCKER_CONFIG/config.json",
        ];
        assert_eq!(default_auth_files(all), expected.map(PathBuf::from));
        assert_eq!(default_auth_files(|_| None).len(), 1);
    }

    #[tokio::test]
    async fn broken_and_missing_files_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("broken"), "{").unwrap();
        std::fs::write(path("large"), vec![b' '; 2 << 20]).unwrap();
        std::fs::write(path("good"), r#"{"auths":{"h.io":{"auth":"YTox"}}}"#).unwrap();
        let files = [path("missing"), path("broken"), path("large"), path("good")];
        assert_eq!(find(&files, "h.io", "x").await, basic("a", "1"));
        assert_eq!(find(&files[..3], "h.io", "x").await, None);
    }
}
