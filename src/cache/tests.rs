//! The cache as its users see it, several handles standing for several processes.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::base::ByteRange;

fn content(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed)
        .collect()
}

fn cache(dir: &Path, limit: u64) -> Cache {
    Cache::open(CacheConfig {
        dir: dir.to_owned(),
        limit,
    })
    .unwrap()
}

fn whole(entry: &Entry) -> ByteRange {
    ByteRange::new(0, entry.size())
}

/// Puts a blob in through the front door and seals it.
fn sealed(cache: &Cache, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let entry = Arc::new(cache.entry(&digest, bytes.len() as u64).unwrap());
    entry.writer(whole(&entry)).unwrap().push(bytes).unwrap();
    entry.seal().unwrap();
    digest
}

#[test]
fn bytes_become_present_chunk_by_chunk_and_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 1 << 30);
    let bytes = content(1, 100_000);
    let digest = Digest::of(&bytes);
    let entry = Arc::new(cache.entry(&digest, 100_000).unwrap());
    assert_eq!(entry.missing(whole(&entry)), [whole(&entry)]);
    let mut writer = entry.writer(whole(&entry)).unwrap();
    // Pieces of every awkward length.
    let mut at = 0;
    for len in [1, 16383, 1, 16384, 40_000, 20_000, 100_000] {
        let end = (at + len).min(bytes.len());
        writer.push(&bytes[at..end]).unwrap();
        at = end;
        let ready = if at == bytes.len() {
            at
        } else {
            at / 16384 * 16384
        };
        assert_eq!(entry.present(whole(&entry)), ready as u64);
        if ready > 0 {
            let range = ByteRange::new(ready as u64 / 2, ready as u64);
            assert_eq!(entry.read(range).unwrap().unwrap(), bytes[ready / 2..ready]);
        }
        if ready < bytes.len() {
            assert!(
                entry
                    .read(ByteRange::new(0, ready as u64 + 1))
                    .unwrap()
                    .is_none()
            );
        }
    }
    assert!(entry.missing(whole(&entry)).is_empty());
}

#[test]
fn pieces_written_at_once_are_what_they_are_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(3, 200_000);
    let digest = Digest::of(&bytes);
    // From the start and from a place within a chunk; one chunk is there before, or none.
    for (first, there) in [(0, None), (0, Some(3)), (70_000, None), (70_000, Some(5))] {
        let cache = cache(&dir.path().join(format!("{first} {there:?}")), 1 << 30);
        let entry = Arc::new(cache.entry(&digest, bytes.len() as u64).unwrap());
        if let Some(chunk) = there {
            let range = ByteRange::at(chunk * 16384, 16384);
            let part = &bytes[range.start() as usize..range.end() as usize];
            entry.writer(range).unwrap().push(part).unwrap();
        }
        let mut writer = entry.writer(whole(&entry)).unwrap();
        writer.push(&bytes[..first]).unwrap();
        let (mut at, mut pieces) = (first, Vec::new());
        for len in [1, 0, 16383, 16384, 7, 100, 65536].into_iter().cycle() {
            let end = (at + len).min(bytes.len());
            pieces.push(Bytes::copy_from_slice(&bytes[at..end]));
            at = end;
            if pieces.len() == 3 || at == bytes.len() {
                writer.push_pieces(&std::mem::take(&mut pieces)).unwrap();
                assert_eq!(writer.position(), at as u64);
            }
            if at == bytes.len() {
                break;
            }
        }
        assert_eq!(entry.read(whole(&entry)).unwrap().unwrap(), bytes);
        drop((writer, entry));
        // The checksums on disk are right, too.
        cache
            .verify(|_, verdict| assert_eq!(verdict, Verdict::Sound))
            .unwrap();
        assert_eq!(
            cache.present(&digest, bytes.len() as u64),
            bytes.len() as u64
        );
    }
}

#[test]
fn a_second_process_sees_the_bytes_and_a_remount_finds_them() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (cache(dir.path(), 1 << 30), cache(dir.path(), 1 << 30));
    let bytes = content(2, 100_000);
    let digest = Digest::of(&bytes);
    let writing = Arc::new(a.entry(&digest, 100_000).unwrap());
    let reading = b.entry(&digest, 100_000).unwrap();
    let part = ByteRange::new(16384, 65536);
    writing
        .writer(part)
        .unwrap()
        .push(&bytes[16384..65536])
        .unwrap();
    assert!(!reading.has(part));
    reading.refresh(part).unwrap();
    assert_eq!(reading.read(part).unwrap().unwrap(), bytes[16384..65536]);
    drop((writing, reading));
    let again = cache(dir.path(), 1 << 30).entry(&digest, 100_000).unwrap();
    assert_eq!(
        again.missing(whole(&again)),
        [ByteRange::new(0, 16384), ByteRange::new(65536, 100_000)]
    );
    assert_eq!(again.read(part).unwrap().unwrap(), bytes[16384..65536]);
}

#[test]
fn what_is_there_is_not_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 1 << 30);
    let bytes = content(3, 70_000);
    let digest = Digest::of(&bytes);
    let entry = Arc::new(cache.entry(&digest, 70_000).unwrap());
    entry
        .writer(ByteRange::new(16384, 32768))
        .unwrap()
        .push(&bytes[16384..32768])
        .unwrap();
    // A stream that passes by with other bytes at that place must not change them.
    let mut stream = bytes.clone();
    stream[16384..32768].fill(0);
    let mut writer = entry.writer(whole(&entry)).unwrap();
    for piece in stream.chunks(10_001) {
        writer.push(piece).unwrap();
    }
    assert_eq!(writer.position(), 70_000);
    assert_eq!(entry.read(whole(&entry)).unwrap().unwrap(), bytes);
}

#[test]
fn damage_is_found_on_first_use_and_counts_as_absent() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(4, 50_000);
    let digest = Digest::of(&bytes);
    {
        let cache = cache(dir.path(), 1 << 30);
        let entry = Arc::new(cache.entry(&digest, 50_000).unwrap());
        entry.writer(whole(&entry)).unwrap().push(&bytes).unwrap();
    }
    let cache = cache(dir.path(), 1 << 30);
    let data = fs::OpenOptions::new()
        .write(true)
        .open(cache.layout().data(&digest))
        .unwrap();
    data.write_all_at(b"!", 20_000).unwrap();
    let entry = cache.entry(&digest, 50_000).unwrap();
    assert!(entry.missing(whole(&entry)).is_empty());
    assert_eq!(
        entry.read(ByteRange::new(0, 16384)).unwrap().unwrap(),
        bytes[..16384]
    );
    assert!(entry.read(whole(&entry)).unwrap().is_none());
    assert_eq!(entry.missing(whole(&entry)), [ByteRange::new(16384, 32768)]);
    entry.refresh(whole(&entry)).unwrap();
    assert_eq!(
        entry.missing(whole(&entry)),
        [ByteRange::new(16384, 32768)],
        "dropped for all processes"
    );
}

#[test]
fn a_sealed_blob_is_a_file_of_the_layout_for_everybody() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (cache(dir.path(), 1 << 30), cache(dir.path(), 1 << 30));
    let bytes = content(5, 50_000);
    let digest = Digest::of(&bytes);
    let other = b.entry(&digest, 50_000).unwrap();
    assert_eq!(sealed(&a, &bytes), digest);
    assert_eq!(
        fs::read(dir.path().join("blobs/sha256").join(digest.hex())).unwrap(),
        bytes
    );
    assert_eq!(fs::read_dir(a.layout().partial_dir()).unwrap().count(), 0);
    other.refresh(whole(&other)).unwrap();
    assert!(other.is_sealed());
    assert_eq!(other.read(whole(&other)).unwrap().unwrap(), bytes);
    assert!(b.entry(&digest, 50_000).unwrap().is_sealed());
    assert!(
        matches!(
            b.entry(&digest, 49_999),
            Err(CacheError::WrongLength { .. })
        ),
        "a descriptor that lies"
    );
}

#[test]
fn a_discarded_blob_leaves_nothing_and_can_begin_again() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (cache(dir.path(), 1 << 30), cache(dir.path(), 1 << 30));
    let digest = Digest::of(b"something else");
    let entry = Arc::new(a.entry(&digest, 50_000).unwrap());
    let other = b.entry(&digest, 50_000).unwrap();
    entry
        .writer(whole(&entry))
        .unwrap()
        .push(&content(6, 50_000))
        .unwrap();
    entry.discard();
    assert!(entry.is_discarded());
    other.refresh(whole(&other)).unwrap();
    assert!(other.is_discarded());
    assert_eq!(fs::read_dir(a.layout().partial_dir()).unwrap().count(), 0);
    let anew = a.entry(&digest, 50_000).unwrap();
    assert_eq!(anew.missing(whole(&anew)), [whole(&anew)]);
    other.discard();
    assert!(
        a.layout().data(&digest).exists(),
        "the new one is not the old one's to remove"
    );
}

#[test]
fn whoever_opens_a_blob_that_is_being_discarded_does_not_wait_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (cache(dir.path(), 1 << 30), cache(dir.path(), 1 << 30));
    let digest = Digest::of(b"something else");
    let entry = Arc::new(a.entry(&digest, 50_000).unwrap());
    let part = content(6, 50_000);
    entry.writer(whole(&entry)).unwrap().push(&part).unwrap();
    // Another process has found it wrong and said so, and was stopped before it took the files away.
    let map = fs::OpenOptions::new().write(true).open(
        a.layout()
            .partial_dir()
            .join(format!("{}.map", digest.hex())),
    );
    map.unwrap().write_all_at(&2_u32.to_le_bytes(), 56).unwrap();
    let anew = Arc::new(b.entry(&digest, 50_000).unwrap());
    assert_eq!(anew.missing(whole(&anew)), [whole(&anew)]);
    // It goes on and takes away what is its own to take.
    entry.refresh(whole(&entry)).unwrap();
    assert!(entry.is_discarded());
    entry.discard();
    assert!(a.layout().data(&digest).exists() && a.layout().map(&digest).exists());
    anew.writer(whole(&anew)).unwrap().push(&part).unwrap();
    drop((entry, anew));
    let kept = b.entry(&digest, 50_000).unwrap();
    assert!(kept.has(whole(&kept)), "the new one kept its map");
}

#[test]
fn a_stale_map_does_not_vouch_for_new_data() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 1 << 30);
    let bytes = content(7, 50_000);
    let digest = Digest::of(&bytes);
    let entry = Arc::new(cache.entry(&digest, 50_000).unwrap());
    entry.writer(whole(&entry)).unwrap().push(&bytes).unwrap();
    drop(entry);
    fs::remove_file(cache.layout().data(&digest)).unwrap();
    let entry = cache.entry(&digest, 50_000).unwrap();
    assert_eq!(entry.missing(whole(&entry)), [whole(&entry)]);
}

#[test]
fn the_least_recently_used_goes_and_what_is_open_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mib = 1 << 20;
    let cache = cache(dir.path(), 9 * mib);
    let blobs: Vec<_> = (0..3)
        .map(|seed| content(seed, 2 * mib as usize + 4096))
        .collect();
    let digests: Vec<_> = blobs.iter().map(|bytes| sealed(&cache, bytes)).collect();
    let age = |digest: &Digest, seconds| {
        let file = fs::File::open(cache.layout().sealed(digest)).unwrap();
        let past = SystemTime::now() - Duration::from_secs(seconds);
        file.set_times(fs::FileTimes::new().set_accessed(past))
            .unwrap();
    };
    age(&digests[0], 30);
    age(&digests[1], 3000);
    age(&digests[2], 300);
    let open = cache.entry(&digests[1], blobs[1].len() as u64).unwrap();
    age(&digests[1], 3000);
    let new = sealed(&cache, &content(9, 4 * mib as usize));
    let sealed_now = |digest: &Digest| cache.is_sealed(digest);
    assert!(!sealed_now(&digests[2]), "the oldest that nobody uses");
    assert!(sealed_now(&digests[1]), "older, but open");
    assert!(sealed_now(&digests[0]) && sealed_now(&new));
    assert_eq!(open.read(whole(&open)).unwrap().unwrap(), blobs[1]);
    assert!(cache.usage().allocated <= 9 * mib);
    assert!(matches!(
        cache.remove(&digests[1]),
        Err(CacheError::InUse { .. })
    ));
    drop(open);
    cache.remove(&digests[1]).unwrap();
    assert!(matches!(
        cache.remove(&digests[1]),
        Err(CacheError::Absent { .. })
    ));
}

#[test]
fn a_blob_that_cannot_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 1 << 20);
    let entry = Arc::new(cache.entry(&Digest::of(b"large"), 8 << 20).unwrap());
    assert!(matches!(
        entry.writer(whole(&entry)),
        Err(CacheError::Full { .. })
    ));
    assert!(entry.writer(ByteRange::new(0, 65536)).is_ok());
}

#[test]
fn eviction_takes_the_artifact_out_of_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 1 << 30);
    let blob = sealed(&cache, &content(1, 2 << 20));
    let manifest = format!(r#"{{"layers":[{{"digest":"{blob}"}}]}}"#);
    let digest = Digest::of(manifest.as_bytes());
    cache.put(&digest, manifest.as_bytes());
    let other = Digest::of(b"{}");
    cache.put(&other, b"{}");
    cache.publish(
        "ghcr.io/o/m:v1",
        "application/vnd.oci.image.manifest.v1+json",
        &digest,
        9,
        None,
    );
    cache.publish(
        "ghcr.io/o/n:v1",
        "application/vnd.oci.image.manifest.v1+json",
        &other,
        2,
        None,
    );
    assert_eq!(cache.published().len(), 2);
    cache.remove(&blob).unwrap();
    assert_eq!(
        cache.published(),
        [Published {
            name: "ghcr.io/o/n:v1".into(),
            digest: other
        }]
    );
}

#[test]
fn verify_removes_what_rotted() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 1 << 30);
    let good = sealed(&cache, &content(1, 3 << 20));
    let bad = sealed(&cache, &content(2, 3 << 20));
    let partial = content(3, 3 << 20);
    let partial_digest = Digest::of(&partial);
    {
        let entry = Arc::new(cache.entry(&partial_digest, 3 << 20).unwrap());
        entry
            .writer(ByteRange::new(0, 1 << 20))
            .unwrap()
            .push(&partial[..1 << 20])
            .unwrap();
        entry
            .writer(ByteRange::new(2 << 20, 3 << 20))
            .unwrap()
            .push(&partial[2 << 20..])
            .unwrap();
    }
    let rot = |path: PathBuf| {
        fs::OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .write_all_at(b"?", 100)
            .unwrap()
    };
    rot(cache.layout().sealed(&bad));
    rot(cache.layout().data(&partial_digest));
    let mut verdicts = Vec::new();
    cache
        .verify(|info, verdict| verdicts.push((info.digest, verdict)))
        .unwrap();
    verdicts.sort();
    let mut expected = [
        (good, Verdict::Sound),
        (bad, Verdict::Removed),
        (partial_digest, Verdict::Removed),
    ];
    expected.sort_by_key(|(digest, _)| *digest);
    assert_eq!(verdicts, expected);
    assert!(cache.is_sealed(&good) && !cache.is_sealed(&bad));
    let entry = cache.entry(&partial_digest, 3 << 20).unwrap();
    assert_eq!(
        entry.missing(whole(&entry)),
        [ByteRange::new(0, 16384), ByteRange::new(1 << 20, 2 << 20)]
    );
    assert!(cache.get(&good, 4 << 20).is_some());
    assert!(cache.get(&good, 1 << 20).is_none());
}

#[test]
fn many_openers_at_once_agree_on_one_pair_of_files() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..20u8 {
        let bytes = content(round, 40_000);
        let digest = Digest::of(&bytes);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (dir, bytes, digest) = (dir.path(), &bytes, &digest);
                scope.spawn(move || {
                    let cache = cache(dir, 1 << 30);
                    let entry = Arc::new(cache.entry(digest, 40_000).unwrap());
                    let part = ByteRange::new(
                        (thread % 3) * 16384,
                        ((thread % 3 + 1) * 16384).min(40_000),
                    );
                    if !entry.is_sealed() {
                        let slice = &bytes[part.start() as usize..part.end() as usize];
                        entry.writer(part).unwrap().push(slice).unwrap();
                    }
                });
            }
        });
        let entry = cache(dir.path(), 1 << 30).entry(&digest, 40_000).unwrap();
        assert_eq!(entry.read(whole(&entry)).unwrap().unwrap(), bytes);
    }
}

#[test]
fn what_is_sealed_is_the_file_that_was_hashed_and_no_other_of_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(7, 100_000);
    let digest = Digest::of(&bytes);
    let a = cache(dir.path(), 1 << 30);
    let whole_one = Arc::new(a.entry(&digest, 100_000).unwrap());
    whole_one
        .writer(whole(&whole_one))
        .unwrap()
        .push(&bytes)
        .unwrap();
    // Somebody removes the directory below a daemon, and another one begins the same blob anew.
    fs::remove_dir_all(dir.path()).unwrap();
    let b = cache(dir.path(), 1 << 30);
    let begun = Arc::new(b.entry(&digest, 100_000).unwrap());
    let part = ByteRange::new(0, 16384);
    begun.writer(part).unwrap().push(&bytes[..16384]).unwrap();
    assert!(whole_one.seal().is_err());
    assert!(!b.is_sealed(&digest), "a blob with holes was sealed");
    let rest = ByteRange::new(16384, 100_000);
    begun.writer(rest).unwrap().push(&bytes[16384..]).unwrap();
    begun.seal().unwrap();
    assert_eq!(
        fs::read(b.layout().sealed(&digest)).unwrap(),
        bytes,
        "and the other one is not hindered"
    );
}

/// Threads, each with descriptors of its own, are to each other as processes are.
#[test]
fn what_somebody_is_writing_is_not_swept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 1 << 30);
    let layer = Digest::of(b"layer");
    let path = dir
        .path()
        .join(format!("ocifs/unpacked/{}.tar", layer.hex()));
    let over = std::sync::atomic::AtomicBool::new(false);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(relaxed) {
                    cache.sweep();
                }
            });
        }
        let began = std::time::Instant::now();
        let mut lost = Vec::new();
        let mut rounds = 0;
        while lost.is_empty() && began.elapsed() < std::time::Duration::from_secs(3) {
            rounds += 1;
            let note = dir.path().join("ocifs/notes/note");
            if let Err(error) = super::layout::replace(&note, b"{}") {
                lost.push(format!("a note: {error}"));
            }
            // As a crash leaves one.
            std::fs::write(&path, "left").unwrap();
            let Ok(Unpacking::Ours(mut unpacker)) = cache.unpack(&layer) else {
                continue;
            };
            unpacker.push(b"live").unwrap();
            std::thread::yield_now();
            if unpacker.growing().len() != 4 || !path.exists() {
                lost.push("a layer that is being unpacked".to_owned());
            }
        }
        over.store(true, relaxed);
        println!("{rounds} rounds");
        assert!(lost.is_empty(), "{lost:?} in round {rounds}");
    });
}

#[test]
fn what_does_not_fit_in_any_case_drives_nothing_small_out() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 8 * MIB);
    let manifest = Digest::of(b"{}");
    cache.put(&manifest, b"{}");
    let closed = content(7, 2 << 20);
    let closed = sealed(&cache, &closed);
    let entry = cache.entry(&Digest::of(b"large"), 64 * MIB);
    let entry = Arc::new(entry.unwrap());
    let fill = |at: u64| entry.writer(ByteRange::at(at * MIB, MIB)).map(drop);
    let full = (0..64).find(|at| fill(*at).is_err()).unwrap();
    assert!(full > 5, "what is closed has made room: {full}");
    assert!(!cache.is_sealed(&closed) && cache.is_sealed(&manifest));
    let usage = cache.usage();
    assert!(usage.allocated <= usage.limit, "{usage:?}");
}
