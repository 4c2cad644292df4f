//! The `vllm.config.tar` of Docker's v0.1 format: small files, flat, sorted, without times or owners.

use std::fs;

use bytes::Bytes;

use super::PackError;
use super::scan::SourceFile;

/// The most that the files in the archive may have together: it is made, and later extracted, in memory.
const LARGEST: u64 = 512 << 20;

/// An uncompressed tar of these files under their own names.
pub(super) fn build(files: &[SourceFile]) -> Result<Bytes, PackError> {
    let total: u64 = files.iter().map(|file| file.size).sum();
    if let (true, Some(largest)) = (total > LARGEST, files.iter().max_by_key(|file| file.size)) {
        let reason = format!(
            "the config files have {total} bytes together, more than {LARGEST}; use --format docker"
        );
        return Err(PackError::File {
            path: largest.source.clone(),
            reason,
        });
    }
    let mut builder = tar::Builder::new(Vec::new());
    for file in files {
        let content = fs::read(&file.source).map_err(PackError::io("read", &file.source))?;
        if content.len() as u64 != file.size {
            return Err(PackError::Changed {
                path: file.source.clone(),
            });
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(file.size);
        header.set_mode(0o644);
        header.set_mtime(0);
        let added = builder.append_data(&mut header, &file.path, content.as_slice());
        added.map_err(PackError::io("archive", &file.source))?;
    }
    let bytes = builder
        .into_inner()
        .expect("writing to memory does not fail");
    Ok(Bytes::from(bytes))
}
