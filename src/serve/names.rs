//! How the names in a layout's `index.json` map to what clients ask for, as pure functions.
//!
//! An entry's `org.opencontainers.image.ref.name` may be written in three ways:
//!
//! | annotation | is served as |
//! |---|---|
//! | `host/repo:tag` (what ocifs' cache and `skopeo copy … oci:DIR:REF` write) | tag of `repo`, and of `host/repo` |
//! | `repo:tag` | tag of `repo` |
//! | `tag` (what the image-spec suggests) | tag of every repository |
//!
//! A part before the first `/` is a host when it has a `.` or a `:` or is `localhost`, as in docker's references.
//! `host/repo` cannot be asked for where the host has a port: a repository name has no colon. Entries
//! without the annotation, or with one that fits none of these, can be fetched by digest.

/// The longest repository name that is looked at.
const LONGEST_NAME: usize = 255;

/// An annotation, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RefName {
    /// The registry host, where the annotation has one.
    pub(super) host: Option<String>,
    /// The repository; `None` for a bare tag.
    pub(super) repository: Option<String>,
    /// The tag.
    pub(super) tag: String,
}

impl RefName {
    /// Takes an annotation apart; `None` when it fits none of the three forms.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let name_end = text.rfind('/').map_or(0, |slash| slash + 1);
        let Some(colon) = text[name_end..].find(':').map(|at| name_end + at) else {
            let bare = name_end == 0 && is_tag(text);
            return bare.then(|| Self {
                host: None,
                repository: None,
                tag: text.to_owned(),
            });
        };
        let (path, tag) = (&text[..colon], &text[colon + 1..]);
        if !is_tag(tag) {
            return None;
        }
        let (host, repository) = match path.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => {
                (Some(host), rest)
            }
            _ => (None, path),
        };
        is_repository(repository).then(|| Self {
            host: host.map(str::to_owned),
            repository: Some(repository.to_owned()),
            tag: tag.to_owned(),
        })
    }

    /// Whether the entry belongs to the repository that a client names.
    pub(super) fn serves(&self, asked: &str) -> bool {
        match (&self.host, &self.repository) {
            (_, None) => true,
            (_, Some(repository)) if repository == asked => true,
            (Some(host), Some(repository)) => {
                asked
                    .strip_prefix(host.as_str())
                    .and_then(|rest| rest.strip_prefix('/'))
                    == Some(repository)
            }
            (None, Some(_)) => false,
        }
    }
}

/// Whether a string is a repository name (distribution-spec, "Pulling manifests").
pub(super) fn is_repository(text: &str) -> bool {
    text.len() <= LONGEST_NAME && text.split('/').all(is_component)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    bytes
        .split(|&byte| alphanumeric(byte))
        .filter(|separator| !separator.is_empty())
        .all(|separator| {
            matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|&byte| byte == b'-')
        })
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`
pub(super) fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text
            .bytes()
            .all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Option<(Option<String>, Option<String>, String)> {
        RefName::parse(text).map(|name| (name.host, name.repository, name.tag))
    }

    #[test]
    fn the_three_forms_are_told_apart() {
        let some = |text: &str| Some(text.to_owned());
        for (text, host, repository, tag) in [
            ("v1", None, None, "v1"),
            ("gpt2:v1", None, some("gpt2"), "v1"),
            ("org/model:v1", None, some("org/model"), "v1"),
            (
                "ghcr.io/org/model:v1",
                some("ghcr.io"),
                some("org/model"),
                "v1",
            ),
            ("localhost/m:v1", some("localhost"), some("m"), "v1"),
            (
                "127.0.0.1:5000/a/b:V_1.0",
                some("127.0.0.1:5000"),
                some("a/b"),
                "V_1.0",
            ),
        ] {
            assert_eq!(
                parts(text),
                Some((host, repository, tag.to_owned())),
                "{text}"
            );
        }
        for text in [
            "",
            "ghcr.io/org/model",
            "Org/model:v1",
            "a/../b:v1",
            "a:b:c",
            "a/b:",
            ":v1",
            "a//b:v1",
        ] {
            assert_eq!(parts(text), None, "{text}");
        }
    }

    #[test]
    fn a_name_serves_its_repository_with_and_without_its_host() {
        let name = RefName::parse("ghcr.io/org/model:v1").unwrap();
        assert!(name.serves("org/model") && name.serves("ghcr.io/org/model"));
        assert!(
            !name.serves("model")
                && !name.serves("ghcr.io/org")
                && !name.serves("quay.io/org/model")
        );
        assert!(RefName::parse("v1").unwrap().serves("what/ever"));
        assert!(!RefName::parse("a:v1").unwrap().serves("b"));
    }

    #[test]
    fn repository_names_follow_the_distribution_spec() {
        for text in ["a", "a/b/c", "a.b", "a_b", "a__b", "a---b", "0/1"] {
            assert!(is_repository(text), "{text}");
        }
        let long = "a".repeat(256);
        for text in [
            "", "/", "a/", "/a", "A", "a..b", "a___b", "a._b", ".a", "a-", "a/../b", "a%2f", &long,
        ] {
            assert!(!is_repository(text), "{text}");
        }
    }
}
