//! The tree's answers in the protocol's terms.

use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyData, ReplyEntry,
    ReplyOpen, ReplyXattr,
};

use super::errno::{BUFFER_TOO_SMALL, errno};
use crate::tree::{Attr, DirEntry, Entry, Kind, NodeId, Opened, TreeError};

/// Node ids are not used again for something else, so there is one generation.
pub(super) const GENERATION: Generation = Generation(0);

pub(super) fn node(ino: INodeNo) -> NodeId {
    NodeId(ino.0)
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.time,
        mtime: attr.time,
        ctime: attr.time,
        crtime: attr.time,
        kind: file_type(attr.kind),
        perm: attr.kind.mode(),
        nlink: Attr::LINKS,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: Attr::BLOCK_SIZE,
        flags: 0,
    }
}

pub(super) fn reply_entry(reply: ReplyEntry, result: Result<Entry, TreeError>) {
    match result {
        Ok(entry) => reply.entry_with_ttls(
            &entry.attr_ttl,
            &entry.entry_ttl,
            &file_attr(&entry.attr),
            GENERATION,
        ),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_read(reply: ReplyData, result: Result<Bytes, TreeError>) {
    match result {
        Ok(bytes) => reply.data(&bytes),
        Err(error) => {
            tracing::error!(reason = error.chain(), "a read failed");
            reply.error(errno(&error));
        }
    }
}

pub(super) fn reply_opendir(reply: ReplyOpen, result: Result<Opened, TreeError>) {
    match result {
        Ok(opened) => {
            let flags = if opened.immutable {
                FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE
            } else {
                FopenFlags::empty()
            };
            reply.opened(FileHandle(opened.handle.0), flags);
        }
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_xattr(reply: ReplyXattr, size: u32, value: &[u8]) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(value),
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

/// What an entry without a node tells: its number and kind. The kernel reads nothing else of it.
pub(super) fn bare_attr(entry: &DirEntry) -> FileAttr {
    file_attr(&Attr {
        ino: entry.ino,
        kind: entry.kind,
        size: 0,
        blocks: 0,
        time: SystemTime::UNIX_EPOCH,
        uid: 0,
        gid: 0,
    })
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
