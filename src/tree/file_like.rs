//! Which names in a repository directory are taken for files, so that `:latest` is asked for them.
//!
//! `org/qwen2.5-0.5b` is a repository and `org/model/config.json` is not, yet both names fit the grammar of a
//! repository component. So a list decides: names with an extension that files of models have, and some names in capitals
//! that no repository can have. Such a name is never a directory.

/// Extensions of files that are found in models, lower case.
const EXTENSIONS: &[&str] = &[
    // weights
    "bin",
    "ckpt",
    "engine",
    "ggml",
    "gguf",
    "h5",
    "keras",
    "mlmodel",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "onnx_data",
    "ot",
    "pb",
    "pickle",
    "pkl",
    "plan",
    "pt",
    "pth",
    "safetensors",
    "tflite",
    // configuration, tokenizers, templates
    "cfg",
    "ini",
    "j2",
    "jinja",
    "jinja2",
    "json",
    "jsonl",
    "model",
    "spm",
    "tiktoken",
    "toml",
    "yaml",
    "yml",
    // code and text
    "csv",
    "html",
    "ipynb",
    "md",
    "parquet",
    "pdf",
    "py",
    "rst",
    "sh",
    "txt",
    // pictures and archives
    "bz2",
    "gif",
    "gz",
    "jpeg",
    "jpg",
    "png",
    "svg",
    "tar",
    "tgz",
    "webp",
    "xz",
    "zip",
    "zst",
];

/// Names without an extension. Capitals cannot be in a repository's name, so these cannot be mistaken for one.
const NAMES: &[&str] = &[
    "CHANGELOG",
    "COPYING",
    "COPYRIGHT",
    "LICENCE",
    "LICENSE",
    "MODEL_CARD",
    "Modelfile",
    "NOTICE",
    "README",
    "USAGE",
    "USE_POLICY",
    "VERSION",
];

/// Whether `name` is taken for a file. See the module's documentation.
pub(super) fn file_like(name: &str) -> bool {
    if NAMES.contains(&name) {
        return true;
    }
    // A name that is all extension (`.json`) is a hidden file, as everywhere; hidden names are not asked for.
    match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() && !stem.starts_with('.') => {
            EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_models_are_told_from_repositories() {
        for name in [
            "config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.model",
            "tinyllama-1.1b.Q4_K_M.gguf",
            "chat_template.jinja",
            "README.md",
            "LICENSE",
            "LICENSE.txt",
            "NOTICE",
            "Model.ONNX",
        ] {
            assert!(file_like(name), "{name}");
        }
        for name in [
            "qwen2.5-0.5b",
            "llama-3.1",
            "v1.0",
            "model",
            "gpt2",
            "",
            ".",
            "..",
            ".json",
            ".git",
            ".hidden.json",
            "license",
            "a.b.c",
            "json",
            "phi-3.5-mini",
            "Foo",
            "x.",
        ] {
            assert!(!file_like(name), "{name}");
        }
    }
}
