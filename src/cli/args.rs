//! What may be typed: subcommands, flags and their help. Nothing is read or resolved here.

// The comments on fields are help texts, in which `[:TAG]` and `[default: 5m]` are no links.
#![allow(rustdoc::broken_intra_doc_links)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};

use super::exit;
use super::generate::Generate;
use super::typed::Typed;
use crate::base::ByteSize;
use crate::config::{ConfigError, Scope, Values};
use crate::pack::Timestamp;

/// Mounts AI models in OCI registries as ordinary directories: lazy, verified, cached.
#[derive(Debug, Parser)]
#[command(
    name = "ocifs",
    version,
    max_term_width = 110,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Start with `ocifs demo`, which shows everything on this machine alone.\n\
                  `ocifs help COMMAND` has examples; `ocifs --help` lists exit codes and settings.",
    after_long_help = exit::HELP
)]
pub struct Cli {
    /// What every command understands.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command understands.
#[derive(Clone, Debug, Default, Args)]
pub struct Global {
    /// Read settings from FILE alone, instead of ~/.config/ocifs/config.toml and then /etc/ocifs/config.toml.
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath, display_order = 900)]
    pub config: Option<PathBuf>,
    /// Say more on stderr: once what is done, twice every request. (OCIFS_LOG takes tracing's filters.)
    #[arg(short, long, global = true, action = ArgAction::Count, display_order = 901)]
    pub verbose: u8,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show registries as a directory tree.
    Mount(Mount),
    /// Take a mount down.
    #[command(visible_alias = "unmount")]
    Umount(Umount),
    /// Show the mounts, how full the cache is, and what is being fetched.
    Status(Status),
    /// List a model's files without mounting or downloading it.
    Ls(Ls),
    /// Tell what an artifact is: packaging, config, layers, files, tensors.
    Inspect(Inspect),
    /// Download models into the cache ahead of use, verified.
    Pull(Pull),
    /// Package a model directory and upload it, or write it to an OCI layout.
    Push(Push),
    /// Let another process of the installed program go on with a mount, under its readers.
    Restart(Restart),
    /// Have mounts log more or less from now on.
    Log(Log),
    /// Ask the registry again what a tag points at, for every mount.
    Refresh(Refresh),
    /// Serve an OCI layout, or the cache, as a read-only registry.
    Serve(Serve),
    /// Prove a login to a registry and keep it where docker and podman find it.
    Login(Login),
    /// Forget a registry's login.
    Logout(Logout),
    /// Look into the cache, make room in it, check it.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Print every setting that is in force, and where its value comes from.
    Config(Config),
    /// Let a model speak: from a reference, or a directory, to text.
    Run(Box<Run>),
    /// Print a shell's completions.
    Completions(Completions),
    /// Print a manual page, or write all of them.
    Man(Man),
    /// See the whole of it in under a minute: make, package, serve, mount and read a model.
    Demo(Demo),
}

/// The flags of commands that use the cache alone.
pub type CacheArgs = Typed<{ Scope::CACHE }>;
/// The flags of commands that talk with a registry, beside credentials.
pub type ReachArgs = Typed<{ Scope::REACH }>;
/// The flags of commands that talk with a registry.
pub type RegistryArgs = Typed<{ Scope::REGISTRY }>;
/// The flags of commands that read models.
pub type Reading = Typed<{ Scope::READING }>;

/// `ocifs mount`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs mount /models\n  \
    ls /models/ghcr.io/org/model:v1          names are resolved when they are looked up\n  \
    vllm serve /models/docker.io/ai/smollm2:latest\n  \
    ocifs mount /models --plain-http registry.lan:5000 --cache-size 200G --allow-other\n  \
    ocifs mount /models -o ro,_netdev,allow_other,cache-size=200G        as in /etc/fstab\n  \
    ocifs mount /models --allow-other -o gid=1234,umask=027              for one group alone\n\n\
    Returns when the mount is up; `ocifs umount /models` takes it down, `ocifs status` tells how it is.")]
pub struct Mount {
    /// The second process of a mount that goes to the background.
    #[arg(long, hide = true)]
    pub detached: bool,
    /// What the mount table shows as the source.
    #[arg(long, hide = true, value_name = "NAME")]
    pub source: Option<String>,
    /// Check everything and mount nothing: mount(8)'s -f.
    #[arg(long, hide = true)]
    pub fake: bool,
    /// An empty directory to mount on.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub mountpoint: PathBuf,
    /// Make the mount point if it is missing.
    #[arg(long)]
    pub mkdir: bool,
    /// Stay in the foreground and log to stderr; Ctrl-C unmounts.
    #[arg(long, short)]
    pub foreground: bool,
    /// Mount options as mount(8) passes them, comma-separated: ro, _netdev, nofail, x-*, and every setting by its
    /// long name (cache-size=20G). Flags win over them.
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Every setting.
    #[command(flatten)]
    pub settings: Typed<{ Scope::MOUNT }>,
}

impl Mount {
    /// What was typed, by setting: flags first, then `-o`.
    ///
    /// # Errors
    /// When `-o` has an option that is not known.
    pub fn values(&self) -> Result<Values, ConfigError> {
        self.settings.with_options(&self.options)
    }
}

/// `ocifs umount`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs umount /models\n  \
    ocifs umount --lazy /models      away from the tree now, gone when the last file is closed\n\n\
    A mount in use is busy (exit code 7): `fuser -vm /models` lists who uses it.")]
pub struct Umount {
    /// The mount.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub mountpoint: PathBuf,
    /// Take it out of the tree at once, and down when nobody uses it any more.
    #[arg(long, short)]
    pub lazy: bool,
    /// End it though it is in use: reads in flight and later ones fail.
    #[arg(long, short)]
    pub force: bool,
}

/// `ocifs status`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs status\n  \
    ocifs status --watch /models         how fast what comes; Ctrl-C ends it\n  \
    ocifs status --json | jq '.mounts[].models[] | {reference, cached, size}'")]
pub struct Status {
    /// Show this mount alone. [default: all of them]
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub mountpoint: Option<PathBuf>,
    /// Show it again every TIME, with rates and what is still to come, until Ctrl-C. [default: 1s]
    #[arg(long, short, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "1s",
        value_parser = pause, conflicts_with = "json")]
    pub watch: Option<Duration>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// A pause between two looks.
fn pause(text: &str) -> Result<Duration, String> {
    let pause = crate::config::duration(text)?;
    match pause < Duration::from_millis(100) {
        true => Err("is too short; give at least 100ms".to_owned()),
        false => Ok(pause),
    }
}

/// `ocifs restart`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs restart               after an upgrade: every mount, with the settings it was made with\n  \
    ocifs restart /models\n\n\
    Who reads or opens something meanwhile waits for a moment; nothing fails and nothing is read again. Configuration \
    files are read anew. Not for mounts with --foreground outside of a service.")]
pub struct Restart {
    /// This mount alone. [default: all of them]
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub mountpoint: Option<PathBuf>,
    /// Return when the process that serves now has ended, without waiting for the next one. For service managers, which start the
    /// next one only then.
    #[arg(long)]
    pub no_wait: bool,
}

/// `ocifs log`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs log debug                          every request to a registry, every eviction\n  \
    ocifs log warn,ocifs::registry=trace /models\n  \
    ocifs log                                as the mount was started\n\n\
    Lasts until the mount ends or another process goes on with it.")]
pub struct Log {
    /// error, warn, info, debug, trace, or tracing's filters by module. [default: what the mount was started with]
    #[arg(value_name = "FILTER")]
    pub filter: Option<String>,
    /// This mount alone. [default: all of them]
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub mountpoint: Option<PathBuf>,
}

/// `ocifs ls`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs ls ai/smollm2                      short names are Docker Hub's, as everywhere in OCI\n  \
    ocifs ls ghcr.io/org/model:v1 text_encoder")]
pub struct Ls {
    /// The model: [HOST/]REPOSITORY[:TAG][@DIGEST].
    #[arg(value_name = "REF")]
    pub reference: String,
    /// A file or folder in it.
    #[arg(value_name = "PATH")]
    pub path: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Cache and registries.
    #[command(flatten)]
    pub reading: Reading,
}

/// `ocifs inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs inspect ghcr.io/org/model:v1\n  \
    ocifs inspect ghcr.io/org/model:v1 model-00001-of-00002.safetensors      the tensors of one file\n  \
    ocifs inspect ghcr.io/org/model:v1 --tensors --json | jq '.files[].tensors[].name'\n\n\
    Tensors are read from a safetensors file's header: a few kilobytes, whatever the file's size.")]
pub struct Inspect {
    /// The model: [HOST/]REPOSITORY[:TAG][@DIGEST].
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Show the tensors of this safetensors file alone.
    #[arg(value_name = "FILE")]
    pub file: Option<String>,
    /// List the tensors of every safetensors file.
    #[arg(long)]
    pub tensors: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Cache and registries.
    #[command(flatten)]
    pub reading: Reading,
}

/// `ocifs run`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs run ghcr.io/org/model:v1 -p 'Why is the sky blue?'\n  \
    ocifs run ghcr.io/org/model:v1\n  \
    ocifs run /models/ghcr.io/org/model:v1 --listen 127.0.0.1:8000\n\n\
A reference is read through a mount that is there already, else (and with options for the cache or registries) \
through one of its own that goes when the run ends.\n\
Text goes to stdout, figures to stderr.")]
pub struct Run {
    /// The model: a directory, or [HOST/]REPOSITORY[:TAG][@DIGEST].
    #[arg(value_name = "REF|DIR")]
    pub model: String,
    /// What to do with it.
    #[command(flatten)]
    pub generate: Generate,
    /// Cache and registries.
    #[command(flatten)]
    pub reading: Reading,
}

/// `ocifs pull`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs pull ghcr.io/org/model:v1\n  \
    ocifs pull ai/smollm2 --json | jq -r .[0].digest\n\n\
    What was fetched stays when it is interrupted; the next pull, or a mount, goes on from there.")]
pub struct Pull {
    /// The models: [HOST/]REPOSITORY[:TAG][@DIGEST].
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<String>,
    /// Blobs fetched at the same time, each over several connections.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub jobs: u8,
    /// Print a summary as JSON.
    #[arg(long)]
    pub json: bool,
    /// Cache and registries.
    #[command(flatten)]
    pub reading: Reading,
}

/// A packaging convention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Docker's current one (model config v0.2): each file a layer, folders kept.
    #[default]
    Docker,
    /// Docker's former one (model config v0.1): weights as layers, all else in one tar.
    #[value(name = "docker-v0.1")]
    DockerV01,
    /// CNCF ModelPack with raw layers.
    Modelpack,
}

/// `ocifs push`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs push ./Llama-3.2-1B ghcr.io/org/llama:1b\n  \
    ocifs push ./Llama-3.2-1B localhost:5000/llama:1b --format modelpack\n  \
    ocifs push ./Llama-3.2-1B oci:./layout:llama-1b      an OCI layout, to copy or `ocifs serve`\n\n\
    Blobs that the registry has are not sent again. The digest depends on file names and contents alone (and on \
    --created): the same directory has the same digest everywhere.")]
pub struct Push {
    /// The directory with config.json, weights, tokenizer.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
    /// Where to: [HOST/]REPOSITORY[:TAG], or oci:LAYOUT[:NAME].
    #[arg(value_name = "REF")]
    pub target: String,
    /// The packaging convention.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: Format,
    /// Write TIME (2026-01-31T12:00:00Z, @SECONDS, now) into the artifact as its creation time.
    /// [default: SOURCE_DATE_EPOCH where it is set, else none]
    #[arg(long, value_name = "TIME")]
    pub created: Option<Timestamp>,
    /// With docker-v0.1: give layers no names, as packagers before November 2025 did.
    #[arg(long, hide = true)]
    pub nameless: bool,
    /// Print a summary as JSON.
    #[arg(long)]
    pub json: bool,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// `ocifs refresh`.
#[derive(Debug, Args)]
#[command(
    after_help = "A tag that moved is shown anew at once where nothing below it is open; files that are open keep \
    what they show."
)]
pub struct Refresh {
    /// The model: [HOST/]REPOSITORY[:TAG].
    #[arg(value_name = "REF")]
    pub reference: String,
    /// In this mount alone. [default: in all of them]
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub mountpoint: Option<PathBuf>,
}

/// `ocifs serve`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs serve ~/.cache/ocifs                       what this machine has, for its neighbours\n  \
    ocifs serve ./layout --listen 0.0.0.0:5000\n\n\
    An entry of index.json named host/repo:tag is served as repo:tag and as host/repo:tag, repo:tag as itself, and a \
    bare tag under any repository. Everybody who can connect can read everything. There is no TLS: put a proxy in \
    front of it, or use it on loopback.")]
pub struct Serve {
    /// The OCI layout directory.
    #[arg(value_name = "LAYOUT", value_hint = ValueHint::DirPath)]
    pub layout: PathBuf,
    /// The address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:5000")]
    pub listen: SocketAddr,
}

/// `ocifs login`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs login ghcr.io                      asks for the user and the password\n  \
    ocifs login -u alice --password-stdin registry.lan:5000 <token.txt\n  \
    ocifs login                              Docker Hub\n\n\
    The registry is asked first; a login that it refuses is not kept. What is kept is what `docker login` and `podman login` \
    keep: with the credential helper that the file names, else in the file itself (mode 0600, not encrypted).")]
pub struct Login {
    /// The registry: HOST[:PORT], with podman also a namespace of it (quay.io/org). [default: docker.io]
    #[arg(value_name = "HOST")]
    pub host: Option<String>,
    /// The user's name; `<token>` for an identity token. [default: asked for]
    #[arg(long, short, value_name = "USER")]
    pub username: Option<String>,
    /// Read the password, or an access token in its place, from stdin. [default: asked for, not shown]
    #[arg(long)]
    pub password_stdin: bool,
    /// Keep it in FILE. [default: $REGISTRY_AUTH_FILE, else $DOCKER_CONFIG/config.json, else ~/.docker/config.json]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub auth_file: Option<PathBuf>,
    /// How to reach the registry.
    #[command(flatten)]
    pub reach: ReachArgs,
}

/// `ocifs logout`.
#[derive(Debug, Args)]
pub struct Logout {
    /// The registry, as it was given to `login`. [default: docker.io]
    #[arg(value_name = "HOST")]
    pub host: Option<String>,
    /// Forget the login in FILE. [default: where `ocifs login` keeps it]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub auth_file: Option<PathBuf>,
}

/// `ocifs cache …`.
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// List what is cached.
    Ls {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// The cache.
        #[command(flatten)]
        cache: CacheArgs,
    },
    /// Remove blobs, or all that a model has for itself alone. What is open stays.
    Rm {
        /// Blob digests (sha256:…) or models.
        #[arg(value_name = "DIGEST|REF", required = true)]
        what: Vec<String>,
        /// The cache.
        #[command(flatten)]
        cache: CacheArgs,
    },
    /// Remove what was used least recently until the cache is small enough.
    Gc {
        /// Until it allocates at most SIZE (20G). [default: its limit]
        #[arg(long, value_name = "SIZE")]
        to: Option<ByteSize>,
        /// The cache.
        #[command(flatten)]
        cache: CacheArgs,
    },
    /// Compute every blob's digest again; what is wrong is removed (exit code 6).
    Verify {
        /// The cache.
        #[command(flatten)]
        cache: CacheArgs,
    },
}

/// `ocifs config`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs config                              what `ocifs mount` would work with, here and now\n  \
    ocifs config --of /models                 what the mount that runs works with\n  \
    ocifs config --template | sudo tee /etc/ocifs/config.toml    a file to start from\n\n\
    Flags win over variables (OCIFS_CACHE_SIZE=200G), these over files, the user's file over the system's.")]
pub struct Config {
    /// What the mount at MOUNTPOINT works with.
    #[arg(long, value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath, conflicts_with = "template")]
    pub of: Option<PathBuf>,
    /// Print a configuration file in which every setting is explained and none is set.
    #[arg(long, conflicts_with = "json")]
    pub template: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Mount options, as `mount` takes them.
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Every setting.
    #[command(flatten)]
    pub settings: Typed<{ Scope::MOUNT }>,
}

/// `ocifs completions`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs completions bash >/etc/bash_completion.d/ocifs\n  \
    ocifs completions zsh >\"${fpath[1]}/_ocifs\"\n  \
    ocifs completions fish >~/.config/fish/completions/ocifs.fish")]
pub struct Completions {
    /// The shell.
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// `ocifs man`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ocifs man mount | man -l -\n  \
    ocifs man --dir /usr/local/share/man      man1/ocifs.1, man1/ocifs-mount.1, …, man5/ocifs.toml.5")]
pub struct Man {
    /// The page: a command's, `ocifs`, or `ocifs.toml`.
    #[arg(value_name = "PAGE", default_value = "ocifs")]
    pub page: String,
    /// Write every page below DIR.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "page")]
    pub dir: Option<PathBuf>,
}

/// `ocifs demo`.
#[derive(Debug, Args)]
#[command(
    after_help = "Needs /dev/fuse, and about three times SIZE in TMPDIR (/tmp) while it runs. Nothing leaves this machine, and \
    nothing is left behind."
)]
pub struct Demo {
    /// Make a model of about SIZE.
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub size: ByteSize,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_table_of_arguments_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_and_mount_options_reach_their_settings() {
        let line = "ocifs mount /m --cache-size 1G --plain-http a:1 --plain-http b -o rw,offline,cache_size=2G,tag-ttl=0";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Command::Mount(mount) = cli.command else {
            panic!()
        };
        let values = mount.values().unwrap();
        let surroundings = crate::config::Surroundings {
            variable: &|name| (name == "HOME").then(|| "/home/x".into()),
            user: 1000,
            directory: "/".into(),
            system_file: "/nonexistent".into(),
        };
        let settings = crate::config::Settings::resolve(values, None, &surroundings).unwrap();
        assert_eq!(settings.cache_size, Some(1 << 30), "the flag wins");
        assert_eq!(settings.registry.plain_http, ["a:1", "b"]);
        assert!(settings.blob.offline && settings.model.tag_ttl.is_zero());
    }

    #[test]
    fn help_of_every_command_fits_a_terminal_and_has_no_holes() {
        let mut root = Cli::command();
        root.build();
        let mut commands = vec![root];
        while let Some(mut command) = commands.pop() {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Usage:"), "{help}");
            for line in help.lines() {
                assert!(
                    line.chars().count() <= 120,
                    "{}: {line}",
                    command.get_name()
                );
            }
            // What is behind the options is broken by the terminal's width alone, and examples are not broken at all.
            let notes = command.get_after_help().map(ToString::to_string);
            let notes = notes.unwrap_or_default();
            for (line, next) in notes.lines().zip(notes.lines().skip(1).chain([""])) {
                let example = line.starts_with("  ");
                assert!(!example || line.chars().count() <= 100, "{line}");
                let ends = next.is_empty() || next.starts_with("  ") || line.ends_with('.');
                assert!(example || line.is_empty() || ends, "{line}");
            }
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    argument.get_id()
                );
            }
            commands.extend(
                command
                    .get_subcommands()
                    .filter(|sub| sub.get_name() != "help")
                    .cloned(),
            );
        }
    }
}
