//! A real mount over a catalogue in memory: what ordinary tools see, and how a mount lives and ends.
//!
//! Needs root and /dev/fuse, and fails without them.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ocifs::base::{Chain, Digest};
use ocifs::fuse::Counts;
use ocifs::model::{Content, File, Model};
use ocifs::mount::{self, Handler, Mount, MountError, MountOptions, Request, Umount};
use ocifs::registry::{Reference, Repository, Tag};
use ocifs::tree::{Catalogue, Space, Tree, TreeConfig, TreeError};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

/// Content that any byte of can be computed from its offset.
fn ramp(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index.wrapping_mul(31) >> 3) as u8 ^ (index >> 16) as u8)
        .collect()
}

fn file(path: &str, content: Vec<u8>) -> File {
    let bytes = Bytes::from(content);
    File {
        path: path.to_owned(),
        size: bytes.len() as u64,
        digest: Some(Digest::of(&bytes)),
        media_type: Some("application/octet-stream".to_owned()),
        modified: None,
        executable: false,
        content: Content::Inline(bytes),
    }
}

fn model(name: &str, files: Vec<File>) -> Arc<Model> {
    let created = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let oci = vec![
        file("manifest.json", b"{}".to_vec()),
        file("config.json", b"{}".to_vec()),
    ];
    Arc::new(Model::of_files(
        Digest::of(name.as_bytes()),
        created,
        files,
        oci,
    ))
}

const BIG: usize = 9 << 20;

fn example() -> Arc<Model> {
    let mut files = vec![
        file("config.json", b"{\"model_type\": \"llama\"}\n".to_vec()),
        file("model.safetensors", ramp(BIG + 17)),
        file("empty.txt", Vec::new()),
        file("onnx/model.onnx", ramp(5000)),
        file("onnx/deeper/vocab.txt", b"a\nb\n".to_vec()),
    ];
    files.extend((0..1500).map(|index| {
        file(
            &format!("many/{index:04}.txt"),
            format!("{index}\n").into_bytes(),
        )
    }));
    model("example", files)
}

/// Models in memory. A repository whose path begins with `slow` takes its time.
#[derive(Default)]
struct Memory {
    tags: Mutex<BTreeMap<String, Arc<Model>>>,
    known: Mutex<Vec<Reference>>,
}

impl Memory {
    fn push(&self, reference: &str, model: &Arc<Model>) {
        let reference: Reference = reference.parse().unwrap();
        self.tags
            .lock()
            .unwrap()
            .insert(reference.to_string(), model.clone());
    }
}

impl Catalogue for Memory {
    fn resolve<'a>(
        &'a self,
        reference: &'a Reference,
        _fresh: bool,
    ) -> BoxFuture<'a, Result<Digest, TreeError>> {
        async move {
            if reference.repository().path().starts_with("slow") {
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
            let found = self
                .tags
                .lock()
                .unwrap()
                .get(&reference.to_string())
                .map(|model| model.digest);
            found.ok_or_else(|| TreeError::not_found(reference.to_string()))
        }
        .boxed()
    }

    fn open<'a>(
        &'a self,
        repository: &'a Repository,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Arc<Model>, TreeError>> {
        let found = self.tags.lock().unwrap().iter().find_map(|(name, model)| {
            (name.starts_with(&format!("{repository}:")) && model.digest == *digest)
                .then(|| model.clone())
        });
        async move { found.ok_or_else(|| TreeError::not_found(digest.to_string())) }.boxed()
    }

    fn tags<'a>(
        &'a self,
        repository: &'a Repository,
        _patience: Duration,
    ) -> BoxFuture<'a, Vec<Tag>> {
        let prefix = format!("{repository}:");
        let tags = self.tags.lock().unwrap();
        let found = tags
            .keys()
            .filter_map(|name| name.strip_prefix(&prefix)?.parse().ok())
            .collect();
        async move { found }.boxed()
    }

    fn known(&self) -> Vec<Reference> {
        self.known.lock().unwrap().clone()
    }
}

/// A mount served by this process.
struct Bench {
    memory: Arc<Memory>,
    tree: Tree,
    counts: Counts,
    directory: tempfile::TempDir,
    runtime: Runtime,
    stop: Option<oneshot::Sender<()>>,
    served: Option<tokio::task::JoinHandle<Result<(), MountError>>>,
}

fn config() -> TreeConfig {
    TreeConfig {
        space: Arc::new(|| Space {
            limit: 64 << 30,
            free: 48 << 30,
        }),
        ..TreeConfig::default()
    }
}

fn handler(tree: Tree) -> Handler {
    Arc::new(move |request| {
        let tree = tree.clone();
        async move {
            match request {
                Request::Status => Ok(serde_json::json!({ "models": tree.bound().len() })),
                Request::Refresh { reference } => {
                    let reference: Reference =
                        reference.parse().map_err(|error| format!("{error}"))?;
                    tree.refresh(&reference)
                        .await
                        .map(|digest| digest.to_string().into())
                        .map_err(|error| Chain(&error).to_string())
                }
                _ => Err("there is nobody to ask".to_owned()),
            }
        }
        .boxed()
    })
}

fn bring_up(
    path: &Path,
    runtime_dir: &Path,
    runtime: &Runtime,
    memory: Arc<Memory>,
) -> Result<(Tree, Mount), MountError> {
    let (tree, events) = Tree::new(memory, config());
    let mut options = MountOptions::new(path, runtime_dir);
    options.threads = 2;
    let mount = Mount::new(
        tree.clone(),
        events,
        &options,
        handler(tree.clone()),
        runtime.handle().clone(),
    )?;
    Ok((tree, mount))
}

fn new_runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

impl Bench {
    fn new() -> Self {
        let memory = Arc::new(Memory::default());
        let example = example();
        for reference in [
            "ghcr.io/org/model:v1",
            "ghcr.io/org/model:latest",
            "localhost:5000/m:v1",
            "gpt2:v1",
        ] {
            memory.push(reference, &example);
        }
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("models")).unwrap();
        let runtime = new_runtime();
        let (tree, mount) = bring_up(
            &directory.path().join("models"),
            &directory.path().join("run"),
            &runtime,
            memory.clone(),
        )
        .unwrap();
        let counts = mount.counts();
        let (stop, stopped) = oneshot::channel();
        let served = runtime.spawn(mount.run(async move { drop(stopped.await) }));
        Self {
            memory,
            tree,
            counts,
            directory,
            runtime,
            stop: Some(stop),
            served: Some(served),
        }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("models")
    }

    fn run_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root().join(below)
    }

    /// Runs a shell command in the mount point's parent; its output, which must be a success's.
    fn sh(&self, script: &str) -> String {
        let output = self.try_sh(script);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{script}\n{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    fn try_sh(&self, script: &str) -> Output {
        Command::new("timeout")
            .args(["60", "bash", "-ec", script])
            .current_dir(self.directory.path())
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn unmount(&self, how: Umount) -> Result<mount::Unmounted, MountError> {
        // The daemon is this process, so it is not waited for.
        mount::unmount(&self.root(), how, &self.run_dir(), Duration::ZERO)
    }

    fn wait_served(&mut self) -> Result<(), MountError> {
        let served = self.served.take().unwrap();
        self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(30), served)
                .await
                .unwrap()
                .unwrap()
        })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(served) = self.served.take() {
            let ended = self
                .runtime
                .block_on(async { tokio::time::timeout(Duration::from_secs(30), served).await });
            if !std::thread::panicking() {
                ended.expect("the mount did not end").unwrap().unwrap();
                assert!(mount::find(&self.root()).is_err());
            }
        }
    }
}

#[test]
fn ordinary_tools_see_an_ordinary_read_only_disk() {
    let bench = Bench::new();
    let at = "models/ghcr.io/org/model:v1";

    // Listings.
    let listing = bench.sh(&format!("ls -lR {at}"));
    assert!(listing.contains("-r--r--r-- 1 root root "), "{listing}");
    assert!(listing.contains("dr-xr-xr-x 1 root root "), "{listing}");
    assert!(listing.contains("1499.txt"));
    assert_eq!(
        bench.sh(&format!("ls -A {at}")),
        ".oci\nconfig.json\nempty.txt\nmany\nmodel.safetensors\nonnx\n"
    );
    assert_eq!(
        bench.sh(&format!("find {at} -type f | wc -l")).trim(),
        "1507"
    );
    assert_eq!(
        bench
            .sh(&format!("find {at} -type d -links 1 -perm 0555 | wc -l"))
            .trim(),
        "5"
    );
    assert_eq!(bench.sh(&format!("ls {at}/many | wc -l")).trim(), "1500");
    assert_eq!(bench.sh("ls -A models/ghcr.io/org/model"), "@latest\n@v1\n");
    assert_eq!(
        bench.sh("ls models models/ghcr.io models/ghcr.io/org"),
        "models:\nghcr.io\n\nmodels/ghcr.io:\norg\n\nmodels/ghcr.io/org:\nmodel\nmodel:v1\n"
    );

    // Copies.
    bench.sh(&format!(
        "cp -r {at} copy && diff -r {at} copy && cp -a {at} archive && diff -r {at} archive"
    ));
    assert_eq!(
        fs::read(bench.directory.path().join("copy/model.safetensors")).unwrap(),
        ramp(BIG + 17)
    );
    bench.sh(&format!(
        "mkdir out && tar -cf - -C {at} . | tar -xf - -C out && diff -r {at} out"
    ));
    bench.sh(&format!(
        "tar -cSf sparse.tar -C {at} . && tar --compare -f sparse.tar -C {at}"
    ));
    let changes = bench.sh(&format!("rsync -anci {at}/ archive/"));
    assert_eq!(changes.trim(), "", "rsync -an finds nothing to do");
    assert_eq!(
        bench
            .sh(&format!("sha256sum < {at}/model.safetensors"))
            .split(' ')
            .next()
            .unwrap(),
        Digest::of(&ramp(BIG + 17)).hex(),
    );

    // Sizes.
    let model = fs::metadata(bench.path("ghcr.io/org/model:v1/model.safetensors")).unwrap();
    assert_eq!(
        (model.len(), model.blocks()),
        ((BIG + 17) as u64, ((BIG + 17) as u64).div_ceil(512))
    );
    assert_eq!(
        (model.mtime(), model.atime(), model.ctime()),
        (1_700_000_000, 1_700_000_000, 1_700_000_000)
    );
    assert_eq!((model.nlink(), model.blksize()), (1, 128 << 10));
    let sizes = bench.sh(&format!(
        "du -s -B1 {at}/onnx; du -s --apparent-size -B1 {at}/onnx"
    ));
    assert_eq!(sizes, format!("5632\t{at}/onnx\n5004\t{at}/onnx\n"));
    let df =
        bench.sh("df -t fuse.ocifs --output=source,fstype,size,avail,target -B1G models | tail -1");
    let df: Vec<_> = df.split_whitespace().collect();
    assert_eq!(df[..4], ["ocifs", "fuse.ocifs", "64", "48"]);
    assert_eq!(bench.sh("stat -f -c '%l %T' models").trim(), "255 fuseblk");

    // Links and attributes.
    assert_eq!(
        bench.sh("readlink models/ghcr.io/org/model/@v1").trim(),
        "../model:v1"
    );
    assert_eq!(
        bench.sh("readlink models/gpt2:v1 models/localhost_5000_ models/user"),
        "docker.io/library/gpt2:v1\nlocalhost:5000\ndocker.io/user\n"
    );
    assert_eq!(bench.sh("cat models/gpt2:v1/config.json models/localhost_5000_/m/@v1/config.json | sort -u | wc -l").trim(), "1");
    let digest = Digest::of(b"example");
    assert_eq!(
        bench.sh(&format!("getfattr --only-values -n user.oci.digest {at}")),
        digest.to_string()
    );
    let all = bench.sh(&format!("getfattr -d {at}/onnx/model.onnx"));
    let blob = Digest::of(&ramp(5000));
    for line in [
        format!("user.oci.digest=\"{blob}\""),
        "user.oci.mediatype=\"application/octet-stream\"".into(),
        "user.ocifs.cached=\"5000\"".into(),
        "user.ocifs.verified=\"true\"".into(),
    ] {
        assert!(all.contains(&line), "{line}\n{all}");
    }
    assert!(
        !bench
            .try_sh(&format!("getfattr -n user.nothing {at}/config.json"))
            .status
            .success()
    );

    // Identity: the digest's directory is another directory with the same files.
    let (tag, pinned) = (
        bench.path("ghcr.io/org/model:v1"),
        bench.path(&format!("ghcr.io/org/model@{digest}")),
    );
    let ino = |path: PathBuf| fs::metadata(path).unwrap().ino();
    assert_ne!(ino(tag.clone()), ino(pinned.clone()));
    assert_eq!(
        ino(tag.join("config.json")),
        ino(pinned.join("config.json"))
    );

    // The whole of what was looked at so far, from the top.
    bench.sh("ls -lR models > /dev/null; find models -ls > /dev/null; tar -cf /dev/null models");
    // Untagged is `latest`; `..` leads back.
    bench.sh("cmp models/ghcr.io/org/model/config.json models/ghcr.io/org/model:v1/../model/@v1/config.json");
    assert_eq!(
        bench
            .sh(&format!(
                "cd {at}/onnx/deeper && cd ../../../ && pwd -P && ls -d model:v1"
            ))
            .lines()
            .last(),
        Some("model:v1")
    );
}

/// What the kernel asks during `script`, once it has asked for what comes late.
fn asked(bench: &Bench, script: &str) -> BTreeMap<u32, u64> {
    let settled = || {
        let mut last = bench.counts.all();
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let now = bench.counts.all();
            if now == last {
                return now;
            }
            last = now;
        }
    };
    let before = settled();
    bench.sh(script);
    let mut after = settled();
    for (kind, count) in before {
        *after.entry(kind).or_default() -= count;
    }
    after.retain(|_, count| *count > 0);
    after
}

#[test]
fn what_is_known_costs_no_request() {
    // `enum fuse_opcode` of the kernel's fuse.h.
    const OPENDIR: u32 = 27;
    const RELEASEDIR: u32 = 29;
    const GETXATTR: u32 = 22;
    let bench = Bench::new();
    let digest = Digest::of(b"example");
    let directories = 5; // the model's own, .oci, many, onnx, onnx/deeper
    for at in [
        "models/ghcr.io/org/model:v1".to_owned(),
        format!("models/ghcr.io/org/model@{digest}"),
    ] {
        let first = asked(&bench, &format!("ls -lRA {at} > /dev/null"));
        assert!(first[&OPENDIR] > 0, "{first:?}");
        for script in ["ls -lRA", "ls -iRA", "find", "find -ls", "du -a"] {
            let (program, arguments) = script.split_once(' ').unwrap_or((script, ""));
            let script = format!("{program} {at} {arguments} > /dev/null");
            let mut again = asked(&bench, &script);
            if program == "ls" {
                // Labels and access lists, which the kernel does not keep.
                again.remove(&GETXATTR);
            }
            let only = BTreeMap::from([(OPENDIR, directories), (RELEASEDIR, directories)]);
            assert_eq!(again, only, "{script}");
        }
        let script = format!(
            "stat {at}/config.json {at}/many/0007.txt; ! stat {at}/none.json {at}/onnx/none"
        );
        asked(&bench, &script);
        assert_eq!(asked(&bench, &script), BTreeMap::new(), "{at}");
    }
}

#[test]
fn a_listing_resolves_nothing_and_a_look_at_its_entries_does() {
    let bench = Bench::new();
    *bench.memory.known.lock().unwrap() = vec![
        "ghcr.io/org/model:v1".parse().unwrap(),
        "ghcr.io/org/gone:v1".parse().unwrap(),
    ];
    let plain = bench.sh("ls -f models/ghcr.io/org | sort; ls -A models/ghcr.io/org/model");
    assert_eq!(
        plain.split_whitespace().collect::<Vec<_>>(),
        [
            ".", "..", "gone", "gone:v1", "model", "model:v1", "@latest", "@v1"
        ]
    );
    let kinds = bench.sh(
        "python3 -c 'import os; print(*(e.is_dir(follow_symlinks=False) for e in os.scandir(\"models/ghcr.io/org\")))'",
    );
    assert_eq!(
        kinds.trim(),
        "True True True True",
        "kinds are told without a look"
    );
    assert!(bench.tree.bound().is_empty(), "{:?}", bench.tree.bound());
    let long = bench.try_sh("ls -l models/ghcr.io/org");
    assert!(String::from_utf8_lossy(&long.stdout).contains("2023 model:v1"));
    assert!(String::from_utf8_lossy(&long.stderr).contains("gone:v1': No such file"));
    assert_eq!(bench.tree.bound().len(), 1);
}

#[test]
fn other_users_read_when_they_are_allowed_to() {
    let bench = Bench::new();
    let as_nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups cat models/ghcr.io/org/model:v1/config.json";
    bench.sh("chmod 755 .");
    assert!(
        !bench.try_sh(as_nobody).status.success(),
        "for its owner alone"
    );
    let open = bench.directory.path().join("open");
    fs::create_dir(&open).unwrap();
    let (tree, events) = Tree::new(bench.memory.clone(), config());
    let options = MountOptions {
        allow_other: true,
        ..MountOptions::new(&open, bench.run_dir())
    };
    let mount = Mount::new(
        tree.clone(),
        events,
        &options,
        handler(tree),
        bench.runtime.handle().clone(),
    )
    .unwrap();
    assert!(
        bench
            .sh(&as_nobody.replace("models", "open"))
            .contains("llama")
    );
    let sockets = fs::read_dir(bench.run_dir()).unwrap().count();
    assert_eq!(sockets, 2, "each mount has a socket of its own");
    drop(mount);
    assert!(
        matches!(mount::find(&open), Err(MountError::NotMounted { .. })),
        "a mount that is dropped is gone"
    );
}

#[test]
fn reads_of_every_kind_give_the_right_bytes() {
    let bench = Bench::new();
    let path = bench.path("ghcr.io/org/model:v1/model.safetensors");
    let content = ramp(BIG + 17);
    let mut file = fs::File::open(&path).unwrap();
    for (offset, length) in [
        (0, 1),
        (4095, 2),
        (BIG - 5, 22),
        (1 << 20, 3 << 20),
        (123_457, 65_536),
    ] {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset as u64).unwrap();
        assert_eq!(bytes, content[offset..offset + length], "{offset} {length}");
    }
    let mut bytes = vec![0; 64];
    assert_eq!(
        file.read_at(&mut bytes, BIG as u64).unwrap(),
        17,
        "cut at the end, and only there"
    );
    assert_eq!(file.read_at(&mut bytes, BIG as u64 + 17).unwrap(), 0);
    assert_eq!(file.read_at(&mut bytes, 1 << 40).unwrap(), 0);
    file.seek(SeekFrom::End(-17)).unwrap();
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).unwrap();
    assert_eq!(tail, content[BIG..]);
    drop(file);
    let hex = Digest::of(&content).hex();
    for script in [
        "dd if=\"$F\" bs=1M iflag=direct status=none | sha256sum",
        "dd if=\"$F\" bs=4096 status=none | sha256sum",
        "python3 -c 'import mmap,sys,os,hashlib; f=open(sys.argv[1],\"rb\"); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); print(hashlib.sha256(m).hexdigest(), \" -\")' \"$F\"",
        "python3 -c 'import sys,os,hashlib; f=os.open(sys.argv[1],os.O_RDONLY); s=os.fstat(f).st_size; o=os.open(\"sent\",os.O_CREAT|os.O_RDWR); n=0\nwhile n<s: n+=os.sendfile(o,f,n,s-n)\nassert os.lseek(f,0,os.SEEK_HOLE)==s; print(hashlib.sha256(open(\"sent\",\"rb\").read()).hexdigest(), \" -\")' \"$F\"",
    ] {
        let output = bench.sh(&format!("F={}; {script}", path.display()));
        assert_eq!(output.split_whitespace().next().unwrap(), hex, "{script}");
    }
    // The kernel says that a file is closed when it finds the time.
    let end = Instant::now() + Duration::from_secs(10);
    while bench.tree.open_handles() > 0 {
        assert!(
            Instant::now() < end,
            "{} handles are left",
            bench.tree.open_handles()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn everything_that_writes_is_refused_as_on_a_read_only_disk() {
    let bench = Bench::new();
    bench.sh("cat models/ghcr.io/org/model:v1/config.json");
    let at = "models/ghcr.io/org/model:v1";
    for script in [
        "touch {}/new",
        "touch {}/config.json",
        "mkdir {}/new",
        "rm -f {}/config.json",
        "rmdir {}/onnx",
        "mv {}/config.json {}/other",
        "ln -s x {}/link",
        "ln {}/config.json {}/hard",
        "chmod 644 {}/config.json",
        "chown 1 {}/config.json",
        "truncate -s 0 {}/config.json",
        "echo x > {}/config.json",
        "echo x >> {}/config.json",
        "setfattr -n user.a -v b {}/config.json",
        "mknod {}/fifo p",
        "mkdir models/ghcr.io/New",
        "rm -rf models/ghcr.io",
    ] {
        let script = script.replace("{}", at);
        let output = bench.try_sh(&script);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains("Read-only file system"),
            "{script}: {text}"
        );
    }
    for (script, reason) in [
        ("cat models/ghcr.io/org/none:v1/config.json", "No such file"),
        ("cat models/ghcr.io/org/Nothing", "No such file"),
        ("cat models/ghcr.io/org", "Is a directory"),
        (
            "ls models/ghcr.io/org/model:v1/config.json/x",
            "Not a directory",
        ),
        (
            "models/ghcr.io/org/model:v1/config.json",
            "Permission denied",
        ),
    ] {
        let output = bench.try_sh(script);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(reason),
            "{script}: {text}"
        );
    }
    bench.sh(&format!(
        "! test -w {at}/config.json && ! test -x {at}/config.json && test -r {at}/config.json"
    ));
}

#[test]
fn a_slow_registry_keeps_nobody_else_waiting() {
    let bench = Bench::new();
    bench.sh("cat models/ghcr.io/org/model:v1/config.json");
    // More than there are threads, in directories of their own.
    let mut slow: Vec<Child> = (0..8)
        .map(|index| {
            let path = bench.path(&format!("ghcr.io/slow{index}/model:v1/config.json"));
            Command::new("cat")
                .arg(path)
                .stderr(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let started = Instant::now();
    assert_eq!(
        fs::read(bench.path("ghcr.io/org/model:v1/onnx/model.onnx")).unwrap(),
        ramp(5000)
    );
    assert_eq!(
        fs::read_dir(bench.path("ghcr.io/org/model:v1/many"))
            .unwrap()
            .count(),
        1500
    );
    assert!(
        slow.iter_mut()
            .all(|child| child.try_wait().unwrap().is_none()),
        "they were meant to be slow"
    );
    assert!(
        started.elapsed() < Duration::from_millis(2500),
        "{:?}",
        started.elapsed()
    );
    for mut child in slow {
        assert!(!child.wait().unwrap().success());
    }
}

#[test]
fn a_tag_that_was_refreshed_shows_the_new_version_at_once() {
    let bench = Bench::new();
    let info = mount::find(&bench.root()).unwrap();
    let ask = |question: &Request| {
        mount::request(&bench.run_dir(), &info, question, Duration::from_secs(20))
    };
    let path = bench.path("ghcr.io/org/model:v1");
    bench.sh("ls -lR models/ghcr.io/org/model:v1");
    let old = fs::File::open(path.join("config.json")).unwrap();
    let new = model(
        "new",
        vec![
            file("config.json", b"new".to_vec()),
            file("added.json", b"{}".to_vec()),
        ],
    );
    bench.memory.push("ghcr.io/org/model:v1", &new);
    assert!(
        fs::read_to_string(path.join("config.json"))
            .unwrap()
            .contains("llama"),
        "a tag does not move by itself"
    );
    assert_eq!(ask(&Request::Status).unwrap()["models"], 1);
    let digest = ask(&Request::Refresh {
        reference: "ghcr.io/org/model:v1".into(),
    })
    .unwrap();
    assert_eq!(digest, new.digest.to_string());
    // The kernel is told by a thread of its own.
    let end = Instant::now() + Duration::from_secs(10);
    while fs::read_to_string(path.join("config.json")).unwrap() != "new" {
        assert!(Instant::now() < end, "the kernel was not told");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(
        bench.sh("ls -A models/ghcr.io/org/model:v1"),
        ".oci\nadded.json\nconfig.json\n"
    );
    assert!(!path.join("onnx").exists());
    let mut text = String::new();
    (&old).read_to_string(&mut text).unwrap();
    assert!(text.contains("llama"), "an open file stays what it is");
    let error = ask(&Request::Refresh {
        reference: "ghcr.io/org/none:v1".into(),
    })
    .unwrap_err();
    assert!(error.to_string().contains("not found"), "{error}");
}

#[test]
fn bind_mounts_work_and_outlive_nothing() {
    let bench = Bench::new();
    bench.sh("mkdir bound && mount --bind models/ghcr.io/org/model/@v1 bound");
    assert_eq!(
        bench
            .sh("sha256sum < bound/model.safetensors")
            .split(' ')
            .next()
            .unwrap(),
        Digest::of(&ramp(BIG + 17)).hex()
    );
    let output = bench.try_sh("touch bound/x");
    assert!(String::from_utf8_lossy(&output.stderr).contains("Read-only file system"));
    assert_eq!(
        bench.sh("df --output=fstype bound | tail -1").trim(),
        "fuse.ocifs"
    );
    bench.sh("umount bound");
}

#[test]
fn a_busy_mount_says_so_and_goes_lazily() {
    let mut bench = Bench::new();
    let mut inside = Command::new("sleep")
        .arg("60")
        .current_dir(bench.path("ghcr.io"))
        .spawn()
        .unwrap();
    let mut open = fs::File::open(bench.path("ghcr.io/org/model:v1/model.safetensors")).unwrap();
    let error = bench.unmount(Umount::Normal).unwrap_err();
    assert!(
        matches!(error, MountError::Busy { .. }) && error.to_string().contains("--lazy"),
        "{error}"
    );
    bench.sh("cat models/ghcr.io/org/model:v1/config.json");

    let unmounted = bench.unmount(Umount::Lazy).unwrap();
    assert_eq!(unmounted.still_running, Some(std::process::id()));
    assert_eq!(
        fs::read_dir(bench.root()).unwrap().count(),
        0,
        "out of the tree"
    );
    assert!(matches!(
        bench.unmount(Umount::Normal),
        Err(MountError::NotMounted { .. })
    ));
    let mut content = Vec::new();
    open.read_to_end(&mut content).unwrap();
    assert_eq!(content, ramp(BIG + 17), "what is open goes on");
    drop(open);
    inside.kill().unwrap();
    inside.wait().unwrap();
    bench
        .wait_served()
        .expect("the session ends with its last reader");
    assert_eq!(
        fs::read_dir(bench.run_dir()).unwrap().count(),
        0,
        "the control socket is gone"
    );
}

#[test]
fn a_free_mount_is_taken_down_from_outside() {
    let mut bench = Bench::new();
    bench.sh("cat models/ghcr.io/org/model:v1/config.json");
    bench.unmount(Umount::Normal).unwrap();
    bench.wait_served().unwrap();
    assert_eq!(fs::read_dir(bench.run_dir()).unwrap().count(), 0);
}

#[test]
fn what_is_mounted_already_is_not_mounted_again() {
    let bench = Bench::new();
    let again = bring_up(
        &bench.root(),
        &bench.run_dir(),
        &bench.runtime,
        bench.memory.clone(),
    );
    assert!(
        matches!(again, Err(MountError::AlreadyMounted { .. })),
        "{again:?}"
    );
    let file = bench.directory.path().join("file");
    fs::write(&file, "").unwrap();
    let error = bring_up(
        &file,
        &bench.run_dir(),
        &bench.runtime,
        bench.memory.clone(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("not a directory"), "{error}");
    assert!(matches!(
        mount::unmount(
            Path::new("/proc"),
            Umount::Normal,
            &bench.run_dir(),
            Duration::ZERO
        ),
        Err(MountError::Foreign { .. })
    ));
}

/// Not a test: the daemon of the tests below, in a process of its own that can be killed.
#[test]
#[ignore = "started by other tests"]
fn daemon_process() {
    let Some(directory) = std::env::var_os("OCIFS_TEST_DIRECTORY").map(PathBuf::from) else {
        panic!("started by other tests");
    };
    let memory = Arc::new(Memory::default());
    memory.push("ghcr.io/org/model:v1", &example());
    let runtime = new_runtime();
    let (_tree, mount) = bring_up(
        &directory.join("models"),
        &directory.join("run"),
        &runtime,
        memory,
    )
    .unwrap();
    fs::write(directory.join("up"), "").unwrap();
    runtime.block_on(mount.run(mount::terminated())).unwrap();
}

struct Daemon {
    child: Child,
    directory: PathBuf,
}

impl Daemon {
    fn start(directory: &Path) -> Self {
        let _ = fs::create_dir(directory.join("models"));
        let _ = fs::remove_file(directory.join("up"));
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "daemon_process", "--ignored", "--nocapture"])
            .env("OCIFS_TEST_DIRECTORY", directory)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut daemon = Self {
            child,
            directory: directory.to_owned(),
        };
        let end = Instant::now() + Duration::from_secs(20);
        while !directory.join("up").exists() {
            assert!(
                daemon.child.try_wait().unwrap().is_none(),
                "the daemon ended"
            );
            assert!(Instant::now() < end, "the daemon did not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        daemon
    }

    fn root(&self) -> PathBuf {
        self.directory.join("models")
    }

    fn unmount(&self, how: Umount) -> Result<mount::Unmounted, MountError> {
        mount::unmount(
            &self.root(),
            how,
            &self.directory.join("run"),
            Duration::from_secs(20),
        )
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        while mount::find(&self.root()).is_ok() {
            let _ = Command::new("umount").arg("-l").arg(self.root()).status();
        }
    }
}

#[test]
fn umount_returns_when_the_daemon_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(directory.path());
    fs::read(daemon.root().join("ghcr.io/org/model:v1/config.json")).unwrap();
    let unmounted = daemon.unmount(Umount::Normal).unwrap();
    assert_eq!(unmounted.still_running, None);
    assert!(daemon.child.try_wait().unwrap().unwrap().success());
}

#[test]
fn a_daemon_that_is_told_to_end_unmounts() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(directory.path());
    fs::read(daemon.root().join("ghcr.io/org/model:v1/config.json")).unwrap();
    let pid = daemon.child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert!(daemon.child.wait().unwrap().success());
    assert!(mount::find(&daemon.root()).is_err());
    assert_eq!(
        fs::read_dir(directory.path().join("run")).unwrap().count(),
        0
    );
}

#[test]
fn a_daemon_that_is_told_to_end_while_it_is_read_lets_readers_finish() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(directory.path());
    let mut open =
        fs::File::open(daemon.root().join("ghcr.io/org/model:v1/model.safetensors")).unwrap();
    let pid = daemon.child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    let end = Instant::now() + Duration::from_secs(5);
    while mount::find(&daemon.root()).is_ok() {
        assert!(Instant::now() < end, "still in the tree");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut content = Vec::new();
    open.read_to_end(&mut content).unwrap();
    assert_eq!(content, ramp(BIG + 17));
    drop(open);
    assert!(daemon.child.wait().unwrap().success());
}

#[test]
fn a_dead_mount_is_healed_by_mount_and_removed_by_umount() {
    let directory = tempfile::tempdir().unwrap();
    let kill = |daemon: &mut Daemon| {
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
        let error = fs::read_dir(daemon.root()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotConnected, "{error}");
    };
    let mut first = Daemon::start(directory.path());
    kill(&mut first);
    let mut second = Daemon::start(directory.path());
    fs::read(second.root().join("ghcr.io/org/model:v1/config.json")).unwrap();
    assert_eq!(
        mount::mounts()
            .unwrap()
            .iter()
            .filter(|mount| mount.path == second.root().canonicalize().unwrap())
            .count(),
        1
    );
    kill(&mut second);
    second.unmount(Umount::Normal).unwrap();
    assert_eq!(fs::read_dir(second.root()).unwrap().count(), 0);
    drop(first);
}

#[test]
fn a_mount_is_taken_away_by_force_from_readers_that_wait() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path());
    let mut reader = Command::new("cat")
        .arg(daemon.root().join("ghcr.io/slow/model:v1/config.json"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let started = Instant::now();
    let unmounted = daemon.unmount(Umount::Force).unwrap();
    assert!(!reader.wait().unwrap().success());
    assert!(
        started.elapsed() < Duration::from_millis(2500),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(unmounted.still_running, None);
}
