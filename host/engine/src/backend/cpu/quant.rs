//! Activations in 8 bits, for products with Q8_0 weights: blocks of 32 along K, as the weights have them.
//!
//! The scale stays `f32`: it is never stored, and a second rounding would buy nothing.

use super::isa::{Isa, Kernel, Lanes, Simd, stride};
use super::matrix::BLOCK;

/// One block of one row. The value `i` is `quads[i / 4]`'s byte `i % 4`, times `scale`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct QuantRow {
    pub(super) quads: [i32; BLOCK / 4],
    pub(super) scale: f32,
    /// -128 times the sum of the values: takes back what unsigned weights add.
    pub(super) offset: i32,
}

/// Quantises panel-major activations `[k / 16][stride(rows)][16]` into `[k / 32][rows]`.
pub(super) fn quantise(isa: Isa, x: &[Lanes], rows: usize, out: &mut [QuantRow]) {
    isa.run(Quantise { x, rows, out });
}

struct Quantise<'a> {
    x: &'a [Lanes],
    rows: usize,
    out: &'a mut [QuantRow],
}

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (b, blocks) in self.out.chunks_exact_mut(self.rows).enumerate() {
            for (row, out) in blocks.iter_mut().enumerate() {
                let low = s.load(&self.x[2 * b * stride(self.rows) + row]);
                let high = s.load(&self.x[(2 * b + 1) * stride(self.rows) + row]);
                let zero = s.zero();
                let magnitude = s.max(s.max(low, s.sub(zero, low)), s.max(high, s.sub(zero, high)));
                let largest = s.max_lane(magnitude);
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                // A denormal maximum would make the inverse infinite.
                let inverse = s.splat(if inverse.is_finite() { inverse } else { 0.0 });
                let (low, high) = (s.mul(low, inverse), s.mul(high, inverse));
                // At most 32 * 127: exact, in any order.
                let sum = s.sum(s.add(s.round(low), s.round(high)));
                let mut quads = [0; BLOCK / 4];
                let halves = [s.round_i8(low), s.round_i8(high)];
                for (quad, bytes) in quads.iter_mut().zip(halves.as_flattened().as_chunks::<4>().0) {
                    *quad = i32::from_le_bytes(bytes.map(i8::cast_unsigned));
                }
                *out = QuantRow { quads, scale: largest / 127.0, offset: -128 * sum as i32 };
            }
        }
    }
}
