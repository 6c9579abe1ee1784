//! Embedding, norms, and rotation with the store into pages.

use super::{Call, Case, Check, POISON, Rng, close, is_close};
use crate::backend::cuda::element::Element;

const EPS: f64 = 1e-5;

/// Half of the cases are of models that keep their gains less 1; any number does.
const PLUS: f64 = 0.75;

fn normed(x: &[f64], gain: &[f64], plus: f64) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    x.iter().zip(gain).map(|(v, g)| v / (mean + EPS).sqrt() * (g + plus)).collect()
}

/// What is too large for the type is its largest number.
fn finite(element: Element, x: f64) -> f64 {
    let largest = if element == Element::F16 { 65_504.0 } else { f64::INFINITY };
    x.clamp(-largest, largest)
}

fn embed(element: Element, rng: &mut Rng) -> Case {
    let (live, rows, hidden, vocab) = (3, 5, 264, 7);
    let table = element.random(rng, vocab * hidden);
    let tokens = [6, 0, 4];
    let row = |&t: &u32| table[t as usize * hidden..][..hidden].iter().map(|v| v * 1.5).collect::<Vec<_>>();
    let expect = tokens.iter().flat_map(row).collect();
    let call = Call::typed("embed", element, [rows, 1, 1], 256)
        .count(live)
        .words(&tokens)
        .input(element, &table)
        .poisoned(rows * hidden * 4)
        .u32(hidden)
        .f32(1.5);
    Case { what: format!("embed {}", element), call, check: close(Element::F32, 1e-7, expect) }
}

fn rms_norm(element: Element, rng: &mut Rng, hidden: usize, pick: Option<[u32; 2]>) -> Case {
    let (live, rows) = (2, 3);
    let x = Element::F32.random(rng, 4 * hidden);
    let gain = element.random(rng, hidden);
    let from = pick.unwrap_or([0, 1]).map(|i| &x[i as usize * hidden..][..hidden]);
    let plus = if hidden > 1_000 { PLUS } else { 0.0 };
    let expect = from.iter().flat_map(|x| normed(x, &gain, plus)).collect();
    let call = Call::typed("rms_norm", element, [rows, 1, 1], 256).count(live).input(Element::F32, &x);
    let call = match pick {
        Some(pick) => call.words(&pick),
        None => call.null(),
    };
    let call = call.input(element, &gain).poisoned(rows * hidden * element.bytes()).u32(hidden).f32(EPS).f32(plus);
    let what = format!("rms_norm {} {hidden} {pick:?}", element);
    Case { what, call, check: close(element, element.tolerance(), expect) }
}

fn norm_add(element: Element, rng: &mut Rng, hidden: usize, too_large: bool) -> Case {
    let (live, rows) = (2, 4);
    let x = Element::F32.random(rng, live * hidden);
    let (mut delta, gain) = (element.random(rng, live * hidden), element.random(rng, hidden));
    if too_large {
        // Of one row a library has stored what was too large for it.
        (delta[3], delta[hidden - 1]) = (f64::INFINITY, f64::NEG_INFINITY);
    }
    let rows_of = |values: &[f64]| values.iter().map(|v| finite(element, *v)).collect::<Vec<_>>();
    let added: Vec<f64> = delta.chunks(hidden).flat_map(|row| normed(&rows_of(row), &gain, PLUS)).collect();
    let expect = x.iter().zip(&added).map(|(x, d)| x + d).collect();
    let mut initial = Element::F32.encode(&x);
    initial.resize(rows * hidden * 4, POISON);
    let call = Call::typed("norm_add", element, [rows, 1, 1], 256)
        .count(live)
        .output(initial)
        .input(element, &delta)
        .input(element, &gain)
        .u32(hidden)
        .f32(EPS)
        .f32(PLUS);
    let what = format!("norm_add {element} {hidden}{}", if too_large { " too large" } else { "" });
    Case { what, call, check: close(Element::F32, 1e-6, expect) }
}

/// Of 2 live rows after the first, in a launch of 3.
fn gated(element: Element, rng: &mut Rng, (ffn, kind): (usize, usize), too_large: bool) -> Case {
    let (first, live, rows) = (1, 2, 3);
    let mut pairs = element.random(rng, live * 2 * ffn);
    if too_large {
        // Gate of one, up of another, and both of a third, with what they make.
        (pairs[0], pairs[3]) = (f64::NEG_INFINITY, f64::INFINITY);
        (pairs[4], pairs[5]) = (f64::INFINITY, f64::INFINITY);
    }
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let of = |x: f64| if kind == 3 { x } else { 1.595_769_121_605_731 * (x + 0.044_715 * x * x * x) };
    let made = pairs.chunks(2).map(|pair| (finite(element, pair[0]), finite(element, pair[1])));
    let made = made.map(|(gate, up)| finite(element, gate * sigmoid(of(gate)) * up));
    // Nothing writes the first row, nor what follows the live ones.
    let mut initial = element.encode(&vec![0.5; first * ffn]);
    initial.resize((first + rows) * ffn * element.bytes(), POISON);
    let expect = vec![0.5; first * ffn].into_iter().chain(made).collect();
    let in_x = ffn.div_ceil(256 * 16 / element.bytes());
    let call = Call::typed("gated", element, [in_x, rows, 1], 256)
        .count(first + live)
        .input(element, &pairs)
        .output(initial)
        .u32(first)
        .u32(ffn)
        .u32(kind);
    let what = format!("gated {element} {ffn} as {kind}{}", if too_large { " too large" } else { "" });
    Case { what, call, check: close(element, element.tolerance(), expect) }
}

/// Rows of lengths that end within, at and past a page; their last tokens are in the step.
struct Rope {
    heads: usize,
    kv_heads: usize,
    d: usize,
    block_tokens: usize,
    /// Elements of a head that are turned.
    turned: usize,
    with_gains: bool,
    /// Numbers of a query and of a key were, for `f16`; their norms are not.
    too_large: bool,
}

const POSITIONS: [u32; 5] = [0, 15, 16, 33, 47];
const ROW_OF: [u32; 5] = [1, 0, 0, 2, 1];
const MAX_BLOCKS: usize = 4;

impl Rope {
    fn rotate(&self, x: &[f64], gain: Option<&[f64]>, position: u32) -> Vec<f64> {
        let x = gain.map_or_else(|| x.to_vec(), |gain| normed(x, gain, PLUS));
        let half = self.turned / 2;
        let turn = |i: usize| {
            if i >= self.turned {
                return x[i];
            }
            let (low, high) = (x[i % half], x[i % half + half]);
            let (sin, cos) = self.angle(position as usize, i % half).sin_cos();
            if i < half { low * cos - high * sin } else { high * cos + low * sin }
        };
        (0..self.d).map(turn).collect()
    }

    fn angle(&self, position: usize, i: usize) -> f64 {
        position as f64 * 10_000f64.powf(-2.0 * i as f64 / self.turned as f64)
    }

    fn table(&self) -> Vec<f64> {
        let pair = |at: usize| {
            let (sin, cos) = self.angle(at / (self.turned / 2), at % (self.turned / 2)).sin_cos();
            [cos, sin]
        };
        (0..48 * self.turned / 2).flat_map(pair).collect()
    }

    fn case(&self, element: Element, rng: &mut Rng) -> Case {
        let &Self { heads, kv_heads, d, block_tokens, turned, with_gains, too_large } = self;
        let (rows, width, stride) = (POSITIONS.len() + 2, (heads + 2 * kv_heads) * d, kv_heads * block_tokens * d);
        let tables: Vec<u32> = rng.shuffled(3 * MAX_BLOCKS).into_iter().map(|page| page as u32).collect();
        let mut qkv = element.random(rng, POSITIONS.len() * width);
        if too_large {
            (qkv[1], qkv[width + heads * d + 2]) = (f64::INFINITY, f64::NEG_INFINITY);
        }
        let gains = with_gains.then(|| [element.random(rng, d), element.random(rng, d)]);
        let (mut expect, mut pages) = (qkv.clone(), vec![f64::NAN; 3 * MAX_BLOCKS * 2 * stride]);
        for (token, (&position, &row)) in POSITIONS.iter().zip(&ROW_OF).enumerate() {
            let page = tables[row as usize * MAX_BLOCKS + position as usize / block_tokens] as usize;
            for head in 0..heads + 2 * kv_heads {
                let from = &qkv[token * width + head * d..][..d];
                let from = &from.iter().map(|v| finite(element, *v)).collect::<Vec<_>>()[..];
                let gain = gains.as_ref().map(|[q, k]| if head < heads { q.as_slice() } else { k.as_slice() });
                let rotated = self.rotate(from, gain, position);
                let slot = position as usize % block_tokens;
                let mut put = |part: usize, kv_head: usize, values: &[f64]| {
                    let at = (page * 2 + part) * stride + (kv_head * block_tokens + slot) * d;
                    pages[at..][..d].copy_from_slice(values);
                };
                if head < heads {
                    expect[token * width + head * d..][..d].copy_from_slice(&rotated);
                } else if head < heads + kv_heads {
                    put(0, head - heads, &rotated);
                } else {
                    put(1, head - heads - kv_heads, from);
                }
            }
        }
        let mut initial = element.encode(&qkv);
        initial.resize(rows * width * element.bytes(), POISON);
        let call = Call::typed("qk_rope_store", element, [rows, (heads + 2 * kv_heads).div_ceil(4), 1], 128)
            .count(POSITIONS.len())
            .output(initial)
            .words(&POSITIONS)
            .words(&ROW_OF)
            .words(&tables)
            .u32(MAX_BLOCKS)
            .input(Element::F32, &self.table())
            .u32(turned)
            .maybe(element, gains.as_ref().map(|[q, _]| q.as_slice()))
            .maybe(element, gains.as_ref().map(|[_, k]| k.as_slice()))
            .f32(EPS)
            .f32(PLUS)
            .poisoned(pages.len() * element.bytes())
            .u64(2 * stride)
            .u32(heads)
            .u32(kv_heads)
            .u32(d)
            .u32(block_tokens);
        let what = format!("qk_rope_store {} {heads}/{kv_heads} d {d}/{turned} pages of {block_tokens}", element);
        let what = if too_large { what + " too large" } else { what };
        let key = too_large.then_some(width + heads * d + 2);
        let check = turned_and_stored(element, (expect, pages), key);
        Case { what, call, check }
    }
}

/// Queries are turned, and pages have keys and values. What stands beside the queries stays as it was: also a key that is negative
/// infinity.
fn turned_and_stored(element: Element, (mut expect, pages): (Vec<f64>, Vec<f64>), key: Option<usize>) -> Check {
    key.into_iter().for_each(|key| expect[key] = 0.0);
    Box::new(move |outs| {
        let mut queries = outs[0].clone();
        if let Some(key) = key {
            let at = &mut queries[key * element.bytes()..][..element.bytes()];
            if at != element.encode(&[f64::NEG_INFINITY]) {
                return Err("a key was changed where it stands beside its query".to_owned());
            }
            at.fill(0);
        }
        is_close(element, element.tolerance(), &expect, &queries)?;
        let found = element.decode(&outs[1]);
        if let Some(at) = (0..pages.len()).find(|&i| pages[i].is_nan() != found[i].is_nan()) {
            return Err(format!("element {at} of the pages: {} instead of {}", found[at], pages[at]));
        }
        let (expect, found): (Vec<f64>, Vec<f64>) =
            pages.iter().zip(&found).filter(|(expect, _)| !expect.is_nan()).map(|(e, f)| (*e, *f)).unzip();
        is_close(Element::F32, element.tolerance(), &expect, &Element::F32.encode(&found))
    })
}

/// Every kernel here, at sizes that fit no tile.
#[must_use]
pub fn cases(element: Element) -> Vec<Case> {
    let mut rng = Rng(5);
    let rope = |heads, kv_heads, d: [usize; 2], block_tokens, with_gains| {
        let [d, turned] = d;
        Rope { heads, kv_heads, d, block_tokens, turned, with_gains, too_large: false }
    };
    let mut cases = vec![
        embed(element, &mut rng),
        rms_norm(element, &mut rng, 8, None),
        rms_norm(element, &mut rng, 1_032, None),
        rms_norm(element, &mut rng, 256, Some([3, 1])),
        // More than a block keeps in registers.
        rms_norm(element, &mut rng, 8_232, None),
        norm_add(element, &mut rng, 520, false),
        norm_add(element, &mut rng, 8_232, false),
        gated(element, &mut rng, (8, 3), false),
        gated(element, &mut rng, (2_056, 4), false),
        rope(4, 2, [64, 64], 16, false).case(element, &mut rng),
        rope(3, 1, [128, 128], 48, true).case(element, &mut rng),
        rope(7, 1, [64, 64], 16, true).case(element, &mut rng),
        rope(2, 1, [96, 96], 16, true).case(element, &mut rng),
        rope(2, 2, [256, 256], 16, true).case(element, &mut rng),
        rope(3, 1, [96, 64], 32, false).case(element, &mut rng),
        rope(1, 1, [256, 64], 16, true).case(element, &mut rng),
    ];
    if element == Element::F16 {
        cases.extend([520, 8_232].map(|hidden| norm_add(element, &mut rng, hidden, true)));
        cases.extend([(8, 3), (8, 4)].map(|of| gated(element, &mut rng, of, true)));
        cases.push(Rope { too_large: true, ..rope(4, 2, [64, 64], 16, true) }.case(element, &mut rng));
    }
    cases
}
