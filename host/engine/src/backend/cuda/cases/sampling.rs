//! Sampling on the device: rules, greedy choice, draws and log-probabilities, against a sampler that sorts.

use super::{Call, Case, Check, POISON, Rng, bytes_to_words, words_to_bytes};

const NONE: u32 = u32::MAX;
const TOP_BYTES: usize = 168;

/// A row's rules, as in README.md beside the kernels; lists by value.
#[derive(Clone, Debug)]
struct Rules {
    seed: u64,
    index: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// Prompt, then output.
    history: [Vec<u32>; 2],
    previous: u32,
    bias: Vec<(u32, f32)>,
    edit: Vec<(u32, f32)>,
    allowed: Option<Vec<u32>>,
    banned: Vec<u32>,
    logprobs: u32,
    known: u32,
}

/// The lists of a batch, as the device wants them.
#[derive(Default)]
struct Lists {
    rules: Vec<u8>,
    history: Vec<u32>,
    biases: Vec<u32>,
    banned: Vec<u32>,
    masks: Vec<u32>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            seed: 0,
            index: 0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            history: [Vec::new(), Vec::new()],
            previous: NONE,
            bias: Vec::new(),
            edit: Vec::new(),
            allowed: None,
            banned: Vec::new(),
            logprobs: NONE,
            known: NONE,
        }
    }
}

impl Lists {
    fn of(rows: &[Rules], vocab: usize) -> Self {
        let mut lists = Self::default();
        rows.iter().for_each(|row| lists.add(row, vocab));
        lists
    }

    fn add(&mut self, r: &Rules, vocab: usize) {
        let words = vocab.div_ceil(32);
        let mut biases = |list: &[(u32, f32)]| {
            let start = self.biases.len() as u32 / 2;
            self.biases.extend(list.iter().flat_map(|(token, add)| [*token, add.to_bits()]));
            [start, list.len() as u32]
        };
        let (bias, edit) = (biases(&r.bias), biases(&r.edit));
        let mask = r.allowed.as_ref().map_or(NONE, |allowed| {
            let mut mask = vec![0u32; words];
            allowed.iter().for_each(|token| mask[*token as usize / 32] |= 1 << (token % 32));
            self.masks.extend(mask);
            (self.masks.len() / words - 1) as u32
        });
        let history = [self.history.len() as u32, (r.history[0].len() + r.history[1].len()) as u32];
        self.history.extend(r.history.concat());
        let banned = [self.banned.len() as u32, r.banned.len() as u32];
        self.banned.extend(&r.banned);
        self.rules.extend(r.seed.to_le_bytes());
        self.rules.extend(words_to_bytes(&[r.index, r.temperature.to_bits(), r.top_k]));
        for v in [r.top_p, r.min_p, r.repetition, r.presence, r.frequency] {
            self.rules.extend(v.to_le_bytes());
        }
        self.rules.extend(words_to_bytes(&[history[0], history[1], r.history[0].len() as u32, r.previous]));
        self.rules
            .extend(words_to_bytes(&[bias[0], bias[1], edit[0], edit[1], mask, banned[0], banned[1], r.logprobs]));
        self.rules.extend(r.known.to_le_bytes());
        self.rules.extend([POISON; 4]);
    }
}

// === The reference ===

/// What the rules make of logits.
fn ruled(logits: &[f32], r: &Rules, sampled: &[u32]) -> Vec<f32> {
    let mut out = logits.to_vec();
    let [prompt, output] = &r.history;
    let mut output = output.clone();
    output.extend(sampled.get(r.previous as usize));
    let penalties = r.repetition != 1.0 || r.presence != 0.0 || r.frequency != 0.0;
    for (token, v) in out.iter_mut().enumerate().filter(|_| penalties) {
        let times = |list: &[u32]| list.iter().filter(|&&t| t as usize == token).count() as f32;
        let n = times(&output);
        if n > 0.0 || times(prompt) > 0.0 {
            let scaled = if *v > 0.0 { *v / r.repetition } else { *v * r.repetition };
            let present = if n > 0.0 { r.presence } else { 0.0 };
            *v = (scaled - present - n * r.frequency).clamp(f32::MIN, f32::MAX);
        }
    }
    let vocab = out.len();
    let there = |list: &[(u32, f32)]| list.iter().copied().filter(|(t, _)| (*t as usize) < vocab).collect::<Vec<_>>();
    there(&r.bias).into_iter().for_each(|(token, add)| out[token as usize] += add);
    let allowed = r.allowed.as_ref().filter(|allowed| allowed.iter().any(|&t| out[t as usize].is_finite()));
    if let Some(allowed) = allowed {
        (0..vocab).filter(|&t| !allowed.contains(&(t as u32))).for_each(|t| out[t] = f32::NEG_INFINITY);
    }
    for (token, add) in there(&r.edit) {
        let v = &mut out[token as usize];
        if v.is_finite() {
            *v = (*v + add).clamp(f32::MIN, f32::MAX);
        }
    }
    let spared = (0..vocab).any(|t| out[t].is_finite() && !r.banned.contains(&(t as u32)));
    if allowed.is_none() || spared {
        r.banned.iter().filter(|&&t| (t as usize) < vocab).for_each(|&t| out[t as usize] = f32::NEG_INFINITY);
    }
    out
}

/// The first of the largest, NaN aside.
fn best(logits: &[f32]) -> (f32, u32) {
    let mut best = (f32::NEG_INFINITY, NONE);
    for (token, &v) in logits.iter().enumerate() {
        if v > best.0 {
            best = (v, token as u32);
        }
    }
    best
}

fn by_rank(logits: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&t| logits[t as usize] > f32::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    order
}

fn drawn(logits: &[f32], r: &Rules, max: f32) -> u32 {
    let weight = |t: u32| f64::from((logits[t as usize] - max) * (1.0 / r.temperature)).exp();
    let mut kept = by_rank(logits);
    let is_cut = r.top_k > 0 && (r.top_k as usize) < kept.len();
    if is_cut {
        kept.truncate(r.top_k as usize);
    }
    if r.top_p < 1.0 {
        let target = f64::from(r.top_p) * kept.iter().map(|&t| weight(t)).sum::<f64>();
        let mut sum = 0.0;
        let last = kept.iter().position(|&t| {
            sum += weight(t);
            sum >= target
        });
        kept.truncate(last.map_or(kept.len(), |last| last + 1));
    }
    if !is_cut && r.top_p >= 1.0 {
        kept.sort_unstable();
    }
    kept.retain(|&t| weight(t) >= f64::from(r.min_p) || logits[t as usize] == max);
    let mut left = uniform(r.seed, r.index) * kept.iter().map(|&t| weight(t)).sum::<f64>();
    let found = kept.iter().find(|&&t| {
        left -= weight(t);
        left < 0.0
    });
    found.or(kept.last()).copied().unwrap_or(NONE)
}

/// A number in [0, 1) from a seed and a counter, as the engine's sampler has it: SplitMix64, twice.
#[must_use]
pub fn uniform(seed: u64, index: u32) -> f64 {
    let stream = Rng(seed).next();
    let mut rng = Rng(stream.wrapping_add(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(u64::from(index))));
    (rng.next() >> 11) as f64 / (1u64 << 53) as f64
}

fn logprobs(logits: &[f32], max: f32) -> Vec<f64> {
    let exps = || logits.iter().filter(|v| **v > f32::NEG_INFINITY).map(|v| f64::from(v - max).exp());
    let log_sum = exps().sum::<f64>().ln();
    logits.iter().map(|v| f64::from(*v) - f64::from(max) - log_sum).collect()
}

// === Cases ===

/// Logits with ties, and some that are no candidates.
fn random_logits(rng: &mut Rng, vocab: usize) -> Vec<f32> {
    let mut one = || match rng.below(20) {
        0 => f32::NEG_INFINITY,
        1 => f32::NAN,
        2..6 => rng.below(3) as f32,
        _ => (rng.unit() * 6.0) as f32,
    };
    (0..vocab).map(|_| one()).collect()
}

fn floats(rows: &[Vec<f32>]) -> Vec<u8> {
    rows.concat().iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn rules_case(what: &str, rows: &[(Vec<f32>, Rules)], sampled: &[u32]) -> Case {
    let vocab = rows[0].0.len();
    let (logits, rules): (Vec<_>, Vec<_>) = rows.iter().cloned().unzip();
    let lists = Lists::of(&rules, vocab);
    let expect: Vec<f32> = rows.iter().flat_map(|(logits, r)| ruled(logits, r, sampled)).collect();
    let mut initial = floats(&logits);
    initial.extend(vec![POISON; 2 * vocab * 4]);
    let call = Call::new("sample_rules", [rows.len() + 2, 1, 1], 1024)
        .count(rows.len())
        .bytes(lists.rules)
        .output(initial)
        .words(&lists.history)
        .words(sampled)
        .output(vec![0; rows.len() * vocab * 4])
        .words(&lists.biases)
        .words(&lists.banned)
        .words(&lists.masks)
        .u32(vocab);
    let check: Check = Box::new(move |outs| {
        if outs[1].iter().any(|&byte| byte != 0) {
            return Err("the scratch is not zero again".to_owned());
        }
        let found = bytes_to_words(&outs[0]).into_iter().map(f32::from_bits);
        for (at, (found, expect)) in found.zip(expect.iter().chain(std::iter::repeat(&f32::NAN))).enumerate() {
            let both_nan = found.is_nan() && expect.is_nan();
            let is_near = expect.is_finite() && (found - expect).abs() <= 1e-6 * expect.abs();
            if !(both_nan || found == *expect || is_near) {
                return Err(format!("row {} token {}: {found} instead of {expect}", at / vocab, at % vocab));
            }
        }
        Ok(())
    });
    Case { what: format!("sample_rules {what}"), call, check }
}

fn rules_cases(rng: &mut Rng) -> Vec<Case> {
    let vocab = 1_500;
    let mut row = |rules: Rules| (random_logits(rng, vocab), rules);
    let long: Vec<u32> = (0..2_500).map(|i| i * 7 % 1_600).collect();
    let penalties = Rules {
        repetition: 1.3,
        presence: 0.5,
        frequency: 0.25,
        history: [long.clone(), vec![3, 3, 9, 1_499, 7]],
        ..Rules::default()
    };
    let bias = vec![(0, 2.5), (1_499, -7.0), (1_600, 1.0), (40, f32::NEG_INFINITY)];
    let few: Vec<u32> = vec![5, 31, 32, 63, 1_499];
    let masked = Rules { allowed: Some(few.clone()), ..Rules::default() };
    let rows = vec![
        row(Rules::default()),
        row(penalties.clone()),
        row(Rules { previous: 1, history: [vec![], long], ..penalties }),
        row(Rules { bias: bias.clone(), edit: bias, ..Rules::default() }),
        row(masked.clone()),
        row(Rules { banned: vec![5, 31, 2_000], ..masked.clone() }),
        row(Rules { banned: few.clone(), ..masked.clone() }),
        row(Rules { banned: few.clone(), edit: vec![(5, 3.0), (6, 3.0)], ..Rules::default() }),
    ];
    // All rules meet at all tokens, each list in another order, so that every thread takes over from another.
    let every = |step: u32| (0..1_499).map(move |i| i * step % 1_499);
    let some: Vec<u32> = every(11).filter(|t| t % 3 > 0).collect();
    let all = Rules {
        // The largest bias overflows, unless a policy's is added to it, which is clamped.
        bias: every(13).map(|t| (t, if t % 5 == 0 { f32::MAX } else { t as f32 * 1e-3 })).collect(),
        edit: every(17).map(|t| (t, if t % 5 == 0 { f32::MAX } else { t as f32 * -1e-3 })).collect(),
        banned: every(19).filter(|t| t % 3 == 1).collect(),
        allowed: Some(some),
        ..rows[1].1.clone()
    };
    let unmasked = Rules { allowed: None, ..all.clone() };
    let all = Rules { edit: Vec::new(), ..all };
    let all = vec![(rows[1].0.clone(), all), (rows[1].0.clone(), unmasked)];
    // A mask that leaves nothing: its tokens are no candidates.
    let mut hollow = rows[4].0.clone();
    few.iter().for_each(|&token| hollow[token as usize] = f32::NAN);
    let hollow = vec![(hollow, Rules { banned: vec![8], ..masked })];
    vec![
        rules_case("one by one", &rows, &[11, 12]),
        rules_case("together", &all, &[]),
        rules_case("a mask that leaves nothing", &hollow, &[]),
        rules_case("one token", &[(vec![1.0], Rules { banned: vec![0], ..Rules::default() })], &[]),
    ]
}

fn argmax_case(what: &str, rows: &[Vec<f32>], n_parts: usize) -> Case {
    let vocab = rows[0].len();
    let expect: Vec<(f32, u32)> = rows.iter().map(|row| best(row)).collect();
    let call = Call::new("argmax_parts", [n_parts, rows.len() + 1, 1], 256)
        .count(rows.len())
        .bytes(floats(rows))
        .poisoned((rows.len() + 1) * n_parts * 8)
        .u32(vocab);
    let check: Check = Box::new(move |outs| {
        let parts = bytes_to_words(&outs[0]);
        let better = |a: (f32, u32), b: &[u32]| {
            let b = (f32::from_bits(b[0]), b[1]);
            if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) { b } else { a }
        };
        for (row, expect) in parts.chunks(2 * n_parts).zip(&expect) {
            let found = row.chunks(2).fold((f32::NEG_INFINITY, NONE), better);
            if found != *expect {
                return Err(format!("{found:?} instead of {expect:?}"));
            }
        }
        Ok(())
    });
    Case { what: format!("argmax_parts {what} in {n_parts}"), call, check }
}

/// Rows that are ready to choose from.
fn choose_case(what: &str, rows: &[(Vec<f32>, Rules)]) -> Case {
    let vocab = rows[0].0.len();
    let (logits, rules): (Vec<_>, Vec<_>) = rows.iter().cloned().unzip();
    let parts: Vec<u32> = logits
        .iter()
        .flat_map(|row| {
            let (value, token) = best(row);
            [f32::NEG_INFINITY.to_bits(), NONE, value.to_bits(), token]
        })
        .collect();
    let call = Call::new("sample_choose", [rows.len() + 1, 1, 1], 1024)
        .count(rows.len())
        .bytes(Lists::of(&rules, vocab).rules)
        .bytes(floats(&logits))
        .words(&parts)
        .u32(2)
        .poisoned((rows.len() + 1) * 4)
        .poisoned((rows.len() + 1) * TOP_BYTES)
        .u32(vocab);
    let rows = rows.to_vec();
    let check: Check = Box::new(move |outs| {
        let tokens = bytes_to_words(&outs[0]);
        if tokens[rows.len()] != NONE {
            return Err("a padding row was written".to_owned());
        }
        for (i, (logits, r)) in rows.iter().enumerate() {
            let (max, first) = best(logits);
            let expect = match max.is_finite() {
                false => NONE,
                true if r.known != NONE => r.known,
                true if r.temperature < 1e-5 => first,
                true => drawn(logits, r, max),
            };
            if tokens[i] != expect {
                return Err(format!("row {i}: token {} instead of {expect} of {r:?}", tokens[i]));
            }
            if expect != NONE && r.logprobs != NONE {
                check_top(&outs[1][i * TOP_BYTES..][..TOP_BYTES], logits, expect, r.logprobs)?;
            }
        }
        Ok(())
    });
    Case { what: format!("sample_choose {what}"), call, check }
}

fn check_top(bytes: &[u8], logits: &[f32], chosen: u32, wanted: u32) -> Result<(), String> {
    let words = bytes_to_words(bytes);
    let expect = logprobs(logits, best(logits).0);
    // A known token may be one that nothing chooses: infinitely unlikely, or no number.
    let is_near = |bits: u32, token: u32| {
        let (found, expect) = (f64::from(f32::from_bits(bits)), expect[token as usize]);
        (found - expect).abs() < 1e-5 || found == expect || found.is_nan() && expect.is_nan()
    };
    let mut order = by_rank(logits);
    order.truncate(wanted as usize);
    let (count, tokens) = (words[1] as usize, &words[2..22]);
    let are_near = order.iter().zip(&words[22..]).all(|(&token, &bits)| is_near(bits, token));
    if is_near(words[0], chosen) && count == order.len() && tokens[..count] == order[..] && are_near {
        return Ok(());
    }
    Err(format!("log-probabilities {words:?} instead of those of {chosen} and {order:?}"))
}

fn choose_cases(rng: &mut Rng) -> Vec<Case> {
    let kinds = [
        Rules { temperature: 1.0, ..Rules::default() },
        Rules { temperature: 0.3, top_k: 40, ..Rules::default() },
        Rules { temperature: 1.7, top_p: 0.9, ..Rules::default() },
        Rules { temperature: 1.0, top_p: 0.0, ..Rules::default() },
        Rules { temperature: 1.0, top_k: 7, top_p: 0.5, logprobs: 20, ..Rules::default() },
        Rules { temperature: 1.0, top_k: 1, logprobs: 0, ..Rules::default() },
        Rules { temperature: 2.0, min_p: 0.2, ..Rules::default() },
        Rules { temperature: 0.8, top_k: 1_000_000, top_p: 0.99, min_p: 0.01, logprobs: 3, ..Rules::default() },
        Rules { temperature: 0.0, logprobs: 5, ..Rules::default() },
        Rules { temperature: 1.0, logprobs: 2, known: 0, ..Rules::default() },
    ];
    let mut cases = Vec::new();
    for vocab in [1, 5, 1_000, 2_048, 5_003] {
        let mut row = |i: usize| {
            let seed = rng.next();
            (random_logits(rng, vocab), Rules { seed, index: i as u32, ..kinds[i % kinds.len()].clone() })
        };
        let rows: Vec<_> = (0..27).map(&mut row).collect();
        cases.push(choose_case(&format!("of {vocab}"), &rows));
    }
    // Nearly equal weights need all digits of the rank; equal ones the digits of the id.
    let flat = |step: f32| (0..3_000).map(|i| (i % 500) as f32 * step).collect::<Vec<f32>>();
    let any = |i: u32| Rules { temperature: 1.0, top_p: 0.5, top_k: 2_000, index: i, logprobs: 20, ..Rules::default() };
    cases.push(choose_case("of nearly equal", &[(flat(1e-7), any(0)), (flat(0.0), any(1)), (flat(-0.0), any(2))]));
    // So many tokens that a row's parts are several turns of a block: candidates in three of them, the last token among them.
    let mut wide = vec![f32::NEG_INFINITY; 70_003];
    for token in (9_000..9_400).chain(40_957..40_963).chain(69_900..70_003) {
        wide[token] = (rng.unit() * 4.0) as f32;
    }
    let ruled = |i: usize| (wide.clone(), Rules { seed: i as u64, index: 3, ..kinds[i].clone() });
    cases.push(choose_case("of a wide vocabulary", &[0, 1, 2, 6, 7].map(ruled)));
    let nothing = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY].map(|v| (vec![v; 3], any(0)));
    cases.push(choose_case("of nothing", &nothing));
    cases
}

/// Every kernel here, at sizes that fit no tile.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut rng = Rng(13);
    let mut cases = rules_cases(&mut rng);
    let rows: Vec<_> = (0..3).map(|_| random_logits(&mut rng, 3_001)).collect();
    cases.push(argmax_case("random", &rows, 7));
    cases.push(argmax_case("fewer than parts", &[vec![1.0, 3.0, 3.0], vec![f32::NAN; 3]], 16));
    cases.push(argmax_case("tied across parts", &[vec![2.0; 700]], 2));
    cases.extend(choose_cases(&mut rng));
    cases
}
