//! The header of a safetensors file: tensor names, types, shapes and byte ranges, without touching the tensors.
//!
//! Layout (safetensors README, "Format"): 8 bytes little-endian N, N bytes of a JSON object, then the tensors' bytes.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::bounded;
use crate::base::ByteRange;

/// Bytes of the length field.
pub(super) const PREFIX: u64 = 8;
/// Longest header that the safetensors library reads.
const LONGEST: u64 = 100_000_000;
/// Most tensors of one file.
const MOST_TENSORS: usize = 500_000;
/// Most entries of `__metadata__`: what a training program notes are a few dozen.
const MOST_METADATA: usize = 10_000;
/// Most dimensions of a tensor; frameworks stop at 8 to 64.
const MOST_DIMENSIONS: usize = 64;

/// A parsed header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Header {
    /// The tensors in the order of their bytes.
    pub tensors: Vec<Tensor>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Where the first tensor byte may stand: length field and header.
    pub data_start: u64,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its element type as written, like `BF16`.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its first byte's offset in the file.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
}

impl Tensor {
    /// Its bytes in the file.
    pub fn range(&self) -> ByteRange {
        ByteRange::at(self.offset, self.size)
    }
}

/// Why a file is not a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a safetensors file: {0}")]
pub struct Malformed(String);

impl Malformed {
    pub(super) fn new(reason: &str) -> Self {
        Self(reason.to_owned())
    }
}

/// The length of the JSON header that `start`, the file's first bytes, announces.
pub(super) fn header_len(start: &[u8], file_size: u64) -> Result<u64, Malformed> {
    let prefix = start
        .first_chunk::<8>()
        .ok_or_else(|| Malformed(format!("it has {} bytes and no header", start.len())))?;
    let len = u64::from_le_bytes(*prefix);
    if len > LONGEST {
        return Err(Malformed(format!(
            "its header would have {len} bytes, more than {LONGEST}"
        )));
    }
    if len < 2 || PREFIX + len > file_size {
        return Err(Malformed(format!(
            "its header would have {len} bytes in a file of {file_size}"
        )));
    }
    Ok(len)
}

/// Parses the JSON header of a file of `file_size` bytes.
pub(super) fn parse(json: &[u8], file_size: u64) -> Result<Header, Malformed> {
    if json.first() != Some(&b'{') {
        return Err(Malformed("its header does not begin with `{`".into()));
    }
    let raw: RawHeader =
        serde_json::from_slice(json).map_err(|error| Malformed(error.to_string()))?;
    let data_start = PREFIX + json.len() as u64;
    let data_len = file_size.checked_sub(data_start).ok_or_else(|| {
        Malformed(format!(
            "its header has {} bytes in a file of {file_size}",
            json.len()
        ))
    })?;
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, info) in raw.tensors {
        let [begin, end] = info.data_offsets;
        let problem =
            |what: &str| Malformed(format!("tensor {}: {what}", super::notes::quote(&name)));
        if begin > end || end > data_len {
            return Err(problem(&format!(
                "its bytes {begin}..{end} are not within the file's {data_len}"
            )));
        }
        let elements = info
            .shape
            .iter()
            .try_fold(1_u64, |product, n| product.checked_mul(*n));
        let elements = elements.ok_or_else(|| problem("its shape has more than 2^64 elements"))?;
        if let Some(bits) = bits(&info.dtype) {
            let size = elements
                .checked_mul(bits)
                .filter(|bits| bits % 8 == 0)
                .map(|bits| bits / 8);
            if size != Some(end - begin) {
                return Err(problem(&format!(
                    "its shape and type don't make {} bytes",
                    end - begin
                )));
            }
        }
        let offset = data_start + begin;
        tensors.push(Tensor {
            name,
            dtype: info.dtype,
            shape: info.shape,
            offset,
            size: end - begin,
        });
    }
    tensors.sort_by(|a, b| (a.offset, a.size, &a.name).cmp(&(b.offset, b.size, &b.name)));
    if let Some(pair) = tensors
        .windows(2)
        .find(|pair| pair[0].range().end() > pair[1].offset)
    {
        let [a, b] = [&pair[0].name, &pair[1].name].map(|name| super::notes::quote(name));
        return Err(Malformed(format!("tensors {a} and {b} overlap")));
    }
    Ok(Header {
        tensors,
        metadata: raw.metadata,
        data_start,
    })
}

/// Bits of one element; `None` for types that are not known here, whose size is then not checked.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    #[serde(deserialize_with = "shape")]
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// A shape of at most [`MOST_DIMENSIONS`]: lists of a million zeros are not kept.
fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Dimensions;
    impl<'de> Visitor<'de> for Dimensions {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(dimension) = list.next_element()? {
                if shape.len() == MOST_DIMENSIONS {
                    return Err(de::Error::custom(format!(
                        "a shape has more than {MOST_DIMENSIONS} dimensions"
                    )));
                }
                shape.push(dimension);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Dimensions)
}

/// `__metadata__`.
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded::texts(deserializer, MOST_METADATA).map(Self)
    }
}

struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut seen = HashSet::new();
                let mut header = RawHeader {
                    tensors: Vec::new(),
                    metadata: BTreeMap::new(),
                };
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(de::Error::custom(format!(
                            "{} is there twice",
                            super::notes::quote(&name)
                        )));
                    }
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Metadata>()?.0;
                    } else if header.tensors.len() == MOST_TENSORS {
                        return Err(de::Error::custom(format!(
                            "it has more than {MOST_TENSORS} tensors"
                        )));
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A safetensors file of `U8` tensors with these names and sizes, all bytes zero.
#[cfg(test)]
pub(super) fn file_for_tests(tensors: &[(&str, u64)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, size) in tensors {
        header.insert(
            (*name).into(),
            serde_json::json!({"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}),
        );
        at += size;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + at as usize, 0);
    file
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let json = br#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[2,26]},"a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},"z":{"dtype":"I64","shape":[0,9],"data_offsets":[26,26]}}  "#;
        let size = 8 + json.len() as u64 + 26;
        let header = parse(json, size).unwrap();
        let names: Vec<&str> = header.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "z"]);
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.tensors[1].range(), ByteRange::new(size - 24, size));
        assert_eq!(header.tensors[1].shape, [2, 3]);
    }

    #[test]
    fn what_lies_about_itself_is_malformed() {
        for (json, reason) in [
            (r#"[]"#, "begin"),
            (r#" {}"#, "begin"),
            (r#"{"a":1}"#, "invalid type"),
            (r#"{} {}"#, "trailing"),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
                "twice",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#,
                "not within",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[101],"data_offsets":[0,101]}}"#,
                "not within",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}"#,
                "-4",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}"#,
                "don't make",
            ),
            (
                r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#,
                "don't make",
            ),
            (
                r#"{"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
                "2^64",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
                "overlap",
            ),
            (r#"{"__metadata__":{"a":1}}"#, "invalid type"),
        ] {
            let error = parse(json.as_bytes(), 8 + json.len() as u64 + 100)
                .unwrap_err()
                .to_string();
            assert!(error.contains(reason), "{json}: {error}");
        }
        let deep = format!(
            r#"{{"a":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#,
            "1,".repeat(64)
        );
        assert!(
            parse(deep.as_bytes(), 10_000)
                .unwrap_err()
                .to_string()
                .contains("dimensions")
        );
        assert!(parse(br#"{}"#, 9).is_err());
        let unknown = br#"{"a":{"dtype":"Q3","shape":[4],"data_offsets":[0,5]}}"#;
        assert_eq!(parse(unknown, 1000).unwrap().tensors[0].dtype, "Q3");
    }

    #[test]
    fn the_announced_length_is_bounded_by_the_file() {
        assert_eq!(header_len(&[2, 0, 0, 0, 0, 0, 0, 0, b'{'], 10), Ok(2));
        assert!(header_len(&[2, 0, 0, 0, 0, 0, 0, 0], 9).is_err());
        assert!(header_len(&[0; 8], 100).is_err());
        assert!(header_len(&[0xff; 8], u64::MAX).is_err());
        assert!(header_len(&100_000_001_u64.to_le_bytes(), u64::MAX).is_err());
        assert!(header_len(&[2, 0, 0], 3).is_err());
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_in_the_file_without_overlap(
            tensors in proptest::collection::vec((any::<u8>(), 0_u64..40, 0_u64..40, prop_oneof![Just("U8"), Just("F32"), Just("?")]), 0..6),
            file_size in 0_u64..600,
        ) {
            let entries: Vec<String> = tensors.iter().map(|(name, begin, end, dtype)| {
                format!(r#""{name}":{{"dtype":"{dtype}","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end.saturating_sub(*begin))
            }).collect();
            let json = format!("{{{}}}", entries.join(","));
            if let Ok(header) = parse(json.as_bytes(), file_size) {
                let mut end = header.data_start;
                for tensor in &header.tensors {
                    prop_assert!(tensor.offset >= end);
                    end = tensor.range().end();
                }
                prop_assert!(end <= file_size);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), size in any::<u64>()) {
            let _ = header_len(&bytes, size);
            let _ = parse(&bytes, size);
            bytes.insert(0, b'{');
            let _ = parse(&bytes, size);
        }
    }
}
