//! Small steps over panel-major rows `[width / 16][stride(rows)][16]`: bias, soft cap, and rows that move between products.

use super::isa::{Isa, Kernel, Lanes, Simd, stride};
use super::math;

/// Adds a bias to every row.
pub(super) fn add_bias(isa: Isa, bias: &[Lanes], x: &mut [Lanes], rows: usize) {
    isa.run(AddBias { bias, x, rows });
}

/// Makes every value `cap * tanh(value / cap)`.
pub(super) fn cap(isa: Isa, cap: f32, x: &mut [Lanes]) {
    isa.run(Cap { cap, x });
}

/// Copies the rows that `pick` gives, in its order, to the rows of `out`.
pub(super) fn gather(x: &[Lanes], rows: usize, pick: impl ExactSizeIterator<Item = usize> + Clone, out: &mut [Lanes]) {
    let (from, to) = (stride(rows), stride(pick.len()));
    for (x, out) in x.chunks_exact(from).zip(out.chunks_exact_mut(to)) {
        out.iter_mut().zip(pick.clone()).for_each(|(out, row)| *out = x[row]);
    }
}

/// Adds `weight` times each row of `x` to the row of `out` that `pick` names for it.
pub(super) fn scatter_add(isa: Isa, x: &[Lanes], pick: &[(u32, f32)], out: &mut [Lanes], rows: usize) {
    isa.run(ScatterAdd { x, pick, out, rows });
}

struct AddBias<'a> {
    bias: &'a [Lanes],
    x: &'a mut [Lanes],
    rows: usize,
}

struct Cap<'a> {
    cap: f32,
    x: &'a mut [Lanes],
}

struct ScatterAdd<'a> {
    x: &'a [Lanes],
    pick: &'a [(u32, f32)],
    out: &'a mut [Lanes],
    rows: usize,
}

impl Kernel for AddBias<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (panel, bias) in self.x.chunks_exact_mut(stride(self.rows)).zip(self.bias) {
            let bias = s.load(bias);
            for x in &mut panel[..self.rows] {
                s.store(s.add(s.load(x), bias), x);
            }
        }
    }
}

impl Kernel for Cap<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x {
            s.store(math::cap(s, s.load(x), self.cap), x);
        }
    }
}

impl Kernel for ScatterAdd<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (from, to) = (stride(self.pick.len()), stride(self.rows));
        for (x, out) in self.x.chunks_exact(from).zip(self.out.chunks_exact_mut(to)) {
            for (x, &(row, weight)) in x.iter().zip(self.pick) {
                let out = &mut out[row as usize];
                s.store(s.fma(s.load(x), s.splat(weight), s.load(out)), out);
            }
        }
    }
}
