//! A small chat on a terminal: one line a message, the whole conversation as the prompt; what was seen before costs nothing again.

use std::io::{self, BufRead, Write};
use std::ops::ControlFlow;

use anyhow::{Result, bail};
use ocifs::cli::generate::Generate;
use ocifs::runner::engine::{Engine, Progress, Request};
use ocifs::runner::sample::Sampling;
use serde_json::json;

use super::{say, summary};

pub(super) fn run(engine: &mut Engine, generate: &Generate, sampling: &Sampling) -> Result<u8> {
    let Some(template) = engine.template().filter(|_| !generate.raw).cloned() else {
        bail!("there is no chat without a chat template; -p TEXT goes on from a text");
    };
    say("an empty line or Ctrl-D ends the chat");
    let start: Vec<_> = generate
        .system
        .iter()
        .map(|text| json!({ "role": "system", "content": text }))
        .collect();
    let mut messages = start.clone();
    loop {
        write!(io::stderr().lock(), "> ")?;
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(0);
        }
        messages.push(json!({ "role": "user", "content": line.trim() }));
        let prompt = engine
            .text()
            .tokens(&template.render(&messages, None)?, false)?;
        if prompt.len() + 1 >= engine.room() {
            say("the conversation is longer than there is room for (--ctx); it begins anew");
            messages = start.clone();
            continue;
        }
        let request = Request {
            prompt,
            most: generate.tokens,
            sampling: sampling.clone(),
            stops: generate.stop.clone(),
            ignore_ends: false,
        };
        let mut answer = String::new();
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
            ControlFlow::Continue(())
        })?;
        writeln!(io::stdout().lock())?;
        say(&summary(&outcome));
        messages.push(json!({ "role": "assistant", "content": answer }));
    }
}
