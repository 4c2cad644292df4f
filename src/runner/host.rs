//! Memory of one tensor on the CPU, that workers fill side by side before it is a tensor.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::error::{Error, Result};
use super::load::Space;

/// A vector of the tensor's own element type: its allocation is aligned for it, and becomes the tensor without a copy.
enum Buffer {
    U8(Vec<u8>),
    U32(Vec<u32>),
    I16(Vec<i16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    BF16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// The memory; nothing of it is initialised until it is read into.
pub(super) struct Host {
    buffer: Buffer,
    start: *mut u8,
    bytes: usize,
    elements: usize,
}

// SAFETY: `start` points into `buffer`, which nobody else has; writes through it are the callers' to keep apart.
unsafe impl Sync for Host {}

/// Asks for large pages. Every token reads every weight, and with pages of 4 KiB waits for a page table every 4 KiB of it.
///
/// Asked for are all pages that the tensor touches. Those that the allocator has written to before stay small, which is what small tensors have; of
/// large ones nearly all is in large pages. Where there are none, or nobody is to have them, nothing is lost.
fn prefer_large_pages(start: *mut u8, bytes: usize) {
    /// Smaller tensors are not read often enough, and may lie among other things.
    const LEAST: usize = 64 << 10;
    if bytes < LEAST {
        return;
    }
    let page = rustix::param::page_size();
    let before = start.addr() % page;
    let length = (before + bytes).next_multiple_of(page);
    // SAFETY: the advice changes no content, whoever's it is.
    let _ = unsafe {
        rustix::mm::madvise(
            start.wrapping_sub(before).cast(),
            length,
            rustix::mm::Advice::LinuxHugepage,
        )
    };
}

fn room<T>(elements: usize) -> Result<(Vec<T>, *mut u8)> {
    let mut vector = Vec::<T>::new();
    vector
        .try_reserve_exact(elements)
        .map_err(|_| Error::Unsupported(format!("{elements} elements do not fit into memory")))?;
    let start = vector.as_mut_ptr().cast();
    prefer_large_pages(start, elements * size_of::<T>());
    Ok((vector, start))
}

impl Host {
    /// Room for a tensor.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub(super) fn allocate(space: &Space) -> Result<Self> {
        let n = space.elements;
        macro_rules! with {
            ($variant:ident) => {{
                let (vector, start) = room(n)?;
                (Buffer::$variant(vector), start)
            }};
        }
        let (buffer, start) = match space.dtype {
            DType::U8 => with!(U8),
            DType::U32 => with!(U32),
            DType::I16 => with!(I16),
            DType::I32 => with!(I32),
            DType::I64 => with!(I64),
            DType::BF16 => with!(BF16),
            DType::F16 => with!(F16),
            DType::F32 => with!(F32),
            DType::F64 => with!(F64),
            other => return Err(Error::Unsupported(format!("tensors of {other:?}"))),
        };
        Ok(Self {
            buffer,
            start,
            bytes: n * space.dtype.size_in_bytes(),
            elements: n,
        })
    }

    /// Reads `length` bytes of `file` from `offset` into the bytes from `at`.
    ///
    /// # Safety
    /// No other thread reads into the same bytes.
    ///
    /// # Errors
    /// What the file says; an end before the last byte is one.
    pub(super) unsafe fn read(
        &self,
        file: &File,
        offset: u64,
        at: usize,
        length: usize,
    ) -> io::Result<()> {
        assert!(
            at.checked_add(length).is_some_and(|end| end <= self.bytes),
            "a job beyond its tensor"
        );
        // SAFETY: within the allocation, by the assertion; `u8` has no invalid values, and the kernel only writes to it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start.add(at), length) };
        file.read_exact_at(bytes, offset)
    }

    /// The tensor.
    ///
    /// # Safety
    /// Every byte has been read into.
    ///
    /// # Errors
    /// When the shape has another number of elements.
    pub(super) unsafe fn into_tensor(self, shape: &[usize]) -> Result<Tensor> {
        let n = self.elements;
        macro_rules! with {
            ($vector:ident) => {{
                let mut vector = $vector;
                // SAFETY: `n` elements were reserved, and the caller says that they were read; all these types take any bits.
                unsafe { vector.set_len(n) };
                Tensor::from_vec(vector, shape, &Device::Cpu)?
            }};
        }
        Ok(match self.buffer {
            Buffer::U8(v) => with!(v),
            Buffer::U32(v) => with!(v),
            Buffer::I16(v) => with!(v),
            Buffer::I32(v) => with!(v),
            Buffer::I64(v) => with!(v),
            Buffer::BF16(v) => with!(v),
            Buffer::F16(v) => with!(v),
            Buffer::F32(v) => with!(v),
            Buffer::F64(v) => with!(v),
        })
    }
}
