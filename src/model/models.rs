//! All models of this process: resolving, opening once, sharing, publishing.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::base::{Deadline, Digest, lock};
use crate::blob::Blobs;
use crate::cache::{NoteKind, TagRecord};
use crate::registry::{Reference, Repository, Tag};

use super::answers::Answers;
use super::assemble::assemble;
use super::bases::Pin;
use super::chunked::Pieces;
use super::fetch::{LARGEST_MANIFEST, Remote, on_disk};
use super::flight::Flights;
use super::manifest::{self, Descriptor, Document};
use super::plan::{Part, Plan, build};
use super::plans::Plans;
use super::unpacked::UnpackedLayers;
use super::{Content, Model, ModelConfig, ModelError};

/// Most repositories that a blob is said to be in.
const MOST_REPOSITORIES: usize = 16;
/// Most tags that are asked for.
const MOST_TAGS: usize = 10_000;

/// How long a registry is asked about a tag whose last digest is known: one that says nothing holds up what is cached for no longer.
const KNOWN_PATIENCE: Duration = Duration::from_secs(5);

/// Models of any reference; clones share what they resolved.
#[derive(Clone, Debug)]
pub struct Models {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    blobs: Blobs,
    layers: UnpackedLayers,
    pieces: Pieces,
    config: ModelConfig,
    answers: Mutex<Answers<Reference>>,
    resolving: Flights<Reference, Result<Digest, ModelError>>,
    /// Manifests that could not be had; the digest in an answer means nothing here.
    failures: Mutex<Answers<(Repository, Digest)>>,
    planning: Flights<(Repository, Digest), Result<Arc<Plan>, ModelError>>,
    plans: Mutex<Plans>,
    /// Which artifacts those are that others name by a tag, by the digest of who names them.
    pins: Mutex<HashMap<Digest, Digest>>,
    /// Models that somebody uses.
    live: Mutex<HashMap<Digest, Live>>,
    /// What was named in the cache's index by this process.
    published: Mutex<HashMap<Reference, Digest>>,
}

/// A model that somebody uses.
#[derive(Debug)]
struct Live {
    model: Weak<Model>,
    /// Where its blobs can come from.
    repositories: Vec<Repository>,
}

impl Models {
    /// Models over these blobs.
    pub fn new(blobs: Blobs, config: ModelConfig) -> Self {
        let shared = Shared {
            layers: UnpackedLayers::new(blobs.clone()),
            pieces: Pieces::new(blobs.clone()),
            blobs,
            config,
            answers: Mutex::default(),
            resolving: Flights::default(),
            failures: Mutex::default(),
            planning: Flights::default(),
            plans: Mutex::default(),
            pins: Mutex::default(),
            live: Mutex::default(),
            published: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The blobs below.
    pub fn blobs(&self) -> &Blobs {
        &self.shared.blobs
    }

    /// The models that somebody uses.
    pub(super) fn in_use(&self) -> Vec<Arc<Model>> {
        lock(&self.shared.live)
            .values()
            .filter_map(|live| live.model.upgrade())
            .collect()
    }

    /// The digest that a reference shows now: its own, else a fresh-enough answer, else the registry's, else the last known.
    ///
    /// Takes at most [`ModelConfig::metadata_timeout`]. That there is no such tag is remembered for some seconds, as is
    /// that a registry can't be reached.
    pub async fn resolve(&self, reference: &Reference) -> Result<Digest, ModelError> {
        self.permit(reference.repository(), reference)?;
        if let Some(digest) = reference.digest() {
            return Ok(*digest);
        }
        if let Some(answer) = lock(&self.shared.answers).fresh(reference, Instant::now()) {
            return answer;
        }
        let (shared, reference) = (Arc::clone(&self.shared), reference.clone());
        let what = reference.to_string();
        let flight = self
            .shared
            .resolving
            .join(reference.clone(), async move || {
                shared.resolve(&reference).await
            });
        self.shared.patiently(what, flight).await
    }

    /// Asks the registry what a tag points at, however fresh the last answer is. Fails when it can't be asked, and the
    /// last answer stays.
    pub async fn refresh(&self, reference: &Reference) -> Result<Digest, ModelError> {
        self.permit(reference.repository(), reference)?;
        if let Some(digest) = reference.digest() {
            return Ok(*digest);
        }
        if self.shared.blobs.config().offline {
            return Err(ModelError::Offline {
                reference: reference.to_string(),
            });
        }
        self.shared
            .patiently(reference.to_string(), async {
                Some(self.shared.ask(reference, None).await)
            })
            .await
    }

    /// Refuses what the settings keep from being read.
    fn permit(&self, repository: &Repository, what: &Reference) -> Result<(), ModelError> {
        match self.shared.config.access.permits(repository) {
            true => Ok(()),
            false => Err(ModelError::Forbidden {
                reference: what.to_string(),
            }),
        }
    }

    /// The model with this manifest digest; built once per digest, shared. Fails when no engine could use it.
    ///
    /// Takes at most [`ModelConfig::metadata_timeout`]; what was begun then goes on behind, so that a later call finds it.
    pub async fn open(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Arc<Model>, ModelError> {
        let model = self.inspect(repository, digest).await?;
        match &model.problem {
            None => Ok(model),
            Some(reason) => {
                let reference = Reference::pinned(repository.clone(), *digest).to_string();
                Err(ModelError::Unusable {
                    reference,
                    reason: reason.clone(),
                })
            }
        }
    }

    /// Like [`open`](Self::open), and also gives artifacts that have no usable file: see [`Model::problem`].
    pub async fn inspect(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Arc<Model>, ModelError> {
        self.permit(repository, &Reference::pinned(repository.clone(), *digest))?;
        if let Some(model) = self.shared.in_use(digest, repository) {
            return Ok(model);
        }
        let plan = lock(&self.shared.plans).get(digest);
        let plan = match plan {
            Some(plan) => plan,
            None => self.plan(repository, *digest).await?,
        };
        Ok(self.shared.share(&plan, repository))
    }

    /// Like [`inspect`](Self::inspect), but waits for as long as there is work that goes on: a model of compressed
    /// layers is known when they are unpacked. For commands; what the kernel waits for must not.
    pub async fn inspect_patiently(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Arc<Model>, ModelError> {
        let mut told = false;
        loop {
            match self.inspect(repository, digest).await {
                Err(ModelError::Timeout { reference, .. }) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(reference, "layers that are compressed are unpacked first");
                    }
                }
                outcome => return outcome,
            }
        }
    }

    /// What refers to a manifest: signatures, attestations, and whatever else names it as its subject.
    pub async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Vec<Descriptor>, ModelError> {
        let reference = Reference::pinned(repository.clone(), *digest).to_string();
        if self.shared.blobs.config().offline {
            return Err(ModelError::Offline { reference });
        }
        let deadline = Deadline::after(self.shared.question_timeout());
        let registry = self.shared.blobs.registry();
        let found = registry.referrers(repository, digest, deadline).await;
        let found = found.map_err(|error| ModelError::Registry {
            reference: reference.clone(),
            source: Arc::new(error),
        })?;
        let Some(index) = found else {
            return Ok(Vec::new());
        };
        match manifest::parse(&index, "") {
            Ok(Document::Index(referrers)) => Ok(referrers),
            Ok(Document::Manifest(_)) => Err(ModelError::Unusable {
                reference,
                reason: "what refers to it is told in no index".into(),
            }),
            Err(reason) => Err(ModelError::Unusable { reference, reason }),
        }
    }

    async fn plan(&self, repository: &Repository, digest: Digest) -> Result<Arc<Plan>, ModelError> {
        let key = (repository.clone(), digest);
        if let Some(Err(error)) = lock(&self.shared.failures).fresh(&key, Instant::now()) {
            return Err(error);
        }
        let what = Reference::pinned(repository.clone(), digest).to_string();
        let shared = Arc::clone(&self.shared);
        let flight = self
            .shared
            .planning
            .join(key.clone(), async move || shared.plan(key).await);
        self.shared.patiently(what, flight).await
    }

    /// The repository's tags: the registry's by `deadline`, else those that the cache knows.
    pub async fn tags(&self, repository: &Repository, deadline: Deadline) -> Vec<Tag> {
        let blobs = &self.shared.blobs;
        if !self.shared.config.access.permits(repository) {
            return Vec::new();
        }
        if !blobs.config().offline {
            let asked = blobs.registry().tags(repository, MOST_TAGS, deadline);
            match tokio::time::timeout_at(deadline.instant(), asked).await {
                Ok(Ok(tags)) => return tags,
                Ok(Err(error)) => tracing::debug!(%repository, %error, "the tags can't be listed"),
                Err(_) => tracing::debug!(%repository, "the tags were not listed in time"),
            }
        }
        let known = self.known();
        known
            .iter()
            .filter(|known| known.repository() == repository)
            .filter_map(|known| known.tag().cloned())
            .collect()
    }

    /// Every reference that this process or the cache has resolved; sorted.
    pub fn known(&self) -> Vec<Reference> {
        let mut known: Vec<Reference> = lock(&self.shared.answers)
            .known()
            .map(|(known, _)| known.clone())
            .collect();
        known.extend(
            self.shared
                .blobs
                .cache()
                .tags()
                .iter()
                .filter_map(|record| record.name.parse().ok()),
        );
        let access = &self.shared.config.access;
        known.retain(|known| access.permits(known.repository()));
        known.sort_unstable();
        known.dedup();
        known
    }

    /// Names the model in the cache's `index.json` when all of its blobs are complete and right and its manifest is
    /// there; gives whether it was. For `pull`, and for whoever sees the last blob complete.
    pub async fn publish_if_complete(&self, reference: &Reference, model: &Model) -> bool {
        if !model.is_complete() {
            return false;
        }
        let name = reference.to_string();
        let (digest, size) = (model.manifest_digest, model.manifest_size);
        let media_type = model.manifest.media_type.clone();
        let artifact_type = model.manifest.artifact_type.clone();
        let manifest = model
            .oci
            .iter()
            .find(|file| file.path == "manifest.json")
            .map(|file| file.content.clone());
        let cache = self.shared.blobs.cache().clone();
        // Nothing was ever fetched of an empty blob, but who copies the artifact from the layout wants its file.
        let empty = Digest::of(b"");
        let has_empty = model.blobs.iter().any(|blob| blob.digest() == empty);
        let publish = move || {
            if has_empty {
                cache.put(&empty, b"");
            }
            if cache.get(&digest, LARGEST_MANIFEST).is_none() {
                match manifest {
                    Some(Content::Inline(bytes)) => cache.put(&digest, &bytes),
                    _ => return false,
                }
            }
            cache.publish(&name, &media_type, &digest, size, artifact_type.as_deref());
            true
        };
        on_disk(publish).await.unwrap_or(false)
    }

    /// Names every model that is in use, complete and not named yet, under each reference that shows it. For a daemon,
    /// now and then: it costs little when nothing became complete.
    pub async fn publish_completed(&self) {
        for (reference, model) in self.shared.publishable() {
            if self.publish_if_complete(&reference, &model).await {
                lock(&self.shared.published).insert(reference, model.digest);
            }
        }
    }
}

impl Shared {
    /// Models in use with the references that show them, those that are published left out.
    fn publishable(&self) -> Vec<(Reference, Arc<Model>)> {
        let shown: Vec<(Reference, Digest)> = {
            let answers = lock(&self.answers);
            let mut published = lock(&self.published);
            published.retain(|reference, digest| answers.last(reference) == Some(*digest));
            let is_new = |(reference, digest): &(&Reference, Digest)| {
                published.get(*reference) != Some(digest)
            };
            answers
                .known()
                .filter(is_new)
                .map(|(reference, digest)| (reference.clone(), digest))
                .collect()
        };
        let live = lock(&self.live);
        let model = |digest: &Digest| live.get(digest).and_then(|live| live.model.upgrade());
        shown
            .into_iter()
            .filter_map(|(reference, digest)| Some((reference, model(&digest)?)))
            .collect()
    }

    /// Waits for work that bounds itself or goes on behind, for as long as a person or the kernel may be kept waiting.
    async fn patiently<T>(
        &self,
        reference: String,
        work: impl Future<Output = Option<Result<T, ModelError>>>,
    ) -> Result<T, ModelError> {
        let timeout = self.config.metadata_timeout;
        match tokio::time::timeout(timeout, work).await {
            Ok(Some(outcome)) => outcome,
            // The work panicked, or the program is ending.
            Ok(None) => Err(ModelError::Unusable {
                reference,
                reason: "ocifs failed to open it; see the log".into(),
            }),
            Err(_) => Err(ModelError::Timeout { reference, timeout }),
        }
    }

    /// The time for one question to a registry: less than callers wait, so that they get its error and not their own.
    fn question_timeout(&self) -> Duration {
        self.config.metadata_timeout.mul_f64(0.9)
    }

    async fn resolve(&self, reference: &Reference) -> Result<Digest, ModelError> {
        let error = if self.blobs.config().offline {
            ModelError::Offline {
                reference: reference.to_string(),
            }
        } else {
            match self.ask(reference, Some(KNOWN_PATIENCE)).await {
                Ok(digest) => return Ok(digest),
                Err(error) => error,
            }
        };
        let outcome = self.last_known(reference, error).await;
        lock(&self.answers).failed(reference.clone(), outcome.clone(), Instant::now());
        outcome
    }

    /// Asks the registry, and remembers what it says. About what was seen before it is asked for `known` at most.
    async fn ask(
        &self,
        reference: &Reference,
        known: Option<Duration>,
    ) -> Result<Digest, ModelError> {
        let registry = self.blobs.registry();
        let (cache, name) = (self.blobs.cache().clone(), tag_name(reference));
        let seen = on_disk(move || cache.tag(&name)).await.flatten().is_some();
        // What was never seen is fetched next; what was is mostly the same still, and HEAD costs registries less.
        let patience = self.question_timeout();
        let known = known.filter(|_| seen).unwrap_or(patience);
        let deadline = Deadline::after(patience.min(known));
        let resolved = if seen {
            registry.resolve(reference, deadline).await
        } else {
            registry.resolve_with_manifest(reference, deadline).await
        };
        let resolved = resolved.map_err(|error| ModelError::Registry {
            reference: reference.to_string(),
            source: Arc::new(error),
        })?;
        lock(&self.answers).succeeded(
            reference.clone(),
            resolved.digest,
            self.config.tag_ttl,
            Instant::now(),
        );
        let cache = self.blobs.cache().clone();
        let record = TagRecord {
            name: tag_name(reference),
            digest: resolved.digest,
            checked: SystemTime::now(),
        };
        let remember = move || {
            if let Some(manifest) = resolved.manifest {
                cache.put(&manifest.digest, &manifest.bytes);
            }
            cache.set_tag(&record);
        };
        on_disk(remember).await;
        Ok(resolved.digest)
    }

    /// What the cache knows when the registry can't be asked. That it says "not found" is an answer and stays one.
    async fn last_known(
        &self,
        reference: &Reference,
        error: ModelError,
    ) -> Result<Digest, ModelError> {
        if error.is_not_found() {
            return Err(error);
        }
        let (cache, name) = (self.blobs.cache().clone(), tag_name(reference));
        let recorded = on_disk(move || cache.tag(&name))
            .await
            .flatten()
            .map(|record| record.digest);
        let Some(digest) = recorded.or_else(|| lock(&self.answers).last(reference)) else {
            return Err(error);
        };
        if !self.blobs.config().offline {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            let reason = source.unwrap_or_else(|| error.to_string());
            tracing::warn!(%reference, %digest, %reason, "the registry can't be asked; the tag's last known digest is used");
        }
        Ok(digest)
    }

    /// Builds a plan and keeps it.
    async fn plan(&self, key: (Repository, Digest)) -> Result<Arc<Plan>, ModelError> {
        let (repository, digest) = &key;
        let built = async {
            let mut plan = self.build(repository, *digest, Part::All).await?;
            let settled = self.take_in_bases(&mut plan, repository).await?;
            Ok::<_, ModelError>((plan, settled))
        };
        match built.await {
            Ok((plan, settled)) => {
                for note in &plan.notes {
                    tracing::info!(%repository, %digest, "{note}");
                }
                let plan = Arc::new(plan);
                lock(&self.failures).forget(&key);
                if settled {
                    lock(&self.plans).insert(Arc::clone(&plan));
                }
                Ok(plan)
            }
            Err(error) => {
                lock(&self.failures).failed(key, Err(error.clone()), Instant::now());
                Err(error)
            }
        }
    }

    async fn build(
        &self,
        repository: &Repository,
        digest: Digest,
        part: Part,
    ) -> Result<Plan, ModelError> {
        let fetch = Remote::new(
            self.blobs.clone(),
            self.layers.clone(),
            repository.clone(),
            self.question_timeout(),
            self.config.platform.clone(),
        );
        build(&fetch, digest, part).await
    }

    /// Follows the chain of artifacts whose model is shown as this one's. Where it breaks for a reason that waiting does not mend, the
    /// plan says so; it may be mended in the registry still, and gives that the plan is not to be kept.
    async fn take_in_bases(
        &self,
        plan: &mut Plan,
        repository: &Repository,
    ) -> Result<bool, ModelError> {
        let mut seen = vec![plan.manifest_id.digest];
        let mut namer = (repository.clone(), plan.digest);
        while let Some(reference) = plan.names.take() {
            if !self.config.access.permits(reference.repository()) {
                plan.problem = Some(format!(
                    "its model is that of {reference}, which the settings `allow` and `deny` keep from being read here"
                ));
                return Ok(true);
            }
            if let Some(reason) = plan.refuses(&namer.0, &reference) {
                plan.problem = Some(reason);
                return Ok(true);
            }
            let found = async {
                let digest = self.base(&namer.1, &reference).await?;
                let found = self.build(reference.repository(), digest, Part::Model);
                found.await
            };
            let base = match found.await {
                Ok(base) => base,
                Err(error) if !error.may_pass() => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    let cause = cause.unwrap_or_else(|| error.to_string());
                    plan.problem = Some(format!("its model is that of {reference}: {cause}"));
                    return Ok(false);
                }
                Err(error) => return Err(error),
            };
            if seen.contains(&base.manifest_id.digest) {
                plan.problem = Some(format!("its model is that of {reference}, in a circle"));
                return Ok(true);
            }
            seen.push(base.manifest_id.digest);
            namer = (reference.repository().clone(), base.digest);
            plan.take_in(&reference, base);
        }
        Ok(true)
    }

    /// What the reference to a base meant when it was followed from this artifact for the first time.
    async fn base(&self, namer: &Digest, reference: &Reference) -> Result<Digest, ModelError> {
        if let Some(digest) = reference.digest() {
            return Ok(*digest);
        }
        if let Some(digest) = lock(&self.pins).get(namer) {
            return Ok(*digest);
        }
        let (cache, name, key) = (self.blobs.cache().clone(), reference.to_string(), *namer);
        let recall = move || {
            let note = cache.note(NoteKind::Base, &key)?;
            let pin: Pin = serde_json::from_slice(&note).ok()?;
            (pin.reference == name).then_some(pin.digest)
        };
        let digest = match on_disk(recall).await.flatten() {
            Some(digest) => digest,
            None => self.resolve(reference).await?,
        };
        lock(&self.pins).insert(*namer, digest);
        let (cache, key) = (self.blobs.cache().clone(), *namer);
        let pin = Pin {
            reference: reference.to_string(),
            digest,
        };
        on_disk(move || {
            if let Ok(note) = serde_json::to_vec(&pin) {
                cache.set_note(NoteKind::Base, &key, &note);
            }
        })
        .await;
        Ok(digest)
    }

    /// The model of this digest if somebody has it. Its blobs learn of a further repository that they can come from.
    fn in_use(&self, digest: &Digest, repository: &Repository) -> Option<Arc<Model>> {
        let (model, is_new) = {
            let mut live = lock(&self.live);
            let live = live.get_mut(digest)?;
            let model = live.model.upgrade()?;
            let is_new = live.repositories.len() < MOST_REPOSITORIES
                && !live.repositories.contains(repository);
            if is_new {
                live.repositories.push(repository.clone());
            }
            (model, is_new)
        };
        if is_new {
            // What is of another artifact is not in this repository.
            let own = [&model.manifest.config]
                .into_iter()
                .chain(&model.manifest.layers);
            for blob in own {
                self.blobs.open(blob.digest, blob.size, repository);
            }
        }
        Some(model)
    }

    /// The model of a plan: the one that is in use, else a new one.
    fn share(&self, plan: &Plan, repository: &Repository) -> Arc<Model> {
        if let Some(model) = self.in_use(&plan.digest, repository) {
            return model;
        }
        let model = Arc::new(assemble(
            &self.blobs,
            &self.layers,
            &self.pieces,
            plan,
            repository,
        ));
        let mut live = lock(&self.live);
        // Another thread may have been faster.
        if let Some(model) = live.get(&plan.digest).and_then(|live| live.model.upgrade()) {
            return model;
        }
        live.retain(|_, live| live.model.strong_count() > 0);
        let entry = Live {
            model: Arc::downgrade(&model),
            repositories: vec![repository.clone()],
        };
        live.insert(plan.digest, entry);
        model
    }
}

/// `host/path:tag`, the name of a tag in the cache.
fn tag_name(reference: &Reference) -> String {
    let tag = reference.tag().cloned().unwrap_or_else(Tag::latest);
    Reference::tagged(reference.repository().clone(), tag).to_string()
}

#[cfg(test)]
#[path = "models_tests.rs"]
mod tests;
