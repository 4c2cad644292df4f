//! Config tars made by an enemy: nothing outside the tree, and the rest of the model is there or the error is clear.

use std::fs;

use tempfile::TempDir;

use crate::support::artifact::{Artifact, DOCKER_CONFIG_TAR, DOCKER_SAFETENSORS, Layer, tar_entry};
use crate::support::model::{Files, read_tree};
use crate::support::mount::{Mount, run_ocifs};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, scale, scratch, within};

/// A mounted artifact of a weight file and this tar; its cache lies inside an otherwise empty directory.
struct Site {
    mount: Mount,
    reference: String,
    around: TempDir,
    registry: Registry,
}

fn site(mut archive: Vec<u8>) -> Site {
    archive.resize(archive.len() + 1024, 0);
    let registry = Registry::open();
    let artifact = Artifact::docker_v01()
        .layer(Layer::bytes(DOCKER_SAFETENSORS, "weights").at("model.safetensors"))
        .layer(Layer::bytes(DOCKER_CONFIG_TAR, archive));
    let reference = artifact.publish(&registry, "org/m:v1").reference;
    let around = scratch("around");
    let mount = Mount::start::<&str>(&around.path().join("a/b/cache"), []);
    Site {
        mount,
        reference,
        around,
        registry,
    }
}

fn file(archive: &mut Vec<u8>, name: &str, text: &str) {
    tar_entry(archive, name, b'0', "", text.len() as u64, text.as_bytes());
}

impl Site {
    /// Nothing was written beside the cache, and nothing in it has a name or kind of the enemy's choice.
    fn assert_contained(&self) {
        let mut folders = vec![self.around.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().to_string_lossy().into_owned();
                assert!(!name.contains("evil"), "{:?}", entry.path());
                let kind = entry.file_type().unwrap();
                assert!(
                    kind.is_dir() || kind.is_file(),
                    "{:?} is a {kind:?}",
                    entry.path()
                );
                if kind.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        for path in ["/evil.json", "/tmp/evil.json", "/etc/evil.json"] {
            assert!(!fs::exists(path).unwrap(), "{path}");
        }
    }

    /// The model's files, or `None` when it is refused as a whole; then `inspect` must say why.
    fn files(&self) -> Option<Files> {
        let path = self.mount.path(&self.reference);
        let listed = within(PATIENCE, "list the model", {
            let path = path.clone();
            move || fs::read_dir(path).map(|entries| entries.count())
        });
        if listed.is_ok() {
            return Some(within(PATIENCE * 2, "read the model", move || {
                read_tree(&path)
            }));
        }
        let cache = self.around.path().join("inspect");
        let output = run_ocifs([
            "inspect",
            "--cache-dir",
            cache.to_str().unwrap(),
            &self.reference,
        ]);
        assert!(
            format!("{output}").to_lowercase().contains("tar"),
            "{output}"
        );
        None
    }

    /// The daemon serves other models as before.
    fn assert_alive(&self) {
        let artifact = Artifact::docker_v01()
            .layer(Layer::bytes(DOCKER_SAFETENSORS, "other").at("model.safetensors"));
        let other = artifact.publish(&self.registry, "org/other:v1").reference;
        assert_eq!(
            self.mount.read(&format!("{other}/model.safetensors")),
            b"other"
        );
    }
}

#[test]
fn members_that_lead_out_or_are_no_files_stay_outside() {
    let mut archive = Vec::new();
    file(&mut archive, "config.json", "{\"first\": true}");
    for name in [
        "/evil.json",
        "/tmp/evil.json",
        "../evil.json",
        "../../../../../tmp/evil.json",
        "a/../../evil.json",
        "./../evil.json",
        "a/b/../../../evil.json",
        "..",
        ".",
        "/",
        "a//../..//evil.json",
    ] {
        file(&mut archive, name, "evil");
    }
    let secret = scratch("secret");
    let secret_file = secret.path().join("s");
    fs::write(&secret_file, "a secret of the host").unwrap();
    let target = secret_file.to_str().unwrap();
    tar_entry(&mut archive, "evil-link.json", b'2', target, 0, b"");
    tar_entry(&mut archive, "evil-dir", b'2', "/tmp", 0, b"");
    file(&mut archive, "evil-dir/evil.json", "evil");
    tar_entry(&mut archive, "evil-hard.json", b'1', target, 0, b"");
    tar_entry(
        &mut archive,
        "evil-relative.json",
        b'1',
        "../../../../../etc/passwd",
        0,
        b"",
    );
    tar_entry(&mut archive, "evil-char", b'3', "", 0, b"");
    tar_entry(&mut archive, "evil-block", b'4', "", 0, b"");
    tar_entry(&mut archive, "evil-fifo", b'6', "", 0, b"");
    tar_entry(&mut archive, "evil-contiguous", b'7', "", 4, b"evil");
    tar_entry(&mut archive, "evil-unknown", b'Q', "", 4, b"evil");
    // Names that are taken; what ocifs shows itself must not be one that the artifact can set.
    file(&mut archive, "model.safetensors", "evil");
    file(&mut archive, ".oci/manifest.json", "evil");
    file(&mut archive, "config.json/evil.json", "evil");
    file(&mut archive, "tokenizer.json", "{\"last\": true}");
    let site = site(archive);
    if let Some(files) = site.files() {
        assert_eq!(files["config.json"], b"{\"first\": true}");
        assert_eq!(files["tokenizer.json"], b"{\"last\": true}");
        for (name, bytes) in &files {
            assert!(
                !bytes.starts_with(b"a secret") && !bytes.starts_with(b"root:"),
                "{name} shows a file of the host"
            );
            assert!(!name.contains("..") && !name.starts_with('/'), "{name}");
        }
        assert_ne!(
            site.mount
                .read(&format!("{}/.oci/manifest.json", site.reference)),
            b"evil"
        );
    }
    site.assert_contained();
    site.assert_alive();
}

#[test]
fn a_million_members_are_bounded() {
    let count = scale(250_000, 1_000_000);
    let mut archive = Vec::with_capacity(count * 512 + 4096);
    file(&mut archive, "config.json", "{\"first\": true}");
    for index in 0..count {
        tar_entry(
            &mut archive,
            &format!("d{}/evil{index}", index % 1000),
            b'0',
            "",
            0,
            b"",
        );
    }
    let site = site(archive);
    let began = std::time::Instant::now();
    let listed = site.mount.try_list(&site.reference);
    assert!(began.elapsed() < PATIENCE);
    if let Ok(names) = listed {
        assert!(names.len() < 110_000, "{} names", names.len());
    }
    let memory = site.mount.peak_memory();
    assert!(memory < 700 << 20, "the daemon took {} MiB", memory >> 20);
    site.assert_contained();
    site.assert_alive();
}

#[test]
fn sizes_that_lie_are_found() {
    for size in [1_000_000, 1 << 33, 1 << 62, u64::MAX] {
        let mut archive = Vec::new();
        file(&mut archive, "config.json", "{\"first\": true}");
        tar_entry(&mut archive, "evil.json", b'0', "", size, b"short");
        let site = site(archive);
        if let Some(files) = site.files() {
            // What the archive does not hold is not made up.
            if let Some(bytes) = files.get("evil.json") {
                assert!(
                    bytes.len() < 4096,
                    "{} bytes for a size of {size}",
                    bytes.len()
                );
            }
        }
        site.assert_alive();
        assert!(site.mount.peak_memory() < 700 << 20);
    }
}

#[test]
fn garbage_in_place_of_a_tar_leaves_the_weights() {
    for archive in [
        vec![],
        vec![0xFF; 5000],
        b"{\"not\": \"a tar\"}".to_vec(),
        vec![0; 100_000],
    ] {
        let site = site(archive);
        if let Some(files) = site.files() {
            assert_eq!(
                files.get("model.safetensors").map(Vec::as_slice),
                Some(b"weights".as_slice())
            );
        }
        site.assert_alive();
    }
}

#[test]
fn path_annotations_that_lead_out_stay_outside() {
    let registry = Registry::open();
    let paths = [
        "../evil.json",
        "/evil.json",
        "a/../../evil.json",
        "",
        ".",
        "..",
        "a\0b",
        "good.json/evil.json",
        ".oci/manifest.json",
    ];
    let layers = paths.iter().enumerate().map(|(index, path)| {
        Layer::bytes(
            "application/vnd.docker.ai.model.file",
            format!("evil {index}"),
        )
        .at(path)
    });
    let artifact = Artifact::docker_v02()
        .layer(Layer::bytes("application/vnd.docker.ai.model.file", "good").at("good.json"))
        .layers(layers);
    let reference = artifact.publish(&registry, "org/m:v1").reference;
    let around = scratch("around");
    let mount = Mount::start::<&str>(&around.path().join("a/b/cache"), []);
    let site = Site {
        mount,
        reference,
        around,
        registry,
    };
    let files = site.files().expect("the good file is shown");
    assert_eq!(files["good.json"], b"good");
    assert!(
        files
            .keys()
            .all(|name| !name.contains("..") && !name.starts_with('/')),
        "{:?}",
        files.keys()
    );
    site.assert_contained();
    site.assert_alive();
}
