//! `ocifs inspect`: what an artifact is, without a mount.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::args::{Global, Inspect};
use super::exit::Exit;
use super::explain::Failure;
use super::interrupt::unless_interrupted;
use super::output::{Align, line, printable, table};
use super::{context, output};
use crate::base::{ByteRange, ByteSize, Digest};
use crate::model::{Descriptor, File, Header, Model};
use crate::pack::Timestamp;
use crate::registry::Reference;

/// The largest artifact config that is looked into.
const LARGEST_CONFIG: u64 = 1 << 20;

pub(super) fn run(global: &Global, args: &Inspect) -> Result<Exit> {
    let reference: Reference = args.reference.parse()?;
    let settings = context::looking(global, args.reading.values())?;
    context::block_on(unless_interrupted(async {
        let (models, _) = context::models(&settings)?;
        let model = context::look_up(&models, &reference).await?;
        if let Some(path) = &args.file {
            let file = model.file(path.trim_start_matches('/'));
            let missing = || {
                Failure::new(Exit::NotFound, format!("{reference} has no file `{path}`"))
                    .hint(format!("`ocifs ls {reference}` lists what it has"))
            };
            return one_file(file.ok_or_else(missing)?, args.json).await;
        }
        let tensors = match args.tensors {
            true => tensors_of_all(&model).await?,
            false => Vec::new(),
        };
        let config = config(&model).await;
        // What refers to the model is no part of it: that it cannot be listed is no failure.
        let asked = models.referrers(reference.repository(), &model.digest);
        let referrers = asked.await.unwrap_or_else(|error| {
            tracing::info!(%error, "what refers to it cannot be listed");
            Vec::new()
        });
        if args.json {
            let mut document = document(&reference, &model, config, &tensors);
            document["referrers"] = json!(referrers);
            output::json(&document)?;
        } else {
            print(&reference, &model, config.as_ref(), &tensors)?;
            print_referrers(&referrers)?;
        }
        Ok(Exit::Ok)
    }))
}

async fn one_file(file: &File, json: bool) -> Result<Exit> {
    let header = file.tensors(context::look_deadline()).await;
    let header = header.with_context(|| format!("cannot list the tensors of {}", file.path))?;
    if json {
        output::json(&tensors_json(&header))?;
    } else {
        print_tensors(&header)?;
    }
    Ok(Exit::Ok)
}

type Tensors<'a> = (&'a str, Header);

async fn tensors_of_all(model: &Model) -> Result<Vec<Tensors<'_>>> {
    let mut all = Vec::new();
    for file in model
        .files
        .iter()
        .filter(|file| file.path.ends_with(".safetensors"))
    {
        let header = file.tensors(context::look_deadline()).await;
        all.push((
            file.path.as_str(),
            header.with_context(|| format!("cannot list the tensors of {}", file.path))?,
        ));
    }
    Ok(all)
}

/// The artifact's config, when it is JSON and can be had.
async fn config(model: &Model) -> Option<Value> {
    let file = model
        .oci
        .iter()
        .find(|file| file.path == "config.json" && file.size <= LARGEST_CONFIG)?;
    let bytes = file
        .peek(ByteRange::new(0, file.size), context::look_deadline())
        .await
        .ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// What a config says about the model, whichever convention wrote it: Docker's keys, then ModelPack's.
fn facts(config: &Value) -> Vec<String> {
    let inner = &config["config"];
    let known = [
        ("architecture", &["architecture"][..]),
        ("parameters", &["parameters", "paramSize"]),
        ("format", &["format"]),
        ("precision", &["precision"]),
        ("quantization", &["quantization"]),
    ];
    let find = |keys: &[&str]| {
        keys.iter()
            .find_map(|key| inner[*key].as_str())
            .filter(|text| !text.is_empty())
    };
    known
        .iter()
        .filter_map(|(name, keys)| Some(format!("{name} {}", printable(find(keys)?))))
        .collect()
}

fn print(
    reference: &Reference,
    model: &Model,
    config: Option<&Value>,
    tensors: &[Tensors<'_>],
) -> Result<()> {
    let manifest = &model.manifest;
    let mut rows = vec![
        ["reference".to_owned(), reference.to_string()],
        ["digest".to_owned(), model.digest.to_string()],
        ["packaging".to_owned(), model.packaging.to_owned()],
        ["config".to_owned(), printable(&manifest.config.media_type)],
    ];
    if let Some(artifact_type) = &manifest.artifact_type {
        rows.push(["artifact".to_owned(), printable(artifact_type)]);
    }
    let facts = config.map(facts).unwrap_or_default();
    if !facts.is_empty() {
        rows.push(["model".to_owned(), facts.join(", ")]);
    }
    if model.created > std::time::SystemTime::UNIX_EPOCH {
        rows.push([
            "created".to_owned(),
            Timestamp::of(model.created).to_string(),
        ]);
    }
    let count = manifest.layers.len();
    let plural = if count == 1 { "" } else { "s" };
    let size = format!("{} in {count} layer{plural}", ByteSize(model.size()));
    rows.push(["size".to_owned(), size]);
    if let Some(problem) = &model.problem {
        rows.push(["problem".to_owned(), printable(problem)]);
    }
    table([Align::Left, Align::Left], &rows)?;

    line("\nlayers")?;
    let layers: Vec<[String; 3]> = manifest
        .layers
        .iter()
        .map(|layer| {
            [
                ByteSize(layer.size).to_string(),
                short(&layer.digest),
                printable(&layer.media_type),
            ]
        })
        .collect();
    table([Align::Right, Align::Left, Align::Left], &layers)?;

    line("\nfiles")?;
    let files: Vec<[String; 3]> = model
        .files
        .iter()
        .map(|file| {
            let digest = file
                .digest
                .as_ref()
                .map_or_else(|| "made by ocifs".to_owned(), short);
            [
                ByteSize(file.size).to_string(),
                digest,
                printable(&file.path),
            ]
        })
        .collect();
    table([Align::Right, Align::Left, Align::Left], &files)?;
    if !model.links.is_empty() {
        line("\nlinks")?;
        let links: Vec<[String; 2]> = model
            .links
            .iter()
            .map(|link| {
                [
                    printable(&link.path),
                    format!("-> {}", printable(&link.target)),
                ]
            })
            .collect();
        table([Align::Left, Align::Left], &links)?;
    }

    for (path, header) in tensors {
        line(format_args!("\ntensors of {}", printable(path)))?;
        print_tensors(header)?;
    }
    if !model.notes.is_empty() {
        line("\nnotes")?;
        model
            .notes
            .iter()
            .try_for_each(|note| line(format_args!("  {}", printable(note))))?;
    }
    Ok(())
}

fn print_referrers(referrers: &[Descriptor]) -> Result<()> {
    if referrers.is_empty() {
        return Ok(());
    }
    line("\nreferrers")?;
    let rows: Vec<[String; 3]> = referrers
        .iter()
        .map(|referrer| {
            let kind = referrer
                .artifact_type
                .as_ref()
                .unwrap_or(&referrer.media_type);
            [
                ByteSize(referrer.size).to_string(),
                short(&referrer.digest),
                printable(kind),
            ]
        })
        .collect();
    table([Align::Right, Align::Left, Align::Left], &rows)?;
    Ok(())
}

fn print_tensors(header: &Header) -> Result<()> {
    let rows: Vec<[String; 4]> = header
        .tensors
        .iter()
        .map(|tensor| {
            let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
            [
                ByteSize(tensor.size).to_string(),
                printable(&tensor.dtype),
                shape.join("×"),
                printable(&tensor.name),
            ]
        })
        .collect();
    table(
        [Align::Right, Align::Left, Align::Right, Align::Left],
        &rows,
    )?;
    Ok(())
}

/// Enough of a digest to tell it from others by eye.
fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(19).collect()
}

fn document(
    reference: &Reference,
    model: &Model,
    config: Option<Value>,
    tensors: &[Tensors<'_>],
) -> Value {
    let files: Vec<Value> = model
        .files
        .iter()
        .map(|file| {
            let mut document = json!({
                "path": file.path,
                "size": file.size,
                "digest": file.digest,
                "mediaType": file.media_type,
            });
            if let Some((_, header)) = tensors.iter().find(|(path, _)| *path == file.path) {
                document["tensors"] = tensors_json(header)["tensors"].take();
            }
            document
        })
        .collect();
    let links: Vec<Value> = model
        .links
        .iter()
        .map(|link| json!({ "path": link.path, "target": link.target }))
        .collect();
    json!({
        "reference": reference.to_string(),
        "digest": model.digest,
        "manifestDigest": model.manifest_digest,
        "packaging": model.packaging,
        "created": Timestamp::of(model.created).to_string(),
        "size": model.size(),
        "manifest": model.manifest,
        "config": config,
        "files": files,
        "links": links,
        "notes": model.notes,
        "problem": model.problem,
    })
}

fn tensors_json(header: &Header) -> Value {
    let tensors: Vec<Value> = header
        .tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "offset": tensor.offset,
                "size": tensor.size,
            })
        })
        .collect();
    json!({ "metadata": header.metadata, "tensors": tensors })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_conventions_tell_their_facts() {
        let docker = json!({ "config": { "parameters": "8B", "architecture": "llama", "format": "safetensors" } });
        assert_eq!(
            facts(&docker),
            ["architecture llama", "parameters 8B", "format safetensors"]
        );
        let modelpack = json!({ "config": { "paramSize": "8b", "precision": "bf16" } });
        assert_eq!(facts(&modelpack), ["parameters 8b", "precision bf16"]);
        assert!(facts(&json!([1])).is_empty() && facts(&json!({ "config": "x" })).is_empty());
    }
}
