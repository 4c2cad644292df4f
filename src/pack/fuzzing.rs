//! What the fuzzer calls. A panic is a finding.

use super::{card, gguf, weights};

/// The header of a GGUF file.
pub fn gguf(data: &[u8]) {
    if let Ok(gguf) = gguf::parse(data) {
        assert!(
            gguf.architecture
                .is_none_or(|text| text.len() <= 3 * data.len())
        );
    }
}

/// A model card, and a header of safetensors as `push` reads it.
pub fn card(data: &[u8]) {
    let licences = card::licences(&String::from_utf8_lossy(data));
    assert!(
        licences
            .iter()
            .all(|name| !name.is_empty() && name.len() <= 100)
    );
    let _ = weights::tensors(data);
}
