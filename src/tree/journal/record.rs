//! Records of the journal: what happened, in bytes.
//!
//! Numbers are little-endian, texts and lists have their length in front. A record is framed by its length and its CRC-32C, so that
//! one that was cut off by a kill is told from a whole one.

use super::Malformed;
use crate::base::Digest;
use crate::cache::Identity;
use crate::registry::{Reference, Repository};
use crate::tree::node::{Folder, Place};

/// The longest record, in bytes: a listing of a repository with very many tags. A longer one is not written.
pub(super) const LONGEST: usize = 64 << 20;

/// Bytes in front of a record: its length and its checksum.
pub(super) const FRAME: usize = 8;

/// A node, with all that it takes to have it again. What is in a file comes from its artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) enum Kept {
    /// A registry host.
    Host(String),
    /// A namespace or repository.
    Folder(Folder),
    /// A directory of a model.
    Directory { place: Place, path: String },
    /// A file; the repository is one that its artifact can be had from.
    File {
        repository: Repository,
        digest: Digest,
        path: String,
        direct: bool,
    },
    /// A symbolic link.
    Link {
        directory: String,
        name: String,
        target: String,
    },
}

/// Something that the kernel must drop from its caches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) enum Stale {
    /// A name in a directory.
    Entry { parent: u64, name: String },
    /// A node's attributes.
    Attributes(u64),
    /// What is kept of a node's content.
    Content(u64),
    /// What is kept of the content of every file that a blob is in: nodes of such files may come to be until it is thrown away.
    Blob(Digest),
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) enum Record {
    /// What whoever serves the tree needs in order to go on; the last one counts.
    Session(Vec<u8>),
    /// A process has taken the session over, after the one before it ended in this way.
    TakenOver { reason: String },
    /// The kernel is told of a node for the first time, or holds it so many times.
    Told { id: u64, count: u64, node: Kept },
    /// The kernel is told of a node once more.
    Again { id: u64 },
    /// The kernel forgets so many times that it was told of a node.
    Forgot { id: u64, count: u64 },
    /// A reference shows an artifact.
    Bound {
        reference: Reference,
        digest: Digest,
    },
    /// A reference shows nothing.
    Unbound { reference: Reference },
    /// A file is open. `backing` is what the kernel reads in our place, 0 where it does not.
    Opened {
        handle: u64,
        node: u64,
        unique: u64,
        backing: i32,
    },
    /// A directory is open. `names` is what it lists, where that does not follow from what is shown.
    Listed {
        handle: u64,
        node: u64,
        unique: u64,
        names: Option<Vec<String>>,
    },
    /// A file or directory is closed.
    Closed { handle: u64 },
    /// The highest handle and backing id so far: numbers above are free.
    Highest { handle: u64, backing: i32 },
    /// How often the session was taken over before what follows.
    Times { times: u64, reason: String },
    /// What the kernel keeps of this is about to become wrong, and it will be told.
    Owed { debt: u64, what: Vec<Stale> },
    /// The kernel has been told.
    Settled { debt: u64 },
    /// The kernel is given bytes of a blob from this file of the cache, and nobody knows whether they are right. Without a file: all
    /// that it was given so far is.
    Given {
        blob: Digest,
        file: Option<Identity>,
    },
}

/// A record as it grows.
struct Out<'a>(&'a mut Vec<u8>);

impl Out<'_> {
    fn byte(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn number(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.number(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn text(&mut self, value: &str) -> &mut Self {
        self.bytes(value.as_bytes())
    }

    fn repository(&mut self, value: &Repository) -> &mut Self {
        self.text(value.host()).text(value.path())
    }

    fn digest(&mut self, value: &Digest) -> &mut Self {
        self.0.extend_from_slice(value.as_bytes());
        self
    }

    fn kept(&mut self, node: &Kept) {
        match node {
            Kept::Host(host) => self.byte(1).text(host),
            Kept::Folder(Folder { host, path }) => self.byte(2).text(host).text(path),
            Kept::Directory { place, path } => {
                match place {
                    Place::Tagged(repository, tag) => {
                        self.byte(3).repository(repository).text(tag.as_str())
                    }
                    Place::Pinned(repository, digest) => {
                        self.byte(4).repository(repository).digest(digest)
                    }
                    Place::Latest(repository) => self.byte(5).repository(repository),
                };
                self.text(path)
            }
            Kept::File {
                repository,
                digest,
                path,
                direct,
            } => {
                let kind = if *direct { 7 } else { 6 };
                self.byte(kind)
                    .repository(repository)
                    .digest(digest)
                    .text(path)
            }
            Kept::Link {
                directory,
                name,
                target,
            } => self.byte(8).text(directory).text(name).text(target),
        };
    }

    fn stale(&mut self, stale: &Stale) {
        match stale {
            Stale::Entry { parent, name } => self.byte(1).number(*parent).text(name),
            Stale::Attributes(node) => self.byte(2).number(*node),
            Stale::Content(node) => self.byte(3).number(*node),
            Stale::Blob(digest) => self.byte(4).digest(digest),
        };
    }

    fn record(&mut self, record: &Record) {
        match record {
            Record::Session(bytes) => {
                self.byte(1).bytes(bytes);
            }
            Record::TakenOver { reason } => {
                self.byte(2).text(reason);
            }
            Record::Told { id, count, node } => self.byte(3).number(*id).number(*count).kept(node),
            Record::Again { id } => {
                self.byte(4).number(*id);
            }
            Record::Forgot { id, count } => {
                self.byte(5).number(*id).number(*count);
            }
            Record::Bound { reference, digest } => {
                self.byte(6).text(&reference.to_string()).digest(digest);
            }
            Record::Unbound { reference } => {
                self.byte(7).text(&reference.to_string());
            }
            Record::Opened {
                handle,
                node,
                unique,
                backing,
            } => {
                self.byte(8).number(*handle).number(*node).number(*unique);
                self.0.extend_from_slice(&backing.to_le_bytes());
            }
            Record::Listed {
                handle,
                node,
                unique,
                names,
            } => {
                let kind = if names.is_some() { 10 } else { 9 };
                self.byte(kind)
                    .number(*handle)
                    .number(*node)
                    .number(*unique);
                if let Some(names) = names {
                    self.number(names.len() as u64);
                    for name in names {
                        self.text(name);
                    }
                }
            }
            Record::Closed { handle } => {
                self.byte(11).number(*handle);
            }
            Record::Highest { handle, backing } => {
                self.byte(12).number(*handle);
                self.0.extend_from_slice(&backing.to_le_bytes());
            }
            Record::Times { times, reason } => {
                self.byte(13).number(*times).text(reason);
            }
            Record::Owed { debt, what } => {
                self.byte(14).number(*debt).number(what.len() as u64);
                for stale in what {
                    self.stale(stale);
                }
            }
            Record::Settled { debt } => {
                self.byte(15).number(*debt);
            }
            Record::Given { blob, file } => {
                let kind = if file.is_some() { 16 } else { 17 };
                self.byte(kind).digest(blob);
                for number in file.iter().flat_map(|file| file.to_numbers()) {
                    self.number(number);
                }
            }
        }
    }
}

/// What is left to read of a record.
struct In<'a>(&'a [u8]);

impl<'a> In<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*first)
    }

    fn number(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn small(&mut self) -> Result<i32, Malformed> {
        self.array().map(i32::from_le_bytes)
    }

    fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let length = usize::try_from(self.number()?).map_err(|_| Malformed)?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, Malformed> {
        let bytes = self.bytes()?.to_vec();
        String::from_utf8(bytes).map_err(|_| Malformed)
    }

    fn repository(&mut self) -> Result<Repository, Malformed> {
        let (host, path) = (self.text()?, self.text()?);
        Repository::new(&host, &path).map_err(|_| Malformed)
    }

    fn reference(&mut self) -> Result<Reference, Malformed> {
        self.text()?.parse().map_err(|_| Malformed)
    }

    fn digest(&mut self) -> Result<Digest, Malformed> {
        self.array().map(Digest::from_bytes)
    }

    fn kept(&mut self) -> Result<Kept, Malformed> {
        let [kind] = self.array()?;
        Ok(match kind {
            1 => Kept::Host(self.text()?),
            2 => Kept::Folder(Folder {
                host: self.text()?,
                path: self.text()?,
            }),
            3..=5 => {
                let repository = self.repository()?;
                let place = match kind {
                    3 => Place::Tagged(repository, self.text()?.parse().map_err(|_| Malformed)?),
                    4 => Place::Pinned(repository, self.digest()?),
                    _ => Place::Latest(repository),
                };
                Kept::Directory {
                    place,
                    path: self.text()?,
                }
            }
            6 | 7 => Kept::File {
                repository: self.repository()?,
                digest: self.digest()?,
                path: self.text()?,
                direct: kind == 7,
            },
            8 => Kept::Link {
                directory: self.text()?,
                name: self.text()?,
                target: self.text()?,
            },
            _ => return Err(Malformed),
        })
    }

    fn stale(&mut self) -> Result<Stale, Malformed> {
        let [kind] = self.array()?;
        Ok(match kind {
            1 => Stale::Entry {
                parent: self.number()?,
                name: self.text()?,
            },
            2 => Stale::Attributes(self.number()?),
            3 => Stale::Content(self.number()?),
            4 => Stale::Blob(self.digest()?),
            _ => return Err(Malformed),
        })
    }

    fn record(&mut self) -> Result<Record, Malformed> {
        let [kind] = self.array()?;
        Ok(match kind {
            1 => Record::Session(self.bytes()?.to_vec()),
            2 => Record::TakenOver {
                reason: self.text()?,
            },
            3 => Record::Told {
                id: self.number()?,
                count: self.number()?,
                node: self.kept()?,
            },
            4 => Record::Again { id: self.number()? },
            5 => Record::Forgot {
                id: self.number()?,
                count: self.number()?,
            },
            6 => Record::Bound {
                reference: self.reference()?,
                digest: self.digest()?,
            },
            7 => Record::Unbound {
                reference: self.reference()?,
            },
            8 => Record::Opened {
                handle: self.number()?,
                node: self.number()?,
                unique: self.number()?,
                backing: self.small()?,
            },
            9 | 10 => {
                let (handle, node) = (self.number()?, self.number()?);
                let unique = self.number()?;
                let names = match kind {
                    9 => None,
                    _ => Some(
                        (0..self.number()?)
                            .map(|_| self.text())
                            .collect::<Result<_, _>>()?,
                    ),
                };
                Record::Listed {
                    handle,
                    node,
                    unique,
                    names,
                }
            }
            11 => Record::Closed {
                handle: self.number()?,
            },
            12 => Record::Highest {
                handle: self.number()?,
                backing: self.small()?,
            },
            13 => Record::Times {
                times: self.number()?,
                reason: self.text()?,
            },
            14 => Record::Owed {
                debt: self.number()?,
                what: (0..self.number()?)
                    .map(|_| self.stale())
                    .collect::<Result<_, _>>()?,
            },
            15 => Record::Settled {
                debt: self.number()?,
            },
            16 => Record::Given {
                blob: self.digest()?,
                file: Some(Identity::from_numbers([
                    self.number()?,
                    self.number()?,
                    self.number()?,
                ])),
            },
            17 => Record::Given {
                blob: self.digest()?,
                file: None,
            },
            _ => return Err(Malformed),
        })
    }
}

/// Appends a record in its frame.
pub(super) fn put(out: &mut Vec<u8>, record: &Record) {
    let start = out.len();
    out.extend_from_slice(&[0; FRAME]);
    Out(out).record(record);
    let body = &out[start + FRAME..];
    let (length, sum) = (body.len() as u64, crc32c::crc32c(body));
    // A length that does not fit is no record's, so nobody takes it for one.
    let length = u32::try_from(length).unwrap_or(0);
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    out[start + 4..start + FRAME].copy_from_slice(&sum.to_le_bytes());
}

/// The first record of `bytes` and its length with the frame; `None` where no whole record is.
pub(super) fn take(bytes: &[u8]) -> Option<(Record, usize)> {
    let mut fields = In(bytes);
    let length = usize::try_from(u32::from_le_bytes(fields.array().ok()?)).ok()?;
    let sum = u32::from_le_bytes(fields.array().ok()?);
    let body = fields.0.get(..length).filter(|_| length <= LONGEST)?;
    if crc32c::crc32c(body) != sum {
        return None;
    }
    let mut fields = In(body);
    let record = fields.record().ok()?;
    fields.0.is_empty().then_some((record, FRAME + length))
}
