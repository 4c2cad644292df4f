//! Which addresses may be spoken to, and how: pure decisions about hosts, schemes and redirects.

use reqwest::Url;

/// Hosts that are spoken to over plain HTTP because the user said so.
#[derive(Clone, Debug, Default)]
pub(super) struct PlainHosts(Vec<String>);

impl PlainHosts {
    /// `host` stands for all its ports, `host:port` for one.
    pub(super) fn new(hosts: &[String]) -> Self {
        Self(
            hosts
                .iter()
                .map(|host| host.trim().to_ascii_lowercase())
                .collect(),
        )
    }

    /// Whether this `host[:port]` is listed.
    pub(super) fn lists(&self, address: &str) -> bool {
        let address = address.to_ascii_lowercase();
        let name = host_of(&address);
        self.0
            .iter()
            .any(|listed| *listed == address || listed == name)
    }

    /// Whether a server at `from` may send us to `to`.
    ///
    /// Plain HTTP only to hosts that are listed, and on loopback only when a loopback server says so that speaks it itself: a server
    /// far away has no business with what listens on this machine, and what begins with TLS goes on with it.
    pub(super) fn allow(&self, from: &Url, to: &Url) -> Result<(), String> {
        let Some(host) = to.host_str() else {
            return Err(format!("{} names no host", shown(to)));
        };
        if !to.username().is_empty() || to.password().is_some() {
            return Err(format!("{} carries credentials", shown(to)));
        }
        match to.scheme() {
            "https" => Ok(()),
            "http" if self.lists(&address_of(to)) => Ok(()),
            "http"
                if is_loopback(host)
                    && from.scheme() == "http"
                    && from.host_str().is_some_and(is_loopback) =>
            {
                Ok(())
            }
            "http" => Err(format!(
                "{} is plain HTTP, which is not allowed for {host} (--plain-http {host} allows it)",
                shown(to)
            )),
            scheme => Err(format!("{scheme} is not a scheme that ocifs speaks")),
        }
    }

    /// The address that a Location header at `from` leads to; relative ones are resolved.
    pub(super) fn follow(&self, from: &Url, location: &str) -> Result<Url, String> {
        let to = from
            .join(location)
            .map_err(|error| format!("the Location is malformed: {error}"))?;
        self.allow(from, &to)?;
        Ok(to)
    }
}

/// Whether credentials for `registry` may go to `url`: same scheme, host and port.
pub(super) fn same_origin(registry: &Url, url: &Url) -> bool {
    registry.scheme() == url.scheme()
        && registry.host_str() == url.host_str()
        && registry.port_or_known_default() == url.port_or_known_default()
}

/// The host of `host[:port]`, with an IPv6 literal's brackets.
pub(super) fn host_of(address: &str) -> &str {
    match (address.rfind(':'), address.rfind(']')) {
        (Some(colon), Some(bracket)) if colon < bracket => address,
        (Some(colon), _) => &address[..colon],
        (None, _) => address,
    }
}

/// Whether a host (IPv6 with brackets) is this machine, by its name alone.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare
            .parse()
            .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

/// `host[:port]` of a URL.
pub(super) fn address_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// A URL for people: no credentials, no query (it may be a signature), of bounded length.
pub(super) fn shown(url: &Url) -> String {
    super::error::bounded(
        &format!("{}://{}{}", url.scheme(), address_of(url), url.path()),
        300,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn where_redirects_may_lead() {
        let plain = PlainHosts::new(&["plain.io".to_owned(), "ported.io:81".to_owned()]);
        for (from, location, to) in [
            (
                "https://r.io/v2/x/blobs/d",
                "https://cdn.io/d?sig=1",
                Some("https://cdn.io/d?sig=1"),
            ),
            ("https://r.io/v2/x/blobs/d", "/d", Some("https://r.io/d")),
            (
                "https://r.io/v2/x/blobs/d",
                "e?f",
                Some("https://r.io/v2/x/blobs/e?f"),
            ),
            ("https://r.io/v2/x", "//cdn.io/d", Some("https://cdn.io/d")),
            ("https://r.io/v2/x", "http://r.io/v2/x", None),
            ("https://r.io/v2/x", "http://cdn.io/d", None),
            (
                "https://r.io/v2/x",
                "http://plain.io:99/d",
                Some("http://plain.io:99/d"),
            ),
            (
                "https://r.io/v2/x",
                "http://ported.io:81/d",
                Some("http://ported.io:81/d"),
            ),
            ("https://r.io/v2/x", "http://ported.io/d", None),
            ("https://r.io/v2/x", "http://127.0.0.1:9/d", None),
            ("http://plain.io/v2/x", "http://cdn.io/d", None),
            (
                "http://localhost:5000/v2/x",
                "http://127.0.0.1:9/d",
                Some("http://127.0.0.1:9/d"),
            ),
            (
                "http://[::1]:5000/v2/x",
                "http://localhost/d",
                Some("http://localhost/d"),
            ),
            ("https://localhost:5000/v2/x", "http://127.0.0.1:9/d", None),
            ("https://r.io/v2/x", "https://u:p@r.io/d", None),
            ("https://r.io/v2/x", "file:///etc/passwd", None),
            ("https://r.io/v2/x", "ftp://r.io/d", None),
            ("https://r.io/v2/x", "https://", None),
        ] {
            assert_eq!(
                plain.follow(&url(from), location).ok(),
                to.map(url),
                "{from} -> {location}"
            );
        }
    }

    #[test]
    fn credentials_stay_with_their_origin() {
        let registry = url("https://r.io/v2/");
        for (to, same) in [
            ("https://r.io/other", true),
            ("https://r.io:443/other", true),
            ("https://r.io:444/v2/", false),
            ("http://r.io/v2/", false),
            ("http://r.io:443/v2/", false),
            ("https://x.r.io/v2/", false),
        ] {
            assert_eq!(same_origin(&registry, &url(to)), same, "{to}");
        }
    }

    #[test]
    fn loopback_hosts_by_name() {
        for host in [
            "localhost",
            "LOCALHOST",
            "127.0.0.1",
            "127.255.0.9",
            "[::1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.evil.org",
            "127.0.0.1.evil.org",
            "10.0.0.1",
            "[::2]",
            "",
            "0.0.0.0",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
        assert_eq!(host_of("[::1]:5000"), "[::1]");
        assert_eq!(host_of("[::1]"), "[::1]");
        assert_eq!(host_of("h:5"), "h");
    }

    #[test]
    fn urls_are_shown_without_secrets() {
        let text = shown(&url(
            "https://user:secret@h.io:8443/a/b?X-Amz-Signature=secret#secret",
        ));
        assert_eq!(text, "https://h.io:8443/a/b");
    }
}
