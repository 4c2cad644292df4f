//! Notes: what was not understood or left out, in bounded number and length.

/// Lines for people, at most a limit of them; what comes later is only counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Notes {
    lines: Vec<String>,
    limit: usize,
    more: usize,
}

impl Notes {
    /// No notes yet, at most `limit` of them.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            lines: Vec::new(),
            limit,
            more: 0,
        }
    }

    /// Adds a line, or counts it when there are enough.
    pub(super) fn add(&mut self, line: impl Into<String>) {
        if self.lines.len() < self.limit {
            self.lines.push(line.into());
        } else {
            self.more += 1;
        }
    }

    /// Adds all of these.
    pub(super) fn extend(&mut self, lines: impl IntoIterator<Item = String>) {
        lines.into_iter().for_each(|line| self.add(line));
    }

    /// The lines; the last says how many more there were.
    pub(super) fn into_lines(mut self) -> Vec<String> {
        if self.more > 0 {
            self.lines.push(format!("and {} more", self.more));
        }
        self.lines
    }
}

/// Foreign text as it may stand in a message: escaped, in backticks, at most 120 characters of it.
pub(super) fn quote(text: &str) -> String {
    const LONGEST: usize = 120;
    let mut quoted: String = text
        .chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        quoted.push('…');
    }
    format!("`{quoted}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_limit_notes_are_counted() {
        let mut notes = Notes::new(2);
        notes.extend((0..5).map(|n| n.to_string()));
        assert_eq!(notes.into_lines(), ["0", "1", "and 3 more"]);
        assert_eq!(Notes::new(0).into_lines(), [""; 0]);
    }

    #[test]
    fn quoted_text_is_short_and_has_no_control_characters() {
        assert_eq!(quote("a\nb"), "`a\\nb`");
        assert!(quote(&"\u{1b}".repeat(100_000)).len() < 1000);
    }
}
