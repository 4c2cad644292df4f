//! What was answered lately: which tag points where, and what failed. Pure: the caller brings the time.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::base::Digest;

use super::ModelError;

/// How long a failure is remembered: at first, and at most while it repeats.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Most answers that are kept.
const MOST: usize = 10_000;

/// Answers by key; at most [`MOST`].
#[derive(Debug)]
pub(super) struct Answers<K> {
    answers: HashMap<K, Answer>,
}

#[derive(Debug)]
struct Answer {
    /// The digest that counts: a registry's word, or the last known one while the registry can't be asked.
    outcome: Result<Digest, ModelError>,
    /// When it is time to ask again.
    until: Instant,
    /// Failures in a row.
    failures: u32,
}

impl<K> Default for Answers<K> {
    fn default() -> Self {
        Self {
            answers: HashMap::new(),
        }
    }
}

impl<K: Eq + Hash + Clone> Answers<K> {
    /// The answer that needs no asking.
    pub(super) fn fresh(&self, key: &K, now: Instant) -> Option<Result<Digest, ModelError>> {
        self.answers
            .get(key)
            .filter(|answer| now < answer.until)
            .map(|answer| answer.outcome.clone())
    }

    /// A registry answered; believed for `ttl`.
    pub(super) fn succeeded(&mut self, key: K, digest: Digest, ttl: Duration, now: Instant) {
        let until = now
            .checked_add(ttl)
            .unwrap_or_else(|| now + Duration::from_secs(365 * 86_400));
        self.insert(
            key,
            Answer {
                outcome: Ok(digest),
                until,
                failures: 0,
            },
            now,
        );
    }

    /// Asking failed; until it is tried again, `outcome` counts.
    pub(super) fn failed(&mut self, key: K, outcome: Result<Digest, ModelError>, now: Instant) {
        let failures = self.answers.get(&key).map_or(0, |answer| answer.failures);
        let pause = FIRST_PAUSE
            .saturating_mul(1 << failures.min(8))
            .min(LONGEST_PAUSE);
        self.insert(
            key,
            Answer {
                outcome,
                until: now + pause,
                failures: failures + 1,
            },
            now,
        );
    }

    /// The last digest that counted, however old it is.
    pub(super) fn last(&self, key: &K) -> Option<Digest> {
        self.answers.get(key)?.outcome.as_ref().ok().copied()
    }

    /// Takes an answer back.
    pub(super) fn forget(&mut self, key: &K) {
        self.answers.remove(key);
    }

    /// The keys with a digest.
    pub(super) fn known(&self) -> impl Iterator<Item = (&K, Digest)> {
        self.answers
            .iter()
            .filter_map(|(key, answer)| Some((key, *answer.outcome.as_ref().ok()?)))
    }

    fn insert(&mut self, key: K, answer: Answer, now: Instant) {
        if self.answers.len() >= MOST && !self.answers.contains_key(&key) {
            // A crawler that asks for many names must not push out what is in use: failures go first.
            self.answers
                .retain(|_, answer| answer.outcome.is_ok() && now < answer.until);
            if self.answers.len() >= MOST {
                // An eighth at a time, so that a full table does not sort itself for every answer.
                let mut untils: Vec<Instant> =
                    self.answers.values().map(|answer| answer.until).collect();
                untils.sort_unstable();
                let oldest = untils[MOST / 8];
                self.answers.retain(|_, answer| answer.until > oldest);
            }
        }
        self.answers.insert(key, answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error() -> Result<Digest, ModelError> {
        Err(ModelError::Offline {
            reference: "x".into(),
        })
    }

    fn after(now: Instant, seconds: u64) -> Instant {
        now + Duration::from_secs(seconds)
    }

    #[test]
    fn an_answer_is_fresh_for_its_time() {
        let (now, digest) = (Instant::now(), Digest::of(b"x"));
        let mut answers = Answers::default();
        assert!(answers.fresh(&"a", now).is_none());
        answers.succeeded("a", digest, Duration::from_secs(60), now);
        assert_eq!(
            answers.fresh(&"a", after(now, 59)).map(Result::ok),
            Some(Some(digest))
        );
        assert!(answers.fresh(&"a", after(now, 60)).is_none());
        answers.succeeded("b", digest, Duration::MAX, now);
        assert!(answers.fresh(&"b", after(now, 86_400)).is_some());
        answers.succeeded("c", digest, Duration::ZERO, now);
        assert!(answers.fresh(&"c", now).is_none());
    }

    #[test]
    fn failures_that_repeat_are_remembered_longer_up_to_a_limit() {
        let mut now = Instant::now();
        let mut answers = Answers::default();
        for pause in [5, 10, 20, 30, 30, 30] {
            answers.failed("a", error(), now);
            assert!(answers.fresh(&"a", after(now, pause - 1)).unwrap().is_err());
            assert!(answers.fresh(&"a", after(now, pause)).is_none());
            now = after(now, pause);
        }
        answers.succeeded("a", Digest::of(b""), Duration::ZERO, now);
        answers.failed("a", Ok(Digest::of(b"last known")), now);
        assert!(answers.fresh(&"a", after(now, 4)).unwrap().is_ok());
        assert!(answers.fresh(&"a", after(now, 5)).is_none());
    }

    #[test]
    fn many_failures_do_not_push_answers_out() {
        let now = Instant::now();
        let mut answers = Answers::default();
        answers.succeeded(u64::MAX, Digest::of(b""), Duration::from_secs(60), now);
        for key in 0..2 * MOST as u64 {
            answers.failed(key, error(), now);
        }
        assert!(answers.answers.len() <= MOST);
        assert_eq!(
            answers.known().map(|(key, _)| *key).collect::<Vec<_>>(),
            [u64::MAX]
        );
        for key in 0..2 * MOST as u64 {
            answers.succeeded(key, Digest::of(b""), Duration::from_secs(60), now);
        }
        assert!(answers.answers.len() <= MOST && answers.last(&u64::MAX).is_none());
    }
}
