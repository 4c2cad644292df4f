//! The table of settings. Whatever is said about a setting anywhere (a flag and its help, a variable, a key of the file, a mount
//! option, completions, ocifs.toml(5)) is said here once.

/// What the value of a setting is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Yes or no; as a flag or an `-o` option without a value it means yes.
    Switch,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A number of bytes: `20G`, `512MiB`.
    Size,
    /// A duration: `90s`, `15m`, `1h30m`.
    Time,
    /// A directory's path.
    Dir,
    /// A file's path.
    File,
    /// A text that help shows under this name.
    Text(&'static str),
}

/// What a setting is about: its heading in help and manual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Where blobs are kept.
    Cache,
    /// How to reach registries.
    Registry,
    /// As whom.
    Credentials,
    /// What every command that reads models wants to know.
    Reading,
    /// What a mount fetches, and when.
    Fetching,
    /// Who may read a mount, and what it shows them.
    Access,
    /// How a mount sits in the system.
    System,
    /// What a mount tells about itself.
    Watching,
}

impl Group {
    /// The heading.
    pub fn heading(self) -> &'static str {
        match self {
            Self::Cache => "Cache",
            Self::Registry | Self::Credentials | Self::Reading => "Registry",
            Self::Fetching => "Fetching",
            Self::Access => "Access",
            Self::System => "System",
            Self::Watching => "Watching",
        }
    }

    /// The group as a set of one.
    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Groups whose settings are flags of a command: a set, as a number, so that it can be a parameter of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope(pub u8);

impl Scope {
    /// The cache alone.
    pub const CACHE: u8 = Group::Cache.bit();
    /// The way to registries, without credentials.
    pub const REACH: u8 = Group::Registry.bit();
    /// Registries and credentials.
    pub const REGISTRY: u8 = Self::REACH | Group::Credentials.bit();
    /// All that reading models needs.
    pub const READING: u8 = Self::CACHE | Self::REGISTRY | Group::Reading.bit();
    /// Everything.
    pub const MOUNT: u8 = u8::MAX;

    /// The settings in it.
    pub fn settings(self) -> impl Iterator<Item = &'static Setting> {
        SETTINGS
            .iter()
            .filter(move |setting| self.0 & setting.group.bit() != 0)
    }
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Name of the flag (`--name`), the file's key and the `-o` option.
    pub name: &'static str,
    /// What it is about.
    pub group: Group,
    /// What its value is.
    pub takes: Takes,
    /// Whether there may be several: in a variable or an `-o` option separated by `:`, a flag repeated, in a file an array.
    pub many: bool,
    /// Whether few people want it: short help leaves it out.
    pub rare: bool,
    /// What holds when nothing is said, for people.
    pub default: &'static str,
    /// What it does: the help of the flag. One or two sentences.
    pub about: &'static str,
    /// What more there is to know about it; empty where nothing is.
    pub more: &'static str,
}

impl Setting {
    const fn new(
        name: &'static str,
        group: Group,
        takes: Takes,
        default: &'static str,
        about: &'static str,
    ) -> Self {
        Self {
            name,
            group,
            takes,
            many: false,
            rare: false,
            default,
            about,
            more: "",
        }
    }

    const fn many(self) -> Self {
        Self { many: true, ..self }
    }

    const fn rare(self) -> Self {
        Self { rare: true, ..self }
    }

    const fn more(self, more: &'static str) -> Self {
        Self { more, ..self }
    }

    /// The row with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        SETTINGS.iter().find(|setting| setting.name == name)
    }

    /// Its environment variable.
    pub fn variable(&self) -> String {
        format!("OCIFS_{}", self.name.replace('-', "_").to_ascii_uppercase())
    }

    /// How help names its value: `DIR`, `none|blob|model`; empty for a switch.
    pub fn value_name(&self) -> String {
        match self.takes {
            Takes::Switch => String::new(),
            Takes::Word(words) => words.join("|"),
            Takes::Size => "SIZE".to_owned(),
            Takes::Time => "TIME".to_owned(),
            Takes::Dir => "DIR".to_owned(),
            Takes::File => "FILE".to_owned(),
            Takes::Text(name) => name.to_owned(),
        }
    }
}

use Group::{Access, Cache, Credentials, Fetching, Reading, Registry, System, Watching};
use Takes::{Dir, File, Size, Switch, Text, Time, Word};

/// All settings, in the order in which help lists them.
pub const SETTINGS: &[Setting] = &[
    Setting::new(
        "cache-dir",
        Cache,
        Dir,
        "/var/cache/ocifs for root, else ~/.cache/ocifs",
        "Keep blobs in DIR, an OCI image layout that other tools read too.",
    )
    .more("Several mounts and commands may share it, also at the same time. It belongs to one user and has mode 0700."),
    Setting::new(
        "cache-size",
        Cache,
        Size,
        "80 % of what is free on its file system and of what it holds",
        "Let the cache allocate at most SIZE (20G, 512MiB); what was used least recently goes first.",
    )
    .more("What is open stays. What then does not fit is read from the registry and not kept. At least 64MiB."),
    Setting::new(
        "plain-http",
        Registry,
        Text("HOST"),
        "none; loopback addresses are spoken to in plain HTTP anyway",
        "Speak plain HTTP with HOST (registry.lan:5000), as is done with loopback addresses anyway; repeatable.",
    )
    .many(),
    Setting::new(
        "ca-file",
        Registry,
        File,
        "the system's authorities alone",
        "Trust the certificate authorities in the PEM file FILE as well; repeatable.",
    )
    .many(),
    Setting::new(
        "hosts-dir",
        Registry,
        Dir,
        "none",
        "Take mirrors, certificates and headers of registries from DIR/HOST/hosts.toml, as containerd does \
         (/etc/containerd/certs.d).",
    )
    .more("A file that changes counts within seconds."),
    Setting::new(
        "auth-file",
        Credentials,
        File,
        "where docker login and podman login put them",
        "Take credentials from FILE; repeatable.",
    )
    .many()
    .more("Each is a config.json of docker's, an auth.json of podman's, or a mounted Kubernetes secret. They are read anew whenever \
         a token is renewed or a password refused."),
    Setting::new(
        "offline",
        Reading,
        Switch,
        "no",
        "Never ask a registry: show and read what the cache has.",
    ),
    Setting::new(
        "read-timeout",
        Reading,
        Time,
        "5m",
        "Let a read of weights wait up to TIME (90s, 5m) in all for a registry that does not deliver.",
    )
    .more("Then the read fails with ETIMEDOUT, which ends most engines: be generous."),
    Setting::new(
        "platform",
        Reading,
        Text("OS/ARCH"),
        "this machine's",
        "Of an image index, show the image for OS/ARCH[/VARIANT] (linux/arm64).",
    ),
    Setting::new(
        "metadata-timeout",
        Reading,
        Time,
        "20s",
        "Let a lookup, an open or a listing wait up to TIME in all for a registry.",
    )
    .rare()
    .more("What was asked for goes on behind it, and the next try finds it."),
    Setting::new(
        "connect-timeout",
        Reading,
        Time,
        "10s",
        "Let a connection to a registry take up to TIME to come up.",
    )
    .rare(),
    Setting::new(
        "stall-timeout",
        Reading,
        Time,
        "30s",
        "Take a transfer that has sent nothing for TIME as dead, and ask again over another connection.",
    )
    .rare()
    .more("A host that usually answers sooner is given up on sooner."),
    Setting::new(
        "http",
        Reading,
        Word(&["auto", "1.1", "2"]),
        "auto",
        "Speak this HTTP with servers that have TLS; auto fetches parts over connections of their own.",
    )
    .rare(),
    Setting::new(
        "max-connections",
        Reading,
        Text("N"),
        "16",
        "Fetch at most N parts (1 to 16) from a host at a time.",
    )
    .rare()
    .more("How many are used below that is found by trying, and fewer are when a registry says that it is too much."),
    Setting::new(
        "prefetch",
        Fetching,
        Word(&["none", "blob", "model"]),
        "model",
        "Fetch nothing ahead of reads, the rest of a blob that is read in earnest, or the rest of its model.",
    ),
    Setting::new(
        "verify",
        Fetching,
        Word(&["early", "strict"]),
        "early",
        "Serve bytes as they come and check the blob when it is whole (early), or serve nothing of a blob before all of it is \
         here and right (strict).",
    ),
    Setting::new(
        "tag-ttl",
        Fetching,
        Time,
        "15m",
        "Believe for TIME (90s, 15m, 0) what a tag points at; it never moves below an open file.",
    ),
    Setting::new(
        "memory",
        Fetching,
        Size,
        "an eighth of the machine's or the control group's, 32MiB to 256MiB",
        "Let bytes that are under way take at most SIZE of memory; reads wait beyond that.",
    )
    .more("At least 16MiB."),
    Setting::new(
        "allow-other",
        Access,
        Switch,
        "no",
        "Let other users read the mount, with the credentials of the one who mounts.",
    )
    .more("For others than root, /etc/fuse.conf must have user_allow_other."),
    Setting::new(
        "uid",
        Access,
        Text("NUMBER"),
        "who mounts",
        "Show everything as the user's with this number.",
    )
    .rare(),
    Setting::new(
        "gid",
        Access,
        Text("NUMBER"),
        "the group of who mounts",
        "Show everything as the group's with this number.",
    )
    .rare(),
    Setting::new(
        "umask",
        Access,
        Text("MASK"),
        "000",
        "Take these permission bits, in octal, from everything: 027 leaves it to owner and group.",
    )
    .rare()
    .more("The kernel checks them only with --allow-other."),
    Setting::new(
        "allow",
        Access,
        Text("PATTERN"),
        "everything",
        "Read only repositories that match PATTERN (ghcr.io/org/*), whatever the credentials open; repeatable.",
    )
    .many()
    .more("A pattern is a repository, or a host or namespace for all below it; * stands for any characters but a slash, ** for whole \
         parts. What does not match is EACCES. The model that a kit names as its base is held to it too."),
    Setting::new(
        "deny",
        Access,
        Text("PATTERN"),
        "nothing",
        "Read no repository that matches PATTERN, whatever is allowed; repeatable.",
    )
    .many(),
    Setting::new(
        "passthrough",
        System,
        Switch,
        "yes",
        "Let the kernel read blobs that are whole and verified without the daemon, where it can.",
    )
    .rare()
    .more("Needs Linux 6.9 and CAP_SYS_ADMIN. Without, the daemon answers from a map of the cache file."),
    Setting::new(
        "nonempty",
        System,
        Switch,
        "no",
        "Mount on a directory that holds something, which is hidden then.",
    )
    .rare(),
    Setting::new(
        "runtime-dir",
        System,
        Dir,
        "/run/ocifs for root, else $XDG_RUNTIME_DIR/ocifs",
        "Keep control sockets and logs of mounts in DIR.",
    )
    .rare()
    .more("Commands that ask a mount (status, refresh, restart) look there: set it where all of them see it."),
    Setting::new(
        "log",
        Watching,
        Text("FILTER"),
        "warn; info in the foreground",
        "Log what FILTER lets through: error, warn, info, debug or trace, or tracing's filters by module.",
    )
    .more("`ocifs log FILTER` changes it while a mount runs."),
    Setting::new(
        "log-format",
        Watching,
        Word(&["auto", "text", "json", "journal"]),
        "auto: journal where stderr is systemd's journal, else text",
        "Log lines of text, a JSON document a line, or to systemd's journal with a field for each value.",
    ),
    Setting::new(
        "metrics",
        Watching,
        Text("ADDR:PORT"),
        "none",
        "Answer Prometheus on ADDR:PORT (127.0.0.1:9464) with /metrics, and others with /health.",
    )
    .more("Everybody who can connect can read it; no name, digest or path of a model is in it."),
];
