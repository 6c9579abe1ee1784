//! `out = x * W^T` in floats, each output element one chain of fused multiply-adds over K in ascending order.
//!
//! That order is the contract (batch invariance): the tile below computes 1 to 12 rows by 1 to 4 panels at once, and
//! which rows share a tile, how many there are and which thread has it changes no bit. Tiles exist for speed only: a
//! chain waits four cycles per step, so at least eight must be in flight, and a widened weight should serve many rows.
//!
//! Activations are panel-major: `[k / 16][stride(rows)][16]`. A tile reads its rows' next sixteen values as one short run, the
//! outputs of a panel are one contiguous slice that a thread can own, and an output is the next product's input as it is.

use std::ops::Range;

use super::block_dots::BlockDots;
use super::isa::{Isa, Kernel, LANES, Lanes, Simd, Weight, stride};
use super::math;
use super::matrix::{BLOCK, Matrix, PANEL, Packed, Segment};
use super::pool::ComputePool;
use super::quant::Quantised;
use super::super_dots::SuperDots;
use super::supers::SUPER;

/// Most rows of a tile, with 32 registers.
const MAX_ROWS: usize = 12;

/// What becomes of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    /// Replaces the output.
    Store,
    /// Is added to the output: the residual stream.
    Add,
    /// The panel holds sixteen gate and sixteen up columns: the output is `silu(gate) * up`.
    SiluMul,
    /// The same with `gelu(gate) * up`.
    GeluMul,
}

/// Activations of some rows, panel-major, with room for their quantised form.
#[derive(Debug)]
pub(super) struct Input<'a> {
    pub(super) x: &'a [Lanes],
    pub(super) rows: usize,
    pub(super) quantised: &'a mut Quantised,
}

/// Computes `out` from `x` for all panels, in parallel where that pays.
pub(super) fn matmul(pool: &ComputePool, w: &Matrix, input: Input<'_>, out: &mut [Lanes], epilogue: Epilogue) {
    let Input { x, rows, quantised: Quantised { blocks, supers } } = input;
    let isa = pool.isa();
    let unit = epilogue.out_vectors() * stride(rows);
    let is_any = |depth| w.segments.iter().any(|segment| segment.packed.depth(w.k) == Some(depth));
    let blocks = is_any(BLOCK).then(|| blocks.fill(pool, x, rows, w.k));
    let supers = is_any(SUPER).then(|| supers.fill(pool, x, rows, w.k));
    for Segment { first_panel, n_panels, packed } in &w.segments {
        let out = &mut out[first_panel * unit..][..n_panels * unit];
        pool.split(n_panels * PANEL * w.k * rows, out, unit, |first, out| {
            let part = Part { rows, k: w.k, first, epilogue };
            match (packed, blocks, supers) {
                (Packed::F32(w), ..) => part.run(isa, x, w, out),
                (Packed::F16(w), ..) => part.run(isa, x, w, out),
                (Packed::Bf16(w), ..) => part.run(isa, x, w, out),
                (Packed::Q8(w), Some(x), _) => BlockDots { part, x, w, out }.run(isa),
                (Packed::Q4(w), Some(x), _) => BlockDots { part, x, w, out }.run(isa),
                (Packed::Q8(w), _, Some(x)) => SuperDots { part, x, w: w.as_chunks::<8>().0, out }.run(isa),
                (Packed::Q4(w), _, Some(x)) => SuperDots { part, x, w: w.as_chunks::<8>().0, out }.run(isa),
                (Packed::Q8Supers(w), _, Some(x)) => SuperDots { part, x, w, out }.run(isa),
                (Packed::Q4k(w), _, Some(x)) => SuperDots { part, x, w, out }.run(isa),
                (Packed::Q5k(w), _, Some(x)) => SuperDots { part, x, w, out }.run(isa),
                (Packed::Q6k(w), _, Some(x)) => SuperDots { part, x, w, out }.run(isa),
                _ => unreachable!("activations for quantised weights are quantised above"),
            }
        });
    }
}

/// Panels `first ..` of a product, as many as the output slice holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) rows: usize,
    pub(super) k: usize,
    pub(super) first: usize,
    pub(super) epilogue: Epilogue,
}

struct Gemm<'a, W> {
    part: Part,
    x: &'a [Lanes],
    w: &'a [[W; PANEL]],
    out: &'a mut [Lanes],
}

impl Epilogue {
    #[inline(always)]
    fn out_vectors(self) -> usize {
        if matches!(self, Self::SiluMul | Self::GeluMul) { 1 } else { 2 }
    }

    /// Finishes one row of one panel: the sums of its two halves.
    #[inline(always)]
    pub(super) fn apply<S: Simd>(self, s: S, sums: [S::V; 2], out: &mut [Lanes], at: [usize; 2]) {
        match self {
            Self::Store => {
                s.store(sums[0], &mut out[at[0]]);
                s.store(sums[1], &mut out[at[1]]);
            }
            Self::Add => {
                let low = s.add(s.load(&out[at[0]]), sums[0]);
                s.store(low, &mut out[at[0]]);
                let high = s.add(s.load(&out[at[1]]), sums[1]);
                s.store(high, &mut out[at[1]]);
            }
            Self::SiluMul => {
                let product = s.mul(math::silu(s, sums[0]), sums[1]);
                s.store(product, &mut out[at[0]]);
            }
            Self::GeluMul => {
                let product = s.mul(math::gelu(s, sums[0]), sums[1]);
                s.store(product, &mut out[at[0]]);
            }
        }
    }
}

impl Part {
    fn run<W: Weight>(self, isa: Isa, x: &[Lanes], w: &[[W; PANEL]], out: &mut [Lanes]) {
        isa.run(Gemm { part: self, x, w, out });
    }

    /// Where in the output the two halves of a row of a panel go.
    #[inline(always)]
    pub(super) fn at(&self, panel: usize, row: usize) -> [usize; 2] {
        let vectors = self.epilogue.out_vectors();
        let base = panel * vectors * stride(self.rows) + row;
        [base, base + (vectors - 1) * stride(self.rows)]
    }

    #[inline(always)]
    pub(super) fn n_panels(&self, out_len: usize) -> usize {
        out_len / (self.epilogue.out_vectors() * stride(self.rows))
    }
}

/// Splits `rows` into runs of at most `max`, as even as can be: `(first row, length)`.
#[inline(always)]
pub(super) fn tiles(rows: usize, max: usize) -> impl Iterator<Item = (usize, usize)> {
    let n = rows.div_ceil(max);
    let (base, longer) = (rows / n, rows % n);
    (0..n).map(move |i| (i * base + i.min(longer), base + usize::from(i < longer)))
}

/// Most rows of a tile.
#[inline(always)]
fn most_rows<S: Simd>() -> usize {
    if S::WIDE { MAX_ROWS } else { 3 }
}

/// Panels that a tile of few rows may take at once.
const GROUP: usize = 4;

/// Rows that share one widening of the weights.
const BLOCK_ROWS: usize = 48;

/// Length along K of a piece of a panel that is widened at once: it and the activations of a block of rows fit the
/// nearest cache.
const PIECE: usize = 128;

/// A piece of a panel, widened.
#[repr(align(64))]
struct Widened([[Lanes; 2]; PIECE]);

/// Sums of a block of rows, between pieces.
#[repr(align(64))]
struct Sums([[Lanes; 2]; BLOCK_ROWS]);

impl<W: Weight> Kernel for Gemm<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let n_panels = self.part.n_panels(self.out.len());
        if self.part.rows > most_rows::<S>() {
            return self.blocks(s, n_panels);
        }
        for first in (0..n_panels).step_by(GROUP) {
            let n = GROUP.min(n_panels - first);
            if S::WIDE {
                self.wide(s, self.part.rows, first..first + n);
            } else {
                self.narrow(s, self.part.rows, first..first + n);
            }
        }
    }
}

/// Many rows: weights are widened once per block of rows instead of once per tile.
impl<W: Weight> Gemm<'_, W> {
    #[inline(always)]
    fn blocks<S: Simd>(&mut self, s: S, n_panels: usize) {
        let mut widened = Widened([[[0.0; LANES]; 2]; PIECE]);
        for panel in 0..n_panels {
            for (row, len) in tiles(self.part.rows, BLOCK_ROWS) {
                self.block(s, panel, row..row + len, &mut widened);
            }
        }
    }

    /// Some rows by one panel.
    #[inline(always)]
    fn block<S: Simd>(&mut self, s: S, panel: usize, rows: Range<usize>, widened: &mut Widened) {
        let Part { k, first, epilogue, .. } = self.part;
        let w = &self.w[(first + panel) * k..];
        let mut sums = Sums([[[0.0; LANES]; 2]; BLOCK_ROWS]);
        for begin in (0..k).step_by(PIECE) {
            let n = PIECE.min(k - begin);
            for (wide, w) in widened.0.iter_mut().zip(&w[begin..begin + n]) {
                let (halves, _) = w.as_chunks::<LANES>();
                s.store(W::widen(s, &halves[0]), &mut wide[0]);
                s.store(W::widen(s, &halves[1]), &mut wide[1]);
            }
            let rest = &w[begin + n..];
            let mut next = rest[..PIECE.min(rest.len())].iter();
            for (at, len) in tiles(rows.len(), most_rows::<S>()) {
                let piece = Piece {
                    x: &self.x[begin / LANES * stride(self.part.rows) + rows.start + at..],
                    step: stride(self.part.rows),
                    w: &widened.0[..n],
                    sums: &mut sums.0[at..at + len],
                };
                piece.run(s, len, &mut next);
            }
        }
        for (row, sums) in rows.zip(&sums.0) {
            epilogue.apply(s, [s.load(&sums[0]), s.load(&sums[1])], self.out, self.part.at(panel, row));
        }
    }
}

/// Some rows by a widened piece of a panel.
struct Piece<'a> {
    /// From the first row on.
    x: &'a [Lanes],
    step: usize,
    w: &'a [[Lanes; 2]],
    sums: &'a mut [[Lanes; 2]],
}

impl Piece<'_> {
    #[inline(always)]
    fn run<S: Simd, T>(self, s: S, rows: usize, next: &mut std::slice::Iter<'_, T>) {
        // More rows than a tile holds leave no tile less than half full.
        match (S::WIDE, rows) {
            (false, 2) => self.tile::<S, T, 2>(s, next),
            (false, _) => self.tile::<S, T, 3>(s, next),
            (true, 6) => self.tile::<S, T, 6>(s, next),
            (true, 7) => self.tile::<S, T, 7>(s, next),
            (true, 8) => self.tile::<S, T, 8>(s, next),
            (true, 9) => self.tile::<S, T, 9>(s, next),
            (true, 10) => self.tile::<S, T, 10>(s, next),
            (true, 11) => self.tile::<S, T, 11>(s, next),
            (true, _) => self.tile::<S, T, MAX_ROWS>(s, next),
        }
    }

    /// Continues the chains of `R` rows, and asks for a share of the weights that come next: two tiles ask for all.
    #[inline(always)]
    fn tile<S: Simd, T, const R: usize>(self, s: S, next: &mut std::slice::Iter<'_, T>) {
        let Some(sums) = self.sums.first_chunk_mut::<R>() else { return };
        let mut acc = [[s.zero(); 2]; R];
        for r in 0..R {
            acc[r] = [s.load(&sums[r][0]), s.load(&sums[r][1])];
        }
        for (kp, w) in self.w.as_chunks::<LANES>().0.iter().enumerate() {
            let Some(x) = self.x[kp * self.step..].first_chunk::<R>() else { return };
            next.by_ref().take(LANES / 2).for_each(|w| s.prefetch(w));
            for i in 0..LANES {
                let w = [s.load(&w[i][0]), s.load(&w[i][1])];
                for r in 0..R {
                    let x = s.splat(x[r][i]);
                    acc[r][0] = s.fma(x, w[0], acc[r][0]);
                    acc[r][1] = s.fma(x, w[1], acc[r][1]);
                }
            }
        }
        for r in 0..R {
            s.store(acc[r][0], &mut sums[r][0]);
            s.store(acc[r][1], &mut sums[r][1]);
        }
    }
}

/// Few rows: a tile is all of them, and widens in register.
impl<W: Weight> Gemm<'_, W> {
    /// Tiles for 32 registers of sixteen lanes.
    #[inline(always)]
    fn wide<S: Simd>(&mut self, s: S, rows: usize, panels: Range<usize>) {
        match rows {
            1 => self.tiles::<S, 1, 4>(s, panels),
            2 => self.tiles::<S, 2, 4>(s, panels),
            3 => self.tiles::<S, 3, 2>(s, panels),
            4 => self.tiles::<S, 4, 2>(s, panels),
            5 => self.tiles::<S, 5, 1>(s, panels),
            6 => self.tiles::<S, 6, 1>(s, panels),
            7 => self.tiles::<S, 7, 1>(s, panels),
            8 => self.tiles::<S, 8, 1>(s, panels),
            9 => self.tiles::<S, 9, 1>(s, panels),
            10 => self.tiles::<S, 10, 1>(s, panels),
            11 => self.tiles::<S, 11, 1>(s, panels),
            _ => self.tiles::<S, MAX_ROWS, 1>(s, panels),
        }
    }

    /// Tiles for 16 registers of eight lanes.
    #[inline(always)]
    fn narrow<S: Simd>(&mut self, s: S, rows: usize, panels: Range<usize>) {
        match rows {
            1 => self.tiles::<S, 1, 2>(s, panels),
            2 => self.tiles::<S, 2, 1>(s, panels),
            _ => self.tiles::<S, 3, 1>(s, panels),
        }
    }

    #[inline(always)]
    fn tiles<S: Simd, const R: usize, const P: usize>(&mut self, s: S, panels: Range<usize>) {
        let mut panel = panels.start;
        while panel + P <= panels.end {
            self.tile::<S, R, P>(s, panel);
            panel += P;
        }
        while panel < panels.end {
            self.tile::<S, R, 1>(s, panel);
            panel += 1;
        }
    }

    /// `R` rows by `P` panels: `2 * R * P` independent chains.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const P: usize>(&mut self, s: S, panel: usize) {
        let Part { rows, k, first, epilogue } = self.part;
        let mut acc = [[[s.zero(); 2]; P]; R];
        let empty: &[[W; PANEL]] = &[];
        let mut w = [empty; P];
        for (p, w) in w.iter_mut().enumerate() {
            *w = &self.w[(first + panel + p) * k..][..k];
        }
        for kp in 0..k / LANES {
            let Some(x) = self.x[kp * stride(rows)..].first_chunk::<R>() else { return };
            for i in 0..LANES {
                for p in 0..P {
                    let (halves, _) = w[p][kp * LANES + i].as_chunks::<LANES>();
                    let weights = [W::widen(s, &halves[0]), W::widen(s, &halves[1])];
                    for r in 0..R {
                        let x = s.splat(x[r][i]);
                        acc[r][p][0] = s.fma(x, weights[0], acc[r][p][0]);
                        acc[r][p][1] = s.fma(x, weights[1], acc[r][p][1]);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (p, &sums) in acc.iter().enumerate() {
                epilogue.apply(s, sums, self.out, self.part.at(panel + p, r));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::blocks::ScaledBlock;
    use crate::backend::cpu::matrix::Join;
    use crate::load::{Elements, Kind};
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};
    use half::{bf16, f16};

    /// 35 leave a place of their last group empty.
    const ROWS: [usize; 7] = [1, 2, 7, 12, 13, 35, 64];

    /// Values of about one, the same for every run.
    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(u16::try_from(state >> 16).unwrap()) / 32_768.0 - 1.0
        };
        (0..n).map(|_| next() + next()).collect()
    }

    fn floats(n: usize, k: usize) -> Vec<Matrix> {
        let w = values(n * k, 3);
        let wide: Vec<[u8; 4]> = w.iter().map(|x| x.to_le_bytes()).collect();
        let half: Vec<[u8; 2]> = w.iter().map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let brain: Vec<[u8; 2]> = w.iter().map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let pack = |kind, bytes: &[u8]| Matrix::pack(&[Elements::new(kind, bytes)], k, Join::Concat);
        let (wide, half, brain) = (wide.as_flattened(), half.as_flattened(), brain.as_flattened());
        vec![pack(Kind::F32, wide), pack(Kind::F16, half), pack(Kind::Bf16, brain)]
    }

    /// `[n][k]` values, quantised.
    fn blocks(kind: Kind, n: usize, k: usize) -> Elements<'static> {
        quantise(kind, values(n * k, 3), n, k)
    }

    fn quantise(kind: Kind, values: Vec<f32>, n: usize, k: usize) -> Elements<'static> {
        let dtype = match kind {
            Kind::Q4_0 => GgmlDType::Q4_0,
            Kind::Q4K => GgmlDType::Q4K,
            Kind::Q5K => GgmlDType::Q5K,
            Kind::Q6K => GgmlDType::Q6K,
            _ => GgmlDType::Q8_0,
        };
        let tensor = Tensor::from_vec(values, (n, k), &Device::Cpu).unwrap();
        Elements::owned(kind, QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned())
    }

    /// One of each type, and one of several.
    fn quantised(n: usize, k: usize) -> Vec<Matrix> {
        let kinds = [Kind::Q8_0, Kind::Q4_0, Kind::Q4K, Kind::Q5K, Kind::Q6K];
        let of = |kind: Kind| blocks(kind, n, k);
        let each = kinds.into_iter().filter(|kind| k.is_multiple_of(kind.values()));
        let mut all: Vec<Matrix> = each.map(|kind| Matrix::pack(&[of(kind)], k, Join::Concat)).collect();
        if n.is_multiple_of(PANEL) && all.len() == kinds.len() {
            all.push(Matrix::pack(&[Kind::Q4K, Kind::Q4K, Kind::Q6K].map(of), k, Join::Concat));
            assert_eq!(all[kinds.len()].segments.len(), 2);
            all.push(Matrix::pack_as_stored(&[of(Kind::Q8_0)], k, Join::Concat));
        }
        all
    }

    /// Rows `[rows][k]` as panels.
    fn panels(x: &[Vec<f32>], k: usize) -> Vec<Lanes> {
        let at =
            |panel: usize, row: usize| std::array::from_fn(|i| x.get(row).map_or(f32::NAN, |x| x[panel * LANES + i]));
        let n = stride(x.len());
        (0..k / LANES).flat_map(|panel| (0..n).map(move |row| (panel, row))).map(|(p, r)| at(p, r)).collect()
    }

    /// Rows of the product.
    fn product(pool: &ComputePool, w: &Matrix, x: &[Vec<f32>], epilogue: Epilogue) -> Vec<Vec<u32>> {
        let (rows, x) = (x.len(), panels(x, w.k));
        let mut quantised = Quantised::allocate(w.k, rows);
        let mut out = vec![[0.25; LANES]; w.n_panels() * epilogue.out_vectors() * stride(rows)];
        let input = Input { x: &x, rows, quantised: &mut quantised };
        pool.run(usize::MAX, || matmul(pool, w, input, &mut out, epilogue));
        let row = |row: usize| out.iter().skip(row).step_by(stride(rows)).flatten().map(|x| x.to_bits()).collect();
        (0..rows).map(row).collect()
    }

    fn check_rows(w: &Matrix) {
        let x: Vec<Vec<f32>> = (0..64).map(|row| values(w.k, 100 + row)).collect();
        for epilogue in [Epilogue::Store, Epilogue::Add, Epilogue::SiluMul, Epilogue::GeluMul] {
            let one = ComputePool::start(1).unwrap();
            let alone: Vec<Vec<u32>> =
                x.iter().flat_map(|x| product(&one, w, std::slice::from_ref(x), epilogue)).collect();
            for isa in Isa::available() {
                for n_threads in [1, 3] {
                    let pool = ComputePool::with_isa(n_threads, isa).unwrap();
                    for rows in ROWS {
                        let found = product(&pool, w, &x[..rows], epilogue);
                        assert!(
                            found == alone[..rows],
                            "{rows} rows, {epilogue:?}, {}, {n_threads} threads",
                            isa.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_alone_is_the_row_of_many() {
        floats(200, 352).iter().chain(&quantised(200, 352)).chain(&quantised(96, 512)).for_each(check_rows);
    }

    #[test]
    fn what_passes_in_several_spans_is_the_same() {
        // More groups, panels and super-blocks than tiles take at once.
        let (n, k) = (160, 2_560);
        let x: Vec<Vec<f32>> = (0..520).map(|row| values(k, 100 + row)).collect();
        for kind in [Kind::Q8_0, Kind::Q4K] {
            let w = Matrix::pack(&[blocks(kind, n, k)], k, Join::Concat);
            for n_threads in [1, 2] {
                let pool = ComputePool::start(n_threads).unwrap();
                let found = product(&pool, &w, &x, Epilogue::Add);
                for row in [0, 255, 511, 512, 519] {
                    let alone = product(&pool, &w, &x[row..=row], Epilogue::Add);
                    assert!(found[row] == alone[0], "{kind:?}, row {row}, {n_threads} threads");
                }
            }
        }
    }

    #[test]
    fn an_element_is_one_chain_over_k() {
        let (n, k) = (70, 64);
        let x = values(k, 9);
        for w in &floats(n, k) {
            let found = &product(&ComputePool::start(1).unwrap(), w, std::slice::from_ref(&x), Epilogue::Store)[0];
            for (column, &bits) in found[..n].iter().enumerate() {
                let mut sum = 0f32;
                w.gather(column, |k, w| sum = x[k].mul_add(w, sum));
                assert_eq!(f32::from_bits(bits), sum, "column {column}");
            }
            assert!(found[n..].iter().all(|&x| x == 0), "padding");
        }
    }

    /// What a weight is multiplied by before it is: one, but where scales become integers.
    fn rescaled(w: &Matrix, column: usize, k: usize) -> f64 {
        fn change<B: ScaledBlock>(blocks: &[B], column: usize, block: usize) -> f64 {
            let scale = |block: &B| block.scales()[column].to_f32();
            let largest = blocks.iter().fold(0f32, |largest, block| scale(block).abs().max(largest));
            let integer = (scale(&blocks[block]) * (B::FINEST / largest)).round_ties_even();
            f64::from(integer) * f64::from(largest) / f64::from(B::FINEST) / f64::from(scale(&blocks[block]))
        }
        if w.segments[0].packed.depth(w.k) != Some(SUPER) {
            return 1.0;
        }
        let first = column / PANEL * w.k / BLOCK + k / SUPER * 8;
        let at = (column % PANEL, k % SUPER / BLOCK);
        match &w.segments[0].packed {
            Packed::Q8(blocks) => change(&blocks[first..][..8], at.0, at.1),
            Packed::Q4(blocks) => change(&blocks[first..][..8], at.0, at.1),
            _ => 1.0,
        }
    }

    #[test]
    fn eight_bit_products_are_those_of_the_rounded_values() {
        let (n, k) = (64, 512);
        let x = values(k, 9);
        let rounded = |length: usize| -> Vec<f64> {
            let round = |block: &[f32]| {
                let scale = block.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
                block.iter().map(|x| f64::from((x / scale).round()) * f64::from(scale)).collect::<Vec<_>>()
            };
            x.chunks(length).flat_map(round).collect()
        };
        for w in &quantised(n, k) {
            let rounded = rounded(w.segments[0].packed.depth(k).unwrap());
            let found = &product(&ComputePool::start(1).unwrap(), w, std::slice::from_ref(&x), Epilogue::Store)[0];
            for (column, &bits) in found[..w.n].iter().enumerate() {
                let mut sum = 0f64;
                w.gather(column, |i, value| sum += rounded[i] * f64::from(value) * rescaled(w, column, i));
                let found = f64::from(f32::from_bits(bits));
                assert!((found - sum).abs() < 3e-4, "column {column}: {found}, not {sum}");
            }
        }
    }

    #[test]
    fn integer_scales_move_no_weight_far() {
        let (n, k) = (64, 512);
        let x = values(k, 9);
        for (kind, finest) in [(Kind::Q8_0, 255.0), (Kind::Q4_0, 2_047.0)] {
            // Blocks of large, small and smaller weights, side by side.
            let spread = |(i, w): (usize, f32)| w * 0.1f32.powi((i / BLOCK % 3) as i32);
            let wide: Vec<f32> = values(n * k, 3).into_iter().enumerate().map(spread).collect();
            let elements = [quantise(kind, wide, n, k)];
            let (w, exact) =
                (Matrix::pack(&elements, k, Join::Concat), Matrix::pack_as_stored(&elements, k, Join::Concat));
            let found = &product(&ComputePool::start(1).unwrap(), &w, std::slice::from_ref(&x), Epilogue::Store)[0];
            for (column, &bits) in found[..n].iter().enumerate() {
                let (mut weights, mut most) = (vec![0f64; k], 0f64);
                exact.gather(column, |i, value| weights[i] = value.into());
                let mut sum = 0f64;
                for (x, weights) in x.chunks(SUPER).zip(weights.chunks(SUPER)) {
                    let scale = x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
                    let largest = weights.iter().fold(0f64, |m, w| m.max(w.abs()));
                    for (x, w) in x.iter().zip(weights) {
                        let x = f64::from((x / scale).round()) * f64::from(scale);
                        sum += x * w;
                        most += x.abs() * largest / (2.0 * finest);
                    }
                }
                let error = (f64::from(f32::from_bits(bits)) - sum).abs();
                assert!(error < most + 1e-4, "{kind:?}, column {column}: {error} of at most {most}");
            }
        }
    }

    #[test]
    fn the_largest_weights_and_activations_overflow_nothing() {
        // All bits of a weight set and the largest integer scales; the floats are one.
        for (kind, bytes, ones) in [(Kind::Q4K, 144, 0), (Kind::Q5K, 176, 0), (Kind::Q6K, 210, 208)] {
            let mut block = vec![255u8; bytes];
            block[ones..ones + 2].copy_from_slice(&f16::ONE.to_le_bytes());
            match kind {
                Kind::Q6K => block[192..208].fill(i8::MIN.cast_unsigned()),
                _ => block[2..4].copy_from_slice(&f16::ZERO.to_le_bytes()),
            }
            let w = Matrix::pack(&[Elements::owned(kind, block.repeat(64))], SUPER, Join::Concat);
            for (x, rows) in [(1.0, 1), (-1.0, 1), (1.0, 9), (-1.0, 9)] {
                let x: Vec<Vec<f32>> = vec![vec![x; SUPER]; rows];
                let mut sum = 0.0;
                w.gather(0, |i, value| sum += value * x[0][i]);
                for isa in Isa::available() {
                    let found = product(&ComputePool::with_isa(1, isa).unwrap(), &w, &x, Epilogue::Store);
                    for bits in found.concat() {
                        let found = f32::from_bits(bits);
                        assert!((found / sum - 1.0).abs() < 1e-5, "{kind:?}, {}: {found}, not {sum}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn integer_scales_of_the_load_are_those_of_the_products() {
        // The last panel is not full.
        let (n, k) = (70, 512);
        let x: Vec<Vec<f32>> = (0..35).map(|row| values(k, 100 + row)).collect();
        for negative in [false, true] {
            let mut bytes = blocks(Kind::Q8_0, n, k).blocks::<34>().to_vec();
            // Scales far apart, some that are zero, and all of one column.
            for (i, block) in bytes.iter_mut().enumerate() {
                let scale = f16::from_le_bytes([block[0], block[1]]);
                let scale = match i % 11 {
                    3 => f16::ZERO,
                    _ if i < 8 => f16::ZERO,
                    5 | 6 if negative => -scale,
                    part => f16::from_f32(scale.to_f32() / (1 << part) as f32),
                };
                block[..2].copy_from_slice(&scale.to_le_bytes());
            }
            let elements = [Elements::owned(Kind::Q8_0, bytes.into_flattened())];
            let packed = Matrix::pack(&elements, k, Join::Concat);
            let stored = Matrix::pack_as_stored(&elements, k, Join::Concat);
            assert!(packed.bytes() < stored.bytes());
            for isa in Isa::available() {
                let pool = ComputePool::with_isa(1, isa).unwrap();
                for rows in [1, 2, 9, 35] {
                    let [found, expect] =
                        [&packed, &stored].map(|w| product(&pool, w, &x[..rows], Epilogue::Store).concat());
                    assert_eq!(found, expect, "{rows} rows, {}, negative: {negative}", isa.name());
                }
            }
        }
    }

    #[test]
    fn packed_blocks_keep_their_values() {
        let (n, k) = (40, 512);
        for kind in [Kind::Q8_0, Kind::Q4_0, Kind::Q4K, Kind::Q5K, Kind::Q6K] {
            let elements = blocks(kind, n, k);
            let w = Matrix::pack_as_stored(std::slice::from_ref(&elements), k, Join::Concat);
            for row in 0..n {
                w.gather(row, |i, value| {
                    assert_eq!(value.to_bits(), elements.f32(row * k + i).to_bits(), "{kind:?} {row} {i}");
                });
            }
        }
    }
}
