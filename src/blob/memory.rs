//! Getting memory out of the budget: at once, by taking back what is no longer needed, or by waiting.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;

use super::budget::{Reservation, Standing};
use super::flight::Urgency;
use super::{Blobs, Shared};
use crate::base::lock;
use crate::base::rt::timeout;
use crate::cache::Data;

/// How often somebody who waits looks for bytes that have become stale.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What a reader gets.
pub(super) trait Held: From<Bytes> {
    /// The same bytes as they came, for a reader who passes them on at once: a small piece of what the HTTP client has received keeps
    /// all of that in memory.
    const AS_THEY_COME: Option<fn(Vec<Bytes>) -> Self>;

    /// Keeps the reservation for as long as the memory that it is for; what lies in a file takes none.
    fn with_room(self, room: Reservation) -> Self;

    /// The same with what memory it takes, if that is to be had now.
    fn with_room_now(self, shared: &Shared) -> Option<Self>;
}

impl Held for Bytes {
    const AS_THEY_COME: Option<fn(Vec<Bytes>) -> Self> = None;

    fn with_room(self, room: Reservation) -> Self {
        Self::from_owner(Roomed {
            bytes: self,
            _room: room,
        })
    }

    fn with_room_now(self, shared: &Shared) -> Option<Self> {
        let room = shared.try_room(self.len() as u64, Urgency::Demand)?;
        Some(self.with_room(room))
    }
}

impl Held for Data {
    const AS_THEY_COME: Option<fn(Vec<Bytes>) -> Self> = Some(Self::Pieces);

    fn with_room(self, room: Reservation) -> Self {
        match self {
            Self::Owned(bytes) => Self::Owned(bytes.with_room(room)),
            Self::Pieces(mut pieces) => {
                // They live and die together.
                if let Some(first) = pieces.first_mut() {
                    *first = std::mem::take(first).with_room(room);
                }
                Self::Pieces(pieces)
            }
            Self::Mapped(_) => self,
        }
    }

    fn with_room_now(self, shared: &Shared) -> Option<Self> {
        match self {
            Self::Owned(bytes) => bytes.with_room_now(shared).map(Self::Owned),
            Self::Pieces(_) => {
                let room = shared.try_room(self.len(), Urgency::Demand)?;
                Some(self.with_room(room))
            }
            Self::Mapped(_) => Some(self),
        }
    }
}

/// Bytes for a reply, with the memory that they take.
struct Roomed {
    bytes: Bytes,
    _room: Reservation,
}

impl AsRef<[u8]> for Roomed {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Memory of the budget that a layer above uses, until this is dropped.
#[derive(Debug)]
pub struct Memory {
    _room: Reservation,
}

/// Memory of the budget for work of a layer above that takes its time, until this is dropped.
#[derive(Debug)]
pub struct LastingMemory {
    _room: Standing,
}

impl Blobs {
    /// Memory for `bytes` bytes that work takes from its begin to its end, as urgent as a read. No more than half of the budget should be
    /// asked for in all: what is left is for bytes under way, those that such work itself waits for among them.
    pub async fn lasting_room(&self, bytes: u64) -> LastingMemory {
        let room = self.shared.room(bytes, Urgency::Demand).await;
        LastingMemory {
            _room: room.stand(),
        }
    }

    /// Memory for `bytes` bytes that are kept in case somebody wants them, if it is to be had now.
    pub fn try_room(&self, bytes: u64) -> Option<Memory> {
        let room = self.shared.try_room(bytes, Urgency::Fill)?;
        Some(Memory { _room: room })
    }
}

impl Shared {
    /// Memory for `bytes` bytes, if it is to be had now.
    pub(super) fn try_room(&self, bytes: u64, urgency: Urgency) -> Option<Reservation> {
        self.budget.try_reserve(bytes, urgency).or_else(|| {
            self.take_back(bytes);
            self.budget.try_reserve(bytes, urgency)
        })
    }

    /// Memory for `bytes` bytes.
    pub(super) async fn room(&self, bytes: u64, urgency: Urgency) -> Reservation {
        if let Some(room) = self.try_room(bytes, urgency) {
            return room;
        }
        let mut room = pin!(self.budget.reserve(bytes, urgency));
        loop {
            match timeout(LOOK_AGAIN, room.as_mut()).await {
                Ok(room) => return room,
                Err(_) => self.take_back(bytes),
            }
        }
    }

    /// Has all blobs give up bytes that they hold in memory and that are not needed.
    fn take_back(&self, wanted: u64) {
        let blobs: Vec<_> = lock(&self.table).values().cloned().collect();
        let mut freed = 0;
        for stale in [false, true] {
            for blob in blobs.iter().filter_map(std::sync::Weak::upgrade) {
                if freed >= wanted {
                    return;
                }
                let overlay = &mut lock(&blob.state).overlay;
                freed += if stale {
                    overlay.drop_stale(wanted - freed)
                } else {
                    overlay.drop_read(wanted - freed)
                };
            }
        }
    }
}
