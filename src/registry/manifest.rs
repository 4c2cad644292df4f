//! What a reference points at, and manifests checked against their digest.

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;

use super::auth::Action;
use super::client::{Call, Client, Need};
use super::error::bounded;
use super::peer::Peer;
use super::retry::Tries;
use super::transport::Answer;
use super::{Reference, RegistryError, Repository, Tag};
use crate::base::{Deadline, Digest};

/// Longest manifest, in bytes. The distribution-spec asks registries to take at least 4 MiB.
const LONGEST_MANIFEST: usize = 16 << 20;
/// Some registries say 404 to whoever does not name the media type that they have.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                      application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// What a tag points at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The manifest's digest.
    pub digest: Digest,
    /// The manifest itself, when the registry could only be asked by GET.
    pub manifest: Option<Manifest>,
}

impl Resolved {
    /// With nothing known but the digest.
    fn bare(digest: Digest) -> Self {
        Self {
            digest,
            manifest: None,
        }
    }
}

/// A manifest, checked against its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The digest of `bytes`.
    pub digest: Digest,
    /// Content-Type as answered (without parameters), else the `mediaType` inside, else empty.
    pub media_type: String,
    /// As sent, byte for byte.
    pub bytes: Bytes,
}

/// What a HEAD told.
enum Told {
    Digest(Digest),
    /// The registry does not answer HEAD usefully: ask by GET.
    Nothing,
}

/// A question about what a tag (or `latest`) points at.
fn by_tag(reference: &Reference, method: Method) -> Call<'_> {
    let tag = reference.tag().cloned().unwrap_or_else(Tag::latest);
    Call {
        method,
        repository: reference.repository(),
        action: Action::Pull,
        path: format!("manifests/{tag}"),
        accept: Some(ACCEPT),
        range: None,
        bulk: false,
        fresh: false,
        what: reference.to_string(),
    }
}

impl Client {
    /// See [`super::Registry::resolve`].
    pub(super) async fn resolve(
        &self,
        reference: &Reference,
        deadline: Deadline,
    ) -> Result<Resolved, RegistryError> {
        if let Some(&digest) = reference.digest() {
            return Ok(Resolved::bare(digest));
        }
        let call = &by_tag(reference, Method::HEAD);
        let told = self.retry(&call.what, Tries::Lookup, deadline, || {
            self.via(call, Need::Resolve, deadline, |peer| async move {
                peer.head_once(call).await
            })
        });
        match told.await? {
            Told::Digest(digest) => Ok(Resolved::bare(digest)),
            Told::Nothing => self.resolve_with_manifest(reference, deadline).await,
        }
    }

    /// See [`super::Registry::resolve_with_manifest`].
    pub(super) async fn resolve_with_manifest(
        &self,
        reference: &Reference,
        deadline: Deadline,
    ) -> Result<Resolved, RegistryError> {
        if let Some(&digest) = reference.digest() {
            return Ok(Resolved::bare(digest));
        }
        let call = &by_tag(reference, Method::GET);
        let manifest = self.retry(&call.what, Tries::Lookup, deadline, || {
            self.via(call, Need::Resolve, deadline, |peer| async move {
                peer.manifest_once(call, None).await
            })
        });
        let manifest = manifest.await?;
        Ok(Resolved {
            digest: manifest.digest,
            manifest: Some(manifest),
        })
    }

    /// See [`super::Registry::manifest`].
    pub(super) async fn manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        deadline: Deadline,
    ) -> Result<Manifest, RegistryError> {
        let call = Call {
            method: Method::GET,
            repository,
            action: Action::Pull,
            path: format!("manifests/{digest}"),
            accept: Some(ACCEPT),
            range: None,
            bulk: false,
            fresh: false,
            what: format!("manifest {repository}@{digest}"),
        };
        let call = &call;
        self.retry(&call.what, Tries::Lookup, deadline, || {
            self.via(call, Need::Pull, deadline, |peer| async move {
                peer.manifest_once(call, Some(*digest)).await
            })
        })
        .await
    }
}

impl Peer {
    async fn head_once(&self, call: &Call<'_>) -> Result<Told, RegistryError> {
        let answer = self.call_once(call).await?;
        let status = answer.response.status().as_u16();
        if answer.response.status().is_success() {
            return Ok(told_digest(&answer).map_or(Told::Nothing, Told::Digest));
        }
        let by_registry = answer
            .response
            .headers()
            .contains_key("docker-distribution-api-version")
            || answer
                .response
                .headers()
                .get(CONTENT_TYPE)
                .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        match status {
            401 | 429 | 408 | 425 | 500 | 502 | 503 | 504 => Err(self.refusal(answer, call).await),
            // Registries name themselves in their 404; another one may come from something that knows no HEAD.
            404 if by_registry => Err(self.refusal(answer, call).await),
            _ => Ok(Told::Nothing),
        }
    }

    async fn manifest_once(
        &self,
        call: &Call<'_>,
        asked: Option<Digest>,
    ) -> Result<Manifest, RegistryError> {
        let mut answer = self.call_once(call).await?;
        if answer.response.status() != 200 {
            return Err(if answer.response.status().is_success() {
                RegistryError::Protocol {
                    what: call.what.clone(),
                    reason: format!("unexpected status {}", answer.response.status()),
                }
            } else {
                self.refusal(answer, call).await
            });
        }
        let expected = asked.or_else(|| told_digest(&answer));
        let content_type = answer
            .response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let bytes = self
            .transport
            .read(&mut answer.response, LONGEST_MANIFEST, &call.what)
            .await?;
        check(&call.what, expected, &content_type, bytes)
    }
}

/// `Docker-Content-Digest`; one of an algorithm that ocifs cannot check counts as none.
fn told_digest(answer: &Answer) -> Option<Digest> {
    answer
        .response
        .headers()
        .get("docker-content-digest")?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// A manifest from an answer's parts, if it is JSON and has the digest that was asked for or told.
fn check(
    what: &str,
    expected: Option<Digest>,
    content_type: &str,
    bytes: Bytes,
) -> Result<Manifest, RegistryError> {
    #[derive(serde::Deserialize)]
    struct Typed {
        #[serde(default, rename = "mediaType")]
        media_type: Option<String>,
    }
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    // An array would pass as a sequence of fields: a manifest is an object.
    let object = bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
    let typed = serde_json::from_slice::<Typed>(&bytes).ok().filter(|_| object).ok_or_else(|| RegistryError::Protocol {
        what: what.to_owned(),
        reason: format!(
            "the answer is no JSON manifest but {} (the page of a proxy or of something that is no registry?)",
            if kind.is_empty() { "of no known type".to_owned() } else { bounded(kind, 80) }
        ),
    })?;
    let digest = Digest::of(&bytes);
    if let Some(expected) = expected
        && expected != digest
    {
        return Err(RegistryError::WrongDigest {
            what: what.to_owned(),
            expected,
            actual: digest,
        });
    }
    let media_type = if kind.is_empty() {
        typed.media_type.unwrap_or_default()
    } else {
        kind.to_owned()
    };
    Ok(Manifest {
        digest,
        media_type: bounded(&media_type, 255),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_are_checked_before_anybody_sees_them() {
        let good = br#"{"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;
        let digest = Digest::of(good);
        let checked = |expected, kind: &str, body: &'static [u8]| {
            check("m", expected, kind, Bytes::from_static(body))
        };
        let manifest = checked(Some(digest), "application/x; charset=utf-8", good).unwrap();
        assert_eq!(
            (manifest.digest, manifest.media_type.as_str()),
            (digest, "application/x")
        );
        assert_eq!(
            checked(None, "", good).unwrap().media_type,
            "application/vnd.oci.image.manifest.v1+json"
        );
        assert_eq!(checked(None, "", b" {} ").unwrap().media_type, "");
        assert!(matches!(
            checked(Some(Digest::of(b"other")), "", good),
            Err(RegistryError::WrongDigest { actual, .. }) if actual == digest
        ));
        for body in [
            &b"<!DOCTYPE html><html></html>"[..],
            b"",
            b"[]",
            b"[null]",
            b"\"x\"",
            b"{",
            b"{}{}",
            br#"{"mediaType":7}"#,
        ] {
            let error = checked(None, "text/html", body).expect_err("no manifest");
            assert!(error.to_string().contains("text/html"), "{error}");
            assert!(!error.is_transient());
        }
    }
}
