//! Packaging: a model directory becomes an artifact, in the formats that other tools read.
//!
//! [`pack`] scans a directory, hashes its files and returns a [`Package`]: the manifest and where each
//! blob's bytes are. Nothing is copied; [`layout::write`] or a registry upload then reads the files once more.
//!
//! The result depends on file names and contents alone (and on [`Options::created`], where it is given): not on
//! times, owners, modes or the order of directory entries. The same directory has the same digest everywhere.

mod card;
mod classify;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod gguf;
pub mod layout;
mod manifest;
mod scan;
mod tarball;
mod time;
mod weights;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;

use crate::base::{Digest, Hasher};
use classify::Kind;
use scan::SourceFile;
pub use time::Timestamp;

/// Files hashed at the same time: hashing outruns most disks with two.
const HASHERS: usize = 2;
/// Bytes read at a time while hashing and copying.
const PIECE: usize = 1 << 20;

/// The packaging convention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Format {
    /// Docker's current one (model config v0.2): each file a raw layer, named by annotation, folders kept.
    #[default]
    Docker,
    /// Docker's former one (model config v0.1): raw safetensors and GGUF layers, all else in one
    /// `vllm.config.tar`. Files of the top folder only.
    DockerV01,
    /// CNCF ModelPack with raw layers.
    ModelPack,
}

/// How to package.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The packaging convention.
    pub format: Format,
    /// The creation time to write into the artifact; `None` writes none.
    pub created: Option<Timestamp>,
    /// With [`Format::DockerV01`]: write no names on the layers, as the packagers before November 2025 did.
    pub nameless: bool,
}

/// Where a blob's bytes are.
#[derive(Clone, Debug)]
pub enum Source {
    /// In this file, from its first byte to its last.
    File(PathBuf),
    /// In memory.
    Memory(Bytes),
}

/// One blob of a package.
#[derive(Clone, Debug)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
    /// What people call it: the file's path, or what it is.
    pub name: String,
    /// Where its bytes are.
    pub source: Source,
    annotations: Vec<(&'static str, String)>,
}

/// An artifact that is ready to be written or uploaded: blobs first, the manifest last.
#[derive(Clone, Debug)]
pub struct Package {
    /// The manifest, byte for byte.
    pub manifest: Bytes,
    /// The manifest's digest: the artifact's.
    pub digest: Digest,
    /// The manifest's `artifactType`, where the format has one.
    pub artifact_type: Option<&'static str>,
    /// The config.
    pub config: Blob,
    /// The layers in the manifest's order. Two may have one digest.
    pub layers: Vec<Blob>,
    /// What was left out and why, for people.
    pub notes: Vec<String>,
}

/// The media type of every manifest that is written.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

impl Package {
    /// Every blob once: the layers in order, then the config.
    pub fn blobs(&self) -> Vec<&Blob> {
        let mut seen = std::collections::HashSet::new();
        self.layers
            .iter()
            .chain([&self.config])
            .filter(|blob| seen.insert(blob.digest))
            .collect()
    }

    /// The sum of the sizes of [`Self::blobs`].
    pub fn size(&self) -> u64 {
        self.blobs().iter().map(|blob| blob.size).sum()
    }
}

/// Why a directory cannot be packaged.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The file system says no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// A symbolic link leads out of the directory, or nowhere.
    #[error("{}: the link leads out of the directory; copy the file in, or package what it is in", path.display())]
    Link {
        /// The link.
        path: PathBuf,
    },
    /// A file cannot be part of a model.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// There is no weight file in the directory.
    #[error("{}: no model: it holds no .safetensors, .gguf, .dduf, .bin or .pt file", path.display())]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// A file is not what it was when it was hashed.
    #[error("{}: changed while it was packaged; try again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A name that a layout cannot hold.
    #[error("`{name}` cannot name an artifact in a layout")]
    Name {
        /// The name.
        name: String,
    },
    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,
}

impl PackError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// Told how many more bytes were hashed or copied; `false` asks to stop.
pub type Progress<'a> = &'a (dyn Fn(u64) -> bool + Sync);

/// The number of bytes that [`pack`] will hash in `dir`, for a progress bar.
///
/// # Errors
/// As [`pack`] for what a scan can tell.
pub fn measure(dir: &Path) -> Result<u64, PackError> {
    Ok(scan::scan(dir)?.0.iter().map(|file| file.size).sum())
}

/// Packages the model in `dir`. Blocks on the disk.
///
/// Hidden files are left out. A symbolic link is followed when it stays inside `dir`.
///
/// # Errors
/// When `dir` holds no weights, a link leads out of it, a file cannot be read or changes meanwhile.
pub fn pack(dir: &Path, options: &Options, progress: Progress<'_>) -> Result<Package, PackError> {
    let (files, mut notes) = scan::scan(dir)?;
    let is_weight = |file: &SourceFile| classify::kind(&file.path) == Kind::Weight;
    if !files.iter().any(is_weight) {
        return Err(PackError::NoWeights {
            path: dir.to_owned(),
        });
    }
    let facts = weights::facts(dir, &files, &mut notes)?;
    let layers = match options.format {
        Format::Docker | Format::ModelPack => {
            let digests = hash_all(&files, progress)?;
            let pairs = files.iter().zip(digests);
            pairs
                .map(|(file, digest)| manifest::file_layer(file, digest, options))
                .collect()
        }
        Format::DockerV01 => docker_v01(&files, options, &mut notes, progress)?,
    };
    Ok(manifest::package(layers, &facts, options, notes))
}

fn docker_v01(
    files: &[SourceFile],
    options: &Options,
    notes: &mut Vec<String>,
    progress: Progress<'_>,
) -> Result<Vec<Blob>, PackError> {
    let (mut layered, mut archived) = (Vec::new(), Vec::new());
    for file in files {
        match classify::docker_v01(&file.path) {
            classify::Place::Layer => layered.push(file.clone()),
            classify::Place::Archive => archived.push(file.clone()),
            classify::Place::Nowhere => {
                notes.push(format!(
                    "{}: left out, this format has no place for it",
                    file.path
                ));
            }
        }
    }
    if layered.is_empty() {
        let path = files
            .first()
            .map(|file| file.source.clone())
            .unwrap_or_default();
        let reason = "no .safetensors or .gguf file in the top folder, which this format needs";
        return Err(PackError::File {
            path,
            reason: reason.to_owned(),
        });
    }
    let digests = hash_all(&layered, progress)?;
    let pairs = layered.iter().zip(digests);
    let mut layers: Vec<Blob> = pairs
        .map(|(file, digest)| manifest::file_layer(file, digest, options))
        .collect();
    if !archived.is_empty() {
        layers.push(manifest::archive_layer(tarball::build(&archived)?));
        progress(archived.iter().map(|file| file.size).sum());
    }
    Ok(layers)
}

/// The digests of files, in their order, computed by a few threads.
fn hash_all(files: &[SourceFile], progress: Progress<'_>) -> Result<Vec<Digest>, PackError> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let results: Vec<Mutex<Option<Result<Digest, PackError>>>> =
        files.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..HASHERS.min(files.len()) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(file) = files.get(at) else { break };
                    let result = hash(file, progress);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    *results[at]
                        .lock()
                        .unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(result);
                }
            });
        }
    });
    let done = results.into_iter().map(|slot| {
        slot.into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    });
    let (good, mut bad): (Vec<_>, Vec<_>) = done.flatten().partition(Result::is_ok);
    match bad.pop() {
        Some(Err(error)) => Err(error),
        _ => good.into_iter().collect(),
    }
}

fn hash(file: &SourceFile, progress: Progress<'_>) -> Result<Digest, PackError> {
    let mut hasher = Hasher::new();
    let size = read_pieces(&file.source, |piece| {
        hasher.update(piece);
        match progress(piece.len() as u64) {
            true => Ok(()),
            false => Err(PackError::Stopped),
        }
    })?;
    if size != file.size {
        return Err(PackError::Changed {
            path: file.source.clone(),
        });
    }
    Ok(hasher.finish())
}

/// Reads a file from its start to its end; returns the number of bytes.
fn read_pieces(
    path: &Path,
    mut each: impl FnMut(&[u8]) -> Result<(), PackError>,
) -> Result<u64, PackError> {
    use std::io::Read;
    let mut file = std::fs::File::open(path).map_err(PackError::io("open", path))?;
    let mut buffer = vec![0; PIECE];
    let mut size = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(size),
            Ok(count) => {
                size += count as u64;
                each(&buffer[..count])?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(PackError::io("read", path)(error)),
        }
    }
}

#[cfg(test)]
mod tests;
