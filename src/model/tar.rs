//! The members of an uncompressed tar and where their bytes lie, found from its headers alone.
//!
//! Nothing is unpacked: a member becomes an offset into the tar. The walk is a function of bytes: it is handed
//! windows of the tar and says which window it needs next, so that neither a header of 8 GiB nor a slow registry is a
//! special case. Single headers are read by the `tar` crate (ustar, pax and GNU names).

use std::cell::Cell;
use std::io::{self, Read};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tar::{Archive, EntryType};

use crate::base::ByteRange;

use super::chunked::Chunk;
use super::inflate::Compression;
use super::names::{self, MemberName};
use super::notes::{Notes, quote};
use super::stamp::Stamp;

/// Most entries of any type.
const MOST_ENTRIES: usize = 100_000;
/// Most bytes of all names together.
const MOST_NAME_BYTES: usize = 16 << 20;
/// Most bytes of one member's headers: its own, and those that hold its long names.
const LONGEST_HEADERS: u64 = 1 << 20;
/// Notes about what was left out.
const MOST_NOTES: usize = 20;
/// The unit of a tar.
const BLOCK: u64 = 512;

/// One file, link or directory in a tar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Member {
    /// Its sanitised path.
    pub(super) path: String,
    /// Where its bytes begin in the tar.
    pub(super) offset: u64,
    /// How many there are.
    pub(super) size: u64,
    /// What it is.
    pub(super) item: Item,
    /// What its header tells of it.
    #[serde(default, skip_serializing_if = "Stamp::is_empty")]
    pub(super) stamp: Stamp,
}

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Item {
    /// A regular file, in one piece.
    File,
    /// A regular file in pieces that are compressed by themselves.
    Chunked(Arc<[Chunk]>),
    /// A directory.
    Directory,
    /// A symbolic link to what it says, which nobody has checked.
    Symlink(String),
    /// Another name of the file at this sanitised path.
    HardLink(String),
}

/// What a tar holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listing {
    /// How its bytes are had.
    pub(super) form: Form,
    /// The members in the order of the tar; a path may occur again, and then the later one counts.
    pub(super) members: Vec<Member>,
    /// What was left out, and why.
    pub(super) notes: Vec<String>,
    /// How many entries of all types were looked at.
    pub(super) entries: usize,
}

/// The form of a remembered listing: JSON in one zstd frame. Another version's is none.
const NOTE_VERSION: u32 = 2;
/// The largest listing that is read back, uncompressed.
const LARGEST_NOTE: u64 = 512 << 20;

impl Listing {
    /// As it is remembered.
    pub(super) fn to_note(&self) -> Option<Vec<u8>> {
        let json = serde_json::to_vec(&(NOTE_VERSION, self)).ok()?;
        zstd::encode_all(&json[..], 1).ok()
    }

    /// As it was remembered.
    pub(super) fn from_note(note: &[u8]) -> Option<Self> {
        let json = super::inflate::whole(Compression::Zstd, note, LARGEST_NOTE).ok()?;
        let (version, listing) = serde_json::from_slice::<(u32, Self)>(&json).ok()?;
        (version == NOTE_VERSION).then_some(listing)
    }
}

/// How the bytes of a tar's members are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Form {
    /// The layer is the tar.
    Plain,
    /// The layer is the tar, compressed: members are offsets into its uncompressed form.
    Compressed,
    /// The layer has a table of contents: members are [`Item::Chunked`].
    Chunked,
}

/// Why a tar is refused as a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TarError {
    /// It is compressed.
    #[error("it is compressed with {}", .0.name())]
    Compressed(Compression),
    /// Its first block is no header of a tar.
    #[error("it is no tar")]
    NoTar,
    /// It is compressed, and what it holds cannot be had.
    #[error("{0}")]
    Undecodable(String),
    /// A header can't be understood.
    #[error("its header at byte {at} is damaged: {reason}")]
    Damaged {
        /// Where the header begins.
        at: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A member's bytes reach behind the tar's end.
    #[error("its member {name} claims bytes up to {end}, but the tar has {size}")]
    Lies {
        /// The member, quoted.
        name: String,
        /// The claimed end.
        end: u64,
        /// The tar's size.
        size: u64,
    },
    /// Too much of something.
    #[error("it has more than {0}")]
    TooLarge(&'static str),
}

/// A walk over the headers of one tar.
#[derive(Debug)]
pub(super) struct Walk {
    size: u64,
    /// Where the next entry's first header begins.
    at: u64,
    window: u64,
    entries: usize,
    name_bytes: usize,
    members: Vec<Member>,
    notes: Notes,
}

/// What one attempt to read an entry gives.
enum Attempt {
    /// An entry.
    Entry(Entry),
    /// The end mark.
    End,
    /// The window is too short to tell.
    Short,
}

/// One entry of whatever type.
struct Entry {
    name: Vec<u8>,
    offset: u64,
    size: u64,
    /// Where the entry after it begins.
    next: u64,
    kind: Kind,
    stamp: Stamp,
}

/// What becomes of an entry.
enum Kind {
    File,
    Directory,
    /// The target as it stands there.
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    /// Nothing to show and nothing to say: a global header.
    Silent,
    /// Left out, with the reason.
    LeftOut(&'static str),
}

impl Kind {
    /// What a link says.
    fn target(&self) -> &[u8] {
        match self {
            Self::Symlink(target) | Self::HardLink(target) => target,
            _ => &[],
        }
    }
}

impl Walk {
    /// A walk over a tar of `size` bytes by windows of `window` bytes, larger ones where headers lie close together.
    pub(super) fn new(size: u64, window: u64) -> Self {
        let window = window.clamp(BLOCK, LONGEST_HEADERS);
        Self {
            size,
            at: 0,
            window,
            entries: 0,
            name_bytes: 0,
            members: Vec::new(),
            notes: Notes::new(MOST_NOTES),
        }
    }

    /// The first window that is needed; `None` for an empty tar.
    pub(super) fn begin(&self) -> Option<ByteRange> {
        (self.size > 0).then(|| ByteRange::new(0, self.window.min(self.size)))
    }

    /// Goes on with `bytes`, which begin at `start` in the tar; gives the window that is needed next, `None` at the end.
    pub(super) fn advance(
        &mut self,
        start: u64,
        bytes: &[u8],
    ) -> Result<Option<ByteRange>, TarError> {
        let window_end = start.saturating_add(bytes.len() as u64);
        let is_last = window_end >= self.size;
        while self.at < self.size {
            let inside = self
                .at
                .checked_sub(start)
                .and_then(|at| usize::try_from(at).ok());
            let here = inside.and_then(|at| bytes.get(at..)).unwrap_or_default();
            if here.is_empty() {
                return Ok(Some(self.window_at(window_end, 0)));
            }
            match attempt(here, self.at, is_last)? {
                Attempt::End => break,
                Attempt::Short if here.len() as u64 >= LONGEST_HEADERS => {
                    return Err(TarError::TooLarge("1 MiB of headers for one member"));
                }
                Attempt::Short => return Ok(Some(self.window_at(window_end, here.len() as u64))),
                Attempt::Entry(entry) => self.take(entry)?,
            }
        }
        Ok(None)
    }

    /// Where the next entry would begin, if all that was found is one file with bytes (and directories).
    pub(super) fn only_file(&self) -> Option<u64> {
        let mut files = self
            .members
            .iter()
            .filter(|member| member.item != Item::Directory);
        let only = files.next()?;
        let is_one = only.item == Item::File && only.size > 0 && files.next().is_none();
        is_one.then_some(self.at)
    }

    /// What was found.
    pub(super) fn finish(self) -> Listing {
        Listing {
            form: Form::Plain,
            members: self.members,
            notes: self.notes.into_lines(),
            entries: self.entries,
        }
    }

    /// The window at the present entry, when the last ended at `last_end` and `have` bytes of the entry are not enough.
    fn window_at(&mut self, last_end: u64, have: u64) -> ByteRange {
        if self.at < last_end.saturating_add(self.window) {
            self.window = (self.window * 2).min(LONGEST_HEADERS);
        }
        let len = self.window.max(have.saturating_mul(2));
        ByteRange::new(self.at, self.at.saturating_add(len).min(self.size))
    }

    fn take(&mut self, entry: Entry) -> Result<(), TarError> {
        self.entries += 1;
        self.name_bytes += entry.name.len() + entry.kind.target().len();
        if self.entries > MOST_ENTRIES {
            return Err(TarError::TooLarge("100000 members"));
        }
        if self.name_bytes > MOST_NAME_BYTES {
            return Err(TarError::TooLarge("16 MiB of names"));
        }
        let quoted = || quote(&String::from_utf8_lossy(&entry.name));
        let end = entry.offset.saturating_add(entry.size);
        let mut member = |item: Item| match names::member(&entry.name) {
            Ok(MemberName::Directory) if item != Item::Directory => None,
            Ok(MemberName::Directory) => {
                let path = names::directory(&entry.name).ok()?;
                self.members.push(Member {
                    path,
                    offset: 0,
                    size: 0,
                    item,
                    stamp: Stamp::default(),
                });
                None
            }
            Ok(MemberName::Path(path)) => {
                let (offset, size) = match item {
                    Item::File => (entry.offset, entry.size),
                    _ => (0, 0),
                };
                self.members.push(Member {
                    path,
                    offset,
                    size,
                    item,
                    stamp: entry.stamp,
                });
                None
            }
            Err(why) => Some(why),
        };
        let left_out = match &entry.kind {
            Kind::Silent => None,
            Kind::LeftOut(why) => Some(*why),
            Kind::File if end > self.size => {
                return Err(TarError::Lies {
                    name: quoted(),
                    end,
                    size: self.size,
                });
            }
            Kind::File => member(Item::File),
            Kind::Directory => member(Item::Directory),
            Kind::Symlink(target) => match std::str::from_utf8(target) {
                Ok(target) if names::is_target(target) => member(Item::Symlink(target.to_owned())),
                _ => Some("it is a symbolic link to what cannot be a path"),
            },
            Kind::HardLink(target) => match names::member(target) {
                Ok(MemberName::Path(target)) => member(Item::HardLink(target)),
                _ => Some("it is a hard link to what cannot be a file"),
            },
        };
        if let Some(why) = left_out {
            self.notes.add(format!("left out {}: {why}", quoted()));
        }
        self.at = entry.next;
        Ok(())
    }
}

/// Reads one entry from the first bytes of `window`, which lie at `at` in the tar and reach its end if `is_last`.
fn attempt(window: &[u8], at: u64, is_last: bool) -> Result<Attempt, TarError> {
    if at == 0
        && let Some(format) = Compression::of(window)
    {
        return Err(TarError::Compressed(format));
    }
    let told = window.len() as u64 >= BLOCK || is_last;
    if at == 0 && told && window.iter().any(|byte| *byte != 0) && !is_header(window) {
        return Err(TarError::NoTar);
    }
    if is_last && (window.len() as u64) < BLOCK && window.iter().all(|byte| *byte == 0) {
        return Ok(Attempt::End);
    }
    let damaged = |error: io::Error| TarError::Damaged {
        at,
        reason: error.to_string(),
    };
    let short = Cell::new(false);
    let mut archive = Archive::new(Window {
        left: window,
        short: &short,
    });
    let outcome = archive.entries().map_err(damaged)?.next();
    if short.get() && !is_last {
        return Ok(Attempt::Short);
    }
    let Some(entry) = outcome else {
        return Ok(Attempt::End);
    };
    let mut entry = entry.map_err(damaged)?;
    let name = entry.path_bytes().into_owned();
    let file_position = entry.raw_file_position();
    let offset = at.saturating_add(file_position);
    let size = entry.size();
    // What lies between this entry's first header and the next entry's, beside the headers.
    let mut stored = size;
    let kind = match entry.header().entry_type() {
        EntryType::Regular | EntryType::Continuous if is_pax_sparse(&mut entry) => {
            Kind::LeftOut("it is a sparse file")
        }
        EntryType::Regular | EntryType::Continuous => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::XGlobalHeader => Kind::Silent,
        EntryType::Symlink => {
            Kind::Symlink(entry.link_name_bytes().unwrap_or_default().into_owned())
        }
        EntryType::Link => Kind::HardLink(entry.link_name_bytes().unwrap_or_default().into_owned()),
        EntryType::Char | EntryType::Block => Kind::LeftOut("it is a device"),
        EntryType::Fifo => Kind::LeftOut("it is a fifo"),
        EntryType::GNUSparse => {
            stored = entry.header().entry_size().map_err(damaged)?;
            stored = stored.saturating_add(sparse_map_size(window, file_position));
            Kind::LeftOut("it is a sparse file")
        }
        _ => Kind::LeftOut("its type is not known"),
    };
    let next = stored
        .checked_next_multiple_of(BLOCK)
        .and_then(|stored| offset.checked_add(stored));
    let next = next.ok_or_else(|| TarError::Damaged {
        at,
        reason: "its size overflows".into(),
    })?;
    let (mode, modified) = (entry.header().mode(), entry.header().mtime());
    let stamp = match kind {
        Kind::File => Stamp::new(modified.ok(), mode.unwrap_or(0)),
        _ => Stamp::default(),
    };
    Ok(Attempt::Entry(Entry {
        name,
        offset,
        size,
        next,
        kind,
        stamp,
    }))
}

/// Whether pax records say that the data is a sparse file's map and pieces (GNU tar manual, "Storing Sparse Files").
fn is_pax_sparse<R: Read>(entry: &mut tar::Entry<'_, R>) -> bool {
    let Ok(Some(records)) = entry.pax_extensions() else {
        return false;
    };
    records
        .flatten()
        .any(|record| record.key_bytes().starts_with(b"GNU.sparse."))
}

/// The bytes of the further map blocks that follow the header of a GNU sparse file; the tar crate has checked them.
fn sparse_map_size(window: &[u8], file_position: u64) -> u64 {
    // Offsets of `isextended` in the header and in a map block (GNU tar, tar.h).
    const IN_HEADER: usize = 482;
    const IN_MAP: usize = 504;
    let Ok(file_position) = usize::try_from(file_position) else {
        return 0;
    };
    let header = file_position.saturating_sub(BLOCK as usize);
    let mut flag = window.get(header + IN_HEADER);
    let mut blocks = 0;
    while flag.is_some_and(|flag| *flag != 0) {
        flag = window.get(file_position + blocks * BLOCK as usize + IN_MAP);
        blocks += 1;
    }
    blocks as u64 * BLOCK
}

/// Whether these bytes begin as a tar does: with a header whose checksum is right, or with the end mark.
pub(super) fn is_header(start: &[u8]) -> bool {
    // Where the checksum stands (POSIX.1-2017, pax, "ustar Interchange Format").
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let Some(block) = start.get(..BLOCK as usize) else {
        return false;
    };
    if block.iter().all(|byte| *byte == 0) {
        return true;
    }
    let digits: Vec<u8> = block[CHECKSUM]
        .iter()
        .copied()
        .filter(|byte| (b'0'..=b'7').contains(byte))
        .collect();
    let told = digits
        .iter()
        .fold(0_i64, |sum, digit| sum * 8 + i64::from(digit - b'0'));
    let counted = |at: usize, byte: u8| if CHECKSUM.contains(&at) { b' ' } else { byte };
    let bytes = || {
        block
            .iter()
            .enumerate()
            .map(|(at, byte)| counted(at, *byte))
    };
    let unsigned: i64 = bytes().map(i64::from).sum();
    // Some old tars summed signed bytes.
    let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
    !digits.is_empty() && (told == unsigned || told == signed)
}

/// A window as a reader that remembers whether more than it has was asked for.
struct Window<'a> {
    left: &'a [u8],
    short: &'a Cell<bool>,
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left.is_empty() && !buffer.is_empty() {
            self.short.set(true);
        }
        self.left.read(buffer)
    }
}

/// The whole walk over a tar in memory.
#[cfg(test)]
pub(super) fn list(tar: &[u8], window: u64) -> Result<(Listing, usize), TarError> {
    let mut walk = Walk::new(tar.len() as u64, window);
    let mut wanted = walk.begin();
    let mut windows = 0;
    while let Some(range) = wanted {
        windows += 1;
        wanted = walk.advance(
            range.start(),
            &tar[range.start() as usize..range.end() as usize],
        )?;
    }
    Ok((walk.finish(), windows))
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
