//! Mount points: which path is meant, what is there, and whether it can be mounted on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::mount::UnmountFlags;

use super::mountinfo::{self, FS_TYPE, MountInfo};
use super::{MountError, control};
use crate::base::Deadline;

/// A mount that does not answer stat(2) in this time is taken for one that hangs.
const STAT_PATIENCE: Duration = Duration::from_secs(5);

/// How long the last process of a dead mount may take to let go of its socket.
const SOCKET_PATIENCE: Duration = Duration::from_secs(1);

/// How many dead mounts on top of each other are cleared away.
const DEAD_MOUNTS: usize = 32;

/// The absolute path of a mount point, without touching what is mounted there: it may be dead.
pub fn full_path(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    let full = match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => parent.canonicalize()?.join(name),
        _ => return absolute.canonicalize(),
    };
    // A link is followed where nothing is mounted on it, and nothing can be.
    match fs::read_link(&full) {
        Ok(_) => full.canonicalize(),
        Err(_) => Ok(full),
    }
}

/// The mount of ocifs at `path`, on top of whatever else is mounted there.
pub fn find(path: &Path) -> Result<MountInfo, MountError> {
    let full = full_path(path).map_err(|_| MountError::NotMounted {
        path: path.to_owned(),
    })?;
    match top(&full)? {
        Some(mount) if mount.kind == FS_TYPE => Ok(mount),
        Some(mount) => Err(MountError::Foreign {
            path: full,
            kind: mount.kind,
        }),
        None => Err(MountError::NotMounted { path: full }),
    }
}

/// What is mounted at exactly this path, the latest first.
pub(super) fn top(path: &Path) -> Result<Option<MountInfo>, MountError> {
    let all = mountinfo::all().map_err(|source| MountError::Setup {
        action: "cannot read",
        path: "/proc/self/mountinfo".into(),
        source,
    })?;
    Ok(all.into_iter().rfind(|mount| mount.path == path))
}

/// What a mount point is like.
#[derive(Debug)]
enum State {
    Directory,
    NotDirectory,
    /// The daemon of a mount here is gone.
    Dead,
    /// The daemon of a mount here does not answer.
    Hung,
    Other(io::Error),
}

fn state(path: &Path) -> State {
    let (sender, receiver) = mpsc::channel();
    let target = path.to_owned();
    // statfs(2) beside, because the kernel may know the attributes without asking. On a mount that hangs neither comes back, nor can
    // be interrupted; so it is a thread's, which is left behind in that case.
    let look = move || {
        rustix::fs::statfs(&target)?;
        fs::metadata(target)
    };
    std::thread::spawn(move || drop(sender.send(look())));
    match receiver.recv_timeout(STAT_PATIENCE) {
        Ok(Ok(metadata)) if metadata.is_dir() => State::Directory,
        Ok(Ok(_)) => State::NotDirectory,
        // The second is said to who asked when it died.
        Ok(Err(error))
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOTCONN | libc::ECONNABORTED)
            ) =>
        {
            State::Dead
        }
        Ok(Err(error)) => State::Other(error),
        Err(_) => State::Hung,
    }
}

/// Makes sure that `path` can be mounted on; its full form. Dead mounts of ours are cleared away. What a directory holds is
/// hidden by a mount, so one that holds something is refused unless `cover` says that it may be.
pub(super) fn prepare(path: &Path, cover: bool, runtime_dir: &Path) -> Result<PathBuf, MountError> {
    let refuse = |reason: String| MountError::Point {
        path: path.to_owned(),
        reason,
    };
    let full = full_path(path).map_err(|error| refuse(explain(&error)))?;
    for _ in 0..DEAD_MOUNTS {
        let dead = top(&full)?.filter(|mount| mount.kind == FS_TYPE);
        let ours = dead.is_some();
        match state(&full) {
            State::Directory if ours => return Err(MountError::AlreadyMounted { path: full }),
            State::Directory => {
                let something = |entry: io::Result<fs::DirEntry>| {
                    entry.is_ok_and(|entry| entry.file_name() != "lost+found")
                };
                if !cover
                    && fs::read_dir(&full).is_ok_and(|entries| entries.into_iter().any(something))
                {
                    return Err(refuse("it is not empty, and a mount would hide what it holds (-o nonempty mounts all the same)".into()));
                }
                return Ok(full);
            }
            State::NotDirectory => return Err(refuse("it is not a directory".into())),
            State::Other(error) => return Err(refuse(explain(&error))),
            State::Dead if ours => {
                tracing::warn!(path = %full.display(), "a mount of ocifs whose daemon is gone is cleared away");
                let socket = dead.and_then(|mount| control::Name::of(runtime_dir, &mount));
                super::umount::detach(&full, UnmountFlags::DETACH)?;
                // Left by a daemon that could not remove it. The mount that follows has another number, it may be.
                if let Some(socket) = socket {
                    socket.gone_by(Deadline::after(SOCKET_PATIENCE));
                }
            }
            State::Dead => {
                return Err(refuse(
                    "another file system's daemon has died there; unmount it first (umount -l)"
                        .into(),
                ));
            }
            State::Hung => {
                return Err(refuse(
                    "what is mounted there does not answer; `ocifs umount --force` takes it away"
                        .into(),
                ));
            }
        }
    }
    Err(refuse(
        "dead mounts are stacked there and do not go away".into(),
    ))
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "it does not exist; make the directory first (mkdir -p)".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_mounted_on_is_refused_with_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let reason = |path: &Path| {
            prepare(path, false, Path::new("/run"))
                .unwrap_err()
                .to_string()
        };
        assert!(
            reason(&file).contains("not a directory"),
            "{}",
            reason(&file)
        );
        let missing = reason(&directory.path().join("missing"));
        assert!(missing.contains("mkdir"), "{missing}");
        let missing = reason(&directory.path().join("missing/deeper"));
        assert!(missing.contains("mkdir"), "{missing}");
        assert!(reason(directory.path()).contains("not empty"));
        assert!(prepare(directory.path(), true, directory.path()).is_ok());
        fs::remove_file(&file).unwrap();
        fs::create_dir(directory.path().join("lost+found")).unwrap();
        assert!(prepare(directory.path(), false, directory.path()).is_ok());
        assert!(matches!(
            find(directory.path()),
            Err(MountError::NotMounted { .. })
        ));
        assert!(matches!(
            find(Path::new("/proc")),
            Err(MountError::Foreign { .. })
        ));
    }

    #[test]
    fn links_and_dots_lead_to_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        let link = real.join("link");
        fs::create_dir(real.join("point")).unwrap();
        std::os::unix::fs::symlink("point", &link).unwrap();
        assert_eq!(full_path(&link).unwrap(), real.join("point"));
        assert_eq!(
            full_path(&real.join("point/.")).unwrap(),
            real.join("point")
        );
        assert_eq!(
            full_path(&real.join("link/../point")).unwrap(),
            real.join("point")
        );
        assert_eq!(full_path(Path::new("/")).unwrap(), Path::new("/"));
    }
}
