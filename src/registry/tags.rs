//! A repository's tags, page by page.

use reqwest::Method;
use reqwest::header::LINK;

use super::address::same_origin;
use super::auth::Action;
use super::client::{Call, Client};
use super::peer::Peer;
use super::retry::Tries;
use super::{RegistryError, Repository, Tag};
use crate::base::Deadline;

/// Longest page, in bytes.
const LONGEST_PAGE: usize = 4 << 20;
/// Most pages.
const MOST_PAGES: usize = 100;
/// Tags asked for at once; larger numbers are refused by some registries.
const PAGE: usize = 1000;

impl Client {
    /// See [`super::Registry::tags`].
    pub(super) async fn tags(
        &self,
        repository: &Repository,
        limit: usize,
        deadline: Deadline,
    ) -> Result<Vec<Tag>, RegistryError> {
        let mut call = Call {
            method: Method::GET,
            repository,
            action: Action::Pull,
            path: format!("tags/list?n={}", limit.clamp(1, PAGE)),
            accept: None,
            range: None,
            bulk: false,
            fresh: false,
            what: format!("tags of {repository}"),
        };
        // Mirrors list what they have, which is less.
        let server = &self.ways.to(repository).await?.server;
        let mut tags = Vec::new();
        for _ in 0..MOST_PAGES {
            let (page, next) = self
                .retry(&call.what, Tries::Lookup, deadline, || {
                    server.tags_once(&call)
                })
                .await?;
            tags.extend(page);
            tags.truncate(limit);
            match next {
                Some(path) if tags.len() < limit => call.path = path,
                _ => break,
            }
        }
        Ok(tags)
    }
}

impl Peer {
    async fn tags_once(
        &self,
        call: &Call<'_>,
    ) -> Result<(Vec<Tag>, Option<String>), RegistryError> {
        let mut answer = self.call_once(call).await?;
        if answer.response.status() != 200 {
            return Err(self.refusal(answer, call).await);
        }
        let root = self.root(call.repository).await?;
        let base = format!("{}{}/", root.path(), call.repository.path());
        let link = answer
            .response
            .headers()
            .get(LINK)
            .and_then(|value| value.to_str().ok())
            .and_then(next_page);
        // The next page is on the same registry, below the same repository; anything else is not followed.
        let next = link
            .and_then(|target| answer.url.join(target).ok())
            .filter(|url| same_origin(&root, url) && url.path() == format!("{base}tags/list"))
            .map(|url| format!("tags/list?{}", url.query().unwrap_or_default()))
            .filter(|path| *path != call.path);
        let body = self
            .transport
            .read(&mut answer.response, LONGEST_PAGE, &call.what)
            .await?;
        let tags = page(&body).map_err(|line| RegistryError::Protocol {
            what: call.what.clone(),
            reason: format!("the answer is no JSON list of tags (line {line})"),
        })?;
        Ok((tags, next))
    }
}

/// The tags on a page, without what cannot be one; else the line where it is no such page.
pub(super) fn page(body: &[u8]) -> Result<Vec<Tag>, usize> {
    #[derive(serde::Deserialize)]
    struct Page {
        #[serde(default)]
        tags: Option<Vec<String>>,
    }
    let page: Page = serde_json::from_slice(body).map_err(|error| error.line())?;
    let tags = page.tags.unwrap_or_default();
    Ok(tags.iter().filter_map(|tag| tag.parse().ok()).collect())
}

/// The target of `<target>; rel="next"` in a Link header (RFC 8288).
pub(super) fn next_page(header: &str) -> Option<&str> {
    let mut rest = header;
    while let Some((_, tail)) = rest.split_once('<') {
        let (target, parameters) = tail.split_once('>')?;
        let end = parameters.find('<').unwrap_or(parameters.len());
        let is_next = parameters[..end]
            .split([';', ','])
            .filter_map(|parameter| parameter.trim().split_once('='))
            .any(|(name, value)| {
                name.trim().eq_ignore_ascii_case("rel")
                    && value
                        .trim()
                        .trim_matches('"')
                        .split(' ')
                        .any(|relation| relation.eq_ignore_ascii_case("next"))
            });
        if is_next {
            return Some(target);
        }
        rest = &parameters[end..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_headers() {
        for (header, target) in [
            (
                r#"</v2/x/tags/list?last=b&n=2>; rel="next""#,
                Some("/v2/x/tags/list?last=b&n=2"),
            ),
            ("<?last=b>;rel=next", Some("?last=b")),
            (
                r#"<a>; rel="prev", <b,c>; title="x"; REL="next last""#,
                Some("b,c"),
            ),
            (r#"<a>; rel="prev""#, None),
            ("<a>", None),
            ("<a", None),
            ("", None),
            ("rel=next", None),
        ] {
            assert_eq!(next_page(header), target, "{header}");
        }
    }
}
