//! The mount: requests, session, daemon, control socket. No logic: what a request means is decided in [`crate::tree`], how it
//! looks on the wire in [`crate::fuse`].
//!
//! | file | what |
//! |---|---|
//! | `handler` | call the tree, reply |
//! | `reply` | the tree's answers in the protocol's terms |
//! | `passthrough` | files that the kernel reads without us |
//! | `errno` | the only place that names error numbers |
//! | `session` | mount, serve, end |
//! | `point` | what may be mounted on, and healing a dead mount |
//! | `umount` | taking a mount down from outside |
//! | `control` | a socket per mount, for `status` and `refresh` |
//! | `daemon` | going to the background |
//! | `keeper` | who keeps the descriptors while the daemon is exchanged |
//! | `holder` | a process of ours that does |
//! | `watchdog` | telling the service manager that we go on |
//! | `mountinfo` | which mounts there are |

mod control;
mod daemon;
mod ending;
mod errno;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod handler;
mod holder;
mod keeper;
mod meter;
mod mountinfo;
mod passthrough;
mod point;
mod reply;
mod session;
mod umount;
mod watchdog;

pub use control::{Handler, Request, request};
pub use daemon::{Ready, spawn_detached};
pub use ending::Tries;
pub use error::MountError;
pub use holder::{Plan, can_take_over, hold};
pub use keeper::{Keeper, Kept, Left};
pub use meter::Meter;
pub use mountinfo::{FS_TYPE, MountInfo, mounts};
pub use point::{find, full_path};
pub use session::{End, Mount, MountOptions, SessionRecord, Takeover, terminated};
pub use umount::{Umount, Unmounted, process_ends, unmount};
pub use watchdog::Watchdog;
