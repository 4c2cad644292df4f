//! Error numbers: the only file that names them.

use rustix::io::Errno;

use crate::tree::TreeError;

/// For an open that would write. The kernel answers these itself, because the mount is read-only; this is for those that it
/// lets through.
pub(super) const READ_ONLY: Errno = Errno::ROFS;

/// A name that is not UTF-8: nothing has such a name.
pub(super) const NO_SUCH_NAME: Errno = Errno::NOENT;

/// Bytes that could not be had, whatever kept them away: programs know this one, and retry or give up on it.
pub(super) const NO_BYTES: Errno = Errno::IO;

/// The buffer for an extended attribute is too small.
pub(super) const BUFFER_TOO_SMALL: Errno = Errno::RANGE;

/// The number that a program sees for an error.
pub(super) fn errno(error: &TreeError) -> Errno {
    match error {
        TreeError::NotFound { .. } => Errno::NOENT,
        TreeError::Denied { .. } | TreeError::Forbidden { .. } => Errno::ACCESS,
        TreeError::Unusable { .. } | TreeError::Unreachable { .. } => Errno::IO,
        TreeError::Timeout { .. } => Errno::TIMEDOUT,
        TreeError::Read { .. } | TreeError::Short { .. } => NO_BYTES,
        TreeError::Stale(_) => Errno::STALE,
        TreeError::NotDirectory => Errno::NOTDIR,
        TreeError::IsDirectory => Errno::ISDIR,
        TreeError::NotLink => Errno::INVAL,
        TreeError::NameTooLong => Errno::NAMETOOLONG,
        TreeError::NoAttribute => Errno::NODATA,
        TreeError::NoNamespace => Errno::OPNOTSUPP,
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
            (TreeError::Forbidden { what: what() }, libc::EACCES),
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
            assert_eq!(errno(&error).raw_os_error(), number, "{error}");
        }
    }
}
