//! A model's files as a tree of directories.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::names::{NAME_MAX, OCI_DIR};
use crate::base::Digest;
use crate::model::{File, Model};
use crate::registry::Repository;

/// How deep directories may be nested in a model directory.
const DEPTH_MAX: usize = 64;

/// A model with an index of its directories; immutable.
#[derive(Debug)]
pub(super) struct Shown {
    repository: Repository,
    model: Arc<Model>,
    /// By path (`""` is the model directory), then by name.
    directories: HashMap<String, BTreeMap<String, Child>>,
}

/// Something in a directory of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Child {
    /// A directory.
    Directory,
    /// A file.
    File(Place),
    /// A symbolic link: `links[_]`.
    Link(usize),
}

/// Which of a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// `files[_]`.
    Files(usize),
    /// `oci[_]`.
    Oci(usize),
}

impl Shown {
    /// Indexes a model of a repository. Paths that no directory entry can have are left out: the model made them from what a registry
    /// sent, so this is the second look at them.
    pub(super) fn new(repository: Repository, model: Arc<Model>) -> Self {
        let mut directories = HashMap::from([(String::new(), BTreeMap::new())]);
        for (index, file) in model.oci.iter().enumerate() {
            insert(
                &mut directories,
                &format!("{OCI_DIR}/{}", file.path),
                Child::File(Place::Oci(index)),
            );
        }
        for (index, file) in model.files.iter().enumerate() {
            if file.path != OCI_DIR && !file.path.starts_with(".oci/") {
                let child = Child::File(Place::Files(index));
                insert(&mut directories, &file.path, child);
            }
        }
        for (index, link) in model.links.iter().enumerate() {
            if link.path != OCI_DIR && !link.path.starts_with(".oci/") {
                insert(&mut directories, &link.path, Child::Link(index));
            }
        }
        for path in &model.empty_directories {
            if path != OCI_DIR
                && !path.starts_with(".oci/")
                && insert(&mut directories, path, Child::Directory)
            {
                directories.entry(path.clone()).or_default();
            }
        }
        Self {
            repository,
            model,
            directories,
        }
    }

    /// The model.
    pub(super) fn model(&self) -> &Model {
        &self.model
    }

    /// A repository that has the artifact.
    pub(super) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The artifact's digest.
    pub(super) fn digest(&self) -> Digest {
        self.model.digest
    }

    /// What `name` is in the directory `path`.
    pub(super) fn child(&self, path: &str, name: &str) -> Option<Child> {
        self.directories.get(path)?.get(name).copied()
    }

    /// Whether there is such a directory.
    pub(super) fn has_directory(&self, path: &str) -> bool {
        self.directories.contains_key(path)
    }

    /// What is in the directory `path`, sorted by name.
    pub(super) fn list(&self, path: &str) -> impl Iterator<Item = (&str, Child)> {
        self.directories
            .get(path)
            .into_iter()
            .flatten()
            .map(|(name, child)| (name.as_str(), *child))
    }

    /// Every directory's path, in no order.
    pub(super) fn directories(&self) -> impl Iterator<Item = &str> {
        self.directories.keys().map(String::as_str)
    }

    /// The file at `path`.
    pub(super) fn file(&self, path: &str) -> Option<&File> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        match self.child(directory, name)? {
            Child::Directory | Child::Link(_) => None,
            Child::File(Place::Files(index)) => self.model.files.get(index),
            Child::File(Place::Oci(index)) => self.model.oci.get(index),
        }
    }
}

impl Shown {
    /// The target of a link.
    pub(super) fn target(&self, link: usize) -> &str {
        self.model.links.get(link).map_or("", |link| &link.target)
    }
}

/// `directory` and `name` as one path.
pub(super) fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() {
        name.to_owned()
    } else {
        format!("{directory}/{name}")
    }
}

/// Puts something at a path, below directories that are made; gives whether it did.
fn insert(
    directories: &mut HashMap<String, BTreeMap<String, Child>>,
    path: &str,
    child: Child,
) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    let usable = |part: &&str| {
        !part.is_empty()
            && *part != "."
            && *part != ".."
            && part.len() <= NAME_MAX
            && !part.contains('\0')
    };
    if parts.len() > DEPTH_MAX || !parts.iter().all(usable) {
        tracing::warn!(path, "a file is not shown: its path cannot be one");
        return false;
    }
    let Some((name, above)) = parts.split_last() else {
        return false;
    };
    // Look before anything is made: a file that lies on another one's path is left out as a whole.
    let mut directory = String::new();
    for part in above {
        if let Some(Child::File(_) | Child::Link(_)) = directories
            .get(&directory)
            .and_then(|children| children.get(*part))
        {
            tracing::warn!(path, "a file is not shown: it would be inside another file");
            return false;
        }
        directory = join(&directory, part);
    }
    if directories
        .get(&directory)
        .is_some_and(|children| children.contains_key(*name))
    {
        tracing::warn!(path, "a file is not shown: its name is taken");
        return false;
    }
    let mut directory = String::new();
    for part in above {
        directories
            .entry(directory.clone())
            .or_default()
            .insert((*part).to_owned(), Child::Directory);
        directory = join(&directory, part);
    }
    directories
        .entry(directory)
        .or_default()
        .insert((*name).to_owned(), child);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::fake::model;

    fn shown(files: &[(&str, &str)]) -> Shown {
        let repository = Repository::new("r.example", "m").unwrap();
        Shown::new(repository, model(b"m", files))
    }

    #[test]
    fn paths_become_directories() {
        let shown = shown(&[
            ("config.json", "{}"),
            ("onnx/a/b.onnx", "x"),
            ("onnx/c", "y"),
        ]);
        let names = |path| {
            shown
                .list(path)
                .map(|(name, _)| name.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(""), [".oci", "config.json", "onnx"]);
        assert_eq!(names("onnx"), ["a", "c"]);
        assert_eq!(names(".oci"), ["manifest.json"]);
        assert_eq!(shown.child("", "onnx"), Some(Child::Directory));
        assert_eq!(shown.child("", "nothing"), None);
        assert_eq!(shown.file("onnx/a/b.onnx").unwrap().size, 1);
        assert!(shown.file("onnx/a").is_none());
        assert!(shown.has_directory("onnx/a") && !shown.has_directory("onnx/c"));
    }

    #[test]
    fn paths_that_cannot_be_are_left_out() {
        let long = "n".repeat(256);
        let deep = vec!["d"; DEPTH_MAX + 1].join("/");
        let shown = shown(&[
            ("../up", ""),
            ("/absolute", ""),
            ("a//b", ""),
            ("a/./b", ""),
            ("", ""),
            ("nul\0", ""),
            (&long, ""),
            (&deep, ""),
            (".oci/manifest.json", "forged"),
            ("file", "1"),
            ("file", "2"),
            ("file/below", ""),
            ("good", ""),
        ]);
        let names: Vec<_> = shown.list("").map(|(name, _)| name).collect();
        assert_eq!(names, [".oci", "file", "good"]);
        assert_eq!(
            shown.directories().count(),
            2,
            "nothing is left of what was refused"
        );
    }
}
