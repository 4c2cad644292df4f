//! The protocol: decode, call, reply.
//!
//! A FUSE thread never waits for the network. What the tree knows is answered on the spot; what must be asked for goes
//! to the runtime, together with the reply.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use tokio::runtime::Handle;

use super::errno::{NO_SUCH_NAME, NOT_DONE_HERE, READ_ONLY, errno};
use super::passthrough::Backings;
use super::reply::{
    GENERATION, bare_attr, file_attr, file_type, from_offset, node, reply_entry, reply_opendir,
    reply_read, reply_xattr,
};
use crate::tree::{HandleId, NodeId, OpenFile, Opened, Tree};

/// Unit of statfs, bytes.
const STATFS_UNIT: u32 = 4096;

/// Longest name, for statfs.
const NAME_MAX: u32 = 255;

/// Requests that the kernel may have under way in the background (readahead, O_DIRECT in pieces).
const MAX_BACKGROUND: u16 = 64;

/// The file system that a session serves.
#[derive(Debug)]
pub(super) struct Ocifs {
    pub(super) tree: Tree,
    pub(super) runtime: Handle,
    /// How many file systems lie on each other where the cache is, ours counted.
    pub(super) stack_depth: u32,
    pub(super) backings: Backings,
}

impl Ocifs {
    fn reply_open(&self, ino: NodeId, opened: &Opened, reply: ReplyOpen) {
        let handle = FileHandle(opened.handle.0);
        if let Some(entry) = &opened.direct {
            match self.backings.open(ino, entry.file(), &reply) {
                // Any other flag but NOFLUSH would be refused beside passthrough.
                Ok(Some(id)) => {
                    return reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH, &id);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::info!(%error, "the kernel does not read the cache's files itself; reads go through the daemon");
                    self.tree.without_passthrough();
                }
            }
        }
        // A file's bytes never change, so its pages are kept from one open to the next. Nothing is flushed at
        // close: that would only let a program hang in close(2) while the daemon is down.
        reply.opened(
            handle,
            FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
        );
    }

    fn read_file(&self, file: OpenFile, offset: u64, size: u32, reply: ReplyData) {
        match file.try_read(offset, size) {
            Some(result) => reply_read(reply, result),
            None => {
                self.runtime
                    .spawn(async move { reply_read(reply, file.read(offset, size).await) });
            }
        }
    }
}

impl Filesystem for Ocifs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_ASYNC_DIO,
        ] {
            if config.add_capabilities(wanted).is_err() {
                tracing::debug!(?wanted, "this kernel does without");
            }
        }
        if self.tree.has_passthrough() {
            let asked = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH);
            if asked.is_err() || config.set_max_stack_depth(self.stack_depth).is_err() {
                tracing::info!(
                    "this kernel has no FUSE passthrough; reads of sealed blobs go through the daemon"
                );
                self.tree.without_passthrough();
            }
        }
        if let Err(nearest) = config.set_max_background(MAX_BACKGROUND) {
            tracing::debug!(nearest, "max_background stays as it is");
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(name) = name.to_str() else {
            return reply.error(NO_SUCH_NAME);
        };
        match self.tree.try_lookup(node(parent), name) {
            Some(result) => reply_entry(reply, result),
            None => {
                let (tree, name) = (self.tree.clone(), name.to_owned());
                self.runtime.spawn(async move {
                    reply_entry(reply, tree.lookup(node(parent), &name).await)
                });
            }
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.tree.forget(node(ino), nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.tree.getattr(node(ino)) {
            Ok((attr, ttl)) => reply.attr(&ttl, &file_attr(&attr)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.tree.readlink(node(ino)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            return reply.error(READ_ONLY);
        }
        match self.tree.open(node(ino)) {
            Ok(opened) => self.reply_open(node(ino), &opened, reply),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.tree.file(node(ino), HandleId(fh.0)) {
            Ok(file) => self.read_file(file, offset, size, reply),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.backings.release(node(ino));
        self.tree.release(HandleId(fh.0));
        reply.ok();
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.tree.try_opendir(node(ino)) {
            Some(result) => reply_opendir(reply, result),
            None => {
                let tree = self.tree.clone();
                self.runtime
                    .spawn(async move { reply_opendir(reply, tree.opendir(node(ino)).await) });
            }
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.tree.entries(node(ino), HandleId(fh.0)) {
            Ok(entries) => entries,
            Err(error) => return reply.error(errno(&error)),
        };
        for (cookie, entry) in from_offset(&entries, offset) {
            if reply.add(
                INodeNo(entry.ino.0),
                cookie,
                file_type(entry.kind),
                &entry.name,
            ) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let entries = match self.tree.entries(node(ino), HandleId(fh.0)) {
            Ok(entries) => entries,
            Err(error) => return reply.error(errno(&error)),
        };
        for (cookie, entry) in from_offset(&entries, offset) {
            // The kernel counts a lookup for every entry that has a node id, but for `.` and `..`
            // (`fuse_direntplus_link` in fs/fuse/readdir.c). With node id 0 it takes the name and kind alone, and
            // looks the rest up when somebody wants it.
            let listed = match entry.name.as_str() {
                "." | ".." => None,
                _ => self.tree.lookup_listed(node(ino), entry),
            };
            let full = match &listed {
                Some(found) => {
                    let (id, attr) = (INodeNo(found.attr.ino.0), file_attr(&found.attr));
                    reply.add(
                        id,
                        cookie,
                        &entry.name,
                        &found.entry_ttl.min(found.attr_ttl),
                        &attr,
                        GENERATION,
                    )
                }
                None => reply.add(
                    INodeNo(0),
                    cookie,
                    &entry.name,
                    &Duration::ZERO,
                    &bare_attr(entry),
                    GENERATION,
                ),
            };
            if full {
                // It did not go out, so the kernel does not know of it.
                if let Some(found) = listed {
                    self.tree.forget(found.attr.ino, 1);
                }
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.release(HandleId(fh.0));
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let space = self.tree.space();
        let units = |bytes: u64| bytes / u64::from(STATFS_UNIT);
        let free = units(space.free.min(space.limit));
        reply.statfs(
            units(space.limit),
            free,
            free,
            0,
            0,
            STATFS_UNIT,
            NAME_MAX,
            STATFS_UNIT,
        );
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self
            .tree
            .xattr(node(ino), name.to_str().unwrap_or_default())
        {
            Ok(value) => reply_xattr(reply, size, value.as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.tree.xattrs(node(ino)) {
            Ok(xattrs) => {
                let names: String = xattrs.iter().flat_map(|(name, _)| [name, "\0"]).collect();
                reply_xattr(reply, size, names.as_bytes());
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    // There is nothing to write back.

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    // What the kernel does better by itself, once it is told so.

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(NOT_DONE_HERE);
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        // SEEK_DATA and SEEK_HOLE: the whole file is data, which is the kernel's own answer too.
        reply.error(NOT_DONE_HERE);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(NOT_DONE_HERE);
    }

    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        reply.error(NOT_DONE_HERE);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(NOT_DONE_HERE);
    }

    // Everything that writes.

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(READ_ONLY);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(READ_ONLY);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(READ_ONLY);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(READ_ONLY);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(READ_ONLY);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(READ_ONLY);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(READ_ONLY);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(READ_ONLY);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(READ_ONLY);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(READ_ONLY);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(READ_ONLY);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(READ_ONLY);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(READ_ONLY);
    }
}
