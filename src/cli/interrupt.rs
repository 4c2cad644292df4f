//! Ctrl-C and SIGTERM: work ends where it can be taken up again.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};

/// The command was interrupted.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(super) struct Interrupted;

/// Done at the first SIGINT or SIGTERM. Must be called inside a runtime.
pub(super) async fn interrupted() {
    let both = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    let (Ok(mut interrupt), Ok(mut terminate)) = both else {
        // Without handlers the signals end the process by themselves.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Does `work` unless it is interrupted; what it holds is dropped then.
pub(super) async fn unless_interrupted<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        result = work => result,
        () = interrupted() => Err(Interrupted.into()),
    }
}

/// Tells blocking work whether to go on; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Tells it to stop.
    pub(super) fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether to go on.
    pub(super) fn going(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
}

/// Does blocking `work` on a thread; when interrupted, tells it to stop and waits until it has.
pub(super) async fn blocking<T: Send + 'static>(
    stop: Stop,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let mut running = tokio::task::spawn_blocking(work);
    tokio::select! {
        result = &mut running => result?,
        () = interrupted() => {
            stop.stop();
            let _ = running.await;
            Err(Interrupted.into())
        }
    }
}
