//! Questions to whoever sits at the terminal; what must not be seen is not shown.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use anyhow::{Context as _, Result};
use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};

use super::exit::Exit;
use super::explain::Failure;
use super::interrupt::Interrupted;
use crate::base::Secret;

/// The longest answer, in bytes: access tokens of clouds have a few thousand.
const LONGEST: u64 = 64 << 10;

/// Asks; the answer is shown as it is typed.
pub(super) fn shown(question: &str) -> Result<String> {
    terminal()?;
    ask(question)?;
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .context("cannot read from the terminal")?;
    Ok(answer.trim().to_owned())
}

/// Asks; the answer is not shown.
pub(super) fn hidden(question: &str) -> Result<Secret> {
    terminal()?;
    let quiet = Quiet::start().context("cannot keep the terminal from showing the password")?;
    ask(question)?;
    let answer = typed(&mut io::stdin().lock());
    drop(quiet);
    ask("\n")?;
    Ok(Secret::new(answer?))
}

/// The whole of stdin, without the line end that `echo` leaves.
pub(super) fn stdin() -> Result<Secret> {
    let mut text = String::new();
    io::stdin()
        .lock()
        .take(LONGEST + 1)
        .read_to_string(&mut text)
        .context("cannot read the password from stdin")?;
    if text.len() as u64 > LONGEST {
        return Err(
            Failure::new(Exit::Usage, "what came on stdin is too long for a password").into(),
        );
    }
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Ok(Secret::new(line.strip_suffix('\r').unwrap_or(line)))
}

fn terminal() -> Result<()> {
    if io::stdin().is_terminal() {
        return Ok(());
    }
    let failure = Failure::new(Exit::Usage, "there is no terminal to ask at");
    Err(failure
        .hint("give --username USER and --password-stdin, with the password on stdin")
        .into())
}

fn ask(question: &str) -> Result<()> {
    let mut out = io::stderr().lock();
    write!(out, "{question}")?;
    Ok(out.flush()?)
}

/// The terminal without echo, until dropped. Keys come one by one and Ctrl-C is a key: a signal would end the process and leave the
/// terminal silent.
struct Quiet(Termios);

impl Quiet {
    fn start() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut quiet = before.clone();
        quiet
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
        quiet.special_codes[SpecialCodeIndex::VMIN] = 1;
        quiet.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(io::stdin(), OptionalActions::Flush, &quiet)?;
        Ok(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // Without a terminal there is nothing to restore.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// A line from keys that come one by one.
fn typed(keys: &mut impl BufRead) -> Result<String> {
    let mut line = Vec::new();
    for key in keys.bytes() {
        match key.context("cannot read from the terminal")? {
            b'\r' | b'\n' => break,
            3 => return Err(Interrupted.into()),
            // Ctrl-D ends a line that has begun and gives up one that has not, as everywhere.
            4 if line.is_empty() => return Err(Interrupted.into()),
            4 => break,
            // Backspace takes a character, which may be several bytes; Ctrl-U takes all.
            8 | 127 => while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {},
            21 => line.clear(),
            _ if line.len() as u64 >= LONGEST => break,
            byte => line.push(byte),
        }
    }
    String::from_utf8(line).context("the password is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_make_a_line() {
        for (keys, line) in [
            ("s3cret\rmore", Some("s3cret")),
            ("s3crex\x7ft\n", Some("s3cret")),
            ("wrong\x15right\r", Some("right")),
            ("é\x7f\x7f\x7fa\r", Some("a")),
            ("abc\x04", Some("abc")),
            ("\x04", None),
            ("abc\x03", None),
            ("", Some("")),
        ] {
            let typed = typed(&mut keys.as_bytes());
            assert_eq!(typed.as_deref().ok(), line, "{keys:?}");
        }
    }
}
