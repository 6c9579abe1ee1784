//! Weight matrices, packed once at load into the order in which the kernels read them.
//!
//! A panel is 32 output columns wide: `[n / 32][k][32]`, one cache line of `f16` per `k`, two vectors of sixteen lanes, so
//! that each lane is the sum of one output element and no lanes are ever added together. Columns beyond the last are zero.
//! Why not `[n][k]` as in the file: a dot product along `k` needs a sum over lanes at its end, and its order would differ
//! between vector widths.

use half::{bf16, f16};

use super::aligned::Aligned;
use super::isa::{LANES, Weight};
use crate::load::{Elements, Kind, LoadError, quantise_q8_0};

/// Columns of a panel.
pub(super) const PANEL: usize = 2 * LANES;

/// Length of a Q8_0 block along K.
pub(super) const BLOCK: usize = 32;

/// A weight matrix `[n][k]` in kernel order.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) packed: Packed,
}

#[derive(Debug)]
pub(super) enum Packed {
    F32(Aligned<f32, PANEL>),
    F16(Aligned<f16, PANEL>),
    Bf16(Aligned<bf16, PANEL>),
    Q8(Vec<Q8Block>),
}

/// 32 columns by 32 values of K: for column `c`, value `k` is `(quants[k / 4][4 * c + k % 4] - 128) * scales[c]`.
/// Unsigned, as the dot-product instructions want one side; the kernels take the 128 out again.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q8Block {
    pub(super) quants: [[u8; 4 * PANEL]; BLOCK / 4],
    pub(super) scales: [f16; PANEL],
}

/// How rows of the parts become columns of one packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Join {
    /// One after the other: q, k, v.
    Concat,
    /// Two parts of one height, alternating every sixteen columns, so that a panel holds a gate and its up half.
    Interleave,
}

impl Matrix {
    /// Packs the rows of `parts`, all of width `k`, as they are stored.
    pub(super) fn pack(parts: &[Elements<'_>], k: usize, join: Join) -> Self {
        let n = rows(parts, k).len();
        let kind = parts.first().map(|part| part.kind).filter(|&kind| parts.iter().all(|part| part.kind == kind));
        let packed = match kind {
            Some(Kind::F16) => Packed::F16(pack(parts, k, join, |part, i| part.f16(i))),
            Some(Kind::Bf16) => Packed::Bf16(pack(parts, k, join, |part, i| part.bf16(i))),
            Some(Kind::Q8_0) => Packed::Q8(pack_q8(parts, k, join)),
            // Blocks of other types are widened, exactly.
            _ => Packed::F32(pack(parts, k, join, |part, i| part.f32(i))),
        };
        Self { n, k, packed }
    }

    /// Packs the rows of `parts` as Q8_0.
    pub(super) fn quantise(parts: &[Elements<'_>], k: usize, join: Join) -> Result<Self, LoadError> {
        let parts = parts.iter().map(|part| quantise_q8_0(part, k)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { n: rows(&parts, k).len(), k, packed: Packed::Q8(pack_q8(&parts, k, join)) })
    }

    pub(super) fn n_panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.packed {
            Packed::F32(w) => size_of_val(&**w),
            Packed::F16(w) => size_of_val(&**w),
            Packed::Bf16(w) => size_of_val(&**w),
            Packed::Q8(w) => size_of_val(w.as_slice()),
        }
    }

    /// Row `n` of the matrix as it was before packing: how an embedding is read from a tied head.
    pub(super) fn gather(&self, n: usize, mut put: impl FnMut(usize, f32)) {
        let (panel, c) = (n / PANEL, n % PANEL);
        match &self.packed {
            Packed::F32(w) => (0..self.k).for_each(|k| put(k, w[panel * self.k + k][c])),
            Packed::F16(w) => (0..self.k).for_each(|k| put(k, w[panel * self.k + k][c].to_f32())),
            Packed::Bf16(w) => (0..self.k).for_each(|k| put(k, w[panel * self.k + k][c].to_f32())),
            Packed::Q8(w) => (0..self.k).for_each(|k| {
                let block = &w[panel * (self.k / BLOCK) + k / BLOCK];
                let quant = block.quants[k % BLOCK / 4][4 * c + k % 4] ^ 0x80;
                put(k, f32::from(quant.cast_signed()) * block.scales[c].to_f32());
            }),
        }
    }
}

/// Part and row within it, row by row of all parts.
fn rows(parts: &[Elements<'_>], k: usize) -> Vec<(usize, usize)> {
    parts.iter().enumerate().flat_map(|(part, e)| (0..e.len() / k).map(move |row| (part, row))).collect()
}

/// Part and row behind each packed column, in order.
fn columns(parts: &[Elements<'_>], k: usize, join: Join) -> impl Iterator<Item = (usize, usize)> {
    let mut order = rows(parts, k);
    if join == Join::Interleave {
        order.sort_by_key(|&(part, row)| (row / LANES, part, row));
    }
    order.into_iter()
}

fn pack<W: Weight>(
    parts: &[Elements<'_>],
    k: usize,
    join: Join,
    get: impl Fn(&Elements<'_>, usize) -> W,
) -> Aligned<W, PANEL> {
    let n = rows(parts, k).len();
    let mut aligned = Aligned::filled(W::ZERO, n.div_ceil(PANEL) * k);
    let packed: &mut [[W; PANEL]] = &mut aligned;
    for (column, (part, row)) in columns(parts, k, join).enumerate() {
        for i in 0..k {
            packed[column / PANEL * k + i][column % PANEL] = get(&parts[part], row * k + i);
        }
    }
    aligned
}

/// Blocks of Q8_0 as they are.
fn pack_q8(parts: &[Elements<'_>], k: usize, join: Join) -> Vec<Q8Block> {
    let n_blocks = k / BLOCK;
    let empty = Q8Block { quants: [[128; 4 * PANEL]; BLOCK / 4], scales: [f16::ZERO; PANEL] };
    let mut packed = vec![empty; rows(parts, k).len().div_ceil(PANEL) * n_blocks];
    for (column, (part, row)) in columns(parts, k, join).enumerate() {
        for (b, block) in parts[part].blocks::<34>()[row * n_blocks..][..n_blocks].iter().enumerate() {
            let (target, c) = (&mut packed[column / PANEL * n_blocks + b], column % PANEL);
            target.scales[c] = f16::from_le_bytes([block[0], block[1]]);
            for (i, &q) in block[2..].iter().enumerate() {
                target.quants[i / 4][4 * c + i % 4] = q ^ 0x80;
            }
        }
    }
    packed
}
