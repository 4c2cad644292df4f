//! Whether a registry takes a login: what `docker login` asks before it keeps one.

use reqwest::{Method, Url};

use super::auth::{basic, header_value};
use super::challenge::Challenge;
use super::client::Client;
use super::credentials::Credentials;
use super::error::bounded;
use super::retry::Tries;
use super::token::{self, TokenServer, Wants};
use super::transport::{Ask, Transport};
use super::{RegistryError, Repository};
use crate::base::{Deadline, Secret};

/// Tries for a registry that cannot be reached: somebody waits at a terminal.
const TRIES: u32 = 3;

/// What a registry says to a login that it does not refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// The login is right.
    Proved,
    /// It asks nobody who they are, and has not looked at it.
    Unasked,
}

impl Client {
    /// See [`super::Registry::check_login`].
    pub(super) async fn check_login(
        &self,
        host: &str,
        username: &str,
        password: &Secret,
        deadline: Deadline,
    ) -> Result<Accepted, RegistryError> {
        let credentials = Credentials::login(username.to_owned(), password.clone());
        self.retry(host, Tries::AtMost(TRIES), deadline, || {
            self.check_once(host, &credentials)
        })
        .await
    }

    async fn check_once(
        &self,
        host: &str,
        credentials: &Credentials,
    ) -> Result<Accepted, RegistryError> {
        let protocol = |reason: String| RegistryError::Protocol {
            what: host.to_owned(),
            reason,
        };
        // A registry's address follows from its name as for any repository of it.
        let registry = Repository::new(host, "any").map_err(|error| protocol(error.to_string()))?;
        let way = self.ways.to(&registry).await?;
        let peer = &way.server;
        let root = peer.root(&registry).await?;
        let url = root.clone();
        let denied = |status: u16, reason: String| RegistryError::Denied {
            what: host.to_owned(),
            status,
            reason,
        };
        let Some(challenge) = peer.ping(&root, host).await? else {
            let answer = peer
                .transport
                .send(&Ask::new(Method::GET, url), host)
                .await?;
            return match answer.response.status().as_u16() {
                200..=299 => Ok(Accepted::Unasked),
                404 => Err(protocol("there is no registry at this address".to_owned())),
                _ => Err(peer.transport.refusal(answer, host, host).await),
            };
        };
        let header = match (&challenge, credentials) {
            (Challenge::Basic, Credentials::Basic { username, password }) => {
                basic(username, password.expose())
            }
            (Challenge::Basic, _) => {
                let reason = "it wants a user name and a password, not a token";
                return Err(denied(401, reason.to_owned()));
            }
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scopes,
                },
                credentials,
            ) => {
                let wants = Wants {
                    root: &root,
                    host,
                    what: host,
                };
                let server = TokenServer {
                    realm,
                    service: service.as_deref(),
                    scopes,
                };
                let token =
                    token::fetch(&peer.transport, wants, server, Some(credentials.clone())).await;
                let token = token.map_err(|error| match error {
                    RegistryError::Denied { status, .. } => denied(status, wrong(credentials)),
                    other => other,
                })?;
                format!("Bearer {}", token.token.expose())
            }
        };
        let authorization = header_value(&header)
            .ok_or_else(|| protocol("this login cannot be in a header".to_owned()))?;
        prove(&peer.transport, host, url, authorization, credentials).await
    }
}

async fn prove(
    transport: &Transport,
    host: &str,
    url: Url,
    authorization: reqwest::header::HeaderValue,
    credentials: &Credentials,
) -> Result<Accepted, RegistryError> {
    let ask = Ask {
        authorization: Some(authorization),
        ..Ask::new(Method::GET, url)
    };
    let answer = transport.send(&ask, host).await?;
    match answer.response.status().as_u16() {
        200..=299 => Ok(Accepted::Proved),
        status @ (401 | 403) => Err(RegistryError::Denied {
            what: host.to_owned(),
            status,
            reason: wrong(credentials),
        }),
        _ => Err(transport.refusal(answer, host, host).await),
    }
}

fn wrong(credentials: &Credentials) -> String {
    match credentials {
        Credentials::Basic { username, .. } => format!(
            "this is not the password of `{}`; where a second factor is on, an access token takes its place",
            bounded(username, 60)
        ),
        _ => "this token is not accepted".to_owned(),
    }
}
