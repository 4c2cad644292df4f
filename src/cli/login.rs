//! `ocifs login` and `logout`: proves a login, and keeps or forgets it where docker and podman look.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::args::{Global, Login, Logout};
use super::exit::Exit;
use super::explain::Failure;
use super::interrupt::unless_interrupted;
use super::output::{line, printable};
use super::progress::eprint;
use super::{context, prompt};
use crate::base::Deadline;
use crate::config::Settings;
use crate::registry::{Accepted, Registry, Repository, forget_login, is_login_used, keep_login};

/// How long a registry and its token server may take: somebody waits.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn login(global: &Global, args: &Login) -> Result<Exit> {
    let place = place(args.host.as_deref())?;
    let settings = context::settings(global, args.reach.values())?;
    let file = file(args.auth_file.as_deref(), &settings)?;
    let username = match &args.username {
        Some(username) => username.clone(),
        None if args.password_stdin => {
            let failure = Failure::new(Exit::Usage, "--password-stdin needs a user's name");
            return Err(failure.hint("give it with --username USER").into());
        }
        None => prompt::shown("Username: ")?,
    };
    let password = if args.password_stdin {
        prompt::stdin()?
    } else {
        prompt::hidden("Password: ")?
    };
    if username.is_empty() || password.expose().is_empty() {
        return Err(Failure::new(
            Exit::Usage,
            "the user's name and the password cannot be empty",
        )
        .into());
    }
    // Basic authentication could not tell the name from the password (RFC 7617, section 2).
    if username.contains(':') {
        return Err(Failure::new(Exit::Usage, "a user's name has no colon").into());
    }
    let host = host_of(&place);
    context::block_on(async {
        let registry = Registry::new(settings.registry.clone())?;
        let check = async {
            let deadline = Deadline::after(PATIENCE);
            Ok(registry
                .check_login(host, &username, &password, deadline)
                .await?)
        };
        if unless_interrupted(check).await? == Accepted::Unasked {
            eprint(&format!(
                "warning: {host} asks nobody for a login; it is kept without being proved"
            ));
        }
        let kept = keep_login(&file, &place, &username, &password).await?;
        let by = kept.helper.map_or(String::new(), |name| {
            format!(" by docker-credential-{name}, as it says")
        });
        line(format_args!(
            "logged in to {place} as {}; kept{by} in {}",
            printable(&username),
            kept.file.display()
        ))?;
        let files = settings.registry.auth_files.as_deref().unwrap_or_default();
        if !is_login_used(files, &place, &username, &password).await {
            eprint(&match &args.auth_file {
                Some(file) => format!("note: use it with --auth-file {}", file.display()),
                None => format!(
                    "warning: ocifs goes on with another login for {place}: a credential file that comes first has one (podman's?)"
                ),
            });
        }
        Ok(Exit::Ok)
    })
}

pub(super) fn logout(global: &Global, args: &Logout) -> Result<Exit> {
    let place = place(args.host.as_deref())?;
    let settings = context::settings(global, crate::config::Values::default())?;
    let file = file(args.auth_file.as_deref(), &settings)?;
    context::block_on(async {
        if !forget_login(&file, &place).await? {
            let failure = Failure::new(
                Exit::NotFound,
                format!("{} has no login for {place}", file.display()),
            );
            return Err(failure
                .hint("podman keeps its own in another file: `podman logout`, or name it with --auth-file")
                .into());
        }
        line(format_args!("logged out of {place} in {}", file.display()))?;
        Ok(Exit::Ok)
    })
}

/// What was typed as the registry: people paste URLs.
fn place(typed: Option<&str>) -> Result<String> {
    let typed = typed.unwrap_or("docker.io");
    let bare = typed
        .strip_prefix("https://")
        .or_else(|| typed.strip_prefix("http://"))
        .unwrap_or(typed)
        .trim_end_matches('/');
    let bare = match bare {
        "index.docker.io" | "registry-1.docker.io" | "index.docker.io/v1" => "docker.io",
        other => other,
    };
    let (host, namespace) = bare.split_once('/').unwrap_or((bare, "any"));
    if !Repository::is_host(host) || Repository::new(host, namespace).is_err() {
        let failure = Failure::new(
            Exit::Usage,
            format!("`{}` is no registry", printable(typed)),
        );
        return Err(failure
            .hint("write it as HOST or HOST:PORT, like ghcr.io or registry.lan:5000")
            .into());
    }
    Ok(bare.to_owned())
}

fn host_of(place: &str) -> &str {
    place.split('/').next().unwrap_or(place)
}

fn file(typed: Option<&Path>, settings: &Settings) -> Result<PathBuf> {
    let file = typed
        .map(Path::to_owned)
        .or_else(|| settings.login_file.clone());
    let failure = || {
        let failure = Failure::new(Exit::Usage, "no place for the login: HOME is not set");
        failure.hint("name a file with --auth-file FILE")
    };
    Ok(file.ok_or_else(failure)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_as_people_type_them() {
        for (typed, expected) in [
            (None, "docker.io"),
            (Some("https://index.docker.io/v1/"), "docker.io"),
            (Some("https://ghcr.io/"), "ghcr.io"),
            (Some("registry.lan:5000"), "registry.lan:5000"),
            (Some("[::1]:5000"), "[::1]:5000"),
            (Some("quay.io/org"), "quay.io/org"),
        ] {
            assert_eq!(place(typed).unwrap(), expected, "{typed:?}");
        }
        for typed in ["", "alice", "h.io/../x", "a b.io", "https://"] {
            assert!(place(Some(typed)).is_err(), "{typed}");
        }
    }
}
