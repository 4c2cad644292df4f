//! Runs a model directory: loads its weights and generates text, on the CPU or (feature `cuda`) an NVIDIA GPU.
//!
//! It is the proof that a mounted path is all that an engine needs, so it reads ordinary files and knows nothing of mounts or
//! registries. What it does for a lazy mount it does for any disk: it reads in file order, with several reads at a time ([`load`]).

mod attention;
pub mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod decoder;
pub mod device;
pub mod engine;
mod error;
#[cfg(feature = "cuda")]
mod gate;
pub mod header;
mod host;
pub mod load;
#[cfg(feature = "cuda")]
mod pinned;
mod rope;
pub mod sample;
pub mod server;
pub mod shards;
pub mod template;
pub mod text;
mod weights;

pub use candle_core::DType;
pub use error::{Error, Result};
pub use rope::Rope;
