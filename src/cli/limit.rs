//! The cache's limit when none is given.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context as _, Result};

/// The part of the room that is taken: the rest is left to others on the file system.
const PERCENT: u64 = 80;
/// The least limit: below it no model fits.
const LEAST: u64 = 64 << 20;
/// Entries of the cache that are looked at; a larger one is judged by these.
const MOST_ENTRIES: usize = 200_000;

/// 80 % of what is free on the file system of `dir` together with what `dir` holds already.
pub(super) fn default(dir: &Path) -> Result<u64> {
    let existing = dir
        .ancestors()
        .find(|ancestor| ancestor.is_dir())
        .unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing);
    let stat =
        stat.with_context(|| format!("cannot tell how much is free in {}", existing.display()))?;
    Ok(of_room(
        stat.f_bavail.saturating_mul(stat.f_frsize),
        allocated(dir),
    ))
}

fn of_room(free: u64, held: u64) -> u64 {
    (free.saturating_add(held) / 100 * PERCENT).max(LEAST)
}

/// Allocated bytes below a directory; what cannot be read counts as nothing.
fn allocated(dir: &Path) -> u64 {
    let (mut sum, mut seen, mut open) = (0u64, 0, vec![dir.to_owned()]);
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            seen += 1;
            if seen > MOST_ENTRIES {
                return sum;
            }
            // Does not follow links: what they lead to is not the cache's.
            let Ok(meta) = entry.metadata() else { continue };
            match meta.is_dir() {
                true => open.push(entry.path()),
                false => sum = sum.saturating_add(meta.blocks().saturating_mul(512)),
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_does_not_shrink_as_the_cache_fills() {
        let gib = 1 << 30;
        assert_eq!(of_room(100 * gib, 0), of_room(40 * gib, 60 * gib));
        assert_eq!(of_room(0, 0), LEAST);
        assert!(of_room(u64::MAX, u64::MAX) > 1 << 60);
    }

    #[test]
    fn a_cache_that_does_not_exist_yet_has_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let before = default(&dir.path().join("a/b/c")).unwrap();
        assert!(before >= LEAST);
        fs::create_dir(dir.path().join("x")).unwrap();
        fs::write(dir.path().join("x/y"), vec![1; 1 << 20]).unwrap();
        assert!((1 << 20..2 << 20).contains(&allocated(dir.path())));
    }
}
