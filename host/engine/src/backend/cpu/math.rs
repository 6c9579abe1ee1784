//! Exponential, SiLU and softmax pieces on lanes: small polynomials of our own.
//!
//! Why not the standard library's: `f32::exp` is the platform's libm, whose last bit changes with its version and with
//! the machine; these are the same bits everywhere. Relative error of [`exp`] is below 2e-7 on -87 ..= 88.

use super::isa::Simd;

/// e^x. Below -87 it stays at e^-87 (about 1.6e-38), above 88 at e^88: never zero, infinite or denormal.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Taylor coefficients 1/7! .. 1/2!: on |r| <= ln(2)/2 the remainder is below 6e-9.
    const TAYLOR: [f32; 6] = [1.984_127e-4, 1.388_888_9e-3, 8.333_334e-3, 4.166_666_8e-2, 0.166_666_67, 0.5];
    // ln(2) in two parts; the first has few enough bits that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = s.min(s.max(x, s.splat(-87.0)), s.splat(88.0));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(TAYLOR[0]);
    for &c in &TAYLOR[1..] {
        p = s.fma(p, r, s.splat(c));
    }
    let one = s.splat(1.0);
    let p = s.fma(s.fma(p, r, one), r, one);
    s.mul(p, s.pow2(n))
}

/// x / (1 + e^-x).
#[inline(always)]
pub(super) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.sub(s.zero(), x));
    s.div(x, s.add(s.splat(1.0), e))
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel, LANES, Lanes};
    use super::*;

    struct Both<'a>(&'a Lanes);

    impl Kernel for Both<'_> {
        type Out = [Lanes; 2];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [Lanes; 2] {
            let mut out = [[0.0; LANES]; 2];
            let x = s.load(self.0);
            s.store(exp(s, x), &mut out[0]);
            s.store(silu(s, x), &mut out[1]);
            out
        }
    }

    #[test]
    fn exp_and_silu_are_close_to_the_truth_and_equal_everywhere() {
        let isas = Isa::available();
        for step in 0..2_800 {
            let x: Lanes = std::array::from_fn(|i| -87.0 + (step * LANES + i) as f32 * (175.0 / 44_800.0));
            let reference = isas[0].run(Both(&x));
            for isa in &isas {
                assert_eq!(isa.run(Both(&x)).map(|l| l.map(f32::to_bits)), reference.map(|l| l.map(f32::to_bits)));
            }
            for i in 0..LANES {
                let (truth, sigmoid) = (f64::from(x[i]).exp(), 1.0 / (1.0 + f64::from(-x[i]).exp()));
                assert!((f64::from(reference[0][i]) / truth - 1.0).abs() < 2e-7, "exp({})", x[i]);
                let silu = f64::from(x[i]) * sigmoid;
                assert!((f64::from(reference[1][i]) - silu).abs() <= 4e-7 * silu.abs() + 1e-30, "silu({})", x[i]);
            }
        }
    }

    #[test]
    fn exp_is_clamped_at_both_ends() {
        let mut x = [0.0; LANES];
        (x[0], x[1], x[2]) = (f32::NEG_INFINITY, -1_000.0, 1_000.0);
        let [e, _] = Isa::best().run(Both(&x));
        assert!(e[0] > 0.0 && e[0] < 2e-38 && e[1] == e[0] && e[2].is_finite() && e[3] == 1.0, "{e:?}");
    }
}
