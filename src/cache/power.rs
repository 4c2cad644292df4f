//! A simulated disk that loses its power: from what was done to a directory, what may be found in it afterwards.
//!
//! What was not synced may be there, or not, or in part, each change by itself: a file's bytes may be lost while its length is not; a name may
//! be lost while the file's bytes are not; a rename may be lost while a later one is not. Only fsync of a file makes its bytes and
//! length sure, and only fsync of a directory the names in it. That is less than any real file system gives.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::faults::Event;

/// What becomes of what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// All of it is lost.
    All,
    /// Names are there, and files have their length, but the bytes are zeros.
    Bytes,
    /// The bytes are there, the names are lost.
    Names,
    /// Each change by itself, drawn from this seed.
    Drawn(u64),
}

/// A directory tree whose files have numbers.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    files: BTreeMap<usize, Inode>,
    dirs: BTreeSet<PathBuf>,
    names: BTreeMap<PathBuf, usize>,
    /// The names as they are while the power is on.
    now: BTreeMap<PathBuf, usize>,
    /// Changes of names that are not synced, in order, each with the file that it is about.
    pending: Vec<(Event, usize)>,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    content: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

/// All files below a directory.
pub(super) fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

fn dirs(root: &Path, into: &mut BTreeSet<PathBuf>) {
    into.insert(root.to_owned());
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            dirs(&entry.path(), into);
        }
    }
}

impl Disk {
    /// What is in a directory now, all of it safe.
    pub(super) fn of(root: &Path) -> Self {
        let mut disk = Self::default();
        dirs(root, &mut disk.dirs);
        for (id, path) in files(root).into_iter().enumerate() {
            let content = fs::read(&path).unwrap();
            disk.files.insert(
                id,
                Inode {
                    content,
                    pending: Vec::new(),
                },
            );
            disk.names.insert(path, id);
        }
        disk.now = disk.names.clone();
        disk
    }

    /// The numbers of its files.
    pub(super) fn numbers(&self) -> Vec<(PathBuf, usize)> {
        let named = |(path, id): (&PathBuf, &usize)| (path.clone(), *id);
        self.names.iter().map(named).collect()
    }

    /// Something is done to it.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Made(id, _) => {
                self.files.insert(*id, Inode::default());
                self.pending.push((event.clone(), *id));
                rename(&mut self.now, event, *id);
            }
            Event::MadeDir(_) => self.pending.push((event.clone(), 0)),
            Event::Renamed(path, _) | Event::Removed(path) => {
                if let Some(&id) = self.now.get(path) {
                    self.pending.push((event.clone(), id));
                    rename(&mut self.now, event, id);
                }
            }
            Event::Wrote(id, at, bytes) => self
                .inode(*id)
                .pending
                .push(Change::Write(*at, bytes.clone())),
            Event::Length(id, len) => self.inode(*id).pending.push(Change::Length(*len)),
            Event::Synced(id) => {
                let inode = self.inode(*id);
                for change in std::mem::take(&mut inode.pending) {
                    change.apply(&mut inode.content);
                }
            }
            Event::SyncedDir(dir) => {
                let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending)
                    .into_iter()
                    .partition(|(event, _)| touches(event, dir));
                self.pending = later;
                for (event, id) in now {
                    // What gave the file the name that it has lost since has no effect any more.
                    if let Event::Renamed(from, _) | Event::Removed(from) = &event {
                        self.pending.retain(|(earlier, of)| {
                            *of != id || !matches!(earlier, Event::Made(_, to) | Event::Renamed(_, to) if to == from)
                        });
                    }
                    self.settle(&event, id);
                }
            }
            Event::Promised(_) => {}
        }
    }

    fn inode(&mut self, id: usize) -> &mut Inode {
        self.files.get_mut(&id).unwrap()
    }

    /// Makes a change of names sure.
    fn settle(&mut self, event: &Event, id: usize) {
        match event {
            Event::MadeDir(path) => {
                self.dirs.insert(path.clone());
            }
            event => rename(&mut self.names, event, id),
        }
    }

    /// Writes what may be found once the power is back to where it was. The directory must not be there.
    pub(super) fn restore(mut self, loss: Loss) {
        let mut random = match loss {
            Loss::Drawn(seed) => seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            _ => 0,
        };
        let mut draw = |of: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 11) % of
        };
        for (event, id) in std::mem::take(&mut self.pending) {
            let kept = match loss {
                Loss::All | Loss::Names => false,
                Loss::Bytes => true,
                Loss::Drawn(_) => draw(2) == 0,
            };
            if kept {
                self.settle(&event, id);
            }
        }
        for inode in self.files.values_mut() {
            for change in std::mem::take(&mut inode.pending) {
                let change = match (loss, change) {
                    (Loss::All, _) => continue,
                    (Loss::Bytes, Change::Write(at, bytes)) => {
                        Change::Write(at, vec![0; bytes.len()])
                    }
                    (Loss::Drawn(_), Change::Write(at, mut bytes)) => {
                        match draw(4) {
                            0 => continue,
                            1 => bytes.fill(0),
                            2 => bytes.truncate(draw(bytes.len() as u64 + 1) as usize),
                            _ => {}
                        }
                        Change::Write(at, bytes)
                    }
                    (Loss::Drawn(_), change) if draw(2) == 0 => {
                        drop(change);
                        continue;
                    }
                    (_, change) => change,
                };
                change.apply(&mut inode.content);
            }
        }
        for dir in &self.dirs {
            // One whose own name was lost takes all in it along.
            if dir.parent().is_some_and(|above| above.is_dir()) {
                fs::create_dir(dir).unwrap();
            }
        }
        for (path, id) in &self.names {
            if path.parent().is_some_and(|dir| dir.is_dir()) {
                fs::write(path, &self.files[id].content).unwrap();
            }
        }
    }
}

/// What a change of names does to them.
fn rename(names: &mut BTreeMap<PathBuf, usize>, event: &Event, id: usize) {
    let mut gone = |path: &PathBuf| {
        if names.get(path) == Some(&id) {
            names.remove(path);
        }
    };
    match event {
        Event::Made(_, path) => {
            names.insert(path.clone(), id);
        }
        Event::Renamed(from, to) => {
            gone(from);
            names.insert(to.clone(), id);
        }
        Event::Removed(path) => gone(path),
        _ => {}
    }
}

fn touches(event: &Event, dir: &Path) -> bool {
    let within = |path: &Path| path.parent() == Some(dir);
    match event {
        Event::Made(_, path) | Event::MadeDir(path) | Event::Removed(path) => within(path),
        Event::Renamed(from, to) => within(from) || within(to),
        _ => false,
    }
}

impl Change {
    fn apply(self, content: &mut Vec<u8>) {
        match self {
            Self::Length(len) => content.resize(len as usize, 0),
            Self::Write(at, bytes) => {
                let (at, end) = (at as usize, at as usize + bytes.len());
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[at..end].copy_from_slice(&bytes);
            }
        }
    }
}
