//! What a file is, by its name: the rules that Docker's and ModelPack's packagers follow.

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Weights in any format.
    Weight,
    /// A licence or a notice that goes with it.
    License,
    /// A Jinja chat template.
    ChatTemplate,
    /// Other text for people.
    Doc,
    /// Program text.
    Code,
    /// What an engine reads beside the weights: configuration, tokenizer, index.
    Config,
}

/// What the file at `path` is for.
pub(super) fn kind(path: &str) -> Kind {
    let name = file_name(path);
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    let stem = name.split_once('.').map_or(name.as_str(), |(stem, _)| stem);
    let licence = matches!(stem, "license" | "licence" | "copying" | "notice")
        || stem.starts_with("license-")
        || stem.starts_with("license_");
    // `license.json` is data.
    let text = matches!(extension, "" | "md" | "txt" | "rst");
    match extension {
        "safetensors" | "gguf" | "dduf" | "bin" | "pt" | "pth" | "onnx" => Kind::Weight,
        "jinja" => Kind::ChatTemplate,
        _ if licence && text => Kind::License,
        "md" | "rst" | "pdf" | "png" | "jpg" | "jpeg" | "gif" | "svg" | "webp" => Kind::Doc,
        "py" | "sh" | "ipynb" | "c" | "cc" | "cpp" | "cu" | "h" | "js" | "rs" => Kind::Code,
        _ => Kind::Config,
    }
}

/// The last component of a path, in lower case.
fn file_name(path: &str) -> String {
    path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase()
}

/// The media type of a raw layer in Docker's formats (docker/model-spec, spec.md).
pub(super) fn docker_type(path: &str) -> &'static str {
    let name = file_name(path);
    match kind(path) {
        Kind::Weight if name.ends_with(".safetensors") => "application/vnd.docker.ai.safetensors",
        Kind::Weight if name.ends_with(".gguf") && name.contains("mmproj") => {
            "application/vnd.docker.ai.mmproj"
        }
        Kind::Weight if name.ends_with(".gguf") => "application/vnd.docker.ai.gguf.v3",
        Kind::Weight if name.ends_with(".dduf") => "application/vnd.docker.ai.dduf",
        Kind::License => "application/vnd.docker.ai.license",
        Kind::ChatTemplate => "application/vnd.docker.ai.chat.template.jinja",
        _ => "application/vnd.docker.ai.model.file",
    }
}

/// The media type of a raw layer in ModelPack (modelpack/model-spec, docs/spec.md).
pub(super) fn modelpack_type(path: &str) -> &'static str {
    match kind(path) {
        Kind::Weight => "application/vnd.cncf.model.weight.v1.raw",
        Kind::License | Kind::Doc => "application/vnd.cncf.model.doc.v1.raw",
        Kind::Code => "application/vnd.cncf.model.code.v1.raw",
        Kind::ChatTemplate | Kind::Config => "application/vnd.cncf.model.weight.config.v1.raw",
    }
}

/// Where Docker's v0.1 packager puts a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A layer of its own.
    Layer,
    /// The config tar.
    Archive,
    /// Left out.
    Nowhere,
}

/// Where Docker's v0.1 packager puts a file: top folder only, no program text, no pickled weights.
pub(super) fn docker_v01(path: &str) -> Place {
    if path.contains('/') {
        return Place::Nowhere;
    }
    let name = file_name(path);
    let suffix = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if suffix(&[".safetensors", ".gguf"]) || kind(path) == Kind::License {
        Place::Layer
    } else if suffix(&[".json", ".txt", ".md", ".vocab", ".jinja"]) || name == "tokenizer.model" {
        Place::Archive
    } else {
        Place::Nowhere
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_follow_the_names() {
        for (path, docker, modelpack) in [
            ("model.safetensors", "safetensors", "weight"),
            ("sub/Model-Q4.GGUF", "gguf.v3", "weight"),
            ("mmproj-f16.gguf", "mmproj", "weight"),
            ("x.dduf", "dduf", "weight"),
            ("pytorch_model.bin", "model.file", "weight"),
            ("LICENSE", "license", "doc"),
            ("LICENSE.txt", "license", "doc"),
            ("license-mit.md", "license", "doc"),
            ("licenses.json", "model.file", "weight.config"),
            (
                "chat_template.jinja",
                "chat.template.jinja",
                "weight.config",
            ),
            ("config.json", "model.file", "weight.config"),
            (
                "model.safetensors.index.json",
                "model.file",
                "weight.config",
            ),
            ("tokenizer.model", "model.file", "weight.config"),
            ("merges.txt", "model.file", "weight.config"),
            ("README.md", "model.file", "doc"),
            ("modeling_llama.py", "model.file", "code"),
        ] {
            assert_eq!(
                docker_type(path),
                format!("application/vnd.docker.ai.{docker}"),
                "{path}"
            );
            assert_eq!(
                modelpack_type(path),
                format!("application/vnd.cncf.model.{modelpack}.v1.raw"),
                "{path}"
            );
        }
    }

    #[test]
    fn the_former_docker_format_is_flat() {
        assert_eq!(docker_v01("model-00001-of-00002.safetensors"), Place::Layer);
        assert_eq!(docker_v01("LICENSE"), Place::Layer);
        assert_eq!(docker_v01("model.safetensors.index.json"), Place::Archive);
        assert_eq!(docker_v01("tokenizer.model"), Place::Archive);
        assert_eq!(docker_v01("sub/model.safetensors"), Place::Nowhere);
        assert_eq!(docker_v01("modeling.py"), Place::Nowhere);
    }
}
