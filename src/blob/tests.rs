//! Lazy blobs against a real HTTP server on loopback that can misbehave.

use std::path::Path;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::base::Deadline;
use crate::cache::{CacheConfig, Data};
use crate::registry::{HttpVersion, RegistryConfig};

/// How the server treats a blob request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Right,
    /// 200 and the whole blob, whatever was asked.
    NoRange,
    /// The first requests end after this many bytes of their body.
    Cut {
        after: usize,
        requests: usize,
    },
    /// The first requests are answered 503.
    Unavailable {
        requests: usize,
    },
    /// One byte of the blob is wrong.
    Wrong {
        at: usize,
    },
    /// There is no such blob.
    Absent,
    /// 64 KiB at a time with a pause in between.
    Slow {
        pause: Duration,
    },
}

struct Server {
    address: String,
    log: Arc<StdMutex<Vec<ByteRange>>>,
    sent: Arc<AtomicUsize>,
}

impl Server {
    async fn start(content: Vec<u8>, manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let log = Arc::new(StdMutex::new(Vec::new()));
        let (sent, count) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let content = Arc::new(content);
        let (log2, sent2) = (Arc::clone(&log), Arc::clone(&sent));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (content, log, sent, count) = (
                    Arc::clone(&content),
                    Arc::clone(&log2),
                    Arc::clone(&sent2),
                    Arc::clone(&count),
                );
                tokio::spawn(async move {
                    let _ = serve(socket, &content, manner, &log, &sent, &count).await;
                });
            }
        });
        Self { address, log, sent }
    }

    fn requests(&self) -> Vec<ByteRange> {
        self.log.lock().unwrap().clone()
    }

    fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    fn repository(&self) -> Repository {
        Repository::new(&self.address, "org/model").unwrap()
    }
}

async fn serve(
    mut socket: TcpStream,
    content: &[u8],
    manner: Manner,
    log: &StdMutex<Vec<ByteRange>>,
    sent: &AtomicUsize,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        while !buffer.windows(4).any(|window| window == b"\r\n\r\n") {
            if socket.read_buf(&mut buffer).await? == 0 || !buffer[0].is_ascii_uppercase() {
                return Ok(());
            }
        }
        let head = String::from_utf8_lossy(&buffer).to_lowercase();
        buffer.clear();
        let asked = head.split("range: bytes=").nth(1).and_then(|rest| {
            let (first, last) = rest.split("\r\n").next()?.split_once('-')?;
            Some(ByteRange::new(
                first.parse().ok()?,
                last.parse::<u64>().ok()? + 1,
            ))
        });
        let Some(range) = asked.filter(|_| head.contains("/blobs/")) else {
            socket
                .write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                .await?;
            continue;
        };
        log.lock().unwrap().push(range);
        let nth = count.fetch_add(1, Ordering::Relaxed);
        let mut body = content[range.start() as usize..range.end() as usize].to_vec();
        let mut status = format!(
            "206 Partial Content\r\ncontent-range: bytes {}-{}/{}",
            range.start(),
            range.end() - 1,
            content.len()
        );
        let mut keep = usize::MAX;
        let mut pause = Duration::ZERO;
        match manner {
            Manner::Right => {}
            Manner::NoRange => {
                body = content.to_vec();
                status = "200 OK".into();
            }
            Manner::Cut { after, requests } if nth < requests => keep = after,
            Manner::Unavailable { requests } if nth < requests => {
                body.clear();
                status = "503 Service Unavailable".into();
            }
            Manner::Cut { .. } | Manner::Unavailable { .. } => {}
            Manner::Wrong { at } => {
                if let Some(byte) = at
                    .checked_sub(range.start() as usize)
                    .and_then(|at| body.get_mut(at))
                {
                    *byte ^= 1;
                }
            }
            Manner::Absent => {
                body.clear();
                status = "404 Not Found".into();
            }
            Manner::Slow { pause: length } => pause = length,
        }
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).await?;
        for piece in body[..keep.min(body.len())].chunks(64 << 10) {
            sent.fetch_add(piece.len(), Ordering::Relaxed);
            socket.write_all(piece).await?;
            tokio::time::sleep(pause).await;
        }
        if keep < body.len() {
            return Ok(());
        }
    }
}

fn content(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn blobs(dir: &Path, limit: u64, config: BlobConfig) -> Blobs {
    let cache = Cache::open(CacheConfig {
        dir: dir.to_owned(),
        limit,
    })
    .unwrap();
    let registry = Registry::new(RegistryConfig {
        plain_http: Vec::new(),
        ca_files: Vec::new(),
        auth_files: None,
        hosts_dir: None,
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_secs(5),
        http: HttpVersion::Auto,
        max_connections: RegistryConfig::MOST_CONNECTIONS,
    })
    .unwrap();
    Blobs::new(cache, registry, config)
}

fn lazily() -> BlobConfig {
    BlobConfig {
        prefetch: Prefetch::None,
        read_timeout: Duration::from_secs(20),
        ..BlobConfig::default()
    }
}

const BIG: u64 = 1 << 30;
const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_to_the_kernel_does_not_wait_for_the_cache() {
    let bytes = content(3 * MIB);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let range = ByteRange::new(MIB as u64 + 5, MIB as u64 + 65_541);
    let _hold = blob.hold();
    let came = blob.share(range).await.unwrap();
    let Data::Pieces(pieces) = &came else {
        panic!("it came by way of the cache: {came:?}");
    };
    assert_eq!(pieces.concat(), bytes[MIB + 5..MIB + 65_541]);
    assert_eq!(came.len(), range.len());
    assert!(blobs.memory().0 >= range.len(), "memory that nobody counts");
    drop(came);
    // All the same it is kept, in whole chunks, and nothing is asked for twice.
    let kept = async {
        while blobs.memory().0 > 0 || blob.cached() < range.align(16 << 10, BIG).len() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), kept)
        .await
        .unwrap();
    let again = blob.try_share(range).unwrap().unwrap();
    assert!(matches!(again, Data::Mapped(_)), "{again:?}");
    assert_eq!(server.requests().len(), 1);
    // What is too much to be handed on in one go comes by way of the cache.
    let more = blob.share(ByteRange::at(0, MIB as u64)).await.unwrap();
    assert!(matches!(more, Data::Mapped(_)), "{more:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_fetches_what_it_needs_and_only_once() {
    let bytes = content(20 * MIB + 77);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    assert!(blob.try_read(ByteRange::new(0, 1)).is_none());
    assert_eq!(server.sent(), 0);
    let range = ByteRange::new(5 * MIB as u64 + 3, 5 * MIB as u64 + 70_000);
    assert_eq!(
        blob.read(range).await.unwrap(),
        bytes[5 * MIB + 3..5 * MIB + 70_000]
    );
    assert!(server.sent() <= 70_000 + 2 * 16384, "{}", server.sent());
    let sent = server.sent();
    assert_eq!(
        blob.try_read(range).unwrap().unwrap(),
        bytes[5 * MIB + 3..5 * MIB + 70_000]
    );
    assert_eq!(blob.read(range).await.unwrap().len(), 70_000 - 3);
    assert_eq!(server.sent(), sent);
    assert_eq!(blob.cached(), sent as u64);
    let tail = ByteRange::new(20 * MIB as u64, bytes.len() as u64);
    assert_eq!(blob.read(tail).await.unwrap(), bytes[20 * MIB..]);
    assert!(matches!(
        blob.read(ByteRange::new(0, bytes.len() as u64 + 1)).await,
        Err(BlobError::OutOfBounds { .. })
    ));
    assert_eq!(blob.read(ByteRange::new(7, 7)).await.unwrap(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_one_blob_cause_one_fetch() {
    let bytes = content(12 * MIB);
    let server = Server::start(
        bytes.clone(),
        Manner::Slow {
            pause: Duration::from_millis(1),
        },
    )
    .await;
    let dir = tempfile::tempdir().unwrap();
    // Two of everything: two processes on one cache.
    let processes = [
        blobs(dir.path(), BIG, lazily()),
        blobs(dir.path(), BIG, BlobConfig::default()),
    ];
    let mut readers = Vec::new();
    for reader in 0..8 {
        let blob = processes[reader % 2].open(
            Digest::of(&bytes),
            bytes.len() as u64,
            &server.repository(),
        );
        let bytes = bytes.clone();
        readers.push(tokio::spawn(async move {
            for at in (0..bytes.len()).step_by(MIB) {
                let range = ByteRange::at(at as u64, MIB as u64);
                assert_eq!(blob.read(range).await.unwrap(), bytes[at..at + MIB]);
            }
        }));
    }
    for reader in readers {
        reader.await.unwrap();
    }
    // A machine that is busy may make the server look slow, and a part that is slow is asked for twice.
    let hedges: u64 = processes.iter().map(Blobs::hedges).sum();
    assert!(
        server.sent() == bytes.len() || hedges > 0,
        "{}",
        server.sent()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completed_blob_is_verified_sealed_and_served_from_the_layout() {
    let bytes = content(30 * MIB + 1);
    let digest = Digest::of(&bytes);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    {
        let blobs = blobs(dir.path(), BIG, lazily());
        let mut events = blobs.events();
        let blob = blobs.open(digest, bytes.len() as u64, &server.repository());
        assert_eq!(blob.verified(), Verified::NotYet);
        blob.read(ByteRange::new(9 * MIB as u64, 10 * MIB as u64))
            .await
            .unwrap();
        blob.complete().await.unwrap();
        assert_eq!(blob.verified(), Verified::Yes);
        assert_eq!(events.recv().await.unwrap(), Event::Sealed(digest));
        assert_eq!(
            server.sent(),
            bytes.len(),
            "what was there is not fetched again"
        );
        assert!(
            server
                .requests()
                .iter()
                .all(|range| range.len() <= plan::PART)
        );
    }
    assert_eq!(
        std::fs::read(dir.path().join("blobs/sha256").join(digest.hex())).unwrap(),
        bytes
    );
    let offline = blobs(
        dir.path(),
        BIG,
        BlobConfig {
            offline: true,
            ..lazily()
        },
    );
    let blob = offline.open(digest, bytes.len() as u64, &server.repository());
    assert_eq!(
        blob.read(ByteRange::new(0, bytes.len() as u64))
            .await
            .unwrap(),
        bytes
    );
    let other = offline.open(Digest::of(b"?"), 5, &server.repository());
    assert!(matches!(
        other.read(ByteRange::new(0, 5)).await,
        Err(BlobError::Offline { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_is_never_sealed_and_an_error_once_known() {
    let bytes = content(3 * MIB);
    let digest = Digest::of(&bytes);
    let server = Server::start(bytes.clone(), Manner::Wrong { at: MIB }).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let partial = dir.path().join("ocifs/partial");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (note, data) = (
        Arc::clone(&seen),
        partial.join(format!("{}.data", digest.hex())),
    );
    blobs.witness(move |digest, notice| {
        if notice == Notice::Discards {
            note.lock().unwrap().push((digest, data.exists()));
        }
    });
    let mut events = blobs.events();
    let blob = blobs.open(digest, bytes.len() as u64, &server.repository());
    assert_eq!(
        blob.read(ByteRange::new(0, 100)).await.unwrap(),
        bytes[..100],
        "served before it can be known"
    );
    assert!(matches!(
        blob.complete().await,
        Err(BlobError::Corrupt { .. })
    ));
    assert!(matches!(
        blob.try_read(ByteRange::new(0, 100)),
        Some(Err(BlobError::Corrupt { .. }))
    ));
    assert!(matches!(
        blob.read(ByteRange::new(0, 100)).await,
        Err(BlobError::Corrupt { .. })
    ));
    assert_eq!(events.recv().await.unwrap(), Event::Corrupt(digest));
    assert!(!blobs.cache().is_sealed(&digest));
    assert_eq!(std::fs::read_dir(partial).unwrap().count(), 0);
    assert_eq!(
        *seen.lock().unwrap(),
        [(digest, true), (digest, true)],
        "told each time, before the bytes were gone"
    );
}

/// Two sets of blobs on one directory are to each other as two processes are.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_another_process_threw_away_are_told_of_when_the_blob_is_opened_again() {
    let bytes = content(3 * MIB);
    let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
    let wrong = Server::start(bytes.clone(), Manner::Wrong { at: 10 }).await;
    let right = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let [ours, theirs] = [(); 2].map(|()| blobs(dir.path(), BIG, lazily()));
    let noted = Arc::new(std::sync::Mutex::new(Vec::new()));
    let note = Arc::clone(&noted);
    ours.witness(move |_, notice| {
        note.lock().unwrap().push(notice);
    });
    let mut events = ours.events();
    let start = ByteRange::new(0, 100);
    let early = ours.open(digest, size, &wrong.repository());
    assert_ne!(early.read(start).await.unwrap(), bytes[..100]);
    // Opened again, it is the same file.
    assert!(early.try_read(start).is_some() && events.try_recv().is_err());
    let late = theirs.open(digest, size, &right.repository());
    late.complete().await.unwrap();
    assert_eq!(theirs.wrong().len(), 1, "they found it wrong");
    assert_eq!(early.try_read(start).unwrap().unwrap(), bytes[..100]);
    assert_eq!(events.try_recv().unwrap(), Event::Replaced(digest));
    let noted = noted.lock().unwrap().clone();
    let [Notice::Gives(file), Notice::Discards, Notice::Proves] = noted[..] else {
        panic!("{noted:?}");
    };
    // What is known to be right is right wherever it comes from.
    assert!(early.try_read(start).is_some() && events.try_recv().is_err());

    // Who goes on for a process that was killed before it noticed is told as well, even by who reads nothing.
    let next = blobs(dir.path(), BIG, lazily());
    next.were_given([(digest, file)]);
    let mut events = next.events();
    drop(next.open(digest, size, &right.repository()).hold());
    assert_eq!(events.try_recv().unwrap(), Event::Replaced(digest));
    // Of the same file it is told nothing, be it sealed by now or not.
    let entry = next.cache().entry(&digest, size).unwrap();
    let same = blobs(dir.path(), BIG, lazily());
    same.were_given([(digest, entry.identity())]);
    let mut events = same.events();
    drop(same.open(digest, size, &right.repository()).hold());
    assert!(events.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_serves_nothing_before_all_is_right() {
    let bytes = content(3 * MIB);
    let strict = BlobConfig {
        strict: true,
        ..lazily()
    };
    for (manner, right) in [
        (Manner::Right, true),
        (Manner::Wrong { at: 2 * MIB }, false),
    ] {
        let server = Server::start(bytes.clone(), manner).await;
        let dir = tempfile::tempdir().unwrap();
        let blobs = blobs(dir.path(), BIG, strict.clone());
        let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
        assert_eq!(blob.read(ByteRange::new(0, 9)).await.is_ok(), right);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_sends_the_blob_once() {
    let bytes = content(9 * MIB);
    let server = Server::start(bytes.clone(), Manner::NoRange).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let mut readers = Vec::new();
    for part in [8, 0, 4, 7, 2] {
        let (blob, bytes) = (Arc::clone(&blob), bytes.clone());
        readers.push(tokio::spawn(async move {
            let range = ByteRange::at((part * MIB) as u64, MIB as u64);
            assert_eq!(
                blob.read(range).await.unwrap(),
                bytes[part * MIB..(part + 1) * MIB]
            );
        }));
    }
    for reader in readers {
        reader.await.unwrap();
    }
    blob.complete().await.unwrap();
    // Requests that were under way before the first answer are dropped at their heads; some of their bytes left the server.
    assert!(
        server.sent() < 2 * bytes.len() + 5 * MIB,
        "{}",
        server.sent()
    );
    assert_eq!(blob.received(), bytes.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_cut_off_are_continued() {
    let bytes = content(10 * MIB);
    for manner in [
        Manner::Cut {
            after: 100_000,
            requests: 20,
        },
        Manner::Cut {
            after: 0,
            requests: 3,
        },
        Manner::Unavailable { requests: 2 },
    ] {
        let server = Server::start(bytes.clone(), manner).await;
        let dir = tempfile::tempdir().unwrap();
        let blobs = blobs(dir.path(), BIG, lazily());
        let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
        assert_eq!(
            blob.read(ByteRange::new(0, bytes.len() as u64))
                .await
                .unwrap(),
            bytes,
            "{manner:?}"
        );
        assert_eq!(server.sent(), bytes.len(), "nothing twice: {manner:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_an_error_soon() {
    let bytes = content(MIB);
    let server = Server::start(bytes.clone(), Manner::Absent).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let read = tokio::time::timeout(Duration::from_secs(5), blob.read(ByteRange::new(0, 10)))
        .await
        .unwrap();
    assert!(matches!(read, Err(BlobError::Fetch { source, .. }) if source.is_not_found()));
    // The other repository has it.
    let other = Server::start(bytes.clone(), Manner::Right).await;
    blobs.open(Digest::of(&bytes), bytes.len() as u64, &other.repository());
    assert_eq!(blob.read(ByteRange::new(0, 10)).await.unwrap(), bytes[..10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_gets_nothing_ends_by_its_deadline() {
    let bytes = content(MIB);
    let server = Server::start(
        bytes.clone(),
        Manner::Slow {
            pause: Duration::from_secs(60),
        },
    )
    .await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(
        dir.path(),
        BIG,
        BlobConfig {
            read_timeout: Duration::from_secs(1),
            ..lazily()
        },
    );
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let read = tokio::time::timeout(
        Duration::from_secs(5),
        blob.read(ByteRange::new(0, 500_000)),
    )
    .await
    .unwrap();
    assert!(matches!(read, Err(BlobError::Deadline { .. })), "{read:?}");
    let soon = Deadline::after(Duration::from_millis(200));
    let peek = tokio::time::timeout(
        Duration::from_secs(2),
        blob.peek(ByteRange::new(500_000, 500_010), soon),
    )
    .await;
    assert!(matches!(peek.unwrap(), Err(BlobError::Deadline { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_larger_than_the_cache_streams_through() {
    let bytes = content(24 * MIB);
    for manner in [Manner::Right, Manner::NoRange] {
        let server = Server::start(bytes.clone(), manner).await;
        let dir = tempfile::tempdir().unwrap();
        let blobs = blobs(
            dir.path(),
            4 * MIB as u64,
            BlobConfig {
                prefetch: Prefetch::Model,
                ..lazily()
            },
        );
        let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
        for at in (0..bytes.len()).step_by(MIB) {
            let range = ByteRange::at(at as u64, MIB as u64);
            assert_eq!(
                blob.read(range).await.unwrap(),
                bytes[at..at + MIB],
                "{manner:?}"
            );
        }
        assert!(
            matches!(blob.complete().await, Err(BlobError::NoRoom { .. })),
            "{manner:?}"
        );
        let usage = blobs.cache().usage();
        assert!(usage.allocated <= usage.limit, "{usage:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequential_reader_is_kept_ahead_and_then_gets_everything() {
    let bytes = content(64 * MIB);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(
        dir.path(),
        BIG,
        BlobConfig {
            prefetch: Prefetch::Blob,
            ..lazily()
        },
    );
    let mut events = blobs.events();
    let digest = Digest::of(&bytes);
    let blob = blobs.open(digest, bytes.len() as u64, &server.repository());
    let hold = blob.hold();
    for at in (0..20 * MIB).step_by(128 << 10) {
        let range = ByteRange::at(at as u64, 128 << 10);
        let read = match blob.try_read(range) {
            Some(read) => read,
            None => blob.read(range).await,
        };
        assert_eq!(read.unwrap(), bytes[at..at + (128 << 10)]);
    }
    assert_eq!(events.recv().await.unwrap(), Event::Wanted(digest));
    assert_eq!(events.recv().await.unwrap(), Event::Sealed(digest));
    assert_eq!(server.sent(), bytes.len());
    assert!(server.requests().len() < 30, "{:?}", server.requests());
    drop(hold);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_blob_is_hashed_anew() {
    let bytes = content(2 * MIB);
    let digest = Digest::of(&bytes);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(digest, bytes.len() as u64, &server.repository());
    blob.complete().await.unwrap();
    // Tasks that have done their work may hold the blob for a moment longer.
    let mut tries = 0;
    while let Err(error) = blobs.cache().remove(&digest) {
        assert!(tries < 200, "{error}");
        tries += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(blob.read(ByteRange::new(0, 10)).await.unwrap(), bytes[..10]);
    assert_eq!(blob.verified(), Verified::NotYet);
    blob.complete().await.unwrap();
    assert!(blobs.cache().is_sealed(&digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_blob_needs_no_request() {
    let server = Server::start(vec![0], Manner::Absent).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(Digest::of(b""), 0, &server.repository());
    assert_eq!(blob.read(ByteRange::new(0, 0)).await.unwrap(), "");
    blob.complete().await.unwrap();
    let lie = blobs.open(Digest::of(b"x"), 0, &server.repository());
    assert!(matches!(
        lie.complete().await,
        Err(BlobError::Corrupt { .. })
    ));
    assert_eq!(server.requests(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_was_whole_when_its_daemon_died_is_decided_when_it_is_opened() {
    let bytes = content(3 * MIB + 5);
    let digest = Digest::of(&bytes);
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let whole = ByteRange::new(0, bytes.len() as u64);
    let entry = Arc::new(blobs.cache().entry(&digest, whole.end()).unwrap());
    entry.writer(whole).unwrap().push(&bytes).unwrap();
    drop(entry);
    let mut events = blobs.events();
    let nowhere = Repository::new("127.0.0.1:1", "org/model").unwrap();
    let blob = blobs.open(digest, whole.end(), &nowhere);
    let _hold = blob.hold();
    let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await;
    assert_eq!(event.unwrap().unwrap(), Event::Sealed(digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_file_that_cannot_be_read_is_done_without() {
    let bytes = content(3 * MIB + 5);
    let digest = Digest::of(&bytes);
    let whole = ByteRange::new(0, bytes.len() as u64);
    for strict in [false, true] {
        let server = Server::start(bytes.clone(), Manner::Right).await;
        let dir = tempfile::tempdir().unwrap();
        let config = BlobConfig {
            strict,
            read_timeout: Duration::from_secs(3),
            ..lazily()
        };
        let blobs = blobs(dir.path(), BIG, config);
        let blob = blobs.open(digest, whole.end(), &server.repository());
        let hold = blob.hold();
        assert_eq!(blob.read(whole).await.unwrap(), bytes);
        blob.complete().await.unwrap();
        // As a disk that gives up: every read of the file fails.
        let path = dir.path().join("blobs/sha256").join(digest.hex());
        std::fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(0)
            .unwrap();
        let begun = std::time::Instant::now();
        let read = tokio::time::timeout(Duration::from_secs(20), blob.read(whole)).await;
        match read.unwrap() {
            Ok(read) => assert!(!strict && read == bytes),
            Err(error) => assert!(strict, "{error}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(2));
        drop(hold);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_dropped_is_fetched_again_in_whole_chunks() {
    let bytes = content(2 * MIB);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let hold = blob.hold();
    // What is left when a full cache had sent bytes through memory, and has room again.
    let room = blob.shared.try_room(40_000, flight::Urgency::Demand);
    {
        let overlay = &mut lock(&blob.state).overlay;
        overlay.begin(u64::MAX, room.unwrap(), false);
        let piece = Bytes::copy_from_slice(&bytes[10_000..50_000]);
        overlay.push(u64::MAX, 10_000, piece);
    }
    let range = ByteRange::new(0, 100_000);
    let read = tokio::time::timeout(Duration::from_secs(5), blob.read(range)).await;
    assert_eq!(read.unwrap().unwrap(), bytes[..100_000]);
    assert!(server.requests().len() <= 2, "{:?}", server.requests());
    drop(hold);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_does_not_wait_for_memory_behind_what_was_fetched_ahead_of_it() {
    let bytes = content(16 * MIB);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let config = BlobConfig {
        prefetch: Prefetch::Blob,
        read_timeout: Duration::from_secs(5),
        ..lazily()
    };
    let blobs = blobs(dir.path(), BIG, config);
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let hold = blob.hold();
    // Something takes more than the half that is for it, for long.
    let limit = blobs.config().memory;
    let taken = blob
        .shared
        .try_room(limit / 2 + 1, flight::Urgency::Demand)
        .unwrap();
    for at in (0..bytes.len()).step_by(128 << 10) {
        let range = ByteRange::at(at as u64, 128 << 10);
        assert_eq!(blob.read(range).await.unwrap(), bytes[at..at + (128 << 10)]);
    }
    drop((hold, taken));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_blob_that_streams_through_share_what_comes() {
    let bytes = Arc::new(content(128 * MIB));
    let server = Server::start(bytes.to_vec(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let config = BlobConfig {
        prefetch: Prefetch::Model,
        memory: 64 << 20,
        ..lazily()
    };
    let blobs = blobs(dir.path(), 4 * MIB as u64, config);
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let hold = blob.hold();
    // One of them is slower than the others, and comes a little late.
    let readers = (0..4_u64).map(|number| {
        let (blob, bytes) = (Arc::clone(&blob), Arc::clone(&bytes));
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20 * number)).await;
            for at in (0..bytes.len()).step_by(512 << 10) {
                let range = ByteRange::at(at as u64, 512 << 10);
                assert_eq!(blob.read(range).await.unwrap(), bytes[at..at + (512 << 10)]);
                tokio::time::sleep(Duration::from_millis(number)).await;
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    let times = server.sent() as f64 / bytes.len() as f64;
    println!("{times:.3} times its size for 4 readers");
    assert!(times < 1.1, "{times}");
    drop(hold);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stream_for_each_reader_is_enough_where_neither_ranges_nor_room_are_to_be_had() {
    let bytes = Arc::new(content(96 * MIB));
    let server = Server::start(bytes.to_vec(), Manner::NoRange).await;
    let dir = tempfile::tempdir().unwrap();
    let config = BlobConfig {
        prefetch: Prefetch::Model,
        ..lazily()
    };
    let blobs = blobs(dir.path(), 4 * MIB as u64, config);
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let hold = blob.hold();
    // Two readers far from each other, both slower than the server.
    let read = |from: usize, to: usize| {
        let (blob, bytes) = (Arc::clone(&blob), Arc::clone(&bytes));
        tokio::spawn(async move {
            for at in (from..to).step_by(512 << 10) {
                let range = ByteRange::at(at as u64, 512 << 10);
                assert_eq!(blob.read(range).await.unwrap(), bytes[at..at + (512 << 10)]);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
    };
    let (front, back) = (read(0, 96 * MIB), read(60 * MIB, 90 * MIB));
    tokio::time::timeout(Duration::from_secs(60), async { (front.await, back.await) })
        .await
        .map(|(front, back)| (front.unwrap(), back.unwrap()))
        .unwrap();
    // A stream each, and the ones that found out.
    assert!(server.sent() < 5 * bytes.len(), "{}", server.sent() / MIB);
    drop(hold);
}

#[tokio::test(flavor = "multi_thread")]
async fn hashing_ends_although_readers_never_pause_and_every_processor_computes() {
    let bytes = content(40 * MIB);
    let digest = Digest::of(&bytes);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(digest, bytes.len() as u64, &server.repository());
    let whole = ByteRange::new(0, bytes.len() as u64);
    assert_eq!(blob.read(whole).await.unwrap(), bytes);
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let busy: Vec<_> = (0..std::thread::available_parallelism().unwrap().get() * 2)
        .map(|_| {
            let (blob, done) = (Arc::clone(&blob), Arc::clone(&done));
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert!(blob.try_read(ByteRange::new(0, 4096)).is_some());
                }
            })
        })
        .collect();
    let completed = tokio::time::timeout(Duration::from_secs(60), blob.complete()).await;
    done.store(true, Ordering::Relaxed);
    for thread in busy {
        thread.join().unwrap();
    }
    completed.unwrap().unwrap();
    assert_eq!(blob.verified(), Verified::Yes);
    let cost = blobs.hash_cost();
    assert_eq!(cost.bytes, bytes.len() as u64, "each byte once");
    assert!(cost.processor > Duration::ZERO);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_streams_for_all_where_a_server_ignores_ranges() {
    let bytes = content(24 * MIB);
    let server = Server::start(bytes.clone(), Manner::NoRange).await;
    let dir = tempfile::tempdir().unwrap();
    let processes = [(); 3].map(|()| blobs(dir.path(), BIG, lazily()));
    let open =
        |blobs: &Blobs| blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let opened = processes.each_ref().map(open);
    let readers = opened.clone().map(|blob| {
        let bytes = bytes.clone();
        tokio::spawn(async move {
            for at in (0..bytes.len()).step_by(MIB) {
                let range = ByteRange::at(at as u64, MIB as u64);
                assert_eq!(blob.read(range).await.unwrap(), bytes[at..at + MIB]);
            }
        })
    });
    for reader in readers {
        reader.await.unwrap();
    }
    let received: u64 = opened.iter().map(|blob| blob.received()).sum();
    assert_eq!(received, bytes.len() as u64, "each byte by one of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_file_that_was_cut_off_is_removed_and_fetched_again() {
    let bytes = content(3 * MIB + 5);
    let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
    let server = Server::start(bytes.clone(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blobs/sha256").join(digest.hex());
    let whole = ByteRange::new(0, size);
    {
        let blobs = blobs(dir.path(), BIG, lazily());
        let blob = blobs.open(digest, size, &server.repository());
        blob.complete().await.unwrap();
    }
    // As a machine that lost power leaves it, on a file system that does not keep its promises.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(MIB as u64).unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    let blob = blobs.open(digest, size, &server.repository());
    assert_eq!(blob.verified(), Verified::NotYet);
    assert_eq!(blob.read(whole).await.unwrap(), bytes, "at once, past it");
    let begun = std::time::Instant::now();
    while let Err(error) = blob.complete().await {
        assert!(begun.elapsed() < Duration::from_secs(20), "{error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    // A descriptor that lies of the size costs the right file nothing.
    let liar = blobs.open(digest, size + 1, &server.repository());
    let _ = tokio::time::timeout(Duration::from_secs(20), liar.read(ByteRange::new(0, 10))).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_new_is_filled_while_a_reader_waits() {
    let pause = Duration::from_millis(30);
    let small = content(128 << 10);
    let filled = Server::start(small.clone(), Manner::Slow { pause }).await;
    let large = content(2 * MIB);
    let wanted = Server::start(large.clone(), Manner::Slow { pause }).await;
    let dir = tempfile::tempdir().unwrap();
    let blobs = blobs(dir.path(), BIG, lazily());
    // One blob after the other in the background. None has the right digest, which shows only when it is whole.
    let background = {
        let (blobs, repository) = (blobs.clone(), filled.repository());
        tokio::spawn(async move {
            for number in 0..200_u8 {
                let blob = blobs.open(Digest::of(&[number]), 128 << 10, &repository);
                assert!(matches!(
                    blob.complete().await,
                    Err(BlobError::Corrupt { .. })
                ));
            }
        })
    };
    let begun = |count: usize| {
        let filled = &filled;
        async move {
            let more = async {
                while filled.requests().len() < count {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let soon = tokio::time::timeout(Duration::from_secs(20), more).await;
            soon.expect("the background goes on");
        }
    };
    begun(3).await;
    let blob = blobs.open(Digest::of(&large), large.len() as u64, &wanted.repository());
    let before = filled.requests().len();
    let since = std::time::Instant::now();
    blob.read(ByteRange::at(MIB as u64, 10 * (64 << 10)))
        .await
        .unwrap();
    let meanwhile = filled.requests().len() - before;
    // In 300 ms there would have been five. One may have passed the look before the reader came, and none waits for more than
    // a second.
    let allowed = 2 + since.elapsed().as_secs() as usize;
    assert!(meanwhile <= allowed, "{meanwhile}, not {allowed}");
    begun(before + meanwhile + 2).await;
    background.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cache_streams_in_parts_through_bounded_memory() {
    let bytes = Arc::new(content(96 * MIB));
    let server = Server::start(bytes.to_vec(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let memory = 48 * MIB as u64;
    let config = BlobConfig {
        prefetch: Prefetch::Model,
        memory,
        ..lazily()
    };
    let blobs = blobs(dir.path(), 4 * MIB as u64, config);
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let hold = blob.hold();
    // Where the machine has other work, a reader comes late to what was kept for him, or a server is taken for a slow one. Each may cost
    // what was on its way then; a run without either has to do without that.
    let (mut last, mut pauses) = (std::time::Instant::now(), 0);
    for at in (0..bytes.len()).step_by(128 << 10) {
        let range = ByteRange::at(at as u64, 128 << 10);
        let read = match blob.try_read(range) {
            Some(read) => read,
            None => blob.read(range).await,
        };
        assert_eq!(read.unwrap(), bytes[at..at + (128 << 10)]);
        pauses += usize::from(last.elapsed() > overlay::FRESH / 2);
        last = std::time::Instant::now();
    }
    let (requests, sent) = (server.requests().len(), server.sent());
    let hedges = blobs.hedges() as usize;
    let most = 100 + hedges + 10 * pauses;
    assert!(requests < most, "{requests} requests for 768 reads");
    let most = bytes.len() * 11 / 10 + hedges * 16 * MIB + pauses * memory as usize;
    assert!(sent <= most, "{sent}, {hedges} hedges, {pauses} pauses");
    let (_, peak) = blobs.memory();
    assert!(peak <= memory, "{peak}");
    drop(hold);
    let soon = tokio::time::timeout(Duration::from_secs(60), async {
        while blobs.memory().0 > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    soon.await.expect("all of it is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_without_end_fit_into_little_memory() {
    let bytes = Arc::new(content(40 * MIB));
    let server = Server::start(bytes.to_vec(), Manner::Right).await;
    let dir = tempfile::tempdir().unwrap();
    let config = BlobConfig {
        prefetch: Prefetch::Model,
        memory: 16 * MIB as u64,
        read_timeout: Duration::from_secs(60),
        ..lazily()
    };
    let blobs = blobs(dir.path(), 4 * MIB as u64, config);
    let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
    let hold = blob.hold();
    // Some read large pieces and keep none; some stop in the middle; one wants more than there is.
    let readers: Vec<_> = (0..40)
        .map(|reader| {
            let (blob, bytes) = (Arc::clone(&blob), Arc::clone(&bytes));
            tokio::spawn(async move {
                let step = if reader % 2 == 0 { MIB } else { 100_000 };
                for at in (reader * MIB..bytes.len()).step_by(step).take(6) {
                    let end = (at + step).min(bytes.len());
                    let read = blob.read(ByteRange::new(at as u64, end as u64)).await;
                    assert_eq!(read.unwrap(), bytes[at..end]);
                }
            })
        })
        .collect();
    let all = blob.read(ByteRange::new(0, 20 * MIB as u64)).await.unwrap();
    assert_eq!(all, bytes[..20 * MIB]);
    drop(all);
    for reader in readers {
        reader.await.unwrap();
    }
    drop(hold);
}

/// Each process is a thread with a runtime, a cache handle and a registry of its own.
#[test]
fn what_a_process_cannot_keep_another_one_fetches_without_waiting_for_it() {
    let bytes = Arc::new(content(2 * MIB));
    let (digest, all) = (Digest::of(&bytes), ByteRange::new(0, 2 * MIB as u64));
    let process = || {
        let runtime = tokio::runtime::Builder::new_current_thread();
        { runtime }.enable_all().build().unwrap()
    };
    // The cache has no room from the beginning; or its disk fails in the middle.
    for limit in [1, BIG] {
        let dir = tempfile::tempdir().unwrap();
        let (fetches, begun) = std::sync::mpsc::channel();
        let (over, end) = tokio::sync::oneshot::channel::<()>();
        let (path, content) = (dir.path().to_owned(), Arc::clone(&bytes));
        let first = std::thread::spawn(move || {
            process().block_on(async {
                let pause = Duration::from_secs(1);
                let server = Server::start(content.to_vec(), Manner::Slow { pause }).await;
                let blobs = blobs(&path, limit, lazily());
                let blob = blobs.open(digest, all.end(), &server.repository());
                let reader = tokio::spawn({
                    let blob = Arc::clone(&blob);
                    async move { blob.read(all).await.map(drop) }
                });
                while server.sent() == 0 || (limit == BIG && blob.cached() == 0) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                crate::cache::fail_writes();
                fetches.send(()).unwrap();
                let _ = end.await;
                assert!(!reader.is_finished(), "it fetches all the while");
            });
        });
        begun.recv().unwrap();
        process().block_on(async {
            let server = Server::start(bytes.to_vec(), Manner::Right).await;
            let blobs = blobs(dir.path(), BIG, lazily());
            let blob = blobs.open(digest, all.end(), &server.repository());
            let asked = std::time::Instant::now();
            assert_eq!(blob.read(all).await.unwrap(), bytes[..]);
            let took = asked.elapsed();
            assert!(took < Duration::from_secs(8), "limit {limit}: {took:?}");
            assert!(server.sent() > 0);
        });
        over.send(()).unwrap();
        first.join().unwrap();
    }
}

/// Near each other they are served by what the first has brought; farther apart than memory reaches, each pulls its own, and no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_reader_of_a_blob_that_streams_through_pulls_it_once_more_at_most() {
    let bytes = Arc::new(content(96 * MIB));
    for (late, most) in [(50, 1.3), (700, 2.1)] {
        let server = Server::start(bytes.to_vec(), Manner::Right).await;
        let dir = tempfile::tempdir().unwrap();
        let config = BlobConfig {
            prefetch: Prefetch::Model,
            memory: 48 << 20,
            ..lazily()
        };
        let blobs = blobs(dir.path(), 4 * MIB as u64, config);
        let blob = blobs.open(Digest::of(&bytes), bytes.len() as u64, &server.repository());
        let hold = blob.hold();
        let longest = Arc::new(Mutex::new(Duration::ZERO));
        let readers = (0..2_u64).map(|number| {
            let (blob, bytes) = (Arc::clone(&blob), Arc::clone(&bytes));
            let longest = Arc::clone(&longest);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(late * number)).await;
                for at in (0..bytes.len()).step_by(512 << 10) {
                    let asked = std::time::Instant::now();
                    let range = ByteRange::at(at as u64, 512 << 10);
                    assert_eq!(blob.read(range).await.unwrap(), bytes[at..at + (512 << 10)]);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    let mut longest = lock(&longest);
                    *longest = asked.elapsed().max(*longest);
                }
            })
        });
        for reader in readers.collect::<Vec<_>>() {
            reader.await.unwrap();
        }
        let times = server.sent() as f64 / bytes.len() as f64;
        println!("{late} ms late: {times:.3} times its size for 2 readers");
        // Where the machine has other work they drift apart.
        let paused = *lock(&longest) > overlay::FRESH / 2 || blobs.hedges() > 0;
        assert!(times < most || paused, "{late} ms late: {times}");
        drop(hold);
    }
}
