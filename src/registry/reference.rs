//! References to artifacts: `host[:port]/repository[:tag][@digest]`.

use std::fmt;
use std::str::FromStr;

use super::address::{host_of, is_loopback};
use super::error::bounded;
use crate::base::Digest;

/// A repository on a registry host.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    host: String,
    path: String,
}

/// A tag: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}` (distribution-spec, "Pulling manifests").
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(String);

/// A reference to one artifact, normalised as docker does (`gpt2` is `docker.io/library/gpt2:latest`).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    repository: Repository,
    tag: Option<Tag>,
    digest: Option<Digest>,
}

/// Why a string is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a reference: {reason}")]
pub struct ReferenceError {
    text: String,
    reason: String,
}

impl ReferenceError {
    fn new(text: &str, reason: impl Into<String>) -> Self {
        Self {
            text: bounded(text, 100),
            reason: reason.into(),
        }
    }
}

/// Longest `host/path` (distribution-spec, "Pulling manifests": clients' limit of 255 characters).
const LONGEST_NAME: usize = 255;
/// Docker Hub under the one name that references, caches and directories use.
const DOCKER_HUB: &str = "docker.io";

impl Repository {
    /// `host` (`ghcr.io`, `localhost:5000`, `docker.io`) and `path` (`org/model`), checked.
    ///
    /// Hosts are lower-cased, Docker Hub's other names become `docker.io`, and its official images get their `library/`.
    pub fn new(host: &str, path: &str) -> Result<Self, ReferenceError> {
        let refuse = |reason: &str| Err(ReferenceError::new(&format!("{host}/{path}"), reason));
        if !Self::is_host(host) {
            return refuse(
                "the registry host is malformed (expected like ghcr.io or localhost:5000)",
            );
        }
        if path.len() > LONGEST_NAME || !path.split('/').all(Self::is_component) {
            return refuse(
                "the repository path must be lower-case letters, digits and single separators ('.', '_', '__', '-')",
            );
        }
        let mut host = host.to_ascii_lowercase();
        if matches!(host.as_str(), "index.docker.io" | "registry-1.docker.io") {
            host = DOCKER_HUB.to_owned();
        }
        let path = if host == DOCKER_HUB && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if host.len() + 1 + path.len() > LONGEST_NAME {
            return refuse("host and path together are longer than 255 characters");
        }
        Ok(Self { host, path })
    }
    /// The host as written: `docker.io`, not the address that it is served from.
    pub fn host(&self) -> &str {
        &self.host
    }
    /// The path below the host.
    pub fn path(&self) -> &str {
        &self.path
    }
    /// The `host[:port]` that serves it: Docker Hub's registry has another name than Docker Hub.
    pub fn address(&self) -> &str {
        if self.host == DOCKER_HUB {
            "registry-1.docker.io"
        } else {
            &self.host
        }
    }
    /// Whether the registry is one of this machine, by its name alone.
    pub fn is_loopback(&self) -> bool {
        is_loopback(host_of(&self.host))
    }
    /// Whether a string can name a registry host: it has a '.' or ':' or is `localhost`, and is well-formed.
    pub fn is_host(text: &str) -> bool {
        if text.len() > LONGEST_NAME {
            return false;
        }
        let is_port = |port: &str| {
            !port.is_empty()
                && port.bytes().all(|b| b.is_ascii_digit())
                && port.parse::<u16>().is_ok_and(|port| port > 0)
        };
        if let Some(literal) = text.strip_prefix('[') {
            let Some((address, rest)) = literal.split_once(']') else {
                return false;
            };
            return address.parse::<std::net::Ipv6Addr>().is_ok()
                && (rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port));
        }
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        };
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        (port.is_some() || name.contains('.') || name == "localhost")
            && port.is_none_or(is_port)
            && name.split('.').all(is_label)
    }
    /// Whether a string can be one component of a repository path:
    /// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` (distribution-spec, "Pulling manifests").
    pub fn is_component(text: &str) -> bool {
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        if bytes.len() > LONGEST_NAME
            || !bytes.first().copied().is_some_and(alphanumeric)
            || !bytes.last().copied().is_some_and(alphanumeric)
        {
            return false;
        }
        text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .all(|separator| {
                matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
            })
    }
}

impl FromStr for Tag {
    type Err = ReferenceError;
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let bytes = text.as_bytes();
        let well_formed = bytes.len() <= 128
            && bytes.first().copied().is_some_and(word)
            && bytes.iter().all(|&b| word(b) || b == b'.' || b == b'-');
        if well_formed {
            Ok(Self(text.to_owned()))
        } else {
            Err(ReferenceError::new(
                text,
                "a tag has 1 to 128 letters, digits, '_', '.' and '-', the first no '.' or '-'",
            ))
        }
    }
}

impl Tag {
    /// `latest`.
    pub fn latest() -> Self {
        Self("latest".to_owned())
    }
    /// The tag's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Reference {
    /// The artifact that `tag` of the repository points at.
    pub fn tagged(repository: Repository, tag: Tag) -> Self {
        Self {
            repository,
            tag: Some(tag),
            digest: None,
        }
    }
    /// The artifact with this manifest digest.
    pub fn pinned(repository: Repository, digest: Digest) -> Self {
        Self {
            repository,
            tag: None,
            digest: Some(digest),
        }
    }
    /// Its repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }
    /// Its tag, when it has one.
    pub fn tag(&self) -> Option<&Tag> {
        self.tag.as_ref()
    }
    /// Its digest, when it has one: then the tag is for people only.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;
    /// Parses what people write: `gpt2`, `org/model:v1`, `[::1]:5000/model@sha256:…`.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        // Host, path, tag and digest at their longest; also keeps the parser below from long inputs.
        const LONGEST: usize = LONGEST_NAME + 1 + 128 + 1 + 71;
        if text.len() > LONGEST {
            return Err(ReferenceError::new(text, "it is too long"));
        }
        // The parser knows no IPv6 literals: it gets a name in its place.
        let (literal, named) = match text.strip_prefix('[').and_then(|_| text.split_once('/')) {
            Some((host, rest)) => (Some(host), format!("ipv6.invalid/{rest}")),
            None => (None, text.to_owned()),
        };
        let parsed: oci_client::Reference =
            named.parse().map_err(|error: oci_client::ParseError| {
                ReferenceError::new(text, fault(text).unwrap_or_else(|| error.to_string()))
            })?;
        let repository = Repository::new(literal.unwrap_or(parsed.registry()), parsed.repository())
            .map_err(|error| ReferenceError::new(text, error.reason))?;
        let tag = parsed.tag().map(Tag::from_str).transpose()?;
        let digest =
            match parsed.digest() {
                Some(digest) => Some(digest.parse::<Digest>().map_err(|error| {
                    ReferenceError::new(text, bounded(&error.to_string(), 200))
                })?),
                None => None,
            };
        Ok(Self {
            repository,
            tag,
            digest,
        })
    }
}

/// Which part of a text that is no reference is wrong, where that can be told.
fn fault(text: &str) -> Option<String> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (text, None),
    };
    if let Some(digest) = digest
        && let Err(error) = digest.parse::<Digest>()
    {
        return Some(bounded(&error.to_string(), 200));
    }
    let (directory, last) = name.rsplit_once('/').unwrap_or(("", name));
    let (last, tag) = match last.split_once(':') {
        Some((last, tag)) => (last, Some(tag)),
        None => (last, None),
    };
    if let Some(tag) = tag
        && let Err(error) = Tag::from_str(tag)
    {
        return Some(error.reason);
    }
    let (host, path) = match directory.split_once('/') {
        Some((host, path)) if Repository::is_host(host) => (host, format!("{path}/{last}")),
        None if Repository::is_host(directory) => (directory, last.to_owned()),
        None if directory.is_empty() => (DOCKER_HUB, last.to_owned()),
        _ => (DOCKER_HUB, format!("{directory}/{last}")),
    };
    Some(Repository::new(host, &path).err()?.reason)
}

macro_rules! show {
    ($($type:ty),*) => {$(
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )*};
}
show!(Repository, Tag, Reference);

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Reference {
    /// The full form; `tag@digest` when both are known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_reference_is_told_which_part_is_wrong() {
        for (text, part) in [
            ("localhost:5300/t/v01:", "a tag has"),
            ("BAD:REF:x", "a tag has"),
            ("x.io/m:.v1", "a tag has"),
            ("UPPER", "lower-case"),
            ("x.io/Org/m", "lower-case"),
            ("x.io/m@sha256:abc", "digest"),
            ("x.io/m@md5:abc", "digest"),
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn references_are_normalised_as_docker_does() {
        let digest = format!("sha256:{}", "0f".repeat(32));
        for (text, full) in [
            ("gpt2", "docker.io/library/gpt2:latest"),
            ("gpt2:v1", "docker.io/library/gpt2:v1"),
            ("ai/smollm2", "docker.io/ai/smollm2:latest"),
            ("docker.io/gpt2", "docker.io/library/gpt2:latest"),
            ("index.docker.io/ai/x:1", "docker.io/ai/x:1"),
            ("registry-1.docker.io/ai/x:1", "docker.io/ai/x:1"),
            ("ghcr.io/org/model:v1.0-rc_1", "ghcr.io/org/model:v1.0-rc_1"),
            ("GHCR.io/org/model", "ghcr.io/org/model:latest"),
            ("localhost/m", "localhost/m:latest"),
            ("localhost:5000/a/b/c:x", "localhost:5000/a/b/c:x"),
            ("127.0.0.1:5000/m", "127.0.0.1:5000/m:latest"),
            ("[::1]:5000/a/m:v2", "[::1]:5000/a/m:v2"),
            ("[::1]/m", "[::1]/m:latest"),
            ("foo.com:5000", "docker.io/library/foo.com:5000"),
            (
                &format!("ghcr.io/o/m@{digest}"),
                &format!("ghcr.io/o/m@{digest}"),
            ),
            (
                &format!("ghcr.io/o/m:t@{digest}"),
                &format!("ghcr.io/o/m:t@{digest}"),
            ),
        ] {
            let reference: Reference = text
                .parse()
                .unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(reference.to_string(), full, "{text}");
            assert_eq!(full.parse::<Reference>().unwrap(), reference, "{full}");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused_with_a_bounded_message() {
        let short_digest = format!("m@sha256:{}", "0".repeat(63));
        let sha512 = format!("m@sha512:{}", "0".repeat(128));
        let upper = format!("m@sha256:{}", "A".repeat(64));
        let long_path = format!("ghcr.io/{}", "a".repeat(256));
        let long_tag = format!("m:{}", "a".repeat(129));
        let huge = "a/".repeat(1 << 20);
        for text in [
            "",
            "/",
            ":",
            "@",
            "a//b",
            "/a",
            "a/",
            "Upper/case",
            "ghcr.io/Org/m",
            "a b",
            "a\0b",
            "m:",
            "m:.t",
            "m:-t",
            "m@",
            "..",
            "../etc",
            "ghcr.io/../m",
            "localhost:0/m",
            "localhost:65536/m",
            "localhost:99999999999/m",
            "[::1/m",
            "[zz]:5/m",
            "[::1]x/m",
            "[::1]:/m",
            "-a.io/m",
            "a-.io/m",
            "http://ghcr.io/m",
            "user:pw@ghcr.io/m",
            "ghcr.io/m?x=y",
            "ghcr.io/m#f",
            "ghcr.io/m%2f",
            "é",
            short_digest.as_str(),
            sha512.as_str(),
            upper.as_str(),
            long_path.as_str(),
            long_tag.as_str(),
            huge.as_str(),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.len() < 600, "{}", error.len());
        }
    }

    #[test]
    fn hosts_and_components() {
        for (text, host, component) in [
            ("ghcr.io", true, true),
            ("localhost", true, true),
            ("localhost:5000", true, false),
            ("[::1]:5000", true, false),
            ("[fe80::1]", true, false),
            ("10.0.0.1:443", true, false),
            ("a.b", true, true),
            ("config.json", true, true),
            ("org", false, true),
            ("a__b", false, true),
            ("a___b", false, false),
            ("a..b", false, false),
            ("a---b", false, true),
            ("a._b", false, false),
            ("_a", false, false),
            ("a-", false, false),
            (".", false, false),
            ("..", false, false),
            ("", false, false),
            (":", false, false),
            (":5000", false, false),
            ("a:b", false, false),
            ("a.b:", false, false),
            ("a.b:00000000080", true, false),
            ("a.b:+80", false, false),
            ("a.b.", false, false),
            (".a.b", false, false),
            ("a_b.c", false, false),
            ("A.io", true, false),
        ] {
            // Leading zeros are what the URL standard lets pass as well; they stay harmless.
            assert_eq!(Repository::is_host(text), host, "host {text}");
            if text != "a_b.c" {
                assert_eq!(
                    Repository::is_component(text),
                    component,
                    "component {text}"
                );
            }
        }
        assert!(!Repository::is_host(&"a.".repeat(1000)));
        assert!(!Repository::is_component(&"a".repeat(256)));
    }

    #[test]
    fn docker_hub_is_served_from_elsewhere() {
        assert_eq!(
            Repository::new("docker.io", "ai/x").unwrap().address(),
            "registry-1.docker.io"
        );
        assert_eq!(
            Repository::new("docker.io", "gpt2").unwrap().path(),
            "library/gpt2"
        );
        assert_eq!(
            Repository::new("ghcr.io", "x").unwrap().address(),
            "ghcr.io"
        );
    }

    proptest::proptest! {
        #[test]
        fn what_parses_prints_as_what_it_parses_to(text in "[a-z0-9.:/@_-]{0,40}|[a-z]{1,5}([.:/_-]{1,2}[a-z0-9]{1,5}){0,6}") {
            if let Ok(reference) = text.parse::<Reference>() {
                proptest::prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference.clone()));
                let repository = reference.repository();
                proptest::prop_assert_eq!(Repository::new(repository.host(), repository.path()), Ok(repository.clone()));
                proptest::prop_assert!(Repository::is_host(repository.host()));
                proptest::prop_assert!(repository.path().split('/').all(Repository::is_component));
            }
        }
    }
}
