//! Value types that every layer speaks, and how work begins: no I/O.

mod deadline;
mod digest;
mod range;
mod secret;
mod size;
mod start;
mod sync;

pub use deadline::Deadline;
pub use digest::{Digest, DigestError, Hasher};
pub use range::ByteRange;
pub use secret::Secret;
pub use size::ByteSize;
pub use start::start;
pub use sync::lock;
