//! Root-mean-square norm and rotary positions, on panel-major activations `[width / 16][stride(rows)][16]`.

use super::isa::{Isa, Kernel, LANES, Lanes, Simd, stride};
use super::pool::ComputePool;
use crate::spec::Rope;

/// Rows whose squares are summed at once: what they have of a panel lies together.
const TOGETHER: usize = 8;

/// Where a norm goes, with room for a number per row.
#[derive(Debug)]
pub(super) struct Normed<'a> {
    pub(super) rows: usize,
    pub(super) scales: &'a mut [f32],
    pub(super) out: &'a mut [Lanes],
}

/// Writes `x / rms(x) * gain`, row by row.
pub(super) fn rms_norm(pool: &ComputePool, norm: &Norm, x: &[Lanes], to: Normed<'_>) {
    norm.run(pool, x, to, false);
}

/// Adds `x / rms(x) * gain` to `out`, row by row.
pub(super) fn rms_norm_add(pool: &ComputePool, norm: &Norm, x: &[Lanes], to: Normed<'_>) {
    norm.run(pool, x, to, true);
}

/// Norms each head in `x` in place.
pub(super) fn norm_heads(isa: Isa, norm: &Norm, x: &mut [Lanes], rows: usize) {
    isa.run(NormHeads { norm, x, rows });
}

/// Gains of a norm.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) gain: Vec<Lanes>,
    pub(super) eps: f32,
}

/// What rows `first ..` are multiplied by.
struct RowScales<'a> {
    norm: &'a Norm,
    x: &'a [Lanes],
    step: usize,
    first: usize,
    out: &'a mut [f32],
}

/// Panels `first ..` of all rows.
struct Apply<'a> {
    gain: &'a [Lanes],
    x: &'a [Lanes],
    scales: &'a [f32],
    out: &'a mut [Lanes],
    add: bool,
}

struct NormHeads<'a> {
    norm: &'a Norm,
    x: &'a mut [Lanes],
    rows: usize,
}

impl Norm {
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.gain.as_slice())
    }

    /// By rows, then by panels, which lie together: a thread owns what it writes.
    fn run(&self, pool: &ComputePool, x: &[Lanes], to: Normed<'_>, add: bool) {
        let (isa, step) = (pool.isa(), stride(to.rows));
        let (scales, out) = (&mut to.scales[..to.rows], &mut to.out[..self.gain.len() * step]);
        // A value costs about as much as four multiply-adds.
        let work = 4 * out.len() * LANES;
        pool.split(work, scales, 1, |first, out| isa.run(RowScales { norm: self, x, step, first, out }));
        let scales = &*scales;
        pool.split(work, out, step, |first, out| {
            let panels = first..first + out.len() / step;
            let x = &x[panels.start * step..panels.end * step];
            isa.run(Apply { gain: &self.gain[panels], x, scales, out, add });
        });
    }

    /// What each of `R` rows, the first of which begins `x`, is multiplied by before the gain.
    #[inline(always)]
    fn scales<S: Simd, const R: usize>(&self, s: S, x: &[Lanes], step: usize) -> [f32; R] {
        let mut squares = [s.zero(); R];
        for panel in 0..self.gain.len() {
            for (squares, x) in squares.iter_mut().zip(&x[panel * step..]) {
                let x = s.load(x);
                *squares = s.fma(x, x, *squares);
            }
        }
        let width = (self.gain.len() * LANES) as f32;
        squares.map(|squares| 1.0 / (s.sum(squares) / width + self.eps).sqrt())
    }
}

impl Kernel for RowScales<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, x, step, first, out } = self;
        let (several, rest) = out.as_chunks_mut::<TOGETHER>();
        let n_rest = first + TOGETHER * several.len();
        for (i, scales) in several.iter_mut().enumerate() {
            *scales = norm.scales(s, &x[first + TOGETHER * i..], step);
        }
        for (i, scale) in rest.iter_mut().enumerate() {
            [*scale] = norm.scales(s, &x[n_rest + i..], step);
        }
    }
}

impl Kernel for Apply<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { gain, x, scales, out, add } = self;
        let step = out.len() / gain.len();
        for ((out, x), gain) in out.chunks_exact_mut(step).zip(x.chunks_exact(step)).zip(gain) {
            let gain = s.load(gain);
            for ((out, x), &scale) in out.iter_mut().zip(x).zip(scales) {
                let v = s.mul(s.mul(s.load(x), s.splat(scale)), gain);
                s.store(if add { s.add(s.load(out), v) } else { v }, out);
            }
        }
    }
}

impl Kernel for NormHeads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, x, rows } = self;
        let step = stride(rows);
        for head in x.chunks_exact_mut(norm.gain.len() * step) {
            for row in 0..rows {
                let [scale] = norm.scales(s, &head[row..], step);
                let scale = s.splat(scale);
                for (panel, gain) in norm.gain.iter().enumerate() {
                    let v = s.mul(s.load(&head[panel * step + row]), scale);
                    s.store(s.mul(v, s.load(gain)), &mut head[panel * step + row]);
                }
            }
        }
    }
}

/// Cosines and sines by position, for the first half of what is turned of a head: `[position][rope width / 32][16]`.
///
/// Made once in `f64` from the platform's sine and cosine and rounded to `f32`: another machine's libm may differ in the
/// last bit of the `f64`, which survives that rounding about once in 2^28 values.
#[derive(Debug)]
pub(super) struct RopeTables {
    cos: Vec<Lanes>,
    sin: Vec<Lanes>,
    half: usize,
    /// Vectors of a head, turned or not.
    head: usize,
}

impl RopeTables {
    pub(super) fn new(rope: &Rope, head_dim: usize, positions: usize) -> Self {
        let frequencies = rope.frequencies();
        let half = frequencies.len() / LANES;
        let angle = |v: usize, i: usize| (v / half) as f64 * frequencies[v % half * LANES + i];
        let table = |f: fn(f64) -> f64| {
            (0..positions * half).map(|v| std::array::from_fn(|i| (rope.magnitude * f(angle(v, i))) as f32)).collect()
        };
        Self { cos: table(f64::cos), sin: table(f64::sin), half, head: head_dim / LANES }
    }

    pub(super) fn bytes(&self) -> usize {
        2 * size_of_val(self.cos.as_slice())
    }

    /// Turns the heads in `x`, whose rows stand at `positions`.
    pub(super) fn rotate(&self, isa: Isa, x: &mut [Lanes], positions: &[u32]) {
        isa.run(Rotate { rope: self, x, positions });
    }
}

struct Rotate<'a> {
    rope: &'a RopeTables,
    x: &'a mut [Lanes],
    positions: &'a [u32],
}

impl Kernel for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (step, half) = (stride(self.positions.len()), self.rope.half);
        for head in self.x.chunks_exact_mut(self.rope.head * step) {
            let (low, high) = head[..2 * half * step].split_at_mut(half * step);
            for (row, &position) in self.positions.iter().enumerate() {
                for panel in 0..half {
                    let table = position as usize * half + panel;
                    let (cos, sin) = (s.load(&self.rope.cos[table]), s.load(&self.rope.sin[table]));
                    let at = panel * step + row;
                    let (a, b) = (s.load(&low[at]), s.load(&high[at]));
                    let minus_sin = s.sub(s.zero(), sin);
                    s.store(s.fma(b, minus_sin, s.mul(a, cos)), &mut low[at]);
                    s.store(s.fma(a, sin, s.mul(b, cos)), &mut high[at]);
                }
            }
        }
    }
}
