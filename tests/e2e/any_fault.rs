//! Any reads with any faults, through a real mount and real HTTP: the right bytes or an error in time, and nothing wrong is kept.
//!
//! `src/blob/fault_tests.rs` has the same with scripted servers, in many more cases. They are the same ones each time,
//! so that a change is told from chance; `OCIFS_TEST_SEED` chooses others.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rustix::io::Errno;

use crate::support::artifact::{Artifact, DOCKER_SAFETENSORS, Layer};
use crate::support::content::{Content, digest_file};
use crate::support::mount::Mount;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, heavy, scale, scratch, within};

/// Blobs of one artifact, each a case of its own.
const BLOBS: usize = 50;
/// Cases at a time: most of their time they wait.
const AT_ONCE: usize = 12;
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// Who sends a wrong byte.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    Never,
    Once,
    Always,
}

#[derive(Clone, Debug)]
struct Case {
    size: u64,
    lie: Lie,
    /// Thousandths of the blob.
    lie_at: u64,
    /// In order of the requests for the blob.
    faults: Vec<Option<Fault>>,
    /// Of each reader: start and length in thousandths.
    readers: Vec<Vec<(u64, u64)>>,
    strict: bool,
}

fn fault() -> impl Strategy<Value = Option<Fault>> {
    let status = |code: u16| Fault::Status(code, vec![]);
    let codes = vec![401, 403, 404, 408, 416, 429, 500, 502, 503, 504];
    prop_oneof![
        4 => Just(None),
        2 => proptest::sample::select(codes).prop_map(move |code| Some(status(code))),
        1 => (0..3_u32).prop_map(|wait| {
            Some(Fault::Status(429, vec![("Retry-After".into(), wait.to_string())]))
        }),
        1 => (0..1500_u64).prop_map(|millis| Some(Fault::Delay(Duration::from_millis(millis)))),
        2 => (0..300_000_u64).prop_map(|at| Some(Fault::Reset(at))),
        2 => (0..300_000_u64).prop_map(|at| Some(Fault::Truncate(at))),
        1 => (0..300_000_u64).prop_map(|at| Some(Fault::Stall(at))),
        1 => (1..100_000_u64).prop_map(|by| Some(Fault::ShiftRange(by))),
        1 => (1..1000_u64).prop_map(|by| Some(Fault::Longer(by))),
        1 => Just(Some(Fault::IgnoreRange)),
        1 => Just(Some(Fault::RedirectLoop)),
        1 => (20_000..400_000_u64).prop_map(|rate| Some(Fault::Throttle(rate))),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let lie = prop_oneof![
        4 => Just(Lie::Never),
        1 => Just(Lie::Once),
        1 => Just(Lie::Always),
    ];
    let reader = vec((0..1000_u64, 1..1001_u64), 1..4);
    (
        1..300_000_u64,
        lie,
        0..1000_u64,
        vec(fault(), 0..5),
        vec(reader, 1..4),
        prop::bool::weighted(0.3),
    )
        .prop_map(|(size, lie, lie_at, faults, readers, strict)| Case {
            size,
            lie,
            lie_at,
            faults,
            readers,
            strict,
        })
}

/// What happened in all cases together.
#[derive(Debug, Default)]
struct Tally {
    cases: AtomicUsize,
    faults: AtomicUsize,
    reads: AtomicUsize,
    errors: AtomicUsize,
    wrong: AtomicUsize,
    lied: AtomicUsize,
}

struct Site {
    proxy: Proxy,
    /// Early and strict.
    mounts: [Mount; 2],
    tally: Tally,
}

impl Site {
    /// One case on a blob that is nobody else's.
    fn run(&self, case: &Case, name: &str, digest: &str, content: Content) {
        let mount = &self.mounts[usize::from(case.strict)];
        let below = format!("{}/{name}", self.proxy.host());
        let wrong_at = case.size * case.lie_at / 1000;
        for (nth, fault) in case.faults.iter().enumerate() {
            if let Some(fault) = fault {
                self.proxy.after(digest, nth, 1, fault.clone());
                self.tally.faults.fetch_add(1, Ordering::Relaxed);
            }
        }
        let lies = match case.lie {
            Lie::Never => 0,
            Lie::Once => 1,
            Lie::Always => usize::MAX,
        };
        if lies > 0 {
            self.proxy.times(digest, lies, Fault::Corrupt(wrong_at));
            self.tally.lied.fetch_add(1, Ordering::Relaxed);
        }
        let right = content.bytes(0, case.size as usize);
        let fits = |start: u64, found: &[u8]| {
            let right = &right[start as usize..start as usize + found.len()];
            let mut wrong = (0..found.len()).filter(|&at| found[at] != right[at]);
            match wrong.next() {
                None => true,
                Some(at) => {
                    self.tally.wrong.fetch_add(1, Ordering::Relaxed);
                    lies > 0
                        && !case.strict
                        && start + at as u64 == wrong_at
                        && wrong.next().is_none()
                }
            }
        };
        std::thread::scope(|scope| {
            for reads in &case.readers {
                let (fits, path) = (&fits, mount.path(&below));
                scope.spawn(move || {
                    for &(start, len) in reads {
                        let start = case.size * start / 1000;
                        let len = (case.size * len / 1000).clamp(1, case.size - start);
                        self.tally.reads.fetch_add(1, Ordering::Relaxed);
                        let begun = Instant::now();
                        match read(&path, start, len as usize) {
                            Ok(found) => {
                                assert!(found.len() as u64 == len, "{case:?}: a short read");
                                assert!(fits(start, &found), "{case:?}: wrong bytes");
                            }
                            Err(error) => {
                                self.tally.errors.fetch_add(1, Ordering::Relaxed);
                                let known = [Errno::IO, Errno::ACCESS, Errno::TIMEDOUT]
                                    .map(|errno| Some(errno.raw_os_error()));
                                assert!(known.contains(&error.raw_os_error()), "{case:?}: {error}");
                            }
                        }
                        let took = begun.elapsed();
                        // Opening, and twice the read: the kernel asks again for a page that failed as read-ahead.
                        assert!(took < 4 * READ_TIMEOUT, "{case:?}: {took:?}");
                    }
                });
            }
        });
        // The server becomes as good as it gets: then the blob is there, or known to be wrong.
        let path = mount.path(&below);
        if case.lie == Lie::Always {
            self.proxy.forget(digest);
            self.proxy.always(digest, Fault::Corrupt(wrong_at));
            eventually(PATIENCE, &format!("{case:?}: reads fail"), || {
                read(&path, 0, case.size as usize).err()
            });
        } else {
            self.proxy.forget(digest);
            eventually(PATIENCE, &format!("{case:?}: it is read right"), || {
                let found = read(&path, 0, case.size as usize).ok()?;
                (found == right).then_some(())
            });
        }
        self.proxy.forget(digest);
        self.tally.cases.fetch_add(1, Ordering::Relaxed);
    }
}

fn read(path: &Path, start: u64, len: usize) -> io::Result<Vec<u8>> {
    let path = path.to_owned();
    within(PATIENCE * 2, "a read", move || {
        let mut bytes = vec![0; len];
        fs::File::open(path)?.read_exact_at(&mut bytes, start)?;
        Ok(bytes)
    })
}

fn seed() -> u64 {
    let told = std::env::var("OCIFS_TEST_SEED");
    told.map_or(0x5eed, |seed| {
        seed.parse().expect("OCIFS_TEST_SEED is a number")
    })
}

#[test]
fn any_reads_with_any_faults_are_right_or_fail_in_time() {
    let _alone = heavy();
    let seed = seed();
    eprintln!("OCIFS_TEST_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let registry = Registry::open();
    let caches = [scratch("early"), scratch("strict")];
    let flags = |verify: &'static str| {
        let times = "stall-timeout=1s,connect-timeout=3s";
        ["-o", times, "--read-timeout", "15s", "--verify", verify]
    };
    let site = Site {
        proxy: Proxy::start(registry.address()),
        mounts: [
            Mount::start(caches[0].path(), flags("early")),
            Mount::start(caches[1].path(), flags("strict")),
        ],
        tally: Tally::default(),
    };
    for round in 0..scale(10, 100) {
        let cases: Vec<Case> = (0..BLOBS)
            .map(|_| case().new_tree(&mut runner).unwrap().current())
            .collect();
        let content = |nth: usize| Content::new(seed.wrapping_add((round * BLOBS + nth) as u64));
        let layers = cases.iter().enumerate().map(|(nth, case)| {
            Layer::bytes(
                DOCKER_SAFETENSORS,
                content(nth).bytes(0, case.size as usize),
            )
            .at(&format!("{nth}.bin"))
        });
        let name = format!("org/m{round}:v1");
        let published = Artifact::docker_v02()
            .layers(layers)
            .publish(&registry, &name);
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    loop {
                        let nth = next.fetch_add(1, Ordering::Relaxed);
                        let Some(case) = cases.get(nth) else { return };
                        let below = format!("{name}/{nth}.bin");
                        site.run(case, &below, &published.layers[nth], content(nth));
                    }
                });
            }
        });
    }
    eprintln!("{:?}", site.tally);
    let [early, strict] = site.mounts;
    early.unmount();
    strict.unmount();
    for cache in &caches {
        for file in fs::read_dir(cache.path().join("blobs/sha256")).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.len() == 64 {
                assert_eq!(
                    digest_file(&path),
                    format!("sha256:{name}"),
                    "sealed and wrong"
                );
            }
        }
    }
}
