//! Value types that every layer speaks: no I/O, no async.

mod deadline;
mod digest;
mod range;
mod secret;
mod size;
mod sync;

pub use deadline::Deadline;
pub use digest::{Digest, DigestError, Hasher};
pub use range::ByteRange;
pub use secret::Secret;
pub use size::ByteSize;
pub use sync::lock;
