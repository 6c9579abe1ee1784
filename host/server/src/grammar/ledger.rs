//! What all compiled forms and live masks use together, and the bound of it.
//!
//! A form has bounds of its own, but a thousand requests of tens of megabytes each would still be more than a machine has. So
//! each reports what the tables of its lexer, which grow as its text goes on and outgrow all else, have come to; the one that
//! grows beyond the sum is refused. Not a worst case reserved beforehand: that is a thousand times what most forms need.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The sum.
#[derive(Debug)]
pub(super) struct Ledger {
    most: usize,
    used: AtomicUsize,
}

/// What one form or mask uses of it, until it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    ledger: Arc<Ledger>,
    bytes: usize,
}

impl Ledger {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, used: AtomicUsize::new(0) })
    }

    /// A share of nothing as yet.
    pub(super) fn share(ledger: &Arc<Self>) -> Share {
        Share { ledger: Arc::clone(ledger), bytes: 0 }
    }
}

impl Share {
    /// What it has come to.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Another one, of nothing as yet.
    pub(super) fn another(&self) -> Self {
        Ledger::share(&self.ledger)
    }

    /// Has come to `bytes`; false where there is no room for that, and whoever uses them must let them go.
    #[must_use]
    pub(super) fn set(&mut self, bytes: usize) -> bool {
        let before = std::mem::replace(&mut self.bytes, bytes);
        let Ledger { most, used } = &*self.ledger;
        match bytes.checked_sub(before) {
            Some(more) => used.fetch_add(more, Ordering::Relaxed).saturating_add(more) <= *most || more == 0,
            None => {
                used.fetch_sub(before - bytes, Ordering::Relaxed);
                true
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.ledger.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_grows_beyond_the_sum_is_refused() {
        let ledger = Ledger::new(100);
        let (mut a, mut b) = (Ledger::share(&ledger), Ledger::share(&ledger));
        // Whose share comes to what, and whether there is room.
        for (step, (is_a, bytes, expect)) in [
            (true, 60, true),
            (false, 40, true),
            (false, 41, false),
            (true, 60, true),
            (true, 10, true),
            (true, 59, true),
            (true, 60, false),
        ]
        .into_iter()
        .enumerate()
        {
            let share = if is_a { &mut a } else { &mut b };
            assert_eq!(share.set(bytes), expect, "step {step}");
        }
        let mut c = a.another();
        drop((a, b));
        assert!(c.set(100), "what was refused is given back with the rest");
    }
}
