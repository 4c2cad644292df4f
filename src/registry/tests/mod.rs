//! The whole layer against servers that follow the rules and servers that do not.

mod auth;
mod blob;
mod manifest;
mod mirrors;
mod pool;
mod push;
