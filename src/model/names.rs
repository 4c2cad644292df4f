//! Names from outside: which of them may be paths in a model directory, and how they are written there.

/// Longest path in bytes (PATH_MAX with its NUL is 4096).
const LONGEST_PATH: usize = 4095;
/// Longest component in bytes (NAME_MAX).
const LONGEST_COMPONENT: usize = 255;
/// Most components.
const DEEPEST: usize = 32;
/// The directory that ocifs adds at the top of each model.
pub(super) const RESERVED: &str = ".oci";

/// Why a name is refused.
pub(super) type Refusal = &'static str;

/// The path that a file path annotation asks for.
///
/// Leading `../` are dropped and `.` components removed, as model-runner does: packagers write paths relative to a
/// directory beside the model's. What is absolute, names a directory or leaves the model is refused.
pub(super) fn annotated(name: &str) -> Result<String, Refusal> {
    let mut rest = name;
    while let Some(tail) = rest.strip_prefix("../").or_else(|| rest.strip_prefix("./")) {
        rest = tail;
    }
    if name.starts_with('/') || rest.starts_with('/') {
        return Err("it is absolute");
    }
    let mut components: Vec<&str> = Vec::new();
    for component in rest.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components.pop().ok_or("it leads out of the model")?;
            }
            component => components.push(component),
        }
    }
    if rest.ends_with('/') || rest.ends_with("/.") || rest.ends_with("/..") {
        return Err("it names a directory");
    }
    checked(&components)
}

/// What a tar member's name is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum MemberName {
    /// A name of this path.
    Path(String),
    /// A name that ends in `/` or is the top directory itself: a directory, whatever its type says.
    Directory,
}

/// The components of a path in a tar. `..` is refused wherever it stands: no packager of models needs it.
fn components(path: &str) -> Result<Vec<&str>, Refusal> {
    let components: Vec<&str> = path
        .split('/')
        .filter(|c| !c.is_empty() && *c != ".")
        .collect();
    if components.contains(&"..") {
        return Err("it has a `..` component");
    }
    Ok(components)
}

/// The path of a tar member.
pub(super) fn member(name: &[u8]) -> Result<MemberName, Refusal> {
    let name = std::str::from_utf8(name).map_err(|_| "it is not UTF-8")?;
    if name.starts_with('/') {
        return Err("it is absolute");
    }
    let components = components(name)?;
    if name.ends_with('/') || name.ends_with("/.") || (components.is_empty() && !name.is_empty()) {
        return Ok(MemberName::Directory);
    }
    checked(&components).map(MemberName::Path)
}

/// The path of a directory in a tar.
pub(super) fn directory(name: &[u8]) -> Result<String, Refusal> {
    let name = std::str::from_utf8(name).map_err(|_| "it is not UTF-8")?;
    let components = components(name)?;
    checked(&components)
}

/// Whether a path without `.` and `..` can be that of a file or directory.
pub(super) fn is_proper(path: &str) -> bool {
    checked(&path.split('/').collect::<Vec<_>>()).is_ok()
}

/// Whether this can be the target of a symbolic link. Where it leads is for `links` to find out.
pub(super) fn is_target(target: &str) -> bool {
    !target.is_empty() && target.len() <= LONGEST_PATH && !target.chars().any(char::is_control)
}

fn checked(components: &[&str]) -> Result<String, Refusal> {
    let Some(first) = components.first() else {
        return Err("it is empty");
    };
    if *first == RESERVED {
        return Err("`.oci` is ocifs's own directory");
    }
    if components.len() > DEEPEST {
        return Err("it has more than 32 components");
    }
    if components
        .iter()
        .any(|component| component.len() > LONGEST_COMPONENT)
    {
        return Err("a component is longer than 255 bytes");
    }
    let path = components.join("/");
    if path.len() > LONGEST_PATH {
        return Err("it is longer than 4095 bytes");
    }
    if path.chars().any(char::is_control) {
        return Err("it has a control character");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn annotations_become_paths_below_the_model_or_are_refused() {
        for (name, path) in [
            ("config.json", "config.json"),
            (
                "text_encoder/model.safetensors",
                "text_encoder/model.safetensors",
            ),
            ("./a", "a"),
            ("../a", "a"),
            ("../../a/b", "a/b"),
            (".././../a", "a"),
            ("a//b/./c", "a/b/c"),
            ("a/../b", "b"),
            ("a\\..\\b", "a\\..\\b"),
            ("..a/b..", "..a/b.."),
            ("ä ö.txt", "ä ö.txt"),
            ("a/.oci/b", "a/.oci/b"),
            (".ocifs", ".ocifs"),
        ] {
            assert_eq!(annotated(name).as_deref(), Ok(path), "{name}");
        }
        for name in [
            "",
            ".",
            "./",
            "..",
            "../",
            "/",
            "/etc/passwd",
            "..//etc/passwd",
            "a/",
            "a/.",
            "a/..",
            "a/../..",
            "a/../../b",
            "a\0b",
            "a\nb",
            "\u{85}",
            ".oci",
            ".oci/manifest.json",
            "./.oci/x",
            "a/../.oci/x",
        ] {
            assert!(
                annotated(name).is_err(),
                "{name:?} gave {:?}",
                annotated(name)
            );
        }
        assert!(annotated(&"x".repeat(256)).is_err());
        assert!(annotated(&vec!["x"; 33].join("/")).is_err());
        assert!(annotated(&vec!["x".repeat(255); 20].join("/")).is_err());
        assert!(annotated(&vec!["x"; 32].join("/")).is_ok());
    }

    #[test]
    fn members_outside_the_tree_are_refused() {
        assert_eq!(member(b"./a/b"), Ok(MemberName::Path("a/b".into())));
        for name in ["a/", "./", ".", "a/."] {
            assert_eq!(member(name.as_bytes()), Ok(MemberName::Directory), "{name}");
        }
        for name in ["", "..", "../a", "a/../b", "/a", "/", ".oci/x", "a\x07"] {
            assert!(member(name.as_bytes()).is_err(), "{name:?}");
        }
        assert!(member(b"\xff").is_err());
    }

    fn is_inside(path: &str) -> bool {
        !path.is_empty()
            && path.split('/').all(|c| !["", ".", ".."].contains(&c))
            && !path.contains('\0')
    }

    proptest! {
        #[test]
        fn no_annotation_leads_outside(name in "[./a-c\\\\\0oi]{0,24}|\\PC{0,40}") {
            if let Ok(path) = annotated(&name) {
                prop_assert!(is_inside(&path), "{path:?}");
                prop_assert_eq!(annotated(&path), Ok(path));
            }
        }

        #[test]
        fn no_member_leads_outside(name in proptest::collection::vec(prop_oneof![Just(b'.'), Just(b'/'), any::<u8>()], 0..24)) {
            if let Ok(MemberName::Path(path)) = member(&name) {
                prop_assert!(is_inside(&path), "{path:?}");
            }
        }
    }
}
