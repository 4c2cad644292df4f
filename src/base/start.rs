//! Work that begins on the thread that has it to do.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::rt::Handle;

/// Work whose first steps are done. Whoever holds it may go on with it by polling it; when it is dropped, the runtime does.
#[must_use = "the runtime goes on with it once it is dropped"]
pub struct Begun {
    runtime: Handle,
    work: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Runs `work` on `runtime`. Its steps up to where it first has to wait are done here and now: what it asks of others is on its
/// way before another thread has woken. They must be short, as on the runtime itself.
pub fn start(runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) {
    drop(begin(runtime, work));
}

/// As [`start`], for those who would otherwise wait for the work to be done elsewhere; `None` when it is done already.
pub fn begin(runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) -> Option<Begun> {
    let mut work: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(work);
    let begun = {
        let _entered = runtime.enter();
        // Nobody is to be woken: it is polled again, and sees what has come meanwhile.
        work.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    };
    begun.is_pending().then(|| Begun {
        runtime: runtime.clone(),
        work: Some(work),
    })
}

impl Future for Begun {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(work) = &mut self.work else {
            return Poll::Ready(());
        };
        let done = work.as_mut().poll(cx);
        if done.is_ready() {
            self.work = None;
        }
        done
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            self.runtime.spawn(work);
        }
    }
}

impl std::fmt::Debug for Begun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Begun")
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use tokio::runtime::Runtime;
    use tokio::sync::oneshot;

    use super::*;

    #[test]
    fn the_first_steps_are_taken_here_and_the_rest_elsewhere() {
        let runtime = Runtime::new().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let (wake, woken) = oneshot::channel::<()>();
        let note = tell.clone();
        start(runtime.handle(), async move {
            note.send(thread::current().id()).unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
            woken.await.unwrap();
            note.send(thread::current().id()).unwrap();
        });
        assert_eq!(told.try_recv().unwrap(), thread::current().id());
        wake.send(()).unwrap();
        assert_ne!(told.recv().unwrap(), thread::current().id());
        start(runtime.handle(), async move {
            tell.send(thread::current().id()).unwrap()
        });
        assert_eq!(told.try_recv().unwrap(), thread::current().id());
    }

    #[test]
    fn what_was_begun_is_done_by_whoever_holds_it_or_by_the_runtime() {
        let runtime = Runtime::new().unwrap();
        for held in [true, false] {
            let (tell, told) = std::sync::mpsc::channel();
            let (wake, woken) = oneshot::channel::<()>();
            let begun = begin(runtime.handle(), async move {
                woken.await.unwrap();
                tell.send(thread::current().id()).unwrap();
            });
            let begun = begun.unwrap();
            wake.send(()).unwrap();
            if held {
                runtime.block_on(begun);
                assert_eq!(told.try_recv().unwrap(), thread::current().id());
            } else {
                drop(begun);
                assert_ne!(told.recv().unwrap(), thread::current().id());
            }
        }
        assert!(begin(runtime.handle(), async {}).is_none());
    }
}
