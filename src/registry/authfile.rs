//! Credential files: docker's `config.json`, podman's `auth.json` (containers-auth.json(5)), Kubernetes' mounted secrets.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::Value;

use super::credentials::Credentials;
use crate::base::Secret;

/// Longest credential file that is read, in bytes.
pub(super) const LONGEST_FILE: u64 = 1 << 20;
/// The name by which docker and its helpers know Docker Hub.
pub(super) const HUB: &str = "https://index.docker.io/v1/";
/// What a mounted secret or a docker configuration directory may hold, in order.
const IN_DIRECTORY: [&str; 4] = [".dockerconfigjson", "config.json", "auth.json", LEGACY];
/// Docker's format before 1.7, and Kubernetes' `kubernetes.io/dockercfg`: the entries alone, without `auths` around them.
const LEGACY: &str = ".dockercfg";

/// A credential file that was read.
pub(super) struct AuthFile {
    auths: HashMap<String, Value>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

/// Why a file gives nothing.
#[derive(Debug)]
pub(super) enum Unread {
    /// There is none.
    Absent,
    /// It cannot be read.
    Io(io::Error),
    /// It is not in docker's format. serde_json's message may quote the text: where, not what.
    Syntax(usize),
}

impl AuthFile {
    /// Reads a file, or the one that a directory has: Kubernetes mounts a secret as a directory that it swaps.
    pub(super) async fn read(path: &Path) -> Result<Self, Unread> {
        match read_bounded(path).await {
            Ok(text) => Self::parse(&text, path.ends_with(LEGACY)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Unread::Absent),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                for name in IN_DIRECTORY {
                    match read_bounded(&path.join(name)).await {
                        Ok(text) => return Self::parse(&text, name == LEGACY),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(Unread::Io(error)),
                    }
                }
                Err(Unread::Absent)
            }
            Err(error) => Err(Unread::Io(error)),
        }
    }

    pub(super) fn parse(text: &[u8], legacy: bool) -> Result<Self, Unread> {
        // Entries stay JSON until they are looked up: a strange one spoils itself alone.
        #[derive(serde::Deserialize)]
        struct Format {
            #[serde(default)]
            auths: Option<HashMap<String, Value>>,
            #[serde(default, rename = "credsStore")]
            creds_store: Option<String>,
            #[serde(default, rename = "credHelpers")]
            cred_helpers: Option<HashMap<String, String>>,
        }
        let syntax = |error: serde_json::Error| Unread::Syntax(error.line());
        if legacy {
            return Ok(Self {
                auths: serde_json::from_slice(text).map_err(syntax)?,
                creds_store: None,
                cred_helpers: HashMap::new(),
            });
        }
        let format: Format = serde_json::from_slice(text).map_err(syntax)?;
        Ok(Self {
            auths: format.auths.unwrap_or_default(),
            creds_store: format.creds_store.filter(|name| !name.is_empty()),
            cred_helpers: format.cred_helpers.unwrap_or_default(),
        })
    }

    /// The helper to ask about a host: its own, else the store for all. An empty name for a host means none, as with docker.
    pub(super) fn helper(&self, host: &str) -> Option<&str> {
        let mut own: Vec<_> = self
            .cred_helpers
            .iter()
            .filter(|(key, _)| same_host(key, host))
            .collect();
        // Of several spellings the first by name, so that it is the same one each time.
        own.sort_unstable();
        match own.first() {
            Some((_, name)) => Some(name.as_str()).filter(|name| !name.is_empty()),
            None => self.creds_store.as_deref(),
        }
    }

    /// The most specific entry: `host/a/b`, `host/a`, `host`, then legacy keys such as `https://host/v1/`.
    pub(super) fn lookup(&self, host: &str, path: &str) -> Option<Credentials> {
        let exact = keys(host, path)
            .into_iter()
            .filter_map(|key| self.auths.get(&key));
        let mut legacy: Vec<_> = self
            .auths
            .iter()
            .filter(|(key, _)| same_host(key, host))
            .collect();
        legacy.sort_unstable_by_key(|(key, _)| *key);
        let legacy = legacy.into_iter().map(|(_, entry)| entry);
        exact.chain(legacy).find_map(credentials)
    }
}

#[cfg(any(test, fuzzing))]
impl AuthFile {
    /// How many entries a host has, under any spelling.
    pub(super) fn auths_of(&self, host: &str) -> usize {
        let keys = self.auths.keys();
        keys.filter(|key| same_host(key, host)).count()
    }
}

async fn read_bounded(file: &Path) -> io::Result<Vec<u8>> {
    use tokio::io::AsyncReadExt;
    let mut text = Vec::new();
    tokio::fs::File::open(file)
        .await?
        .take(LONGEST_FILE + 1)
        .read_to_end(&mut text)
        .await?;
    if text.len() as u64 > LONGEST_FILE {
        return Err(io::Error::other("longer than 1 MiB"));
    }
    Ok(text)
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

/// Whether a key names this host, in any of the spellings that `docker login` has had.
pub(super) fn same_host(key: &str, host: &str) -> bool {
    hub(legacy_host(key)) == hub(host)
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

/// The name under which docker keeps a host's login, in files and with helpers.
pub(super) fn key_of(host: &str) -> &str {
    match hub(host) {
        "docker.io" => HUB,
        _ => host,
    }
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

/// What an entry opens; `None` for one that is empty, as docker leaves it beside a helper, or malformed.
fn credentials(entry: &Value) -> Option<Credentials> {
    use serde::Deserialize;
    let entry = Entry::deserialize(entry).ok()?;
    let given = |field: Option<String>| field.filter(|text| !text.is_empty());
    if let Some(token) = given(entry.identitytoken) {
        return Some(Credentials::Identity(Secret::new(token)));
    }
    if let Some(token) = given(entry.registrytoken) {
        return Some(Credentials::Registry(Secret::new(token)));
    }
    let (username, password) = match given(entry.auth).and_then(|auth| decode(&auth)) {
        Some(pair) => pair,
        None => (given(entry.username)?, given(entry.password)?),
    };
    Some(Credentials::login(username, Secret::new(password)))
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

/// A change to a credential file: what one host's entry becomes, all else left as it is.
pub(super) enum Edit<'a> {
    /// `{"auth": base64(user:password)}`, or `{"identitytoken": …}`.
    Keep(&'a Credentials),
    /// `{}`: a helper has it. Docker lists its hosts so.
    KeptByHelper,
    /// No entry, under any spelling of the host.
    Remove,
}

/// Makes the change for a host, or with podman a namespace of it (`quay.io/org`), in the text of a file (empty: a new one). Gives the
/// new text, or `None` when it is the old one.
pub(super) fn edit(text: &[u8], host: &str, change: Edit<'_>) -> Result<Option<String>, String> {
    let mut root: Value = if text.iter().all(u8::is_ascii_whitespace) {
        Value::Object(serde_json::Map::new())
    } else {
        serde_json::from_slice(text).map_err(|error| format!("line {}: no JSON", error.line()))?
    };
    let before = root.clone();
    let object = root.as_object_mut().ok_or("it is no JSON object")?;
    let auths = match object.entry("auths") {
        serde_json::map::Entry::Vacant(slot) => match change {
            Edit::Remove => return Ok(None),
            _ => slot.insert(Value::Object(serde_json::Map::new())),
        },
        serde_json::map::Entry::Occupied(slot) => slot.into_mut(),
    };
    if auths.is_null() {
        *auths = Value::Object(serde_json::Map::new());
    }
    let auths = auths
        .as_object_mut()
        .ok_or("its `auths` is no JSON object")?;
    match change {
        Edit::Remove => auths.retain(|key, _| !same_host(key, host)),
        Edit::Keep(_) | Edit::KeptByHelper => {
            // Another spelling of the host would be found as well, and has the old password.
            let key = key_of(host);
            auths.retain(|other, _| other == key || !same_host(other, host));
            let entry = match change {
                Edit::Keep(credentials) => written(credentials),
                _ => Value::Object(serde_json::Map::new()),
            };
            auths.insert(key.to_owned(), entry);
        }
    }
    Ok((root != before).then(|| pretty(&root)))
}

/// An entry as docker writes it.
fn written(credentials: &Credentials) -> Value {
    let encode = |user: &str, password: &str| {
        base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
    };
    match credentials {
        Credentials::Basic { username, password } => {
            serde_json::json!({"auth": encode(username, password.expose())})
        }
        Credentials::Identity(token) => {
            serde_json::json!({"auth": encode("<token>", ""), "identitytoken": token.expose()})
        }
        Credentials::Registry(token) => serde_json::json!({"registrytoken": token.expose()}),
    }
}

/// Tabs, as docker writes its file: a diff shows what changed.
fn pretty(value: &Value) -> String {
    use serde::Serialize;
    let mut text = Vec::new();
    let tabs = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, tabs);
    value
        .serialize(&mut serializer)
        .expect("a Vec takes every write, and keys are texts");
    text.push(b'\n');
    String::from_utf8(text).expect("JSON is UTF-8")
}

/// The file that a path stands for when something is to be written: of a directory its `config.json`.
pub(super) fn file_in(path: &Path) -> PathBuf {
    if path.is_dir() {
        path.join("config.json")
    } else {
        path.to_owned()
    }
}

#[cfg(test)]
#[path = "authfile_tests.rs"]
mod tests;
