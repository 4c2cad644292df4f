//! Ranged blob reads: the only place that writes `Range` or reads `Content-Range` (RFC 9110, section 14).

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Response, Url};

use super::address::{address_of, same_origin};
use super::auth::Action;
use super::client::{Call, Client, Need};
use super::error::chain;
use super::hosts::Host;
use super::mirrors::Health;
use super::peer::Peer;
use super::retry::Tries;
use super::transport::{Answer, Ask, next_piece};
use super::{RegistryError, Repository};
use crate::base::{ByteRange, Deadline, Digest, Instant, lock};

/// The answer to a ranged blob read.
#[derive(Debug)]
pub enum BlobBody {
    /// 206: the bytes from the start of the range; a stream that ends before the range does fails at its end.
    Range(BodyStream),
    /// 200: the server ignores ranges and sends the blob from its first byte.
    Whole(BodyStream),
}

/// The body of a blob response, piece by piece.
#[derive(Debug)]
pub struct BodyStream {
    /// On the heap, for it is large and what holds it is moved about.
    response: Box<Response>,
    source: Arc<Source>,
    /// Since when the next piece is waited for.
    waiting: Option<Instant>,
    /// Bytes that the server announced and has not sent yet.
    left: u64,
    /// Bytes asked for that the server did not announce.
    withheld: u64,
    stall_timeout: Duration,
    what: String,
    ended: bool,
    host: Arc<Host>,
    /// From the request to its head.
    head: Duration,
    begun: Instant,
    received: u64,
    /// The mirror that sends it, and what it is asked for.
    mirror: Option<Box<(Arc<Health>, String)>>,
}

/// Who sends a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The registry or mirror that was asked.
    pub server: String,
    /// Whether it is a mirror.
    pub is_mirror: bool,
    /// `host[:port]` that sends the bytes, behind all redirects.
    pub host: String,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_mirror { "mirror " } else { "" };
        write!(f, "{kind}{}", self.server)?;
        if self.host != self.server {
            write!(f, " by way of {}", self.host)?;
        }
        Ok(())
    }
}

/// Whoever asks for the next piece again after a while gets so long for it at least.
const LEAST_WAIT: Duration = Duration::from_secs(1);

impl BodyStream {
    /// Who sends it.
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// The next piece, `None` behind the last. A body that ends early, runs over or stalls is a transient error:
    /// what came before is right, and the rest can be asked for; a mirror that did it is left for the next server.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let next = self.receive().await;
        if let Some((mirror, key)) = self.mirror.as_deref() {
            match &next {
                Err(error) => mirror.failed(key, error, Instant::now(), Duration::ZERO),
                Ok(None) => mirror.worked(),
                Ok(Some(_)) => {}
            }
        }
        next
    }

    async fn receive(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let cut = |what: &str, reason: String| RegistryError::Interrupted {
            what: what.to_owned(),
            reason,
        };
        while !self.ended {
            let patience = self.host.patience_for_gap(self.stall_timeout);
            let now = Instant::now();
            let since = *self.waiting.get_or_insert(now);
            let left = patience.saturating_sub(now - since);
            let left = left.max(LEAST_WAIT.min(patience));
            match next_piece(&mut self.response, left, &self.what).await {
                Ok(Some(piece)) if piece.is_empty() => continue,
                Ok(Some(piece)) if piece.len() as u64 > self.left => {
                    self.ended = true;
                    return Err(cut(
                        &self.what,
                        "the server sends more than it announced".to_owned(),
                    ));
                }
                Ok(Some(piece)) => {
                    self.waiting = None;
                    self.host.went_on(since.elapsed());
                    self.left -= piece.len() as u64;
                    self.received += piece.len() as u64;
                    self.host.delivered(piece.len() as u64);
                    return Ok(Some(piece));
                }
                Ok(None) => {
                    self.ended = true;
                    let missing = self.left + self.withheld;
                    if missing > 0 {
                        return Err(cut(
                            &self.what,
                            format!("the body ended {missing} bytes early"),
                        ));
                    }
                    self.host
                        .timed(self.head, self.begun.elapsed(), self.received);
                }
                Err(error) => {
                    self.ended = true;
                    if matches!(error, RegistryError::Timeout { .. }) {
                        self.host.stalled();
                    }
                    return Err(error);
                }
            }
        }
        Ok(None)
    }
}

/// `bytes=a-b`. Always closed: there are registries that refuse open ranges.
fn range_header(range: ByteRange) -> Option<HeaderValue> {
    let last = range.end().checked_sub(1).filter(|_| !range.is_empty())?;
    HeaderValue::from_str(&format!("bytes={}-{last}", range.start())).ok()
}

/// What a response head promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    /// This many bytes from the start of the range.
    Range(u64),
    /// The whole blob.
    Whole,
}

/// Bodies from here on come over connections of their own; smaller ones would cost more in handshakes than they gain.
const BULK: u64 = 1 << 20;

/// Checks the head of a 200 or 206 against what was asked for.
pub(super) fn check_head(
    status: u16,
    headers: &HeaderMap,
    range: ByteRange,
    size: u64,
) -> Result<Promise, String> {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
            .map(str::trim)
    };
    let length = match text(CONTENT_LENGTH) {
        Some(length) => Some(parse_number(length).ok_or("the Content-Length is malformed")?),
        None => None,
    };
    if status == 200 {
        return match length {
            Some(length) if length != size => Err(format!(
                "the blob has {length} bytes in the registry, {size} in the manifest"
            )),
            _ => Ok(Promise::Whole),
        };
    }
    if status != 206 {
        return Err(format!("unexpected status {status}"));
    }
    if text(CONTENT_TYPE).is_some_and(|kind| kind.to_ascii_lowercase().starts_with("multipart/")) {
        return Err("a multipart answer to a single range".to_owned());
    }
    let header = text(CONTENT_RANGE).ok_or("206 without Content-Range")?;
    let malformed = || {
        format!(
            "malformed Content-Range `{}`",
            super::error::bounded(header, 80)
        )
    };
    let (first, last, total) = parse_content_range(header).ok_or_else(malformed)?;
    if first != range.start()
        || last < first
        || last >= range.end()
        || total.is_some_and(|total| total != size)
    {
        return Err(format!(
            "asked for bytes {range} of {size}, got Content-Range `{}`",
            super::error::bounded(header, 80)
        ));
    }
    let promised = last - first + 1;
    if length.is_some_and(|length| length != promised) {
        return Err(format!(
            "Content-Length and Content-Range `{}` contradict each other",
            super::error::bounded(header, 80)
        ));
    }
    Ok(Promise::Range(promised))
}

/// First byte, last byte and total (`None` for `*`) of `bytes a-b/total`.
fn parse_content_range(header: &str) -> Option<(u64, u64, Option<u64>)> {
    let (unit, rest) = header.split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(parse_number(total)?),
    };
    unit.eq_ignore_ascii_case("bytes").then_some((
        parse_number(first.trim())?,
        parse_number(last.trim())?,
        total,
    ))
}

/// Digits only: `u64::from_str` would take a sign.
fn parse_number(text: &str) -> Option<u64> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

/// Where redirects led for each blob. Signed addresses live for minutes and save a request to the registry each time.
#[derive(Default)]
pub(super) struct KeptUrls(Mutex<HashMap<(Repository, Digest), Url>>);

impl KeptUrls {
    /// Most addresses that are kept.
    const MOST: usize = 4096;

    fn get(&self, key: &(Repository, Digest)) -> Option<Url> {
        lock(&self.0).get(key).cloned()
    }

    pub(super) fn keep(&self, key: (Repository, Digest), url: Url) {
        let mut kept = lock(&self.0);
        if kept.len() >= Self::MOST && !kept.contains_key(&key) {
            kept.clear();
        }
        kept.insert(key, url);
    }

    /// Forgets where redirects led for this.
    pub(super) fn drop_of(&self, key: &(Repository, Digest)) {
        lock(&self.0).remove(key);
    }

    /// Forgets `url`, unless somebody has found a newer one already.
    fn forget(&self, key: &(Repository, Digest), url: &Url) {
        let mut kept = lock(&self.0);
        if kept.get(key) == Some(url) {
            kept.remove(key);
        }
    }
}

impl fmt::Debug for KeptUrls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeptUrls")
    }
}

impl Client {
    /// The host that sends a blob, as far as is known.
    pub(super) fn host_of(&self, repository: &Repository, digest: &Digest) -> Arc<Host> {
        let peer = self.likely(repository, &format!("blobs/{digest}"));
        match peer.kept.get(&(repository.clone(), *digest)) {
            Some(url) => peer.transport.host(&address_of(&url)),
            None => peer.transport.host(&peer.address(repository)),
        }
    }

    /// See [`super::Registry::blob`].
    pub(super) async fn blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        range: ByteRange,
        fresh: bool,
        deadline: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        let what = format!("blob {digest} of {repository}");
        let header = range_header(range)
            .filter(|_| range.end() <= size)
            .ok_or_else(|| RegistryError::Protocol {
                what: what.clone(),
                reason: format!("there are no bytes {range} in a blob of {size} bytes"),
            })?;
        let mut call = Call {
            method: Method::GET,
            repository,
            action: Action::Pull,
            path: format!("blobs/{digest}"),
            accept: None,
            range: Some(header),
            bulk: range.len() >= BULK || fresh,
            fresh,
            what,
        };
        let key = (repository.clone(), *digest);
        match self.blob_by(&call, &key, size, range, deadline).await {
            // One of several servers behind a name may be broken, or what was sent on this connection before.
            Err(error @ RegistryError::OtherBytes { .. }) => {
                tracing::warn!(error = %chain(&error), "asking once more, over another connection");
                (call.fresh, call.bulk) = (true, true);
                self.blob_by(&call, &key, size, range, deadline).await
            }
            answer => answer,
        }
    }

    async fn blob_by(
        &self,
        call: &Call<'_>,
        key: &(Repository, Digest),
        size: u64,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        self.retry(&call.what, Tries::UntilDeadline, deadline, || {
            self.via(call, Need::Pull, deadline, |peer| async move {
                peer.blob_once(call, key, size, range, deadline).await
            })
        })
        .await
    }
}

impl Peer {
    async fn blob_once(
        &self,
        call: &Call<'_>,
        key: &(Repository, Digest),
        size: u64,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        if let Some(url) = self.kept.get(key) {
            match self.blob_from_kept(call, &url, size, range, deadline).await {
                Ok(Some(body)) => return Ok(body),
                // Expired, or moved: the registry is asked again, once.
                Ok(None) => self.kept.forget(key, &url),
                Err(error) => {
                    self.kept.forget(key, &url);
                    return Err(error);
                }
            }
        }
        let answer = self.call_once(call).await?;
        let (redirected, url) = (answer.redirected, answer.url.clone());
        let body = self.body(answer, call, size, range, deadline).await?;
        if redirected {
            self.kept.keep(key.clone(), url);
        }
        Ok(body)
    }

    /// Asks an address that a redirect led to before; `None` when it has gone out of date. Only the registry itself
    /// gets credentials.
    async fn blob_from_kept(
        &self,
        call: &Call<'_>,
        url: &Url,
        size: u64,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<Option<BlobBody>, RegistryError> {
        let root = self.root(call.repository).await?;
        let answer = if same_origin(&root, url) {
            self.ask(call, &root, url.clone()).await?
        } else {
            let ask = Ask {
                range: call.range.clone(),
                bulk: call.bulk,
                fresh: call.fresh,
                ..Ask::new(Method::GET, url.clone())
            };
            self.transport.send(&ask, &call.what).await?
        };
        if matches!(
            answer.response.status().as_u16(),
            400 | 401 | 403 | 404 | 410
        ) {
            return Ok(None);
        }
        self.body(answer, call, size, range, deadline)
            .await
            .map(Some)
    }

    async fn body(
        &self,
        answer: Answer,
        call: &Call<'_>,
        size: u64,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        let status = answer.response.status();
        if !status.is_success() {
            return Err(self.refusal(answer, call).await);
        }
        let promise = check_head(status.as_u16(), answer.response.headers(), range, size).map_err(
            |reason| RegistryError::OtherBytes {
                what: call.what.clone(),
                reason,
            },
        )?;
        let source = Source {
            server: self.name(call.repository),
            is_mirror: self.watched().is_some(),
            host: address_of(&answer.url),
        };
        let stream = |left: u64, withheld: u64| BodyStream {
            source: Arc::new(source),
            waiting: None,
            host: self.transport.host(&address_of(&answer.url)),
            head: answer.head,
            begun: Instant::now(),
            received: 0,
            response: Box::new(answer.response),
            left,
            withheld,
            // A body that is silent until nobody waits for it any more helps nobody.
            stall_timeout: self
                .transport
                .stall_timeout()
                .min(deadline.left().max(LEAST_WAIT)),
            what: call.what.clone(),
            ended: false,
            mirror: self.watched().map(|mirror| Box::new((mirror, call.key()))),
        };
        Ok(match promise {
            Promise::Range(promised) => BlobBody::Range(stream(promised, range.len() - promised)),
            Promise::Whole => BlobBody::Whole(stream(size, 0)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_closed() {
        assert_eq!(range_header(ByteRange::new(0, 1)).unwrap(), "bytes=0-0");
        assert_eq!(range_header(ByteRange::new(10, 30)).unwrap(), "bytes=10-29");
        assert_eq!(range_header(ByteRange::new(7, 7)), None);
    }

    #[test]
    fn heads_are_believed_only_when_they_fit() {
        let range = ByteRange::new(100, 200);
        for (status, content_range, length, expected) in [
            (
                206,
                Some("bytes 100-199/1000"),
                Some("100"),
                Some(Promise::Range(100)),
            ),
            (
                206,
                Some("bytes 100-199/1000"),
                None,
                Some(Promise::Range(100)),
            ),
            (
                206,
                Some("BYTES 100-199/*"),
                None,
                Some(Promise::Range(100)),
            ),
            (
                206,
                Some("bytes 100-149/1000"),
                Some("50"),
                Some(Promise::Range(50)),
            ),
            (206, Some("bytes 100-200/1000"), None, None),
            (206, Some("bytes 99-199/1000"), None, None),
            (206, Some("bytes 101-199/1000"), None, None),
            (206, Some("bytes 100-99/1000"), None, None),
            (206, Some("bytes 100-199/1001"), None, None),
            (206, Some("bytes 100-199/1000"), Some("99"), None),
            (206, Some("bytes 100-199/1000"), Some("+100"), None),
            (206, Some("bytes */1000"), None, None),
            (206, Some("bytes -100-199/1000"), None, None),
            (206, Some("bytes 100-18446744073709551616/1000"), None, None),
            (206, Some("items 100-199/1000"), None, None),
            (206, Some(""), None, None),
            (206, None, Some("100"), None),
            (200, None, Some("1000"), Some(Promise::Whole)),
            (200, None, None, Some(Promise::Whole)),
            (200, None, Some("100"), None),
            (200, None, Some("999999999999999999999"), None),
            (204, None, None, None),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [(CONTENT_RANGE, content_range), (CONTENT_LENGTH, length)] {
                if let Some(value) = value {
                    headers.insert(name, value.parse().unwrap());
                }
            }
            let promise = check_head(status, &headers, range, 1000);
            assert_eq!(
                promise.clone().ok(),
                expected,
                "{status} {content_range:?} {length:?}: {promise:?}"
            );
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_RANGE, "bytes 100-199/1000".parse().unwrap());
        headers.insert(
            CONTENT_TYPE,
            "Multipart/ByteRanges; boundary=x".parse().unwrap(),
        );
        assert!(check_head(206, &headers, range, 1000).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_content_range_panics(header in "(bytes )?[0-9*/ -]{0,60}") {
            parse_content_range(&header);
        }
    }
}
