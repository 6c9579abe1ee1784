//! The block pool and the prefix index as one thing, so that neither can forget what the other knows.
//!
//! Invariant: a block is marked cached in the pool exactly while the index has an entry for it. Everything that breaks one
//! side (eviction, displacement of an orphan, a failed step) goes through here.

use std::sync::Arc;

use crate::blocks::BlockPool;
use crate::config::Config;
use crate::ids::BlockId;
use crate::prefix::{Inserted, Link, PrefixIndex, chain_hash};
use crate::publish::PrefixSketch;
use crate::request::Request;

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

#[derive(Debug)]
pub(crate) struct Kv {
    pub(crate) pool: BlockPool,
    index: PrefixIndex,
    block_tokens: usize,
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
        let taken = self.pool.take()?;
        if taken.evicted {
            assert!(self.index.remove(taken.block), "{:?} was cached and not indexed", taken.block);
        }
        Some(taken.block)
    }

    /// Gives a whole table back, the last block first: the end of a prefix is evicted before its beginning.
    pub(crate) fn release_all(&mut self, table: &mut Vec<BlockId>) {
        while let Some(block) = table.pop() {
            self.pool.release(block);
        }
    }

    /// Indexes the blocks of `table` that hold `computed` tokens of `text` and are not in the index yet.
    pub(crate) fn publish(&mut self, text: Text<'_>, table: &[BlockId], computed: u32, chain: &mut Chain) {
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

    /// Forgets what a block holds, because its contents can no longer be trusted.
    pub(crate) fn distrust(&mut self, block: BlockId) {
        if self.index.remove(block) {
            self.pool.uncache(block);
        }
    }

    /// Blocks of a table that nobody else holds. Sharing is by prefix, so they are its end and bisection finds them.
    pub(crate) fn n_private(&self, table: &[BlockId]) -> u32 {
        let shared = table.partition_point(|&block| self.pool.references(block) > 1);
        u32::try_from(table.len() - shared).unwrap_or(u32::MAX)
    }

    /// Asserts that pool and index agree on every block.
    pub(crate) fn assert_consistent(&self) {
        for index in 0..self.pool.n_blocks() {
            let block = BlockId(index);
            assert_eq!(self.pool.is_cached(block), self.index.contains(block), "{block:?}: pool and index disagree");
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

    #[test]
    fn a_copy_takes_the_place_of_an_evicted_beginning() {
        let mut kv = Kv::new(&CONFIG, Arc::new(PrefixSketch::new(4)));
        let text = Text { tokens: &[1, 1, 2, 2, 9], hashes: &[] };
        let [mut first, mut copy] = [(); 2].map(|()| (vec![kv.take().expect("a free block")], Chain::start(true)));
        kv.publish(text, &first.0, 2, &mut first.1);
        // Computed at the same time: known already, so it stays private.
        kv.publish(text, &copy.0, 2, &mut copy.1);
        kv.release_all(&mut first.0);
        let others: Vec<_> = (0..3).map(|_| kv.take().expect("the last one is evicted")).collect();
        kv.pool.release(others[0]);
        copy.0.push(kv.take().expect("just released"));
        kv.publish(text, &copy.0, 4, &mut copy.1);
        let mut found = Vec::new();
        kv.matching(text, &mut found);
        assert_eq!(found, copy.0);
        kv.assert_consistent();
    }
}
