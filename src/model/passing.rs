//! Compressed layers that the cache has no room for: decompressed for whoever reads, and kept nowhere.
//!
//! A pass is one run of the decoder over a layer, from its first byte on. It keeps the last bytes that came out, runs ahead of its
//! readers by half of that, and stops while nobody reads on. A reader that goes on in order, or leaves something out, is served by one
//! pass; one that goes back behind what a pass has kept needs another, which begins at the front. There are few at a time, and one
//! that nobody has used for a while ends. What a reader waits for is never dropped before he has it.
//!
//! Every pass hashes all that it decompresses, so that one that came to the end tells whether the layer is right, and its size.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use super::decompress::{Feed, Stopped};
use super::fetch::on_disk;
use super::unpacked::Unpacked;
use crate::base::{ByteRange, Deadline, Digest, lock};
use crate::blob::BlobError;

/// Passes over one layer at a time.
const PASSES: usize = 3;
/// What a pass keeps, of `--memory`, and the least that is of use.
const KEPT: u64 = 16;
const LEAST_KEPT: u64 = 4 << 20;
const MOST_KEPT: u64 = 16 << 20;
/// A pass that nobody uses for so long ends.
const IDLE: Duration = Duration::from_secs(5);
/// How often a reader looks whether a pass has become free.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The cache is tried again when nobody has read for so long.
const TRY_CACHE_AFTER: Duration = Duration::from_secs(60);

/// The passes over one layer.
#[derive(Debug)]
pub(super) struct Passing {
    passes: Mutex<Vec<Arc<Pass>>>,
    /// What it holds, once a pass has come to its end and found it right.
    size: Mutex<Option<u64>>,
    used: Mutex<Instant>,
}

/// One pass.
#[derive(Debug)]
struct Pass {
    state: Mutex<State>,
    /// Told whenever more has come out, or it has ended.
    came: watch::Sender<u64>,
    /// The decoder waits here for readers.
    wanted: Condvar,
    /// Bytes that it keeps.
    kept: u64,
}

#[derive(Debug)]
struct State {
    pieces: VecDeque<Bytes>,
    /// The first byte that is kept, and the one behind the last.
    start: u64,
    end: u64,
    /// Up to where readers have asked.
    wanted: u64,
    /// Where those begin who wait now.
    waiting: Vec<u64>,
    used: Instant,
    ended: Option<Result<u64, BlobError>>,
    /// It serves nobody any more.
    left: bool,
}

/// What a pass has for a reader.
enum Look {
    Here(Bytes),
    /// It will come.
    Later,
    /// It has passed, or will not come from here.
    Gone,
    /// The layer ends before it.
    Behind(u64),
    Failed(BlobError),
}

impl Passing {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            passes: Mutex::default(),
            size: Mutex::default(),
            used: Mutex::new(Instant::now()),
        })
    }

    /// Whether the cache may be asked for room again, with nobody reading who would have to begin anew.
    pub(super) fn is_over(&self) -> bool {
        lock(&self.passes).iter().all(|pass| lock(&pass.state).left)
            && lock(&self.used).elapsed() >= TRY_CACHE_AFTER
    }

    /// The bytes of `range` if a pass has them now.
    pub(super) fn try_read(&self, range: ByteRange) -> Option<Bytes> {
        *lock(&self.used) = Instant::now();
        match self.nearest(range.start())?.look(range) {
            Look::Here(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The pass that is the nearest one before `at`, if it is worth waiting for; removes those that have ended.
    fn nearest(&self, at: u64) -> Option<Arc<Pass>> {
        let mut passes = lock(&self.passes);
        passes.retain(|pass| !lock(&pass.state).left);
        let before = passes.iter().filter_map(|pass| {
            let state = lock(&pass.state);
            (state.start <= at).then(|| (state.end, Arc::clone(pass)))
        });
        before.max_by_key(|(end, _)| *end).map(|(_, pass)| pass)
    }

    /// Enters a new pass, in place of the one that has been idle for the longest; `None` while all are in use.
    fn enter(&self, kept: u64) -> Option<Arc<Pass>> {
        let mut passes = lock(&self.passes);
        passes.retain(|pass| !lock(&pass.state).left);
        if passes.len() >= PASSES {
            let idle = passes.iter().filter(|pass| {
                let state = lock(&pass.state);
                state.waiting.is_empty() && state.wanted < u64::MAX
            });
            let oldest = idle.min_by_key(|pass| lock(&pass.state).used)?;
            oldest.leave();
        }
        let pass = Arc::new(Pass {
            state: Mutex::new(State {
                pieces: VecDeque::new(),
                start: 0,
                end: 0,
                wanted: 0,
                waiting: Vec::new(),
                used: Instant::now(),
                ended: None,
                left: false,
            }),
            came: watch::Sender::new(0),
            wanted: Condvar::new(),
            kept,
        });
        passes.push(Arc::clone(&pass));
        Some(pass)
    }
}

impl Pass {
    fn look(&self, range: ByteRange) -> Look {
        let mut state = lock(&self.state);
        if state.left {
            return match &state.ended {
                Some(Err(error)) => Look::Failed(error.clone()),
                _ => Look::Gone,
            };
        }
        state.used = Instant::now();
        if range.start() < state.start {
            return Look::Gone;
        }
        if range.end() > state.wanted {
            state.wanted = range.end();
            self.wanted.notify_all();
        }
        if range.end() <= state.end {
            return Look::Here(state.copy(range));
        }
        match &state.ended {
            None => Look::Later,
            Some(Ok(size)) => Look::Behind(*size),
            Some(Err(error)) => Look::Failed(error.clone()),
        }
    }

    /// As [`Pass::look`], and waits while it will come; no longer than `patience` without progress.
    async fn read(self: &Arc<Self>, range: ByteRange, patience: Duration) -> Option<Look> {
        let mut came = self.came.subscribe();
        let _waiting = Waiting::new(self, range.start());
        loop {
            came.mark_unchanged();
            match self.look(range) {
                Look::Later => {}
                look => return Some(look),
            }
            let deadline = Deadline::after(patience);
            let moved = tokio::time::timeout_at(deadline.instant(), came.changed()).await;
            moved.ok()?.ok()?;
        }
    }

    /// Takes what came out, and waits while nobody wants more. [`Stopped::Left`] when it serves nobody any more.
    fn push(&self, bytes: &[u8]) -> Result<(), Stopped> {
        let mut state = lock(&self.state);
        loop {
            if state.left {
                return Err(Stopped::Left);
            }
            let end = state.end + bytes.len() as u64;
            let first = state.waiting.iter().min().copied();
            // What somebody waits for stays.
            let drops_nothing = first.is_none_or(|first| end <= first.saturating_add(self.kept));
            if state.end < state.wanted.saturating_add(self.kept / 2) && drops_nothing {
                break;
            }
            state = self.rest(state);
        }
        state.pieces.push_back(Bytes::copy_from_slice(bytes));
        state.end += bytes.len() as u64;
        while state.end - state.start > self.kept
            && let Some(piece) = state.pieces.pop_front()
        {
            state.start += piece.len() as u64;
        }
        let end = state.end;
        drop(state);
        self.came.send_replace(end);
        Ok(())
    }

    /// Waits for readers; leaves when none has come for a while.
    fn rest<'a>(
        &'a self,
        state: std::sync::MutexGuard<'a, State>,
    ) -> std::sync::MutexGuard<'a, State> {
        let (mut state, _) = self
            .wanted
            .wait_timeout(state, IDLE / 5)
            .unwrap_or_else(PoisonError::into_inner);
        if state.waiting.is_empty() && state.used.elapsed() >= IDLE {
            state.left = true;
        }
        state
    }

    /// It has come to an end, of the layer or by an error. What it has kept is served until nobody comes any more.
    fn end(&self, ended: Result<u64, BlobError>) {
        let mut state = lock(&self.state);
        let failed = ended.is_err();
        state.ended.get_or_insert(ended);
        state.left |= failed;
        let end = state.end;
        drop(state);
        self.came.send_replace(end);
        let mut state = lock(&self.state);
        while !state.left {
            state = self.rest(state);
        }
        state.pieces.clear();
        drop(state);
        self.came.send_replace(end);
    }

    fn leave(&self) {
        let mut state = lock(&self.state);
        state.left = true;
        self.wanted.notify_all();
        let end = state.end;
        drop(state);
        self.came.send_replace(end);
    }
}

impl State {
    /// The bytes of a range that is kept.
    fn copy(&self, range: ByteRange) -> Bytes {
        let mut all = BytesMut::with_capacity(usize::try_from(range.len()).unwrap_or(0));
        let mut at = self.start;
        for piece in &self.pieces {
            let here = ByteRange::at(at, piece.len() as u64).intersect(range);
            if !here.is_empty() {
                let from = (here.start() - at) as usize;
                all.extend_from_slice(&piece[from..from + here.len() as usize]);
            }
            at += piece.len() as u64;
        }
        all.freeze()
    }
}

/// A reader that waits for what begins here.
struct Waiting<'a> {
    pass: &'a Pass,
    start: u64,
}

impl<'a> Waiting<'a> {
    fn new(pass: &'a Pass, start: u64) -> Self {
        lock(&pass.state).waiting.push(start);
        Self { pass, start }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.pass.state);
        if let Some(index) = state.waiting.iter().position(|start| *start == self.start) {
            state.waiting.swap_remove(index);
        }
        self.pass.wanted.notify_all();
    }
}

impl Unpacked {
    fn kept(&self) -> u64 {
        (self.blobs.config().memory / KEPT).clamp(LEAST_KEPT, MOST_KEPT)
    }

    /// The bytes of `range` by way of a pass.
    pub(super) async fn read_passing(
        self: &Arc<Self>,
        passing: &Arc<Passing>,
        range: ByteRange,
    ) -> Result<Bytes, BlobError> {
        if self.blobs.config().strict {
            // All of it would have to be kept until it is known to be right.
            return Err(BlobError::NoRoom {
                digest: self.blob.digest(),
                size: self.blob.size(),
            });
        }
        let most = self.kept() / 2;
        if range.len() <= most {
            return self.read_piece(passing, range).await;
        }
        let mut all = BytesMut::new();
        while (all.len() as u64) < range.len() {
            let at = range.start() + all.len() as u64;
            let piece = ByteRange::at(at, most).intersect(range);
            all.extend_from_slice(&self.read_piece(passing, piece).await?);
        }
        Ok(all.freeze())
    }

    async fn read_piece(
        self: &Arc<Self>,
        passing: &Arc<Passing>,
        range: ByteRange,
    ) -> Result<Bytes, BlobError> {
        let patience = self.blobs.config().read_timeout;
        let late = || BlobError::Deadline {
            digest: self.blob.digest(),
            range,
        };
        let deadline = Deadline::after(patience);
        loop {
            *lock(&passing.used) = Instant::now();
            let pass = match passing.nearest(range.start()) {
                Some(pass) => pass,
                None => match self.pass(passing) {
                    Some(pass) => pass,
                    None if deadline.passed() => return Err(late()),
                    None => {
                        tokio::time::sleep(LOOK_EVERY).await;
                        continue;
                    }
                },
            };
            match pass.read(range, patience).await {
                Some(Look::Here(bytes)) => return Ok(bytes),
                Some(Look::Failed(error)) => return Err(error),
                Some(Look::Behind(size)) => {
                    return Err(BlobError::OutOfBounds {
                        digest: self.blob.digest(),
                        size,
                        range,
                    });
                }
                Some(Look::Gone | Look::Later) => {}
                None => return Err(late()),
            }
        }
    }

    /// Has one pass go to the end; gives the size of what the layer holds.
    pub(super) async fn pass_all(
        self: &Arc<Self>,
        passing: &Arc<Passing>,
    ) -> Result<u64, BlobError> {
        loop {
            if let Some(size) = *lock(&passing.size) {
                return Ok(size);
            }
            *lock(&passing.used) = Instant::now();
            let Some(pass) = self.pass(passing) else {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            };
            // Where it ends no byte is, so it either ends or fails.
            match pass
                .read(
                    ByteRange::new(u64::MAX - 1, u64::MAX),
                    self.blobs.config().read_timeout,
                )
                .await
            {
                Some(Look::Behind(size)) => return Ok(size),
                Some(Look::Failed(error)) => return Err(error),
                Some(Look::Here(_) | Look::Gone | Look::Later) => {}
                None => {
                    return Err(BlobError::Deadline {
                        digest: self.blob.digest(),
                        range: ByteRange::new(0, self.blob.size()),
                    });
                }
            }
        }
    }

    /// Begins a pass, unless as many as may be are in use.
    fn pass(self: &Arc<Self>, passing: &Arc<Passing>) -> Option<Arc<Pass>> {
        let pass = passing.enter(self.kept())?;
        let (layer, passing, begun) = (Arc::clone(self), Arc::clone(passing), Arc::clone(&pass));
        tokio::spawn(async move { layer.run(&passing, &begun).await });
        Some(pass)
    }

    async fn run(self: &Arc<Self>, passing: &Arc<Passing>, pass: &Arc<Pass>) {
        // Whoever waits for it is told that there is hope.
        let came = pass.came.clone();
        let hold = self.blob.hold();
        let window = match self.window().await {
            Ok(window) => window,
            Err(error) => {
                self.pass_failed(&error);
                pass.end(Err(error));
                return;
            }
        };
        let _turn = self
            .turn(window + pass.kept, || came.send_modify(|_| {}))
            .await;
        let (source, feeding) = self.feed(1);
        let (layer, passing, running) = (Arc::clone(self), Arc::clone(passing), Arc::clone(pass));
        let ran = on_disk(move || {
            let ended =
                layer.decompress_to(Feed::new(source), window, &mut |bytes| running.push(bytes));
            let ended = match ended {
                Ok((digest, size)) => {
                    layer.came_right(&passing, &digest, size);
                    Ok(size)
                }
                Err(Stopped::Failed(error)) => {
                    layer.pass_failed(&error);
                    Err(error)
                }
                Err(Stopped::Left | Stopped::NotKept(_)) => {
                    lock(&running.state).left = true;
                    Ok(0)
                }
            };
            running.end(ended);
        });
        // A panic there must not leave readers waiting.
        if ran.await.is_none() {
            pass.leave();
        }
        feeding.abort();
        drop(hold);
    }

    /// What the registry could not deliver may come with the next pass; what is wrong stays so.
    fn pass_failed(&self, error: &BlobError) {
        if let BlobError::Corrupt { .. } | BlobError::Undecodable { lasting: true, .. } = error {
            self.came_wrong(error);
        }
    }

    fn came_right(&self, passing: &Passing, digest: &Digest, size: u64) {
        tracing::debug!(layer = %self.blob.digest(), size, "a pass has come to the end");
        *lock(&passing.size) = Some(size);
        self.blobs
            .cache()
            .note_unpacked(&self.blob.digest(), digest, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(kept: u64) -> Arc<Pass> {
        Passing::new().enter(kept).unwrap()
    }

    const MIB: u64 = 1 << 20;

    fn piece(number: u8) -> Vec<u8> {
        vec![number; MIB as usize]
    }

    #[test]
    fn it_runs_ahead_of_its_readers_by_half_of_what_it_keeps_and_then_leaves() {
        let pass = pass(4 * MIB);
        assert!(matches!(pass.look(ByteRange::new(0, 10)), Look::Later));
        let pushing = {
            let pass = Arc::clone(&pass);
            std::thread::spawn(move || (0..100).find_map(|n| pass.push(&piece(n)).err()))
        };
        let eventually = |end| {
            let begun = Instant::now();
            while lock(&pass.state).end < end {
                assert!(begun.elapsed() < Duration::from_secs(5));
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(lock(&pass.state).end, end);
        };
        eventually(3 * MIB);
        // Over the border of two pieces.
        let Look::Here(bytes) = pass.look(ByteRange::new(MIB - 1, MIB + 1)) else {
            panic!("it is there")
        };
        assert_eq!(&bytes[..], [0, 1]);
        let far = ByteRange::new(20 * MIB, 20 * MIB + 5);
        assert!(matches!(pass.look(far), Look::Later));
        eventually(23 * MIB);
        assert!(matches!(pass.look(far), Look::Here(_)));
        assert!(matches!(pass.look(ByteRange::new(0, 10)), Look::Gone));
        assert!(matches!(pushing.join().unwrap(), Some(Stopped::Left)));
        assert!(matches!(pass.look(far), Look::Gone));
    }

    #[tokio::test]
    async fn what_somebody_waits_for_is_there_until_he_has_it() {
        let pass = pass(4 * MIB);
        let slow = Waiting::new(&pass, 2 * MIB);
        // Another one is far ahead.
        assert!(matches!(
            pass.look(ByteRange::new(50 * MIB, 51 * MIB)),
            Look::Later
        ));
        let pushing = {
            let pass = Arc::clone(&pass);
            std::thread::spawn(move || (0..60).find_map(|n| pass.push(&piece(n)).err()))
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(lock(&pass.state).end, 6 * MIB);
        assert!(matches!(
            pass.look(ByteRange::new(2 * MIB, 3 * MIB)),
            Look::Here(_)
        ));
        drop(slow);
        let look = pass.read(ByteRange::new(50 * MIB, 51 * MIB), Duration::from_secs(5));
        let Some(Look::Here(bytes)) = look.await else {
            panic!("it comes")
        };
        assert!(bytes[..] == piece(50));
        pass.leave();
        assert!(pushing.join().unwrap().is_some());
    }

    #[test]
    fn few_passes_are_under_way_and_the_idle_one_makes_room() {
        let passing = Passing::new();
        let passes: Vec<_> = (0..PASSES).map(|_| passing.enter(MIB).unwrap()).collect();
        let busy: Vec<_> = passes.iter().map(|pass| Waiting::new(pass, 0)).collect();
        assert!(passing.enter(MIB).is_none());
        drop(busy);
        passes[0].look(ByteRange::new(0, 1));
        passes[2].look(ByteRange::new(0, 1));
        passing.enter(MIB).unwrap();
        let left: Vec<_> = passes.iter().map(|pass| lock(&pass.state).left).collect();
        assert_eq!(left, [false, true, false]);
    }
}
