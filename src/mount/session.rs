//! A mount's life: up, serving, down, or handed over to another process.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::mount::UnmountFlags;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use super::control::{Handler, Identity, Server};
use super::handler::Ocifs;
use super::keeper::{CONTROL, DEVICE, JOURNAL, Keeper, Left};
use super::meter::Meter;
use super::mountinfo::{FS_TYPE, MountInfo};
use super::passthrough::Backings;
use super::watchdog::{self, Watchdog, Watched};
use super::{MountError, point, umount};
use crate::fuse::{
    self, Activity, Counts, MountSpec, Negotiated, Notifier, Serving, Session, Wanted,
};
use crate::tree::{Invalidation, Journal, Restored, Tree};

/// How long readers of a mount that was busy at the end may finish what they do.
const GRACE: Duration = Duration::from_secs(10);

/// How long answers under way may take when another process goes on. What is not answered then comes to that one.
const HAND_OVER: Duration = Duration::from_millis(500);

/// How long those may close their files who were told that nothing more comes.
const LAST_GRACE: Duration = Duration::from_secs(1);

/// Requests that the kernel may have under way in the background (readahead).
const MAX_BACKGROUND: u16 = 64;

/// What a mount is made with.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Where.
    pub path: PathBuf,
    /// What the mount table shows as the source.
    pub source: String,
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
    /// Who keeps the descriptors for the next process; needs a tree with a journal.
    pub keeper: Option<Arc<Keeper>>,
    /// Where reads are counted.
    pub meter: Arc<Meter>,
}

impl MountOptions {
    /// A mount at `path` with control sockets in `runtime_dir`, for its owner alone.
    pub fn new(path: impl Into<PathBuf>, runtime_dir: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            source: "ocifs".to_owned(),
            allow_other: false,
            threads: 4,
            cover: false,
            stack_depth: 1,
            runtime_dir: runtime_dir.into(),
            keeper: None,
            meter: Arc::default(),
        }
    }
}

/// What another process must know of a session beside what is in the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    negotiated: Negotiated,
    major: u32,
    minor: u32,
    path: Vec<u8>,
    root: Vec<u8>,
    kind: String,
    /// The control socket.
    socket: Identity,
    /// What directories show as their time.
    pub started: SystemTime,
}

impl SessionRecord {
    fn new(
        negotiated: &Negotiated,
        info: &MountInfo,
        control: &Server,
        started: SystemTime,
    ) -> Self {
        Self {
            negotiated: negotiated.clone(),
            major: info.major,
            minor: info.minor,
            path: info.path.as_os_str().as_bytes().to_owned(),
            root: info.root.as_os_str().as_bytes().to_owned(),
            kind: info.kind.clone(),
            socket: control.identity(),
            started,
        }
    }

    /// From what [`Journal::session`] was given.
    ///
    /// # Errors
    /// When it is of a version that says other things.
    pub fn parse(bytes: &[u8]) -> Result<Self, MountError> {
        serde_json::from_slice(bytes).map_err(|error| MountError::Session(error.into()))
    }

    fn info(&self) -> MountInfo {
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_owned()));
        MountInfo {
            major: self.major,
            minor: self.minor,
            root: path(&self.root),
            path: path(&self.path),
            kind: self.kind.clone(),
        }
    }
}

/// What another process has left, and what was made of it.
#[derive(Debug)]
pub struct Takeover {
    /// Its descriptors.
    pub left: Left,
    /// What it said of the session.
    pub record: SessionRecord,
    /// What the tree has restored.
    pub restored: Restored,
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The mount is gone.
    Unmounted,
    /// Another process is to go on. This one must end at once, without running destructors: an answer that is dropped is an error
    /// to whoever waits for it.
    HandedOver,
}

/// A mount that is up. It is served until [`Mount::run`] returns, and goes down when this is dropped.
#[derive(Debug)]
pub struct Mount {
    info: MountInfo,
    serving: Serving,
    /// What the thread does that tells the kernel what to drop.
    notifying: Activity,
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
        let path = point::prepare(&options.path, options.cover, &options.runtime_dir)?;
        let failed = |source| MountError::Mount {
            path: path.clone(),
            source,
        };
        let spec = MountSpec {
            path: &path,
            source: &options.source,
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
        if let (Some(keeper), Some(journal)) = (&options.keeper, tree.journal()) {
            let record = SessionRecord::new(session.negotiated(), &info, &control, tree.started());
            let kept = keep(keeper, &journal, &record, &session, &control);
            if let Err(error) = kept {
                tracing::warn!(%error, "should this process die, the mount ends with it");
                journal.abandon();
            }
        }
        let backings = Backings::default();
        let mount = Self::serve(
            session, info, tree, events, options, backings, control, runtime,
        )?;
        std::mem::forget(taken_back);
        Ok(mount)
    }

    /// Goes on with a mount that another process has served, once [`Tree::restore`] has given what is in `takeover`.
    pub fn resume(
        tree: Tree,
        events: Receiver<Invalidation>,
        options: &MountOptions,
        handler: Handler,
        runtime: Handle,
        takeover: Takeover,
    ) -> Result<Self, MountError> {
        let _entered = runtime.enter();
        let Takeover {
            left,
            mut record,
            restored,
        } = takeover;
        let info = record.info();
        let session = Session::resume(left.device, record.negotiated.clone());
        let backings = match session.negotiated().passthrough() {
            true => {
                let (notifier, highest) = (session.notifier(), restored.highest_backing);
                Backings::adopt(&notifier, restored.backings, highest)
            }
            false => {
                tree.without_passthrough();
                Backings::default()
            }
        };
        let control = match left.control {
            Some(listener) => Server::resume(listener, record.socket, Arc::clone(&handler)),
            None => Err(std::io::ErrorKind::NotFound.into()),
        };
        let control = match control {
            Ok(control) => control,
            Err(error) => {
                tracing::info!(%error, "a new control socket is made");
                let control = Server::start_again(&options.runtime_dir, &info, handler)?;
                record.socket = control.identity();
                if let (Some(keeper), Some(journal)) = (&options.keeper, tree.journal()) {
                    if let Ok(record) = serde_json::to_vec(&record) {
                        journal.session(&record);
                    }
                    let _ = keeper.keep(CONTROL, control.descriptor());
                }
                control
            }
        };
        // Before any request is read here: what this process has read must not be sent again.
        if let Err(error) = session.notifier().resend() {
            tracing::debug!(%error, "the mount is gone already");
        }
        Self::serve(
            session, info, tree, events, options, backings, control, runtime,
        )
    }

    #[expect(clippy::too_many_arguments, reason = "what a mount consists of")]
    fn serve(
        session: Session,
        info: MountInfo,
        tree: Tree,
        events: Receiver<Invalidation>,
        options: &MountOptions,
        backings: Backings,
        control: Server,
        runtime: Handle,
    ) -> Result<Self, MountError> {
        let journal = tree.journal();
        let filesystem = Ocifs {
            tree,
            runtime,
            backings: Arc::new(backings),
            meter: Arc::clone(&options.meter),
        };
        let notifying = Activity::default();
        let serving = notify(session.notifier(), events, journal, notifying.clone())
            .and_then(|()| session.serve(filesystem, options.threads.max(2)))
            .map_err(|source| MountError::Setup {
                action: "cannot start a thread for",
                path: info.path.clone(),
                source,
            })?;
        Ok(Self {
            info,
            serving,
            notifying,
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

    /// Tells the service manager from now on that this process goes on, while it does.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn watch(
        &self,
        keeper: Arc<Keeper>,
        watchdog: Watchdog,
        runtime: Handle,
    ) -> std::io::Result<()> {
        let watched = Watched {
            serving: self.serving.threads().to_vec(),
            notifying: self.notifying.clone(),
            runtime,
        };
        watchdog::watch(keeper, watchdog, watched)
    }

    /// Like [`run`](Self::run), but when `next` comes, requests are left to the process that goes on from here.
    pub async fn run_until(
        self,
        stop: impl Future<Output = ()>,
        next: impl Future<Output = ()>,
    ) -> Result<End, MountError> {
        tokio::pin!(next);
        let mut handed_over = false;
        let this = &self;
        // Whichever comes first; what `run` does at its end it does for the mount itself.
        tokio::select! {
            ended = this.serving.ended() => {
                let mut this = self;
                this.down = true;
                return ended.map(|()| End::Unmounted).map_err(MountError::Session);
            }
            () = stop => {}
            () = &mut next => handed_over = true,
        }
        if handed_over {
            self.serving.hand_over(HAND_OVER).await;
            std::mem::forget(self);
            return Ok(End::HandedOver);
        }
        self.run(std::future::ready(())).await?;
        Ok(End::Unmounted)
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

/// Gives what another process needs to whoever keeps it.
fn keep(
    keeper: &Keeper,
    journal: &Journal,
    record: &SessionRecord,
    session: &Session,
    control: &Server,
) -> std::io::Result<()> {
    if !session.negotiated().resend() {
        let text =
            "this kernel cannot send requests once more that a dead process has read (Linux 6.9)";
        return Err(std::io::Error::new(std::io::ErrorKind::Unsupported, text));
    }
    journal.session(&serde_json::to_vec(record)?);
    keeper.keep(JOURNAL, journal.descriptor())?;
    keeper.keep(CONTROL, control.descriptor())?;
    // Last, because with it the mount outlives this process.
    keeper.keep(DEVICE, session.device())?;
    keeper.heard()
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
/// reply. So this is a thread of its own that owes nobody a reply. What the process before this one has left to tell comes first, while
/// the threads that answer are about to start: the kernel may wait for an answer of theirs.
fn notify(
    notifier: Notifier,
    events: Receiver<Invalidation>,
    journal: Option<Arc<Journal>>,
    activity: Activity,
) -> std::io::Result<()> {
    let pass_on = move || {
        for event in events {
            let _busy = activity.begin();
            let sent = match &event {
                Invalidation::Entry { parent, name } => notifier.entry(parent.0, name),
                Invalidation::Attributes(node) => notifier.attributes(node.0),
                // A page under way is waited for, which this thread may do.
                Invalidation::Content(node) => notifier.content(node.0),
                Invalidation::Settled(debt) => {
                    if let Some(journal) = &journal {
                        journal.settle(*debt);
                    }
                    Ok(())
                }
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, socketpair};

    use super::*;

    /// What a session with these flags of INIT gives to its keeper, or says.
    fn kept(flags: u64) -> Result<Vec<String>, String> {
        let text = format!(r#"{{"minor":40,"flags":{flags}}}"#);
        let negotiated: Negotiated = serde_json::from_str(&text).unwrap();
        let device = File::open("/dev/null").unwrap().into();
        let session = Session::resume(device, negotiated);
        let info = MountInfo {
            major: 0,
            minor: 9999,
            root: "/".into(),
            path: "/m".into(),
            kind: FS_TYPE.into(),
        };
        let dir = tempfile::tempdir().unwrap();
        let handler: Handler = Arc::new(|_| Box::pin(async { Err(String::new()) }));
        let control = Server::start(dir.path(), &info, handler).unwrap();
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let keeper = Keeper::holder(theirs).unwrap();
        let journal = Journal::new().unwrap();
        let record = SessionRecord::new(
            session.negotiated(),
            &info,
            &control,
            SystemTime::UNIX_EPOCH,
        );
        let result = keep(&keeper, &journal, &record, &session, &control);
        result.map_err(|error| error.to_string())?;
        let mut heard = Vec::new();
        let mut bytes = [0; 100];
        while let Ok((length, _)) = recv(&ours, &mut bytes, rustix::net::RecvFlags::empty()) {
            heard.push(String::from_utf8(bytes[..length].to_vec()).unwrap());
        }
        let (_, state) =
            Journal::resume(journal.descriptor().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(SessionRecord::parse(state.session()).unwrap(), record);
        assert_eq!(record.info(), info);
        Ok(heard)
    }

    #[tokio::test]
    async fn a_session_is_kept_only_where_requests_can_be_sent_again() {
        let names = ["ocifs-journal", "ocifs-control", "ocifs-device"];
        let said = names.map(|name| format!("FDSTORE=1\nFDNAME={name}"));
        assert_eq!(kept(1 << 39).unwrap(), said);
        let refused = kept(0).unwrap_err();
        assert!(
            refused.contains("cannot send requests once more"),
            "{refused}"
        );
    }
}
