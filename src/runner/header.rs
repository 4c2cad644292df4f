//! The header of a safetensors file, checked before a byte of it is believed: names, dtypes, shapes, lengths and offsets must agree
//! with each other and with the length of the file.
//!
//! Layout: 8 bytes little-endian N, N bytes of a JSON object of `name: {dtype, shape, data_offsets: [begin, end]}`, then the tensors.

use std::collections::HashSet;
use std::fmt;

use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Longest header that the safetensors library reads.
const LONGEST: u64 = 100_000_000;
/// Bytes of the length field.
pub const PREFIX: u64 = 8;

/// Element types, as safetensors names them.
const DTYPES: &[(&str, u64)] = &[
    ("BOOL", 8),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
    ("C64", 64),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
];

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its element type as written.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its first byte's offset in the file.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// The length of the header of a file of `file_size` bytes that begins with `prefix`.
///
/// # Errors
/// What is wrong, for people.
pub fn length(prefix: [u8; 8], file_size: u64) -> Result<usize, String> {
    let length = u64::from_le_bytes(prefix);
    if length > LONGEST {
        return Err(format!(
            "a header of {length} bytes; at most {LONGEST} are read"
        ));
    }
    if length < 2 || length > file_size.saturating_sub(PREFIX) {
        return Err(format!(
            "a header of {length} bytes in a file of {file_size}"
        ));
    }
    Ok(length as usize)
}

/// The tensors, in the order of their bytes, of a file of `file_size` bytes with the header `text`.
///
/// # Errors
/// What is wrong, for people: it names the tensor.
pub fn parse(text: &[u8], file_size: u64) -> Result<Vec<Entry>, String> {
    let entries: Entries =
        serde_json::from_slice(text).map_err(|error| format!("its header: {error}"))?;
    let start = PREFIX + text.len() as u64;
    let mut found = Vec::with_capacity(entries.0.len());
    for (name, raw) in entries.0 {
        found.push(check(name, &raw, start, file_size)?);
    }
    found.sort_by_key(|entry| (entry.offset, entry.size));
    // As the format demands: no byte belongs to two tensors, and none to nobody.
    let mut end = start;
    for entry in &found {
        if entry.offset < end {
            return Err(format!(
                "tensor `{}` overlaps the one before it",
                entry.name
            ));
        }
        if entry.offset > end {
            return Err(format!(
                "{} bytes before tensor `{}` belong to no tensor",
                entry.offset - end,
                entry.name
            ));
        }
        end += entry.size;
    }
    if end != file_size {
        return Err(format!(
            "its tensors end at byte {end}, the file at {file_size}"
        ));
    }
    Ok(found)
}

fn check(name: String, raw: &Raw, start: u64, file_size: u64) -> Result<Entry, String> {
    let [begin, end] = raw.data_offsets;
    let Some((_, bits)) = DTYPES.iter().find(|(known, _)| *known == raw.dtype) else {
        return Err(format!(
            "tensor `{name}` has the unknown dtype `{}`",
            raw.dtype
        ));
    };
    if begin > end || end > file_size - start {
        return Err(format!(
            "tensor `{name}` lies at {begin}..{end} of {} bytes",
            file_size - start
        ));
    }
    let bits = raw
        .shape
        .iter()
        .try_fold(*bits, |product, size| product.checked_mul(*size));
    let Some(bits) = bits.filter(|bits| bits % 8 == 0) else {
        return Err(format!(
            "tensor `{name}` has an impossible shape {:?}",
            raw.shape
        ));
    };
    if bits / 8 != end - begin {
        return Err(format!(
            "tensor `{name}` of {} {:?} takes {} bytes, not {}",
            raw.dtype,
            raw.shape,
            bits / 8,
            end - begin
        ));
    }
    Ok(Entry {
        name,
        dtype: raw.dtype.clone(),
        shape: raw.shape.iter().map(|size| *size as usize).collect(),
        offset: start + begin,
        size: end - begin,
    })
}

#[derive(Deserialize)]
struct Raw {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The object's entries. A map type would keep the last of two with one name, and hide that there were two.
struct Entries(Vec<(String, Raw)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let (mut entries, mut names) = (Vec::new(), HashSet::new());
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(de::Error::custom(format!(
                    "two tensors are called `{name}`"
                )));
            }
            if name == "__metadata__" {
                map.next_value::<de::IgnoredAny>()?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(Entries(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &str, data: u64) -> Result<Vec<Entry>, String> {
        parse(header.as_bytes(), PREFIX + header.len() as u64 + data)
    }

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
            "none":{"dtype":"F32","shape":[0,5],"data_offsets":[16,16]}}"#;
        let entries = read(header, 16).unwrap();
        let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "none"]);
        assert_eq!(
            (entries[1].offset, entries[1].size),
            (PREFIX + header.len() as u64 + 4, 12)
        );
    }

    #[test]
    fn every_lie_is_named() {
        let one = |dtype: &str, shape: &str, begin: u64, end: u64| {
            format!(
                r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#
            )
        };
        for (header, data, said) in [
            (one("F32", "[2]", 0, 8), 4, "lies at 0..8 of 4 bytes"),
            (one("F32", "[2]", 8, 0), 8, "lies at 8..0"),
            (one("F32", "[3]", 0, 8), 8, "takes 12 bytes, not 8"),
            (one("F32", "[2]", 4, 12), 12, "4 bytes before tensor `w`"),
            (one("F32", "[2]", 0, 8), 9, "end at byte"),
            (one("Q4", "[2]", 0, 8), 8, "unknown dtype `Q4`"),
            (one("F4", "[3]", 0, 1), 1, "impossible shape"),
            (one("F32", "[4294967296,4294967296]", 0, 8), 8, "impossible shape"),
            (one("F32", "[-1]", 0, 8), 8, "its header"),
            (one("F32", "[2]", 0, 18_446_744_073_709_551_615), 8, "lies at"),
            (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#.to_owned(), 6, "overlaps"),
            (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#.to_owned(), 8, "two tensors are called `a`"),
            ("[]".to_owned(), 0, "its header"),
            ("{".to_owned(), 0, "its header"),
        ] {
            let error = read(&header, data).unwrap_err();
            assert!(error.contains(said), "{header}: {error}");
        }
        assert!(
            length(u64::MAX.to_le_bytes(), 100)
                .unwrap_err()
                .contains("at most")
        );
        assert!(
            length(93u64.to_le_bytes(), 100)
                .unwrap_err()
                .contains("in a file of 100")
        );
        assert!(length(0u64.to_le_bytes(), 100).is_err());
        assert_eq!(length(92u64.to_le_bytes(), 100), Ok(92));
    }
}
