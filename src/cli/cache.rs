//! `ocifs cache ls|rm|gc|verify`.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::args::{CacheArgs, CacheCommand, Global};
use super::exit::Exit;
use super::explain::Failure;
use super::output::{Align, line, printable, table};
use super::progress::{Progress, eprint};
use super::{context, output};
use crate::base::{ByteSize, Digest};
use crate::cache::{BlobInfo, Cache, CacheError, Verdict};
use crate::pack::Timestamp;
use crate::registry::Reference;

/// The largest manifest that is read.
const LARGEST_MANIFEST: u64 = 16 << 20;

pub(super) fn run(global: &Global, command: &CacheCommand) -> Result<Exit> {
    match command {
        CacheCommand::Ls { json, cache } => list(&open(global, cache)?, *json),
        CacheCommand::Rm { what, cache } => remove(&open(global, cache)?, what),
        CacheCommand::Gc { to, cache } => collect(&open(global, cache)?, *to),
        CacheCommand::Verify { cache } => verify(&open(global, cache)?),
    }
}

fn open(global: &Global, args: &CacheArgs) -> Result<Cache> {
    context::cache(&context::settings(global, args.values())?)
}

/// What people call the blobs of an artifact: its reference and the file's path.
fn names(cache: &Cache) -> Vec<(Digest, String)> {
    let mut names = Vec::new();
    for published in cache.published() {
        names.push((published.digest, format!("{} (manifest)", published.name)));
        let Some(manifest) = manifest(cache, &published.digest) else {
            continue;
        };
        for (digest, path) in blobs_of(&manifest) {
            names.push((digest, format!("{} {path}", published.name)));
        }
    }
    names
}

fn manifest(cache: &Cache, digest: &Digest) -> Option<Value> {
    serde_json::from_slice(&cache.get(digest, LARGEST_MANIFEST)?).ok()
}

/// The config and the layers that a manifest names, with the paths that it gives them.
fn blobs_of(manifest: &Value) -> Vec<(Digest, String)> {
    let layers = manifest["layers"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let descriptor = |(descriptor, fallback): (&Value, &str)| {
        let digest = descriptor["digest"].as_str()?.parse().ok()?;
        let path = descriptor["annotations"]["org.cncf.model.filepath"].as_str();
        Some((digest, path.unwrap_or(fallback).to_owned()))
    };
    let config = [(&manifest["config"], "(config)")];
    let layers = layers
        .iter()
        .map(|layer| (layer, layer["mediaType"].as_str().unwrap_or("(layer)")));
    config
        .into_iter()
        .chain(layers)
        .filter_map(descriptor)
        .collect()
}

fn list(cache: &Cache, json: bool) -> Result<Exit> {
    let blobs = cache.list()?;
    let names = names(cache);
    let name = |digest: &Digest| {
        names
            .iter()
            .find(|(named, _)| named == digest)
            .map(|(_, name)| name.as_str())
    };
    let usage = cache.usage();
    if json {
        let blobs: Vec<Value> = blobs
            .iter()
            .map(|blob| document(blob, name(&blob.digest)))
            .collect();
        output::json(&json!({
            "dir": cache.dir(),
            "allocated": usage.allocated,
            "limit": usage.limit,
            "blobs": blobs,
        }))?;
        return Ok(Exit::Ok);
    }
    let now = SystemTime::now();
    let rows: Vec<[String; 5]> = blobs
        .iter()
        .map(|blob| {
            let state = match (blob.sealed, blob.open) {
                (true, false) => "verified".to_owned(),
                (true, true) => "verified, open".to_owned(),
                (false, open) => {
                    let percent = blob
                        .allocated
                        .min(blob.size)
                        .saturating_mul(100)
                        .checked_div(blob.size)
                        .unwrap_or(0);
                    format!("{percent} %{}", if open { ", open" } else { "" })
                }
            };
            [
                ByteSize(blob.allocated).to_string(),
                state,
                ago(now.duration_since(blob.used).unwrap_or_default()),
                blob.digest.to_string(),
                printable(name(&blob.digest).unwrap_or("")),
            ]
        })
        .collect();
    table(
        [
            Align::Right,
            Align::Left,
            Align::Right,
            Align::Left,
            Align::Left,
        ],
        &rows,
    )?;
    let (dir, used, limit) = (
        cache.dir().display(),
        ByteSize(usage.allocated),
        ByteSize(usage.limit),
    );
    eprint(&format!("{dir}: {used} of {limit}, {} blobs", blobs.len()));
    Ok(Exit::Ok)
}

fn document(blob: &BlobInfo, name: Option<&str>) -> Value {
    json!({
        "digest": blob.digest,
        "size": blob.size,
        "allocated": blob.allocated,
        "verified": blob.sealed,
        "open": blob.open,
        "used": Timestamp::of(blob.used).to_string(),
        "name": name,
    })
}

fn ago(span: Duration) -> String {
    match span.as_secs() {
        seconds @ 0..120 => format!("{seconds} s ago"),
        seconds @ 120..7200 => format!("{} min ago", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} days ago", seconds / 86_400),
    }
}

fn remove(cache: &Cache, what: &[String]) -> Result<Exit> {
    for text in what {
        let before = cache.usage().allocated;
        match text.parse::<Digest>() {
            Ok(digest) => cache.remove(&digest)?,
            Err(error) if text.starts_with("sha256:") => {
                let failure = Failure::new(Exit::Usage, format!("`{text}` is no digest: {error}"));
                return Err(failure
                    .hint("`ocifs cache ls` shows the digests in full")
                    .into());
            }
            Err(_) => remove_model(cache, &text.parse()?)?,
        }
        let freed = before.saturating_sub(cache.usage().allocated);
        line(format_args!("{text}: {} freed", ByteSize(freed)))?;
    }
    Ok(Exit::Ok)
}

/// Forgets a reference, and removes the blobs that no other artifact in the cache's index needs.
fn remove_model(cache: &Cache, reference: &Reference) -> Result<()> {
    let name = reference.to_string();
    let tagged = cache.tag(&name).map(|record| record.digest);
    let Some(digest) = reference.digest().copied().or(tagged) else {
        return Err(CacheError::Absent { what: name }.into());
    };
    let Some(document) = manifest(cache, &digest) else {
        return Err(CacheError::Absent { what: name }.into());
    };
    // Other tags may show the same artifact, and other artifacts may share its blobs.
    let elsewhere = cache
        .tags()
        .iter()
        .any(|record| record.digest == digest && record.name != name);
    if !elsewhere {
        let needed = needed_by_others(cache, &digest);
        let manifest = [(digest, String::new())];
        for (blob, _) in blobs_of(&document)
            .iter()
            .chain(&manifest)
            .filter(|(blob, _)| !needed.contains(blob))
        {
            match cache.remove(blob) {
                // A model that was never read has no blobs, and one can be named twice.
                Err(CacheError::Absent { .. }) | Ok(()) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot remove all of {name}"));
                }
            }
        }
    }
    if tagged.is_some() {
        cache.remove_tag(&name)?;
    }
    Ok(())
}

/// What the other artifacts that the cache knows, whole or not, are made of.
fn needed_by_others(cache: &Cache, digest: &Digest) -> HashSet<Digest> {
    let published = cache
        .published()
        .into_iter()
        .map(|published| published.digest);
    let tagged = cache.tags().into_iter().map(|record| record.digest);
    let others: HashSet<Digest> = published
        .chain(tagged)
        .filter(|other| other != digest)
        .collect();
    let blobs = others
        .iter()
        .filter_map(|other| manifest(cache, other))
        .flat_map(|document| blobs_of(&document));
    blobs
        .map(|(blob, _)| blob)
        .chain(others.iter().copied())
        .collect()
}

fn collect(cache: &Cache, to: Option<ByteSize>) -> Result<Exit> {
    let usage = cache.usage();
    let target = to.map_or(usage.limit, |size| size.0);
    let left = cache.gc(target)?;
    let freed = ByteSize(usage.allocated.saturating_sub(left));
    line(format_args!("{freed} freed, {} left", ByteSize(left)))?;
    if left > target {
        eprint("what is left is open: take down the mounts that use it, and try again");
        return Ok(Exit::Busy);
    }
    Ok(Exit::Ok)
}

fn verify(cache: &Cache) -> Result<Exit> {
    let total: u64 = cache
        .list()?
        .iter()
        .map(|blob| blob.allocated.min(blob.size))
        .sum();
    let task = Progress::new().task("verifying", total);
    let (mut sound, mut wrong) = (0u64, Vec::new());
    cache.verify(|blob, verdict| {
        task.advance(blob.allocated.min(blob.size));
        match verdict {
            Verdict::Sound => sound += 1,
            Verdict::Removed => wrong.push(format!("{}: damaged, removed", blob.digest)),
        }
    })?;
    task.finish();
    wrong.iter().try_for_each(line)?;
    line(format_args!(
        "{sound} blobs are right, {} were wrong",
        wrong.len()
    ))?;
    if wrong.is_empty() {
        return Ok(Exit::Ok);
    }
    let failure = Failure::new(
        Exit::Corrupt,
        format!(
            "{} blobs in {} were damaged",
            wrong.len(),
            cache.dir().display()
        ),
    );
    Err(failure
        .hint("what was removed is fetched again when it is needed; check the disk")
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blobs_of_a_manifest_are_its_config_and_layers() {
        let [a, b] = [Digest::of(b"a"), Digest::of(b"b")];
        let manifest = json!({
            "config": { "digest": a },
            "layers": [
                { "digest": b, "annotations": { "org.cncf.model.filepath": "x/y" } },
                { "digest": b, "mediaType": "t/t" },
                { "digest": "nonsense" },
            ],
        });
        let expected = [
            (a, "(config)".to_owned()),
            (b, "x/y".to_owned()),
            (b, "t/t".to_owned()),
        ];
        assert_eq!(blobs_of(&manifest), expected);
        assert!(blobs_of(&json!([])).is_empty());
    }
}
