//! Attention over pages: decode in splits and their combination, and chunks of many tokens.

use super::{Call, Case, Check, POISON, Rng, close, is_close};
use crate::backend::cuda::element::Element;

/// A batch of rows with their keys and values in shuffled pages. Whatever no token of a row sees is NaN.
struct Batch {
    element: Element,
    heads: usize,
    kv_heads: usize,
    d: usize,
    block_tokens: usize,
    window: usize,
    /// Of scores; 0 is none.
    cap: f64,
    /// Per row: all of its positions, and how many of them are computed in this step.
    rows: Vec<[usize; 2]>,
    max_blocks: usize,
    tables: Vec<u32>,
    pages: Vec<f64>,
    /// As computed: rotated q, and k and v that attention must not look at.
    qkv: Vec<f64>,
}

#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    d: usize,
    block_tokens: usize,
    window: usize,
    cap: f64,
}

impl Batch {
    fn random(element: Element, shape: Shape, rows: &[[usize; 2]], rng: &mut Rng) -> Self {
        let Shape { heads, kv_heads, d, block_tokens, window, cap } = shape;
        let max_blocks = rows.iter().map(|row| row[0].div_ceil(block_tokens)).max().unwrap_or(1) + 1;
        let n_pages = rows.len() * max_blocks;
        let tables = rng.shuffled(n_pages).into_iter().map(|page| page as u32).collect();
        let stride = 2 * kv_heads * block_tokens * d;
        let width = (heads + 2 * kv_heads) * d;
        let mut batch = Self {
            element,
            heads,
            kv_heads,
            d,
            block_tokens,
            window,
            cap,
            rows: rows.to_vec(),
            max_blocks,
            tables,
            pages: vec![f64::NAN; n_pages * stride],
            qkv: Vec::new(),
        };
        for (row, [len, computed]) in rows.iter().enumerate() {
            let before = if window == 0 { 0 } else { (len - computed + 1).saturating_sub(window) };
            for position in before..*len {
                for (part, head) in (0..2).flat_map(|part| (0..kv_heads).map(move |head| (part, head))) {
                    let at = batch.at(row, position, part, head);
                    batch.pages[at..at + d].copy_from_slice(&element.random(rng, d));
                }
            }
            for _ in 0..*computed {
                // Queries of some size, so that weights differ.
                let q = element.random(rng, heads * d).into_iter().map(|v| 4.0 * v);
                batch.qkv.extend(q.chain(vec![f64::NAN; width - heads * d]));
            }
        }
        batch
    }

    fn at(&self, row: usize, position: usize, part: usize, head: usize) -> usize {
        let page = self.tables[row * self.max_blocks + position / self.block_tokens] as usize;
        (((page * 2 + part) * self.kv_heads + head) * self.block_tokens + position % self.block_tokens) * self.d
    }

    /// One query head of one token.
    fn attend(&self, row: usize, position: usize, token: usize, head: usize) -> Vec<f64> {
        let (d, kv_head) = (self.d, head / (self.heads / self.kv_heads));
        let q = &self.qkv[token * (self.heads + 2 * self.kv_heads) * d + head * d..][..d];
        let from = if self.window == 0 { 0 } else { (position + 1).saturating_sub(self.window) };
        let score = |other: usize| {
            let key = &self.pages[self.at(row, other, 0, kv_head)..][..d];
            let score = q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt();
            if self.cap == 0.0 { score } else { self.cap * (score / self.cap).tanh() }
        };
        let scores: Vec<f64> = (from..=position).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut out = vec![0.0; d];
        for (other, score) in (from..=position).zip(&scores) {
            let value = &self.pages[self.at(row, other, 1, kv_head)..][..d];
            for (out, v) in out.iter_mut().zip(value) {
                *out += (score - max).exp() / sum * v;
            }
        }
        out
    }

    fn expect(&self) -> Vec<f64> {
        let mut expect = Vec::new();
        let mut token = 0;
        for (row, [len, computed]) in self.rows.iter().enumerate() {
            for position in len - computed..*len {
                for head in 0..self.heads {
                    expect.extend(self.attend(row, position, token, head));
                }
                token += 1;
            }
        }
        expect
    }

    fn lens(&self) -> Vec<u32> {
        self.rows.iter().map(|row| row[0] as u32).collect()
    }

    fn what(&self, kernel: &str) -> String {
        let Self { element, heads, kv_heads, d, block_tokens, window, cap, rows, .. } = self;
        format!(
            "{kernel} {} {heads}/{kv_heads} d {d} pages of {block_tokens} window {window} cap {cap} {rows:?}",
            element
        )
    }

    /// Row and token of each row of one token.
    fn singles(&self) -> Vec<[u32; 2]> {
        let mut token = 0;
        let mut singles = Vec::new();
        for (row, [_, computed]) in self.rows.iter().enumerate() {
            if *computed == 1 {
                singles.push([row as u32, token]);
            }
            token += *computed as u32;
        }
        singles
    }

    /// Of the rows of one token, which are listed where there are others.
    fn decode(&self, splits: usize) -> Case {
        let (element, group, width) = (self.element, self.heads / self.kv_heads, self.heads * self.d);
        let together = if element == Element::F32 { 4 } else { 8 };
        let singles = self.singles();
        let n_tokens: usize = self.rows.iter().map(|row| row[1]).sum();
        let (live, padded) = (singles.len(), singles.len() + 1);
        let n_part = padded * self.heads * splits;
        let grid = [self.kv_heads * group.div_ceil(together), padded, splits];
        let call = Call::typed(&format!("decode_attention_d{}", self.d), element, grid, 128).count(live);
        let call = if live == self.rows.len() { call.null() } else { call.words(singles.as_flattened()) };
        let call = call
            .input(element, &self.qkv)
            .input(element, &self.pages)
            .u64(2 * self.kv_heads * self.block_tokens * self.d)
            .words(&self.tables)
            .u32(self.max_blocks)
            .words(&self.lens())
            .poisoned((n_tokens + 1) * width * element.bytes());
        let call =
            if splits == 1 { call.null().null() } else { call.poisoned(n_part * self.d * 4).poisoned(n_part * 8) };
        let call = call.u32(self.heads).u32(self.kv_heads).u32(self.block_tokens).u32(self.window);
        let call = call.f32(1.0 / (self.d as f64).sqrt()).f32(self.cap);
        let what = format!("{} in {splits}", self.what("decode_attention"));
        let tokens: Vec<usize> = singles.iter().map(|single| single[1] as usize).collect();
        let all = self.expect();
        let expect: Vec<f64> = tokens.iter().flat_map(|token| &all[token * width..][..width]).copied().collect();
        if splits == 1 {
            let check: Check = Box::new(move |outs| {
                let found = picked(&outs[0], width * element.bytes(), &tokens);
                is_close(element, element.tolerance(), &expect, &found)
            });
            return Case { what, call, check };
        }
        let (d, heads) = (self.d, live * self.heads);
        let check: Check = Box::new(move |outs| {
            if outs[0].iter().any(|&byte| byte != POISON) {
                return Err("splits wrote the output".to_owned());
            }
            let (part, rest) = outs[1].split_at(heads * splits * d * 4);
            let (stat, rest_of_stat) = outs[2].split_at(heads * splits * 8);
            if rest.iter().chain(rest_of_stat).any(|&byte| byte != POISON) {
                return Err("a padding row was written".to_owned());
            }
            let joined = join(&Element::F32.decode(part), &Element::F32.decode(stat), splits, d);
            is_close(Element::F32, element.tolerance(), &expect, &Element::F32.encode(&joined))
        });
        Case { what, call, check }
    }

    fn prefill(&self) -> Case {
        let (element, group) = (self.element, self.heads / self.kv_heads);
        let per_tile = 64 / group;
        let tiles: Vec<u32> = self
            .rows
            .iter()
            .enumerate()
            .flat_map(|(row, [_, chunk])| (0..*chunk).step_by(per_tile).map(move |first| [row as u32, first as u32]))
            .flatten()
            .collect();
        let mut starts = vec![0];
        for [_, computed] in &self.rows {
            starts.push(starts[starts.len() - 1] + *computed as u32);
        }
        let n_tiles = tiles.len() / 2;
        let n_tokens = starts[starts.len() - 1] as usize + 3;
        let call =
            Call::typed(&format!("prefill_attention_d{}", self.d), element, [n_tiles + 2, self.kv_heads, 1], 128)
                .count(n_tiles)
                .words(&tiles)
                .input(element, &self.qkv)
                .input(element, &self.pages)
                .u64(2 * self.kv_heads * self.block_tokens * self.d)
                .words(&self.tables)
                .u32(self.max_blocks)
                .words(&starts)
                .words(&self.lens())
                .poisoned(n_tokens * self.heads * self.d * element.bytes())
                .u32(self.heads)
                .u32(self.kv_heads)
                .u32(self.block_tokens)
                .u32(self.window)
                .f32(1.0 / (self.d as f64).sqrt())
                .f32(self.cap)
                .shared(if self.d == 256 { 65_536 } else { 0 });
        Case { what: self.what("prefill_attention"), call, check: close(element, element.tolerance(), self.expect()) }
    }
}

/// Those pieces of so many bytes that are asked for, and then all others.
fn picked(bytes: &[u8], size: usize, which: &[usize]) -> Vec<u8> {
    let others = (0..bytes.len() / size).filter(|i| !which.contains(i));
    which.iter().copied().chain(others).flat_map(|i| &bytes[i * size..][..size]).copied().collect()
}

/// The splits' sums put together, for every head.
fn join(part: &[f64], stat: &[f64], splits: usize, d: usize) -> Vec<f64> {
    let head = |(part, stat): (&[f64], &[f64])| {
        let max = stat.iter().step_by(2).copied().fold(f64::NEG_INFINITY, f64::max);
        let weight = |s: usize| (stat[2 * s] - max).exp2();
        let sum: f64 = (0..splits).map(|s| stat[2 * s + 1] * weight(s)).sum();
        let saw = |s: &usize| stat[2 * s + 1] > 0.0;
        let joined = |i: usize| (0..splits).filter(saw).map(|s| part[s * d + i] * weight(s)).sum::<f64>() / sum;
        (0..d).map(joined).collect::<Vec<_>>()
    };
    part.chunks(splits * d).zip(stat.chunks(splits * 2)).flat_map(head).collect()
}

/// Of two rows, of which each token is its row's, or the second comes later.
fn combine(element: Element, d: usize, splits: usize, tokens: Option<[usize; 2]>, rng: &mut Rng) -> Case {
    let (heads, live, rows) = (3, 2, 3);
    // The last split of each head saw nothing, and wrote no part.
    let mut part = Element::F32.random(rng, live * heads * splits * d);
    part.chunks_exact_mut(splits * d).for_each(|head| head[(splits - 1) * d..].fill(f64::NAN));
    let stat = |i: usize| if i % splits == splits - 1 { [-1e30, 0.0] } else { [(i % 5) as f64, 1.0 + i as f64] };
    let stat: Vec<f64> = (0..live * heads * splits).flat_map(stat).collect();
    let expect = join(&part, &stat, splits, d);
    let call = Call::typed(&format!("combine_d{d}"), element, [heads, rows, 1], d as u32).count(live);
    let call = match tokens {
        Some([first, second]) => call.words(&[4, first as u32, 7, second as u32]),
        None => call.null(),
    };
    let call = call
        .input(Element::F32, &part)
        .input(Element::F32, &stat)
        .poisoned(2 * rows * heads * d * element.bytes())
        .u32(heads)
        .u32(splits);
    let what = format!("combine {element} d {d} of {splits} for {tokens:?}");
    let check: Check = Box::new(move |outs| {
        let found = picked(&outs[0], heads * d * element.bytes(), &tokens.unwrap_or([0, 1]));
        is_close(element, element.tolerance(), &expect, &found)
    });
    Case { what, call, check }
}

fn shape(heads: usize, kv_heads: usize, d: usize, block_tokens: usize, window: usize) -> Shape {
    Shape { heads, kv_heads, d, block_tokens, window, cap: 0.0 }
}

/// Every kernel here, at sizes that fit no tile.
#[must_use]
pub fn cases(element: Element) -> Vec<Case> {
    let mut rng = Rng(7);
    let lens = [[1, 1], [16, 1], [17, 1], [100, 1]];
    let mut cases = Vec::new();
    for (shape, splits) in [
        (shape(4, 2, 64, 16, 0), 1),
        (shape(4, 1, 128, 16, 0), 3),
        (shape(7, 1, 64, 48, 0), 2),
        (shape(8, 1, 128, 32, 0), 1),
        (shape(16, 1, 64, 16, 0), 5),
        (shape(3, 3, 128, 16, 20), 1),
        (shape(5, 1, 128, 16, 33), 3),
        (shape(2, 2, 64, 48, 1), 8),
        (shape(10, 1, 32, 16, 21), 2),
        (shape(4, 2, 32, 48, 0), 1),
        (shape(4, 2, 96, 16, 0), 1),
        (shape(6, 1, 96, 32, 21), 3),
        (shape(4, 2, 256, 16, 0), 2),
        (Shape { cap: 1.5, ..shape(5, 1, 256, 16, 30) }, 1),
        (Shape { cap: 3.0, ..shape(4, 1, 128, 16, 0) }, 2),
    ] {
        cases.push(Batch::random(element, shape, &lens, &mut rng).decode(splits));
    }
    let beside = [[40, 20], [50, 1], [16, 16], [100, 1], [1, 1]];
    for (shape, splits) in [(shape(5, 1, 64, 16, 0), 1), (shape(4, 2, 128, 16, 20), 3), (shape(2, 1, 96, 16, 9), 2)] {
        cases.push(Batch::random(element, shape, &beside, &mut rng).decode(splits));
    }
    for (d, splits, tokens) in
        [(64, 2, None), (64, 4, Some([1, 4])), (128, 7, None), (96, 3, Some([3, 5])), (256, 2, Some([0, 2]))]
    {
        cases.push(combine(element, d, splits, tokens, &mut rng));
    }
    for (shape, rows) in [
        (shape(4, 2, 64, 16, 0), &[[1, 1], [70, 70], [33, 1], [50, 17]][..]),
        (shape(4, 1, 128, 16, 0), &[[40, 23]]),
        (shape(7, 1, 64, 48, 0), &[[30, 30], [97, 5]]),
        (shape(16, 1, 64, 16, 0), &[[19, 6]]),
        (shape(2, 2, 128, 32, 20), &[[100, 40], [1, 1]]),
        (shape(3, 1, 64, 16, 1), &[[45, 25]]),
        (shape(3, 1, 32, 16, 0), &[[50, 40], [33, 1]]),
        (shape(2, 1, 96, 16, 0), &[[50, 40], [33, 1]]),
        (shape(2, 1, 256, 16, 0), &[[70, 45], [1, 1]]),
        (Shape { cap: 1.5, ..shape(2, 2, 256, 16, 20) }, &[[40, 30]]),
        (Shape { cap: 3.0, ..shape(4, 2, 64, 32, 0) }, &[[40, 20]]),
    ] {
        cases.push(Batch::random(element, shape, rows, &mut rng).prefill());
    }
    cases
}

/// Long contexts, in many splits and over many pages.
#[must_use]
pub fn large(element: Element) -> Vec<Case> {
    let mut rng = Rng(8);
    let decodes = [[9_000, 1], [1, 1], [4_097, 1]];
    vec![
        Batch::random(element, shape(8, 2, 128, 16, 0), &decodes, &mut rng).decode(33),
        Batch::random(element, shape(8, 1, 64, 16, 4_000), &decodes, &mut rng).decode(16),
        Batch::random(element, shape(8, 2, 128, 16, 0), &[[3_000, 70], [513, 512]], &mut rng).prefill(),
    ]
}
