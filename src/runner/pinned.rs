//! Loading into a GPU: each worker reads into one of two page-locked buffers while the other is on its way over the bus.

use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice, result,
};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor};
use half::{bf16, f16};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::error::{Error, Result};
use super::load::{JOB, Job, Space, Wanted, in_order};
use super::shards::Shard;

fn cuda(error: DriverError) -> Error {
    Error::Tensor(candle_core::Error::wrap(error))
}

enum Memory {
    U8(CudaSlice<u8>),
    U32(CudaSlice<u32>),
    I64(CudaSlice<i64>),
    BF16(CudaSlice<bf16>),
    F16(CudaSlice<f16>),
    F32(CudaSlice<f32>),
    F64(CudaSlice<f64>),
}

/// One worker's stream and buffers.
struct Worker {
    stream: Arc<CudaStream>,
    buffers: [(PinnedHostSlice<u8>, CudaEvent); 2],
    next: usize,
}

impl Worker {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream().context().new_stream().map_err(cuda)?;
        let buffer = || -> Result<(PinnedHostSlice<u8>, CudaEvent)> {
            // SAFETY: nothing is read from the buffer before a file was read into it.
            let memory = unsafe {
                stream
                    .context()
                    .alloc_pinned_with_flags::<u8>(JOB as usize, 0)
            }
            .map_err(cuda)?;
            Ok((memory, stream.record_event(None).map_err(cuda)?))
        };
        let buffers = [buffer()?, buffer()?];
        Ok(Self {
            stream,
            buffers,
            next: 0,
        })
    }

    /// Reads and sends. `to` is where the bytes go on the device.
    fn work(&mut self, shard: &Shard, job: &Job, to: u64) -> Result<()> {
        let (memory, sent) = &mut self.buffers[self.next];
        self.next = 1 - self.next;
        sent.synchronize().map_err(cuda)?;
        let bytes = &mut memory.as_mut_slice().map_err(cuda)?[..job.length];
        shard
            .file
            .read_exact_at(bytes, job.offset)
            .map_err(|error| Error::io(&shard.path, error))?;
        // SAFETY: `to` has room for the job, the buffer is not touched again before the event, and both live until the stream is empty.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }.map_err(cuda)?;
        sent.record(&self.stream).map_err(cuda)
    }
}

/// As [`super::load::load`], on a GPU.
pub(super) fn load(
    files: &[Shard],
    wanted: &[Wanted],
    spaces: &[Space],
    jobs: &[Job],
    workers: usize,
    device: &CudaDevice,
) -> Result<Vec<Tensor>> {
    let stream = device.cuda_stream();
    let mut memories = Vec::with_capacity(spaces.len());
    for space in spaces {
        // SAFETY: every byte is written by a job before anybody reads it.
        memories.push(unsafe { allocate(space, device) }?);
    }
    let starts: Vec<u64> = memories.iter().map(|(_, start)| *start).collect();
    // The memory is there when the device's own stream has come so far.
    stream.synchronize().map_err(cuda)?;
    in_order(
        jobs,
        workers,
        || Worker::new(device),
        |worker, job| worker.work(&files[job.shard], job, starts[job.tensor] + job.at as u64),
        |worker| worker.stream.synchronize().map_err(cuda),
    )?;
    Ok(memories
        .into_iter()
        .zip(wanted)
        .map(|((memory, _), want)| tensor(memory, want, device))
        .collect())
}

/// Memory on the device, and where it begins.
///
/// # Safety
/// It is not initialised.
unsafe fn allocate(space: &Space, device: &CudaDevice) -> Result<(Memory, u64)> {
    let stream = device.cuda_stream();
    macro_rules! with {
        ($variant:ident) => {{
            // SAFETY: as the caller says.
            let slice = unsafe { device.alloc(space.elements) }?;
            let start = slice.device_ptr(&stream).0;
            (Memory::$variant(slice), start)
        }};
    }
    Ok(match space.dtype {
        DType::U8 => with!(U8),
        DType::U32 => with!(U32),
        DType::I64 => with!(I64),
        DType::BF16 => with!(BF16),
        DType::F16 => with!(F16),
        DType::F32 => with!(F32),
        DType::F64 => with!(F64),
        other => return Err(Error::Unsupported(format!("tensors of {other:?} on a GPU"))),
    })
}

fn tensor(memory: Memory, want: &Wanted, device: &CudaDevice) -> Tensor {
    let device = device.clone();
    let storage = match memory {
        Memory::U8(slice) => CudaStorage::wrap_cuda_slice(slice, device),
        Memory::U32(slice) => CudaStorage::wrap_cuda_slice(slice, device),
        Memory::I64(slice) => CudaStorage::wrap_cuda_slice(slice, device),
        Memory::BF16(slice) => CudaStorage::wrap_cuda_slice(slice, device),
        Memory::F16(slice) => CudaStorage::wrap_cuda_slice(slice, device),
        Memory::F32(slice) => CudaStorage::wrap_cuda_slice(slice, device),
        Memory::F64(slice) => CudaStorage::wrap_cuda_slice(slice, device),
    };
    Tensor::from_storage(
        Storage::Cuda(storage),
        want.shape.as_slice(),
        BackpropOp::none(),
        false,
    )
}
