//! `ocifs pull`: fills the cache ahead of use.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};

use super::args::{Global, Pull};
use super::exit::Exit;
use super::interrupt::unless_interrupted;
use super::progress::{Progress, eprint};
use super::{context, output};
use crate::base::ByteSize;
use crate::blob::{LazyBlob, Verified};
use crate::model::{Model, Models};
use crate::registry::Reference;

/// How often a blob's progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub(super) fn run(global: &Global, args: &Pull) -> Result<Exit> {
    let references: Vec<Reference> = args
        .references
        .iter()
        .map(|text| text.parse())
        .collect::<Result<_, _>>()?;
    // Blobs are completed one by one below: nothing has to be guessed.
    let settings = context::looking(global, args.reading.values())?;
    context::block_on(async {
        let (models, blobs) = context::models(&settings)?;
        let progress = Progress::new();
        let mut summaries = Vec::new();
        for reference in &references {
            let pulled = pull(&models, reference, usize::from(args.jobs), &progress);
            let summary = unless_interrupted(pulled).await;
            let summary = summary.with_context(|| format!("cannot pull {reference}"))?;
            if !args.json {
                eprint(&summary.people());
                output::line(summary.model.digest)?;
            }
            summaries.push(summary);
        }
        if args.json {
            let documents: Vec<Value> = summaries.iter().map(Summary::json).collect();
            output::json(&documents)?;
        }
        let usage = blobs.cache().usage();
        if usage.allocated > usage.limit {
            eprint(
                "warning: the cache is over its limit: not all of this will stay; see --cache-size",
            );
        }
        Ok(Exit::Ok)
    })
}

struct Summary {
    reference: Reference,
    model: Arc<Model>,
    fetched: u64,
    named: bool,
    took: Duration,
}

async fn pull(
    models: &Models,
    reference: &Reference,
    jobs: usize,
    progress: &Progress,
) -> Result<Summary> {
    let start = Instant::now();
    // A pull asks the registry even when an answer is fresh; offline the last answer has to do.
    let digest = match models.refresh(reference).await {
        Err(crate::model::ModelError::Offline { .. }) => models.resolve(reference).await?,
        answer => answer?,
    };
    let model = models
        .inspect_patiently(reference.repository(), &digest)
        .await?;
    let cached = |model: &Model| model.blobs.iter().map(LazyBlob::cached).sum::<u64>();
    let before = cached(&model);
    let downloads = model
        .blobs
        .iter()
        .map(|blob| complete(blob, label(&model, blob), progress));
    stream::iter(downloads)
        .buffer_unordered(jobs)
        .try_collect::<Vec<()>>()
        .await?;
    let named = models.publish_if_complete(reference, &model).await;
    let fetched = cached(&model).saturating_sub(before);
    Ok(Summary {
        reference: reference.clone(),
        model,
        fetched,
        named,
        took: start.elapsed(),
    })
}

/// What people call a blob: the file that it is, else its digest.
fn label(model: &Model, blob: &LazyBlob) -> String {
    let file = model
        .files
        .iter()
        .find(|file| file.digest == Some(blob.digest()) && file.size == blob.size());
    file.map_or_else(|| blob.digest().to_string(), |file| file.path.clone())
}

/// Completes one blob and shows how far it is.
async fn complete(blob: &Arc<LazyBlob>, label: String, progress: &Progress) -> Result<()> {
    if blob.verified() == Verified::Yes {
        return Ok(());
    }
    let task = progress.task(&label, blob.size());
    let shown = async {
        loop {
            let cached = blob.cached();
            task.set(cached);
            if cached >= blob.size() {
                task.note("verifying");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let result = tokio::select! {
        result = blob.complete() => result,
        () = shown => unreachable!("it only ends by being dropped"),
    };
    task.finish();
    result.with_context(|| format!("cannot complete {label}"))
}

impl Summary {
    fn people(&self) -> String {
        let rate = self.fetched as f64 / self.took.as_secs_f64().max(0.001) / 1e6;
        let how = match self.fetched {
            0 => "was complete".to_owned(),
            fetched => format!("{} fetched, {rate:.0} MB/s", ByteSize(fetched)),
        };
        let size = ByteSize(self.model.size());
        let named = if self.named {
            ""
        } else {
            "; not all of it stayed in the cache"
        };
        format!(
            "{}: {size} verified, {how}, {:.1} s{named}",
            self.reference,
            self.took.as_secs_f64()
        )
    }

    fn json(&self) -> Value {
        json!({
            "reference": self.reference.to_string(),
            "digest": self.model.digest,
            "size": self.model.size(),
            "fetched": self.fetched,
            "complete": self.model.is_complete(),
            "named": self.named,
            "seconds": self.took.as_secs_f64(),
        })
    }
}
