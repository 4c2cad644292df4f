//! What goes wrong between a directory and its text.

use std::path::{Path, PathBuf};

/// Why a model cannot be loaded, or a request not be answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system did not deliver.
    #[error("{}: {said}", path.display())]
    Io {
        /// What was read.
        path: PathBuf,
        /// What it said. Not the `source`: it is in the message, which goes to clients of the server too.
        said: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The model needs what the runner does not have; it would run wrongly.
    #[error("this model cannot be run: {0}")]
    Unsupported(String),
    /// What was asked for cannot be done with this model.
    #[error("{0}")]
    Request(String),
    /// The device or a tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// The result of everything in the runner.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(super) fn io(path: &Path, said: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            said,
        }
    }

    pub(super) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
