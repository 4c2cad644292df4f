//! What a model card says of licences: the front matter of `README.md` as model hubs write it.

/// The licences that a card names, in SPDX's spelling where that is known; empty when it names none.
///
/// The front matter is YAML between two lines of dashes; of it only `license: x`, `license: [x, y]`, and a list below `license:`
/// are read. `other` says nothing, `license_name` then may.
pub(super) fn licences(card: &str) -> Vec<String> {
    let mut lines = card.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Vec::new();
    }
    let front: Vec<&str> = lines.take_while(|line| line.trim_end() != "---").collect();
    let of = |key: &str| -> Vec<&str> {
        let is_key = |line: &&str| {
            line.strip_prefix(key)
                .is_some_and(|rest| rest.starts_with(':'))
        };
        let Some(at) = front.iter().position(is_key) else {
            return Vec::new();
        };
        let inline = front[at][key.len() + 1..].trim();
        if !inline.is_empty() {
            let list = inline
                .strip_prefix('[')
                .and_then(|list| list.strip_suffix(']'));
            return list.unwrap_or(inline).split(',').collect();
        }
        front[at + 1..]
            .iter()
            .map_while(|line| line.trim_start().strip_prefix("- "))
            .collect()
    };
    let clean = |name: &str| {
        let name = name.trim().trim_matches(['"', '\'']);
        let fits = !name.is_empty() && name.len() <= 100 && !name.chars().any(char::is_control);
        (fits && name != "other").then(|| spdx(name).to_owned())
    };
    let named: Vec<String> = of("license").into_iter().filter_map(clean).collect();
    if named.is_empty() {
        return of("license_name").into_iter().filter_map(clean).collect();
    }
    named
}

/// SPDX's spelling of a hub's name.
fn spdx(name: &str) -> &str {
    const KNOWN: [&str; 20] = [
        "Apache-2.0",
        "MIT",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSD-3-Clause-Clear",
        "ISC",
        "MPL-2.0",
        "GPL-2.0",
        "GPL-3.0",
        "LGPL-3.0",
        "AGPL-3.0",
        "CC0-1.0",
        "CC-BY-4.0",
        "CC-BY-SA-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-NC-ND-4.0",
        "Artistic-2.0",
        "Zlib",
        "Unlicense",
    ];
    let known = KNOWN.iter().find(|known| known.eq_ignore_ascii_case(name));
    known.copied().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_front_matter_names_licences() {
        for (card, licences) in [
            (
                "---\nlanguage: en\nlicense: apache-2.0\n---\n# Model",
                &["Apache-2.0"][..],
            ),
            (
                "---\nlicense:\n- mit\n- \"cc-by-4.0\"\ntags:\n- x\n---\n",
                &["MIT", "CC-BY-4.0"],
            ),
            ("---\nlicense: [mit, llama3]\n---\n", &["MIT", "llama3"]),
            ("---\nlicense: other\nlicense_name: qwen\n---\n", &["qwen"]),
            ("---\nlicense: other\n---\n", &[]),
            ("---\ntags: x\n---\nlicense: mit\n", &[]),
            ("# license: mit\n", &[]),
            ("", &[]),
        ] {
            assert_eq!(super::licences(card), licences, "{card}");
        }
    }
}
