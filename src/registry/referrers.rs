//! What refers to a manifest: the referrers API, and the tag that takes its place in registries without it
//! (distribution-spec, "Listing Referrers" and "Referrers Tag Schema").

use bytes::Bytes;
use reqwest::Method;

use super::auth::Action;
use super::client::{Call, Client};
use super::peer::Peer;
use super::retry::Tries;
use super::{Reference, RegistryError, Repository};
use crate::base::{Deadline, Digest};

/// Longest list, in bytes. Only the first page is read.
const LONGEST: usize = 4 << 20;
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

impl Client {
    /// See [`super::Registry::referrers`].
    pub(super) async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        deadline: Deadline,
    ) -> Result<Option<Bytes>, RegistryError> {
        let call = Call {
            method: Method::GET,
            repository,
            action: Action::Pull,
            path: format!("referrers/{digest}"),
            accept: Some(INDEX),
            range: None,
            bulk: false,
            fresh: false,
            what: format!("referrers of {repository}@{digest}"),
        };
        // Mirrors list what they have, which is less.
        let server = &self.ways.to(repository).await?.server;
        let listed = self
            .retry(&call.what, Tries::Lookup, deadline, || {
                server.referrers_once(&call)
            })
            .await?;
        if listed.is_some() {
            return Ok(listed);
        }
        // A 404 means that the registry does not have the API: with it the answer would be an empty list.
        let tag = format!("sha256-{}", digest.hex());
        let Ok(tag) = tag.parse() else {
            return Ok(None);
        };
        let reference = Reference::tagged(repository.clone(), tag);
        match self.resolve(&reference, deadline).await {
            Ok(resolved) => {
                let manifest = self
                    .manifest(repository, &resolved.digest, deadline)
                    .await?;
                Ok(Some(manifest.bytes))
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Peer {
    async fn referrers_once(&self, call: &Call<'_>) -> Result<Option<Bytes>, RegistryError> {
        let mut answer = self.call_once(call).await?;
        match answer.response.status().as_u16() {
            200 => {}
            // Registries from before the API know no such path, or no such method of it.
            400 | 404 | 405 | 501 => return Ok(None),
            _ => return Err(self.refusal(answer, call).await),
        }
        let is_index = answer
            .response
            .headers()
            .get(reqwest::header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|value| value.split(';').next().map(str::trim) == Some(INDEX));
        if !is_index {
            return Ok(None);
        }
        let body = self
            .transport
            .read(&mut answer.response, LONGEST, &call.what)
            .await?;
        Ok(Some(body))
    }
}
