//! Registries: references, credentials, tokens, ranged blob reads, retries, push.
//!
//! A request goes down through `client` (retried, under one deadline, by way of `mirrors`) and a `peer` (one server, authorised) to
//! `transport` (redirects, time limits), and from there to reqwest or, for large bodies, to our own connections (`pool`, `dial`,
//! `wire`). `hosts` knows how many of them a host gets. What is decided on the way, by `address`, `challenge`, `retry`, `lanes` and
//! the heads of `range`, are pure functions of what was received.
//!
//! Credentials (`credentials`, from files by `authfile` and programs by `helper`) are looked up anew for each grant (`auth`, `token`).

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncRead;

use crate::base::{ByteRange, Deadline, Digest, Secret};

mod address;
mod answers;
mod auth;
mod authfile;
mod certs_d;
mod challenge;
mod client;
mod credentials;
mod dial;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod helper;
mod hosts;
mod keep;
mod lanes;
mod login;
mod manifest;
mod mirrors;
mod patience;
mod peer;
mod pool;
mod push;
mod range;
mod reference;
mod referrers;
mod retry;
mod tags;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod tls;
mod token;
mod transport;
mod wire;

pub use answers::Answers;
pub use credentials::default_auth_files;
pub use error::RegistryError;
pub use hosts::Lane;
pub use keep::{KeepError, Kept, forget_login, is_login_used, keep_login};
pub use login::Accepted;
pub use manifest::{Manifest, Resolved};
pub use push::Pushed;
pub use range::{BlobBody, BodyStream, Source};
pub use reference::{Reference, ReferenceError, Repository, Tag};

/// How to reach registries. Proxies named in the environment (`HTTPS_PROXY`, `NO_PROXY`, …) are used, except for loopback.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// Hosts (`host` or `host:port`) spoken to over plain HTTP beside loopback ones.
    pub plain_http: Vec<String>,
    /// PEM files with further certificate authorities.
    pub ca_files: Vec<PathBuf>,
    /// Credential files in order of preference, see [`default_auth_files`]; `None`: no credentials.
    pub auth_files: Option<Vec<PathBuf>>,
    /// containerd's registry directory (`/etc/containerd/certs.d`) with mirrors and certificates of registries; `None`: none.
    pub hosts_dir: Option<PathBuf>,
    /// How long a TCP and TLS connection may take to come up.
    pub connect_timeout: Duration,
    /// The longest that a server may send nothing: before the response head, and between two pieces of a body. One that is known to
    /// be quick gets several times what it usually takes, some seconds at least.
    pub stall_timeout: Duration,
    /// The protocol to speak.
    pub http: HttpVersion,
    /// Most parts that are fetched from one host at a time, 1 to 16.
    pub max_connections: usize,
}

impl RegistryConfig {
    /// As many parts at a time as pay, within our own bound.
    pub const MOST_CONNECTIONS: usize = lanes::MOST;
}

/// Which HTTP is spoken with servers that use TLS; without it, it is always HTTP/1.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpVersion {
    /// Large bodies over several HTTP/1.1 connections, if the server speaks it; the rest over HTTP/2, if the server speaks that.
    #[default]
    Auto,
    /// HTTP/1.1 alone.
    Http1,
    /// HTTP/2 for everything, if the server speaks it.
    Http2,
}

/// A client of any number of registries; cheap to clone, all clones share connections and tokens.
#[derive(Clone, Debug)]
pub struct Registry {
    client: Arc<client::Client>,
}

impl Registry {
    /// A client with these settings.
    pub fn new(config: RegistryConfig) -> Result<Self, RegistryError> {
        Ok(Self {
            client: Arc::new(client::Client::new(config)?),
        })
    }

    /// Whether a registry takes a login; `<token>` as the user's name marks an identity token.
    ///
    /// # Errors
    /// [`RegistryError::Denied`] when it does not.
    pub async fn check_login(
        &self,
        host: &str,
        username: &str,
        password: &Secret,
        deadline: Deadline,
    ) -> Result<Accepted, RegistryError> {
        self.client
            .check_login(host, username, password, deadline)
            .await
    }

    /// Asks what a reference's tag (or `latest`) points at: HEAD (free at Docker Hub), GET where HEAD tells no digest.
    /// A reference with a digest points at that digest, and nobody is asked.
    pub async fn resolve(
        &self,
        reference: &Reference,
        deadline: Deadline,
    ) -> Result<Resolved, RegistryError> {
        self.client.resolve(reference, deadline).await
    }

    /// As [`Registry::resolve`], but by GET at once: one question less when the manifest is wanted next and not here.
    pub async fn resolve_with_manifest(
        &self,
        reference: &Reference,
        deadline: Deadline,
    ) -> Result<Resolved, RegistryError> {
        self.client.resolve_with_manifest(reference, deadline).await
    }

    /// Fetches a manifest by digest, checked, of bounded size.
    pub async fn manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        deadline: Deadline,
    ) -> Result<Manifest, RegistryError> {
        self.client.manifest(repository, digest, deadline).await
    }

    /// Waits for the right to fetch a part of a blob. There are as many for a host as pay; whoever waits for bytes now need
    /// not ask.
    pub async fn lane(&self, repository: &Repository, digest: &Digest) -> Lane {
        self.client.host_of(repository, digest).lane().await
    }

    /// The size that requests for parts of a blob should have: 8 MiB or 16 MiB, by what was measured.
    pub fn part_size(&self, repository: &Repository, digest: &Digest) -> u64 {
        self.client.host_of(repository, digest).part_size()
    }

    /// Starts a read of `range` of a blob of `size` bytes; returns when the response head is right.
    ///
    /// `deadline` bounds the time to the head with all its retries; the body is bounded piece by piece by the stall timeout.
    pub async fn blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        self.client
            .blob(repository, digest, size, range, false, deadline)
            .await
    }

    /// As [`Registry::blob`], over a connection that has carried nothing before: a kept one may have died without a word.
    pub async fn blob_afresh(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        self.client
            .blob(repository, digest, size, range, true, deadline)
            .await
    }

    /// From how long on a request for `bytes` bytes of a blob is slow, by what its host usually takes.
    pub fn slow(&self, repository: &Repository, digest: &Digest, bytes: u64) -> Duration {
        self.client.host_of(repository, digest).slow(bytes)
    }

    /// Takes note that a blob that came from `sources` does not have its digest. Mirrors among them are not asked for it again for
    /// an hour, and the others only when the registry itself fails; where redirects led for it is forgotten.
    pub fn blame(&self, repository: &Repository, digest: &Digest, sources: &[Arc<Source>]) {
        self.client.blame(repository, digest, sources);
    }

    /// How requests ended so far.
    pub fn answers(&self) -> &Answers {
        self.client.answers()
    }

    /// The repository's tags, at most `limit`.
    pub async fn tags(
        &self,
        repository: &Repository,
        limit: usize,
        deadline: Deadline,
    ) -> Result<Vec<Tag>, RegistryError> {
        self.client.tags(repository, limit, deadline).await
    }

    /// What names a manifest as its subject: an image index, by the API or by the tag that takes its place; `None` where there is
    /// neither. Not checked against any digest: it has none.
    pub async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        deadline: Deadline,
    ) -> Result<Option<Bytes>, RegistryError> {
        self.client.referrers(repository, digest, deadline).await
    }

    /// Whether a repository has a blob.
    pub async fn exists(
        &self,
        repository: &Repository,
        digest: &Digest,
        deadline: Deadline,
    ) -> Result<bool, RegistryError> {
        self.client.exists(repository, digest, deadline).await
    }

    /// Uploads a blob of `size` bytes unless the repository has it.
    ///
    /// `open` begins the content anew for each try and is never asked for all of it at once; `progress` hears how
    /// many bytes of the current try have gone out, from zero again when there is another.
    pub async fn push_blob<S, F>(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        open: impl Fn() -> F + Send + Sync,
        progress: impl Fn(u64) + Send + Sync + 'static,
        deadline: Deadline,
    ) -> Result<Pushed, RegistryError>
    where
        S: AsyncRead + Send + Unpin + 'static,
        F: Future<Output = std::io::Result<S>> + Send,
    {
        self.client
            .push_blob(
                repository,
                digest,
                size,
                &open,
                Arc::new(progress),
                deadline,
            )
            .await
    }

    /// Uploads a manifest under the reference's tag, or under its digest when it has none. Blobs come first.
    pub async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
        deadline: Deadline,
    ) -> Result<Digest, RegistryError> {
        self.client
            .push_manifest(reference, media_type, bytes, deadline)
            .await
    }
}
