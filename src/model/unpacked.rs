//! Compressed layers: decompressed once, from front to back, into the cache, while readers of what came early already read.
//!
//! Nothing of a compressed stream can be had before the rest, so a layer is decompressed as a whole when the first byte of
//! it is wanted. What comes out is a file of the cache that grows (`cache/unpacked.rs`); a read waits until the file has
//! reached its end. When the stream has ended and the digest of what it holds (the config's `diff_id`, else that of the
//! layer itself) is right, the file is sealed as a blob; when it is wrong, nothing of it is kept and reads fail.
//! Memory is bounded by a few pieces and the decoder's window, the disk by the cache's limit, a bomb by its ratio. What the cache has
//! no room for is decompressed for each reader and kept nowhere (`passing.rs`).

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio::task::JoinHandle;

use super::decompress::{Feed, Stopped};
use super::fetch::on_disk;
use super::inflate::{self, Claimed};
use super::passing::Passing;
use crate::base::{ByteRange, ByteSize, Deadline, Digest, lock};
use crate::blob::{BlobError, Blobs, LastingMemory, LazyBlob, Verified};
use crate::cache::{CacheError, Entry, Growing, Unpacker, Unpacking};

/// Compressed bytes that are read at a time: a part of `--memory`, and not too few; and how many such pieces wait for the decoder.
const PIECE: u64 = 32;
const LEAST_PIECE: u64 = 1 << 20;
const MOST_PIECE: u64 = 4 << 20;
const PIECES: usize = 2;
/// A failure is what readers get for this long; then the layer is tried again.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Layers that are decompressed at a time: each takes a core.
const AT_ONCE: usize = 4;
/// A layer may look back so far however little memory ocifs may use: zstd does up to level 19.
const LEAST_WINDOW: u64 = 8 << 20;
/// What decompressing takes beside the window and the pieces, which the budget counts as what readers get.
const BUFFERS: u64 = 2 << 20;
/// Who waits for a layer that waits for its turn is told this often that there is hope.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How often a file that another process makes is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// All compressed layers that something refers to; clones share them.
#[derive(Clone, Debug)]
pub(super) struct UnpackedLayers {
    blobs: Blobs,
    table: Arc<Mutex<HashMap<Key, Weak<Unpacked>>>>,
    turns: Arc<Semaphore>,
    /// What all that are decompressed at a time may take, in MiB: half of what ocifs may use, of which it is a part. Bytes that come have
    /// the other half.
    memory: Arc<Semaphore>,
}

type Key = (Digest, Option<Digest>);

/// The uncompressed form of one compressed layer.
#[derive(Debug)]
pub struct Unpacked {
    pub(super) blobs: Blobs,
    pub(super) blob: Arc<LazyBlob>,
    turns: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    pub(super) diff_id: Option<Digest>,
    state: Mutex<State>,
    /// Held while it is found out where the bytes are.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Where the bytes are, while somebody holds the layer or it is being made.
    place: Option<Place>,
    holds: usize,
    failed: Option<(Instant, BlobError)>,
}

/// Where bytes can be read.
#[derive(Clone, Debug)]
enum Place {
    /// All of them: verified and sealed.
    Whole(Arc<Entry>),
    /// Those that came so far.
    Growing(Growing, watch::Receiver<Progress>),
    /// Nowhere: they come anew for each reader.
    Passing(Arc<Passing>),
}

/// How far it is.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) at: u64,
    ended: bool,
}

impl UnpackedLayers {
    pub(super) fn new(blobs: Blobs) -> Self {
        let half = blobs.config().memory / 2;
        Self {
            blobs,
            table: Arc::default(),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            memory: Arc::new(Semaphore::new((half >> 20) as usize)),
        }
    }

    /// The uncompressed form of a layer, whose digest is `diff_id` where that is known.
    pub(super) fn open(&self, blob: &Arc<LazyBlob>, diff_id: Option<Digest>) -> Arc<Unpacked> {
        let key = (blob.digest(), diff_id);
        let mut table = lock(&self.table);
        if let Some(known) = table.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        table.retain(|_, layer| layer.strong_count() > 0);
        let layer = Arc::new(Unpacked {
            blobs: self.blobs.clone(),
            blob: Arc::clone(blob),
            turns: Arc::clone(&self.turns),
            memory: Arc::clone(&self.memory),
            diff_id,
            state: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
        });
        table.insert(key, Arc::downgrade(&layer));
        layer
    }
}

impl Unpacked {
    /// The layer as it is in the registry.
    pub fn blob(&self) -> &Arc<LazyBlob> {
        &self.blob
    }

    /// Keeps the bytes from being evicted until it is dropped.
    pub fn hold(self: &Arc<Self>) -> UnpackedHold {
        lock(&self.state).holds += 1;
        UnpackedHold(Arc::clone(self))
    }

    /// Bytes of `range` that are in the cache.
    pub fn cached_in(&self, range: ByteRange) -> u64 {
        match lock(&self.state).place.clone() {
            Some(Place::Whole(_)) => range.len(),
            Some(Place::Growing(_, progress)) => {
                let at = progress.borrow().at;
                range.intersect(ByteRange::new(0, at)).len()
            }
            Some(Place::Passing(_)) => 0,
            None if self.is_here() => range.len(),
            None => 0,
        }
    }

    /// Whether its digest was checked and right.
    pub fn verified(&self) -> Verified {
        let (place, failed) = {
            let state = lock(&self.state);
            (state.place.clone(), state.failed.clone())
        };
        match (place, failed) {
            (Some(Place::Whole(_)), _) => Verified::Yes,
            (_, Some((_, BlobError::Corrupt { actual, .. }))) => Verified::No { actual },
            (None, _) if self.is_here() => Verified::Yes,
            _ => Verified::NotYet,
        }
    }

    fn is_here(&self) -> bool {
        self.blobs.cache().unpacked(&self.blob.digest()).is_some()
    }

    /// Makes it whole and verified, in the cache where that has room; gives its size.
    pub async fn complete(self: &Arc<Self>) -> Result<u64, BlobError> {
        let _hold = self.hold();
        loop {
            match self.place().await? {
                Place::Whole(entry) => return Ok(entry.size()),
                Place::Growing(_, mut progress) => self.wait(&mut progress, u64::MAX).await?,
                Place::Passing(passing) => return self.pass_all(&passing).await,
            }
        }
    }

    /// The bytes of `range` if they can be had without waiting.
    pub fn try_read(self: &Arc<Self>, range: ByteRange) -> Option<Result<Bytes, BlobError>> {
        let place = lock(&self.state).place.clone()?;
        self.look(&place, range).map(Ok)
    }

    /// The bytes of `range`, which lies within it.
    pub async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Bytes, BlobError> {
        let _hold = self.hold();
        let mut damaged = 0;
        loop {
            let place = self.place().await?;
            if let Some(bytes) = self.look(&place, range) {
                return Ok(bytes);
            }
            match place {
                Place::Growing(_, mut progress) => {
                    let wanted = if self.blobs.config().strict {
                        u64::MAX
                    } else {
                        range.end()
                    };
                    self.wait(&mut progress, wanted).await?;
                }
                Place::Passing(passing) => return self.read_passing(&passing, range).await,
                Place::Whole(entry) => {
                    damaged += 1;
                    if range.end() > entry.size() || damaged > 2 {
                        return Err(BlobError::OutOfBounds {
                            digest: self.blob.digest(),
                            size: entry.size(),
                            range,
                        });
                    }
                    // The file cannot be read: it is made again.
                    self.blobs
                        .cache()
                        .remove_note(crate::cache::NoteKind::Unpacked, &self.blob.digest());
                    lock(&self.state).place = None;
                }
            }
        }
    }

    /// What a place has of `range` now.
    fn look(&self, place: &Place, range: ByteRange) -> Option<Bytes> {
        let read = match place {
            Place::Whole(entry) => entry.read(range),
            Place::Growing(growing, progress) => {
                let here = progress.borrow().at >= range.end() && !self.blobs.config().strict;
                if !here {
                    return None;
                }
                growing.read(range).map(Some)
            }
            Place::Passing(_) if self.blobs.config().strict => return None,
            Place::Passing(passing) => return passing.try_read(range),
        };
        read.unwrap_or_else(|error| {
            tracing::warn!(digest = %self.blob.digest(), %error, "an unpacked layer cannot be read");
            None
        })
    }

    /// Waits until the file reaches `wanted` or ends, for as long as it grows.
    async fn wait(
        &self,
        progress: &mut watch::Receiver<Progress>,
        wanted: u64,
    ) -> Result<(), BlobError> {
        loop {
            {
                let now = progress.borrow_and_update();
                if now.ended || now.at >= wanted {
                    return Ok(());
                }
            }
            let deadline = Deadline::after(self.blobs.config().read_timeout);
            match tokio::time::timeout_at(deadline.instant(), progress.changed()).await {
                Ok(Ok(())) => {}
                // Whoever made it is gone.
                Ok(Err(_)) => return Ok(()),
                Err(_) => {
                    return Err(BlobError::Deadline {
                        digest: self.blob.digest(),
                        range: ByteRange::new(0, self.blob.size()),
                    });
                }
            }
        }
    }

    /// Where the bytes are; has them made when they are nowhere.
    async fn place(self: &Arc<Self>) -> Result<Place, BlobError> {
        let _opening = self.opening.lock().await;
        {
            let mut state = lock(&self.state);
            match &state.place {
                Some(Place::Growing(_, progress))
                    if progress.borrow().ended || progress.has_changed().is_err() =>
                {
                    state.place = None;
                }
                // Readers may have closed what took the room.
                Some(Place::Passing(passing)) if passing.is_over() => state.place = None,
                Some(place) => return Ok(place.clone()),
                None => {}
            }
            match &state.failed {
                Some((
                    _,
                    error @ (BlobError::Corrupt { .. }
                    | BlobError::Undecodable { lasting: true, .. }),
                )) => {
                    return Err(error.clone());
                }
                Some((at, error)) if at.elapsed() < TRY_AGAIN_AFTER => return Err(error.clone()),
                _ => state.failed = None,
            }
        }
        let (cache, digest) = (self.blobs.cache().clone(), self.blob.digest());
        let found = on_disk(move || match cache.unpacked(&digest) {
            Some(entry) => Ok(Err(entry)),
            None => cache.unpack(&digest).map(Ok),
        });
        let place = match found.await {
            Some(Ok(Err(entry))) => {
                // Another artifact may have said another digest of the same layer.
                if let Some(diff_id) = self.diff_id.filter(|diff_id| diff_id != entry.digest()) {
                    return Err(BlobError::Corrupt {
                        digest: diff_id,
                        actual: *entry.digest(),
                    });
                }
                Place::Whole(Arc::new(entry))
            }
            Some(Ok(Ok(unpacking))) => {
                let (sender, receiver) = watch::channel(Progress::default());
                let growing = match unpacking {
                    Unpacking::Ours(unpacker) => {
                        let growing = unpacker.growing();
                        tokio::spawn(Arc::clone(self).make(unpacker, sender));
                        growing
                    }
                    Unpacking::Others(growing) => {
                        tokio::spawn(Arc::clone(self).follow(growing.clone(), sender));
                        growing
                    }
                };
                Place::Growing(growing, receiver)
            }
            Some(Err(error)) => self.pass_by(&error),
            None => {
                return Err(BlobError::Undecodable {
                    digest,
                    reason: "ocifs is ending".into(),
                    lasting: false,
                });
            }
        };
        lock(&self.state).place = Some(place.clone());
        Ok(place)
    }

    /// Another process makes the file: tells readers how long it is, until that process has ended.
    async fn follow(self: Arc<Self>, growing: Growing, progress: watch::Sender<Progress>) {
        loop {
            let at = growing.len();
            progress.send_if_modified(|now| {
                let grew = at > now.at;
                now.at = at;
                grew
            });
            if self.is_here() || growing.is_left() {
                progress.send_modify(|now| now.ended = true);
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Decompresses the layer.
    async fn make(self: Arc<Self>, unpacker: Unpacker, progress: watch::Sender<Progress>) {
        let _hold = self.blob.hold();
        let window = match self.window().await {
            Ok(window) => window,
            Err(error) => {
                self.ended(Err(Stopped::Failed(error)));
                progress.send_modify(|now| now.ended = true);
                return;
            }
        };
        let _turn = self.turn(window, || progress.send_modify(|_| {})).await;
        let (source, feeding) = self.feed(PIECES);
        let layer = Arc::clone(&self);
        let started = Instant::now();
        let told = progress.clone();
        let made =
            on_disk(move || layer.decompress(unpacker, Feed::new(source), window, &told)).await;
        feeding.abort();
        let ended = match made {
            Some(Ok(entry)) => {
                tracing::info!(digest = %self.blob.digest(), bytes = entry.size(), seconds = started.elapsed().as_secs_f64(), "unpacked a layer");
                Ok(entry)
            }
            Some(Err(stopped)) => Err(stopped),
            None => Err(Stopped::Failed(BlobError::Undecodable {
                digest: self.blob.digest(),
                reason: "ocifs failed to unpack it; see the log".into(),
                lasting: false,
            })),
        };
        self.ended(ended);
        progress.send_modify(|now| now.ended = true);
    }

    /// Waits for its turn to decompress, and for memory: `room` bytes beside a few buffers. Calls `tell` now and then meanwhile.
    pub(super) async fn turn(&self, room: u64, tell: impl Fn()) -> Turn<'_> {
        let turn = patiently(&tell, self.turns.acquire()).await.ok();
        let room = (room + BUFFERS).min(self.blobs.config().memory / 2);
        let share = u32::try_from(room >> 20).unwrap_or(u32::MAX);
        let share = patiently(&tell, self.memory.acquire_many(share)).await.ok();
        let memory = patiently(&tell, self.blobs.lasting_room(room)).await;
        Turn {
            _turn: turn,
            _share: share,
            _memory: memory,
        }
    }

    /// Has the compressed bytes come, no more than so many pieces ahead of whoever takes them.
    pub(super) fn feed(&self, pieces: usize) -> (Pieces, JoinHandle<()>) {
        let (sender, source) = mpsc::channel(pieces);
        let blob = Arc::clone(&self.blob);
        let piece = (self.blobs.config().memory / PIECE).clamp(LEAST_PIECE, MOST_PIECE);
        let feeding = tokio::spawn(async move {
            let mut at = 0;
            while at < blob.size() {
                let range = ByteRange::at(at, piece).intersect(ByteRange::new(0, blob.size()));
                let piece = blob.read(range).await;
                let failed = piece.is_err();
                // Nobody takes it any more: the stream was found bad.
                if sender.send(piece).await.is_err() || failed {
                    return;
                }
                at = range.end();
            }
        });
        (source, feeding)
    }

    /// How far back decompressing it looks: what memory it takes beside a few buffers.
    pub(super) async fn window(&self) -> Result<u64, BlobError> {
        let config = self.blobs.config();
        let start = ByteRange::new(0, Claimed::START.min(self.blob.size()));
        let deadline = Deadline::after(config.read_timeout);
        let start = self.blob.peek(start, deadline).await?;
        let most = (config.memory / 2).max(LEAST_WINDOW);
        match inflate::window(&start) {
            None => Ok(most),
            Some(needed) if needed <= most => Ok(needed),
            Some(needed) => Err(BlobError::Undecodable {
                digest: self.blob.digest(),
                reason: format!(
                    "decompressing it takes {} of memory, more than half of what ocifs may use; see --memory",
                    ByteSize(needed)
                ),
                lasting: true,
            }),
        }
    }

    /// It was made, or not.
    fn ended(&self, made: Result<Entry, Stopped>) {
        match made {
            Ok(entry) => {
                let mut state = lock(&self.state);
                let place = Place::Whole(Arc::new(entry));
                state.place = (state.holds > 0).then_some(place);
            }
            Err(Stopped::NotKept(error)) => {
                let place = self.pass_by(&error);
                lock(&self.state).place = Some(place);
            }
            Err(Stopped::Failed(error)) => self.came_wrong(&error),
            Err(Stopped::Left) => lock(&self.state).place = None,
        }
    }

    /// It cannot be had; for those who ask again too.
    pub(super) fn came_wrong(&self, error: &BlobError) {
        tracing::warn!(%error, "a compressed layer cannot be unpacked");
        let mut state = lock(&self.state);
        state.place = None;
        state.failed = Some((Instant::now(), error.clone()));
    }

    /// The cache does not keep it.
    fn pass_by(&self, error: &CacheError) -> Place {
        self.blobs.cache().failed(error);
        let digest = self.blob.digest();
        if self.blobs.config().strict {
            tracing::error!(
                %digest, %error,
                "what a compressed layer holds cannot be kept, and --verify strict serves nothing that was not kept and found right: reads of it fail; see --cache-size"
            );
        } else {
            tracing::warn!(
                %digest, %error,
                "what a compressed layer holds is not kept: it is decompressed anew for each reader that does not go from front to back; see --cache-size"
            );
        }
        Place::Passing(Passing::new())
    }
}

/// The right to decompress, and the memory for it.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _turn: Option<SemaphorePermit<'a>>,
    _share: Option<SemaphorePermit<'a>>,
    _memory: LastingMemory,
}

type Pieces = mpsc::Receiver<Result<Bytes, BlobError>>;

/// Waits for something, and tells those who wait for the layer that there is hope.
async fn patiently<T>(tell: &impl Fn(), what: impl Future<Output = T>) -> T {
    let mut what = std::pin::pin!(what);
    loop {
        match tokio::time::timeout(TELL_EVERY, what.as_mut()).await {
            Ok(done) => return done,
            Err(_) => tell(),
        }
    }
}

/// Keeps what was unpacked from being evicted.
#[derive(Debug)]
pub struct UnpackedHold(Arc<Unpacked>);

impl Clone for UnpackedHold {
    fn clone(&self) -> Self {
        self.0.hold()
    }
}

impl Drop for UnpackedHold {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.holds -= 1;
        if state.holds == 0 && matches!(state.place, Some(Place::Whole(_))) {
            let place = state.place.take();
            drop(state);
            drop(place);
        }
    }
}
