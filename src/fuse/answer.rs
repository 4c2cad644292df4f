//! What answers consist of.

use std::time::{Duration, SystemTime};

use super::wire::Wire;

/// `struct fuse_attr`: what stat(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// `st_ino`.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    /// All three times; before 1970 is 1970.
    pub time: SystemTime,
    /// Type and permission bits.
    pub mode: u32,
    /// Names of the node.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// How many bytes are read at once with profit.
    pub block_size: u32,
}

/// `struct fuse_entry_out`: the answer to a lookup. The kernel holds the node from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The node's number; 0 says that there is nothing, or, in a listing, that nothing is told.
    pub node: u64,
    /// For how long the name means this node.
    pub entry_ttl: Duration,
    /// For how long the attributes hold.
    pub attr_ttl: Duration,
    /// The attributes.
    pub attr: Attr,
}

/// `struct fuse_open_out`: the answer to OPEN and OPENDIR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// What later requests on it name.
    pub handle: u64,
    /// Flags of [`super::open`].
    pub flags: u32,
    /// The file that the kernel reads in our place, with [`super::open::PASSTHROUGH`]; else 0.
    pub backing: i32,
}

/// `struct fuse_kstatfs`: the answer to STATFS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// The size of the file system, in units.
    pub blocks: u64,
    /// Free units.
    pub free: u64,
    /// Bytes in a unit.
    pub unit: u32,
    /// The longest name, in bytes.
    pub name_max: u32,
}

/// `sizeof(struct fuse_attr)`.
const ATTR: usize = 88;
/// `sizeof(struct fuse_entry_out)`.
const ENTRY: usize = 40 + ATTR;
/// `sizeof(struct fuse_dirent)`, the name left out.
const DIRENT: usize = 24;

impl Attr {
    fn put(&self, wire: &mut Wire) {
        let since = self
            .time
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let (seconds, nanos) = (since.as_secs(), since.subsec_nanos());
        wire.u64(self.ino).u64(self.size).u64(self.blocks);
        wire.u64(seconds).u64(seconds).u64(seconds);
        wire.u32(nanos).u32(nanos).u32(nanos);
        wire.u32(self.mode).u32(self.links);
        wire.u32(self.uid).u32(self.gid);
        wire.u32(0).u32(self.block_size).u32(0); // rdev, blksize, flags
    }

    /// `struct fuse_attr_out`.
    pub(super) fn answer(&self, ttl: Duration) -> Wire {
        let mut wire = Wire::with_capacity(16 + ATTR);
        wire.u64(ttl.as_secs()).u32(ttl.subsec_nanos()).u32(0);
        self.put(&mut wire);
        wire
    }
}

impl Entry {
    fn put(&self, wire: &mut Wire) {
        // Numbers of nodes are not used again for something else, so there is one generation.
        wire.u64(self.node).u64(0);
        wire.u64(self.entry_ttl.as_secs())
            .u64(self.attr_ttl.as_secs());
        wire.u32(self.entry_ttl.subsec_nanos())
            .u32(self.attr_ttl.subsec_nanos());
        self.attr.put(wire);
    }

    pub(super) fn answer(&self) -> Wire {
        let mut wire = Wire::with_capacity(ENTRY);
        self.put(&mut wire);
        wire
    }

    /// An entry without a node: ENOENT that holds for a while (`fuse_lookup_name` in fs/fuse/dir.c).
    pub(super) fn missing(ttl: Duration) -> Wire {
        let mut wire = Wire::with_capacity(ENTRY);
        wire.u64(0).u64(0).u64(ttl.as_secs()).u64(0);
        wire.u32(ttl.subsec_nanos()).u32(0).bytes(&[0; ATTR]);
        wire
    }
}

impl Opened {
    pub(super) fn answer(&self) -> Wire {
        let mut wire = Wire::with_capacity(16);
        wire.u64(self.handle).u32(self.flags).i32(self.backing);
        wire
    }
}

impl StatFs {
    pub(super) fn answer(&self) -> Wire {
        let mut wire = Wire::with_capacity(80);
        wire.u64(self.blocks).u64(self.free).u64(self.free);
        wire.u64(0).u64(0); // files, ffree: not known
        wire.u32(self.unit).u32(self.name_max).u32(self.unit);
        wire.bytes(&[0; 28]);
        wire
    }
}

/// Entries of a directory, as many as the asker has room for.
#[derive(Debug)]
pub struct Listing {
    wire: Wire,
    room: usize,
}

impl Listing {
    /// An empty one for an asker with room for `size` bytes.
    pub fn new(size: u32) -> Self {
        let room = usize::try_from(size).unwrap_or(usize::MAX);
        Self {
            // The kernel asks for what the caller of getdents(2) has room for, at most 1 MiB.
            wire: Wire::with_capacity(room.min(1 << 20)),
            room,
        }
    }

    /// Adds an entry (`struct fuse_dirent`); whether there was room. `cookie` is where the next call goes on.
    ///
    /// `mode` gives the kind; its permission bits are not looked at.
    #[must_use]
    pub fn add(&mut self, ino: u64, cookie: u64, mode: u32, name: &str) -> bool {
        self.put(None, ino, cookie, mode, name)
    }

    /// Adds an entry that is looked up as well (`struct fuse_direntplus`); whether there was room, and only then the kernel
    /// holds the node. [`Entry::node`] may be 0: then it takes the name and kind alone.
    #[must_use]
    pub fn add_plus(&mut self, entry: &Entry, cookie: u64, name: &str) -> bool {
        self.put(Some(entry), entry.attr.ino, cookie, entry.attr.mode, name)
    }

    fn put(&mut self, entry: Option<&Entry>, ino: u64, cookie: u64, mode: u32, name: &str) -> bool {
        let before = self.wire.len();
        let length = entry.map_or(0, |_| ENTRY) + (DIRENT + name.len()).next_multiple_of(8);
        let Ok(name_length) = u32::try_from(name.len()) else {
            return false;
        };
        if before + length > self.room {
            return false;
        }
        if let Some(entry) = entry {
            entry.put(&mut self.wire);
        }
        self.wire
            .u64(ino)
            .u64(cookie)
            .u32(name_length)
            // `DT_…` is the type's bits of the mode (`S_DT` in include/linux/fs_types.h).
            .u32((mode & libc::S_IFMT) >> 12)
            .bytes(name.as_bytes())
            .align();
        debug_assert_eq!(self.wire.len(), before + length);
        true
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.wire.as_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr() -> Attr {
        Attr {
            ino: 5,
            size: 6,
            blocks: 7,
            time: SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 9),
            mode: 0o100_444,
            links: 1,
            uid: 1000,
            gid: 1001,
            block_size: 4096,
        }
    }

    fn words(bytes: &[u8]) -> Vec<u32> {
        let words = bytes.chunks_exact(4);
        words
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect()
    }

    /// `struct fuse_attr` as words of a little-endian machine.
    fn attr_words() -> Vec<u32> {
        let times = [
            1_700_000_000,
            0,
            1_700_000_000,
            0,
            1_700_000_000,
            0,
            9,
            9,
            9,
        ];
        let mut words = vec![5, 0, 6, 0, 7, 0];
        words.extend(times);
        words.extend([0o100_444, 1, 1000, 1001, 0, 4096, 0]);
        words
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn answers_are_laid_out_as_in_fuse_h() {
        let answer = attr().answer(Duration::new(3, 4));
        let mut expected = vec![3, 0, 4, 0];
        expected.extend(attr_words());
        assert_eq!(words(answer.as_slice()), expected);
        assert_eq!(answer.as_slice().len(), 104);

        let entry = Entry {
            node: 50,
            entry_ttl: Duration::new(1, 2),
            attr_ttl: Duration::new(3, 4),
            attr: attr(),
        };
        let mut expected = vec![50, 0, 0, 0, 1, 0, 3, 0, 2, 4];
        expected.extend(attr_words());
        assert_eq!(words(entry.answer().as_slice()), expected);
        assert_eq!(entry.answer().as_slice().len(), 128);

        let opened = Opened {
            handle: 9,
            flags: 0xa2,
            backing: 3,
        };
        assert_eq!(words(opened.answer().as_slice()), [9, 0, 0xa2, 3]);
        let statfs = StatFs {
            blocks: 100,
            free: 50,
            unit: 4096,
            name_max: 255,
        };
        let bytes = words(statfs.answer().as_slice());
        assert_eq!(
            bytes[..13],
            [100, 0, 50, 0, 50, 0, 0, 0, 0, 0, 4096, 255, 4096]
        );
        assert_eq!(bytes.len(), 20);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn listings_end_where_the_room_ends() {
        let mut listing = Listing::new(24 + 8 + 24 + 16 + 31);
        assert!(listing.add(5, 1, 0o040_555, "a"));
        assert!(listing.add(6, 2, 0o100_444, "config.json"));
        assert!(!listing.add(7, 3, 0o120_777, "b"), "a byte is missing");
        let expected = [5, 0, 1, 0, 1, 4, 0x61, 0, 6, 0, 2, 0, 11, 8];
        assert_eq!(words(listing.as_slice())[..14], expected);
        assert_eq!(&listing.as_slice()[56..], b"config.json\0\0\0\0\0");

        let entry = Entry {
            node: 5,
            entry_ttl: Duration::ZERO,
            attr_ttl: Duration::ZERO,
            attr: attr(),
        };
        let mut listing = Listing::new(128 + 24 + 8);
        assert!(listing.add_plus(&entry, 1, "12345678"));
        assert!(!listing.add_plus(&entry, 2, "x"));
        assert_eq!(listing.as_slice()[..128], *entry.answer().as_slice());
        assert_eq!(words(&listing.as_slice()[128..152]), [5, 0, 1, 0, 8, 8]);
        assert_eq!(&listing.as_slice()[152..], b"12345678");
    }
}
