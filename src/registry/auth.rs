//! Authorisation by challenge: which header a request carries, and when it is renewed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use reqwest::Url;
use reqwest::header::HeaderValue;

use super::challenge::Challenge;
use super::credentials::{self, Credentials};
use super::token::{self, TokenServer};
use super::transport::Transport;
use super::{RegistryError, Repository};
use crate::base::lock;

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
    /// Scheme and address of the registry.
    pub(super) root: &'a Url,
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
    /// The same in parts, for uploads.
    pub(super) form: GrantForm,
    /// From when on it is renewed before use; `None`: never.
    renew_at: Option<Instant>,
    /// When half its life is over: an upload begins with a younger one.
    half_life: Option<Instant>,
}

/// What a grant consists of.
#[derive(Clone, Debug)]
pub(super) enum GrantForm {
    /// User name and password.
    Basic(String, crate::base::Secret),
    /// A bearer token.
    Bearer(crate::base::Secret),
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
    files: Vec<PathBuf>,
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
    /// Credentials come from these files, in this order.
    pub(super) fn new(files: Vec<PathBuf>) -> Self {
        Self {
            files,
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

    async fn fetch(
        &self,
        transport: &Transport,
        place: Place<'_>,
        challenge: &Challenge,
    ) -> Result<Grant, RegistryError> {
        let repository = place.repository;
        let host = repository.host();
        let found = credentials::find(&self.files, host, repository.path()).await;
        match (challenge, found) {
            (Challenge::Basic, Some(Credentials::Basic { username, password })) => {
                let header = basic(&username, password.expose());
                grant(
                    repository,
                    &header,
                    GrantForm::Basic(username, password),
                    None,
                )
            }
            (Challenge::Basic, found) => Err(RegistryError::Denied {
                what: repository.to_string(),
                status: 401,
                reason: match found {
                    None => format!(
                        "{host} wants a user name and password, and no credential file has any for it; log in with `docker login {host}` or `podman login {host}`"
                    ),
                    Some(_) => format!(
                        "{host} wants a user name and password, and the credential file has only a token for it"
                    ),
                },
            }),
            (Challenge::Bearer { .. }, Some(Credentials::Registry(token))) => grant(
                repository,
                &format!("Bearer {}", token.expose()),
                GrantForm::Bearer(token),
                None,
            ),
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scopes,
                },
                found,
            ) => {
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
                let (token, lifetime) = token::fetch(transport, place, server, found).await?;
                grant(
                    repository,
                    &format!("Bearer {}", token.expose()),
                    GrantForm::Bearer(token),
                    Some(lifetime),
                )
            }
        }
    }
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
    form: GrantForm,
    lifetime: Option<Duration>,
) -> Result<Grant, RegistryError> {
    let header = header_value(header).ok_or_else(|| RegistryError::Protocol {
        what: repository.to_string(),
        reason: "the token has characters that cannot be in a header".to_owned(),
    })?;
    let now = Instant::now();
    Ok(Grant {
        header,
        form,
        renew_at: lifetime.map(|lifetime| now + usable(lifetime)),
        half_life: lifetime.map(|lifetime| now + lifetime / 2),
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
        let form = || GrantForm::Bearer(crate::base::Secret::new("x"));
        assert!(grant(&repository, "Bearer a\r\nX: y", form(), None).is_err());
        let grant = grant(&repository, "Bearer hunter2", form(), None).unwrap();
        assert!(!format!("{grant:?}").contains("hunter2"));
    }
}
