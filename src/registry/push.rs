//! Uploads: blobs as one stream each, then the manifest. The protocol is oci-client's; who may is decided here.
//!
//! Known limits of oci-client 0.18: it reads the body of an error answer whole, and passes no Retry-After on. It follows an upload's
//! Location to any host (without credentials), so a registry is trusted with where the content goes.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use oci_client::RegistryOperation;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::token_cache::{RegistryToken, RegistryTokenType};
use reqwest::header::HeaderValue;
use reqwest::{Method, Url};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::address::{host_of, is_loopback};
use super::auth::{Action, Grant, GrantForm, Known, Place};
use super::challenge::Challenge;
use super::client::{Call, Client};
use super::retry::Tries;
use super::{Reference, RegistryError, Repository};
use crate::base::{Deadline, Digest, lock};

/// Most tries of an upload: its deadline is made for its length and would allow hours of them.
const MOST_TRIES: u32 = 8;
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

/// An upload client with its authorisation.
struct Uploader {
    client: oci_client::Client,
    root: Url,
    known: Known,
    /// Whether the authorisation is the answer to a 401.
    renewed: bool,
}

/// Bytes of one upload that the connection has taken, and why the local side stopped if it did.
#[derive(Debug, Default)]
struct Sent {
    bytes: AtomicU64,
    failure: Mutex<Option<String>>,
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
        self.retry(&call.what, Tries::UntilDeadline, deadline, || {
            self.exists_once(&call)
        })
        .await
    }

    async fn exists_once(&self, call: &Call<'_>) -> Result<bool, RegistryError> {
        let answer = self.origin.call_once(call).await?;
        match answer.response.status().as_u16() {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(self.origin.refusal(answer, call).await),
        }
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
        self.retry(&call.what, Tries::AtMost(MOST_TRIES), deadline, || async {
            // Also finds what an earlier try has brought there although its answer got lost.
            if self.exists_once(&call).await? {
                let first = tries.load(Ordering::Relaxed) == 0;
                return Ok(if first { Pushed::Existed } else { Pushed::Sent });
            }
            tries.fetch_add(1, Ordering::Relaxed);
            let mut uploader = self.uploader(repository, &call.what).await?;
            loop {
                progress(0);
                let content = open()
                    .await
                    .map_err(|error| source(&call.what, &error.to_string()))?;
                match self
                    .upload(&uploader, &call, digest, size, content, progress.clone())
                    .await
                {
                    Ok(()) => return Ok(Pushed::Sent),
                    Err(error) => {
                        uploader = self
                            .after_refusal(uploader, repository, &call.what, error)
                            .await?
                    }
                }
            }
        })
        .await
    }

    /// One upload of a blob.
    async fn upload<S: AsyncRead + Send + Unpin + 'static>(
        &self,
        uploader: &Uploader,
        call: &Call<'_>,
        digest: &Digest,
        size: u64,
        content: S,
        progress: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> Result<(), RegistryError> {
        let sent = Arc::new(Sent::default());
        let stream = pieces(content, size, sent.clone(), progress);
        let digest = digest.to_string();
        let target = target(call.repository, "latest");
        let stall_timeout = self.origin.transport.stall_timeout();
        let result = tokio::select! {
            result = uploader.client.push_blob_stream(&target, stream, &digest, Some(size)) => result,
            () = stalled(&sent, size, stall_timeout) => {
                return Err(RegistryError::Timeout { what: call.what.clone(), after: stall_timeout });
            }
        };
        if let Some(reason) = lock(&sent.failure).take() {
            return Err(source(&call.what, &reason));
        }
        match result {
            Ok(_) => Ok(()),
            // A success of another number than the specification's, or without Location: what counts is what is there.
            Err(
                OciDistributionError::RegistryNoLocationError
                | OciDistributionError::SpecViolationError(_),
            ) if self.exists_once(call).await? => Ok(()),
            Err(error) => Err(refused(error, &call.what, call.repository)),
        }
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
        let repository = reference.repository();
        // oci-client cuts the tag off its own URL (0.18, client.rs:1868) and panics for a reference that has only a digest
        // where a registry sends no Location: it is given the digest in the tag's place, which makes the same URL.
        let name = reference
            .tag()
            .map_or_else(|| digest.to_string(), |tag| tag.as_str().to_owned());
        let target = target(repository, &name);
        self.retry(&what, Tries::AtMost(MOST_TRIES), deadline, || async {
            let mut uploader = self.uploader(repository, &what).await?;
            loop {
                match uploader
                    .client
                    .push_manifest_raw(&target, bytes.clone(), kind.clone())
                    .await
                {
                    Ok(_) => return Ok(digest),
                    Err(error) => {
                        let error = refused(error, &what, repository);
                        uploader = self
                            .after_refusal(uploader, repository, &what, error)
                            .await?;
                    }
                }
            }
        })
        .await
    }

    /// An uploader with what is known to open the repository for writing.
    async fn uploader(
        &self,
        repository: &Repository,
        what: &str,
    ) -> Result<Uploader, RegistryError> {
        let root = self.origin.root(repository).await?;
        let known = self
            .origin
            .auth
            .known(&self.origin.transport, writing(&root, repository))
            .await?;
        let client = self
            .oci_client(&root, repository, known.grant.as_ref(), what)
            .await?;
        Ok(Uploader {
            client,
            root,
            known,
            renewed: false,
        })
    }

    /// After a first 401 an uploader with a new grant, else the error again.
    ///
    /// What a registry lets everybody read may need a login to write. The challenge does not come through oci-client:
    /// `/v2/` is asked for it, and where that is open too, Basic is what is left to try.
    async fn after_refusal(
        &self,
        uploader: Uploader,
        repository: &Repository,
        what: &str,
        error: RegistryError,
    ) -> Result<Uploader, RegistryError> {
        let Uploader {
            root,
            known,
            renewed,
            ..
        } = uploader;
        if renewed || !matches!(error, RegistryError::Denied { status: 401, .. }) {
            return Err(error);
        }
        let challenge = self
            .origin
            .ping(&root, what)
            .await?
            .unwrap_or(Challenge::Basic);
        let known = match self
            .origin
            .auth
            .renew(
                &self.origin.transport,
                writing(&root, repository),
                challenge,
                &known,
            )
            .await
        {
            Ok(known) => known,
            Err(RegistryError::Denied { .. }) => return Err(error),
            Err(other) => return Err(other),
        };
        let client = self
            .oci_client(&root, repository, known.grant.as_ref(), what)
            .await?;
        Ok(Uploader {
            client,
            root,
            known,
            renewed: true,
        })
    }

    /// An oci-client that has this grant and asks for no other.
    async fn oci_client(
        &self,
        root: &Url,
        repository: &Repository,
        grant: Option<&Grant>,
        what: &str,
    ) -> Result<oci_client::Client, RegistryError> {
        let authorities = self
            .origin
            .transport
            .authorities()
            .iter()
            .map(|der| Certificate {
                encoding: CertificateEncoding::Der,
                data: der.clone(),
            });
        // Naming a proxy that is not for this host is how oci-client is told to use none.
        let no_proxy = is_loopback(host_of(repository.address()));
        let config = ClientConfig {
            protocol: if root.scheme() == "http" {
                ClientProtocol::Http
            } else {
                ClientProtocol::Https
            },
            // One PUT per blob: chunked uploads are the exception that registries get wrong.
            use_monolithic_push: true,
            extra_root_certificates: authorities.collect(),
            connect_timeout: Some(self.config.connect_timeout),
            user_agent: super::transport::NAME,
            http_proxy: no_proxy.then(|| "http://127.0.0.1".to_owned()),
            no_proxy: no_proxy.then(|| "localhost,127.0.0.0/8,::1".to_owned()),
            ..ClientConfig::default()
        };
        let client =
            oci_client::Client::try_from(config).map_err(|error| RegistryError::Protocol {
                what: what.to_owned(),
                reason: format!("the upload client could not be set up: {error}"),
            })?;
        let Some(grant) = grant else {
            return Ok(client);
        };
        // Both stores: the first says that there is a login, the second spares it from asking /v2/ how to use it.
        let (auth, token) = match &grant.form {
            GrantForm::Basic(username, password) => (
                RegistryAuth::Basic(username.clone(), password.expose().to_owned()),
                RegistryTokenType::Basic(username.clone(), password.expose().to_owned()),
            ),
            GrantForm::Bearer(token) => (
                RegistryAuth::Bearer(token.expose().to_owned()),
                RegistryTokenType::Bearer(RegistryToken::Token {
                    token: token.expose().to_owned(),
                }),
            ),
        };
        let target = target(repository, "latest");
        client
            .store_auth_if_needed(target.resolve_registry(), &auth)
            .await;
        client
            .tokens
            .insert(&target, RegistryOperation::Push, token)
            .await;
        Ok(client)
    }
}

fn writing<'a>(root: &'a Url, repository: &'a Repository) -> Place<'a> {
    Place {
        root,
        name: repository.host(),
        repository,
        action: Action::Push,
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
        what: format!("blob {digest} of {repository}"),
    }
}

fn target(repository: &Repository, tag: &str) -> oci_client::Reference {
    oci_client::Reference::with_tag(
        repository.address().to_owned(),
        repository.path().to_owned(),
        tag.to_owned(),
    )
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
) -> impl Stream<Item = Result<Bytes, OciDistributionError>> + Send + 'static {
    let stop = |sent: &Sent, reason: String| {
        *lock(&sent.failure) = Some(reason.clone());
        OciDistributionError::IoError(io::Error::other(reason))
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

/// oci-client's errors as ours.
fn refused(error: OciDistributionError, what: &str, repository: &Repository) -> RegistryError {
    match error {
        // What is missing is not what was to be pushed.
        OciDistributionError::ServerError {
            code: 404, message, ..
        } => RegistryError::Status {
            what: what.to_owned(),
            status: 404,
            reason: format!(
                "{}; the repository or its project may have to be created at the registry first",
                super::error::explain(message.as_bytes())
            ),
            retry_after: None,
        },
        OciDistributionError::ServerError { code, message, .. } => {
            RegistryError::from_status(what, repository.host(), code, None, message.as_bytes())
        }
        OciDistributionError::RequestError(error) => {
            RegistryError::from_transport(what, repository.address(), error)
        }
        OciDistributionError::UnauthorizedError { .. }
        | OciDistributionError::AuthenticationFailure(_) => {
            RegistryError::from_status(what, repository.host(), 401, None, b"")
        }
        // Others may carry a URL with a signature in their text.
        OciDistributionError::RegistryNoLocationError => {
            protocol(what, "the registry does not say where to upload to")
        }
        OciDistributionError::UrlParseError(_) => {
            protocol(what, "the registry names a malformed address to upload to")
        }
        OciDistributionError::SpecViolationError(text) => protocol(what, &text),
        _ => protocol(
            what,
            "the registry's answer to the upload is not understood",
        ),
    }
}

fn protocol(what: &str, reason: &str) -> RegistryError {
    RegistryError::Protocol {
        what: what.to_owned(),
        reason: super::error::bounded(reason, 200),
    }
}
