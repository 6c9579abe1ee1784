//! The paged KV pool: which blocks are free, held by sequences, or kept only because their contents may be wanted again.
//!
//! Every block is in exactly one of three states, told apart by its reference count and its `cached` flag:
//!
//! | references | cached | state | where |
//! |---|---|---|---|
//! | 0 | no | free | the free list |
//! | 0 | yes | evictable | the list of least recent use |
//! | > 0 | either | held | in the tables of that many sequences |
//!
//! A cached block may besides have a [`Standing`] that a retention policy gave it. Those that go last stay in the one list of
//! least recent use and are passed over, instead of living in a list of their own: taking the standing away again then
//! leaves every block where its last use put it.
//!
//! Releasing is explicit and not a `Drop`: the owner (a sequence in the scheduler's slab) must say when a block's contents
//! stop mattering, and a pool behind an `Rc` per block would cost a pointer chase per row and per step. A wrong release is
//! corrupt state and asserts: handing the same memory to two requests would show one user's text to another.

use crate::ids::BlockId;

/// End of a list.
const NIL: u32 = u32::MAX;

/// Who holds the pool's blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Nobody.
    pub free: u32,
    /// The prefix cache alone; evicted when needed.
    pub cached: u32,
    /// Sequences, whether or not the cache knows the block too.
    pub held: u32,
}

/// A block fresh from [`BlockPool::take`], with one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The block.
    pub block: BlockId,
    /// Whether it was cached until now: the index must forget it before anyone else looks.
    pub evicted: bool,
}

/// When a cached block goes, compared with the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// In its turn: the least recently used goes first.
    #[default]
    InTurn,
    /// Before all others, unless it is used again.
    First,
    /// After all others.
    Last,
}

/// The pool. Nothing allocates after construction, but for [`resize`](Self::resize).
#[derive(Debug)]
pub struct BlockPool {
    /// All that it was made with; it has the first `n_blocks` of them.
    blocks: Vec<Block>,
    n_blocks: u32,
    /// Used as a stack: the block freed last is the one most likely still in a cache.
    free: Vec<u32>,
    /// Ends of the intrusive list of evictable blocks.
    oldest: u32,
    newest: u32,
    /// In that list, every block before this one goes last; `NIL` when all do.
    in_turn: u32,
    n_evictable: u32,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    references: u32,
    cached: bool,
    standing: Standing,
    older: u32,
    newer: u32,
}

impl BlockPool {
    /// A pool of `n_blocks` free blocks, handed out from number 0 up.
    #[must_use]
    pub fn new(n_blocks: u32) -> Self {
        let block = Block { references: 0, cached: false, standing: Standing::InTurn, older: NIL, newer: NIL };
        Self {
            blocks: vec![block; n_blocks as usize],
            n_blocks,
            free: (0..n_blocks).rev().collect(),
            oldest: NIL,
            newest: NIL,
            in_turn: NIL,
            n_evictable: 0,
        }
    }

    /// Hands out a free block, else evicts the least recently used cached one, of those that go last only when there are no
    /// others; `None` when sequences hold everything.
    pub fn take(&mut self) -> Option<Taken> {
        if let Some(index) = self.free.pop() {
            self.blocks[index as usize].references = 1;
            return Some(Taken { block: BlockId(index), evicted: false });
        }
        let index = if self.any_in_turn() { self.in_turn } else { self.oldest };
        (index != NIL).then(|| self.evict(BlockId(index)))
    }

    /// Hands out this evictable block.
    pub fn evict(&mut self, block: BlockId) -> Taken {
        assert!(self.is_evictable(block), "{block:?} is not evictable");
        self.unlink(block.0);
        let entry = &mut self.blocks[block.0 as usize];
        (entry.references, entry.cached, entry.standing) = (1, false, Standing::InTurn);
        Taken { block, evicted: true }
    }

    /// Adds a holder to a block that is held or evictable.
    pub fn retain(&mut self, block: BlockId) {
        let entry = self.blocks[block.0 as usize];
        assert!(entry.references > 0 || entry.cached, "{block:?} is free and cannot be shared");
        if entry.references == 0 {
            self.unlink(block.0);
        }
        let entry = &mut self.blocks[block.0 as usize];
        entry.references += 1;
        if entry.standing == Standing::First {
            entry.standing = Standing::InTurn;
        }
    }

    /// Takes a holder away. The last one leaves the block evictable when it is cached (as the most recently used), free
    /// otherwise.
    pub fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.0 as usize];
        assert!(entry.references > 0, "{block:?} is released more often than it was taken");
        entry.references -= 1;
        if entry.references == 0 {
            if entry.cached { self.link_newest(block.0) } else { self.free.push(block.0) }
        }
    }

    /// Marks a held block as known to the prefix index, so that its last release keeps it.
    pub fn set_cached(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.0 as usize];
        assert!(entry.references > 0, "{block:?} has no holder and cannot enter the cache");
        entry.cached = true;
    }

    /// The prefix index has forgotten the block: frees it at once when nobody holds it.
    pub fn uncache(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.0 as usize];
        entry.standing = Standing::InTurn;
        if std::mem::replace(&mut entry.cached, false) && entry.references == 0 {
            self.unlink(block.0);
            self.free.push(block.0);
        }
    }

    /// Says when a cached block goes. Call [`standings_changed`](Self::standings_changed) after the last one.
    pub fn set_standing(&mut self, block: BlockId, standing: Standing) {
        let entry = &mut self.blocks[block.0 as usize];
        if entry.cached {
            entry.standing = standing;
        }
    }

    /// Looks at the standings from the beginning again.
    pub fn standings_changed(&mut self) {
        self.in_turn = self.oldest;
    }

    /// When a cached block goes.
    #[must_use]
    pub fn standing(&self, block: BlockId) -> Standing {
        self.blocks[block.0 as usize].standing
    }

    /// Whether there is an evictable block that does not go last. Every block is passed over once per use and standing.
    pub fn any_in_turn(&mut self) -> bool {
        while self.in_turn != NIL && self.blocks[self.in_turn as usize].standing == Standing::Last {
            self.in_turn = self.blocks[self.in_turn as usize].newer;
        }
        self.in_turn != NIL
    }

    /// Whether only the cache holds the block.
    #[must_use]
    pub fn is_evictable(&self, block: BlockId) -> bool {
        let entry = self.blocks[block.0 as usize];
        entry.references == 0 && entry.cached
    }

    /// The evictable blocks, least recently used first, whatever their standing.
    pub fn evictable(&self) -> impl Iterator<Item = BlockId> {
        let next = |&index: &u32| Some(self.blocks[index as usize].newer).filter(|&newer| newer != NIL);
        std::iter::successors(Some(self.oldest).filter(|&oldest| oldest != NIL), next).map(BlockId)
    }

    /// Number of sequences that hold the block.
    #[must_use]
    pub fn references(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].references
    }

    /// Whether the prefix index knows the block.
    #[must_use]
    pub fn is_cached(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].cached
    }

    /// Blocks that [`take`](Self::take) can still hand out.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.n_free() + self.n_evictable
    }

    /// Who holds the blocks now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let (free, cached) = (self.n_free(), self.n_evictable);
        Counts { free, cached, held: self.n_blocks() - free - cached }
    }

    /// Blocks in the pool.
    #[must_use]
    pub fn n_blocks(&self) -> u32 {
        self.n_blocks
    }

    /// Has the first so many blocks from now on, of those that it was made with. Blocks that go must be free; those that come are handed
    /// out after all others.
    pub fn resize(&mut self, n_blocks: u32) {
        assert!(n_blocks as usize <= self.blocks.len(), "the pool was not made with {n_blocks} blocks");
        let gone = self.blocks.iter().skip(n_blocks as usize);
        assert!(gone.clone().all(|block| block.references == 0 && !block.cached), "a block that goes is not free");
        self.free.retain(|&block| block < n_blocks);
        self.free.splice(0..0, (self.n_blocks..n_blocks).rev());
        self.n_blocks = n_blocks;
    }

    fn n_free(&self) -> u32 {
        u32::try_from(self.free.len()).unwrap_or(NIL)
    }

    fn link_newest(&mut self, index: u32) {
        let older = std::mem::replace(&mut self.newest, index);
        let entry = &mut self.blocks[index as usize];
        (entry.older, entry.newer) = (older, NIL);
        if older == NIL {
            self.oldest = index
        } else {
            self.blocks[older as usize].newer = index
        }
        if self.in_turn == NIL {
            self.in_turn = index
        }
        self.n_evictable += 1;
    }

    fn unlink(&mut self, index: u32) {
        let Block { older, newer, .. } = self.blocks[index as usize];
        if self.in_turn == index {
            self.in_turn = newer
        }
        if older == NIL {
            self.oldest = newer
        } else {
            self.blocks[older as usize].newer = newer
        }
        if newer == NIL {
            self.newest = older
        } else {
            self.blocks[newer as usize].older = older
        }
        self.n_evictable -= 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The pool as anyone would write it first: vectors, searched from the front.
    #[derive(Debug)]
    struct Naive {
        references: Vec<u32>,
        cached: Vec<bool>,
        free: Vec<u32>,
        evictable: Vec<u32>,
        standing: Vec<Standing>,
    }

    impl Naive {
        fn new(n: u32) -> Self {
            let len = n as usize;
            Self {
                references: vec![0; len],
                cached: vec![false; len],
                free: (0..n).rev().collect(),
                evictable: Vec::new(),
                standing: vec![Standing::InTurn; len],
            }
        }

        fn take(&mut self) -> Option<Taken> {
            let (index, evicted) = match self.free.pop() {
                Some(index) => (index, false),
                None if self.evictable.is_empty() => return None,
                None => {
                    let goes_last = |i: &u32| self.standing[*i as usize] == Standing::Last;
                    let place = self.evictable.iter().position(|i| !goes_last(i)).unwrap_or(0);
                    (self.evictable.remove(place), true)
                }
            };
            self.references[index as usize] = 1;
            self.cached[index as usize] = false;
            self.standing[index as usize] = Standing::InTurn;
            Some(Taken { block: BlockId(index), evicted })
        }

        fn release(&mut self, index: u32) {
            self.references[index as usize] -= 1;
            if self.references[index as usize] == 0 {
                if self.cached[index as usize] { self.evictable.push(index) } else { self.free.push(index) }
            }
        }

        fn resize(&mut self, n: u32, before: u32) {
            self.free.retain(|&index| index < n);
            for index in before..n {
                self.free.insert(0, index);
            }
        }

        fn uncache(&mut self, index: u32) {
            self.cached[index as usize] = false;
            self.standing[index as usize] = Standing::InTurn;
            if self.evictable.contains(&index) {
                self.evictable.retain(|&other| other != index);
                self.free.push(index);
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Take,
        Retain(u32),
        Release(u32),
        Cache(u32),
        Uncache(u32),
        Evict(u32),
        Rank(Vec<(u32, Standing)>),
        Resize(u32),
    }

    fn operations(n: u32) -> impl Strategy<Value = Vec<Operation>> {
        let standing = prop_oneof![Just(Standing::InTurn), Just(Standing::First), Just(Standing::Last)];
        let operation = prop_oneof![
            Just(Operation::Take),
            (0..n).prop_map(Operation::Retain),
            (0..n).prop_map(Operation::Release),
            (0..n).prop_map(Operation::Cache),
            (0..n).prop_map(Operation::Uncache),
            (0..n).prop_map(Operation::Evict),
            prop::collection::vec((0..n, standing), 0..4).prop_map(Operation::Rank),
            (0..=n).prop_map(Operation::Resize),
        ];
        prop::collection::vec(operation, 0..200)
    }

    proptest! {
        #[test]
        fn the_pool_agrees_with_a_naive_model(operations in operations(5)) {
            let (mut pool, mut naive) = (BlockPool::new(5), Naive::new(5));
            for operation in operations {
                match operation {
                    Operation::Take => prop_assert_eq!(pool.take(), naive.take()),
                    Operation::Retain(i) if naive.references[i as usize] > 0 || naive.cached[i as usize] => {
                        pool.retain(BlockId(i));
                        naive.evictable.retain(|&other| other != i);
                        naive.references[i as usize] += 1;
                        if naive.standing[i as usize] == Standing::First {
                            naive.standing[i as usize] = Standing::InTurn;
                        }
                    }
                    Operation::Release(i) if naive.references[i as usize] > 0 => {
                        pool.release(BlockId(i));
                        naive.release(i);
                    }
                    Operation::Cache(i) if naive.references[i as usize] > 0 => {
                        pool.set_cached(BlockId(i));
                        naive.cached[i as usize] = true;
                    }
                    Operation::Uncache(i) => {
                        pool.uncache(BlockId(i));
                        naive.uncache(i);
                    }
                    Operation::Evict(i) if naive.evictable.contains(&i) => {
                        prop_assert_eq!(pool.evict(BlockId(i)), Taken { block: BlockId(i), evicted: true });
                        naive.evictable.retain(|&other| other != i);
                        naive.references[i as usize] = 1;
                        naive.cached[i as usize] = false;
                        naive.standing[i as usize] = Standing::InTurn;
                    }
                    Operation::Rank(standings) => {
                        for (i, standing) in standings {
                            pool.set_standing(BlockId(i), standing);
                            if naive.cached[i as usize] {
                                naive.standing[i as usize] = standing;
                            }
                        }
                        pool.standings_changed();
                    }
                    Operation::Resize(n) => {
                        let is_free = |i| naive.references[i as usize] == 0 && !naive.cached[i as usize];
                        if (n..5).all(is_free) {
                            naive.resize(n, pool.n_blocks());
                            pool.resize(n);
                        }
                    }
                    Operation::Retain(_) | Operation::Release(_) | Operation::Cache(_) | Operation::Evict(_) => {}
                }
                prop_assert_eq!(pool.evictable().map(|block| block.0).collect::<Vec<_>>(), &naive.evictable[..]);
                let held = naive.references.iter().filter(|&&references| references > 0).count();
                let counts = pool.counts();
                prop_assert_eq!(
                    (counts.free as usize, counts.cached as usize, counts.held as usize),
                    (naive.free.len(), naive.evictable.len(), held)
                );
                for i in 0..5 {
                    prop_assert_eq!(pool.references(BlockId(i)), naive.references[i as usize]);
                    prop_assert_eq!(pool.is_cached(BlockId(i)), naive.cached[i as usize]);
                    prop_assert_eq!(pool.standing(BlockId(i)), naive.standing[i as usize]);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_double_release_asserts() {
        let mut pool = BlockPool::new(1);
        let taken = pool.take().expect("a free block");
        pool.release(taken.block);
        pool.release(taken.block);
    }
}
