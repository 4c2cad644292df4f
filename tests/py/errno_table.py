"""What each system call answers below a directory: one line of JSON, `operation: "ok"`, a value, or the name of the error.

errno_table.py FILES LINKS [UID]: FILES has the file `data`; LINKS has the file `file`, the link `link` to it and the directory `dir` with
the file `inner`. What is tried would change all of them; nothing is cleaned up, for nothing must come of it.
"""

import ctypes, errno, fcntl, json, mmap, os, signal, socket, stat, struct, sys

FILES, LINKS = sys.argv[1:3]
if len(sys.argv) > 3:
    uid = int(sys.argv[3])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
os.chdir("/")
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

AT_FDCWD = -100
FILE, DATA = LINKS + "/file", FILES + "/data"
LINK, DIR = LINKS + "/link", LINKS + "/dir"
NEW = LINKS + "/new"
table = {}


def syscall(number, *args):
    args = [arg.encode() if isinstance(arg, str) else arg for arg in args]
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), "syscall")
    return result


def row(name, action, value=False):
    try:
        result = action()
        table[name] = result if value else "ok"
        if not value and isinstance(result, int) and not isinstance(result, bool) and name.startswith("open"):
            os.close(result)
    except OSError as error:
        table[name] = errno.errorcode.get(error.errno, str(error.errno))


def with_fd(path, flags, action):
    fd = os.open(path, flags)
    try:
        return action(fd)
    finally:
        os.close(fd)


O = {name: getattr(os, name) for name in dir(os) if name.startswith("O_")}
for path, which in ((FILE, "file"), (DATA, "data")):
    for flags in (
        "O_RDONLY", "O_WRONLY", "O_RDWR", "O_RDONLY|O_TRUNC", "O_WRONLY|O_TRUNC", "O_WRONLY|O_APPEND", "O_RDONLY|O_APPEND",
        "O_RDONLY|O_CREAT", "O_RDWR|O_CREAT", "O_RDONLY|O_CREAT|O_EXCL", "O_WRONLY|O_CREAT|O_EXCL", "O_RDONLY|O_DIRECTORY",
        "O_RDONLY|O_NOFOLLOW", "O_PATH", "O_RDONLY|O_DIRECT", "O_RDONLY|O_SYNC", "O_RDONLY|O_NONBLOCK", "O_RDONLY|O_NOATIME",
        "O_RDONLY|O_CREAT|O_DIRECTORY",
    ):
        value = 0
        for flag in flags.split("|"):
            value |= O[flag]
        row(f"open {which} {flags}", lambda: os.open(path, value, 0o644))
    row(f"truncate {which}", lambda: os.truncate(path, 0))
    row(f"chmod {which}", lambda: os.chmod(path, 0o777))
    row(f"chmod {which} to what it is", lambda: os.chmod(path, 0o444))
    row(f"chown {which}", lambda: os.chown(path, 0, 0))
    row(f"lchown {which}", lambda: os.lchown(path, 1, 1))
    row(f"utimens {which}", lambda: os.utime(path, (1, 1)))
    row(f"utimens {which} now", lambda: os.utime(path))
    row(f"unlink {which}", lambda: os.unlink(path))
    row(f"rmdir {which}", lambda: os.rmdir(path))
    row(f"readlink {which}", lambda: os.readlink(path))
    row(f"access {which} R_OK", lambda: syscall(269, AT_FDCWD, path, os.R_OK))
    row(f"access {which} W_OK", lambda: syscall(269, AT_FDCWD, path, os.W_OK))
    row(f"access {which} X_OK", lambda: syscall(269, AT_FDCWD, path, os.X_OK))
    row(f"faccessat2 {which} W_OK AT_EACCESS", lambda: syscall(439, AT_FDCWD, path, os.W_OK, 0x200))
    row(f"faccessat2 {which} bad flags", lambda: syscall(439, AT_FDCWD, path, os.R_OK, 0x40000))
    row(f"execve {which}", lambda: os.execv(path, [path]))
    row(f"chdir {which}", lambda: os.chdir(path))
    row(f"statfs {which}", lambda: bool(os.statvfs(path).f_flag & os.ST_RDONLY), value=True)
    row(f"setxattr {which} user", lambda: os.setxattr(path, "user.x", b"y"))
    row(f"setxattr {which} security", lambda: os.setxattr(path, "security.x", b"y"))
    row(f"setxattr {which} trusted", lambda: os.setxattr(path, "trusted.x", b"y"))
    row(f"removexattr {which}", lambda: os.removexattr(path, "user.x"))
    row(f"getxattr {which} absent", lambda: os.getxattr(path, "user.absent"))
    row(f"getxattr {which} security.selinux", lambda: os.getxattr(path, "security.selinux"))
    row(f"getxattr {which} acl", lambda: os.getxattr(path, "system.posix_acl_access"))
    row(f"getxattr {which} trusted", lambda: os.getxattr(path, "trusted.x"))
    row(f"getxattr {which} no namespace", lambda: os.getxattr(path, "nothing"))
    row(f"setxattr {which} acl", lambda: os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2)))
    row(f"inotify {which}", lambda: syscall(254, syscall(294, 0), path, 0x2))
    row(f"link {which}", lambda: os.link(path, NEW))
    row(f"link to {which}", lambda: os.link(FILE, path))
    row(f"rename {which}", lambda: os.rename(path, path + "2"))
    row(f"rename {which} out", lambda: os.rename(path, "/tmp/errno-table-moved"))
    row(f"rename {which} to itself", lambda: os.rename(path, path))
    row(f"stat below {which}", lambda: os.stat(path + "/x"))
    row(f"stat {which}/", lambda: os.stat(path + "/"))
    row(f"socket at {which}", lambda: socket.socket(socket.AF_UNIX).connect(path))
    row(f"bind at {which}", lambda: socket.socket(socket.AF_UNIX).bind(path))
    row(f"swapon {which}", lambda: syscall(167, path, 0))
    row(f"acct {which}", lambda: syscall(163, path))

    def fd_row(name, action, value=False, flags=os.O_RDONLY):
        row(f"{name} {which}", lambda: with_fd(path, flags, action), value)

    buffer = ctypes.create_string_buffer(4096)
    size = os.stat(path).st_size
    fd_row("write", lambda fd: os.write(fd, b"x"))
    fd_row("pwrite", lambda fd: os.pwrite(fd, b"x", 0))
    fd_row("ftruncate", lambda fd: os.ftruncate(fd, 0))
    fd_row("fallocate", lambda fd: syscall(285, fd, 0, 0, 4096))
    fd_row("fallocate punch", lambda fd: syscall(285, fd, 3, 0, 4096))
    fd_row("fchmod", lambda fd: os.fchmod(fd, 0o777))
    fd_row("fchown", lambda fd: os.fchown(fd, 0, 0))
    fd_row("futimens", lambda fd: os.utime(fd, (1, 1)))
    fd_row("fsetxattr", lambda fd: os.setxattr(fd, "user.x", b"y"))
    fd_row("fremovexattr", lambda fd: os.removexattr(fd, "user.x"))
    fd_row("fsync", lambda fd: os.fsync(fd))
    fd_row("fdatasync", lambda fd: os.fdatasync(fd))
    fd_row("syncfs", lambda fd: syscall(306, fd))
    fd_row("sync_file_range", lambda fd: syscall(277, fd, 0, 4096, 2))
    fd_row("fadvise", lambda fd: os.posix_fadvise(fd, 0, 4096, os.POSIX_FADV_WILLNEED))
    fd_row("fadvise dontneed", lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))
    fd_row("fadvise bad", lambda fd: syscall(221, fd, 0, 0, 99))
    fd_row("readahead", lambda fd: syscall(187, fd, 0, 4096))
    fd_row("flock shared", lambda fd: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB))
    fd_row("flock exclusive", lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    fd_row("lock shared", lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB))
    fd_row("lock exclusive", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    fd_row("ofd lock shared", lambda fd: fcntl.fcntl(fd, 37, struct.pack("hhqqi", fcntl.F_RDLCK, 0, 0, 0, 0)))
    fd_row("lease read", lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK))
    fd_row("lease write", lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK))
    fd_row("lease none", lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK))
    fd_row("getlease", lambda fd: fcntl.fcntl(fd, fcntl.F_GETLEASE), value=True)
    fd_row("setfl append", lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND))
    fd_row("setfl direct", lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT))
    fd_row("setfl noatime", lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NOATIME))
    fd_row("seek data", lambda fd: os.lseek(fd, 0, os.SEEK_DATA), value=True)
    fd_row("seek data inside", lambda fd: os.lseek(fd, 3, os.SEEK_DATA), value=True)
    fd_row("seek data at the end", lambda fd: os.lseek(fd, size, os.SEEK_DATA), value=True)
    fd_row("seek hole", lambda fd: os.lseek(fd, 0, os.SEEK_HOLE) == size, value=True)
    fd_row("seek hole at the end", lambda fd: os.lseek(fd, size, os.SEEK_HOLE), value=True)
    fd_row("seek hole behind", lambda fd: os.lseek(fd, size + 1, os.SEEK_HOLE), value=True)
    fd_row("seek before", lambda fd: os.lseek(fd, -1, os.SEEK_SET), value=True)
    fd_row("seek behind", lambda fd: os.lseek(fd, 10, os.SEEK_END) == size + 10, value=True)
    fd_row("seek bad", lambda fd: os.lseek(fd, 0, 99), value=True)
    fd_row("pread at the end", lambda fd: os.pread(fd, 10, size).hex(), value=True)
    fd_row("pread behind", lambda fd: os.pread(fd, 10, size + 4096).hex(), value=True)
    fd_row("pread far behind", lambda fd: os.pread(fd, 10, (1 << 63) - 1).hex(), value=True)
    fd_row("pread before", lambda fd: os.pread(fd, 10, -1), value=True)
    fd_row("pread nothing", lambda fd: os.pread(fd, 0, 0).hex(), value=True)
    fd_row("pread to a bad address", lambda fd: syscall(17, fd, ctypes.c_void_p(8), 10, 0))
    fd_row("getdents", lambda fd: syscall(217, fd, buffer, 4096))
    fd_row("mmap private", lambda fd: mmap.mmap(fd, 4, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ).close())
    fd_row("mmap private to write", lambda fd: mmap.mmap(fd, 4, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE).close())
    fd_row("mmap shared", lambda fd: mmap.mmap(fd, 4, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ).close())
    fd_row("mmap shared to write", lambda fd: mmap.mmap(fd, 4, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE).close())
    fd_row("mmap shared to execute", lambda fd: mmap.mmap(fd, 4, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_EXEC).close())
    fd_row("ioctl unknown", lambda fd: fcntl.ioctl(fd, 0x1234))
    fd_row("ioctl TCGETS", lambda fd: fcntl.ioctl(fd, 0x5401, b"\0" * 64))
    fd_row("ioctl FIONREAD", lambda fd: struct.unpack("i", fcntl.ioctl(fd, 0x541B, b"\0" * 4))[0] == size, value=True)
    fd_row("ioctl FIGETBSZ", lambda fd: fcntl.ioctl(fd, 2, b"\0" * 4))
    fd_row("ioctl FIBMAP", lambda fd: fcntl.ioctl(fd, 1, b"\0" * 4))
    fd_row("ioctl FIEMAP", lambda fd: fcntl.ioctl(fd, 0xC020660B, struct.pack("=QQIIII", 0, 4096, 0, 0, 0, 0)))
    fd_row("ioctl GETFLAGS", lambda fd: fcntl.ioctl(fd, 0x80086601, b"\0" * 8))
    fd_row("ioctl SETFLAGS", lambda fd: fcntl.ioctl(fd, 0x40086602, b"\0" * 8))
    fd_row("ioctl FSGETXATTR", lambda fd: fcntl.ioctl(fd, 0x801C581F, b"\0" * 28))
    fd_row("ioctl GETVERSION", lambda fd: fcntl.ioctl(fd, 0x80087601, b"\0" * 8))
    fd_row("ioctl FICLONE", lambda fd: with_fd(FILE, os.O_RDONLY, lambda other: fcntl.ioctl(fd, 0x40049409, other)))
    fd_row("ioctl FITRIM", lambda fd: fcntl.ioctl(fd, 0xC0185879, b"\0" * 24))
    fd_row("ioctl FIFREEZE", lambda fd: fcntl.ioctl(fd, 0xC0045877, b"\0" * 4))
    fd_row("copy_file_range into", lambda fd: with_fd(FILE, os.O_RDONLY, lambda other: os.copy_file_range(other, fd, 4)))
    fd_row("copy_file_range out", lambda fd: with_fd("/tmp", os.O_TMPFILE | os.O_RDWR, lambda out: os.copy_file_range(fd, out, 4)), value=True)
    fd_row("sendfile out", lambda fd: with_fd("/tmp", os.O_TMPFILE | os.O_RDWR, lambda out: os.sendfile(out, fd, 0, 4)), value=True)
    fd_row("sendfile into", lambda fd: with_fd(FILE, os.O_RDONLY, lambda other: os.sendfile(fd, other, 0, 4)))
    fd_row("splice", lambda fd: os.splice(fd, os.pipe()[1], 4), value=True)
    fd_row("openat below", lambda fd: os.open("x", os.O_RDONLY, dir_fd=fd))
    fd_row("fchdir", lambda fd: os.fchdir(fd))
    fd_row("reopen to write", lambda fd: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
    fd_row("linkat empty path", lambda fd: syscall(265, fd, "", AT_FDCWD, NEW, 0x1000))
    fd_row("name_to_handle_at", lambda fd: syscall(303, fd, "", ctypes.create_string_buffer(struct.pack("=Ii", 0, 0), 200), ctypes.byref(ctypes.c_int()), 0x1000))
    fd_row("read O_PATH", lambda fd: os.read(fd, 1), flags=os.O_PATH)
    fd_row("read direct", lambda fd: os.preadv(fd, [mmap.mmap(-1, 4096)], 0), value=True, flags=os.O_RDONLY | os.O_DIRECT)
    fd_row("poll", lambda fd: __import__("select").select([fd], [fd], [], 5)[0] == [fd], value=True)
    fd_row("epoll", lambda fd: __import__("select").epoll().register(fd))

row("create", lambda: os.open(NEW, os.O_CREAT | os.O_WRONLY, 0o644))
row("create read-only", lambda: os.open(NEW, os.O_CREAT | os.O_RDONLY, 0o644))
row("create exclusive", lambda: os.open(NEW, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))
row("create below a file", lambda: os.open(FILE + "/x", os.O_CREAT | os.O_WRONLY, 0o644))
row("create a long name", lambda: os.open(LINKS + "/" + "x" * 256, os.O_CREAT | os.O_WRONLY, 0o644))
row("creat over the link", lambda: os.open(LINK, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644))
row("create the directory", lambda: os.open(DIR, os.O_CREAT | os.O_RDONLY, 0o644))
row("tmpfile", lambda: os.open(LINKS, os.O_TMPFILE | os.O_RDWR, 0o600))
row("mkdir", lambda: os.mkdir(NEW))
row("mkdir over a file", lambda: os.mkdir(FILE))
row("mkdir over a directory", lambda: os.mkdir(DIR))
row("mkdir below a file", lambda: os.mkdir(FILE + "/x"))
row("mkdir below nothing", lambda: os.mkdir(NEW + "/x"))
row("mknod file", lambda: os.mknod(NEW, stat.S_IFREG | 0o600))
row("mknod device", lambda: os.mknod(NEW, stat.S_IFCHR | 0o600, os.makedev(1, 3)))
row("mknod over a file", lambda: os.mknod(FILE, stat.S_IFREG | 0o600))
row("mkfifo", lambda: os.mkfifo(NEW))
row("symlink", lambda: os.symlink("x", NEW))
row("symlink over a file", lambda: os.symlink("x", FILE))
row("link the link", lambda: os.link(LINK, NEW, follow_symlinks=False))
row("link nothing", lambda: os.link(NEW, NEW + "2"))
row("link a directory", lambda: os.link(DIR, NEW))
row("link from outside", lambda: os.link("/etc/passwd", NEW))
row("link to outside", lambda: os.link(FILE, "/tmp/errno-table-link"))
row("rmdir", lambda: os.rmdir(DIR))
row("rmdir nothing", lambda: os.rmdir(NEW))
row("rmdir dot", lambda: os.rmdir(DIR + "/."))
row("rmdir dot dot", lambda: os.rmdir(DIR + "/.."))
row("unlink the directory", lambda: os.unlink(DIR))
row("unlink nothing", lambda: os.unlink(NEW))
row("unlink the link", lambda: os.unlink(LINK))
row("unlink with a slash", lambda: os.unlink(FILE + "/"))
row("rename nothing", lambda: os.rename(NEW, NEW + "2"))
row("rename over", lambda: os.rename(FILE, DIR + "/inner"))
row("rename a directory", lambda: os.rename(DIR, NEW))
row("rename a directory into itself", lambda: os.rename(DIR, DIR + "/x"))
row("rename a file over a directory", lambda: os.rename(FILE, DIR))
row("rename from outside", lambda: os.rename("/etc/passwd", NEW))
for flag, name in ((1, "noreplace"), (2, "exchange"), (4, "whiteout"), (8, "unknown"), (3, "both")):
    row(f"renameat2 {name}", lambda: syscall(316, AT_FDCWD, FILE, AT_FDCWD, NEW, flag))
    row(f"renameat2 {name} over", lambda: syscall(316, AT_FDCWD, FILE, AT_FDCWD, DIR + "/inner", flag))
row("open link O_NOFOLLOW", lambda: os.open(LINK, os.O_RDONLY | os.O_NOFOLLOW))
row("open link O_NOFOLLOW|O_PATH", lambda: os.open(LINK, os.O_PATH | os.O_NOFOLLOW))
row("open link O_WRONLY", lambda: os.open(LINK, os.O_WRONLY))
row("readlink", lambda: os.readlink(LINK), value=True)
row("readlink directory", lambda: os.readlink(DIR))
row("lchmod link", lambda: syscall(452, AT_FDCWD, LINK, 0o777, 0x100))
row("lchown link", lambda: os.lchown(LINK, 1, 1))
row("lutimes link", lambda: os.utime(LINK, (1, 1), follow_symlinks=False))
row("lsetxattr link", lambda: os.setxattr(LINK, "user.x", b"y", follow_symlinks=False))
row("lgetxattr link", lambda: os.getxattr(LINK, "user.x", follow_symlinks=False))
row("open directory O_WRONLY", lambda: os.open(DIR, os.O_WRONLY))
row("open directory O_RDWR", lambda: os.open(DIR, os.O_RDWR))
row("open directory O_DIRECT", lambda: os.open(DIR, os.O_RDONLY | os.O_DIRECT))
row("open directory O_TRUNC", lambda: os.open(DIR, os.O_RDONLY | os.O_TRUNC))
row("open directory O_CREAT", lambda: os.open(DIR, os.O_RDONLY | os.O_CREAT))
row("read directory", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: os.read(fd, 1)))
row("pread directory", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: os.pread(fd, 1, 0)))
row("mmap directory", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: mmap.mmap(fd, 4, prot=mmap.PROT_READ)))
row("fsync directory", lambda: with_fd(DIR, os.O_RDONLY, os.fsync))
row("getdents to nothing", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: syscall(217, fd, buffer, 1)))
row("flock directory", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)))
row("lease directory", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)))
row("dnotify directory", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_MODIFY)))
row("ioctl directory", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: fcntl.ioctl(fd, 0x1234)))
row("ioctl directory GETFLAGS", lambda: with_fd(DIR, os.O_RDONLY, lambda fd: fcntl.ioctl(fd, 0x80086601, b"\0" * 8)))
row("chmod directory", lambda: os.chmod(DIR, 0o700))
row("chown directory", lambda: os.chown(DIR, 0, 0))
row("utimens directory", lambda: os.utime(DIR))
row("setxattr directory", lambda: os.setxattr(DIR, "user.x", b"y"))
row("setxattr directory default acl", lambda: os.setxattr(DIR, "system.posix_acl_default", struct.pack("<I", 2)))
row("access directory W_OK", lambda: syscall(269, AT_FDCWD, DIR, os.W_OK))
row("access nothing", lambda: syscall(269, AT_FDCWD, NEW, os.W_OK))
row("truncate directory", lambda: os.truncate(DIR, 0))
row("truncate nothing", lambda: os.truncate(NEW, 0))
row("truncate before", lambda: syscall(76, FILE, -1))
row("execve directory", lambda: os.execv(DIR, ["x"]))
row("statvfs", lambda: bool(os.statvfs(LINKS).f_flag & os.ST_RDONLY), value=True)
row("statvfs name max", lambda: os.statvfs(LINKS).f_namemax >= 255, value=True)
row("statvfs frsize", lambda: os.statvfs(LINKS).f_frsize > 0, value=True)
row("pathconf link max", lambda: os.pathconf(FILE, "PC_LINK_MAX") > 0, value=True)
row("a name of 255", lambda: os.stat(LINKS + "/" + "x" * 255))
row("a name of 256", lambda: os.stat(LINKS + "/" + "x" * 256))
row("inotify directory", lambda: syscall(254, syscall(294, 0), DIR, 0x100))
row("fanotify", lambda: syscall(301, syscall(300, 0, 0), 1, 0x20, AT_FDCWD, FILE))
row("mount point of a bind", lambda: libc.umount2(DIR.encode(), 8) == -1 and ctypes.get_errno() == errno.EINVAL, value=True)
row("pivot", lambda: syscall(161, FILE))
row("quotactl", lambda: syscall(443, os.open(DIR, os.O_RDONLY), 0x80000700, 0, buffer))

json.dump(table, sys.stdout, indent=0, sort_keys=True)
