//! Settings: flag, then `OCIFS_*`, then configuration file, then default; checked once, then immutable.
//!
//! Every setting has one row in [`SETTINGS`]; flags, environment variables, file keys, `-o` options, completions and manual pages
//! are made from it. Values stay text with their origin until [`Settings::resolve`] reads them, so
//! that a mistake is reported with the place that it was made in.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::blob::BlobConfig;
use crate::model::{Access, ModelConfig, Pattern, Platform};
use crate::registry::{RegistryConfig, default_auth_files};

mod file;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod nearest;
mod parse;
mod table;
#[cfg(test)]
mod tests;

pub use nearest::nearest;
pub use parse::duration;
use parse::{
    address, cache_size, connections, http_version, id, log_filter, log_format, memory, positive,
    prefetch, split, strict, umask, yes_or_no,
};
pub use table::{Group, SETTINGS, Scope, Setting, Takes};

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On the command line, as this flag.
    Flag(String),
    /// On the command line, in `-o`.
    Option(String),
    /// In this environment variable.
    Variable(String),
    /// In a file, on a line counted from one.
    File(PathBuf, usize),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => write!(f, "--{name}"),
            Self::Option(name) => write!(f, "-o {name}"),
            Self::Variable(name) => f.write_str(name),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
        }
    }
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value that is none.
    #[error("{origin}: {reason}")]
    Value {
        /// Where it stands.
        origin: Origin,
        /// What is wrong.
        reason: String,
    },
    /// A configuration file that cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: std::io::Error,
    },
    /// A configuration file that is no TOML.
    #[error("{}:{line}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is no home directory to keep a cache in.
    #[error("no place for the cache: neither XDG_CACHE_HOME nor HOME is set; give --cache-dir DIR")]
    NoHome,
}

/// Values by setting name, each with its origin. The first that is given wins.
#[derive(Clone, Debug, Default)]
pub struct Values(BTreeMap<&'static str, (Vec<String>, Origin)>);

impl Values {
    /// Gives a setting these values, unless one of higher rank has given it already.
    pub fn give(&mut self, setting: &'static Setting, values: Vec<String>, origin: Origin) {
        self.0.entry(setting.name).or_insert((values, origin));
    }

    /// Adds what a mount option says: `name`, `name=value`, with `_` for `-` where one likes.
    ///
    /// # Errors
    /// When no setting has this name; the nearest one is named.
    pub fn option(&mut self, text: &str) -> Result<(), ConfigError> {
        let (name, value) = text
            .split_once('=')
            .map_or((text, None), |(name, value)| (name, Some(value)));
        let wanted = name.replace('_', "-");
        let origin = Origin::Option(name.to_owned());
        let refuse = |reason: String| ConfigError::Value {
            origin: Origin::Option(name.to_owned()),
            reason,
        };
        let Some(setting) = Setting::named(&wanted) else {
            let known = SETTINGS
                .iter()
                .map(|setting| setting.name)
                .chain(STANDARD_OPTIONS.iter().copied());
            let hint = nearest(&wanted, known)
                .map(|near| format!("; did you mean `{near}`?"))
                .unwrap_or_default();
            return Err(refuse(format!("there is no such mount option{hint}")));
        };
        let values = match value {
            None if setting.takes == Takes::Switch => vec!["true".to_owned()],
            None => return Err(refuse(format!("needs a value: {wanted}=VALUE"))),
            Some(value) if setting.many => split(value),
            Some(value) => vec![value.to_owned()],
        };
        self.give(setting, values, origin);
        Ok(())
    }
}

/// Options of mount(8) that say nothing to ocifs, or what holds anyway. `rw` is among them because mount(8) passes
/// it when nothing else was asked for; the mount is read-only whatever is given.
pub const STANDARD_OPTIONS: &[&str] = &[
    "ro",
    "rw",
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "exec",
    "noexec",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "async",
    "sync",
    "default_permissions",
];

/// Splits the argument of `-o` and drops what is for mount(8) alone.
pub fn mount_options(argument: &str) -> impl Iterator<Item = &str> {
    argument.split(',').map(str::trim).filter(|option| {
        !option.is_empty()
            && !STANDARD_OPTIONS.contains(option)
            && !["x-", "X-", "comment="]
                .iter()
                .any(|prefix| option.starts_with(prefix))
    })
}

/// How log messages look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// [`Journal`](Self::Journal) where stderr is the journal, else [`Text`](Self::Text).
    #[default]
    Auto,
    /// A line of text each.
    Text,
    /// A JSON document on a line each.
    Json,
    /// Datagrams to systemd's journal, each value a field.
    Journal,
}

/// Everything that ocifs can be told, resolved.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What was given, and where.
    pub given: Values,
    /// The cache's directory, absolute.
    pub cache_dir: PathBuf,
    /// Whether the kernel may read sealed blobs without the daemon.
    pub passthrough: bool,
    /// Whether to mount on a directory that holds something.
    pub nonempty: bool,
    /// Where control sockets of mounts are, absolute.
    pub runtime_dir: PathBuf,
    /// The cache's limit in bytes; `None`: measure the file system when the cache is opened.
    pub cache_size: Option<u64>,
    /// Memory for bytes under way; `None`: a share of what there is.
    pub memory: Option<u64>,
    /// Whether other users may read the mount.
    pub allow_other: bool,
    /// What is logged, as tracing's filters say it; `None`: by the command.
    pub log: Option<String>,
    /// How log messages look.
    pub log_format: LogFormat,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// The owner that is shown; `None`: who mounts.
    pub uid: Option<u32>,
    /// The group that is shown; `None`: that of who mounts.
    pub gid: Option<u32>,
    /// Permission bits that are taken away from what is shown, at most `0o777`.
    pub umask: u16,
    /// For the registry client.
    pub registry: RegistryConfig,
    /// The credential file that a login is written to; `None` without a home.
    pub login_file: Option<PathBuf>,
    /// For lazy blobs.
    pub blob: BlobConfig,
    /// For models.
    pub model: ModelConfig,
}

/// What the process was started in: read here once, so that tests can give another.
pub struct Surroundings<'a> {
    /// Looks up an environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// The effective user; 0 is root.
    pub user: u32,
    /// The current directory.
    pub directory: PathBuf,
    /// The system's configuration file.
    pub system_file: PathBuf,
}

impl fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

impl Surroundings<'static> {
    /// Those of this process.
    pub fn of_process() -> Self {
        Self {
            variable: &|name| std::env::var_os(name),
            user: rustix::process::geteuid().as_raw(),
            directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            system_file: PathBuf::from("/etc/ocifs/config.toml"),
        }
    }
}

impl Surroundings<'_> {
    fn path(&self, variable: &str) -> Option<PathBuf> {
        (self.variable)(variable)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    }

    /// A directory of the user's by its variable, else below HOME.
    fn user_dir(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        let own = self.path(variable).filter(|path| path.is_absolute());
        own.or_else(|| Some(self.path("HOME")?.join(below_home)))
    }

    /// /run for root; for others the directory that the session gave them, else one of their own in /tmp, which
    /// the mount makes for them alone.
    fn runtime_dir(&self) -> PathBuf {
        if self.user == 0 {
            return PathBuf::from("/run/ocifs");
        }
        let given = self
            .path("XDG_RUNTIME_DIR")
            .filter(|path| path.is_absolute());
        given.map_or_else(
            || PathBuf::from(format!("/tmp/ocifs-{}", self.user)),
            |dir| dir.join("ocifs"),
        )
    }

    fn cache_dir(&self) -> Result<PathBuf, ConfigError> {
        if self.user == 0 {
            return Ok(PathBuf::from("/var/cache/ocifs"));
        }
        let dir = self
            .user_dir("XDG_CACHE_HOME", ".cache")
            .ok_or(ConfigError::NoHome)?;
        Ok(dir.join("ocifs"))
    }
}

impl Values {
    /// Adds what the environment and the configuration files say.
    ///
    /// `config` is the file that `--config` names; it is then the only one, and has to exist.
    ///
    /// # Errors
    /// When a file is no configuration or has a key that is no setting's; the message names the place.
    fn joined(
        mut self,
        config: Option<&Path>,
        surroundings: &Surroundings<'_>,
    ) -> Result<Self, ConfigError> {
        let values = &mut self;
        for setting in SETTINGS {
            let variable = setting.variable();
            let Some(value) = (surroundings.variable)(&variable).filter(|value| !value.is_empty())
            else {
                continue;
            };
            let origin = Origin::Variable(variable);
            let Some(value) = value.to_str() else {
                return Err(ConfigError::Value {
                    origin,
                    reason: "is not UTF-8".to_owned(),
                });
            };
            let list = if setting.many {
                split(value)
            } else {
                vec![value.to_owned()]
            };
            values.give(setting, list, origin);
        }
        let named = config
            .map(Path::to_owned)
            .or_else(|| surroundings.path("OCIFS_CONFIG"));
        match named {
            Some(path) => file::read(&path, values)?,
            None => {
                let user = surroundings.user_dir("XDG_CONFIG_HOME", ".config");
                let user = user.map(|dir| dir.join("ocifs/config.toml"));
                for path in user.iter().chain([&surroundings.system_file]) {
                    match file::read(path, values) {
                        Err(ConfigError::Read { source, .. }) if is_absent(&source) => {}
                        result => result?,
                    }
                }
            }
        }
        Ok(self)
    }
}

impl Settings {
    /// Joins what was typed with the environment, the configuration files and the defaults.
    ///
    /// `config` is the file that `--config` names; it is then the only one, and has to exist.
    ///
    /// # Errors
    /// When a value cannot be read, or a file is no configuration; the message names the place.
    pub fn resolve(
        typed: Values,
        config: Option<&Path>,
        surroundings: &Surroundings<'_>,
    ) -> Result<Self, ConfigError> {
        let values = typed.joined(config, surroundings)?;
        let cache_dir = match values.0.get("cache-dir") {
            Some((dir, _)) => surroundings.directory.join(&dir[0]),
            None => surroundings.cache_dir()?,
        };
        let runtime_dir = match values.0.get("runtime-dir") {
            Some((dir, _)) => surroundings.directory.join(&dir[0]),
            None => surroundings.runtime_dir(),
        };
        let plain_http = values.list("plain-http").unwrap_or_default();
        if let Some(wrong) = plain_http.iter().find(|host| host.contains('/')) {
            return Err(values.refuse(
                "plain-http",
                format!("`{wrong}` is no host; write HOST or HOST:PORT"),
            ));
        }
        // Typed by hand it must be there. The default ones, and those of a file, may come with a later login.
        if let Some((files, Origin::Flag(_))) = values.0.get("auth-file") {
            let absent = |file: &&String| !surroundings.directory.join(file).exists();
            if let Some(file) = files.iter().find(absent) {
                return Err(values.refuse("auth-file", format!("there is no file {file}")));
            }
        }
        if let Some((dirs, Origin::Flag(_))) = values.0.get("hosts-dir") {
            let is_dir = |dir: &String| surroundings.directory.join(dir).is_dir();
            if let Some(dir) = dirs.iter().find(|dir| !is_dir(dir)) {
                return Err(values.refuse("hosts-dir", format!("there is no directory {dir}")));
            }
        }
        let seconds = Duration::from_secs;
        let paths = |name: &str| {
            let list = values.list(name)?;
            Some(
                list.into_iter()
                    .map(|path| surroundings.directory.join(path))
                    .collect::<Vec<_>>(),
            )
        };
        // The first that was named; else docker's, which podman reads too.
        let login_file = paths("auth-file")
            .and_then(|files| files.into_iter().next())
            .or_else(|| surroundings.path("REGISTRY_AUTH_FILE"))
            .or_else(|| {
                let dir = surroundings.path("DOCKER_CONFIG");
                let dir = dir.or_else(|| Some(surroundings.path("HOME")?.join(".docker")))?;
                Some(dir.join("config.json"))
            });
        Ok(Self {
            cache_dir,
            login_file,
            passthrough: values.read("passthrough", yes_or_no)?.unwrap_or(true),
            nonempty: values.read("nonempty", yes_or_no)?.unwrap_or(false),
            runtime_dir,
            cache_size: values.read("cache-size", cache_size)?,
            memory: values.read("memory", memory)?,
            allow_other: values.read("allow-other", yes_or_no)?.unwrap_or(false),
            log: values.read("log", log_filter)?,
            log_format: values.read("log-format", log_format)?.unwrap_or_default(),
            metrics: values.read("metrics", address)?,
            uid: values.read("uid", id)?,
            gid: values.read("gid", id)?,
            umask: values.read("umask", umask)?.unwrap_or(0),
            registry: RegistryConfig {
                plain_http,
                ca_files: paths("ca-file").unwrap_or_default(),
                auth_files: Some(
                    paths("auth-file").unwrap_or_else(|| default_auth_files(surroundings.variable)),
                ),
                hosts_dir: paths("hosts-dir").and_then(|dirs| dirs.into_iter().next()),
                connect_timeout: values
                    .read("connect-timeout", positive)?
                    .unwrap_or(seconds(10)),
                stall_timeout: values
                    .read("stall-timeout", positive)?
                    .unwrap_or(seconds(30)),
                http: values.read("http", http_version)?.unwrap_or_default(),
                max_connections: values
                    .read("max-connections", connections)?
                    .unwrap_or(RegistryConfig::MOST_CONNECTIONS),
            },
            blob: BlobConfig {
                prefetch: values.read("prefetch", prefetch)?.unwrap_or_default(),
                read_timeout: values
                    .read("read-timeout", positive)?
                    .unwrap_or(seconds(300)),
                offline: values.read("offline", yes_or_no)?.unwrap_or(false),
                strict: values.read("verify", strict)?.unwrap_or(false),
                ..BlobConfig::default()
            },
            model: ModelConfig {
                tag_ttl: values
                    .read("tag-ttl", duration)?
                    .unwrap_or(seconds(15 * 60)),
                metadata_timeout: values
                    .read("metadata-timeout", positive)?
                    .unwrap_or(seconds(20)),
                platform: values
                    .read("platform", Platform::asked)?
                    .unwrap_or_default(),
                access: Access {
                    allow: values.read_all("allow")?,
                    deny: values.read_all("deny")?,
                },
            },
            given: values,
        })
    }
}

impl Values {
    /// What is given, in the order of the table.
    pub fn given(&self) -> impl Iterator<Item = (&'static Setting, &[String], &Origin)> {
        SETTINGS.iter().filter_map(|setting| {
            let (values, origin) = self.0.get(setting.name)?;
            Some((setting, values.as_slice(), origin))
        })
    }

    fn refuse(&self, name: &str, reason: String) -> ConfigError {
        let origin = self.0.get(name).map(|(_, origin)| origin.clone());
        ConfigError::Value {
            origin: origin.unwrap_or_else(|| Origin::Flag(name.to_owned())),
            reason,
        }
    }

    fn read<T>(
        &self,
        name: &str,
        parse: fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let Some((values, origin)) = self.0.get(name) else {
            return Ok(None);
        };
        let text = values.first().map_or("", String::as_str);
        let parsed = parse(text.trim());
        parsed.map(Some).map_err(|reason| ConfigError::Value {
            origin: origin.clone(),
            reason,
        })
    }

    fn read_all(&self, name: &str) -> Result<Vec<Pattern>, ConfigError> {
        let Some((values, origin)) = self.0.get(name) else {
            return Ok(Vec::new());
        };
        let parsed = values.iter().map(|text| text.trim().parse());
        let parsed: Result<_, _> = parsed.collect();
        parsed.map_err(|reason| ConfigError::Value {
            origin: origin.clone(),
            reason,
        })
    }

    fn list(&self, name: &str) -> Option<Vec<String>> {
        self.0.get(name).map(|(values, _)| values.clone())
    }
}

/// ENOENT, and a directory on the way that we may not search or that is a file.
fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}
