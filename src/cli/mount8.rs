//! mount(8)'s helper: what `/sbin/mount.fuse.ocifs` and `/sbin/mount.ocifs`, links to this program, are asked, as arguments of
//! `ocifs mount`.
//!
//! mount(8) calls `mount.TYPE SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`, and what mounts at boot calls mount(8). The helper
//! returns when the mount is up, with mount(8)'s exit codes.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::exit::Exit;
use crate::config::{Setting, mount_options};

/// The names by which this program is the helper.
const NAMES: [&str; 2] = ["mount.fuse.ocifs", "mount.ocifs"];

/// mount(8): it was not called as it must be.
const INCORRECT: u8 = 1;
/// mount(8): the mount failed.
const FAILED: u8 = 32;

/// The arguments of the `ocifs mount` that is asked for; `None` when this program is not the helper.
///
/// # Errors
/// When the call is not one of mount(8)'s, or the source is more than a name.
pub(super) fn arguments(given: &[OsString]) -> Option<Result<Vec<OsString>, String>> {
    let name = Path::new(given.first()?).file_name()?.to_str()?;
    let called = NAMES.into_iter().find(|known| *known == name)?;
    Some(translated(called, &given[1..]))
}

/// An exit code of ours as mount(8) has them.
pub(super) fn exit_code(code: u8) -> u8 {
    match code {
        0 => 0,
        code if code == Exit::Usage as u8 => INCORRECT,
        _ => FAILED,
    }
}

fn translated(called: &str, given: &[OsString]) -> Result<Vec<OsString>, String> {
    let usage = || {
        format!(
            "usage: {called} ocifs DIR [-sfnv] [-o OPTIONS]; it is for mount(8), `ocifs mount` is for people"
        )
    };
    let (mut names, mut options) = (Vec::new(), Vec::new());
    let (mut sloppy, mut fake, mut verbose) = (false, false, false);
    let mut rest = given.iter();
    while let Some(argument) = rest.next() {
        // What is no text is a path.
        let Some(letters) = argument.to_str().and_then(|text| text.strip_prefix('-')) else {
            names.push(argument);
            continue;
        };
        for (at, letter) in letters.char_indices() {
            match letter {
                's' => sloppy = true,
                'f' => fake = true,
                'v' => verbose = true,
                // There is no /etc/mtab.
                'n' => {}
                'o' | 't' | 'N' => {
                    let behind = &letters[at + 1..];
                    let value = match behind {
                        "" => rest.next().and_then(|value| value.to_str()),
                        value => Some(value),
                    };
                    let value = value.ok_or_else(usage)?;
                    match letter {
                        'o' => options.push(value),
                        // It was called by that type.
                        't' => {}
                        _ => {
                            return Err(format!(
                                "another mount namespace is entered by `nsenter --mount={value} mount …`, not by -N"
                            ));
                        }
                    }
                    break;
                }
                _ => return Err(usage()),
            }
        }
    }
    let [source, point] = names[..] else {
        return Err(usage());
    };
    let mut arguments: Vec<OsString> = ["ocifs", "mount"].map(OsString::from).into();
    arguments.extend(flag("--source", source_name(source)?));
    arguments.extend(fake.then(|| "--fake".into()));
    arguments.extend(verbose.then(|| "-v".into()));
    for option in options.into_iter().flat_map(mount_options) {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        match name {
            "remount" => {
                return Err(
                    "settings of a mount that is up are read anew by `ocifs restart DIR`, without its readers noticing".to_owned(),
                );
            }
            "config" => arguments.extend(flag("--config", value)),
            _ if sloppy && Setting::named(&name.replace('_', "-")).is_none() => {}
            _ => arguments.extend(flag("-o", option)),
        }
    }
    arguments.push("--".into());
    arguments.push(point.clone());
    Ok(arguments)
}

fn flag(name: &str, value: &str) -> [OsString; 2] {
    [name.into(), value.into()]
}

/// What the mount table is to show as the source: a name, since all registries are mounted. It must be the one that fstab(5) has, else
/// `mount -a` mounts again.
fn source_name(source: &OsStr) -> Result<&str, String> {
    let refuse = || {
        format!(
            "the source `{}` must be a plain name like `ocifs` or `none`: all registries are mounted, and a model is a directory below the mount point",
            source.to_string_lossy()
        )
    };
    let name = source.to_str().ok_or_else(refuse)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match !name.is_empty() && name.chars().all(plain) {
        true => Ok(name),
        false => Err(refuse()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> Result<String, String> {
        let given: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let arguments = arguments(&given).expect("it is the helper");
        let texts = arguments?.into_iter().map(|text| text.into_string());
        Ok(texts.map(Result::unwrap).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn calls_of_mount_8_become_ours() {
        let line =
            "/sbin/mount.fuse.ocifs none /models -o rw,allow_other,cache-size=20G,_netdev,nofail";
        let expected = "ocifs mount --source none -o allow_other -o cache-size=20G -- /models";
        assert_eq!(asked(line).unwrap(), expected);
        assert_eq!(
            asked("mount.ocifs -nv ocifs /m -t fuse.ocifs -oro,config=/etc/m.toml").unwrap(),
            "ocifs mount --source ocifs -v --config /etc/m.toml -- /m"
        );
        assert_eq!(
            asked("mount.ocifs models /m -sf -o frobnicate,umask=027").unwrap(),
            "ocifs mount --source models --fake -o umask=027 -- /m"
        );
        // What is not known is for `ocifs mount` to refuse, unless it was asked to be tolerant.
        assert!(
            asked("mount.ocifs models /m -o frobnicate")
                .unwrap()
                .contains("-o frobnicate")
        );
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_to_do() {
        for (line, part) in [
            ("mount.ocifs", "usage: mount.ocifs"),
            ("mount.ocifs none", "usage"),
            ("mount.ocifs none /m /n", "usage"),
            ("mount.ocifs none /m -o", "usage"),
            ("mount.ocifs none /m -x", "usage"),
            ("mount.ocifs ghcr.io/org/m:v1 /m", "below the mount point"),
            ("mount.ocifs none /m -o remount,ro", "ocifs restart"),
            ("mount.ocifs none /m -N /proc/7/ns/mnt", "nsenter"),
        ] {
            let error = asked(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
        let own = ["/usr/bin/ocifs", "mount", "/m"].map(OsString::from);
        assert!(arguments(&own).is_none());
        assert!(arguments(&[]).is_none());
    }

    #[test]
    fn codes_are_those_of_mount_8() {
        assert_eq!([0, 2, 1, 5, 7].map(exit_code), [0, 1, 32, 32, 32]);
    }
}
