//! `crate::registry` as the blob core knows it: one server that sends pieces, and now and then stops in the middle.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use shuttle::future::yield_now;
use shuttle::rand::Rng as _;

use crate::base::{ByteRange, Deadline, Digest};

/// Small parts, so that a small blob has several.
const PART: u64 = 32 << 10;
const PIECE: usize = 7 << 10;

/// How the server is.
#[derive(Debug, Default)]
pub struct Server {
    pub content: Vec<u8>,
    /// Bytes that it sent.
    pub sent: AtomicU64,
    /// Sends the whole blob whatever is asked for.
    pub no_ranges: bool,
    /// One body in so many is cut off.
    pub cuts: Option<u32>,
    /// So many of the first bodies have a wrong byte each.
    pub lies: AtomicU64,
}

#[derive(Clone, Debug)]
pub struct Registry(pub Arc<Server>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository;

#[derive(Debug)]
pub struct Lane;

pub struct RegistryConfig;

impl RegistryConfig {
    pub const MOST_CONNECTIONS: usize = 4;
}

#[derive(Clone, Debug)]
pub enum RegistryError {
    Cut,
    Denied {},
}

impl fmt::Display for RegistryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for RegistryError {}

impl RegistryError {
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Cut)
    }

    pub fn is_not_found(&self) -> bool {
        false
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Source;

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server")
    }
}

#[derive(Debug)]
pub enum BlobBody {
    Range(BodyStream),
    Whole(BodyStream),
}

#[derive(Debug)]
pub struct BodyStream {
    server: Arc<Server>,
    source: Arc<Source>,
    rest: Bytes,
    cut: bool,
}

impl BodyStream {
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        yield_now().await;
        if self.rest.is_empty() {
            return Ok(None);
        }
        if self.cut && shuttle::rand::thread_rng().gen_bool(0.5) {
            self.rest.clear();
            return Err(RegistryError::Cut);
        }
        let piece = self.rest.split_to(PIECE.min(self.rest.len()));
        self.server
            .sent
            .fetch_add(piece.len() as u64, Ordering::Relaxed);
        Ok(Some(piece))
    }
}

impl Registry {
    pub async fn lane(&self, _: &Repository, _: &Digest) -> Lane {
        yield_now().await;
        Lane
    }

    pub fn part_size(&self, _: &Repository, _: &Digest) -> u64 {
        PART
    }

    pub async fn blob(
        &self,
        _: &Repository,
        _: &Digest,
        _size: u64,
        range: ByteRange,
        _: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        yield_now().await;
        let server = &self.0;
        let mut content = server.content.clone();
        let lies = server
            .lies
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            });
        if lies.is_ok() {
            content[range.start() as usize] ^= 1;
        }
        let rest = match server.no_ranges {
            true => content.into(),
            false => Bytes::from(content).slice(range.start() as usize..range.end() as usize),
        };
        let cut = server
            .cuts
            .is_some_and(|one_in| shuttle::rand::thread_rng().gen_range(0..one_in) == 0);
        let body = BodyStream {
            server: Arc::clone(server),
            source: Arc::new(Source),
            rest,
            cut,
        };
        Ok(match server.no_ranges {
            true => BlobBody::Whole(body),
            false => BlobBody::Range(body),
        })
    }

    pub async fn blob_afresh(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        range: ByteRange,
        deadline: Deadline,
    ) -> Result<BlobBody, RegistryError> {
        self.blob(repository, digest, size, range, deadline).await
    }

    pub fn slow(&self, _: &Repository, _: &Digest, _: u64) -> Duration {
        Duration::from_secs(1)
    }

    pub fn blame(&self, _: &Repository, _: &Digest, _: &[Arc<Source>]) {}
}
