//! Readers, peers, and the table.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::servers::{Place, Server, run};

const PATIENCE: Duration = Duration::from_secs(120);

/// Reads a file from front to back, 1 MiB at a time.
pub(crate) fn sequential(file: &File) -> u64 {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let count = file.read_at(&mut buffer, at).unwrap();
        if count == 0 {
            return at;
        }
        at += count as u64;
    }
}

/// The first MiB, as an engine reads a header.
pub(crate) fn header(file: &File) -> u64 {
    let mut buffer = vec![0; 1 << 20];
    file.read_exact_at(&mut buffer, 0).unwrap();
    buffer.len() as u64
}

/// Maps a file and copies it out from front to back, as loaders do.
pub(crate) fn mapped(file: &File) -> u64 {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    let size = usize::try_from(file.metadata().unwrap().len()).unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that nobody writes.
    let start = unsafe {
        mmap(
            std::ptr::null_mut(),
            size,
            ProtFlags::READ,
            MapFlags::PRIVATE,
            file,
            0,
        )
    }
    .unwrap();
    // SAFETY: the mapping is `size` bytes long, readable and not written by anybody until it is removed below.
    let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), size) };
    let mut buffer = vec![0; 1 << 20];
    for piece in bytes.chunks(1 << 20) {
        buffer[..piece.len()].copy_from_slice(piece);
        std::hint::black_box(&buffer);
    }
    // SAFETY: the mapping made above; `bytes` is not used any more.
    unsafe { munmap(start, size) }.unwrap();
    size as u64
}

/// Reads `count` pieces of `length` bytes at places that are the same in each run.
pub(crate) fn random(file: &File, length: usize, count: u64) -> u64 {
    let size = file.metadata().unwrap().size();
    let mut buffer = vec![0; length];
    let mut state = 88_172_645_463_325_252_u64;
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.read_exact_at(&mut buffer, state % (size - length as u64))
            .unwrap();
    }
    count * length as u64
}

/// Seconds that `parts` curls take for the file, each a range to a file of its own.
pub(crate) fn curl(server: &Server, dir: &Path, parts: u64) -> f64 {
    let url = server.url();
    let start = Instant::now();
    let children: Vec<Child> = (0..parts)
        .map(|part| {
            let range = format!(
                "{}-{}",
                server.size * part / parts,
                server.size * (part + 1) / parts - 1
            );
            let out = dir.join(format!("curl{part}"));
            let mut command = Command::new("curl");
            command.args(["-sf", "-r", &range, "-o"]).arg(out).arg(&url);
            command.spawn().expect("curl is installed")
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let seconds = start.elapsed().as_secs_f64();
    for part in 0..parts {
        fs::remove_file(dir.join(format!("curl{part}"))).unwrap();
    }
    seconds
}

/// Seconds that the download loop of engines' own loaders takes: one stream, pieces of 8 KiB, to a file.
pub(crate) fn old_loader(server: &Server, dir: &Path) -> Option<f64> {
    const LOOP: &str = "import requests, sys
with requests.get(sys.argv[1], stream=True) as response, open(sys.argv[2], 'wb') as out:
    for piece in response.iter_content(chunk_size=8192):
        out.write(piece)
";
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    let python = home.join(".cache/ocifs-tests/venv/bin/python3");
    if !python.exists() {
        eprintln!("the old loader is left out: tests/setup.sh installs what it needs");
        return None;
    }
    let out = dir.join("loader");
    let start = Instant::now();
    run(Command::new(python)
        .args(["-c", LOOP, &server.url()])
        .arg(&out));
    let seconds = start.elapsed().as_secs_f64();
    fs::remove_file(out).unwrap();
    Some(seconds)
}

/// A mount of the server.
pub(crate) struct Mount {
    daemon: Child,
    point: PathBuf,
    address: String,
}

impl Mount {
    pub(crate) fn start(server: &Server, cache: &Path, flags: &[&str]) -> Self {
        let point = cache.with_file_name("models");
        fs::create_dir_all(&point).unwrap();
        let outside = fs::metadata(&point).unwrap().dev();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs"));
        command
            .args([
                "mount",
                "--foreground",
                "--plain-http",
                &server.address,
                "--cache-dir",
            ])
            .arg(cache);
        let daemon = command
            .args(flags)
            .arg(&point)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while fs::metadata(&point).unwrap().dev() == outside {
            assert!(start.elapsed() < PATIENCE, "the mount does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mount = Self {
            daemon,
            point,
            address: server.address.clone(),
        };
        assert!(mount.file().exists(), "the model is not shown");
        mount
    }

    /// The weight file.
    pub(crate) fn file(&self) -> PathBuf {
        self.point
            .join(format!("{}/bench/m:v1/model.safetensors", self.address))
    }

    pub(crate) fn wait_until_verified(&self) {
        let start = Instant::now();
        let mut value = [0; 16];
        loop {
            let length =
                rustix::fs::getxattr(self.file(), "user.ocifs.verified", &mut value[..]).unwrap();
            if &value[..length] == b"true" {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "never verified");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processor seconds of the daemon so far.
    pub(crate) fn processor(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.daemon.id())).unwrap();
        // Fields 14 and 15 of proc_pid_stat(5), in ticks of 1/100 s; the name before them may hold spaces.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
    }

    /// The daemon's peak resident memory that is not of files, in bytes, as far as the kernel tells: VmHWM less what is
    /// of files now.
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u64>()
                .unwrap()
                * 1024
        };
        field("VmHWM:").saturating_sub(field("RssFile:"))
    }

    pub(crate) fn stop(mut self) {
        run(Command::new(env!("CARGO_BIN_EXE_ocifs"))
            .arg("umount")
            .arg(&self.point));
        self.daemon.wait().unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // After a failure; a mount that was stopped is gone.
        if matches!(self.daemon.try_wait(), Ok(None)) {
            let _ = Command::new(env!("CARGO_BIN_EXE_ocifs"))
                .args(["umount", "--force"])
                .arg(&self.point)
                .status();
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
    }
}

/// What a figure is of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    unit: &'static str,
    place: Place,
    name: String,
}

impl Row {
    pub(crate) fn new(place: Place, name: &str, unit: &'static str) -> Self {
        Self {
            unit,
            place,
            name: name.to_owned(),
        }
    }
}

/// All figures.
#[derive(Debug, Default)]
pub(crate) struct Rows(BTreeMap<Row, Vec<f64>>);

impl Rows {
    pub(crate) fn add(&mut self, row: Row, figure: f64) {
        self.0.entry(row).or_default().push(figure);
    }

    /// Ratios first.
    pub(crate) fn print(&self) {
        for unit in ["ratio", "seconds", "core-s/GB", "MiB"] {
            println!("\n{unit:<78} median  (min – max)");
            for (row, figures) in self.0.iter().filter(|(row, _)| row.unit == unit) {
                let mut sorted = figures.clone();
                sorted.sort_by(f64::total_cmp);
                let place = match row.place {
                    Place::Loopback => "loopback",
                    Place::LimitedLink => "4 Gbit/s",
                };
                let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
                println!(
                    "{place:<10}{:<68}{:>6.2}  ({low:.2} – {high:.2})",
                    row.name,
                    sorted[sorted.len() / 2]
                );
            }
        }
    }
}
