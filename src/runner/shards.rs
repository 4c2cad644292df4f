//! Which files hold a model's tensors, and where in them each lies. Reads headers only.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::{Error, Result};
use super::header::{self, Entry};

/// One open weight file.
#[derive(Debug)]
pub struct Shard {
    /// Where it is.
    pub path: PathBuf,
    /// The open file; its header has been checked against its length.
    pub file: File,
    /// Its tensors, in the order of their bytes.
    pub entries: Vec<Entry>,
}

/// The weight files of a model.
#[derive(Debug)]
pub struct Shards {
    /// In the order of their names.
    pub files: Vec<Shard>,
    places: HashMap<String, (usize, usize)>,
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

impl Shards {
    /// Opens the weight files of the model in `dir` and checks every header; no tensor is read.
    ///
    /// # Errors
    /// When there is none, one cannot be read, a header lies, or the index and the files disagree.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = dir.join(INDEX);
        let (names, wanted) = match std::fs::read(&index) {
            Ok(text) => names_of(&text, &index)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                (alone(dir)?, BTreeMap::new())
            }
            Err(error) => return Err(Error::io(&index, error)),
        };
        // A header is a round trip on a lazy mount: all at once, however many shards there are.
        let opened: Vec<Result<Shard>> = std::thread::scope(|scope| {
            let threads: Vec<_> = names
                .iter()
                .map(|name| scope.spawn(move || open_shard(dir.join(name))))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        });
        let files = opened.into_iter().collect::<Result<Vec<Shard>>>()?;
        let mut places = HashMap::new();
        for (number, shard) in files.iter().enumerate() {
            for (at, entry) in shard.entries.iter().enumerate() {
                if places.insert(entry.name.clone(), (number, at)).is_some() {
                    return Err(Error::malformed(
                        &shard.path,
                        format!("tensor `{}` is in another file too", entry.name),
                    ));
                }
            }
        }
        for (tensor, name) in &wanted {
            if places
                .get(tensor)
                .is_none_or(|(number, _)| names[*number] != *name)
            {
                return Err(Error::malformed(
                    &index,
                    format!("tensor `{tensor}` is not in {name}"),
                ));
            }
        }
        Ok(Self { files, places })
    }

    /// Where a tensor is: the number of its file, and its entry there.
    pub fn get(&self, name: &str) -> Option<(usize, &Entry)> {
        let (number, at) = *self.places.get(name)?;
        Some((number, &self.files[number].entries[at]))
    }

    /// All tensors' names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }
}

/// The weight file of a model without an index.
fn alone(dir: &Path) -> Result<Vec<String>> {
    if dir.join(SINGLE).exists() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|error| Error::io(dir, error))? {
        let name = entry.map_err(|error| Error::io(dir, error))?.file_name();
        if let Some(name) = name.to_str().filter(|name| name.ends_with(".safetensors")) {
            names.push(name.to_owned());
        }
    }
    match names.len() {
        1 => Ok(names),
        0 => Err(Error::malformed(dir, "there is no safetensors file here")),
        _ => Err(Error::malformed(
            dir,
            format!("there are several safetensors files, and no {INDEX}"),
        )),
    }
}

fn names_of(text: &[u8], path: &Path) -> Result<(Vec<String>, BTreeMap<String, String>)> {
    let value: Value =
        serde_json::from_slice(text).map_err(|error| Error::malformed(path, error.to_string()))?;
    let Some(map) = value
        .get("weight_map")
        .and_then(Value::as_object)
        .filter(|map| !map.is_empty())
    else {
        return Err(Error::malformed(path, "it has no `weight_map`"));
    };
    let mut wanted = BTreeMap::new();
    let mut names = Vec::new();
    for (tensor, name) in map {
        // A name is one of a file beside the index: an index is no way to read other files of the machine.
        let Some(name) = name.as_str().filter(|name| {
            !name.is_empty() && !name.contains('/') && *name != ".." && *name != "."
        }) else {
            return Err(Error::malformed(
                path,
                format!("the file of tensor `{tensor}` has no usable name"),
            ));
        };
        wanted.insert(tensor.clone(), name.to_owned());
        names.push(name.to_owned());
    }
    names.sort();
    names.dedup();
    if names.len() > 4096 {
        return Err(Error::malformed(path, "it names more than 4096 files"));
    }
    Ok((names, wanted))
}

fn open_shard(path: PathBuf) -> Result<Shard> {
    let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
    let size = file
        .metadata()
        .map_err(|error| Error::io(&path, error))?
        .len();
    if size < header::PREFIX {
        return Err(Error::malformed(
            &path,
            format!("not a safetensors file: {size} bytes"),
        ));
    }
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0)
        .map_err(|error| Error::io(&path, error))?;
    let length = header::length(prefix, size).map_err(|reason| Error::malformed(&path, reason))?;
    let mut text = vec![0; length];
    file.read_exact_at(&mut text, header::PREFIX)
        .map_err(|error| Error::io(&path, error))?;
    let entries = header::parse(&text, size).map_err(|reason| Error::malformed(&path, reason))?;
    Ok(Shard {
        path,
        file,
        entries,
    })
}
