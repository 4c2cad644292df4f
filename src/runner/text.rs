//! Text to tokens and back, also piece by piece: a stream never shows half a character, nor the beginning of a stop word.

use std::path::Path;

use tokenizers::Tokenizer;

use super::error::{Error, Result};

/// `tokenizer.json`.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
}

impl Text {
    /// Reads it from a model directory.
    ///
    /// # Errors
    /// When it is not there, or no tokenizer.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|error| Error::malformed(&path, error.to_string()))?;
        // Both are for training; a prompt is never cut or filled silently.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| Error::malformed(&path, error.to_string()))?;
        Ok(Self { tokenizer })
    }

    /// The tokens of a text; `special`: with those that stand around every text, like a beginning.
    ///
    /// # Errors
    /// When the tokenizer has no way to write the text.
    pub fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match self.tokenizer.encode_fast(text, special) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(Error::Request(format!(
                "the text cannot be made into tokens: {error}"
            ))),
        }
    }

    /// The token that is written so.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The text of tokens, without special ones.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn text(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(tokens, true)
            .map_err(|error| Error::Request(format!("tokens cannot be made into text: {error}")))
    }
}

/// A text that grows by tokens.
#[derive(Debug, Default)]
pub struct Stream {
    tokens: Vec<u32>,
    /// Tokens before this one have been shown and no longer change how later ones are written.
    prefix: usize,
    /// Tokens before this one have been shown.
    shown: usize,
}

impl Stream {
    /// What a token adds to the text; nothing while a character is incomplete.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn push(&mut self, text: &Text, token: u32) -> Result<String> {
        self.tokens.push(token);
        let now = text.text(&self.tokens[self.prefix..])?;
        // Bytes that are no character yet come as U+FFFD. A character is over after four; a real U+FFFD must not stop the stream.
        if now.ends_with('\u{fffd}') && self.tokens.len() - self.shown < 8 {
            return Ok(String::new());
        }
        self.take(text, now)
    }

    /// What has not been shown when no more tokens come.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn finish(&mut self, text: &Text) -> Result<String> {
        let now = text.text(&self.tokens[self.prefix..])?;
        self.take(text, now)
    }

    fn take(&mut self, text: &Text, now: String) -> Result<String> {
        // A first word may be written differently from a later one, so the last shown tokens are decoded again before it.
        let before = text.text(&self.tokens[self.prefix..self.shown])?;
        let new = now.get(before.len()..).unwrap_or_default().to_owned();
        self.prefix = self.shown;
        self.shown = self.tokens.len();
        Ok(new)
    }
}

/// Ends a text before a stop word.
#[derive(Debug)]
pub struct Stops {
    words: Vec<String>,
    held: String,
}

impl Stops {
    /// Empty words stop nothing.
    pub fn new(words: &[String]) -> Self {
        Self {
            words: words
                .iter()
                .filter(|word| !word.is_empty())
                .cloned()
                .collect(),
            held: String::new(),
        }
    }

    /// What of the text so far may be shown, and whether a stop word came: then the text ends before it.
    pub fn push(&mut self, new: &str) -> (String, bool) {
        self.held.push_str(new);
        if let Some(at) = self
            .words
            .iter()
            .filter_map(|word| self.held.find(word.as_str()))
            .min()
        {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end of the text that a stop word begins with waits for what follows.
        let waits = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| {
                self.words
                    .iter()
                    .any(|word| word.starts_with(&self.held[*at..]))
            })
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(waits);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_word_is_seen_however_it_is_cut() {
        let text = "one STO two STOP three";
        for size in 1..text.len() {
            let mut stops = Stops::new(&["STOP".to_owned(), String::new()]);
            let (mut shown, mut stopped) = (String::new(), false);
            for piece in text.as_bytes().chunks(size) {
                let (new, stop) = stops.push(std::str::from_utf8(piece).unwrap());
                assert!(!stopped || new.is_empty());
                shown += &new;
                stopped |= stop;
                if stop {
                    break;
                }
            }
            assert_eq!(
                (shown.as_str(), stopped),
                ("one STO two ", true),
                "in pieces of {size}"
            );
        }
    }

    #[test]
    fn what_only_began_like_a_stop_word_is_shown_in_the_end() {
        let mut stops = Stops::new(&["\n\nUser:".to_owned()]);
        assert_eq!(stops.push("yes\n\nUs"), ("yes".to_owned(), false));
        assert_eq!(stops.push("e it"), ("\n\nUse it".to_owned(), false));
        assert_eq!(stops.push("\n"), (String::new(), false));
        assert_eq!(stops.finish(), "\n");
    }

    #[test]
    fn the_earliest_of_two_stop_words_counts() {
        let mut stops = Stops::new(&["later".to_owned(), "now".to_owned()]);
        assert_eq!(stops.push("a now later"), ("a ".to_owned(), true));
    }
}
