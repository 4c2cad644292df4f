//! The first exchange of a session: what kernel and daemon can do, and what is made of it.

use serde::{Deserialize, Serialize};

use super::abi::{self, init};
use super::request::Init;
use super::wire::Wire;

/// The largest READ, in pages: 1 MiB, which is also what the kernel cuts it to (`fs.fuse.max_pages_limit`). Larger ones fall out
/// of the processor's caches and are slower.
const MAX_PAGES: u16 = 256;

/// The largest WRITE, in bytes: the least that there is, because none comes. The kernel wants read buffers with room for it.
const MAX_WRITE: u32 = 4096;

/// Used where the kernel has it, done without where not.
///
/// Not `ASYNC_DIO`: it sends the pieces of a large O_DIRECT read at once, and then nothing can end the wait for them, not even
/// SIGKILL (`fuse_direct_IO` in fs/fuse/file.c).
const USEFUL: u64 = init::ASYNC_READ
    | init::PARALLEL_DIROPS
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::CACHE_SYMLINKS
    | init::MAX_PAGES
    | init::INIT_EXT
    | init::HAS_RESEND;

/// What a session asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// How deep file systems are stacked where the files are that the kernel shall read in our place, ours counted (1 or 2);
    /// 0 when it shall not.
    pub stack_depth: u32,
    /// Requests that the kernel may have under way in the background: readahead.
    pub max_background: u16,
}

/// What was agreed. A later process that takes the session over needs it, for the kernel introduces itself once only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// The protocol's minor version.
    minor: u32,
    /// What both sides do.
    flags: u64,
}

impl Negotiated {
    /// Whether the kernel reads other files in our place.
    pub fn passthrough(&self) -> bool {
        self.flags & init::PASSTHROUGH != 0
    }

    /// Whether the kernel sends requests once more that a dead process has read.
    pub fn resend(&self) -> bool {
        self.flags & init::HAS_RESEND != 0
    }
}

/// What to do about the kernel's introduction.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Its major version is above ours: it is told ours and introduces itself again.
    Again,
    /// It is too old.
    Refused,
    /// Agreed.
    Agreed(Negotiated),
}

pub(super) fn negotiate(kernel: &Init, wanted: Wanted) -> Step {
    if kernel.major > abi::MAJOR {
        return Step::Again;
    }
    if kernel.major < abi::MAJOR || kernel.minor < abi::MINOR_LEAST {
        return Step::Refused;
    }
    let mut flags = USEFUL;
    if wanted.stack_depth > 0 {
        flags |= init::PASSTHROUGH;
    }
    Step::Agreed(Negotiated {
        minor: kernel.minor.min(abi::MINOR),
        flags: flags & kernel.flags,
    })
}

/// `struct fuse_init_out`.
pub(super) fn answer(kernel: &Init, wanted: Wanted, agreed: &Negotiated) -> Wire {
    let mut wire = Wire::with_capacity(64);
    wire.u32(abi::MAJOR)
        .u32(agreed.minor)
        .u32(kernel.max_readahead)
        .u32(agreed.flags as u32)
        .u16(wanted.max_background)
        // At three quarters, as the kernel itself does it, the queue counts as congested.
        .u16(wanted.max_background / 4 * 3)
        .u32(MAX_WRITE)
        .u32(1) // time_gran, in nanoseconds
        .u16(MAX_PAGES)
        .u16(0) // map_alignment
        .u32((agreed.flags >> 32) as u32)
        .u32(match agreed.passthrough() {
            true => wanted.stack_depth,
            false => 0,
        })
        .bytes(&[0; 24]); // request_timeout (none), unused
    wire
}

/// The part of `struct fuse_init_out` that a kernel of a higher major version reads.
pub(super) fn version_only() -> Wire {
    let mut wire = Wire::with_capacity(8);
    wire.u32(abi::MAJOR).u32(abi::MINOR);
    wire
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        stack_depth: 2,
        max_background: 64,
    };

    fn kernel(major: u32, minor: u32, flags: u64) -> Init {
        Init {
            major,
            minor,
            max_readahead: 131_072,
            flags,
        }
    }

    #[test]
    fn the_lesser_of_both_is_agreed_on() {
        let new = kernel(7, 45, u64::MAX);
        let Step::Agreed(agreed) = negotiate(&new, WANTED) else {
            panic!("it is new enough");
        };
        assert!(agreed.passthrough() && agreed.resend());
        assert_eq!(agreed.minor, 40);
        // Nothing is accepted that was not looked at: not WRITEBACK_CACHE, AUTO_INVAL_DATA, ASYNC_DIO, EXPORT_SUPPORT.
        for bit in [16, 12, 15, 4, 41, 42] {
            assert_eq!(agreed.flags & (1 << bit), 0, "{bit}");
        }
        let wire = answer(&new, WANTED, &agreed);
        let bytes = wire.as_slice();
        assert_eq!(bytes.len(), 64);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4), word(8)), (7, 40, 131_072));
        assert_eq!(word(12), agreed.flags as u32);
        assert_eq!(bytes[16..20], [64, 0, 48, 0]);
        assert_eq!((word(20), word(24)), (4096, 1));
        assert_eq!(bytes[28..32], [0, 1, 0, 0]);
        assert_eq!(word(32), (agreed.flags >> 32) as u32);
        assert_eq!(word(36), 2, "max_stack_depth");

        let old = kernel(7, 31, 0x0fff_ffff);
        let Step::Agreed(agreed) = negotiate(&old, WANTED) else {
            panic!("it is new enough");
        };
        assert!(!agreed.passthrough() && !agreed.resend());
        assert_eq!(agreed.minor, 31);
        assert_eq!(answer(&old, WANTED, &agreed).as_slice()[32..64], [0; 32]);

        let unwanted = Wanted {
            stack_depth: 0,
            ..WANTED
        };
        let Step::Agreed(agreed) = negotiate(&new, unwanted) else {
            panic!("it is new enough");
        };
        assert!(!agreed.passthrough());
    }

    #[test]
    fn other_versions_are_told_ours_or_refused() {
        assert_eq!(negotiate(&kernel(8, 0, 0), WANTED), Step::Again);
        assert_eq!(version_only().as_slice().len(), 8);
        assert_eq!(negotiate(&kernel(6, 99, 0), WANTED), Step::Refused);
        assert_eq!(negotiate(&kernel(7, 30, u64::MAX), WANTED), Step::Refused);
    }

    #[test]
    fn what_was_agreed_survives_on_paper() {
        let agreed = Negotiated {
            minor: 40,
            flags: u64::MAX >> 1,
        };
        let text = serde_json::to_string(&agreed).unwrap();
        assert_eq!(
            serde_json::from_str::<Negotiated>(&text).unwrap(),
            agreed,
            "{text}"
        );
    }
}
