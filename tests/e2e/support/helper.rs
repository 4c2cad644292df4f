//! Credential helpers: programs named `docker-credential-NAME`, as shell scripts in a directory for PATH.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A directory with helpers.
pub struct Helpers {
    dir: TempDir,
}

impl Helpers {
    pub fn new() -> Self {
        Self {
            dir: super::scratch("helpers"),
        }
    }

    /// Writes a helper: what it does as shell text, with the verb as `$1` and the directory of the helpers as `$DIR`. Each run adds
    /// its arguments to the log before. A helper that is there is replaced at once.
    pub fn write(&self, name: &str, script: &str) {
        let path = self.dir.path().join(format!("docker-credential-{name}"));
        let text = format!(
            "#!/bin/sh\nDIR='{}'\necho \"{name} $*\" >>\"$DIR/log\"\n{script}\n",
            self.dir.path().display()
        );
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, path).unwrap();
    }

    /// A helper that answers `get` for one server, and says of others what the protocol wants.
    pub fn write_login(&self, name: &str, server: &str, user: &str, secret: &str) {
        self.write(
            name,
            &format!(
                "read server\nif [ \"$1 $server\" = 'get {server}' ]; then\n\
                 printf '{{\"ServerURL\":\"%s\",\"Username\":\"{user}\",\"Secret\":\"{secret}\"}}' \"$server\"\n\
                 else echo 'credentials not found in native keychain'; exit 1; fi"
            ),
        );
    }

    /// A helper that keeps logins as files, one for each server.
    pub fn write_keeper(&self, name: &str) {
        self.write(
            name,
            r#"case "$1" in
store) cat >"$DIR/new" && mv "$DIR/new" "$DIR/$(jq -r .ServerURL "$DIR/new" | tr -c 'a-z0-9\n' _).kept" ;;
get) cat "$DIR/$(tr -c 'a-z0-9\n' _).kept" 2>/dev/null || { echo 'credentials not found in native keychain'; exit 1; } ;;
erase) rm "$DIR/$(tr -c 'a-z0-9\n' _).kept" 2>/dev/null || { echo 'credentials not found in native keychain'; exit 1; } ;;
esac"#,
        );
    }

    /// What was run so far: `NAME VERB` a line.
    pub fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A file beside them, with these contents.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Puts the helpers first in a command's PATH.
    pub fn give(&self, command: &mut Command) {
        let mut path = OsString::from(self.dir.path());
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path);
    }
}
