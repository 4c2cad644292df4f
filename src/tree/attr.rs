//! Attributes, plain and extended: pure functions of a file or directory.

use std::time::SystemTime;

use super::node::NodeId;
use crate::model::File;

/// Unit of `st_blocks` (POSIX leaves it open, Linux has always had 512).
const BLOCK: u64 = 512;

/// What kind of file a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

impl Kind {
    /// Its permission bits: everybody may read, nobody may write.
    pub fn mode(self) -> u16 {
        match self {
            Self::Directory => 0o555,
            Self::File => 0o444,
            Self::Link => 0o777,
        }
    }
}

/// What stat(2) tells of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Its number.
    pub ino: NodeId,
    /// Its kind.
    pub kind: Kind,
    /// Size in bytes; 0 for directories.
    pub size: u64,
    /// What of it is local, in units of 512 bytes.
    pub blocks: u64,
    /// Whether it is a file that may be executed.
    pub executable: bool,
    /// When the file was changed, else when the artifact was created, else when the tree was made.
    pub time: SystemTime,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits that it does not have.
    pub umask: u16,
}

impl Attr {
    /// Permission bits: its kind's, and a program may be run by whoever may read it. The mask holds for everything but links, whose
    /// bits nobody looks at.
    pub fn mode(&self) -> u16 {
        let mode = self.kind.mode() | if self.executable { 0o111 } else { 0 };
        match self.kind {
            Kind::Link => mode,
            Kind::Directory | Kind::File => mode & !self.umask,
        }
    }

    /// `st_blksize`: how much stdio and Python's buffered readers ask for at once. 128 KiB is the kernel's readahead
    /// window and what coreutils use anyway; more would only make every reader of a small file allocate it.
    pub const BLOCK_SIZE: u32 = 128 << 10;

    /// `st_nlink`, of directories too: 1 tells find(1) that links are not counted here, so that it looks at every entry
    /// rather than trusting the number of sub-directories, which nobody can know.
    pub const LINKS: u32 = 1;
}

/// How much the cache may hold, and how much of it is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Space {
    /// The limit, in bytes.
    pub limit: u64,
    /// Free below the limit, in bytes.
    pub free: u64,
}

/// `st_blocks`: what is local, and at least one for a file with bytes, because a tool may take none for a hole.
pub(super) fn blocks(size: u64, cached: u64) -> u64 {
    match size {
        0 => 0,
        _ => cached.min(size).div_ceil(BLOCK).max(1),
    }
}

/// Extended attributes of a file, in the order in which they are listed.
pub(super) fn of_file(file: &File) -> Vec<(&'static str, String)> {
    let mut attributes = Vec::with_capacity(4);
    if let Some(digest) = &file.digest {
        attributes.push(("user.oci.digest", digest.to_string()));
    }
    if let Some(media_type) = &file.media_type {
        attributes.push(("user.oci.mediatype", media_type.clone()));
    }
    attributes.push(("user.ocifs.cached", file.cached().to_string()));
    attributes.push(("user.ocifs.verified", file.is_verified().to_string()));
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_takes_bits_away_from_files_and_directories() {
        let mode = |kind, executable, umask| {
            let attr = Attr {
                ino: NodeId(7),
                kind,
                size: 0,
                blocks: 0,
                executable,
                time: SystemTime::UNIX_EPOCH,
                uid: 0,
                gid: 0,
                umask,
            };
            attr.mode()
        };
        assert_eq!(mode(Kind::Directory, false, 0), 0o555);
        assert_eq!(mode(Kind::Directory, false, 0o027), 0o550);
        assert_eq!(mode(Kind::File, false, 0o027), 0o440);
        assert_eq!(mode(Kind::File, true, 0o077), 0o500);
        assert_eq!(mode(Kind::Link, false, 0o777), 0o777);
    }

    #[test]
    fn blocks_tell_what_is_local_and_never_claim_a_hole() {
        for (size, cached, expected) in [
            (0, 0, 0),
            (1, 0, 1),
            (1, 1, 1),
            (512, 512, 1),
            (513, 513, 2),
            (1 << 30, 0, 1),
            (1 << 30, 1 << 20, 2048),
            (10, 99, 1),
        ] {
            assert_eq!(blocks(size, cached), expected, "{size} {cached}");
        }
    }
}
