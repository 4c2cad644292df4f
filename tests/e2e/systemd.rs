//! Under a systemd that has booted: the units of `systemd/`, mounts of fstab(5), and the helper that mount(8) calls. Each test boots a
//! system of its own ([`crate::support::booted`]); readers are programs of this machine that look into it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::booted::{Booted, Plan};
use crate::support::content::Content;
use crate::support::process::run;
use crate::support::{PATIENCE, eventually, heavy, scratch, within};
use crate::takeover::{Published, Readers};

/// Where the model is below a mount of the system, by a registry that everybody may read and one that wants a password.
pub const MODEL: &str = "127.0.0.1:5000/org/m:v1";
const PRIVATE: &str = "127.0.0.1:5001/org/m:v1";

const READERS: [(&str, &str); 4] = [
    ("read", "warm.safetensors"),
    ("mmap", "cold.safetensors"),
    ("direct", "warm.safetensors"),
    ("names", "cold.safetensors"),
];

/// A system with two registries that have what was published, and a cache on this machine's disk.
pub struct Machine {
    pub published: Published,
    pub cache: TempDir,
}

impl Machine {
    pub fn new() -> Self {
        Self {
            published: Published::new(),
            cache: scratch("cache"),
        }
    }

    /// With the program under test and its units.
    pub fn plan(&self) -> Plan {
        self.plan_on(Plan::new())
    }

    /// On what stands there.
    pub fn plan_on(&self, plan: Plan) -> Plan {
        let config = |port: u16| {
            json!({
                "version": "0.1",
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": "/srv/registry"}},
                "http": {"addr": format!("127.0.0.1:{port}"), "secret": "of no use outside this test"},
            })
        };
        let mut private = config(5001);
        private["auth"] =
            json!({"htpasswd": {"realm": "private", "path": "/etc/registry/passwords"}});
        let passwords = run("htpasswd", ["-Bbn", "alice", "s3cret"]).ok();
        let unit = "[Service]\nExecStart=/usr/bin/docker-registry serve /etc/registry/%i.yml\n";
        plan.bind(&self.published.registry.data(), "/srv/registry")
            .bind(self.cache.path(), "/var/cache/ocifs")
            .file("/etc/registry/open.yml", &config(5000).to_string())
            .file("/etc/registry/private.yml", &private.to_string())
            .file("/etc/registry/passwords", &passwords)
            .file("/etc/systemd/system/registry@.service", unit)
    }
}

pub fn start_registries(booted: &Booted) {
    booted.sh("systemctl start registry@open registry@private");
    booted.sh("for port in 5000 5001; do curl -s --retry 50 --retry-connrefused --retry-delay 0 http://127.0.0.1:$port/v2/; done");
}

fn main_process(booted: &Booted, unit: &str) -> u32 {
    booted.property(unit, "MainPID").parse().unwrap()
}

/// Another process serves the mount, and says so.
fn another_goes_on(booted: &Booted, unit: &str, before: u32) -> u32 {
    let pid = eventually(PATIENCE, "another process is started", || {
        let pid = main_process(booted, unit);
        (pid != 0 && pid != before).then_some(pid)
    });
    booted.until(unit, "ActiveState", "active");
    pid
}

pub fn status(booted: &Booted, point: &str) -> Value {
    let text = booted.sh(&format!("ocifs status --json {point}"));
    let all: Value = serde_json::from_str(&text).unwrap();
    all["mounts"][0].clone()
}

fn read(path: PathBuf, at: u64) -> std::io::Result<Vec<u8>> {
    within(PATIENCE, "read", move || {
        let mut bytes = vec![0; 50_000];
        File::open(path)?.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    })
}

/// The beginning of the file `warm`, by way of this path of the system.
fn is_right(booted: &Booted, model: &str) {
    let path = booted.path(&format!("{model}/warm.safetensors"));
    let bytes =
        read(path, 99).unwrap_or_else(|error| panic!("{model}: {error}\n{}", booted.journal()));
    assert!(bytes == Content::new(21).bytes(99, 50_000), "{model}");
}

#[test]
fn a_service_starts_restarts_is_killed_and_stops_under_its_readers() {
    let _heavy = heavy();
    let machine = Machine::new();
    let booted = machine.plan().boot();
    start_registries(&booted);
    let unit = "ocifs@models.service";
    booted.sh("systemctl start ocifs@models");
    assert_eq!(
        booted.sh("findmnt --noheadings --output SOURCE,FSTYPE --raw /models"),
        "ocifs fuse.ocifs"
    );
    // What it says is in the journal, values as fields.
    let told = eventually(PATIENCE, "the journal has it", || {
        let entry = booted.sh("journalctl --no-pager -o json OCIFS_PATH=/models | head -n 1");
        serde_json::from_str::<Value>(&entry).ok()
    });
    assert_eq!(
        (
            &told["MESSAGE"],
            &told["SYSLOG_IDENTIFIER"],
            &told["_SYSTEMD_UNIT"]
        ),
        (&json!("mounted"), &json!("ocifs"), &json!(unit))
    );
    let model = booted.path(&format!("/models/{MODEL}"));
    let mut readers = Readers::start(&machine.published, &model, &READERS);
    let mut pid = main_process(&booted, unit);
    let mut exchanged = 0;
    // Each twice: what the second process keeps must be enough for the third.
    for round in 0..2 {
        for how in [
            "systemctl kill --kill-who=main --signal=KILL ocifs@models",
            "systemctl restart ocifs@models",
            "systemctl reload ocifs@models",
            "ocifs restart /models",
        ] {
            std::thread::sleep(Duration::from_millis(300));
            readers.check();
            // So often within seconds a service is not started, unless it is forgotten that it was.
            booted.sh("systemctl reset-failed ocifs@models");
            booted.sh(how);
            pid = another_goes_on(&booted, unit, pid);
            exchanged += 1;
            let status = status(&booted, "/models");
            assert_eq!(
                status["takenOver"]["times"], exchanged,
                "{round}: {how}: {status}"
            );
            assert_eq!(status["keeper"]["by"], "service manager");
        }
    }
    readers.stop();
    is_right(&booted, &format!("/models/{MODEL}"));

    // A credential is there for the process that starts after it came.
    let private = booted.path(&format!("/models/{PRIVATE}/warm.safetensors"));
    assert!(read(private, 99).is_err(), "it wants a password");
    let auth = json!({"auths": {"127.0.0.1:5001": {"auth": "YWxpY2U6czNjcmV0"}}});
    booted.sh(&format!(
        "install -D -m 600 /dev/null /etc/credstore/ocifs.auth.json && echo '{auth}' >/etc/credstore/ocifs.auth.json"
    ));
    booted.sh("systemctl reset-failed ocifs@models && systemctl restart ocifs@models");
    another_goes_on(&booted, unit, pid);
    eventually(PATIENCE, "the private model is there", || {
        booted
            .path(&format!("/models/{PRIVATE}/warm.safetensors"))
            .metadata()
            .ok()
    });
    is_right(&booted, &format!("/models/{PRIVATE}"));

    booted.sh("systemctl stop ocifs@models");
    assert_eq!(booted.property(unit, "ActiveState"), "inactive");
    assert_eq!(booted.property(unit, "Result"), "success");
    assert!(
        booted.run(["findmnt", "/models"]).status.code() == Some(1),
        "nothing is mounted"
    );
    assert_eq!(booted.sh("ls -A /models"), "");

    // What was taken down by hand stays down.
    booted.sh("systemctl reset-failed ocifs@models; systemctl start ocifs@models");
    booted.sh("umount /models");
    booted.until(unit, "ActiveState", "inactive");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(booted.property(unit, "ActiveState"), "inactive");
}

#[test]
fn a_service_that_dies_again_and_again_is_given_up_and_can_be_started_anew() {
    let _heavy = heavy();
    let machine = Machine::new();
    let booted = machine.plan().boot();
    start_registries(&booted);
    let unit = "ocifs@models.service";
    booted.sh("systemctl start ocifs@models");
    is_right(&booted, &format!("/models/{MODEL}"));
    let open = File::open(booted.path(&format!("/models/{MODEL}/cold.safetensors"))).unwrap();
    let mut pid = main_process(&booted, unit);
    for _ in 0..20 {
        booted.run(["kill", "-9", &pid.to_string()]);
        let next = eventually(PATIENCE, "another process, or none any more", || {
            let state = booted.property(unit, "ActiveState");
            let next = main_process(&booted, unit);
            (state == "failed" || next != 0 && next != pid).then_some(next)
        });
        if next == 0 {
            break;
        }
        pid = next;
    }
    booted.until(unit, "ActiveState", "failed");
    assert!(booted.journal().contains("repeated too quickly"));
    // Who still has a file open gets an error and does not hang.
    within(PATIENCE, "read of a dead mount", move || {
        assert!(open.read_exact_at(&mut [0; 4096], 30 << 20).is_err());
    });
    // The mount point is dead, which is no reason not to mount there.
    let dead = booted.run(["ls", "/models"]).failed();
    assert!(dead.contains("not connected"), "{dead}");
    booted.sh("systemctl reset-failed ocifs@models && systemctl start ocifs@models");
    is_right(&booted, &format!("/models/{MODEL}"));
}

#[test]
fn mounts_come_up_at_boot_before_the_registry_and_in_the_order_of_the_network() {
    let _heavy = heavy();
    let machine = Machine::new();
    let fstab = "\
        ocifs /srv/fstab fuse.ocifs allow_other,_netdev,nofail,memory=64M 0 0\n\
        none /srv/auto fuse.ocifs x-systemd.automount,allow_other,_netdev,gid=65534,umask=027 0 0\n\
        ocifs /srv/hand fuse.ocifs noauto,allow_other 0 0\n";
    let late = "[Unit]\nDefaultDependencies=no\nBefore=network-online.target\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=sleep 2\n";
    let booted = machine
        .plan()
        .file("/etc/fstab", fstab)
        .file("/etc/systemd/system/late.service", late)
        .enabled("late.service", "network-online.target")
        .enabled("ocifs@models.service", "multi-user.target")
        .enabled("models2.mount", "remote-fs.target")
        .file(
            "/etc/systemd/system/models2.mount",
            &fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/models.mount"))
                .unwrap()
                .replace("/models", "/models2"),
        )
        .boot();
    let entered = |unit: &str| -> u64 {
        let time = booted.property(unit, "ActiveEnterTimestampMonotonic");
        time.parse().unwrap()
    };
    let network = entered("network-online.target");
    assert!(network >= entered("late.service") && network > 2_000_000);
    for unit in ["ocifs@models.service", "srv-fstab.mount", "models2.mount"] {
        booted.until(unit, "ActiveState", "active");
        assert!(
            entered(unit) >= network,
            "{unit} did not wait for the network"
        );
    }
    booted.until("srv-auto.automount", "ActiveState", "active");
    assert_eq!(booted.property("srv-auto.mount", "ActiveState"), "inactive");

    // The registry is not there yet: an error, soon, and no mount is the worse for it.
    let start = Instant::now();
    let error = read(booted.path(&format!("/models/{MODEL}/warm.safetensors")), 0).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(30), "{error}");
    start_registries(&booted);
    for point in ["/models", "/models2", "/srv/fstab"] {
        eventually(PATIENCE, "the model is there", || {
            booted.path(&format!("{point}/{MODEL}")).metadata().ok()
        });
        is_right(&booted, &format!("{point}/{MODEL}"));
    }
    // Whoever looks first has it mounted.
    let listed = booted.sh(&format!("ls /srv/auto/{MODEL}"));
    assert!(listed.contains("cold.safetensors"), "{listed}");
    assert_eq!(booted.property("srv-auto.mount", "ActiveState"), "active");
    let table = booted.mounts();
    assert_eq!(
        table,
        "/models ocifs\n/models2 ocifs\n/srv/auto none\n/srv/fstab ocifs"
    );

    // Owner and mask: the group may, others may not.
    let file = format!("/srv/auto/{MODEL}/warm.safetensors");
    assert_eq!(
        booted.sh(&format!("stat -c '%u %g %a' {file}")),
        "0 65534 440"
    );
    assert_eq!(booted.sh("stat -c %a /srv/auto"), "550");
    let head = |user: &str, group: &str| {
        let setpriv = format!("setpriv --reuid={user} --regid={group} --clear-groups");
        booted.run(["sh", "-c", &format!("{setpriv} head -c 9 {file}")])
    };
    assert_eq!(head("1234", "65534").ok_bytes().len(), 9);
    assert!(head("1234", "1234").failed().contains("denied"));

    // mount(8): all that is wanted is there already; by hand, and down again.
    booted.sh("mount -a && mount -a");
    assert_eq!(booted.mounts(), table);
    booted.sh("mkdir -p /srv/hand && mount /srv/hand && findmnt /srv/hand");
    is_right(&booted, &format!("/srv/hand/{MODEL}"));
    booted.sh("umount /srv/hand");
    booted.sh("umount /srv/fstab && mount /srv/fstab");
    is_right(&booted, &format!("/srv/fstab/{MODEL}"));

    booted.power_off(PATIENCE);
}

#[test]
fn mount_8_refuses_what_it_does_not_know_and_says_what_was_meant() {
    let booted = Plan::new().boot();
    booted.sh("mkdir /srv/m");
    let mount = |line: &str| {
        let output = booted.run(["sh", "-c", &format!("mount {line} /srv/m")]);
        (output.status.code(), output.stderr)
    };
    for (line, code, part) in [
        (
            "-t fuse.ocifs ocifs -o cache-sise=1G",
            1,
            "did you mean `cache-size`?",
        ),
        (
            "-t ocifs ocifs -o alow_other",
            1,
            "did you mean `allow-other`?",
        ),
        (
            "-t fuse.ocifs ghcr.io/org/model:v1",
            1,
            "below the mount point",
        ),
        ("-t fuse.ocifs ocifs -o umask=9", 1, "in octal"),
        (
            "-t fuse.ocifs ocifs -o config=/nowhere.toml",
            1,
            "/nowhere.toml",
        ),
    ] {
        let (got, text) = mount(line);
        assert!(
            got == Some(code) && text.contains(part),
            "{line}: {got:?} {text}"
        );
    }
    // -s is for options of other systems, -f for a look at whether it would do.
    assert_eq!(
        mount("-s -f -t fuse.ocifs ocifs -o frobnicate,uid=daemon"),
        (Some(0), String::new())
    );
    assert_eq!(booted.run(["findmnt", "/srv/m"]).status.code(), Some(1));
    assert_eq!(
        mount("-t ocifs ocifs -o uid=daemon,ro,noexec,offline"),
        (Some(0), String::new())
    );
    assert_eq!(booted.sh("stat -c %U /srv/m"), "daemon");
    let (code, text) = mount("-o remount,ro");
    assert!(code != Some(0) && text.contains("ocifs restart"), "{text}");
    let (code, text) = mount("-t fuse.ocifs ocifs");
    assert!(
        code == Some(32) && text.contains("already"),
        "{code:?} {text}"
    );
    booted.sh("umount /srv/m");
    booted.sh("test -z \"$(pgrep -x ocifs)\" || { sleep 3; ! pgrep -x ocifs; }");
}

#[test]
fn timers_keep_the_cache_and_unit_files_have_no_mistake() {
    let _heavy = heavy();
    let machine = Machine::new();
    let booted = machine
        .plan()
        .file(
            "/etc/systemd/system/ocifs-cache-gc.timer.d/soon.conf",
            "[Timer]\nOnActiveSec=1s\nRandomizedDelaySec=0\n",
        )
        .boot();
    let dir = "/etc/systemd/system";
    for units in [
        format!("{dir}/ocifs@models.service {dir}/models.mount {dir}/models.automount"),
        format!("{dir}/ocifs-cache-gc.timer {dir}/ocifs-cache-verify.timer"),
    ] {
        let said = booted.sh(&format!("systemd-analyze verify --man=no {units} 2>&1"));
        assert_eq!(said, "", "{units}");
    }
    // What is open is said in the unit, line by line; more must not come to it.
    booted.sh("systemd-analyze security --offline=true --threshold=50 ocifs@models.service >&2");
    booted.sh("systemd-analyze security --offline=true --threshold=20 ocifs-cache-gc.service >&2");

    start_registries(&booted);
    booted.sh("systemctl start ocifs@models");
    is_right(&booted, &format!("/models/{MODEL}"));
    booted.sh(&format!("cat /models/{MODEL}/* >/dev/null"));
    booted.sh("systemctl enable --now ocifs-cache-gc.timer ocifs-cache-verify.timer 2>&1");
    for timer in ["ocifs-cache-gc.timer", "ocifs-cache-verify.timer"] {
        assert_ne!(booted.property(timer, "NextElapseUSecRealtime"), "");
    }
    eventually(PATIENCE, "the timer has run its service", || {
        let ended = booted.property("ocifs-cache-gc.service", "ExecMainExitTimestampMonotonic");
        (ended != "0").then_some(())
    });
    assert_eq!(
        booted.property("ocifs-cache-gc.service", "Result"),
        "success"
    );
    booted.sh("systemctl start ocifs-cache-verify.service");
    // Under a mount that reads it, nothing was taken away; a wrong blob is found and makes the unit fail.
    is_right(&booted, &format!("/models/{MODEL}"));
    booted.sh("systemctl stop ocifs@models");
    let largest = "find /var/cache/ocifs/blobs -type f -printf '%s %p\\n' | sort -n | tail -1 | cut -d' ' -f2";
    booted.sh(&format!(
        "f=$({largest}); printf x | dd of=$f bs=1 seek=7 conv=notrunc status=none"
    ));
    booted
        .run(["systemctl", "start", "ocifs-cache-verify.service"])
        .failed();
    assert_eq!(
        booted.property("ocifs-cache-verify.service", "ExecMainStatus"),
        "6"
    );
    let disk = machine.cache.path().metadata().unwrap();
    assert_eq!(disk.mode() & 0o777, 0o700, "it is root's alone");
}

#[test]
fn a_user_mounts_without_root_and_the_manager_of_the_user_goes_on() {
    let _heavy = heavy();
    let machine = Machine::new();
    let booted = machine.plan().boot();
    start_registries(&booted);
    booted.sh("useradd --uid 4321 --create-home reader && loginctl enable-linger reader");
    booted.until("user@4321.service", "ActiveState", "active");
    let user = |line: &str| {
        let line = format!(
            "runuser -u reader -- env HOME=/home/reader XDG_RUNTIME_DIR=/run/user/4321 sh -c 'cd && {line}'"
        );
        booted.sh(&line)
    };
    let unit = "/etc/systemd/user/ocifs@models.service";
    assert_eq!(
        user(&format!(
            "systemd-analyze --user verify --man=no {unit} 2>&1"
        )),
        ""
    );
    user("systemctl --user enable --now ocifs@models 2>&1");
    assert_eq!(
        user("findmnt --noheadings --output FSTYPE models"),
        "fuse.ocifs"
    );
    user(&format!(
        "head -c 20000000 models/{MODEL}/cold.safetensors >/dev/null"
    ));
    // Its own, not root's: the mount is for the user alone.
    assert_eq!(
        user(&format!("stat -c %u models/{MODEL}/warm.safetensors")),
        "4321"
    );
    assert!(
        booted
            .run(["ls", "/home/reader/models"])
            .failed()
            .contains("denied")
    );
    let (slow, sum) = (machine.published.file("cold.safetensors"), "sha256sum");
    let truth = run(sum, [&slow]).ok();
    // Killed, restarted and reloaded under a program that reads.
    user(&format!(
        "(for i in 1 2 3 4 5 6; do {sum} <models/{MODEL}/cold.safetensors; sleep 0.3; done) >sums 2>&1 & \
         for how in \"kill --kill-who=main --signal=KILL\" restart reload; do \
             sleep 0.5; systemctl --user reset-failed ocifs@models; systemctl --user $how ocifs@models; \
         done; wait"
    ));
    let wanted = truth.split(' ').next().unwrap();
    let sums = user("cat sums");
    assert_eq!(
        sums.lines().filter(|line| line.starts_with(wanted)).count(),
        6,
        "{sums}"
    );
    eventually(PATIENCE, "the service is up", || {
        let state = booted.sh("systemctl --user --machine=reader@ is-active ocifs@models || true");
        (state == "active").then_some(())
    });
    let status = user("ocifs status --json models");
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["mounts"][0]["takenOver"]["times"], 3, "{status}");
    user("systemctl --user stop ocifs@models");
    assert_eq!(booted.mounts(), "");
}
