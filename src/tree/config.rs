//! What a tree is made with.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{Journal, Space};

/// What a tree is made with.
#[derive(Clone)]
pub struct TreeConfig {
    /// A tag may move when nothing below it was looked up for so long, and nothing is open.
    pub tag_ttl: Duration,
    /// For how long it is believed that something is not there, is denied or is unusable.
    pub failure_ttl: Duration,
    /// For how long a lookup, an open or a listing may take: the kernel cannot interrupt those.
    pub patience: Duration,
    /// For how long a read waits for a file that a process before this one has opened and this one cannot have yet.
    pub read_patience: Duration,
    /// For how long a listing waits for a repository's tags.
    pub tags_patience: Duration,
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
    /// Permission bits that files and directories do not have (umask(2)), at most `0o777`.
    pub umask: u16,
    /// Whether the kernel may be given the files of sealed blobs to read without us.
    pub passthrough: bool,
    /// The time of directories that are of no artifact.
    pub started: SystemTime,
    /// Where is kept what another process needs in order to go on from here; nowhere, when none shall.
    pub journal: Option<Arc<Journal>>,
    /// What statfs tells.
    pub space: Arc<dyn Fn() -> Space + Send + Sync>,
}

impl Default for TreeConfig {
    fn default() -> Self {
        Self {
            tag_ttl: Duration::from_secs(15 * 60),
            failure_ttl: Duration::from_secs(5),
            patience: Duration::from_secs(15),
            read_patience: Duration::from_secs(300),
            tags_patience: Duration::from_secs(2),
            uid: 0,
            gid: 0,
            umask: 0,
            passthrough: false,
            started: SystemTime::now(),
            journal: None,
            space: Arc::new(Space::default),
        }
    }
}

impl fmt::Debug for TreeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TreeConfig")
            .field("tag_ttl", &self.tag_ttl)
            .field("failure_ttl", &self.failure_ttl)
            .field("patience", &self.patience)
            .field("read_patience", &self.read_patience)
            .field("tags_patience", &self.tags_patience)
            .field("uid", &self.uid)
            .field("gid", &self.gid)
            .field("umask", &format_args!("{:#o}", self.umask))
            .field("passthrough", &self.passthrough)
            .finish_non_exhaustive()
    }
}
