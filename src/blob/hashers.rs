//! The threads that hash: several blobs at a time, never in the way of readers, never starved for good.
//!
//! Each thread of the pool is two. The first decides and takes the locks; it is ordinary but nice, and hashes while no reader
//! is about. The second only hashes, under `SCHED_IDLE` (sched(7)): the scheduler takes a processor that runs nothing else
//! for an idle one, so whatever serves readers is put there and goes first at once. A thread cannot leave that
//! policy again without privileges, hence two. The second holds no lock that anybody else takes, because it may not run
//! again for a long time. An engine that computes on all processors while it loads would stop it for as long; so when it gets
//! nowhere the first takes over, at the share of a nice thread.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::readers::Readers;
use super::verify::{Job, Step};
use crate::base::lock;
use crate::base::sync::atomic::{AtomicU64, Ordering};
use crate::base::sync::{Condvar, Mutex};

/// Readers count as active for so long after a read.
const RECENT: Duration = Duration::from_millis(50);
/// An idle thread that hashed less than [`LEAST`] in this time is starved.
const STARVED: Duration = Duration::from_secs(2);
/// Bytes.
const LEAST: u64 = 64 << 20;
/// A starved blob is hashed by an ordinary thread for so long.
const HURRY: Duration = Duration::from_secs(1);
/// Bytes of one blob after which another one that waits is taken.
const TURN: u64 = 256 << 20;
/// A thread without work ends after this.
const KEEP: Duration = Duration::from_secs(10);
/// The nice value of the ordinary threads: a tenth of the weight of those that serve readers (sched(7)).
const NICE: i32 = 10;

/// What hashing has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HashCost {
    /// Bytes hashed.
    pub bytes: u64,
    /// Processor time for it, that of reading them included.
    pub processor: Duration,
}

/// The pool; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Hashers {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    queue: Mutex<Queue>,
    more: Condvar,
    readers: Arc<Readers>,
    /// Most blobs at a time; with 0, everything is hashed at once by whoever asks for it.
    most: usize,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Box<Job>>,
    threads: usize,
    idle: usize,
}

impl Hashers {
    /// With so many threads at most; without any, everything is hashed at once by whoever asks for it.
    pub(super) fn new(readers: Arc<Readers>, most: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                queue: Mutex::default(),
                more: Condvar::new(),
                readers,
                most,
                bytes: AtomicU64::new(0),
                nanoseconds: AtomicU64::new(0),
            }),
        }
    }

    pub(super) fn cost(&self) -> HashCost {
        HashCost {
            bytes: self.inner.bytes.load(Ordering::Relaxed),
            processor: Duration::from_nanos(self.inner.nanoseconds.load(Ordering::Relaxed)),
        }
    }

    /// Has the job done some time; gives it back when no thread is to be had for it.
    pub(super) fn add(&self, mut job: Box<Job>) -> Result<(), Box<Job>> {
        if self.inner.most == 0 {
            while matches!(self.inner.step(&mut job), Step::More) {}
            job.end();
            return Ok(());
        }
        let mut queue = lock(&self.inner.queue);
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() || queue.threads == self.inner.most {
            drop(queue);
            self.inner.more.notify_one();
            return Ok(());
        }
        let inner = Arc::clone(&self.inner);
        let begun = thread::Builder::new()
            .name("ocifs-hash".into())
            .spawn(move || inner.serve());
        if begun.is_ok() {
            queue.threads += 1;
        } else if queue.threads == 0 {
            return queue.jobs.pop_back().map_or(Ok(()), Err);
        }
        Ok(())
    }
}

impl Inner {
    /// The ordinary thread's life.
    fn serve(self: &Arc<Self>) {
        // "Process" 0 is the calling thread on Linux (setpriority(2), "C library/kernel differences").
        let _ = rustix::process::setpriority_process(None, NICE);
        let mut behind = None;
        while let Some(job) = self.next() {
            let again = self.work(job, &mut behind);
            if let Some(job) = again {
                lock(&self.queue).jobs.push_back(job);
            }
        }
    }

    fn next(&self) -> Option<Box<Job>> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue.idle += 1;
            let (guard, waited) = self
                .more
                .wait_timeout(queue, KEEP)
                .unwrap_or_else(PoisonError::into_inner);
            queue = guard;
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() {
                queue.threads -= 1;
                return None;
            }
        }
    }

    /// Hashes a blob to its next gap or its end. The job comes back when it is another one's turn.
    fn work(self: &Arc<Self>, mut job: Box<Job>, behind: &mut Option<Behind>) -> Option<Box<Job>> {
        let mut hurry: Option<Instant> = None;
        let mut done = 0;
        loop {
            let hurried = hurry.is_some_and(|until| Instant::now() < until);
            let gives_way = !hurried && self.readers.active_within(RECENT);
            let step;
            if gives_way && (behind.is_some() || self.begin(behind)) {
                let Some(idle) = behind.as_ref() else {
                    continue;
                };
                let Some((back, last, bytes)) = idle.hash(job) else {
                    // It panicked, and the job with it; the blob is hashed anew when it is opened again.
                    *behind = None;
                    return None;
                };
                (job, step) = (back, last);
                done += bytes;
                if matches!(step, Step::Starved) {
                    hurry = Some(Instant::now() + HURRY);
                }
            } else {
                step = self.step(&mut job);
                done += job.step_len();
            }
            if matches!(step, Step::End) {
                job.end();
                return None;
            }
            if done >= TURN && !lock(&self.queue).jobs.is_empty() {
                return Some(job);
            }
        }
    }

    /// One step, with its costs counted.
    fn step(&self, job: &mut Job) -> Step {
        let begun = clock_gettime(ClockId::ThreadCPUTime);
        let step = job.step();
        let ended = clock_gettime(ClockId::ThreadCPUTime);
        let spent = (ended.tv_sec - begun.tv_sec) * 1_000_000_000 + (ended.tv_nsec - begun.tv_nsec);
        self.nanoseconds
            .fetch_add(u64::try_from(spent).unwrap_or(0), Ordering::Relaxed);
        if matches!(step, Step::More) {
            self.bytes.fetch_add(job.step_len(), Ordering::Relaxed);
        }
        step
    }

    fn begin(self: &Arc<Self>, behind: &mut Option<Behind>) -> bool {
        *behind = Behind::start(self);
        behind.is_some()
    }
}

/// The idle thread behind an ordinary one. Ends when this is dropped.
#[derive(Debug)]
struct Behind {
    to: SyncSender<Box<Job>>,
    from: Receiver<(Box<Job>, Step)>,
    /// Bytes hashed so far, and the count at which it is to stop: set to what it is when it is starved.
    done: Arc<AtomicU64>,
    stop: Arc<AtomicU64>,
}

impl Behind {
    fn start(inner: &Arc<Inner>) -> Option<Self> {
        let (to, jobs) = sync_channel::<Box<Job>>(1);
        let (back, from) = sync_channel(1);
        let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (inner, count, until) = (Arc::clone(inner), Arc::clone(&done), Arc::clone(&stop));
        let life = move || {
            become_idle();
            while let Ok(mut job) = jobs.recv() {
                let step = loop {
                    match inner.step(&mut job) {
                        Step::More => {}
                        step => break step,
                    }
                    let now = count.fetch_add(job.step_len(), Ordering::AcqRel) + job.step_len();
                    if now >= until.load(Ordering::Acquire) || !inner.readers.active_within(RECENT)
                    {
                        break Step::More;
                    }
                };
                if back.send((job, step)).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("ocifs-hash-idle".into())
            .spawn(life)
            .ok()?;
        Some(Self {
            to,
            from,
            done,
            stop,
        })
    }

    /// Has the idle thread hash until readers are gone, its turn is over or nothing is left; and how many bytes it did.
    fn hash(&self, job: Box<Job>) -> Option<(Box<Job>, Step, u64)> {
        let before = self.done.load(Ordering::Acquire);
        self.stop.store(before + TURN, Ordering::Release);
        self.to.send(job).ok()?;
        let mut seen = before;
        let mut starved = false;
        let (job, step) = loop {
            match self.from.recv_timeout(STARVED) {
                Ok(back) => break back,
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let now = self.done.load(Ordering::Acquire);
                    if now - seen < LEAST {
                        // It gives the job back at its next step.
                        starved = true;
                        self.stop.store(0, Ordering::Release);
                    }
                    seen = now;
                }
            }
        };
        let bytes = self.done.load(Ordering::Acquire) - before;
        match step {
            Step::More if starved => Some((job, Step::Starved, bytes)),
            step => Some((job, step, bytes)),
        }
    }
}

/// Makes the calling thread one that runs when nothing else wants to.
fn become_idle() {
    // SAFETY: the structure is plain data of the right type, zero is the one priority that the policy knows, and "process" 0 is
    // the calling thread (sched_setscheduler(2), "C library/kernel differences").
    let result = unsafe {
        let param: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param)
    };
    if result != 0 {
        // A sandbox may forbid it; the lowest weight is the next best.
        let _ = rustix::process::setpriority_process(None, 19);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_thread_is_one() {
        let policy = thread::spawn(|| {
            become_idle();
            // SAFETY: no memory is involved.
            unsafe { libc::sched_getscheduler(0) }
        });
        assert_eq!(policy.join().unwrap(), libc::SCHED_IDLE);
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_OTHER);
    }
}
