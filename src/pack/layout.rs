//! Writes a package into an OCI image layout (image-spec, image-layout.md).

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Blob, MANIFEST_TYPE, PackError, Package, Progress, Source};
#[cfg(test)]
use crate::base::Digest;
use crate::base::Hasher;

/// The largest `index.json` that is added to.
const LARGEST_INDEX: u64 = 64 << 20;
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Writes `package` into the layout in `dir` as `name`, which replaces an entry of that name.
///
/// The directory is made when it is missing, and may hold other artifacts. Blobs that are there already are
/// left as they are. Each blob and then `index.json` appear under their names only when they are complete,
/// so that a reader at the same time, or a crash, never meets half of one. Two writers must not
/// add to one layout at once: the later `index.json` wins.
///
/// # Errors
/// When `name` is empty or has control characters, the disk says no, a file changed since it was hashed, or `dir`
/// holds something that is no layout.
pub fn write(
    package: &Package,
    dir: &Path,
    name: &str,
    progress: Progress<'_>,
) -> Result<(), PackError> {
    if name.is_empty() || name.contains(|c: char| c.is_control() || c.is_whitespace()) {
        return Err(PackError::Name {
            name: name.to_owned(),
        });
    }
    let blobs = dir.join("blobs/sha256");
    let mut index = open(dir)?;
    fs::create_dir_all(&blobs).map_err(PackError::io("make", &blobs))?;
    for blob in package.blobs() {
        write_blob(&blobs, blob, progress)?;
    }
    let manifest = blobs.join(package.digest.hex());
    replace(&manifest, &package.manifest)?;

    let mut entry = json!({
        "mediaType": MANIFEST_TYPE,
        "digest": package.digest,
        "size": package.manifest.len(),
        "annotations": { REF_NAME: name },
    });
    if let Some(artifact_type) = package.artifact_type {
        entry["artifactType"] = json!(artifact_type);
    }
    let Some(entries) = index.get_mut("manifests").and_then(Value::as_array_mut) else {
        return Err(unusable(&dir.join("index.json"), "has no list `manifests`"));
    };
    entries.retain(|old| old["annotations"][REF_NAME].as_str() != Some(name));
    entries.push(entry);
    replace(
        &dir.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    replace(&dir.join("index.json"), index.to_string().as_bytes())
}

fn unusable(path: &Path, reason: &str) -> PackError {
    PackError::File {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

/// The `index.json` of a layout, or a new one where there is none yet.
fn open(dir: &Path) -> Result<Value, PackError> {
    let path = dir.join("index.json");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let occupied = fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
            if occupied && !dir.join("oci-layout").exists() {
                return Err(unusable(
                    dir,
                    "holds other things and is no OCI layout; name a new directory",
                ));
            }
            return Ok(json!({ "schemaVersion": 2, "manifests": [] }));
        }
        Err(error) => return Err(PackError::io("open", &path)(error)),
    };
    let mut text = Vec::new();
    file.take(LARGEST_INDEX)
        .read_to_end(&mut text)
        .map_err(PackError::io("read", &path))?;
    let index: Value =
        serde_json::from_slice(&text).map_err(|error| unusable(&path, &error.to_string()))?;
    match index.is_object() {
        true => Ok(index),
        false => Err(unusable(&path, "is no JSON object")),
    }
}

fn write_blob(blobs: &Path, blob: &Blob, progress: Progress<'_>) -> Result<(), PackError> {
    let path = blobs.join(blob.digest.hex());
    if fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == blob.size) {
        return if progress(blob.size) {
            Ok(())
        } else {
            Err(PackError::Stopped)
        };
    }
    let source = match &blob.source {
        Source::Memory(bytes) => {
            replace(&path, bytes)?;
            return if progress(blob.size) {
                Ok(())
            } else {
                Err(PackError::Stopped)
            };
        }
        Source::File(source) => source,
    };
    let partial = Partial::create(&path)?;
    let mut hasher = Hasher::new();
    super::read_pieces(source, |piece| {
        hasher.update(piece);
        (&partial.file)
            .write_all(piece)
            .map_err(PackError::io("write", &partial.path))?;
        match progress(piece.len() as u64) {
            true => Ok(()),
            false => Err(PackError::Stopped),
        }
    })?;
    if hasher.finish() != blob.digest {
        return Err(PackError::Changed {
            path: source.clone(),
        });
    }
    partial.commit(&path)
}

/// Puts small content under a name in one step.
fn replace(path: &Path, content: &[u8]) -> Result<(), PackError> {
    let partial = Partial::create(path)?;
    (&partial.file)
        .write_all(content)
        .map_err(PackError::io("write", &partial.path))?;
    partial.commit(path)
}

/// A file that is removed unless it is committed.
struct Partial {
    file: File,
    path: PathBuf,
    committed: bool,
}

impl Partial {
    /// A new file beside `path`; hidden, and no name that a layout knows.
    fn create(path: &Path) -> Result<Self, PackError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!(".{name}.{}", std::process::id()));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(PackError::io("make", parent))?;
        }
        let file = File::create(&partial).map_err(PackError::io("make", &partial))?;
        Ok(Self {
            file,
            path: partial,
            committed: false,
        })
    }

    fn commit(mut self, path: &Path) -> Result<(), PackError> {
        self.file
            .sync_data()
            .map_err(PackError::io("write", &self.path))?;
        fs::rename(&self.path, path).map_err(PackError::io("make", path))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The digests that a layout's `index.json` gives to a name; for tests and the demonstration.
#[cfg(test)]
pub(super) fn lookup(dir: &Path, name: &str) -> Option<Digest> {
    let index = open(dir).ok()?;
    let entries = index["manifests"].as_array()?.clone();
    entries
        .iter()
        .find(|entry| entry["annotations"][REF_NAME] == name)?["digest"]
        .as_str()?
        .parse()
        .ok()
}
