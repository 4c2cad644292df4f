//! What another process needs in order to go on where this one was killed.
//!
//! The kernel names nodes and handles by numbers that we gave it, and goes on doing so after the process that gave them has died. So
//! before the reply goes out that tells the kernel of one, a record of it is in the journal:
//!
//! | record | before |
//! |---|---|
//! | a node is told of, once more | the answer to LOOKUP or READDIRPLUS |
//! | a reference is bound to a digest | the answer to the first LOOKUP that it shows in |
//! | a file is open, and by which backing id | the answer to OPEN |
//! | a directory is open, and the names that it lists | the answer to OPENDIR |
//! | what the kernel gets of a blob comes from this file of the cache, and may be wrong | the first answer to READ from that file |
//! | what the kernel keeps is about to be wrong | what makes it wrong: a tag moves, bytes are thrown away |
//!
//! That something is forgotten or closed, or that the kernel was told what to drop, is written after it was, and may be lost: a
//! node or name too many does no harm, nor does it to drop right pages once more.
//!
//! # Where it is
//! In a memfd: memory of the kernel's that has no name and lives for as long as a process has the descriptor. Whoever keeps the
//! descriptor of /dev/fuse for us keeps this one beside it, so the two live and end together: a journal is never left behind, and never
//! taken for that of another mount. A mount does not survive the machine, so neither need this; what was written by
//! write(2) outlives kill -9, and no fsync is paid for.
//!
//! # Layout
//! A page with the magic, the version of the format, whether something could not be written, and where the records start; then records,
//! one behind the other ([`record`]). What is not a whole record, and all behind it, was cut off by a kill and does not count:
//! nobody was told of it.
//!
//! # Compaction
//! When the records are twice as long as what they come to, that is written anew behind them, then the start is moved there by one write
//! of eight bytes, then the old part is given back. A kill before the second step leaves the old records, one behind it the new ones.

mod record;
mod state;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::DebtId;
use crate::base::lock;

pub(super) use record::{Kept, Record, Stale};
pub use state::State;
pub(super) use state::{Opened, What};

/// The version of the format, which both processes must agree on.
pub const FORMAT: u32 = 3;

/// What a journal begins with.
const MAGIC: [u8; 8] = *b"ocifsjnl";

/// Where in the first page the version, the mark of what could not be written, and the start are.
const FORMAT_AT: u64 = 8;
const BROKEN_AT: u64 = 12;
const START_AT: u64 = 16;

/// Records begin at multiples of this, the first one behind the head.
const PAGE: u64 = 4096;

/// Records shorter than this in all are not written anew.
const SHORT: u64 = 256 << 10;

/// Not a record, or not a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed")]
pub(super) struct Malformed;

/// The journal of one session; see the module's documentation.
#[derive(Debug)]
pub struct Journal {
    file: File,
    place: Mutex<Place>,
}

#[derive(Debug)]
struct Place {
    start: u64,
    end: u64,
    /// How long the records may get before they are written anew.
    limit: u64,
    broken: bool,
    buffer: Vec<u8>,
}

impl Journal {
    /// An empty one.
    ///
    /// # Errors
    /// When the kernel has no memory for it, or no memfd_create(2).
    pub fn new() -> io::Result<Self> {
        let file = memfd_create("ocifs journal", MemfdFlags::CLOEXEC)?;
        Self::begin(file.into())
    }

    fn begin(file: File) -> io::Result<Self> {
        file.set_len(0)?;
        let mut head = [0; PAGE as usize];
        head[..8].copy_from_slice(&MAGIC);
        head[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        head[16..24].copy_from_slice(&PAGE.to_le_bytes());
        file.write_all_at(&head, 0)?;
        Ok(Self::at(file, PAGE, PAGE))
    }

    fn at(file: File, start: u64, end: u64) -> Self {
        let place = Place {
            start,
            end,
            limit: SHORT.max(2 * (end - start)),
            broken: false,
            buffer: Vec::new(),
        };
        Self {
            file,
            place: Mutex::new(place),
        }
    }

    /// Goes on with another process's journal, and what it comes to.
    ///
    /// # Errors
    /// When it is none, of another version, or lacks something because it could not be written.
    pub fn resume(file: OwnedFd) -> io::Result<(Self, State)> {
        let file = File::from(file);
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let mut head = [0; 24];
        file.read_exact_at(&mut head, 0)?;
        let number = |at: u64| {
            let at = at as usize;
            u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
        };
        if head[..8] != MAGIC {
            return Err(invalid("this is no journal of ocifs"));
        }
        if number(FORMAT_AT) != FORMAT {
            let format = number(FORMAT_AT);
            return Err(invalid(&format!(
                "the journal has format {format}, and this version of ocifs knows {FORMAT}"
            )));
        }
        if number(BROKEN_AT) != 0 {
            return Err(invalid("the journal lacks what could not be written to it"));
        }
        let start = u64::from(number(START_AT)) | u64::from(number(START_AT + 4)) << 32;
        let bytes = read_from(&file, start)?;
        let (state, length) = replay(&bytes);
        let end = start + length as u64;
        // What was cut off must not be taken for the rest of a shorter record that is written over its beginning.
        file.set_len(end)?;
        give_back(&file, PAGE, start);
        Ok((Self::at(file, start, end), state))
    }

    /// Keeps what the layer above needs to go on with the session.
    pub fn session(&self, bytes: &[u8]) {
        self.write(&Record::Session(bytes.to_vec()));
    }

    /// Says that another process goes on from here, because the last one ended for this `reason`.
    pub fn taken_over(&self, reason: &str) {
        let reason = reason.to_owned();
        self.write(&Record::TakenOver { reason });
    }

    /// The kernel has been told of all that this debt was about.
    pub fn settle(&self, debt: DebtId) {
        self.write(&Record::Settled { debt: debt.0 });
    }

    /// Nobody keeps it: nothing is written from here on, and whoever has it all the same is refused it.
    pub fn abandon(&self) {
        self.give_up(&mut lock(&self.place));
    }

    /// Whether nothing is missing in it.
    pub fn is_whole(&self) -> bool {
        !lock(&self.place).broken
    }

    /// The descriptor, for whoever keeps it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes a record. Should that fail, the journal is of no use any more, which is said once; the mount goes on.
    pub(super) fn write(&self, record: &Record) {
        let mut place = lock(&self.place);
        if place.broken {
            return;
        }
        if let Err(error) = self.append(&mut place, record) {
            tracing::error!(%error, "what a take-over needs cannot be kept; should this process die, the mount ends with it");
            self.give_up(&mut place);
        }
    }

    fn append(&self, place: &mut Place, record: &Record) -> io::Result<()> {
        place.buffer.clear();
        record::put(&mut place.buffer, record);
        if place.buffer.len() > record::LONGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.file.write_all_at(&place.buffer, place.end)?;
        place.end += place.buffer.len() as u64;
        place.buffer.shrink_to(PAGE as usize);
        if place.end - place.start > place.limit {
            self.compact(place)?;
        }
        Ok(())
    }

    /// Writes anew what the records come to.
    fn compact(&self, place: &mut Place) -> io::Result<()> {
        let (state, _) = replay(&read_from(&self.file, place.start)?);
        let mut bytes = Vec::new();
        for record in state.records() {
            record::put(&mut bytes, &record);
        }
        let start = place.end.next_multiple_of(PAGE);
        self.file.write_all_at(&bytes, start)?;
        self.file.write_all_at(&start.to_le_bytes(), START_AT)?;
        give_back(&self.file, PAGE, start);
        place.start = start;
        place.end = start + bytes.len() as u64;
        place.limit = SHORT.max(2 * bytes.len() as u64);
        Ok(())
    }

    /// Marks the journal as lacking something; the page for that is there.
    fn give_up(&self, place: &mut Place) {
        place.broken = true;
        let marked = self.file.write_all_at(&1_u32.to_le_bytes(), BROKEN_AT);
        if let Err(error) = marked.or_else(|_| self.file.set_len(0)) {
            tracing::error!(%error, "the journal cannot be marked as broken");
        }
        give_back(&self.file, PAGE, place.end.next_multiple_of(PAGE));
    }
}

/// All from `start` on.
fn read_from(file: &File, start: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len().saturating_sub(start);
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes)
}

/// What the whole records at the beginning of `bytes` come to, and their length.
fn replay(bytes: &[u8]) -> (State, usize) {
    let (mut state, mut at) = (State::default(), 0);
    while let Some((record, length)) = record::take(&bytes[at..]) {
        state.apply(record);
        at += length;
    }
    (state, at)
}

/// Gives the memory of a part of the file back. Where that is not possible it stays until the end of the session.
fn give_back(file: &File, start: u64, end: u64) {
    if end > start {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = fallocate(file, flags, start, end - start);
    }
}

#[cfg(test)]
mod tests;
