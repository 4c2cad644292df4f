//! What is tried, and what must hold at the end of each schedule.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use shuttle::future::{block_on, spawn, yield_now};
use shuttle::rand::Rng as _;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, MaxSteps, Runner};

use crate::base::rt::timeout;
use crate::base::{ByteRange, Digest};
use crate::blob::{BlobConfig, BlobError, Blobs, Event, Prefetch, Verified};
use crate::cache::{Cache, CacheConfig};
use crate::registry::{Registry, Repository, Server};

const KIB: u64 = 1 << 10;
/// Six chunks of the cache, the last of them short; three parts.
const SIZE: u64 = 85 * KIB + 13;

/// One way that things can be.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Processes on one cache, and readers in each.
    processes: usize,
    readers: usize,
    /// All of the blob is wanted as well.
    completes: bool,
    /// Somebody evicts what nobody uses, all the time.
    evicts: bool,
    /// The cache's limit.
    limit: u64,
    memory: u64,
    /// The longest read.
    longest: u64,
    no_ranges: bool,
    cuts: Option<u32>,
    lies: u64,
    strict: bool,
    prefetch: bool,
    /// Half of the reads are given up in the middle, as those of killed readers are.
    killed: bool,
}

const CALM: Scenario = Scenario {
    processes: 1,
    readers: 3,
    completes: false,
    evicts: false,
    limit: 1 << 30,
    memory: 4 << 20,
    longest: SIZE,
    no_ranges: false,
    cuts: None,
    lies: 0,
    strict: false,
    prefetch: false,
    killed: false,
};

pub const ALL: &[(&str, Scenario)] = &[
    ("readers_share_what_is_under_way", CALM),
    (
        "a_blob_is_promoted_under_its_readers",
        Scenario {
            completes: true,
            prefetch: true,
            ..CALM
        },
    ),
    (
        "eviction_goes_on_beside_readers",
        Scenario {
            completes: true,
            evicts: true,
            ..CALM
        },
    ),
    (
        "two_processes_share_a_cache_by_claims",
        Scenario {
            processes: 2,
            readers: 2,
            completes: true,
            evicts: true,
            ..CALM
        },
    ),
    (
        "a_full_cache_and_little_memory_are_enough",
        Scenario {
            limit: 0,
            memory: 64 * KIB,
            ..CALM
        },
    ),
    (
        "bodies_are_cut_off",
        Scenario {
            cuts: Some(2),
            completes: true,
            ..CALM
        },
    ),
    (
        "one_stream_serves_all_where_ranges_are_ignored",
        Scenario {
            no_ranges: true,
            processes: 2,
            readers: 2,
            ..CALM
        },
    ),
    (
        "streams_pass_through_memory_where_ranges_are_ignored_and_the_cache_is_full",
        Scenario {
            no_ranges: true,
            limit: 0,
            // A stream keeps a quarter of it, and that a few reads, as the real numbers have it.
            memory: 256 * KIB,
            longest: 12 * KIB,
            ..CALM
        },
    ),
    (
        "wrong_bytes_are_thrown_away_and_fetched_again",
        Scenario {
            lies: 1,
            completes: true,
            ..CALM
        },
    ),
    (
        "strict_readers_see_no_wrong_byte",
        Scenario {
            lies: 1,
            strict: true,
            ..CALM
        },
    ),
    (
        "what_a_killed_reader_has_begun_comes_for_the_others",
        Scenario {
            killed: true,
            ..CALM
        },
    ),
    (
        "a_killed_reader_gives_its_memory_back",
        Scenario {
            killed: true,
            limit: 0,
            memory: 64 * KIB,
            ..CALM
        },
    ),
    (
        "a_killed_reader_ends_no_stream_that_others_read",
        Scenario {
            killed: true,
            no_ranges: true,
            ..CALM
        },
    ),
    (
        "content_that_stays_wrong_is_an_error",
        Scenario {
            lies: u64::MAX,
            completes: true,
            ..CALM
        },
    ),
];

/// Orders that are tried of a scenario for each seed: at random, and by random priorities that change at a few steps.
const RANDOM: usize = 30;
const PRIORITIES: usize = 20;

/// The seeds: `OCIFS_MODEL_SEEDS` of them. The same ones each time, so that a change is told from chance.
fn seeds() -> u64 {
    if std::env::var_os("SHUTTLE_RANDOM_SEED").is_some() {
        return 1; // which shuttle takes in place of ours
    }
    let full = std::env::var("OCIFS_TEST_SCALE").is_ok_and(|scale| scale == "full");
    let told = std::env::var("OCIFS_MODEL_SEEDS").ok();
    told.map_or(if full { 50 } else { 5 }, |told| told.parse().unwrap())
}

/// Tries a scenario in many orders.
pub fn check(name: &str, scenario: &Scenario) {
    let begun = std::time::Instant::now();
    let schedules = Arc::new(AtomicUsize::new(0));
    for seed in 1..=seeds() {
        let random = RandomScheduler::new_from_seed(seed, RANDOM);
        run(scenario, random, &schedules);
        let priorities = PctScheduler::new_from_seed(seed, 5, PRIORITIES);
        run(scenario, priorities, &schedules);
    }
    let schedules = schedules.load(Ordering::Relaxed);
    let took = begun.elapsed().as_secs_f64();
    println!("{name}: {schedules} schedules, {took:.1} s");
}

fn run(scenario: &Scenario, scheduler: impl Scheduler + 'static, schedules: &Arc<AtomicUsize>) {
    let mut config = Config::new();
    // Debug builds of futures in futures take their room.
    config.stack_size = 2 << 20;
    config.max_steps = MaxSteps::FailAfter(2_000_000);
    config.silence_warnings = true;
    let (scenario, schedules) = (*scenario, Arc::clone(schedules));
    Runner::new(scheduler, config).run(move || {
        one(&scenario);
        schedules.fetch_add(1, Ordering::Relaxed);
    });
}

fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at * at % 251) as u8).collect()
}

fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    tempfile::Builder::new()
        .prefix("ocifs-model-")
        .tempdir_in(base)
        .unwrap()
}

/// One schedule.
fn one(scenario: &Scenario) {
    let place = place();
    let bytes = content();
    let digest = Digest::of(&bytes);
    let server = Arc::new(Server {
        content: bytes.clone(),
        no_ranges: scenario.no_ranges,
        cuts: scenario.cuts,
        lies: AtomicU64::new(scenario.lies),
        ..Server::default()
    });
    let processes: Vec<_> = (0..scenario.processes)
        .map(|_| {
            let cache = Cache::open(CacheConfig {
                dir: place.path().join("cache"),
                limit: scenario.limit,
            });
            let config = BlobConfig {
                prefetch: if scenario.prefetch {
                    Prefetch::Blob
                } else {
                    Prefetch::None
                },
                strict: scenario.strict,
                memory: scenario.memory,
                ..BlobConfig::default()
            };
            Blobs::new(cache.unwrap(), Registry(Arc::clone(&server)), config)
        })
        .collect();
    let lied = scenario.lies > 0;
    let bytes = Arc::new(bytes);
    block_on(async {
        let mut tasks = Vec::new();
        let mut opened = Vec::new();
        for blobs in &processes {
            let blob = blobs.open(digest, SIZE, &Repository);
            opened.push(Arc::clone(&blob));
            for _ in 0..scenario.readers {
                let (blob, bytes) = (Arc::clone(&blob), Arc::clone(&bytes));
                let Scenario {
                    strict,
                    longest,
                    killed,
                    ..
                } = *scenario;
                tasks.push(spawn(async move {
                    for _ in 0..2 {
                        let start = shuttle::rand::thread_rng().gen_range(0..SIZE);
                        let len =
                            shuttle::rand::thread_rng().gen_range(1..=longest.min(SIZE - start));
                        let range = ByteRange::at(start, len);
                        let read = match blob.try_read(range) {
                            Some(read) => read,
                            None if killed && shuttle::rand::thread_rng().gen_bool(0.5) => {
                                let read = blob.read(range);
                                match timeout(Duration::from_millis(1), read).await {
                                    Ok(read) => read,
                                    Err(_) => continue,
                                }
                            }
                            None => blob.read(range).await,
                        };
                        let right = &bytes[start as usize..(start + len) as usize];
                        match read {
                            Ok(read) => assert!(read == right || lied && !strict, "wrong bytes"),
                            Err(error) => assert!(
                                lied && matches!(error, BlobError::Corrupt { .. }),
                                "{error}"
                            ),
                        }
                    }
                }));
            }
            if scenario.completes {
                tasks.push(spawn(async move {
                    match blob.complete().await {
                        Ok(()) => assert_eq!(blob.verified(), Verified::Yes),
                        Err(error) => {
                            assert!(
                                lied && matches!(error, BlobError::Corrupt { .. }),
                                "{error}"
                            );
                        }
                    }
                }));
            }
        }
        if scenario.evicts {
            let cache = processes[0].cache().clone();
            tasks.push(spawn(async move {
                for _ in 0..4 {
                    cache.evict(0).unwrap();
                    yield_now().await;
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        at_the_end(scenario, &processes, &server, digest).await;
        drop(opened);
    });
    let path = place.path().join("cache/blobs/sha256").join(digest.hex());
    if let Ok(sealed) = std::fs::read(path) {
        assert!(sealed == *bytes, "wrong bytes are sealed");
        assert!(
            scenario.lies < u64::MAX,
            "sealed although nobody sent it right"
        );
    } else {
        let must = scenario.completes && !scenario.evicts && scenario.lies < u64::MAX;
        assert!(!must, "complete and not sealed");
    }
}

/// What must hold when all readers have gone.
async fn at_the_end(scenario: &Scenario, processes: &[Blobs], server: &Server, digest: Digest) {
    // What was begun ahead of readers ends by itself.
    let idle =
        |blobs: &Blobs| blobs.memory().0 == 0 && blobs.live().iter().all(|blob| !blob.is_held());
    for round in 0.. {
        if processes.iter().all(idle) {
            break;
        }
        assert!(
            round < 20_000,
            "something goes on for ever, or memory is not given back"
        );
        crate::base::rt::sleep(Duration::from_millis(600)).await;
    }
    for blobs in processes {
        let (_, most) = blobs.memory();
        // One reservation is always granted, however large.
        assert!(
            most <= scenario.memory.max(2 * SIZE),
            "{most} bytes of memory"
        );
    }
    // Without faults, and while nothing is taken away, each byte comes once, whoever asked for it.
    let calm = scenario.cuts.is_none()
        && scenario.lies == 0
        && scenario.limit > 0
        && !scenario.evicts
        && !scenario.no_ranges;
    let sent = server.sent.load(Ordering::Relaxed);
    assert!(!calm || sent <= SIZE, "{sent} bytes for {SIZE}");
    if scenario.lies == u64::MAX && scenario.completes {
        let blob = processes[0].open(digest, SIZE, &Repository);
        assert!(!matches!(blob.verified(), Verified::Yes));
        assert!(
            processes[0].wrong().iter().any(|wrong| wrong.lasting),
            "nobody is told"
        );
    }
}
