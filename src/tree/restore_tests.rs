//! A tree goes on from the journal of another one: everything that the kernel may name is there and says the same.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::fake::{Fake, model};
use super::{
    Data, Entry, HandleId, Invalidation, Journal, NodeId, State, Tree, TreeConfig, TreeError,
};
use crate::base::{Digest, lock};

struct Life {
    tree: Tree,
    journal: Arc<Journal>,
    events: Receiver<Invalidation>,
}

fn life(fake: &Arc<Fake>, journal: Journal) -> Life {
    let journal = Arc::new(journal);
    let config = TreeConfig {
        journal: Some(Arc::clone(&journal)),
        patience: Duration::from_millis(300),
        passthrough: true,
        ..TreeConfig::default()
    };
    let (tree, events) = Tree::new(fake.clone(), config);
    Life {
        tree,
        journal,
        events,
    }
}

impl Life {
    fn state(&self) -> (Journal, State) {
        Journal::resume(self.journal.descriptor().try_clone_to_owned().unwrap()).unwrap()
    }

    async fn next(self, fake: &Arc<Fake>) -> (Self, super::Restored) {
        let (journal, state) = self.state();
        let next = life(fake, journal);
        let restored = next.tree.restore(state).await;
        (next, restored)
    }

    async fn walk(&self, path: &str) -> Vec<Entry> {
        let mut at = NodeId::ROOT;
        let mut found = Vec::new();
        for name in path.split('/') {
            let entry = self.tree.lookup(at, name).await.unwrap();
            at = entry.attr.ino;
            found.push(entry);
        }
        found
    }

    async fn opendir(&self, node: NodeId, unique: u64) -> HandleId {
        let handle = self.tree.opendir(node).await.unwrap().handle;
        self.tree.opened(handle, unique, 0);
        handle
    }

    fn open(&self, node: NodeId, unique: u64, backing: i32) -> HandleId {
        let handle = self.tree.open(node).unwrap().handle;
        self.tree.opened(handle, unique, backing);
        handle
    }

    fn names(&self, node: NodeId, handle: HandleId) -> Vec<(String, NodeId)> {
        let entries = self.tree.entries(node, handle).unwrap();
        let name = |entry: &super::DirEntry| (entry.name.clone(), entry.ino);
        entries.iter().map(name).collect()
    }

    /// What the kernel is to be told now; when `told`, it has been.
    fn due(&self, told: bool) -> Vec<Invalidation> {
        let mut due = Vec::new();
        for event in self.events.try_iter() {
            match event {
                Invalidation::Settled(debt) if told => self.journal.settle(debt),
                Invalidation::Settled(_) => {}
                event => due.push(event),
            }
        }
        due
    }

    async fn text(&self, node: NodeId, handle: HandleId) -> String {
        let file = self.tree.file(node, handle).unwrap();
        match file.read(0, 100).await.unwrap() {
            Data::Owned(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
            _ => panic!("it is in memory, in one place"),
        }
    }
}

fn published() -> Arc<Fake> {
    let fake = Arc::new(Fake::default());
    fake.push(
        "r.example/org/m:v1",
        &model(b"one", &[("config.json", "{}"), ("sub/weights", "w")]),
    );
    fake.push("r.example/org/m:v2", &model(b"two", &[("other", "o")]));
    fake
}

#[tokio::test]
async fn everything_that_the_kernel_may_name_is_there_again() {
    let fake = published();
    let first = life(&fake, Journal::new().unwrap());
    let mut told = first.walk("r.example/org/m:v1/sub/weights").await;
    told.extend(first.walk("r.example/org/m/@v1").await);
    told.extend(first.walk("gpt2:v1").await);
    told.extend(first.walk("r.example/org/m:v1/config.json").await);
    let weights = told[4].attr.ino;
    let (org, m, v1) = (told[1].attr.ino, told[7].attr.ino, told[2].attr.ino);
    let read = first.open(weights, 10, 0);
    let past = first.open(told.last().unwrap().attr.ino, 12, 7);
    let closed = first.open(weights, 14, 0);
    let tags = first.opendir(m, 16).await;
    let listed = first.opendir(v1, 18).await;
    let before = (first.names(m, tags), first.names(v1, listed));
    assert!(before.0.iter().any(|(name, _)| name == "@v2"));
    first.tree.release(closed);

    // The registry goes on: a tag moves, another one comes. What is cached can be had, by digest.
    fake.push("r.example/org/m:v1", &model(b"three", &[("new", "n")]));
    fake.push("r.example/org/m:v3", &model(b"four", &[]));
    let (second, restored) = first.next(&fake).await;
    assert_eq!((restored.missing, restored.highest_backing), (0, 7));
    let node = told.last().unwrap().attr.ino;
    assert_eq!(
        restored.backings.into_iter().collect::<Vec<_>>(),
        [(node, (1, 7))]
    );
    for entry in &told {
        let (attr, _) = second.tree.getattr(entry.attr.ino).unwrap();
        let time = (attr.time, entry.attr.time);
        assert!(attr == entry.attr || time.0 != time.1, "{attr:?} {entry:?}");
    }
    assert_eq!(second.text(weights, read).await, "w");
    assert_eq!(second.text(node, past).await, "{}");
    assert_eq!((second.names(m, tags), second.names(v1, listed)), before);
    let digest = second.tree.xattr(v1, "user.oci.digest").unwrap();
    assert_eq!(digest, Digest::of(b"one").to_string(), "what it showed");
    assert!(second.tree.lookup(v1, "new").await.is_err());
    let bound = second.tree.bound();
    assert_eq!((bound.len(), bound[0].open), (1, 3));

    // New handles have new numbers.
    let new = second.open(weights, 20, 0);
    assert!(
        [read, past, closed, tags, listed]
            .iter()
            .all(|old| old.0 < new.0)
    );
    assert_eq!(second.tree.release(read), Some(weights));
    assert_eq!(second.tree.release(read), None, "it comes once more");
    second.tree.release(tags);

    // And so on, with what has happened since.
    let (third, _) = second.next(&fake).await;
    assert_eq!(third.tree.open_handles(), 3);
    assert_eq!(third.text(weights, new).await, "w");
    assert_eq!(third.names(v1, listed), before.1);
    for handle in [past, new] {
        assert!(third.tree.release(handle).is_some());
    }
    third.tree.release(listed);
    // The kernel forgets everything as often as it was told of it.
    for entry in &told {
        third.tree.forget(entry.attr.ino, 1);
    }
    assert_eq!(third.tree.nodes(), 0);
    assert!(matches!(third.tree.getattr(org), Err(TreeError::Stale(_))));
    let (_, state) = third.state();
    assert!(state.nodes.is_empty() && state.open.is_empty());
    assert_eq!(state.times(), 0, "nobody has said so here");
}

#[tokio::test]
async fn an_open_that_was_not_answered_is_opened_once() {
    let fake = published();
    let first = life(&fake, Journal::new().unwrap());
    let file = first.walk("r.example/org/m:v1/config.json").await[3]
        .attr
        .ino;
    first.open(file, 10, 5);
    let (second, restored) = first.next(&fake).await;
    assert_eq!(restored.backings.len(), 1);
    assert_eq!(second.tree.reopened(12), None, "another request");
    assert_eq!(second.tree.reopened(10), Some(file));
    assert_eq!(second.tree.reopened(10), None);
    second.open(file, 10, 6);
    assert_eq!(second.tree.open_handles(), 1);
    let (_, state) = second.state();
    assert_eq!((state.open.len(), state.highest_backing), (1, 6));
}

#[tokio::test]
async fn an_artifact_that_cannot_be_had_is_tried_again_and_nothing_else_is_shown() {
    let fake = published();
    let first = life(&fake, Journal::new().unwrap());
    let told = first.walk("r.example/org/m:v1/config.json").await;
    let file = told[3].attr.ino;
    let handle = first.open(file, 10, 0);
    let listed = first.opendir(told[2].attr.ino, 12).await;
    let away = TreeError::Timeout {
        what: "r.example".into(),
        source: None,
    };
    *lock(&fake.broken) = Some(away);
    let (second, restored) = first.next(&fake).await;
    assert_eq!(restored.missing, 1);
    assert!(second.tree.getattr(told[0].attr.ino).is_ok());
    // Who asks for it waits, and is told in time that it does not come.
    assert!(second.tree.is_absent(file, false));
    assert!(second.tree.is_absent(told[2].attr.ino, true));
    assert!(!second.tree.is_absent(told[2].attr.ino, false));
    assert!(!second.tree.is_absent(told[1].attr.ino, true));
    let waited = second.tree.come(file, false).await;
    assert!(
        matches!(waited, Err(TreeError::Timeout { .. })),
        "{waited:?}"
    );
    // What will not come is told at once.
    *lock(&fake.broken) = Some(TreeError::not_found("the artifact"));
    let waited = second.tree.come(file, true).await;
    assert!(
        matches!(waited, Err(TreeError::NotFound { .. })),
        "{waited:?}"
    );
    fake.push("r.example/org/m:v1", &model(b"three", &[("new", "n")]));
    // Back again; the tag has moved and was not asked for.
    *lock(&fake.broken) = None;
    let again = second.walk("r.example/org/m:v1/config.json").await;
    assert_eq!(again[3].attr.ino, file);
    let mut tries = 0;
    while second.tree.bound().iter().all(|bound| bound.open == 0) {
        tries += 1;
        assert!(tries < 500, "the handle is not had again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(second.text(file, handle).await, "{}");
    assert!(!second.tree.is_absent(file, false));
    second.tree.come(file, true).await.unwrap();
    let names = second.names(told[2].attr.ino, listed);
    assert!(names.iter().any(|(name, _)| name == "config.json"));
    // Both processes have told the kernel of it once.
    second.tree.forget(file, 1);
    assert!(second.tree.getattr(file).is_ok());
    second.tree.forget(file, 1);
    assert!(second.tree.getattr(file).is_err());
}

#[tokio::test]
async fn what_the_kernel_was_not_told_is_told_by_the_next_process_until_one_has() {
    let fake = published();
    let first = life(&fake, Journal::new().unwrap());
    let told = first.walk("r.example/org/m:v1/sub/weights").await;
    let (v1, weights) = (told[2].attr.ino, told[4].attr.ino);
    let of_weights = vec![Invalidation::Content(weights)];
    let entry = |name: &str| Invalidation::Entry {
        parent: v1,
        name: name.to_owned(),
    };
    // Killed before the bytes are gone.
    first.tree.0.debts.owe_blob(Digest::of(b"w"));
    assert_eq!(first.due(true), []);
    let (second, _) = first.next(&fake).await;
    assert_eq!(second.due(false), of_weights);
    // Killed while it was told, and after the bytes are gone once more.
    second.tree.0.debts.owe_blob(Digest::of(b"w"));
    second.tree.drop_content(Digest::of(b"w"));
    assert_eq!(second.due(false), of_weights);
    let (third, _) = second.next(&fake).await;
    assert_eq!(third.due(true), [of_weights.clone(), of_weights].concat());
    let (fourth, _) = third.next(&fake).await;
    assert_eq!(fourth.due(true), [], "it was told");

    // The tag moves, and nobody hears of it.
    fake.push("r.example/org/m:v1", &model(b"three", &[("new", "n")]));
    let reference = "r.example/org/m:v1".parse().unwrap();
    fourth.tree.refresh(&reference).await.unwrap();
    assert!(fourth.due(false).contains(&entry("sub")));
    let (fifth, _) = fourth.next(&fake).await;
    let due = fifth.due(true);
    assert!(due.contains(&entry("sub")) && due.contains(&entry("new")));
    assert!(due.contains(&Invalidation::Content(v1)), "{due:?}");
    let (sixth, _) = fifth.next(&fake).await;
    assert_eq!(sixth.due(true), []);

    // Numbers that are taken are not given to other debts.
    sixth.tree.0.debts.owe_blob(Digest::of(b"n"));
    let (seventh, _) = sixth.next(&fake).await;
    seventh.tree.0.debts.owe_blob(Digest::of(b"w"));
    let (_, state) = seventh.state();
    assert_eq!(state.owed.len(), 2);
}

#[tokio::test]
async fn of_an_artifact_that_is_missing_every_file_is_dropped() {
    let fake = published();
    let first = life(&fake, Journal::new().unwrap());
    let told = first.walk("r.example/org/m:v1/config.json").await;
    first.walk("r.example/org/m:v2").await;
    first.tree.0.debts.owe_blob(Digest::of(b"w"));
    *lock(&fake.broken) = Some(TreeError::Timeout {
        what: "r.example".into(),
        source: None,
    });
    let (second, restored) = first.next(&fake).await;
    assert_eq!(restored.missing, 2);
    assert_eq!(
        second.due(true),
        [Invalidation::Content(told[3].attr.ino)],
        "which of them the blob is in cannot be told"
    );
}
