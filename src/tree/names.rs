//! What a name can be, by its spelling alone: no network, no state.

use super::file_like::file_like;
use crate::base::Digest;
use crate::registry::{Repository, Tag};

/// The host whose repositories have short names, as everywhere in OCI.
pub(super) const DOCKER_HUB: &str = "docker.io";

/// Where Docker Hub keeps repositories of one component.
pub(super) const DOCKER_LIBRARY: &str = "library";

/// The longest name that Linux allows (`NAME_MAX`), in bytes.
pub(super) const NAME_MAX: usize = 255;

/// The longest repository name, host included, that registries accept (distribution-spec, "Pull", on clients' limits).
pub(super) const REPOSITORY_MAX: usize = 255;

/// The directory of raw parts in each model directory.
pub(super) const OCI_DIR: &str = ".oci";

/// What a name in the root directory can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RootName {
    /// A registry host.
    Host,
    /// Another spelling; a symbolic link to this path.
    Link(String),
    /// Nothing.
    Nothing,
}

/// What a name in a host or repository directory can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Name<'a> {
    /// `component:tag`.
    Tagged(&'a str, Tag),
    /// `component@sha256:<hex>`.
    Pinned(&'a str, Digest),
    /// `component:tag@sha256:<hex>`, as docker prints it: the digest alone counts.
    TaggedPinned(&'a str, Digest),
    /// `@tag`.
    TagAlias(Tag),
    /// `@sha256-<hex>`.
    DigestAlias(Digest),
    /// A file of the untagged repository, should it have one; `.oci` as well.
    FileLike,
    /// One more component of a repository's path.
    Component,
    /// Nothing that a registry could be asked for.
    Other,
}

/// What `name` can be in the root directory.
///
/// A name with a dot, or with a port, or `localhost` is a host; so `alpine:3` is host `alpine`, port 3, and the image
/// is found as `docker.io/library/alpine:3`.
pub(super) fn root(name: &str) -> RootName {
    if name.len() > NAME_MAX {
        return RootName::Nothing;
    }
    if Repository::is_host(name) {
        // One host has one directory: another spelling of it (capitals, Docker Hub's other names) leads there.
        return match repository(name, "a/a") {
            Some(normal) if normal.host() == name => RootName::Host,
            Some(normal) => RootName::Link(normal.host().to_owned()),
            None => RootName::Nothing,
        };
    }
    if let Some(host) = unaliased_host(name) {
        return RootName::Link(host);
    }
    match below(name) {
        Name::Tagged(..) | Name::Pinned(..) => {
            RootName::Link(format!("{DOCKER_HUB}/{DOCKER_LIBRARY}/{name}"))
        }
        Name::TaggedPinned(component, digest) => RootName::Link(format!(
            "{DOCKER_HUB}/{DOCKER_LIBRARY}/{component}@{digest}"
        )),
        Name::Component => RootName::Link(format!("{DOCKER_HUB}/{name}")),
        Name::TagAlias(_) | Name::DigestAlias(_) | Name::FileLike | Name::Other => {
            RootName::Nothing
        }
    }
}

/// `localhost_5000_` → `localhost:5000`: containerd's spelling of a host with a port where a colon is in the way.
fn unaliased_host(name: &str) -> Option<String> {
    let (host, port) = name.strip_suffix('_')?.rsplit_once('_')?;
    if port.is_empty() || !port.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    // The one spelling that its directory has.
    let normal = repository(&format!("{host}:{port}"), "a/a")?;
    Some(normal.host().to_owned())
}

/// `localhost:5000` → `localhost_5000_`.
pub(super) fn host_alias(host: &str) -> Option<String> {
    let (name, port) = host.rsplit_once(':')?;
    Some(format!("{name}_{port}_"))
}

/// What `name` can be in a host or repository directory.
pub(super) fn below(name: &str) -> Name<'_> {
    if name.len() > NAME_MAX {
        return Name::Other;
    }
    if let Some(alias) = name.strip_prefix('@') {
        // A tag `sha256-<hex>` is where registries without a referrers API keep a list of referrers
        // (distribution-spec, "Referrers Tag Schema"), never a model: the alias is the digest's.
        if let Some(digest) = alias
            .strip_prefix("sha256-")
            .and_then(|hex| Digest::from_hex(hex).ok())
        {
            return Name::DigestAlias(digest);
        }
        return alias.parse().map_or(Name::Other, Name::TagAlias);
    }
    if let Some((left, digest)) = name.split_once('@') {
        let Ok(digest) = digest.parse() else {
            return Name::Other;
        };
        return match left.split_once(':') {
            None if Repository::is_component(left) => Name::Pinned(left, digest),
            Some((component, tag))
                if Repository::is_component(component) && tag.parse::<Tag>().is_ok() =>
            {
                Name::TaggedPinned(component, digest)
            }
            _ => Name::Other,
        };
    }
    if let Some((component, tag)) = name.split_once(':') {
        return match tag.parse() {
            Ok(tag) if Repository::is_component(component) => Name::Tagged(component, tag),
            _ => Name::Other,
        };
    }
    if name == OCI_DIR || file_like(name) {
        Name::FileLike
    } else if Repository::is_component(name) {
        Name::Component
    } else {
        Name::Other
    }
}

/// The repository at `path` of a host; none when it is too long or malformed.
pub(super) fn repository(host: &str, path: &str) -> Option<Repository> {
    if host.len() + 1 + path.len() > REPOSITORY_MAX {
        return None;
    }
    Repository::new(host, path).ok()
}

/// The last component of a repository's path.
pub(super) fn last_component(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, last)| last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn names_in_the_root() {
        let link = |path: &str| RootName::Link(path.to_owned());
        for (name, expected) in [
            ("ghcr.io", RootName::Host),
            ("localhost", RootName::Host),
            ("localhost:5000", RootName::Host),
            ("127.0.0.1:5000", RootName::Host),
            ("docker.io", RootName::Host),
            ("GHCR.io", link("ghcr.io")),
            ("index.docker.io", link("docker.io")),
            ("localhost_5000_", link("localhost:5000")),
            ("LocalHost_5000_", link("localhost:5000")),
            ("my.host_80_", link("my.host:80")),
            ("user", link("docker.io/user")),
            ("gpt2:v1", link("docker.io/library/gpt2:v1")),
            ("@v1", RootName::Nothing),
            (".git", RootName::Nothing),
            (".oci", RootName::Nothing),
            ("Foo", RootName::Nothing),
            ("-x", RootName::Nothing),
            ("a b", RootName::Nothing),
            ("", RootName::Nothing),
            ("gpt2:", RootName::Nothing),
            ("gpt2@sha256:00", RootName::Nothing),
        ] {
            assert_eq!(root(name), expected, "{name}");
        }
        let pinned = format!("gpt2@sha256:{HEX}");
        assert_eq!(root(&pinned), link(&format!("docker.io/library/{pinned}")));
        assert_eq!(
            root(&format!("gpt2:v1@sha256:{HEX}")),
            link(&format!("docker.io/library/{pinned}"))
        );
        assert_eq!(root(&"a".repeat(256)), RootName::Nothing);
    }

    #[test]
    fn names_below_a_host() {
        let digest = Digest::from_hex(HEX).unwrap();
        let tag = |text: &str| text.parse::<Tag>().unwrap();
        for (name, expected) in [
            ("model:v1", Name::Tagged("model", tag("v1"))),
            (
                "qwen2.5-0.5b:Q4_K_M",
                Name::Tagged("qwen2.5-0.5b", tag("Q4_K_M")),
            ),
            ("model.gguf:v1", Name::Tagged("model.gguf", tag("v1"))),
            ("@v1", Name::TagAlias(tag("v1"))),
            ("config.json", Name::FileLike),
            (".oci", Name::FileLike),
            ("qwen2.5-0.5b", Name::Component),
            ("model", Name::Component),
            ("Model", Name::Other),
            ("Model:v1", Name::Other),
            ("model:", Name::Other),
            (":v1", Name::Other),
            ("a:b:c", Name::Other),
            ("@", Name::Other),
            ("@a/b", Name::Other),
            ("model@", Name::Other),
            ("model@sha512:00", Name::Other),
            ("model@v1", Name::Other),
            (".", Name::Other),
            ("..", Name::Other),
            ("", Name::Other),
            (".git", Name::Other),
            ("-", Name::Other),
        ] {
            assert_eq!(below(name), expected, "{name}");
        }
        assert_eq!(
            below(&format!("model@sha256:{HEX}")),
            Name::Pinned("model", digest)
        );
        assert_eq!(
            below(&format!("model:v1@sha256:{HEX}")),
            Name::TaggedPinned("model", digest)
        );
        assert_eq!(below(&format!("@sha256-{HEX}")), Name::DigestAlias(digest));
        assert_eq!(
            below(&format!("@sha256-{HEX}.sig")),
            Name::TagAlias(tag(&format!("sha256-{HEX}.sig")))
        );
        assert_eq!(
            below(&format!("model@sha256:{}", HEX.to_uppercase())),
            Name::Other
        );
        assert_eq!(below(&format!("model:{}", "x".repeat(129))), Name::Other);
        assert_eq!(below(&"a".repeat(256)), Name::Other);
    }

    #[test]
    fn a_repository_is_bounded_in_length() {
        let long = "a".repeat(200);
        assert!(repository("r.example", &long).is_some());
        assert!(repository("r.example", &format!("{long}/{long}")).is_none());
    }

    #[test]
    fn aliases_of_hosts_go_there_and_back() {
        for host in ["localhost:5000", "127.0.0.1:80", "r.example:443"] {
            assert_eq!(
                root(&host_alias(host).unwrap()),
                RootName::Link(host.to_owned())
            );
        }
        assert_eq!(host_alias("ghcr.io"), None);
    }
}
