//! A small chat on a terminal: one line a message, the whole conversation as the prompt; what was seen before costs nothing again.
//!
//! Ctrl-C ends an answer and not the chat, Ctrl-D the chat.

use std::io::{self, BufRead, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use ocifs::cli::generate::Generate;
use ocifs::runner::engine::{Engine, Finish, Progress, Request};
use ocifs::runner::sample::Sampling;
use ocifs::runner::template::Template;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use super::{say, summary};

pub(super) fn run(
    engine: &mut Engine,
    generate: &Generate,
    sampling: &Sampling,
    runtime: &Runtime,
) -> Result<u8> {
    let Some(template) = engine.template().filter(|_| !generate.raw).cloned() else {
        bail!("there is no chat without a chat template; -p TEXT goes on from a text");
    };
    let interrupt = Interrupt::watch(runtime)?;
    say("Ctrl-C ends an answer, Ctrl-D the chat");
    let start: Vec<Value> = generate
        .system
        .iter()
        .map(|text| json!({ "role": "system", "content": text }))
        .collect();
    let mut messages = start.clone();
    loop {
        prompt();
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line)? == 0 {
            say("");
            return Ok(0);
        }
        if line.trim().is_empty() {
            continue;
        }
        messages.push(json!({ "role": "user", "content": line.trim() }));
        let Some(prompt) = fitting(engine, &template, &mut messages, start.len())? else {
            say("this message is longer than there is room for (--ctx)");
            messages.truncate(start.len());
            continue;
        };
        let request = Request {
            prompt,
            most: generate.tokens,
            sampling: sampling.clone(),
            stops: generate.stop.clone(),
            ignore_ends: false,
        };
        let mut answer = String::new();
        interrupt.begin();
        let outcome = engine.generate(&request, |progress| {
            if let Progress::Text(piece) = progress {
                answer.push_str(piece);
                let mut out = io::stdout().lock();
                if out
                    .write_all(piece.as_bytes())
                    .and_then(|()| out.flush())
                    .is_err()
                {
                    return ControlFlow::Break(());
                }
            }
            if interrupt.came() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        interrupt.end();
        writeln!(io::stdout().lock())?;
        let stopped = match outcome.finish {
            Finish::Dropped => "stopped: ",
            Finish::Stop | Finish::Length => "",
        };
        say(&format!("{stopped}{}", summary(&outcome)));
        messages.push(json!({ "role": "assistant", "content": answer }));
    }
}

fn prompt() {
    let mut err = io::stderr().lock();
    let _ = write!(err, "> ").and_then(|()| err.flush());
}

/// The conversation's tokens. Where it is too long its oldest turns are left out, except for the first `kept` messages; `None` when the last
/// message alone is.
fn fitting(
    engine: &Engine,
    template: &Template,
    messages: &mut Vec<Value>,
    kept: usize,
) -> Result<Option<Vec<u32>>> {
    let mut told = false;
    loop {
        let tokens = engine
            .text()
            .tokens(&template.render(messages, None)?, false)?;
        if tokens.len() + 1 < engine.room() {
            return Ok(Some(tokens));
        }
        if messages.len() < kept + 3 {
            return Ok(None);
        }
        if !told {
            say(
                "the conversation is longer than there is room for (--ctx): its beginning is left out",
            );
            told = true;
        }
        messages.drain(kept..kept + 2);
    }
}

/// Whether Ctrl-C came during an answer. At the prompt it only says how to leave.
struct Interrupt(Arc<State>);

#[derive(Default)]
struct State {
    answering: AtomicBool,
    came: AtomicBool,
}

impl Interrupt {
    fn watch(runtime: &Runtime) -> Result<Self> {
        let _inside = runtime.enter();
        let mut interrupts = signal(SignalKind::interrupt())?;
        let state = Arc::new(State::default());
        let theirs = Arc::clone(&state);
        runtime.spawn(async move {
            while interrupts.recv().await.is_some() {
                if theirs.answering.load(Ordering::Relaxed) {
                    theirs.came.store(true, Ordering::Relaxed);
                } else {
                    // What was typed on this line is gone: the terminal has discarded it.
                    say("\nCtrl-D ends the chat");
                    prompt();
                }
            }
        });
        Ok(Self(state))
    }

    fn begin(&self) {
        self.0.came.store(false, Ordering::Relaxed);
        self.0.answering.store(true, Ordering::Relaxed);
    }

    fn came(&self) -> bool {
        self.0.came.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.0.answering.store(false, Ordering::Relaxed);
    }
}
