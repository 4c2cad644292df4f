//! A mount's life: up, serving, down.

use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

use fuser::{Config, INodeNo, MountOption, Notifier, Session, SessionACL};
use rustix::mount::UnmountFlags;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::control::{Handler, Server};
use super::fuse::Ocifs;
use super::mountinfo::{FS_TYPE, MountInfo};
use super::passthrough::Backings;
use super::{MountError, point, umount};
use crate::tree::{Invalidation, Tree};

/// How long readers of a mount that was busy at the end may finish what they do.
const GRACE: Duration = Duration::from_secs(10);

/// What a mount is made with.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Where.
    pub path: PathBuf,
    /// Whether other users than the one who mounts may read.
    pub allow_other: bool,
    /// Threads that take requests from the kernel; at least two, so that one slow copy does not keep others waiting.
    pub threads: usize,
    /// Whether the directory may hold something, which the mount then hides.
    pub cover: bool,
    /// How deep file systems are stacked where the cache lies, ours counted: 1, or 2 over overlayfs. The kernel reads
    /// sealed blobs itself only where it was told enough, and nothing can be stacked on ours beyond 2.
    pub stack_depth: u32,
    /// Where control sockets are; made (0700) when it is missing.
    pub runtime_dir: PathBuf,
}

impl MountOptions {
    /// A mount at `path` with control sockets in `runtime_dir`, for its owner alone.
    pub fn new(path: impl Into<PathBuf>, runtime_dir: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            allow_other: false,
            threads: 4,
            cover: false,
            stack_depth: 1,
            runtime_dir: runtime_dir.into(),
        }
    }
}

/// A mount that is up. It is served until [`Mount::run`] returns, and goes down when this is dropped.
#[derive(Debug)]
pub struct Mount {
    info: MountInfo,
    ended: oneshot::Receiver<std::io::Result<()>>,
    down: bool,
    _control: Server,
}

impl Mount {
    /// Mounts `tree`; when this returns, the mount is up and answers. `events` is what [`Tree::new`] gave.
    pub fn new(
        tree: Tree,
        events: Receiver<Invalidation>,
        options: &MountOptions,
        handler: Handler,
        runtime: Handle,
    ) -> Result<Self, MountError> {
        let _entered = runtime.enter();
        let path = point::prepare(&options.path, options.cover)?;
        let filesystem = Ocifs {
            tree,
            runtime: runtime.clone(),
            stack_depth: options.stack_depth,
            backings: Backings::default(),
        };
        let session =
            Session::new(filesystem, &path, &session_config(options)).map_err(|source| {
                MountError::Mount {
                    path: path.clone(),
                    source,
                }
            })?;
        // From here on the session unmounts when it is dropped.
        let info = match point::top(&path)? {
            Some(info) if info.kind == FS_TYPE => info,
            _ => return Err(MountError::NotMounted { path }),
        };
        let control = Server::start(&options.runtime_dir, &info, handler)?;
        notify(session.notifier(), events)
            .and_then(|()| {
                let (end, ended) = oneshot::channel();
                thread::Builder::new()
                    .name("ocifs-session".into())
                    .spawn(move || end.send(session.run()))?;
                Ok(Self {
                    info: info.clone(),
                    ended,
                    down: false,
                    _control: control,
                })
            })
            .map_err(|source| MountError::Setup {
                action: "cannot start a thread for",
                path,
                source,
            })
    }

    /// Where it is mounted, and its device number.
    pub fn info(&self) -> &MountInfo {
        &self.info
    }

    /// Serves until somebody unmounts, or until `stop` comes: then it unmounts itself, lazily if it is busy.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), MountError> {
        tokio::select! {
            ended = &mut self.ended => {
                self.down = true;
                return finish(ended);
            }
            () = stop => {}
        }
        let info = self.info.clone();
        self.down = true;
        // umount(2) waits for requests that the kernel has sent, so it must not sit on a thread that answers them.
        let busy = tokio::task::spawn_blocking(move || take_down(&info))
            .await
            .unwrap_or(Ok(true))?;
        match tokio::time::timeout(GRACE, &mut self.ended).await {
            Ok(ended) => finish(ended),
            Err(_) => {
                tracing::warn!(busy, path = %self.info.path.display(), "files are still open; their readers get errors from now on");
                Ok(())
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.down
            && let Err(error) = take_down(&self.info)
        {
            tracing::warn!(%error, "the mount could not be taken down");
        }
    }
}

fn session_config(options: &MountOptions) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("ocifs".into()),
        // Not `Subtype`, which fuser passes to fusermount3 alone: this way mount(2) gets it too.
        MountOption::CUSTOM("subtype=ocifs".into()),
        MountOption::RO,
        MountOption::NoDev,
        MountOption::NoSuid,
        // The kernel checks the mode bits that we report: access(2) and execve(2) get right answers without a request.
        MountOption::DefaultPermissions,
    ];
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(options.threads.max(2));
    // A request that was read from a clone dies with the process that read it, and no speed is lost without clones.
    config.clone_fd = false;
    config
}

fn finish(ended: Result<std::io::Result<()>, oneshot::error::RecvError>) -> Result<(), MountError> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(MountError::Session(error)),
        Err(_) => Err(MountError::Session(std::io::Error::other(
            "the session's thread has panicked",
        ))),
    }
}

/// Unmounts what is ours; whether it was busy, so that it is only out of the tree.
fn take_down(info: &MountInfo) -> Result<bool, MountError> {
    // Somebody may have unmounted already, and mounted something else.
    let same = |top: &MountInfo| (top.major, top.minor) == (info.major, info.minor);
    if !point::top(&info.path)?.as_ref().is_some_and(same) {
        return Ok(false);
    }
    match umount::detach(&info.path, UnmountFlags::empty()) {
        Ok(()) => Ok(false),
        Err(MountError::Busy { path }) => {
            tracing::warn!(path = %path.display(), "the mount is busy; it is taken out of the tree and ends with its last reader");
            umount::detach(&path, UnmountFlags::DETACH)?;
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// Passes on to the kernel what it must drop.
///
/// The kernel takes a directory's lock for that, and keeps the sender waiting while a lookup in the directory waits for its
/// reply. So this is a thread of its own that owes nobody a reply.
fn notify(notifier: Notifier, events: Receiver<Invalidation>) -> std::io::Result<()> {
    let pass_on = move || {
        for event in events {
            let sent = match &event {
                Invalidation::Entry { parent, name } => {
                    notifier.inval_entry(INodeNo(parent.0), Path::new(name).as_os_str())
                }
                // A negative offset: attributes alone, no pages (`fuse_reverse_inval_inode` in fs/fuse/inode.c).
                Invalidation::Attributes(node) => notifier.inval_inode(INodeNo(node.0), -1, 0),
                // No length: all pages to the end. A page under way is waited for, which this thread may do.
                Invalidation::Content(node) => notifier.inval_inode(INodeNo(node.0), 0, 0),
            };
            if let Err(error) = sent {
                tracing::debug!(?event, %error, "the kernel was not told");
            }
        }
    };
    thread::Builder::new()
        .name("ocifs-notify".into())
        .spawn(pass_on)
        .map(drop)
}

/// Waits for SIGTERM or SIGINT: the usual `stop` of [`Mount::run`].
pub async fn terminated() {
    match (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "signals cannot be caught; `ocifs umount` still ends the mount");
            std::future::pending().await
        }
    }
}
