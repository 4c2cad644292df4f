//! What the tests stand on: processes with deadlines, servers, mounts, artifacts.

pub mod artifact;
pub mod booted;
pub mod certs;
pub mod content;
pub mod forward;
pub mod freeze;
pub mod held;
pub mod helper;
pub mod http;
pub mod model;
pub mod mount;
pub mod netns;
pub mod process;
pub mod proxy;
pub mod python;
pub mod registry;
pub mod tokens;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long anything on loopback may take before a test calls it hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of its own under the system's temporary directory, removed when dropped.
pub fn scratch(purpose: &str) -> TempDir {
    tempfile::Builder::new()
        .prefix(&format!("ocifs-test-{purpose}-"))
        .tempdir()
        .expect("a temporary directory")
}

/// Picks `full` with `OCIFS_TEST_SCALE=full`, else `quick`.
pub fn scale<T>(quick: T, full: T) -> T {
    match std::env::var("OCIFS_TEST_SCALE").as_deref() {
        Ok("full") => full,
        Ok("quick" | "") | Err(_) => quick,
        Ok(other) => panic!("OCIFS_TEST_SCALE is `{other}`, must be `quick` or `full`"),
    }
}

/// A loopback address that nobody listens on. Below the kernel's ephemeral range, so that no outgoing connection takes it.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Runs that start at the same time begin at different places.
    let start = (std::process::id() % 97) as u16 * 123;
    for _ in 0..12_000 {
        let port = 20_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed) % 12_000) % 12_000;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return listener.local_addr().unwrap();
        }
    }
    panic!("no free loopback port between 20000 and 32000");
}

/// Runs `action` on a thread of its own and panics when it takes longer than `limit`: a read of a mount that hangs would
/// otherwise hang the test before its guards can end the daemon. The thread ends when they do.
pub fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    action: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        // The receiver is gone when the test has given up.
        let _ = sender.send(action());
    });
    match receiver.recv_timeout(limit) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what}: took longer than {limit:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(payload) => std::panic::resume_unwind(payload),
            Ok(()) => unreachable!("the thread sends before it ends"),
        },
    }
}

/// Asks again and again until `probe` answers, at most for `limit`.
pub fn eventually<T>(limit: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not so after {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Held by tests that use a gigabyte or a core for themselves: one of them at a time.
pub fn heavy() -> MutexGuard<'static, ()> {
    static HEAVY: Mutex<()> = Mutex::new(());
    HEAVY.lock().unwrap_or_else(PoisonError::into_inner)
}
