//! `ocifs mount`: builds the layers bottom-up and serves them, here or in a process in the background, anew or where another process
//! was killed.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::args::{Global, Mount};
use super::exit::Exit;
use super::explain::{Failure, explain};
use super::progress::eprint;
use super::report::Report;
use super::supervise::{self, Supervision};
use super::{config, context, log, metrics};
use crate::blob::Blobs;
use crate::config::Settings;
use crate::mount::{
    self, End, Handler, Keeper, Kept, MountOptions, Ready, Request, Takeover, Watchdog,
};
use crate::registry::Reference;
use crate::tree::{Space, Tree, TreeConfig, TreeError};

/// How long the mount may take to come up.
const PATIENCE: Duration = Duration::from_secs(60);

/// `arguments` are those that `args` were read from.
pub(super) fn run(global: &Global, args: &Mount, arguments: &[OsString]) -> Result<Exit> {
    if args.detached {
        return Ok(detached(global, args));
    }
    let settings = context::settings(global, args.values()?)?;
    if args.fake {
        return Ok(Exit::Ok);
    }
    if args.mkdir {
        make_point(&args.mountpoint);
    }
    if args.foreground {
        return serve(args, &settings, || Ok(()));
    }
    let point = mount::full_path(&args.mountpoint).unwrap_or_else(|_| args.mountpoint.clone());
    let log = log_file(&settings.runtime_dir, &point)?;
    let hides = hides_something(&point);
    // A holder, and by it the process in the background.
    let holder = [supervise::HOLDER.into(), point.clone().into_os_string()];
    let mut typed: Vec<OsString> = arguments.iter().skip(1).cloned().collect();
    // Behind a `--` it would be a path.
    let end = typed.iter().position(|argument| argument == "--");
    typed.insert(end.unwrap_or(typed.len()), "--detached".into());
    let typed = holder.into_iter().chain(typed);
    // What goes wrong there is told with its exit code, on the first line.
    mount::spawn_detached(typed, Some(log), PATIENCE).map_err(|text| {
        let told = text
            .split_once('\n')
            .and_then(|(code, rest)| Some((exit_of(code.parse().ok()?)?, rest)));
        let (exit, message) = told.unwrap_or((Exit::Failure, &text));
        Failure::new(exit, message)
    })?;
    if hides {
        // The process in the background writes its messages to a file that nobody looks at now.
        eprint(&format!(
            "warning: {0} is not empty; what is in it is hidden until `ocifs umount {0}`",
            point.display()
        ));
    }
    Ok(Exit::Ok)
}

/// Makes a mount point that is missing, without asking what may be mounted there: a dead mount, or one whose next process waits for
/// this one to start. What goes wrong shows when it is mounted on.
fn make_point(point: &Path) {
    let mode = rustix::fs::Mode::from(0o755);
    if rustix::fs::mkdir(point, mode) == Err(rustix::io::Errno::NOENT) {
        let _ = std::fs::create_dir_all(point);
    }
}

/// Whether a mount on `point` hides files. What can't be told is none.
fn hides_something(point: &Path) -> bool {
    std::fs::read_dir(point).is_ok_and(|mut entries| entries.next().is_some())
}

/// The process in the background.
fn detached(global: &Global, args: &Mount) -> Exit {
    let ready = match Ready::adopt() {
        Ok(ready) => ready,
        Err(error) => {
            tracing::error!(%error, "cannot leave the terminal");
            return Exit::Failure;
        }
    };
    let mut ready = Some(ready);
    let result = (|| {
        let settings = context::settings(global, args.values()?)?;
        let signal = || ready.take().map_or(Ok(()), Ready::signal);
        // Known before the mount is up: afterwards the way to it may be gone.
        let point = mount::full_path(&args.mountpoint);
        let exit = serve(args, &settings, signal)?;
        // It went well, so nobody will look for what was said.
        if exit == Exit::Ok
            && let Ok(point) = point
        {
            let _ = std::fs::remove_file(settings.runtime_dir.join(log_name(&point)));
        }
        anyhow::Ok(exit)
    })();
    let error = match result {
        Ok(exit) => return exit,
        Err(error) => error,
    };
    let explained = explain(&error);
    let text = explained.text(&error).unwrap_or_default();
    // Where a process before this one was up, nobody hears it but the log.
    tracing::error!("{text}");
    if let Some(ready) = ready {
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let _ = ready.fail(&format!("{}\n{text}", explained.exit as u8));
    }
    explained.exit
}

pub(super) fn exit_of(code: u8) -> Option<Exit> {
    use Exit::{Busy, Corrupt, Denied, Failure, Network, NotFound, Usage};
    [Failure, Usage, NotFound, Denied, Network, Corrupt, Busy]
        .into_iter()
        .find(|exit| *exit as u8 == code)
}

/// Where the background process writes its messages: `<runtime dir>/<mount point with dashes>.log`, begun anew.
fn log_file(runtime_dir: &Path, point: &Path) -> Result<File> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(runtime_dir);
    made.with_context(|| format!("cannot make {}", runtime_dir.display()))?;
    let path = runtime_dir.join(log_name(point));
    // Nobody's link is followed: the directory may be in /tmp.
    let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(flags)
        .open(&path);
    file.with_context(|| format!("cannot write {}", path.display()))
}

fn log_name(point: &Path) -> String {
    let name = point.to_string_lossy().trim_matches('/').replace('/', "-");
    // File names end at 255 bytes.
    let start = name
        .char_indices()
        .map(|(at, _)| at)
        .find(|at| name.len() - at <= 200)
        .unwrap_or(0);
    format!("{}.log", &name[start..])
}

/// Mounts, says so by `up`, and serves until SIGINT, SIGTERM or an unmount.
fn serve(args: &Mount, settings: &Settings, up: impl FnOnce() -> io::Result<()>) -> Result<Exit> {
    let mut supervision = Supervision::of_process();
    let taken = supervision.taken();
    let runtime = context::runtime()?;
    let (models, blobs) = {
        let _entered = runtime.enter();
        context::models(settings)?
    };
    let mut config = tree_config(settings, &blobs);
    match &taken {
        Some(taken) => {
            config.journal = Some(Arc::clone(&taken.journal));
            config.started = taken.record.started;
        }
        None => config.journal = supervision.journal(),
    }
    let life = Life {
        keeper: supervision.keeper,
        times: taken.as_ref().map_or(0, |taken| taken.state.times()),
        why: taken.as_ref().map(|taken| taken.state.reason().to_owned()),
        next: Notify::new(),
        start: Instant::now(),
    };
    let life = Arc::new(life);
    let (tree, events) = Tree::new(Arc::new(models.clone()), config);
    let options = MountOptions {
        keeper: life.keeper.clone(),
        allow_other: settings.allow_other,
        cover: settings.nonempty,
        source: args.source.clone().unwrap_or_else(|| "ocifs".to_owned()),
        stack_depth: if blobs.cache().is_on_overlay() { 2 } else { 1 },
        ..MountOptions::new(&args.mountpoint, &settings.runtime_dir)
    };
    let before = taken.as_ref().map(|taken| &taken.state);
    let watching = tree.clone().follow(&blobs, before);
    let report = Arc::new(Report {
        tree: tree.clone(),
        models: models.clone(),
        blobs: blobs.clone(),
        life: Arc::clone(&life),
        meter: Arc::clone(&options.meter),
        counts: OnceLock::new(),
        cache_dir: settings.cache_dir.clone(),
        // A mount for everybody reads what its owner may read: that is worth a word unless rules bound it.
        open_to_all: settings.allow_other && settings.model.access.allow.is_empty(),
    });
    let handler = handler(settings, &report);
    if let Some(address) = settings.metrics {
        // Where a process goes on for another one, that one may still have the address.
        let patience = taken.as_ref().map_or(Duration::ZERO, |_| PATIENCE);
        runtime.block_on(metrics::serve(address, Arc::clone(&report), patience))?;
    }
    let on = runtime.handle().clone();
    let mount = match taken {
        None => mount::Mount::new(tree, events, &options, handler, on)?,
        Some(taken) => {
            let restored = runtime.block_on(tree.restore(taken.state));
            tracing::info!(
                nodes = restored.nodes,
                missing = restored.missing,
                why = life.why,
                "taken over"
            );
            let takeover = Takeover {
                left: taken.left,
                record: taken.record,
                restored,
            };
            mount::Mount::resume(tree, events, &options, handler, on, takeover)?
        }
    };
    let _ = report.counts.set(mount.counts());
    runtime.spawn(models.tend());
    runtime.spawn(watching);
    up().context("cannot tell that the mount is up")?;
    tracing::info!(path = %mount.info().path.display(), cache = %settings.cache_dir.display(), "mounted");
    life.up(&mount.info().path);
    if let (Some(keeper), Some(every)) = (&life.keeper, supervision.watchdog) {
        let watchdog = Watchdog {
            every,
            longest_answer: settings
                .blob
                .read_timeout
                .max(settings.model.metadata_timeout),
        };
        let on = runtime.handle().clone();
        if let Err(error) = mount.watch(Arc::clone(keeper), watchdog, on) {
            tracing::warn!(%error, "the service manager will not hear that this process goes on");
        }
    }
    let next = life.next.notified();
    let end = runtime.block_on(mount.run_until(mount::terminated(), next))?;
    if end == End::HandedOver {
        tracing::info!("another process goes on");
        std::mem::forget(runtime);
        return Ok(Exit::HandedOver);
    }
    if let Some(keeper) = &life.keeper {
        keeper.stopping();
    }
    tracing::info!("unmounted");
    // The process ends now, and downloads under way with it, as a kill would end them; what they wrote is kept. To shut the
    // runtime down below their feet instead would make them panic.
    std::mem::forget(runtime);
    Ok(Exit::Ok)
}

/// Where this process stands in the life of its mount.
#[derive(Debug)]
pub(super) struct Life {
    keeper: Option<Arc<Keeper>>,
    /// How many processes have served the mount before.
    pub(super) times: u64,
    /// Why the last one of them ended.
    pub(super) why: Option<String>,
    /// Tells that another process is to go on.
    next: Notify,
    pub(super) start: Instant,
}

impl Life {
    /// The mount is up.
    fn up(&self, path: &Path) {
        let Some(keeper) = &self.keeper else {
            return;
        };
        if let Err(error) = keeper.ready() {
            tracing::warn!(%error, "the service manager was not told that the mount is up");
        }
        let path = path.display();
        keeper.status(&match &self.why {
            None => format!("serving {path}"),
            Some(why) => format!("serving {path}, taken over {} times: {why}", self.times),
        });
    }

    /// Has another process go on, once whoever asked for it has heard so.
    fn restart(self: &Arc<Self>) -> Result<Value, String> {
        /// How long the answer may take to be written.
        const ANSWER: Duration = Duration::from_millis(100);
        let keeper = self.keeper.as_deref();
        let program = supervise::prepare_restart(keeper).map_err(|error| format!("{error:#}"))?;
        if let Some(keeper) = keeper {
            keeper
                .restart(&program)
                .map_err(|error| format!("the holder does not hear: {error}"))?;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(ANSWER).await;
            this.next.notify_one();
        });
        Ok(json!({ "pid": std::process::id(), "program": program }))
    }

    /// Who follows should this process die, for people and scripts.
    pub(super) fn keeper(&self, tree: &Tree) -> Value {
        let whole = tree.journal().is_some_and(|journal| journal.is_whole());
        let (by, pid) = match self.keeper.as_ref().map(|keeper| keeper.who()) {
            None => ("nobody", None),
            Some(Kept::HolderGone(_)) => ("nobody: the holder has ended", None),
            Some(_) if !whole => ("nobody: what a take-over needs could not be kept", None),
            Some(Kept::Holder(pid)) => ("holder", Some(pid)),
            Some(Kept::Manager) => ("service manager", None),
        };
        json!({ "by": by, "pid": pid })
    }
}

fn tree_config(settings: &Settings, blobs: &Blobs) -> TreeConfig {
    let cache = blobs.cache().clone();
    TreeConfig {
        tag_ttl: settings.model.tag_ttl,
        patience: settings.model.metadata_timeout,
        read_patience: settings.blob.read_timeout,
        // A user without the capability finds out at the first open, and reads go through the daemon then.
        passthrough: settings.passthrough,
        uid: settings
            .uid
            .unwrap_or_else(|| rustix::process::geteuid().as_raw()),
        gid: settings
            .gid
            .unwrap_or_else(|| rustix::process::getegid().as_raw()),
        umask: settings.umask,
        space: Arc::new(move || {
            let usage = cache.usage();
            Space {
                limit: usage.limit,
                free: usage.limit.saturating_sub(usage.allocated),
            }
        }),
        ..TreeConfig::default()
    }
}

/// Answers what a mount is asked by other commands.
fn handler(settings: &Settings, report: &Arc<Report>) -> Handler {
    let report = Arc::clone(report);
    let rows = json!(config::rows(settings));
    Arc::new(move |request| {
        let (report, rows) = (Arc::clone(&report), rows.clone());
        Box::pin(async move {
            match request {
                Request::Status => Ok(report.status().await),
                Request::Config => Ok(rows),
                Request::Log { filter } => {
                    let filter = log::set(filter.as_deref())?;
                    Ok(json!({ "filter": filter }))
                }
                // A program is run and waited for.
                Request::Restart => tokio::task::block_in_place(|| report.life.restart()),
                Request::Refresh { reference } => {
                    let reference: Reference =
                        reference.parse().map_err(|error| format!("{error}"))?;
                    match report.tree.refresh(&reference).await {
                        Ok(digest) => Ok(json!({ "digest": digest })),
                        Err(error) => Ok(refused(&error)),
                    }
                }
            }
        })
    })
}

/// What a refresh failed for, and the exit code that tells a script.
fn refused(error: &TreeError) -> Value {
    let exit = match error {
        TreeError::NotFound { .. } => Exit::NotFound,
        TreeError::Denied { .. } | TreeError::Forbidden { .. } => Exit::Denied,
        TreeError::Unreachable { .. } | TreeError::Timeout { .. } => Exit::Network,
        _ => Exit::Failure,
    };
    json!({ "error": causes(error), "exit": exit as u8 })
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let message = cause.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_have_a_name_each_and_exit_codes_survive_the_pipe() {
        assert_eq!(log_name(Path::new("/srv/models/")), "srv-models.log");
        let long = log_name(Path::new(&format!("/{}/é", "é".repeat(300))));
        assert!(long.len() <= 204 && long.ends_with("-é.log"));
        assert_eq!(exit_of(7), Some(Exit::Busy));
        assert_eq!(exit_of(0), None);
    }

    #[test]
    fn a_mount_point_with_files_is_told_from_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!hides_something(dir.path()));
        assert!(!hides_something(&dir.path().join("nowhere")));
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(hides_something(dir.path()));
    }

    #[test]
    fn a_mount_point_that_is_missing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        for below in ["a", "b/c/d", "b/c/d"] {
            let point = dir.path().join(below);
            make_point(&point);
            assert!(point.is_dir(), "{below}");
        }
        std::fs::write(dir.path().join("file"), "").unwrap();
        make_point(&dir.path().join("file"));
    }

    #[test]
    fn a_log_is_begun_anew_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let point = Path::new("/m");
        drop(log_file(&dir.path().join("run"), point).unwrap());
        let path = dir.path().join("run/m.log");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(log_file(&dir.path().join("run"), point).is_err());
    }
}
