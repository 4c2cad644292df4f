//! One server: requests to it, authorised by what it asks for.

use std::sync::Arc;

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use reqwest::{Method, Url};

use super::address::address_of;
use super::auth::{self, Action, Auth, Known, Place};
use super::certs_d::{Capabilities, Endpoint};
use super::challenge::{self, Challenge};
use super::client::{Call, Need};
use super::credentials::Sources;
use super::error::bounded;
use super::mirrors::Health;
use super::range::KeptUrls;
use super::transport::{Answer, Ask, Transport, drain};
use super::{RegistryError, Repository};

/// A server: a mirror, or the registries themselves.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) transport: Arc<Transport>,
    pub(super) auth: Auth,
    pub(super) kept: KeptUrls,
    pub(super) health: Arc<Health>,
    /// What repositories are below; `None`: what the name of each registry says.
    base: Option<Url>,
    is_mirror: bool,
    capabilities: Capabilities,
    /// Sent with each request to it.
    pub(super) headers: HeaderMap,
}

impl Peer {
    /// Every registry of which nothing is said.
    pub(super) fn registry(transport: Arc<Transport>, sources: Arc<Sources>) -> Self {
        Self::endpoint(transport, sources, &Endpoint::default(), false)
    }

    /// A server that a file describes.
    pub(super) fn endpoint(
        transport: Arc<Transport>,
        sources: Arc<Sources>,
        endpoint: &Endpoint,
        is_mirror: bool,
    ) -> Self {
        Self {
            transport,
            auth: Auth::new(sources),
            kept: KeptUrls::default(),
            health: Arc::default(),
            base: endpoint.base.clone(),
            is_mirror,
            capabilities: endpoint.capabilities,
            headers: endpoint.headers.clone(),
        }
    }

    pub(super) fn is_good_for(&self, need: Need) -> bool {
        match need {
            Need::Pull => self.capabilities.pull,
            Need::Resolve => self.capabilities.resolve,
            Need::Push => self.capabilities.push,
        }
    }

    /// Its health, where it is a mirror: a registry itself is asked in any case.
    pub(super) fn watched(&self) -> Option<Arc<Health>> {
        self.is_mirror.then(|| Arc::clone(&self.health))
    }

    /// The name under which credentials for it are kept: a mirror never gets those of the registry that it stands for.
    pub(super) fn name(&self, repository: &Repository) -> String {
        match &self.base {
            Some(base) if address_of(base) != repository.address() => address_of(base),
            _ => repository.host().to_owned(),
        }
    }

    /// `host[:port]` of it.
    pub(super) fn address(&self, repository: &Repository) -> String {
        match &self.base {
            Some(base) => address_of(base),
            None => repository.address().to_owned(),
        }
    }

    /// Where its repositories are: `https://host/v2/`.
    pub(super) async fn root(&self, repository: &Repository) -> Result<Url, RegistryError> {
        if let Some(base) = &self.base {
            return Ok(base.clone());
        }
        let root = self.transport.root(repository.address()).await?;
        joined(&root, "/v2/", repository.address())
    }

    /// The address of something in a repository. A server that is not the registry itself is told whom it stands for
    /// (distribution-spec, "Registry Proxying").
    pub(super) fn url(&self, root: &Url, call: &Call<'_>) -> Result<Url, RegistryError> {
        let path = format!("{}/{}", call.repository.path(), call.path);
        let mut url = joined(root, &path, &call.what)?;
        if let Some(base) = &self.base
            && ![call.repository.address(), call.repository.host()]
                .contains(&address_of(base).as_str())
        {
            url.query_pairs_mut()
                .append_pair("ns", call.repository.host());
        }
        Ok(url)
    }

    /// One try of a call, with a new token if the registry wants one. Statuses other than 401 are the caller's.
    pub(super) async fn call_once(&self, call: &Call<'_>) -> Result<Answer, RegistryError> {
        let root = self.root(call.repository).await?;
        let url = self.url(&root, call)?;
        self.ask(call, &root, url).await
    }

    /// Like [`Self::call_once`], for an address of the registry that it told us itself.
    pub(super) async fn ask(
        &self,
        call: &Call<'_>,
        root: &Url,
        url: Url,
    ) -> Result<Answer, RegistryError> {
        let name = self.name(call.repository);
        let place = self.place(call, root, &name);
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
        let Some(challenge) = self.challenge(&answer, root, call).await? else {
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
            && let Some(user) = known.grant.as_ref().and_then(|grant| grant.user.as_deref())
        {
            let (host, user) = (&name, bounded(user, 60));
            return Err(RegistryError::Denied {
                what: call.what.clone(),
                status: 401,
                reason: format!(
                    "{host} does not accept the password that is kept for `{user}`; log in again with \
                     `ocifs login {host}`, `docker login {host}` or `podman login {host}`"
                ),
            });
        }
        Ok(answer)
    }

    /// Where a call's rights are needed; `name` is the server's.
    pub(super) fn place<'a>(&self, call: &Call<'a>, root: &'a Url, name: &'a str) -> Place<'a> {
        Place {
            root,
            name,
            repository: call.repository,
            action: call.action,
        }
    }

    /// After a 401 to what was sent with all that is known: another grant is fetched.
    pub(super) async fn renew(&self, call: &Call<'_>, answer: Answer) -> Result<(), RegistryError> {
        let root = self.root(call.repository).await?;
        let name = self.name(call.repository);
        let place = self.place(call, &root, &name);
        let known = self.auth.known(&self.transport, place).await?;
        let challenge = self.challenge(&answer, &root, call).await?;
        drain(answer.response).await;
        match challenge {
            Some(challenge) => self
                .auth
                .renew(&self.transport, place, challenge, &known)
                .await
                .map(|_| ()),
            None => Ok(()),
        }
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
            fresh: call.fresh,
            headers: self.headers.clone(),
        };
        self.transport.send(&ask, &call.what).await
    }

    /// The challenge of a 401; registries that send none with it are asked at `/v2/`, where they have to. Where that is open and only
    /// writing wants a login, a password is what is left to try.
    async fn challenge(
        &self,
        refused: &Answer,
        root: &Url,
        call: &Call<'_>,
    ) -> Result<Option<Challenge>, RegistryError> {
        if let Some(challenge) = chosen(refused) {
            return Ok(Some(challenge));
        }
        let told = self.ping(root, &call.what).await?;
        Ok(told.or((call.action == Action::Push).then_some(Challenge::Basic)))
    }

    /// The challenge that the root (`/v2/`) answers, if it answers one.
    pub(super) async fn ping(
        &self,
        root: &Url,
        what: &str,
    ) -> Result<Option<Challenge>, RegistryError> {
        let ask = Ask {
            headers: self.headers.clone(),
            ..Ask::new(Method::GET, root.clone())
        };
        let answer = self.transport.send(&ask, what).await?;
        Ok(if answer.response.status() == 401 && !answer.foreign {
            chosen(&answer)
        } else {
            None
        })
    }

    /// The error of an answer that is no success.
    pub(super) async fn refusal(&self, answer: Answer, call: &Call<'_>) -> RegistryError {
        self.transport
            .refusal(answer, &call.what, &self.name(call.repository))
            .await
    }
}

fn joined(root: &Url, path: &str, what: &str) -> Result<Url, RegistryError> {
    root.join(path).map_err(|error| RegistryError::Protocol {
        what: what.to_owned(),
        reason: error.to_string(),
    })
}

fn chosen(answer: &Answer) -> Option<Challenge> {
    let headers = answer.response.headers().get_all(WWW_AUTHENTICATE);
    challenge::choose(headers.iter().filter_map(|value| value.to_str().ok()))
}
