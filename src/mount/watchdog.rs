//! The watchdog of sd_notify(3): the service manager is told again and again that this process goes on, for as long as it does. When it is
//! not told for the time that its unit allows (`WatchdogSec=`), it kills this process, and the next one goes on.
//!
//! That it goes on means: of the threads that answer the kernel, not all are at one request for too long; the thread that tells the
//! kernel what to drop has not been at that for longer than any answer may take, on which it may have to wait; and the runtime
//! still runs tasks. A thread of its own looks, which needs nothing of all these.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;

use super::keeper::Keeper;
use crate::fuse::Activity;

/// What a process that is watched has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchdog {
    /// How often it says that it goes on, and how long a request may take: half of what its manager waits.
    pub every: Duration,
    /// How long an answer to the kernel may be owed.
    pub longest_answer: Duration,
}

/// What is looked at.
#[derive(Debug)]
pub(super) struct Watched {
    /// Those that answer the kernel.
    pub(super) serving: Vec<Activity>,
    /// The one that tells it what to drop.
    pub(super) notifying: Activity,
    pub(super) runtime: Handle,
}

impl Watched {
    /// What does not go on, for people.
    fn stuck(&self, watchdog: Watchdog) -> Option<&'static str> {
        let Watchdog {
            every,
            longest_answer,
        } = watchdog;
        if self.serving.iter().all(|thread| thread.busy_for() >= every) {
            return Some("no thread answers the kernel");
        }
        if self.notifying.busy_for() >= longest_answer.saturating_add(every) {
            return Some("the kernel does not take what it is told to drop");
        }
        let (tell, told) = channel();
        self.runtime.spawn(async move { tell.send(()) });
        match told.recv_timeout(every) {
            Ok(()) => None,
            Err(_) => Some("the runtime runs no tasks"),
        }
    }
}

/// Begins to tell `keeper`, until the process ends.
///
/// # Errors
/// When there is no thread to be had.
pub(super) fn watch(keeper: Arc<Keeper>, watchdog: Watchdog, watched: Watched) -> io::Result<()> {
    let look = move || {
        loop {
            match watched.stuck(watchdog) {
                None => keeper.alive(),
                Some(reason) => {
                    tracing::error!(
                        reason,
                        "this process does not go on; the service manager is not told that it does"
                    );
                }
            }
            thread::sleep(watchdog.every);
        }
    };
    thread::Builder::new()
        .name("ocifs-watchdog".into())
        .spawn(look)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_manager_is_told_for_as_long_as_everything_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let every = Duration::from_millis(20);
        let watchdog = Watchdog {
            every,
            longest_answer: Duration::from_millis(100),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let serving = vec![Activity::default(), Activity::default()];
        let notifying = Activity::default();
        let keeper = Arc::new(Keeper::manager(path.as_os_str()).unwrap());
        let watched = Watched {
            serving: serving.clone(),
            notifying: notifying.clone(),
            runtime: runtime.handle().clone(),
        };
        watch(keeper, watchdog, watched).unwrap();
        let told = || {
            let mut bytes = [0; 100];
            let length = manager.recv(&mut bytes).ok()?;
            assert_eq!(&bytes[..length], b"WATCHDOG=1");
            Some(())
        };
        let goes_on = || (0..5).for_each(|_| told().expect("it goes on"));
        let is_stuck = || {
            let begun = Instant::now();
            while told().is_some() {
                assert!(
                    begun.elapsed() < Duration::from_secs(5),
                    "it is not noticed"
                );
            }
        };
        goes_on();
        let one = serving[0].begin();
        thread::sleep(2 * every);
        goes_on();
        let other = serving[1].begin();
        is_stuck();
        drop((one, other));
        goes_on();
        let dropping = notifying.begin();
        is_stuck();
        drop(dropping);
        goes_on();
        let (go_on, waits) = channel::<()>();
        runtime.spawn(async move { waits.recv() });
        is_stuck();
        drop(go_on);
        goes_on();
    }
}
