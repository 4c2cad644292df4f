//! The Debian package: installed, upgraded under readers, removed and purged in a system that has booted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::booted::{Booted, Plan};
use crate::support::process::{run, run_command};
use crate::support::{PATIENCE, eventually, heavy, scratch};
use crate::systemd::{MODEL, Machine, start_registries, status};
use crate::takeover::Readers;

/// The package with this version, of the program under test.
fn package(dir: &Path, version: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/deb.sh");
    let mut command = Command::new(script);
    command
        .arg(env!("CARGO_BIN_EXE_ocifs"))
        .arg(dir)
        .env("OCIFS_DEB_VERSION", version)
        .env("SOURCE_DATE_EPOCH", "1750000000");
    run_command(&mut command, 3 * PATIENCE).ok().trim().into()
}

fn install(booted: &Booted, version: &str) -> String {
    let package = format!("/srv/packages/ocifs_{version}_$(dpkg --print-architecture).deb");
    booted.sh(&format!(
        "DEBIAN_FRONTEND=noninteractive dpkg --install {package} 2>&1"
    ))
}

#[test]
fn a_package_is_installed_upgraded_under_readers_and_removed() {
    let _heavy = heavy();
    let packages = scratch("packages");
    let first = package(packages.path(), "0.0.1");
    let again = scratch("packages");
    let same = package(again.path(), "0.0.1");
    assert!(
        fs::read(&first).unwrap() == fs::read(same).unwrap(),
        "the same input gives the same package"
    );
    package(packages.path(), "0.0.2");
    let contents = run("dpkg-deb", ["--contents".as_ref(), first.as_os_str()]).ok();
    for file in [
        "./usr/bin/ocifs",
        "./usr/sbin/mount.fuse.ocifs -> ../bin/ocifs",
        "./usr/lib/systemd/system/ocifs@.service",
        "./usr/lib/systemd/user/ocifs@.service",
        "./usr/lib/systemd/system/ocifs-cache-gc.timer",
        "./usr/share/doc/ocifs/examples/models.automount",
        "./etc/ocifs/config.toml",
    ] {
        assert!(contents.contains(file), "{file} is not in {contents}");
    }

    let machine = Machine::new();
    let plan = machine.plan_on(Plan::bare());
    let booted = plan.bind(packages.path(), "/srv/packages").boot();
    start_registries(&booted);
    install(&booted, "0.0.1");
    booted.sh("mkdir -p /srv/hand; echo 'ocifs /srv/hand fuse.ocifs noauto,allow_other 0 0' >/etc/fstab; mount /srv/hand");
    booted.sh("echo 'memory = \"64M\"' >>/etc/ocifs/config.toml");
    booted.sh("systemctl enable --now ocifs@models ocifs-cache-gc.timer 2>&1");
    let models = booted.path(&format!("/models/{MODEL}"));
    let hand = booted.path(&format!("/srv/hand/{MODEL}"));
    let readers = [
        Readers::start(
            &machine.published,
            &models,
            &[("read", "cold.safetensors"), ("mmap", "warm.safetensors")],
        ),
        Readers::start(&machine.published, &hand, &[("names", "warm.safetensors")]),
    ];
    let said = install(&booted, "0.0.2");
    for (point, by) in [("/models", "service manager"), ("/srv/hand", "holder")] {
        eventually(PATIENCE, "the new program goes on", || {
            (status(&booted, point)["takenOver"]["times"] == 1).then_some(())
        });
        assert_eq!(status(&booted, point)["keeper"]["by"], by, "{said}");
        let pid = status(&booted, point)["pid"].to_string();
        let exe = booted.sh(&format!("readlink /proc/{pid}/exe"));
        assert_eq!(exe, "/usr/bin/ocifs", "it is the installed one: {said}");
    }
    assert!(
        booted.sh("cat /etc/ocifs/config.toml").contains("64M"),
        "what was changed is kept"
    );
    readers.into_iter().for_each(Readers::stop);

    booted.sh("dpkg --remove ocifs 2>&1");
    assert_eq!(booted.mounts(), "");
    eventually(PATIENCE, "no process is left", || {
        (booted.run(["pgrep", "-x", "ocifs"]).status.code() == Some(1)).then_some(())
    });
    assert_eq!(
        booted.sh("systemctl list-units --failed --no-legend 'ocifs*'"),
        ""
    );
    assert_ne!(
        booted.sh("ls /var/cache/ocifs/blobs/sha256"),
        "",
        "the cache is for who comes back"
    );
    booted.sh("dpkg --purge ocifs 2>&1");
    assert_eq!(booted.sh("ls -A /var/cache/ocifs 2>/dev/null; find /etc -name 'ocifs*'; find /run -maxdepth 1 -name ocifs"), "");
}
