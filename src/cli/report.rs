//! What a mount tells about itself: to `ocifs status`, and as metrics.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};

use super::log;
use super::mount::Life;
use crate::blob::{Blobs, Verified};
use crate::fuse::Counts;
use crate::model::Models;
use crate::mount::Meter;
use crate::tree::Tree;

/// Where it all comes from.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) tree: Tree,
    pub(super) models: Models,
    pub(super) blobs: Blobs,
    pub(super) life: Arc<Life>,
    pub(super) meter: Arc<Meter>,
    /// What the kernel has asked, once there is a session.
    pub(super) counts: OnceLock<Counts>,
    pub(super) cache_dir: PathBuf,
    /// Everybody reads with the credentials of whoever mounted, and no rule says what.
    pub(super) open_to_all: bool,
}

impl Report {
    /// What `ocifs status` shows.
    pub(super) async fn status(&self) -> Value {
        let Self {
            tree,
            models,
            blobs,
            life,
            ..
        } = self;
        let usage = blobs.cache().usage();
        let mut shown = Vec::new();
        for bound in tree.bound() {
            let reference = bound.reference.to_string();
            let mut entry = json!({
                "reference": reference,
                "digest": bound.digest,
                "open": bound.open,
                "idleSeconds": bound.idle.as_secs(),
            });
            // It is shown, so it is in memory: nobody is asked.
            if let Ok(model) = models
                .inspect(bound.reference.repository(), &bound.digest)
                .await
            {
                entry["size"] = json!(model.size());
                entry["cached"] = json!(model.blobs.iter().map(|blob| blob.cached()).sum::<u64>());
                entry["verified"] = json!(model.is_complete());
            }
            shown.push(entry);
        }
        let live = blobs.live();
        let live = live.iter().map(|blob| {
        let verified = match blob.verified() {
            Verified::Yes => "yes",
            Verified::NotYet => "not yet",
            Verified::No { .. } => "no",
        };
        json!({ "digest": blob.digest(), "size": blob.size(), "cached": blob.cached(), "verified": verified })
    });
        let wrong = blobs.wrong();
        let wrong = wrong.iter().map(|wrong| {
            let ago = wrong.at.elapsed().unwrap_or_default();
            json!({
                "digest": wrong.digest,
                "actual": wrong.actual,
                "from": wrong.sources,
                "agoSeconds": ago.as_secs(),
                "lasting": wrong.lasting,
            })
        });
        let troubles = log::troubles();
        let troubles = troubles.iter().map(|one| {
            let ago = one.at.elapsed().unwrap_or_default().as_secs();
            json!({ "level": one.level, "text": one.text, "agoSeconds": ago })
        });
        let hashing = blobs.hash_cost();
        let (used, peak) = blobs.memory();
        json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "upSeconds": life.start.elapsed().as_secs(),
            "takenOver": { "times": life.times, "why": life.why },
            "keeper": life.keeper(tree),
            "offline": blobs.config().offline,
            "passthrough": tree.has_passthrough(),
            "memory": { "limit": blobs.config().memory, "used": used, "peak": peak },
            "hashing": { "bytes": hashing.bytes, "cpuSeconds": hashing.processor.as_secs_f64() },
            "cache": { "dir": self.cache_dir, "allocated": usage.allocated, "limit": usage.limit, "trouble": blobs.cache().trouble() },
            "models": shown,
            "blobs": live.collect::<Vec<_>>(),
            "wrong": wrong.collect::<Vec<_>>(),
            "hedges": blobs.hedges(),
            "reads": {
                "cachedBytes": self.meter.cached(),
                "fetchedBytes": self.meter.fetched(),
                "failed": self.meter.failed(),
            },
            "registry": {
                "receivedBytes": blobs.received(),
                "requests": blobs.registry().answers().all().collect::<BTreeMap<_, _>>(),
            },
            "openFiles": tree.open_handles(),
            "openToAll": self.open_to_all,
            "troubles": troubles.collect::<Vec<_>>(),
        })
    }
}
