//! Tasks and timers of the concurrent core, from one place, for the same reason as [`super::sync`].

pub use tokio::runtime::Handle;
pub use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Sleeps with the thread, for those who may.
pub fn pause(span: std::time::Duration) {
    std::thread::sleep(span);
}

/// Threads that may hash at a time. With none, whoever brings the last bytes does it.
pub fn hashing_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does what may wait for a disk. The other tasks of this thread move to another one meanwhile, where there is one.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::RuntimeFlavor::CurrentThread;
    match Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == CurrentThread => work(),
        _ => tokio::task::block_in_place(work),
    }
}
