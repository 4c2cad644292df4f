//! `ocifs status`: what the mounts say about themselves.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::args::{Global, Status};
use super::exit::Exit;
use super::output::{StdoutError, line};
use super::{context, interrupt, output, overview};
use crate::config::{Settings, Values};
use crate::mount::{self, MountInfo, Request};

pub(super) fn run(global: &Global, args: &Status) -> Result<Exit> {
    let settings = context::settings(global, Values::default())?;
    if let Some(pause) = args.watch {
        return watch(&settings, args, pause);
    }
    let mounts = chosen(args.mountpoint.as_deref())?;
    let answers: Vec<Value> = mounts.iter().map(|one| ask(&settings, one)).collect();
    if args.json {
        output::json(&json!({ "mounts": answers }))?;
        return Ok(Exit::Ok);
    }
    if answers.is_empty() {
        line("no mounts; `ocifs mount DIR` makes one")?;
    }
    for text in overview::describe(&answers, None) {
        line(text)?;
    }
    Ok(Exit::Ok)
}

/// Shows the same again and again, with what moved meanwhile, until it is interrupted.
fn watch(settings: &Settings, args: &Status, pause: Duration) -> Result<Exit> {
    let mut before: Option<(Vec<Value>, Instant)> = None;
    let look = |before: &mut Option<(Vec<Value>, Instant)>| {
        // A mount may come or go meanwhile.
        let mounts = chosen(args.mountpoint.as_deref())?;
        let answers: Vec<Value> = mounts.iter().map(|one| ask(settings, one)).collect();
        let now = Instant::now();
        let earlier = before
            .as_ref()
            .map(|(answers, at)| (answers.as_slice(), now - *at));
        let mut lines = overview::describe(&answers, earlier);
        if answers.is_empty() {
            lines.push("no mounts".to_owned());
        }
        *before = Some((answers, now));
        anyhow::Ok(lines)
    };
    let terminal = rustix::termios::isatty(std::io::stdout());
    let screen = terminal.then(Screen::enter).transpose()?;
    context::block_on(async {
        let mut interrupted = std::pin::pin!(interrupt::interrupted());
        loop {
            let lines = tokio::task::block_in_place(|| look(&mut before))?;
            match &screen {
                Some(screen) => screen.show(&lines)?,
                None => {
                    lines.iter().try_for_each(line)?;
                    line("")?;
                }
            }
            tokio::select! {
                () = &mut interrupted => return Ok(Exit::Ok),
                () = tokio::time::sleep(pause) => {}
            }
        }
    })
}

/// The terminal while it is ours: another screen without a cursor (ctlseqs, modes 1049 and 25), which goes when this is dropped.
struct Screen;

impl Screen {
    fn enter() -> Result<Self, StdoutError> {
        let this = Self;
        this.write("\x1b[?1049h\x1b[?25l")?;
        Ok(this)
    }

    /// As much as fits, from the top.
    fn show(&self, lines: &[String]) -> Result<(), StdoutError> {
        let size = rustix::termios::tcgetwinsize(std::io::stdout());
        let told = size.map_or((0, 0), |size| (size.ws_row, size.ws_col));
        let (rows, columns) = room(told);
        self.write(&frame(lines, rows, columns))
    }

    fn write(&self, text: &str) -> Result<(), StdoutError> {
        let mut out = std::io::stdout().lock();
        Ok(out.write_all(text.as_bytes()).and_then(|()| out.flush())?)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.write("\x1b[?25h\x1b[?1049l");
    }
}

/// Rows and columns of a terminal that tells these; 0 where it does not know, as some serial lines and containers do.
fn room((rows, columns): (u16, u16)) -> (usize, usize) {
    let known = |told: u16, usual: u16| if told == 0 { usual } else { told };
    let (rows, columns) = (known(rows, 24), known(columns, 80));
    (rows.max(2).into(), columns.max(20).into())
}

/// What makes a screen show these lines, without a flicker.
fn frame(lines: &[String], rows: usize, columns: usize) -> String {
    let mut text = "\x1b[H".to_owned();
    let (room, more) = match lines.len().saturating_sub(rows - 1) {
        0 => (lines.len(), None),
        over => (rows - 2, Some(format!("… {} more lines", over + 1))),
    };
    for line in lines.iter().take(room).chain(&more) {
        text.extend(line.chars().take(columns));
        text.push_str("\x1b[K\r\n");
    }
    text.push_str("\x1b[J");
    text
}

/// The mount at a path, or all of ours.
pub(super) fn chosen(path: Option<&Path>) -> Result<Vec<MountInfo>> {
    match path {
        Some(path) => Ok(vec![mount::find(path)?]),
        None => mount::mounts().context("cannot read the table of mounts"),
    }
}

/// What a mount says; where its daemon cannot be asked, why.
fn ask(settings: &Settings, one: &MountInfo) -> Value {
    let mut answer = match mount::request(
        &settings.runtime_dir,
        one,
        &Request::Status,
        context::PATIENCE,
    ) {
        Ok(answer) => answer,
        Err(error) => {
            // The message that tells most is the last one: no such socket, permission denied.
            let error = anyhow::Error::from(error);
            json!({ "error": error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ") })
        }
    };
    answer["mountpoint"] = json!(one.path);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_fits_its_screen_and_says_what_it_leaves_out() {
        let lines: Vec<String> = (0..10).map(|number| format!("line {number}")).collect();
        let shown = |rows, columns| {
            let frame = frame(&lines, rows, columns);
            let body = frame
                .strip_prefix("\x1b[H")
                .unwrap()
                .strip_suffix("\x1b[J")
                .unwrap();
            body.split_terminator("\x1b[K\r\n")
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(shown(11, 80), lines);
        assert_eq!(shown(4, 3), ["lin", "lin", "… 8"]);
        assert!(shown(4, 80)[2].contains("8 more lines"));
        assert_eq!(room((50, 132)), (50, 132));
        assert_eq!(room((0, 0)), (24, 80), "a terminal that knows no size");
        assert_eq!(room((1, 1)), (2, 20));
    }
}
