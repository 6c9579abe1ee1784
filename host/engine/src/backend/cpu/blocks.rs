//! Quantised weights as they lie in memory: 32 columns by one block of a GGML type, in exactly its bits.
//!
//! Four values of a column lie together, as both the vectors' and the tiles' dot products want them; what is packed
//! tighter than a byte (`supers`) is opened right before its products. Why not bytes for all: a decode step is bound by the
//! weights that it reads.

use half::f16;

use super::isa::WeightQuads;
use super::matrix::{BLOCK, PANEL};
use crate::load::Elements;

/// Weights of 32 columns by a block along K.
pub(super) trait QuantBlock: Send + Sync + 'static {
    /// Blocks of 32 along K.
    const BLOCKS: usize;
    /// All zeros.
    const EMPTY: Self;

    /// Takes over one column, which is all zeros, from a block of elements of its type.
    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize);

    /// The value `k` of a column.
    fn value(&self, column: usize, k: usize) -> f32;
}

/// GGML's Q8_0: signed bytes and a scale.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q8Block {
    pub(super) quants: WeightQuads,
    pub(super) scales: [f16; PANEL],
}

/// Where value `i` of a column in a block of 32 is: its quad and the byte there.
#[inline(always)]
pub(super) fn at(column: usize, i: usize) -> (usize, usize) {
    (i / 4, 4 * column + i % 4)
}

pub(super) fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

// === impl Q8Block ===

impl QuantBlock for Q8Block {
    const BLOCKS: usize = 1;
    const EMPTY: Self = Self { quants: [[0; 4 * PANEL]; BLOCK / 4], scales: [f16::ZERO; PANEL] };

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml = &from.blocks::<34>()[block];
        self.scales[column] = half(ggml, 0);
        for (i, q) in ggml[2..].iter().enumerate() {
            let (quad, byte) = at(column, i);
            self.quants[quad][byte] = q.cast_signed();
        }
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        let (quad, byte) = at(column, k);
        f32::from(self.quants[quad][byte]) * self.scales[column].to_f32()
    }
}
