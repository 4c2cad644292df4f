//! Keeps and forgets logins where docker and podman look for them: in a credential file, or with the helper that it names.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::authfile::{AuthFile, Edit, LONGEST_FILE, Unread, edit, file_in, key_of};
use super::credentials::{Credentials, Sources};
use super::helper;
use crate::base::Secret;

/// Where a login is kept now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The credential file.
    pub file: PathBuf,
    /// The helper that has the password; `None`: the file itself.
    pub helper: Option<String>,
}

/// A login could not be kept or forgotten.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The file cannot be read or written.
    #[error("{}: the credential file cannot be read or written", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The file is not in docker's format; it is left as it is.
    #[error("{}: not a credential file that ocifs may change: {reason}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The helper that the file names failed.
    #[error("{reason}")]
    Helper {
        /// What it said.
        reason: String,
    },
}

/// Keeps a login for a host, or with podman a namespace of it (`quay.io/org`), as `docker login` does: with the helper that the file
/// names for the host, else in the file. All else in the file stays; the file is replaced as a whole and readable by its owner alone.
pub async fn keep_login(
    file: &Path,
    host: &str,
    username: &str,
    password: &Secret,
) -> Result<Kept, KeepError> {
    let file = real(file);
    let credentials = Credentials::login(username.to_owned(), password.clone());
    let helper = helper_of(&file, host).await?;
    let change = match &helper {
        Some(name) => {
            helper::store(name, key_of(host), username, password)
                .await
                .map_err(|reason| KeepError::Helper { reason })?;
            Edit::KeptByHelper
        }
        None => Edit::Keep(&credentials),
    };
    change_file(&file, host, change)?;
    Ok(Kept { file, helper })
}

/// Forgets a host's login in a file and with the helper that it names; whether there was one.
pub async fn forget_login(file: &Path, host: &str) -> Result<bool, KeepError> {
    let file = real(file);
    let erased = match helper_of(&file, host).await? {
        Some(name) => helper::erase(&name, key_of(host))
            .await
            .map_err(|reason| KeepError::Helper { reason })?,
        None => false,
    };
    Ok(change_file(&file, host, Edit::Remove)? || erased)
}

/// Whether this login is what a registry's client with these credential files would use.
pub async fn is_login_used(
    files: &[PathBuf],
    host: &str,
    username: &str,
    password: &Secret,
) -> bool {
    let (host, path) = host.split_once('/').unwrap_or((host, ""));
    let found = Sources::new(files.to_vec()).find(host, path).await;
    found.credentials == Some(Credentials::login(username.to_owned(), password.clone()))
}

/// The file itself: behind links it is the target that is replaced, not the link.
fn real(file: &Path) -> PathBuf {
    let file = file_in(file);
    fs::canonicalize(&file).unwrap_or(file)
}

/// Helpers keep logins of hosts, not of namespaces.
async fn helper_of(file: &Path, host: &str) -> Result<Option<String>, KeepError> {
    match AuthFile::read(file).await {
        Ok(parsed) if !host.contains('/') => Ok(parsed.helper(host).map(str::to_owned)),
        Ok(_) | Err(Unread::Absent) => Ok(None),
        Err(Unread::Io(source)) => Err(KeepError::Io {
            path: file.to_owned(),
            source,
        }),
        Err(Unread::Syntax(line)) => Err(KeepError::Format {
            path: file.to_owned(),
            reason: format!("line {line} is not in docker's JSON format"),
        }),
    }
}

/// Whether the file had to be changed.
fn change_file(file: &Path, host: &str, change: Edit<'_>) -> Result<bool, KeepError> {
    let fail = |source: io::Error| KeepError::Io {
        path: file.to_owned(),
        source,
    };
    let dir = match file.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    if matches!(change, Edit::Remove) && !file.exists() {
        return Ok(false);
    }
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(fail)?;
    // Two logins at once would lose one of the two.
    let lock = File::open(dir).map_err(fail)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| fail(error.into()))?;
    let mut text = Vec::new();
    let old = match File::open(file) {
        Ok(old) => {
            let owner = old.metadata().map_err(fail)?;
            old.take(LONGEST_FILE + 1)
                .read_to_end(&mut text)
                .map_err(fail)?;
            Some(owner)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(fail(error)),
    };
    if text.len() as u64 > LONGEST_FILE {
        return Err(fail(io::Error::other("longer than 1 MiB")));
    }
    let new = edit(&text, host, change).map_err(|reason| KeepError::Format {
        path: file.to_owned(),
        reason,
    })?;
    let Some(new) = new else { return Ok(false) };
    let owner = old.map(|old| (old.uid(), old.gid()));
    replace(file, dir, &lock, new.as_bytes(), owner).map_err(fail)?;
    Ok(true)
}

/// Puts a file with this content in the place of `file`, at once and for good.
fn replace(
    file: &Path,
    dir: &Path,
    lock: &File,
    content: &[u8],
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let new = dir.join(format!(".{name}.ocifs-{}", std::process::id()));
    // Left by a process of this number that was killed. Whoever holds the lock is alone here.
    let _ = fs::remove_file(&new);
    let write = || {
        let mut out = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        if let Some((uid, gid)) = owner {
            // Root may log somebody else in; others can only have owned it before.
            let _ = std::os::unix::fs::fchown(&out, Some(uid), Some(gid));
        }
        out.write_all(content)?;
        out.sync_all()?;
        fs::rename(&new, file)?;
        lock.sync_all()
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[tokio::test]
    async fn a_login_is_written_as_a_whole_and_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("deep/er/config.json");
        let password = Secret::new("s3cret");
        let kept = keep_login(&file, "h.io", "alice", &password).await.unwrap();
        assert_eq!(kept.helper, None);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&file), 0o600);
        assert_eq!(mode(file.parent().unwrap()), 0o700);

        // Through a link, and over a file that everybody could read.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        let link = dir.path().join("link.json");
        symlink(&file, &link).unwrap();
        keep_login(&link, "i.io", "bob", &password).await.unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(mode(&file), 0o600);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("h.io") && text.contains("i.io"), "{text}");
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);

        assert!(forget_login(&file, "h.io").await.unwrap());
        assert!(!forget_login(&file, "h.io").await.unwrap());
        assert!(
            !forget_login(&dir.path().join("none"), "h.io")
                .await
                .unwrap()
        );
        assert!(!dir.path().join("none").exists());
    }

    #[tokio::test]
    async fn a_file_that_is_not_understood_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        for text in ["{ not json", "[]", r#"{"auths": 7}"#] {
            fs::write(&file, text).unwrap();
            let error = keep_login(&file, "h.io", "a", &Secret::new("s3cret")).await;
            let error = error.expect_err(text);
            assert!(matches!(error, KeepError::Format { .. }), "{error:?}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        fs::write(&file, r#"{"credsStore":"ocifs-unit-test-absent"}"#).unwrap();
        let error = keep_login(&file, "h.io", "a", &Secret::new("s3cret")).await;
        assert!(matches!(error, Err(KeepError::Helper { .. })));
        assert!(!fs::read_to_string(&file).unwrap().contains("h.io"));
    }

    #[test]
    fn logins_at_the_same_time_are_all_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::thread::scope(|scope| {
            for n in 0..8 {
                let file = &file;
                scope.spawn(move || {
                    let login = Credentials::login(format!("u{n}"), Secret::new("p"));
                    change_file(file, &format!("h{n}.io"), Edit::Keep(&login)).unwrap();
                });
            }
        });
        let text = fs::read(&file).unwrap();
        let root: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(root["auths"].as_object().unwrap().len(), 8);
    }
}
