//! Who keeps a mount's descriptors while its daemon is exchanged, as the daemon sees it: systemd, or a process of ours
//! ([`super::holder`]).
//!
//! Both are spoken to in the words of sd_notify(3): lines of `NAME=value` in a datagram, descriptors beside them. To systemd they go
//! to the socket that `NOTIFY_SOCKET` names, to our own process over a socket pair, which also tells when that process is gone. What
//! is kept comes back with the next process: from systemd as sd_listen_fds(3) has it, from ours the same way.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg, sendmsg_addr, socket_with,
};

/// The names under which descriptors are kept.
pub(super) const DEVICE: &str = "ocifs-device";
pub(super) const JOURNAL: &str = "ocifs-journal";
pub(super) const CONTROL: &str = "ocifs-control";

/// How long the manager may take to say that it has what it was sent.
const BARRIER: Duration = Duration::from_secs(5);

/// See the module's documentation.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    to: To,
}

#[derive(Debug)]
enum To {
    /// The other end of the pair.
    Holder { pid: u32 },
    /// The service manager's socket.
    Manager(SocketAddrUnix),
}

/// Who keeps a mount's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// A process of ours.
    Holder(u32),
    /// A process of ours that has ended: nobody any more.
    HolderGone(u32),
    /// The service manager.
    Manager,
}

impl Keeper {
    /// A process of ours, at the other end of a socket pair.
    ///
    /// # Errors
    /// When it is no such socket.
    pub fn holder(socket: OwnedFd) -> io::Result<Self> {
        fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
        let peer = rustix::net::sockopt::socket_peercred(&socket)?;
        let pid = u32::try_from(peer.pid.as_raw_nonzero().get()).unwrap_or(0);
        let to = To::Holder { pid };
        Ok(Self { socket, to })
    }

    /// The service manager that listens at `address`: a path, or a name that begins with `@`.
    ///
    /// # Errors
    /// When that is not an address, or there are no sockets.
    pub fn manager(address: &OsStr) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            _ => SocketAddrUnix::new(Path::new(address))?,
        };
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let to = To::Manager(address);
        Ok(Self { socket, to })
    }

    /// Who it is.
    pub fn who(&self) -> Kept {
        match self.to {
            To::Manager(_) => Kept::Manager,
            To::Holder { pid } if self.is_there() => Kept::Holder(pid),
            To::Holder { pid } => Kept::HolderGone(pid),
        }
    }

    /// Whether a process that ends now is followed by another one.
    pub fn is_there(&self) -> bool {
        match self.to {
            To::Manager(_) => true,
            To::Holder { .. } => {
                let at_once = Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
                poll(&mut polled, Some(&at_once)).is_ok()
                    && !polled[0].revents().contains(PollFlags::HUP)
            }
        }
    }

    /// The mount is up.
    ///
    /// # Errors
    /// When nobody hears it.
    pub fn ready(&self) -> io::Result<()> {
        self.say("READY=1", None)
    }

    /// This process goes on: for a manager that would kill it otherwise.
    pub(super) fn alive(&self) {
        self.try_say("WATCHDOG=1");
    }

    /// What to show to people.
    pub fn status(&self, text: &str) {
        let text = text.replace('\n', " ");
        self.try_say(&format!("STATUS={text}"));
    }

    /// What was kept is of no use: nobody needs to keep it any longer.
    pub fn forget(&self) {
        for name in [DEVICE, JOURNAL, CONTROL] {
            self.try_say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
        }
        if let Err(error) = self.heard() {
            tracing::debug!(%error, "the service manager did not say that it has forgotten");
        }
    }

    /// The mount goes, and the process after it: no other one is wanted.
    pub fn stopping(&self) {
        self.try_say("STOPPING=1");
    }

    /// This process ends now, for another one of `program`.
    ///
    /// # Errors
    /// When nobody hears it.
    pub fn restart(&self, program: &Path) -> io::Result<()> {
        match self.to {
            // It starts the program that its unit names, on our exit code.
            To::Manager(_) => Ok(()),
            To::Holder { .. } => {
                let mut text = b"X_OCIFS_RESTART=".to_vec();
                text.extend_from_slice(program.as_os_str().as_bytes());
                self.send(&text, None)
            }
        }
    }

    /// Gives a descriptor to be kept.
    pub(super) fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.say(&format!("FDSTORE=1\nFDNAME={name}"), Some(descriptor))
    }

    /// Returns once all that was said before was heard. A datagram of a process that is dead by the time it is read may not
    /// count with systemd; from ours it does.
    pub(super) fn heard(&self) -> io::Result<()> {
        if matches!(self.to, To::Holder { .. }) {
            return Ok(());
        }
        let (reader, writer) = io::pipe()?;
        self.say("BARRIER=1", Some(writer.as_fd()))?;
        drop(writer);
        let timeout = Timespec {
            tv_sec: i64::try_from(BARRIER.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let mut polled = [PollFd::new(&reader, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }

    fn try_say(&self, text: &str) {
        if let Err(error) = self.say(text, None) {
            tracing::debug!(%error, text, "the service manager was not told");
        }
    }

    fn say(&self, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send(text.as_bytes(), descriptor)
    }

    fn send(&self, text: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.as_slice();
        if !descriptors.is_empty() {
            beside.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let (text, flags) = ([IoSlice::new(text)], SendFlags::NOSIGNAL);
        match &self.to {
            To::Holder { .. } => sendmsg(&self.socket, &text, &mut beside, flags)?,
            To::Manager(to) => sendmsg_addr(&self.socket, to, &text, &mut beside, flags)?,
        };
        Ok(())
    }
}

/// What the process before this one has left: everything that it takes to go on.
#[derive(Debug)]
pub struct Left {
    /// The open device.
    pub(super) device: OwnedFd,
    /// The journal.
    pub journal: OwnedFd,
    /// The control socket, which listens.
    pub(super) control: Option<OwnedFd>,
}

impl Left {
    /// From descriptors and the names that they were kept under; `None` where something is missing, so that there is nothing to go
    /// on with. Programs that are started from here do not inherit them.
    pub fn from_kept(kept: impl IntoIterator<Item = (String, OwnedFd)>) -> Option<Self> {
        let (mut device, mut journal, mut control) = (None, None, None);
        for (name, descriptor) in kept {
            if let Err(error) = fcntl_setfd(&descriptor, FdFlags::CLOEXEC) {
                tracing::warn!(%error, number = descriptor.as_raw_fd(), "a descriptor that was kept is none");
                continue;
            }
            match name.as_str() {
                DEVICE => device = Some(descriptor),
                JOURNAL => journal = Some(descriptor),
                CONTROL => control = Some(descriptor),
                _ => tracing::debug!(name, "a descriptor of nobody's"),
            }
        }
        Some(Self {
            device: device?,
            journal: journal?,
            control,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_manager_is_told_in_datagrams() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let keeper = Keeper::manager(path.as_os_str()).unwrap();
        let heard = || {
            let mut bytes = [0; 200];
            let length = manager.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..length].to_vec()).unwrap()
        };
        keeper.ready().unwrap();
        assert_eq!(heard(), "READY=1");
        keeper.status("two\nlines");
        assert_eq!(heard(), "STATUS=two lines");
        keeper.keep(DEVICE, manager.as_fd()).unwrap();
        assert_eq!(heard(), "FDSTORE=1\nFDNAME=ocifs-device");
        keeper.restart(Path::new("/bin/ocifs")).unwrap();
        keeper.stopping();
        assert_eq!(heard(), "STOPPING=1");
        assert_eq!(keeper.who(), Kept::Manager);
        drop(manager);
        assert!(keeper.ready().is_err());
        assert!(Keeper::manager(OsStr::new(&"x".repeat(200))).is_err());
    }

    #[test]
    fn a_holder_is_known_and_missed() {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let keeper = Keeper::holder(theirs).unwrap();
        assert_eq!(keeper.who(), Kept::Holder(std::process::id()));
        keeper.ready().unwrap();
        assert!(keeper.is_there());
        drop(ours);
        assert_eq!(keeper.who(), Kept::HolderGone(std::process::id()));
        assert!(keeper.restart(Path::new("/bin/ocifs")).is_err());
    }

    #[test]
    fn what_was_left_is_whole_or_nothing() {
        let some = || std::fs::File::open("/dev/null").unwrap().into();
        let named =
            |names: &[&str]| Left::from_kept(names.iter().map(|name| ((*name).to_owned(), some())));
        assert!(named(&[]).is_none());
        assert!(named(&[DEVICE, CONTROL]).is_none());
        assert!(named(&[DEVICE, "other", JOURNAL]).is_some_and(|left| left.control.is_none()));
        assert!(named(&[JOURNAL, CONTROL, DEVICE]).is_some_and(|left| left.control.is_some()));
    }
}
