//! `ocifs ls`: the files of a model, without a mount.

use anyhow::Result;
use serde_json::{Value, json};

use super::args::{Global, Ls};
use super::exit::Exit;
use super::explain::Failure;
use super::interrupt::unless_interrupted;
use super::output::{Align, printable};
use super::{context, output};
use crate::base::ByteSize;
use crate::model::{File, Link};
use crate::registry::Reference;

pub(super) fn run(global: &Global, args: &Ls) -> Result<Exit> {
    let reference: Reference = args.reference.parse()?;
    let settings = context::looking(global, args.reading.values())?;
    context::block_on(unless_interrupted(async {
        let (models, _) = context::models(&settings)?;
        let digest = models.resolve(&reference).await?;
        // First patiently: what cannot be used is then told by `open` at once.
        models
            .inspect_patiently(reference.repository(), &digest)
            .await?;
        let model = models.open(reference.repository(), &digest).await?;
        let path = args.path.as_deref().unwrap_or("").trim_matches('/');
        let files: Vec<&File> = model
            .files
            .iter()
            .filter(|file| lies_in(&file.path, path))
            .collect();
        let links: Vec<&Link> = model
            .links
            .iter()
            .filter(|link| lies_in(&link.path, path))
            .collect();
        if files.is_empty() && links.is_empty() {
            let failure = Failure::new(
                Exit::NotFound,
                format!("{reference} has no file or folder `{path}`"),
            );
            return Err(failure
                .hint(format!("`ocifs ls {reference}` lists what it has"))
                .into());
        }
        if args.json {
            let files: Vec<Value> = files.iter().map(|file| document(file)).collect();
            let links: Vec<Value> = links
                .iter()
                .map(|link| json!({ "path": link.path, "target": link.target }))
                .collect();
            output::json(
                &json!({ "reference": reference.to_string(), "digest": digest, "files": files, "links": links }),
            )?;
            return Ok(Exit::Ok);
        }
        let mut rows: Vec<[String; 3]> = files.iter().map(|file| row(file)).collect();
        rows.extend(links.iter().map(|link| {
            let shown = format!("{} -> {}", printable(&link.path), printable(&link.target));
            [String::new(), "link".to_owned(), shown]
        }));
        output::table([Align::Right, Align::Right, Align::Left], &rows)?;
        Ok(Exit::Ok)
    }))
}

/// Whether a file is `path` or lies below it; everything lies below the empty path.
fn lies_in(file: &str, path: &str) -> bool {
    path.is_empty()
        || file
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn row(file: &File) -> [String; 3] {
    let percent = file
        .cached()
        .saturating_mul(100)
        .checked_div(file.size)
        .unwrap_or(100);
    [
        ByteSize(file.size).to_string(),
        format!("{percent} % cached"),
        printable(&file.path),
    ]
}

fn document(file: &File) -> Value {
    json!({
        "path": file.path,
        "size": file.size,
        "cached": file.cached(),
        "digest": file.digest,
        "mediaType": file.media_type,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_file_or_a_folder_and_no_mere_prefix() {
        assert!(
            lies_in("a/b.json", "") && lies_in("a/b.json", "a") && lies_in("a/b.json", "a/b.json")
        );
        assert!(!lies_in("a/b.json", "a/b") && !lies_in("ab/c", "a") && !lies_in("a", "a/b"));
    }
}
