//! Writes safetensors files, and the weights of the goldens, which `tests/py/make_goldens.py` makes in the same way.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

/// A tensor as it lies in a file.
pub struct Raw {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Writes one file by the format's description alone.
pub fn write_file(path: &Path, tensors: &[&Raw]) {
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for tensor in tensors {
        let end = at + tensor.bytes.len();
        header.insert(
            tensor.name.clone(),
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    write_raw(
        path,
        &Value::Object(header).to_string(),
        tensors.iter().map(|tensor| tensor.bytes.as_slice()),
    );
}

/// Writes a file with this header, right or wrong.
pub fn write_raw<'a>(path: &Path, header: &str, data: impl IntoIterator<Item = &'a [u8]>) {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    data.into_iter()
        .for_each(|bytes| file.extend_from_slice(bytes));
    std::fs::write(path, file).unwrap();
}

/// Writes `count` files and an index, or one file without.
pub fn write_shards(dir: &Path, tensors: &[Raw], count: usize) {
    if count == 1 {
        return write_file(
            &dir.join("model.safetensors"),
            &tensors.iter().collect::<Vec<_>>(),
        );
    }
    let mut map = BTreeMap::new();
    for (number, shard) in tensors.chunks(tensors.len().div_ceil(count)).enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", number + 1);
        write_file(&dir.join(&name), &shard.iter().collect::<Vec<_>>());
        map.extend(
            shard
                .iter()
                .map(|tensor| (tensor.name.clone(), name.clone())),
        );
    }
    std::fs::write(
        dir.join("model.safetensors.index.json"),
        json!({"metadata": {}, "weight_map": map}).to_string(),
    )
    .unwrap();
}

/// Numbers from -0.5 up to 0.5 that depend on the name alone.
pub fn values(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (1..=count as u64)
        .map(|number| {
            let mut z = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}
