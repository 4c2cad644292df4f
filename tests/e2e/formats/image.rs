//! Container images: KServe's modelcars and any other, made by buildah and umoci, unpacked again by umoci for comparison.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::{Site, archive, compressed};
use crate::support::artifact::{Artifact, Layer};
use crate::support::content::digest;
use crate::support::model::{SampleModel, assert_same_files, read_tree};
use crate::support::mount::run_ocifs;
use crate::support::process::{run, run_command};
use crate::support::{PATIENCE, scratch};

const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// buildah with storage of its own.
pub(super) struct Buildah {
    dir: tempfile::TempDir,
}

impl Buildah {
    pub(super) fn new() -> Self {
        Self {
            dir: scratch("buildah"),
        }
    }

    pub(super) fn run(&self, args: &[&str]) -> String {
        let mut command = Command::new("buildah");
        let dir = |name: &str| self.dir.path().join(name).to_str().unwrap().to_owned();
        command
            .args(["--storage-driver", "vfs", "--root", &dir("root")])
            .args(["--runroot", &dir("run")])
            .args(args)
            .env("BUILDAH_ISOLATION", "chroot")
            .env("TMPDIR", self.dir.path());
        run_command(&mut command, PATIENCE).ok().trim().to_owned()
    }
}

/// A modelcar: an image of two layers with the model below `/models`, pushed with this format and compression.
fn modelcar(site: &Site, model: &SampleModel, format: &str, compression: &str) -> String {
    let buildah = Buildah::new();
    let container = buildah.run(&["from", "scratch"]);
    let path = model.path().to_str().unwrap();
    buildah.run(&["copy", &container, path, "/models/"]);
    let commit = |container: &str, name: &str| {
        buildah.run(&["commit", "-q", "--format", format, "--rm", container, name]);
    };
    commit(&container, "localhost/base");
    // A second layer: one file is gone, one is new, one is another.
    let container = buildah.run(&["from", "localhost/base"]);
    let more = scratch("more");
    fs::write(more.path().join("added.txt"), "added").unwrap();
    fs::write(more.path().join("config.json"), "{\"second\": true}").unwrap();
    buildah.run(&[
        "copy",
        &container,
        more.path().to_str().unwrap(),
        "/models/",
    ]);
    commit(&container, "localhost/car");
    let target = format!(
        "{}/org/car:{format}-{}",
        site.registry.host(),
        compression.replace(':', "-")
    );
    buildah.run(&[
        "push",
        "-q",
        "--tls-verify=false",
        "--format",
        if format == "docker" { "v2s2" } else { "oci" },
        "--compression-format",
        compression,
        "localhost/car",
        &format!("docker://{target}"),
    ]);
    target
}

#[test]
fn modelcars_of_both_formats_show_their_model_below_models() {
    let site = Site::new();
    let model = SampleModel::new(331);
    let mut wanted = model.files().clone();
    wanted.insert("config.json".into(), b"{\"second\": true}".to_vec());
    wanted.insert("added.txt".into(), b"added".to_vec());
    for (format, compression) in [("oci", "gzip"), ("docker", "gzip"), ("oci", "zstd")] {
        let shown = modelcar(&site, &model, format, compression);
        assert_same_files(&site.mount.files(&format!("{shown}/models")), &wanted);
        assert_eq!(site.mount.list(&shown), [".oci", "models"]);
    }
    let said = site.inspect(&format!("{}/org/car:oci-gzip", site.registry.host()));
    assert!(said.contains("container image"), "{said}");
}

/// An image layout that umoci made, layer by layer, and what umoci unpacks of it.
struct Umoci {
    dir: tempfile::TempDir,
}

impl Umoci {
    fn new() -> Self {
        let dir = scratch("umoci");
        let umoci = Self { dir };
        umoci.run(&["init", "--layout", &umoci.path("layout")]);
        umoci.run(&["new", "--image", &umoci.image()]);
        umoci
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn image(&self) -> String {
        format!("{}:v1", self.path("layout"))
    }

    fn run(&self, args: &[&str]) {
        run("umoci", args).ok();
    }

    /// Adds a layer.
    fn insert(&self, options: &[&str], rest: &[&str]) {
        let mut args = vec!["insert", "--image"];
        let image = self.image();
        args.push(&image);
        args.extend(options);
        args.extend(rest);
        self.run(&args);
    }

    fn unpacked(&self) -> PathBuf {
        let bundle = self.path("bundle");
        self.run(&["unpack", "--image", &self.image(), &bundle]);
        Path::new(&bundle).join("rootfs")
    }
}

#[test]
fn whiteouts_directories_links_and_times_are_those_of_umoci() {
    let umoci = Umoci::new();
    let dir = scratch("tree");
    let path = |name: &str| dir.path().join(name);
    fs::create_dir_all(path("one/models/deep/er")).unwrap();
    for (name, text) in [
        ("one/models/a.bin", "a"),
        ("one/models/gone.bin", "gone"),
        ("one/models/deep/x", "x"),
        ("one/models/deep/er/y", "y"),
        ("one/models/file-then-folder", "a file"),
    ] {
        fs::write(path(name), text).unwrap();
    }
    fs::create_dir_all(path("one/models/folder-then-file/z")).unwrap();
    fs::create_dir_all(path("one/models/empty/below")).unwrap();
    fs::write(
        path("one/models/run.sh"),
        "#!/bin/sh\necho from the image\n",
    )
    .unwrap();
    fs::set_permissions(path("one/models/run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    run(
        "touch",
        [
            "-d",
            "2024-02-29T12:00:00Z",
            path("one/models/a.bin").to_str().unwrap(),
        ],
    )
    .ok();
    fs::write(path("one/models/folder-then-file/z/1"), "1").unwrap();
    fs::hard_link(path("one/models/a.bin"), path("one/models/hard.bin")).unwrap();
    symlink("a.bin", path("one/models/soft.bin")).unwrap();
    symlink("/models/deep", path("one/models/absolute")).unwrap();
    symlink("../../../../models/a.bin", path("one/models/deep/up")).unwrap();
    symlink("/etc/passwd", path("one/models/dangling")).unwrap();
    fs::create_dir_all(path("two")).unwrap();
    fs::write(path("two/fresh"), "fresh").unwrap();
    fs::create_dir_all(path("three/models/file-then-folder")).unwrap();
    fs::write(path("three/models/file-then-folder/in"), "in").unwrap();
    fs::write(path("three/models/folder-then-file"), "a file now").unwrap();
    fs::write(path("three/models/soft.bin"), "no link any more").unwrap();

    umoci.insert(
        &["--rootless"],
        &[path("one/models").to_str().unwrap(), "/models"],
    );
    umoci.insert(&["--rootless", "--whiteout"], &["/models/gone.bin"]);
    umoci.insert(
        &["--rootless", "--opaque"],
        &[path("two").to_str().unwrap(), "/models/deep"],
    );
    umoci.insert(
        &["--rootless"],
        &[path("three/models").to_str().unwrap(), "/models"],
    );
    let rootfs = umoci.unpacked();

    let site = Site::new();
    site.registry
        .skopeo_push(&format!("oci:{}", umoci.image()), "org/m:v1");
    let shown = site
        .mount
        .path(&format!("{}/org/m:v1", site.registry.host()));
    // Links compared as what they lead to, in a root of their own.
    let tree = |root: &Path| -> Vec<String> {
        let mut command = Command::new("find");
        command.args([".", "-path", "./.oci", "-prune", "-o", "-printf", "%P %y\n"]);
        command.current_dir(root);
        let mut lines: Vec<String> = run_command(&mut command, PATIENCE)
            .ok()
            .lines()
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    let mut wanted = tree(&rootfs);
    wanted.retain(|line| !line.starts_with("models/dangling"));
    assert_eq!(tree(&shown), wanted);
    for line in &wanted {
        let (name, kind) = line.rsplit_once(' ').unwrap();
        if kind == "f" {
            let (found, unpacked) = (shown.join(name), rootfs.join(name));
            assert_eq!(
                fs::read(&found).unwrap(),
                fs::read(&unpacked).unwrap(),
                "{name}"
            );
            let told = |path: &Path| {
                let metadata = fs::metadata(path).unwrap();
                (metadata.mtime(), metadata.mode() & 0o111 != 0)
            };
            assert_eq!(told(&found), told(&unpacked), "time and kind of {name}");
        }
    }
    assert_eq!(
        run(shown.join("models/run.sh").to_str().unwrap(), [""; 0]).ok(),
        "from the image\n"
    );
    assert!(wanted.contains(&"models/empty/below d".to_owned()));
    // Whoever follows a link stays in the image.
    let link = |name: &str| fs::read_link(shown.join(name)).unwrap();
    assert_eq!(link("models/absolute"), Path::new("deep"));
    assert_eq!(
        fs::canonicalize(shown.join("models/deep")).unwrap(),
        shown.join("models/deep")
    );
    assert_eq!(fs::read(shown.join("models/hard.bin")).unwrap(), b"a");
    let said = site.inspect(&format!("{}/org/m:v1", site.registry.host()));
    assert!(
        said.contains("left out the link `models/dangling`"),
        "{said}"
    );
}

#[test]
fn links_across_layers_stay_in_the_image() {
    let dir = scratch("links");
    let path = |name: &str| dir.path().join(name);
    // As in a model hub's cache: snapshots of links to blobs; and a folder that is a link.
    fs::create_dir_all(path("one/hub/blobs")).unwrap();
    fs::create_dir_all(path("one/hub/snapshots/1")).unwrap();
    fs::write(path("one/hub/blobs/abc"), "weights").unwrap();
    symlink("../../blobs/abc", path("one/hub/snapshots/1/model.bin")).unwrap();
    symlink("hub/snapshots/1", path("one/current")).unwrap();
    symlink("../../../../../../../etc", path("one/out")).unwrap();
    symlink("loop", path("one/loop")).unwrap();
    let one = archive(&path("one"), &["."], Some("gzip"));
    // The second layer writes through the link of the first.
    fs::create_dir_all(path("two/current")).unwrap();
    fs::write(path("two/current/config.json"), "{}").unwrap();
    let two = archive(&path("two"), &["current/config.json"], Some("zstd"));
    let site = Site::new();
    let artifact = Artifact::new(OCI_CONFIG, &json!({"architecture": "amd64", "os": "linux"}))
        .layer(Layer::bytes(&format!("{OCI_LAYER}+gzip"), one))
        .layer(Layer::bytes(&format!("{OCI_LAYER}+zstd"), two));
    let shown = site.show(&artifact);
    let root = site.mount.path(&shown);
    assert_eq!(
        fs::read(root.join("current/model.bin")).unwrap(),
        b"weights"
    );
    assert_eq!(fs::read(root.join("current/config.json")).unwrap(), b"{}");
    assert_eq!(
        fs::read(root.join("hub/snapshots/1/config.json")).unwrap(),
        b"{}"
    );
    let mut names = site.mount.list(&shown);
    names.retain(|name| name != ".oci");
    assert_eq!(
        names,
        ["current", "hub"],
        "nothing leads out, and circles are not shown"
    );
}

#[test]
fn an_image_that_is_not_what_its_config_says_is_refused() {
    let site = Site::new();
    let model = SampleModel::new(332);
    let tar = archive(model.path(), &["."], None);
    for (tag, diff_id, good) in [
        ("good", digest(&tar), true),
        ("bad", digest(b"other"), false),
    ] {
        let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}});
        let artifact = Artifact::new(OCI_CONFIG, &config).layer(Layer::bytes(
            &format!("{OCI_LAYER}+gzip"),
            compressed(&tar, "gzip"),
        ));
        let shown = artifact
            .publish(&site.registry, &format!("org/m:{tag}"))
            .reference;
        if good {
            assert_same_files(&site.mount.files(&shown), model.files());
        } else {
            site.assert_wrong(&shown);
        }
    }
}

#[test]
fn a_pulled_image_is_read_without_the_registry() {
    let mut site = Site::new();
    let model = SampleModel::new(333);
    let shown = modelcar(&site, &model, "oci", "gzip");
    let cache = scratch("cache");
    let dir = cache.path().to_str().unwrap();
    run_ocifs(["pull", "--cache-dir", dir, &shown]).ok();
    site.registry.stop();
    let mount = crate::support::mount::Mount::start(cache.path(), ["--offline"]);
    let found = mount.files(&format!("{shown}/models"));
    assert_eq!(found.len(), read_tree(model.path()).len() + 1);
}
