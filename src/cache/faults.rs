//! Faults for the tests of this layer: each step of `disk.rs` that a thread takes is counted, can fail or be the last one, and can be
//! written down for a simulated loss of power (`power.rs`).
//!
//! A process that is killed does nothing any more to the files, its destructors included; so does one whose every step from some
//! point on fails. That is how a kill is made here, in one process.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::disk::{Access, Step};
use crate::base::{ByteRange, Digest};

/// What happens at the step that is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It fails with this error number, and the disk is as good as new.
    Once(i32),
    /// It and all after it fail: the disk is dead, or the process.
    Dead(i32),
    /// Half of what it writes is written, and then as [`Fault::Dead`].
    Torn,
}

/// What has been done to a directory.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// A file was made.
    Made(usize, PathBuf),
    MadeDir(PathBuf),
    Wrote(usize, u64, Vec<u8>),
    Length(usize, u64),
    Synced(usize),
    SyncedDir(PathBuf),
    Renamed(PathBuf, PathBuf),
    Removed(PathBuf),
    /// From here on this must be so.
    Promised(Promise),
}

/// What whoever called this layer may rely on from now on.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Promise {
    /// The blob is whole, whatever happens.
    Sealed(Digest),
    /// The tag points there, whatever happens.
    Tag(String, Digest),
    /// These bytes are here, unless the power goes.
    Chunks(Digest, u64, ByteRange),
}

#[derive(Default)]
struct Plan {
    fault: Option<(usize, Fault)>,
    seen: usize,
    /// Whether the step that was chosen has come.
    hit: bool,
    dead: Option<i32>,
    /// Numbers of the steps that write.
    writes: Vec<usize>,
    events: Vec<Event>,
    /// Files by device and inode; a number is used again once its file is gone.
    ids: HashMap<(u64, u64), usize>,
    next: usize,
}

thread_local! {
    static PLAN: RefCell<Option<Plan>> = const { RefCell::new(None) };
    static READ_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// From now on what this thread writes to a file fails.
pub(crate) fn fail_writes() {
    READ_ONLY.set(true);
}

/// What a run was like.
pub(super) struct Run {
    pub(super) steps: usize,
    pub(super) writes: Vec<usize>,
    pub(super) hit: bool,
    pub(super) events: Vec<Event>,
}

impl Run {
    pub(super) fn promises(&self) -> Vec<Promise> {
        let promised = |event: &Event| match event {
            Event::Promised(promise) => Some(promise.clone()),
            _ => None,
        };
        self.events.iter().filter_map(promised).collect()
    }
}

/// Runs `action` with a fault at step number `.0` (counted from 0) of this thread. `files` are known by these numbers in the events.
pub(super) fn run(
    fault: Option<(usize, Fault)>,
    files: &[(PathBuf, usize)],
    action: impl FnOnce(),
) -> Run {
    let ids: HashMap<_, _> = files
        .iter()
        .filter_map(|(path, id)| Some((identity(&fs::symlink_metadata(path).ok()?), *id)))
        .collect();
    let next = files.len();
    PLAN.set(Some(Plan {
        fault,
        ids,
        next,
        ..Plan::default()
    }));
    action();
    let plan = PLAN.take().unwrap();
    Run {
        steps: plan.seen,
        writes: plan.writes,
        hit: plan.hit,
        events: plan.events,
    }
}

fn with(action: impl FnOnce(&mut Plan)) {
    PLAN.with_borrow_mut(|plan| {
        if let Some(plan) = plan {
            action(plan);
        }
    });
}

/// Notes what must be so from here on, unless a fault has come before: then whoever called was told.
pub(super) fn promise(promise: Promise) {
    with(|plan| {
        if !plan.hit {
            plan.events.push(Event::Promised(promise));
        }
    });
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn joined(pieces: &[IoSlice<'_>]) -> Vec<u8> {
    pieces
        .iter()
        .flat_map(|piece| piece.iter().copied())
        .collect()
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Called before each step; an error is what it ends with.
pub(super) fn before(step: &Step<'_>) -> io::Result<()> {
    if READ_ONLY.get() && matches!(step, Step::Write(..)) {
        return Err(error(libc::EIO));
    }
    let mut outcome = Ok(());
    with(|plan| {
        if let Some(number) = plan.dead {
            outcome = Err(error(number));
            return;
        }
        let number = plan.seen;
        plan.seen += 1;
        if matches!(step, Step::Write(..)) {
            plan.writes.push(number);
        }
        let Some((_, fault)) = plan.fault.filter(|(at, _)| *at == number) else {
            return;
        };
        plan.hit = true;
        outcome = match (fault, step) {
            (Fault::Once(number), _) => Err(error(number)),
            (Fault::Dead(number), _) => {
                plan.dead = Some(number);
                Err(error(number))
            }
            (Fault::Torn, step) => {
                if let Step::Write(file, at, pieces) = step {
                    let all = joined(pieces);
                    file.write_all_at(&all[..all.len() / 2], *at).unwrap();
                }
                plan.dead = Some(libc::EIO);
                Err(error(libc::EIO))
            }
        };
    });
    outcome
}

/// Whether a step is about to make a file.
pub(super) fn is_new(step: &Step<'_>) -> bool {
    let makes = |path: &Path| fs::symlink_metadata(path).is_err();
    match step {
        Step::Open(path, Access::Make | Access::New) => makes(path),
        Step::MakeDir(path) => makes(path),
        _ => false,
    }
}

/// Called after each step that went well.
pub(super) fn after(step: &Step<'_>, new: bool) {
    with(|plan| {
        let id = |file: &File| plan.ids.get(&identity(&file.metadata().unwrap())).copied();
        let event = match *step {
            Step::Open(path, _) if new => {
                let id = plan.next;
                plan.next += 1;
                plan.ids
                    .insert(identity(&fs::symlink_metadata(path).unwrap()), id);
                Event::Made(id, path.to_owned())
            }
            Step::MakeDir(path) if new => Event::MadeDir(path.to_owned()),
            Step::Write(file, at, pieces) => Event::Wrote(id(file).unwrap(), at, joined(pieces)),
            Step::SetLen(file, len) => Event::Length(id(file).unwrap(), len),
            Step::Sync(file) => Event::Synced(id(file).unwrap()),
            Step::SyncDir(dir) => Event::SyncedDir(dir.to_owned()),
            Step::Rename(from, to) => Event::Renamed(from.to_owned(), to.to_owned()),
            Step::Remove(path) => Event::Removed(path.to_owned()),
            _ => return,
        };
        plan.events.push(event);
    });
}
