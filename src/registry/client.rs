//! Requests to registries: by way of their mirrors, retried, under one deadline.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use reqwest::header::HeaderValue;

use super::answers::Answers;
use super::auth::Action;
use super::credentials::Sources;
use super::error::chain;
use super::mirrors::{Advice, Ways};
use super::peer::Peer;
use super::range::Source;
use super::retry::{self, Decision, Tries};
use super::{RegistryConfig, RegistryError, Repository};
use crate::base::{Deadline, Digest, Instant};

/// What all clones of a [`super::Registry`] share.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) ways: Ways,
}

/// What a server must be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Content by digest.
    Pull,
    /// What a tag points at.
    Resolve,
    /// Uploads.
    Push,
}

/// A request below `/v2/<repository>/`.
#[derive(Clone, Debug)]
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) repository: &'a Repository,
    pub(super) action: Action,
    /// `manifests/v1`, `blobs/sha256:…`, `tags/list?n=100`.
    pub(super) path: String,
    pub(super) accept: Option<&'static str>,
    pub(super) range: Option<HeaderValue>,
    /// See [`Ask::bulk`](super::transport::Ask::bulk).
    pub(super) bulk: bool,
    /// See [`Ask::fresh`](super::transport::Ask::fresh).
    pub(super) fresh: bool,
    /// What is asked for, for errors.
    pub(super) what: String,
}

/// The least time that a mirror gets.
const LEAST_TIME: Duration = Duration::from_millis(100);

impl Call<'_> {
    /// Names what is asked for, whoever is asked.
    pub(super) fn key(&self) -> String {
        format!("{}/{}", self.repository.path(), self.path)
    }
}

impl Client {
    pub(super) fn new(config: RegistryConfig) -> Result<Self, RegistryError> {
        let sources = Sources::new(config.auth_files.clone().unwrap_or_default());
        Ok(Self {
            ways: Ways::new(&config, Arc::new(sources))?,
        })
    }

    /// How requests ended so far.
    pub(super) fn answers(&self) -> &Answers {
        &self.ways.answers
    }

    /// Runs `attempt` until it succeeds, fails for good or for the last of its `tries`, or the deadline comes.
    pub(super) async fn retry<T, F: Future<Output = Result<T, RegistryError>>>(
        &self,
        what: &str,
        tries: Tries,
        deadline: Deadline,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, RegistryError> {
        let mut last = None;
        let out_of_time = |last: Option<RegistryError>| RegistryError::Deadline {
            what: what.to_owned(),
            last: last.map(Box::new),
        };
        for number in 1u32.. {
            let error = match tokio::time::timeout_at(deadline.instant(), attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error,
                Err(_) => return Err(out_of_time(last)),
            };
            if tries.are_over(&error, number) {
                return Err(error);
            }
            match retry::decide(&error, number, deadline.left(), retry::jitter()) {
                Decision::GiveUp => return Err(error),
                Decision::OutOfTime => return Err(out_of_time(Some(error))),
                Decision::Wait(pause) => {
                    if number == 1 {
                        tracing::info!(error = %chain(&error), ?pause, "will be tried again");
                    } else {
                        tracing::warn!(error = %chain(&error), ?pause, number, "will be tried again");
                    }
                    last = Some(error);
                    tokio::time::sleep(pause).await;
                }
            }
        }
        Err(out_of_time(last))
    }

    /// One round of tries: of each mirror that is good for it and has not failed a moment ago, in order, then of the registry itself, and
    /// when that has trouble of the mirrors that were left out. What a mirror says is believed only when it delivers: whatever is wrong
    /// with it, the next one is asked, and the registry's own answer is what counts in the end.
    pub(super) async fn via<T, F: Future<Output = Result<T, RegistryError>>>(
        &self,
        call: &Call<'_>,
        need: Need,
        deadline: Deadline,
        attempt: impl Fn(Arc<Peer>) -> F,
    ) -> Result<T, RegistryError> {
        let way = self.ways.to(call.repository).await?;
        let key = call.key();
        let (mut ready, mut resting) = (Vec::new(), Vec::new());
        for mirror in way.mirrors.iter().filter(|mirror| mirror.is_good_for(need)) {
            match mirror.health.advice(&key, Instant::now()) {
                Advice::Ask => ready.push(mirror),
                Advice::Rest => resting.push(mirror),
                Advice::Skip => {}
            }
        }
        for mirror in ready {
            if let Some(value) = self
                .try_mirror(mirror, call, &key, deadline, &attempt)
                .await
            {
                return Ok(value);
            }
        }
        let answer = attempt(Arc::clone(&way.server)).await;
        if matches!(&answer, Err(error) if error.is_transient()) {
            for mirror in resting {
                if let Some(value) = self
                    .try_mirror(mirror, call, &key, deadline, &attempt)
                    .await
                {
                    return Ok(value);
                }
            }
        }
        answer
    }

    async fn try_mirror<T, F: Future<Output = Result<T, RegistryError>>>(
        &self,
        mirror: &Arc<Peer>,
        call: &Call<'_>,
        key: &str,
        deadline: Deadline,
        attempt: &impl Fn(Arc<Peer>) -> F,
    ) -> Option<T> {
        // A mirror that does not answer leaves enough time for the next one.
        let after = (deadline.left() / 2).max(LEAST_TIME);
        let begun = Instant::now();
        let error = match tokio::time::timeout(after, attempt(Arc::clone(mirror))).await {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(error)) => error,
            Err(_) => RegistryError::Timeout {
                what: call.what.clone(),
                after,
            },
        };
        mirror
            .health
            .failed(key, &error, Instant::now(), begun.elapsed());
        let name = mirror.name(call.repository);
        match error.is_not_found() {
            true => tracing::debug!(
                mirror = name,
                what = call.what,
                "the mirror does not have it"
            ),
            false => {
                tracing::warn!(mirror = name, error = %chain(&error), "mirror left for the next server");
            }
        }
        None
    }

    /// See [`super::Registry::blame`].
    pub(super) fn blame(&self, repository: &Repository, digest: &Digest, sources: &[Arc<Source>]) {
        let way = self.ways.last(repository);
        let key = format!("{}/blobs/{digest}", repository.path());
        let now = Instant::now();
        let of_mirrors = sources.iter().any(|source| source.is_mirror);
        for mirror in way.mirrors.iter().filter(|_| of_mirrors) {
            let name = mirror.name(repository);
            let its_own = sources.iter().any(|source| source.server == name);
            mirror.health.distrusted(&key, its_own, now);
        }
        for peer in way.mirrors.iter().chain([&way.server]) {
            peer.kept.drop_of(&(repository.clone(), *digest));
        }
    }

    /// The server that is likely to send a blob, as far as is known without asking.
    pub(super) fn likely(&self, repository: &Repository, path: &str) -> Arc<Peer> {
        let way = self.ways.last(repository);
        let key = format!("{}/{path}", repository.path());
        let ready = way.mirrors.iter().find(|mirror| {
            mirror.is_good_for(Need::Pull)
                && mirror.health.advice(&key, Instant::now()) == Advice::Ask
        });
        Arc::clone(ready.unwrap_or(&way.server))
    }
}
