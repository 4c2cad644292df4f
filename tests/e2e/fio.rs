//! fio reads through the mount what fio wrote to a disk, and checks every block of it: all its ways to read, cold and sealed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::mount::Mount;
use crate::support::process::{Output, run_command};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scale, scratch};

/// The ways in which fio 3.33 can read a file.
const ENGINES: [&str; 8] = [
    "psync", "sync", "pvsync2", "mmap", "libaio", "io_uring", "splice", "posixaio",
];
const BLOCK: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(180);

fn size() -> u64 {
    scale(8 << 20, 256 << 20)
}

/// fio's job file for one file: each block carries its offset and a CRC-32C of its content.
fn fio(file: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("fio");
    command
        .args(["--name=v", "--thread", "--output-format=terse"])
        // A colon would begin another name.
        .arg(format!(
            "--filename={}",
            file.display().to_string().replace(':', "\\:")
        ))
        .arg(format!("--bs={BLOCK}"))
        .arg(format!("--size={}", size()))
        .args(["--verify=crc32c", "--verify_fatal=1"])
        .args(args)
        // It leaves state files where it runs.
        .current_dir(std::env::temp_dir());
    run_command(&mut command, LIMIT)
}

fn written(dir: &Path) -> PathBuf {
    let file = dir.join("data");
    fio(&file, &["--rw=write", "--do_verify=0", "--ioengine=psync"]).ok();
    assert_eq!(fs::metadata(&file).unwrap().len(), size());
    file
}

struct Bench {
    registry: Registry,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = scratch("fio");
        let registry = Registry::open();
        let right = written(dir.path());
        publish(&registry, &right, "org/right:v1");
        // One bit of one block, in the part that the checksum is of.
        let wrong = dir.path().join("wrong");
        fs::copy(&right, &wrong).unwrap();
        let file = File::options().read(true).write(true).open(&wrong).unwrap();
        let at = size() / 2 + 5000;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        publish(&registry, &wrong, "org/wrong:v1");
        Self {
            registry,
            _dir: dir,
        }
    }

    fn below(&self, name: &str) -> String {
        format!("{}/org/{name}:v1/data", self.registry.host())
    }
}

fn publish(registry: &Registry, file: &Path, name: &str) {
    Artifact::docker_v02()
        .layer(Layer::file(DOCKER_SAFETENSORS, file).at("data"))
        .publish(registry, name);
}

const BOTH: [&str; 2] = ["--rw=read", "--rw=randread"];

/// Reads all of it in one way, in these orders; fio ends well only if each block is right.
fn verify(file: &Path, engine: &str, orders: &[&str], more: &[&str]) {
    let engine_arg = format!("--ioengine={engine}");
    for order in orders {
        let mut args = vec!["--readonly", *order, &engine_arg];
        args.extend(more);
        let output = fio(file, &args);
        assert!(
            output.status.success(),
            "{engine} {order} {more:?}: {output}"
        );
        // Terse output: the fifth field is the error, the sixth what was read in KiB, by each job.
        let text = output.ok();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with("3;"))
            .map(|line| line.split(';').collect())
            .collect();
        assert!(!lines.is_empty(), "{text}");
        for fields in lines {
            let read: u64 = fields[5].parse().unwrap();
            assert!(fields[4] == "0" && read * 1024 >= size(), "{text}");
        }
    }
}

fn is_sealed(mount: &Mount, below: &str) -> bool {
    mount.xattr(below, "user.ocifs.verified").as_deref() == Some("true")
}

#[test]
fn fio_finds_every_block_right_in_all_its_ways_to_read() {
    let bench = Bench::new();
    let below = bench.below("right");
    for engine in ENGINES {
        // Cold: nothing is here, and nothing comes but what is read.
        let cache = scratch("cache");
        let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
        verify(&mount.path(&below), engine, &BOTH, &[]);
        eventually(PATIENCE, "the file is verified", || {
            is_sealed(&mount, &below).then_some(())
        });
        mount.unmount();
        // Sealed, read by the kernel itself, and by way of the daemon.
        for (passthrough, order) in [
            ("passthrough=true", "--rw=randread"),
            ("passthrough=false", "--rw=read"),
        ] {
            let mount = Mount::start(cache.path(), ["--offline", "-o", passthrough]);
            let served = mount.xattr(&below, "user.ocifs.served");
            assert_eq!(
                served.as_deref() == Some("passthrough"),
                passthrough.ends_with("true"),
                "{served:?}"
            );
            verify(&mount.path(&below), engine, scale(&[order], &BOTH), &[]);
            mount.unmount();
        }
    }
}

#[test]
fn fio_finds_every_block_right_by_direct_reads_and_by_many_jobs() {
    let bench = Bench::new();
    let below = bench.below("right");
    let ways: [&[&str]; 3] = [
        &["--direct=1"],
        &["--direct=1", "--iodepth=16", "--numjobs=4"],
        &["--numjobs=4", "--iodepth=8"],
    ];
    for (way, engine) in ways.into_iter().zip(["psync", "libaio", "io_uring"]) {
        let cache = scratch("cache");
        let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
        verify(&mount.path(&below), engine, &BOTH, way);
        eventually(PATIENCE, "the file is verified", || {
            is_sealed(&mount, &below).then_some(())
        });
        verify(&mount.path(&below), engine, &BOTH, way);
        mount.unmount();
        let mount = Mount::start(cache.path(), ["--offline", "-o", "passthrough=false"]);
        verify(&mount.path(&below), engine, &BOTH, way);
        mount.unmount();
    }
}

/// That the tests above see a wrong byte: one bit is another, and the file is none the less what its digest says.
#[test]
fn fio_finds_the_one_bit_that_is_wrong() {
    let bench = Bench::new();
    let cache = scratch("cache");
    let mount = Mount::start::<&str>(cache.path(), []);
    for engine in ENGINES {
        let file = mount.path(&bench.below("wrong"));
        let engine_arg = format!("--ioengine={engine}");
        let output = fio(&file, &["--readonly", "--rw=read", &engine_arg]);
        let said = output.failed();
        assert!(said.contains("verify"), "{engine}: {said}");
    }
    mount.unmount();
}
