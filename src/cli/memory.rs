//! Memory: how much of it is taken when nothing is said, that the allocator gives back what is free, and that nobody else reads it.

use std::fs;
use std::path::{Path, PathBuf};

/// The part of what there is that bytes under way may take.
const SHARE: u64 = 8;
/// Bounds of it: less makes reads slow, more does not make them faster.
const LEAST: u64 = 32 << 20;
const MOST: u64 = 256 << 20;

/// Nobody reads this process's memory but root: it leaves no core file, and no other process of the user may trace it. Passwords and
/// tokens are in it, and a core file goes wherever the machine sends those (core(5)). A panic still tells where it was.
pub(super) fn keep_private() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::debug!(%error, "a crash would leave a core file");
    }
}

/// An eighth of the memory of the machine or of the tightest control group, at least 32 MiB, at most 256 MiB.
pub(super) fn default() -> u64 {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let limit = limit_files(&own, &mounts)
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
        .min();
    of_limits(machine(), limit)
}

fn of_limits(machine: Option<u64>, group: Option<u64>) -> u64 {
    let there = machine.into_iter().chain(group).min();
    there.map_or(MOST, |bytes| (bytes / SHARE).clamp(LEAST, MOST))
}

/// `MemTotal` of proc_meminfo(5), in bytes.
fn machine() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The files that hold the limits of this process's control group and of all above it (cgroups(7)): `memory.max` in
/// version 2, where no limit is the word `max`; `memory.limit_in_bytes` in version 1, where it is a huge number.
///
/// `own` is /proc/self/cgroup, `mounts` /proc/self/mountinfo. In a container the group's path may begin above what is mounted; then
/// only the part below the mount's root can be looked at, which the limit of the container itself is part of.
fn limit_files(own: &str, mounts: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in own.lines() {
        // hierarchy-ID:controller-list:cgroup-path
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(group)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let second = id == "0" && controllers.is_empty();
        let first = controllers.split(',').any(|name| name == "memory");
        if !first && !second {
            continue;
        }
        let name = if second {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        for (root, point) in mounts.lines().filter_map(|line| hierarchy(line, second)) {
            let below = Path::new(group).strip_prefix(root).unwrap_or(Path::new(""));
            let group = Path::new(point).join(below);
            let above = group.ancestors().take_while(|dir| dir.starts_with(point));
            files.extend(above.map(|dir| dir.join(name)));
        }
    }
    files
}

/// Root and mount point of a line of proc_pid_mountinfo(5), if it is a hierarchy of control groups with a memory controller.
fn hierarchy(line: &str, second: bool) -> Option<(&str, &str)> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(3);
    let (root, point) = (front.next()?, front.next()?);
    let mut back = back.split(' ');
    let (kind, options) = (back.next()?, back.nth(1)?);
    let right = if second {
        kind == "cgroup2"
    } else {
        kind == "cgroup" && options.split(',').any(|option| option == "memory")
    };
    right.then_some((root, point))
}

/// Has the C library keep one heap in place of several for each processor: each of those keeps what was free in it, and few
/// threads here allocate at a time. To be called before threads are started.
pub(super) fn one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) may be called at any time; it changes how later allocations are made.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_all_groups_above_are_looked_at() {
        let mounts = "25 24 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            30 24 0:26 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n\
            31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n";
        let own = "5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/c\n";
        let found = limit_files(own, mounts);
        let expected = [
            "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/unified/c/memory.max",
            "/sys/fs/cgroup/unified/memory.max",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
        // In a container: the mount's root is the container's group, seen from outside or as "/".
        let inside = "9 8 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        for own in ["0::/docker/abc\n", "0::/\n"] {
            assert_eq!(
                limit_files(own, inside),
                [PathBuf::from("/sys/fs/cgroup/memory.max")]
            );
        }
        assert!(limit_files("garbage\n::\n", "also garbage\n").is_empty());
    }

    #[test]
    fn an_eighth_of_the_least_is_taken_within_bounds() {
        let gib = 1 << 30;
        assert_eq!(of_limits(Some(64 * gib), None), MOST);
        assert_eq!(of_limits(Some(64 * gib), Some(gib)), gib / 8);
        assert_eq!(of_limits(Some(gib), Some(u64::MAX)), gib / 8);
        assert_eq!(of_limits(Some(64 * gib), Some(100 << 20)), LEAST);
        assert_eq!(of_limits(None, None), MOST);
        assert!((LEAST..=MOST).contains(&default()));
    }
}
