//! Completing a blob: what is missing of it fetched in parts, then hashed and sealed.

use std::future::ready;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::flight::Urgency;
use super::hold::Hold;
use super::lazy::LazyBlob;
use super::{BlobError, PARTS_AT_ONCE, Verified, plan};
use crate::base::rt::sleep;
use crate::base::sync::atomic::Ordering;
use crate::base::{ByteRange, Deadline};

/// Completing a blob is given up when this many rounds found every byte and could not decide on them.
pub(super) const ROUNDS: u32 = 3;
/// How often, and how many times, to look whether readers have gone before the disk is asked to write.
const LOOK: Duration = Duration::from_millis(20);
const LOOKS: u32 = 100;

impl LazyBlob {
    /// Fetches what is missing, verifies and seals.
    ///
    /// # Errors
    /// [`BlobError::NoRoom`] when the cache cannot hold it.
    pub async fn complete(self: &Arc<Self>) -> Result<(), BlobError> {
        for _ in 0..ROUNDS {
            self.check()?;
            if *self.verified.borrow() == Verified::Yes {
                return Ok(());
            }
            // What was wrong is thrown away and fetched again: the entry is another one then.
            let hold = self.hold();
            self.filling.store(true, Ordering::Release);
            self.fetch_all(&hold, ()).await?;
            let hashed = pin!(self.hash_what_came(&hold));
            let decided = match select(hashed, pin!(self.begin_sync(&hold))).await {
                Either::Left((decided, _)) => decided,
                Either::Right(((), hashed)) => hashed.await,
            };
            if decided {
                self.check()?;
                return Ok(());
            }
            if hold.entry().is_none() && !self.doubted.load(Ordering::Acquire) {
                break;
            }
        }
        // It may have been decided just now.
        self.check()?;
        Err(BlobError::NoRoom {
            digest: self.digest,
            size: self.size,
        })
    }

    /// Fetches what is missing, and no more: [`LazyBlob::complete`] without the wait for the hash. As long as the hold lives, nothing
    /// of it is evicted. `turn` is dropped once the last part of it has been asked for, at the latest when this ends: whoever waits for
    /// it comes behind this blob and leaves no connection idle.
    ///
    /// # Errors
    /// As [`LazyBlob::complete`].
    pub async fn fill(self: &Arc<Self>, turn: impl Send) -> Result<Hold, BlobError> {
        let hold = self.hold();
        self.check()?;
        self.filling.store(true, Ordering::Release);
        if *self.verified.borrow() != Verified::Yes {
            self.fetch_all(&hold, turn).await?;
        }
        Ok(hold)
    }

    /// Sealing waits for the disk, which may as well write while the rest is hashed, once no reader needs the processors.
    async fn begin_sync(&self, hold: &Hold) {
        for _ in 0..LOOKS {
            if self.shared.readers.active_within(LOOK) {
                sleep(LOOK).await;
                continue;
            }
            if let Some(entry) = hold.entry() {
                self.shared
                    .runtime
                    .spawn_blocking(move || entry.begin_sync());
            }
            return;
        }
    }

    async fn fetch_all(self: &Arc<Self>, hold: &Hold, turn: impl Send) -> Result<(), BlobError> {
        let mut turn = Some(turn);
        for _ in 0..ROUNDS {
            match self.fetch_parts(hold, turn.take()).await {
                // It was found wrong and thrown away under these requests: that is no want of room, and it comes once more.
                Err(BlobError::NoRoom { .. }) if self.doubted.load(Ordering::Acquire) => {
                    self.check()?;
                    drop(self.hold()); // opens it anew
                }
                done => return done,
            }
        }
        Err(BlobError::NoRoom {
            digest: self.digest,
            size: self.size,
        })
    }

    async fn fetch_parts(
        self: &Arc<Self>,
        hold: &Hold,
        mut turn: Option<impl Send>,
    ) -> Result<(), BlobError> {
        stream::iter(plan::parts(ByteRange::new(0, self.size), 2 * plan::PART))
            .map(|part| {
                if part.end() == self.size {
                    // It is asked for in the very poll that took it, before anybody who is woken by this.
                    turn = None;
                }
                async move {
                    let deadline = Deadline::after(self.shared.config.read_timeout);
                    self.ensure(hold, part, None, Urgency::Fill, deadline).await
                }
            })
            .buffered(PARTS_AT_ONCE / 2)
            .try_for_each(|_| ready(Ok(())))
            .await
    }
}
