//! Packaging conventions: what each layer of an artifact is. One file each; adding one is that file and a line in [`ALL`].
//!
//! A convention looks at media types and annotations alone. It gives steps; `layout` carries them out and is the one
//! place that decides about unusable and repeated paths.

use super::manifest::{Descriptor, Manifest};

mod docker;
mod docker_v01;
mod generic;
mod modelpack;

/// All conventions in the order in which they are tried; the last takes everything.
static ALL: &[&Convention] = &[
    &docker_v01::CONVENTION,
    &docker::CONVENTION,
    &modelpack::CONVENTION,
    &generic::CONVENTION,
];

/// One way to package a model.
#[derive(Debug)]
pub(super) struct Convention {
    /// What people call it.
    pub(super) name: &'static str,
    /// Whether this artifact follows it.
    recognises: fn(&Manifest) -> bool,
    /// What to do with each layer, in the order of doing; each layer occurs once.
    pub(super) steps: fn(&Manifest) -> Vec<Step>,
}

/// What to do with one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// The layer's index in the manifest.
    pub(super) layer: usize,
    /// What it is.
    pub(super) role: Role,
    /// What happens where an earlier step has put a file on the same path.
    pub(super) clash: Clash,
}

/// What a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A file under this name, which nobody has checked yet.
    File(String),
    /// One safetensors shard whose name is to be found out.
    NamelessShard,
    /// An uncompressed tar whose members are files.
    Tar {
        /// Whether the artifact is of no use when the tar is damaged.
        required: bool,
        /// Up to which size the tar is fetched whole and verified before it is looked into; larger ones are walked
        /// by small ranges.
        whole_up_to: u64,
    },
    /// Visible under `.oci/blobs` only, for the reason given if it is worth a note.
    Hidden(Option<String>),
}

/// What happens when a path is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clash {
    /// The file that is there stays.
    KeepFirst,
    /// The later file takes its place.
    Replace,
}

/// A tar of configs: completed and verified first up to this size.
const CONFIG_TAR: u64 = 256 << 20;
/// Other tars without weights.
const SMALL_TAR: u64 = 4 << 20;

/// The convention that an artifact follows.
pub(super) fn of(manifest: &Manifest) -> &'static Convention {
    ALL.iter()
        .find(|convention| (convention.recognises)(manifest))
        .expect("the last convention takes everything")
}

/// Keeps the first of two files on one path.
fn keep(layer: usize, role: Role) -> Step {
    Step {
        layer,
        role,
        clash: Clash::KeepFirst,
    }
}

/// The path of a layer in the words of ModelPack's annotations, old and new.
fn file_path(layer: &Descriptor) -> Option<&str> {
    layer
        .annotation("org.cncf.model.filepath")
        .or_else(|| layer.annotation("org.cnai.model.filepath"))
}

/// The title of a layer as ORAS writes it (image-spec annotations.md).
fn title(layer: &Descriptor) -> Option<&str> {
    layer.annotation("org.opencontainers.image.title")
}

/// A note on a layer that has no name.
fn nameless() -> Option<String> {
    Some("it has no name".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_occurs_in_one_step() {
        let types = [
            "application/vnd.docker.ai.safetensors",
            "application/vnd.docker.ai.gguf.v3",
            "application/vnd.docker.ai.vllm.config.tar",
            "application/vnd.docker.ai.dir.tar",
            "application/vnd.docker.ai.model.file",
            "application/vnd.cncf.model.weight.v1.raw",
            "application/vnd.cncf.model.doc.v1.tar",
            "application/vnd.cnai.model.weight.v1.tar+gzip",
            "application/octet-stream",
            "",
        ];
        let layers: Vec<_> = types
            .iter()
            .flat_map(|t| {
                [
                    (*t, 1, &[][..]),
                    (*t, 1, &[("org.cncf.model.filepath", "x")][..]),
                ]
            })
            .collect();
        let manifest = Manifest::for_tests(&layers);
        for convention in ALL {
            let mut seen: Vec<usize> = (convention.steps)(&manifest)
                .iter()
                .map(|step| step.layer)
                .collect();
            seen.sort_unstable();
            assert_eq!(
                seen,
                (0..layers.len()).collect::<Vec<_>>(),
                "{}",
                convention.name
            );
        }
    }

    #[test]
    fn artifacts_are_recognised_by_their_types() {
        for (config, artifact_type, layer, name) in [
            (
                "application/vnd.docker.ai.model.config.v0.1+json",
                None,
                "",
                "Docker model v0.1",
            ),
            (
                "application/vnd.docker.ai.model.config.v0.2+json",
                None,
                "",
                "Docker model",
            ),
            (
                "application/vnd.cncf.model.config.v1+json",
                None,
                "",
                "ModelPack",
            ),
            (
                "application/vnd.cnai.model.config.v1+json",
                None,
                "",
                "ModelPack",
            ),
            (
                "application/vnd.oci.empty.v1+json",
                Some("application/vnd.cncf.model.manifest.v1+json"),
                "",
                "ModelPack",
            ),
            (
                "application/vnd.oci.empty.v1+json",
                None,
                "application/vnd.cncf.model.weight.v1.raw",
                "ModelPack",
            ),
            (
                "application/vnd.oci.empty.v1+json",
                None,
                "application/octet-stream",
                "OCI artifact",
            ),
            (
                "application/vnd.oci.image.config.v1+json",
                None,
                "application/vnd.oci.image.layer.v1.tar+gzip",
                "OCI artifact",
            ),
        ] {
            let mut manifest = Manifest::for_tests(&[(layer, 1, &[])]);
            manifest.config.media_type = config.into();
            manifest.artifact_type = artifact_type.map(str::to_owned);
            assert_eq!(of(&manifest).name, name, "{config}");
        }
    }
}
