//! How many requests may be sent to a second upstream because the first is slow to begin: a tenth of those that the first is
//! sent, so that one that is slow for everybody does not double the load of the others.

use std::sync::atomic::{AtomicU32, Ordering};

/// Requests that pay for one more.
const PER_HEDGE: u32 = 10;
/// Those that can be saved up, for a moment in which many wait.
const MOST: u32 = 10 * PER_HEDGE;

/// Counts requests, and those of them that were sent twice.
#[derive(Debug)]
pub(super) struct Allowance(AtomicU32);

impl Default for Allowance {
    /// The first request that waits need not be the tenth.
    fn default() -> Self {
        Self(AtomicU32::new(PER_HEDGE))
    }
}

impl Allowance {
    /// Another request was sent.
    pub(super) fn earn(&self) {
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| (saved < MOST).then_some(saved + 1));
    }

    /// Whether one may be sent twice; it is paid for.
    pub(super) fn take(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| saved.checked_sub(PER_HEDGE)).is_ok()
    }

    /// It was not sent after all.
    pub(super) fn give_back(&self) {
        let back = |saved: u32| Some(MOST.min(saved + PER_HEDGE));
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, back);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_and_ten_at_once_at_most() {
        let allowance = Allowance::default();
        assert!(allowance.take() && !allowance.take(), "the first");
        let taken = |n: u32| (0..n).filter(|_| allowance.take()).count();
        (0..9).for_each(|_| allowance.earn());
        assert_eq!(taken(5), 0);
        allowance.earn();
        assert_eq!(taken(5), 1);
        (0..1_000).for_each(|_| allowance.earn());
        assert_eq!(taken(1_000), 10);
        allowance.give_back();
        assert_eq!(taken(5), 1);
    }
}
