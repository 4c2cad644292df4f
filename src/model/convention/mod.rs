//! Packaging conventions: what each layer of an artifact is. One file each; adding one is that file and a line in [`ALL`].
//!
//! A convention looks at media types and annotations alone. It gives steps; `layout` carries them out and is the one
//! place that decides about unusable and repeated paths.

use bytes::Bytes;

use super::manifest::{Descriptor, Manifest};
use crate::registry::Reference;

mod docker;
mod docker_v01;
mod generic;
mod image;
mod kitops;
mod modelfile;
mod modelpack;
mod ollama;

/// All conventions in the order in which they are tried; the last takes everything.
static ALL: &[&Convention] = &[
    &docker_v01::CONVENTION,
    &docker::CONVENTION,
    &kitops::CONVENTION,
    &modelpack::CONVENTION,
    &ollama::CONVENTION,
    &image::CONVENTION,
    &generic::CONVENTION,
];

/// One way to package a model.
#[derive(Debug)]
pub(super) struct Convention {
    /// What people call it.
    pub(super) name: &'static str,
    /// Whether this artifact follows it.
    recognises: fn(&Manifest) -> bool,
    /// Whether the steps depend on what the config says; it is empty else, so that nothing waits for it.
    pub(super) needs_config: bool,
    /// What to do with each layer, in the order of doing; each layer occurs once. The config may be empty or anything at all.
    pub(super) steps: fn(&Manifest, &[u8]) -> Vec<Step>,
    /// What there is beside the layers.
    pub(super) extras: Option<fn(&Manifest, &[u8]) -> Extras>,
}

/// What a convention shows that is no layer.
#[derive(Debug, Default)]
pub(super) struct Extras {
    /// Files of the top folder that the config makes up.
    pub(super) files: Vec<(&'static str, Bytes)>,
    /// The artifact whose model is shown as this one's own.
    pub(super) base: Option<Reference>,
    /// A file that is made of the texts of layers.
    pub(super) composed: Option<Composed>,
    /// What is worth saying.
    pub(super) notes: Vec<String>,
}

/// A file of the top folder that is made of what some layers say.
#[derive(Debug)]
pub(super) struct Composed {
    /// Its name.
    pub(super) name: &'static str,
    /// The layers, by their index in the manifest.
    pub(super) layers: Vec<usize>,
    /// Makes it.
    pub(super) make: Compose,
}

/// Makes a text of the manifest, the config, and what some layers hold; else says why not.
type Compose = fn(&Manifest, &[u8], &[Bytes]) -> Result<String, String>;

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
    /// A tar whose members are files; whether and how it is compressed, its bytes tell, whatever its type says.
    Tar {
        /// Whether the artifact is of no use when the tar is damaged.
        required: bool,
        /// Up to which size the tar is fetched whole and verified before it is looked into; larger ones are walked
        /// by small ranges.
        whole_up_to: u64,
        /// Where its members go.
        under: Under,
        /// Whether its links are shown.
        links: bool,
        /// The name of the file that the layer is if it turns out not to be a tar.
        otherwise: Option<String>,
    },
    /// Visible under `.oci/blobs` only, for the reason given if it is worth a note.
    Hidden(Option<String>),
}

impl Role {
    /// A tar whose names are those of the model.
    pub(super) fn tar(required: bool, whole_up_to: u64) -> Self {
        Self::Tar {
            required,
            whole_up_to,
            under: Under::Top,
            links: true,
            otherwise: None,
        }
    }
}

/// Where the members of a tar go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Under {
    /// Where their names say.
    Top,
    /// Into the folder of this name, which their own names may begin with.
    Titled(String),
    /// Into the folder of this name.
    Folder(String),
}

/// What happens when a path is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clash {
    /// The file that is there stays.
    KeepFirst,
    /// The later file takes its place.
    Replace,
    /// It lies over the former as the layers of a container image do, whiteouts included.
    Overlay,
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

/// Whether a layer of this type is part of the model that an artifact has, and not of what is packed beside it.
pub(super) fn is_of_model(media_type: &str) -> bool {
    kitops::is_of_model(media_type) || modelpack::is_of_model(media_type)
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
            "application/vnd.kitops.modelkit.modelpart.v1.tar+gzip",
            "application/vnd.ollama.image.license",
            "application/vnd.ollama.image.tensor",
            "application/vnd.oci.image.layer.v1.tar+zstd",
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
            let mut seen: Vec<usize> = (convention.steps)(&manifest, b"{}")
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
                "container image",
            ),
            (
                "application/vnd.kitops.modelkit.config.v1+json",
                None,
                "application/vnd.kitops.modelkit.model.v1.tar",
                "KitOps ModelKit",
            ),
            (
                "application/vnd.docker.container.image.v1+json",
                None,
                "application/vnd.ollama.image.model",
                "Ollama model",
            ),
        ] {
            let mut manifest = Manifest::for_tests(&[(layer, 1, &[])]);
            manifest.config.media_type = config.into();
            manifest.artifact_type = artifact_type.map(str::to_owned);
            assert_eq!(of(&manifest).name, name, "{config}");
        }
    }
}
