//! A pool that grows and shrinks, and a cache that is emptied, while requests flow: what lies beside the pool on its device comes
//! and goes.
//!
//! Blocks go from the end, so that what is behind them can be given back as one piece. Who holds one of them is preempted and not
//! waited for: a long answer must not keep another model from being loaded, and most of what is lost is found in the cache.

use crate::ids::Micros;
use crate::observe::Observer;
use crate::sequence::Slot;

use super::Scheduler;

impl Scheduler {
    /// Empties the prefix cache; how many blocks it had. What running requests hold stays with them, and is known again as they
    /// go on.
    pub fn clear_cache(&mut self) -> u32 {
        let n = self.kv.forget_all();
        self.forget_ranking();
        self.publish_gauges();
        n
    }

    /// Gives the pool this many blocks; how many it has now: not more than it was made with, and not fewer than the largest live
    /// request may come to. Not while a step is in flight.
    pub fn resize(&mut self, n_blocks: u32, now: Micros, observer: &mut dyn Observer) -> u32 {
        assert!(!self.in_flight, "a step is in flight, and the engine writes its blocks");
        let needed = self.live().map(|(request, _)| self.most_blocks_of(request)).max();
        let n_blocks = n_blocks.max(needed.unwrap_or(0)).clamp(1, self.kv.most_blocks());
        // No policy decides who goes.
        self.generation = 0;
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        let holds = |slot: &Slot| self.sequences[*slot].table.iter().any(|block| block.0 >= n_blocks);
        slots.extend(self.running.iter().copied().filter(holds));
        for &slot in &slots {
            self.preempt(slot, now, observer);
        }
        self.slots = slots;
        self.kv.resize(n_blocks);
        self.forget_ranking();
        self.config.n_blocks = n_blocks;
        self.publish_gauges();
        n_blocks
    }

    /// What a retention policy said was about blocks that hold something else by now.
    fn forget_ranking(&mut self) {
        self.kv.forget_ranking();
        self.review.begin_anew();
    }
}
