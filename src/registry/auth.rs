//! Authorisation by challenge: which header a request carries, and when it is renewed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use reqwest::Url;
use reqwest::header::HeaderValue;

use super::challenge::Challenge;
use super::credentials::{Credentials, Found, Sources};
use super::token::{self, Token, TokenServer, Wants};
use super::transport::Transport;
use super::{RegistryError, Repository};
use crate::base::{Digest, Instant, Secret, lock};

/// Most (repository, action) pairs whose authorisation is remembered.
const MOST_ENTRIES: usize = 4096;

/// What is to be done in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Action {
    /// Read.
    Pull,
    /// Read and write.
    Push,
}

/// Where something is to be done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    /// Where the server's repositories are.
    pub(super) root: &'a Url,
    /// The name under which credentials for it are kept.
    pub(super) name: &'a str,
    /// The repository there.
    pub(super) repository: &'a Repository,
    /// What is to be done in it.
    pub(super) action: Action,
}

impl Place<'_> {
    /// The scope that a token needs (distribution, "Token Scope Documentation").
    fn scope(self) -> String {
        let actions = match self.action {
            Action::Pull => "pull",
            Action::Push => "pull,push",
        };
        format!("repository:{}:{actions}", self.repository.path())
    }
}

/// A header that opens the door, and until when.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    /// Value of `Authorization`, marked sensitive.
    pub(super) header: HeaderValue,
    /// Whose password it is, where it is one.
    pub(super) user: Option<String>,
    /// From when on it is renewed before use; `None`: never.
    renew_at: Option<Instant>,
    /// When half its life is over: an upload begins with a younger one.
    half_life: Option<Instant>,
    /// What it was made from; `None`: nothing.
    from: Option<Digest>,
    /// Why it was made from nothing, where there should have been credentials.
    pub(super) trouble: Option<String>,
}

/// What is known before a request is sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// Counts the attempts to be authorised; tells whether somebody else has tried since.
    generation: u64,
    /// The header to send, if one is known.
    pub(super) grant: Option<Grant>,
}

/// All authorisations of this process.
#[derive(Debug)]
pub(super) struct Auth {
    sources: Arc<Sources>,
    /// Refresh tokens that token servers gave in place of others (RFC 6749, section 6), by what they replace.
    rotated: Mutex<HashMap<Digest, Secret>>,
    entries: Mutex<HashMap<(Repository, Action), Arc<Entry>>>,
}

/// One repository and action. Its lock is held while a token is fetched: whoever else wants one waits for it.
type Entry = tokio::sync::Mutex<State>;

#[derive(Debug, Default)]
struct State {
    generation: u64,
    challenge: Option<Challenge>,
    outcome: Option<Result<Grant, RegistryError>>,
}

impl Auth {
    /// Nothing is known yet.
    pub(super) fn new(sources: Arc<Sources>) -> Self {
        Self {
            sources,
            rotated: Mutex::default(),
            entries: Mutex::default(),
        }
    }

    fn entry(&self, place: Place<'_>, create: bool) -> Option<Arc<Entry>> {
        let mut entries = lock(&self.entries);
        let key = (place.repository.clone(), place.action);
        if !create {
            return entries.get(&key).cloned();
        }
        if entries.len() >= MOST_ENTRIES && !entries.contains_key(&key) {
            // Forgetting costs a challenge and a token each, and only a crawler comes here.
            entries.clear();
        }
        Some(entries.entry(key).or_default().clone())
    }

    /// What to send with the next request; a token that ends soon is renewed first.
    pub(super) async fn known(
        &self,
        transport: &Transport,
        place: Place<'_>,
    ) -> Result<Known, RegistryError> {
        let Some(entry) = self.entry(place, false) else {
            return Ok(Known::default());
        };
        let mut state = entry.lock().await;
        let now = Instant::now();
        let stale = |grant: &Grant| match place.action {
            Action::Pull => grant.renew_at.is_some_and(|at| at <= now),
            Action::Push => grant.half_life.is_some_and(|at| at <= now),
        };
        let grant = match (&state.outcome, &state.challenge) {
            (Some(Ok(grant)), Some(challenge)) if stale(grant) => {
                let challenge = challenge.clone();
                Some(
                    self.try_again(&mut state, transport, place, challenge)
                        .await?,
                )
            }
            (Some(Ok(grant)), _) => Some(grant.clone()),
            _ => None,
        };
        Ok(Known {
            generation: state.generation,
            grant,
        })
    }

    /// After a 401: a new grant by the registry's challenge. Of many requests that come here at once, one fetches.
    pub(super) async fn renew(
        &self,
        transport: &Transport,
        place: Place<'_>,
        challenge: Challenge,
        used: &Known,
    ) -> Result<Known, RegistryError> {
        let entry = self.entry(place, true).unwrap_or_default();
        let mut state = entry.lock().await;
        if state.generation != used.generation
            && let Some(outcome) = &state.outcome
        {
            return outcome.clone().map(|grant| Known {
                generation: state.generation,
                grant: Some(grant),
            });
        }
        let grant = self
            .try_again(&mut state, transport, place, challenge)
            .await?;
        Ok(Known {
            generation: state.generation,
            grant: Some(grant),
        })
    }

    async fn try_again(
        &self,
        state: &mut State,
        transport: &Transport,
        place: Place<'_>,
        challenge: Challenge,
    ) -> Result<Grant, RegistryError> {
        let outcome = self.fetch(transport, place, &challenge).await;
        state.generation += 1;
        state.challenge = Some(challenge);
        state.outcome = Some(outcome.clone());
        outcome
    }

    /// After a 403: a new grant where other credentials are found than those that were refused. Some registries say 403 to a password
    /// that has expired, and a new one may have been written since.
    pub(super) async fn reread(
        &self,
        transport: &Transport,
        place: Place<'_>,
        used: &Known,
    ) -> Result<Option<Known>, RegistryError> {
        let Some(entry) = self.entry(place, false) else {
            return Ok(None);
        };
        let mut state = entry.lock().await;
        if state.generation == used.generation {
            let Some(challenge) = state.challenge.clone() else {
                return Ok(None);
            };
            let found = self.sources.find(place.name, place.repository.path()).await;
            let from = found.credentials.as_ref().map(Credentials::fingerprint);
            let refused = used.grant.as_ref().and_then(|grant| grant.from);
            if from.is_none() || from == refused {
                return Ok(None);
            }
            self.try_again(&mut state, transport, place, challenge)
                .await?;
        }
        let grant = state.outcome.clone().transpose()?;
        Ok(Some(Known {
            generation: state.generation,
            grant,
        }))
    }

    async fn fetch(
        &self,
        transport: &Transport,
        place: Place<'_>,
        challenge: &Challenge,
    ) -> Result<Grant, RegistryError> {
        let repository = place.repository;
        let host = place.name;
        let Found {
            credentials,
            trouble,
        } = self.sources.find(host, repository.path()).await;
        let from = credentials.as_ref().map(Credentials::fingerprint);
        let grant = match challenge {
            Challenge::Basic => basic_grant(repository, host, credentials, trouble.as_deref())?,
            Challenge::Bearer {
                realm,
                service,
                scopes,
            } => {
                let mut wanted = scopes.clone();
                let own = place.scope();
                // A read's challenge asks for less than a write needs.
                if wanted.is_empty() || place.action == Action::Push && !wanted.contains(&own) {
                    wanted.push(own);
                }
                let server = TokenServer {
                    realm,
                    service: service.as_deref(),
                    scopes: &wanted,
                };
                self.bearer_grant(transport, place, server, credentials)
                    .await
                    .map_err(|error| explained(error, trouble.as_deref()))?
            }
        };
        Ok(Grant {
            from,
            trouble,
            ..grant
        })
    }

    async fn bearer_grant(
        &self,
        transport: &Transport,
        place: Place<'_>,
        server: TokenServer<'_>,
        credentials: Option<Credentials>,
    ) -> Result<Grant, RegistryError> {
        let bearer = |token: Secret, lifetime| {
            let header = format!("Bearer {}", token.expose());
            grant(place.repository, &header, None, lifetime)
        };
        let given = match credentials {
            Some(Credentials::Registry(token)) => return bearer(token, None),
            Some(Credentials::Identity(ref token)) => Some(Digest::of(token.expose().as_bytes())),
            _ => None,
        };
        let rotated = given.and_then(|given| lock(&self.rotated).get(&given).cloned());
        let was_rotated = rotated.is_some();
        let credentials = rotated.map(Credentials::Identity).or(credentials);
        let wants = Wants {
            root: place.root,
            host: place.name,
            what: &place.repository.to_string(),
        };
        let fetched = token::fetch(transport, wants, server, credentials).await;
        if let Some(given) = given {
            match &fetched {
                Ok(Token {
                    refresh: Some(refresh),
                    ..
                }) => {
                    let mut rotated = lock(&self.rotated);
                    if rotated.len() >= MOST_ENTRIES {
                        rotated.clear();
                    }
                    rotated.insert(given, refresh.clone());
                }
                // What the file has is tried again the next time: it may have been written anew.
                Err(RegistryError::Denied { .. }) if was_rotated => {
                    lock(&self.rotated).remove(&given);
                }
                _ => {}
            }
        }
        let Token {
            token, lifetime, ..
        } = fetched?;
        bearer(token, Some(lifetime))
    }
}

/// A denial with the reason why there were no credentials, where there is one.
pub(super) fn explained(error: RegistryError, trouble: Option<&str>) -> RegistryError {
    match (error, trouble) {
        (
            RegistryError::Denied {
                what,
                status,
                reason,
            },
            Some(trouble),
        ) => RegistryError::Denied {
            what,
            status,
            reason: format!("{trouble}; without credentials: {reason}"),
        },
        (error, _) => error,
    }
}

fn basic_grant(
    repository: &Repository,
    host: &str,
    credentials: Option<Credentials>,
    trouble: Option<&str>,
) -> Result<Grant, RegistryError> {
    let reason = match credentials {
        Some(Credentials::Basic { username, password }) => {
            let header = basic(&username, password.expose());
            return grant(repository, &header, Some(username), None);
        }
        Some(_) => format!(
            "{host} wants a user name and password, and the credential file has only a token for it"
        ),
        None => {
            let why = trouble.unwrap_or("no credential file has any for it");
            format!(
                "{host} wants a user name and password, and {why}; log in with `ocifs login {host}`, `docker login {host}` or \
                 `podman login {host}`"
            )
        }
    };
    Err(RegistryError::Denied {
        what: repository.to_string(),
        status: 401,
        reason,
    })
}

/// `Basic …` (RFC 7617).
pub(super) fn basic(username: &str, password: &str) -> String {
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"))
    )
}

/// A header that no log prints.
pub(super) fn header_value(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn grant(
    repository: &Repository,
    header: &str,
    user: Option<String>,
    lifetime: Option<Duration>,
) -> Result<Grant, RegistryError> {
    let header = header_value(header).ok_or_else(|| RegistryError::Protocol {
        what: repository.to_string(),
        reason: "the token has characters that cannot be in a header".to_owned(),
    })?;
    let now = Instant::now();
    Ok(Grant {
        header,
        user,
        renew_at: lifetime.map(|lifetime| now + usable(lifetime)),
        half_life: lifetime.map(|lifetime| now + lifetime / 2),
        from: None,
        trouble: None,
    })
}

/// How long a token is used: up to 10 s less than its lifetime, at most a fifth of it.
fn usable(lifetime: Duration) -> Duration {
    lifetime - (lifetime / 5).min(Duration::from_secs(10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_renewed_a_little_early() {
        for (lifetime, used_for) in [
            (300, 290.0),
            (60, 50.0),
            (50, 40.0),
            (10, 8.0),
            (1, 0.8),
            (0, 0.0),
        ] {
            assert_eq!(
                usable(Duration::from_secs(lifetime)),
                Duration::from_secs_f64(used_for),
                "{lifetime}"
            );
        }
    }

    #[test]
    fn a_token_that_would_split_the_header_is_refused() {
        let repository = Repository::new("h.io", "x").unwrap();
        assert!(grant(&repository, "Bearer a\r\nX: y", None, None).is_err());
        let grant = grant(&repository, "Bearer hunter2", None, None).unwrap();
        assert!(!format!("{grant:?}").contains("hunter2"));
    }
}
