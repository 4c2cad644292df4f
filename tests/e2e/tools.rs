//! Ordinary tools on the mount, and the mount as the system sees it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::support::model::{SampleModel, assert_same_files, read_tree};
use crate::support::mount::{Mount, detach, is_mounted, mount_type, ocifs, run_ocifs};
use crate::support::process::{run, run_command, wait};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch};

struct Site {
    mount: Mount,
    model: SampleModel,
    reference: String,
    _registry: Registry,
    _cache: TempDir,
}

fn site(seed: u64) -> Site {
    let registry = Registry::open();
    let model = SampleModel::new(seed);
    let reference = model.docker_v02().publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--cache-size", "1GiB"]);
    Site {
        mount,
        model,
        reference,
        _registry: registry,
        _cache: cache,
    }
}

impl Site {
    /// The model directory.
    fn directory(&self) -> String {
        self.mount
            .path(&self.reference)
            .to_str()
            .unwrap()
            .to_owned()
    }

    fn total(&self) -> u64 {
        self.model
            .files()
            .values()
            .map(|bytes| bytes.len() as u64)
            .sum()
    }
}

/// Detaches what is mounted there when dropped.
struct Detach<'a>(&'a Path);

impl Drop for Detach<'_> {
    fn drop(&mut self) {
        detach(self.0);
    }
}

#[test]
fn listings_show_every_file_with_its_size() {
    let site = site(21);
    let long = run("ls", ["-lR", &site.directory()]).ok();
    for (name, bytes) in site.model.files() {
        let base = name.rsplit('/').next().unwrap();
        let size = bytes.len().to_string();
        assert!(
            long.lines().any(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                words.first() == Some(&"-r--r--r--")
                    && words.get(4) == Some(&size.as_str())
                    && words.last() == Some(&base)
            }),
            "{name} in {long}"
        );
    }
    let found = run(
        "find",
        [
            &site.directory(),
            "-name",
            ".oci",
            "-prune",
            "-o",
            "-type",
            "f",
            "-printf",
            "%P %s\n",
        ],
    )
    .ok();
    let mut found: Vec<_> = found.lines().map(str::to_owned).collect();
    found.sort();
    let mut wanted: Vec<_> = site
        .model
        .files()
        .iter()
        .map(|(name, bytes)| format!("{name} {}", bytes.len()))
        .collect();
    wanted.sort();
    assert_eq!(found, wanted);
    // A crawl of the whole mount ends.
    run("find", [site.mount.root()]).ok();
}

#[test]
fn copies_and_archives_are_the_source() {
    let site = site(22);
    let target = scratch("copies");
    let copy = target.path().join("copy");
    run("cp", ["-r", &site.directory(), copy.to_str().unwrap()]).ok();
    assert_same_files(&read_tree(&copy), site.model.files());

    let archive = target.path().join("archive.tar");
    run(
        "tar",
        [
            "-C",
            &site.directory(),
            "--exclude=./.oci",
            "-cf",
            archive.to_str().unwrap(),
            ".",
        ],
    )
    .ok();
    let unpacked = target.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    run(
        "tar",
        [
            "-C",
            unpacked.to_str().unwrap(),
            "-xf",
            archive.to_str().unwrap(),
        ],
    )
    .ok();
    assert_same_files(&read_tree(&unpacked), site.model.files());

    run(
        "diff",
        [
            "-r",
            "--exclude=.oci",
            &site.directory(),
            site.model.path().to_str().unwrap(),
        ],
    )
    .ok();
}

#[test]
fn sums_and_rsync_find_no_difference() {
    let site = site(23);
    let sums = Command::new("sh")
        .args(["-c", "find . -type f | xargs sha256sum"])
        .current_dir(site.model.path())
        .output()
        .unwrap();
    let list = scratch("sums");
    fs::write(list.path().join("sums"), sums.stdout).unwrap();
    let mut check = Command::new("sha256sum");
    check
        .arg("-c")
        .arg("--quiet")
        .arg(list.path().join("sums"))
        .current_dir(site.directory());
    assert_eq!(run_command(&mut check, PATIENCE).ok(), "");

    let (source, mounted) = (
        format!("{}/", site.model.path().display()),
        format!("{}/", site.directory()),
    );
    let changes = run(
        "rsync",
        [
            "-anc",
            "--itemize-changes",
            "--no-times",
            "--no-perms",
            "--no-group",
            "--no-owner",
            "--exclude=.oci",
            &mounted,
            &source,
        ],
    )
    .ok();
    let differs = |line: &str| {
        [">f", "cd", "*del"]
            .iter()
            .any(|mark| line.starts_with(mark))
    };
    assert!(!changes.lines().any(differs), "{changes}");
    run(
        "rsync",
        ["-an", &mounted, &format!("{}/", list.path().display())],
    )
    .ok();
}

#[test]
fn du_tells_what_is_local_from_what_there_is() {
    let registry = Registry::open();
    let model = SampleModel::new(24);
    let reference = model.docker_v02().publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let shard = mount
        .path(&reference)
        .join("model-00003-of-00003.safetensors")
        .to_str()
        .unwrap()
        .to_owned();
    let number = |args: &[&str]| {
        run("du", args)
            .ok()
            .split_whitespace()
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let size = model.files()["model-00003-of-00003.safetensors"].len() as u64;
    assert_eq!(number(&["--apparent-size", "--block-size=1", &shard]), size);
    assert!((1..=8192).contains(&number(&["--block-size=1", &shard])));
    run("cat", [&shard]).ok_bytes();
    eventually(PATIENCE, "du sees the file", || {
        (number(&["--block-size=1", &shard]) >= size).then_some(())
    });
}

#[test]
fn df_shows_the_cache_and_the_type() {
    let site = site(25);
    let line = run(
        "df",
        [
            "-B1",
            "--output=fstype,size,avail",
            site.mount.root().to_str().unwrap(),
        ],
    )
    .ok();
    let words: Vec<_> = line.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(words[..2], ["fuse.ocifs", "1073741824"]);
    let free = |site: &Site| -> u64 {
        let line = run(
            "df",
            ["-B1", "--output=avail", site.mount.root().to_str().unwrap()],
        )
        .ok();
        line.lines().nth(1).unwrap().trim().parse().unwrap()
    };
    let before = free(&site);
    assert!((1..=1 << 30).contains(&before));
    assert_same_files(&site.mount.files(&site.reference), site.model.files());
    let total = site.total();
    eventually(PATIENCE, "df sees what was cached", || {
        (free(&site) + total * 9 / 10 <= before).then_some(())
    });
}

#[test]
fn extended_attributes_are_listed_for_getfattr() {
    let site = site(26);
    let file = format!("{}/config.json", site.directory());
    let shown = run("getfattr", ["-d", "-m", "-", "--absolute-names", &file]).ok();
    for name in [
        "user.oci.digest=\"sha256:",
        "user.oci.mediatype=",
        "user.ocifs.cached=",
        "user.ocifs.verified=",
    ] {
        assert!(shown.contains(name), "{name} in {shown}");
    }
}

#[test]
fn a_model_can_be_bind_mounted_by_its_name_without_a_colon() {
    let site = site(27);
    let (host, _) = site.reference.split_once('/').unwrap();
    let source = site.mount.path(&format!("{host}/org/m/@v1"));
    let target = scratch("bind");
    let point = target.path().join("m");
    fs::create_dir(&point).unwrap();
    run(
        "mount",
        ["--bind", source.to_str().unwrap(), point.to_str().unwrap()],
    )
    .ok();
    let _detach = Detach(&point);
    assert_same_files(&read_tree(&point), site.model.files());
}

#[test]
fn fuse_reads_by_every_road_are_the_same_bytes() {
    let site = site(28);
    let shard = format!("{}/model-00003-of-00003.safetensors", site.directory());
    let wanted =
        crate::support::content::digest(&site.model.files()["model-00003-of-00003.safetensors"]);
    for road in ["shared", "private"] {
        let printed = crate::support::python::python("mmap_digest.py", [&shard, road]).ok();
        assert_eq!(format!("sha256:{}", printed.trim()), wanted, "{road}");
    }
    for flags in [&["bs=4k"][..], &["bs=1M", "iflag=direct"], &["bs=12345"]] {
        let mut args = vec![format!("if={shard}"), "status=none".to_owned()];
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        assert_eq!(
            crate::support::content::digest(&run("dd", args).ok_bytes()),
            wanted,
            "{flags:?}"
        );
    }
}

/// A process whose working directory is in the mount; ended when dropped.
struct Sitter(Child);

impl Drop for Sitter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_mount_that_is_in_use_says_busy_and_goes_when_it_is_not() {
    let site = site(29);
    let mut sitter = Command::new("sleep");
    sitter
        .arg("600")
        .current_dir(site.directory())
        .stdin(Stdio::null());
    let sitter = Sitter(sitter.spawn().unwrap());
    let said = run_command(ocifs(["umount"]).arg(site.mount.root()), PATIENCE).failed();
    assert!(
        said.to_lowercase().contains("busy") || said.contains("in use"),
        "{said}"
    );
    assert!(is_mounted(site.mount.root()));
    assert!(site.mount.stat(&site.reference).is_dir(), "still works");
    drop(sitter);
    let Site { mount, .. } = site;
    mount.unmount();
}

#[test]
fn mount_returns_when_it_is_up_and_umount_ends_the_daemon() {
    let registry = Registry::open();
    let model = SampleModel::new(30);
    let reference = model.docker_v02().publish(&registry, "org/m:v1").reference;
    let (cache, dir) = (scratch("cache"), scratch("mount"));
    let point = dir.path().join("models");
    fs::create_dir(&point).unwrap();
    let _detach = Detach(&point);
    run_command(
        ocifs(["mount", "--cache-dir"])
            .arg(cache.path())
            .arg(&point),
        PATIENCE,
    )
    .ok();
    assert_eq!(mount_type(&point).as_deref(), Some("fuse.ocifs"));
    assert_same_files(&read_tree(&point.join(&reference)), model.files());

    let status = run_ocifs(["status", "--json"]).ok();
    let status: serde_json::Value = serde_json::from_str(&status).expect("--json prints JSON");
    assert!(
        status.to_string().contains(point.to_str().unwrap()),
        "{status}"
    );

    run_command(ocifs(["umount"]).arg(&point), PATIENCE).ok();
    assert!(!is_mounted(&point));
    // The daemon is nobody's child here: it is gone when nothing has the cache open.
    eventually(PATIENCE, "the daemon ends", || {
        (processes_with(cache.path()) == 0).then_some(())
    });
    let status = run_ocifs(["status", "--json"]).ok();
    assert!(!status.contains(point.to_str().unwrap()), "{status}");
}

/// Processes that have a file of this directory open.
fn processes_with(dir: &Path) -> usize {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter(|process| {
            process
                .file_name()
                .to_string_lossy()
                .bytes()
                .all(|byte| byte.is_ascii_digit())
        })
        .filter(|process| {
            let files = fs::read_dir(process.path().join("fd"))
                .into_iter()
                .flatten()
                .flatten();
            files
                .into_iter()
                .any(|file| fs::read_link(file.path()).is_ok_and(|target| target.starts_with(dir)))
        })
        .count()
}

#[test]
fn mistakes_on_the_command_line_are_explained() {
    let cache = scratch("cache");
    let cache = cache.path().to_str().unwrap();
    let cases: [(&[&str], &str); 6] = [
        (
            &[
                "mount",
                "--foreground",
                "--cache-dir",
                cache,
                "/nonexistent/ocifs/mount/point",
            ],
            "/nonexistent/ocifs/mount/point",
        ),
        (&["umount", "/usr"], "/usr"),
        (
            &["pull", "--cache-dir", cache, "not a reference"],
            "not a reference",
        ),
        (
            &["pull", "--cache-dir", cache, "127.0.0.1:1/org/m:v1"],
            "127.0.0.1:1",
        ),
        (
            &["push", "/nonexistent/model", "127.0.0.1:1/org/m:v1"],
            "/nonexistent/model",
        ),
        (&["mount", "--cache-size", "lots", "/tmp"], "lots"),
    ];
    for (args, wanted) in cases {
        let said = run_ocifs(args).failed();
        assert!(said.contains(wanted), "{args:?}: {said}");
    }
}

#[test]
fn a_daemon_that_is_told_to_end_takes_its_mount_down() {
    let registry = Registry::open();
    let reference = SampleModel::new(31)
        .docker_v02()
        .publish(&registry, "org/m:v1")
        .reference;
    let (cache, dir) = (scratch("cache"), scratch("mount"));
    let mut command = ocifs(["mount", "--foreground", "--cache-dir"]);
    command
        .arg(cache.path())
        .arg(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = Sitter(command.spawn().unwrap());
    let _detach = Detach(dir.path());
    eventually(PATIENCE, "the mount comes up", || {
        is_mounted(dir.path()).then_some(())
    });
    assert!(dir.path().join(reference).is_dir());
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child.0),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    let status = wait(&mut child.0, Duration::from_secs(20)).expect("the daemon ends on SIGTERM");
    assert!(status.success(), "{status}");
    assert!(!is_mounted(dir.path()));
}
