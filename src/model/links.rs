//! Symbolic links within a model. Pure.
//!
//! A link is followed as in a root directory that is the model's: an absolute target begins there, and `..` leads no
//! further up. What is shown is a relative link to where it finally leads, over directories that are directories, so that
//! whoever follows it stays in the model whatever the other links are. A link that leads nowhere is not shown.

/// The most links that are followed for one path (MAXSYMLINKS in the kernel's `include/linux/namei.h`).
const MOST_HOPS: usize = 40;
/// The most components that are gone through for one path, those of the links on its way included. The kernel has no such limit, but
/// an artifact may have a hundred thousand links, each over forty others of four thousand characters.
const MOST_STEPS: usize = 256;

/// What there is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum There<'a> {
    /// Nothing.
    Nothing,
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A link to this target.
    Link(&'a str),
}

/// Why a link cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// There is nothing where it leads.
    Dangling,
    /// Too many links on the way.
    Loop,
    /// Too long a way.
    Far,
}

/// Where `path` leads from the directory `from`; `there` tells what is at a path without following links.
///
/// With `create`, what is missing counts as a directory: for files that are about to be put there.
pub(super) fn follow<'a>(
    from: &str,
    path: &'a str,
    create: bool,
    there: impl Fn(&str) -> There<'a>,
) -> Result<String, Lost> {
    let mut at: Vec<&str> = from.split('/').filter(|part| !part.is_empty()).collect();
    // What is still to go, the next component last.
    let mut rest: Vec<&str> = path.split('/').rev().collect();
    if path.starts_with('/') {
        at.clear();
    }
    // `at` borrows from `from`, which may live shorter than what links say: owned from here on.
    let mut at: Vec<String> = at.into_iter().map(str::to_owned).collect();
    let (mut hops, mut steps) = (0, 0);
    while let Some(component) = rest.pop() {
        steps += 1;
        if steps > MOST_STEPS {
            return Err(Lost::Far);
        }
        match component {
            "" | "." => continue,
            ".." => {
                at.pop();
                continue;
            }
            component => at.push(component.to_owned()),
        }
        match there(&at.join("/")) {
            There::Directory => {}
            There::Nothing if create => {}
            There::Nothing => return Err(Lost::Dangling),
            There::File if rest.iter().all(|part| matches!(*part, "" | ".")) => {}
            There::File => return Err(Lost::Dangling),
            There::Link(target) => {
                hops += 1;
                if hops > MOST_HOPS {
                    return Err(Lost::Loop);
                }
                at.pop();
                if target.starts_with('/') {
                    at.clear();
                }
                rest.extend(target.split('/').rev());
            }
        }
    }
    Ok(at.join("/"))
}

/// `to` as it is written in a link in the directory `from`; both are paths of real directories and files.
pub(super) fn relative(from: &str, to: &str) -> String {
    let split = |path: &'_ str| -> Vec<String> {
        path.split('/')
            .filter(|part| !part.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let (from, to) = (split(from), split(to));
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let mut parts = vec![".."; from.len() - common];
    parts.extend(to[common..].iter().map(String::as_str));
    if parts.is_empty() {
        ".".to_owned()
    } else {
        parts.join("/")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn there(path: &str) -> There<'static> {
        match path {
            "a" | "a/b" | "d" | "usr" | "usr/bin" => There::Directory,
            "a/b/file" | "d/file" | "usr/bin/python3.11" => There::File,
            "bin" => There::Link("usr/bin"),
            "usr/bin/python3" => There::Link("python3.11"),
            "abs" => There::Link("/d/file"),
            "up" => There::Link("../../../../d"),
            "dir" => There::Link("a/b"),
            "loop" => There::Link("loop2"),
            "loop2" => There::Link("loop"),
            "self" => There::Link("."),
            _ => There::Nothing,
        }
    }

    #[test]
    fn links_are_followed_as_in_a_root_of_their_own() {
        for (from, path, end) in [
            ("", "d/file", Ok("d/file")),
            ("a/b", "../../d/file", Ok("d/file")),
            ("a/b", "../../../../../etc/../d/file", Err(Lost::Dangling)),
            ("a", "/abs", Ok("d/file")),
            ("", "up/file", Ok("d/file")),
            ("", "/bin/python3", Ok("usr/bin/python3.11")),
            // `..` is that of where the link leads, not of its name.
            ("", "dir/../b/file", Ok("a/b/file")),
            ("", "d/file/", Ok("d/file")),
            ("", "d/file/x", Err(Lost::Dangling)),
            ("", "self/self/d", Ok("d")),
            ("", ".", Ok("")),
            ("", "loop", Err(Lost::Loop)),
            ("", "nothing", Err(Lost::Dangling)),
        ] {
            let found = follow(from, path, false, there);
            assert_eq!(found.as_deref().map_err(|e| *e), end, "{from} {path}");
        }
        assert_eq!(
            follow("", "bin/new/x", true, there).unwrap(),
            "usr/bin/new/x"
        );
    }

    #[test]
    fn a_way_of_thousands_of_steps_is_not_gone() {
        let long = "a/../".repeat(800);
        let asked = std::cell::Cell::new(0);
        let counted = |path: &str| {
            asked.set(asked.get() + 1);
            match path {
                "l" => There::Link(&long),
                "a" => There::Directory,
                _ => There::Nothing,
            }
        };
        // Forty links of sixteen hundred components each.
        let path = "l/".repeat(40);
        assert_eq!(follow("", &path, false, counted), Err(Lost::Far));
        assert!(asked.get() <= MOST_STEPS, "{}", asked.get());
    }

    #[test]
    fn relative_links_are_the_shortest() {
        for (from, to, link) in [
            ("", "d/file", "d/file"),
            ("a/b", "d/file", "../../d/file"),
            ("a/b", "a/c", "../c"),
            ("a/b", "a/b", "."),
            ("a/b", "", "../.."),
            ("", "", "."),
        ] {
            assert_eq!(relative(from, to), link, "{from} {to}");
        }
    }

    proptest! {
        #[test]
        fn no_link_leads_out(from in "([ab]{1}/?){0,3}", path in "[./ab]{0,20}") {
            if let Ok(end) = follow(&from, &path, true, |_| There::Nothing) {
                prop_assert!(!end.split('/').any(|part| part == ".." || part == "."), "{end}");
                prop_assert!(!end.starts_with('/'));
            }
        }
    }
}
