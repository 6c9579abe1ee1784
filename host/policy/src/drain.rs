//! Counting who is inside a generation, retiring it, and learning exactly once that the last one left.
//!
//! One word: the count of those inside, and a bit that says "retired". Nobody ever waits: a reader that finds the bit set
//! leaves again and looks up the current generation, which was published before the bit was set. A reference count alone
//! (`Arc`) would free a generation on whichever serving thread lets go of it last; here that thread only learns that it was
//! the last, and freeing the guests' memory is left to the maintenance thread.
//!
//! Only std, through `super::sync`, so that tests/loom.rs can include this very file and check every interleaving.

use super::sync::{AtomicU64, Ordering};

/// Set once nobody may enter any more.
const RETIRED: u64 = 1 << 63;
/// Set by the one that is told `Drained`.
const CLAIMED: u64 = 1 << 62;

/// The door of one generation.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Number of those inside, plus [`RETIRED`].
    word: AtomicU64,
}

/// What [`Gate::retire`] and [`Gate::leave`] learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Someone is inside, or it is not retired: nothing to do.
    Pending,
    /// It is retired and nobody is inside, ever again. Told to exactly one caller.
    Drained,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self { word: AtomicU64::new(0) }
    }

    /// Goes in; pair it with [`leave`](Self::leave). `Err` if the generation is retired: look up the current one. The
    /// error carries what the failed attempt learned, for it may itself have been the last to go.
    pub(crate) fn enter(&self) -> Result<(), Drain> {
        if self.word.fetch_add(1, Ordering::Acquire) & RETIRED == 0 { Ok(()) } else { Err(self.leave()) }
    }

    /// Goes out.
    pub(crate) fn leave(&self) -> Drain {
        // AcqRel: what was done inside happens before whatever the drained generation's owner does next.
        if self.word.fetch_sub(1, Ordering::AcqRel) == RETIRED + 1 { self.claim() } else { Drain::Pending }
    }

    /// Closes the door. Call it after the next generation was published, once.
    pub(crate) fn retire(&self) -> Drain {
        if self.word.fetch_or(RETIRED, Ordering::AcqRel) == 0 { self.claim() } else { Drain::Pending }
    }

    /// Whether it was found drained.
    pub(crate) fn is_drained(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLAIMED != 0
    }

    /// Late visitors pass through the door and out again, each bringing the count to zero once more: the first to set the
    /// claim is the one that is told.
    fn claim(&self) -> Drain {
        if self.word.fetch_or(CLAIMED, Ordering::AcqRel) & CLAIMED == 0 { Drain::Drained } else { Drain::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sync::model;
    use super::*;

    #[test]
    fn the_last_one_out_is_told() {
        model(|| {
            let gate = Gate::new();
            assert_eq!(gate.enter(), Ok(()));
            assert_eq!(gate.enter(), Ok(()));
            assert_eq!(gate.leave(), Drain::Pending);
            assert_eq!(gate.retire(), Drain::Pending);
            assert_eq!(gate.enter(), Err(Drain::Pending));
            assert!(!gate.is_drained());
            assert_eq!(gate.leave(), Drain::Drained);
            assert!(gate.is_drained());
            assert_eq!(gate.enter(), Err(Drain::Pending), "told once");
        });
    }

    #[test]
    fn retiring_an_empty_one_drains_it() {
        model(|| {
            let gate = Gate::new();
            assert_eq!(gate.retire(), Drain::Drained);
            assert_eq!(gate.enter(), Err(Drain::Pending));
        });
    }
}
