//! What can go wrong on the way to a registry.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::dial::DialError;
use super::pool::PoolError;
use crate::base::{Chain, Digest};

/// What can go wrong on the way to a registry. URLs in it are stripped of queries and credentials.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// There is no such repository, tag, manifest or blob (404).
    #[error("{what}: not found in the registry")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// The registry or its token server refuses us (401 after a fresh token, 403).
    #[error("{what}: access denied ({status}): {reason}")]
    Denied {
        /// What was asked for.
        what: String,
        /// The HTTP status; 401 where no request was possible for want of credentials.
        status: u16,
        /// What the registry said, and what to try.
        reason: String,
    },
    /// Too many requests (429).
    #[error("{what}: the registry limits our rate ({reason}); wait, or log in for a higher limit")]
    RateLimited {
        /// What was asked for.
        what: String,
        /// What the registry said.
        reason: String,
        /// How long it asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// Any other status that is not success.
    #[error("{what}: the registry answered {status}: {reason}")]
    Status {
        /// What was asked for.
        what: String,
        /// The HTTP status.
        status: u16,
        /// What the registry said.
        reason: String,
        /// How long it asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// The host's name could not be resolved.
    #[error("{host}: the name cannot be resolved; check its spelling and the network")]
    Dns {
        /// The host.
        host: String,
        /// The cause.
        #[source]
        source: Arc<dyn StdError + Send + Sync>,
    },
    /// No connection came up.
    #[error("{host}: cannot connect")]
    Connect {
        /// The host and port.
        host: String,
        /// The cause.
        #[source]
        source: Arc<dyn StdError + Send + Sync>,
    },
    /// TLS failed: a certificate that nobody vouches for, or a server that does not speak TLS.
    #[error("{host}: no trusted TLS connection; {hint}")]
    Tls {
        /// The host and port.
        host: String,
        /// What to try.
        hint: &'static str,
        /// The cause.
        #[source]
        source: Arc<dyn StdError + Send + Sync>,
    },
    /// The server sent nothing for too long.
    #[error("{what}: the server sent nothing for {} ms", .after.as_millis())]
    Timeout {
        /// What was asked for.
        what: String,
        /// How long we waited.
        after: Duration,
    },
    /// The connection broke, or a body ended before its end.
    #[error("{what}: the transfer was cut off: {reason}")]
    Interrupted {
        /// What was asked for.
        what: String,
        /// How it ended.
        reason: String,
    },
    /// The content does not have its digest.
    #[error("{what}: content has digest {actual}, not {expected}")]
    WrongDigest {
        /// What was asked for.
        what: String,
        /// The digest that it should have.
        expected: Digest,
        /// The digest that it has.
        actual: Digest,
    },
    /// An answer is longer than ocifs reads.
    #[error("{what}: the answer is longer than the {limit} bytes that ocifs accepts")]
    TooLarge {
        /// What was asked for.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A redirect that is not followed: a loop, no address, or plain HTTP where that is not allowed.
    #[error("{what}: redirect not followed: {reason}")]
    Redirect {
        /// What was asked for.
        what: String,
        /// Why not.
        reason: String,
    },
    /// The answer is not what the distribution protocol says.
    #[error("{what}: {reason}")]
    Protocol {
        /// What was asked for.
        what: String,
        /// What was wrong with the answer.
        reason: String,
    },
    /// The head of an answer that would bring bytes tells of other bytes than were asked for.
    #[error("{what}: {reason}")]
    OtherBytes {
        /// What was asked for.
        what: String,
        /// What the head says.
        reason: String,
    },
    /// The deadline passed, or the wait that the registry asks for goes beyond it.
    #[error("{what}: no answer within the time allowed")]
    Deadline {
        /// What was asked for.
        what: String,
        /// Last failure before the deadline.
        #[source]
        last: Option<Box<RegistryError>>,
    },
    /// A certificate file that cannot be used.
    #[error("{}: not usable as a file of certificate authorities: {reason}", .path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A client certificate or its key that cannot be used.
    #[error("{}: not usable as a client certificate: {reason}", .path.display())]
    ClientCertificate {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A file of mirrors (containerd's `hosts.toml`) that cannot be used.
    #[error("{}:{line}: {reason}", .path.display())]
    HostsFile {
        /// The file.
        path: PathBuf,
        /// Counted from one; 0 for the file as a whole.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The HTTP client could not be set up.
    #[error("the HTTP client could not be set up")]
    Setup {
        /// The cause.
        #[source]
        source: Arc<dyn StdError + Send + Sync>,
    },
    /// The local content of a push could not be read, or is not what was announced.
    #[error("{what}: the local content could not be read: {reason}")]
    Source {
        /// What was to be pushed.
        what: String,
        /// Why not.
        reason: String,
    },
}

impl RegistryError {
    /// Whether the same request may succeed later (network trouble, 429, 5xx, a body cut short).
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. }
            | Self::Dns { .. }
            | Self::Connect { .. }
            | Self::Timeout { .. }
            | Self::Interrupted { .. }
            | Self::Deadline { .. } => true,
            Self::Status { status, .. } => super::retry::is_transient_status(*status),
            _ => false,
        }
    }

    /// Whether the registry said that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// How long the server asks to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Status { retry_after, .. } => {
                *retry_after
            }
            Self::Deadline {
                last: Some(last), ..
            } => last.retry_after(),
            _ => None,
        }
    }

    /// The error for a response with `status` and the (bounded) beginning of its body.
    pub(super) fn from_status(
        what: &str,
        host: &str,
        status: u16,
        retry_after: Option<Duration>,
        body: &[u8],
    ) -> Self {
        let what = what.to_owned();
        let reason = explain(body);
        match status {
            404 => Self::NotFound { what },
            401 | 403 => Self::Denied {
                what,
                status,
                reason: denial(&reason, host),
            },
            429 => Self::RateLimited {
                what,
                reason,
                retry_after,
            },
            416 => Self::Protocol {
                what,
                reason: "the registry says that the range lies outside the blob (416); \
                         the size in the manifest may be wrong"
                    .to_owned(),
            },
            _ => Self::Status {
                what,
                status,
                reason,
                retry_after,
            },
        }
    }

    /// The error for a request that got no response; `host` is what it was sent to.
    pub(super) fn from_transport(what: &str, host: &str, error: reqwest::Error) -> Self {
        // The URL of the error may carry a signature in its query.
        let error = error.without_url();
        let host = host.to_owned();
        if let Some(tls) = tls_cause(&error) {
            return Self::Tls {
                host,
                hint: tls_hint(tls),
                source: Arc::new(error),
            };
        }
        if error.is_dns() {
            let source = Arc::new(error);
            return Self::Dns { host, source };
        }
        if error.is_connect() {
            let source = Arc::new(error);
            return Self::Connect { host, source };
        }
        Self::Interrupted {
            what: what.to_owned(),
            reason: innermost(&error),
        }
    }

    /// The same for a connection of our own.
    pub(super) fn from_pool(what: &str, host: &str, error: PoolError) -> Self {
        let host = host.to_owned();
        match error {
            PoolError::Dial(DialError::Name(error)) => Self::Dns {
                host,
                source: Arc::new(error),
            },
            PoolError::Dial(DialError::Connect(error)) => Self::Connect {
                host,
                source: Arc::new(error),
            },
            PoolError::Dial(DialError::Tls(error)) => match tls_cause(&error) {
                Some(tls) => Self::Tls {
                    host,
                    hint: tls_hint(tls),
                    source: Arc::new(error),
                },
                // It hung up in the middle of the handshake.
                None => Self::Connect {
                    host,
                    source: Arc::new(error),
                },
            },
            PoolError::Exchange(error) => Self::Interrupted {
                what: what.to_owned(),
                reason: innermost(&error),
            },
            PoolError::Otherwise | PoolError::Dial(DialError::Protocol) => Self::Protocol {
                what: what.to_owned(),
                reason: "the server does not speak HTTP/1.1".to_owned(),
            },
        }
    }
}

/// The rustls error inside, if TLS is what failed. `io::Error::source` skips its own inner error, hence the second look.
fn tls_cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        let inner = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        if let Some(inner) = inner {
            next = Some(inner);
        } else {
            next = error.source();
        }
    }
    None
}

fn tls_hint(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(_) => {
            "the server's certificate is not trusted: for an own authority give its certificate with --ca-file"
        }
        rustls::Error::InvalidMessage(_) => {
            "the server does not seem to speak TLS: allow plain HTTP with --plain-http if that is meant"
        }
        _ => "check the server's TLS settings",
    }
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    bounded(&error.to_string(), 200)
}

/// What to try when a registry refuses: it says the same for a missing repository and a private one.
pub(super) fn denial(reason: &str, host: &str) -> String {
    format!(
        "{reason}; the repository may not exist, or it is private: \
         log in with `ocifs login {host}`, `docker login {host}` or `podman login {host}`"
    )
}

/// An error with its causes on one line, which is no longer than what a registry may make it.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    bounded(&Chain(error).to_string(), 300)
}

/// At most `most` characters of a text from outside, without control characters.
pub(super) fn bounded(text: &str, most: usize) -> String {
    let mut short: String = text
        .chars()
        .take(most)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(most).is_some() {
        short.push('…');
    }
    short
}

/// The message in a registry's error body, `{"errors":[{"code":…,"message":…}]}` (distribution-spec, "Error Codes").
pub(super) fn explain(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Envelope {
        #[serde(default)]
        errors: Vec<Entry>,
        // Token servers say `{"details": …}` or `{"error": …, "error_description": …}` (RFC 6749, 5.2).
        #[serde(default)]
        details: Option<String>,
        #[serde(default)]
        error_description: Option<String>,
        #[serde(default)]
        message: Option<String>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: Option<String>,
    }
    let Ok(envelope) = serde_json::from_slice::<Envelope>(body) else {
        return plain(body).unwrap_or_else(|| "it gives no reason".to_owned());
    };
    let mut said: Vec<String> = envelope
        .errors
        .into_iter()
        .take(3)
        .map(
            |entry| match entry.message.filter(|message| !message.is_empty()) {
                Some(message) => {
                    format!("{}: {}", bounded(&entry.code, 60), bounded(&message, 200))
                }
                None => bounded(&entry.code, 60),
            },
        )
        .collect();
    let others = [
        envelope.details,
        envelope.error_description,
        envelope.message,
    ];
    said.extend(others.into_iter().flatten().map(|text| bounded(&text, 200)));
    if said.is_empty() {
        "it gives no reason".to_owned()
    } else {
        said.join("; ")
    }
}

/// A body that is one short line of text, as servers send that are no registry, or speak TLS on that port.
fn plain(body: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(body).ok()?.trim();
    let is_line = !text.is_empty() && !text.starts_with(['<', '{', '[']) && !text.contains('\n');
    is_line.then(|| bounded(text, 200))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_bodies_are_read_bounded() {
        for (body, text) in [
            (
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
                "MANIFEST_UNKNOWN: manifest unknown",
            ),
            (r#"{"errors":[{"code":"DENIED"}]}"#, "DENIED"),
            (
                r#"{"details":"incorrect username or password"}"#,
                "incorrect username or password",
            ),
            (
                "Client sent an HTTP request to an HTTPS server.\n",
                "Client sent an HTTP request to an HTTPS server.",
            ),
            ("two\nlines", "it gives no reason"),
            ("<html>", "it gives no reason"),
            ("{}", "it gives no reason"),
            ("", "it gives no reason"),
        ] {
            assert_eq!(explain(body.as_bytes()), text, "{body}");
        }
        let long = format!(
            r#"{{"errors":[{{"code":"X","message":"{}"}}]}}"#,
            "y\\n".repeat(5000)
        );
        let text = explain(long.as_bytes());
        assert!(text.len() < 300 && !text.contains('\n'), "{text}");
    }

    #[test]
    fn statuses_become_the_errors_that_callers_tell_apart() {
        let of = |status| RegistryError::from_status("x", "h", status, None, b"");
        assert!(of(404).is_not_found());
        assert!(!of(404).is_transient());
        for status in [429, 500, 502, 503, 504] {
            assert!(of(status).is_transient(), "{status}");
        }
        for status in [400, 401, 403, 405, 416, 501] {
            assert!(!of(status).is_transient(), "{status}");
        }
        assert!(of(401).to_string().contains("docker login h"));
    }
}
