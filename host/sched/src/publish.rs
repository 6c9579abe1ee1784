//! What a replica shows to router threads while its driver works: gauges and a sketch of its prefix cache.
//!
//! Plain atomics written by the driver at step boundaries and read by router threads without a lock. A reader may see one
//! gauge older than another; routing needs no more. The prefix sketch is a hint: it may miss, and after an eviction it may
//! promise too much for the length of one step; the index itself confirms by tokens before a block is reused.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::predict::Outlook;

/// Load of one replica.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the fields are those of `record replicas` in wit/policy.wit, documented there")]
pub struct ReplicaGauges {
    pub waiting: AtomicU32,
    pub running: AtomicU32,
    pub running_limit: AtomicU32,
    pub queued_tokens: AtomicU32,
    pub free_blocks: AtomicU32,
    pub total_blocks: AtomicU32,
    /// Of the free blocks, those that hold a prefix; and all that had to give theirs up for room, in sum.
    pub cached_blocks: AtomicU32,
    pub evicted_blocks: AtomicU64,
    /// Places of held blocks in which no token is.
    pub slack_tokens: AtomicU32,
    /// Known tokens at admission of sequences that may use the prefix cache, and those found there, in sum.
    pub prefix_query_tokens: AtomicU64,
    pub prefix_hit_tokens: AtomicU64,
    /// Requests sent to the replica's mailbox that its driver has not taken yet, and their prompt tokens: the router's own
    /// reservations, so that a burst between two steps does not pile onto one replica.
    pub reserved_requests: AtomicU32,
    pub reserved_tokens: AtomicU32,
    /// Share of the recent time in which the replica computed, in millionths.
    pub busy_ppm: AtomicU32,
    /// Share of the requests that ended lately which failed by a fault of host or device, in millionths.
    pub failed_ppm: AtomicU32,
    /// The parts of an [`Outlook`].
    pub step_ns: AtomicU64,
    pub token_ns: AtomicU64,
    pub step_tokens: AtomicU32,
    /// Its driver has ended, or ends: nobody takes requests any more.
    pub gone: AtomicBool,
}

impl ReplicaGauges {
    /// Counts a request on its way to the mailbox.
    pub fn reserve(&self, prompt_tokens: u32) {
        self.reserved_requests.fetch_add(1, Ordering::Relaxed);
        self.reserved_tokens.fetch_add(prompt_tokens, Ordering::Relaxed);
    }

    /// Takes a reservation back: the driver has accepted the request, or the mailbox refused it.
    pub fn release(&self, prompt_tokens: u32) {
        self.reserved_requests.fetch_sub(1, Ordering::Relaxed);
        self.reserved_tokens.fetch_sub(prompt_tokens, Ordering::Relaxed);
    }

    /// Says what the next steps look like. Driver only.
    pub fn look_ahead(&self, outlook: Outlook) {
        self.step_ns.store(outlook.step_ns, Ordering::Relaxed);
        self.token_ns.store(outlook.token_ns, Ordering::Relaxed);
        self.step_tokens.store(outlook.step_tokens, Ordering::Relaxed);
    }

    /// What the driver said last.
    #[must_use]
    pub fn outlook(&self) -> Outlook {
        Outlook {
            step_ns: self.step_ns.load(Ordering::Relaxed),
            token_ns: self.token_ns.load(Ordering::Relaxed),
            step_tokens: self.step_tokens.load(Ordering::Relaxed),
        }
    }
}

/// Ways per set of the sketch.
const WAYS: usize = 4;

/// A set-associative table of the chained block hashes that a replica holds. One writer (the driver), many readers.
#[derive(Debug)]
pub struct PrefixSketch {
    sets: Box<[[AtomicU64; WAYS]]>,
}

impl PrefixSketch {
    /// A sketch for about `n_blocks` cached blocks, with room to spare.
    #[must_use]
    pub fn new(n_blocks: u32) -> Self {
        let n_sets = (n_blocks as usize).max(WAYS).next_power_of_two();
        Self { sets: (0..n_sets).map(|_| Default::default()).collect() }
    }

    fn set(&self, hash: u64) -> &[AtomicU64; WAYS] {
        // The chained hashes are well mixed: low bits are as good as any.
        &self.sets[usize::try_from(hash & (self.sets.len() as u64 - 1)).unwrap_or(0)]
    }

    /// Notes that a block with this chained hash is cached. A full set forgets its oldest way. Driver only.
    pub fn insert(&self, hash: u64) {
        let set = self.set(hash);
        if set.iter().any(|way| way.load(Ordering::Relaxed) == hash) {
            return;
        }
        let free = set.iter().find(|way| way.load(Ordering::Relaxed) == 0);
        let way = free.unwrap_or_else(|| &set[usize::try_from(hash >> 61).unwrap_or(0) % WAYS]);
        way.store(hash, Ordering::Relaxed);
    }

    /// Notes that the block was evicted. Driver only.
    pub fn remove(&self, hash: u64) {
        for way in self.set(hash) {
            if way.load(Ordering::Relaxed) == hash {
                way.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Number of leading hashes of a prompt that the replica probably holds.
    #[must_use]
    pub fn leading_hits(&self, hashes: &[u64]) -> usize {
        let hit = |hash: &&u64| self.set(**hash).iter().any(|way| way.load(Ordering::Relaxed) == **hash);
        hashes.iter().take_while(hit).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_hits_up_to_its_first_unknown_block() {
        let sketch = PrefixSketch::new(8);
        for hash in [11, 12, 14] {
            sketch.insert(hash);
        }
        assert_eq!(sketch.leading_hits(&[11, 12, 13, 14]), 2);
        sketch.remove(11);
        assert_eq!(sketch.leading_hits(&[11, 12]), 0);
        assert_eq!(sketch.leading_hits(&[]), 0);
    }
}
