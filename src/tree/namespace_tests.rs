//! The tree over a catalogue in memory.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::fake::{Fake, model};
use super::{Data, Entry, Invalidation, Kind, NodeId, Tree, TreeConfig, TreeError};
use crate::base::Digest;
use crate::model::Model;
use crate::registry::Reference;

struct Bench {
    fake: Arc<Fake>,
    tree: Tree,
    events: Receiver<Invalidation>,
}

fn bench_with(config: TreeConfig) -> Bench {
    let fake = Arc::new(Fake::default());
    let (tree, events) = Tree::new(fake.clone(), config);
    Bench { fake, tree, events }
}

fn bench() -> Bench {
    bench_with(TreeConfig::default())
}

fn small() -> Arc<Model> {
    model(
        b"small",
        &[
            ("config.json", "{}"),
            ("onnx/model.onnx", "weights"),
            ("vocab", "a b c"),
            ("Modelfile", "FROM ."),
        ],
    )
}

/// The bytes of a file in memory.
fn owned(data: Data) -> Bytes {
    match data {
        Data::Owned(bytes) => bytes,
        _ => panic!("it is in memory, in one place"),
    }
}

impl Bench {
    /// Walks a path, following links as the kernel does.
    async fn walk(&self, path: &str) -> Result<Entry, TreeError> {
        let mut stack = vec![NodeId::ROOT];
        let mut todo: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut entry = None;
        while let Some(name) = todo.pop() {
            if name == ".." {
                stack.pop();
                continue;
            }
            let found = self.tree.lookup(*stack.last().unwrap(), &name).await?;
            if found.attr.kind == Kind::Link {
                todo.extend(
                    self.tree
                        .readlink(found.attr.ino)?
                        .split('/')
                        .rev()
                        .map(str::to_owned),
                );
            } else {
                stack.push(found.attr.ino);
                entry = Some(found);
            }
        }
        entry.ok_or(TreeError::NotDirectory)
    }

    async fn ls(&self, path: &str) -> Vec<String> {
        let node = if path.is_empty() {
            NodeId::ROOT
        } else {
            self.walk(path).await.unwrap().attr.ino
        };
        let opened = self.tree.opendir(node).await.unwrap();
        let entries = self.tree.entries(node, opened.handle).unwrap();
        self.tree.release(opened.handle);
        assert_eq!(
            (entries[0].name.as_str(), entries[1].name.as_str()),
            (".", "..")
        );
        entries[2..]
            .iter()
            .map(|entry| entry.name.clone())
            .collect()
    }

    async fn cat(&self, path: &str) -> String {
        let node = self.walk(path).await.unwrap().attr.ino;
        let opened = self.tree.open(node).unwrap();
        let bytes = self
            .tree
            .file(node, opened.handle)
            .unwrap()
            .read(0, 1 << 20)
            .await
            .unwrap();
        self.tree.release(opened.handle);
        String::from_utf8(owned(bytes).to_vec()).unwrap()
    }

    async fn is_missing(&self, path: &str) -> bool {
        matches!(self.walk(path).await, Err(TreeError::NotFound { .. }))
    }
}

#[tokio::test]
async fn every_form_of_a_reference_leads_to_the_same_file() {
    let bench = bench();
    let small = small();
    for reference in [
        "ghcr.io/org/model:v1",
        "ghcr.io/org/model:latest",
        "localhost:5000/m:v1",
        "gpt2:v1",
        "user/chat:q4",
    ] {
        bench.fake.push(reference, &small);
    }
    let digest = small.digest;
    let mut inodes = Vec::new();
    for path in [
        "ghcr.io/org/model:v1".to_owned(),
        "GHCR.io/org/model:v1".to_owned(),
        format!("ghcr.io/org/model@{digest}"),
        format!("ghcr.io/org/model:v1@{digest}"),
        "ghcr.io/org/model/@v1".to_owned(),
        format!("ghcr.io/org/model/@sha256-{}", digest.hex()),
        "ghcr.io/org/model".to_owned(),
        "localhost:5000/m:v1".to_owned(),
        "localhost_5000_/m:v1".to_owned(),
        "gpt2:v1".to_owned(),
        "docker.io/gpt2:v1".to_owned(),
        "docker.io/library/gpt2:v1".to_owned(),
        "docker.io/library/gpt2/@v1".to_owned(),
        format!("gpt2@{digest}"),
        "user/chat:q4".to_owned(),
        "docker.io/user/chat:q4".to_owned(),
    ] {
        assert_eq!(
            bench.cat(&format!("{path}/config.json")).await,
            "{}",
            "{path}"
        );
        assert_eq!(
            bench.cat(&format!("{path}/onnx/model.onnx")).await,
            "weights",
            "{path}"
        );
        assert_eq!(
            bench.cat(&format!("{path}/.oci/manifest.json")).await,
            "{}",
            "{path}"
        );
        inodes.push(
            bench
                .walk(&format!("{path}/config.json"))
                .await
                .unwrap()
                .attr
                .ino,
        );
    }
    inodes.dedup();
    assert_eq!(inodes.len(), 1, "all tags of a digest share its files");
    assert_eq!(bench.tree.open_handles(), 0);
}

#[tokio::test]
async fn what_cannot_be_a_reference_is_missing_without_asking() {
    let bench = bench();
    bench.fake.push("ghcr.io/org/model:v1", &small());
    let hex = "0".repeat(63);
    for path in [
        ".git",
        ".oci",
        "Foo",
        "@v1",
        "a b",
        "gpt2:",
        "gpt2@sha256:00",
        "ghcr.io/.git",
        "ghcr.io/HEAD",
        "ghcr.io/config.json",
        "ghcr.io/.oci",
        "ghcr.io/@v1",
        "ghcr.io/org/Model",
        "ghcr.io/org/model:",
        "ghcr.io/org/:v1",
        "ghcr.io/org/a:b:c",
        "ghcr.io/org/model@v1",
        "docker.io/user/config.json",
        "ghcr.io/org/model/@",
        "ghcr.io/org/.hidden",
        &format!("ghcr.io/org/model@sha256:{hex}"),
    ] {
        assert!(bench.is_missing(path).await, "{path}");
    }
    // Directories by their spelling, links by theirs.
    for path in [
        "ghcr.io",
        "nowhere.example",
        "ghcr.io/org",
        "ghcr.io/org/qwen2.5-0.5b",
        "ghcr.io/a/b/c/d",
        "user",
        "docker.io/user",
    ] {
        assert_eq!(
            bench.walk(path).await.unwrap().attr.kind,
            Kind::Directory,
            "{path}"
        );
    }
    let folder = bench.walk("ghcr.io/org/model").await.unwrap().attr.ino;
    assert_eq!(
        bench.tree.lookup(folder, "@v9").await.unwrap().attr.kind,
        Kind::Link
    );
    assert!(matches!(
        bench.tree.lookup(folder, &"n".repeat(256)).await,
        Err(TreeError::NameTooLong)
    ));
    let long = vec!["a".repeat(100); 3].join("/");
    assert!(
        bench.is_missing(&format!("ghcr.io/{long}")).await,
        "longer than a repository may be"
    );
    assert_eq!(bench.fake.asked(), (0, 0, 0));
}

#[tokio::test]
async fn a_missing_tag_is_asked_for_once_in_a_while_and_can_appear() {
    let bench = bench_with(TreeConfig {
        failure_ttl: Duration::from_millis(80),
        ..TreeConfig::default()
    });
    for _ in 0..5 {
        assert!(bench.is_missing("ghcr.io/org/model:v1").await);
        assert!(bench.is_missing("ghcr.io/org/model/config.json").await);
        assert!(bench.is_missing("ghcr.io/org/model/tokenizer.json").await);
    }
    assert_eq!(
        bench.fake.asked(),
        (2, 0, 0),
        "one question for v1, one for latest"
    );
    bench.fake.push("ghcr.io/org/model:v1", &small());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(bench.cat("ghcr.io/org/model:v1/config.json").await, "{}");
}

#[tokio::test]
async fn a_failure_is_an_error_of_its_kind_and_not_believed_for_long() {
    let bench = bench();
    bench.fake.push("ghcr.io/org/model:v1", &small());
    let source = Arc::new(std::io::Error::other("cable cut"));
    *bench.fake.broken.lock().unwrap() = Some(TreeError::Unreachable {
        what: "x".into(),
        source: source.clone(),
    });
    assert!(matches!(
        bench.walk("ghcr.io/org/model:v1").await,
        Err(TreeError::Unreachable { .. })
    ));
    *bench.fake.broken.lock().unwrap() = None;
    assert!(
        bench.walk("ghcr.io/org/model:v1").await.is_ok(),
        "trouble on the way is not remembered"
    );
    *bench.fake.broken.lock().unwrap() = Some(TreeError::Denied {
        what: "x".into(),
        source,
    });
    assert!(matches!(
        bench.walk("ghcr.io/org/secret:v1").await,
        Err(TreeError::Denied { .. })
    ));
    let asked = bench.fake.asked();
    assert!(matches!(
        bench.walk("ghcr.io/org/secret:v1").await,
        Err(TreeError::Denied { .. })
    ));
    assert_eq!(bench.fake.asked(), asked, "a refusal is remembered");
}

#[tokio::test]
async fn a_slow_answer_is_a_timeout_now_and_there_the_next_time() {
    let bench = bench_with(TreeConfig {
        patience: Duration::from_millis(50),
        ..TreeConfig::default()
    });
    bench.fake.push("ghcr.io/org/model:v1", &small());
    *bench.fake.delay.lock().unwrap() = Duration::from_millis(100);
    let (one, two) = tokio::join!(
        bench.walk("ghcr.io/org/model:v1"),
        bench.walk("ghcr.io/org/model:v1")
    );
    assert!(matches!(
        (one, two),
        (
            Err(TreeError::Timeout { .. }),
            Err(TreeError::Timeout { .. })
        )
    ));
    let end = Instant::now() + Duration::from_secs(10);
    while bench.walk("ghcr.io/org/model:v1").await.is_err() {
        assert!(Instant::now() < end, "the answer never arrived");
    }
    assert_eq!(
        bench.fake.asked(),
        (1, 1, 0),
        "everybody waits for one answer"
    );
}

#[tokio::test]
async fn listings_show_what_is_known_and_never_ask_for_manifests() {
    let bench = bench();
    let small = small();
    bench.fake.push("ghcr.io/org/model:v1", &small);
    bench.fake.push("ghcr.io/org/model:latest", &small);
    assert!(bench.ls("").await.is_empty());
    *bench.fake.known.lock().unwrap() = ["ghcr.io/org/model:v1", "localhost:5000/m:v1", "gpt2:v1"]
        .map(|text| text.parse().unwrap())
        .to_vec();
    assert_eq!(
        bench.ls("").await,
        [
            "docker.io",
            "ghcr.io",
            "gpt2:v1",
            "localhost:5000",
            "localhost_5000_"
        ]
    );
    assert_eq!(bench.ls("ghcr.io").await, ["org"]);
    assert_eq!(bench.ls("ghcr.io/org").await, ["model", "model:v1"]);
    assert_eq!(bench.ls("ghcr.io/org/model").await, ["@latest", "@v1"]);
    assert_eq!(
        bench.fake.asked(),
        (0, 0, 2),
        "two repositories could have tags"
    );
    // `docker.io/user` is a namespace and nothing else.
    assert!(bench.ls("docker.io/user").await.is_empty());
    assert_eq!(bench.fake.asked(), (0, 0, 2));
    *bench.fake.broken.lock().unwrap() = Some(TreeError::Timeout {
        what: "x".into(),
        source: None,
    });
    assert_eq!(
        bench.ls("ghcr.io/org/model").await,
        ["@v1"],
        "goes without the registry's tags"
    );
    *bench.fake.broken.lock().unwrap() = None;

    assert_eq!(
        bench.ls("ghcr.io/org/model:v1").await,
        [".oci", "Modelfile", "config.json", "onnx", "vocab"]
    );
    assert_eq!(bench.ls("ghcr.io/org/model:v1/onnx").await, ["model.onnx"]);
    assert_eq!(
        bench.ls("ghcr.io/org/model:v1/.oci").await,
        ["manifest.json"]
    );
}

#[tokio::test]
async fn an_untagged_repository_shows_its_latest_from_the_first_file_on() {
    let bench = bench();
    bench.fake.push("ghcr.io/org/model:latest", &small());
    let folder = bench.walk("ghcr.io/org/model").await.unwrap().attr.ino;
    let namespace = bench.walk("ghcr.io/org/model/vocab").await.unwrap();
    assert_eq!(
        namespace.attr.kind,
        Kind::Directory,
        "until somebody asks for a file it is a name as any other"
    );
    assert!(bench.is_missing("ghcr.io/org/model/Modelfil").await);
    assert_eq!(bench.fake.asked(), (0, 0, 0));

    assert_eq!(bench.cat("ghcr.io/org/model/config.json").await, "{}");
    let stale = Invalidation::Entry {
        parent: folder,
        name: "vocab".into(),
    };
    assert_eq!(
        bench.events.try_iter().collect::<Vec<_>>(),
        [stale],
        "the kernel must forget the directory `vocab`"
    );
    assert_eq!(bench.cat("ghcr.io/org/model/vocab").await, "a b c");
    assert_eq!(bench.cat("ghcr.io/org/model/Modelfile").await, "FROM .");
    assert_eq!(
        bench.cat("ghcr.io/org/model/onnx/model.onnx").await,
        "weights"
    );
    assert!(
        bench
            .is_missing("ghcr.io/org/model/generation_config.json")
            .await
    );
    assert_eq!(bench.fake.asked(), (1, 1, 0));
    assert_eq!(
        bench.ls("ghcr.io/org/model").await,
        [
            ".oci",
            "@latest",
            "Modelfile",
            "config.json",
            "onnx",
            "vocab"
        ]
    );
    assert_eq!(
        bench
            .walk("ghcr.io/org/model/other")
            .await
            .unwrap()
            .attr
            .kind,
        Kind::Directory
    );
    let digest = bench.tree.xattr(folder, "user.oci.digest").unwrap();
    assert_eq!(digest, small().digest.to_string());
}

#[tokio::test]
async fn a_tag_moves_only_when_nobody_could_see_two_versions() {
    let ttl = Duration::from_millis(60);
    let bench = bench_with(TreeConfig {
        tag_ttl: ttl,
        ..TreeConfig::default()
    });
    let (old, new) = (
        model(b"old", &[("config.json", "old"), ("gone", "")]),
        model(b"new", &[("config.json", "new")]),
    );
    bench.fake.push("r.example/m:v1", &old);
    let directory = bench.walk("r.example/m:v1").await.unwrap().attr.ino;
    let file = bench
        .walk("r.example/m:v1/config.json")
        .await
        .unwrap()
        .attr
        .ino;
    let opened = bench.tree.open(file).unwrap();
    bench.fake.push("r.example/m:v1", &new);

    tokio::time::sleep(ttl * 2).await;
    assert_eq!(
        bench.cat("r.example/m:v1/config.json").await,
        "old",
        "a file is open"
    );
    bench.tree.release(opened.handle);
    assert_eq!(
        bench.cat("r.example/m:v1/config.json").await,
        "old",
        "it was open just now"
    );
    assert!(bench.events.try_iter().next().is_none());
    tokio::time::sleep(ttl * 2).await;
    assert_eq!(bench.cat("r.example/m:v1/config.json").await, "new");
    assert_eq!(
        bench.walk("r.example/m:v1").await.unwrap().attr.ino,
        directory,
        "the directory stays the same"
    );
    assert!(bench.is_missing("r.example/m:v1/gone").await);
    let events: Vec<_> = bench.events.try_iter().collect();
    for name in [".oci", "config.json", "gone"] {
        assert!(
            events.contains(&Invalidation::Entry {
                parent: directory,
                name: name.into()
            }),
            "{name} {events:?}"
        );
    }
    assert!(events.contains(&Invalidation::Content(directory)));
    let bytes = bench
        .tree
        .file(file, opened.handle)
        .unwrap()
        .read(0, 10)
        .await
        .unwrap();
    let bytes = owned(bytes);
    assert_eq!(
        &bytes[..],
        b"old",
        "what the kernel still holds stays readable"
    );
}

#[tokio::test]
async fn a_tag_that_nobody_looks_at_moves_while_another_one_is_read() {
    let ttl = Duration::from_millis(60);
    let bench = bench_with(TreeConfig {
        tag_ttl: ttl,
        ..TreeConfig::default()
    });
    let (old, new) = (
        model(b"old", &[("config.json", "old")]),
        model(b"new", &[("config.json", "new")]),
    );
    bench.fake.push("r.example/m:v1", &old);
    bench.fake.push("r.example/m:stable", &old);
    bench.cat("r.example/m:stable/config.json").await;
    tokio::time::sleep(ttl * 2).await;
    let file = bench
        .walk("r.example/m:v1/config.json")
        .await
        .unwrap()
        .attr
        .ino;
    let opened = bench.tree.open(file).unwrap();
    bench.fake.push("r.example/m:v1", &new);
    bench.fake.push("r.example/m:stable", &new);
    tokio::time::sleep(ttl * 2).await;
    assert_eq!(bench.cat("r.example/m:v1/config.json").await, "old");
    assert_eq!(bench.cat("r.example/m:stable/config.json").await, "new");
    bench.tree.release(opened.handle);
}

#[tokio::test]
async fn a_registry_that_is_down_takes_nothing_away() {
    let bench = bench_with(TreeConfig {
        tag_ttl: Duration::ZERO,
        ..TreeConfig::default()
    });
    bench.fake.push("r.example/m:v1", &small());
    assert_eq!(bench.cat("r.example/m:v1/config.json").await, "{}");
    *bench.fake.broken.lock().unwrap() = Some(TreeError::Timeout {
        what: "x".into(),
        source: None,
    });
    assert_eq!(bench.cat("r.example/m:v1/config.json").await, "{}");
    *bench.fake.broken.lock().unwrap() = None;
    bench.fake.untag("r.example/m:v1");
    assert!(
        bench.is_missing("r.example/m:v1").await,
        "a registry that says no is believed"
    );
    assert!(bench.tree.bound().is_empty());
}

#[tokio::test]
async fn a_refresh_moves_a_tag_at_once() {
    let bench = bench();
    let (old, new) = (
        model(b"old", &[("config.json", "old")]),
        model(b"new", &[("config.json", "new")]),
    );
    bench.fake.push("r.example/m:v1", &old);
    let file = bench
        .walk("r.example/m:v1/config.json")
        .await
        .unwrap()
        .attr
        .ino;
    let opened = bench.tree.open(file).unwrap();
    bench.fake.push("r.example/m:v1", &new);
    let reference: Reference = "r.example/m:v1".parse().unwrap();
    assert_eq!(
        bench.tree.refresh(&reference).await.unwrap(),
        Digest::of(b"new")
    );
    assert_eq!(bench.cat("r.example/m:v1/config.json").await, "new");
    let bytes = bench
        .tree
        .file(file, opened.handle)
        .unwrap()
        .read(0, 10)
        .await
        .unwrap();
    let bytes = owned(bytes);
    assert_eq!(&bytes[..], b"old");
    bench.tree.release(opened.handle);
    assert_eq!(bench.tree.bound()[0].open, 0);
}

#[tokio::test]
async fn attributes_are_those_of_a_read_only_disk() {
    let bench = bench();
    let small = small();
    bench.fake.push("r.example/m:v1", &small);
    let file = bench
        .walk("r.example/m:v1/onnx/model.onnx")
        .await
        .unwrap()
        .attr;
    assert_eq!(
        (file.kind, file.kind.mode(), file.size, file.blocks),
        (Kind::File, 0o444, 7, 1)
    );
    assert_eq!(file.time, small.created);
    let xattr = |name| bench.tree.xattr(file.ino, name);
    assert_eq!(
        xattr("user.oci.digest").unwrap(),
        Digest::of(b"weights").to_string()
    );
    assert_eq!(
        xattr("user.oci.mediatype").unwrap(),
        "application/octet-stream"
    );
    assert_eq!(xattr("user.ocifs.cached").unwrap(), "7");
    assert_eq!(xattr("user.ocifs.verified").unwrap(), "true");
    assert!(matches!(
        xattr("security.selinux"),
        Err(TreeError::NoAttribute)
    ));
    for other in ["system.posix_acl_access", "nothing"] {
        assert!(matches!(xattr(other), Err(TreeError::NoNamespace)));
    }
    assert!(matches!(
        xattr("user.oci.reference"),
        Err(TreeError::NoAttribute)
    ));

    let directory = bench.walk("r.example/m:v1").await.unwrap().attr;
    assert_eq!(
        (directory.kind.mode(), directory.time),
        (0o555, small.created)
    );
    assert_eq!(
        bench
            .tree
            .xattr(directory.ino, "user.oci.reference")
            .unwrap(),
        "r.example/m:v1"
    );
    assert!(bench.tree.xattrs(NodeId::ROOT).unwrap().is_empty());
    assert!(matches!(
        bench.tree.open(directory.ino),
        Err(TreeError::IsDirectory)
    ));
    assert!(matches!(
        bench.tree.opendir(file.ino).await,
        Err(TreeError::NotDirectory)
    ));
    assert!(matches!(
        bench.tree.lookup(file.ino, "x").await,
        Err(TreeError::NotDirectory)
    ));
    assert!(matches!(
        bench.tree.readlink(file.ino),
        Err(TreeError::NotLink)
    ));
}

#[tokio::test]
async fn what_is_known_is_answered_at_once_and_only_that() {
    let bench = bench();
    bench.fake.push("r.example/m:v1", &small());
    let host = bench
        .tree
        .try_lookup(NodeId::ROOT, "r.example")
        .unwrap()
        .unwrap()
        .attr
        .ino;
    assert!(
        bench.tree.try_lookup(host, "m:v1").is_none(),
        "needs the registry"
    );
    let directory = bench.tree.lookup(host, "m:v1").await.unwrap();
    assert_eq!(
        bench.tree.try_lookup(host, "m:v1").unwrap().unwrap(),
        directory
    );
    let file = bench
        .tree
        .try_lookup(directory.attr.ino, "config.json")
        .unwrap()
        .unwrap()
        .attr
        .ino;
    assert!(bench.tree.try_opendir(directory.attr.ino).unwrap().is_ok());
    let handle = bench.tree.open(file).unwrap().handle;
    let file = bench.tree.file(file, handle).unwrap();
    assert_eq!(owned(file.try_read(1, 100).unwrap().unwrap()), "}");
    assert!(file.try_read(2, 100).unwrap().unwrap().is_empty());
    assert!(
        file.try_read(u64::MAX, u32::MAX)
            .unwrap()
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn the_table_holds_what_the_kernel_holds() {
    let bench = bench();
    bench.fake.push("r.example/m:v1", &small());
    let host = bench
        .tree
        .lookup(NodeId::ROOT, "r.example")
        .await
        .unwrap()
        .attr
        .ino;
    let directory = bench.tree.lookup(host, "m:v1").await.unwrap().attr.ino;
    let opened = bench.tree.opendir(directory).await.unwrap();
    let entries = bench.tree.entries(directory, opened.handle).unwrap();
    assert_eq!(
        bench.tree.nodes(),
        2,
        "a listing alone tells the kernel of nothing"
    );
    let told: Vec<_> = entries[2..]
        .iter()
        .map(|entry| bench.tree.lookup_listed(directory, entry).unwrap())
        .collect();
    assert_eq!(bench.tree.nodes(), 2 + told.len());
    for (entry, listed) in told.iter().zip(&entries[2..]) {
        assert_eq!(entry.attr.ino, listed.ino);
        bench.tree.forget(entry.attr.ino, 1);
    }
    bench.tree.release(opened.handle);
    bench.tree.forget(directory, 1);
    bench.tree.forget(host, 1);
    assert_eq!((bench.tree.nodes(), bench.tree.open_handles()), (0, 0));
}
