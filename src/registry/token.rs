//! Token servers: the request for a token and its answer (distribution, "Token Authentication Specification").

use std::time::Duration;

use reqwest::{Method, Url};

use super::RegistryError;
use super::address::{address_of, shown};
use super::auth::{Place, basic, header_value};
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

/// The request for a token: GET with Basic credentials or none, POST with a refresh token (OAuth 2.0, RFC 6749 section 6).
fn request(
    transport: &Transport,
    place: Place<'_>,
    server: TokenServer<'_>,
    credentials: Option<Credentials>,
) -> Result<Ask, RegistryError> {
    let TokenServer {
        realm,
        service,
        scopes,
    } = server;
    let refuse = |reason: String| RegistryError::Protocol {
        what: place.repository.to_string(),
        reason: format!("the registry's token server is not usable: {reason}"),
    };
    let mut url = Url::parse(realm).map_err(|error| refuse(error.to_string()))?;
    transport.plain().allow(place.root, &url).map_err(refuse)?;
    url.set_fragment(None);
    if let Some(Credentials::Identity(refresh)) = credentials {
        let mut form =
            Url::parse("http://form.invalid/").map_err(|error| refuse(error.to_string()))?;
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("client_id", "ocifs")
            .append_pair("service", service.unwrap_or_default())
            .append_pair("scope", &scopes.join(" "))
            .append_pair("refresh_token", refresh.expose());
        let form = form.query().map(Secret::new);
        return Ok(Ask {
            form,
            ..Ask::new(Method::POST, url)
        });
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
            header_value(&basic(&username, password.expose()))
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
}

/// Fetches a token; gives it and its lifetime.
pub(super) async fn fetch(
    transport: &Transport,
    place: Place<'_>,
    server: TokenServer<'_>,
    credentials: Option<Credentials>,
) -> Result<(Secret, Duration), RegistryError> {
    let ask = request(transport, place, server, credentials)?;
    let repository = place.repository;
    let what = format!("token for {repository} from {}", shown(&ask.url));
    tracing::debug!(%repository, realm = %shown(&ask.url), anonymous = ask.authorization.is_none() && ask.form.is_none(), "asking for a token");
    let mut answer = transport.send(&ask, &what).await?;
    let status = answer.response.status();
    if !status.is_success() {
        let realm_host = address_of(&ask.url);
        let refused = transport.refusal(answer, &what, repository.host()).await;
        // Some token servers answer 404 to a wrong login; what helps is the same as with 401.
        return Err(match refused {
            RegistryError::NotFound { what } => RegistryError::Denied {
                what,
                status: 404,
                reason: denial(&format!("{realm_host} gives no token"), repository.host()),
            },
            other => other,
        });
    }
    let body = transport
        .read(&mut answer.response, LONGEST_ANSWER, &what)
        .await?;
    // serde_json's message is left out: it may quote the token.
    let bad = |reason: &str| RegistryError::Protocol {
        what: what.clone(),
        reason: reason.to_owned(),
    };
    let parsed: TokenAnswer = serde_json::from_slice(&body)
        .map_err(|_| bad("the answer is not the JSON of a token server"))?;
    let token = [parsed.token, parsed.access_token]
        .into_iter()
        .flatten()
        .find(|token| !token.is_empty())
        .ok_or_else(|| bad("the answer has no token"))?;
    Ok((Secret::new(token), lifetime(parsed.expires_in)))
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
