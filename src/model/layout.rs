//! From steps to paths: which file stands where, what is hidden, and what is said about it. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::chunked::Chunk;
use super::convention::{Clash, Role, Step, Under};
use super::manifest::{Descriptor, Manifest};
use super::names;
use super::notes::{Notes, quote};
use super::overlay::is_whiteout;
use super::stamp::Stamp;
use super::tar::{Form, Item, Listing, Member, TarError};

/// Most files of a model.
pub(super) const MOST_FILES: usize = 200_000;
/// Most notes of a model.
const MOST_NOTES: usize = 200;

/// Where a file's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// From a layer, from this offset on.
    Layer {
        /// The layer's index in the manifest.
        layer: usize,
        /// The first byte's offset in the layer.
        offset: u64,
    },
    /// From the uncompressed form of a layer, from this offset on.
    Unpacked {
        /// The layer's index in the manifest.
        layer: usize,
        /// The first byte's offset in the uncompressed form.
        offset: u64,
    },
    /// From pieces of a layer that are compressed by themselves.
    Chunks {
        /// The layer's index in the manifest.
        layer: usize,
        /// The pieces, in the order of the file.
        chunks: Arc<[Chunk]>,
    },
    /// From memory.
    Made(Bytes),
    /// Nowhere: it is a symbolic link to this.
    Link(String),
}

impl Source {
    /// Counts its layer from further on: other layers are put before it.
    pub(super) fn shift(&mut self, by: usize) {
        match self {
            Self::Layer { layer, .. }
            | Self::Unpacked { layer, .. }
            | Self::Chunks { layer, .. } => *layer += by,
            Self::Made(_) | Self::Link(_) => {}
        }
    }

    /// The layer that it is of.
    pub(super) fn layer(&self) -> Option<usize> {
        match self {
            Self::Layer { layer, .. }
            | Self::Unpacked { layer, .. }
            | Self::Chunks { layer, .. } => Some(*layer),
            Self::Made(_) | Self::Link(_) => None,
        }
    }
}

/// A file without its path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Placed {
    /// Size in bytes.
    pub(super) size: u64,
    /// Where its bytes are.
    pub(super) source: Source,
    /// What its packager told of it.
    pub(super) stamp: Stamp,
}

impl Placed {
    /// The file that a layer is from its first byte to its last.
    pub(super) fn whole(layer: usize, descriptor: &Descriptor) -> Self {
        Self {
            size: descriptor.size,
            source: Source::Layer { layer, offset: 0 },
            stamp: Stamp::of_layer(descriptor),
        }
    }
}

/// A model's files while they are laid out.
#[derive(Debug)]
pub(super) struct Layout {
    /// Files by path; no path lies below another.
    pub(super) files: BTreeMap<String, Placed>,
    /// All ancestors of the files, and directories that a tar has for themselves.
    pub(super) directories: BTreeSet<String>,
    /// Layers to show under `.oci/blobs`.
    pub(super) hidden: BTreeSet<usize>,
    /// What is worth saying.
    pub(super) notes: Notes,
    /// Why the artifact cannot be used although some of its files may be laid out.
    pub(super) problem: Option<String>,
}

/// What a path is taken by.
pub(super) enum Taken {
    File,
    Directory,
    /// By a file where the path has a directory.
    FileAbove(String),
}

/// Carries out the steps. `tars` has the listing of each tar layer that a step names, by layer; `shard_names` the names
/// of nameless shards in the order of their steps: without them they are left out.
pub(super) fn lay_out(
    manifest: &Manifest,
    steps: &[Step],
    tars: &BTreeMap<usize, Result<Listing, TarError>>,
    shard_names: Option<&[String]>,
) -> Layout {
    let mut layout = Layout {
        files: BTreeMap::new(),
        directories: BTreeSet::new(),
        hidden: BTreeSet::new(),
        notes: Notes::new(MOST_NOTES),
        problem: None,
    };
    let mut shard_names = shard_names.map(|names| names.iter());
    for step in steps {
        let Some(layer) = manifest.layers.get(step.layer) else {
            continue;
        };
        let whole = Placed::whole(step.layer, layer);
        match &step.role {
            Role::File(name) => layout.place_named(manifest, name, whole, step),
            Role::NamelessShard => {
                if let Some(names) = &mut shard_names {
                    match names.next() {
                        Some(path) => layout.place(manifest, path.clone(), whole, step),
                        None => layout.hide(manifest, step.layer, Some("it has no name")),
                    }
                }
            }
            Role::Tar {
                required,
                otherwise,
                ..
            } => match (tars.get(&step.layer), otherwise) {
                (Some(Ok(listing)), _) => layout.place_members(manifest, listing, step),
                (Some(Err(TarError::NoTar)), Some(name)) => {
                    layout.place_named(manifest, name, whole, step);
                }
                // Only its type says that it is a tar: it is the file that its name says.
                (Some(Err(error)), Some(name)) if !required => {
                    let by = describe(manifest, step.layer);
                    layout
                        .notes
                        .add(format!("{by}: it is shown as a file: {error}"));
                    layout.place_named(manifest, name, whole, step);
                }
                (Some(Err(error)), _) => {
                    let why = format!("it can't be read as a tar: {error}");
                    layout.hide(manifest, step.layer, Some(&why));
                    if *required {
                        layout.problem.get_or_insert_with(|| {
                            format!("{}: {why}", describe(manifest, step.layer))
                        });
                    }
                }
                (None, _) => layout.hide(manifest, step.layer, None),
            },
            Role::Hidden(why) => layout.hide(manifest, step.layer, why.as_deref()),
        }
        if layout.files.len() > MOST_FILES {
            layout.problem = Some(format!("it has more than {MOST_FILES} files"));
            break;
        }
    }
    layout.settle_links();
    layout
}

impl Layout {
    /// The paths that are taken.
    pub(super) fn paths(&self) -> BTreeSet<&str> {
        self.files.keys().map(String::as_str).collect()
    }

    /// Shows a layer under `.oci/blobs` only; the reason, if there is one, becomes a note.
    fn hide(&mut self, manifest: &Manifest, layer: usize, why: Option<&str>) {
        self.hidden.insert(layer);
        if let Some(why) = why {
            self.notes
                .add(format!("{}: {why}", describe(manifest, layer)));
        }
    }

    /// Puts a layer at the path that its name asks for.
    fn place_named(&mut self, manifest: &Manifest, name: &str, file: Placed, step: &Step) {
        match names::annotated(name) {
            Ok(path) => self.place(manifest, path, file, step),
            Err(why) => {
                let why = format!("its name {} can't be used: {why}", quote(name));
                self.hide(manifest, step.layer, Some(&why));
            }
        }
    }

    fn place_members(&mut self, manifest: &Manifest, listing: &Listing, step: &Step) {
        let Role::Tar { under, links, .. } = &step.role else {
            return;
        };
        let tar = describe(manifest, step.layer);
        let overlay = step.clash == Clash::Overlay;
        self.notes
            .extend(listing.notes.iter().map(|note| format!("{tar}: {note}")));
        // Within one tar the last entry of a name counts, as when it is unpacked.
        let mut last = BTreeMap::new();
        for (n, member) in listing.members.iter().enumerate() {
            let again = last.insert(member.path.as_str(), n).is_some();
            if again && !overlay && member.item != Item::Directory {
                self.notes.add(format!(
                    "{tar}: has {} more than once; the last counts",
                    quote(&member.path)
                ));
            }
        }
        if overlay {
            self.white_out(listing);
        }
        let folder = folder(under, listing);
        for (n, member) in listing.members.iter().enumerate() {
            if last.get(member.path.as_str()) != Some(&n) || (overlay && is_whiteout(&member.path))
            {
                continue;
            }
            let path = match &folder {
                Some(folder) => format!("{folder}/{}", member.path),
                None => member.path.clone(),
            };
            let file = match &member.item {
                Item::Directory => {
                    self.place_directory(path, overlay);
                    continue;
                }
                Item::Symlink(_) | Item::HardLink(_) if !links => {
                    let what = quote(&member.path);
                    self.notes
                        .add(format!("{tar}: left out {what}: it is a link"));
                    continue;
                }
                Item::HardLink(target) => {
                    match self.linked(listing, &last, &folder, target, step) {
                        Some(file) => file,
                        None => {
                            let (what, target) = (quote(&member.path), quote(target));
                            self.notes.add(format!(
                            "{tar}: left out {what}: it is a hard link to {target}, which is not there"
                        ));
                            continue;
                        }
                    }
                }
                Item::Symlink(target) => link(target),
                Item::File | Item::Chunked(_) => placed(listing.form, member, step.layer),
            };
            self.place(manifest, path, file, step);
        }
    }

    /// The file that a hard link of a tar names: one of the same tar, else one that lies there already.
    fn linked(
        &self,
        listing: &Listing,
        last: &BTreeMap<&str, usize>,
        folder: &Option<String>,
        target: &str,
        step: &Step,
    ) -> Option<Placed> {
        let mut target = target;
        // A hard link may name another one.
        for _ in 0..8 {
            let Some(member) = last.get(target).map(|n| &listing.members[*n]) else {
                break;
            };
            match &member.item {
                Item::File | Item::Chunked(_) => {
                    return Some(placed(listing.form, member, step.layer));
                }
                Item::Symlink(to) => return Some(link(to)),
                Item::HardLink(next) => target = next,
                Item::Directory => return None,
            }
        }
        let path = match folder {
            Some(folder) => format!("{folder}/{target}"),
            None => target.to_owned(),
        };
        self.files.get(&path).cloned()
    }

    fn place(&mut self, manifest: &Manifest, path: String, file: Placed, step: &Step) {
        let by = || describe(manifest, step.layer);
        if step.clash == Clash::Overlay {
            return self.overlay(path, file, &by());
        }
        match self.taken(&path) {
            None => self.insert(path, file),
            Some(Taken::File) if self.is_same(manifest, &path, &file) => {}
            Some(Taken::File) if step.clash == Clash::Replace => {
                self.notes.add(format!(
                    "{}: replaces {} of an earlier layer",
                    by(),
                    quote(&path)
                ));
                let old = self.files.insert(path, file);
                if let Some(layer) = old.and_then(|old| old.source.layer())
                    && layer != step.layer
                {
                    self.hidden.insert(layer);
                }
            }
            Some(taken) => {
                let why = match taken {
                    Taken::File => "an earlier one stays in its place".to_owned(),
                    Taken::Directory => "there is a directory of that name".to_owned(),
                    Taken::FileAbove(file) => format!("{} is a file", quote(&file)),
                };
                self.notes
                    .add(format!("{}: left out {}: {why}", by(), quote(&path)));
                self.hidden.insert(step.layer);
            }
        }
    }

    /// Makes the directory that a tar has, unless a file is in its way; in an image the file makes room.
    fn place_directory(&mut self, path: String, overlay: bool) {
        let path = if overlay {
            let path = self.beneath_links(&path);
            self.files.remove(&path);
            path
        } else {
            path
        };
        if self.taken(&path).is_none() {
            self.insert_directory(path);
        }
    }

    /// Makes a directory and those above it on a path that is free.
    pub(super) fn insert_directory(&mut self, path: String) {
        for parent in ancestors(&path) {
            if !self.directories.insert(parent.to_owned()) {
                break;
            }
        }
        self.directories.insert(path);
    }

    /// The directories with nothing in them.
    pub(super) fn empty_directories(&self) -> Vec<String> {
        let is_empty = |directory: &&String| {
            let below = format!("{directory}/");
            let has = |next: Option<&String>| next.is_some_and(|next| next.starts_with(&below));
            let file = self.files.range(below.clone()..).next();
            !has(file.map(|(path, _)| path)) && !has(self.directories.range(below.clone()..).next())
        };
        self.directories.iter().filter(is_empty).cloned().collect()
    }

    /// Puts a file on a path that is free.
    pub(super) fn insert(&mut self, path: String, file: Placed) {
        for parent in ancestors(&path) {
            if !self.directories.insert(parent.to_owned()) {
                break;
            }
        }
        self.files.insert(path, file);
    }

    /// Puts a file that ocifs made on a top-level path unless the path is taken.
    pub(super) fn add_made(&mut self, path: &str, content: Bytes) {
        if self.taken(path).is_none() {
            let size = content.len() as u64;
            self.insert(
                path.to_owned(),
                Placed {
                    size,
                    source: Source::Made(content),
                    stamp: Stamp::default(),
                },
            );
        }
    }

    pub(super) fn taken(&self, path: &str) -> Option<Taken> {
        if self.files.contains_key(path) {
            return Some(Taken::File);
        }
        if self.directories.contains(path) {
            return Some(Taken::Directory);
        }
        ancestors(path)
            .find(|parent| self.files.contains_key(*parent))
            .map(|file| Taken::FileAbove(file.to_owned()))
    }

    /// Whether a file with the same bytes is there: the same part of a blob with the same digest.
    fn is_same(&self, manifest: &Manifest, path: &str, file: &Placed) -> bool {
        let Some(there) = self.files.get(path) else {
            return false;
        };
        match (&there.source, &file.source) {
            (
                Source::Layer {
                    layer: a,
                    offset: at_a,
                },
                Source::Layer {
                    layer: b,
                    offset: at_b,
                },
            )
            | (
                Source::Unpacked {
                    layer: a,
                    offset: at_a,
                },
                Source::Unpacked {
                    layer: b,
                    offset: at_b,
                },
            ) => {
                manifest.layers[*a].digest == manifest.layers[*b].digest
                    && at_a == at_b
                    && there.size == file.size
            }
            _ => false,
        }
    }
}

/// A file in a tar of this form.
fn placed(form: Form, member: &Member, layer: usize) -> Placed {
    let offset = member.offset;
    let source = match (&member.item, form) {
        (Item::Chunked(chunks), _) => Source::Chunks {
            layer,
            chunks: Arc::clone(chunks),
        },
        (_, Form::Plain) => Source::Layer { layer, offset },
        (_, Form::Compressed | Form::Chunked) => Source::Unpacked { layer, offset },
    };
    Placed {
        size: member.size,
        source,
        stamp: member.stamp,
    }
}

/// A symbolic link that nobody has followed yet.
fn link(target: &str) -> Placed {
    Placed {
        size: 0,
        source: Source::Link(target.to_owned()),
        stamp: Stamp::default(),
    }
}

/// Where the members of a tar go.
///
/// The folders that ORAS packs carry their title in front of each name (the Go library), only its last component (the
/// Python one), or nothing at all.
fn folder(under: &Under, listing: &Listing) -> Option<String> {
    let title = match under {
        Under::Top => return None,
        Under::Folder(folder) => return names::annotated(folder.trim_end_matches('/')).ok(),
        Under::Titled(title) => title,
    };
    let title = names::annotated(title.trim_end_matches('/')).ok()?;
    let (parent, base) = match title.rsplit_once('/') {
        Some((parent, base)) => (Some(parent), base),
        None => (None, title.as_str()),
    };
    let all_below = |folder: &str| {
        listing.members.iter().all(|member| {
            member
                .path
                .strip_prefix(folder)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    };
    if all_below(&title) {
        None
    } else if all_below(base) {
        parent.map(str::to_owned)
    } else {
        Some(title)
    }
}

/// `a/b` and `a` for `a/b/c`: the directories above a path, the nearest first.
pub(super) fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.rmatch_indices('/').map(|(at, _)| &path[..at])
}

/// A layer in a note: `layer 2 (application/…, sha256:…)`.
fn describe(manifest: &Manifest, layer: usize) -> String {
    let descriptor = &manifest.layers[layer];
    let hex = descriptor.digest.hex();
    format!(
        "layer {} ({}, sha256:{}…)",
        layer + 1,
        quote(&descriptor.media_type),
        &hex[..12]
    )
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
