//! What is listed in the directories above models: a pure function of the references that are known.

use std::collections::BTreeSet;

use super::names::{self, DOCKER_HUB, DOCKER_LIBRARY, NAME_MAX};
use crate::registry::Reference;

/// Names in the root directory: hosts, the colon-free spelling of those with a port, and Docker Hub's short names.
pub(super) fn root(known: &[Reference]) -> BTreeSet<String> {
    let mut listed = BTreeSet::new();
    for reference in known {
        let repository = reference.repository();
        listed.insert(repository.host().to_owned());
        listed.extend(names::host_alias(repository.host()));
        if repository.host() == DOCKER_HUB {
            match repository.path().split_once('/') {
                Some((DOCKER_LIBRARY, name)) if !name.contains('/') => {
                    listed.extend(model_name(reference))
                }
                Some((user, _)) => drop(listed.insert(user.to_owned())),
                None => {}
            }
        }
    }
    listed
}

/// Names in the directory of a host or, with a `path`, of a namespace or repository.
pub(super) fn below(host: &str, path: Option<&str>, known: &[Reference]) -> BTreeSet<String> {
    let mut listed = BTreeSet::new();
    for reference in known {
        let repository = reference.repository();
        if repository.host() != host {
            continue;
        }
        let rest = match path {
            None => repository.path(),
            Some(path) if path == repository.path() => {
                listed.extend(alias(reference));
                continue;
            }
            Some(path) => match repository
                .path()
                .strip_prefix(path)
                .and_then(|rest| rest.strip_prefix('/'))
            {
                Some(rest) => rest,
                None => continue,
            },
        };
        match rest.split_once('/') {
            Some((first, _)) => drop(listed.insert(first.to_owned())),
            None => {
                listed.insert(rest.to_owned());
                listed.extend(model_name(reference));
            }
        }
    }
    listed
}

/// `model:v1`, or `model@sha256:…`.
fn model_name(reference: &Reference) -> Option<String> {
    let component = names::last_component(reference.repository().path());
    let name = match (reference.digest(), reference.tag()) {
        (_, Some(tag)) => format!("{component}:{tag}"),
        (Some(digest), None) => format!("{component}@{digest}"),
        (None, None) => return None,
    };
    (name.len() <= NAME_MAX).then_some(name)
}

/// `@v1`, or `@sha256-…`.
fn alias(reference: &Reference) -> Option<String> {
    match (reference.digest(), reference.tag()) {
        (_, Some(tag)) => Some(format!("@{tag}")),
        (Some(digest), None) => Some(format!("@sha256-{}", digest.hex())),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<Reference> {
        let pinned = format!("ghcr.io/org/model@{}", crate::base::Digest::of(b"x"));
        [
            "ghcr.io/org/model:v1",
            "ghcr.io/org/deep/er:v2",
            "localhost:5000/m:v1",
            "docker.io/user/chat:q4",
            "gpt2:v1",
            &pinned,
        ]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect()
    }

    fn list(names: BTreeSet<String>) -> Vec<String> {
        names.into_iter().collect()
    }

    #[test]
    fn parents_of_what_is_known_are_listed() {
        let known = known();
        let hex = crate::base::Digest::of(b"x").hex();
        assert_eq!(
            list(root(&known)),
            [
                "docker.io",
                "ghcr.io",
                "gpt2:v1",
                "localhost:5000",
                "localhost_5000_",
                "user"
            ]
        );
        assert_eq!(list(below("ghcr.io", None, &known)), ["org"]);
        let pinned = format!("model@sha256:{hex}");
        assert_eq!(
            list(below("ghcr.io", Some("org"), &known)),
            ["deep", "model", "model:v1", pinned.as_str()]
        );
        assert_eq!(
            list(below("ghcr.io", Some("org/deep"), &known)),
            ["er", "er:v2"]
        );
        assert_eq!(
            list(below("ghcr.io", Some("org/model"), &known)),
            [format!("@sha256-{hex}"), "@v1".into()]
        );
        assert_eq!(list(below("localhost:5000", None, &known)), ["m", "m:v1"]);
        assert_eq!(list(below("docker.io", None, &known)), ["library", "user"]);
        assert!(
            below("ghcr.io", Some("or"), &known).is_empty(),
            "a prefix of a component is not a parent"
        );
        assert!(below("quay.io", None, &known).is_empty());
    }
}
