//! Numbers of the protocol, with the names that the kernel's `include/uapi/linux/fuse.h` gives them (there with `FUSE_` or `FOPEN_`
//! in front).

/// `FUSE_KERNEL_VERSION`.
pub(super) const MAJOR: u32 = 7;
/// The newest minor version whose messages are known here. What came after 7.40 (`FUSE_PASSTHROUGH`, `FUSE_NOTIFY_RESEND`) is
/// asked for by flags, or not at all.
pub(super) const MINOR: u32 = 40;
/// Linux 5.4. Older kernels, of which 4.20 is the first to have all else that is used here, may lie below this.
pub(super) const MINOR_LEAST: u32 = 31;

/// `sizeof(struct fuse_in_header)`.
pub(super) const IN_HEADER: usize = 40;
/// `sizeof(struct fuse_out_header)`.
pub(super) const OUT_HEADER: usize = 16;
/// The smallest read buffer that the kernel takes: `FUSE_MIN_READ_BUFFER`, or room for the largest WRITE that was negotiated
/// (`fuse_dev_do_read` in fs/fuse/dev.c).
pub(super) const MIN_READ_BUFFER: usize = 8192;

/// `enum fuse_opcode`.
pub(super) mod opcode {
    pub(in crate::fuse) const LOOKUP: u32 = 1;
    pub(in crate::fuse) const FORGET: u32 = 2;
    pub(in crate::fuse) const GETATTR: u32 = 3;
    pub(in crate::fuse) const SETATTR: u32 = 4;
    pub(in crate::fuse) const READLINK: u32 = 5;
    pub(in crate::fuse) const SYMLINK: u32 = 6;
    pub(in crate::fuse) const MKNOD: u32 = 8;
    pub(in crate::fuse) const MKDIR: u32 = 9;
    pub(in crate::fuse) const UNLINK: u32 = 10;
    pub(in crate::fuse) const RMDIR: u32 = 11;
    pub(in crate::fuse) const RENAME: u32 = 12;
    pub(in crate::fuse) const LINK: u32 = 13;
    pub(in crate::fuse) const OPEN: u32 = 14;
    pub(in crate::fuse) const READ: u32 = 15;
    pub(in crate::fuse) const WRITE: u32 = 16;
    pub(in crate::fuse) const STATFS: u32 = 17;
    pub(in crate::fuse) const RELEASE: u32 = 18;
    pub(in crate::fuse) const SETXATTR: u32 = 21;
    pub(in crate::fuse) const GETXATTR: u32 = 22;
    pub(in crate::fuse) const LISTXATTR: u32 = 23;
    pub(in crate::fuse) const REMOVEXATTR: u32 = 24;
    pub(in crate::fuse) const INIT: u32 = 26;
    pub(in crate::fuse) const OPENDIR: u32 = 27;
    pub(in crate::fuse) const READDIR: u32 = 28;
    pub(in crate::fuse) const RELEASEDIR: u32 = 29;
    pub(in crate::fuse) const CREATE: u32 = 35;
    pub(in crate::fuse) const INTERRUPT: u32 = 36;
    pub(in crate::fuse) const DESTROY: u32 = 38;
    pub(in crate::fuse) const NOTIFY_REPLY: u32 = 41;
    pub(in crate::fuse) const BATCH_FORGET: u32 = 42;
    pub(in crate::fuse) const FALLOCATE: u32 = 43;
    pub(in crate::fuse) const READDIRPLUS: u32 = 44;
    pub(in crate::fuse) const RENAME2: u32 = 45;
    pub(in crate::fuse) const TMPFILE: u32 = 51;
}

/// Flags of INIT. Those from bit 32 on travel in `flags2`.
pub(super) mod init {
    pub(in crate::fuse) const ASYNC_READ: u64 = 1 << 0;
    pub(in crate::fuse) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(in crate::fuse) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(in crate::fuse) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(in crate::fuse) const MAX_PAGES: u64 = 1 << 22;
    pub(in crate::fuse) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(in crate::fuse) const INIT_EXT: u64 = 1 << 30;
    pub(in crate::fuse) const PASSTHROUGH: u64 = 1 << 37;
    pub(in crate::fuse) const HAS_RESEND: u64 = 1 << 39;
}

/// `enum fuse_notify_code`: what stands in the error field of a message that answers no request.
pub(super) mod notify {
    pub(in crate::fuse) const INVAL_INODE: i32 = 2;
    pub(in crate::fuse) const INVAL_ENTRY: i32 = 3;
    pub(in crate::fuse) const RESEND: i32 = 7;
}

/// Flags of the answers to OPEN and OPENDIR.
pub mod open {
    /// The pages that the kernel has of the file, or the entries that it has of the directory, stay good.
    pub const KEEP_CACHE: u32 = 1 << 1;
    /// The kernel may keep the entries of the directory.
    pub const CACHE_DIR: u32 = 1 << 3;
    /// Nothing is sent when a descriptor is closed.
    pub const NOFLUSH: u32 = 1 << 5;
    /// The kernel reads another file in its place: the one that the backing id names.
    pub const PASSTHROUGH: u32 = 1 << 7;
}

/// `_IOW(FUSE_DEV_IOC_MAGIC, 1, struct fuse_backing_map)`, where the structure is `{ i32 fd; u32 flags; u64 padding }`.
pub(super) const IOC_BACKING_OPEN: u32 = iow(1, 16);
/// `_IOW(FUSE_DEV_IOC_MAGIC, 2, u32)`.
pub(super) const IOC_BACKING_CLOSE: u32 = iow(2, 4);

/// `_IOW(229, number, size)` of include/uapi/asm-generic/ioctl.h.
const fn iow(number: u32, size: u32) -> u32 {
    const MAGIC: u32 = 229;
    1 << 30 | size << 16 | MAGIC << 8 | number
}

/// The name of a kind of request, for those that a read-only file system gets.
pub fn operation_name(number: u32) -> Option<&'static str> {
    Some(match number {
        opcode::LOOKUP => "lookup",
        opcode::FORGET => "forget",
        opcode::GETATTR => "getattr",
        opcode::READLINK => "readlink",
        opcode::OPEN => "open",
        opcode::READ => "read",
        opcode::STATFS => "statfs",
        opcode::RELEASE => "release",
        opcode::GETXATTR => "getxattr",
        opcode::LISTXATTR => "listxattr",
        opcode::OPENDIR => "opendir",
        opcode::READDIR => "readdir",
        opcode::RELEASEDIR => "releasedir",
        opcode::INTERRUPT => "interrupt",
        opcode::BATCH_FORGET => "batch_forget",
        opcode::READDIRPLUS => "readdirplus",
        _ => return None,
    })
}
