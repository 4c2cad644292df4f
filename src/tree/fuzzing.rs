//! What the fuzzer calls. A panic is a finding.

use super::names::{self, Name, RootName};

/// A name that somebody looks up.
pub fn name(data: &[u8]) {
    let Ok(name) = std::str::from_utf8(data) else {
        return;
    };
    match names::root(name) {
        RootName::Link(target) => {
            assert!(!target.starts_with('/') && !target.split('/').any(|part| part == ".."));
            assert!(target.len() <= 2 * names::NAME_MAX);
            // A link in the root leads to what is none.
            let first = target.split('/').next().unwrap_or_default();
            assert_eq!(names::root(first), RootName::Host, "{name} -> {target}");
        }
        RootName::Host => assert!(!name.contains('/')),
        RootName::Nothing => {}
    }
    match names::below(name) {
        Name::Tagged(component, _)
        | Name::Pinned(component, _)
        | Name::TaggedPinned(component, _) => {
            assert!(name.starts_with(component) && !component.contains('/'));
        }
        Name::Component => assert!(!name.contains('/')),
        Name::TagAlias(_) | Name::DigestAlias(_) | Name::FileLike | Name::Other => {}
    }
}
