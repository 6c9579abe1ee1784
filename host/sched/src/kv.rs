//! The block pool and the prefix index as one thing, so that neither can forget what the other knows.
//!
//! Invariant: a block is marked cached in the pool exactly while the index has an entry for it. Everything that breaks one
//! side (eviction, displacement of an orphan, a failed step) goes through here.
//!
//! Who is evicted next is decided here too, because it takes both sides to know: a retention policy's order over blocks is
//! looked at only when memory is needed, and holds only for blocks that are still cached, unused, and without children.

use std::sync::Arc;

use crate::blocks::{BlockPool, Standing};
use crate::config::Config;
use crate::ids::{BlockId, Micros};
use crate::prefix::{Inserted, Link, PrefixIndex, chain_hash};
use crate::publish::PrefixSketch;
use crate::request::Request;
use crate::retention::{BlockColumns, MAX_ROWS, Ranking};

/// How far a sequence's blocks are in the index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chain {
    /// Entry of the last indexed block.
    link: Link,
    /// Its chained hash.
    hash: u64,
    /// Number of leading blocks that are indexed, or known there in another block.
    indexed: u32,
    /// False when the request asked for no caching, or a collision ended it.
    on: bool,
}

/// A sequence's tokens with the hashes that its request came with (of the full blocks of the prompt).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) hashes: &'a [u64],
}

/// For whom and when blocks are computed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Origin {
    pub(crate) tenant: u32,
    pub(crate) now: Micros,
    /// They leave the cache with the last sequence that holds them.
    pub(crate) transient: bool,
}

#[derive(Debug)]
pub(crate) struct Kv {
    pub(crate) pool: BlockPool,
    index: PrefixIndex,
    block_tokens: usize,
    /// By block; meaningful while it is cached.
    uses: Vec<Uses>,
    /// Blocks that a retention policy wants gone first, and last.
    first: Queue,
    last: Queue,
    /// Cached blocks that had to go because memory was needed, in all.
    pub(crate) n_evicted: u64,
}

/// What became of a cached block.
#[derive(Clone, Copy, Debug, Default)]
struct Uses {
    created: Micros,
    last: Micros,
    hits: u32,
    tenant: u32,
    transient: bool,
}

/// Blocks in the order of a ranking, each looked at once.
#[derive(Debug, Default)]
struct Queue {
    blocks: Vec<BlockId>,
    next: usize,
}

impl Queue {
    fn with_room(n: usize) -> Self {
        Self { blocks: Vec::with_capacity(n), next: 0 }
    }

    fn pop(&mut self, may_go: impl Fn(BlockId) -> bool) -> Option<BlockId> {
        let rest = &self.blocks[self.next..];
        let skipped = rest.iter().position(|&block| may_go(block));
        self.next += skipped.map_or(rest.len(), |skipped| skipped + 1);
        skipped.map(|skipped| rest[skipped])
    }

    fn clear(&mut self) {
        self.blocks.clear();
        self.next = 0;
    }
}

impl Chain {
    pub(crate) fn start(on: bool) -> Self {
        Self { link: Link::ROOT, hash: 0, indexed: 0, on }
    }

    fn advance(&mut self, link: Link, hash: u64) {
        (self.link, self.hash, self.indexed) = (link, hash, self.indexed + 1);
    }
}

impl Kv {
    pub(crate) fn new(config: &Config, sketch: Arc<PrefixSketch>) -> Self {
        Self {
            pool: BlockPool::new(config.n_blocks),
            index: PrefixIndex::new(config.n_blocks, config.block_tokens, sketch),
            block_tokens: config.block_tokens as usize,
            uses: vec![Uses::default(); config.n_blocks as usize],
            first: Queue::with_room(MAX_ROWS),
            last: Queue::with_room(config.n_blocks as usize),
            n_evicted: 0,
        }
    }

    /// Whether a request may use the cache: it came with the hashes of its prompt's full blocks, no more and no fewer.
    pub(crate) fn is_cacheable(&self, request: &Request) -> bool {
        let n_hashes = request.block_hashes.len();
        n_hashes > 0 && n_hashes == request.prompt.len() / self.block_tokens
    }

    /// The leading blocks of `text` that are cached, the last token excepted: it must be computed so that logits exist.
    /// Nothing is retained yet.
    pub(crate) fn matching(&self, text: Text<'_>, found: &mut Vec<BlockId>) -> Chain {
        found.clear();
        let mut chain = Chain::start(true);
        let n_blocks = text.tokens.len().saturating_sub(1) / self.block_tokens;
        while (chain.indexed as usize) < n_blocks {
            let (hash, tokens) = self.next_block(text, &chain);
            let Some(link) = self.index.find(chain.link, hash, tokens) else { break };
            found.push(link.block());
            chain.advance(link, hash);
        }
        chain
    }

    /// A block of one's own, evicting if need be; `None` when sequences hold the whole pool.
    pub(crate) fn take(&mut self) -> Option<BlockId> {
        let ranked = if self.pool.counts().free > 0 { None } else { self.ranked_victim() };
        let taken = match ranked {
            Some(block) => self.pool.evict(block),
            None => self.pool.take()?,
        };
        if taken.evicted {
            assert!(self.index.remove(taken.block), "{:?} was cached and not indexed", taken.block);
            self.n_evicted += 1;
        }
        Some(taken.block)
    }

    /// The block that a ranking wants gone next: one of the first, or one of the last when only those are left. A block of
    /// which a continuation is still cached stays, for its children would be lost with it.
    fn ranked_victim(&mut self) -> Option<BlockId> {
        let Self { pool, index, first, last, .. } = self;
        let is_leaf = |block| index.children(block) == 0;
        let goes_first = |block| pool.is_evictable(block) && pool.standing(block) == Standing::First;
        if let Some(block) = first.pop(|block| goes_first(block) && is_leaf(block)) {
            return Some(block);
        }
        if last.blocks.is_empty() || pool.any_in_turn() {
            return None;
        }
        last.pop(|block| pool.is_evictable(block) && is_leaf(block))
    }

    /// Fills `columns` with evictable blocks in the host's order, and `rows` with which they are; at most [`MAX_ROWS`].
    pub(crate) fn show(&self, columns: &mut BlockColumns, rows: &mut Vec<BlockId>) {
        columns.clear();
        rows.clear();
        rows.extend(self.pool.evictable().take(MAX_ROWS));
        for &block in rows.iter() {
            let uses = self.uses[block.0 as usize];
            columns.prefix.push(self.index.hash(block));
            columns.depth.push(self.index.depth(block));
            columns.children.push(self.index.children(block));
            columns.last_used.push(uses.last);
            columns.created.push(uses.created);
            columns.hits.push(uses.hits);
            columns.tenant.push(uses.tenant);
        }
    }

    /// Follows a checked ranking of `rows` from now on, instead of the one before. What precedes a kept block in its prompt is
    /// kept with it: alone it would be of no use.
    pub(crate) fn follow(&mut self, ranking: &Ranking, rows: &[BlockId]) {
        self.forget_ranking();
        for &row in &ranking.evict {
            self.pool.set_standing(rows[row as usize], Standing::First);
            self.first.blocks.push(rows[row as usize]);
        }
        for &row in &ranking.keep {
            self.pool.set_standing(rows[row as usize], Standing::Last);
            self.last.blocks.push(rows[row as usize]);
        }
        for i in 0..ranking.keep.len() {
            let mut before = self.index.parent(self.last.blocks[i]);
            while let Some(block) = before.filter(|&block| self.pool.standing(block) != Standing::Last) {
                self.pool.set_standing(block, Standing::Last);
                self.last.blocks.push(block);
                before = self.index.parent(block);
            }
        }
    }

    /// Goes back to the host's own order.
    pub(crate) fn forget_ranking(&mut self) {
        for &block in self.first.blocks.iter().chain(&self.last.blocks) {
            self.pool.set_standing(block, Standing::InTurn);
        }
        self.first.clear();
        self.last.clear();
        self.pool.standings_changed();
    }

    /// A request uses blocks that it found in the cache.
    pub(crate) fn reuse(&mut self, block: BlockId, is_hit: bool) {
        self.pool.retain(block);
        let hits = &mut self.uses[block.0 as usize].hits;
        *hits = hits.saturating_add(u32::from(is_hit));
    }

    /// Gives a whole table back, the last block first: the end of a prefix is evicted before its beginning.
    pub(crate) fn release_all(&mut self, table: &mut Vec<BlockId>, now: Micros) {
        while let Some(block) = table.pop() {
            if self.uses[block.0 as usize].transient && self.pool.references(block) == 1 {
                self.forget(block);
            }
            self.pool.release(block);
            self.uses[block.0 as usize].last = now;
        }
    }

    /// Indexes the blocks of `table` that hold the `computed` first tokens of `text` and are not in the index yet.
    pub(crate) fn publish(
        &mut self,
        text: Text<'_>,
        (table, computed): (&[BlockId], u32),
        chain: &mut Chain,
        origin: Origin,
    ) {
        let n_full = computed as usize / self.block_tokens;
        let mut restarted = false;
        while chain.on && (chain.indexed as usize) < n_full {
            let (hash, tokens) = self.next_block(text, chain);
            let block = table[chain.indexed as usize];
            match self.index.insert(chain.link, hash, tokens, block) {
                Inserted::New { link, displaced } => {
                    if let Some(orphan) = displaced {
                        self.pool.uncache(orphan);
                    }
                    if !self.pool.is_cached(block) {
                        let Origin { tenant, now, transient } = origin;
                        self.uses[block.0 as usize] = Uses { created: now, last: now, hits: 0, tenant, transient };
                    }
                    self.pool.set_cached(block);
                    chain.advance(link, hash);
                }
                Inserted::Known(link) => chain.advance(link, hash),
                // The sequence's own copy of the beginning takes the place of the evicted one.
                Inserted::ParentGone if !restarted => {
                    restarted = true;
                    *chain = Chain::start(true);
                }
                Inserted::ParentGone | Inserted::Collision => chain.on = false,
            }
        }
    }

    /// Forgets what a block holds.
    pub(crate) fn forget(&mut self, block: BlockId) {
        if self.index.remove(block) {
            self.pool.uncache(block);
        }
    }

    /// Forgets what all blocks hold; how many that were. Those of sequences stay with them.
    pub(crate) fn forget_all(&mut self) -> u32 {
        self.forget_from(0)
    }

    /// Blocks that it was made with.
    pub(crate) fn most_blocks(&self) -> u32 {
        u32::try_from(self.uses.len()).unwrap_or(u32::MAX)
    }

    /// Has the first so many blocks from now on. No sequence holds one of those that go.
    pub(crate) fn resize(&mut self, n_blocks: u32) {
        self.forget_from(n_blocks);
        self.pool.resize(n_blocks);
    }

    fn forget_from(&mut self, first: u32) -> u32 {
        let mut n = 0;
        for index in first..self.pool.n_blocks() {
            n += u32::from(self.pool.is_cached(BlockId(index)));
            self.forget(BlockId(index));
        }
        n
    }

    /// Blocks of a table that nobody else holds. Sharing is by prefix, so they are its end and bisection finds them.
    pub(crate) fn n_private(&self, table: &[BlockId]) -> u32 {
        let shared = table.partition_point(|&block| self.pool.references(block) > 1);
        u32::try_from(table.len() - shared).unwrap_or(u32::MAX)
    }

    /// Asserts that pool and index agree on every block, and that only cached ones have a standing.
    pub(crate) fn assert_consistent(&self) {
        for index in 0..self.pool.n_blocks() {
            let block = BlockId(index);
            assert_eq!(self.pool.is_cached(block), self.index.contains(block), "{block:?}: pool and index disagree");
            let standing = self.pool.standing(block);
            assert!(
                self.pool.is_cached(block) || standing == Standing::InTurn,
                "{block:?} is not cached and {standing:?}"
            );
        }
    }

    fn next_block<'a>(&self, text: Text<'a>, chain: &Chain) -> (u64, &'a [u32]) {
        let i = chain.indexed as usize;
        let tokens = &text.tokens[i * self.block_tokens..(i + 1) * self.block_tokens];
        let hash = text.hashes.get(i).copied().unwrap_or_else(|| chain_hash(chain.hash, tokens));
        (hash, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        block_tokens: 2,
        n_blocks: 4,
        max_running: 1,
        step_tokens: 1,
        max_waiting: 1,
        prefill_chunk: 1,
        starvation_us: 1,
        context_tokens: 8,
    };

    const ORIGIN: Origin = Origin { tenant: 1, now: 1, transient: false };

    #[test]
    fn a_copy_takes_the_place_of_an_evicted_beginning() {
        let mut kv = Kv::new(&CONFIG, Arc::new(PrefixSketch::new(4)));
        let text = Text { tokens: &[1, 1, 2, 2, 9], hashes: &[] };
        let [mut first, mut copy] = [(); 2].map(|()| (vec![kv.take().expect("a free block")], Chain::start(true)));
        kv.publish(text, (&first.0, 2), &mut first.1, ORIGIN);
        // Computed at the same time: known already, so it stays private.
        kv.publish(text, (&copy.0, 2), &mut copy.1, ORIGIN);
        kv.release_all(&mut first.0, 1);
        let others: Vec<_> = (0..3).map(|_| kv.take().expect("the last one is evicted")).collect();
        kv.pool.release(others[0]);
        copy.0.push(kv.take().expect("just released"));
        kv.publish(text, (&copy.0, 4), &mut copy.1, ORIGIN);
        let mut found = Vec::new();
        kv.matching(text, &mut found);
        assert_eq!(found, copy.0);
        kv.assert_consistent();
    }

    /// A pool in which prompts of two blocks each have been computed and released, at times 10, 20 ...; rows are in the
    /// host's order: the end of the oldest prompt first.
    fn filled(n_prompts: u32) -> (Kv, Vec<BlockId>) {
        let config = Config { n_blocks: 2 * n_prompts, ..CONFIG };
        let mut kv = Kv::new(&config, Arc::new(PrefixSketch::new(8)));
        for prompt in 0..n_prompts {
            let tokens = [prompt; 4];
            let mut table: Vec<_> = (0..2).map(|_| kv.take().expect("a free block")).collect();
            let now = Micros::from(10 * (prompt + 1));
            let origin = Origin { tenant: prompt, now, transient: false };
            kv.publish(Text { tokens: &tokens, hashes: &[] }, (&table, 4), &mut Chain::start(true), origin);
            kv.release_all(&mut table, now + 5);
        }
        let (mut columns, mut rows) = (BlockColumns::default(), Vec::new());
        kv.show(&mut columns, &mut rows);
        assert_eq!(columns.len(), rows.len());
        (kv, rows)
    }

    #[test]
    fn columns_say_what_became_of_a_block() {
        let (mut kv, rows) = filled(2);
        kv.reuse(rows[1], true);
        kv.reuse(rows[1], false);
        for now in [30, 40] {
            kv.release_all(&mut vec![rows[1]], now);
        }
        let (mut columns, mut rows) = (BlockColumns::default(), Vec::new());
        kv.show(&mut columns, &mut rows);
        let first = [chain_hash(0, &[0, 0]), chain_hash(0, &[1, 1])];
        let second = [chain_hash(first[0], &[0, 0]), chain_hash(first[1], &[1, 1])];
        let expect = BlockColumns {
            prefix: vec![second[0], second[1], first[1], first[0]],
            depth: vec![1, 1, 0, 0],
            children: vec![0, 0, 1, 1],
            last_used: vec![15, 25, 25, 40],
            created: vec![10, 20, 20, 10],
            hits: vec![0, 0, 0, 1],
            tenant: vec![0, 1, 1, 0],
            new_tenants: Vec::new(),
        };
        assert_eq!(columns, expect);
    }

    #[test]
    fn a_ranking_is_an_order_and_never_a_refusal() {
        // Rows: 0 the end of the oldest prompt, 1 its beginning, 2 and 3 the next prompt, 4 and 5 the youngest.
        for (evict, keep, expect) in [
            (vec![], vec![], [0, 1, 2, 3, 4, 5]),
            (vec![4, 5], vec![], [4, 5, 0, 1, 2, 3]),
            // A beginning goes after its end whatever the order; it is skipped then, and goes in its turn.
            (vec![5, 4], vec![], [4, 0, 1, 2, 3, 5]),
            (vec![], vec![0, 1], [2, 3, 4, 5, 0, 1]),
            (vec![], vec![2, 3, 0, 1], [4, 5, 2, 3, 0, 1]),
            // A kept end keeps its beginning.
            (vec![], vec![0], [2, 3, 4, 5, 0, 1]),
            (vec![1, 3], vec![0], [2, 3, 4, 5, 0, 1]),
            (vec![], vec![0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
            (vec![4], vec![2, 3], [4, 0, 1, 5, 2, 3]),
        ] {
            let (mut kv, rows) = filled(3);
            let ranking = Ranking { evict, keep };
            kv.follow(&ranking, &rows);
            let taken: Vec<_> = std::iter::from_fn(|| kv.take()).collect();
            assert_eq!(taken, expect.map(|row| rows[row]), "{ranking:?}");
            assert_eq!(kv.n_evicted, 6);
            kv.assert_consistent();
        }
    }

    #[test]
    fn what_has_changed_since_the_ranking_is_skipped() {
        let (mut kv, rows) = filled(3);
        kv.follow(&Ranking { evict: vec![4, 5, 2], keep: vec![0, 1] }, &rows);
        // Used again: the policy's reason to evict it is gone. One that is kept is kept all the more.
        for row in [4, 1] {
            kv.reuse(rows[row], true);
            kv.release_all(&mut vec![rows[row]], 50);
        }
        kv.forget(rows[2]);
        let taken: Vec<_> = std::iter::from_fn(|| kv.take()).collect();
        assert_eq!(taken, [2, 3, 5, 4, 0, 1].map(|row| rows[row]), "2 is free; 5 has a child and goes in its turn");
        // Forgotten rankings leave nothing behind.
        let (mut kv, rows) = filled(3);
        kv.follow(&Ranking { evict: vec![4], keep: vec![0, 2, 3] }, &rows);
        kv.forget_ranking();
        let taken: Vec<_> = std::iter::from_fn(|| kv.take()).collect();
        assert_eq!(taken, rows);
    }
}
