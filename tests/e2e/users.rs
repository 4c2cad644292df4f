//! Who reads and who mounts: other users, containers that were there before the mount, user namespaces, and mounts without root.

use crate::support::booted::Booted;
use crate::support::process::run;
use crate::support::{PATIENCE, eventually, heavy};
use crate::systemd::{MODEL, Machine, start_registries};

/// The first bytes of a file's digest, by which the shells of these tests compare.
fn truth(machine: &Machine) -> String {
    let sum = run("sha256sum", [machine.published.file("warm.safetensors")]).ok();
    sum.split(' ').next().unwrap().to_owned()
}

/// A line of shell as the user `reader`, who has a home.
fn as_reader(booted: &Booted, line: &str) -> crate::support::process::Output {
    let variables = "HOME=/home/reader PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    let command = format!("cd && {line}");
    let start = ["runuser", "-u", "reader", "--", "env", "-i"];
    let words = start.into_iter().chain(variables.split(' '));
    booted.run(words.chain(["sh", "-c", &command]))
}

#[test]
fn other_users_containers_and_user_namespaces_read_a_shared_mount() {
    let _heavy = heavy();
    let machine = Machine::new();
    let booted = machine.plan().boot();
    start_registries(&booted);
    booted.sh("useradd --create-home reader && mkdir -p /srv/models /srv/own");
    // A container whose volume is the directory around the mount: read-only, and a slave, as `-v /srv:/mnt:ro,rslave` makes it.
    booted.sh(
        "unshare --mount --propagation unchanged sh -c '\
            mount --rbind /srv /mnt && mount --make-rslave /mnt && mount -o remount,bind,ro /mnt && \
            touch /run/ready && exec sleep 600' >/dev/null 2>&1 & echo $! >/run/container; \
         while [ ! -e /run/ready ]; do sleep 0.02; done",
    );
    booted.sh("ocifs mount --allow-other /srv/models && ocifs mount /srv/own");
    let truth = truth(&machine);
    let same = |text: &str| assert!(text.contains(&truth), "{text}");
    let file = format!("models/{MODEL}/warm.safetensors");
    same(&booted.sh(&format!(
        "nsenter -t $(cat /run/container) -m sha256sum /mnt/{file}"
    )));
    let write = format!("nsenter -t $(cat /run/container) -m touch /mnt/{file} /mnt/x");
    let refused = booted.run(["sh", "-c", &write]).failed();
    assert_eq!(
        refused.matches("Read-only file system").count(),
        2,
        "{refused}"
    );
    same(&as_reader(&booted, &format!("sha256sum /srv/{file}")).ok());
    same(
        &as_reader(
            &booted,
            &format!("unshare --user --map-root-user sha256sum /srv/{file}"),
        )
        .ok(),
    );
    // One that is not shared is for its owner alone, whoever calls himself root.
    for line in ["ls /srv/own", "unshare --user --map-root-user ls /srv/own"] {
        let refused = as_reader(&booted, line).failed();
        assert!(refused.contains("denied"), "{refused}");
    }
    // The colon-free name is for `-v SOURCE:TARGET`.
    let alias = format!(
        "/srv/models/{}",
        MODEL
            .replace("127.0.0.1:5000", "127.0.0.1_5000_")
            .replace("m:v1", "m/@v1")
    );
    assert!(!alias.contains(':'));
    booted.sh("mkdir /run/m");
    same(&booted.sh(&format!(
        "mount --bind -o ro {alias} /run/m && sha256sum /run/m/warm.safetensors"
    )));
    booted.sh("umount /run/m");
    // A mount that comes later is seen in the container as well.
    booted.sh("ocifs umount /srv/models && ocifs mount --allow-other /srv/models");
    same(&booted.sh(&format!(
        "nsenter -t $(cat /run/container) -m sha256sum /mnt/{file}"
    )));
}

#[test]
fn a_user_mounts_without_root_by_fusermount3_and_in_a_user_namespace() {
    let _heavy = heavy();
    let machine = Machine::new();
    let booted = machine.plan().boot();
    start_registries(&booted);
    booted.sh("useradd --create-home reader");
    let truth = truth(&machine);
    let file = format!("{MODEL}/warm.safetensors");
    let reader = |line: &str| as_reader(&booted, line).ok();
    reader("mkdir m && ocifs mount m");
    assert!(reader(&format!("sha256sum m/{file}")).contains(&truth));
    // What is sealed the kernel would read itself, for root. It is sealed soon after it was read.
    let status = eventually(PATIENCE, "the kernel takes no file of this user's", || {
        assert!(reader(&format!("sha256sum m/{file}")).contains(&truth));
        let status = reader("ocifs status --json m");
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        (status["mounts"][0]["passthrough"] == false).then_some(status)
    });
    // Its daemon killed: another one goes on, with the same rights.
    let pid = &status["mounts"][0]["pid"];
    booted.sh(&format!("kill -9 {pid}"));
    assert!(reader(&format!("sha256sum m/{file}")).contains(&truth));
    reader("ocifs umount m");
    eventually(PATIENCE, "nothing is left", || {
        let left = booted.run(["pgrep", "-u", "reader", "ocifs"]);
        (left.status.code() == Some(1)).then_some(())
    });
    // To share it is for root to allow.
    let refused = as_reader(&booted, "ocifs mount --allow-other m").failed();
    assert!(refused.contains("user_allow_other"), "{refused}");
    booted.sh("echo user_allow_other >>/etc/fuse.conf");
    reader("ocifs mount --allow-other m && chmod 755 .");
    assert!(
        booted
            .sh(&format!(
                "setpriv --reuid=77 --regid=77 --clear-groups sha256sum /home/reader/m/{file}"
            ))
            .contains(&truth)
    );
    reader("ocifs umount m");
    // Who is root of a user namespace mounts by mount(2), and the kernel leaves passthrough to the root of the machine.
    let inside = format!(
        "ocifs mount m && sha256sum m/{file} && findmnt --noheadings --output FSTYPE m && ocifs umount m"
    );
    let line = format!(
        "OCIFS_CACHE_DIR=$HOME/c OCIFS_RUNTIME_DIR=$HOME/r unshare --user --map-root-user --mount sh -c '{inside}'"
    );
    let said = reader(&line);
    assert!(
        said.contains(&truth) && said.contains("fuse.ocifs"),
        "{said}"
    );
}
