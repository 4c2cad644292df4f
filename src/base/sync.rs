//! Locks and atomics of the concurrent core, from one place: its model check (`tests/model`) has others here, which
//! try every order of what threads do.

use std::sync::PoisonError;
pub use std::sync::{Condvar, Mutex, MutexGuard};

/// As in the standard library.
pub mod atomic {
    pub use std::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
    };
}

/// Locks `mutex`, poisoned or not: every critical section here leaves its data whole at each step, and a panic
/// elsewhere must not turn into one in every later reader.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
