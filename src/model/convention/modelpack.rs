//! CNCF ModelPack (modelpack/model-spec docs/spec.md), under its present name and its old one, `cnai`.
//!
//! A raw layer is one file, named by annotation. The members of a tar layer are files; there the names in the tar win
//! over the layer's annotation, as in modctl.

use serde::Deserialize;

use super::{
    Convention, Descriptor, Manifest, Role, SMALL_TAR, Step, Under, file_path, keep, nameless,
    title,
};

pub(super) static CONVENTION: Convention = Convention {
    name: "ModelPack",
    recognises,
    needs_config: false,
    steps,
    extras: None,
};

fn recognises(manifest: &Manifest) -> bool {
    let own_types = [
        Some(&manifest.config.media_type),
        manifest.artifact_type.as_ref(),
    ];
    let layer_types = manifest.layers.iter().map(|layer| &layer.media_type);
    own_types
        .into_iter()
        .flatten()
        .chain(layer_types)
        .any(|media_type| tail(media_type).is_some())
}

/// What follows the prefix that all ModelPack types have.
fn tail(media_type: &str) -> Option<&str> {
    ["application/vnd.cncf.model.", "application/vnd.cnai.model."]
        .into_iter()
        .find_map(|prefix| media_type.strip_prefix(prefix))
}

/// Whether a layer is of the model itself, its configuration included.
pub(super) fn is_of_model(media_type: &str) -> bool {
    tail(media_type).is_some_and(|tail| tail.starts_with("weight."))
}

fn steps(manifest: &Manifest, _config: &[u8]) -> Vec<Step> {
    manifest
        .layers
        .iter()
        .enumerate()
        .map(|(n, layer)| keep(n, role(layer)))
        .collect()
}

fn role(layer: &Descriptor) -> Role {
    // `kit pack --use-model-pack` adds its Kitfile as a layer.
    if layer.media_type == super::kitops::CONFIG {
        return Role::File(super::kitops::KITFILE.to_owned());
    }
    // `<kind>.v1.<encoding>`, such as `weight.config.v1.tar+gzip`.
    let (kind, encoding) = tail(&layer.media_type)
        .and_then(|tail| tail.split_once(".v1."))
        .unwrap_or_default();
    if !matches!(encoding, "tar" | "tar+gzip" | "tar+zstd") {
        return name(layer).map_or_else(|| Role::Hidden(nameless()), Role::File);
    }
    let (required, whole_up_to) = match kind {
        "weight" | "layer" => (true, 0),
        "weight.config" => (true, SMALL_TAR),
        _ => (false, SMALL_TAR),
    };
    // Some writers put the file itself under a tar's type; then it is the file that the annotation names.
    Role::Tar {
        required,
        whole_up_to,
        under: Under::Top,
        links: true,
        otherwise: name(layer),
    }
}

/// The path annotation, else the name in the file metadata, else the title.
fn name(layer: &Descriptor) -> Option<String> {
    #[derive(Deserialize)]
    struct Metadata {
        name: String,
    }
    let metadata = [
        "org.cncf.model.file.metadata+json",
        "org.cnai.model.file.metadata+json",
    ];
    let metadata = metadata.into_iter().find_map(|key| layer.annotation(key));
    let metadata = metadata.and_then(|json| serde_json::from_str::<Metadata>(json).ok());
    let metadata = metadata
        .map(|metadata| metadata.name)
        .filter(|name| !name.is_empty());
    file_path(layer)
        .map(str::to_owned)
        .or(metadata)
        .or_else(|| title(layer).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_are_read_alike() {
        for org in ["cncf", "cnai"] {
            let role = |kind: &str, annotations: &[(&str, &str)]| {
                let media_type = format!("application/vnd.{org}.model.{kind}");
                role(&Manifest::for_tests(&[(&media_type, 1, annotations)]).layers[0])
            };
            let path = format!("org.{org}.model.filepath");
            let metadata = format!("org.{org}.model.file.metadata+json");
            for kind in ["weight", "weight.config", "doc", "code", "dataset"] {
                let file = Role::File("a/b".into());
                assert_eq!(role(&format!("{kind}.v1.raw"), &[(&path, "a/b")]), file);
                assert_eq!(
                    role(
                        &format!("{kind}.v1.raw"),
                        &[(&metadata, r#"{"name":"a/b"}"#)]
                    ),
                    file
                );
                assert_eq!(
                    role(
                        &format!("{kind}.v1.raw"),
                        &[("org.opencontainers.image.title", "a/b")]
                    ),
                    file
                );
                assert!(matches!(
                    role(&format!("{kind}.v1.raw"), &[]),
                    Role::Hidden(Some(_))
                ));
                assert!(matches!(
                    role(&format!("{kind}.v1.tar"), &[(&path, "a/b")]),
                    Role::Tar { .. }
                ));
                for encoding in ["tar+gzip", "tar+zstd"] {
                    assert!(matches!(
                        role(&format!("{kind}.v1.{encoding}"), &[(&path, "a/b")]),
                        Role::Tar {
                            otherwise: Some(_),
                            ..
                        }
                    ));
                }
            }
            assert_eq!(role("weight.v1.tar", &[]), Role::tar(true, 0));
            assert_eq!(
                role("weight.v1.safetensors", &[(&path, "m.safetensors")]),
                Role::File("m.safetensors".into())
            );
            assert!(matches!(
                role("layer.v1.tar", &[]),
                Role::Tar { required: true, .. }
            ));
        }
    }
}
