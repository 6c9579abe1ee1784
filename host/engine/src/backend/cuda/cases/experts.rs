//! Sparse experts: a router's logits, the choice of experts, their products, and the sum of what they made.

use super::products::{Epilogue, MATRIX_UNITS};
use super::quantised::Form;
use super::{Call, Case, Check, POISON, Rng, bytes_to_words, close, is_close, words_to_bytes};
use crate::backend::cuda::element::Element;

/// A product of experts: rows and columns of a tile, and threads.
#[derive(Clone, Copy)]
struct Entry {
    name: &'static str,
    rows: usize,
    columns: usize,
    block: u32,
}

const EXPERTS_8: Entry = Entry { name: "experts_m8", rows: 8, columns: 32, block: 256 };
const EXPERTS_64: Entry = Entry { name: "experts_m64", rows: 64, columns: 64, block: 128 };

/// Entry, rows of each expert, k, columns of each expert, and whether rows are named by a list.
const PRODUCTS: [(Entry, &[usize], usize, usize, bool); 6] = [
    (EXPERTS_8, &[1, 0, 9, 8], 96, 34, true),
    (EXPERTS_8, &[0, 3], 1_056, 64, false),
    (EXPERTS_8, &[0, 0, 0, 0, 1], 32, 70, true),
    (EXPERTS_64, &[70, 0, 1], 96, 66, true),
    (EXPERTS_64, &[2, 64, 0], 224, 130, false),
    (EXPERTS_64, &[0, 5], 64, 10, true),
];

/// Live tokens, tokens of the bucket, experts, experts of a token, whether their shares sum to 1, rows of a tile.
const CHOICES: [([usize; 4], bool, usize); 6] = [
    ([1, 1, 8, 2], true, 8),
    ([37, 40, 128, 8], true, 8),
    ([5, 33, 130, 32], false, 64),
    ([300, 320, 6, 3], false, 64),
    ([17, 17, 512, 10], true, 8),
    ([0, 16, 4, 1], true, 8),
];

fn router_logits(element: Element, rng: &mut Rng, [live, rows, hidden, count]: [usize; 4]) -> Case {
    let (x, w) = (element.random(rng, live * hidden), Element::F32.random(rng, count * hidden));
    let logit = |i: usize| -> f64 {
        let (x, w) = (&x[i / count * hidden..][..hidden], &w[i % count * hidden..][..hidden]);
        x.iter().zip(w).map(|(x, w)| x * w).sum()
    };
    let expect = (0..live * count).map(logit).collect();
    let call = Call::typed("router_logits", element, [count.div_ceil(8), rows.div_ceil(8), 1], 128)
        .count(live)
        .input(Element::F32, &w)
        .input(element, &x)
        .poisoned(rows * count * 4)
        .u32(hidden)
        .u32(count);
    let what = format!("router_logits {element} {live} of {rows}, {hidden} by {count}");
    Case { what, call, check: close(Element::F32, 1e-5, expect) }
}

/// Tiles of so many rows of experts that have so many.
fn tiles(sizes: &[usize], rows: usize) -> Vec<[u32; 3]> {
    let mut start = 0;
    let mut of = |(expert, size): (usize, &usize)| {
        let here = (0..*size).step_by(rows);
        let tiles: Vec<_> =
            here.map(|at| [expert, start + at, start + size.min(&(at + rows))].map(|n| n as u32)).collect();
        start += size;
        tiles
    };
    sizes.iter().enumerate().flat_map(&mut of).collect()
}

/// The weights of all experts: what a call is given of them, and the numbers that they stand for.
fn weights(element: Element, form: Option<Form>, rng: &mut Rng, [rows, k]: [usize; 2]) -> (Vec<Vec<u8>>, Vec<f64>) {
    let Some(form) = form else {
        let values = element.random(rng, rows * k);
        return (vec![element.encode(&values)], values);
    };
    let stored = form.random(rng, rows, k);
    // On their way into the matrix units they are rounded.
    let is_rounded = form == Form::Q8 && element != Element::F32;
    let values = if is_rounded { element.decode(&element.encode(&stored.values)) } else { stored.values };
    (vec![stored.bytes, stored.scales], values)
}

fn product(
    element: Element,
    form: Option<Form>,
    (entry, sizes, k, n, is_listed): (Entry, &[usize], usize, usize, bool),
    epilogue: Epilogue,
    rng: &mut Rng,
) -> Case {
    let rows: usize = sizes.iter().sum();
    let n_tokens = if is_listed { 7 } else { rows };
    let (given, w) = weights(element, form, rng, [sizes.len() * n, k]);
    let x = element.random(rng, n_tokens * k);
    let numbers: Vec<u32> = (0..rows).map(|row| if is_listed { rng.below(n_tokens) } else { row } as u32).collect();
    let expert_of: Vec<usize> = sizes.iter().enumerate().flat_map(|(i, size)| vec![i; *size]).collect();
    let dot = |row: usize, column: usize| -> f64 {
        let (x, w) = (&x[numbers[row] as usize * k..][..k], &w[(expert_of[row] * n + column) * k..][..k]);
        x.iter().zip(w).map(|(x, w)| x * w).sum()
    };
    let width = if epilogue.is_pair() { n / 2 } else { n };
    let at = |i: usize| match epilogue.is_pair() {
        true => epilogue.gated(dot(i / width, i % width * 2), dot(i / width, i % width * 2 + 1)),
        false => dot(i / width, i % width),
    };
    let expect: Vec<f64> = (0..rows * width).map(at).collect();
    let to = if epilogue == Epilogue::StoreFloat { Element::F32 } else { element };
    let name = form.map_or_else(|| entry.name.to_owned(), |form| format!("{}_{}", entry.name, form.name()));
    let tiles = tiles(sizes, entry.rows);
    let list: Vec<u32> = [tiles.len() as u32].into_iter().chain(tiles.iter().copied().flatten()).collect();
    // There are more blocks than tiles, and nothing stands behind the list.
    let grid = [n.div_ceil(entry.columns), tiles.len() + 2, 1];
    let call = Call::typed(&name, element, grid, entry.block).words(&list);
    let call = given.into_iter().fold(call, Call::bytes);
    let call = if is_listed { call.words(&numbers) } else { call.null() };
    let call = call.input(element, &x).poisoned((rows + 3) * width * to.bytes()).u32(k).u32(n).u32(epilogue as usize);
    let tolerance = if element == Element::F32 { 1e-5 } else { to.tolerance().max(MATRIX_UNITS) };
    let what = format!("{name} {element} {epilogue:?} {sizes:?} rows, {k} by {n}, listed: {is_listed}");
    Case { what, call, check: close(to, tolerance, expect) }
}

/// What a token's logits choose: experts and their shares, best first.
fn chosen(logits: &[f64], n: usize, is_normalised: bool) -> Vec<(usize, f64)> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    order.truncate(n);
    let of: &[usize] = if is_normalised { &order } else { &(0..logits.len()).collect::<Vec<_>>() };
    let total: f64 = of.iter().map(|expert| weights[*expert]).sum();
    order.into_iter().map(|expert| (expert, weights[expert] / total)).collect()
}

/// The sizes of a choice.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    rows: usize,
    per_token: usize,
    tile_rows: usize,
}

/// Whether the lists say that these rows go through these experts.
fn is_listed(expect: &[(usize, f64)], count: usize, sizes: Sizes, outs: &[Vec<u8>]) -> Result<(), String> {
    let [tiles_of, tokens, places, shares, ended] = outs else { return Err("five outputs".to_owned()) };
    let (n, per_token) = (expect.len(), sizes.per_token);
    let words = bytes_to_words(tiles_of);
    let per_expert: Vec<usize> = (0..count).map(|i| expect.iter().filter(|(expert, _)| *expert == i).count()).collect();
    let list = tiles(&per_expert, sizes.tile_rows);
    let found: Vec<[u32; 3]> = words[1..].as_chunks::<3>().0.iter().copied().take(words[0] as usize).collect();
    if found != list {
        return Err(format!("tiles {found:?} instead of {list:?}"));
    }
    if words[1 + 3 * list.len()..].iter().any(|word| *word != u32::MAX) || bytes_to_words(ended) != [0] {
        return Err("there is more behind the tiles, or the count of blocks is not zero again".to_owned());
    }
    let (tokens, places) = (bytes_to_words(tokens), bytes_to_words(places));
    if tokens.len() != sizes.rows || tokens[n..].iter().chain(&places[n..]).any(|word| *word != u32::MAX) {
        return Err("something stands behind the last row".to_owned());
    }
    let starts: Vec<usize> = (0..=count).map(|i| per_expert[..i].iter().sum()).collect();
    for (i, (expert, _)) in expect.iter().enumerate() {
        let place = places[i] as usize;
        if !(starts[*expert]..starts[*expert + 1]).contains(&place) || tokens[place] as usize != i / per_token {
            return Err(format!("choice {i}, of expert {expert}, has row {place}"));
        }
    }
    let expect: Vec<f64> = expect.iter().map(|(_, share)| *share).collect();
    is_close(Element::F32, 1e-5, &expect, shares)
}

fn choice(
    rng: &mut Rng,
    ([live, tokens, count, per_token], is_normalised, tile_rows): ([usize; 4], bool, usize),
) -> Case {
    let mut logits = Element::F32.random(rng, live * count);
    logits.iter_mut().for_each(|logit| *logit *= 8.0);
    // Of equals the first counts; what is not at all likely is chosen where nothing else is left.
    for (i, row) in logits.chunks_mut(count).enumerate().filter(|(i, _)| i % 3 == 1) {
        row[count - 1] = row[i % count];
        row[2 % count] = f64::NEG_INFINITY;
    }
    let logits = Element::F32.decode(&Element::F32.encode(&logits));
    let expect: Vec<(usize, f64)> =
        logits.chunks(count).flat_map(|row| chosen(row, per_token, is_normalised)).collect();
    let rows = tokens * per_token;
    let most_tiles = rows.div_ceil(tile_rows) + count;
    let call = Call::new("choose_experts", [tokens.div_ceil(16), 1, 1], 512)
        .count(live)
        .input(Element::F32, &logits)
        .poisoned((1 + 3 * most_tiles) * 4)
        .poisoned(rows * 4)
        .poisoned(rows * 4)
        .poisoned(rows * 4)
        .u32(count)
        .u32(per_token)
        .u32(is_normalised.into())
        .u32(tile_rows)
        .output(vec![0; 4]);
    let what = format!("choose_experts {live} of {tokens}, {per_token} of {count}, tiles of {tile_rows}");
    let sizes = Sizes { rows, per_token, tile_rows };
    let check: Check = Box::new(move |outs| is_listed(&expect, count, sizes, outs));
    Case { what, call, check }
}

fn add(rng: &mut Rng, hidden: usize, per_token: usize) -> Case {
    let (live, tokens) = (3, 4);
    let rows = live * per_token;
    let (results, x) = (Element::F32.random(rng, rows * hidden), Element::F32.random(rng, live * hidden));
    let shares = Element::F32.random(rng, rows);
    let places = rng.shuffled(rows);
    let of = |i: usize| -> f64 {
        let (token, column) = (i / hidden, i % hidden);
        (token * per_token..(token + 1) * per_token).map(|j| shares[j] * results[places[j] * hidden + column]).sum()
    };
    let expect = x.iter().enumerate().map(|(i, x)| x + of(i)).collect();
    let mut initial = Element::F32.encode(&x);
    initial.resize(tokens * hidden * 4, POISON);
    let call = Call::new("add_experts", [tokens, hidden.div_ceil(256), 1], 256)
        .count(live)
        .input(Element::F32, &results)
        .bytes(words_to_bytes(&places.iter().map(|place| *place as u32).collect::<Vec<_>>()))
        .input(Element::F32, &shares)
        .output(initial)
        .u32(hidden)
        .u32(per_token);
    Case { what: format!("add_experts {hidden} of {per_token}"), call, check: close(Element::F32, 1e-6, expect) }
}

/// What has no type.
#[must_use]
pub fn choices() -> Vec<Case> {
    let mut rng = Rng(21);
    let mut cases: Vec<Case> = CHOICES.into_iter().map(|sizes| choice(&mut rng, sizes)).collect();
    cases.extend([(264, 1), (520, 8)].map(|(hidden, per_token)| add(&mut rng, hidden, per_token)));
    cases
}

/// What has a type, at sizes that fit no tile.
#[must_use]
pub fn cases(element: Element) -> Vec<Case> {
    let mut rng = Rng(22);
    let routers = [[1, 1, 72, 5], [9, 16, 520, 130], [8, 8, 264, 8], [0, 8, 64, 4]];
    let mut cases: Vec<Case> = routers.into_iter().map(|sizes| router_logits(element, &mut rng, sizes)).collect();
    let forms = [None].into_iter().chain(Form::ALL.map(Some));
    let all = forms.flat_map(|form| PRODUCTS.into_iter().map(move |of| (form, of)));
    for (form, of) in all.filter(|(_, (entry, ..))| element != Element::F32 || entry.rows == 64) {
        let here = [Epilogue::Store, Epilogue::StoreFloat, Epilogue::SiluMul, Epilogue::GeluMul];
        cases.extend(here.map(|epilogue| product(element, form, of, epilogue, &mut rng)));
    }
    cases
}
