//! Bytes that can be computed from their offset, so that any range of any size can be checked without keeping a copy.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

/// A sequence of bytes without repetition; equal seeds give equal sequences.
#[derive(Clone, Copy)]
pub struct Content {
    seed: u64,
}

impl Content {
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The eight bytes at `index * 8` (SplitMix64's output function over a counter).
    fn word(self, index: u64) -> [u8; 8] {
        let mut z = self
            .seed
            .wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)).to_le_bytes()
    }

    /// The bytes from `offset`.
    pub fn bytes(self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 16);
        let skipped = (offset % 8) as usize;
        let mut index = offset / 8;
        while bytes.len() < length + skipped {
            bytes.extend_from_slice(&self.word(index));
            index += 1;
        }
        bytes.drain(..skipped);
        bytes.truncate(length);
        bytes
    }

    /// Writes the first `length` bytes to a file.
    pub fn write(self, path: &Path, length: u64) {
        let mut file = File::create(path).unwrap();
        self.write_to(&mut file, length);
    }

    /// Writes the first `length` bytes.
    pub fn write_to(self, out: &mut impl Write, length: u64) {
        const BLOCK: u64 = 1 << 20;
        let mut at = 0;
        while at < length {
            let size = BLOCK.min(length - at);
            out.write_all(&self.bytes(at, size as usize)).unwrap();
            at += size;
        }
    }
}

/// The digest as OCI writes it.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// The digest of a file's content.
pub fn digest_file(path: &Path) -> String {
    let mut hash = Sha256::new();
    let mut file = File::open(path).unwrap();
    let mut block = vec![0; 1 << 20];
    loop {
        let read = std::io::Read::read(&mut file, &mut block).unwrap();
        if read == 0 {
            return format!("sha256:{}", hex(&hash.finalize()));
        }
        hash.update(&block[..read]);
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A tensor of a safetensors file made by [`write_safetensors`].
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Bytes; a multiple of 4, shown as a vector of F32.
    pub size: u64,
}

/// Writes a safetensors file whose data section is `content` from its start; returns the header's length, prefix included.
pub fn write_safetensors(path: &Path, tensors: &[Tensor], content: Content) -> u64 {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for tensor in tensors {
        header.insert(
            tensor.name.clone(),
            serde_json::json!({"dtype": "F32", "shape": [tensor.size / 4], "data_offsets": [at, at + tensor.size]}),
        );
        at += tensor.size;
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    // The format wants the data section aligned to 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(&header).unwrap();
    content.write_to(&mut file, at);
    file.flush().unwrap();
    8 + header.len() as u64
}
