//! The structure that `src/lib.rs` draws, checked: which layer names which, and that each file says what it is for.

// Helpers outside of `#[test]` functions are test code too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Each layer and those that it may name. `base` is everybody's.
const LAYERS: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("registry", &[]),
    ("cache", &[]),
    ("blob", &["cache", "registry"]),
    ("model", &["blob", "cache", "registry"]),
    ("tree", &["model", "blob", "cache", "registry"]),
    ("fuse", &[]),
    ("mount", &["tree", "fuse"]),
    ("http", &[]),
    ("serve", &["http"]),
    ("pack", &["model"]),
    ("runner", &["http"]),
    // Programs beside `ocifs` use the library from outside.
    ("bin", &[]),
    ("config", &["model", "blob", "cache", "registry"]),
    (
        "cli",
        &[
            "config", "mount", "fuse", "tree", "model", "blob", "cache", "registry", "http",
            "serve", "pack",
        ],
    ),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all() -> Vec<PathBuf> {
    let mut found = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut found,
    );
    assert!(found.len() > 100);
    found
}

/// `src/blob/lazy.rs` is of `blob`, `src/config.rs` of `config`.
fn layer(path: &Path) -> String {
    let below = path
        .strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))
        .unwrap();
    let first = below
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_str()
        .unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Tests may look at any layer.
fn is_test(path: &Path) -> bool {
    let name = path.file_stem().unwrap().to_str().unwrap();
    name == "tests"
        || name.ends_with("_tests")
        || name == "fake"
        || path.components().any(|part| part.as_os_str() == "tests")
}

#[test]
fn calls_go_down_only() {
    let mut wrong = Vec::new();
    let mut used = BTreeSet::new();
    for path in all() {
        let from = layer(&path);
        if is_test(&path) || ["lib", "main"].contains(&from.as_str()) {
            continue;
        }
        let (_, allowed) = LAYERS
            .iter()
            .find(|(name, _)| *name == from)
            .unwrap_or_else(|| panic!("{from} is no layer"));
        let text = fs::read_to_string(&path).unwrap();
        // What stands behind the file's own tests is theirs; links in documentation call nobody.
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for line in code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
        {
            for rest in line.split("crate::").skip(1) {
                let to: String = rest
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                    .collect();
                if to.is_empty() || to == from || to == "base" {
                    continue;
                }
                used.insert((from.clone(), to.clone()));
                if !allowed.contains(&to.as_str()) {
                    wrong.push(format!("{}: {from} names {to}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(
        used.contains(&("blob".to_owned(), "cache".to_owned())),
        "the test does not see what there is: {used:?}"
    );
}

#[test]
fn every_file_says_first_what_it_is_for() {
    for path in all() {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{}", path.display());
    }
}

#[test]
fn the_environment_and_the_terminal_are_for_the_command_line_alone() {
    for path in all() {
        let from = layer(&path);
        if is_test(&path) || ["cli", "config", "main", "bin"].contains(&from.as_str()) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for word in ["env::var", "println!", "anyhow", "process::exit"] {
            let found = code
                .lines()
                .find(|line| line.contains(word) && !line.trim_start().starts_with("//"));
            assert!(found.is_none(), "{}: {found:?}", path.display());
        }
    }
}

#[test]
fn planted_bugs_still_fit_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for entry in fs::read_dir(root.join("tests/planted")).unwrap() {
        let path = entry.unwrap().path();
        let fits = Command::new("patch")
            .args(["--dry-run", "--quiet", "--strip=1", "--input"])
            .arg(&path)
            .current_dir(root)
            .output()
            .expect("tests/setup.sh installs patch");
        let said = String::from_utf8_lossy(&fits.stdout);
        assert!(fits.status.success(), "{}: {said}", path.display());
        count += 1;
    }
    assert!(count >= 6, "{count} patches");
}
