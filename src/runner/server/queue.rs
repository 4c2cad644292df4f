//! The queue before a model: one thread has the engine and answers one request after the other.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use tokio::sync::mpsc;

use super::super::engine::{Engine, Finish, Outcome, Progress, Request};

/// What comes back for a request.
#[derive(Debug)]
pub(super) enum Event {
    /// More text.
    Text(String),
    /// It is over.
    Done(Outcome),
    /// It failed, and why.
    Failed(String),
}

/// A request and where its events go. Whoever drops the receiver no longer wants them.
struct Job {
    request: Request,
    events: mpsc::UnboundedSender<Event>,
}

/// What was done, for `/metrics`.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) waiting: AtomicU64,
    pub(super) running: AtomicU64,
    pub(super) done: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) overloaded: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) reused_tokens: AtomicU64,
    pub(super) generated_tokens: AtomicU64,
    pub(super) first_micros: AtomicU64,
    pub(super) total_micros: AtomicU64,
}

/// The way into the queue.
#[derive(Debug)]
pub(super) struct Queue {
    jobs: SyncSender<Job>,
    pub(super) counters: Arc<Counters>,
    stopping: Arc<AtomicBool>,
}

impl Queue {
    /// Starts the engine's thread. At most `length` requests wait.
    pub(super) fn start(engine: Engine, length: usize) -> Self {
        let (jobs, receiver) = sync_channel(length);
        let (counters, stopping) = (
            Arc::new(Counters::default()),
            Arc::new(AtomicBool::new(false)),
        );
        let (counting, ending) = (Arc::clone(&counters), Arc::clone(&stopping));
        std::thread::spawn(move || work(engine, &receiver, &counting, &ending));
        Self {
            jobs,
            counters,
            stopping,
        }
    }

    /// Puts a request at the end; `None` when the queue is full.
    pub(super) fn ask(&self, request: Request) -> Option<mpsc::UnboundedReceiver<Event>> {
        let (events, receiver) = mpsc::unbounded_channel();
        self.counters.waiting.fetch_add(1, Ordering::Relaxed);
        match self.jobs.try_send(Job { request, events }) {
            Ok(()) => Some(receiver),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.counters.waiting.fetch_sub(1, Ordering::Relaxed);
                self.counters.overloaded.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// Ends the running request at its next token, and those that wait at once.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }
}

fn work(mut engine: Engine, jobs: &Receiver<Job>, counters: &Counters, stopping: &AtomicBool) {
    while let Ok(Job { request, events }) = jobs.recv() {
        counters.waiting.fetch_sub(1, Ordering::Relaxed);
        let unwanted = || events.is_closed() || stopping.load(Ordering::Relaxed);
        if unwanted() {
            counters.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        counters.running.store(1, Ordering::Relaxed);
        let result = engine.generate(&request, |progress| {
            if let Progress::Text(text) = progress {
                let _ = events.send(Event::Text(text.to_owned()));
            }
            if unwanted() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        counters.running.store(0, Ordering::Relaxed);
        match result {
            Ok(outcome) => {
                count(counters, &outcome);
                let _ = events.send(Event::Done(outcome));
            }
            Err(error) => {
                counters.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "a request failed");
                let _ = events.send(Event::Failed(error.to_string()));
            }
        }
    }
}

fn count(counters: &Counters, outcome: &Outcome) {
    let ended = if outcome.finish == Finish::Dropped {
        &counters.dropped
    } else {
        &counters.done
    };
    ended.fetch_add(1, Ordering::Relaxed);
    for (counter, by) in [
        (&counters.prompt_tokens, outcome.prompt_tokens as u64),
        (&counters.reused_tokens, outcome.reused as u64),
        (&counters.generated_tokens, outcome.tokens.len() as u64),
        (&counters.first_micros, outcome.first.as_micros() as u64),
        (&counters.total_micros, outcome.total.as_micros() as u64),
    ] {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}
