//! The lanes as plain arrays: the meaning of every operation, and what runs where no better instruction set is found.
//!
//! Slow where the target has no fused multiply-add (each becomes a library call); it is the definition, not the fast path.

use half::{bf16, f16};

use super::{LANES, Lanes, Simd};

#[derive(Clone, Copy, Debug)]
pub(super) struct Portable;

#[inline(always)]
fn zip(a: Lanes, b: Lanes, op: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|i| op(a[i], b[i]))
}

impl Simd for Portable {
    type V = Lanes;
    type I = [i32; LANES];

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &Lanes) -> Lanes {
        *x
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Lanes {
        x.map(f16::to_f32)
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Lanes {
        x.map(bf16::to_f32)
    }

    #[inline(always)]
    fn store(self, v: Lanes, out: &mut Lanes) {
        *out = v;
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, v: Lanes) -> Lanes {
        v.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn round_int(self, v: Lanes) -> [i32; LANES] {
        v.map(|x| x.round_ties_even() as i32)
    }

    #[inline(always)]
    fn pow2(self, n: Lanes) -> Lanes {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23).cast_unsigned()))
    }

    #[inline(always)]
    fn round_i8(self, v: Lanes) -> [i8; LANES] {
        v.map(|x| x.round_ties_even() as i8)
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> [i32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    fn load_int(self, x: &[i32; LANES]) -> [i32; LANES] {
        *x
    }

    #[inline(always)]
    fn store_int(self, v: [i32; LANES], out: &mut [i32; LANES]) {
        *out = v;
    }

    #[inline(always)]
    fn dot_start(self, _offset: i32) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn dot4(self, acc: [i32; LANES], w: &[i8; 64], x: [i8; 4]) -> [i32; LANES] {
        let x = x.map(i32::from);
        std::array::from_fn(|lane| acc[lane] + (0..4).map(|i| i32::from(w[4 * lane + i]) * x[i]).sum::<i32>())
    }

    #[inline(always)]
    fn dot4_unsigned(self, acc: [i32; LANES], w: &[i8; 64], x: [i8; 4]) -> [i32; LANES] {
        let x = x.map(i32::from);
        std::array::from_fn(|lane| acc[lane] + (0..4).map(|i| i32::from(w[4 * lane + i]) * x[i]).sum::<i32>())
    }

    #[inline(always)]
    fn dot2(self, acc: [i32; LANES], w: &[i16; 32], x: [i16; 2]) -> [i32; LANES] {
        let [x0, x1] = x.map(i32::from);
        std::array::from_fn(|lane| acc[lane] + i32::from(w[2 * lane]) * x0 + i32::from(w[2 * lane + 1]) * x1)
    }

    #[inline(always)]
    fn widen_bytes(self, x: &[u8; 32], out: &mut [i16; 32]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = i16::from(*x));
    }

    #[inline(always)]
    fn int_mul_add(self, acc: [i32; LANES], a: [i32; LANES], b: &[i32; LANES]) -> [i32; LANES] {
        std::array::from_fn(|lane| acc[lane].wrapping_add(a[lane].wrapping_mul(b[lane])))
    }

    #[inline(always)]
    fn shift_add(self, high: [i32; LANES], low: [i32; LANES], shift: u32) -> [i32; LANES] {
        std::array::from_fn(|lane| (high[lane] << shift).wrapping_add(low[lane]))
    }

    #[inline(always)]
    fn int_to_f32(self, v: [i32; LANES]) -> Lanes {
        v.map(|x| x as f32)
    }
}
