//! ocifs: AI models in OCI registries as ordinary directories.
//!
//! `ocifs mount /models` starts a FUSE file system in which `/models/ghcr.io/org/model:v1` is a directory with the files that
//! inference engines look for: `config.json`, a tokenizer, `*.safetensors`. Nothing is configured beforehand and nothing is
//! converted: a name is resolved when it is looked up, a weight file is a blob of the registry that is fetched by ranges as it is
//! read and completed behind the reader's back, and a blob that is whole has its SHA-256 checked and stays on disk for
//! every later start.
//!
//! # The layers, which are also the path of a read
//!
//! ```text
//! cli ─ config            what was typed; wires the rest; the only place for stdout, the environment and anyhow
//!  └ mount                requests: call, reply; errno; session, daemon, control socket
//!     ├ fuse              the protocol: messages, threads, replies; knows no tree
//!     └ tree              names → nodes; no network code, no FUSE type
//!        └ model          reference → manifest → files; one file per packaging convention
//!           └ blob        a lazy blob: what is here, what to fetch, in what order; verification; prefetch
//!              ├ cache    bytes on disk: layout, chunk maps, eviction, locks between processes
//!              └ registry references, credentials, tokens, ranged reads, retries, push
//! runner                  (feature `runner`) text from a model directory; a program of its own that reads plain files
//! serve, pack             the other direction: an OCI layout as a registry, a directory as an artifact
//! http                    a server's connections, for `serve`, metrics and the runner
//! base                    value types of all layers
//! ```
//!
//! Calls go down only. [`cache`] and [`registry`] do not know each other; [`blob`] alone knows both. News goes up through
//! channels ([`blob::Event`]). Decisions are pure functions of values (`blob::plan`, `blob::prefetch`, `cache::evict`,
//! `registry::challenge`, `registry::retry`, `model::names`, …) with their own tests; the code that acts on them is elsewhere.
//!
//! # From `open` to bytes
//!
//! 1. The kernel looks up `ghcr.io`, `org`, `model:v1`. The first two are directories because they are well-formed:
//!    a registry has no notion of their existence. The third is a reference, so [`tree`] asks [`model`], which asks the
//!    registry for the digest behind the tag (a `HEAD`), then for that manifest, checks it, and has the
//!    packaging convention turn layers into files. A small config tar is fetched whole and verified; its members are
//!    files at an offset into it, so nothing is ever unpacked. Layers without names get theirs from the packaged index,
//!    proved against the header of each shard.
//! 2. A read of a weight file becomes a read of a range of a [`blob::LazyBlob`]. What the cache has is copied out at once. What
//!    is missing becomes closed-range requests for 16 KiB chunks (a sparse reader) up to 8 MiB parts (a sequential one), each
//!    under way once for all readers of all processes on the cache. The reply leaves when its own bytes are there.
//! 3. A reader that goes on in order is kept ahead of; one that has read 16 MiB of a blob wants all of it, and with the
//!    default setting the rest of its model, which then comes in the background while demand goes first.
//! 4. Bytes are hashed in order behind the download. A whole blob with the right digest is sealed: renamed into the OCI
//!    layout that the cache is, and from then on the kernel reads that file itself (FUSE passthrough), without us. With a wrong one it is thrown away and fetched once more from elsewhere; when it is wrong again readers get `EIO`. Status and log say who sent it.
//!
//! # When the daemon dies
//!
//! The kernel ends a FUSE mount when the last descriptor of its device is closed. So another process keeps one: systemd, or a holder
//! of ours ([`mount::hold`]) that does nothing else. Before the kernel is told of a node, a binding or an open file, and before what it
//! keeps becomes wrong, that is in a
//! journal ([`tree::Journal`]), which lies in memory of the kernel's and is kept beside the device. The next daemon reads it,
//! has every node and handle again under its number ([`tree::Tree::restore`]), has the kernel send once more what was not answered
//! ([`fuse::Notifier::resend`]) and goes on. `ocifs restart` is the same on purpose.
//!
//! # What always holds
//!
//! - A read returns the right bytes or an error, never fewer bytes before the end of the file.
//! - Nothing is sealed whose digest was not computed from what is on disk. Manifests and configs are checked before use.
//! - No FUSE thread waits for the network; every wait has a deadline.
//! - A broken, full or read-only cache makes reads slower, not wrong.
//! - Chunks count as present only after their bytes are written, and those of an earlier run only after their checksum was found
//!   right; so a kill at any moment costs nothing but the chunk under way.
//! - Credentials go to the host that they are for and nowhere else.
//!
//! The on-disk formats are drawn in `cache/layout.rs`, `cache/chunkmap.rs`, `cache/index.rs` and `cache/tags.rs`, and pinned by
//! tests there.

pub mod base;
pub mod blob;
pub mod cache;
pub mod cli;
pub mod config;
pub mod fuse;
mod http;
pub mod model;
pub mod mount;
pub mod pack;
pub mod registry;
#[cfg(feature = "runner")]
pub mod runner;
pub mod serve;
pub mod tree;
