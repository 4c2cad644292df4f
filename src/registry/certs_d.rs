//! containerd's registry directory (`/etc/containerd/certs.d`): a registry's mirrors, and how each server is to be spoken to.
//!
//! `DIR/<host>_<port>_/hosts.toml`, `DIR/<host:port>/hosts.toml`, `DIR/_default/hosts.toml`: the first that is there counts (containerd,
//! docs/hosts.md). A directory without `hosts.toml` may hold certificates as docker's does: `*.crt`, `*.cert` with `*.key`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::address::is_loopback;

/// The largest file that is read, in bytes.
const LARGEST: u64 = 1 << 20;
/// Most hosts that a file may name.
const MOST_HOSTS: usize = 64;

/// What a directory says about one registry.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Registered {
    /// Its mirrors, in the order in which they are asked.
    pub(super) mirrors: Vec<Endpoint>,
    /// The registry itself.
    pub(super) server: Endpoint,
}

/// One server.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Endpoint {
    /// What repositories are below, with a slash at its end; `None`: what the registry's name says.
    pub(super) base: Option<Url>,
    /// What it is good for.
    pub(super) capabilities: Capabilities,
    /// How it is trusted.
    pub(super) trust: Trust,
    /// Sent with each request to it and to nobody else.
    pub(super) headers: HeaderMap,
}

/// `capabilities`; what is not said of a host it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Blobs and manifests by digest, which prove themselves.
    pub(super) pull: bool,
    /// What a tag points at, for which its word is taken.
    pub(super) resolve: bool,
    /// Uploads.
    pub(super) push: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            pull: true,
            resolve: true,
            push: true,
        }
    }
}

/// Certificates and patience for one server, beside those for all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Trust {
    /// PEM files with further certificate authorities.
    pub(super) ca_files: Vec<PathBuf>,
    /// PEM files that prove who we are: certificate and key, or both in one.
    pub(super) client: Vec<(PathBuf, PathBuf)>,
    /// Any certificate is taken.
    pub(super) skip_verify: bool,
    /// How long a connection may take to come up.
    pub(super) dial_timeout: Option<Duration>,
    /// When the files were written and how long they are: certificates are renewed under the same name.
    pub(super) stamps: Vec<(Option<SystemTime>, u64)>,
}

impl Trust {
    /// Looks at the files.
    fn stamp(&mut self) {
        let pairs = self
            .client
            .iter()
            .flat_map(|(certificate, key)| [certificate, key]);
        let stamp = |path: &PathBuf| {
            let found = std::fs::metadata(path).ok();
            found.map_or((None, 0), |found| (found.modified().ok(), found.len()))
        };
        self.stamps = self.ca_files.iter().chain(pairs).map(stamp).collect();
    }
}

/// A file that cannot be used. A registry whose mirrors were meant is not asked as if there were none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unusable {
    /// The file.
    pub(super) path: PathBuf,
    /// Counted from one; 0 for the file as a whole.
    pub(super) line: usize,
    /// What is wrong.
    pub(super) reason: String,
}

/// What `dir` says about a registry; `None` when it says nothing.
pub(super) fn read(dir: &Path, registry: &str) -> Result<Option<Registered>, Unusable> {
    for name in names(registry) {
        let place = dir.join(name);
        let file = place.join("hosts.toml");
        match read_bounded(&file) {
            Ok(text) => {
                let mut registered = parse(&text, &file, registry)?;
                for mirror in &mut registered.mirrors {
                    mirror.trust.stamp();
                }
                registered.server.trust.stamp();
                return Ok(Some(registered));
            }
            Err(error) if is_absent(&error) => {}
            Err(error) => {
                return Err(Unusable {
                    path: file,
                    line: 0,
                    reason: error.to_string(),
                });
            }
        }
        if let Some(mut trust) = certificates(&place) {
            trust.stamp();
            let server = Endpoint {
                trust,
                ..Endpoint::default()
            };
            return Ok(Some(Registered {
                server,
                mirrors: Vec::new(),
            }));
        }
    }
    Ok(None)
}

/// The directories that may be a registry's, in order.
fn names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':')
        && !port.contains(']')
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    names
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn read_bounded(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(LARGEST + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > LARGEST {
        return Err(io::Error::other("longer than 1 MiB"));
    }
    Ok(text)
}

/// The certificates in a directory, where there are some.
fn certificates(place: &Path) -> Option<Trust> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(place)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    found.sort();
    let with = |extension: &str| {
        let is = |path: &&PathBuf| path.extension().is_some_and(|found| found == extension);
        found.iter().filter(is).cloned().collect::<Vec<_>>()
    };
    let client = with("cert")
        .into_iter()
        .map(|certificate| (certificate.clone(), certificate.with_extension("key")))
        .filter(|(_, key)| found.contains(key))
        .collect();
    let trust = Trust {
        ca_files: with("crt"),
        client,
        ..Trust::default()
    };
    (trust != Trust::default()).then_some(trust)
}

/// Parses a `hosts.toml`.
pub(super) fn parse(text: &str, path: &Path, registry: &str) -> Result<Registered, Unusable> {
    let line = |offset: usize| {
        1 + text.as_bytes()[..offset]
            .iter()
            .filter(|b| **b == b'\n')
            .count()
    };
    let table = DeTable::parse(text).map_err(|error| Unusable {
        path: path.to_owned(),
        line: line(error.span().map_or(0, |span| span.start)),
        reason: error.message().to_owned(),
    })?;
    let refuse = |offset: usize, reason: String| Unusable {
        path: path.to_owned(),
        line: line(offset),
        reason,
    };
    let reader = Reader {
        base: path.parent().unwrap_or(Path::new("/")),
        refuse: &refuse,
    };
    let table = table.get_ref();
    let mut server = reader.endpoint(table, "server")?;
    if let Some(value) = table.get("server") {
        let url = reader.text(value, "server")?;
        if !url.is_empty() {
            let base = base(&url, reader.flag(table, "override_path")?)
                .map_err(|reason| refuse(value.span().start, reason))?;
            server.base = Some(base);
        }
    }
    // What the registry itself can do is not for a file to say: nobody else is left to ask.
    server.capabilities = Capabilities::default();
    let mut mirrors = Vec::new();
    if let Some(hosts) = table.get("host") {
        let DeValue::Table(hosts) = hosts.get_ref() else {
            return Err(refuse(
                hosts.span().start,
                "`host` is a table: [host.\"https://…\"]".to_owned(),
            ));
        };
        // The order of the file is the order of asking.
        let mut hosts: Vec<_> = hosts.iter().collect();
        hosts.sort_by_key(|(key, _)| key.span().start);
        if hosts.len() > MOST_HOSTS {
            return Err(refuse(0, format!("it has more than {MOST_HOSTS} hosts")));
        }
        for (key, value) in hosts {
            let at = key.span().start;
            let DeValue::Table(host) = value.get_ref() else {
                return Err(refuse(
                    at,
                    "a host is a table: [host.\"https://…\"]".to_owned(),
                ));
            };
            let mut endpoint = reader.endpoint(host, "host")?;
            let url = base(key.get_ref(), reader.flag(host, "override_path")?)
                .map_err(|reason| refuse(at, reason))?;
            tracing::trace!(registry, mirror = %url, "configured");
            endpoint.base = Some(url);
            mirrors.push(endpoint);
        }
    }
    Ok(Registered { mirrors, server })
}

/// What repositories are below: `/v2/` behind the URL's path, or with `override_path` the path as it is.
fn base(text: &str, override_path: bool) -> Result<Url, String> {
    let refuse =
        || format!("`{text}` is no address of a server; write it like https://mirror.lan:5000");
    let mut url = match text.contains("://") {
        true => Url::parse(text).map_err(|_| refuse())?,
        // As containerd takes it: TLS, but for this machine.
        false => {
            let host = super::address::host_of(text.split('/').next().unwrap_or(text));
            let scheme = if is_loopback(host) { "http" } else { "https" };
            Url::parse(&format!("{scheme}://{text}")).map_err(|_| refuse())?
        }
    };
    let plain = matches!(url.scheme(), "http" | "https") && url.host_str().is_some();
    if !plain || url.query().is_some() || url.fragment().is_some() {
        return Err(refuse());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "credentials of a mirror belong into a credential file, not into its address"
                .to_owned(),
        );
    }
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && path != "/v2" && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    path.push('/');
    url.set_path(&path);
    Ok(url)
}

type Refuse<'a> = dyn Fn(usize, String) -> Unusable + 'a;

/// Reads the values that a host may have.
struct Reader<'a> {
    /// What relative paths are relative to.
    base: &'a Path,
    refuse: &'a Refuse<'a>,
}

impl Reader<'_> {
    fn endpoint(&self, table: &DeTable<'_>, what: &str) -> Result<Endpoint, Unusable> {
        let mut endpoint = Endpoint::default();
        for (key, value) in table {
            let at = key.span().start;
            match key.get_ref().as_ref() {
                "capabilities" => {
                    let listed = self.texts(value, "capabilities")?;
                    let has = |name: &str| listed.iter().any(|listed| listed == name);
                    if let Some(other) = listed.iter().find(|name| {
                        !["pull", "resolve", "push", "referrers"].contains(&name.as_str())
                    }) {
                        return Err((self.refuse)(
                            at,
                            format!("there is no capability `{other}`"),
                        ));
                    }
                    endpoint.capabilities = Capabilities {
                        pull: has("pull"),
                        resolve: has("resolve"),
                        push: has("push"),
                    };
                }
                "ca" => {
                    endpoint.trust.ca_files = self.paths(value, "ca")?;
                }
                "client" => endpoint.trust.client = self.pairs(value)?,
                "skip_verify" => endpoint.trust.skip_verify = self.flag(table, "skip_verify")?,
                "dial_timeout" => {
                    let text = self.text(value, "dial_timeout")?;
                    let time = duration(&text).filter(|time| !time.is_zero());
                    let refuse = || {
                        let reason =
                            format!("`{text}` is not a duration; write it like 500ms or 3s");
                        (self.refuse)(at, reason)
                    };
                    endpoint.trust.dial_timeout = Some(time.ok_or_else(refuse)?);
                }
                "header" => endpoint.headers = self.headers(value)?,
                "override_path" | "server" | "host" => {}
                other => tracing::warn!(key = other, what, "not understood in hosts.toml"),
            }
        }
        Ok(endpoint)
    }

    fn text(&self, value: &Spanned<DeValue<'_>>, name: &str) -> Result<String, Unusable> {
        match value.get_ref() {
            DeValue::String(text) => Ok(text.to_string()),
            _ => Err((self.refuse)(
                value.span().start,
                format!("`{name}` is a text"),
            )),
        }
    }

    fn flag(&self, table: &DeTable<'_>, name: &str) -> Result<bool, Unusable> {
        match table.get(name) {
            None => Ok(false),
            Some(value) => match value.get_ref() {
                DeValue::Boolean(flag) => Ok(*flag),
                _ => Err((self.refuse)(
                    value.span().start,
                    format!("`{name}` is true or false"),
                )),
            },
        }
    }

    /// One text or several.
    fn texts(&self, value: &Spanned<DeValue<'_>>, name: &str) -> Result<Vec<String>, Unusable> {
        match value.get_ref() {
            DeValue::Array(items) => items.iter().map(|item| self.text(item, name)).collect(),
            _ => Ok(vec![self.text(value, name)?]),
        }
    }

    fn paths(&self, value: &Spanned<DeValue<'_>>, name: &str) -> Result<Vec<PathBuf>, Unusable> {
        let texts = self.texts(value, name)?;
        Ok(texts.iter().map(|path| self.base.join(path)).collect())
    }

    /// `"both.pem"`, `["both.pem"]`, or `[["client.cert", "client.key"]]`.
    fn pairs(&self, value: &Spanned<DeValue<'_>>) -> Result<Vec<(PathBuf, PathBuf)>, Unusable> {
        let single = |value| {
            let file = self.base.join(self.text(value, "client")?);
            Ok((file.clone(), file))
        };
        let DeValue::Array(items) = value.get_ref() else {
            return Ok(vec![single(value)?]);
        };
        items
            .iter()
            .map(|item| match item.get_ref() {
                DeValue::Array(_) => match self.paths(item, "client")?.as_slice() {
                    [file] => Ok((file.clone(), file.clone())),
                    // An empty key means that the certificate's file has it.
                    [certificate, key] if key == self.base => {
                        Ok((certificate.clone(), certificate.clone()))
                    }
                    [certificate, key] => Ok((certificate.clone(), key.clone())),
                    _ => Err((self.refuse)(
                        item.span().start,
                        "a client is a certificate and a key".to_owned(),
                    )),
                },
                _ => single(item),
            })
            .collect()
    }

    fn headers(&self, value: &Spanned<DeValue<'_>>) -> Result<HeaderMap, Unusable> {
        let at = value.span().start;
        let DeValue::Table(table) = value.get_ref() else {
            return Err((self.refuse)(at, "`header` is a table".to_owned()));
        };
        let mut headers = HeaderMap::new();
        for (key, value) in table {
            let at = key.span().start;
            // What is in a value may be a secret and is not repeated.
            let refuse =
                || (self.refuse)(at, format!("the header `{}` cannot be sent", key.get_ref()));
            let name: HeaderName = key.get_ref().parse().map_err(|_| refuse())?;
            for text in self.texts(value, "header")? {
                let mut value = HeaderValue::from_str(&text).map_err(|_| refuse())?;
                value.set_sensitive(true);
                headers.append(name.clone(), value);
            }
        }
        Ok(headers)
    }
}

/// A duration as Go writes it: `300ms`, `1.5s`, `1m30s`.
fn duration(text: &str) -> Option<Duration> {
    let (mut rest, mut sum) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, behind) = rest.split_at(digits);
        let end = behind
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(behind.len());
        let unit = match &behind[..end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let seconds = number.parse::<f64>().ok()? * unit;
        sum = sum.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
        rest = &behind[end..];
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
#[path = "certs_d_tests.rs"]
mod tests;
