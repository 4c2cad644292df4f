//! A machine that systemd has booted: a container of systemd-nspawn over this machine's own files, which it does not change, with a
//! network of its own that has loopback alone.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::process::{Daemon, Output, run_command};
use super::{PATIENCE, eventually, scratch};

/// What stands where before it boots.
pub struct Plan {
    dir: TempDir,
    binds: Vec<String>,
}

impl Plan {
    /// This machine's files, with nothing enabled.
    pub fn bare() -> Self {
        let dir = scratch("booted");
        let plan = Self {
            dir,
            binds: Vec::new(),
        };
        for folder in ["files/etc/systemd/system", "files/etc/systemd/user"] {
            fs::create_dir_all(plan.dir.path().join(folder)).unwrap();
        }
        // Nobody has to wait for hardware. Debian has mounts of the network wanted by the system that is up.
        plan.link(
            "/etc/systemd/system/default.target",
            "/lib/systemd/system/multi-user.target",
        )
        .link(
            "/etc/systemd/system/multi-user.target.wants/remote-fs.target",
            "/lib/systemd/system/remote-fs.target",
        )
        .file("/etc/fstab", "")
    }

    /// The same with the program under test as `/usr/bin/ocifs`, the helper of mount(8), and the units of `systemd/`.
    pub fn new() -> Self {
        Self::bare()
            .bind(Path::new(env!("CARGO_BIN_EXE_ocifs")), "/usr/bin/ocifs")
            .units("systemd", "/etc/systemd/system")
            .units("systemd/user", "/etc/systemd/user")
            .link("/sbin/mount.fuse.ocifs", "/usr/bin/ocifs")
            .link("/sbin/mount.ocifs", "/usr/bin/ocifs")
    }

    fn units(mut self, from: &str, to: &str) -> Self {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(from);
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                let name = entry.file_name().into_string().unwrap();
                let text = fs::read_to_string(entry.path()).unwrap();
                self = self.file(&format!("{to}/{name}"), &text);
            }
        }
        self
    }

    fn place(&self, path: &str) -> PathBuf {
        // What Debian has as links of the root directory must stay links.
        let path = match path.strip_prefix("/sbin/") {
            Some(rest) => format!("usr/sbin/{rest}"),
            None => path.trim_start_matches('/').to_owned(),
        };
        let place = self.dir.path().join("files").join(path);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        place
    }

    /// A file.
    pub fn file(self, path: &str, text: &str) -> Self {
        fs::write(self.place(path), text).unwrap();
        self
    }

    /// A symbolic link.
    pub fn link(self, path: &str, target: &str) -> Self {
        std::os::unix::fs::symlink(target, self.place(path)).unwrap();
        self
    }

    /// A unit that is started at boot.
    pub fn enabled(self, unit: &str, by: &str) -> Self {
        let template = match (unit.split_once('@'), unit.rsplit_once('.')) {
            (Some((name, _)), Some((_, kind))) => format!("{name}@.{kind}"),
            _ => unit.to_owned(),
        };
        let link = format!("/etc/systemd/system/{by}.wants/{unit}");
        self.link(&link, &format!("/etc/systemd/system/{template}"))
    }

    /// A file or directory of this machine, there as well.
    pub fn bind(mut self, from: &Path, to: &str) -> Self {
        self.binds.push(format!("{}:{to}", from.display()));
        self
    }

    /// Boots it. With the time that the system took to come up.
    pub fn boot(self) -> Booted {
        let (tree, log) = (self.dir.path().join("tree"), self.dir.path().join("log"));
        fs::create_dir(&tree).unwrap();
        // In a mount namespace of its own, so that nothing is left of it when it ends. What is enabled here is not enabled there.
        let script = r#"
            set -e
            tree=$1 files=$2
            shift 2
            mount -t tmpfs tmpfs "$tree"
            mkdir "$tree/upper" "$tree/work" "$tree/root"
            cp -a "$files/." "$tree/upper/"
            for folder in etc/systemd/system etc/systemd/user; do
                setfattr -n trusted.overlay.opaque -v y "$tree/upper/$folder"
            done
            mount -t overlay overlay -o "lowerdir=/,upperdir=$tree/upper,workdir=$tree/work" "$tree/root"
            # As udev makes it elsewhere: for everybody.
            mknod -m 666 "$tree/fuse" c 10 229
            mknod -m 644 "$tree/autofs" c 10 235
            exec systemd-nspawn --quiet --directory="$tree/root" --boot --register=no --keep-unit --private-network \
                --console=read-only --machine=booted --resolv-conf=off --timezone=off --bind="$tree/fuse:/dev/fuse" --bind="$tree/autofs:/dev/autofs" --capability=all "$@" \
                systemd.firstboot=no systemd.mask=systemd-firstboot.service systemd.mask=systemd-timesyncd.service
        "#;
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "slave",
            "--",
            "bash",
            "-c",
            script,
            "boot",
        ]);
        command.arg(&tree).arg(self.dir.path().join("files"));
        for bind in &self.binds {
            command.arg(format!("--bind={bind}"));
        }
        // Of Debian's own environment, so that nothing of whoever runs the tests gets in.
        command.env_clear().env("PATH", PATH).env("container", "");
        let mut nspawn = Daemon::start("systemd-nspawn", &mut command, &log);
        let mut leader = None;
        eventually(PATIENCE, "systemd-nspawn starts the system", || {
            assert!(
                nspawn.is_running(),
                "systemd-nspawn ended: {}",
                nspawn.log()
            );
            leader = first_process(nspawn.pid().as_raw_nonzero().get());
            leader
        });
        let booted = Booted {
            leader: leader.unwrap(),
            nspawn,
            _dir: self.dir,
        };
        eventually(PATIENCE, "the system is up", || {
            let state = booted.run(["systemctl", "is-active", "multi-user.target"]);
            state.status.success().then_some(())
        });
        booted
    }
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The child that is the first process of its namespace.
fn first_process(parent: i32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let status = fs::read_to_string(format!("/proc/{child}/status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("NSpid:"))?;
        let init = line.split_whitespace().count() > 2 && line.ends_with("\t1");
        init.then(|| child.parse().ok()).flatten()
    })
}

/// A running system; powered off when dropped.
pub struct Booted {
    nspawn: Daemon,
    leader: u32,
    _dir: TempDir,
}

impl Booted {
    /// A program in it, as root.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "-t",
                &self.leader.to_string(),
                "-m",
                "-u",
                "-i",
                "-n",
                "-p",
                "--",
            ])
            .args(args)
            .env_clear()
            .env("PATH", PATH);
        command
    }

    /// Runs a program in it to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        run_command(&mut self.command(args), 2 * PATIENCE)
    }

    /// Runs a line of shell in it, which must succeed; what it printed, trimmed.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        let output = self.run(["sh", "-c", line]);
        if !output.status.success() {
            eprintln!("---- journal ----\n{}\n----", self.journal());
        }
        output.ok().trim().to_owned()
    }

    /// Its mounts of ocifs: where, and the source that is shown.
    pub fn mounts(&self) -> String {
        self.sh("findmnt --noheadings --raw --types fuse.ocifs --output TARGET,SOURCE | sort")
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let show = ["systemctl", "show", "--value", "-p", name, "--", unit];
        self.run(show).ok().trim().to_owned()
    }

    /// Waits until a property of a unit is this.
    #[track_caller]
    pub fn until(&self, unit: &str, name: &str, value: &str) {
        let mut last = String::new();
        let end = std::time::Instant::now() + PATIENCE;
        while std::time::Instant::now() < end {
            last = self.property(unit, name);
            if last == value {
                return;
            }
            std::thread::sleep(Duration::from_millis(30));
        }
        panic!(
            "{name} of {unit} is {last}, not {value}:\n{}",
            self.journal()
        );
    }

    /// A path of its tree as this machine sees it.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.leader))
    }

    /// The last that its services said.
    pub fn journal(&self) -> String {
        let output = self.run([
            "journalctl",
            "--no-pager",
            "-n",
            "120",
            "-o",
            "short-monotonic",
        ]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Ends the system in order; within this time it must be gone.
    pub fn power_off(mut self, limit: Duration) {
        self.run(["systemctl", "poweroff", "--no-block"]).ok();
        let ended = self.nspawn.wait(limit);
        assert!(
            ended.is_some(),
            "the system does not end: {}",
            self.nspawn.log()
        );
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- journal ----\n{}\n----", self.journal());
        }
        // The first process of its namespace takes all others with it, and those that wait for a mount get an error. It outlives
        // systemd-nspawn, so it goes first, unless that has ended by itself.
        if self.nspawn.is_running() {
            super::held::kill(self.leader, rustix::process::Signal::KILL);
        }
        self.nspawn.kill();
    }
}
