//! The blob core under every fault that a registry can have, in thousands of cases: the right bytes or an error in time.
//!
//! Everything from [`LazyBlob::read`] down to the request on the wire is the real thing, cache files included; the servers are a
//! function (`registry::testing::script`) and the clock stands still while anything can be done, so that a case that waits for
//! minutes takes none and always goes the same way.
//!
//! The cases are the same ones each time, so that a change is told from chance. `OCIFS_TEST_SEED` chooses others, and
//! `OCIFS_TEST_CASES` how many each of the two tests has: 5,000 where `CI` is set, else 100. A failure prints the seed and the
//! smallest case that fails in the same way.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::*;
use crate::base::{Chain, Instant};
use crate::cache::CacheConfig;
use crate::registry::testing::script::{Asked, Said, Step, play};
use crate::registry::{HttpVersion, RegistryConfig};

/// What goes wrong with one answer that would bring bytes.
#[derive(Clone, Debug, PartialEq)]
enum Fault {
    None,
    Status(u16),
    /// With a Retry-After of so many seconds.
    Limited(u16, u64),
    Refused,
    HungUp,
    Silence,
    /// Milliseconds before the head.
    Delay(u64),
    /// Of the body, in thousandths of it.
    Reset(u64),
    Truncate(u64),
    Stall(u64),
    /// Milliseconds between pieces.
    Trickle(u64),
    /// Says a Content-Range that begins so much later.
    ShiftedHead(u64),
    /// Says another size of the blob.
    OtherTotal,
    /// 206 without a Content-Range.
    NoContentRange,
    Multipart,
    /// A right 206 of only some thousandths of the range.
    Less(u64),
    /// Says and sends more than was asked for.
    More,
    /// 200 with the whole blob.
    Whole,
    /// 200 with a blob of another length.
    WholeOfOtherLength,
    /// The token is no longer good.
    TokenExpired,
    /// The signed address is no longer good.
    UrlExpired,
}

/// Which bytes are wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    Nobody,
    /// The registry, always.
    Origin,
    /// The registry, for its first so many answers.
    OriginAtFirst(usize),
    /// The mirror, always.
    Mirror,
}

/// How a mirror is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mirror {
    None,
    Good,
    /// It answers nothing any more after so many answers.
    DiesAfter(usize),
    Lacks,
    Fails,
}

#[derive(Clone, Debug)]
struct Case {
    size: u64,
    seed: u64,
    /// The registry sends everybody to a store.
    redirects: bool,
    mirror: Mirror,
    lie: Lie,
    /// Where the wrong byte is, in thousandths.
    lie_at: u64,
    /// In order of the answers that would bring bytes.
    faults: Vec<Fault>,
    /// Of each reader: start and length in thousandths, and a pause in milliseconds.
    readers: Vec<Vec<(u64, u64, u64)>>,
    strict: bool,
    prefetch: bool,
    /// The cache holds so many thousandths of the blob.
    room: Option<u64>,
    complete: bool,
}

/// The largest blob, in bytes: two parts and some.
const LARGEST: u64 = 18_000_000;
const READ_TIMEOUT: Duration = Duration::from_secs(120);
const ORIGIN: &str = "r.test";
const STORE: &str = "store.test";
const MIRROR: &str = "m.test";

fn fault() -> impl Strategy<Value = Fault> {
    let part = 0..1001_u64;
    prop_oneof![
        6 => Just(Fault::None),
        2 => proptest::sample::select(vec![401, 403, 404, 408, 416, 429, 500, 502, 503, 504]).prop_map(Fault::Status),
        1 => (proptest::sample::select(vec![429, 503]), 0..40_u64).prop_map(|(status, wait)| Fault::Limited(status, wait)),
        1 => Just(Fault::Refused),
        1 => Just(Fault::HungUp),
        1 => Just(Fault::Silence),
        1 => (0..20_000_u64).prop_map(Fault::Delay),
        2 => part.clone().prop_map(Fault::Reset),
        2 => part.clone().prop_map(Fault::Truncate),
        2 => part.clone().prop_map(Fault::Stall),
        1 => (1..3000_u64).prop_map(Fault::Trickle),
        1 => (1..100_000_u64).prop_map(Fault::ShiftedHead),
        1 => proptest::sample::select(vec![Fault::OtherTotal, Fault::NoContentRange, Fault::Multipart]),
        1 => part.prop_map(Fault::Less),
        1 => Just(Fault::More),
        1 => proptest::sample::select(vec![Fault::Whole, Fault::WholeOfOtherLength]),
        1 => Just(Fault::TokenExpired),
        1 => Just(Fault::UrlExpired),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let size = prop_oneof![
        60 => 1..200_000_u64,
        37 => 200_000..2_000_000_u64,
        3 => 7_000_000..LARGEST,
    ];
    let mirror = prop_oneof![
        5 => Just(Mirror::None),
        2 => Just(Mirror::Good),
        1 => (0..6_usize).prop_map(Mirror::DiesAfter),
        1 => Just(Mirror::Lacks),
        1 => Just(Mirror::Fails),
    ];
    let lie = prop_oneof![
        6 => Just(Lie::Nobody),
        1 => Just(Lie::Origin),
        1 => (1..4_usize).prop_map(Lie::OriginAtFirst),
        1 => Just(Lie::Mirror),
    ];
    let reader = vec(
        (
            0..1000_u64,
            prop_oneof![0..50_u64, 0..1001_u64],
            prop_oneof![Just(0), 0..4000_u64],
        ),
        1..6,
    );
    let room = prop_oneof![4 => Just(None), 1 => (0..1500_u64).prop_map(Some)];
    (
        (size, any::<u64>(), any::<bool>(), mirror, lie, 0..1000_u64),
        vec(fault(), 0..12),
        vec(reader, 1..4),
        (
            prop::bool::weighted(0.2),
            any::<bool>(),
            room,
            any::<bool>(),
        ),
    )
        .prop_map(|(world, faults, readers, manner)| {
            let (size, seed, redirects, mirror, lie, lie_at) = world;
            let (strict, prefetch, room, complete) = manner;
            Case {
                size,
                seed,
                redirects,
                mirror,
                lie,
                lie_at,
                faults,
                readers,
                strict,
                prefetch,
                room,
                complete,
            }
        })
}

/// What happened in all cases together.
#[derive(Debug, Default)]
struct Tally {
    cases: u64,
    requests: u64,
    faults: u64,
    reads: u64,
    errors: u64,
    wrong: u64,
    refetched: u64,
    sealed: u64,
    refused: u64,
}

/// The servers of one case.
struct World {
    case: Case,
    content: Bytes,
    answers: Cell<usize>,
    lies: Cell<usize>,
    mirrored: Cell<usize>,
    /// The token and the signature that are good now.
    token: Cell<u64>,
    signature: Cell<u64>,
    requests: Cell<u64>,
    injected: Cell<u64>,
    trace: RefCell<String>,
}

fn status(status: u16, headers: Vec<(&'static str, String)>) -> Said {
    Said::Answer {
        status,
        headers,
        delay: Duration::ZERO,
        body: vec![Step::Bytes(Bytes::from_static(b"{}"))],
    }
}

impl World {
    fn at(&self, thousandths: u64) -> u64 {
        self.case.size * thousandths / 1000
    }

    fn wrong_byte(&self) -> usize {
        self.at(self.case.lie_at) as usize
    }

    fn answer(&self, asked: &Asked) -> Said {
        self.requests.set(self.requests.get() + 1);
        let said = self.decide(asked);
        let short = match &said {
            Said::Answer { status, body, .. } => format!("{status} {}", body.len()),
            other => format!("{other:?}"),
        };
        let _ = writeln!(
            self.trace.borrow_mut(),
            "{}{} {:?}: {short}",
            asked.host,
            asked.target,
            asked.range
        );
        said
    }

    fn decide(&self, asked: &Asked) -> Said {
        match asked.host.as_str() {
            "auth.test" => {
                let token = format!(r#"{{"token":"t{}","expires_in":300}}"#, self.token.get());
                return Said::Answer {
                    status: 200,
                    headers: vec![("content-type", "application/json".into())],
                    delay: Duration::from_millis(3),
                    body: vec![Step::Bytes(token.into())],
                };
            }
            MIRROR => {
                let seen = self.mirrored.replace(self.mirrored.get() + 1);
                return match self.case.mirror {
                    Mirror::Good => self.bytes(asked, self.case.lie == Lie::Mirror),
                    Mirror::DiesAfter(most) if seen < most => {
                        self.bytes(asked, self.case.lie == Lie::Mirror)
                    }
                    Mirror::DiesAfter(_) => Said::Silence,
                    Mirror::Fails => status(500, vec![]),
                    Mirror::Lacks | Mirror::None => status(404, vec![]),
                };
            }
            STORE => {
                if !asked
                    .target
                    .ends_with(&format!("sig={}", self.signature.get()))
                {
                    return status(403, vec![]);
                }
                assert!(asked.authorization.is_none(), "a store gets no token");
            }
            _ => {
                let good = format!("Bearer t{}", self.token.get());
                if asked.authorization.as_ref() != Some(&good) {
                    let challenge = "Bearer realm=\"https://auth.test/token\",service=\"r\"";
                    return status(401, vec![("www-authenticate", challenge.into())]);
                }
                if self.case.redirects {
                    let to = format!("https://{STORE}/b?sig={}", self.signature.get());
                    return status(307, vec![("location", to)]);
                }
            }
        }
        let lies = match self.case.lie {
            Lie::Origin => true,
            Lie::OriginAtFirst(most) => self.lies.replace(self.lies.get() + 1) < most,
            Lie::Mirror | Lie::Nobody => false,
        };
        self.bytes(asked, lies)
    }

    /// The answer to a request for bytes, with the next fault.
    fn bytes(&self, asked: &Asked, lies: bool) -> Said {
        let nth = self.answers.replace(self.answers.get() + 1);
        let fault = self.case.faults.get(nth).cloned().unwrap_or(Fault::None);
        if fault != Fault::None {
            self.injected.set(self.injected.get() + 1);
            let _ = writeln!(self.trace.borrow_mut(), "  {fault:?}");
        }
        let size = self.case.size;
        let Some((first, end)) = asked.range else {
            return status(400, vec![]);
        };
        let mut content = self.content.clone();
        if lies {
            let mut wrong = content.to_vec();
            wrong[self.wrong_byte()] ^= 0x55;
            content = wrong.into();
        }
        let mut body = content.slice(first as usize..end as usize);
        let mut headers = vec![("content-range", format!("bytes {first}-{}/{size}", end - 1))];
        let mut answer_status = 206;
        let mut delay = Duration::from_millis(2);
        match fault {
            Fault::Status(code) => return status(code, vec![]),
            Fault::Limited(code, wait) => {
                return status(code, vec![("retry-after", wait.to_string())]);
            }
            Fault::Refused => return Said::Refused,
            Fault::HungUp => return Said::HungUp,
            Fault::Silence => return Said::Silence,
            Fault::TokenExpired => {
                self.token.set(self.token.get() + 1);
                let challenge = "Bearer realm=\"https://auth.test/token\",service=\"r\"";
                return status(401, vec![("www-authenticate", challenge.into())]);
            }
            Fault::UrlExpired => {
                self.signature.set(self.signature.get() + 1);
                return status(403, vec![]);
            }
            Fault::Delay(millis) => delay = Duration::from_millis(millis),
            Fault::ShiftedHead(by) => {
                headers[0].1 = format!("bytes {}-{}/{size}", first + by, end - 1 + by);
            }
            Fault::OtherTotal => headers[0].1 = format!("bytes {first}-{}/{}", end - 1, size + 1),
            Fault::NoContentRange => headers.clear(),
            Fault::Multipart => {
                headers.push(("content-type", "multipart/byteranges; boundary=x".into()));
            }
            Fault::Less(part) => {
                let less = (body.len() as u64 * part / 1000).max(1);
                body.truncate(less as usize);
                headers[0].1 = format!("bytes {first}-{}/{size}", first + less - 1);
            }
            Fault::More if end < size => {
                body = content.slice(first as usize..end as usize + 1);
                headers[0].1 = format!("bytes {first}-{end}/{size}");
            }
            Fault::Whole => (answer_status, body) = (200, content.clone()),
            Fault::WholeOfOtherLength => {
                answer_status = 200;
                headers = vec![("content-length", (size + 3).to_string())];
            }
            _ => {}
        }
        if answer_status == 200 && fault == Fault::Whole {
            headers = vec![("content-length", size.to_string())];
        }
        let cut = |part: u64| (body.len() as u64 * part / 1000) as usize;
        let (end, last) = match fault {
            Fault::Reset(part) => (cut(part), Some(Step::Break)),
            Fault::Truncate(part) => (cut(part), None),
            Fault::Stall(part) => (cut(part), Some(Step::Stall)),
            _ => (body.len(), None),
        };
        let piece = body.len().div_ceil(8).max(1);
        let mut steps = Vec::new();
        for start in (0..end).step_by(piece) {
            if let Fault::Trickle(millis) = fault {
                steps.push(Step::Wait(Duration::from_millis(millis)));
            }
            steps.push(Step::Bytes(body.slice(start..(start + piece).min(end))));
        }
        steps.extend(last);
        Said::Answer {
            status: answer_status,
            headers,
            delay,
            body: steps,
        }
    }
}

/// Bytes that differ from seed to seed, cut from one large piece that is made once.
fn content(seed: u64, size: u64) -> Bytes {
    thread_local! {
        static ALL: Bytes = {
            let mut state = 0x9E37_79B9_7F4A_7C15_u64;
            let words = std::iter::from_fn(|| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                Some(state.to_le_bytes())
            });
            words.take(LARGEST as usize / 8 + (1 << 17)).flatten().collect::<Vec<_>>().into()
        };
    }
    let start = (seed % (1 << 20)) as usize;
    ALL.with(|all| all.slice(start..start + size as usize))
}

/// A directory of its own for the cache of each case, in memory where that is to be had.
fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    tempfile::Builder::new()
        .prefix("ocifs-faults-")
        .tempdir_in(base)
        .unwrap()
}

/// Files that say where the mirror of the registry is.
fn hosts() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(ORIGIN)).unwrap();
    let text = format!(
        "server = \"https://{ORIGIN}\"\n[host.\"https://{MIRROR}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
    );
    std::fs::write(dir.path().join(ORIGIN).join("hosts.toml"), text).unwrap();
    dir
}

fn registry(hosts_dir: Option<PathBuf>) -> Registry {
    Registry::new(RegistryConfig {
        plain_http: Vec::new(),
        ca_files: Vec::new(),
        auth_files: None,
        hosts_dir,
        connect_timeout: Duration::from_secs(10),
        stall_timeout: Duration::from_secs(30),
        http: HttpVersion::Auto,
        max_connections: RegistryConfig::MOST_CONNECTIONS,
    })
    .unwrap()
}

/// What one read came to.
struct Outcome {
    range: ByteRange,
    took: Duration,
    result: Result<Bytes, BlobError>,
}

/// Runs one case. The error tells what was not as it should be.
fn run(case: &Case, hosts: &Path, tally: &mut Tally) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let world = Rc::new(World {
        case: case.clone(),
        content: content(case.seed, case.size),
        answers: Cell::new(0),
        lies: Cell::new(0),
        mirrored: Cell::new(0),
        token: Cell::new(0),
        signature: Cell::new(0),
        requests: Cell::new(0),
        injected: Cell::new(0),
        trace: RefCell::default(),
    });
    let playing = {
        let world = Rc::clone(&world);
        play(move |asked| world.answer(asked))
    };
    let place = place();
    let result = runtime.block_on(check(&world, hosts, place.path(), tally));
    drop(playing);
    tally.cases += 1;
    tally.requests += world.requests.get();
    tally.faults += world.injected.get();
    result.map_err(|error| format!("{error}\n{}", world.trace.borrow()))
}

async fn check(world: &World, hosts: &Path, place: &Path, tally: &mut Tally) -> Result<(), String> {
    let case = &world.case;
    let limit = case.room.map_or(1 << 30, |part| world.at(part));
    let cache = Cache::open(CacheConfig {
        dir: place.join("cache"),
        limit,
    })
    .map_err(|error| error.to_string())?;
    let mirrored = case.mirror != Mirror::None;
    let registry = registry(mirrored.then(|| hosts.to_owned()));
    let config = BlobConfig {
        prefetch: if case.prefetch {
            Prefetch::Blob
        } else {
            Prefetch::None
        },
        read_timeout: READ_TIMEOUT,
        strict: case.strict,
        ..BlobConfig::default()
    };
    let blobs = Blobs::with(cache, registry, config, 0);
    let mut events = blobs.events();
    let digest = Digest::of(&world.content);
    let repository = Repository::new(ORIGIN, "org/m").map_err(|error| error.to_string())?;
    let blob = blobs.open(digest, case.size, &repository);
    let mut readers = Vec::new();
    for reads in case.readers.clone() {
        let blob = Arc::clone(&blob);
        let ranges = reads.into_iter().map(|(start, len, pause)| {
            let start = world.at(start);
            let len = (case.size * len / 1000).max(1).min(case.size - start);
            (ByteRange::at(start, len), Duration::from_millis(pause))
        });
        let ranges: Vec<_> = ranges.collect();
        readers.push(tokio::spawn(async move {
            let mut outcomes = Vec::new();
            for (range, pause) in ranges {
                tokio::time::sleep(pause).await;
                let begun = Instant::now();
                let result = match blob.try_read(range) {
                    Some(result) => result,
                    None => blob.read(range).await,
                };
                outcomes.push(Outcome {
                    range,
                    took: begun.elapsed(),
                    result,
                });
            }
            outcomes
        }));
    }
    let completed = match case.complete {
        true => Some(blob.complete().await.is_ok()),
        false => None,
    };
    let mut outcomes = Vec::new();
    for reader in readers {
        outcomes.extend(reader.await.map_err(|error| error.to_string())?);
    }
    judge(world, &outcomes, tally)?;
    if completed == Some(true) && blob.verified() != Verified::Yes {
        return Err("complete and not verified".to_owned());
    }
    // The world becomes good again: a blob that is not known to be wrong can be had, and then it is right.
    let whole = ByteRange::new(0, case.size);
    let used_up = case.faults.len() <= world.answers.get();
    let last = blob.complete().await;
    let lied = matches!(case.lie, Lie::Origin);
    let full = case.room.is_some();
    if last.is_ok() {
        let sealed = std::fs::read(place.join("cache/blobs/sha256").join(digest.hex()));
        match sealed {
            Ok(bytes) if bytes == world.content => tally.sealed += 1,
            Ok(_) => return Err("wrong bytes are sealed".to_owned()),
            Err(_) if case.size == 0 => {}
            Err(error) => return Err(format!("complete and not sealed: {error}")),
        }
        let read = blob.read(whole).await.map_err(|error| error.to_string())?;
        if read != world.content {
            return Err("a sealed blob is read wrong".to_owned());
        }
    } else if used_up && !lied && !full && blob.verified() == Verified::NotYet {
        // Whatever failed may be remembered for a while.
        tokio::time::sleep(Duration::from_secs(120)).await;
        match blob.complete().await {
            Ok(()) => {}
            // Of what came since the first lie was found, some was another one.
            Err(BlobError::Corrupt { .. }) if case.lie != Lie::Nobody => {}
            Err(error) => {
                return Err(format!("no fault is left, and yet: {}", Chain(&error)));
            }
        }
    }
    let mut corrupt = 0;
    while let Ok(event) = events.try_recv() {
        corrupt += u64::from(event == Event::Corrupt(digest));
    }
    let known_wrong = matches!(blob.verified(), Verified::No { .. });
    if known_wrong {
        tally.refused += 1;
        if corrupt == 0 {
            return Err("wrong, and nobody is told".to_owned());
        }
        if case.lie == Lie::Nobody {
            return Err("called wrong although nobody lies".to_owned());
        }
        if let Some(Ok(_)) = blob.try_read(whole) {
            return Err("read although it is known to be wrong".to_owned());
        }
    } else if corrupt > 0 {
        tally.refetched += 1;
    }
    if blobs.cache().present(&digest, case.size) > 0 && known_wrong {
        return Err("bytes of a wrong blob are kept".to_owned());
    }
    Ok(())
}

/// What readers saw: right bytes, errors in time, and wrong bytes only where somebody lies and nobody could know.
fn judge(world: &World, outcomes: &[Outcome], tally: &mut Tally) -> Result<(), String> {
    let case = &world.case;
    // Where a server ignores ranges a reader waits for the stream while it moves; a strict one for all parts.
    let patient = case.strict || case.faults.contains(&Fault::Whole);
    let most = READ_TIMEOUT * if patient { 8 } else { 1 } + Duration::from_secs(1);
    for outcome in outcomes {
        tally.reads += 1;
        if outcome.took > most {
            return Err(format!("{} took {:?}", outcome.range, outcome.took));
        }
        match &outcome.result {
            Err(_) => tally.errors += 1,
            Ok(bytes) if bytes.len() as u64 != outcome.range.len() => {
                return Err(format!("{} came as {} bytes", outcome.range, bytes.len()));
            }
            Ok(bytes) => {
                let start = outcome.range.start() as usize;
                let right = &world.content[start..start + bytes.len()];
                if bytes == right {
                    continue;
                }
                let differs = |at: &usize| bytes[*at] != right[*at];
                let wrong: Vec<_> = (0..bytes.len()).filter(differs).collect();
                tally.wrong += 1;
                let excused = wrong == [world.wrong_byte().wrapping_sub(start)];
                if case.lie == Lie::Nobody || case.strict || !excused {
                    return Err(format!("{}: wrong at {:?}", outcome.range, &wrong[..1]));
                }
            }
        }
    }
    Ok(())
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is `{value}`, must be a number")),
    )
}

/// Runs the `nth` share of `cases` cases from this seed, and prints what they were.
fn run_all(seed: u64, nth: u64, cases: u32) {
    let hosts = hosts();
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.wrapping_mul(2).wrapping_add(nth).to_le_bytes());
    let config = Config {
        cases,
        max_shrink_iters: 2000,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let tally = RefCell::new(Tally::default());
    let result = runner.run(&case(), |case| {
        run(&case, hosts.path(), &mut tally.borrow_mut()).map_err(TestCaseError::fail)
    });
    let tally = tally.into_inner();
    eprintln!("OCIFS_TEST_SEED={seed}: {tally:?}");
    if let Err(error) = result {
        panic!("OCIFS_TEST_SEED={seed} OCIFS_TEST_CASES={cases}: {error}");
    }
}

/// The cases of one seed; each test of it runs on a thread of its own.
fn share(nth: u64) {
    let seed = number("OCIFS_TEST_SEED").unwrap_or(0x5eed);
    let cases = number("OCIFS_TEST_CASES").unwrap_or(if std::env::var_os("CI").is_some() {
        5000
    } else {
        100
    });
    run_all(seed, nth, u32::try_from(cases).unwrap());
}

#[test]
fn any_reads_with_any_faults_are_right_or_fail_in_time() {
    share(0);
}

#[test]
fn any_reads_with_any_other_faults_are_right_or_fail_in_time() {
    share(1);
}

/// The first of two requests for the same bytes is cut off, and then the second one's answer is the whole blob.
#[test]
fn a_race_that_nobody_is_left_in_has_an_end() {
    let hosts = hosts();
    for redirects in [false, true] {
        let case = Case {
            size: 48_807,
            seed: 7,
            redirects,
            mirror: Mirror::DiesAfter(0),
            lie: Lie::Nobody,
            lie_at: 0,
            faults: vec![Fault::Reset(0), Fault::None, Fault::Whole],
            readers: vec![vec![(340, 0, 0)], vec![(0, 0, 0), (299, 22, 908)]],
            strict: false,
            prefetch: false,
            room: None,
            complete: false,
        };
        let result = run(&case, hosts.path(), &mut Tally::default());
        assert_eq!(result, Ok(()), "redirects: {redirects}");
    }
}
