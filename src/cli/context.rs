//! What commands share: the runtime, and the layers built from the settings, bottom-up.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::{Builder, Runtime};

use super::args::Global;
use super::{limit, memory};
use crate::base::Deadline;
use crate::blob::{Blobs, Prefetch};
use crate::cache::{Cache, CacheConfig};
use crate::config::{Settings, Surroundings, Values};
use crate::model::{Model, Models};
use crate::registry::{Reference, Registry};

/// How long a daemon may take to answer what it knows by itself.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A runtime for one command.
pub(super) fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start threads")
}

/// Does a command's work on a runtime that is not taken down after it: the process ends then. Taking it down waits for
/// downloads that nobody wants any more, and fails those that are writing at that moment. What they wrote is kept, as it
/// is when the process is killed.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = runtime()?;
    let result = runtime.block_on(work);
    std::mem::forget(runtime);
    result
}

/// The settings that hold for a command.
pub(super) fn settings(global: &Global, typed: Values) -> Result<Settings> {
    Ok(Settings::resolve(
        typed,
        global.config.as_deref(),
        &Surroundings::of_process(),
    )?)
}

/// The cache of these settings.
pub(super) fn cache(settings: &Settings) -> Result<Cache> {
    let limit = match settings.cache_size {
        Some(limit) => limit,
        None => limit::default(&settings.cache_dir)?,
    };
    Ok(Cache::open(CacheConfig {
        dir: settings.cache_dir.clone(),
        limit,
    })?)
}

/// The layers from the cache and the registries up to models. Must be called inside a runtime.
pub(super) fn models(settings: &Settings) -> Result<(Models, Blobs)> {
    let registry = Registry::new(settings.registry.clone())?;
    let mut config = settings.blob.clone();
    config.memory = settings.memory.unwrap_or_else(memory::default);
    let blobs = Blobs::new(cache(settings)?, registry, config);
    Ok((Models::new(blobs.clone(), settings.model.clone()), blobs))
}

/// What a command that only looks at models works with: nothing is fetched beside what is asked for.
pub(super) fn looking(global: &Global, typed: Values) -> Result<Settings> {
    let mut settings = settings(global, typed)?;
    settings.blob.prefetch = Prefetch::None;
    Ok(settings)
}

/// The model that a reference shows, usable or not.
pub(super) async fn look_up(
    models: &Models,
    reference: &Reference,
) -> Result<std::sync::Arc<Model>> {
    let digest = models.resolve(reference).await?;
    Ok(models
        .inspect_patiently(reference.repository(), &digest)
        .await?)
}

/// The time that looking into one file may take.
pub(super) fn look_deadline() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}
