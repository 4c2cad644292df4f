//! Locks and atomics of the concurrent core, from one place: its model check (`tests/model`) has others here, which
//! try every order of what threads do.

use std::sync::PoisonError;
pub use std::sync::{Condvar, Mutex, MutexGuard};

/// As in the standard library.
pub mod atomic {
    pub use std::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
    };

    /// So many zeros. Of many the kernel gives each page when it is first touched, which costs half a microsecond.
    pub fn zeros(count: usize) -> Box<[AtomicU32]> {
        let zeros = Box::into_raw(vec![0_u32; count].into_boxed_slice());
        const { assert!(align_of::<AtomicU32>() == align_of::<u32>()) };
        // SAFETY: an atomic integer has the size and the bit validity of the integer, and here its alignment too.
        unsafe { Box::from_raw(zeros as *mut [AtomicU32]) }
    }
}

/// Locks `mutex`, poisoned or not: every critical section here leaves its data whole at each step, and a panic
/// elsewhere must not turn into one in every later reader.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
