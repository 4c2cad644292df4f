//! Which mounts there are: `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The file system type of our mounts.
pub const FS_TYPE: &str = "fuse.ocifs";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// Major device number of the file system.
    pub major: u32,
    /// Minor device number of the file system.
    pub minor: u32,
    /// Which directory of the file system is mounted; `/` but for bind mounts.
    pub root: PathBuf,
    /// Where it is mounted.
    pub path: PathBuf,
    /// The file system's type, `fuse.ocifs` for ours.
    pub kind: String,
}

/// All mounts that this process sees, in the order in which they were made.
pub(super) fn all() -> io::Result<Vec<MountInfo>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

/// Mounts of ocifs that this process sees, bind mounts of them included.
pub fn mounts() -> io::Result<Vec<MountInfo>> {
    Ok(all()?
        .into_iter()
        .filter(|mount| mount.kind == FS_TYPE)
        .collect())
}

/// One line. Bytes, because a path need not be UTF-8.
pub(super) fn parse(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let root = fields.next()?;
    let path = fields.next()?;
    // Options, then any number of optional fields, then a hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let kind = String::from_utf8(unescape(fields.next()?)).ok()?;
    Some(MountInfo {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        root: OsString::from_vec(unescape(root)).into(),
        path: OsString::from_vec(unescape(path)).into(),
        kind,
    })
}

/// `\040` → a space: the kernel writes space, tab, newline and backslash in octal (`mangle_path` in fs/seq_file.c).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) =
            (first, tail)
        {
            plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = tail;
        } else {
            plain.push(*first);
            rest = tail;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_as_the_kernel_writes_them() {
        let mount = |line: &str| parse(line.as_bytes());
        let expected = |path: &str, kind: &str| MountInfo {
            major: 0,
            minor: 57,
            root: "/".into(),
            path: path.into(),
            kind: kind.into(),
        };
        assert_eq!(
            mount(
                "241 29 0:57 / /models ro,nosuid,nodev,relatime shared:118 - fuse.ocifs ocifs ro,user_id=0"
            ),
            Some(expected("/models", FS_TYPE)),
        );
        assert_eq!(
            mount(
                r"241 29 0:57 / /a\040b\134c\011 ro master:1 propagate_from:2 - fuse.ocifs ocifs ro"
            ),
            Some(expected("/a b\\c\t", FS_TYPE)),
        );
        assert_eq!(
            mount("22 1 0:57 / /proc rw - proc proc rw"),
            Some(expected("/proc", "proc"))
        );
        for line in [
            "",
            "22",
            "22 1 x / / rw - proc",
            "22 1 0:1 / /proc rw shared:1 proc proc rw",
        ] {
            assert_eq!(mount(line), None, "{line}");
        }
        assert_eq!(unescape(br"\9\04\777\"), br"\9\04\777\");
    }

    #[test]
    fn the_mounts_of_this_process_can_be_read() {
        assert!(
            all()
                .unwrap()
                .iter()
                .any(|mount| mount.path == std::path::Path::new("/"))
        );
    }
}
