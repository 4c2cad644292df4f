//! KitOps ModelKits: tar layers that the Kitfile, which is the config, describes.
//!
//! Sources: kitops `pkg/lib/constants/mediatype/kitops.go` for the types, `pkg/artifact/kitfile.go` for the config,
//! `pkg/lib/filesystem/unpack/core.go` for the paths. A layer's entry in the Kitfile is the one with its digest, in kits that
//! tell digests; there the names in the tar are the paths. In older ones it is the next entry of the layer's kind, and the
//! names are relative to the folder that the entry's path lies in.
//!
//! A kit may have the model of another one: its `model.path` is then a reference, and of the artifact there the model is shown beside the
//! kit's own files.

use std::collections::HashMap;

use bytes::Bytes;
use serde::Deserialize;

use super::{
    Convention, Descriptor, Extras, Manifest, Role, SMALL_TAR, Step, Under, file_path, keep,
    nameless, title,
};
use crate::model::notes::quote;
use crate::registry::Reference;

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

    /// The entries of each of [`KINDS`].
    fn by_kind(self) -> [Vec<Entry>; KINDS.len()] {
        let (model, parts) = match self.model {
            Some(Model {
                path,
                digest,
                parts,
            }) => (vec![Entry { path, digest }], parts),
            None => Default::default(),
        };
        [
            model,
            parts,
            self.code,
            self.datasets,
            self.docs,
            self.prompts,
        ]
    }
}

/// What a code layer is in truth (kitops `pkg/lib/constants/consts.go`).
const SUBTYPE: &str = "ml.kitops.modelkit.layer-subtype";
const KINDS: [&str; 6] = ["model", "modelpart", "code", "dataset", "docs", "prompt"];

fn steps(manifest: &Manifest, config: &[u8]) -> Vec<Step> {
    let kinds = Kitfile::parse(config).by_kind();
    // Both lists may be long, so each is gone through once.
    let mut by_digest: HashMap<&str, &Entry> = HashMap::new();
    for entry in kinds.iter().flatten() {
        if let Some(digest) = &entry.digest {
            by_digest.entry(digest).or_insert(entry);
        }
    }
    let mut seen = [0_usize; KINDS.len()];
    let mut steps = Vec::with_capacity(manifest.layers.len());
    for (n, layer) in manifest.layers.iter().enumerate() {
        // `<kind>.v1.<encoding>`, such as `modelpart.v1.tar+gzip`.
        let (kind, encoding) = layer
            .media_type
            .strip_prefix(PREFIX)
            .and_then(|tail| tail.split_once(".v1."))
            .unwrap_or_default();
        let kind = match (kind, layer.annotation(SUBTYPE)) {
            ("code", Some("prompt")) => "prompt",
            _ => kind,
        };
        let Some(place) = KINDS.iter().position(|known| *known == kind) else {
            steps.push(keep(n, unknown(layer)));
            continue;
        };
        let digest = layer.digest.to_string();
        let told = by_digest.get(digest.as_str());
        let next = kinds[place].get(seen[place]);
        seen[place] += 1;
        let path = told.map(|entry| entry.path.clone()).or_else(|| {
            next.map(|entry| entry.path.clone())
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
        let under = match (told, next) {
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

/// Whether a layer is of the model itself.
pub(super) fn is_of_model(media_type: &str) -> bool {
    let kind = media_type.strip_prefix(PREFIX);
    kind.is_some_and(|kind| kind.starts_with("model.") || kind.starts_with("modelpart."))
}

/// Where a kit's model is.
#[derive(Debug, PartialEq, Eq)]
enum Whose {
    /// In its layers.
    Own,
    /// In this artifact.
    Of(Box<Reference>),
    /// In an artifact of the packager's own storage, which no registry has.
    Stored,
}

/// What the path of a kit's model says (kitops `pkg/artifact/util.go`): with a tag or a digest it is a reference, whose first component is a
/// registry when it looks like one; further tags may follow behind commas.
fn whose(path: &str) -> Whose {
    let text = path.split(',').next().unwrap_or_default();
    let Some(reference) = Some(text)
        .filter(|text| text.contains([':', '@']))
        .and_then(|text| text.parse::<Reference>().ok())
    else {
        return Whose::Own;
    };
    match text.split_once('/') {
        Some((host, _)) if host.contains([':', '.']) => Whose::Of(Box::new(reference)),
        _ => Whose::Stored,
    }
}

/// The Kitfile at the top, as it is packaged: JSON, which is YAML too.
fn extras(manifest: &Manifest, config: &[u8]) -> Extras {
    let mut extras = Extras::default();
    if manifest.config.media_type == CONFIG && !config.is_empty() {
        extras.files.push((KITFILE, Bytes::copy_from_slice(config)));
    }
    let kitfile = Kitfile::parse(config);
    let path = kitfile.model.map(|model| model.path).unwrap_or_default();
    match whose(&path) {
        Whose::Own => {}
        Whose::Of(reference) => extras.base = Some(*reference),
        Whose::Stored => extras.notes.push(format!(
            "its model is that of the kit {}, in the storage of whoever packed it",
            quote(&path)
        )),
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
    fn a_long_kitfile_for_many_layers_is_gone_through_once() {
        let kinds = vec!["code.v1.tar"; 20_000];
        let entries: Vec<_> = (0..200_000)
            .map(|n| json!({"path": n.to_string(), "digest": "sha256:0"}))
            .collect();
        let config = json!({"code": entries}).to_string();
        // Each layer with the whole list is four thousand million entries: minutes.
        let begun = std::time::Instant::now();
        assert_eq!(
            steps(&manifest(&kinds), config.as_bytes()).len(),
            kinds.len()
        );
        assert!(begun.elapsed() < std::time::Duration::from_secs(60));
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
    fn a_path_with_a_tag_or_a_digest_is_another_kit() {
        let digest = crate::base::Digest::of(b"kit");
        for (path, whose_model) in [
            ("./model.gguf", None),
            ("models/", None),
            ("", None),
            ("C:\\model.gguf", None),
            ("ghcr.io/jozu/base:v1", Some("ghcr.io/jozu/base:v1")),
            ("ghcr.io/jozu/base:v1,v2", Some("ghcr.io/jozu/base:v1")),
            ("localhost:5000/base:v1", Some("localhost:5000/base:v1")),
            (
                &format!("ghcr.io/jozu/base@{digest}"),
                Some(&format!("ghcr.io/jozu/base@{digest}")),
            ),
        ] {
            let wanted = whose_model.map_or(Whose::Own, |text| {
                Whose::Of(Box::new(text.parse().unwrap()))
            });
            assert_eq!(whose(path), wanted, "{path}");
        }
        assert_eq!(whose("jozu/base:v1"), Whose::Stored);
        assert_eq!(whose("base:v1"), Whose::Stored);

        let manifest = manifest(&[]);
        let of = |path: &str| {
            let config = json!({"model": {"path": path}}).to_string();
            extras(&manifest, config.as_bytes())
        };
        let found = of("ghcr.io/jozu/base:v1");
        assert_eq!(found.base, "ghcr.io/jozu/base:v1".parse().ok());
        assert!(found.notes.is_empty() && found.files.len() == 1);
        let stored = of("jozu/base:v1");
        assert!(stored.base.is_none() && stored.notes[0].contains("`jozu/base:v1`"));
    }

    #[test]
    fn prompts_are_code_by_their_type() {
        let mut manifest = manifest(&["code.v1.tar", "code.v1.tar"]);
        manifest.layers[0]
            .annotations
            .insert(SUBTYPE.to_owned(), "prompt".to_owned());
        let config = json!({"code": [{"path": "src/a.py"}], "prompts": [{"path": "p/b.md"}]});
        let steps = steps(&manifest, config.to_string().as_bytes());
        assert_eq!(under(&steps[0]), &Under::Folder("p".into()));
        assert_eq!(under(&steps[1]), &Under::Folder("src".into()));
    }

    #[test]
    fn the_model_alone_is_what_another_kit_takes() {
        for kind in ["model.v1.tar", "modelpart.v1.tar+gzip", "model.v1.raw"] {
            assert!(is_of_model(&format!("{PREFIX}{kind}")), "{kind}");
        }
        for kind in [
            "code.v1.tar",
            "dataset.v1.tar",
            "docs.v1.tar",
            "config.v1+json",
        ] {
            assert!(!is_of_model(&format!("{PREFIX}{kind}")), "{kind}");
        }
    }
}
