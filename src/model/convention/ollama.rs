//! Ollama's manifests: layers named by their type alone, or, in models that are stored tensor by tensor, by the field
//! `name` of their descriptor (ollama `server/images.go`, `types/model`, `x/create`).
//!
//! The names here are those that llama.cpp takes (`model.gguf`, `-00001-of-0000N`, `mmproj.gguf`) and those under which Hugging
//! Face lets a repository carry the same things for Ollama (`template`, `system`, `params`).

use bytes::Bytes;

use super::modelfile::{Part, modelfile};
use super::{
    Composed, Convention, Descriptor, Extras, Manifest, Role, Step, file_path, keep, nameless,
    title,
};
use crate::model::shards::plain_name;

const PREFIX: &str = "application/vnd.ollama.image.";

pub(super) static CONVENTION: Convention = Convention {
    name: "Ollama model",
    recognises: |manifest| {
        manifest
            .layers
            .iter()
            .any(|layer| layer.media_type.starts_with(PREFIX))
    },
    needs_config: false,
    steps,
    extras: Some(extras),
};

fn steps(manifest: &Manifest, _config: &[u8]) -> Vec<Step> {
    let names = names(manifest).into_iter();
    let role = |name: Option<String>| name.map_or_else(|| Role::Hidden(nameless()), Role::File);
    names
        .enumerate()
        .map(|(n, name)| keep(n, role(name)))
        .collect()
}

fn kind(layer: &Descriptor) -> &str {
    layer.media_type.strip_prefix(PREFIX).unwrap_or_default()
}

/// The name of each layer.
fn names(manifest: &Manifest) -> Vec<Option<String>> {
    let models = manifest
        .layers
        .iter()
        .filter(|layer| kind(layer) == "model")
        .count();
    let mut seen = std::collections::BTreeMap::new();
    let mut names = Vec::with_capacity(manifest.layers.len());
    for layer in &manifest.layers {
        let kind = kind(layer);
        let number = seen.entry(kind).or_insert(0_usize);
        *number += 1;
        // The second of a kind and those after it carry their number.
        let numbered = |stem: &str, extension: &str| match *number {
            1 => format!("{stem}{extension}"),
            n => format!("{stem}-{n}{extension}"),
        };
        names.push(match (kind, &layer.name) {
            // A tensor is a safetensors file of its own.
            ("tensor", Some(name)) => Some(format!("{name}.safetensors")),
            (_, Some(name)) => Some(name.clone()),
            ("model", None) => Some(plain_name(*number, models, ".gguf")),
            ("projector", None) => Some(numbered("mmproj", ".gguf")),
            ("adapter" | "draft" | "embed", None) => Some(numbered(kind, ".gguf")),
            ("license", None) => Some(numbered("LICENSE", "")),
            ("template" | "system" | "params" | "messages" | "prompt", None) => {
                Some(numbered(kind, ""))
            }
            _ => file_path(layer).or_else(|| title(layer)).map(str::to_owned),
        });
    }
    names
}

/// The Modelfile, of a model that is a GGUF.
fn extras(manifest: &Manifest, _config: &[u8]) -> Extras {
    let is_whole = manifest
        .layers
        .iter()
        .any(|layer| kind(layer) == "model" && layer.name.is_none());
    let composed = is_whole.then(|| Composed {
        name: "Modelfile",
        layers: texts(manifest),
        make: compose,
    });
    Extras {
        composed,
        ..Extras::default()
    }
}

/// The layers that a Modelfile has in itself.
fn texts(manifest: &Manifest) -> Vec<usize> {
    let is_text = |layer: &Descriptor| {
        ["template", "system", "params", "license", "messages"].contains(&kind(layer))
    };
    let layers = manifest.layers.iter().enumerate();
    layers
        .filter(|(_, layer)| is_text(layer))
        .map(|(n, _)| n)
        .collect()
}

fn compose(manifest: &Manifest, config: &[u8], texts_found: &[Bytes]) -> Result<String, String> {
    let refuse = |what: &str| format!("a Modelfile cannot say what {what} says");
    let texts: std::collections::BTreeMap<usize, &Bytes> =
        texts(manifest).into_iter().zip(texts_found).collect();
    let names = names(manifest);
    let mut parts = Vec::new();
    for (n, layer) in manifest.layers.iter().enumerate() {
        let name = names[n].as_deref().unwrap_or_default();
        let text = match texts.get(&n) {
            Some(text) => std::str::from_utf8(text).map_err(|_| refuse(name))?,
            None => "",
        };
        parts.push(match kind(layer) {
            "model" | "projector" => Part::From(name),
            "adapter" => Part::Adapter(name),
            "draft" => Part::Draft(name),
            // An empty text is none.
            "template" | "system" | "license" if text.is_empty() => continue,
            "template" => Part::Template(text),
            "system" => Part::System(text),
            "license" => Part::License(text),
            "params" => Part::Params(text),
            "messages" => Part::Messages(text),
            other => return Err(refuse(&format!("a layer of the kind `{other}`"))),
        });
    }
    modelfile(config, &parts).map_err(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(layers: &[(&str, Option<&str>)]) -> Vec<Option<String>> {
        let types: Vec<String> = layers
            .iter()
            .map(|(kind, _)| format!("{PREFIX}{kind}"))
            .collect();
        let plain: Vec<_> = types.iter().map(|t| (t.as_str(), 1, &[][..])).collect();
        let mut manifest = Manifest::for_tests(&plain);
        for (layer, (_, name)) in manifest.layers.iter_mut().zip(layers) {
            layer.name = name.map(str::to_owned);
        }
        let name = |step: Step| match step.role {
            Role::File(name) => Some(name),
            _ => None,
        };
        steps(&manifest, &[]).into_iter().map(name).collect()
    }

    #[test]
    fn layers_are_named_by_their_types() {
        let found = names(&[
            ("model", None),
            ("projector", None),
            ("adapter", None),
            ("adapter", None),
            ("template", None),
            ("license", None),
            ("license", None),
            ("params", None),
            ("system", None),
            ("messages", None),
            ("news", None),
        ]);
        let found: Vec<_> = found.iter().map(Option::as_deref).collect();
        assert_eq!(
            found,
            [
                Some("model.gguf"),
                Some("mmproj.gguf"),
                Some("adapter.gguf"),
                Some("adapter-2.gguf"),
                Some("template"),
                Some("LICENSE"),
                Some("LICENSE-2"),
                Some("params"),
                Some("system"),
                Some("messages"),
                None,
            ]
        );
    }

    #[test]
    fn a_split_model_is_numbered_and_tensors_have_their_own_names() {
        let found = names(&[("model", None), ("model", None)]);
        assert_eq!(found[1].as_deref(), Some("model-00002-of-00002.gguf"));
        let found = names(&[
            ("tensor", Some("text_encoder/model.embed_tokens.weight")),
            ("json", Some("text_encoder/config.json")),
        ]);
        assert_eq!(
            found[0].as_deref(),
            Some("text_encoder/model.embed_tokens.weight.safetensors")
        );
        assert_eq!(found[1].as_deref(), Some("text_encoder/config.json"));
    }
}
