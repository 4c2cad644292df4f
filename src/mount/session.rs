//! A mount's life: up, serving, down.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

use rustix::mount::UnmountFlags;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use super::control::{Handler, Server};
use super::handler::Ocifs;
use super::mountinfo::{FS_TYPE, MountInfo};
use super::passthrough::Backings;
use super::{MountError, point, umount};
use crate::fuse::{self, Counts, MountSpec, Notifier, Serving, Session, Wanted};
use crate::tree::{Invalidation, Tree};

/// How long readers of a mount that was busy at the end may finish what they do.
const GRACE: Duration = Duration::from_secs(10);

/// How long those may close their files who were told that nothing more comes.
const LAST_GRACE: Duration = Duration::from_secs(1);

/// Requests that the kernel may have under way in the background (readahead).
const MAX_BACKGROUND: u16 = 64;

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
    serving: Serving,
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
        let failed = |source| MountError::Mount {
            path: path.clone(),
            source,
        };
        let spec = MountSpec {
            path: &path,
            source: "ocifs",
            subtype: "ocifs",
            allow_other: options.allow_other,
        };
        let device = fuse::mount(&spec).map_err(failed)?;
        let taken_back = TakenBack(path.clone());
        let session = Session::start(device, wanted(&tree, options)).map_err(failed)?;
        if tree.has_passthrough() && !session.negotiated().passthrough() {
            tracing::info!(
                "this kernel has no FUSE passthrough; reads of sealed blobs go through the daemon"
            );
            tree.without_passthrough();
        }
        let info = match point::top(&path)? {
            Some(info) if info.kind == FS_TYPE => info,
            _ => return Err(MountError::NotMounted { path }),
        };
        let control = Server::start(&options.runtime_dir, &info, handler)?;
        let filesystem = Ocifs {
            tree,
            runtime: runtime.clone(),
            backings: Backings::default(),
        };
        let serving = notify(session.notifier(), events)
            .and_then(|()| session.serve(filesystem, options.threads.max(2)))
            .map_err(|source| MountError::Setup {
                action: "cannot start a thread for",
                path: path.clone(),
                source,
            })?;
        std::mem::forget(taken_back);
        Ok(Self {
            info,
            serving,
            down: false,
            _control: control,
        })
    }

    /// Where it is mounted, and its device number.
    pub fn info(&self) -> &MountInfo {
        &self.info
    }

    /// What the kernel has asked.
    pub fn counts(&self) -> Counts {
        self.serving.counts().clone()
    }

    /// Serves until somebody unmounts, or until `stop` comes: then it unmounts itself, lazily if it is busy, and gives who has files
    /// open a while to finish. A signal ends that while: who waits for bytes then gets an error.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), MountError> {
        tokio::select! {
            ended = self.serving.ended() => {
                self.down = true;
                return ended.map_err(MountError::Session);
            }
            () = stop => {}
        }
        let hurry = signalled();
        let info = self.info.clone();
        self.down = true;
        // umount(2) waits for requests that the kernel has sent, so it must not sit on a thread that answers them.
        let busy = tokio::task::spawn_blocking(move || take_down(&info))
            .await
            .unwrap_or(Ok(true))?;
        tokio::select! {
            ended = self.serving.ended() => return ended.map_err(MountError::Session),
            () = hurry => tracing::info!("told again to end; readers that wait get errors"),
            () = tokio::time::sleep(GRACE) => {
                tracing::warn!(busy, path = %self.info.path.display(), "files are still open; their readers get errors from now on");
            }
        }
        self.serving.hurry();
        match tokio::time::timeout(LAST_GRACE, self.serving.ended()).await {
            Ok(ended) => ended.map_err(MountError::Session),
            Err(_) => Ok(()),
        }
    }
}

/// A mount point whose mount goes away again with this.
struct TakenBack(PathBuf);

impl Drop for TakenBack {
    fn drop(&mut self) {
        if let Err(error) = umount::detach(&self.0, UnmountFlags::DETACH) {
            tracing::warn!(%error, "a mount that failed was left behind");
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

fn wanted(tree: &Tree, options: &MountOptions) -> Wanted {
    Wanted {
        stack_depth: match tree.has_passthrough() {
            true => options.stack_depth,
            false => 0,
        },
        max_background: MAX_BACKGROUND,
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
                Invalidation::Entry { parent, name } => notifier.entry(parent.0, name),
                Invalidation::Attributes(node) => notifier.attributes(node.0),
                // A page under way is waited for, which this thread may do.
                Invalidation::Content(node) => notifier.content(node.0),
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
    signalled().await;
}

/// Waits for SIGTERM or SIGINT that come from now on, not only once it is awaited.
fn signalled() -> impl Future<Output = ()> + Send + 'static {
    let signals = signal(SignalKind::terminate())
        .and_then(|terminate| Ok((terminate, signal(SignalKind::interrupt())?)));
    async move {
        match signals {
            Ok((mut terminate, mut interrupt)) => {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            }
            Err(error) => {
                tracing::warn!(%error, "signals cannot be caught; `ocifs umount` still ends the mount");
                std::future::pending().await
            }
        }
    }
}
