//! `index.json`: the artifacts that are whole, for ordinary OCI tools (image-spec, image-layout.md, "index.json file").
//!
//! Each entry names its artifact by the full reference in `org.opencontainers.image.ref.name`, which is what
//! `skopeo … oci:DIR:REFERENCE` looks for. Changed only under the cache's exclusive lock.

use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::disk;
use super::layout::replace;
use crate::base::Digest;

/// A longer file is no index of ours, in bytes.
const LONGEST: u64 = 64 << 20;

const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An artifact in the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its full reference.
    pub name: String,
    /// Its manifest's digest.
    pub digest: Digest,
}

fn load(path: &Path) -> io::Result<Value> {
    let bytes = disk::read(path, LONGEST)?;
    let index: Value = serde_json::from_slice(&bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if !index["manifests"].is_array() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "no list of manifests",
        ));
    }
    Ok(index)
}

fn change(path: &Path, edit: impl FnOnce(&mut Vec<Value>)) -> io::Result<()> {
    let mut index = match load(path) {
        // What is not an index is of no use to anybody; everything in it can be published again.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::NotFound | io::ErrorKind::FileTooLarge
            ) =>
        {
            json!({"schemaVersion": 2, "manifests": []})
        }
        other => other?,
    };
    let Some(manifests) = index["manifests"].as_array_mut() else {
        return Ok(());
    };
    let before = manifests.clone();
    edit(manifests);
    if *manifests == before {
        return Ok(());
    }
    replace(path, &serde_json::to_vec(&index)?)
}

fn name(entry: &Value) -> Option<&str> {
    entry["annotations"][REF_NAME].as_str()
}

/// Adds an artifact, or moves its name.
pub(super) fn publish(
    path: &Path,
    reference: &str,
    media_type: &str,
    digest: &Digest,
    size: u64,
    artifact_type: Option<&str>,
) -> io::Result<()> {
    let mut entry = Map::new();
    entry.insert("mediaType".into(), media_type.into());
    entry.insert("digest".into(), digest.to_string().into());
    entry.insert("size".into(), size.into());
    if let Some(artifact_type) = artifact_type {
        entry.insert("artifactType".into(), artifact_type.into());
    }
    entry.insert("annotations".into(), json!({REF_NAME: reference}));
    let entry = Value::Object(entry);
    change(path, |manifests| {
        manifests.retain(|old| name(old) != Some(reference));
        manifests.push(entry);
        manifests.sort_by(|a, b| name(a).cmp(&name(b)));
    })
}

/// Removes every artifact for which `keep` is false.
pub(super) fn retain(path: &Path, mut keep: impl FnMut(&Digest) -> bool) -> io::Result<()> {
    change(path, |manifests| {
        manifests.retain(|entry| {
            entry["digest"]
                .as_str()
                .and_then(|text| text.parse().ok())
                .is_some_and(|d| keep(&d))
        });
    })
}

/// All artifacts in the index.
pub(super) fn list(path: &Path) -> io::Result<Vec<Published>> {
    let index = load(path)?;
    let entries = index["manifests"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(entries
        .iter()
        .filter_map(|entry| {
            let digest = entry["digest"].as_str()?.parse().ok()?;
            Some(Published {
                name: name(entry)?.to_owned(),
                digest,
            })
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_format_is_pinned_and_a_name_moves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.json");
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        publish(
            &path,
            "ghcr.io/o/m:v1",
            "application/vnd.oci.image.manifest.v1+json",
            &a,
            3,
            None,
        )
        .unwrap();
        publish(
            &path,
            "ghcr.io/o/m:v1",
            "application/vnd.oci.image.manifest.v1+json",
            &b,
            4,
            Some("t/x"),
        )
        .unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!(
                r#"{{"manifests":[{{"annotations":{{"org.opencontainers.image.ref.name":"ghcr.io/o/m:v1"}},"artifactType":"t/x","digest":"{b}","mediaType":"application/vnd.oci.image.manifest.v1+json","size":4}}],"schemaVersion":2}}"#
            )
        );
        assert_eq!(
            list(&path).unwrap(),
            [Published {
                name: "ghcr.io/o/m:v1".into(),
                digest: b
            }]
        );
        retain(&path, |digest| *digest != b).unwrap();
        assert_eq!(list(&path).unwrap(), []);
    }

    #[test]
    fn a_broken_index_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.json");
        for broken in ["", "{", "[]", "{\"manifests\":3}"] {
            fs::write(&path, broken).unwrap();
            assert!(list(&path).is_err());
            publish(&path, "r", "m", &Digest::of(b"a"), 1, None).unwrap();
            assert_eq!(list(&path).unwrap().len(), 1, "{broken}");
        }
    }
}
