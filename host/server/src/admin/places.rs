//! Places of the admin plane: how many calls of each kind may be under way at once.
//!
//! A place belongs to the work and not to the request: a client that hangs up stops no compilation, and as long as that goes on
//! nobody else may begin one in its place. Nobody queues for a place, because whoever waits holds a connection and its memory.
//! One semaphore for all would be simpler, and a host full of compilations could then neither be read nor rolled back.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;
use crate::ports::{AdminError, AdminErrorKind};

/// What a call does, as far as places go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Changes nothing.
    Read,
    /// Waits for compilers, registries and other changes.
    Change,
    /// Takes a policy off at once: abort, pause, safe mode.
    Rescue,
    /// Goes back once other changes are through: rollback, removal.
    Return,
    /// Waits for requests to end, for as long as they are given.
    Unload,
    /// Brings a component: it may be held in memory for as long as a slow client is given.
    Upload,
}

impl Kind {
    /// In the order of the variants.
    const ALL: [Self; 6] = [Self::Read, Self::Change, Self::Rescue, Self::Return, Self::Unload, Self::Upload];

    /// Calls at once; each may hold a thread that the data plane needs too.
    pub(crate) const fn places(self) -> usize {
        match self {
            Self::Read | Self::Change => 32,
            Self::Rescue | Self::Return | Self::Unload | Self::Upload => 8,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Read => "reads",
            Self::Change => "changes",
            Self::Rescue => "aborts, pauses and switches",
            Self::Return => "rollbacks and removals",
            Self::Unload => "unloads",
            Self::Upload => "uploads",
        }
    }
}

/// The places that are free.
#[derive(Debug)]
pub(crate) struct Places([Arc<Semaphore>; Kind::ALL.len()]);

impl Default for Places {
    fn default() -> Self {
        Self(Kind::ALL.map(|kind| Arc::new(Semaphore::new(kind.places()))))
    }
}

impl Places {
    /// One of the places for calls of a kind, free again when it is dropped.
    ///
    /// # Errors
    /// All are taken; try again.
    pub(crate) fn take(&self, kind: Kind) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.0[kind as usize]).try_acquire_owned().map_err(|_| {
            let message = format!("{} {} are under way, the most at once; try again", kind.places(), kind.noun());
            ApiError::Admin(AdminError { kind: AdminErrorKind::Busy, message, param: None })
        })
    }
}
