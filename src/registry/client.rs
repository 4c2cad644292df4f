//! A request to a registry: authorised, retried, under one deadline.

use std::future::Future;

use reqwest::header::{HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, Url};

use super::auth::{self, Action, Auth, GrantForm, Known, Place};
use super::challenge::{self, Challenge};
use super::error::{bounded, chain};
use super::range::KeptUrls;
use super::retry::{self, Decision};
use super::transport::{Answer, Ask, Transport, drain};
use super::{RegistryConfig, RegistryError, Repository};
use crate::base::Deadline;

/// What all clones of a [`super::Registry`] share.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) transport: Transport,
    pub(super) auth: Auth,
    pub(super) kept: KeptUrls,
    pub(super) config: RegistryConfig,
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
    /// See [`Ask::bulk`].
    pub(super) bulk: bool,
    /// What is asked for, for errors.
    pub(super) what: String,
}

impl Client {
    pub(super) fn new(config: RegistryConfig) -> Result<Self, RegistryError> {
        Ok(Self {
            transport: Transport::new(&config)?,
            auth: Auth::new(config.auth_files.clone().unwrap_or_default()),
            kept: KeptUrls::default(),
            config,
        })
    }

    /// Runs `attempt` until it succeeds, fails for good or for the `most`th time, or the deadline comes.
    pub(super) async fn retry<T, F: Future<Output = Result<T, RegistryError>>>(
        &self,
        what: &str,
        most: u32,
        deadline: Deadline,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, RegistryError> {
        let mut last = None;
        let out_of_time = |last: Option<RegistryError>| RegistryError::Deadline {
            what: what.to_owned(),
            last: last.map(Box::new),
        };
        for number in 1u32.. {
            let error = match tokio::time::timeout_at(deadline.instant().into(), attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error,
                Err(_) => return Err(out_of_time(last)),
            };
            if number >= most {
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

    /// One try of a call, with a new token if the registry wants one. Statuses other than 401 are the caller's.
    pub(super) async fn call_once(&self, call: &Call<'_>) -> Result<Answer, RegistryError> {
        let root = self.transport.root(call.repository.address()).await?;
        let url = root
            .join(&format!("/v2/{}/{}", call.repository.path(), call.path))
            .map_err(|error| RegistryError::Protocol {
                what: call.what.clone(),
                reason: error.to_string(),
            })?;
        self.ask(call, &root, url).await
    }

    /// Like [`Self::call_once`], for an address of the registry that it told us itself.
    pub(super) async fn ask(
        &self,
        call: &Call<'_>,
        root: &Url,
        url: Url,
    ) -> Result<Answer, RegistryError> {
        let place = Place {
            root,
            repository: call.repository,
            action: call.action,
        };
        let known = self.auth.known(&self.transport, place).await?;
        let answer = self.send(call, url.clone(), &known).await?;
        if answer.response.status() == 403 && !answer.foreign {
            // A password that has expired, perhaps, and was written anew.
            return match self.auth.reread(&self.transport, place, &known).await? {
                Some(known) => self.send(call, url, &known).await,
                None => self.granted(call, answer, &known).await,
            };
        }
        if answer.response.status() != 401 || answer.foreign {
            return Ok(answer);
        }
        let Some(challenge) = self.challenge(&answer, root, &call.what).await? else {
            return Ok(answer);
        };
        drain(answer.response).await;
        let known = self
            .auth
            .renew(&self.transport, place, challenge, &known)
            .await?;
        let answer = self.send(call, url, &known).await?;
        let answer = self.granted(call, answer, &known).await?;
        // That a login is wrong is the one thing that a second 401 tells for certain; a token may lack a right.
        if answer.response.status() == 401
            && !answer.foreign
            && let Some(GrantForm::Basic(user, _)) = known.grant.as_ref().map(|grant| &grant.form)
        {
            let (host, user) = (call.repository.host(), bounded(user, 60));
            return Err(RegistryError::Denied {
                what: call.what.clone(),
                status: 401,
                reason: format!(
                    "{host} does not accept the password that the credential file has for `{user}`; log in again with \
                     `docker login {host}` or `podman login {host}`"
                ),
            });
        }
        Ok(answer)
    }

    /// A refusal for want of credentials says why there were none.
    async fn granted(
        &self,
        call: &Call<'_>,
        answer: Answer,
        known: &Known,
    ) -> Result<Answer, RegistryError> {
        let trouble = known
            .grant
            .as_ref()
            .and_then(|grant| grant.trouble.as_deref());
        if trouble.is_none() || !matches!(answer.response.status().as_u16(), 401 | 403) {
            return Ok(answer);
        }
        Err(auth::explained(self.refusal(answer, call).await, trouble))
    }

    async fn send(
        &self,
        call: &Call<'_>,
        url: Url,
        known: &Known,
    ) -> Result<Answer, RegistryError> {
        let ask = Ask {
            method: call.method.clone(),
            url,
            accept: call.accept,
            range: call.range.clone(),
            authorization: known.grant.as_ref().map(|grant| grant.header.clone()),
            form: None,
            bulk: call.bulk,
        };
        self.transport.send(&ask, &call.what).await
    }

    /// The challenge of a 401; registries that send none with it are asked at `/v2/`, where they have to.
    async fn challenge(
        &self,
        refused: &Answer,
        root: &Url,
        what: &str,
    ) -> Result<Option<Challenge>, RegistryError> {
        if let Some(challenge) = chosen(refused) {
            return Ok(Some(challenge));
        }
        self.ping(root, what).await
    }

    /// The challenge that `/v2/` answers, if it answers one.
    pub(super) async fn ping(
        &self,
        root: &Url,
        what: &str,
    ) -> Result<Option<Challenge>, RegistryError> {
        let url = root.join("/v2/").map_err(|error| RegistryError::Protocol {
            what: what.to_owned(),
            reason: error.to_string(),
        })?;
        let answer = self
            .transport
            .send(&Ask::new(Method::GET, url), what)
            .await?;
        Ok(if answer.response.status() == 401 && !answer.foreign {
            chosen(&answer)
        } else {
            None
        })
    }

    /// The error of an answer that is no success.
    pub(super) async fn refusal(&self, answer: Answer, call: &Call<'_>) -> RegistryError {
        self.transport
            .refusal(answer, &call.what, call.repository.host())
            .await
    }
}

fn chosen(answer: &Answer) -> Option<Challenge> {
    let headers = answer.response.headers().get_all(WWW_AUTHENTICATE);
    challenge::choose(headers.iter().filter_map(|value| value.to_str().ok()))
}
