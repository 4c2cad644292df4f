//! Requests: call the tree, reply.
//!
//! A FUSE thread never waits for the network. What the tree knows is answered on the spot; what must be asked for goes
//! to the runtime, together with the reply.

use std::str;
use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;

use super::errno::{NO_BYTES, NO_SUCH_NAME, READ_ONLY, errno};
use super::meter::Meter;
use super::passthrough::Backings;
use super::reply::{
    bare_entry, entry, file_attr, from_offset, reply_entry, reply_opendir, reply_read, reply_xattr,
    type_bits,
};
use crate::base::start;
use crate::fuse::{self, Backing, Forgets, Handler, Listing, Operation, Reply, StatFs, open};
use crate::tree::{Data, DirEntry, HandleId, NodeId, Opened, Tree, Way};

/// Unit of statfs, bytes.
const STATFS_UNIT: u32 = 4096;

/// Longest name, for statfs.
const NAME_MAX: u32 = 255;

/// The file system that a session serves.
#[derive(Clone, Debug)]
pub(super) struct Ocifs {
    pub(super) tree: Tree,
    pub(super) runtime: Handle,
    pub(super) backings: Arc<Backings>,
    pub(super) meter: Arc<Meter>,
}

impl Handler for Ocifs {
    fn handle(&self, node: u64, operation: Operation<'_>, reply: Reply) {
        let node = NodeId(node);
        let listing = matches!(operation, Operation::ReadDir { .. });
        if self.tree.is_absent(node, listing)
            && let Some(later) = Later::of(operation)
        {
            return self.handle_later(node, later, reply);
        }
        self.handle_now(node, operation, reply);
    }

    fn forget(&self, nodes: Forgets<'_>) {
        for (node, count) in nodes.iter() {
            self.tree.forget(NodeId(node), count);
        }
    }
}

/// A request that can wait for its node, on its own.
enum Later {
    GetAttr,
    Open(u32),
    Read(u64, u64, u32),
    GetXattr(Vec<u8>, u32),
    ListXattr(u32),
    ReadDir(u64, u64, u32, bool),
}

impl Later {
    /// `None` for what needs no more than is known of a node that cannot be had.
    fn of(operation: Operation<'_>) -> Option<Self> {
        Some(match operation {
            Operation::GetAttr => Self::GetAttr,
            Operation::Open { flags } => Self::Open(flags),
            Operation::Read {
                handle,
                offset,
                size,
            } => Self::Read(handle, offset, size),
            Operation::GetXattr { name, size } => Self::GetXattr(name.to_vec(), size),
            Operation::ListXattr { size } => Self::ListXattr(size),
            Operation::ReadDir {
                handle,
                offset,
                size,
                plus,
            } => Self::ReadDir(handle, offset, size, plus),
            _ => return None,
        })
    }

    fn operation(&self) -> Operation<'_> {
        match *self {
            Self::GetAttr => Operation::GetAttr,
            Self::Open(flags) => Operation::Open { flags },
            Self::Read(handle, offset, size) => Operation::Read {
                handle,
                offset,
                size,
            },
            Self::GetXattr(ref name, size) => Operation::GetXattr { name, size },
            Self::ListXattr(size) => Operation::ListXattr { size },
            Self::ReadDir(handle, offset, size, plus) => Operation::ReadDir {
                handle,
                offset,
                size,
                plus,
            },
        }
    }
}

impl Ocifs {
    /// Answers once the node, which a process before this one told the kernel of, can be had.
    fn handle_later(&self, node: NodeId, later: Later, reply: Reply) {
        let this = self.clone();
        self.runtime.spawn(async move {
            let bytes = matches!(later, Later::Read(..));
            match reply.wait(this.tree.come(node, bytes)).await {
                Some((reply, Ok(()))) => this.handle_now(node, later.operation(), reply),
                Some((reply, Err(error))) => reply.error(match bytes {
                    true => NO_BYTES,
                    false => errno(&error),
                }),
                None => {}
            }
        });
    }

    fn handle_now(&self, node: NodeId, operation: Operation<'_>, reply: Reply) {
        match operation {
            Operation::Lookup { name } => self.lookup(node, name, reply),
            Operation::GetAttr => match self.tree.getattr(node) {
                Ok((attr, ttl)) => reply.attr(&file_attr(&attr), ttl),
                Err(error) => reply.error(errno(&error)),
            },
            Operation::ReadLink => match self.tree.readlink(node) {
                Ok(target) => reply.bytes(target.as_bytes()),
                Err(error) => reply.error(errno(&error)),
            },
            Operation::Open { flags } => self.open(node, flags, reply),
            Operation::Read {
                handle,
                offset,
                size,
            } => self.read(node, HandleId(handle), offset, size, reply),
            Operation::Release { handle } => {
                if let Some(node) = self.tree.release(HandleId(handle)) {
                    self.backings.release(node);
                }
                reply.done();
            }
            Operation::OpenDir => self.opendir(node, reply),
            Operation::ReadDir {
                handle,
                offset,
                size,
                plus,
            } => match self.tree.entries(node, HandleId(handle)) {
                Ok(entries) if plus => reply.listing(&self.list_plus(node, &entries, offset, size)),
                Ok(entries) => reply.listing(&list(&entries, offset, size)),
                Err(error) => reply.error(errno(&error)),
            },
            Operation::ReleaseDir { handle } => {
                self.tree.release(HandleId(handle));
                reply.done();
            }
            Operation::StatFs => reply.statfs(&self.statfs()),
            Operation::GetXattr { name, size } => {
                let name = str::from_utf8(name).unwrap_or_default();
                match self.tree.xattr(node, name) {
                    Ok(value) => reply_xattr(reply, size, value.as_bytes()),
                    Err(error) => reply.error(errno(&error)),
                }
            }
            Operation::ListXattr { size } => match self.tree.xattrs(node) {
                Ok(xattrs) => {
                    let names: String = xattrs.iter().flat_map(|(name, _)| [name, "\0"]).collect();
                    reply_xattr(reply, size, names.as_bytes());
                }
                Err(error) => reply.error(errno(&error)),
            },
        }
    }

    fn lookup(&self, parent: NodeId, name: &[u8], reply: Reply) {
        let Ok(name) = str::from_utf8(name) else {
            return reply.error(NO_SUCH_NAME);
        };
        if let Some(result) = self.tree.try_lookup(parent, name) {
            return reply_entry(reply, &self.tree, parent, result);
        }
        let (tree, name) = (self.tree.clone(), name.to_owned());
        self.runtime.spawn(async move {
            if let Some((reply, result)) = reply.wait(tree.lookup(parent, &name)).await {
                reply_entry(reply, &tree, parent, result);
            }
        });
    }

    fn open(&self, node: NodeId, flags: u32, reply: Reply) {
        let flags = flags.cast_signed();
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return reply.error(READ_ONLY);
        }
        self.reopened(&reply);
        match self.tree.open(node) {
            Ok(opened) => self.opened(node, &opened, reply),
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// What a request opens that comes once more is opened once.
    fn reopened(&self, reply: &Reply) {
        if reply.is_resent()
            && let Some(node) = self.tree.reopened(reply.unique())
        {
            self.backings.release(node);
        }
    }

    fn opened(&self, node: NodeId, opened: &Opened, reply: Reply) {
        let backing = self.backing(node, &opened.way, &reply);
        let (flags, backing) = match &backing {
            // Any other flag but NOFLUSH would be refused beside passthrough.
            Some(backing) => (open::PASSTHROUGH | open::NOFLUSH, backing.id()),
            // A file's bytes never change, so its pages are kept from one open to the next. Nothing is flushed at close: that
            // would only let a program hang in close(2) while the daemon is down.
            None => (open::KEEP_CACHE | open::NOFLUSH, 0),
        };
        self.tree.opened(opened.handle, reply.unique(), backing);
        reply.opened(&fuse::Opened {
            handle: opened.handle.0,
            flags,
            backing,
        });
    }

    /// What the kernel is to read in our place.
    fn backing(&self, node: NodeId, way: &Way, reply: &Reply) -> Option<Arc<Backing>> {
        let Way::Past(cached) = way else {
            return None;
        };
        let file = cached.as_ref().map(|cached| cached.file());
        match self.backings.open(node, file, reply) {
            Ok(backing) => backing,
            Err(error) => {
                tracing::info!(%error, "the kernel does not read the cache's files itself; reads go through the daemon");
                self.tree.without_passthrough();
                None
            }
        }
    }

    fn read(&self, node: NodeId, handle: HandleId, offset: u64, size: u32, reply: Reply) {
        let file = match self.tree.file(node, handle) {
            Ok(file) => file,
            Err(error) => return reply.error(errno(&error)),
        };
        if let Some(result) = file.try_read(offset, size) {
            self.meter.read(result.as_ref().ok().map(Data::len), None);
            return reply_read(reply, node, result);
        }
        let (meter, asked) = (Arc::clone(&self.meter), Instant::now());
        start(&self.runtime, async move {
            if let Some((reply, result)) = reply.wait(file.read(offset, size)).await {
                meter.read(result.as_ref().ok().map(Data::len), Some(asked.elapsed()));
                reply_read(reply, node, result);
            }
        });
    }

    fn opendir(&self, node: NodeId, reply: Reply) {
        self.reopened(&reply);
        if let Some(result) = self.tree.try_opendir(node) {
            return reply_opendir(reply, &self.tree, result);
        }
        let tree = self.tree.clone();
        self.runtime.spawn(async move {
            if let Some((reply, result)) = reply.wait(tree.opendir(node)).await {
                reply_opendir(reply, &tree, result);
            }
        });
    }

    /// Entries with what a lookup of each would tell.
    fn list_plus(&self, node: NodeId, entries: &[DirEntry], offset: u64, size: u32) -> Listing {
        let mut listing = Listing::new(size);
        for (cookie, listed) in from_offset(entries, offset) {
            // The kernel counts a lookup for every entry that has a node, but for `.` and `..` (`fuse_direntplus_link` in
            // fs/fuse/readdir.c).
            let found = match listed.name.as_str() {
                "." | ".." => None,
                _ => self.tree.lookup_listed(node, listed),
            };
            let told = found.as_ref().map_or_else(|| bare_entry(listed), entry);
            if !listing.add_plus(&told, cookie, &listed.name) {
                // It does not go out, so the kernel does not know of it.
                if let Some(found) = found {
                    self.tree.forget(found.attr.ino, 1);
                }
                break;
            }
        }
        listing
    }

    fn statfs(&self) -> StatFs {
        let space = self.tree.space();
        let units = |bytes: u64| bytes / u64::from(STATFS_UNIT);
        StatFs {
            blocks: units(space.limit),
            free: units(space.free.min(space.limit)),
            unit: STATFS_UNIT,
            name_max: NAME_MAX,
        }
    }
}

/// Names, kinds and numbers alone.
fn list(entries: &[DirEntry], offset: u64, size: u32) -> Listing {
    let mut listing = Listing::new(size);
    for (cookie, entry) in from_offset(entries, offset) {
        if !listing.add(entry.ino.0, cookie, type_bits(entry.kind), &entry.name) {
            break;
        }
    }
    listing
}
