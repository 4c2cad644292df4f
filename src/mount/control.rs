//! The control socket: how `ocifs status`, `refresh` and `umount` find and ask the daemon of a mount.
//!
//! Each mount has a Unix socket `<runtime dir>/<major>-<minor>.sock`, named after the device number of its file system, so that it is
//! found from the mount table alone. It belongs to the daemon's user (0600, in a directory of 0700). A client sends one
//! line of JSON and gets one line of JSON: `{"ok": …}` or `{"error": "…"}`.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

use super::MountError;
use super::mountinfo::MountInfo;
use crate::base::Deadline;

/// The longest line that is read, in bytes.
const LINE_MAX: u64 = 16 << 20;

/// The longest request, in bytes.
const REQUEST_MAX: u64 = 64 << 10;

/// Clients that may wait to be answered.
const BACKLOG: i32 = 128;

/// A client that has sent nothing for so long is let go.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);

/// What a daemon can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "request", deny_unknown_fields)]
pub enum Request {
    /// What it does.
    Status,
    /// Which settings it works with.
    Config,
    /// Log more or less.
    Log {
        /// tracing's filters; nothing for those that it was started with.
        filter: Option<String>,
    },
    /// Ask the registry what a tag points at now.
    Refresh {
        /// The tag's reference.
        reference: String,
    },
    /// End, for another process that goes on in its place.
    Restart,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Response {
    Ok(Value),
    Error(String),
}

/// Answers requests: given by the layer above, which knows what there is to tell.
pub type Handler = Arc<dyn Fn(Request) -> BoxFuture<'static, Result<Value, String>> + Send + Sync>;

/// The socket of a mount.
pub(super) fn socket_path(runtime_dir: &Path, mount: &MountInfo) -> PathBuf {
    runtime_dir.join(format!("{}-{}.sock", mount.major, mount.minor))
}

/// Device and inode of a socket's name: a later mount may have taken the name. Good for as long as the socket is open, or the name
/// ([`Name`]): then its inode's number is nobody else's.
pub(super) type Identity = (u64, u64);

/// Held while a name in the runtime directory is made or removed, so that what was looked at is what is removed, and no socket has a name before
/// it listens. Mounts follow each other closely: a device's number is free once its mount is gone, and that is before its daemon has cleared
/// away. Who does not get it goes on without.
fn alone(runtime_dir: &Path) -> Option<OwnedFd> {
    const PATIENCE: Duration = Duration::from_secs(1);
    const LOOK_EVERY: Duration = Duration::from_millis(5);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(runtime_dir, flags, Mode::empty()).ok()?;
    let deadline = Deadline::after(PATIENCE);
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK) if !deadline.left().is_zero() => {
                std::thread::sleep(LOOK_EVERY);
            }
            Err(_) => return None,
        }
    }
}

/// The daemon's side. The socket goes away when this is dropped.
#[derive(Debug)]
pub(super) struct Server {
    path: PathBuf,
    identity: Identity,
    listener: OwnedFd,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Listens for requests about `mount`, which is there. Needs a tokio runtime.
    pub(super) fn start(
        runtime_dir: &Path,
        mount: &MountInfo,
        handler: Handler,
    ) -> Result<Self, MountError> {
        // The number of its device is nobody else's now, so what has this name is left over.
        Self::make(runtime_dir, mount, handler, |_| true)
    }

    /// Listens for requests about `mount`, which may be gone, and its number another one's. Needs a tokio runtime.
    pub(super) fn start_again(
        runtime_dir: &Path,
        mount: &MountInfo,
        handler: Handler,
    ) -> Result<Self, MountError> {
        Self::make(runtime_dir, mount, handler, is_left_over)
    }

    fn make(
        runtime_dir: &Path,
        mount: &MountInfo,
        handler: Handler,
        may_remove: impl FnOnce(&Path) -> bool,
    ) -> Result<Self, MountError> {
        let path = socket_path(runtime_dir, mount);
        let failed = |source| MountError::Setup {
            action: "cannot listen at",
            path: path.clone(),
            source,
        };
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(runtime_dir);
        made.map_err(|source| MountError::Setup {
            action: "cannot make",
            path: runtime_dir.to_owned(),
            source,
        })?;
        let _alone = alone(runtime_dir);
        if may_remove(&path)
            && let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(failed(error));
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let identity = identity(&path).map_err(failed)?;
        Self::listen(path.clone(), identity, listener, handler).map_err(failed)
    }

    /// Goes on listening at a socket that another process has made, and that `was` this. Who asked meanwhile is answered now. Where the
    /// mount is gone, its name may be another socket's.
    ///
    /// # Errors
    /// `NotFound` when nothing has its name.
    pub(super) fn resume(listener: OwnedFd, was: Identity, handler: Handler) -> io::Result<Self> {
        let (path, _) = named(listener.as_fd()).ok_or(io::ErrorKind::NotFound)?;
        // Listening once more makes us the process that clients see at the other end.
        rustix::net::listen(&listener, BACKLOG)?;
        Self::listen(path, was, listener.into(), handler)
    }

    /// Which socket it is, for the process that goes on from here.
    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// The socket, for whoever keeps it open for the next process.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    fn listen(
        path: PathBuf,
        identity: Identity,
        listener: UnixListener,
        handler: Handler,
    ) -> io::Result<Self> {
        let kept = listener.try_clone()?.into();
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        tokio::spawn(serve(stream, handler.clone()));
                    }
                    Err(error) => {
                        // Out of descriptors, most likely: the others get better by waiting.
                        tracing::warn!(%error, "a client of the control socket was not accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(Self {
            path,
            identity,
            listener: kept,
            task,
        })
    }
}

/// Whether nobody listens there.
fn is_left_over(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The name of a socket that listens, where it has one, and what has that name now.
pub(super) fn named(listener: BorrowedFd<'_>) -> Option<(PathBuf, Identity)> {
    let address = rustix::net::getsockname(listener).ok()?;
    let address = SocketAddrUnix::try_from(address).ok()?;
    let path = PathBuf::from(OsStr::from_bytes(address.path()?.to_bytes()));
    let identity = identity(&path).ok()?;
    Some((path, identity))
}

/// Removes the name of a socket that is open, if it is this socket's still.
pub(super) fn remove(path: &Path, was: Identity) {
    let _alone = path.parent().and_then(alone);
    if identity(path).is_ok_and(|now| now == was) {
        let _ = fs::remove_file(path);
    }
}

/// The name of a mount's socket.
#[derive(Debug)]
pub(super) struct Name {
    path: PathBuf,
    identity: Identity,
    _open: fs::File,
}

impl Name {
    /// Of a mount that is there: later the name may be another one's.
    pub(super) fn of(runtime_dir: &Path, mount: &MountInfo) -> Option<Self> {
        let path = socket_path(runtime_dir, mount);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = rustix::fs::open(&path, flags, Mode::empty()).ok()?;
        let open = fs::File::from(open);
        let metadata = open.metadata().ok()?;
        Some(Self {
            path,
            identity: (metadata.dev(), metadata.ino()),
            _open: open,
        })
    }

    fn is_gone(&self) -> bool {
        !identity(&self.path).is_ok_and(|now| now == self.identity)
    }

    /// Waits for it to be gone: whoever keeps the socket removes it last. That of a socket that nobody keeps is removed here. Whether
    /// it is gone by the deadline.
    pub(super) fn gone_by(&self, deadline: Deadline) -> bool {
        const LOOK_EVERY: Duration = Duration::from_millis(10);
        while !self.is_gone() {
            if is_left_over(&self.path) {
                remove(&self.path, self.identity);
            }
            if deadline.left().is_zero() {
                return self.is_gone();
            }
            std::thread::sleep(LOOK_EVERY);
        }
        true
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        remove(&self.path, self.identity);
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

async fn serve(stream: tokio::net::UnixStream, handler: Handler) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = tokio::io::BufReader::new(reader.take(REQUEST_MAX));
    match tokio::time::timeout(CLIENT_PATIENCE, reader.read_line(&mut line)).await {
        Ok(Ok(length)) if length > 0 => {}
        _ => return,
    }
    let response = match serde_json::from_str(&line) {
        Ok(request) => match handler(request).await {
            Ok(value) => Response::Ok(value),
            Err(error) => Response::Error(error),
        },
        Err(error) => Response::Error(format!(
            "not a request that this version of ocifs knows: {error}"
        )),
    };
    let Ok(mut text) = serde_json::to_string(&response) else {
        return;
    };
    text.push('\n');
    let _ = tokio::time::timeout(CLIENT_PATIENCE, writer.write_all(text.as_bytes())).await;
}

/// Asks the daemon of a mount, and waits for its answer for at most `patience`.
pub fn request(
    runtime_dir: &Path,
    mount: &MountInfo,
    request: &Request,
    patience: Duration,
) -> Result<Value, MountError> {
    let socket = socket_path(runtime_dir, mount);
    match ask(&socket, request, patience) {
        Ok(Response::Ok(value)) => Ok(value),
        Ok(Response::Error(error)) => Err(MountError::Refused(error)),
        Err(source) => Err(MountError::Control {
            path: mount.path.clone(),
            socket,
            source,
        }),
    }
}

fn ask(socket: &Path, request: &Request, patience: Duration) -> io::Result<Response> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(patience))?;
    stream.set_read_timeout(Some(patience))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    line.clear();
    BufReader::new(stream.take(LINE_MAX)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// The process that listens at a mount's socket.
pub(super) fn daemon(runtime_dir: &Path, mount: &MountInfo) -> Option<u32> {
    let stream = UnixStream::connect(socket_path(runtime_dir, mount)).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
    u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount() -> MountInfo {
        MountInfo {
            major: 0,
            minor: 999,
            root: "/".into(),
            path: "/models".into(),
            kind: "fuse.ocifs".into(),
        }
    }

    fn handler() -> Handler {
        Arc::new(|request| {
            Box::pin(async move {
                match request {
                    Request::Status => Ok(serde_json::json!({ "pid": std::process::id() })),
                    Request::Refresh { reference } => Err(format!("{reference}: not found")),
                    _ => Err("no".into()),
                }
            })
        })
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn requests_are_answered_and_the_socket_is_private_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let runtime_dir = directory.path().join("ocifs");
        let server = Server::start(&runtime_dir, &mount(), handler()).unwrap();
        let path = socket_path(&runtime_dir, &mount());
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            fs::metadata(&runtime_dir).unwrap().permissions().mode() & 0o777,
            0o700
        );

        let dir = runtime_dir.clone();
        tokio::task::spawn_blocking(move || {
            let ask = |question| request(&dir, &mount(), &question, Duration::from_secs(5));
            assert_eq!(ask(Request::Status).unwrap()["pid"], std::process::id());
            let error = ask(Request::Refresh {
                reference: "gpt2:v9".into(),
            })
            .unwrap_err();
            assert_eq!(error.to_string(), "gpt2:v9: not found");
            assert_eq!(daemon(&dir, &mount()), Some(std::process::id()));
            let mut stream = UnixStream::connect(socket_path(&dir, &mount())).unwrap();
            stream.write_all(b"nonsense\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with(r#"{"error":"#), "{answer}");
        })
        .await
        .unwrap();

        // The process that goes on listening answers from then on, also who asked before.
        let listener = server.descriptor().try_clone_to_owned().unwrap();
        let was = server.identity();
        std::mem::forget(server);
        let server = Server::resume(listener, was, handler()).unwrap();
        let dir = runtime_dir.clone();
        let ask = move || request(&dir, &mount(), &Request::Status, Duration::from_secs(5));
        let answer = tokio::task::spawn_blocking(ask).await.unwrap();
        assert_eq!(answer.unwrap()["pid"], std::process::id());

        // The next daemon on the same device number takes the name over, and keeps it when the first one ends.
        let next = Server::start(&runtime_dir, &mount(), handler()).unwrap();
        let listener = server.descriptor().try_clone_to_owned().unwrap();
        drop(server);
        assert!(path.exists());
        // Nor is it lost to one that goes on for the first one's mount only to find it gone, whatever became of the first one's socket.
        drop(Server::resume(listener, was, handler()).unwrap());
        assert!(path.exists());
        Server::start_again(&runtime_dir, &mount(), handler()).unwrap_err();
        assert!(path.exists());
        drop(next);
        assert!(!path.exists());
        drop(Server::start_again(&runtime_dir, &mount(), handler()).unwrap());
        assert!(!path.exists());
        let error = request(
            &runtime_dir,
            &mount(),
            &Request::Status,
            Duration::from_secs(1),
        )
        .unwrap_err();
        assert!(matches!(error, MountError::Control { .. }));

        // Of a process that was killed the name stays, and nobody listens.
        drop(UnixListener::bind(&path).unwrap());
        let soon = || Deadline::after(Duration::from_millis(50));
        let name = || Name::of(&runtime_dir, &mount()).unwrap();
        assert!(name().gone_by(soon()));
        assert!(!path.exists());
        let listener = UnixListener::bind(&path).unwrap();
        let listens = name();
        assert!(!listens.gone_by(soon()));
        assert_eq!(named(listener.as_fd()).unwrap().0, path);
        // One that has the name next is not waited for, nor is its name removed, and be it before it listens.
        drop(listener);
        fs::remove_file(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(listens.gone_by(Deadline::after(Duration::ZERO)));
        assert!(path.exists());
    }

    #[test]
    fn requests_look_like_this_on_the_wire() {
        let line = serde_json::to_string(&Request::Refresh {
            reference: "gpt2:v1".into(),
        })
        .unwrap();
        assert_eq!(line, r#"{"request":"refresh","reference":"gpt2:v1"}"#);
        assert_eq!(
            serde_json::to_string(&Request::Status).unwrap(),
            r#"{"request":"status"}"#
        );
    }
}
