//! `ocifs push`: packages a directory, and uploads it or writes it to a layout.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde_json::json;
use tokio::io::AsyncRead;

use super::args::{Format, Global, Push};
use super::exit::Exit;
use super::explain::Failure;
use super::interrupt::{Stop, blocking, unless_interrupted};
use super::progress::{Progress, Task, eprint};
use super::{context, output};
use crate::base::{ByteSize, Deadline};
use crate::pack::{self, Blob, MANIFEST_TYPE, Options, Package, Source, Timestamp};
use crate::registry::{Pushed, Reference, Registry};

/// Blobs uploaded at the same time.
const UPLOADS: usize = 3;
/// The time that one blob may take in all: a large shard over a slow line. A line that stands still is given up much earlier.
const BLOB_TIME: Duration = Duration::from_secs(12 * 3600);
/// The time that the manifest may take.
const MANIFEST_TIME: Duration = Duration::from_secs(120);

/// Where a package goes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Registry(Box<Reference>),
    Layout { dir: PathBuf, name: String },
}

/// What was done, for `--json`.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    sent: u64,
    existed: u64,
}

pub(super) fn run(global: &Global, args: &Push) -> Result<Exit> {
    let target = target(&args.target)?;
    let settings = context::settings(global, args.registry.values())?;
    let options = Options {
        format: match args.format {
            Format::Docker => pack::Format::Docker,
            Format::DockerV01 => pack::Format::DockerV01,
            Format::Modelpack => pack::Format::ModelPack,
        },
        created: created(
            args.created,
            std::env::var("SOURCE_DATE_EPOCH").ok().as_deref(),
        )?,
        nameless: args.nameless,
    };
    let start = Instant::now();
    context::runtime()?.block_on(async {
        let progress = Progress::new();
        let package = package(&progress, &args.dir, options).await?;
        for note in &package.notes {
            progress.say(&format!("note: {}", output::printable(note)));
        }
        let done = match &target {
            Target::Registry(reference) => {
                let registry = Registry::new(settings.registry.clone())?;
                unless_interrupted(upload(&progress, &registry, reference, &package)).await?
            }
            Target::Layout { dir, name } => write(&progress, dir, name, &package).await?,
        };
        report(args, &package, done, start.elapsed())?;
        Ok(Exit::Ok)
    })
}

/// `oci:DIR[:NAME]` is a layout (as skopeo writes it), all else a reference.
fn target(text: &str) -> Result<Target> {
    if let Some(rest) = text.strip_prefix("oci:") {
        let (dir, name) = rest.split_once(':').unwrap_or((rest, "latest"));
        if dir.is_empty() || name.is_empty() {
            let failure = Failure::new(Exit::Usage, format!("`{text}` names no layout"));
            return Err(failure
                .hint("write it as oci:DIR:NAME, like oci:./layout:v1")
                .into());
        }
        return Ok(Target::Layout {
            dir: dir.into(),
            name: name.to_owned(),
        });
    }
    let reference: Reference = text.parse()?;
    if reference.digest().is_some() {
        let failure = Failure::new(
            Exit::Usage,
            format!("`{text}` has a digest; it follows from the content"),
        );
        return Err(failure.hint("push to a tag; the digest is printed").into());
    }
    Ok(Target::Registry(Box::new(reference)))
}

/// The creation time that is written: what was typed, else that of reproducible-builds.org's variable.
fn created(typed: Option<Timestamp>, epoch: Option<&str>) -> Result<Option<Timestamp>> {
    let Some(epoch) = epoch.filter(|epoch| typed.is_none() && !epoch.is_empty()) else {
        return Ok(typed);
    };
    let parsed = epoch.parse().ok().and_then(Timestamp::from_unix);
    let refuse = || {
        Failure::new(
            Exit::Usage,
            format!("SOURCE_DATE_EPOCH: `{epoch}` is not a number of seconds since 1970"),
        )
    };
    Ok(Some(parsed.ok_or_else(refuse)?))
}

async fn package(progress: &Progress, dir: &Path, options: Options) -> Result<Package> {
    let (dir, stop) = (dir.to_owned(), Stop::default());
    let (going, progress) = (stop.clone(), progress.clone());
    blocking(stop, move || {
        let task = progress.task("packaging", pack::measure(&dir)?);
        let package = pack::pack(&dir, &options, &|count| {
            task.advance(count);
            going.going()
        })?;
        task.finish();
        Ok(package)
    })
    .await
}

async fn write(progress: &Progress, dir: &Path, name: &str, package: &Package) -> Result<Done> {
    let stop = Stop::default();
    let (going, task) = (stop.clone(), progress.task("writing", package.size()));
    let (dir, name, package) = (dir.to_owned(), name.to_owned(), package.clone());
    blocking(stop, move || {
        pack::layout::write(&package, &dir, &name, &|count| {
            task.advance(count);
            going.going()
        })?;
        task.finish();
        Ok(Done {
            sent: package.size(),
            existed: 0,
        })
    })
    .await
}

async fn upload(
    progress: &Progress,
    registry: &Registry,
    reference: &Reference,
    package: &Package,
) -> Result<Done> {
    let (sent, existed) = (AtomicU64::new(0), AtomicU64::new(0));
    let uploads = package.blobs().into_iter().map(|blob| {
        let (sent, existed) = (&sent, &existed);
        async move {
            let task = progress.task(&blob.name, blob.size);
            let pushed = upload_blob(registry, reference, blob, task.clone()).await;
            task.finish();
            let count = match pushed.with_context(|| format!("cannot upload {}", blob.name))? {
                Pushed::Sent => sent,
                Pushed::Existed => existed,
            };
            count.fetch_add(blob.size, Ordering::Relaxed);
            anyhow::Ok(())
        }
    });
    stream::iter(uploads)
        .buffer_unordered(UPLOADS)
        .try_collect::<Vec<()>>()
        .await?;
    // The manifest comes last: who sees it finds all that it names.
    let deadline = Deadline::after(MANIFEST_TIME);
    registry
        .push_manifest(reference, MANIFEST_TYPE, package.manifest.clone(), deadline)
        .await?;
    Ok(Done {
        sent: sent.into_inner(),
        existed: existed.into_inner(),
    })
}

async fn upload_blob(
    registry: &Registry,
    reference: &Reference,
    blob: &Blob,
    task: Task,
) -> Result<Pushed, crate::registry::RegistryError> {
    let open = || async {
        let content: Box<dyn AsyncRead + Send + Unpin> = match &blob.source {
            Source::File(path) => Box::new(tokio::fs::File::open(path).await?),
            Source::Memory(bytes) => Box::new(std::io::Cursor::new(bytes.clone())),
        };
        Ok(content)
    };
    let repository = reference.repository();
    let deadline = Deadline::after(BLOB_TIME);
    registry
        .push_blob(
            repository,
            &blob.digest,
            blob.size,
            open,
            move |count| task.set(count),
            deadline,
        )
        .await
}

fn report(args: &Push, package: &Package, done: Done, took: Duration) -> Result<()> {
    let seconds = took.as_secs_f64();
    if args.json {
        output::json(&json!({
            "target": args.target,
            "digest": package.digest,
            "size": package.size(),
            "layers": package.layers.len(),
            "sent": done.sent,
            "existed": done.existed,
            "seconds": seconds,
        }))?;
        return Ok(());
    }
    let kept = match done.existed {
        0 => String::new(),
        existed => format!(", {} were there already", ByteSize(existed)),
    };
    eprint(&format!(
        "{}: {} sent{kept}, {seconds:.1} s",
        args.target,
        ByteSize(done.sent)
    ));
    output::line(package.digest)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_layout_or_a_tag() {
        let layout = |dir: &str, name: &str| Target::Layout {
            dir: dir.into(),
            name: name.into(),
        };
        assert_eq!(target("oci:./l").unwrap(), layout("./l", "latest"));
        assert_eq!(
            target("oci:/a/l:x.io/m:v1").unwrap(),
            layout("/a/l", "x.io/m:v1")
        );
        assert!(matches!(
            target("ghcr.io/org/m:v1").unwrap(),
            Target::Registry(_)
        ));
        let pinned = format!("ghcr.io/org/m@{}", crate::base::Digest::of(b""));
        for text in ["oci:", "oci::v1", "oci:l:", "Not A Reference", &pinned] {
            assert!(target(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_was_typed_wins_over_source_date_epoch() {
        let typed = Timestamp::from_unix(5);
        assert_eq!(created(typed, Some("7")).unwrap(), typed);
        assert_eq!(created(None, Some("7")).unwrap(), Timestamp::from_unix(7));
        assert_eq!(created(None, Some("")).unwrap(), None);
        assert!(created(None, Some("yesterday")).is_err());
    }
}
