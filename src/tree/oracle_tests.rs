//! Random walks over random registries, compared with an oracle that is a map from references to files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::fake::{Fake, model};
use super::{Kind, NodeId, Tree, TreeConfig};
use crate::registry::Reference;

const REPOSITORIES: [&str; 5] = [
    "r.example/model",
    "r.example/org",
    "r.example/org/model",
    "r.example/org/model/onnx",
    "localhost:5000/org",
];
const TAGS: [&str; 2] = ["latest", "v1"];
const HOSTS: [&str; 3] = ["r.example", "localhost:5000", "Bad_Host"];
const FILES: [&str; 6] = [
    "config.json",
    "LICENSE",
    "vocab",
    "onnx/model.onnx",
    "onnx/vocab",
    "Modelfile",
];

/// Names below a host, with what their spelling makes of them.
const NAMES: [(&str, Spelling); 17] = [
    ("org", Spelling::Component),
    ("model", Spelling::Component),
    ("onnx", Spelling::Component),
    ("vocab", Spelling::Component),
    ("config.json", Spelling::FileLike),
    ("LICENSE", Spelling::FileLike),
    ("Modelfile", Spelling::FileLike),
    (".oci", Spelling::FileLike),
    ("manifest.json", Spelling::FileLike),
    ("org:v1", Spelling::Tagged),
    ("org:latest", Spelling::Tagged),
    ("model:v1", Spelling::Tagged),
    ("model:latest", Spelling::Tagged),
    ("@v1", Spelling::Alias),
    ("Bad", Spelling::Nothing),
    ("a:b:c", Spelling::Nothing),
    ("model@sha256:0", Spelling::Nothing),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    Component,
    FileLike,
    Tagged,
    Alias,
    Nothing,
}

/// Files by path, `.oci` included, of each published reference.
type Published = BTreeMap<String, BTreeSet<String>>;

/// What is expected: slow and obvious.
struct Oracle<'a> {
    published: &'a Published,
    asked: BTreeSet<String>,
}

impl Oracle<'_> {
    fn ask(&mut self, reference: &str) -> Option<BTreeSet<String>> {
        self.asked.insert(reference.to_owned());
        self.published.get(reference).cloned()
    }

    fn walk(&mut self, path: &[&str]) -> Option<Kind> {
        let (host, below) = path.split_first()?;
        if *host == "Bad_Host" {
            return None;
        }
        let mut place = (*host).to_owned();
        for (index, name) in below.iter().enumerate() {
            let rest = below[index..].join("/");
            let behind = below[index + 1..].join("/");
            let is_repository = index > 0;
            let latest = format!("{place}:latest");
            let shown = if is_repository && self.asked.contains(&latest) {
                self.published.get(&latest)
            } else {
                None
            };
            let has = |files: &BTreeSet<String>| {
                files
                    .iter()
                    .any(|file| file.split('/').next() == Some(*name))
            };
            match NAMES.iter().find(|(known, _)| known == name)?.1 {
                Spelling::Tagged => {
                    let files = self.ask(&format!("{place}/{name}"))?;
                    return in_model(&files, &behind);
                }
                Spelling::Alias if is_repository => return behind.is_empty().then_some(Kind::Link),
                Spelling::FileLike if is_repository => {
                    let files = self.ask(&latest)?;
                    return in_model(&files, &rest);
                }
                Spelling::Component | Spelling::Nothing if shown.is_some_and(has) => {
                    return in_model(shown?, &rest);
                }
                Spelling::Component => place = format!("{place}/{name}"),
                _ => return None,
            }
        }
        Some(Kind::Directory)
    }
}

fn in_model(files: &BTreeSet<String>, path: &str) -> Option<Kind> {
    if files.contains(path) {
        return Some(Kind::File);
    }
    let directory = path.is_empty()
        || files
            .iter()
            .any(|file| file.starts_with(&format!("{path}/")));
    directory.then_some(Kind::Directory)
}

fn registry(published: &Published) -> Arc<Fake> {
    let fake = Fake::default();
    for (reference, files) in published {
        let files: Vec<_> = files
            .iter()
            .filter(|path| !path.starts_with(".oci"))
            .map(|path| (path.as_str(), "x"))
            .collect();
        fake.push(reference, &model(format!("{files:?}").as_bytes(), &files));
        fake.known
            .lock()
            .unwrap()
            .push(reference.parse::<Reference>().unwrap());
    }
    Arc::new(fake)
}

fn tree(fake: &Arc<Fake>) -> Tree {
    let config = TreeConfig {
        failure_ttl: Duration::from_secs(3600),
        ..TreeConfig::default()
    };
    Tree::new(fake.clone(), config).0
}

async fn walk(tree: &Tree, path: &[&str]) -> Option<(NodeId, Kind)> {
    let mut at = (NodeId::ROOT, Kind::Directory);
    for name in path {
        let entry = tree.lookup(at.0, name).await.ok()?;
        at = (entry.attr.ino, entry.attr.kind);
    }
    Some(at)
}

/// Everything that listings show, by path, after every published `latest` is shown.
async fn everything(tree: &Tree, published: &Published) -> HashMap<String, (NodeId, Kind)> {
    for reference in published.keys() {
        walk(tree, &reference.split('/').collect::<Vec<_>>())
            .await
            .unwrap();
    }
    let mut found = HashMap::new();
    let mut todo = vec![String::new()];
    while let Some(path) = todo.pop() {
        let directory = if path.is_empty() {
            vec![]
        } else {
            path.split('/').collect()
        };
        let (ino, _) = walk(tree, &directory).await.unwrap();
        let opened = tree.opendir(ino).await.unwrap();
        for entry in &tree.entries(ino, opened.handle).unwrap()[2..] {
            let looked_up = tree.lookup(ino, &entry.name).await.unwrap().attr;
            assert_eq!(
                (looked_up.ino, looked_up.kind),
                (entry.ino, entry.kind),
                "{path}/{}",
                entry.name
            );
            let full = if path.is_empty() {
                entry.name.clone()
            } else {
                format!("{path}/{}", entry.name)
            };
            if entry.kind == Kind::Directory {
                todo.push(full.clone());
            }
            assert!(
                found.insert(full, (entry.ino, entry.kind)).is_none(),
                "{path}/{} is listed twice",
                entry.name
            );
        }
        tree.release(opened.handle);
    }
    found
}

fn published() -> impl Strategy<Value = Published> {
    let files = prop::sample::subsequence(FILES.to_vec(), 1..=FILES.len());
    let one = prop::option::of(files);
    prop::collection::vec(one, REPOSITORIES.len() * TAGS.len()).prop_map(|models| {
        let references = REPOSITORIES
            .iter()
            .flat_map(|repository| TAGS.map(|tag| format!("{repository}:{tag}")));
        let with_parts = |files: Vec<&str>| {
            files
                .into_iter()
                .chain([".oci/manifest.json"])
                .map(str::to_owned)
                .collect()
        };
        references
            .zip(models)
            .filter_map(|(reference, files)| Some((reference, with_parts(files?))))
            .collect()
    })
}

fn path() -> impl Strategy<Value = Vec<&'static str>> {
    let names = NAMES.map(|(name, _)| name);
    (
        prop::sample::select(HOSTS.to_vec()),
        prop::collection::vec(prop::sample::select(names.to_vec()), 0..6),
    )
        .prop_map(|(host, names)| [vec![host], names].concat())
}

proptest! {
    #[test]
    fn lookups_agree_with_the_oracle_and_ask_for_what_it_asks(
        published in published(),
        paths in prop::collection::vec(path(), 1..30),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fake = registry(&published);
            let tree = tree(&fake);
            let mut oracle = Oracle { published: &published, asked: BTreeSet::new() };
            for path in &paths {
                let found = walk(&tree, path).await.map(|(_, kind)| kind);
                prop_assert_eq!(found, oracle.walk(path), "{:?}", path);
            }
            prop_assert_eq!(fake.asked().0, oracle.asked.len(), "{:?}", oracle.asked);
            Ok(())
        })?;
    }

    #[test]
    fn what_is_listed_is_found_under_the_same_number_in_every_tree(published in published()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fake = registry(&published);
            let first = everything(&tree(&fake), &published).await;
            // Another daemon, asked in another order.
            let other = tree(&fake);
            let mut references: Vec<_> = published.keys().collect();
            references.reverse();
            for reference in references {
                walk(&other, &reference.split('/').collect::<Vec<_>>()).await.unwrap();
            }
            let mut paths: Vec<_> = first.iter().collect();
            paths.sort_by(|one, two| two.0.cmp(one.0));
            for (path, expected) in paths {
                let found = walk(&other, &path.split('/').collect::<Vec<_>>()).await;
                prop_assert_eq!(found.as_ref(), Some(expected), "{}", path);
            }
            // Every directory has a number of its own: the kernel refuses one under two names.
            let directories: Vec<_> = first.values().filter(|(_, kind)| *kind == Kind::Directory).map(|(ino, _)| ino).collect();
            prop_assert_eq!(directories.iter().collect::<BTreeSet<_>>().len(), directories.len());
            Ok(())
        })?;
    }
}
