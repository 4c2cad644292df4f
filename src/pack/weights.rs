//! What the config says about a model: read from safetensors headers and `config.json`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::PackError;
use super::scan::SourceFile;

/// The largest safetensors header that is read (the limit of the safetensors library).
const LARGEST_HEADER: u64 = 100_000_000;
/// The largest `config.json` that is read.
const LARGEST_CONFIG: u64 = 16 << 20;

/// What is known about a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// `safetensors`, `gguf`, `dduf`, or none for other weights.
    pub(super) format: Option<&'static str>,
    /// The number of parameters, where safetensors headers tell it.
    pub(super) parameters: Option<u64>,
    /// The type of most parameters (`BF16`).
    pub(super) precision: Option<String>,
    /// `model_type` of `config.json`.
    pub(super) architecture: Option<String>,
    /// `quantization_config.quant_method` of `config.json`.
    pub(super) quantization: Option<String>,
    /// `max_position_embeddings` of `config.json`.
    pub(super) context_size: Option<u32>,
    /// The licences that the model card names, as SPDX spells them.
    pub(super) licences: Vec<String>,
    /// The sum of the weight files' sizes.
    pub(super) weight_bytes: u64,
}

/// Reads what can be known without the weights themselves.
pub(super) fn facts(
    dir: &Path,
    files: &[SourceFile],
    notes: &mut Vec<String>,
) -> Result<Facts, PackError> {
    let mut facts = Facts::default();
    for (extension, format) in [
        (".dduf", "dduf"),
        (".gguf", "gguf"),
        (".safetensors", "safetensors"),
    ] {
        if files
            .iter()
            .any(|file| file.path.to_ascii_lowercase().ends_with(extension))
        {
            facts.format = Some(format);
        }
    }
    let mut counts = std::collections::BTreeMap::new();
    for file in files {
        if super::classify::kind(&file.path) == super::classify::Kind::Weight {
            facts.weight_bytes += file.size;
        }
        if !file.path.to_ascii_lowercase().ends_with(".safetensors") {
            continue;
        }
        match header(file)? {
            Ok(tensors) => {
                for (dtype, elements) in tensors {
                    let sum: &mut u64 = counts.entry(dtype).or_default();
                    *sum = sum.saturating_add(elements);
                }
            }
            Err(reason) => notes.push(format!("{}: {reason}", file.path)),
        }
    }
    if !counts.is_empty() {
        facts.parameters = Some(
            counts
                .values()
                .fold(0, |sum: u64, count| sum.saturating_add(*count)),
        );
        facts.precision = counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(dtype, _)| dtype);
    }
    gguf_facts(files, &mut facts, notes);
    let card = files
        .iter()
        .find(|file| file.path == "README.md" && file.size <= LARGEST_CONFIG);
    if let Some(card) = card {
        let text = fs::read(&card.source).map_err(PackError::io("read", &card.source))?;
        facts.licences = super::card::licences(&String::from_utf8_lossy(&text));
    }
    let path = dir.join("config.json");
    if files
        .iter()
        .any(|file| file.path == "config.json" && file.size <= LARGEST_CONFIG)
    {
        let text = fs::read(&path).map_err(PackError::io("read", &path))?;
        match serde_json::from_slice::<ModelConfig>(&text) {
            Ok(config) => {
                facts.architecture = config.model_type.or(facts.architecture);
                let quantization = config.quantization_config;
                facts.quantization = quantization
                    .and_then(|quantization| quantization.quant_method)
                    .or(facts.quantization);
                facts.context_size = config.max_position_embeddings.or(facts.context_size);
            }
            Err(error) => notes.push(format!("config.json: {error}")),
        }
    }
    Ok(facts)
}

/// What GGUF files tell, where no safetensors did: of a split one each tells its own tensors.
fn gguf_facts(files: &[SourceFile], facts: &mut Facts, notes: &mut Vec<String>) {
    if facts.parameters.is_some() {
        return;
    }
    let mut total = 0_u64;
    for file in files {
        let name = file.path.to_ascii_lowercase();
        // A projector beside a model has an architecture of its own.
        if !name.ends_with(".gguf") || name.contains("mmproj") {
            continue;
        }
        match super::gguf::read(&file.source) {
            Ok(gguf) => {
                total = total.saturating_add(gguf.parameters);
                facts.architecture = facts.architecture.take().or(gguf.architecture);
                facts.context_size = facts.context_size.or(gguf.context_size);
                match gguf.file_type {
                    Some(plain @ ("F32" | "F16" | "BF16")) => {
                        facts.precision.get_or_insert_with(|| plain.to_owned());
                    }
                    Some(quantised) => {
                        facts
                            .quantization
                            .get_or_insert_with(|| quantised.to_owned());
                    }
                    None => {}
                }
            }
            Err(reason) => notes.push(format!("{}: {reason}", file.path)),
        }
    }
    if total > 0 {
        facts.parameters = Some(total);
    }
}

/// The fields of a transformers `config.json` that the artifact's config repeats.
#[derive(Deserialize)]
struct ModelConfig {
    model_type: Option<String>,
    max_position_embeddings: Option<u32>,
    quantization_config: Option<Quantization>,
}

#[derive(Deserialize)]
struct Quantization {
    quant_method: Option<String>,
}

/// The type and number of elements of each tensor of a safetensors file; the inner error is for people.
fn header(file: &SourceFile) -> Result<Result<Vec<(String, u64)>, String>, PackError> {
    let open = File::open(&file.source).map_err(PackError::io("open", &file.source))?;
    let mut length = [0; 8];
    if file.size < 8 {
        return Ok(Err("not a safetensors file: too short".to_owned()));
    }
    open.read_exact_at(&mut length, 0)
        .map_err(PackError::io("read", &file.source))?;
    let length = u64::from_le_bytes(length);
    if length > LARGEST_HEADER || length > file.size - 8 {
        return Ok(Err(
            "not a safetensors file: its header has no sane length".to_owned()
        ));
    }
    let mut text = vec![0; length as usize];
    open.read_exact_at(&mut text, 8)
        .map_err(PackError::io("read", &file.source))?;
    Ok(tensors(&text))
}

/// The tensors that a header lists, without its `__metadata__`.
pub(super) fn tensors(text: &[u8]) -> Result<Vec<(String, u64)>, String> {
    #[derive(Deserialize)]
    struct Tensor {
        dtype: String,
        shape: Vec<u64>,
    }
    struct Tensors;
    impl<'de> Visitor<'de> for Tensors {
        type Value = Vec<(String, u64)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a safetensors header")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut tensors = Vec::new();
            while let Some(name) = map.next_key::<String>()? {
                if name == "__metadata__" {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                let tensor: Tensor = map.next_value()?;
                tensors.push((
                    tensor.dtype,
                    tensor
                        .shape
                        .iter()
                        .fold(1, |product: u64, n| product.saturating_mul(*n)),
                ));
            }
            Ok(tensors)
        }
    }
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let result = serde::Deserializer::deserialize_map(&mut deserializer, Tensors);
    result.map_err(|error| format!("not a safetensors file: {error}"))
}

/// A number of parameters as model names write it: `1.2B`, `270M`.
pub(super) fn people(count: u64) -> String {
    let (value, unit) = match count {
        1_000_000_000_000.. => (count as f64 / 1e12, "T"),
        1_000_000_000.. => (count as f64 / 1e9, "B"),
        1_000_000.. => (count as f64 / 1e6, "M"),
        1_000.. => (count as f64 / 1e3, "K"),
        _ => return count.to_string(),
    };
    let text = format!("{value:.1}");
    format!("{}{unit}", text.strip_suffix(".0").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_counted_and_a_hostile_one_survived() {
        let text = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},
            "b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}   "#;
        assert_eq!(
            tensors(text).unwrap(),
            [("BF16".to_owned(), 6), ("F32".to_owned(), 1)]
        );
        let huge =
            br#"{"a":{"dtype":"F32","shape":[18446744073709551615,9],"data_offsets":[0,0]}}"#;
        assert_eq!(tensors(huge).unwrap()[0].1, u64::MAX);
        assert!(tensors(b"[]").is_err() && tensors(b"{\"a\":1}").is_err() && tensors(b"").is_err());
        assert!(tensors("[".repeat(1 << 20).as_bytes()).is_err());
    }

    #[test]
    fn parameters_read_as_in_model_names() {
        for (count, text) in [
            (999, "999"),
            (1500, "1.5K"),
            (361_820_000, "361.8M"),
            (8_000_000_000, "8B"),
        ] {
            assert_eq!(people(count), text);
        }
    }
}
