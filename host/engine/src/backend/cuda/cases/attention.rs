//! Attention over pages: one token a row, in splits that are joined, and chunks of many tokens.

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

    /// Row, token and length of each row of one token.
    fn singles(&self) -> Vec<[usize; 3]> {
        let mut token = 0;
        let mut singles = Vec::new();
        for (row, [len, computed]) in self.rows.iter().enumerate() {
            if *computed == 1 {
                singles.push([row, token, *len]);
            }
            token += computed;
        }
        singles
    }

    /// The splits of those rows, as many as given for each or as many as it has runs of 16 positions.
    fn splits(&self, most: usize) -> Vec<[u32; 8]> {
        let mut splits = Vec::new();
        for [row, token, len] in self.singles() {
            let first = if self.window == 0 { 0 } else { len.saturating_sub(self.window) };
            let (base, first_split) = (first / 16 * 16, splits.len());
            let each = (len - base).div_ceil(16).div_ceil(most) * 16;
            let count = (len - base).div_ceil(each);
            let split = |i: usize| {
                let (begin, end) = (first.max(base + i * each), len.min(base + (i + 1) * each));
                [row, token, begin, end, first_split, count, 0, 0].map(|n| n as u32)
            };
            splits.extend((0..count).map(split));
        }
        splits
    }

    /// Of the rows of one token.
    fn decode(&self, most: usize) -> Case {
        let (element, group, width) = (self.element, self.heads / self.kv_heads, self.heads * self.d);
        let together = if element == Element::F32 { 4 } else { 8 };
        let splits = self.splits(most);
        let n_tokens: usize = self.rows.iter().map(|row| row[1]).sum();
        let clusters = self.kv_heads * group.div_ceil(together);
        let (live, padded) = (splits.len(), splits.len() + 1);
        // Four warps, each with quads of elements of 32 lanes, and of their maxima and sums.
        let parts = clusters * 4 * (together * self.d).div_ceil(512) * 34 * 16;
        let call = Call::typed(&format!("decode_attention_d{}", self.d), element, [clusters, padded, 1], 128)
            .count(live)
            .words(splits.as_flattened())
            .input(element, &self.qkv)
            .input(element, &self.pages)
            .u64(2 * self.kv_heads * self.block_tokens * self.d)
            .words(&self.tables)
            .u32(self.max_blocks)
            .poisoned((n_tokens + 1) * width * element.bytes())
            .poisoned(padded * parts)
            .output(vec![0; padded * clusters * 4 * 4])
            .u32(self.heads)
            .u32(self.kv_heads)
            .u32(self.block_tokens)
            .f32(1.0 / (self.d as f64).sqrt())
            .f32(self.cap);
        let what = format!("{} in {most}", self.what("decode_attention"));
        let tokens: Vec<usize> = self.singles().iter().map(|single| single[1]).collect();
        let all = self.expect();
        let expect: Vec<f64> = tokens.iter().flat_map(|token| &all[token * width..][..width]).copied().collect();
        let check: Check = Box::new(move |outs| {
            let found = picked(&outs[0], width * element.bytes(), &tokens);
            is_close(element, element.tolerance(), &expect, &found)?;
            if outs[2].iter().any(|byte| *byte != 0) {
                return Err("the counts of splits are not zero again".to_owned());
            }
            let is_joined = |i: usize| splits.get(i).is_some_and(|split| split[5] > 1);
            let wrote = |part: &[u8]| part.iter().any(|byte| *byte != POISON);
            match outs[1].chunks(parts).enumerate().find(|(i, part)| wrote(part) != is_joined(*i)) {
                Some((i, _)) => Err(format!("split {i} of {splits:?} is joined, or not, as it should not be")),
                None => Ok(()),
            }
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
        (shape(8, 1, 256, 16, 0), 3),
        (Shape { cap: 1.5, ..shape(5, 1, 256, 16, 30) }, 1),
        (Shape { cap: 3.0, ..shape(4, 1, 128, 16, 0) }, 2),
    ] {
        cases.push(Batch::random(element, shape, &lens, &mut rng).decode(splits));
    }
    // More splits of a row than a warp has lanes, of which later ones raise maxima.
    for shape in [shape(16, 1, 64, 16, 0), shape(8, 1, 128, 16, 0)] {
        cases.push(Batch::random(element, shape, &[[20, 1], [640, 1]], &mut rng).decode(40));
    }
    let beside = [[40, 20], [50, 1], [16, 16], [100, 1], [1, 1]];
    for (shape, splits) in [(shape(5, 1, 64, 16, 0), 1), (shape(4, 2, 128, 16, 20), 3), (shape(2, 1, 96, 16, 9), 2)] {
        cases.push(Batch::random(element, shape, &beside, &mut rng).decode(splits));
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
        // More key heads than begin side by side, and runs of which nothing is hidden under a window.
        (shape(20, 10, 32, 16, 0), &[[40, 40], [70, 3]]),
        (shape(2, 1, 64, 16, 90), &[[300, 40]]),
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
