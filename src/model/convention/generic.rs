//! Any other artifact: layers that carry a title or a file path are files of that name (ORAS, podman, RHEL AI).

use super::{Convention, Descriptor, Manifest, Role, Step, file_path, keep, nameless, title};

pub(super) static CONVENTION: Convention = Convention {
    name: "OCI artifact",
    recognises: |_| true,
    steps,
};

fn steps(manifest: &Manifest) -> Vec<Step> {
    manifest
        .layers
        .iter()
        .enumerate()
        .map(|(n, layer)| keep(n, role(layer)))
        .collect()
}

/// Title before path, as CRI-O has it. A folder that ORAS packed is a compressed tar under the folder's name.
fn role(layer: &Descriptor) -> Role {
    if layer.annotation("io.deis.oras.content.unpack") == Some("true") {
        return Role::Hidden(Some("folders packed by ORAS are not unpacked".to_owned()));
    }
    match title(layer).or_else(|| file_path(layer)) {
        Some(name) => Role::File(name.to_owned()),
        None => Role::Hidden(nameless()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_names_a_file_whatever_its_type() {
        let role = |annotations: &[(&str, &str)]| {
            role(
                &Manifest::for_tests(&[("application/vnd.oci.image.layer.v1.tar", 1, annotations)])
                    .layers[0],
            )
        };
        let title = ("org.opencontainers.image.title", "a/b.bin");
        assert_eq!(role(&[title]), Role::File("a/b.bin".into()));
        assert_eq!(
            role(&[title, ("org.cncf.model.filepath", "c")]),
            Role::File("a/b.bin".into())
        );
        assert_eq!(
            role(&[("org.cncf.model.filepath", "c")]),
            Role::File("c".into())
        );
        assert!(matches!(
            role(&[title, ("io.deis.oras.content.unpack", "true")]),
            Role::Hidden(Some(_))
        ));
        assert!(matches!(role(&[]), Role::Hidden(_)));
    }
}
