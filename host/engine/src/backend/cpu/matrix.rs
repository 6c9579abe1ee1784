//! Weight matrices, packed once at load into the order in which the kernels read them.
//!
//! A panel is 32 output columns wide: `[n / 32][k][32]`, one cache line of `f16` per `k`, two vectors of sixteen lanes, so
//! that each lane is the sum of one output element and no lanes are ever added together. Columns beyond the last are zero.
//! Why not `[n][k]` as in the file: a dot product along `k` needs a sum over lanes at its end, and its order would differ
//! between vector widths.

use half::{bf16, f16};

use super::aligned::Aligned;
use super::background::Breath;
use super::blocks::{Q4Block, Q8Block, QuantBlock};
use super::heap::want_large_pages;
use super::isa::{LANES, Weight};
use super::scaled_supers::Q8SuperBlock;
use super::supers::{Q4kBlock, Q5kBlock, Q6kBlock, SUPER};
use crate::load::{Elements, Kind};

/// Columns of a panel.
pub(super) const PANEL: usize = 2 * LANES;

/// Length along K of what is multiplied at once in 8 bits: a block of Q8_0 or Q4_0.
pub(super) const BLOCK: usize = 32;

/// A weight matrix `[n][k]` in kernel order.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) n: usize,
    pub(super) k: usize,
    /// Panels by type, in order: a file may have queries in fewer bits than values.
    pub(super) segments: Vec<Segment>,
}

/// Some panels of one type.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) first_panel: usize,
    pub(super) n_panels: usize,
    pub(super) packed: Packed,
}

#[derive(Debug)]
pub(super) enum Packed {
    F32(Aligned<f32, PANEL>),
    F16(Aligned<f16, PANEL>),
    Bf16(Aligned<bf16, PANEL>),
    Q8(Vec<Q8Block>),
    /// Q8_0 with integer scales.
    Q8Supers(Vec<Q8SuperBlock>),
    Q4(Vec<Q4Block>),
    Q4k(Vec<Q4kBlock>),
    Q5k(Vec<Q5kBlock>),
    Q6k(Vec<Q6kBlock>),
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
    /// Packs the rows of `parts`, all of width `k`, for products.
    pub(super) fn pack(parts: &[Elements<'_>], k: usize, join: Join) -> Self {
        Self::packed(parts, k, join, Packed::for_products)
    }

    /// The same where rows are looked up as well: as they are stored.
    pub(super) fn pack_as_stored(parts: &[Elements<'_>], k: usize, join: Join) -> Self {
        Self::packed(parts, k, join, Packed::as_stored)
    }

    fn packed(parts: &[Elements<'_>], k: usize, join: Join, pack: fn(&[Elements<'_>], usize, Join) -> Packed) -> Self {
        let whole = |part: &Elements<'_>| (part.len() / k).is_multiple_of(PANEL);
        let one = parts.iter().all(|part| part.kind == parts[0].kind);
        let mut matrix = Self { n: rows(parts, k).len(), k, segments: Vec::new() };
        if !one && join == Join::Concat && parts.iter().all(whole) {
            parts.chunk_by(|a, b| a.kind == b.kind).for_each(|parts| matrix.push(parts, pack(parts, k, join)));
        } else {
            matrix.push(parts, pack(parts, k, join));
        }
        matrix
    }

    fn push(&mut self, parts: &[Elements<'_>], packed: Packed) {
        let n_panels = rows(parts, self.k).len().div_ceil(PANEL);
        let first_panel = self.segments.last().map_or(0, |last| last.first_panel + last.n_panels);
        self.segments.push(Segment { first_panel, n_panels, packed });
    }

    pub(super) fn n_panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    pub(super) fn bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.packed.bytes()).sum()
    }

    /// Whether all of its weights are multiplied as integers.
    pub(super) fn is_quantised(&self) -> bool {
        let is_float = |packed: &Packed| matches!(packed, Packed::F32(_) | Packed::F16(_) | Packed::Bf16(_));
        !self.segments.iter().any(|segment| is_float(&segment.packed))
    }

    /// Row `n` of the matrix, as it was before packing where it is [packed as stored](Self::pack_as_stored): how an embedding is
    /// read from a tied head.
    pub(super) fn gather(&self, n: usize, mut put: impl FnMut(usize, f32)) {
        let (panel, c) = (n / PANEL, n % PANEL);
        let at = self.segments.partition_point(|segment| segment.first_panel <= panel) - 1;
        let (Segment { first_panel, packed, .. }, k) = (&self.segments[at], self.k);
        let panel = panel - first_panel;
        match packed {
            Packed::F32(w) => (0..k).for_each(|i| put(i, w[panel * k + i][c])),
            Packed::F16(w) => (0..k).for_each(|i| put(i, w[panel * k + i][c].to_f32())),
            Packed::Bf16(w) => (0..k).for_each(|i| put(i, w[panel * k + i][c].to_f32())),
            Packed::Q8(w) => column(panel_of(w, k, panel), c, put),
            Packed::Q8Supers(w) => column(panel_of(w, k, panel), c, put),
            Packed::Q4(w) => column(panel_of(w, k, panel), c, put),
            Packed::Q4k(w) => column(panel_of(w, k, panel), c, put),
            Packed::Q5k(w) => column(panel_of(w, k, panel), c, put),
            Packed::Q6k(w) => column(panel_of(w, k, panel), c, put),
        }
    }
}

impl Packed {
    fn for_products(parts: &[Elements<'_>], k: usize, join: Join) -> Self {
        if k.is_multiple_of(SUPER) && parts.iter().all(|part| part.kind == Kind::Q8_0) {
            return Self::Q8Supers(pack_blocks(parts, k, join));
        }
        Self::as_stored(parts, k, join)
    }

    fn as_stored(parts: &[Elements<'_>], k: usize, join: Join) -> Self {
        let kind = parts.first().map(|part| part.kind).filter(|&kind| parts.iter().all(|part| part.kind == kind));
        match kind {
            Some(Kind::F16) => Self::F16(pack(parts, k, join, |part, i| part.f16(i))),
            Some(Kind::Bf16) => Self::Bf16(pack(parts, k, join, |part, i| part.bf16(i))),
            Some(Kind::Q8_0) => Self::Q8(pack_blocks(parts, k, join)),
            Some(Kind::Q4_0) => Self::Q4(pack_blocks(parts, k, join)),
            Some(Kind::Q4K) => Self::Q4k(pack_blocks(parts, k, join)),
            Some(Kind::Q5K) => Self::Q5k(pack_blocks(parts, k, join)),
            Some(Kind::Q6K) => Self::Q6k(pack_blocks(parts, k, join)),
            // Blocks of other types are widened, exactly.
            _ => Self::F32(pack(parts, k, join, |part, i| part.f32(i))),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(w) => size_of_val(&**w),
            Self::F16(w) => size_of_val(&**w),
            Self::Bf16(w) => size_of_val(&**w),
            Self::Q8(w) => size_of_val(w.as_slice()),
            Self::Q8Supers(w) => size_of_val(w.as_slice()),
            Self::Q4(w) => size_of_val(w.as_slice()),
            Self::Q4k(w) => size_of_val(w.as_slice()),
            Self::Q5k(w) => size_of_val(w.as_slice()),
            Self::Q6k(w) => size_of_val(w.as_slice()),
        }
    }

    /// Values along K, of `k`, that are multiplied with one scale of the activations; none where they stay floats.
    pub(super) fn depth(&self, k: usize) -> Option<usize> {
        match self {
            Self::F32(_) | Self::F16(_) | Self::Bf16(_) => None,
            Self::Q8(_) | Self::Q4(_) if !k.is_multiple_of(SUPER) => Some(BLOCK),
            _ => Some(SUPER),
        }
    }
}

fn panel_of<B: QuantBlock>(w: &[B], k: usize, panel: usize) -> &[B] {
    let n = k / (BLOCK * B::BLOCKS);
    &w[panel * n..][..n]
}

fn column<B: QuantBlock>(w: &[B], column: usize, mut put: impl FnMut(usize, f32)) {
    for (b, block) in w.iter().enumerate() {
        (0..BLOCK * B::BLOCKS).for_each(|i| put(b * BLOCK * B::BLOCKS + i, block.value(column, i)));
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
    let (mut packed, mut breath) = (Aligned::with_room(W::ZERO, n.div_ceil(PANEL) * k), Breath::default());
    for (column, (part, row)) in columns(parts, k, join).enumerate() {
        let c = column % PANEL;
        if c == 0 {
            packed.push(W::ZERO, k);
        }
        let panel: &mut [[W; PANEL]] = &mut packed[column / PANEL * k..];
        for (i, to) in panel.iter_mut().enumerate() {
            to[c] = get(&parts[part], row * k + i);
        }
        breath.done(k);
    }
    packed
}

/// Quantised blocks.
fn pack_blocks<B: QuantBlock>(parts: &[Elements<'_>], k: usize, join: Join) -> Vec<B> {
    let per_row = k / (BLOCK * B::BLOCKS);
    let n = rows(parts, k).len().div_ceil(PANEL) * per_row;
    let (mut packed, mut breath) = (Vec::with_capacity(n), Breath::default());
    want_large_pages(packed.spare_capacity_mut());
    for (column, (part, row)) in columns(parts, k, join).enumerate() {
        if column % PANEL == 0 {
            packed.extend(std::iter::repeat_with(|| B::EMPTY).take(per_row));
        }
        let panel = &mut packed[column / PANEL * per_row..][..per_row];
        for (b, block) in panel.iter_mut().enumerate() {
            block.put(column % PANEL, &parts[part], row * per_row + b);
        }
        breath.done(k);
    }
    packed
}
