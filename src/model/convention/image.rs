//! Container images: their layers over each other are the directory (image-spec layer.md), as in KServe's modelcars and RamaLama's
//! images, which carry the model below `/models`.

use super::{Clash, Convention, Manifest, Role, SMALL_TAR, Step, title};

pub(super) static CONVENTION: Convention = Convention {
    name: "container image",
    recognises,
    needs_config: true,
    steps,
    extras: None,
};

const CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

fn is_layer(media_type: &str) -> bool {
    [
        "application/vnd.oci.image.layer.",
        "application/vnd.docker.image.rootfs.",
    ]
    .iter()
    .any(|prefix| media_type.starts_with(prefix))
}

/// An image has an image's config and layers. Where every layer has a title, somebody took these types for an artifact's files.
fn recognises(manifest: &Manifest) -> bool {
    CONFIGS.contains(&manifest.config.media_type.as_str())
        && !manifest.layers.is_empty()
        && manifest
            .layers
            .iter()
            .all(|layer| is_layer(&layer.media_type))
        && !manifest.layers.iter().all(|layer| title(layer).is_some())
}

fn steps(manifest: &Manifest, _config: &[u8]) -> Vec<Step> {
    let step = |layer| Step {
        layer,
        role: Role::tar(true, SMALL_TAR),
        clash: Clash::Overlay,
    };
    (0..manifest.layers.len()).map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_under_an_images_types_are_no_image() {
        const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
        let titled = (LAYER, 1, &[("org.opencontainers.image.title", "a")][..]);
        let plain = (LAYER, 1, &[][..]);
        let is_image = |config: &str, layers: &[_]| {
            let mut manifest = Manifest::for_tests(layers);
            manifest.config.media_type = config.into();
            recognises(&manifest)
        };
        assert!(is_image(CONFIGS[0], &[plain]));
        assert!(
            is_image(CONFIGS[1], &[plain, titled]),
            "a layer that was put on top"
        );
        assert!(!is_image(CONFIGS[0], &[titled]));
        assert!(!is_image(CONFIGS[0], &[]));
        assert!(!is_image("application/vnd.oci.empty.v1+json", &[plain]));
        assert!(!is_image(CONFIGS[0], &[plain, ("text/plain", 1, &[][..])]));
    }
}
