//! Sealed blobs are read by the kernel itself. The proof: the daemon is stopped and the bytes still come.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::mount::Mount;
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch, within};

const SIZE: u64 = (24 << 20) + 321;
const CONTENT: u64 = 4711;

fn published() -> (Registry, String) {
    let dir = scratch("weights");
    let file = dir.path().join("model.safetensors");
    Content::new(CONTENT).write(&file, SIZE);
    let registry = Registry::open();
    let layer = Layer::file(DOCKER_SAFETENSORS, &file).at("model.safetensors");
    Artifact::docker_v02()
        .layer(layer)
        .publish(&registry, "org/m:v1");
    let below = format!("{}/org/m:v1/model.safetensors", registry.host());
    (registry, below)
}

fn right(bytes: &[u8], offset: u64) -> bool {
    bytes == Content::new(CONTENT).bytes(offset, bytes.len())
}

fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn sealed(mount: &Mount, below: &str) {
    eventually(PATIENCE, "the file is verified", || {
        (mount.xattr(below, "user.ocifs.verified").as_deref() == Some("true")).then_some(())
    });
}

#[test]
fn a_sealed_file_is_read_while_the_daemon_is_stopped() {
    let (registry, below) = published();
    let cache = scratch("cache");
    let first = Mount::start(cache.path(), registry.ocifs_args());
    assert!(right(&first.read(&below), 0));
    sealed(&first, &below);
    first.unmount();
    // A new mount, so that the kernel has no page of it.
    let mount = Mount::start(cache.path(), registry.ocifs_args());
    let served = mount.xattr(&below, "user.ocifs.served");
    assert_eq!(served.as_deref(), Some("passthrough"));
    let files: Vec<_> = (0..3)
        .map(|_| File::open(mount.path(&below)).unwrap())
        .collect();
    let bytes = mount.while_stopped("read past the daemon", move || {
        files
            .iter()
            .map(|file| read(file, 0, SIZE as usize))
            .collect::<Vec<_>>()
    });
    assert!(bytes.iter().all(|bytes| right(bytes, 0)));
    mount.unmount();
}

#[test]
fn a_file_is_promoted_while_old_handles_and_mappings_live_on() {
    let (registry, below) = published();
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), registry.ocifs_args());
    let old = File::open(mount.path(&below)).unwrap();
    assert!(right(&read(&old, 5 << 20, 100_000), 5 << 20));
    let before = old.metadata().unwrap().ino();
    assert!(right(&mount.read(&below), 0));
    sealed(&mount, &below);
    // The kernel is told by a thread of its own; until then the name leads to the first node, which works as well.
    let new = eventually(PATIENCE, "the name leads to the second node", || {
        let file = File::open(mount.path(&below)).unwrap();
        (file.metadata().unwrap().ino() != before).then_some(file)
    });
    let (bytes, new) = mount.while_stopped("read past the daemon", move || {
        (read(&new, 0, SIZE as usize), new)
    });
    assert!(right(&bytes, 0));
    let path = mount.path(&below);
    within(PATIENCE, "read the old handle and open again", move || {
        assert!(right(&read(&old, SIZE - 70_000, 70_000), SIZE - 70_000));
        drop(old);
        let again = File::open(&path).unwrap();
        assert_eq!(
            again.metadata().unwrap().ino(),
            new.metadata().unwrap().ino()
        );
        assert!(right(&read(&again, 0, 100_000), 0));
        drop((new, again));
        assert!(right(&std::fs::read(&path).unwrap(), 0));
    });
    mount.unmount();
}

#[test]
fn without_passthrough_everything_is_read_through_the_daemon() {
    let (registry, below) = published();
    let cache = scratch("cache");
    let mount = Mount::start(
        cache.path(),
        registry
            .ocifs_args()
            .into_iter()
            .chain(["-o".to_owned(), "passthrough=no".to_owned()]),
    );
    assert!(right(&mount.read(&below), 0));
    sealed(&mount, &below);
    assert_eq!(
        mount.xattr(&below, "user.ocifs.served").as_deref(),
        Some("daemon")
    );
    assert!(right(&mount.read(&below), 0));
    mount.unmount();
}
