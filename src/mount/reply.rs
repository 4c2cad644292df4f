//! The tree's answers in the protocol's terms.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, SystemTime};

use super::errno::{BUFFER_TOO_SMALL, errno};
use crate::base::Chain;
use crate::fuse::{self, Payload, Reply, open};
use crate::tree::{Attr, Data, DirEntry, Entry, Kind, Mapped, NodeId, Opened, Tree, TreeError};

/// The type in a mode.
pub(super) fn type_bits(kind: Kind) -> u32 {
    match kind {
        Kind::Directory => libc::S_IFDIR,
        Kind::File => libc::S_IFREG,
        Kind::Link => libc::S_IFLNK,
    }
}

pub(super) fn file_attr(attr: &Attr) -> fuse::Attr {
    fuse::Attr {
        ino: attr.ino.0,
        size: attr.size,
        blocks: attr.blocks,
        time: attr.time,
        mode: type_bits(attr.kind) | u32::from(attr.mode()),
        links: Attr::LINKS,
        uid: attr.uid,
        gid: attr.gid,
        block_size: Attr::BLOCK_SIZE,
    }
}

pub(super) fn entry(entry: &Entry) -> fuse::Entry {
    fuse::Entry {
        node: entry.attr.ino.0,
        entry_ttl: entry.entry_ttl,
        attr_ttl: entry.attr_ttl,
        attr: file_attr(&entry.attr),
    }
}

/// An entry of a listing whose node is not told: its number and kind. The kernel reads nothing else of it, and looks the rest up
/// when somebody wants it.
pub(super) fn bare_entry(listed: &DirEntry) -> fuse::Entry {
    let attr = Attr {
        ino: listed.ino,
        kind: listed.kind,
        size: 0,
        blocks: 0,
        executable: false,
        time: SystemTime::UNIX_EPOCH,
        uid: 0,
        gid: 0,
        umask: 0,
    };
    fuse::Entry {
        node: 0,
        entry_ttl: Duration::ZERO,
        attr_ttl: Duration::ZERO,
        attr: file_attr(&attr),
    }
}

/// Answers a lookup in `parent`.
pub(super) fn reply_entry(
    reply: Reply,
    tree: &Tree,
    parent: NodeId,
    result: Result<Entry, TreeError>,
) {
    match result {
        Ok(found) => reply.entry(&entry(&found)),
        // Engines look for many files that most models lack.
        Err(error @ TreeError::NotFound { .. }) => match tree.missing_ttl(parent) {
            Some(ttl) => reply.missing(ttl),
            None => reply.error(errno(&error)),
        },
        Err(error) => reply.error(errno(&error)),
    }
}

impl Payload for Mapped {
    fn len(&self) -> usize {
        Self::len(self)
    }

    fn write_behind(&self, device: BorrowedFd<'_>, header: &[u8]) -> io::Result<usize> {
        Self::write_behind(self, device, header)
    }
}

pub(super) fn reply_read(reply: Reply, node: NodeId, result: Result<Data, TreeError>) {
    match result {
        Ok(Data::Owned(bytes)) => reply.bytes(&bytes),
        Ok(Data::Pieces(pieces)) => reply.pieces(&pieces),
        Ok(Data::Mapped(mapped)) => reply.payload(&mapped),
        Err(error) => {
            tracing::error!(?node, reason = %Chain(&error), "a read failed");
            reply.error(errno(&error));
        }
    }
}

pub(super) fn reply_opendir(reply: Reply, tree: &Tree, result: Result<Opened, TreeError>) {
    match result {
        Ok(opened) => {
            tree.opened(opened.handle, reply.unique(), 0);
            reply.opened(&fuse::Opened {
                handle: opened.handle.0,
                flags: match opened.kept {
                    true => open::CACHE_DIR | open::KEEP_CACHE,
                    false => 0,
                },
                backing: 0,
            });
        }
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_xattr(reply: Reply, size: u32, value: &[u8]) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.xattr_size(length),
        Ok(length) if length <= size => reply.bytes(value),
        _ => reply.error(BUFFER_TOO_SMALL),
    }
}

/// The entries behind `offset` with the cookie of each: an entry's cookie is where the next call goes on.
pub(super) fn from_offset<T>(entries: &[T], offset: u64) -> impl Iterator<Item = (u64, &T)> {
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    entries
        .iter()
        .enumerate()
        .skip(skip)
        .map(|(index, entry)| (index as u64 + 1, entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_where_the_next_call_goes_on() {
        let entries = [".", "..", "config.json"];
        let from = |offset| {
            from_offset(&entries, offset)
                .map(|(cookie, name)| (cookie, *name))
                .collect::<Vec<_>>()
        };
        assert_eq!(from(0), [(1, "."), (2, ".."), (3, "config.json")]);
        assert_eq!(from(2), [(3, "config.json")]);
        assert_eq!(from(3), []);
        assert_eq!(from(u64::MAX), []);
    }
}
