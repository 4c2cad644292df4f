//! Mounting: by mount(2) where we may, else by the setuid program fusermount3.

use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// What to mount.
#[derive(Clone, Copy, Debug)]
pub struct MountSpec<'a> {
    /// Where: an absolute path of a directory.
    pub path: &'a Path,
    /// The source, as the mount table shows it.
    pub source: &'a str,
    /// The type, as the mount table shows it behind `fuse.`.
    pub subtype: &'a str,
    /// Whether other users than the one who mounts may look.
    pub allow_other: bool,
}

/// Makes a read-only FUSE mount; the device on which the kernel will introduce itself.
///
/// # Errors
/// What mount(2) says, or fusermount3 where mount(2) is not for us.
pub fn mount(spec: &MountSpec<'_>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let device = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
    match mount_by(&device, spec) {
        Ok(()) => Ok(device),
        Err(Errno::PERM) => {
            drop(device);
            by_fusermount(spec)
        }
        Err(error) => Err(error.into()),
    }
}

/// The options that the kernel understands. It checks the mode bits that we report itself (`default_permissions`): access(2) and
/// execve(2) get right answers without a request.
fn options(spec: &MountSpec<'_>) -> String {
    let other = if spec.allow_other { ",allow_other" } else { "" };
    format!("subtype={},default_permissions{other}", spec.subtype)
}

fn mount_by(device: &OwnedFd, spec: &MountSpec<'_>) -> Result<(), Errno> {
    let root = rustix::fs::stat(spec.path)?;
    let data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},{}",
        device.as_raw_fd(),
        root.st_mode & libc::S_IFMT,
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
        options(spec),
    );
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    rustix::mount::mount(spec.source, spec.path, "fuse", flags, Some(data.as_c_str()))
}

/// fusermount3 opens the device, mounts, and sends the descriptor over a socket whose number stands in `_FUSE_COMMFD`.
fn by_fusermount(spec: &MountSpec<'_>) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("fusermount3");
    command
        .arg("-o")
        .arg(format!(
            "fsname={},{},ro,nodev,nosuid",
            spec.source,
            options(spec)
        ))
        .arg("--")
        .arg(std::ffi::OsStr::from_bytes(
            spec.path.as_os_str().as_bytes(),
        ))
        .env("_FUSE_COMMFD", "0")
        .env("LC_ALL", "C")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child = command.spawn()?;
    // It holds the other end of the socket; while it does, nothing would end the wait for a program that says nothing.
    drop(command);
    let device = receive(&ours);
    let output = child.wait_with_output()?;
    if output.status.success()
        && let Some(device) = device?
    {
        return Ok(device);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let kind = if text.contains("user_allow_other") {
        io::ErrorKind::PermissionDenied
    } else {
        io::ErrorKind::Other
    };
    Err(io::Error::new(kind, text.trim().to_owned()))
}

/// One descriptor from a socket (`SCM_RIGHTS`, unix(7)); `None` at its end.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    loop {
        let data = &mut [IoSliceMut::new(&mut byte)];
        match recvmsg(socket, data, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    }))
}
