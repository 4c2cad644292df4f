//! Work that begins on the thread that has it to do.

use std::task::{Context, Waker};

use super::rt::Handle;

/// Runs `work` on `runtime`. Its steps up to where it first has to wait are done here and now: what it asks of others is on its
/// way before another thread has woken. They must be short, as on the runtime itself.
pub fn start(runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) {
    let mut work = Box::pin(work);
    let begun = {
        let _entered = runtime.enter();
        // Nobody is to be woken: the runtime polls it again, and sees what has come meanwhile.
        work.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    };
    if begun.is_pending() {
        runtime.spawn(work);
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
}
