//! `model.safetensors.index.json`: which tensor is in which shard; read where it is packaged, made where it is missing.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Deserializer};
use serde_json::json;

use super::bounded;
use super::names;
use super::notes::quote;
use super::safetensors::Header;

/// The name that engines look for (transformers, vLLM, SGLang, candle).
pub(super) const NAME: &str = "model.safetensors.index.json";
/// Largest packaged index that is looked into.
pub(super) const LARGEST: u64 = 64 << 20;
/// Most tensors of a packaged index; models of a trillion parameters have a tenth of them.
const MOST_TENSORS: usize = 1_000_000;
/// The end of a safetensors file's name.
pub(super) const EXTENSION: &str = ".safetensors";

/// The `weight_map` of an index: shard by tensor.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct WeightMap {
    shards: BTreeMap<String, String>,
}

impl WeightMap {
    /// Parses an index. Entries whose shard is not a possible `*.safetensors` path are dropped.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Index {
            #[serde(deserialize_with = "tensors")]
            weight_map: BTreeMap<String, String>,
        }
        fn tensors<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<BTreeMap<String, String>, D::Error> {
            bounded::texts(deserializer, MOST_TENSORS)
        }
        let index: Index = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let mut shards = index.weight_map;
        shards.retain(|_, shard| {
            shard.ends_with(EXTENSION) && names::annotated(shard).as_ref() == Ok(shard)
        });
        Ok(Self { shards })
    }

    /// The shard that holds this tensor.
    pub(super) fn shard(&self, tensor: &str) -> Option<&str> {
        self.shards.get(tensor).map(String::as_str)
    }

    /// Each shard with the number of its tensors.
    pub(super) fn tensors_per_shard(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for shard in self.shards.values() {
            *counts.entry(shard.as_str()).or_insert(0) += 1;
        }
        counts
    }
}

/// Which of these files at the model's top an index must list: all safetensors files but adapters, Mistral's
/// consolidated copies (vLLM: `consolidated*.safetensors`) and what another packaged index speaks for.
pub(super) fn shards_to_list<'a>(names: &BTreeSet<&'a str>) -> Vec<&'a str> {
    let other_stems: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_suffix(".safetensors.index.json"))
        .collect();
    let is_other = |name: &str| other_stems.iter().any(|stem| name.starts_with(stem));
    names
        .iter()
        .copied()
        .filter(|name| name.ends_with(EXTENSION) && !name.contains('/'))
        .filter(|name| {
            !name.starts_with("consolidated") && !name.starts_with("adapter") && !is_other(name)
        })
        .collect()
}

/// Makes the index of these shards. The error is a reason for people: a tensor that two shards have.
pub(super) fn make(shards: &[(&str, &Header)]) -> Result<Bytes, String> {
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0_u64;
    for (name, header) in shards {
        for tensor in &header.tensors {
            if let Some(other) = weight_map.insert(tensor.name.as_str(), *name) {
                return Err(format!(
                    "tensor {} is in {} and in {}",
                    quote(&tensor.name),
                    quote(other),
                    quote(name)
                ));
            }
            total_size = total_size.saturating_add(tensor.size);
        }
    }
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    Ok(Bytes::from(format!("{index:#}\n")))
}

#[cfg(test)]
mod tests {
    use super::super::safetensors;
    use super::*;

    fn header(tensors: &[(&str, u64)]) -> Header {
        let file = safetensors::file_for_tests(tensors);
        let len = safetensors::header_len(&file, file.len() as u64).unwrap() as usize;
        safetensors::parse(&file[8..8 + len], file.len() as u64).unwrap()
    }

    #[test]
    fn an_index_is_made_sorted_and_can_be_read_again() {
        let (one, two) = (header(&[("z", 3), ("a", 4)]), header(&[("m", 5)]));
        let made = make(&[("s1.safetensors", &one), ("s2.safetensors", &two)]).unwrap();
        let expected = r#"{
  "metadata": {
    "total_size": 12
  },
  "weight_map": {
    "a": "s1.safetensors",
    "m": "s2.safetensors",
    "z": "s1.safetensors"
  }
}
"#;
        assert_eq!(made, expected);
        let map = WeightMap::parse(&made).unwrap();
        assert_eq!(map.shard("m"), Some("s2.safetensors"));
        assert_eq!(
            map.tensors_per_shard().into_iter().collect::<Vec<_>>(),
            [("s1.safetensors", 2), ("s2.safetensors", 1)]
        );
    }

    #[test]
    fn a_tensor_in_two_shards_is_a_reason_to_make_none() {
        let one = header(&[("a", 4)]);
        assert!(
            make(&[("s1", &one), ("s2", &one)])
                .unwrap_err()
                .contains("`a`")
        );
    }

    #[test]
    fn shard_names_that_lead_elsewhere_are_dropped() {
        let json = r#"{"weight_map":{"a":"../x.safetensors","b":"/x.safetensors","c":"config.json","d":"s/x.safetensors","e":"./x.safetensors"}}"#;
        assert_eq!(
            WeightMap::parse(json.as_bytes())
                .unwrap()
                .tensors_per_shard()
                .into_keys()
                .collect::<Vec<_>>(),
            ["s/x.safetensors"]
        );
        for bad in ["", "[]", "{}", r#"{"weight_map":{"a":1}}"#] {
            assert!(WeightMap::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_index_speaks_for_plain_shards_alone() {
        let names = BTreeSet::from([
            "a.safetensors",
            "adapter_model.safetensors",
            "b.safetensors",
            "config.json",
            "consolidated.safetensors",
            "diffusion_model-1.safetensors",
            "diffusion_model.safetensors.index.json",
            "vae/c.safetensors",
        ]);
        assert_eq!(shards_to_list(&names), ["a.safetensors", "b.safetensors"]);
    }
}
