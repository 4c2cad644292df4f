//! `ocifs demo`: makes, packages, serves, mounts and reads a model on this machine alone.
//!
//! The mount is the real one, made by running this same program as a user would; the registry is `ocifs serve`'s code,
//! which counts what it sends. All of it is in one temporary directory that goes at the end, however that comes.

mod model;
mod mounted;
mod scene;
mod script;
mod tokenizer;

use anyhow::Result;

use super::args::Demo;
use super::context;
use super::exit::Exit;
use super::interrupt::{Interrupted, Stop, interrupted};

/// Runs the demonstration; what it made is gone when this returns.
pub(super) fn run(args: &Demo) -> Result<Exit> {
    let size = args.size.0;
    let runtime = context::runtime()?;
    let stop = Stop::default();
    let (going, handle) = (stop.clone(), runtime.handle().clone());
    runtime.block_on(async move {
        // On its own thread: it reads files through the mount, and such reads block.
        let mut running = tokio::task::spawn_blocking(move || script::play(size, &going, &handle));
        tokio::select! {
            result = &mut running => result?.map(|()| Exit::Ok),
            () = interrupted() => {
                stop.stop();
                // It notices between two steps or pieces, and takes everything down on its way out.
                let _ = running.await;
                Err(Interrupted.into())
            }
        }
    })
}
