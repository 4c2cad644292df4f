//! `ocifs run`: finds or makes a mount with the model, and starts `ocifs-run` on it.
//!
//! The engine is a program of its own, so that this one never links a GPU's libraries and starts where there are none.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::args::{Global, Reading, Run};
use super::context;
use super::exit::Exit;
use super::explain::Failure;
use super::interrupt::interrupted;
use super::supervise;
use crate::mount;
use crate::registry::Reference;

/// The program with the engine; also the variable that names another.
const PROGRAM: &str = "ocifs-run";
const VARIABLE: &str = "OCIFS_RUN";
/// How long a mount may take to come up, or to go down.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(10);

pub(super) fn run(global: &Global, args: &Run) -> Result<Exit> {
    let program = program()?;
    check(&program)?;
    let typed = Path::new(&args.model);
    if typed.is_dir() {
        return become_runner(&program, typed, args, None);
    }
    if let Some(failure) = no_directory(&args.model) {
        return Err(failure.into());
    }
    let reference: Reference = args.model.parse().map_err(|error| {
        Failure::new(Exit::Usage, format!("{error}"))
            .hint(format!("{} is no directory either", typed.display()))
    })?;
    // What is wrong with the settings is told before anything is mounted.
    context::settings(global, args.reading.values())?;
    let name = reference.to_string();
    // A mount that is there has its own cache and its own way to registries: not what was asked for when these were typed.
    let told = !options(global, &args.reading).is_empty();
    if let Some(found) = mounted(&name).filter(|_| !told) {
        return become_runner(&program, &found, args, Some(&name));
    }
    let mount = OwnMount::start(global, &args.reading)?;
    let model = mount.point.join(&name);
    if let Err(error) = fs::metadata(&model) {
        return Err(unavailable(global, args, &reference, &error));
    }
    let chat = args.generate.is_chat();
    let status = attended(
        &mut command(&program, &model, args, Some(&name)),
        &program,
        chat,
    );
    drop(mount);
    Ok(ended(status?))
}

/// What is a path, and yet no directory, is not looked for in a registry.
fn no_directory(typed: &str) -> Option<Failure> {
    let path = Path::new(typed);
    if path.is_file() {
        let text =
            format!("{typed} is a file; a model is a directory with config.json and its weights");
        return Some(Failure::new(Exit::Usage, text));
    }
    let is_path = ["/", "./", "../", "~"]
        .iter()
        .any(|begin| typed.starts_with(begin));
    is_path.then(|| Failure::new(Exit::NotFound, format!("there is no directory {typed}")))
}

/// `ocifs-run`: the one that is named, else the one beside this program, else one on the PATH.
fn program() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) {
        return Ok(named.into());
    }
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let beside = own.with_file_name(PROGRAM);
    if beside.is_file() {
        return Ok(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(PROGRAM))
        .find(|program| program.is_file());
    found.ok_or_else(|| {
        let text = format!("there is no {PROGRAM} beside {} or on the PATH", own.display());
        let hint = format!("`cargo install ocifs --features runner` builds it, with `--features cuda` for NVIDIA GPUs; {VARIABLE} names another");
        Failure::new(Exit::Failure, text).hint(hint).into()
    })
}

/// Whether it starts at all: one that was built for GPUs does not where the GPUs' libraries are missing, and the loader alone says so.
fn check(program: &Path) -> Result<()> {
    let tried = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let tried = tried.map_err(|error| cannot_start(program, &error))?;
    if tried.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&tried.stderr);
    // The loader names the first library that it misses; asked for all that the program links, it names each.
    let listed = Command::new(program)
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .stdin(Stdio::null())
        .output();
    let listed = listed.map_or_else(|_| Vec::new(), |listed| listed.stdout);
    Err(not_started(program, &said, &String::from_utf8_lossy(&listed)).into())
}

/// Why a program does not start, from what it, or its loader, `said`, and the libraries that the loader `listed`.
fn not_started(program: &Path, said: &str, listed: &str) -> Failure {
    let missing: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.trim().strip_suffix("=> not found"))
        .map(str::trim)
        .collect();
    let program = program.display();
    if !missing.is_empty() {
        let text = format!("{program} does not start: {} missing", are(&missing));
        let hint = "it was built for NVIDIA GPUs and needs their driver and CUDA's libraries (LD_LIBRARY_PATH names a folder with them); \
             one that was built with `--features runner` alone needs none";
        return Failure::new(Exit::Failure, text).hint(hint);
    }
    let text = format!("{program} does not start: {}", said.trim());
    Failure::new(Exit::Failure, text).hint(format!("{VARIABLE} names another"))
}

/// "a is", "a, b and c are".
fn are(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => format!("{one} is"),
        [most @ .., last] => format!("{} and {last} are", most.join(", ")),
    }
}

/// The model in a mount that is there and readable.
fn mounted(name: &str) -> Option<PathBuf> {
    let mounts = mount::mounts().unwrap_or_default();
    mounts
        .into_iter()
        .map(|one| one.path.join(name))
        .find(|path| path.join("config.json").is_file())
}

fn command(program: &Path, model: &Path, args: &Run, name: Option<&str>) -> Command {
    let mut command = Command::new(program);
    command.arg(model).args(args.generate.arguments());
    if let Some(name) = name.filter(|_| args.generate.name.is_none()) {
        command.arg(format!("--name={name}"));
    }
    command
}

/// Runs it in this process's place: there is nothing to do afterwards.
fn become_runner(program: &Path, model: &Path, args: &Run, name: Option<&str>) -> Result<Exit> {
    let error = command(program, model, args, name).exec();
    Err(cannot_start(program, &error))
}

fn cannot_start(program: &Path, error: &io::Error) -> anyhow::Error {
    Failure::new(
        Exit::Failure,
        format!("cannot run {}: {error}", program.display()),
    )
    .into()
}

/// Runs a program to its end, and passes on that it is to stop. Ctrl-C ends an answer of a `chat`, which the terminal itself tells it.
fn attended(command: &mut Command, program: &Path, chat: bool) -> Result<ExitStatus> {
    // It does not outlive this process, whose mount it reads.
    end_with_parent(command);
    let mut child = command
        .spawn()
        .map_err(|error| cannot_start(program, &error))?;
    context::runtime()?.block_on(async move {
        let id = rustix::process::Pid::from_child(&child);
        let mut waiting = tokio::task::spawn_blocking(move || child.wait());
        tokio::select! {
            status = &mut waiting => Ok(status??),
            () = ended_by_signal(chat) => {
                // A terminal has told it already; a second time does no harm.
                let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
                Ok(waiting.await??)
            }
        }
    })
}

/// Done at the first SIGTERM, and unless a chat has its own use for it SIGINT. Must be called inside a runtime.
async fn ended_by_signal(chat: bool) {
    use tokio::signal::unix::{SignalKind, signal};
    if !chat {
        return interrupted().await;
    }
    // With a handler, and nobody who waits for it, SIGINT does nothing to this process.
    let both = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    match both {
        (Ok(_interrupt), Ok(mut terminate)) => _ = terminate.recv().await,
        _ => std::future::pending().await,
    }
}

fn end_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only a system call is made, which takes no memory and no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
            Ok(())
        });
    }
}

/// The runner's end as this program's own.
fn ended(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(0), _) => Exit::Ok,
        (Some(2), _) => Exit::Usage,
        (Some(3), _) => Exit::NotFound,
        (Some(130), _) | (_, Some(2 | 15)) => Exit::Interrupted,
        _ => Exit::Failure,
    }
}

/// Why a model is not in the mount: what the registry said is not in an errno, so it is asked again, here.
fn unavailable(
    global: &Global,
    args: &Run,
    reference: &Reference,
    error: &io::Error,
) -> anyhow::Error {
    let asked = context::looking(global, args.reading.values()).and_then(|settings| {
        context::block_on(async {
            let (models, _) = context::models(&settings)?;
            let digest = models.resolve(reference).await?;
            models
                .inspect_patiently(reference.repository(), &digest)
                .await?;
            models.open(reference.repository(), &digest).await?;
            Ok(())
        })
    });
    match asked {
        Err(error) => error,
        Ok(()) => Failure::new(
            Exit::Failure,
            format!("{reference} cannot be read: {error}"),
        )
        .into(),
    }
}

/// A mount for this run alone. It goes when this is dropped, or this process ends.
struct OwnMount {
    program: PathBuf,
    dir: PathBuf,
    point: PathBuf,
    child: Child,
}

impl OwnMount {
    fn start(global: &Global, reading: &Reading) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let dir = std::env::temp_dir().join(format!("ocifs-run-{}", std::process::id()));
        let made = rustix::fs::mkdir(&dir, rustix::fs::Mode::RWXU);
        made.with_context(|| format!("cannot make {}", dir.display()))?;
        let (point, log) = (dir.join("models"), dir.join("log"));
        let started = fs::create_dir(&point)
            .and_then(|()| fs::File::create(&log))
            .and_then(|log| {
                let mut command = Command::new(&program);
                command
                    .args(["mount", "--foreground"])
                    .args(options(global, reading))
                    .arg(&point);
                command
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(log);
                // Whose service this is hears nothing from the mount, and keeps nothing of it.
                supervise::without_manager(&mut command);
                // Ctrl-C is for the runner; the mount is taken down after it.
                command.process_group(0);
                end_with_parent(&mut command);
                let outside = fs::metadata(&point)?.dev();
                Ok((command.spawn()?, outside))
            });
        let (child, outside) = match started {
            Ok(started) => started,
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                return Err(error).context("cannot start a mount");
            }
        };
        let mut mount = Self {
            program,
            dir,
            point,
            child,
        };
        let start = Instant::now();
        while fs::metadata(&mount.point).map(|meta| meta.dev()).ok() == Some(outside) {
            if mount.child.try_wait()?.is_some() || start.elapsed() > PATIENCE {
                let said = fs::read_to_string(&log).unwrap_or_default();
                let said = said.trim().trim_start_matches("error: ").to_owned();
                return Err(Failure::new(
                    Exit::Failure,
                    format!("the model cannot be mounted: {said}"),
                )
                .into());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(mount)
    }
}

impl Drop for OwnMount {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if start.elapsed() > PATIENCE {
                let _ = Command::new(&self.program)
                    .args(["umount", "--force"])
                    .arg(&self.point)
                    .status();
                let _ = self.child.kill();
                let _ = self.child.wait();
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        // Never through a mount that is still there: an empty directory can be removed, a mount point cannot.
        if fs::remove_dir(&self.point).is_ok() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// What was typed, for the mount.
fn options(global: &Global, reading: &Reading) -> Vec<OsString> {
    let mut all: Vec<OsString> = Vec::new();
    for (setting, values, _) in reading.values().given() {
        all.extend(
            values
                .iter()
                .map(|value| format!("--{}={value}", setting.name).into()),
        );
    }
    if let Some(file) = &global.config {
        all.push("--config".into());
        all.push(file.into());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_that_is_missing_is_named() {
        let said = "/x/ocifs-run: error while loading shared libraries: libcuda.so.1: cannot open shared object file";
        let listed = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibcuda.so.1 => not found\n\tlibcublas.so.13 => not found\n\
                      \tlibcurand.so.10 => /lib/libcurand.so.10 (0x00007f)\n\tlibcudart.so.13 => not found\n";
        let failure = not_started(Path::new("/x/ocifs-run"), said, listed);
        assert_eq!(
            failure.message,
            "/x/ocifs-run does not start: libcuda.so.1, libcublas.so.13 and libcudart.so.13 are missing"
        );
        assert!(failure.hint.unwrap().contains("LD_LIBRARY_PATH"));
        let failure = not_started(Path::new("/x/y"), "", "\tlibcuda.so.1 => not found\n");
        assert!(failure.message.ends_with("libcuda.so.1 is missing"));
        let failure = not_started(Path::new("/x/y"), "no such option\n", "");
        assert_eq!(failure.message, "/x/y does not start: no such option");
    }

    #[test]
    fn a_path_is_not_taken_for_a_reference() {
        let said = |typed| no_directory(typed).map(|failure| failure.message);
        assert!(said("/nowhere/at/all").unwrap().contains("no directory"));
        assert!(said("./nowhere").unwrap().contains("no directory"));
        assert!(said("Cargo.toml").unwrap().contains("is a file"));
        assert_eq!(said("ghcr.io/org/model:v1"), None);
        assert_eq!(said("model"), None);
    }
}
