//! Which repositories may be read: patterns of what is allowed and what is not. Pure.

use crate::registry::Repository;

/// The registry that names without a host are of, as everywhere in OCI.
const DEFAULT_HOST: &str = "docker.io";

/// Rules for repositories. Without any, everything may be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Where there are some, only what they match may be read.
    pub allow: Vec<Pattern>,
    /// What they match may not be read, whatever is allowed.
    pub deny: Vec<Pattern>,
}

impl Access {
    /// Whether a repository may be read.
    pub fn permits(&self, repository: &Repository) -> bool {
        let name = repository.to_string();
        let matches = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(&name));
        !matches(&self.deny) && (self.allow.is_empty() || matches(&self.allow))
    }
}

/// A repository, or a host or namespace for all that is below it. `*` stands for any characters but a slash, `**` for whole
/// parts of the name. A name without a host is Docker Hub's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<String>);

impl std::str::FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = |reason: &str| {
            format!("`{text}` is no pattern of repositories: {reason}; write it like ghcr.io/org/*")
        };
        let mut parts: Vec<String> = text.split('/').map(str::to_owned).collect();
        if parts.iter().any(String::is_empty) {
            return Err(refuse("a part of it is empty"));
        }
        let known = |c: char| {
            c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '*' | '[' | ']')
        };
        if !text.chars().all(|c| c == '/' || known(c)) {
            return Err(refuse("it has a character that no repository has"));
        }
        if parts[1..].iter().any(|part| part.contains(':')) {
            return Err(refuse("rules are for repositories, not for tags"));
        }
        let first = &parts[0];
        if !first.contains(['.', ':', '*']) && first != "localhost" {
            // As docker has it: one part alone is an official image.
            if parts.len() == 1 {
                parts.insert(0, "library".to_owned());
            }
            parts.insert(0, DEFAULT_HOST.to_owned());
        }
        Ok(Self(parts))
    }
}

impl Pattern {
    /// Whether it matches a repository's whole name, or a beginning of it that ends at a slash.
    fn matches(&self, name: &str) -> bool {
        let parts: Vec<&str> = name.split('/').collect();
        leads(&self.0, &parts)
    }
}

/// Whether the first ones of `parts` match all of `pattern`. Both are short: a name has at most 255 characters.
fn leads(pattern: &[String], parts: &[&str]) -> bool {
    match pattern.split_first() {
        None => true,
        // What follows may match after any number of parts, none too.
        Some((any, rest)) if any == "**" => {
            (0..=parts.len()).any(|skip| leads(rest, &parts[skip..]))
        }
        Some((first, rest)) => parts.split_first().is_some_and(|(part, others)| {
            part_matches(first.as_bytes(), part.as_bytes()) && leads(rest, others)
        }),
    }
}

/// Whether a part matches, `*` being any characters. Goes back to the last `*` alone, so it takes at most the product of the lengths.
fn part_matches(pattern: &[u8], part: &[u8]) -> bool {
    let (mut at, mut read) = (0, 0);
    let mut star = None;
    while read < part.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(byte) if *byte == part[read] => {
                at += 1;
                read += 1;
            }
            _ => match &mut star {
                Some((place, taken)) => {
                    *taken += 1;
                    (at, read) = (*place + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::registry::Reference;

    fn repository(name: &str) -> Repository {
        name.parse::<Reference>().unwrap().repository().clone()
    }

    fn matches(pattern: &str, name: &str) -> bool {
        let pattern: Pattern = pattern.parse().unwrap();
        pattern.matches(&repository(name).to_string())
    }

    #[test]
    fn a_pattern_is_a_repository_or_what_is_above_it() {
        for (pattern, name, expected) in [
            ("ghcr.io", "ghcr.io/org/model", true),
            ("ghcr.io/org", "ghcr.io/org/model", true),
            ("ghcr.io/org", "ghcr.io/organisation/model", false),
            ("ghcr.io/org/*", "ghcr.io/org/deep/model", true),
            ("ghcr.io/org/*", "ghcr.io/other/model", false),
            ("ghcr.io/*/model", "ghcr.io/org/model", true),
            ("ghcr.io/*/model", "ghcr.io/org/other", false),
            ("*.corp.example/ml", "r1.corp.example/ml/x", true),
            ("*.corp.example/ml", "corp.example/ml/x", false),
            ("**/secret-*", "ghcr.io/a/b/secret-x", true),
            ("**/secret-*", "ghcr.io/a/b/open", false),
            ("ai", "ai/smollm2", false),
            ("ai/*", "ai/smollm2", true),
            ("gpt2", "gpt2", true),
            ("docker.io/library", "gpt2", true),
            ("localhost:5000", "localhost:5000/m", true),
            ("localhost:5000", "localhost:5001/m", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn what_is_denied_stays_so_and_nothing_else_is_allowed_once_something_is() {
        let rules = |allow: &[&str], deny: &[&str]| {
            let parse = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
            let access = Access {
                allow: parse(allow),
                deny: parse(deny),
            };
            move |name: &str| access.permits(&repository(name))
        };
        assert!(rules(&[], &[])("ghcr.io/a/b"));
        let both = rules(&["ghcr.io/a"], &["ghcr.io/a/secret"]);
        assert!(both("ghcr.io/a/b") && !both("ghcr.io/a/secret") && !both("quay.io/a/b"));
        let denied = rules(&[], &["quay.io"]);
        assert!(denied("ghcr.io/a/b") && !denied("quay.io/a/b"));
    }

    #[test]
    fn what_is_no_pattern_is_refused_with_a_reason() {
        for text in [
            "",
            "/",
            "ghcr.io//x",
            "ghcr.io/x:v1",
            "a b",
            "ghcr.io/x@sha256:0",
        ] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }

    proptest! {
        /// `*` against what it stands for, tried in every way.
        #[test]
        fn stars_match_as_they_do_when_every_way_is_tried(pattern in "[ab*]{0,8}", part in "[ab]{0,8}") {
            fn every_way(pattern: &[u8], part: &[u8]) -> bool {
                match pattern.split_first() {
                    None => part.is_empty(),
                    Some((b'*', rest)) => (0..=part.len()).any(|skip| every_way(rest, &part[skip..])),
                    Some((byte, rest)) => part.split_first().is_some_and(|(first, others)| first == byte && every_way(rest, others)),
                }
            }
            prop_assert_eq!(part_matches(pattern.as_bytes(), part.as_bytes()), every_way(pattern.as_bytes(), part.as_bytes()));
        }
    }
}
