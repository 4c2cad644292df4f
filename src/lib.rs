//! ocifs: AI models in OCI registries as ordinary directories: lazy, verified, cached.

pub mod base;
pub mod blob;
pub mod cache;
pub mod model;
pub mod mount;
pub mod pack;
pub mod registry;
pub mod serve;
pub mod tree;
