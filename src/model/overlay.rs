//! Layers that lie over each other as those of a container image do (image-spec layer.md), and the links among files. Pure.

use super::layout::{Layout, Placed, Source, Taken};
use super::links::{self, Lost, There};
use super::names;
use super::notes::quote;
use super::stamp::Stamp;
use super::tar::Listing;

/// What a layer of an image begins the name of a whiteout with, and the whiteout of a whole directory.
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// Whether a path is that of a whiteout.
pub(super) fn is_whiteout(path: &str) -> bool {
    path.rsplit('/')
        .next()
        .is_some_and(|name| name.starts_with(WHITEOUT))
}

impl Layout {
    /// Puts a file of an image's layer over what lies there.
    pub(super) fn overlay(&mut self, path: String, file: Placed, by: &str) {
        let path = self.beneath_links(&path);
        match self.taken(&path) {
            Some(Taken::Directory) => {
                self.remove_below(&path);
                self.directories.remove(&path);
            }
            // Whoever unpacks layers into directories of their own sees a folder where the layer below has a file.
            Some(Taken::FileAbove(above)) if !self.is_link(&above) => {
                self.files.remove(&above);
            }
            Some(Taken::FileAbove(above)) => {
                let (path, above) = (quote(&path), quote(&above));
                self.notes.add(format!(
                    "{by}: left out {path}: {above} is a link that leads nowhere"
                ));
                return;
            }
            Some(Taken::File) | None => {}
        }
        self.insert(path, file);
    }

    /// Takes away what a layer says is no longer there (image-spec layer.md, "Whiteouts"). A whiteout is about what lies
    /// below the layer, never about the layer's own files.
    pub(super) fn white_out(&mut self, listing: &Listing) {
        for member in &listing.members {
            let (folder, name) = member.path.rsplit_once('/').unwrap_or(("", &member.path));
            let Some(gone) = name.strip_prefix(WHITEOUT) else {
                continue;
            };
            let folder = self.physical(folder);
            if name == OPAQUE {
                self.remove_below(&folder);
            } else if !gone.starts_with(WHITEOUT) && !gone.is_empty() {
                let path = if folder.is_empty() {
                    gone.to_owned()
                } else {
                    format!("{folder}/{gone}")
                };
                self.files.remove(&path);
                self.remove_below(&path);
                self.directories.remove(&path);
            }
        }
    }

    /// The path that a layer's entry has when the directories above it are links of the layers below.
    pub(super) fn beneath_links(&self, path: &str) -> String {
        match path.rsplit_once('/') {
            Some((directory, name)) => match self.physical(directory) {
                directory if directory.is_empty() => name.to_owned(),
                directory => format!("{directory}/{name}"),
            },
            None => path.to_owned(),
        }
    }

    /// Removes all that lies below a directory; below the model's own, everything.
    fn remove_below(&mut self, directory: &str) {
        let prefix = if directory.is_empty() {
            String::new()
        } else {
            format!("{directory}/")
        };
        let below: Vec<String> = self
            .files
            .range(prefix.clone()..)
            .map(|(path, _)| path)
            .take_while(|path| path.starts_with(&prefix))
            .cloned()
            .collect();
        for path in below {
            self.files.remove(&path);
        }
        let below: Vec<String> = self
            .directories
            .range(prefix.clone()..)
            .take_while(|path| path.starts_with(&prefix))
            .cloned()
            .collect();
        for path in below {
            self.directories.remove(&path);
        }
    }

    fn is_link(&self, path: &str) -> bool {
        matches!(self.there(path), There::Link(_))
    }

    fn there(&self, path: &str) -> There<'_> {
        match self.files.get(path) {
            Some(Placed {
                source: Source::Link(target),
                ..
            }) => There::Link(target),
            Some(_) => There::File,
            None if path.is_empty() || self.directories.contains(path) => There::Directory,
            None => There::Nothing,
        }
    }

    /// The directory that a path leads to over links.
    fn physical(&self, directory: &str) -> String {
        links::follow("", directory, true, |path| self.there(path))
            .ok()
            // Of what a link says nothing was checked: nothing is put where no file may be.
            .filter(|end| end.is_empty() || names::is_proper(end))
            .unwrap_or_else(|| directory.to_owned())
    }

    /// Makes each link lead straight and relative to where it leads in the end, or leaves it out.
    pub(super) fn settle_links(&mut self) {
        let links = self
            .files
            .iter()
            .filter_map(|(path, file)| match &file.source {
                Source::Link(target) => Some((path.clone(), target.clone())),
                _ => None,
            });
        let links: Vec<(String, String)> = links.collect();
        let mut settled = Vec::with_capacity(links.len());
        for (path, target) in &links {
            let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
            let end = links::follow(directory, target, false, |path| self.there(path));
            settled.push(end.map(|end| links::relative(directory, &end)));
        }
        let (mut lost, mut example) = (0_usize, None);
        for ((path, target), end) in links.into_iter().zip(settled) {
            match end {
                Ok(end) => {
                    let size = end.len() as u64;
                    let source = Source::Link(end);
                    let stamp = Stamp::default();
                    self.files.insert(
                        path,
                        Placed {
                            size,
                            source,
                            stamp,
                        },
                    );
                }
                Err(why) => {
                    self.files.remove(&path);
                    lost += 1;
                    example.get_or_insert((path, target, why));
                }
            }
        }
        if let Some((path, target, why)) = example {
            let why = match why {
                Lost::Dangling => "leads nowhere",
                Lost::Loop => "leads in a circle",
                Lost::Far => "leads over too many directories",
            };
            let (path, target) = (quote(&path), quote(&target));
            let more = if lost > 1 {
                format!("; so do {} further links", lost - 1)
            } else {
                String::new()
            };
            self.notes.add(format!(
                "left out the link {path} to {target}: it {why}{more}"
            ));
        }
    }
}
