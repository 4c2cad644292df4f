//! Recipes of `docs/recipes.md` that no other test runs: a site without a network to the registry, and what is packaged for containers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::Content;
use crate::support::mount::{Mount, ocifs};
use crate::support::netns::Network;
use crate::support::process::{Daemon, run, run_command};
use crate::support::{PATIENCE, python, scratch};

const SIZE: usize = (9 << 20) + 5;

/// `pull` where the registry is, carry the cache to where it is not, `serve` it there, and mount under the registry's own name.
#[test]
fn a_model_is_carried_to_a_site_that_has_no_way_to_its_registry() {
    let (mut outside, mut inside) = (Network::new(), Network::new());
    let (origin, connected) = (outside.machine(), outside.machine());
    let (server, node) = (inside.machine(), inside.machine());
    let dir = scratch("origin");
    let registry = origin.registry(dir.path());
    let bytes = Content::new(77).bytes(0, SIZE);
    let layer = Layer::bytes(DOCKER_SAFETENSORS, bytes.clone()).at("model.safetensors");
    origin.publish(&Artifact::docker_v02().layer(layer), "org/m:v1");
    let host = format!("{}:5000", origin.address);
    let reference = format!("{host}/org/m:v1");

    let fetched = scratch("fetched");
    let mut pull = ocifs(["pull", &reference, "--plain-http", &host, "--cache-dir"]);
    pull.arg(fetched.path());
    connected.wrap(&mut pull);
    run_command(&mut pull, PATIENCE).ok();
    drop(registry);

    // On a disk that is carried.
    let (disk, carried) = (scratch("disk"), scratch("carried"));
    let archive = disk.path().join("cache.tar");
    let tar = |verb: &str, at: &Path, rest: &[&str]| {
        let mut command = Command::new("tar");
        command.arg(verb).arg(&archive).arg("-C").arg(at).args(rest);
        run_command(&mut command, PATIENCE).ok();
    };
    tar("-cf", fetched.path(), &["."]);
    tar("-xf", carried.path(), &[]);
    drop(fetched);

    let listen = format!("{}:5000", server.address);
    let mut serve = ocifs(["serve", "--listen", &listen]);
    serve.arg(carried.path());
    server.wrap(&mut serve);
    let serving = Daemon::start("ocifs serve", &mut serve, &disk.path().join("log"));
    let _serving = server.listening(serving);

    let hosts = scratch("hosts");
    let of_registry = hosts.path().join(host.replace(':', "_") + "_");
    fs::create_dir(&of_registry).unwrap();
    let text = format!("[host.\"http://{listen}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
    fs::write(of_registry.join("hosts.toml"), text).unwrap();
    let cache = scratch("cache");
    let flags = ["--hosts-dir", hosts.path().to_str().unwrap()];
    let mount = Mount::start_as(cache.path(), flags, |command| node.wrap(command));
    assert!(mount.read(&format!("{reference}/model.safetensors")) == bytes);
    mount.verified(&format!("{reference}/model.safetensors"));
    mount.unmount();
}

fn packaging(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("packaging")
        .join(file)
}

/// The last stage of the Containerfile; a directory stands for the one that compiles.
#[test]
fn the_image_has_the_program_and_authorities_and_mounts_by_default() {
    let dir = scratch("image");
    let path = |below: &str| dir.path().join(below);
    for (file, from) in [
        ("build/image/usr/bin/ocifs", env!("CARGO_BIN_EXE_ocifs")),
        (
            "build/image/etc/ssl/certs/ca-certificates.crt",
            "/etc/ssl/certs/ca-certificates.crt",
        ),
    ] {
        fs::create_dir_all(path(file).parent().unwrap()).unwrap();
        fs::copy(from, path(file)).unwrap();
    }
    fs::create_dir(path("context")).unwrap();
    let mut command = Command::new("buildah");
    command
        .args(["--storage-driver", "vfs", "--root"])
        .arg(path("root"));
    command.arg("--runroot").arg(path("runroot"));
    command.args(["bud", "--isolation", "chroot", "--build-context"]);
    command.arg(format!("build={}", path("build").display()));
    command.arg("-f").arg(packaging("Containerfile"));
    command
        .arg("-t")
        .arg(format!("oci:{}:ocifs", path("layout").display()));
    command.arg(path("context"));
    run_command(&mut command, PATIENCE).ok();
    let layout = format!("oci:{}:ocifs", path("layout").display());
    let config = run("skopeo", ["inspect", "--config", &layout]).ok();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let config = &config["config"];
    assert_eq!(config["Entrypoint"][0], "/usr/bin/ocifs");
    let arguments = config["Cmd"].as_array().unwrap();
    let arguments = arguments.iter().map(|argument| argument.as_str().unwrap());
    // What it does by default can be typed.
    let mut check = ocifs(arguments);
    run_command(check.arg("--fake"), PATIENCE).ok();
    let bundle = path("bundle");
    run(
        "umoci",
        [
            "unpack",
            "--image",
            layout.trim_start_matches("oci:"),
            bundle.to_str().unwrap(),
        ],
    )
    .ok();
    let program = bundle.join("rootfs/usr/bin/ocifs");
    assert!(fs::read(program).unwrap() == fs::read(env!("CARGO_BIN_EXE_ocifs")).unwrap());
}

#[test]
fn kubernetes_takes_the_manifests() {
    let validate = python::environment().join("kubernetes/bin/kubernetes-validate");
    for (file, kinds) in [("daemonset.yaml", 3), ("pod.yaml", 1)] {
        let mut command = Command::new(&validate);
        command
            .arg("--strict")
            .arg(packaging("kubernetes").join(file));
        let output = run_command(&mut command, PATIENCE);
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            output.stderr
        );
        assert!(output.status.success(), "{said}");
        assert_eq!(said.matches("passed for resource").count(), kinds, "{said}");
    }
    // The command in it can be typed.
    let text = fs::read_to_string(packaging("kubernetes/daemonset.yaml")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("args: ["))
        .unwrap();
    let arguments = line.trim_end_matches(']').split(", ");
    run_command(ocifs(arguments).arg("--fake"), PATIENCE).ok();
}
