//! What the fuzzer calls: the parsers of this layer, each with what must hold whatever it is given. A panic is a finding.

use std::path::Path;
use std::time::{Duration, SystemTime};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::address::{PlainHosts, address_of, host_of, is_loopback, same_origin, shown};
use super::authfile::{AuthFile, Edit, edit};
use super::challenge::{self, Challenge};
use super::credentials::Credentials;
use super::{Reference, certs_d, error, helper, range, retry, tags, token};
use crate::base::{ByteRange, Secret};

/// `WWW-Authenticate`, a header a line.
pub fn challenge(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Some(Challenge::Bearer { realm, scopes, .. }) = challenge::choose(text.lines()) {
        assert!(!realm.is_empty() && realm.len() <= text.len() * 3 && scopes.len() <= 64);
    }
}

/// A token server's answer; what it gave is never shown.
pub fn token(data: &[u8]) {
    if let Ok(token) = token::parse(data) {
        assert!(token.lifetime <= Duration::from_secs(86_400));
        assert!(!token.token.expose().is_empty());
        let shown = format!("{token:?}");
        // Short ones may stand in the words around them.
        assert!(token.token.expose().len() < 12 || !shown.contains(token.token.expose()));
    }
}

/// A Location: where it may lead from a server with TLS, from one without, and from this machine.
pub fn location(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let plain = PlainHosts::new(&["plain.lan:5000".to_owned()]);
    for from in [
        "https://registry.example/v2/a/blobs/x",
        "http://plain.lan:5000/v2/a/blobs/x",
        "http://127.0.0.1:5000/v2/a/blobs/x",
    ] {
        let from = Url::parse(from).expect("it is one");
        let Ok(to) = plain.follow(&from, &text) else {
            continue;
        };
        let host = to.host_str().expect("it was asked for one");
        let is_loopback_to_loopback =
            is_loopback(host) && is_loopback(from.host_str().expect("it has one"));
        assert!(
            to.scheme() == "https"
                || (to.scheme() == "http"
                    && (address_of(&to) == "plain.lan:5000" || is_loopback_to_loopback)),
            "{from} -> {to}"
        );
        assert!(to.username().is_empty() && to.password().is_none());
        if same_origin(&from, &to) {
            assert_eq!(address_of(&from), address_of(&to));
        }
        let shown = shown(&to);
        assert!(shown.len() <= 1300 && !shown.contains('?'), "{shown}");
    }
    let _ = host_of(&text);
}

/// The head of an answer to a ranged read: three numbers of 8 bytes (start, length, size), the status, then headers a line.
pub fn content_range(data: &[u8]) {
    let Some((numbers, rest)) = data.split_first_chunk::<26>() else {
        return;
    };
    let number = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().expect("8 bytes"));
    let range = ByteRange::at(number(0), number(8));
    let status = u16::from_le_bytes([numbers[24], numbers[25]]);
    let mut headers = HeaderMap::new();
    for line in rest.split(|byte| *byte == b'\n') {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(0);
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(&line[..colon]),
            HeaderValue::from_bytes(line.get(colon + 1..).unwrap_or_default()),
        ) {
            headers.append(name, value);
        }
    }
    for status in [200, 206, status] {
        match range::check_head(status, &headers, range, number(16)) {
            Ok(range::Promise::Range(promised)) => {
                assert!(status == 206 && promised > 0 && promised <= range.len());
            }
            Ok(range::Promise::Whole) => assert_eq!(status, 200),
            Err(reason) => assert!(reason.len() < 1000, "{reason}"),
        }
    }
}

/// A registry's `hosts.toml`.
pub fn hosts_toml(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match certs_d::parse(
        &text,
        Path::new("/etc/certs.d/x/hosts.toml"),
        "registry.example",
    ) {
        Ok(registered) => {
            assert!(registered.mirrors.len() <= 64);
            for endpoint in registered.mirrors.iter().chain([&registered.server]) {
                if let Some(base) = &endpoint.base {
                    assert!(base.path().ends_with('/') && base.host_str().is_some());
                    assert!(base.username().is_empty() && base.password().is_none());
                }
            }
        }
        Err(unusable) => assert!(unusable.line <= text.len() + 1),
    }
}

/// A credential file: looked up in, and changed. What was kept is found again, what was removed is not.
pub fn auth_file(data: &[u8]) {
    const HOST: &str = "registry.example:5000";
    for legacy in [false, true] {
        if let Ok(file) = AuthFile::parse(data, legacy) {
            let _ = file.helper(HOST);
            let _ = file.lookup(HOST, "org/model");
            let _ = file.lookup("docker.io", "library/x");
        }
    }
    let credentials = Credentials::login("alice".to_owned(), Secret::new("pass word"));
    if let Ok(Some(kept)) = edit(data, HOST, Edit::Keep(&credentials)) {
        let file = AuthFile::parse(kept.as_bytes(), false);
        // A file whose other keys have strange types was not usable before either.
        if let Ok(file) = file {
            let found = file.lookup(HOST, "org/model");
            assert!(found.is_some());
        }
        if let Ok(Some(removed)) = edit(kept.as_bytes(), HOST, Edit::Remove)
            && let Ok(file) = AuthFile::parse(removed.as_bytes(), false)
        {
            assert!(file.auths_of(HOST) == 0);
        }
    }
    let _ = edit(data, HOST, Edit::KeptByHelper);
}

/// A reference as people type it; what is printed is read as the same.
pub fn reference(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match text.parse::<Reference>() {
        Ok(reference) => {
            let printed = reference.to_string();
            assert_eq!(printed.parse::<Reference>(), Ok(reference.clone()));
            let repository = reference.repository();
            assert!(super::Repository::is_host(repository.host()));
            assert!(
                repository
                    .path()
                    .split('/')
                    .all(super::Repository::is_component)
            );
            assert!(printed.len() < 600);
        }
        Err(error) => assert!(error.to_string().len() < 1500),
    }
}

/// `Link` headers and pages of tags.
pub fn tags(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Some(target) = tags::next_page(&text) {
        assert!(text.contains(target));
    }
    if let Ok(tags) = tags::page(data) {
        assert!(tags.iter().all(|tag| tag.as_str().len() <= 128));
    }
    if let Some(pause) = retry::retry_after(&text, SystemTime::UNIX_EPOCH) {
        assert!(pause <= Duration::from_secs(86_400));
    }
}

/// The body of a refusal: what is said of it is one short line.
pub fn refusal(data: &[u8]) {
    assert!(error::explain(data).len() < 8000);
}

/// What a credential helper prints.
pub fn helper(data: &[u8]) {
    if let Some((user, secret)) = helper::login(data) {
        let _ = (user.len(), secret.expose().len());
    }
}
