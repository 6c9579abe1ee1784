//! Every interleaving of readers, a publisher and retirement, on the very file that the crate uses (`src/drain.rs`), with
//! loom's atomics in place of std's. The pointer swap itself is arc-swap's and is modelled by an atomic index.

#[path = "../src/drain.rs"]
mod drain;

mod sync {
    pub(crate) use loom::model;
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

use drain::{Drain, Gate};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;

/// A slot with two generations: 0 is current; 1 comes next, or is staged beside it.
struct Slot {
    current: AtomicUsize,
    gates: [Gate; 2],
    alive: [AtomicBool; 2],
    told: AtomicUsize,
}

impl Slot {
    fn new() -> Self {
        Self {
            current: AtomicUsize::new(0),
            gates: [Gate::new(), Gate::new()],
            alive: [AtomicBool::new(true), AtomicBool::new(true)],
            told: AtomicUsize::new(0),
        }
    }

    /// Whoever is told that a generation drained may free it.
    fn learned(&self, index: usize, drain: Drain) {
        if drain == Drain::Drained {
            assert!(self.gates[index].is_drained());
            self.alive[index].store(false, Ordering::Relaxed);
            self.told.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> usize {
        loop {
            let index = self.current.load(Ordering::Acquire);
            match self.gates[index].enter() {
                Ok(()) => {
                    assert!(self.alive[index].load(Ordering::Relaxed), "inside a generation that was freed");
                    assert!(self.alive[index].load(Ordering::Relaxed), "freed while someone was inside");
                    self.learned(index, self.gates[index].leave());
                    return index;
                }
                Err(drain) => {
                    self.learned(index, drain);
                    thread::yield_now();
                }
            }
        }
    }

    fn point_to(&self, index: usize) {
        self.current.store(index, Ordering::Release);
    }

    fn retire(&self, index: usize) {
        self.learned(index, self.gates[index].retire());
    }
}

/// Runs `change` beside two readers, in every interleaving; then `loser` must be gone and the other must serve.
fn beside_readers(loser: usize, change: fn(&Slot)) {
    // Three forced switches find every bug that needs up to three; without a bound the model takes minutes.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let slot = Arc::new(Slot::new());
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let slot = Arc::clone(&slot);
                thread::spawn(move || slot.read())
            })
            .collect();
        change(&slot);
        for reader in readers {
            assert!(reader.join().expect("no panic") < 2);
        }
        assert_eq!(slot.told.load(Ordering::Relaxed), 1, "told exactly once");
        assert!(!slot.alive[loser].load(Ordering::Relaxed), "and nobody is left inside");
        assert!(slot.alive[1 - loser].load(Ordering::Relaxed));
        assert_eq!(slot.read(), 1 - loser);
    });
}

#[test]
fn a_generation_is_freed_once_and_never_under_a_reader() {
    beside_readers(0, |slot| {
        slot.point_to(1);
        slot.retire(0);
    });
}

#[test]
fn a_flip_retires_nobody_and_a_candidate_that_is_taken_back_drains() {
    beside_readers(1, |slot| {
        slot.point_to(1);
        slot.point_to(0);
        slot.retire(1);
    });
}

#[test]
fn a_candidate_that_never_served_drains() {
    beside_readers(1, |slot| slot.retire(1));
}
