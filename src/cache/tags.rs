//! What tags were last known to point at: one small file for each, named by the SHA-256 of the reference.
//!
//! ```text
//! tags/<hex>.json    {"name":"ghcr.io/org/model:v1","digest":"sha256:…","checked":<seconds since the epoch>}
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::disk;
use super::layout::replace;
use crate::base::Digest;

/// What a tag was last known to point at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagRecord {
    /// The reference as `host/path:tag`.
    pub name: String,
    /// The manifest's digest.
    pub digest: Digest,
    /// When a registry last said so, to the second.
    pub checked: SystemTime,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    name: String,
    digest: Digest,
    checked: u64,
}

/// A file longer than this is not one of ours.
const LONGEST: u64 = 4096;

fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{}.json", Digest::of(name.as_bytes()).hex()))
}

fn load(path: &Path) -> Option<TagRecord> {
    let record: OnDisk = serde_json::from_slice(&disk::read(path, LONGEST).ok()?).ok()?;
    let checked = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(record.checked))?;
    Some(TagRecord {
        name: record.name,
        digest: record.digest,
        checked,
    })
}

pub(super) fn set(dir: &Path, record: &TagRecord) -> io::Result<()> {
    let checked = record
        .checked
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let on_disk = OnDisk {
        name: record.name.clone(),
        digest: record.digest,
        checked,
    };
    replace(&path(dir, &record.name), &serde_json::to_vec(&on_disk)?)
}

pub(super) fn get(dir: &Path, name: &str) -> Option<TagRecord> {
    load(&path(dir, name)).filter(|record| record.name == name)
}

pub(super) fn remove(dir: &Path, name: &str) -> io::Result<()> {
    let path = path(dir, name);
    std::fs::symlink_metadata(&path)?;
    disk::remove(&path)
}

pub(super) fn list(dir: &Path) -> Vec<TagRecord> {
    let mut records: Vec<_> = disk::list(dir)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|entry| load(&entry.path()))
        .collect();
    records.sort_by(|a, b| a.name.cmp(&b.name));
    records
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_format_is_pinned_and_damage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let record = TagRecord {
            name: "ghcr.io/o/m:v1".into(),
            digest: Digest::of(b"abc"),
            checked: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        };
        set(dir.path(), &record).unwrap();
        let file = path(dir.path(), &record.name);
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            format!(
                r#"{{"name":"ghcr.io/o/m:v1","digest":"{}","checked":1700000000}}"#,
                Digest::of(b"abc")
            )
        );
        assert_eq!(get(dir.path(), "ghcr.io/o/m:v1"), Some(record.clone()));
        assert_eq!(list(dir.path()), [record]);
        fs::write(&file, "{").unwrap();
        assert_eq!(get(dir.path(), "ghcr.io/o/m:v1"), None);
        assert_eq!(list(dir.path()), []);
    }
}
