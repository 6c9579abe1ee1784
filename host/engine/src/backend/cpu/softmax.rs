//! What sampling needs of a row of logits: the largest, and exponentials relative to it.

use super::isa::{Isa, Kernel, Lanes, Simd};
use super::math;

/// The largest logit; NaNs are passed over.
pub(crate) fn largest(isa: Isa, logits: &[Lanes]) -> f32 {
    isa.run(Largest(logits))
}

/// Writes `exp((logit - max) * scale)` and returns the sum. Logits far below the maximum give a tiny number, not zero.
pub(crate) fn exponentials(isa: Isa, logits: &[Lanes], max: f32, scale: f32, out: &mut [Lanes]) -> f32 {
    isa.run(Exponentials { logits, max, scale, out })
}

struct Largest<'a>(&'a [Lanes]);

impl Kernel for Largest<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut max = s.splat(f32::NEG_INFINITY);
        for logits in self.0 {
            max = s.max(s.load(logits), max);
        }
        s.max_lane(max)
    }
}

struct Exponentials<'a> {
    logits: &'a [Lanes],
    max: f32,
    scale: f32,
    out: &'a mut [Lanes],
}

impl Kernel for Exponentials<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (max, scale) = (s.splat(self.max), s.splat(self.scale));
        let mut total = s.zero();
        for (logits, out) in self.logits.iter().zip(self.out) {
            let e = math::exp(s, s.mul(s.sub(s.load(logits), max), scale));
            total = s.add(total, e);
            s.store(e, out);
        }
        s.sum(total)
    }
}
