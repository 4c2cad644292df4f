//! Packages as other programs see them.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde_json::Value;

use super::*;

fn safetensors(name: &str, fill: u8) -> Vec<u8> {
    let header =
        format!(r#"{{"{name}":{{"dtype":"BF16","shape":[40,50],"data_offsets":[0,4000]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![fill; 4000]);
    bytes
}

fn model(dir: &Path) {
    fs::create_dir_all(dir.join("text_encoder")).unwrap();
    fs::create_dir_all(dir.join(".git")).unwrap();
    fs::write(dir.join(".git/config"), "x").unwrap();
    fs::write(
        dir.join("model-00001-of-00002.safetensors"),
        safetensors("a", 1),
    )
    .unwrap();
    fs::write(
        dir.join("model-00002-of-00002.safetensors"),
        safetensors("b", 2),
    )
    .unwrap();
    fs::write(
        dir.join("text_encoder/model.safetensors"),
        safetensors("c", 3),
    )
    .unwrap();
    let config = r#"{"model_type":"llama","max_position_embeddings":2048,"architectures":["LlamaForCausalLM"]}"#;
    fs::write(dir.join("config.json"), config).unwrap();
    fs::write(dir.join("LICENSE"), "MIT").unwrap();
    fs::write(dir.join("README.md"), "# m").unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    fs::write(dir.join("empty.json"), "").unwrap();
    std::os::unix::fs::symlink("config.json", dir.join("copy.json")).unwrap();
}

fn packed(dir: &Path, format: Format) -> Package {
    pack(
        dir,
        &Options {
            format,
            ..Options::default()
        },
        &|_| true,
    )
    .unwrap()
}

fn layers(package: &Package) -> BTreeMap<String, (String, u64)> {
    let manifest: Value = serde_json::from_slice(&package.manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    let of = |layer: &Value| {
        let path = layer["annotations"]["org.cncf.model.filepath"]
            .as_str()
            .unwrap_or("-")
            .to_owned();
        let kind = layer["mediaType"]
            .as_str()
            .unwrap()
            .rsplit_once("vnd.")
            .unwrap()
            .1
            .to_owned();
        (path, (kind, layer["size"].as_u64().unwrap()))
    };
    layers.iter().map(of).collect()
}

#[test]
fn the_current_docker_format_keeps_every_file_and_folder() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let package = packed(dir.path(), Format::Docker);
    let layers = layers(&package);
    assert_eq!(layers.len(), 9);
    assert_eq!(
        layers["text_encoder/model.safetensors"].0,
        "docker.ai.safetensors"
    );
    assert_eq!(layers["LICENSE"], ("docker.ai.license".to_owned(), 3));
    assert_eq!(
        layers["copy.json"], layers["config.json"],
        "a link inside is followed"
    );
    assert_eq!(layers["empty.json"].1, 0);
    let Source::Memory(config) = &package.config.source else {
        panic!()
    };
    let config: Value = serde_json::from_slice(config).unwrap();
    assert_eq!(config["config"]["parameters"], "6K");
    assert_eq!(config["config"]["architecture"], "llama");
    assert_eq!(config["config"]["format"], "safetensors");
    assert_eq!(config["config"]["context_size"], 2048);
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 9);
    assert!(
        package.notes.iter().any(|note| note.starts_with(".git")),
        "{:?}",
        package.notes
    );
    assert_eq!(
        package.blobs().len(),
        9,
        "two layers share a blob, and the config is one"
    );
}

#[test]
fn modelpack_has_its_types_and_the_former_format_its_tar() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let package = packed(dir.path(), Format::ModelPack);
    let manifest: Value = serde_json::from_slice(&package.manifest).unwrap();
    assert_eq!(
        manifest["artifactType"],
        "application/vnd.cncf.model.manifest.v1+json"
    );
    assert_eq!(
        layers(&package)["tokenizer.json"].0,
        "cncf.model.weight.config.v1.raw"
    );

    let package = packed(dir.path(), Format::DockerV01);
    let names: Vec<&str> = package
        .layers
        .iter()
        .map(|layer| layer.name.as_str())
        .collect();
    let shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    assert_eq!(
        names,
        [&["LICENSE"], &shards[..], &["vllm.config.tar"]].concat()
    );
    let Source::Memory(tar) = &package.layers[3].source else {
        panic!()
    };
    let mut archive = tar::Archive::new(&tar[..]);
    let inside = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string());
    let expected = [
        "README.md",
        "config.json",
        "copy.json",
        "empty.json",
        "tokenizer.json",
    ];
    assert_eq!(inside.collect::<Vec<_>>(), expected);
    let options = Options {
        format: Format::DockerV01,
        nameless: true,
        ..Options::default()
    };
    let nameless = pack(dir.path(), &options, &|_| true).unwrap();
    assert!(!String::from_utf8_lossy(&nameless.manifest).contains("filepath"));
    assert!(nameless.digest != package.digest);
}

#[test]
fn the_digest_depends_on_names_and_contents_alone() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    model(one.path());
    model(two.path());
    use std::os::unix::fs::PermissionsExt;
    let config = fs::File::open(two.path().join("config.json")).unwrap();
    config
        .set_permissions(fs::Permissions::from_mode(0o600))
        .unwrap();
    config
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    for format in [Format::Docker, Format::DockerV01, Format::ModelPack] {
        let same = packed(one.path(), format).digest;
        assert_eq!(packed(two.path(), format).digest, same, "{format:?}");
        let created = Some("2026-01-31".parse().unwrap());
        let options = Options {
            format,
            created,
            ..Options::default()
        };
        assert_ne!(pack(one.path(), &options, &|_| true).unwrap().digest, same);
    }
    fs::rename(two.path().join("README.md"), two.path().join("OTHER.md")).unwrap();
    assert_ne!(
        packed(two.path(), Format::Docker).digest,
        packed(one.path(), Format::Docker).digest
    );
}

#[test]
fn what_is_no_model_or_leads_out_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = || pack(dir.path(), &Options::default(), &|_| true).unwrap_err();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(matches!(refused(), PackError::NoWeights { .. }));
    fs::write(dir.path().join("model.safetensors"), safetensors("a", 1)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("vocab.txt")).unwrap();
    assert!(matches!(refused(), PackError::Link { .. }));
    fs::remove_file(dir.path().join("vocab.txt")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("vocab.txt")).unwrap();
    assert!(matches!(refused(), PackError::Link { .. }));
    fs::remove_file(dir.path().join("vocab.txt")).unwrap();
    std::os::unix::fs::symlink(".", dir.path().join("loop")).unwrap();
    assert_eq!(packed(dir.path(), Format::Docker).layers.len(), 2);
    let stopped = pack(dir.path(), &Options::default(), &|_| false).unwrap_err();
    assert!(matches!(stopped, PackError::Stopped));
}

#[test]
fn a_layout_takes_several_artifacts_and_never_half_of_one() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    model(dir.path());
    let package = packed(dir.path(), Format::Docker);
    let target = out.path().join("layout");
    layout::write(&package, &target, "v1", &|_| true).unwrap();
    let second = packed(dir.path(), Format::ModelPack);
    layout::write(&second, &target, "v2", &|_| true).unwrap();
    layout::write(&second, &target, "v1", &|_| true).unwrap();
    assert_eq!(layout::lookup(&target, "v1"), Some(second.digest));
    assert_eq!(layout::lookup(&target, "v2"), Some(second.digest));

    fs::write(dir.path().join("README.md"), "# other").unwrap();
    let late = layout::write(&package, &out.path().join("late"), "v1", &|_| true).unwrap_err();
    assert!(matches!(late, PackError::Changed { .. }), "{late}");
    assert_eq!(layout::lookup(&out.path().join("late"), "v1"), None);
    let blobs = fs::read_dir(out.path().join("late/blobs/sha256")).unwrap();
    for blob in blobs.map(|entry| entry.unwrap().path()) {
        let name = blob.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(Digest::of(&fs::read(&blob).unwrap()).hex(), name);
    }
    assert!(
        layout::write(&package, dir.path(), "v1", &|_| true).is_err(),
        "a model's directory is no layout"
    );
    assert!(layout::write(&package, &target, "", &|_| true).is_err());
}

#[test]
fn skopeo_reads_what_was_written() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    model(dir.path());
    for format in [Format::Docker, Format::DockerV01, Format::ModelPack] {
        let package = packed(dir.path(), format);
        let name = format!("x.io/org/m:{format:?}");
        layout::write(&package, &out.path().join("l"), &name, &|_| true).unwrap();
        let source = format!("oci:{}/l:{name}", out.path().display());
        let raw = Command::new("skopeo")
            .args(["inspect", "--raw", &source])
            .output()
            .unwrap();
        assert!(
            raw.status.success(),
            "{}",
            String::from_utf8_lossy(&raw.stderr)
        );
        assert_eq!(raw.stdout, package.manifest);
        let copy = out.path().join(format!("{format:?}"));
        let target = format!("dir:{}", copy.display());
        let copied = Command::new("skopeo")
            .args(["copy", "-q", &source, &target])
            .output()
            .unwrap();
        assert!(
            copied.status.success(),
            "{}",
            String::from_utf8_lossy(&copied.stderr)
        );
        for blob in package.blobs() {
            assert_eq!(
                fs::metadata(copy.join(blob.digest.hex())).unwrap().len(),
                blob.size
            );
        }
    }
}
