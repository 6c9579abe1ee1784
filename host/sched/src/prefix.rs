//! The prefix index: which full blocks of past prompts and outputs the pool still holds.
//!
//! A block is found by the hash of its tokens chained with the hash of everything before it, so one lookup per block walks
//! a prompt. **Equal hashes prove nothing**: the hash is short, public and easy to collide on purpose, and reusing a wrong
//! block would answer one user from another's text. A find therefore compares the block's tokens and its parent link,
//! which names the very index entry that its predecessor was confirmed as; by induction the whole prefix is equal.
//!
//! Links carry a serial number and not only a block number, because blocks are recycled: a child whose parent was evicted
//! must not be reachable through whatever lives in the parent's memory next. Such an orphan is replaced as soon as someone
//! computes the same prefix again.
//!
//! A tree of blocks would make links free, but then a hit is a pointer walk, eviction a tree surgery, and routers could
//! not ask "how much of this prompt do you hold" from a flat table of hashes ([`PrefixSketch`]).

use std::sync::Arc;

use crate::hash::{IntMap, mix};
use crate::ids::BlockId;
use crate::publish::PrefixSketch;

/// Hash of a block given the hash of the block before it (0 before the first); never 0. Stable across restarts and hosts:
/// routers place by it.
#[must_use]
pub fn chain_hash(parent: u64, tokens: &[u32]) -> u64 {
    /// An odd constant with no pattern (the golden ratio's fraction).
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = mix(parent ^ STEP);
    for &token in tokens {
        // Multiply and fold: both are bijections, so two blocks that differ in one token never collide.
        hash = (hash ^ u64::from(token)).wrapping_mul(STEP);
        hash ^= hash >> 29;
    }
    mix(hash).max(1)
}

/// Chained hash of every full block of `tokens`, as [`Request::block_hashes`](crate::request::Request::block_hashes)
/// wants them. The rest after the last full block has none. Empty when `block_tokens` is 0.
#[must_use]
pub fn chain_hashes(tokens: &[u32], block_tokens: u32) -> Vec<u64> {
    salted_hashes(0, tokens, block_tokens)
}

/// The same in the place of a salt: prompts of different salts never find each other's blocks, because for the same tokens a
/// block's hash is a bijection of what precedes it. So nobody learns from the time of an answer what others have asked.
#[must_use]
pub fn salted_hashes(salt: u64, tokens: &[u32], block_tokens: u32) -> Vec<u64> {
    if block_tokens == 0 {
        return Vec::new();
    }
    let mut parent = salt;
    let next = |block: &[u32]| {
        parent = chain_hash(parent, block);
        parent
    };
    tokens.chunks_exact(block_tokens as usize).map(next).collect()
}

/// Names an entry of the index: a prefix that ends in this block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    block: BlockId,
    /// Given once per entry; 0 is the empty prefix.
    serial: u64,
}

/// What became of [`PrefixIndex::insert`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The block is in the index now.
    New {
        /// Its entry.
        link: Link,
        /// An unreachable block that had to go; the pool must be told.
        displaced: Option<BlockId>,
    },
    /// The same prefix is there already, in another block.
    Known(Link),
    /// Other contents have the same hash; they stay, the new block is not indexed.
    Collision,
    /// The parent was evicted in the meantime: nothing can hang below it.
    ParentGone,
}

/// The index. Capacity is that of the pool; nothing allocates after construction.
#[derive(Debug)]
pub struct PrefixIndex {
    by_hash: IntMap<u64, BlockId>,
    /// By block; a serial of 0 is no entry.
    entries: Vec<Entry>,
    /// By block: its tokens.
    tokens: Vec<u32>,
    block_tokens: usize,
    last_serial: u64,
    sketch: Arc<PrefixSketch>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u64,
    serial: u64,
    parent: Link,
    /// Blocks before it.
    depth: u32,
    /// Entries whose parent this is.
    children: u32,
}

impl Link {
    /// The empty prefix, parent of every first block.
    pub const ROOT: Self = Self { block: BlockId(u32::MAX), serial: 0 };

    /// The block in which the prefix ends.
    #[must_use]
    pub fn block(self) -> BlockId {
        self.block
    }
}

impl PrefixIndex {
    /// An empty index for a pool of `n_blocks`; `sketch` is kept in step with it for the routers.
    #[must_use]
    pub fn new(n_blocks: u32, block_tokens: u32, sketch: Arc<PrefixSketch>) -> Self {
        let n_blocks = n_blocks as usize;
        Self {
            // Twice the entries: the map then cleans its tombstones in place instead of growing.
            by_hash: IntMap::with_capacity_and_hasher(2 * (n_blocks + 1), Default::default()),
            entries: vec![Entry { hash: 0, serial: 0, parent: Link::ROOT, depth: 0, children: 0 }; n_blocks],
            tokens: vec![0; n_blocks * block_tokens as usize],
            block_tokens: block_tokens as usize,
            last_serial: 0,
            sketch,
        }
    }

    /// The entry for `tokens` after the prefix `parent`, confirmed by comparison.
    #[must_use]
    pub fn find(&self, parent: Link, hash: u64, tokens: &[u32]) -> Option<Link> {
        let &block = self.by_hash.get(&hash)?;
        let entry = self.entries[block.0 as usize];
        let equal = entry.parent == parent && self.tokens_of(block) == tokens;
        equal.then_some(Link { block, serial: entry.serial })
    }

    /// Adds a full, computed block after the prefix `parent`. `block` may be in the index already as an orphan of its own
    /// chain; it is then linked again.
    pub fn insert(&mut self, parent: Link, hash: u64, tokens: &[u32], block: BlockId) -> Inserted {
        assert_eq!(tokens.len(), self.block_tokens, "only full blocks are indexed");
        if parent != Link::ROOT && !self.is_live(parent) {
            return Inserted::ParentGone;
        }
        let mut displaced = None;
        if let Some(&known) = self.by_hash.get(&hash) {
            let entry = self.entries[known.0 as usize];
            let link = Link { block: known, serial: entry.serial };
            if known == block {
                // Its holder computed it after exactly this prefix: only the entry of the parent is another one now.
                self.leave(entry.parent);
                self.entries[known.0 as usize].parent = parent;
                self.join(parent);
                return Inserted::New { link, displaced: None };
            }
            if entry.parent == parent && self.tokens_of(known) == tokens {
                return Inserted::Known(link);
            }
            let orphan_of = self.entries[known.0 as usize].parent;
            if orphan_of == Link::ROOT || self.is_live(orphan_of) {
                return Inserted::Collision;
            }
            self.remove(known);
            displaced = Some(known);
        }
        assert_eq!(self.entries[block.0 as usize].serial, 0, "{block:?} is indexed under another hash");
        self.last_serial += 1;
        let serial = self.last_serial;
        let depth = self.join(parent);
        self.entries[block.0 as usize] = Entry { hash, serial, parent, depth, children: 0 };
        let start = block.0 as usize * self.block_tokens;
        self.tokens[start..start + self.block_tokens].copy_from_slice(tokens);
        self.by_hash.insert(hash, block);
        self.sketch.insert(hash);
        Inserted::New { link: Link { block, serial }, displaced }
    }

    /// Forgets a block; says whether it was known. Its children become orphans.
    pub fn remove(&mut self, block: BlockId) -> bool {
        let entry = &mut self.entries[block.0 as usize];
        if entry.serial == 0 {
            return false;
        }
        let Entry { hash, parent, .. } = *entry;
        entry.serial = 0;
        self.leave(parent);
        self.by_hash.remove(&hash);
        self.sketch.remove(hash);
        true
    }

    /// Whether the block is indexed.
    #[must_use]
    pub fn contains(&self, block: BlockId) -> bool {
        self.entries[block.0 as usize].serial != 0
    }

    /// Number of blocks in the index.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Whether no block is indexed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// Entries that continue this block's prefix.
    #[must_use]
    pub fn children(&self, block: BlockId) -> u32 {
        self.entries[block.0 as usize].children
    }

    /// Blocks before this one in its prefix.
    #[must_use]
    pub fn depth(&self, block: BlockId) -> u32 {
        self.entries[block.0 as usize].depth
    }

    /// The chained hash that the block is found by.
    #[must_use]
    pub fn hash(&self, block: BlockId) -> u64 {
        self.entries[block.0 as usize].hash
    }

    /// The indexed block that this one continues; `None` for a first block and for an orphan.
    #[must_use]
    pub fn parent(&self, block: BlockId) -> Option<BlockId> {
        let parent = self.entries[block.0 as usize].parent;
        self.is_live(parent).then_some(parent.block)
    }

    /// Counts one more child of `parent` and says how deep that is.
    fn join(&mut self, parent: Link) -> u32 {
        if !self.is_live(parent) {
            return 0;
        }
        let entry = &mut self.entries[parent.block.0 as usize];
        entry.children += 1;
        entry.depth + 1
    }

    /// Takes a child of `parent` away, if that has not gone itself.
    fn leave(&mut self, parent: Link) {
        if self.is_live(parent) {
            self.entries[parent.block.0 as usize].children -= 1;
        }
    }

    fn is_live(&self, link: Link) -> bool {
        self.entries.get(link.block.0 as usize).is_some_and(|entry| entry.serial == link.serial)
    }

    fn tokens_of(&self, block: BlockId) -> &[u32] {
        let start = block.0 as usize * self.block_tokens;
        &self.tokens[start..start + self.block_tokens]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn index(n_blocks: u32) -> (PrefixIndex, Arc<PrefixSketch>) {
        let sketch = Arc::new(PrefixSketch::new(n_blocks));
        (PrefixIndex::new(n_blocks, 2, Arc::clone(&sketch)), sketch)
    }

    fn new_link(inserted: Inserted) -> Link {
        match inserted {
            Inserted::New { link, .. } => link,
            other => panic!("not inserted: {other:?}"),
        }
    }

    #[test]
    fn hashes_are_chained_over_full_blocks_and_stable() {
        assert_eq!(chain_hashes(&[1, 2, 3], 4), []);
        assert_eq!(chain_hashes(&[1, 2, 3], 0), []);
        let whole = chain_hashes(&[1, 2, 3, 4, 5], 2);
        assert_eq!(whole, chain_hashes(&[1, 2, 3, 4], 2), "the rest has no hash");
        assert_eq!(whole[1], chain_hash(whole[0], &[3, 4]));
        assert_ne!(whole[1], chain_hashes(&[9, 2, 3, 4], 2)[1], "the prefix counts");
        // Routers on other hosts and after restarts place by these numbers: they are part of the contract.
        assert_eq!(whole, [4_707_941_259_753_959_032, 14_141_110_628_430_226_041]);
    }

    #[test]
    fn prompts_of_two_salts_never_meet() {
        let (mut index, _) = index(4);
        let prompt = [1, 2, 3, 4];
        let [ours, theirs] = [5, 6].map(|salt| salted_hashes(salt, &prompt, 2));
        assert!(ours.iter().zip(&theirs).all(|(a, b)| a != b));
        let first = new_link(index.insert(Link::ROOT, ours[0], &prompt[..2], BlockId(0)));
        assert_eq!(index.find(Link::ROOT, theirs[0], &prompt[..2]), None);
        assert_eq!(index.find(Link::ROOT, salted_hashes(5, &prompt, 2)[0], &prompt[..2]), Some(first));
    }

    #[test]
    fn hashes_are_well_mixed() {
        let mut seen = HashSet::new();
        let mut ones = [0u32; 64];
        for token in 0..4_096u32 {
            let hash = chain_hash(0, &[token, 7, 7, 7]);
            assert!(seen.insert(hash), "collision at {token}");
            for (bit, count) in ones.iter_mut().enumerate() {
                *count += u32::from(hash >> bit & 1 == 1);
            }
        }
        assert!(ones.iter().all(|count| (1_800..2_300).contains(count)), "{ones:?}");
    }

    #[test]
    fn a_forced_collision_never_finds_the_wrong_block() {
        let (mut index, _) = index(4);
        let first = new_link(index.insert(Link::ROOT, 77, &[1, 2], BlockId(0)));
        assert_eq!(index.find(Link::ROOT, 77, &[1, 3]), None, "other tokens");
        assert_eq!(index.insert(Link::ROOT, 77, &[1, 3], BlockId(1)), Inserted::Collision);
        assert!(!index.contains(BlockId(1)));
        // Equal tokens and an equal hash after another prefix: only the parent link tells them apart.
        let second = new_link(index.insert(first, 88, &[5, 5], BlockId(1)));
        assert_eq!(index.find(Link::ROOT, 88, &[5, 5]), None, "other prefix");
        assert_eq!(index.find(first, 88, &[5, 5]), Some(second));
    }

    #[test]
    fn an_orphan_is_unreachable_even_when_its_parents_block_is_recycled() {
        let (mut index, sketch) = index(4);
        let parent = new_link(index.insert(Link::ROOT, 10, &[1, 1], BlockId(0)));
        let child = new_link(index.insert(parent, 20, &[2, 2], BlockId(1)));
        assert!(index.remove(BlockId(0)));
        assert_eq!(sketch.leading_hits(&[10]), 0);
        assert_eq!(index.insert(parent, 30, &[3, 3], BlockId(2)), Inserted::ParentGone);
        let recycled = new_link(index.insert(Link::ROOT, 11, &[9, 9], BlockId(0)));
        assert_eq!(index.find(recycled, 20, &[2, 2]), None);
        // The same prefix computed again, in other blocks, takes the orphan's place.
        let again = new_link(index.insert(Link::ROOT, 10, &[1, 1], BlockId(2)));
        let inserted = index.insert(again, 20, &[2, 2], BlockId(3));
        assert!(matches!(inserted, Inserted::New { displaced: Some(BlockId(1)), .. }), "{inserted:?}");
        assert_ne!(index.find(again, 20, &[2, 2]), Some(child));
    }

    #[test]
    fn a_holder_links_its_own_orphan_again() {
        let (mut index, _) = index(4);
        let parent = new_link(index.insert(Link::ROOT, 10, &[1, 1], BlockId(0)));
        let child = new_link(index.insert(parent, 20, &[2, 2], BlockId(1)));
        let grandchild = new_link(index.insert(child, 30, &[3, 3], BlockId(2)));
        let family = |index: &PrefixIndex| [0, 1, 2, 3].map(|i| (index.children(BlockId(i)), index.parent(BlockId(i))));
        let (zero, one, three) = (Some(BlockId(0)), Some(BlockId(1)), Some(BlockId(3)));
        assert_eq!(family(&index), [(1, None), (1, zero), (0, one), (0, None)]);
        index.remove(BlockId(0));
        let again = new_link(index.insert(Link::ROOT, 10, &[1, 1], BlockId(3)));
        assert_eq!(index.parent(BlockId(1)), None, "an orphan");
        assert_eq!(index.insert(again, 20, &[2, 2], BlockId(1)), Inserted::New { link: child, displaced: None });
        assert_eq!(family(&index)[1..], [(1, three), (0, one), (1, None)]);
        assert_eq!([0, 1, 2].map(|i| index.depth(BlockId([3, 1, 2][i]))), [0, 1, 2]);
        assert_eq!(index.find(child, 30, &[3, 3]), Some(grandchild));
    }

    proptest! {
        /// Hashes of two bits make nearly everything collide; a find must still only ever name the right contents.
        #[test]
        fn whatever_is_found_is_what_was_put_there(
            operations in prop::collection::vec((0u32..6, prop::collection::vec(0u32..2, 2..7), any::<bool>()), 1..120)
        ) {
            let (mut index, _) = index(6);
            // By block: the whole prefix that was computed into it.
            let mut contents: Vec<Vec<u32>> = vec![Vec::new(); 6];
            for (block, tokens, evict) in operations {
                let block = BlockId(block);
                let parents = || (0..6).map(BlockId).filter(|&b| index.contains(b)).filter_map(|b| index.parent(b));
                for parent in (0..6).map(BlockId).filter(|&b| index.contains(b)) {
                    let children = parents().filter(|&other| other == parent).count();
                    prop_assert_eq!(index.children(parent) as usize, children);
                }
                if evict {
                    index.remove(block);
                    continue;
                }
                let (mut parent, mut hash) = (Link::ROOT, 0);
                for (i, pair) in tokens.chunks_exact(2).enumerate() {
                    hash = chain_hash(hash, pair) & 3;
                    if let Some(link) = index.find(parent, hash, pair) {
                        prop_assert_eq!(&contents[link.block().0 as usize], &tokens[..2 * (i + 1)]);
                        parent = link;
                        continue;
                    }
                    if !index.contains(block)
                        && let Inserted::New { .. } = index.insert(parent, hash, pair, block)
                    {
                        contents[block.0 as usize] = tokens[..2 * (i + 1)].to_vec();
                    }
                    break;
                }
            }
        }
    }
}
