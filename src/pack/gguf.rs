//! What a GGUF file says of itself (ggml docs/gguf.md): the keys and the tensors before its data.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

/// The longest header that is read, in bytes: vocabularies are in it.
const LONGEST: u64 = 1 << 30;
/// The longest string that is kept.
const LONGEST_TEXT: u64 = 64 << 10;

/// What is known of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Gguf {
    /// `general.architecture`.
    pub(super) architecture: Option<String>,
    /// `general.file_type` as llama.cpp writes it: `Q4_K_M`.
    pub(super) file_type: Option<&'static str>,
    /// `<architecture>.context_length`.
    pub(super) context_size: Option<u32>,
    /// The elements of all tensors.
    pub(super) parameters: u64,
}

/// llama.cpp's `llama_ftype` (include/llama.h) by number.
const FILE_TYPES: [(u64, &str); 32] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (8, "Q5_0"),
    (9, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (19, "IQ2_XXS"),
    (20, "IQ2_XS"),
    (21, "Q2_K_S"),
    (22, "IQ3_XS"),
    (23, "IQ3_XXS"),
    (24, "IQ1_S"),
    (25, "IQ4_NL"),
    (26, "IQ3_S"),
    (27, "IQ3_M"),
    (28, "IQ2_S"),
    (29, "IQ2_M"),
    (30, "IQ4_XS"),
    (31, "IQ1_M"),
    (32, "BF16"),
    (36, "TQ1_0"),
    (37, "TQ2_0"),
];

/// Reads a file's header. The error is for people.
pub(super) fn read(path: &Path) -> Result<Gguf, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    parse(BufReader::with_capacity(1 << 20, file)).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => "not a GGUF file: its header is cut off or too long".into(),
        _ => format!("not a GGUF file: {error}"),
    })
}

/// A value, as far as it matters.
enum Value {
    Number(u64),
    Text(String),
    Other,
}

struct Source<R>(io::Take<R>);

impl<R: Read> Source<R> {
    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.0).take(count), &mut io::sink())?;
        if skipped < count {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// A string; one that is too long to matter is passed over.
    fn text(&mut self) -> io::Result<String> {
        let len = self.u64()?;
        if len > LONGEST_TEXT {
            self.skip(len)?;
            return Ok(String::new());
        }
        let mut bytes = vec![0; len as usize];
        self.0.read_exact(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn value(&mut self, kind: u32) -> io::Result<Value> {
        Ok(match kind {
            0 | 7 => Value::Number(u64::from(self.bytes::<1>()?[0])),
            2 => Value::Number(u64::from(u16::from_le_bytes(self.bytes()?))),
            4 => Value::Number(u64::from(self.u32()?)),
            10 => Value::Number(self.u64()?),
            8 => Value::Text(self.text()?),
            9 => {
                self.array()?;
                Value::Other
            }
            _ => {
                let size =
                    fixed(kind).ok_or_else(|| io::Error::other("a value of no known type"))?;
                self.skip(size)?;
                Value::Other
            }
        })
    }

    fn array(&mut self) -> io::Result<()> {
        let (kind, count) = (self.u32()?, self.u64()?);
        if let Some(size) = fixed(kind) {
            let bytes = size
                .checked_mul(count)
                .ok_or_else(|| io::Error::other("an array whose size overflows"))?;
            return self.skip(bytes);
        }
        if kind != 8 {
            return Err(io::Error::other("an array of no known type"));
        }
        for _ in 0..count {
            let len = self.u64()?;
            self.skip(len)?;
        }
        Ok(())
    }
}

/// The size of a value of a fixed-size type.
fn fixed(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

pub(super) fn parse(source: impl Read) -> io::Result<Gguf> {
    let mut source = Source(source.take(LONGEST));
    let magic: [u8; 4] = source.bytes()?;
    let version = source.u32()?;
    if magic != *b"GGUF" || !(2..=3).contains(&version) {
        return Err(io::Error::other("it is none of version 2 or 3"));
    }
    let (tensors, keys) = (source.u64()?, source.u64()?);
    let mut gguf = Gguf::default();
    for _ in 0..keys {
        let key = source.text()?;
        let kind = source.u32()?;
        match (key.as_str(), source.value(kind)?) {
            ("general.architecture", Value::Text(text)) => gguf.architecture = Some(text),
            ("general.file_type", Value::Number(number)) => {
                let known = FILE_TYPES.iter().find(|(known, _)| *known == number);
                gguf.file_type = known.map(|(_, name)| *name);
            }
            (key, Value::Number(number)) if key.ends_with(".context_length") => {
                gguf.context_size = u32::try_from(number).ok();
            }
            _ => {}
        }
    }
    for _ in 0..tensors {
        source.text()?;
        let dimensions = source.u32()?;
        let mut elements = 1_u64;
        for _ in 0..dimensions {
            elements = elements.saturating_mul(source.u64()?);
        }
        // Its type and its offset.
        source.skip(12)?;
        gguf.parameters = gguf.parameters.saturating_add(elements);
    }
    Ok(gguf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn file() -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(2_u64.to_le_bytes());
        file.extend(4_u64.to_le_bytes());
        for (key, kind, value) in [
            ("general.architecture", 8_u32, text("llama")),
            ("general.file_type", 4, 15_u32.to_le_bytes().to_vec()),
            ("llama.context_length", 4, 4096_u32.to_le_bytes().to_vec()),
            (
                "tokenizer.ggml.tokens",
                9,
                [
                    &8_u32.to_le_bytes()[..],
                    &2_u64.to_le_bytes(),
                    &text("a"),
                    &text("bc"),
                ]
                .concat(),
            ),
        ] {
            file.extend(text(key));
            file.extend(kind.to_le_bytes());
            file.extend(value);
        }
        for (name, dimensions) in [("a", &[3_u64, 5][..]), ("b", &[7])] {
            file.extend(text(name));
            file.extend((dimensions.len() as u32).to_le_bytes());
            dimensions.iter().for_each(|n| file.extend(n.to_le_bytes()));
            file.extend([0; 12]);
        }
        file
    }

    #[test]
    fn a_header_tells_architecture_quantisation_and_size() {
        let gguf = parse(&file()[..]).unwrap();
        assert_eq!(gguf.architecture.as_deref(), Some("llama"));
        assert_eq!(
            (gguf.file_type, gguf.context_size),
            (Some("Q4_K_M"), Some(4096))
        );
        assert_eq!(gguf.parameters, 22);
    }

    #[test]
    fn what_is_cut_off_or_lies_is_an_error() {
        let file = file();
        for end in 0..file.len() {
            assert!(parse(&file[..end]).is_err(), "{end}");
        }
        let mut huge = file.clone();
        huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(parse(&huge[..]).is_err());
        let mut long = b"GGUF\x03\0\0\0".to_vec();
        long.extend(0_u64.to_le_bytes());
        long.extend(1_u64.to_le_bytes());
        long.extend(u64::MAX.to_le_bytes());
        assert!(parse(&long[..]).is_err());
        assert!(parse(&b"GGUF\x01\0\0\0"[..]).is_err());
    }
}
