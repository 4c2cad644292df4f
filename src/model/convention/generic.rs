//! Any other artifact: layers that carry a title or a file path are files of that name (ORAS, podman, RHEL AI).
//!
//! Types prove nothing here: ORAS pushes a plain file as `application/vnd.oci.image.layer.v1.tar` by default, and others put a
//! tar under a file's title. What says that it is a tar is looked into.

use super::{
    Convention, Descriptor, Manifest, Role, SMALL_TAR, Step, Under, file_path, keep, nameless,
    title,
};

pub(super) static CONVENTION: Convention = Convention {
    name: "OCI artifact",
    recognises: |_| true,
    needs_config: false,
    steps,
    extras: None,
};

fn steps(manifest: &Manifest, _config: &[u8]) -> Vec<Step> {
    manifest
        .layers
        .iter()
        .enumerate()
        .map(|(n, layer)| keep(n, role(layer)))
        .collect()
}

/// Title before path, as CRI-O has it.
fn role(layer: &Descriptor) -> Role {
    let name = title(layer).or_else(|| file_path(layer));
    // A folder that ORAS packed: a compressed tar under the folder's name (oras-go, `content/file`).
    let is_folder = layer.annotation("io.deis.oras.content.unpack") == Some("true");
    match name {
        Some(name) if is_folder || (says_tar(&layer.media_type) && !is_archive(name)) => {
            Role::Tar {
                required: is_folder,
                whole_up_to: SMALL_TAR,
                under: if is_folder {
                    Under::Titled(name.to_owned())
                } else {
                    Under::Top
                },
                links: true,
                otherwise: Some(name.to_owned()),
            }
        }
        Some(name) => Role::File(name.to_owned()),
        None => Role::Hidden(nameless()),
    }
}

fn says_tar(media_type: &str) -> bool {
    [".tar", ".tar+gzip", ".tar+zstd", ".tar.gzip", ".tar.zstd"]
        .iter()
        .any(|suffix| media_type.ends_with(suffix))
}

/// Whether a name is that of an archive or a compressed file, which is meant to be one.
fn is_archive(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".tar", ".tgz", ".gz", ".zst", ".zip", ".xz", ".bz2"]
        .iter()
        .any(|suffix| name.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

    fn role_of(media_type: &str, annotations: &[(&str, &str)]) -> Role {
        role(&Manifest::for_tests(&[(media_type, 1, annotations)]).layers[0])
    }

    #[test]
    fn a_title_names_a_file_and_a_tars_type_is_looked_into() {
        let title = ("org.opencontainers.image.title", "a/b.bin");
        let path = ("org.cncf.model.filepath", "c");
        let file = |name: &str| Role::File(name.into());
        assert_eq!(role_of("text/plain", &[title]), file("a/b.bin"));
        assert_eq!(role_of("text/plain", &[title, path]), file("a/b.bin"));
        assert_eq!(role_of("text/plain", &[path]), file("c"));
        assert!(matches!(role_of("text/plain", &[]), Role::Hidden(_)));
        assert!(matches!(role_of(TAR, &[]), Role::Hidden(_)));
        let named = role_of(TAR, &[title]);
        assert!(
            matches!(&named, Role::Tar { required: false, under: Under::Top, otherwise: Some(name), .. } if name == "a/b.bin"),
            "{named:?}"
        );
        let archive = ("org.opencontainers.image.title", "data.tar.GZ");
        assert_eq!(role_of(TAR, &[archive]), file("data.tar.GZ"));
    }

    #[test]
    fn a_folder_that_oras_packed_is_unpacked_whatever_its_type() {
        let folder = role_of(
            "application/vnd.oci.image.layer.v1.tar+gzip",
            &[
                ("org.opencontainers.image.title", "tokenizer"),
                ("io.deis.oras.content.unpack", "true"),
            ],
        );
        assert!(
            matches!(&folder, Role::Tar { required: true, under: Under::Titled(name), .. } if name == "tokenizer"),
            "{folder:?}"
        );
    }
}
