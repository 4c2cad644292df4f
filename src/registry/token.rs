//! Token servers: the request for a token and its answer (distribution, "Token Authentication Specification").

use std::time::Duration;

use reqwest::{Method, Url};

use super::RegistryError;
use super::address::{address_of, shown};
use super::auth::{basic, header_value};
use super::credentials::Credentials;
use super::error::denial;
use super::transport::{Ask, Transport};
use crate::base::Secret;

/// Longest answer of a token server, in bytes.
const LONGEST_ANSWER: usize = 256 << 10;
/// Lifetime of a token when its server does not say.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// What a challenge tells about a token server.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenServer<'a> {
    /// Its address.
    pub(super) realm: &'a str,
    /// The registry's name there.
    pub(super) service: Option<&'a str>,
    /// What the token is for.
    pub(super) scopes: &'a [String],
}

/// Who wants a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wants<'a> {
    /// Scheme and address of the registry.
    pub(super) root: &'a Url,
    /// The registry's name, for whoever is to log in.
    pub(super) host: &'a str,
    /// What the token is for, for errors.
    pub(super) what: &'a str,
}

/// How a token is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grant {
    /// GET with Basic credentials or none (distribution, "Token Authentication Specification").
    Query,
    /// POST of a user name and password, for servers that know no GET (RFC 6749, section 4.3).
    Password,
    /// POST of a refresh token (section 6).
    Refresh,
}

/// The request for a token.
fn request(
    transport: &Transport,
    wants: Wants<'_>,
    server: TokenServer<'_>,
    grant: Grant,
    credentials: Option<&Credentials>,
) -> Result<Ask, RegistryError> {
    let TokenServer {
        realm,
        service,
        scopes,
    } = server;
    let refuse = |reason: String| RegistryError::Protocol {
        what: wants.what.to_owned(),
        reason: format!("the registry's token server is not usable: {reason}"),
    };
    let mut url = Url::parse(realm).map_err(|error| refuse(error.to_string()))?;
    transport.plain().allow(wants.root, &url).map_err(refuse)?;
    url.set_fragment(None);
    let form = |kind: &str, secrets: &[(&str, &str)]| {
        let mut form =
            Url::parse("http://form.invalid/").map_err(|error| refuse(error.to_string()))?;
        form.query_pairs_mut()
            .append_pair("grant_type", kind)
            .append_pair("client_id", "ocifs")
            .append_pair("service", service.unwrap_or_default())
            .append_pair("scope", &scopes.join(" "))
            .extend_pairs(secrets);
        let form = form.query().map(Secret::new);
        Ok(Ask {
            form,
            ..Ask::new(Method::POST, url.clone())
        })
    };
    match (grant, credentials) {
        (Grant::Refresh, Some(Credentials::Identity(refresh))) => {
            return form("refresh_token", &[("refresh_token", refresh.expose())]);
        }
        (Grant::Password, Some(Credentials::Basic { username, password })) => {
            let password = password.expose();
            return form(
                "password",
                &[("username", username), ("password", password)],
            );
        }
        _ => {}
    }
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = service {
            query.append_pair("service", service);
        }
        for scope in scopes {
            query.append_pair("scope", scope);
        }
    }
    let mut ask = Ask::new(Method::GET, url);
    if let Some(Credentials::Basic { username, password }) = credentials {
        ask.authorization = Some(
            header_value(&basic(username, password.expose()))
                .ok_or_else(|| refuse("unusable login".to_owned()))?,
        );
    }
    Ok(ask)
}

/// A token server's answer. `issued_at` is not looked at: its clock is not ours, and the answer is fresh.
#[derive(serde::Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
    refresh_token: Option<String>,
}

/// What a token server gave.
#[derive(Debug)]
pub(super) struct Token {
    /// The bearer token.
    pub(super) token: Secret,
    /// How long it lives from now on.
    pub(super) lifetime: Duration,
    /// The refresh token to use from now on in place of the one that was sent.
    pub(super) refresh: Option<Secret>,
}

/// Fetches a token.
pub(super) async fn fetch(
    transport: &Transport,
    wants: Wants<'_>,
    server: TokenServer<'_>,
    credentials: Option<Credentials>,
) -> Result<Token, RegistryError> {
    let what = format!("token for {}", wants.what);
    let send = async |grant| {
        let ask = request(transport, wants, server, grant, credentials.as_ref())?;
        let host = address_of(&ask.url);
        tracing::debug!(realm = %shown(&ask.url), ?grant, "asking for a token");
        let answer = transport.send(&ask, &what).await?;
        Ok::<_, RegistryError>((answer, host))
    };
    let first = match credentials {
        Some(Credentials::Identity(_)) => Grant::Refresh,
        _ => Grant::Query,
    };
    let (mut answer, realm_host) = send(first).await?;
    // A server that knows the OAuth 2.0 way alone does not answer GET; only what is no route of it gives these statuses.
    if matches!(answer.response.status().as_u16(), 404 | 405 | 501)
        && matches!(credentials, Some(Credentials::Basic { .. }))
    {
        let (other, _) = send(Grant::Password).await?;
        if other.response.status().is_success() {
            answer = other;
        }
    }
    let status = answer.response.status();
    if !status.is_success() {
        let host = wants.host;
        let refused = transport.refusal(answer, &what, host).await;
        // Some token servers answer 404 to a wrong login, and 400 to a refresh token that has expired (RFC 6749, section 5.2).
        return Err(match refused {
            RegistryError::NotFound { what } => RegistryError::Denied {
                what,
                status: 404,
                reason: denial(&format!("{realm_host} gives no token"), host),
            },
            RegistryError::Status {
                what,
                status: 400,
                reason,
                ..
            } if first == Grant::Refresh => RegistryError::Denied {
                what,
                status: 400,
                reason: denial(
                    &format!("the identity token is not accepted: {reason}"),
                    host,
                ),
            },
            other => other,
        });
    }
    let body = transport
        .read(&mut answer.response, LONGEST_ANSWER, &what)
        .await?;
    parse(&body).map_err(|reason| RegistryError::Protocol {
        what,
        reason: reason.to_owned(),
    })
}

/// Reads a token server's answer.
pub(super) fn parse(body: &[u8]) -> Result<Token, &'static str> {
    // serde_json's message is left out: it may quote the token.
    let parsed: TokenAnswer =
        serde_json::from_slice(body).map_err(|_| "the answer is not the JSON of a token server")?;
    let token = [parsed.token, parsed.access_token]
        .into_iter()
        .flatten()
        .find(|token| !token.is_empty())
        .ok_or("the answer has no token")?;
    Ok(Token {
        token: Secret::new(token),
        lifetime: lifetime(parsed.expires_in),
        refresh: parsed
            .refresh_token
            .filter(|refresh| !refresh.is_empty())
            .map(Secret::new),
    })
}

/// The lifetime that `expires_in` gives, at most a day.
fn lifetime(expires_in: Option<f64>) -> Duration {
    match expires_in {
        Some(seconds) if seconds >= 0.0 => Duration::from_secs_f64(seconds.min(86_400.0)),
        Some(_) => Duration::ZERO,
        None => DEFAULT_LIFETIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_bounded_whatever_the_server_says() {
        for (expires_in, seconds) in [
            (Some(300.0), 300.0),
            (None, 60.0),
            (Some(0.5), 0.5),
            (Some(0.0), 0.0),
            (Some(-5.0), 0.0),
            (Some(f64::NAN), 0.0),
            (Some(f64::INFINITY), 86_400.0),
            (Some(1e300), 86_400.0),
        ] {
            assert_eq!(
                lifetime(expires_in),
                Duration::from_secs_f64(seconds),
                "{expires_in:?}"
            );
        }
    }
}
