//! Locks and atomics of the concurrent core, from one place: its model check (`tests/model_check.rs`) has others here, which
//! try every order of what threads do.

pub use std::sync::Mutex;
use std::sync::{MutexGuard, PoisonError};

/// As in the standard library.
pub mod atomic {
    pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
}

/// Locks `mutex`, poisoned or not: every critical section here leaves its data whole at each step, and a panic
/// elsewhere must not turn into one in every later reader.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
