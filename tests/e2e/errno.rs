//! What system calls answer on a mount, against what the kernel's own squashfs answers when it is mounted read-only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::mount::{Mount, detach};
use crate::support::process::{run, run_command};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, python, scratch};

const SIZE: u64 = 300_000;
const CONTENT: u64 = 81;
const NOBODY: &str = "65534";

/// Rows that differ and are right so; the reason stands behind each. `*` at the end of a name stands for the rest of it.
const DIFFERENT: &[(&str, &str)] = &[
    (
        "a name of 256",
        "squashfs has names of 256 bytes; Linux and ext4 end at 255",
    ),
    (
        "create a long name",
        "as above: 255 bytes are the limit here",
    ),
    (
        "fsync *",
        "squashfs has no fsync; read-only ext4 says, as we do, that all is on disk",
    ),
    ("fdatasync *", "as fsync"),
    (
        "epoll *",
        "FUSE files can be polled, which the kernel decides",
    ),
    (
        "ioctl FIBMAP *",
        "FUSE answers it in the kernel: no block of a device",
    ),
    (
        "open data O_RDONLY|O_DIRECT",
        "direct reads work here, as on ext4",
    ),
    ("open file O_RDONLY|O_DIRECT", "as above"),
    ("read direct *", "as above"),
    ("setfl direct *", "as above"),
];

type Table = BTreeMap<String, Value>;

/// The table of a tree: `files` has `data`, `links` the rest.
fn table(files: &Path, links: &Path, user: Option<&str>) -> Table {
    let mut command = python::command("errno_table.py");
    command.arg(files).arg(links).args(user);
    let printed = run_command(&mut command, PATIENCE * 2).ok();
    serde_json::from_str(&printed).expect("a table in JSON")
}

/// A squashfs of the tree, mounted by the kernel.
struct Squash {
    point: PathBuf,
    _dir: tempfile::TempDir,
}

impl Squash {
    fn of(tree: &Path) -> Self {
        let dir = scratch("squash");
        let (image, point) = (dir.path().join("image"), dir.path().join("point"));
        fs::create_dir(&point).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let made = ["-quiet".to_owned(), "-no-progress".to_owned()];
        run(
            "mksquashfs",
            [text(tree), text(&image)].into_iter().chain(made),
        )
        .ok();
        run("mount", ["-o", "loop,ro", &text(&image), &text(&point)]).ok();
        Self { point, _dir: dir }
    }
}

impl Drop for Squash {
    fn drop(&mut self) {
        detach(&self.point);
    }
}

/// `files/data`, and in `links` a file, a link to it and a directory with a file.
fn tree() -> tempfile::TempDir {
    let dir = scratch("tree");
    let (files, links) = (dir.path().join("files"), dir.path().join("links"));
    fs::create_dir_all(links.join("dir")).unwrap();
    fs::create_dir(&files).unwrap();
    Content::new(CONTENT).write(&files.join("data"), SIZE);
    fs::write(links.join("file"), "hello world\n").unwrap();
    fs::write(links.join("dir/inner"), "in\n").unwrap();
    symlink("file", links.join("link")).unwrap();
    for file in ["files/data", "links/file", "links/dir/inner"] {
        fs::set_permissions(dir.path().join(file), fs::Permissions::from_mode(0o444)).unwrap();
    }
    for folder in ["links/dir", "links", "files", ""] {
        let folder = dir.path().join(folder);
        fs::set_permissions(folder, fs::Permissions::from_mode(0o555)).unwrap();
    }
    dir
}

fn tar_of(folder: &Path) -> Vec<u8> {
    let text = folder.to_str().unwrap();
    run(
        "tar",
        ["-C", text, "--owner=0", "--group=0", "-cf", "-", "."],
    )
    .ok_bytes()
}

fn is_listed(name: &str) -> bool {
    DIFFERENT
        .iter()
        .any(|(listed, _)| match listed.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == *listed,
        })
}

#[test]
fn every_system_call_answers_as_on_a_squashfs() {
    let tree = tree();
    let squash = Squash::of(tree.path());
    let registry = Registry::open();
    let (files, links) = (tree.path().join("files"), tree.path().join("links"));
    Artifact::docker_v02()
        .layer(Layer::file(DOCKER_SAFETENSORS, files.join("data")).at("data"))
        .publish(&registry, "org/files:v1");
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}});
    Artifact::new("application/vnd.oci.image.config.v1+json", &config)
        .layer(Layer::bytes(
            "application/vnd.oci.image.layer.v1.tar",
            tar_of(&links),
        ))
        .publish(&registry, "org/links:v1");
    let mut differences = BTreeSet::new();
    let mut used = BTreeSet::new();
    let mut rows = 0;
    for flags in [
        &["--allow-other"][..],
        &["--allow-other", "-o", "passthrough=false"],
    ] {
        let cache = scratch("cache");
        let mount = Mount::start(cache.path(), flags);
        let host = registry.host();
        let of = |name: &str| mount.path(&format!("{host}/org/{name}:v1"));
        // Not sealed yet, then sealed: the second is read by the kernel alone where that is to be had.
        for sealed in [false, true] {
            if sealed {
                let data = format!("{host}/org/files:v1/data");
                assert!(mount.read(&data) == Content::new(CONTENT).bytes(0, SIZE as usize));
                eventually(PATIENCE, "the file is verified", || {
                    let verified = mount.xattr(&data, "user.ocifs.verified");
                    (verified.as_deref() == Some("true")).then_some(())
                });
            }
            for user in [None, Some(NOBODY)] {
                let point = &squash.point;
                let expected = table(&point.join("files"), &point.join("links"), user);
                let found = table(&of("files"), &of("links"), user);
                assert!(
                    expected.len() > 350 && found.keys().eq(expected.keys()),
                    "{expected:?}"
                );
                rows += found.len();
                for (name, wanted) in &expected {
                    if found[name] == *wanted {
                        continue;
                    }
                    if is_listed(name) {
                        used.insert(name.clone());
                    } else {
                        let who = user.unwrap_or("root");
                        let found = &found[name];
                        differences.insert(format!(
                            "{name} ({who}, sealed: {sealed}, {flags:?}): {found}, on squashfs {wanted}"
                        ));
                    }
                }
            }
        }
        mount.unmount();
    }
    assert!(differences.is_empty(), "{rows} rows: {differences:#?}");
    for (listed, reason) in DIFFERENT {
        let start = listed.trim_end_matches('*');
        assert!(
            used.iter().any(|name| name.starts_with(start)),
            "{listed} no longer differs: {reason}"
        );
    }
    // What was tried left nothing behind.
    for path in ["/tmp/errno-table-moved", "/tmp/errno-table-link"] {
        assert!(!fs::exists(path).unwrap(), "{path}");
    }
}
