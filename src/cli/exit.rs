//! Exit codes, and the part of `--help` that documents them.

/// How a command ends, for scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It did what was asked. A reader that closes the pipe early (`| head`) is no failure.
    Ok = 0,
    /// Anything that has no code of its own.
    Failure = 1,
    /// What was typed, or a setting, cannot be understood.
    Usage = 2,
    /// No such repository, tag, digest, file or mount.
    NotFound = 3,
    /// The registry, or the system, denies access.
    Denied = 4,
    /// A registry cannot be reached or does not deliver; trying again may help.
    Network = 5,
    /// Content does not have its digest.
    Corrupt = 6,
    /// The mount or the blob is in use.
    Busy = 7,
    /// Another process goes on with the mount (`ocifs restart`).
    HandedOver = 75,
    /// Ended by Ctrl-C or SIGTERM.
    Interrupted = 130,
}

/// The end of `ocifs --help`.
pub const HELP: &str = "\
Settings:
  Every long option of `mount` can also be set by a variable (OCIFS_CACHE_SIZE=200G), or in
  ~/.config/ocifs/config.toml or /etc/ocifs/config.toml (cache-size = \"200G\"). The command line wins over
  variables, these over files, the user's file over the system's.

Exit codes:
    0  done
    1  failed
    2  the command line or a setting is wrong
    3  no such repository, tag, file or mount
    4  access denied
    5  a registry cannot be reached or does not deliver; trying again may help
    6  content does not have its digest
    7  in use
   75  another process goes on with the mount (ocifs restart)
  130  interrupted; what was fetched is kept

Data goes to stdout, messages to stderr.";

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_documented() {
        use Exit::*;
        for exit in [
            Ok,
            Failure,
            Usage,
            NotFound,
            Denied,
            Network,
            Corrupt,
            Busy,
            Interrupted,
        ] {
            let start = format!("{:>5}  ", exit as u8);
            assert!(
                HELP.lines().any(|line| line.starts_with(&start)),
                "{exit:?}"
            );
        }
    }
}
