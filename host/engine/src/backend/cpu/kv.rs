//! The paged key-value memory: one allocation, addressed by the block ids of the plan.
//!
//! `[block][layer][kv head][slab]`, where a slab holds sixteen positions: keys as `[head_dim][16 positions]`, so that
//! sixteen scores are computed at once without ever adding lanes together, values as `[16 positions][head_dim]`.
//!
//! Plain `f32`: the kernels compute in it, so a key read from the cache is the key that was computed, and the cache of a
//! CPU lives in main memory, where a page costs little. Halving it with `f16` is possible and not yet needed.

use pointsman_sched::ids::BlockId;

use super::aligned::Aligned;
use super::isa::{LANES, Lanes};
use crate::spec::ModelSpec;

/// Sizes of the pages, and the arithmetic of how many fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPlan {
    /// Positions in a block; a multiple of 16.
    pub block_tokens: usize,
    /// Bytes of a block: keys and values of `block_tokens` positions in every layer.
    pub block_bytes: usize,
    /// Blocks.
    pub n_blocks: usize,
}

/// The pages.
#[derive(Debug)]
pub(super) struct KvPool {
    pages: Aligned<f32, LANES>,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    slabs_per_block: usize,
}

/// Keys and values of sixteen positions of one head in one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slab<'a> {
    /// `[head_dim]`, a lane per position.
    pub(super) keys: &'a [Lanes],
    /// `[16 positions][head_dim / 16]`.
    pub(super) values: &'a [Lanes],
}

impl KvPlan {
    /// The plan for a given number of blocks.
    #[must_use]
    pub fn for_blocks(spec: &ModelSpec, block_tokens: usize, n_blocks: usize) -> Self {
        let block_bytes = 2 * size_of::<f32>() * spec.layers * spec.kv_dim() * block_tokens;
        Self { block_tokens, block_bytes, n_blocks }
    }

    /// As many blocks as fit in `bytes`.
    #[must_use]
    pub fn for_memory(spec: &ModelSpec, block_tokens: usize, bytes: usize) -> Self {
        let plan = Self::for_blocks(spec, block_tokens, 0);
        Self { n_blocks: bytes / plan.block_bytes.max(1), ..plan }
    }

    /// Bytes of all blocks.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.n_blocks * self.block_bytes
    }
}

impl KvPool {
    pub(super) fn allocate(spec: &ModelSpec, plan: &KvPlan) -> Self {
        Self {
            pages: Aligned::filled(0.0, plan.bytes() / size_of::<Lanes>()),
            layers: spec.layers,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            slabs_per_block: plan.block_tokens / LANES,
        }
    }

    /// Index of the first vector of a slab.
    #[inline(always)]
    fn slab_at(&self, block: BlockId, layer: usize, head: usize, slab: usize) -> usize {
        let head = (block.0 as usize * self.layers + layer) * self.kv_heads + head;
        (head * self.slabs_per_block + slab) * 2 * self.head_dim
    }

    /// Slab `slab` of a sequence with this block table.
    #[inline(always)]
    pub(super) fn slab(&self, blocks: &[BlockId], layer: usize, head: usize, slab: usize) -> Slab<'_> {
        let block = blocks[slab / self.slabs_per_block];
        let at = self.slab_at(block, layer, head, slab % self.slabs_per_block);
        let (keys, values) = self.pages[at..at + 2 * self.head_dim].split_at(self.head_dim);
        Slab { keys, values }
    }

    /// Writes the key and value of one position of one head, given as panels `[head_dim / 16]` with a stride.
    pub(super) fn write(&mut self, at: Position<'_>, key: Strided<'_>, value: Strided<'_>) {
        let slab = at.position / LANES;
        let block = at.blocks[slab / self.slabs_per_block];
        let base = self.slab_at(block, at.layer, at.head, slab % self.slabs_per_block);
        let (lane, panels) = (at.position % LANES, self.head_dim / LANES);
        let (keys, values) = self.pages[base..base + 2 * self.head_dim].split_at_mut(self.head_dim);
        for panel in 0..panels {
            for (i, &x) in key.panel(panel).iter().enumerate() {
                keys[panel * LANES + i][lane] = x;
            }
            values[lane * panels + panel] = *value.panel(panel);
        }
    }
}

/// Where a key and value go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Position<'a> {
    pub(super) blocks: &'a [BlockId],
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) position: usize,
}

/// One row of some panels: every `stride`-th vector.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strided<'a> {
    pub(super) panels: &'a [Lanes],
    pub(super) stride: usize,
    pub(super) row: usize,
}

impl<'a> Strided<'a> {
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &'a Lanes {
        &self.panels[panel * self.stride + self.row]
    }
}
