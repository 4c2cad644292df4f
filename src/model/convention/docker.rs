//! Docker's model format from v0.2 on: every file its own layer, its nested path in an annotation.

use super::docker_v01::unlinked;
use super::{CONFIG_TAR, Convention, Manifest, Role, SMALL_TAR, Step, file_path, keep, nameless};

pub(super) static CONVENTION: Convention = Convention {
    name: "Docker model",
    recognises: |manifest| {
        manifest
            .config
            .media_type
            .starts_with("application/vnd.docker.ai.model.config.")
    },
    needs_config: false,
    steps,
    extras: None,
};

fn steps(manifest: &Manifest, _config: &[u8]) -> Vec<Step> {
    let role = |(n, layer): (usize, &super::Descriptor)| {
        let role = match (layer.media_type.as_str(), file_path(layer)) {
            ("application/vnd.docker.ai.vllm.config.tar", None) => unlinked(CONFIG_TAR),
            ("application/vnd.docker.ai.dir.tar", None) => unlinked(SMALL_TAR),
            (_, Some(path)) => Role::File(path.to_owned()),
            (_, None) => Role::Hidden(nameless()),
        };
        keep(n, role)
    };
    manifest.layers.iter().enumerate().map(role).collect()
}
