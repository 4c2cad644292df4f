//! Which device a model runs on.

use candle_core::Device;

use super::error::{Error, Result};

/// A choice of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The first GPU if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(usize),
}

impl std::str::FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "not one of auto, cpu, cuda, cuda:N".to_owned()),
        }
    }
}

/// The device, ready for use.
///
/// # Errors
/// When a GPU was asked for by number and cannot be used; with `Auto` the CPU is used instead.
pub fn open(choice: Choice) -> Result<Device> {
    match choice {
        Choice::Cpu => Ok(Device::Cpu),
        Choice::Auto => Ok(gpu(0).unwrap_or(Device::Cpu)),
        Choice::Cuda(number) => gpu(number),
    }
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(number)
        .map_err(|error| Error::Request(format!("GPU {number} cannot be used: {error}")))?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: all work but loading is in the device's one stream, and loading waits for its own streams before anything is used.
        unsafe { cuda.disable_event_tracking() };
    }
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn gpu(number: usize) -> Result<Device> {
    Err(Error::Request(format!(
        "GPU {number} cannot be used: this ocifs-run was built without the feature `cuda`"
    )))
}
