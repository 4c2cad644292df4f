//! Every step of everything that this layer does fails, is the last one before a kill, or the last one before the power goes; then the
//! directory is opened again and compared with what may and what must be in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::faults::{self, Fault, Promise, Run, promise};
use super::power::{self, Disk, Loss};
use super::*;
use crate::base::ByteRange;

const CHUNK: usize = 16384;
/// What damage looks like.
const ROT: &[u8] = b"\xFF\x00\xFF\x01\xFE";
const NAME: &str = "r.example/o/m:v1";
const MEDIA: &str = "application/vnd.oci.image.manifest.v1+json";

fn content(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(37).wrapping_add((at >> 8) as u8) ^ seed)
        .collect()
}

/// What a registry sends that has other bytes.
fn falsified(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[CHUNK] ^= 1;
    bytes
}

/// The blobs that the scenarios use, and the tags' targets.
struct World {
    blobs: BTreeMap<Digest, Vec<u8>>,
    a: Digest,
    b: Digest,
    manifest_a: Digest,
    manifest_b: Digest,
    unpacked: Digest,
}

fn world() -> World {
    let mut blobs = BTreeMap::new();
    let mut add = |bytes: Vec<u8>| {
        let digest = Digest::of(&bytes);
        blobs.insert(digest, bytes);
        digest
    };
    let (a, b) = (add(content(1, 5 * CHUNK + 77)), add(content(2, 3 * CHUNK)));
    let manifest = |blob: &Digest| format!(r#"{{"layers":[{{"digest":"{blob}"}}]}}"#).into_bytes();
    World {
        a,
        b,
        manifest_a: add(manifest(&a)),
        manifest_b: add(manifest(&b)),
        unpacked: add(content(3, 2 * CHUNK + 5)),
        blobs,
    }
}

impl World {
    fn bytes(&self, digest: &Digest) -> &[u8] {
        &self.blobs[digest]
    }

    fn size(&self, digest: &Digest) -> u64 {
        self.blobs[digest].len() as u64
    }

    /// Brings what is missing of a blob and seals it, as far as the disk lets it. Whatever it says is here must be right.
    fn fill(&self, cache: &Cache, digest: &Digest) -> Result<(), CacheError> {
        let bytes = self.bytes(digest);
        let entry = Arc::new(cache.entry(digest, bytes.len() as u64)?);
        let whole = ByteRange::new(0, bytes.len() as u64);
        for _ in 0..3 {
            for gap in entry.missing(whole) {
                let part = &bytes[gap.start() as usize..gap.end() as usize];
                let mut writer = entry.writer(gap)?;
                for piece in part.chunks(CHUNK + CHUNK / 2) {
                    writer.push(piece)?;
                }
                promise(Promise::Chunks(*digest, whole.len(), gap));
            }
            // Damage is found by reading, and then brought anew.
            match entry.read(whole)? {
                Some(read) => {
                    if read == falsified(bytes) {
                        entry.discard();
                        return self.fill(cache, digest);
                    }
                    assert!(read == bytes, "wrong bytes");
                    entry.seal()?;
                    promise(Promise::Sealed(*digest));
                    return Ok(());
                }
                None => assert!(!entry.missing(whole).is_empty() || entry.is_discarded()),
            }
        }
        Ok(())
    }

    fn artifact(&self, cache: &Cache, manifest: &Digest, blob: &Digest) -> Result<(), CacheError> {
        self.fill(cache, blob)?;
        cache.put(manifest, self.bytes(manifest));
        promise(Promise::Sealed(*manifest));
        cache.set_tag(&TagRecord {
            name: NAME.into(),
            digest: *manifest,
            checked: SystemTime::UNIX_EPOCH,
        });
        promise(Promise::Tag(NAME.into(), *manifest));
        // As callers do: nothing is named before it is whole.
        if cache.is_sealed(blob) && cache.is_sealed(manifest) {
            cache.publish(NAME, MEDIA, manifest, self.size(manifest), None);
        }
        Ok(())
    }

    /// Whether the scenario had a sealed file rot.
    fn rots(&self, dir: &Path) -> bool {
        let sealed = dir.join("blobs/sha256").join(self.b.hex());
        fs::read(sealed).is_ok_and(|bytes| bytes[5..].starts_with(ROT))
    }

    /// Looks at a directory after whatever happened: what must never be, what must be, and that work goes on.
    fn inspect(&self, dir: &Path, promises: &[Promise], killed: bool) {
        let cache = open(dir, 1 << 30).expect("the cache opens again");
        let layout = cache.layout();
        if self.rots(dir) {
            cache.verify(|_, _| {}).unwrap();
        }
        // Never: a sealed file with other bytes than its name says.
        for path in power::files(&layout.sealed_dir()) {
            let bytes = fs::read(&path).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert_eq!(Digest::of(&bytes).hex(), name, "a sealed blob is wrong");
        }
        // Never: an artifact in the index that is not whole.
        for published in cache.published() {
            let manifest = cache.get(&published.digest, 1 << 20).expect("its manifest");
            let text = String::from_utf8(manifest.to_vec()).unwrap();
            for blob in self.blobs.keys().filter(|blob| text.contains(&blob.hex())) {
                assert!(cache.is_sealed(blob), "the index names what is not whole");
            }
        }
        // Never: something that a crash left behind.
        for dir in layout.replaced_in().iter().chain([
            &layout.partial_dir(),
            &layout.unpacked_dir(),
            &layout.removed_dir(),
        ]) {
            for path in power::files(dir) {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                assert!(!name.starts_with(".tmp-"), "{name} stays for ever");
                let orphan = name.ends_with(".map") && !path.with_extension("data").exists();
                assert!(!orphan, "{name} stays for ever");
                assert!(path.parent() != Some(&layout.unpacked_dir()), "{name}");
                assert!(path.parent() != Some(&layout.removed_dir()), "{name}");
            }
        }
        for promise in promises {
            match promise {
                Promise::Sealed(digest) => assert!(cache.is_sealed(digest), "{digest} is lost"),
                Promise::Tag(name, digest) => {
                    let last = promises
                        .iter()
                        .rfind(|other| matches!(other, Promise::Tag(other, _) if other == name));
                    if last == Some(promise) {
                        let now = cache.tag(name).map(|tag| tag.digest);
                        // Or it has moved on already.
                        let known = [self.manifest_a, self.manifest_b];
                        let moved = now.is_some_and(|now| now != *digest && known.contains(&now));
                        assert!(now == Some(*digest) || moved, "the tag is lost");
                    }
                }
                Promise::Chunks(digest, size, range) if killed => {
                    let here = cache.entry(digest, *size).unwrap();
                    let bytes = here.read(*range).unwrap().expect("bytes are lost");
                    let expected =
                        &self.bytes(digest)[range.start() as usize..range.end() as usize];
                    assert!(bytes == expected, "wrong bytes");
                }
                Promise::Chunks(..) => {}
            }
        }
        if let Some(tag) = cache.tag(NAME) {
            assert!([self.manifest_a, self.manifest_b].contains(&tag.digest));
        }
        if let Some((digest, size)) = cache.unpacked_as(&self.b) {
            assert_eq!((digest, size), (self.unpacked, self.size(&self.unpacked)));
        }
        // Whatever is left of a blob is right or known to be missing, and it can be finished.
        for digest in [&self.a, &self.b] {
            self.fill(&cache, digest).expect("it can be finished");
            assert!(cache.is_sealed(digest));
        }
        cache
            .verify(|info, verdict| assert_eq!(verdict, Verdict::Sound, "{}", info.digest))
            .unwrap();
        // Nothing takes room that cannot be given back.
        let left = cache.gc(0).unwrap();
        assert_eq!(left, 0, "left: {:?}", power::files(dir));
        assert_eq!(cache.published(), []);
        for dir in [
            layout.sealed_dir(),
            layout.partial_dir(),
            layout.notes_dir(),
        ] {
            assert_eq!(power::files(&dir), [] as [PathBuf; 0], "left behind");
        }
    }
}

fn open(dir: &Path, limit: u64) -> Result<Cache, CacheError> {
    Cache::open(CacheConfig {
        dir: dir.to_owned(),
        limit,
    })
}

/// Something that this layer does, from a directory that was made ready.
struct Scenario {
    name: &'static str,
    ready: fn(&World, &Path),
    act: fn(&World, &Path) -> Result<(), CacheError>,
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "a new cache, an artifact in it",
        ready: |_, _| {},
        act: |world, dir| {
            let cache = open(dir, 1 << 30)?;
            world.artifact(&cache, &world.manifest_a, &world.a)
        },
    },
    Scenario {
        name: "a partial blob of an earlier run, some of it damaged, and a sealed one that rotted",
        ready: |world, dir| {
            let cache = open(dir, 1 << 30).unwrap();
            world.artifact(&cache, &world.manifest_b, &world.b).unwrap();
            let entry = Arc::new(cache.entry(&world.a, world.size(&world.a)).unwrap());
            let part = ByteRange::new(CHUNK as u64, 4 * CHUNK as u64);
            let bytes = &world.bytes(&world.a)[part.start() as usize..part.end() as usize];
            entry.writer(part).unwrap().push(bytes).unwrap();
            rot(&cache.layout().data(&world.a), 2 * CHUNK as u64);
            rot(&cache.layout().sealed(&world.b), 5);
        },
        act: |world, dir| {
            let cache = open(dir, 1 << 30)?;
            let mut wrong = 0;
            cache.verify(|_, verdict| wrong += usize::from(verdict == Verdict::Removed))?;
            world.fill(&cache, &world.a)?;
            world.artifact(&cache, &world.manifest_b, &world.b)
        },
    },
    Scenario {
        name: "a blob whose digest is wrong, while another process reads it",
        ready: |_, dir| drop(open(dir, 1 << 30)),
        act: |world, dir| {
            let (cache, other) = (open(dir, 1 << 30)?, open(dir, 1 << 30)?);
            let size = world.size(&world.a);
            let entry = Arc::new(cache.entry(&world.a, size)?);
            let read = other.entry(&world.a, size)?;
            let bytes = falsified(world.bytes(&world.a));
            entry.writer(ByteRange::new(0, size))?.push(&bytes)?;
            entry.discard();
            read.refresh(ByteRange::new(0, size))?;
            drop((read, entry));
            world.fill(&cache, &world.a)
        },
    },
    Scenario {
        name: "an eviction of an artifact for the room of another",
        ready: |world, dir| {
            let cache = open(dir, 1 << 30).unwrap();
            world.artifact(&cache, &world.manifest_b, &world.b).unwrap();
            let old = fs::File::open(cache.layout().sealed(&world.b)).unwrap();
            let times = fs::FileTimes::new().set_accessed(SystemTime::UNIX_EPOCH);
            old.set_times(times).unwrap();
        },
        act: |world, dir| {
            let cache = open(dir, world.size(&world.a) + 40_000)?;
            world.artifact(&cache, &world.manifest_a, &world.a)
        },
    },
    Scenario {
        name: "a layer that is unpacked",
        ready: |_, dir| drop(open(dir, 1 << 30)),
        act: |world, dir| {
            let cache = open(dir, 1 << 30)?;
            let Unpacking::Ours(mut unpacker) = cache.unpack(&world.b)? else {
                panic!("nobody else is there");
            };
            for piece in world.bytes(&world.unpacked).chunks(10_000) {
                unpacker.push(piece)?;
            }
            drop(unpacker.finish(&world.unpacked)?);
            promise(Promise::Sealed(world.unpacked));
            Ok(())
        },
    },
    Scenario {
        name: "a tag that moves, and what it showed is removed",
        ready: |world, dir| {
            let cache = open(dir, 1 << 30).unwrap();
            world.artifact(&cache, &world.manifest_a, &world.a).unwrap();
        },
        act: |world, dir| {
            let cache = open(dir, 1 << 30)?;
            world.artifact(&cache, &world.manifest_b, &world.b)?;
            cache.remove(&world.a)?;
            cache.remove(&world.manifest_a)?;
            cache.gc(1 << 20)?;
            Ok(())
        },
    },
];

fn rot(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(ROT, at).unwrap();
}

/// A directory in memory: these tests sync thousands of times.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm")
}

/// Runs a scenario in a directory of its own that was made ready, with this fault.
fn run(world: &World, scenario: &Scenario, dir: &Path, fault: Option<(usize, Fault)>) -> Run {
    (scenario.ready)(world, dir);
    let files = Disk::of(dir).numbers();
    faults::run(fault, &files, || {
        let outcome = (scenario.act)(world, dir);
        if fault.is_none() {
            outcome.unwrap_or_else(|error| panic!("{}: {error}", scenario.name));
        }
    })
}

/// Says what was done when a check fails.
struct Told(String);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was: {}", self.0);
        }
    }
}

#[test]
fn every_step_may_fail_or_be_the_last() {
    let world = world();
    let (mut steps, mut cases) = (0, 0);
    for scenario in SCENARIOS {
        let honest = run(&world, scenario, &scratch().path().join("c"), None);
        steps += honest.steps;
        for at in 0..honest.steps {
            let torn = honest.writes.contains(&at).then_some(Fault::Torn);
            let faults = [libc::EIO, libc::ENOSPC, libc::EROFS].map(Fault::Once);
            let faults = faults
                .into_iter()
                .chain([Fault::Dead(libc::EIO)])
                .chain(torn);
            for fault in faults {
                let _told = Told(format!("{}: {fault:?} at step {at}", scenario.name));
                // A busy machine may be a step short: what was found out about the directory holds for some milliseconds.
                let tries = (0..5).map(|_| {
                    let dir = scratch();
                    let run = run(&world, scenario, &dir.path().join("c"), Some((at, fault)));
                    (dir, run)
                });
                let hit = tries.into_iter().find(|(_, run)| run.hit);
                let (dir, run) = hit.expect("there is such a step");
                let dir = dir.path().join("c");
                let killed = !matches!(fault, Fault::Once(_));
                world.inspect(&dir, &run.promises(), killed);
                cases += 1;
            }
        }
    }
    println!(
        "{} scenarios, {steps} steps, {cases} faults",
        SCENARIOS.len()
    );
}

#[test]
fn the_power_may_go_after_every_step() {
    let world = world();
    let (mut points, mut cases) = (0, 0);
    for scenario in SCENARIOS {
        let dir = scratch();
        let dir = dir.path().join("c");
        (scenario.ready)(&world, &dir);
        let mut disk = Disk::of(&dir);
        let honest = faults::run(None, &disk.numbers(), || {
            (scenario.act)(&world, &dir).unwrap();
        });
        let mut promises = Vec::new();
        for at in 0..=honest.events.len() {
            let draws = (0..5).map(|seed| Loss::Drawn(seed * 1000 + at as u64 + 1));
            for loss in [Loss::All, Loss::Bytes, Loss::Names]
                .into_iter()
                .chain(draws)
            {
                let _told = Told(format!("{}: {loss:?} after event {at}", scenario.name));
                fs::remove_dir_all(&dir).ok();
                disk.clone().restore(loss);
                world.inspect(&dir, &promises, false);
                cases += 1;
            }
            points += 1;
            if let Some(event) = honest.events.get(at) {
                disk.apply(event);
                if let faults::Event::Promised(promise) = event {
                    promises.push(promise.clone());
                }
            }
        }
    }
    println!(
        "{} scenarios, {points} points, {cases} losses of power",
        SCENARIOS.len()
    );
}
