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

/// The tanh form of GELU: `x / (1 + e^-2u)` with `u = sqrt(2 / pi) * (x + 0.044715 * x^3)`.
#[inline(always)]
pub(super) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    const MINUS_TWICE: f32 = -1.595_769;
    let cube = s.mul(s.mul(x, x), x);
    let u = s.fma(cube, s.splat(0.044_715), x);
    let e = exp(s, s.mul(u, s.splat(MINUS_TWICE)));
    s.div(x, s.add(s.splat(1.0), e))
}

/// The exact form of GELU, `x * (1 + erf(x / sqrt(2))) / 2`, by Abramowitz and Stegun 7.1.26: absolute error below
/// `|x| * 3e-7`.
#[inline(always)]
pub(super) fn gelu_erf<S: Simd>(s: S, x: S::V) -> S::V {
    const P: f32 = 0.327_591_1;
    const A: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_8, -0.284_496_74, 0.254_829_6];
    let magnitude = s.max(x, s.sub(s.zero(), x));
    let z = s.mul(magnitude, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(s.splat(1.0), s.fma(z, s.splat(P), s.splat(1.0)));
    let mut tail = s.splat(A[0]);
    for &a in &A[1..] {
        tail = s.fma(tail, t, s.splat(a));
    }
    let e = exp(s, s.sub(s.zero(), s.mul(z, z)));
    // Half of erfc(z): what is missing to `x` above zero and to nothing below.
    let tail = s.mul(s.mul(tail, t), s.mul(e, s.splat(0.5)));
    s.sub(s.max(x, s.zero()), s.mul(magnitude, tail))
}

/// `cap * tanh(x / cap)`, with an absolute error below `cap * 4e-7`.
#[inline(always)]
pub(super) fn cap<S: Simd>(s: S, x: S::V, cap: f32) -> S::V {
    let e = exp(s, s.mul(x, s.splat(2.0 / cap)));
    let one = s.splat(1.0);
    let below_one = s.div(s.splat(2.0), s.add(e, one));
    s.mul(s.sub(one, below_one), s.splat(cap))
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel, LANES, Lanes};
    use super::*;

    struct All<'a>(&'a Lanes);

    impl Kernel for All<'_> {
        type Out = [Lanes; 5];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [Lanes; 5] {
            let mut out = [[0.0; LANES]; 5];
            let x = s.load(self.0);
            s.store(exp(s, x), &mut out[0]);
            s.store(silu(s, x), &mut out[1]);
            s.store(gelu(s, x), &mut out[2]);
            s.store(cap(s, x, 30.0), &mut out[3]);
            s.store(gelu_erf(s, x), &mut out[4]);
            out
        }
    }

    /// Its Taylor series, which alternates too wildly beyond 4, where it is 1 but for 2e-8.
    fn erf(x: f64) -> f64 {
        if x.abs() > 4.0 {
            return x.signum();
        }
        let term = |sum: (f64, f64), n: i32| (sum.0 + sum.1 / f64::from(2 * n + 1), -sum.1 * x * x / f64::from(n + 1));
        (0..80).fold((0.0, x), term).0 * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn all_are_close_to_the_truth_and_equal_everywhere() {
        let isas = Isa::available();
        for step in 0..2_800 {
            let x: Lanes = std::array::from_fn(|i| -87.0 + (step * LANES + i) as f32 * (175.0 / 44_800.0));
            let reference = isas[0].run(All(&x));
            for isa in &isas {
                assert_eq!(isa.run(All(&x)).map(|l| l.map(f32::to_bits)), reference.map(|l| l.map(f32::to_bits)));
            }
            for i in 0..LANES {
                let (exp, sigmoid) = (f64::from(x[i]).exp(), 1.0 / (1.0 + f64::from(-x[i]).exp()));
                assert!((f64::from(reference[0][i]) / exp - 1.0).abs() < 2e-7, "exp({})", x[i]);
                let truth = f64::from(x[i]);
                let u = (2.0 / std::f64::consts::PI).sqrt() * (truth + 0.044715 * truth.powi(3));
                let gelu = 0.5 * truth * (1.0 + u.tanh());
                // Far below zero the truth vanishes and e^-2u stops at e^88.
                assert!((f64::from(reference[2][i]) - gelu).abs() <= 6e-7 * truth.abs() + 1e-30, "gelu({})", x[i]);
                let exact = 0.5 * truth * (1.0 + erf(truth * std::f64::consts::FRAC_1_SQRT_2));
                assert!((f64::from(reference[4][i]) - exact).abs() <= 3e-7 * truth.abs() + 1e-30, "gelu_erf({})", x[i]);
                let capped = 30.0 * (truth / 30.0).tanh();
                assert!((f64::from(reference[3][i]) - capped).abs() <= 30.0 * 4e-7, "cap({})", x[i]);
                let silu = truth * sigmoid;
                assert!((f64::from(reference[1][i]) - silu).abs() <= 4e-7 * silu.abs() + 1e-30, "silu({})", x[i]);
            }
        }
    }

    #[test]
    fn exp_is_clamped_at_both_ends() {
        let mut x = [0.0; LANES];
        (x[0], x[1], x[2]) = (f32::NEG_INFINITY, -1_000.0, 1_000.0);
        let [e, ..] = Isa::best().run(All(&x));
        assert!(e[0] > 0.0 && e[0] < 2e-38 && e[1] == e[0] && e[2].is_finite() && e[3] == 1.0, "{e:?}");
    }
}
