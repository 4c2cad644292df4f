//! Progress of long work: bars on a terminal, a log line every few seconds elsewhere. Always on stderr.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::printable;
use crate::base::{ByteSize, lock};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// The longest label beside a bar.
const LONGEST_LABEL: usize = 40;

/// The progress of one command.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    bars: MultiProgress,
    terminal: bool,
}

/// The progress of one thing whose size is known.
#[derive(Clone, Debug)]
pub(super) struct Task {
    bar: ProgressBar,
    label: Arc<str>,
    lines: Option<Arc<Mutex<Instant>>>,
}

impl Progress {
    /// Bars when stderr is a terminal, else lines.
    pub(super) fn new() -> Self {
        let terminal = rustix::termios::isatty(std::io::stderr());
        let target = if terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self {
            bars: MultiProgress::with_draw_target(target),
            terminal,
        }
    }

    /// Adds a thing of `bytes` bytes.
    pub(super) fn task(&self, label: &str, bytes: u64) -> Task {
        let label = printable(label);
        let bar = self.bars.add(ProgressBar::new(bytes));
        let style = "{prefix:40!} {bar:24} {binary_bytes:>11} of {binary_total_bytes:<11} {binary_bytes_per_sec:>13} {eta:>4} {msg}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(shorten(&label));
        let lines = (!self.terminal).then(|| Arc::new(Mutex::new(Instant::now())));
        Task {
            bar,
            label: label.into(),
            lines,
        }
    }

    /// Writes a line above the bars.
    pub(super) fn say(&self, text: &str) {
        if !self.terminal {
            eprint(text);
        } else if self.bars.println(text).is_err() {
            tracing::debug!(text, "stderr is closed");
        }
    }
}

impl Task {
    /// `count` more bytes are done.
    pub(super) fn advance(&self, count: u64) {
        self.bar.inc(count);
        self.line();
    }

    /// `count` bytes are done in all.
    pub(super) fn set(&self, count: u64) {
        self.bar.set_position(count);
        self.line();
    }

    /// What is being done with it now.
    pub(super) fn note(&self, text: &'static str) {
        self.bar.set_message(text);
    }

    /// It is done, or given up: its bar goes.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self) {
        let Some(last) = &self.lines else { return };
        let mut last = lock(last);
        if last.elapsed() < LINE_EVERY {
            return;
        }
        *last = Instant::now();
        let (done, all) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let percent = done.saturating_mul(100).checked_div(all).unwrap_or(100);
        let rate = ByteSize(self.bar.per_sec() as u64);
        eprint(&format!(
            "{}: {} of {}, {percent} %, {rate}/s",
            self.label,
            ByteSize(done),
            ByteSize(all)
        ));
    }
}

/// Writes a message to stderr; nobody can be told when that fails.
pub(super) fn eprint(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Keeps the end of a long label: shards differ there.
fn shorten(label: &str) -> String {
    let count = label.chars().count();
    match count > LONGEST_LABEL {
        false => label.to_owned(),
        true => ['…']
            .into_iter()
            .chain(label.chars().skip(count - LONGEST_LABEL + 1))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_label_keeps_its_end() {
        let long = format!("{}/model-00001-of-00002.safetensors", "x".repeat(60));
        let short = shorten(&long);
        assert_eq!(short.chars().count(), LONGEST_LABEL);
        assert!(short.starts_with('…') && short.ends_with("00002.safetensors"));
        assert_eq!(shorten("config.json"), "config.json");
    }
}
