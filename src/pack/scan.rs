//! Which files of a directory belong to the model.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::PackError;

/// More files than any model has; a directory with more is not one.
const MOST_FILES: usize = 20_000;
/// The deepest nesting of folders that is followed.
const DEEPEST: usize = 16;

/// A file to package.
#[derive(Clone, Debug)]
pub(super) struct SourceFile {
    /// Relative to the directory, `/`-separated.
    pub(super) path: String,
    /// Where to read it.
    pub(super) source: PathBuf,
    /// Its size when it was found, in bytes.
    pub(super) size: u64,
}

/// The files below `dir`, in byte order of their paths, and notes on what was left out.
pub(super) fn scan(dir: &Path) -> Result<(Vec<SourceFile>, Vec<String>), PackError> {
    let root = fs::canonicalize(dir).map_err(PackError::io("open", dir))?;
    if !root.is_dir() {
        let reason = "not a directory; name the one that the model's files are in".to_owned();
        return Err(PackError::File {
            path: dir.to_owned(),
            reason,
        });
    }
    let mut scan = Scan {
        root: &root,
        files: Vec::new(),
        notes: Vec::new(),
    };
    scan.folder(&root, "", 0)?;
    scan.files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((scan.files, scan.notes))
}

struct Scan<'a> {
    root: &'a Path,
    files: Vec<SourceFile>,
    notes: Vec<String>,
}

impl Scan<'_> {
    fn folder(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<(), PackError> {
        if depth > DEEPEST {
            let reason = format!("folders are nested more than {DEEPEST} deep");
            return Err(PackError::File {
                path: folder.to_owned(),
                reason,
            });
        }
        for entry in fs::read_dir(folder).map_err(PackError::io("list", folder))? {
            let entry = entry.map_err(PackError::io("list", folder))?;
            let path = entry.path();
            let name = entry.file_name();
            if name.as_bytes().starts_with(b".") {
                self.notes.push(format!(
                    "{prefix}{}: left out, hidden",
                    name.to_string_lossy()
                ));
                continue;
            }
            let Some(name) = name
                .to_str()
                .filter(|name| !name.contains(char::is_control))
            else {
                let reason = "the name is not printable UTF-8".to_owned();
                return Err(PackError::File { path, reason });
            };
            self.entry(&path, &format!("{prefix}{name}"), depth)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, relative: &str, depth: usize) -> Result<(), PackError> {
        let mut source = path.to_owned();
        let mut meta = fs::symlink_metadata(path).map_err(PackError::io("look at", path))?;
        if meta.is_symlink() {
            let target = fs::canonicalize(path).map_err(|_| PackError::Link {
                path: path.to_owned(),
            })?;
            if !target.starts_with(self.root) {
                return Err(PackError::Link {
                    path: path.to_owned(),
                });
            }
            meta = fs::metadata(&target).map_err(PackError::io("look at", &target))?;
            if meta.is_dir() {
                // Following it could go round in circles, and its files are packaged where they are.
                self.notes
                    .push(format!("{relative}: left out, a link to a folder"));
                return Ok(());
            }
            source = target;
        }
        if meta.is_dir() {
            return self.folder(path, &format!("{relative}/"), depth + 1);
        }
        if !meta.is_file() {
            self.notes
                .push(format!("{relative}: left out, not a regular file"));
            return Ok(());
        }
        if self.files.len() == MOST_FILES {
            let reason = format!("holds more than {MOST_FILES} files; is it a model's directory?");
            return Err(PackError::File {
                path: self.root.to_owned(),
                reason,
            });
        }
        self.files.push(SourceFile {
            path: relative.to_owned(),
            source,
            size: meta.len(),
        });
        Ok(())
    }
}
