//! Which servers are asked for a registry's content: its mirrors in order, those that fail left alone for a while, then itself.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::address::address_of;
use super::answers::Answers;
use super::certs_d::{self, Registered, Trust, Unusable};
use super::credentials::Sources;
use super::peer::Peer;
use super::transport::Transport;
use super::{RegistryConfig, RegistryError, Repository};
use crate::base::{Instant, lock};

/// How long what a directory says is believed before its files are looked at again.
const FRESH: Duration = Duration::from_secs(5);
/// The first time that a mirror is left alone after it failed; each further one doubles.
const FIRST_REST: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// It rests for at least so many times the time that it took to fail.
const SLOW: u32 = 6;
/// How long a mirror is not asked again for what it did not have: every part of a blob would ask it first.
const MISSING: Duration = Duration::from_secs(60);
/// How long a mirror is not asked again for a blob of which it sent wrong bytes, and the others only in need.
const LIED: Duration = Duration::from_secs(3600);
/// Most registries whose ways are remembered.
const MOST_REGISTRIES: usize = 4096;
/// Most missing things that are remembered of a mirror.
const MOST_MISSING: usize = 4096;

/// The servers of one registry.
#[derive(Debug)]
pub(super) struct Way {
    /// In the order in which they are asked.
    pub(super) mirrors: Vec<Arc<Peer>>,
    /// The registry itself.
    pub(super) server: Arc<Peer>,
}

/// The ways to all registries.
#[derive(Debug)]
pub(super) struct Ways {
    dir: Option<PathBuf>,
    config: RegistryConfig,
    sources: Arc<Sources>,
    /// To registries of which nothing is said.
    plain: Arc<Way>,
    known: Mutex<HashMap<String, Known>>,
    transports: Mutex<HashMap<Made, Arc<Transport>>>,
    /// How requests ended, over all of them.
    pub(super) answers: Arc<Answers>,
}

#[derive(Debug)]
struct Known {
    read: Option<Registered>,
    way: Arc<Way>,
    checked: Instant,
}

impl Ways {
    /// Without a directory every registry is asked itself.
    pub(super) fn new(
        config: &RegistryConfig,
        sources: Arc<Sources>,
    ) -> Result<Self, RegistryError> {
        let answers = Arc::new(Answers::default());
        let transport = Transport::new(config, &Trust::default(), Arc::clone(&answers))?;
        let transport = Arc::new(transport);
        let server = Arc::new(Peer::registry(transport, Arc::clone(&sources)));
        Ok(Self {
            dir: config.hosts_dir.clone(),
            config: config.clone(),
            sources,
            plain: Arc::new(Way {
                mirrors: Vec::new(),
                server,
            }),
            known: Mutex::default(),
            transports: Mutex::default(),
            answers,
        })
    }

    /// A registry of which nothing is said.
    #[cfg(test)]
    pub(super) fn plain(&self) -> &Arc<Peer> {
        &self.plain.server
    }

    /// The way to a repository's registry. Files that changed count from now on; what did not change keeps its connections.
    pub(super) async fn to(&self, repository: &Repository) -> Result<Arc<Way>, RegistryError> {
        let Some(dir) = self.dir.clone() else {
            return Ok(Arc::clone(&self.plain));
        };
        let registry = repository.host().to_owned();
        if let Some(known) = lock(&self.known).get(&registry)
            && known.checked.elapsed() < FRESH
        {
            return Ok(Arc::clone(&known.way));
        }
        let read = {
            let registry = registry.clone();
            tokio::task::spawn_blocking(move || certs_d::read(&dir, &registry)).await
        };
        let read = read
            .map_err(|error| RegistryError::Protocol {
                what: registry.clone(),
                reason: error.to_string(),
            })?
            .map_err(unusable)?;
        let checked = Instant::now();
        if let Some(known) = lock(&self.known).get_mut(&registry)
            && known.read == read
        {
            known.checked = checked;
            return Ok(Arc::clone(&known.way));
        }
        let way = match &read {
            Some(read) => Arc::new(self.make(read)?),
            None => Arc::clone(&self.plain),
        };
        let known = Known {
            read,
            way: Arc::clone(&way),
            checked,
        };
        let mut all = lock(&self.known);
        if all.len() >= MOST_REGISTRIES {
            // Only a crawler comes here. It costs a look at their files, and what was learned of their mirrors.
            all.clear();
        }
        all.insert(registry, known);
        Ok(way)
    }

    /// The way that was found last, without a look at any file.
    pub(super) fn last(&self, repository: &Repository) -> Arc<Way> {
        lock(&self.known)
            .get(repository.host())
            .map_or_else(|| Arc::clone(&self.plain), |known| Arc::clone(&known.way))
    }

    fn make(&self, read: &Registered) -> Result<Way, RegistryError> {
        let peer = |endpoint: &certs_d::Endpoint, is_mirror: bool| {
            let transport = self.transport(endpoint)?;
            let sources = Arc::clone(&self.sources);
            let peer = Peer::endpoint(transport, sources, endpoint, is_mirror);
            Ok::<_, RegistryError>(Arc::new(peer))
        };
        let mirrors = read.mirrors.iter().map(|mirror| peer(mirror, true));
        Ok(Way {
            mirrors: mirrors.collect::<Result<_, _>>()?,
            server: peer(&read.server, false)?,
        })
    }

    /// The connections to a server, shared with all servers that are spoken to the same way.
    fn transport(&self, endpoint: &certs_d::Endpoint) -> Result<Arc<Transport>, RegistryError> {
        // Who writes plain HTTP into such a file has asked for it.
        let clear = endpoint
            .base
            .as_ref()
            .filter(|base| base.scheme() == "http");
        let made: Made = (endpoint.trust.clone(), clear.map(address_of));
        if made == Made::default() {
            return Ok(Arc::clone(&self.plain.server.transport));
        }
        let mut transports = lock(&self.transports);
        if let Some(transport) = transports.get(&made) {
            return Ok(Arc::clone(transport));
        }
        let mut config = self.config.clone();
        config.ca_files.extend(made.0.ca_files.iter().cloned());
        config.plain_http.extend(made.1.clone());
        if let Some(time) = made.0.dial_timeout {
            config.connect_timeout = time;
        }
        let transport = Arc::new(Transport::new(&config, &made.0, Arc::clone(&self.answers))?);
        transports.retain(|_, transport| Arc::strong_count(transport) > 1);
        transports.insert(made, Arc::clone(&transport));
        Ok(transport)
    }
}

/// What a transport is made for: how it trusts, and whom it may speak plain HTTP with.
type Made = (Trust, Option<String>);

fn unusable(unusable: Unusable) -> RegistryError {
    RegistryError::HostsFile {
        path: unusable.path,
        line: unusable.line,
        reason: unusable.reason,
    }
}

/// How a mirror has done lately.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    rest_until: Option<Instant>,
    missing: HashMap<String, Instant>,
    /// Blobs that turned out wrong: until when, and whether its own bytes were among them.
    wrong: HashMap<String, (Instant, bool)>,
}

/// Whether a mirror is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// Yes.
    Ask,
    /// Only when the registry itself fails: it failed a moment ago, or another mirror sent wrong bytes of this.
    Rest,
    /// No: it said that it does not have this, or sent wrong bytes of it.
    Skip,
}

impl Health {
    /// Whether to ask for `key`.
    pub(super) fn advice(&self, key: &str, now: Instant) -> Advice {
        let state = lock(&self.0);
        let wrong = state.wrong.get(key).filter(|(until, _)| *until > now);
        if let Some((_, its_own)) = wrong {
            return if *its_own { Advice::Skip } else { Advice::Rest };
        }
        if state.missing.get(key).is_some_and(|until| *until > now) {
            Advice::Skip
        } else if state.rest_until.is_some_and(|until| until > now) {
            Advice::Rest
        } else {
            Advice::Ask
        }
    }

    /// It delivered to the end.
    pub(super) fn worked(&self) {
        let mut state = lock(&self.0);
        state.failures = 0;
        state.rest_until = None;
    }

    /// What came for `key` was wrong, and whether this mirror sent some of it.
    pub(super) fn distrusted(&self, key: &str, its_own: bool, now: Instant) {
        let mut state = lock(&self.0);
        if state.wrong.len() >= MOST_MISSING {
            state.wrong.retain(|_, (until, _)| *until > now);
        }
        if state.wrong.len() < MOST_MISSING {
            state.wrong.insert(key.to_owned(), (now + LIED, its_own));
        }
    }

    /// It did not deliver `key`, and took so long to fail. Trouble is trouble for everything; a refusal is one of this alone.
    pub(super) fn failed(&self, key: &str, error: &RegistryError, now: Instant, took: Duration) {
        let mut state = lock(&self.0);
        let trouble = error.is_transient() || matches!(error, RegistryError::Tls { .. });
        if !trouble {
            if state.missing.len() >= MOST_MISSING {
                state.missing.retain(|_, until| *until > now);
            }
            if state.missing.len() < MOST_MISSING {
                state.missing.insert(key.to_owned(), now + MISSING);
            }
            return;
        }
        let own = FIRST_REST.saturating_mul(1 << state.failures.min(10));
        let asked = error.retry_after().unwrap_or_default();
        // Of the time of those who read, one that answers nobody costs at most a small part.
        let slow = took.saturating_mul(SLOW);
        // Of requests that fail together, the first counts.
        if state.rest_until.is_none_or(|until| until <= now) {
            state.failures += 1;
            state.rest_until = Some(now + own.max(asked).max(slow).min(LONGEST_REST));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16, retry_after: Option<u64>) -> RegistryError {
        RegistryError::from_status("x", "h", status, retry_after.map(Duration::from_secs), b"")
    }

    #[test]
    fn trouble_rests_a_mirror_ever_longer_and_a_miss_concerns_one_thing() {
        let health = Health::default();
        let start = Instant::now();
        let quick = Duration::ZERO;
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        assert_eq!(health.advice("a", at(0.0)), Advice::Ask);
        health.failed("a", &status(503, None), at(0.0), quick);
        health.failed("b", &status(503, None), at(0.1), quick);
        assert_eq!(health.advice("b", at(0.9)), Advice::Rest);
        assert_eq!(
            health.advice("b", at(1.1)),
            Advice::Ask,
            "both were one failure"
        );
        health.failed("a", &status(500, None), at(1.1), quick);
        assert_eq!(health.advice("a", at(3.0)), Advice::Rest);
        assert_eq!(health.advice("a", at(3.2)), Advice::Ask);
        health.worked();
        health.failed("a", &status(429, Some(20)), at(4.0), quick);
        assert_eq!(health.advice("a", at(23.9)), Advice::Rest);
        assert_eq!(health.advice("a", at(24.1)), Advice::Ask);
        for n in 0..20 {
            health.failed("a", &status(502, None), at(1000.0 * f64::from(n)), quick);
        }
        assert_eq!(health.advice("a", at(19_059.0)), Advice::Rest);
        assert_eq!(health.advice("a", at(19_061.0)), Advice::Ask);
        health.worked();

        let at = |seconds: f64| at(20_000.0 + seconds);
        health.failed("a", &status(503, None), at(0.0), Duration::from_secs(4));
        assert_eq!(
            health.advice("a", at(23.0)),
            Advice::Rest,
            "it took its time"
        );
        assert_eq!(health.advice("a", at(25.0)), Advice::Ask);
        health.worked();
        let at = |seconds: f64| at(100.0 + seconds);
        health.failed("a", &status(404, None), at(0.0), quick);
        health.failed("c", &status(403, None), at(0.0), quick);
        assert_eq!(health.advice("a", at(1.0)), Advice::Skip);
        assert_eq!(health.advice("b", at(1.0)), Advice::Ask);
        assert_eq!(health.advice("c", at(1.0)), Advice::Skip);
        assert_eq!(health.advice("a", at(61.0)), Advice::Ask);
    }

    #[test]
    fn a_mirror_that_lied_of_a_blob_is_not_asked_for_it_and_the_others_only_in_need() {
        let (liar, other) = (Health::default(), Health::default());
        let start = Instant::now();
        liar.distrusted("a", true, start);
        other.distrusted("a", false, start);
        liar.worked();
        assert_eq!(liar.advice("a", start), Advice::Skip);
        assert_eq!(other.advice("a", start), Advice::Rest);
        assert_eq!(liar.advice("b", start), Advice::Ask);
        assert_eq!(liar.advice("a", start + LIED), Advice::Ask);
    }
}
