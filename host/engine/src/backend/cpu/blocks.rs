//! Quantised weights as they lie in memory: 32 columns by one block of a GGML type, in exactly its bits.
//!
//! Four values of a column lie together, as both the vectors' and the tiles' dot products want them; what is packed
//! tighter than a byte is opened right before its products. Why not bytes for all: a decode step is bound by the
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

/// A block of 32, for products with activations in 8 bits: column `c` is `scales * quads`.
pub(super) trait ScaledBlock: QuantBlock {
    /// The bytes, opened into `room` where they are packed.
    fn quads<'a>(&'a self, room: &'a mut WeightQuads) -> &'a WeightQuads;

    fn scales(&self) -> &[f16; PANEL];

    /// What the largest of some scales becomes where they become integers: with the largest value it makes a number of 16 bits.
    const FINEST: f32;
}

/// GGML's Q8_0: signed bytes and a scale.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q8Block {
    quants: WeightQuads,
    scales: [f16; PANEL],
}

/// GGML's Q4_0: nibbles, 8 too large, and a scale.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q4Block {
    /// Low nibbles are quads 0 to 3, high nibbles 4 to 7.
    nibbles: [[u8; 4 * PANEL]; 4],
    scales: [f16; PANEL],
}

/// Room for a block of 32 whose weights were packed tighter than a byte, in whole cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Opened(pub(super) WeightQuads);

impl Opened {
    pub(super) const EMPTY: Self = Self([[0; 4 * PANEL]; BLOCK / 4]);
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

impl ScaledBlock for Q8Block {
    const FINEST: f32 = 255.0;

    #[inline(always)]
    fn quads<'a>(&'a self, _room: &'a mut WeightQuads) -> &'a WeightQuads {
        &self.quants
    }

    #[inline(always)]
    fn scales(&self) -> &[f16; PANEL] {
        &self.scales
    }
}

// === impl Q4Block ===

impl QuantBlock for Q4Block {
    const BLOCKS: usize = 1;
    const EMPTY: Self = Self { nibbles: [[0; 4 * PANEL]; BLOCK / 8], scales: [f16::ZERO; PANEL] };

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml = &from.blocks::<18>()[block];
        self.scales[column] = half(ggml, 0);
        // As there: values 0 to 15 are low nibbles, 16 to 31 the high ones of the same bytes.
        for (i, q) in ggml[2..].iter().enumerate() {
            let (quad, byte) = at(column, i);
            self.nibbles[quad][byte] = *q;
        }
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        let (quad, byte) = at(column, k);
        let q = self.nibbles[quad % 4][byte] >> (quad / 4 * 4) & 15;
        (f32::from(q) - 8.0) * self.scales[column].to_f32()
    }
}

impl ScaledBlock for Q4Block {
    const FINEST: f32 = 2_047.0;

    #[inline(always)]
    fn quads<'a>(&'a self, room: &'a mut WeightQuads) -> &'a WeightQuads {
        for (quad, out) in room.iter_mut().enumerate() {
            let (nibbles, up) = (&self.nibbles[quad % 4], quad / 4 * 4);
            out.iter_mut().zip(nibbles).for_each(|(out, nibbles)| *out = (nibbles >> up & 15).cast_signed() - 8);
        }
        room
    }

    #[inline(always)]
    fn scales(&self) -> &[f16; PANEL] {
        &self.scales
    }
}
