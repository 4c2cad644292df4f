//! How requests to registries ended.

use super::RegistryError;
use crate::base::meter::Counter;

/// Requests by the class of their answer's status; a redirect and what it leads to are two.
#[derive(Debug, Default)]
pub struct Answers {
    classes: [Counter; 5],
    failed: Counter,
}

impl Answers {
    pub(super) fn count(&self, result: Result<u16, &RegistryError>) {
        match result {
            Ok(status) => match self.classes.get(usize::from(status / 100).wrapping_sub(1)) {
                Some(class) => class.add(1),
                None => self.failed.add(1),
            },
            Err(_) => self.failed.add(1),
        }
    }

    /// Name and number of each kind: `1xx` to `5xx` by status, `failed` without one (no connection, a time-out, a broken answer).
    pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let names = ["1xx", "2xx", "3xx", "4xx", "5xx", "failed"];
        names
            .into_iter()
            .zip(self.classes.iter().chain([&self.failed]).map(Counter::get))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_that_is_none_is_a_failure() {
        let answers = Answers::default();
        for status in [200, 206, 307, 401, 429, 503, 42, 999] {
            answers.count(Ok(status));
        }
        let counts: Vec<_> = answers.all().map(|(_, count)| count).collect();
        assert_eq!(counts, [0, 2, 1, 2, 1, 2]);
    }
}
