//! Nodes: what the kernel holds by number.

use std::fmt;
use std::sync::Arc;

use super::journal::Kept;
use super::names;
use super::shown::Shown;
use crate::base::Digest;
use crate::registry::{Reference, Repository, Tag};

/// A node's number, as `st_ino` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root directory (`FUSE_ROOT_ID` in the kernel's `include/uapi/linux/fuse.h`).
    pub const ROOT: Self = Self(1);
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {:#x}", self.0)
    }
}

/// A directory between a host and models: a namespace or repository. OCI does not tell them apart, one name can be both.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Folder {
    pub(super) host: String,
    pub(super) path: String,
}

impl Folder {
    /// The repository of this name. `docker.io/user` is none: Docker Hub reads a single component as an official image,
    /// which is `docker.io/library/user`.
    pub(super) fn repository(&self) -> Option<Repository> {
        let repository = Repository::new(&self.host, &self.path).ok()?;
        (repository.path() == self.path).then_some(repository)
    }

    /// The folder `component` in this one; none when the name would be too long for a registry.
    pub(super) fn child(&self, component: &str) -> Option<Self> {
        let path = format!("{}/{component}", self.path);
        names::repository(&self.host, &path).map(|_| Self {
            host: self.host.clone(),
            path,
        })
    }

    fn parent(&self) -> Node {
        match self.path.rsplit_once('/') {
            None => Node::Host(self.host.clone()),
            Some((path, _)) => Node::Folder(Self {
                host: self.host.clone(),
                path: path.to_owned(),
            }),
        }
    }

    /// The last component of its path.
    pub(super) fn name(&self) -> &str {
        names::last_component(&self.path)
    }
}

impl From<&Repository> for Folder {
    fn from(repository: &Repository) -> Self {
        Self {
            host: repository.host().to_owned(),
            path: repository.path().to_owned(),
        }
    }
}

/// Where a model is shown: three places, three directories, though they may show the same artifact.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// `host/path:tag`.
    Tagged(Repository, Tag),
    /// `host/path@sha256:…`.
    Pinned(Repository, Digest),
    /// The repository's own directory, which shows `:latest` among other things.
    Latest(Repository),
}

impl Place {
    pub(super) fn repository(&self) -> &Repository {
        match self {
            Self::Tagged(repository, _)
            | Self::Pinned(repository, _)
            | Self::Latest(repository) => repository,
        }
    }

    /// What is shown there. A repository's own directory and its `:latest` show one version between them.
    pub(super) fn reference(&self) -> Reference {
        match self {
            Self::Tagged(repository, tag) => Reference::tagged(repository.clone(), tag.clone()),
            Self::Pinned(repository, digest) => Reference::pinned(repository.clone(), *digest),
            Self::Latest(repository) => Reference::tagged(repository.clone(), Tag::latest()),
        }
    }

    /// Every place where a reference is shown.
    pub(super) fn all(reference: &Reference) -> Vec<Self> {
        let repository = reference.repository();
        match (reference.digest(), reference.tag()) {
            (Some(digest), _) => vec![Self::Pinned(repository.clone(), *digest)],
            (None, Some(tag)) if *tag == Tag::latest() => {
                vec![
                    Self::Tagged(repository.clone(), tag.clone()),
                    Self::Latest(repository.clone()),
                ]
            }
            (None, Some(tag)) => vec![Self::Tagged(repository.clone(), tag.clone())],
            (None, None) => Self::all(&Reference::tagged(repository.clone(), Tag::latest())),
        }
    }

    /// Whether what is shown can never change.
    pub(super) fn is_immutable(&self) -> bool {
        matches!(self, Self::Pinned(..))
    }

    /// The directory at `path` of the model shown here; `""` is the model's own.
    pub(super) fn directory(&self, path: &str) -> Node {
        match (self, path) {
            (Self::Latest(repository), "") => Node::Folder(repository.into()),
            _ => Node::Directory {
                place: self.clone(),
                path: path.to_owned(),
            },
        }
    }
}

/// One node.
#[derive(Clone, Debug)]
pub(super) enum Node {
    /// The root directory.
    Root,
    /// A registry host.
    Host(String),
    /// A namespace or repository.
    Folder(Folder),
    /// A model directory, or one of those in it. `path` is empty only for the first, and never for [`Place::Latest`].
    Directory {
        /// Where the model is shown.
        place: Place,
        /// `/`-separated, below the model directory.
        path: String,
    },
    /// A file. It belongs to the artifact, not to the place where it was found: all tags of a digest share it.
    File {
        /// The model.
        shown: Arc<Shown>,
        /// `/`-separated, below the model directory.
        path: String,
        /// A second node for the same file, which the kernel reads itself, while the first one is open in another way:
        /// the kernel takes one way for all that have a node open.
        direct: bool,
    },
    /// A symbolic link.
    Link {
        /// The directory's key.
        directory: String,
        /// The name in it.
        name: String,
        /// Where it points.
        target: String,
    },
}

impl Node {
    /// The text that the node's number is derived from: the same in every process and after every restart, different
    /// for different nodes.
    ///
    /// Directories and links have their path from the mount point; a directory inside the `:latest` of an untagged
    /// repository has `//` where the repository ends, which no path has. A file has its artifact's digest and path, its
    /// second node `//` between these.
    pub(super) fn key(&self) -> String {
        match self {
            Self::Root => "/".to_owned(),
            Self::Host(host) => format!("/{host}"),
            Self::Folder(Folder { host, path }) => format!("/{host}/{path}"),
            Self::Directory { place, path } => {
                let model = match place {
                    Place::Tagged(repository, tag) => format!("/{repository}:{tag}"),
                    Place::Pinned(repository, digest) => format!("/{repository}@{digest}"),
                    Place::Latest(repository) => format!("/{repository}/"),
                };
                if path.is_empty() {
                    model
                } else {
                    format!("{model}/{path}")
                }
            }
            Self::File {
                shown,
                path,
                direct: false,
            } => format!("{}/{path}", shown.digest()),
            Self::File {
                shown,
                path,
                direct: true,
            } => format!("{}//{path}", shown.digest()),
            Self::Link {
                directory, name, ..
            } => format!("{directory}/{name}"),
        }
    }

    /// The directory that `..` means; a file or link has none, and the root is its own.
    pub(super) fn parent(&self) -> Self {
        match self {
            Self::Root | Self::Host(_) | Self::File { .. } | Self::Link { .. } => Self::Root,
            Self::Folder(folder) => folder.parent(),
            Self::Directory { place, path } => match path.rsplit_once('/') {
                Some((directory, _)) => place.directory(directory),
                None if path.is_empty() => Folder::from(place.repository()).parent(),
                None => place.directory(""),
            },
        }
    }

    /// What a journal keeps of it; the root need not be kept.
    pub(super) fn kept(&self) -> Option<Kept> {
        Some(match self.clone() {
            Self::Root => return None,
            Self::Host(host) => Kept::Host(host),
            Self::Folder(folder) => Kept::Folder(folder),
            Self::Directory { place, path } => Kept::Directory { place, path },
            Self::File {
                shown,
                path,
                direct,
            } => Kept::File {
                repository: shown.repository().clone(),
                digest: shown.digest(),
                path,
                direct,
            },
            Self::Link {
                directory,
                name,
                target,
            } => Kept::Link {
                directory,
                name,
                target,
            },
        })
    }

    /// A link in this directory.
    pub(super) fn link(&self, name: &str, target: String) -> Self {
        let directory = match self {
            Self::Root => String::new(),
            _ => self.key(),
        };
        Self::Link {
            directory,
            name: name.to_owned(),
            target,
        }
    }

    /// The place whose model directory this is.
    pub(super) fn model_place(&self) -> Option<Place> {
        match self {
            Self::Folder(folder) => folder.repository().map(Place::Latest),
            Self::Directory { place, path } if path.is_empty() => Some(place.clone()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_paths_and_differ() {
        let repository = Repository::new("r.example", "org/model").unwrap();
        let digest = Digest::of(b"x");
        let tagged = Place::Tagged(repository.clone(), Tag::latest());
        let latest = Place::Latest(repository.clone());
        let keys = [
            Node::Root.key(),
            Node::Host("r.example".into()).key(),
            Node::Folder(Folder::from(&repository)).key(),
            Node::Folder(Folder::from(&repository).child("onnx").unwrap()).key(),
            tagged.directory("").key(),
            tagged.directory("onnx").key(),
            latest.directory("onnx").key(),
            Place::Pinned(repository.clone(), digest)
                .directory("")
                .key(),
            Node::Folder(Folder::from(&repository))
                .link("@v1", "../model:v1".into())
                .key(),
        ];
        assert_eq!(keys[4], "/r.example/org/model:latest");
        assert_eq!(keys[6], "/r.example/org/model//onnx");
        assert_eq!(keys[8], "/r.example/org/model/@v1");
        let unique: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(unique.len(), keys.len(), "{keys:?}");
    }

    #[test]
    fn parents_lead_to_the_root() {
        let repository = Repository::new("r.example", "org/model").unwrap();
        let mut node = Place::Latest(repository).directory("a/b");
        let mut seen = vec![node.key()];
        while !matches!(node, Node::Root) {
            node = node.parent();
            seen.push(node.key());
        }
        let expected = [
            "/r.example/org/model//a/b",
            "/r.example/org/model//a",
            "/r.example/org/model",
            "/r.example/org",
            "/r.example",
            "/",
        ];
        assert_eq!(seen, expected);
    }
}
