//! Credentials: which files are read, which helpers are asked, and what the first of them has for a repository.

use std::ffi::OsString;
use std::path::PathBuf;

use super::authfile::{AuthFile, Unread, key_of};
use super::helper::Helpers;
use crate::base::{Digest, Secret};

/// What we can prove to a registry or its token server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Credentials {
    /// A user name and a password.
    Basic {
        /// The user's name.
        username: String,
        /// The password or access token.
        password: Secret,
    },
    /// `identitytoken`: a refresh token for the token server.
    Identity(Secret),
    /// `registrytoken`: a bearer token, used as it is.
    Registry(Secret),
}

impl Credentials {
    /// What docker makes of a user name and a secret: the name `<token>` marks a refresh token.
    pub(super) fn login(username: String, secret: Secret) -> Self {
        if username == "<token>" {
            return Self::Identity(secret);
        }
        Self::Basic {
            username,
            password: secret,
        }
    }

    /// Tells one from another without keeping it.
    pub(super) fn fingerprint(&self) -> Digest {
        let text = match self {
            Self::Basic { username, password } => format!("b{username}\0{}", password.expose()),
            Self::Identity(token) => format!("i{}", token.expose()),
            Self::Registry(token) => format!("r{}", token.expose()),
        };
        Digest::of(text.as_bytes())
    }
}

/// What was found for a repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The credentials; `None`: it is asked anonymously.
    pub(super) credentials: Option<Credentials>,
    /// Where they were to come from when that failed, for whoever is then denied.
    pub(super) trouble: Option<String>,
}

/// The credential `auth.json` that a service manager has given (`LoadCredential=auth.json:…`, systemd.exec(5)), and behind it the
/// files that podman and docker look into: `REGISTRY_AUTH_FILE` alone where it is set, else `$DOCKER_CONFIG/config.json` alone where that
/// is (containers/common `pkg/auth`; docker looks nowhere else either), else in order `$XDG_RUNTIME_DIR/containers/auth.json`,
/// `$XDG_CONFIG_HOME/containers/auth.json`, with their defaults, `~/.docker/config.json` and `~/.dockercfg`. `env` reads a variable.
pub fn default_auth_files(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let dir = |name: &str| {
        env(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let given = dir("CREDENTIALS_DIRECTORY").map(|dir| dir.join("auth.json"));
    let named =
        dir("REGISTRY_AUTH_FILE").or_else(|| Some(dir("DOCKER_CONFIG")?.join("config.json")));
    if let Some(named) = named {
        return given.into_iter().chain([named]).collect();
    }
    let home = dir("HOME");
    let under_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let runtime = dir("XDG_RUNTIME_DIR")
        .map(|dir| dir.join("containers"))
        .unwrap_or_else(|| {
            PathBuf::from(format!(
                "/run/containers/{}",
                rustix::process::getuid().as_raw()
            ))
        });
    [
        given,
        Some(runtime.join("auth.json")),
        dir("XDG_CONFIG_HOME")
            .or_else(|| under_home(".config"))
            .map(|dir| dir.join("containers/auth.json")),
        under_home(".docker/config.json"),
        under_home(".dockercfg"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Where credentials come from.
#[derive(Debug)]
pub(super) struct Sources {
    files: Vec<PathBuf>,
    helpers: Helpers,
}

impl Sources {
    /// These files, in this order, and the helpers that they name.
    pub(super) fn new(files: Vec<PathBuf>) -> Self {
        Self {
            files,
            helpers: Helpers::default(),
        }
    }

    /// The credentials for a repository in the first file that has some. Files are read, and helpers asked, each time: a login needs
    /// no restart. In one file, as with docker, the helper of the host or of all comes before plain entries.
    pub(super) async fn find(&self, host: &str, path: &str) -> Found {
        let mut trouble = None;
        for file in &self.files {
            let parsed = match AuthFile::read(file).await {
                Ok(parsed) => parsed,
                Err(Unread::Absent) => continue,
                Err(Unread::Io(error)) => {
                    tracing::warn!(file = %file.display(), %error, "credential file cannot be read, going on without it");
                    trouble.get_or_insert_with(|| {
                        format!(
                            "the credential file {} cannot be read: {error}",
                            file.display()
                        )
                    });
                    continue;
                }
                Err(Unread::Syntax(line)) => {
                    tracing::warn!(file = %file.display(), line, "credential file is not in docker's JSON format, going on without it");
                    trouble.get_or_insert_with(|| {
                        format!(
                            "line {line} of the credential file {} is not in docker's JSON format",
                            file.display()
                        )
                    });
                    continue;
                }
            };
            if let Some(helper) = parsed.helper(host) {
                match self.helpers.get(helper, key_of(host)).await {
                    Ok(Some(credentials)) => {
                        return Found {
                            credentials: Some(credentials),
                            trouble: None,
                        };
                    }
                    Ok(None) => {}
                    Err(reason) => {
                        trouble.get_or_insert(reason);
                    }
                }
            }
            if let Some(credentials) = parsed.lookup(host, path) {
                return Found {
                    credentials: Some(credentials),
                    trouble: None,
                };
            }
        }
        Found {
            credentials: None,
            trouble,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_places_of_the_files() {
        let env = |name: &str| match name {
            "HOME" => Some("/home/u".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/7".into()),
            _ => None,
        };
        let expected = [
            "/run/user/7/containers/auth.json",
            "/home/u/.config/containers/auth.json",
            "/home/u/.docker/config.json",
            "/home/u/.dockercfg",
        ];
        assert_eq!(default_auth_files(env), expected.map(PathBuf::from));
        // What is named is meant alone, and where an empty name stands, nothing is named.
        let set = |set: &'static [&str]| {
            default_auth_files(move |name| set.contains(&name).then(|| format!("/{name}").into()))
        };
        let podmans = PathBuf::from("/REGISTRY_AUTH_FILE");
        let dockers = PathBuf::from("/DOCKER_CONFIG/config.json");
        assert_eq!(
            set(&["REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "HOME"]),
            [podmans]
        );
        assert_eq!(
            set(&["DOCKER_CONFIG", "HOME", "XDG_RUNTIME_DIR"]),
            std::slice::from_ref(&dockers)
        );
        // What a service was given comes first, and is not there for most.
        let given = PathBuf::from("/CREDENTIALS_DIRECTORY/auth.json");
        let both = set(&["CREDENTIALS_DIRECTORY", "DOCKER_CONFIG"]);
        assert_eq!(both, [given.clone(), dockers]);
        assert_eq!(set(&["CREDENTIALS_DIRECTORY", "HOME"])[0], given);
        let config = "/XDG_CONFIG_HOME/containers/auth.json";
        assert!(set(&["XDG_CONFIG_HOME"]).contains(&config.into()));
        let empty = |name: &str| (name == "REGISTRY_AUTH_FILE").then(OsString::new);
        assert_eq!(default_auth_files(empty).len(), 1);
        assert_eq!(default_auth_files(|_| None).len(), 1);
    }

    #[tokio::test]
    async fn broken_and_missing_files_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("broken"), "{").unwrap();
        std::fs::write(path("large"), vec![b' '; 2 << 20]).unwrap();
        std::fs::write(path("good"), r#"{"auths":{"h.io":{"auth":"YTox"}}}"#).unwrap();
        let files = vec![path("missing"), path("broken"), path("large"), path("good")];
        let found = Sources::new(files.clone()).find("h.io", "x").await;
        let expected = Credentials::login("a".into(), Secret::new("1"));
        assert_eq!(found.credentials, Some(expected));
        let found = Sources::new(files[..3].to_vec()).find("h.io", "x").await;
        assert_eq!(found.credentials, None);
        assert!(found.trouble.unwrap().contains("broken"));
    }

    #[tokio::test]
    async fn a_helper_that_fails_leaves_the_plain_entries_and_is_told_of_where_there_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let text =
            r#"{"credsStore":"ocifs-unit-test-absent","auths":{"h.io":{"auth":"YTox"},"i.io":{}}}"#;
        std::fs::write(&file, text).unwrap();
        let sources = Sources::new(vec![file]);
        assert!(sources.find("h.io", "x").await.credentials.is_some());
        let found = sources.find("i.io", "x").await;
        assert_eq!(found.credentials, None);
        let trouble = found.trouble.unwrap();
        assert!(
            trouble.contains("docker-credential-ocifs-unit-test-absent"),
            "{trouble}"
        );
    }
}
