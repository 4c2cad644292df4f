//! What the tar layers of an artifact hold: their listings, by the cheapest way that each layer allows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::ModelError;
use super::convention::{Role, Step};
use super::fetch::Fetch;
use super::inflate::Claimed;
use super::layout;
use super::manifest::{Descriptor, Manifest};
use super::plan::gather;
use super::tar::{Form, Listing, TarError, Walk};
use super::toc::{self, Toc};
use crate::base::ByteRange;
use crate::blob::BlobError;

/// Most bytes of tars that are fetched whole for one model; beyond, they are walked by small ranges.
const MOST_WHOLE_TARS: u64 = 1 << 30;
/// Windows in which tars are walked: by requests to a registry, and in the cache.
const REMOTE_WINDOW: u64 = 16 << 10;
const LOCAL_WINDOW: u64 = 1 << 20;

/// What each tar layer holds.
pub(super) async fn list_tars<F: Fetch>(
    fetch: &F,
    manifest: &Manifest,
    steps: &[Step],
) -> Result<BTreeMap<usize, Result<Listing, TarError>>, ModelError> {
    let entries = AtomicUsize::new(0);
    let mut whole_left = MOST_WHOLE_TARS;
    let mut listings = Vec::new();
    for step in steps {
        let Role::Tar { whole_up_to, .. } = step.role else {
            continue;
        };
        let (layer, tar, entries) = (step.layer, manifest.blob(step.layer), &entries);
        let descriptor = &manifest.layers[layer];
        let is_small = tar.size <= whole_up_to.min(whole_left);
        if is_small {
            whole_left -= tar.size;
        }
        listings.push(async move {
            if entries.load(Ordering::Relaxed) > layout::MOST_FILES {
                return Ok((
                    layer,
                    Err(TarError::TooLarge("200000 files with the tars before it")),
                ));
            }
            let listing = list_tar(fetch, descriptor, is_small).await?;
            // A refused tar counts as a long one: how far it was read is not known.
            let refused = layout::MOST_FILES / 4;
            let found = listing.as_ref().map_or(refused, |listing| listing.entries);
            entries.fetch_add(found, Ordering::Relaxed);
            Ok((layer, listing))
        });
    }
    Ok(gather(listings).await?.into_iter().collect())
}

/// Walks over one tar: a `whole` one is completed and verified before, others are looked at by small ranges. A compressed
/// one is unpacked first, unless it is known from before.
async fn list_tar<F: Fetch>(
    fetch: &F,
    layer: &Descriptor,
    whole: bool,
) -> Result<Result<Listing, TarError>, ModelError> {
    if let Some(listing) = fetch.recall(layer).await {
        return Ok(Ok(listing));
    }
    if let Some(toc) = toc::of(layer) {
        match list_chunked(fetch, layer, toc).await? {
            Ok(listing) => {
                fetch.remember(&layer.digest, &listing).await;
                return Ok(Ok(listing));
            }
            // It is a compressed tar still.
            Err(reason) => {
                tracing::warn!(digest = %layer.digest, reason, "a layer's table of contents is of no use");
            }
        }
    }
    let tar = layer.blob();
    let is_local = whole && fetch.complete(tar).await?;
    let window = if is_local {
        LOCAL_WINDOW
    } else {
        REMOTE_WINDOW
    };
    let listing = walk(fetch, layer, Form::Plain, Walk::new(tar.size, window));
    match listing.await? {
        Err(TarError::Compressed(_)) => list_compressed(fetch, layer).await,
        listing => Ok(listing),
    }
}

/// What the table of contents of a layer lists. The inner error is for people.
async fn list_chunked<F: Fetch>(
    fetch: &F,
    layer: &Descriptor,
    toc: Toc,
) -> Result<Result<Listing, String>, ModelError> {
    let place = match toc {
        Toc::ZstdChunked(place, _) => place,
        Toc::EStargz(_) => {
            let footer = fetch.peek(layer.blob(), toc::footer(layer)).await?;
            match toc::table(layer, &footer) {
                Some(place) => place,
                None => return Ok(Err("its footer cannot be understood".to_owned())),
            }
        }
    };
    let table = fetch.peek(layer.blob(), place).await?;
    Ok(toc::parse(toc, place, &table))
}

/// What a compressed tar holds, found in its uncompressed form and remembered.
async fn list_compressed<F: Fetch>(
    fetch: &F,
    layer: &Descriptor,
) -> Result<Result<Listing, TarError>, ModelError> {
    if let Some(listing) = list_single(fetch, layer).await? {
        return Ok(Ok(listing));
    }
    let size = match fetch.unpack(layer).await {
        Ok(size) => size,
        // It will be no better the next time: the model is shown without the layer, or is told to be damaged.
        Err(ModelError::Blob {
            source:
                source @ (BlobError::Undecodable { lasting: true, .. } | BlobError::Corrupt { .. }),
            ..
        }) => return Ok(Err(TarError::Undecodable(source.to_string()))),
        Err(error) => return Err(error),
    };
    let listing = walk(
        fetch,
        layer,
        Form::Compressed,
        Walk::new(size, LOCAL_WINDOW),
    );
    match listing.await? {
        Ok(listing) => {
            fetch.remember(&layer.digest, &listing).await;
            Ok(Ok(listing))
        }
        Err(TarError::Compressed(format)) => Ok(Err(TarError::Undecodable(format!(
            "it is compressed twice, the second time with {}",
            format.name()
        )))),
        Err(error) => Ok(Err(error)),
    }
}

/// Compressed layers that are shorter are unpacked before anybody has noticed.
const WORTH_A_LOOK: u64 = 16 << 20;
/// What ends a tar: two blocks of zeros. Go's writers, which are those of the field, put nothing behind them; where GNU tar fills up
/// its record, a further small member would not show.
const END_MARK: u64 = 1024;

/// The member of a large compressed tar that holds a single file, as packagers of weights write them, while the rest of it is still being
/// unpacked, so that the file can be read already.
///
/// That there is one is a conclusion from the size that the stream claims and the first header. It is not remembered: the next
/// time the whole is looked at. Errors are left to who does that.
async fn list_single<F: Fetch>(
    fetch: &F,
    layer: &Descriptor,
) -> Result<Option<Listing>, ModelError> {
    if layer.size < WORTH_A_LOOK {
        return Ok(None);
    }
    let range = ByteRange::new(0, REMOTE_WINDOW);
    let Ok(window) = fetch.peek_unpacked(layer, range).await else {
        return Ok(None);
    };
    let mut walk = Walk::new(u64::MAX >> 1, REMOTE_WINDOW);
    if !matches!(walk.advance(0, &window), Ok(Some(_))) {
        return Ok(None);
    }
    let Some(end) = walk.only_file() else {
        return Ok(None);
    };
    let blob = layer.blob();
    let start = fetch.peek(blob, ByteRange::new(0, Claimed::START)).await?;
    let last = ByteRange::new(layer.size - Claimed::END, layer.size);
    let last = fetch.peek(blob, last).await?;
    let is_all =
        Claimed::of(&start, &last).is_some_and(|claimed| claimed.is(end.saturating_add(END_MARK)));
    Ok(is_all.then(|| Listing {
        form: Form::Compressed,
        ..walk.finish()
    }))
}

/// Walks over a tar that is the layer, or its uncompressed form.
async fn walk<F: Fetch>(
    fetch: &F,
    layer: &Descriptor,
    form: Form,
    mut walk: Walk,
) -> Result<Result<Listing, TarError>, ModelError> {
    let mut wanted = walk.begin();
    while let Some(range) = wanted {
        let window = match form {
            Form::Plain => fetch.peek(layer.blob(), range).await?,
            Form::Compressed | Form::Chunked => fetch.peek_unpacked(layer, range).await?,
        };
        wanted = match walk.advance(range.start(), &window) {
            Ok(wanted) => wanted,
            Err(error) => return Ok(Err(error)),
        };
    }
    Ok(Ok(Listing {
        form,
        ..walk.finish()
    }))
}
