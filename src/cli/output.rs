//! Stdout for data: tables, JSON, and a closed pipe that is no failure.

use std::io::{self, Write};

use serde::Serialize;

/// Stdout could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to stdout")]
pub(super) struct StdoutError(#[from] io::Error);

impl StdoutError {
    /// Whether the reader has simply gone (`ocifs ls … | head`).
    pub(super) fn reader_gone(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Writes one line of data.
pub(super) fn line(text: impl std::fmt::Display) -> Result<(), StdoutError> {
    writeln!(io::stdout().lock(), "{text}").map_err(StdoutError)
}

/// Writes a document, indented for people who look at it.
pub(super) fn json(document: &impl Serialize) -> Result<(), StdoutError> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).map_err(io::Error::from)?;
    writeln!(out).map_err(StdoutError)
}

/// How a column stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Writes rows in aligned columns, two spaces apart.
pub(super) fn table<const N: usize>(
    align: [Align; N],
    rows: &[[String; N]],
) -> Result<(), StdoutError> {
    lay_out(align, rows).into_iter().try_for_each(line)
}

/// Rows as lines, their columns two spaces apart.
pub(super) fn lay_out<const N: usize>(align: [Align; N], rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let cell = |(column, text): (usize, &String)| match align[column] {
        Align::Left => format!("{text:<width$}", width = widths[column]),
        Align::Right => format!("{text:>width$}", width = widths[column]),
    };
    let of_row = |row: &[String; N]| {
        row.iter()
            .enumerate()
            .map(cell)
            .collect::<Vec<_>>()
            .join("  ")
    };
    rows.iter()
        .map(|row| of_row(row).trim_end().to_owned())
        .collect()
}

/// Text from a registry, fit for a terminal: control characters, which could move its cursor, are replaced.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_nothing_trails() {
        let rows = [
            ["9".to_owned(), "a".to_owned()],
            ["10".to_owned(), String::new()],
        ];
        assert_eq!(lay_out([Align::Right, Align::Left], &rows), [" 9  a", "10"]);
    }

    #[test]
    fn a_terminal_is_not_commanded() {
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
