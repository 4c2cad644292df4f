//! A mount made by running this same program, as a user would; it is gone when the value is.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::super::exit::Exit;
use super::super::explain::Failure;

/// The time that a mount may take to come up or to go down.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A running `ocifs mount --foreground`.
#[derive(Debug)]
pub(super) struct Mounted {
    program: PathBuf,
    point: PathBuf,
    child: Child,
    log: PathBuf,
}

impl Mounted {
    /// Mounts on `point`, which is made, with `cache`; returns when the mount is up.
    pub(super) fn start(scene: &Path, point: &Path, cache: &Path, prefetch: &str) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        fs::create_dir_all(point)?;
        let outside = fs::metadata(point)?.dev();
        let settings = scene.join("config.toml");
        fs::write(&settings, "")?;
        let log = scene.join("mount.log");
        let mut command = Command::new(&program);
        command
            .args(["mount", "--foreground", "--prefetch", prefetch, "--config"])
            .arg(&settings)
            .arg("--cache-dir")
            .arg(cache)
            .args(["--cache-size", "1T"])
            .arg(point)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            // Ctrl-C is for the demonstration, which then takes the mount down in order.
            .process_group(0);
        super::super::supervise::without_manager(&mut command);
        let own =
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("OCIFS_"));
        for (name, _) in own {
            command.env_remove(name);
        }
        let child = command
            .spawn()
            .context("cannot run this program's own file")?;
        let mut mounted = Self {
            program,
            point: point.to_owned(),
            child,
            log,
        };
        let start = Instant::now();
        while fs::metadata(point).map(|meta| meta.dev()).ok() == Some(outside) {
            if mounted.child.try_wait()?.is_some() {
                return Err(mounted.failed("the mount did not come up"));
            }
            if start.elapsed() > PATIENCE {
                return Err(mounted.failed("the mount did not come up in time"));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(mounted)
    }

    fn failed(&self, what: &str) -> anyhow::Error {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(8).collect();
        let said: Vec<&str> = last.into_iter().rev().collect();
        let text = match said.is_empty() {
            true => what.to_owned(),
            false => format!("{what}; it said:\n{}", said.join("\n")),
        };
        let hint = match Path::new("/dev/fuse").exists() {
            true => "a mount needs root, or the package fuse3 for fusermount3",
            false => {
                "there is no /dev/fuse: `modprobe fuse`, or give a container --device /dev/fuse --cap-add SYS_ADMIN"
            }
        };
        Failure::new(Exit::Failure, text).hint(hint).into()
    }

    /// Takes it down as a user would.
    pub(super) fn stop(mut self) -> Result<()> {
        let status = self.umount(&[])?;
        if !status.success() {
            return Err(self.failed("the mount could not be taken down"));
        }
        match self.wait() {
            true => Ok(()),
            false => Err(self.failed("the mount was taken down and its program did not end")),
        }
    }

    fn umount(&self, flags: &[&str]) -> Result<std::process::ExitStatus> {
        let mut command = Command::new(&self.program);
        command
            .arg("umount")
            .args(flags)
            .arg(&self.point)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Ok(command.stderr(Stdio::null()).process_group(0).status()?)
    }

    /// Whether the program has ended, or does so in time.
    fn wait(&mut self) -> bool {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(LOOK_EVERY),
                _ => return true,
            }
        }
        false
    }
}

impl Drop for Mounted {
    /// On the way out of a failure or an interruption: whatever it takes.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let _ = self.umount(&["--force"]);
        if !self.wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = self.umount(&["--lazy", "--force"]);
        }
    }
}
