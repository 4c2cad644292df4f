//! The FUSE protocol (the kernel's `include/uapi/linux/fuse.h`), as much of it as a read-only file system needs. It knows no tree
//! and no file.
//!
//! | file | what |
//! |---|---|
//! | `abi` | the protocol's numbers |
//! | `wire` | fields of messages |
//! | `request` | what the kernel asks |
//! | `answer` | what answers consist of |
//! | `init` | which version and which abilities both sides agree on |
//! | `device` | reading requests, writing answers and notifications, backing files |
//! | `reply` | an answer that is given once, now or later |
//! | `interrupt` | who waits and is killed goes at once |
//! | `activity` | whether threads go on |
//! | `session` | threads, from the introduction to the end |
//! | `mounting` | mount(2) or fusermount3 |
//!
//! What is asked of a handler is what a read-only file system does. All that would change something is answered EROFS here, the
//! rest ENOSYS, which the kernel remembers. A request that is not understood, or whose reply is dropped, is EIO.

mod abi;
mod activity;
mod answer;
mod device;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod init;
mod interrupt;
mod mounting;
mod reply;
mod request;
mod session;
mod wire;

pub use abi::{open, operation_name};
pub use activity::Activity;
pub use answer::{Attr, Entry, Listing, Opened, StatFs};
pub use device::{Backing, Notifier};
pub use init::{Negotiated, Wanted};
pub use mounting::{MountSpec, mount};
pub use reply::{Payload, Reply};
pub use request::{Forgets, Header, Init, Operation};
pub use session::{Counts, Handler, Serving, Session};
pub use wire::Malformed;
