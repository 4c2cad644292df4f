//! Value types that every layer speaks, how work begins, and what of a runtime the model check replaces: no I/O.

mod chain;
mod deadline;
mod digest;
pub mod meter;
mod range;
pub mod rt;
mod secret;
mod size;
mod start;
pub mod sync;

pub use chain::Chain;
pub use deadline::Deadline;
pub use digest::{Digest, DigestError, Hasher};
pub use range::ByteRange;
/// A moment of the clock that timers go by, which tests may stop and move on.
pub use rt::Instant;
pub use secret::Secret;
pub use size::ByteSize;
pub use start::{Begun, begin, start};
pub use sync::lock;
