//! From files to tensors: positioned reads in file order, by several workers, straight into the final place.
//!
//! A lazy mount fetches in chunks and pays for each wait; a disk wants a queue. So all bytes that are wanted are cut into jobs of at
//! most 8 MiB at multiples of 8 MiB, in the order in which they lie in the files, and the workers take the next one when they are
//! done. Tensors that the model multiplies with together (`q`, `k`, `v`) have one destination, so joining them costs no copy.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use super::error::{Error, Result};
use super::host::Host;
use super::shards::{Shard, Shards};

/// Most bytes that one read asks for, and what reads are aligned to.
pub const JOB: u64 = 8 << 20;
/// Enough to cover the latency of a registry; a local disk is no slower with them.
pub const WORKERS: usize = 16;

/// A tensor to be made: one tensor of the files, or several of one dtype joined along their first dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The parts' names, in order.
    pub parts: Vec<String>,
    /// The shape of the whole.
    pub shape: Vec<usize>,
}

/// What loading took.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadStats {
    /// Bytes read.
    pub bytes: u64,
    /// From the first read to the last byte in place.
    pub time: Duration,
}

/// One read: where from, how much, and where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) shard: usize,
    pub(super) offset: u64,
    pub(super) length: usize,
    pub(super) tensor: usize,
    pub(super) at: usize,
}

/// A tensor's dtype and size, known before a byte is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub(super) dtype: DType,
    pub(super) elements: usize,
}

/// Makes the tensors that are `wanted` on `device`, with at most `workers` reads at a time.
///
/// # Errors
/// When a tensor is missing or has another shape or dtype, when a read fails, or the device has no room.
pub fn load(
    shards: &Shards,
    wanted: &[Wanted],
    device: &Device,
    workers: usize,
) -> Result<(Vec<Tensor>, LoadStats)> {
    let (spaces, jobs) = plan(shards, wanted)?;
    let started = Instant::now();
    let tensors = match device {
        Device::Cpu => on_cpu(&shards.files, wanted, &spaces, &jobs, workers)?,
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            super::pinned::load(&shards.files, wanted, &spaces, &jobs, workers, cuda)?
        }
        _ => {
            return Err(Error::Unsupported(
                "the runner was built without this device".to_owned(),
            ));
        }
    };
    let bytes = jobs.iter().map(|job| job.length as u64).sum();
    Ok((
        tensors,
        LoadStats {
            bytes,
            time: started.elapsed(),
        },
    ))
}

fn dtype_of(name: &str, tensor: &str) -> Result<DType> {
    Ok(match name {
        "U8" => DType::U8,
        "U32" => DType::U32,
        "I16" => DType::I16,
        "I32" => DType::I32,
        "I64" => DType::I64,
        "BF16" => DType::BF16,
        "F16" => DType::F16,
        "F32" => DType::F32,
        "F64" => DType::F64,
        other => {
            return Err(Error::Unsupported(format!(
                "tensor `{tensor}` is of {other}"
            )));
        }
    })
}

/// Every destination and every read, in file order. Nothing has been read or allocated when this fails.
fn plan(shards: &Shards, wanted: &[Wanted]) -> Result<(Vec<Space>, Vec<Job>)> {
    let (mut spaces, mut jobs) = (Vec::new(), Vec::new());
    for (tensor, want) in wanted.iter().enumerate() {
        let (mut dtype, mut at) = (None, 0);
        for name in &want.parts {
            let Some((shard, entry)) = shards.get(name) else {
                return Err(Error::Unsupported(format!("it has no tensor `{name}`")));
            };
            let this = dtype_of(&entry.dtype, name)?;
            if dtype.is_some_and(|dtype| dtype != this) {
                return Err(Error::Unsupported(format!(
                    "tensor `{name}` is of {}, the tensors that belong to it are not",
                    entry.dtype
                )));
            }
            dtype = Some(this);
            cut(shard, entry.offset, entry.size, tensor, at, &mut jobs);
            at += entry.size as usize;
        }
        let elements = want.shape.iter().product::<usize>();
        let dtype = dtype.unwrap_or(DType::U8);
        if elements * dtype.size_in_bytes() != at {
            return Err(Error::Unsupported(format!(
                "tensor `{}` does not have the shape {:?} that config.json says",
                want.parts.join("` + `"),
                want.shape
            )));
        }
        spaces.push(Space { dtype, elements });
    }
    jobs.sort_by_key(|job| (job.shard, job.offset));
    Ok((spaces, jobs))
}

fn cut(
    shard: usize,
    mut offset: u64,
    mut size: u64,
    tensor: usize,
    mut at: usize,
    jobs: &mut Vec<Job>,
) {
    while size > 0 {
        let length = size.min(JOB - offset % JOB);
        jobs.push(Job {
            shard,
            offset,
            length: length as usize,
            tensor,
            at,
        });
        offset += length;
        size -= length;
        at += length as usize;
    }
}

/// Runs `work` with each job, in order, on several threads; after the first failure no further job begins.
pub(super) fn in_order<S>(
    jobs: &[Job],
    workers: usize,
    start: impl Fn() -> Result<S> + Sync,
    work: impl Fn(&mut S, &Job) -> Result<()> + Sync,
    end: impl Fn(S) -> Result<()> + Sync,
) -> Result<()> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let run = || -> Result<()> {
        let mut state = start()?;
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(&mut state, job)?;
        }
        end(state)
    };
    std::thread::scope(|scope| {
        for _ in 0..workers.clamp(1, jobs.len().max(1)) {
            scope.spawn(|| {
                if let Err(error) = run() {
                    next.store(jobs.len(), Ordering::Relaxed);
                    failed
                        .lock()
                        .unwrap_or_else(|poisoned| poisoned.into_inner())
                        .get_or_insert(error);
                }
            });
        }
    });
    match failed
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
    {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

fn on_cpu(
    files: &[Shard],
    wanted: &[Wanted],
    spaces: &[Space],
    jobs: &[Job],
    workers: usize,
) -> Result<Vec<Tensor>> {
    let hosts = spaces
        .iter()
        .map(Host::allocate)
        .collect::<Result<Vec<Host>>>()?;
    in_order(
        jobs,
        workers,
        || Ok(()),
        |(), job| {
            let shard = &files[job.shard];
            // SAFETY: jobs do not overlap: each was cut from its own part of its tensor, within the tensor's length.
            unsafe { hosts[job.tensor].read(&shard.file, job.offset, job.at, job.length) }
                .map_err(|error| Error::io(&shard.path, error))
        },
        |()| Ok(()),
    )?;
    hosts
        .into_iter()
        .zip(wanted)
        // SAFETY: every byte was read: the parts' jobs cover the tensor, and none has failed.
        .map(|(host, want)| Ok(unsafe { host.into_tensor(&want.shape)? }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_end_at_multiples_and_cover_every_byte_once() {
        let mut jobs = Vec::new();
        cut(0, JOB - 10, 2 * JOB + 30, 7, 100, &mut jobs);
        let lengths: Vec<usize> = jobs.iter().map(|job| job.length).collect();
        assert_eq!(lengths, [10, JOB as usize, JOB as usize, 20]);
        let (mut offset, mut at) = (JOB - 10, 100);
        for job in jobs {
            assert_eq!((job.offset, job.at, job.tensor), (offset, at, 7));
            offset += job.length as u64;
            at += job.length;
        }
    }

    #[test]
    fn the_first_failure_ends_the_work() {
        let jobs: Vec<Job> = (0..1000)
            .map(|n| Job {
                shard: 0,
                offset: n,
                length: 1,
                tensor: 0,
                at: 0,
            })
            .collect();
        let done = AtomicUsize::new(0);
        let result = in_order(
            &jobs,
            4,
            || Ok(()),
            |(), job| {
                done.fetch_add(1, Ordering::Relaxed);
                if job.offset == 10 {
                    Err(Error::Request("no".to_owned()))
                } else {
                    Ok(())
                }
            },
            |()| Ok(()),
        );
        assert!(result.is_err());
        assert!(done.load(Ordering::Relaxed) < 1000);
    }
}
