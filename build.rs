//! Compiles the runner's own GPU kernels, when the feature `cuda` is on: `nvcc` ($NVCC, else of $CUDA_HOME, else on the PATH) makes
//! PTX, which the driver finishes for whatever GPU is there.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/runner/cuda.cu");
    for name in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let nvcc = std::env::var_os("NVCC")
        .map(PathBuf::from)
        .or(home.filter(|path| path.exists()));
    let nvcc = nvcc.unwrap_or_else(|| PathBuf::from("nvcc"));
    // bf16 arithmetic begins with 8.0.
    let capability = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".to_owned());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("cuda.ptx");
    let status = Command::new(&nvcc)
        .args(["-ptx", "-O3", &format!("-arch=compute_{capability}"), "-o"])
        .arg(&out)
        .arg("src/runner/cuda.cu")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} ended with {status}", nvcc.display()),
        Err(error) => panic!(
            "{}: {error}; set NVCC or CUDA_HOME to NVIDIA's CUDA toolkit",
            nvcc.display()
        ),
    }
}
