//! What can go wrong in the tree; `mount::errno` gives each its number.

use std::error::Error;
use std::sync::Arc;

use crate::blob::BlobError;

/// The reason behind a failure, shared by everybody who waited for it.
pub(super) type Cause = Arc<dyn Error + Send + Sync>;

/// What can go wrong in the tree. Cheap to clone: all who wait for the same answer get it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TreeError {
    /// There is no such name, tag, digest or file.
    #[error("{what}: not found")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// The registry denies access.
    #[error("{what}: access denied; check the credentials for this registry")]
    Denied {
        /// What was asked for.
        what: String,
        /// What the registry said.
        #[source]
        source: Cause,
    },
    /// A rule of this mount's forbids it, whatever the registry says.
    #[error("{what}: the settings `allow` and `deny` keep it from being read here")]
    Forbidden {
        /// What was asked for.
        what: String,
    },
    /// The artifact cannot be shown as a directory.
    #[error("{what}: not usable as a model")]
    Unusable {
        /// What was asked for.
        what: String,
        /// Why.
        #[source]
        source: Cause,
    },
    /// The registry could not be reached, or gave an answer that makes no sense.
    #[error("{what}: the registry gave no usable answer")]
    Unreachable {
        /// What was asked for.
        what: String,
        /// The failure.
        #[source]
        source: Cause,
    },
    /// The answer did not come in time; the next try may find it.
    #[error("{what}: no answer in time; try again")]
    Timeout {
        /// What was asked for.
        what: String,
        /// What kept it, where that is known.
        #[source]
        source: Option<Cause>,
    },
    /// The bytes of a file could not be had.
    #[error("{path}: read failed")]
    Read {
        /// The file, below its model directory.
        path: String,
        /// The failure.
        #[source]
        source: BlobError,
    },
    /// Fewer bytes came than the file has; the kernel would cut the file there, so it is an error.
    #[error("{path}: {got} bytes came where {wanted} were due")]
    Short {
        /// The file, below its model directory.
        path: String,
        /// Bytes that were due.
        wanted: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The node is not known any more.
    #[error("node {0} is not known")]
    Stale(u64),
    /// A directory was needed.
    #[error("not a directory")]
    NotDirectory,
    /// A file was needed.
    #[error("is a directory")]
    IsDirectory,
    /// A symbolic link was needed.
    #[error("not a symbolic link")]
    NotLink,
    /// The name is longer than 255 bytes.
    #[error("name too long")]
    NameTooLong,
    /// There is no such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// There are no extended attributes of that kind.
    #[error("no such kind of attribute")]
    NoNamespace,
}

impl TreeError {
    /// A name that is not there.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::NotFound { what: what.into() }
    }

    /// Whether asking again at once would only get the same answer.
    pub(super) fn is_final(&self) -> bool {
        matches!(
            self,
            Self::NotFound { .. }
                | Self::Denied { .. }
                | Self::Forbidden { .. }
                | Self::Unusable { .. }
        )
    }
}
