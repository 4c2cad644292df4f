//! Errors on one line.

use std::error::Error;
use std::fmt;

/// Displays an error and all its causes on one line, the outermost first.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{what}")]
    struct Layer {
        what: &'static str,
        source: Option<Box<Self>>,
    }

    #[test]
    fn causes_follow_in_order() {
        let layer = |what, source| Layer { what, source };
        let error = layer(
            "a",
            Some(Box::new(layer("b", Some(Box::new(layer("c", None)))))),
        );
        assert_eq!(Chain(&error).to_string(), "a: b: c");
        assert_eq!(Chain(&layer("a", None)).to_string(), "a");
    }
}
