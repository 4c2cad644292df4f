//! Uploads: blobs as one stream each, then the manifest (distribution-spec, "Pushing blobs", "Pushing manifests").
//!
//! They go to the first server of the registry's `hosts.toml` that can take them, else to the registry itself, with the certificates and
//! headers that are meant for it. A registry is trusted with where the content goes: the Location of an upload may be another host's, which
//! gets neither credentials nor headers.
//!
//! One PUT per blob: chunked uploads are the exception that registries get wrong, and distribution's own throws away what came before a
//! connection broke. What was sent whole is found and not sent again.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Body, Method, Url};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::address::same_origin;
use super::auth::Action;
use super::client::{Call, Client, Need};
use super::peer::Peer;
use super::retry::Tries;
use super::transport::{Answer, Ask};
use super::{Reference, RegistryError, Repository};
use crate::base::{Deadline, Digest, lock};

/// Most tries of an upload: its deadline is made for its length and would allow hours of them.
const TRIES: Tries = Tries::AtMost(8);
/// Size of the pieces that an upload is read in.
const PIECE: usize = 256 << 10;
/// How long a registry may take to answer when it has all of a blob: many hash it, or move it to their store, only then.
const SETTLING_TIME: Duration = Duration::from_secs(15 * 60);

/// What became of a blob that was to be pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It was sent.
    Sent,
    /// The repository had it already; nothing was sent.
    Existed,
}

/// Bytes of one upload that the connection has taken, and why the local side stopped if it did.
#[derive(Debug, Default)]
struct Sent {
    bytes: AtomicU64,
    failure: Mutex<Option<String>>,
}

/// What one request carries.
struct Content {
    kind: HeaderValue,
    size: u64,
    body: Body,
}

impl Client {
    /// See [`super::Registry::exists`].
    pub(super) async fn exists(
        &self,
        repository: &Repository,
        digest: &Digest,
        deadline: Deadline,
    ) -> Result<bool, RegistryError> {
        let call = head(repository, digest, Action::Pull);
        self.retry(&call.what, Tries::UntilDeadline, deadline, || async {
            self.taker(repository).await?.exists_once(&call).await
        })
        .await
    }

    /// The server that takes uploads to a repository.
    async fn taker(&self, repository: &Repository) -> Result<Arc<Peer>, RegistryError> {
        let way = self.ways.to(repository).await?;
        let able = way
            .mirrors
            .iter()
            .find(|mirror| mirror.is_good_for(Need::Push));
        Ok(Arc::clone(able.unwrap_or(&way.server)))
    }

    /// See [`super::Registry::push_blob`].
    pub(super) async fn push_blob<S, F>(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        open: &(dyn Fn() -> F + Send + Sync),
        progress: Arc<dyn Fn(u64) + Send + Sync>,
        deadline: Deadline,
    ) -> Result<Pushed, RegistryError>
    where
        S: AsyncRead + Send + Unpin + 'static,
        F: Future<Output = io::Result<S>> + Send,
    {
        let call = head(repository, digest, Action::Push);
        let tries = AtomicU64::new(0);
        self.retry(&call.what, TRIES, deadline, || async {
            let peer = self.taker(repository).await?;
            // Also finds what an earlier try has brought there although its answer got lost.
            if peer.exists_once(&call).await? {
                let first = tries.load(Ordering::Relaxed) == 0;
                return Ok(if first { Pushed::Existed } else { Pushed::Sent });
            }
            tries.fetch_add(1, Ordering::Relaxed);
            let mut renewed = false;
            loop {
                let url = peer.begin(&call, digest).await?;
                progress(0);
                let content = open()
                    .await
                    .map_err(|error| source(&call.what, &error.to_string()))?;
                let upload = peer.upload(&call, url, size, content, progress.clone());
                let answer = upload.await?;
                match answer.response.status().as_u16() {
                    201 => return Ok(Pushed::Sent),
                    // A success of another number than the specification's: what counts is what is there.
                    200..=299 if peer.exists_once(&call).await? => return Ok(Pushed::Sent),
                    401 if !renewed && !answer.foreign => {
                        renewed = true;
                        peer.renew(&call, answer).await?;
                    }
                    _ => return Err(peer.refused(answer, &call).await),
                }
            }
        })
        .await
    }

    /// See [`super::Registry::push_manifest`].
    pub(super) async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
        deadline: Deadline,
    ) -> Result<Digest, RegistryError> {
        let what = format!("push of {reference}");
        let digest = Digest::of(&bytes);
        if let Some(&expected) = reference.digest()
            && expected != digest
        {
            return Err(RegistryError::WrongDigest {
                what,
                expected,
                actual: digest,
            });
        }
        let kind = HeaderValue::from_str(media_type)
            .map_err(|_| source(&what, "the media type cannot be in a header"))?;
        let name = reference
            .tag()
            .map_or_else(|| digest.to_string(), |tag| tag.as_str().to_owned());
        let call = Call {
            method: Method::PUT,
            path: format!("manifests/{name}"),
            what,
            ..head(reference.repository(), &digest, Action::Push)
        };
        self.retry(&call.what, TRIES, deadline, || async {
            let peer = self.taker(call.repository).await?;
            let mut renewed = false;
            loop {
                let content = Content {
                    kind: kind.clone(),
                    size: bytes.len() as u64,
                    body: bytes.clone().into(),
                };
                let root = peer.root(call.repository).await?;
                let url = peer.url(&root, &call)?;
                let answer = peer.send_content(&call, url, content).await?;
                match answer.response.status().as_u16() {
                    200..=299 => return Ok(digest),
                    401 if !renewed => {
                        renewed = true;
                        peer.renew(&call, answer).await?;
                    }
                    _ => return Err(peer.refused(answer, &call).await),
                }
            }
        })
        .await
    }
}

impl Peer {
    async fn exists_once(&self, call: &Call<'_>) -> Result<bool, RegistryError> {
        let answer = self.call_once(call).await?;
        match answer.response.status().as_u16() {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(self.refusal(answer, call).await),
        }
    }

    /// Asks for an upload of a blob; gives where its bytes go.
    async fn begin(&self, call: &Call<'_>, digest: &Digest) -> Result<Url, RegistryError> {
        let begin = Call {
            method: Method::POST,
            path: "blobs/uploads/".to_owned(),
            ..call.clone()
        };
        let answer = self.call_once(&begin).await?;
        if !answer.response.status().is_success() {
            return Err(self.refused(answer, call).await);
        }
        let location = answer.response.headers().get(LOCATION);
        let location = location
            .and_then(|location| location.to_str().ok())
            .ok_or_else(|| protocol(&call.what, "the registry does not say where to upload to"))?;
        let plain = self.transport.plain();
        let mut url = plain
            .follow(&answer.url, location)
            .map_err(|reason| protocol(&call.what, &format!("where to upload to: {reason}")))?;
        url.query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        Ok(url)
    }

    /// One upload of a blob.
    async fn upload<S: AsyncRead + Send + Unpin + 'static>(
        &self,
        call: &Call<'_>,
        url: Url,
        size: u64,
        content: S,
        progress: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> Result<Answer, RegistryError> {
        let sent = Arc::new(Sent::default());
        let content = Content {
            kind: HeaderValue::from_static("application/octet-stream"),
            size,
            body: Body::wrap_stream(pieces(content, size, sent.clone(), progress)),
        };
        let stall_timeout = self.transport.stall_timeout();
        let result = tokio::select! {
            result = self.send_content(call, url, content) => result,
            () = stalled(&sent, size, stall_timeout) => {
                return Err(RegistryError::Timeout { what: call.what.clone(), after: stall_timeout });
            }
        };
        if let Some(reason) = lock(&sent.failure).take() {
            return Err(source(&call.what, &reason));
        }
        result
    }

    /// Sends content to an address of the registry or one that it told, which is another's perhaps.
    async fn send_content(
        &self,
        call: &Call<'_>,
        url: Url,
        content: Content,
    ) -> Result<Answer, RegistryError> {
        let root = self.root(call.repository).await?;
        let home = same_origin(&root, &url);
        let name = self.name(call.repository);
        let grant = match home {
            true => {
                let place = self.place(call, &root, &name);
                self.auth.known(&self.transport, place).await?.grant
            }
            false => None,
        };
        let mut headers = match home {
            true => self.headers.clone(),
            false => HeaderMap::new(),
        };
        headers.insert(CONTENT_TYPE, content.kind);
        headers.insert(CONTENT_LENGTH, HeaderValue::from(content.size));
        let ask = Ask {
            authorization: grant.map(|grant| grant.header),
            headers,
            ..Ask::new(Method::PUT, url)
        };
        let mut answer = self
            .transport
            .upload(&ask, content.body, &call.what)
            .await?;
        answer.foreign = !home;
        Ok(answer)
    }

    /// The error of an upload that was refused.
    async fn refused(&self, answer: Answer, call: &Call<'_>) -> RegistryError {
        match self.refusal(answer, call).await {
            // What is missing is not what was to be pushed.
            RegistryError::NotFound { what } => RegistryError::Status {
                what,
                status: 404,
                reason: "there is no such repository or project; it may have to be created at the registry first"
                    .to_owned(),
                retry_after: None,
            },
            error => error,
        }
    }
}

fn head<'a>(repository: &'a Repository, digest: &Digest, action: Action) -> Call<'a> {
    Call {
        method: Method::HEAD,
        repository,
        action,
        path: format!("blobs/{digest}"),
        accept: None,
        range: None,
        bulk: false,
        fresh: false,
        what: format!("blob {digest} of {repository}"),
    }
}

fn source(what: &str, reason: &str) -> RegistryError {
    RegistryError::Source {
        what: what.to_owned(),
        reason: super::error::bounded(reason, 200),
    }
}

/// The content in pieces, exactly `size` bytes; what is wrong with it is left in `sent`.
fn pieces<S: AsyncRead + Send + Unpin + 'static>(
    content: S,
    size: u64,
    sent: Arc<Sent>,
    progress: Arc<dyn Fn(u64) + Send + Sync>,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let stop = |sent: &Sent, reason: String| {
        *lock(&sent.failure) = Some(reason.clone());
        io::Error::other(reason)
    };
    futures_util::stream::try_unfold((content, 0u64), move |(mut content, at)| {
        let (sent, progress) = (sent.clone(), progress.clone());
        async move {
            let mut piece = BytesMut::with_capacity(PIECE);
            let n = content
                .read_buf(&mut piece)
                .await
                .map_err(|error| stop(&sent, error.to_string()))?;
            let at = at + n as u64;
            if at > size || n == 0 && at < size {
                return Err(stop(
                    &sent,
                    format!(
                        "it has {} than the {size} bytes announced",
                        if at > size { "more" } else { "fewer" }
                    ),
                ));
            }
            if n == 0 {
                return Ok(None);
            }
            sent.bytes.store(at, Ordering::Relaxed);
            progress(at);
            Ok(Some((piece.freeze(), (content, at))))
        }
    })
}

/// Returns when an upload has not moved for `stall_timeout`, or its answer takes longer than [`SETTLING_TIME`].
async fn stalled(sent: &Sent, size: u64, stall_timeout: Duration) {
    let mut before = None;
    loop {
        let now = sent.bytes.load(Ordering::Relaxed);
        if before == Some(now) {
            if now < size {
                return;
            }
            tokio::time::sleep(SETTLING_TIME).await;
            return;
        }
        before = Some(now);
        tokio::time::sleep(stall_timeout).await;
    }
}

fn protocol(what: &str, reason: &str) -> RegistryError {
    RegistryError::Protocol {
        what: what.to_owned(),
        reason: super::error::bounded(reason, 200),
    }
}
