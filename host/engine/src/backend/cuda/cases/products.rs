//! GEMV and GEMM: every entry, epilogue and element type, at sizes that fit no tile.

use super::{Call, Case, Check, Rng, is_close};
use crate::backend::cuda::element::Element;

/// What becomes of a product, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    Store,
    StoreFloat,
    AddFloat,
    SiluMul,
    GeluMul,
}

use Epilogue::{AddFloat, GeluMul, SiluMul, Store, StoreFloat};

/// An entry: columns and rows of a block, its threads, its dynamic shared memory, and the runs into which k is cut where it can be.
struct Entry {
    name: &'static str,
    columns: usize,
    rows: usize,
    block: u32,
    shared: u32,
    only_16_bit: bool,
    runs: Option<usize>,
}

const fn gemv(name: &'static str, columns: usize, rows: usize) -> Entry {
    Entry { name, columns, rows, block: 128, shared: 0, only_16_bit: false, runs: None }
}

const GEMV_1: Entry = gemv("gemv_b1", 8, 1);
const GEMV_2: Entry = gemv("gemv_b2", 8, 2);
const GEMV_4: Entry = gemv("gemv_b4", 16, 4);
const GEMM: Entry = gemv("gemm", 64, 64);
const GEMM_8: Entry = Entry { block: 256, only_16_bit: true, ..gemv("gemm_m8", 32, 8) };
const GEMM_16: Entry = Entry { block: 256, only_16_bit: true, ..gemv("gemm_m16", 32, 16) };
const GEMM_32: Entry = Entry { block: 256, only_16_bit: true, ..gemv("gemm_m32", 32, 32) };
const GEMM_64: Entry = in_runs(gemv("gemm_m64", 128, 64), 1);
const GEMM_64_CUT: Entry = in_runs(GEMM_64, 3);
const GEMM_128: Entry = in_runs(gemv("gemm_m128", 128, 128), 1);
const GEMM_128_CUT: Entry = in_runs(GEMM_128, 2);

const fn in_runs(entry: Entry, runs: usize) -> Entry {
    Entry { block: 256, shared: 98_304, only_16_bit: true, runs: Some(runs), ..entry }
}

/// The same for [`large`].
const LARGE: [(Entry, [usize; 4]); 9] = [
    (GEMV_1, [1, 1, 14_336, 512]),
    (GEMV_2, [2, 2, 4_096, 1_024]),
    (GEMV_4, [4, 4, 4_096, 1_024]),
    (GEMM_8, [8, 8, 14_336, 96]),
    (GEMM_16, [16, 16, 14_336, 96]),
    (GEMM_32, [32, 32, 4_096, 128]),
    (GEMM_64_CUT, [64, 64, 14_336, 256]),
    (GEMM_128, [300, 384, 4_096, 256]),
    (GEMM_128_CUT, [96, 128, 4_096, 256]),
];

/// Relative error of sums of 14,336 products, by published models of these units some 5e-6.
pub(super) const MATRIX_UNITS: f64 = 3e-5;

/// Of the sums of a run of the largest tile.
const PARTS_BYTES: usize = 4 * 128 * 128;

/// Entry, live rows, rows of the bucket, k, `n_out`.
const SHAPES: [(Entry, [usize; 4]); 28] = [
    (GEMV_1, [1, 1, 8, 1]),
    (GEMV_1, [1, 1, 1_048, 34]),
    (GEMV_1, [0, 1, 64, 8]),
    (GEMV_2, [1, 2, 264, 10]),
    (GEMV_2, [2, 2, 1_304, 7]),
    (GEMV_4, [3, 4, 520, 33]),
    (GEMV_4, [4, 4, 16, 18]),
    (GEMM, [1, 1, 8, 2]),
    (GEMM, [3, 64, 72, 66]),
    (GEMM, [65, 70, 200, 70]),
    (GEMM, [64, 64, 328, 64]),
    (GEMM, [0, 64, 64, 64]),
    (GEMM_8, [5, 8, 776, 50]),
    (GEMM_8, [8, 8, 1_032, 18]),
    (GEMM_8, [0, 8, 64, 8]),
    (GEMM_16, [9, 16, 1_096, 70]),
    (GEMM_16, [16, 16, 520, 32]),
    (GEMM_16, [1, 16, 8, 5]),
    (GEMM_32, [17, 32, 584, 34]),
    (GEMM_32, [32, 32, 64, 64]),
    (GEMM_64, [33, 64, 72, 130]),
    (GEMM_64_CUT, [64, 64, 584, 128]),
    // Runs without a tile of their own.
    (GEMM_64_CUT, [40, 48, 128, 66]),
    (GEMM_64_CUT, [0, 64, 256, 64]),
    (GEMM_128, [130, 140, 136, 130]),
    (GEMM_128_CUT, [130, 140, 200, 130]),
    (GEMM_128, [7, 128, 328, 128]),
    (GEMM_128, [128, 128, 64, 66]),
];

/// What a product is made of beside its entry and its weights.
pub(super) struct Product {
    pub(super) element: Element,
    pub(super) epilogue: Epilogue,
    /// Live rows, rows of the bucket, k, `n_out`.
    pub(super) shape: [usize; 4],
    pub(super) biased: bool,
}

impl Epilogue {
    pub(super) const ALL: [Self; 5] = [Store, StoreFloat, AddFloat, SiluMul, GeluMul];

    /// Whether two columns make one of the result.
    pub(super) fn is_pair(self) -> bool {
        matches!(self, SiluMul | GeluMul)
    }

    /// What those two come to.
    pub(super) fn gated(self, gate: f64, up: f64) -> f64 {
        let part = match self {
            SiluMul => 1.0 / (1.0 + (-gate).exp()),
            _ => 0.5 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3))).tanh()),
        };
        gate * part * up
    }
}

impl Product {
    /// Completes a call that has its weights, and says what must come of it; `w` are the numbers that the weights stand for. One that
    /// may be cut into runs has room for their sums, and counts that are zero again afterwards.
    pub(super) fn case(&self, call: Call, w: &[f64], (runs, what): (Option<usize>, String), rng: &mut Rng) -> Case {
        let &Self { element, epilogue, shape: [live, rows, k, n_out], biased } = self;
        let x = element.random(rng, live * k);
        let bias = biased.then(|| element.random(rng, n_out));
        let residual = Element::F32.random(rng, live * n_out);
        let dot = |row: usize, column: usize| {
            let sum: f64 = (0..k).map(|i| x[row * k + i] * w[column * k + i]).sum();
            sum + bias.as_ref().map_or(0.0, |bias| bias[column])
        };
        let at = |row: usize, column: usize| match epilogue {
            Store | StoreFloat => dot(row, column),
            AddFloat => dot(row, column) + residual[row * n_out + column],
            SiluMul | GeluMul => epilogue.gated(dot(row, 2 * column), dot(row, 2 * column + 1)),
        };
        let width = if epilogue.is_pair() { n_out / 2 } else { n_out };
        let expect: Vec<f64> = (0..live * width).map(|i| at(i / width, i % width)).collect();
        let to = if epilogue == Store || epilogue.is_pair() { element } else { Element::F32 };
        let mut initial = if epilogue == AddFloat { to.encode(&residual) } else { Vec::new() };
        initial.resize(rows * width * to.bytes(), super::POISON);
        let call = call
            .input(element, &x)
            .maybe(element, bias.as_deref())
            .output(initial)
            .u32(k)
            .u32(n_out)
            .u32(epilogue as usize);
        // Sums are in float whatever the type, so a float result of exact inputs is as exact as that, but for matrix units, which
        // multiply 16 bits: they cut off what they do not add.
        let by_units = element != Element::F32 && call.kernel.starts_with("gemm");
        let tolerance = if by_units { to.tolerance().max(MATRIX_UNITS) } else { to.tolerance() };
        let [columns, in_y, _] = call.grid.map(|n| n as usize);
        let call = match runs {
            Some(runs) => call.poisoned(columns * in_y * runs * PARTS_BYTES).output(vec![0; columns * in_y * 8 * 4]),
            None => call,
        };
        let check: Check = Box::new(move |outs| {
            let is_reset = outs.get(2).is_none_or(|counts| counts.iter().all(|byte| *byte == 0));
            is_close(to, tolerance, &expect, &outs[0])?;
            if is_reset { Ok(()) } else { Err("the counts of runs are not zero again".to_owned()) }
        });
        Case { what, call, check }
    }

    /// With whole weights.
    fn whole(&self, entry: &Entry, rng: &mut Rng) -> Case {
        let &Self { element, epilogue, shape: [live, rows, k, n_out], .. } = self;
        let w = element.random(rng, n_out * k);
        let grid = [n_out.div_ceil(entry.columns), rows.div_ceil(entry.rows), entry.runs.unwrap_or(1)];
        let call = Call::typed(entry.name, element, grid, entry.block).shared(entry.shared).count(live);
        let what = format!("{} {} {epilogue:?} {:?} {:?}", entry.name, element, self.shape, entry.runs);
        self.case(call.input(element, &w), &w, (entry.runs, what), rng)
    }
}

/// Sums that are too large for `f16`, whose largest number is stored; of pairs what gate and up make.
fn too_large(entry: &Entry, epilogue: Epilogue) -> Case {
    let (element, k, n_out) = (Element::F16, 64_usize, 8_usize);
    let signs: Vec<f64> = (0..n_out).map(|column| if column % 3 == 1 { -1.0 } else { 1.0 }).collect();
    let w: Vec<f64> = signs.iter().flat_map(|sign| [sign * 100.0; 64]).collect();
    let grid = [n_out.div_ceil(entry.columns), 1, 1];
    let call = Call::typed(entry.name, element, grid, entry.block).shared(entry.shared).count(1);
    let call = call.input(element, &w).input(element, &[100.0; 64]).maybe(element, None);
    let width = if epilogue.is_pair() { n_out / 2 } else { n_out };
    let call = call.poisoned(width * 2).u32(k).u32(n_out).u32(epilogue as usize);
    // One run of the largest tile, which is not cut.
    let call = match entry.runs {
        Some(_) => call.poisoned(PARTS_BYTES).output(vec![0; 8 * 4]),
        None => call,
    };
    // A gate of a large number is that or nothing.
    let gated = |pair: &[f64]| if pair[0] < 0.0 { 0.0 } else { pair[1] * 65_504.0 };
    let expect: Vec<f64> = match epilogue.is_pair() {
        true => signs.chunks(2).map(gated).collect(),
        false => signs.iter().map(|sign| sign * 65_504.0).collect(),
    };
    let check: Check = Box::new(move |outs| match element.decode(&outs[0]) {
        found if found == expect => Ok(()),
        found => Err(format!("{found:?} instead of {expect:?}")),
    });
    Case { what: format!("{} {element} {epilogue:?} of sums beyond it", entry.name), call, check }
}

/// Every kernel here, at sizes that fit no tile.
#[must_use]
pub fn cases(element: Element) -> Vec<Case> {
    let mut rng = Rng(3);
    let mut cases = Vec::new();
    for (entry, shape) in SHAPES.iter().filter(|(entry, _)| !entry.only_16_bit || element != Element::F32) {
        for (i, epilogue) in Epilogue::ALL.into_iter().enumerate() {
            let mut shape = *shape;
            if epilogue.is_pair() {
                shape[3] = shape[3].next_multiple_of(2);
            }
            let product = Product { element, epilogue, shape, biased: i % 2 == 1 };
            cases.push(product.whole(entry, &mut rng));
        }
    }
    if element == Element::F16 {
        let entries = [GEMV_1, GEMM, GEMM_8, GEMM_64, GEMM_128];
        let both = |entry| [Store, SiluMul].map(|epilogue| too_large(entry, epilogue));
        cases.extend(entries.iter().flat_map(both));
    }
    cases
}

/// Lengths of real models.
#[must_use]
pub fn large(element: Element) -> Vec<Case> {
    let mut rng = Rng(4);
    let exists = |(entry, _): &&(Entry, [usize; 4])| !entry.only_16_bit || element != Element::F32;
    let product = |(entry, shape): &'static (Entry, [usize; 4])| {
        Product { element, epilogue: StoreFloat, shape: *shape, biased: false }.whole(entry, &mut rng)
    };
    LARGE.iter().filter(exists).map(product).collect()
}
