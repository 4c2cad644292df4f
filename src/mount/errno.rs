//! Error numbers: the only file that names them.

use fuser::Errno;

use crate::tree::TreeError;

/// For every operation that would write. The kernel answers these itself, because the mount is read-only; this is for
/// those that it lets through.
pub(super) const READ_ONLY: Errno = Errno::EROFS;

/// The kernel remembers that we do not do this, and falls back to its generic way.
pub(super) const NOT_DONE_HERE: Errno = Errno::ENOSYS;

/// A name that is not UTF-8: nothing has such a name.
pub(super) const NO_SUCH_NAME: Errno = Errno::ENOENT;

/// The buffer for an extended attribute is too small.
pub(super) const BUFFER_TOO_SMALL: Errno = Errno::ERANGE;

/// The number that a program sees for an error.
pub(super) fn errno(error: &TreeError) -> Errno {
    match error {
        TreeError::NotFound { .. } => Errno::ENOENT,
        TreeError::Denied { .. } => Errno::EACCES,
        TreeError::Unusable { .. } | TreeError::Unreachable { .. } => Errno::EIO,
        TreeError::Timeout { .. } => Errno::ETIMEDOUT,
        // Whatever kept the bytes away: programs know EIO, and retry or give up on it.
        TreeError::Read { .. } | TreeError::Short { .. } => Errno::EIO,
        TreeError::Stale(_) => Errno::ESTALE,
        TreeError::NotDirectory => Errno::ENOTDIR,
        TreeError::IsDirectory => Errno::EISDIR,
        TreeError::NotLink => Errno::EINVAL,
        TreeError::NameTooLong => Errno::ENAMETOOLONG,
        TreeError::NoAttribute => Errno::ENODATA,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn each_error_has_the_number_that_a_local_disk_would_give() {
        let what = || "r.example/m:v1".to_owned();
        let source = || Arc::new(std::io::Error::other("x"));
        for (error, number) in [
            (TreeError::NotFound { what: what() }, libc::ENOENT),
            (
                TreeError::Denied {
                    what: what(),
                    source: source(),
                },
                libc::EACCES,
            ),
            (
                TreeError::Unusable {
                    what: what(),
                    source: source(),
                },
                libc::EIO,
            ),
            (
                TreeError::Unreachable {
                    what: what(),
                    source: source(),
                },
                libc::EIO,
            ),
            (
                TreeError::Timeout {
                    what: what(),
                    source: None,
                },
                libc::ETIMEDOUT,
            ),
            (
                TreeError::Short {
                    path: what(),
                    wanted: 2,
                    got: 1,
                },
                libc::EIO,
            ),
            (TreeError::Stale(7), libc::ESTALE),
            (TreeError::NotDirectory, libc::ENOTDIR),
            (TreeError::IsDirectory, libc::EISDIR),
            (TreeError::NotLink, libc::EINVAL),
            (TreeError::NameTooLong, libc::ENAMETOOLONG),
            (TreeError::NoAttribute, libc::ENODATA),
        ] {
            assert_eq!(errno(&error).code(), number, "{error}");
        }
    }
}
