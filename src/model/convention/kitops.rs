//! KitOps ModelKits: tar layers that the Kitfile, which is the config, describes.
//!
//! Sources: kitops `pkg/lib/constants/mediatype/kitops.go` for the types, `pkg/artifact/kitfile.go` for the config,
//! `pkg/lib/filesystem/unpack/core.go` for the paths. A layer's entry in the Kitfile is the one with its digest, in kits that
//! tell digests; there the names in the tar are the paths. In older ones it is the next entry of the layer's kind, and the
//! names are relative to the folder that the entry's path lies in.

use bytes::Bytes;
use serde::Deserialize;

use super::{
    Convention, Descriptor, Extras, Manifest, Role, SMALL_TAR, Step, Under, file_path, keep,
    nameless, title,
};
use crate::model::notes::quote;

/// The type of a Kitfile.
pub(super) const CONFIG: &str = "application/vnd.kitops.modelkit.config.v1+json";
/// The name of a Kitfile.
pub(super) const KITFILE: &str = "Kitfile";
const PREFIX: &str = "application/vnd.kitops.modelkit.";

pub(super) static CONVENTION: Convention = Convention {
    name: "KitOps ModelKit",
    recognises: |manifest| {
        manifest.config.media_type == CONFIG
            || manifest
                .artifact_type
                .as_deref()
                .is_some_and(|text| text.starts_with(PREFIX))
    },
    needs_config: true,
    steps,
    extras: Some(extras),
};

/// What of a Kitfile matters here; what else there is may be anything.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Kitfile {
    model: Option<Model>,
    code: Vec<Entry>,
    datasets: Vec<Entry>,
    docs: Vec<Entry>,
    prompts: Vec<Entry>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Model {
    path: String,
    digest: Option<String>,
    parts: Vec<Entry>,
}

#[derive(Clone, Deserialize, Default)]
#[serde(default)]
struct Entry {
    path: String,
    digest: Option<String>,
}

impl Kitfile {
    fn parse(config: &[u8]) -> Self {
        serde_json::from_slice(config).unwrap_or_default()
    }

    fn of_kind(&self, kind: &str) -> Vec<Entry> {
        let model = self.model.as_ref();
        match kind {
            "model" => model
                .map(|model| Entry {
                    path: model.path.clone(),
                    digest: model.digest.clone(),
                })
                .into_iter()
                .collect(),
            "modelpart" => model.map(|model| model.parts.clone()).unwrap_or_default(),
            "code" => self.code.clone(),
            "dataset" => self.datasets.clone(),
            "docs" => self.docs.clone(),
            "prompt" => self.prompts.clone(),
            _ => Vec::new(),
        }
    }
}

const KINDS: [&str; 6] = ["model", "modelpart", "code", "dataset", "docs", "prompt"];

fn steps(manifest: &Manifest, config: &[u8]) -> Vec<Step> {
    let kitfile = Kitfile::parse(config);
    let all: Vec<Entry> = KINDS
        .iter()
        .flat_map(|kind| kitfile.of_kind(kind))
        .collect();
    let mut seen = [0_usize; KINDS.len()];
    let mut steps = Vec::with_capacity(manifest.layers.len());
    for (n, layer) in manifest.layers.iter().enumerate() {
        // `<kind>.v1.<encoding>`, such as `modelpart.v1.tar+gzip`.
        let (kind, encoding) = layer
            .media_type
            .strip_prefix(PREFIX)
            .and_then(|tail| tail.split_once(".v1."))
            .unwrap_or_default();
        let Some(place) = KINDS.iter().position(|known| *known == kind) else {
            steps.push(keep(n, unknown(layer)));
            continue;
        };
        let digest = layer.digest.to_string();
        let told = all
            .iter()
            .find(|entry| entry.digest.as_deref() == Some(&digest));
        let next = kitfile.of_kind(kind).into_iter().nth(seen[place]);
        seen[place] += 1;
        let path = told.map(|entry| entry.path.clone()).or_else(|| {
            next.as_ref()
                .map(|entry| entry.path.clone())
                .filter(|path| !path.is_empty())
        });
        if !encoding.starts_with("tar") {
            let path = file_path(layer).map(str::to_owned).or(path);
            steps.push(keep(
                n,
                path.map_or_else(|| Role::Hidden(nameless()), Role::File),
            ));
            continue;
        }
        let under = match (told, &next) {
            (None, Some(entry)) if entry.digest.is_none() => {
                match entry.path.trim_end_matches('/').rsplit_once('/') {
                    Some((folder, _)) => Under::Folder(folder.to_owned()),
                    None => Under::Top,
                }
            }
            _ => Under::Top,
        };
        let role = Role::Tar {
            required: matches!(kind, "model" | "modelpart"),
            whole_up_to: SMALL_TAR,
            under,
            links: true,
            otherwise: path,
        };
        steps.push(keep(n, role));
    }
    steps
}

fn unknown(layer: &Descriptor) -> Role {
    file_path(layer).or_else(|| title(layer)).map_or_else(
        || Role::Hidden(nameless()),
        |name| Role::File(name.to_owned()),
    )
}

/// The Kitfile at the top, as it is packaged: JSON, which is YAML too.
fn extras(manifest: &Manifest, config: &[u8]) -> Extras {
    let mut extras = Extras::default();
    if manifest.config.media_type == CONFIG && !config.is_empty() {
        extras.files.push((KITFILE, Bytes::copy_from_slice(config)));
    }
    let kitfile = Kitfile::parse(config);
    let other = kitfile.model.map(|model| model.path).unwrap_or_default();
    // kitops `pkg/artifact/util.go`: a path with a tag or a digest is a reference.
    if other.contains([':', '@']) && other.parse::<crate::registry::Reference>().is_ok() {
        extras.notes.push(format!(
            "its model is that of another ModelKit, {}: open that one beside it",
            quote(&other)
        ));
    }
    extras
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn manifest(kinds: &[&str]) -> Manifest {
        let types: Vec<String> = kinds.iter().map(|kind| format!("{PREFIX}{kind}")).collect();
        let layers: Vec<_> = types.iter().map(|t| (t.as_str(), 1, &[][..])).collect();
        let mut manifest = Manifest::for_tests(&layers);
        manifest.config.media_type = CONFIG.into();
        manifest
    }

    fn under(step: &Step) -> &Under {
        match &step.role {
            Role::Tar { under, .. } => under,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn entries_of_older_kits_are_paired_by_order_and_kind() {
        let manifest = manifest(&[
            "code.v1.tar",
            "model.v1.tar",
            "code.v1.tar+gzip",
            "docs.v1.tar",
        ]);
        let config = json!({
            "manifestVersion": "1.0.0",
            "model": {"path": "models/m.gguf"},
            "code": [{"path": "a/one.py"}, {"path": "two.py"}],
            "docs": [{"path": "./README.md"}],
        });
        let steps = steps(&manifest, config.to_string().as_bytes());
        let folder = |name: &str| Under::Folder(name.into());
        assert_eq!(
            steps.iter().map(under).collect::<Vec<_>>(),
            [&folder("a"), &folder("models"), &Under::Top, &folder(".")]
        );
    }

    #[test]
    fn entries_with_digests_are_paired_by_them_and_the_tar_names_the_paths() {
        let manifest = manifest(&["model.v1.tar", "modelpart.v1.raw"]);
        let digest = |n: usize| manifest.layers[n].digest.to_string();
        let config = json!({"model": {
            "path": "models/m.gguf", "digest": digest(0), "diffId": digest(0),
            "parts": [{"path": "other"}, {"path": "lora/a.gguf", "digest": digest(1)}],
        }});
        let steps = steps(&manifest, config.to_string().as_bytes());
        assert_eq!(under(&steps[0]), &Under::Top);
        assert_eq!(steps[1].role, Role::File("lora/a.gguf".into()));
    }

    #[test]
    fn a_model_that_is_another_kit_is_said() {
        let manifest = manifest(&[]);
        let config = json!({"model": {"path": "ghcr.io/jozu/base:v1"}}).to_string();
        let extras = extras(&manifest, config.as_bytes());
        assert!(extras.notes[0].contains("`ghcr.io/jozu/base:v1`"));
        assert_eq!(extras.files[0], (KITFILE, Bytes::from(config)));
        for local in ["./model.gguf", "models/", ""] {
            let config = json!({"model": {"path": local}}).to_string();
            assert!(super::extras(&manifest, config.as_bytes()).notes.is_empty());
        }
    }
}
