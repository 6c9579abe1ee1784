//! Products of weights in 8 bits: every entry, epilogue, form and element type, at sizes that fit no tile.
//!
//! The reference multiplies the numbers that the stored bytes stand for. Where a kernel rounds them to the element type on
//! their way into the matrix units, the reference does so too, so that results are compared as exactly as those of
//! whole weights.

use half::f16;

use super::products::{Epilogue, Product};
use super::{Call, Case, Check, Rng, is_close};
use crate::backend::cuda::element::Element;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Q8,
    Fp8,
}

use Form::{Fp8, Q8};

/// A matrix as a device has it, and the numbers that it stands for.
pub(super) struct Stored {
    pub(super) bytes: Vec<u8>,
    pub(super) scales: Vec<u8>,
    pub(super) values: Vec<f64>,
}

/// An entry: columns and rows of a block, its threads, its dynamic shared memory.
#[derive(Clone, Copy)]
struct Entry {
    name: &'static str,
    columns: usize,
    rows: usize,
    block: u32,
    shared: u32,
    /// Into which k is cut, where it can be.
    runs: Option<usize>,
    /// Its weights go through the matrix units, as the element type.
    rounds: bool,
}

const GEMV_1: Entry = Entry { name: "gemv_b1", columns: 8, rows: 1, block: 128, shared: 0, runs: None, rounds: false };
const GEMV_2: Entry = Entry { name: "gemv_b2", rows: 2, ..GEMV_1 };
const GEMM: Entry = Entry { name: "gemm", columns: 64, rows: 64, rounds: true, ..GEMV_1 };
const GEMM_8: Entry = Entry { name: "gemm_m8", columns: 32, rows: 8, block: 256, ..GEMM };
const GEMM_16: Entry = Entry { name: "gemm_m16", rows: 16, ..GEMM_8 };
const GEMM_32: Entry = Entry { name: "gemm_m32", rows: 32, ..GEMM_8 };
const GEMM_64: Entry = Entry { name: "gemm_m64", columns: 128, block: 128, shared: 69_632, runs: Some(1), ..GEMM };
const GEMM_64_CUT: Entry = Entry { runs: Some(3), ..GEMM_64 };
const GEMM_128: Entry = Entry { name: "gemm_m128", rows: 128, block: 256, shared: 76_800, ..GEMM_64 };
const GEMM_128_CUT: Entry = Entry { runs: Some(2), ..GEMM_128 };

/// Entry, live rows, rows of the bucket, k, `n_out`.
const SHAPES: [(Entry, [usize; 4]); 22] = [
    (GEMV_1, [1, 1, 32, 1]),
    (GEMV_1, [1, 1, 2_592, 35]),
    (GEMV_1, [0, 1, 64, 8]),
    (GEMV_2, [1, 2, 544, 10]),
    (GEMV_2, [2, 2, 2_080, 7]),
    (GEMM_8, [3, 8, 1_184, 33]),
    (GEMM_8, [8, 8, 32, 70]),
    (GEMM_16, [9, 16, 1_056, 70]),
    (GEMM_16, [1, 16, 96, 5]),
    (GEMM_32, [17, 32, 2_144, 34]),
    (GEMM_32, [32, 32, 64, 64]),
    (GEMM, [3, 64, 96, 66]),
    (GEMM, [65, 70, 224, 70]),
    (GEMM, [1, 1, 32, 2]),
    (GEMM, [0, 64, 64, 64]),
    (GEMM_64, [33, 64, 96, 130]),
    (GEMM_64_CUT, [64, 64, 608, 128]),
    (GEMM_64_CUT, [40, 48, 128, 66]),
    (GEMM_128, [130, 140, 160, 130]),
    (GEMM_128_CUT, [130, 140, 224, 130]),
    (GEMM_128, [7, 128, 352, 128]),
    (GEMM_128, [128, 128, 32, 66]),
];

// === impl Form ===

impl Form {
    pub(super) const ALL: [Self; 2] = [Q8, Fp8];

    pub(super) fn name(self) -> &'static str {
        match self {
            Q8 => "q8",
            Fp8 => "fp8",
        }
    }

    /// A random matrix; its numbers are of the size of 1.
    pub(super) fn random(self, rng: &mut Rng, rows: usize, k: usize) -> Stored {
        let mut stored = Stored { bytes: vec![0; rows * k], scales: Vec::new(), values: vec![0.0; rows * k] };
        let mut scale = 0.0;
        for at in 0..rows * k {
            if self == Q8 && at % 32 == 0 {
                let kept = f16::from_f64((0.5 + 0.5 * rng.unit().abs()) / 127.0);
                stored.scales.extend(kept.to_le_bytes());
                scale = kept.to_f64();
            } else if self == Fp8 && at % k == 0 {
                // The kernels widen to 1/256 of the number, which the stored scale makes up for.
                let kept = ((1.0 + rng.unit().abs()) / 448.0) as f32;
                stored.scales.extend((kept * 256.0).to_le_bytes());
                scale = f64::from(kept);
            }
            let byte = match self {
                Q8 => rng.below(256) as u8,
                // Every number of the format but the two that are none.
                Fp8 => (rng.below(2) * 128 + rng.below(127)) as u8,
            };
            stored.bytes[at - at % 16 + place(at % 16)] = byte;
            stored.values[at] = scale * if self == Q8 { f64::from(byte) - 128.0 } else { e4m3(byte) };
        }
        stored
    }
}

/// Where one of sixteen elements is kept.
fn place(element: usize) -> usize {
    [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15][element]
}

/// The number of a byte: sign, four bits of exponent, three of fraction.
fn e4m3(byte: u8) -> f64 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f64::from(byte & 7) / 8.0);
    let size = if exponent == 0 { fraction * 2f64.powi(-6) } else { (1.0 + fraction) * 2f64.powi(exponent - 7) };
    if byte & 128 == 0 { size } else { -size }
}

fn product(form: Form, entry: Entry, product: &Product, rng: &mut Rng) -> Case {
    let &Product { element, epilogue, shape: [live, rows, k, n_out], .. } = product;
    let w = form.random(rng, n_out, k);
    let values = match (form, entry.rounds && element != Element::F32) {
        (Q8, true) => element.decode(&element.encode(&w.values)),
        _ => w.values,
    };
    let grid = [n_out.div_ceil(entry.columns), rows.div_ceil(entry.rows), entry.runs.unwrap_or(1)];
    let name = format!("{}_{}", entry.name, form.name());
    let call = Call::typed(&name, element, grid, entry.block).shared(entry.shared).count(live);
    let what = format!("{name} {} {epilogue:?} {:?} {:?}", element.name(), product.shape, entry.runs);
    product.case(call.bytes(w.bytes).bytes(w.scales), &values, (entry.runs, what), rng)
}

fn embed(element: Element, form: Form, rng: &mut Rng) -> Case {
    let (live, rows, hidden, vocab) = (3, 5, 288, 7);
    let table = form.random(rng, vocab, hidden);
    let tokens = [6, 0, 4];
    let row = |&t: &u32| table.values[t as usize * hidden..][..hidden].iter().map(|v| v * 2.0).collect::<Vec<_>>();
    let expect: Vec<f64> = tokens.iter().flat_map(row).collect();
    let name = format!("embed_{}", form.name());
    let call = Call::typed(&name, element, [rows, 1, 1], 256)
        .count(live)
        .words(&tokens)
        .bytes(table.bytes)
        .bytes(table.scales)
        .poisoned(rows * hidden * 4)
        .u32(hidden)
        .f32(2.0);
    let check: Check = Box::new(move |outs| is_close(Element::F32, 1e-6, &expect, &outs[0]));
    Case { what: format!("{name} {}", element.name()), call, check }
}

/// Every kernel here, at sizes that fit no tile.
#[must_use]
pub fn cases(element: Element) -> Vec<Case> {
    let mut rng = Rng(11);
    let mut cases = Vec::new();
    for form in Form::ALL {
        cases.push(embed(element, form, &mut rng));
        let here = |entry: &Entry| element != Element::F32 || ["gemv_b1", "gemv_b2", "gemm"].contains(&entry.name);
        for (i, &(entry, mut shape)) in SHAPES.iter().enumerate().filter(|(_, (entry, _))| here(entry)) {
            // Each shape under three of the five epilogues, each entry under all.
            for epilogue in [3 * i % 5, (3 * i + 1) % 5, (3 * i + 2) % 5] {
                let (epilogue, biased) = (Epilogue::ALL[epilogue], epilogue % 2 == 1);
                if epilogue.is_pair() {
                    shape[3] = shape[3].next_multiple_of(2);
                }
                let with = Product { element, epilogue, shape, biased };
                cases.push(product(form, entry, &with, &mut rng));
            }
        }
    }
    cases
}
