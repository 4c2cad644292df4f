//! The loader against the safetensors crate, byte for byte; and every kind of bad file, refused before it is used.

use std::fs::OpenOptions;
use std::path::Path;

use ocifs::runner::device::{self, Choice};
use ocifs::runner::load::{self, Wanted};
use ocifs::runner::shards::Shards;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

use crate::support::content::Content;
use crate::support::scratch;
use crate::weights::{Raw, write_raw, write_shards};

/// What a tensor of candle's holds, as bytes.
fn bytes(tensor: &candle_core::Tensor) -> Vec<u8> {
    use candle_core::DType::*;
    let flat = tensor.flatten_all().unwrap();
    macro_rules! with {
        ($type:ty) => {
            flat.to_vec1::<$type>()
                .unwrap()
                .into_iter()
                .flat_map(<$type>::to_le_bytes)
                .collect()
        };
    }
    match tensor.dtype() {
        U8 => flat.to_vec1::<u8>().unwrap(),
        U32 => with!(u32),
        I16 => with!(i16),
        I32 => with!(i32),
        I64 => with!(i64),
        BF16 => with!(half::bf16),
        F16 => with!(half::f16),
        F32 => with!(f32),
        F64 => with!(f64),
        other => panic!("{other:?}"),
    }
}

const DTYPES: &[(Dtype, &str, usize)] = &[
    (Dtype::U8, "U8", 1),
    (Dtype::I16, "I16", 2),
    (Dtype::F16, "F16", 2),
    (Dtype::BF16, "BF16", 2),
    (Dtype::U32, "U32", 4),
    (Dtype::I32, "I32", 4),
    (Dtype::F32, "F32", 4),
    (Dtype::I64, "I64", 8),
    (Dtype::F64, "F64", 8),
];

#[test]
fn every_dtype_is_loaded_byte_for_byte() {
    let dir = scratch("dtypes");
    let path = dir.path().join("model.safetensors");
    // Sizes on both sides of a job's end; an empty one, a scalar, and one over several jobs.
    let job = load::JOB as usize;
    let shapes: &[&[usize]] = &[&[3, 5], &[], &[0, 7], &[1000, 37]];
    let mut data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (number, (dtype, name, size)) in DTYPES.iter().enumerate() {
        for (at, shape) in shapes.iter().enumerate() {
            let length = shape.iter().product::<usize>() * size;
            data.push((
                format!("{name}.{at}"),
                *dtype,
                shape.to_vec(),
                Content::new(number as u64 * 10 + at as u64).bytes(0, length),
            ));
        }
    }
    data.push((
        "large".to_owned(),
        Dtype::BF16,
        vec![2, job / 2 + 3],
        Content::new(99).bytes(0, 2 * (job + 6)),
    ));
    let views: Vec<(String, TensorView<'_>)> = data
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            (
                name.clone(),
                TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
            )
        })
        .collect();
    serialize_to_file(views, None, &path).unwrap();

    let file = std::fs::read(&path).unwrap();
    let reference = SafeTensors::deserialize(&file).unwrap();
    let device = device::open(Choice::Cpu).unwrap();
    let wanted: Vec<Wanted> = data
        .iter()
        .map(|(name, _, shape, _)| Wanted {
            parts: vec![name.clone()],
            shape: shape.clone(),
        })
        .collect();
    for workers in [1, 16] {
        let shards = Shards::open(dir.path()).unwrap();
        let (tensors, stats) = load::load(&shards, &wanted, &device, workers).unwrap();
        for (tensor, want) in tensors.iter().zip(&wanted) {
            let view = reference.tensor(&want.parts[0]).unwrap();
            assert_eq!(tensor.dims(), view.shape(), "{want:?}");
            assert!(
                bytes(tensor) == view.data(),
                "{want:?} with {workers} workers"
            );
        }
        assert_eq!(
            stats.bytes,
            data.iter()
                .map(|(.., bytes)| bytes.len() as u64)
                .sum::<u64>()
        );
    }
}

#[test]
fn parts_from_several_files_become_one_tensor() {
    let dir = scratch("parts");
    let raws: Vec<Raw> = ["q", "k", "v", "o"]
        .iter()
        .enumerate()
        .map(|(number, name)| Raw {
            name: (*name).to_owned(),
            dtype: "F32",
            shape: vec![number + 2, 3],
            bytes: Content::new(number as u64).bytes(0, (number + 2) * 12),
        })
        .collect();
    write_shards(dir.path(), &raws, 3);
    let wanted = [Wanted {
        parts: ["v", "q", "k"].map(str::to_owned).to_vec(),
        shape: vec![9, 3],
    }];
    let shards = Shards::open(dir.path()).unwrap();
    for workers in [1, 16] {
        let (tensors, _) = load::load(
            &shards,
            &wanted,
            &device::open(Choice::Cpu).unwrap(),
            workers,
        )
        .unwrap();
        let joined: Vec<u8> = [2, 0, 1]
            .iter()
            .flat_map(|at: &usize| raws[*at].bytes.clone())
            .collect();
        assert!(bytes(&tensors[0]) == joined);
    }
}

fn refused(dir: &Path, said: &str) {
    let error = Shards::open(dir).unwrap_err().to_string();
    assert!(error.contains(said), "{error} does not say `{said}`");
}

#[test]
fn every_kind_of_bad_header_is_refused_before_a_tensor_is_read() {
    let tensor = |dtype: &str, shape: serde_json::Value, begin: u64, end: u64| json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]});
    let cases: Vec<(String, usize, &str)> = vec![
        (
            json!({"w": tensor("F32", json!([2]), 0, 8)}).to_string(),
            7,
            "lies at 0..8 of 7",
        ),
        (
            json!({"w": tensor("F32", json!([2]), 0, 8)}).to_string(),
            12,
            "the file at",
        ),
        (
            json!({"w": tensor("F32", json!([3]), 0, 8)}).to_string(),
            8,
            "takes 12 bytes",
        ),
        (
            json!({"w": tensor("F32", json!([2]), 8, 16)}).to_string(),
            16,
            "belong to no tensor",
        ),
        (
            json!({"a": tensor("U8", json!([6]), 0, 6), "b": tensor("U8", json!([6]), 4, 10)})
                .to_string(),
            10,
            "overlaps",
        ),
        (
            json!({"w": tensor("F32", json!([u64::MAX, 2]), 0, 8)}).to_string(),
            8,
            "impossible shape",
        ),
        (
            json!({"w": tensor("Q8", json!([8]), 0, 8)}).to_string(),
            8,
            "unknown dtype",
        ),
        (
            json!({"w": tensor("F32", json!([2]), 8, 0)}).to_string(),
            8,
            "lies at 8..0",
        ),
        (
            json!({"w": {"dtype": "F32", "shape": [2]}}).to_string(),
            8,
            "data_offsets",
        ),
        (json!([1, 2]).to_string(), 8, "its header"),
        ("not JSON".to_owned(), 8, "its header"),
    ];
    for (header, data, said) in cases {
        let dir = scratch("header");
        write_raw(
            &dir.path().join("model.safetensors"),
            &header,
            [vec![0; data].as_slice()],
        );
        refused(dir.path(), said);
        // The reference refuses the same file.
        let file = std::fs::read(dir.path().join("model.safetensors")).unwrap();
        assert!(SafeTensors::deserialize(&file).is_err(), "{header}");
    }
    for (file, said) in [
        (vec![], "0 bytes"),
        (vec![1, 2, 3], "3 bytes"),
        (u64::MAX.to_le_bytes().to_vec(), "at most"),
        (
            [200u64.to_le_bytes().as_slice(), b"{}"].concat(),
            "a header of 200 bytes",
        ),
    ] {
        let dir = scratch("length");
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        refused(dir.path(), said);
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let raws: Vec<Raw> = ["a", "b"]
        .iter()
        .map(|name| Raw {
            name: (*name).to_owned(),
            dtype: "U8",
            shape: vec![4],
            bytes: vec![7; 4],
        })
        .collect();
    let with = |index: &str, said: &str| {
        let dir = scratch("index");
        write_shards(dir.path(), &raws, 2);
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        refused(dir.path(), said);
    };
    let (one, two) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    with("{", "EOF");
    with("{}", "weight_map");
    with(
        &json!({"weight_map": {"a": "../etc/passwd"}}).to_string(),
        "no usable name",
    );
    with(
        &json!({"weight_map": {"a": 3}}).to_string(),
        "no usable name",
    );
    with(
        &json!({"weight_map": {"a": two, "b": two}}).to_string(),
        "`a` is not in",
    );
    with(
        &json!({"weight_map": {"a": one, "b": two, "c": two}}).to_string(),
        "`c` is not in",
    );
    with(
        &json!({"weight_map": {"a": "missing.safetensors"}}).to_string(),
        "missing.safetensors",
    );
    let dir = scratch("several");
    std::fs::write(dir.path().join("x.safetensors"), "").unwrap();
    std::fs::write(dir.path().join("y.safetensors"), "").unwrap();
    refused(dir.path(), "several");
    refused(scratch("none").path(), "no safetensors file");
}

#[test]
fn what_cannot_become_a_tensor_and_what_ends_early_is_an_error() {
    let dir = scratch("early");
    let raws = [
        Raw {
            name: "flag".to_owned(),
            dtype: "BOOL",
            shape: vec![4],
            bytes: vec![1; 4],
        },
        Raw {
            name: "w".to_owned(),
            dtype: "F32",
            shape: vec![1 << 20],
            bytes: vec![7; 4 << 20],
        },
    ];
    write_shards(dir.path(), &raws, 1);
    let shards = Shards::open(dir.path()).unwrap();
    let device = device::open(Choice::Cpu).unwrap();
    let load = |name: &str, shape: &[usize]| {
        let wanted = [Wanted {
            parts: vec![name.to_owned()],
            shape: shape.to_vec(),
        }];
        load::load(&shards, &wanted, &device, 4)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(load("flag", &[4]).contains("BOOL"));
    assert!(load("nothing", &[4]).contains("no tensor `nothing`"));
    assert!(load("w", &[7]).contains("shape"));
    // The file gets shorter between the header and the tensors.
    let path = dir.path().join("model.safetensors");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let error = load("w", &[1 << 20]);
    assert!(error.contains("model.safetensors"), "{error}");
}
