//! What was found out about a layer whose bytes were verified: small files named by its digest, so that nobody has to
//! find it out again after a restart or when the bytes themselves were evicted.
//!
//! ```text
//! notes/<hex>.<kind>     CRC-32C of the rest, little endian; then the note, whose form its writer knows
//! ```
//!
//! A note counts in the cache's limit and goes like a blob that nobody uses. One that is damaged is none.

use std::path::PathBuf;

use super::disk;
use super::layout::replace;
use super::{Cache, CacheError};
use crate::base::Digest;

/// The longest note, in bytes.
const LONGEST: u64 = 64 << 20;

/// What a note is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoteKind {
    /// What a tar layer holds.
    Listing,
    /// Which blob of the cache a compressed layer's uncompressed form is.
    Unpacked,
    /// Which artifact it is that a manifest names by a tag.
    Base,
}

impl NoteKind {
    fn suffix(self) -> &'static str {
        match self {
            Self::Listing => "listing",
            Self::Unpacked => "unpacked",
            Self::Base => "base",
        }
    }
}

impl Cache {
    fn note_path(&self, kind: NoteKind, layer: &Digest) -> PathBuf {
        let name = format!("{}.{}", layer.hex(), kind.suffix());
        self.layout().notes_dir().join(name)
    }

    /// Keeps a note on a layer. Best effort: a failure is logged.
    pub fn set_note(&self, kind: NoteKind, layer: &Digest, note: &[u8]) {
        let path = self.note_path(kind, layer);
        let content = [&crc32c::crc32c(note).to_le_bytes(), note].concat();
        let write = || replace(&path, &content).map_err(CacheError::io("write", &path));
        if note.len() as u64 > LONGEST {
            return;
        }
        if let Err(error) = self.reserve(content.len() as u64, write) {
            self.failed(&error);
            tracing::debug!(digest = %layer, %error, "what was found out about a layer is not kept");
        }
    }

    /// The note on a layer, if there is a sound one.
    pub fn note(&self, kind: NoteKind, layer: &Digest) -> Option<Vec<u8>> {
        let path = self.note_path(kind, layer);
        let mut content = disk::read(&path, LONGEST + 4).ok()?;
        let note = content.get(4..)?;
        if content[..4] != crc32c::crc32c(note).to_le_bytes() {
            tracing::warn!(digest = %layer, "a note in the cache is damaged");
            self.remove_note(kind, layer);
            return None;
        }
        content.drain(..4);
        Some(content)
    }

    /// Forgets a note.
    pub fn remove_note(&self, kind: NoteKind, layer: &Digest) {
        let path = self.note_path(kind, layer);
        if let Err(error) = disk::remove(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove a note");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cache::CacheConfig;

    #[test]
    fn a_note_is_kept_counted_and_not_believed_when_it_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(CacheConfig {
            dir: dir.path().to_owned(),
            limit: 1 << 20,
        })
        .unwrap();
        let layer = Digest::of(b"layer");
        assert_eq!(cache.note(NoteKind::Listing, &layer), None);
        cache.set_note(NoteKind::Listing, &layer, b"members");
        assert_eq!(
            cache.note(NoteKind::Listing, &layer).as_deref(),
            Some(&b"members"[..])
        );
        assert_eq!(cache.note(NoteKind::Unpacked, &layer), None);
        assert!(cache.list().unwrap().is_empty(), "a note is no blob");

        let path = cache.note_path(NoteKind::Listing, &layer);
        let mut content = fs::read(&path).unwrap();
        content[5] ^= 1;
        fs::write(&path, content).unwrap();
        assert_eq!(cache.note(NoteKind::Listing, &layer), None);
        assert!(!path.exists());

        cache.set_note(NoteKind::Listing, &layer, &[7; 100_000]);
        assert_eq!(cache.evict(0).unwrap(), 0, "it takes room and may go");
        assert!(!path.exists());
    }
}
