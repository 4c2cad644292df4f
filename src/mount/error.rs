//! What can go wrong with a mount, outside the answers to requests.

use std::io;
use std::path::PathBuf;

/// What can go wrong with a mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The directory cannot be mounted on.
    #[error("{path} cannot be mounted on: {reason}")]
    Point {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// ocifs is mounted there.
    #[error("ocifs is mounted on {path} already; `ocifs umount {path}` takes it down")]
    AlreadyMounted {
        /// The directory.
        path: PathBuf,
    },
    /// The kernel did not mount.
    #[error(
        "cannot mount on {path}; is /dev/fuse there (`modprobe fuse`), and for users without root fusermount3?"
    )]
    Mount {
        /// The directory.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Nothing is mounted there.
    #[error("nothing is mounted on {path}; `ocifs status` lists the mounts")]
    NotMounted {
        /// The directory.
        path: PathBuf,
    },
    /// Something else is mounted there.
    #[error("{path} is a mount of type {kind}, not ocifs")]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// The file system type.
        kind: String,
    },
    /// The mount is in use.
    #[error(
        "{path} is busy: a process has its working directory or an open file there; see `fuser -vm {path}`, or use --lazy"
    )]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// The kernel did not unmount.
    #[error("cannot unmount {path}")]
    Umount {
        /// The directory.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The daemon of a mount could not be spoken to.
    #[error(
        "the daemon of {path} cannot be reached at {socket}; does it run, and as the same user?"
    )]
    Control {
        /// The mount point.
        path: PathBuf,
        /// The socket.
        socket: PathBuf,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// The daemon refused a request.
    #[error("{0}")]
    Refused(String),
    /// Something that a mount needs could not be set up.
    #[error("{action} {path}")]
    Setup {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// The session broke.
    #[error("the connection to the kernel broke")]
    Session(#[source] io::Error),
}
