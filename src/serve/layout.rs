//! An OCI image layout on disk, as the server reads it (image-spec, image-layout.md).

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::Deserialize;

use super::names::RefName;
use crate::base::{Digest, lock};

/// The largest `index.json` that is read: some hundred thousand entries.
const LARGEST_INDEX: u64 = 64 << 20;

/// A layout directory. Its `index.json` is read again whenever it changes.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
    seen: Mutex<Option<(Stamp, Arc<Index>)>>,
}

/// What tells one version of a file from the next: device, inode, size, mtime with nanoseconds.
type Stamp = (u64, u64, u64, i64, i64);

/// `index.json`, as far as the server needs it.
#[derive(Debug, Default)]
pub(super) struct Index {
    names: Vec<(RefName, Digest)>,
    media_types: HashMap<Digest, String>,
}

impl Index {
    /// The digest that a tag of a repository points at; of several entries the last.
    pub(super) fn tag(&self, repository: &str, tag: &str) -> Option<Digest> {
        let entry = self
            .names
            .iter()
            .rev()
            .find(|(name, _)| name.tag == tag && name.serves(repository));
        entry.map(|(_, digest)| *digest)
    }

    /// The tags of a repository, sorted, each once; empty when there is no such repository.
    pub(super) fn tags(&self, repository: &str) -> Vec<&str> {
        let serving = self
            .names
            .iter()
            .filter(|(name, _)| name.serves(repository));
        let mut tags: Vec<&str> = serving.map(|(name, _)| name.tag.as_str()).collect();
        tags.sort_unstable();
        tags.dedup();
        tags
    }

    /// The media type that `index.json` gives for a manifest.
    pub(super) fn media_type(&self, digest: &Digest) -> Option<&str> {
        self.media_types.get(digest).map(String::as_str)
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Document {
            #[serde(default)]
            manifests: Vec<Entry>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Entry {
            digest: String,
            #[serde(default)]
            media_type: String,
            #[serde(default)]
            annotations: Option<HashMap<String, String>>,
        }
        let document: Document = serde_json::from_slice(bytes)?;
        let mut index = Self::default();
        for entry in document.manifests {
            // A digest of another algorithm has no blob that could be served.
            let Ok(digest) = entry.digest.parse::<Digest>() else {
                continue;
            };
            if !entry.media_type.is_empty() {
                index.media_types.insert(digest, entry.media_type);
            }
            let annotations = entry.annotations.unwrap_or_default();
            if let Some(name) = annotations
                .get(REF_NAME)
                .and_then(|text| RefName::parse(text))
            {
                index.names.push((name, digest));
            }
        }
        Ok(index)
    }
}

/// The annotation that names an entry of `index.json` (image-spec, annotations.md).
const REF_NAME: &str = "org.opencontainers.image.ref.name";

impl Layout {
    /// A layout in `dir`, which must have an `index.json` that can be read.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let layout = Self {
            dir: dir.to_owned(),
            seen: Mutex::new(None),
        };
        if !dir.join("oci-layout").is_file() {
            let text = match dir.is_dir() {
                true => "no OCI image layout: the directory has no `oci-layout` file",
                false => "there is no such directory",
            };
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        layout.index()?;
        Ok(layout)
    }

    /// `index.json` as it is now. Blocks on the disk.
    pub(super) fn index(&self) -> io::Result<Arc<Index>> {
        let path = self.dir.join("index.json");
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            // A cache that holds no whole artifact yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Arc::default()),
            Err(error) => return Err(error),
        };
        let stamp = (
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec(),
        );
        let mut seen = lock(&self.seen);
        if let Some((known, index)) = &*seen
            && *known == stamp
        {
            return Ok(Arc::clone(index));
        }
        let mut bytes = Vec::new();
        File::open(&path)?
            .take(LARGEST_INDEX + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LARGEST_INDEX {
            let text = format!("index.json is larger than {LARGEST_INDEX} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let index = Arc::new(Index::parse(&bytes)?);
        *seen = Some((stamp, Arc::clone(&index)));
        Ok(index)
    }

    /// Opens a blob; `None` when there is none. Its name comes from the digest's own hexadecimal digits.
    pub(super) fn blob(&self, digest: &Digest) -> io::Result<Option<(File, u64)>> {
        let path = self.dir.join("blobs/sha256").join(digest.hex());
        // O_NONBLOCK: opening a fifo that somebody put there must not hang; it changes nothing for files.
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
        {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let meta = file.metadata()?;
        Ok(meta.is_file().then_some((file, meta.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_read_leniently_and_looked_up_by_name() {
        let [a, b] = [Digest::of(b"a"), Digest::of(b"b")];
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[
                {{"mediaType":"t/a","digest":"{a}","size":1,"annotations":{{"{REF_NAME}":"x.io/m:v1"}}}},
                {{"mediaType":"t/b","digest":"{b}","size":1,"annotations":{{"{REF_NAME}":"m:v1"}}}},
                {{"mediaType":"t/b","digest":"{b}","size":1,"annotations":{{"{REF_NAME}":"any"}}}},
                {{"mediaType":"t/c","digest":"sha512:00","size":1}},
                {{"digest":"{b}","size":1,"annotations":null}}]}}"#
        );
        let index = Index::parse(text.as_bytes()).unwrap();
        assert_eq!(index.tag("m", "v1"), Some(b), "the last entry wins");
        assert_eq!(index.tag("x.io/m", "v1"), Some(a));
        assert_eq!(index.tag("other", "any"), Some(b));
        assert_eq!(index.tag("other", "v1"), None);
        assert_eq!(index.tags("m"), ["any", "v1"]);
        assert_eq!(index.media_type(&a), Some("t/a"));
        assert!(Index::parse(b"<html>").is_err());
    }
}
