//! The safetensors part of a plan: headers are read where names or an index are missing, and only there.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;

use crate::base::ByteRange;

use super::ModelError;
use super::convention::{Role, Step};
use super::fetch::{Fetch, peek_file, whole};
use super::index::{self, WeightMap};
use super::layout::{self, Layout, Placed, Source};
use super::manifest::Manifest;
use super::notes::quote;
use super::plan::gather;
use super::safetensors::{self, Header, Malformed};
use super::shards;
use super::tar::{Listing, TarError};

/// Most bytes of safetensors headers of one model.
const MOST_HEADER_BYTES: u64 = 128 << 20;
/// First read of a safetensors file: its header's length, and the header itself for most shards.
pub(super) const FIRST_READ: u64 = 16 << 10;
/// Lays out all files of a model, finds names for its nameless shards, and adds an index where it is missing.
pub(super) async fn lay_out<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    steps: &[Step],
    tars: &BTreeMap<usize, Result<Listing, TarError>>,
) -> Result<Layout, ModelError> {
    let mut headers = Headers::default();
    let mut layout = name_shards(fetch, manifest, steps, tars, &mut headers).await?;
    add_index(fetch, manifest, &mut layout, &mut headers).await?;
    Ok(layout)
}

/// Safetensors headers that were read.
#[derive(Default)]
struct Headers {
    known: HashMap<Placed, Result<Header, Malformed>>,
    bytes: u64,
}

impl Headers {
    /// Reads the headers of these files, all at once, unless they are known.
    async fn read<F: Fetch>(
        &mut self,
        fetch: &F,
        manifest: &Manifest,
        files: &[Placed],
    ) -> Result<(), ModelError> {
        let mut seen = HashSet::new();
        let files: Vec<&Placed> = files
            .iter()
            .filter(|file| !self.known.contains_key(*file) && seen.insert(*file))
            .collect();
        let first = files
            .iter()
            .map(async |file| match file.size.min(FIRST_READ) {
                0 => Ok(Bytes::new()),
                len => peek_file(fetch, manifest, file, ByteRange::at(0, len)).await,
            });
        let first = gather(first.collect()).await?;
        let mut rests = Vec::new();
        for (file, start) in files.into_iter().zip(first) {
            let len = safetensors::header_len(&start, file.size).and_then(|len| {
                self.bytes = self.bytes.saturating_add(len);
                let fits = self.bytes <= MOST_HEADER_BYTES;
                fits.then_some(len)
                    .ok_or_else(|| Malformed::new("the model's headers have more than 128 MiB"))
            });
            match len {
                Ok(len) => rests.push(rest_of_header(fetch, manifest, file, start, len)),
                Err(error) => {
                    self.known.insert(file.clone(), Err(error));
                }
            }
        }
        self.known.extend(gather(rests).await?);
        Ok(())
    }
}

async fn rest_of_header<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    file: &Placed,
    start: Bytes,
    len: u64,
) -> Result<(Placed, Result<Header, Malformed>), ModelError> {
    let end = safetensors::PREFIX + len;
    let have = start.len() as u64;
    let mut json = start
        .get(safetensors::PREFIX as usize..)
        .unwrap_or_default()
        .to_vec();
    if have < end {
        let rest = peek_file(fetch, manifest, file, ByteRange::new(have, end)).await?;
        json.extend_from_slice(&rest);
    }
    json.truncate(len as usize);
    Ok((file.clone(), safetensors::parse(&json, file.size)))
}

/// Lays the packaged files out, after finding names for nameless shards.
async fn name_shards<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    steps: &[Step],
    tars: &BTreeMap<usize, Result<Listing, TarError>>,
    headers: &mut Headers,
) -> Result<Layout, ModelError> {
    let nameless: Vec<usize> = steps
        .iter()
        .filter(|step| step.role == Role::NamelessShard)
        .map(|step| step.layer)
        .collect();
    let named = layout::lay_out(manifest, steps, tars, None);
    if nameless.is_empty() {
        return Ok(named);
    }
    let mut notes = Vec::new();
    let index = match named.files.get(index::NAME) {
        Some(placed) => match read_index(fetch, manifest, placed).await? {
            Ok(index) => Some(index),
            Err(note) => {
                notes.push(note);
                None
            }
        },
        None => None,
    };
    let taken = named.paths();
    let assignment = match index {
        Some(index) => {
            let extents: Vec<Placed> = nameless
                .iter()
                .map(|layer| Placed::whole(*layer, &manifest.layers[*layer]))
                .collect();
            headers.read(fetch, manifest, &extents).await?;
            let tensors = extents.iter().map(|extent| match &headers.known[extent] {
                Ok(header) => Some(
                    header
                        .tensors
                        .iter()
                        .map(|tensor| tensor.name.clone())
                        .collect(),
                ),
                Err(_) => None,
            });
            shards::with_index(&index, &tensors.collect::<Vec<_>>(), &taken)
        }
        None => shards::without_index(nameless.len(), &taken),
    };
    let mut layout = layout::lay_out(manifest, steps, tars, Some(&assignment.names));
    layout
        .notes
        .extend(notes.into_iter().chain(assignment.notes));
    Ok(layout)
}

/// The packaged index, or a note on why it can't be used.
async fn read_index<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    placed: &Placed,
) -> Result<Result<WeightMap, String>, ModelError> {
    if placed.source.layer().is_none() {
        return Ok(Err(format!("{} is not packaged", index::NAME)));
    }
    if placed.size > index::LARGEST {
        return Ok(Err(format!(
            "{} has {} bytes and is not read",
            index::NAME,
            placed.size
        )));
    }
    let bytes = match placed.source {
        _ if placed.size == 0 => Bytes::new(),
        Source::Layer { layer, .. } if placed.size == manifest.layers[layer].size => {
            whole(fetch, manifest.blob(layer)).await?
        }
        _ => peek_file(fetch, manifest, placed, ByteRange::new(0, placed.size)).await?,
    };
    Ok(WeightMap::parse(&bytes)
        .map_err(|error| format!("{} can't be understood: {error}", index::NAME)))
}

/// Makes `model.safetensors.index.json` if there are several shards and none is packaged.
async fn add_index<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    layout: &mut Layout,
    headers: &mut Headers,
) -> Result<(), ModelError> {
    let shards: Vec<(String, Placed)> = {
        let paths = layout.paths();
        if paths.contains(index::NAME) {
            return Ok(());
        }
        let extent = |path: &str| {
            let placed = &layout.files[path];
            placed
                .source
                .layer()
                .map(|_| (path.to_owned(), placed.clone()))
        };
        index::shards_to_list(&paths)
            .into_iter()
            .filter_map(extent)
            .collect()
    };
    if shards.len() < 2 || layout.problem.is_some() {
        return Ok(());
    }
    let extents: Vec<Placed> = shards.iter().map(|(_, extent)| extent.clone()).collect();
    headers.read(fetch, manifest, &extents).await?;
    let mut parsed = Vec::with_capacity(shards.len());
    for (path, extent) in &shards {
        match &headers.known[extent] {
            Ok(header) => parsed.push((path.as_str(), header)),
            Err(error) => {
                layout.notes.add(format!(
                    "no {} is made: {} is {error}",
                    index::NAME,
                    quote(path)
                ));
                return Ok(());
            }
        }
    }
    match index::make(&parsed) {
        Ok(content) => layout.add_made(index::NAME, content),
        Err(reason) => layout
            .notes
            .add(format!("no {} is made: {reason}", index::NAME)),
    }
    Ok(())
}
