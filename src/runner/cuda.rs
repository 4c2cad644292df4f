//! The decoder's operations on a GPU: one launch where a tensor library has several, and no wait for the device between them.
//!
//! The kernels are in `cuda.cu`. All work of a device is in one stream, so what is launched later sees what was written before.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaStream, CudaView, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};
use std::sync::Arc;

use super::attention::Attention;
use super::config::Activation;

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/cuda.ptx"));

/// Positions that one block of the attention of a single step takes, at least.
const PIECE: usize = 128;
/// Blocks that keep a large GPU busy.
const BLOCKS: usize = 264;

/// How a token's heads lie side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) kv: usize,
    pub(super) width: usize,
}

/// An element type of activations.
trait Element: CudaDType + DeviceRepr {
    const NAME: &'static str;
}

impl Element for bf16 {
    const NAME: &'static str = "bf16";
}

impl Element for f16 {
    const NAME: &'static str = "f16";
}

impl Element for f32 {
    const NAME: &'static str = "f32";
}

/// Calls a generic function with the element type of a tensor.
macro_rules! by_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            DType::BF16 => $function::<bf16>($($argument),*),
            DType::F16 => $function::<f16>($($argument),*),
            DType::F32 => $function::<f32>($($argument),*),
            other => bail!("activations of {other:?}"),
        }
    };
}

/// A kernel, and the stream that it runs in.
struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    fn builder(&self) -> LaunchArgs<'_> {
        self.stream.launch_builder(&self.function)
    }
}

fn kernel<T: Element>(device: &CudaDevice, name: &str) -> Result<Kernel> {
    let function = device.get_or_load_custom_func(&format!("{name}_{}", T::NAME), "ocifs", PTX)?;
    Ok(Kernel {
        function: function.into_cuda_function(),
        stream: device.cuda_stream(),
    })
}

/// The elements of a contiguous tensor on the device.
fn view<'a, T: Element>(storage: &'a Storage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let (Storage::Cuda(storage), Some((start, end))) = (storage, layout.contiguous_offsets())
    else {
        bail!("a kernel needs contiguous tensors on the device");
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

fn wrap<T: Element>(
    slice: candle_core::cuda_backend::cudarc::driver::CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

fn grid(x: usize, y: usize, z: usize, threads: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, z as u32),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// Threads for a block that goes through a row.
fn threads(width: usize) -> usize {
    width.div_ceil(8).next_multiple_of(32).clamp(32, 1024)
}

/// x / rms(x) · weight, of each row.
pub(super) fn norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    fn typed<T: Element>(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
        let device = x.device().as_cuda_device()?;
        let (rows, width) = x.dims2()?;
        let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
        let (x, weight) = (view::<T>(&xs, xl)?, view::<f32>(&ws, wl)?);
        // SAFETY: the kernel writes every element.
        let out = unsafe { device.alloc::<T>(rows * width)? };
        let function = kernel::<T>(device, "norm")?;
        let width32 = width as i32;
        let mut builder = function.builder();
        builder
            .arg(&x)
            .arg(&weight)
            .arg(&out)
            .arg(&width32)
            .arg(&epsilon);
        // SAFETY: the arguments are those of the kernel, and a block takes a row.
        unsafe { builder.launch(grid(rows, 1, 1, threads(width))) }.w()?;
        Ok(wrap(out, device, (rows, width)))
    }
    by_dtype!(x.dtype(), typed(x, weight, epsilon))
}

/// x + y, and its norm.
pub(super) fn add_norm(
    x: &Tensor,
    y: &Tensor,
    weight: &Tensor,
    epsilon: f32,
) -> Result<(Tensor, Tensor)> {
    fn typed<T: Element>(
        x: &Tensor,
        y: &Tensor,
        weight: &Tensor,
        epsilon: f32,
    ) -> Result<(Tensor, Tensor)> {
        let device = x.device().as_cuda_device()?;
        let (rows, width) = x.dims2()?;
        let ((xs, xl), (ys, yl), (ws, wl)) = (
            x.storage_and_layout(),
            y.storage_and_layout(),
            weight.storage_and_layout(),
        );
        let (x, y, weight) = (
            view::<T>(&xs, xl)?,
            view::<T>(&ys, yl)?,
            view::<f32>(&ws, wl)?,
        );
        // SAFETY: the kernel writes every element of both.
        let (sum, out) = unsafe {
            (
                device.alloc::<T>(rows * width)?,
                device.alloc::<T>(rows * width)?,
            )
        };
        let function = kernel::<T>(device, "add_norm")?;
        let width32 = width as i32;
        let mut builder = function.builder();
        builder
            .arg(&x)
            .arg(&y)
            .arg(&weight)
            .arg(&sum)
            .arg(&out)
            .arg(&width32)
            .arg(&epsilon);
        // SAFETY: the arguments are those of the kernel, and a block takes a row.
        unsafe { builder.launch(grid(rows, 1, 1, threads(width))) }.w()?;
        Ok((
            wrap(sum, device, (rows, width)),
            wrap(out, device, (rows, width)),
        ))
    }
    by_dtype!(x.dtype(), typed(x, y, weight, epsilon))
}

/// x · Wᵀ for one row: bound by memory, so by how the weights are read.
pub(super) fn gemv(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    fn typed<T: Element>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let device = x.device().as_cuda_device()?;
        let (n, k) = weight.dims2()?;
        let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
        let (x, weight) = (view::<T>(&xs, xl)?, view::<T>(&ws, wl)?);
        // SAFETY: the kernel writes every element.
        let out = unsafe { device.alloc::<T>(n)? };
        let function = kernel::<T>(device, "gemv")?;
        let (n32, k32) = (n as i32, k as i32);
        let mut builder = function.builder();
        builder.arg(&weight).arg(&x).arg(&out).arg(&n32).arg(&k32);
        // SAFETY: the arguments are those of the kernel, a warp takes a row, and rows begin at multiples of 16 bytes.
        unsafe { builder.launch(grid(n.div_ceil(4), 1, 1, 128)) }.w()?;
        Ok(wrap(out, device, (1, n)))
    }
    // Rows that do not begin at multiples of 16 bytes are for the library.
    if (weight.dim(1)? * weight.dtype().size_in_bytes()) % 16 != 0
        || weight.layout().start_offset() * weight.dtype().size_in_bytes() % 16 != 0
    {
        return x.matmul(&weight.t()?);
    }
    by_dtype!(x.dtype(), typed(x, weight))
}

/// The gate of an MLP; see [`super::gate`].
pub(super) fn gate(
    activation: Activation,
    x: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    fn typed<T: Element>(
        activation: Activation,
        x: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let device = &x.device;
        let (rows, double) = layout.shape().dims2()?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a gate needs a contiguous tensor");
        };
        let (x, width) = (x.as_cuda_slice::<T>()?.slice(start..end), double / 2);
        // SAFETY: the kernel writes every element.
        let out = unsafe { device.alloc::<T>(rows * width)? };
        let function = kernel::<T>(device, "gate")?;
        let (width32, gelu) = (width as i32, i32::from(activation == Activation::GeluTanh));
        let mut builder = function.builder();
        builder.arg(&x).arg(&out).arg(&width32).arg(&gelu);
        // SAFETY: the arguments are those of the kernel, and a thread takes an element of a row.
        unsafe { builder.launch(grid(width.div_ceil(256), rows, 1, 256)) }.w()?;
        Ok((
            CudaStorage::wrap_cuda_slice(out, device.clone()),
            (rows, width).into(),
        ))
    }
    use candle_core::backend::BackendStorage;
    by_dtype!(x.dtype(), typed(activation, x, layout))
}

/// Norms (if there are norms) and turns queries and keys, writes keys and values into the caches, and gives the queries `[s, heads, d]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn rotate(
    qkv: &Tensor,
    norms: Option<(&Tensor, &Tensor)>,
    cos: &Tensor,
    sin: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    position: usize,
    epsilon: f32,
) -> Result<Tensor> {
    #[allow(clippy::too_many_arguments)]
    fn typed<T: Element>(
        qkv: &Tensor,
        norms: Option<(&Tensor, &Tensor)>,
        cos: &Tensor,
        sin: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: Heads,
        position: usize,
        epsilon: f32,
    ) -> Result<Tensor> {
        let device = qkv.device().as_cuda_device()?;
        let (steps, room) = (qkv.dim(0)?, k.dim(1)?);
        let ((qs, ql), (cs, cl), (ss, sl)) = (
            qkv.storage_and_layout(),
            cos.storage_and_layout(),
            sin.storage_and_layout(),
        );
        let ((ks, kl), (vs, vl)) = (k.storage_and_layout(), v.storage_and_layout());
        let (qkv, cos, sin) = (
            view::<T>(&qs, ql)?,
            view::<f32>(&cs, cl)?,
            view::<f32>(&ss, sl)?,
        );
        let (k, v) = (view::<T>(&ks, kl)?, view::<T>(&vs, vl)?);
        // SAFETY: the kernel writes every element.
        let q = unsafe { device.alloc::<T>(steps * heads.query * heads.width)? };
        let numbers =
            [heads.query, heads.kv, heads.width, room, position].map(|number| number as i32);
        // A warp a head.
        let launch = grid((heads.query + 2 * heads.kv).div_ceil(4), steps, 1, 128);
        match norms {
            None => {
                let function = kernel::<T>(device, "rotate")?;
                let mut builder = function.builder();
                builder
                    .arg(&qkv)
                    .arg(&cos)
                    .arg(&sin)
                    .arg(&q)
                    .arg(&k)
                    .arg(&v);
                for number in &numbers {
                    builder.arg(number);
                }
                // SAFETY: the arguments are those of the kernel; positions are within the caches' room.
                unsafe { builder.launch(launch) }.w()?;
            }
            Some((q_norm, k_norm)) => {
                let ((qns, qnl), (kns, knl)) =
                    (q_norm.storage_and_layout(), k_norm.storage_and_layout());
                let (q_norm, k_norm) = (view::<f32>(&qns, qnl)?, view::<f32>(&kns, knl)?);
                let function = kernel::<T>(device, "norm_rotate")?;
                let mut builder = function.builder();
                builder
                    .arg(&qkv)
                    .arg(&q_norm)
                    .arg(&k_norm)
                    .arg(&cos)
                    .arg(&sin)
                    .arg(&q)
                    .arg(&k)
                    .arg(&v);
                for number in &numbers {
                    builder.arg(number);
                }
                builder.arg(&epsilon);
                // SAFETY: as above.
                unsafe { builder.launch(launch) }.w()?;
            }
        }
        Ok(wrap(q, device, (steps, heads.query, heads.width)))
    }
    if position + qkv.dim(0)? > k.dim(1)? {
        bail!("positions beyond the cache");
    }
    by_dtype!(
        qkv.dtype(),
        typed(qkv, norms, cos, sin, k, v, heads, position, epsilon)
    )
}

/// Attention of queries `[s, heads, d]` over caches `[kv_heads, room, d]`: `[s, heads * d]`.
pub(super) fn attend(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (steps, _, width) = q.dims3()?;
    if steps == 1 && [32, 64, 96, 128, 256].contains(&width) {
        return by_dtype!(q.dtype(), step(attention, q, k, v));
    }
    by_dtype!(q.dtype(), several(attention, q, k, v))
}

/// One query: the cache is read once, in pieces side by side.
fn step<T: Element>(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let device = q.device().as_cuda_device()?;
    let ((_, heads, width), (kv, room, _)) = (q.dims3()?, k.dims3()?);
    let seen = attention.sees(attention.position);
    let (group, parts) = (heads / kv, (heads / kv).div_ceil(4));
    let splits = seen
        .len()
        .div_ceil(PIECE)
        .clamp(1, (BLOCKS / (kv * parts)).max(1));
    let piece = seen.len().div_ceil(splits);
    let splits = seen.len().div_ceil(piece);
    let ((qs, ql), (ks, kl), (vs, vl)) = (
        q.storage_and_layout(),
        k.storage_and_layout(),
        v.storage_and_layout(),
    );
    let (q, k, v) = (
        view::<T>(&qs, ql)?,
        view::<T>(&ks, kl)?,
        view::<T>(&vs, vl)?,
    );
    // SAFETY: the kernels write every element.
    let (partial, out) = unsafe {
        (
            device.alloc::<f32>(heads * splits * (width + 2))?,
            device.alloc::<T>(heads * width)?,
        )
    };
    let numbers = [group, room, seen.start, seen.end, piece].map(|number| number as i32);
    let function = kernel::<T>(device, &format!("attend_{width}"))?;
    let mut builder = function.builder();
    builder.arg(&q).arg(&k).arg(&v).arg(&partial);
    for number in &numbers {
        builder.arg(number);
    }
    builder.arg(&attention.scale);
    // SAFETY: the arguments are those of the kernel, and what is seen is within the caches' room.
    unsafe { builder.launch(grid(kv, splits, parts, 256)) }.w()?;
    let function = kernel::<T>(device, "join")?;
    let (splits32, width32) = (splits as i32, width as i32);
    let mut builder = function.builder();
    builder.arg(&partial).arg(&out).arg(&splits32).arg(&width32);
    // SAFETY: the arguments are those of the kernel, and a block takes a query head.
    unsafe { builder.launch(grid(heads, 1, 1, width.next_multiple_of(32).min(256))) }.w()?;
    Ok(wrap(out, device, (1, heads * width)))
}

/// A prompt: products of the library around a softmax that masks and scales.
fn several<T: Element>(
    attention: &Attention,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor> {
    let device = q.device().as_cuda_device()?;
    let ((steps, heads, width), kv) = (q.dims3()?, k.dim(0)?);
    let group = heads / kv;
    let first = attention.sees(attention.position).start;
    let length = attention.position + steps - first;
    let (k, v) = (k.narrow(1, first, length)?, v.narrow(1, first, length)?);
    let q = q
        .reshape((steps, kv, group, width))?
        .permute((1, 2, 0, 3))?
        .contiguous()?
        .reshape((kv, group * steps, width))?;
    let scores = q.matmul(&k.transpose(1, 2)?)?;
    let weights = {
        let (ss, sl) = scores.storage_and_layout();
        let scores = view::<T>(&ss, sl)?;
        let rows = kv * group * steps;
        // SAFETY: the kernel writes every element.
        let out = unsafe { device.alloc::<T>(rows * length)? };
        let window = attention.window.unwrap_or(0);
        let numbers =
            [steps, length, first, attention.position, window].map(|number| number as i32);
        let function = kernel::<T>(device, "softmax")?;
        let mut builder = function.builder();
        builder.arg(&scores).arg(&out);
        for number in &numbers {
            builder.arg(number);
        }
        builder.arg(&attention.scale);
        // SAFETY: the arguments are those of the kernel, and a block takes a row.
        unsafe { builder.launch(grid(rows, 1, 1, threads(length))) }.w()?;
        wrap(out, device, (kv, group * steps, length))
    };
    weights
        .matmul(&v)?
        .reshape((kv, group, steps, width))?
        .permute((2, 0, 1, 3))?
        .contiguous()?
        .reshape((steps, heads * width))
}
