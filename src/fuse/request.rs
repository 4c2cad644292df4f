//! What the kernel asks: requests as they come from the device.

use super::abi::{IN_HEADER, opcode};
use super::wire::{Fields, Malformed};

/// What all requests begin with (`struct fuse_in_header`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which request this is; the answer names it. Requests that are sent once more have the highest bit set.
    pub unique: u64,
    /// The node that it is about.
    pub node: u64,
    /// The thread that waits for the answer, as our process sees it; 0 when there is none, or it cannot be seen from here.
    pub pid: u32,
    /// `enum fuse_opcode`.
    pub(super) opcode: u32,
}

/// A message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message<'a> {
    /// Something that a read-only file system does.
    Ask(Operation<'a>),
    /// Something that would change something.
    Change,
    /// Something else that a file system need not do.
    Other,
    /// The kernel forgets nodes; nobody waits for an answer.
    Forget(Forgets<'a>),
    /// A signal came for whoever waits for another request.
    Interrupt { unique: u64 },
    /// The kernel introduces itself.
    Init(Init),
    /// The mount is gone.
    Destroy,
    /// An answer to a question of ours; we have none.
    Unasked,
}

/// What is asked of a read-only file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// What a name in a directory means.
    Lookup {
        /// The name.
        name: &'a [u8],
    },
    /// stat(2).
    GetAttr,
    /// The target of a symbolic link.
    ReadLink,
    /// open(2).
    Open {
        /// Its flags (`O_…`), without those that only creation needs.
        flags: u32,
    },
    /// Bytes of an open file.
    Read {
        /// What the answer to `Open` said.
        handle: u64,
        /// The first byte.
        offset: u64,
        /// How many bytes; fewer are an answer only at the end of the file.
        size: u32,
    },
    /// statfs(2).
    StatFs,
    /// The last descriptor and mapping of an open are gone.
    Release {
        /// What the answer to `Open` said.
        handle: u64,
    },
    /// One extended attribute.
    GetXattr {
        /// Its name.
        name: &'a [u8],
        /// Room for it; 0 asks for its size.
        size: u32,
    },
    /// The names of all extended attributes.
    ListXattr {
        /// Room for them; 0 asks for their size.
        size: u32,
    },
    /// opendir(3).
    OpenDir,
    /// Entries of an open directory.
    ReadDir {
        /// What the answer to `OpenDir` said.
        handle: u64,
        /// The cookie of the last entry that it has, 0 at the start.
        offset: u64,
        /// Room for them.
        size: u32,
        /// Whether each is looked up as well.
        plus: bool,
    },
    /// An open directory is closed.
    ReleaseDir {
        /// What the answer to `OpenDir` said.
        handle: u64,
    },
}

/// `struct fuse_init_in`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    /// The kernel's major version.
    pub major: u32,
    /// The kernel's minor version.
    pub minor: u32,
    /// The largest readahead that it does, in bytes.
    pub max_readahead: u32,
    /// What it can do.
    pub flags: u64,
}

/// Nodes, and how often the kernel forgets that it was told of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgets<'a> {
    /// One node.
    One {
        /// The node.
        node: u64,
        /// How often.
        count: u64,
    },
    /// Pairs of node and count as they came.
    Many(&'a [u8]),
}

impl<'a> Forgets<'a> {
    /// Pairs of node and count.
    pub fn iter(self) -> impl Iterator<Item = (u64, u64)> + 'a {
        let (one, many) = match self {
            Self::One { node, count } => (Some((node, count)), &[][..]),
            Self::Many(pairs) => (None, pairs),
        };
        let pair = |bytes: &[u8]| {
            let mut fields = Fields::new(bytes);
            Some((fields.u64().ok()?, fields.u64().ok()?))
        };
        one.into_iter()
            .chain(many.chunks_exact(16).filter_map(pair))
    }
}

impl Header {
    /// `FUSE_UNIQUE_RESEND`: the bit of [`unique`](Self::unique) that tells a request which is sent once more.
    pub(super) const RESENT: u64 = 1 << 63;

    /// Splits a message into its header and the rest.
    ///
    /// # Errors
    /// When it is shorter than a header, or than it says itself.
    pub fn parse(message: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut fields = Fields::new(message);
        let length = usize::try_from(fields.u32()?).map_err(|_| Malformed)?;
        let opcode = fields.u32()?;
        let unique = fields.u64()?;
        let node = fields.u64()?;
        fields.skip::<8>()?; // uid, gid: the kernel checks permissions itself
        let pid = fields.u32()?;
        let header = Self {
            unique,
            node,
            pid,
            opcode,
        };
        let body = message.get(IN_HEADER..length).ok_or(Malformed)?;
        Ok((header, body))
    }

    /// What is asked, from the part of the message behind the header.
    ///
    /// # Errors
    /// When it is not what its kind of request must look like.
    pub(super) fn message<'a>(&self, body: &'a [u8]) -> Result<Message<'a>, Malformed> {
        let mut fields = Fields::new(body);
        Ok(match self.opcode {
            opcode::FORGET => Message::Forget(Forgets::One {
                node: self.node,
                count: fields.u64()?,
            }),
            opcode::BATCH_FORGET => {
                let count = usize::try_from(fields.u32()?).map_err(|_| Malformed)?;
                fields.skip::<4>()?;
                let length = count.checked_mul(16).ok_or(Malformed)?;
                Message::Forget(Forgets::Many(fields.rest().get(..length).ok_or(Malformed)?))
            }
            opcode::INTERRUPT => Message::Interrupt {
                unique: fields.u64()?,
            },
            opcode::INIT => Message::Init(Init::parse(fields)?),
            opcode::DESTROY => Message::Destroy,
            opcode::NOTIFY_REPLY => Message::Unasked,
            opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::TMPFILE
            | opcode::FALLOCATE => Message::Change,
            _ => match self.operation(fields)? {
                Some(operation) => Message::Ask(operation),
                None => Message::Other,
            },
        })
    }

    fn operation<'a>(&self, mut fields: Fields<'a>) -> Result<Option<Operation<'a>>, Malformed> {
        Ok(Some(match self.opcode {
            opcode::LOOKUP => Operation::Lookup {
                name: fields.name()?,
            },
            opcode::GETATTR => Operation::GetAttr,
            opcode::READLINK => Operation::ReadLink,
            opcode::OPEN => Operation::Open {
                flags: fields.u32()?,
            },
            opcode::READ => Operation::Read {
                handle: fields.u64()?,
                offset: fields.u64()?,
                size: fields.u32()?,
            },
            opcode::STATFS => Operation::StatFs,
            opcode::RELEASE => Operation::Release {
                handle: fields.u64()?,
            },
            opcode::GETXATTR => {
                let size = fields.u32()?;
                fields.skip::<4>()?;
                let name = fields.name()?;
                Operation::GetXattr { name, size }
            }
            opcode::LISTXATTR => Operation::ListXattr {
                size: fields.u32()?,
            },
            opcode::OPENDIR => Operation::OpenDir,
            opcode::READDIR | opcode::READDIRPLUS => Operation::ReadDir {
                handle: fields.u64()?,
                offset: fields.u64()?,
                size: fields.u32()?,
                plus: self.opcode == opcode::READDIRPLUS,
            },
            opcode::RELEASEDIR => Operation::ReleaseDir {
                handle: fields.u64()?,
            },
            _ => return Ok(None),
        }))
    }
}

impl Init {
    fn parse(mut fields: Fields<'_>) -> Result<Self, Malformed> {
        let (major, minor) = (fields.u32()?, fields.u32()?);
        let (max_readahead, low) = (fields.u32()?, fields.u32()?);
        // Kernels before 7.36 end here.
        let high = match u64::from(low) & super::abi::init::INIT_EXT {
            0 => 0,
            _ => fields.u32()?,
        };
        Ok(Self {
            major,
            minor,
            max_readahead,
            flags: u64::from(high) << 32 | u64::from(low),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A request as `struct fuse_in_header` and what follows it in fuse.h, written out byte by byte.
    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(40 + body.len()).unwrap().to_ne_bytes()); // len
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend(0x0102_0304_0506_0708_u64.to_ne_bytes()); // unique
        bytes.extend(42_u64.to_ne_bytes()); // nodeid
        bytes.extend(1000_u32.to_ne_bytes()); // uid
        bytes.extend(1001_u32.to_ne_bytes()); // gid
        bytes.extend(1234_u32.to_ne_bytes()); // pid
        bytes.extend([0; 4]); // total_extlen, padding
        bytes.extend(body);
        bytes
    }

    fn check(opcode: u32, body: &[u8], expected: Message<'_>) {
        let bytes = message(opcode, body);
        let (header, rest) = Header::parse(&bytes).unwrap();
        assert_eq!(
            (header.unique, header.node, header.pid),
            (0x0102_0304_0506_0708, 42, 1234)
        );
        assert_eq!(header.message(rest).unwrap(), expected, "{opcode}");
        // Cut anywhere, it is refused or something else, never a panic.
        for length in 0..bytes.len() {
            assert!(Header::parse(&bytes[..length]).is_err());
        }
    }

    fn numbers(wide: &[u64], narrow: &[u32]) -> Vec<u8> {
        let wide = wide.iter().flat_map(|number| number.to_ne_bytes());
        wide.chain(narrow.iter().flat_map(|number| number.to_ne_bytes()))
            .collect()
    }

    #[test]
    fn requests_as_the_kernel_writes_them() {
        check(
            1,
            b"config.json\0",
            Message::Ask(Operation::Lookup {
                name: b"config.json",
            }),
        );
        let one = Forgets::One { node: 42, count: 3 };
        check(2, &numbers(&[3], &[]), Message::Forget(one));
        check(3, &[0; 16], Message::Ask(Operation::GetAttr));
        check(5, b"", Message::Ask(Operation::ReadLink));
        check(
            14,
            &numbers(&[], &[0o100_000, 0]),
            Message::Ask(Operation::Open { flags: 0o100_000 }),
        );
        // fh, offset, size, read_flags, lock_owner, flags, padding
        let mut read = numbers(&[7, 1 << 33], &[1 << 20, 0]);
        read.extend([0; 16]);
        let (handle, offset, size) = (7, 1 << 33, 1 << 20);
        check(
            15,
            &read,
            Message::Ask(Operation::Read {
                handle,
                offset,
                size,
            }),
        );
        check(
            28,
            &read,
            Message::Ask(Operation::ReadDir {
                handle,
                offset,
                size,
                plus: false,
            }),
        );
        check(
            44,
            &read,
            Message::Ask(Operation::ReadDir {
                handle,
                offset,
                size,
                plus: true,
            }),
        );
        check(17, b"", Message::Ask(Operation::StatFs));
        let release = numbers(&[7, 0, 0], &[]);
        check(18, &release, Message::Ask(Operation::Release { handle: 7 }));
        check(
            29,
            &release,
            Message::Ask(Operation::ReleaseDir { handle: 7 }),
        );
        let mut xattr = numbers(&[], &[255, 0]);
        check(23, &xattr, Message::Ask(Operation::ListXattr { size: 255 }));
        xattr.extend(b"user.oci.digest\0");
        let name = b"user.oci.digest";
        check(
            22,
            &xattr,
            Message::Ask(Operation::GetXattr { name, size: 255 }),
        );
        check(27, &[0; 8], Message::Ask(Operation::OpenDir));
        check(36, &numbers(&[99], &[]), Message::Interrupt { unique: 99 });
        check(38, b"", Message::Destroy);
        for changing in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 51] {
            check(changing, &[0; 64], Message::Change);
        }
        // FSYNC, FLUSH, ACCESS, BMAP, IOCTL, POLL, LSEEK, COPY_FILE_RANGE, SYNCFS, STATX, and what nobody knows.
        for other in [20, 25, 34, 37, 39, 40, 46, 47, 50, 52, 77, 4096] {
            check(other, &[0; 64], Message::Other);
        }
    }

    #[test]
    fn many_nodes_are_forgotten_at_once() {
        let mut body = numbers(&[], &[2, 0]);
        body.extend(numbers(&[5, 1, 6, 2], &[]));
        let bytes = message(42, &body);
        let (header, rest) = Header::parse(&bytes).unwrap();
        let Ok(Message::Forget(forgets)) = header.message(rest) else {
            panic!("{:?}", header.message(rest));
        };
        assert_eq!(forgets.iter().collect::<Vec<_>>(), [(5, 1), (6, 2)]);
        body[0..4].copy_from_slice(&3_u32.to_ne_bytes());
        assert_eq!(header.message(&body), Err(Malformed), "more than came");
        body[0..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(header.message(&body), Err(Malformed));
    }

    #[test]
    fn init_has_a_second_word_of_flags_where_it_says_so() {
        let old = numbers(&[], &[7, 31, 131_072, 0x0003_ffff]);
        let init = Init {
            major: 7,
            minor: 31,
            max_readahead: 131_072,
            flags: 0x0003_ffff,
        };
        check(26, &old, Message::Init(init));
        let mut new = numbers(&[], &[7, 45, 131_072, 0x7fff_ffff, 0x0000_07ff]);
        new.extend([0; 44]);
        let init = Init {
            major: 7,
            minor: 45,
            max_readahead: 131_072,
            flags: 0x0000_07ff_7fff_ffff,
        };
        check(26, &new, Message::Init(init));
        let bytes = message(26, &new[..16]);
        let (header, rest) = Header::parse(&bytes).unwrap();
        assert_eq!(header.message(rest), Err(Malformed));
    }

    #[test]
    fn names_end_with_a_zero_and_are_not_empty() {
        for body in [&b""[..], b"\0", b"abc"] {
            let bytes = message(1, body);
            let (header, rest) = Header::parse(&bytes).unwrap();
            assert_eq!(header.message(rest), Err(Malformed), "{body:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn no_message_panics(
            opcode in prop_oneof![0_u32..60, any::<u32>()],
            body in prop::collection::vec(any::<u8>(), 0..200),
            cut in 0_usize..240,
            length in any::<Option<u32>>(),
        ) {
            let mut bytes = message(opcode, &body);
            if let Some(length) = length {
                bytes[..4].copy_from_slice(&length.to_ne_bytes());
            }
            bytes.truncate(bytes.len().min(cut.max(1)));
            if let Ok((header, rest)) = Header::parse(&bytes)
                && let Ok(Message::Forget(forgets)) = header.message(rest)
            {
                prop_assert!(forgets.iter().count() <= rest.len());
            }
            let raw = Header::parse(&body);
            if let Ok((header, rest)) = raw {
                let _ = header.message(rest);
            }
        }
    }
}
