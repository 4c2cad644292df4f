//! From an error to what a person reads and a script gets: the cause chain, a hint, an exit code.

use std::error::Error;
use std::io;
use std::sync::Arc;

use super::exit::Exit;
use super::interrupt::Interrupted;
use super::output::{StdoutError, printable};
use crate::blob::BlobError;
use crate::cache::CacheError;
use crate::config::ConfigError;
use crate::model::ModelError;
use crate::mount::MountError;
use crate::pack::PackError;
use crate::registry::{ReferenceError, RegistryError};

/// A failure that the command line itself finds.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct Failure {
    pub(super) exit: Exit,
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

impl Failure {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            hint: None,
        }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// What an error means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Explained {
    pub(super) exit: Exit,
    hint: Option<String>,
    silent: bool,
}

impl Explained {
    fn new(exit: Exit, hint: &str) -> Self {
        Self {
            exit,
            hint: (!hint.is_empty()).then(|| hint.to_owned()),
            silent: false,
        }
    }

    /// What goes to stderr; nothing where the end of a pipe is no failure.
    pub(super) fn text(&self, error: &anyhow::Error) -> Option<String> {
        if self.silent {
            return None;
        }
        let mut text = String::from("error: ");
        for (at, message) in messages(error).iter().enumerate() {
            if at > 0 {
                text.push_str("\n  because: ");
            }
            let lines: Vec<String> = message.split('\n').map(printable).collect();
            text.push_str(&lines.join("\n  "));
        }
        if let Some(hint) = &self.hint {
            text.push_str("\nhint: ");
            text.push_str(hint);
        }
        Some(text)
    }
}

/// What an HTTP client says on the way to the cause that matters.
const NOISE: [&str; 5] = [
    "error sending request",
    "client error (Connect)",
    "tcp connect error",
    "dns error",
    "error resolving DNS",
];

/// The messages of a chain without those that the next one repeats or that say nothing.
fn messages(error: &anyhow::Error) -> Vec<String> {
    let mut kept: Vec<String> = Vec::new();
    let mut causes = error.chain().map(ToString::to_string).peekable();
    while let Some(message) = causes.next() {
        let noise = causes.peek().is_some() && NOISE.iter().any(|noise| message.starts_with(noise));
        let repeated = kept.last().is_some_and(|last| last.contains(&message));
        if noise || repeated {
            continue;
        }
        if kept
            .last()
            .is_some_and(|last| message.starts_with(last.as_str()))
        {
            kept.pop();
        }
        kept.push(message);
    }
    kept
}

/// Finds the cause that tells most.
pub(super) fn explain(error: &anyhow::Error) -> Explained {
    let mut found = None;
    for cause in error.chain() {
        // "Not found" is about the model's name, unless it is said of a blob that the manifest names.
        if let Some(BlobError::Fetch { source, .. }) = cause.downcast_ref()
            && source.is_not_found()
        {
            let hint = "the registry has the manifest but not this blob of it; push the model again, or tell its operator";
            return Explained::new(Exit::Network, hint);
        }
        // A cause further down tells more than what wraps it.
        found = of_cause(cause).or(found);
    }
    found.unwrap_or_else(|| Explained::new(Exit::Failure, ""))
}

fn of_cause(cause: &(dyn Error + 'static)) -> Option<Explained> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        let hint = failure.hint.as_deref().unwrap_or("");
        return Some(Explained::new(failure.exit, hint));
    }
    if cause.is::<Interrupted>() {
        return Some(Explained::new(Exit::Interrupted, ""));
    }
    if let Some(error) = cause.downcast_ref::<StdoutError>() {
        let gone = error.reader_gone();
        let exit = if gone { Exit::Ok } else { Exit::Failure };
        return Some(Explained {
            silent: gone,
            ..Explained::new(exit, "")
        });
    }
    if cause.is::<ConfigError>() {
        return Some(Explained::new(Exit::Usage, ""));
    }
    if cause.is::<ReferenceError>() {
        let hint =
            "write it as [HOST/]REPOSITORY[:TAG][@DIGEST], like ghcr.io/org/model:v1 or ai/smollm2";
        return Some(Explained::new(Exit::Usage, hint));
    }
    let registry = cause.downcast_ref::<RegistryError>();
    if let Some(error) = registry.or_else(|| {
        cause
            .downcast_ref::<Arc<RegistryError>>()
            .map(|shared| &**shared)
    }) {
        return Some(of_registry(error));
    }
    if let Some(error) = cause.downcast_ref::<BlobError>() {
        return of_blob(error);
    }
    if let Some(error) = cause.downcast_ref::<ModelError>() {
        return of_model(error);
    }
    if let Some(error) = cause.downcast_ref::<MountError>() {
        return of_mount(error);
    }
    match cause.downcast_ref::<CacheError>() {
        Some(CacheError::Absent { .. }) => {
            return Some(Explained::new(
                Exit::NotFound,
                "`ocifs cache ls` lists what is there",
            ));
        }
        Some(CacheError::InUse { .. }) => {
            return Some(Explained::new(
                Exit::Busy,
                "take down the mounts that use it: `ocifs status` lists them",
            ));
        }
        _ => {}
    }
    if let Some(CacheError::Io { source, .. }) = cause.downcast_ref::<CacheError>() {
        return Some(of_disk(
            source,
            "give a directory that you may write to with --cache-dir DIR",
        ));
    }
    if let Some(error) = cause.downcast_ref::<PackError>() {
        return Some(of_pack(error));
    }
    let error = cause.downcast_ref::<io::Error>()?;
    match error.kind() {
        io::ErrorKind::AddrInUse => Some(Explained::new(
            Exit::Busy,
            "another program listens there; give another address",
        )),
        io::ErrorKind::PermissionDenied => Some(Explained::new(Exit::Denied, "")),
        _ => None,
    }
}

fn of_registry(error: &RegistryError) -> Explained {
    let (exit, hint) = match error {
        RegistryError::NotFound { .. } => (
            Exit::NotFound,
            "check the name and the tag; some registries also say so to those who may not see a private repository \
             (`ocifs login HOST`)",
        ),
        RegistryError::Denied { .. } => (
            Exit::Denied,
            "log in with `ocifs login HOST`, `docker login HOST` or `podman login HOST`, or name a credential file with --auth-file",
        ),
        RegistryError::WrongDigest { .. } => (
            Exit::Corrupt,
            "the registry, or a proxy before it, delivers other content than it announces; tell its operator",
        ),
        RegistryError::Connect { .. } => (
            Exit::Network,
            "is the registry running, and the port right? What is cached can be read with --offline",
        ),
        RegistryError::Tls { .. } => (
            Exit::Network,
            "trust the registry's own authority with --ca-file FILE; if it speaks plain HTTP, say so with --plain-http HOST",
        ),
        RegistryError::RateLimited { .. } => (Exit::Network, ""),
        RegistryError::CaFile { .. } => (Exit::Usage, ""),
        RegistryError::Source { .. } | RegistryError::Setup { .. } => (Exit::Failure, ""),
        _ => (Exit::Network, ""),
    };
    Explained::new(exit, hint)
}

fn of_blob(error: &BlobError) -> Option<Explained> {
    match error {
        BlobError::Corrupt { .. } => {
            let hint =
                "the registry, or a proxy before it, holds damaged content; push the model again";
            Some(Explained::new(Exit::Corrupt, hint))
        }
        BlobError::Offline { .. } => {
            let hint =
                "`ocifs pull` the model while the registry can be reached, or leave --offline away";
            Some(Explained::new(Exit::NotFound, hint))
        }
        BlobError::Deadline { .. } => Some(Explained::new(
            Exit::Network,
            "what came is kept; try again, or allow more with --read-timeout TIME",
        )),
        _ => None,
    }
}

fn of_model(error: &ModelError) -> Option<Explained> {
    match error {
        ModelError::Unusable { .. } => Some(Explained::new(
            Exit::Failure,
            "`ocifs inspect REF` tells what is in the artifact",
        )),
        _ => None,
    }
}

/// Its messages tell what to try themselves.
fn of_mount(error: &MountError) -> Option<Explained> {
    let exit = match error {
        MountError::Busy { .. } | MountError::AlreadyMounted { .. } => Exit::Busy,
        MountError::NotMounted { .. } | MountError::Foreign { .. } => Exit::NotFound,
        _ => return None,
    };
    Some(Explained::new(exit, ""))
}

fn of_pack(error: &PackError) -> Explained {
    match error {
        PackError::Stopped => Explained::new(Exit::Interrupted, ""),
        PackError::Io { source, .. } => of_disk(source, ""),
        _ => Explained::new(Exit::Failure, ""),
    }
}

fn of_disk(error: &io::Error, denied: &str) -> Explained {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Explained::new(Exit::Denied, denied)
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Explained::new(Exit::Failure, "the disk is full")
        }
        io::ErrorKind::NotFound => Explained::new(Exit::NotFound, ""),
        _ => Explained::new(Exit::Failure, ""),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_deepest_known_cause_decides_and_the_chain_is_told_once() {
        let denied = RegistryError::Denied {
            what: "x.io/m".into(),
            status: 401,
            reason: "no".into(),
        };
        let error = ModelError::Registry {
            reference: "x.io/m:v1".into(),
            source: Arc::new(denied),
        };
        let error = Err::<(), _>(error)
            .context("cannot pull x.io/m:v1")
            .unwrap_err();
        let explained = explain(&error);
        assert_eq!(explained.exit, Exit::Denied);
        let text = explained.text(&error).unwrap();
        assert_eq!(text.matches("x.io/m:v1").count(), 1, "{text}");
        assert!(
            text.starts_with("error: cannot pull") && text.contains("\nhint: log in"),
            "{text}"
        );
    }

    #[test]
    fn a_blob_that_the_registry_lost_is_not_a_wrong_name() {
        let lost = BlobError::Fetch {
            digest: crate::base::Digest::of(b""),
            range: crate::base::ByteRange::new(0, 1),
            source: Arc::new(RegistryError::NotFound {
                what: "blob".into(),
            }),
        };
        let error = Err::<(), _>(lost).context("cannot pull").unwrap_err();
        let explained = explain(&error);
        assert_eq!(explained.exit, Exit::Network);
        let text = explained.text(&error).unwrap();
        assert!(
            text.contains("push the model again") && !text.contains("check the name"),
            "{text}"
        );
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let gone = io::Error::from(io::ErrorKind::BrokenPipe);
        let error = anyhow::Error::from(StdoutError::from(gone));
        let explained = explain(&error);
        assert_eq!((explained.exit, explained.text(&error)), (Exit::Ok, None));
        let other = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(
            explain(&other).exit,
            Exit::Failure,
            "only stdout's reader may leave"
        );
    }

    #[test]
    fn codes_follow_the_kind_of_failure() {
        let failure = Failure::new(Exit::Busy, "in use").hint("close it");
        let cache = CacheError::Io {
            action: "make",
            path: "/x".into(),
            source: io::ErrorKind::PermissionDenied.into(),
        };
        let not_found = RegistryError::NotFound { what: "x".into() };
        for (error, exit) in [
            (anyhow::Error::from(failure), Exit::Busy),
            (cache.into(), Exit::Denied),
            (not_found.into(), Exit::NotFound),
            (Interrupted.into(), Exit::Interrupted),
            (ConfigError::NoHome.into(), Exit::Usage),
            (PackError::Stopped.into(), Exit::Interrupted),
            (anyhow::anyhow!("other"), Exit::Failure),
        ] {
            assert_eq!(explain(&error).exit, exit, "{error}");
        }
        let hostile = anyhow::anyhow!("bad \u{1b}[31m text");
        assert!(!explain(&hostile).text(&hostile).unwrap().contains('\u{1b}'));
    }
}
