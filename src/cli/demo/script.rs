//! The steps of the demonstration and what it tells about them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::super::interrupt::{Interrupted, Stop};
use super::super::output::line;
use super::model;
use super::mounted::Mounted;
use super::scene::Scene;
use crate::base::{ByteSize, Digest, Hasher};
use crate::pack::{self, Options, Package};
use crate::serve::{Server, Stats};

/// The reference below the server's address.
const NAME: &str = "demo/llama:v1";
/// Files read at the same time, as engines do.
const READERS: usize = 4;
/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// Plays it; returns when everything is taken down.
pub(super) fn play(size: u64, stop: &Stop, runtime: &Handle) -> Result<()> {
    let scene = Scene::set(size)?;
    line(format_args!(
        "All of this happens on this machine alone, in {}.\n",
        scene.path().display()
    ))?;
    let (source, package, sample) = prepare(&scene, size, stop)?;
    let registry = Registry::start(runtime, &scene, &package, stop)?;
    let outcome = show(&scene, &registry, &source, &package, &sample, stop);
    registry.stop(runtime);
    // After the first failure the rest is taken down silently.
    outcome?;
    scene
        .strike()
        .context("cannot remove the temporary directory")?;
    line("\nunmounted, stopped and removed: nothing is left. Now with a model of yours:\n")?;
    line("    ocifs mount /models")?;
    line("    ls /models/docker.io/ai/smollm2:latest")?;
    Ok(())
}

/// Makes the model and packages it.
fn prepare(scene: &Scene, size: u64, stop: &Stop) -> Result<(PathBuf, Package, String)> {
    let source = scene.folder("source")?;
    let start = Instant::now();
    let made =
        model::make(&source, size, &|| stop.going()).or_else(|error| match stop.going() {
            true => Err(error).context("cannot write the model"),
            false => Err(Interrupted.into()),
        })?;
    let what = format!(
        "a Llama of {} layers, {} million random weights, {}",
        made.layers,
        made.parameters / 1_000_000,
        ByteSize(made.weight_bytes)
    );
    step("made", &what, start.elapsed())?;

    let start = Instant::now();
    let package = pack::pack(&source, &Options::default(), &|_| stop.going())?;
    let what = format!(
        "{} layers, {}…",
        package.layers.len(),
        &package.digest.to_string()[..19]
    );
    step("packaged", &what, start.elapsed())?;
    Ok((source, package, made.sample))
}

/// A running registry over a layout that holds the package.
struct Registry {
    host: String,
    stats: Stats,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Registry {
    fn start(runtime: &Handle, scene: &Scene, package: &Package, stop: &Stop) -> Result<Self> {
        let start = Instant::now();
        let layout = scene.path().join("registry");
        pack::layout::write(package, &layout, NAME, &|_| stop.going())?;
        let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let server = runtime
            .block_on(Server::bind(&layout, any))
            .context("cannot serve on the loopback address")?;
        let (host, stats) = (server.addr().to_string(), server.stats());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = runtime.spawn(server.run(async {
            let _ = stopped.await;
        }));
        step(
            "served",
            &format!("as {host}/{NAME}, by `ocifs serve`"),
            start.elapsed(),
        )?;
        Ok(Self {
            host,
            stats,
            stop,
            task,
        })
    }

    fn stop(self, runtime: &Handle) {
        let _ = self.stop.send(());
        let _ = runtime.block_on(self.task);
    }
}

/// Mounts, reads and verifies.
fn show(
    scene: &Scene,
    registry: &Registry,
    source: &Path,
    package: &Package,
    sample: &str,
    stop: &Stop,
) -> Result<()> {
    let (point, cache) = (scene.path().join("models"), scene.path().join("cache"));
    let model = point.join(&registry.host).join(NAME);
    let weights: u64 = package.layers.iter().map(|layer| layer.size).sum();

    let start = Instant::now();
    let mounted = Mounted::start(scene.path(), &point, &cache, "none")?;
    step(
        "mounted",
        "by `ocifs mount`: nothing is configured, nothing is pulled",
        start.elapsed(),
    )?;
    let start = Instant::now();
    let tree = tree(&model)?;
    line(format_args!("\n$ ls -l {}", model.display()))?;
    for (path, size) in &tree {
        line(format_args!("{:>12}  {path}", ByteSize(*size)))?;
    }
    line("")?;
    let sent = registry.stats.total().bytes;
    step(
        "listed",
        &format!(
            "{} files; the server sent {} so far",
            tree.len(),
            ByteSize(sent)
        ),
        start.elapsed(),
    )?;

    let start = Instant::now();
    let before = registry.stats.total().bytes;
    let tensor = read_tensor(&model, sample)?;
    let took = start.elapsed();
    ensure!(
        tensor == read_tensor(source, sample)?,
        "the tensor differs from its source"
    );
    let sent = registry.stats.total().bytes - before;
    step(
        "one tensor",
        &format!("{sample}, {}", ByteSize(tensor.len() as u64)),
        took,
    )?;
    let percent = sent as f64 * 100.0 / weights as f64;
    line(format_args!(
        "              the server sent {} for it, {percent:.1} % of the model; {} were not moved",
        ByteSize(sent),
        ByteSize(weights.saturating_sub(sent))
    ))?;
    mounted.stop()?;

    let mounted = Mounted::start(scene.path(), &point, &cache, "model")?;
    let total = read_all(&model, source, package, stop)?;
    step(
        "everything",
        &format!("{total}, each digest is that of the source"),
        total.took,
    )?;
    mounted.stop()?;

    // A new mount has nothing in memory: what it reads comes from the cache's files.
    let before = registry.stats.total().bytes;
    let mounted = Mounted::start(scene.path(), &point, &cache, "model")?;
    let total = read_all(&model, source, package, stop)?;
    let sent = ByteSize(registry.stats.total().bytes - before);
    step(
        "second start",
        &format!("{total}; the server sent {sent}"),
        total.took,
    )?;
    mounted.stop()
}

/// One line: what was done, how long it took.
fn step(what: &str, how: &str, took: Duration) -> Result<()> {
    let time = match took.as_millis() {
        millis @ 0..1000 => format!("{millis} ms"),
        _ => format!("{:.1} s", took.as_secs_f64()),
    };
    line(format_args!("{what:<13} {how:<82} {time:>7}"))?;
    Ok(())
}

/// Paths and sizes of the regular files below a directory, by ordinary listing; `.oci` is left out.
fn tree(dir: &Path) -> Result<BTreeMap<String, u64>> {
    let mut files = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?
        {
            let entry = entry?;
            let (path, meta) = (entry.path(), entry.metadata()?);
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            match meta.is_dir() {
                true => open.push(path),
                false => {
                    let relative = path.strip_prefix(dir).unwrap_or(&path);
                    files.insert(relative.display().to_string(), meta.len());
                }
            }
        }
    }
    Ok(files)
}

/// Reads one tensor as any loader does: the index tells the file, its header the place.
fn read_tensor(model: &Path, name: &str) -> Result<Vec<u8>> {
    let index: Value =
        serde_json::from_slice(&fs::read(model.join("model.safetensors.index.json"))?)?;
    let Some(shard) = index["weight_map"][name].as_str() else {
        bail!("the index has no {name}")
    };
    let file = File::open(model.join(shard))?;
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)?;
    let mut header = vec![0; usize::try_from(u64::from_le_bytes(length))?];
    file.read_exact_at(&mut header, 8)?;
    let entries: Value = serde_json::from_slice(&header)?;
    let offset = |at: usize| {
        entries[name]["data_offsets"][at]
            .as_u64()
            .context("the header lacks the tensor")
    };
    let (start, end) = (offset(0)?, offset(1)?);
    let mut tensor = vec![0; usize::try_from(end - start)?];
    file.read_exact_at(&mut tensor, 8 + header.len() as u64 + start)?;
    Ok(tensor)
}

/// What a reading of everything came to.
struct Total {
    bytes: u64,
    files: usize,
    took: Duration,
}

impl std::fmt::Display for Total {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = self.bytes as f64 / 1e6 / self.took.as_secs_f64().max(1e-6);
        write!(
            f,
            "{} files, {}, {rate:.0} MB/s",
            self.files,
            ByteSize(self.bytes)
        )
    }
}

/// Reads every file, several at once, and compares its digest with the source's.
fn read_all(model: &Path, source: &Path, package: &Package, stop: &Stop) -> Result<Total> {
    let shown = tree(model)?;
    ensure!(
        shown == tree(source)?,
        "the mount shows other files than the source has"
    );
    let wanted: BTreeMap<&str, Digest> = package
        .layers
        .iter()
        .map(|layer| (layer.name.as_str(), layer.digest))
        .collect();
    let queue: Mutex<Vec<&String>> = Mutex::new(shown.keys().rev().collect());
    let start = Instant::now();
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let read = || -> Result<()> {
            loop {
                let next = queue
                    .lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner())
                    .pop();
                let Some(path) = next else { return Ok(()) };
                let digest = digest(&model.join(path), stop)?;
                ensure!(
                    wanted.get(path.as_str()) == Some(&digest),
                    "{path}: digest {digest} is not the source's"
                );
            }
        };
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
        let join = |reader: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            reader.join().unwrap_or_else(|_| bail!("a reader failed"))
        };
        readers.into_iter().map(join).collect()
    });
    results.into_iter().collect::<Result<Vec<()>>>()?;
    Ok(Total {
        bytes: shown.values().sum(),
        files: shown.len(),
        took: start.elapsed(),
    })
}

fn digest(path: &Path, stop: &Stop) -> Result<Digest> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let (mut hasher, mut buffer) = (Hasher::new(), vec![0; PIECE]);
    loop {
        if !stop.going() {
            return Err(Interrupted.into());
        }
        match file
            .read(&mut buffer)
            .with_context(|| format!("cannot read {}", path.display()))?
        {
            0 => return Ok(hasher.finish()),
            count => hasher.update(&buffer[..count]),
        }
    }
}
