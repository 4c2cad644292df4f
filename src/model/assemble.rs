//! From a plan to a model: the blobs are opened, and each file knows where its bytes are.

use std::collections::HashMap;
use std::sync::Arc;

use crate::blob::Blobs;
use crate::registry::Repository;

use super::chunked::Pieces;
use super::layout::Source;
use super::manifest::Manifest;
use super::plan::{Plan, PlannedFile};
use super::unpacked::UnpackedLayers;
use super::{ChunkedFile, Content, File, Link, Model};

/// The model of a plan. What is of its bases comes from their own repositories.
pub(super) fn assemble(
    opener: &Blobs,
    unpacked: &UnpackedLayers,
    pieces: &Pieces,
    plan: &Plan,
    repository: &Repository,
) -> Model {
    let mut by_digest = HashMap::new();
    let mut blobs = Vec::new();
    let own = (&plan.manifest.layers, repository);
    let bases = plan.bases.iter();
    let all = [own]
        .into_iter()
        .chain(bases.map(|base| (&base.manifest.layers, &base.repository)));
    let all =
        all.flat_map(|(layers, repository)| layers.iter().map(move |layer| (layer, repository)));
    for (descriptor, repository) in [(&plan.manifest.config, repository)].into_iter().chain(all) {
        by_digest.entry(descriptor.digest).or_insert_with(|| {
            let blob = opener.open(descriptor.digest, descriptor.size, repository);
            blobs.push(Arc::clone(&blob));
            blob
        });
    }
    let layer = |layer: usize| plan.layer(layer);
    let blob = |n: usize| Arc::clone(&by_digest[&layer(n).digest]);
    let file = |planned: &PlannedFile| {
        let content = match &planned.source {
            Source::Made(bytes) => Content::Inline(bytes.clone()),
            Source::Layer { layer, offset } => Content::Blob {
                blob: blob(*layer),
                offset: *offset,
            },
            Source::Unpacked { layer: n, offset } => Content::Unpacked {
                layer: unpacked.open(&blob(*n), layer(*n).diff_id),
                offset: *offset,
            },
            Source::Chunks { layer, chunks } => {
                let pieces = pieces.clone();
                let file = ChunkedFile::new(blob(*layer), Arc::clone(chunks), pieces);
                Content::Chunked(Arc::new(file))
            }
            Source::Link(_) => return None,
        };
        Some(File {
            path: planned.path.clone(),
            size: planned.size,
            digest: planned.digest,
            media_type: planned.media_type.clone(),
            modified: planned.stamp.modified(),
            executable: planned.stamp.executable,
            content,
        })
    };
    let link = |planned: &PlannedFile| match &planned.source {
        Source::Link(target) => Some(Link {
            path: planned.path.clone(),
            target: target.clone(),
        }),
        _ => None,
    };
    Model {
        digest: plan.digest,
        manifest_digest: plan.manifest_id.digest,
        manifest_size: plan.manifest_id.size,
        manifest: Manifest::clone(&plan.manifest),
        packaging: plan.packaging,
        created: plan.created,
        files: plan.files.iter().filter_map(file).collect(),
        links: plan.files.iter().filter_map(link).collect(),
        empty_directories: plan.empty.clone(),
        oci: plan.oci.iter().filter_map(file).collect(),
        blobs,
        notes: plan.notes.clone(),
        problem: plan.problem.clone(),
    }
}
