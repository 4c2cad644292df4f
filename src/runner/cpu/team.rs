//! The threads that a step of the decoder is computed on.
//!
//! A step is a few products a layer, each of some ten microseconds where models are small; to wake a thread takes as long. So the threads of the
//! pool come once a step, and stay: while one of them leads from product to product, the others watch for the next one to be opened.

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How often a thread looks for work before it lets others have the processor each time.
const LOOKS: u32 = 2000;

/// The threads, for the one that leads them.
pub(in crate::runner) struct Team<'a> {
    post: &'a Post,
    /// A task cannot lead: a reference to this cannot go to another thread.
    _leads: PhantomData<Cell<()>>,
}

impl std::fmt::Debug for Team<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").finish_non_exhaustive()
    }
}

/// Runs `lead` on a thread of the pool, with those of the others that have nothing else to do.
pub(in crate::runner) fn with<R: Send>(lead: impl FnOnce(&Team<'_>) -> R + Send) -> R {
    let post = Post {
        state: Apart(AtomicUsize::new(0)),
        inside: Apart(AtomicUsize::new(0)),
        next: Apart(AtomicUsize::new(0)),
        job: UnsafeCell::new(None),
    };
    rayon::scope(|scope| {
        let (post, leader) = (&post, rayon::current_thread_index());
        scope.spawn_broadcast(move |_, context| {
            // The leader's thread may come here while it waits for something else.
            if Some(context.index()) != leader {
                post.help();
            }
        });
        let team = Team {
            post,
            _leads: PhantomData,
        };
        lead(&team)
    })
}

impl Drop for Team<'_> {
    fn drop(&mut self) {
        self.post.state.0.store(OVER, Ordering::Release);
    }
}

impl Team<'_> {
    /// How many threads there are at most.
    pub(in crate::runner) fn threads(&self) -> usize {
        rayon::current_num_threads()
    }

    /// Does tasks 0 to `count`, in any order, and returns when all are done.
    pub(in crate::runner) fn each(&self, count: usize, task: impl Fn(usize) + Sync) {
        if count < 2 || self.threads() < 2 {
            return (0..count).for_each(task);
        }
        self.post.open(count, &task);
    }

    /// Does a task for each `size` elements of `all`; the last may have fewer.
    pub(in crate::runner) fn chunks<T: Send>(
        &self,
        all: &mut [T],
        size: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let shared = Shared::new(all);
        self.each(shared.length.div_ceil(size), |number| {
            let end = ((number + 1) * size).min(shared.length);
            // SAFETY: each task has elements of its own.
            task(number, unsafe { shared.part(number * size..end) });
        });
    }
}

/// A slice whose parts tasks write to.
#[derive(Clone, Copy)]
pub(in crate::runner) struct Shared<'a, T> {
    start: *mut T,
    length: usize,
    _borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives parts to those alone who promise that nobody else has them.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Of `all`.
    pub(in crate::runner) fn new(all: &'a mut [T]) -> Self {
        Self {
            start: all.as_mut_ptr(),
            length: all.len(),
            _borrowed: PhantomData,
        }
    }

    /// Elements of it.
    ///
    /// # Safety
    /// Nobody else has any of them at the same time.
    #[allow(clippy::mut_from_ref)]
    pub(in crate::runner) unsafe fn part(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: within the slice, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// The element at `index`, and what comes after.
    pub(in crate::runner) fn at(&self, index: usize) -> *mut T {
        assert!(index <= self.length);
        // SAFETY: within the slice, or its end.
        unsafe { self.start.add(index) }
    }
}

type Task = dyn Fn(usize) + Sync;

/// Where the leader puts a job, and others find it.
///
/// A thread that wants to look at the job adds itself to `inside` first and then looks whether the job is still open; the leader closes it first and
/// then waits until nobody is inside. In the one order that these four have for all threads (`SeqCst`), either the thread sees that it is closed, or the
/// leader sees the thread.
struct Post {
    /// Which job this is, an odd number while it is open; [`OVER`] when there will be no other.
    state: Apart<AtomicUsize>,
    /// Threads, without the leader, that may be looking at the job.
    inside: Apart<AtomicUsize>,
    /// The first task that nobody has begun.
    next: Apart<AtomicUsize>,
    /// Written by the leader while no job is open and nobody is inside.
    job: UnsafeCell<Option<(*const Task, usize)>>,
}

const OVER: usize = usize::MAX;

/// In a cache line, and the one that is fetched along, of its own.
#[repr(align(128))]
struct Apart<T>(T);

// SAFETY: `job` is used as it says; what it points to is `Sync`.
unsafe impl Sync for Post {}

/// Ends the job, and so the time that its task is borrowed for, when the leader leaves it, by a panic too.
struct Open<'a>(&'a Post, usize);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.state.0.store(self.1 + 1, Ordering::SeqCst);
        let mut looks = 0;
        while self.0.inside.0.load(Ordering::SeqCst) > 0 {
            wait(&mut looks);
        }
    }
}

struct Inside<'a>(&'a AtomicUsize);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // What this thread has written is there for the leader, who sees the number.
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn wait(looks: &mut u32) {
    *looks += 1;
    if *looks < LOOKS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

impl Post {
    fn open<'a>(&self, count: usize, task: &'a (dyn Fn(usize) + Sync + 'a)) {
        let number = self.state.0.load(Ordering::Relaxed) + 1;
        // SAFETY: only the lifetime changes; nobody uses it any more when `_open` is dropped.
        let lasting =
            unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), &'static Task>(task) };
        // SAFETY: no job is open and nobody is inside.
        unsafe { *self.job.get() = Some((lasting, count)) };
        self.next.0.store(0, Ordering::Relaxed);
        self.state.0.store(number, Ordering::SeqCst);
        let _open = Open(self, number);
        self.work(count, task);
    }

    fn work(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        loop {
            let next = self.next.0.fetch_add(1, Ordering::Relaxed);
            if next >= count {
                return;
            }
            task(next);
        }
    }

    fn help(&self) {
        let (mut last, mut looks) = (0, 0);
        loop {
            let state = self.state.0.load(Ordering::Acquire);
            if state == OVER {
                return;
            }
            if state.is_multiple_of(2) || state == last {
                wait(&mut looks);
                continue;
            }
            (last, looks) = (state, 0);
            self.inside.0.fetch_add(1, Ordering::SeqCst);
            let _inside = Inside(&self.inside.0);
            if self.state.0.load(Ordering::SeqCst) == state {
                // SAFETY: it was written before the job was opened, and is not written while this thread is inside.
                if let Some((task, count)) = unsafe { *self.job.get() } {
                    // SAFETY: as above: it is borrowed as long as this thread is inside.
                    self.work(count, unsafe { &*task });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_task_is_done_once_before_the_next_job() {
        for _ in 0..50 {
            let total: usize = with(|team| {
                let mut numbers = vec![0_u32; 1000];
                for round in 0..200_usize {
                    let size = round % 70 + 1;
                    team.chunks(&mut numbers, size, |_, chunk| {
                        chunk.iter_mut().for_each(|number| *number += 1);
                    });
                    assert!(
                        numbers.iter().all(|number| *number as usize == round + 1),
                        "{round}"
                    );
                }
                numbers.len()
            });
            assert_eq!(total, 1000);
        }
    }

    #[test]
    fn several_teams_at_a_time_do_not_wait_for_each_other_for_ever() {
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        with(|team| {
                            team.each(9, |_| {
                                done.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 6 * 20 * 9);
    }

    #[test]
    fn a_task_that_panics_does_not_leave_the_others_with_what_is_gone() {
        for bad in 0..8 {
            let result = std::panic::catch_unwind(|| {
                with(|team| {
                    team.each(8, |task| assert_ne!(task, bad));
                });
            });
            assert!(result.is_err());
        }
        with(|team| team.each(3, |_| ()));
    }
}
