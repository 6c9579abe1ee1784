//! A step's inputs, rules and outputs as words in the layout that the kernels read and write.
//!
//! The seam has ranges into vectors; kernels want arrays of fixed places. Everything is written into host memory that is
//! copied at once, but for block tables that are shorter than their places: many small copies would each cost as much as a
//! kernel.

use std::sync::Arc;

use pointsman_sched::execute::{ExecuteError, Row, Sample, Sampled, StepOutput, StepPlan};
use pointsman_sched::request::TokenLogprobs;
use pointsman_sched::sampler::Edit;

use super::device::Rows;
use super::launch::Extent;
use super::layout::{
    MAX_BANS, MAX_POLICY_BIASES, MAX_REQUEST_BIASES, N_COUNTS, N_SAMPLED, RULES_BYTES, Sizes, TOP_BYTES,
};
use super::splits::Single;
use crate::spec::Window;

/// Stands for no token, no mask, no log-probabilities.
const NONE: u32 = u32::MAX;

/// Most log-probabilities of a token.
const MAX_LOGPROBS: usize = 20;

/// Writes the inputs of a step: first what stands in one piece, whose words are told, then the block tables, as wide as the longest
/// of them. On the device a table has room for the longest context, which for a few rows would be more to copy than all else.
pub(crate) fn write_inputs(sizes: &Sizes, extent: Extent, plan: &StepPlan, words: &mut [u32]) -> (usize, Rows) {
    let layout = sizes.inputs(extent);
    let at = |bytes: u64| (bytes / 4) as usize;
    let (tokens, rows, blocks) = (plan.tokens.len(), plan.rows.len(), sizes.max_blocks());
    words[at(layout.tokens)..][..tokens].copy_from_slice(&plan.tokens);
    let (mut sampled, mut tiles) = (0, 0);
    // A row may bring a longer table than its context needs.
    let table_of = |row| plan.blocks_of(row).get(..blocks).unwrap_or(plan.blocks_of(row));
    let width = plan.rows.iter().map(|row| table_of(row).len()).max().unwrap_or(0);
    for (i, row) in plan.rows.iter().enumerate() {
        let (start, len) = (row.tokens.start as usize, row.tokens.len());
        for j in 0..len {
            words[at(layout.positions) + start + j] = row.position + j as u32;
            words[at(layout.row_of) + start + j] = i as u32;
        }
        words[at(layout.row_starts) + i] = row.tokens.start;
        words[at(layout.lens) + i] = row.position + len as u32;
        if row.sample.is_some() {
            words[at(layout.pick) + sampled] = row.tokens.end - 1;
            sampled += 1;
        }
        if len > 1 {
            for first in (0..len).step_by(sizes.tile_tokens()) {
                words[at(layout.tiles) + 2 * tiles..][..2].copy_from_slice(&[i as u32, first as u32]);
                tiles += 1;
            }
        }
        let table = table_of(row);
        let to = &mut words[at(layout.tables) + i * width..][..table.len()];
        to.iter_mut().zip(table).for_each(|(word, block)| *word = block.0);
    }
    // By how much they see: the kernel begins with the last.
    let (listed, _) = words[at(layout.tiles)..][..2 * tiles].as_chunks_mut::<2>();
    listed.sort_unstable_by_key(|&[row, first]| (plan.rows[row as usize].position + first, row));
    words[at(layout.row_starts) + rows] = tokens as u32;
    words[at(layout.follows)..][..plan.follows.len()].copy_from_slice(&plan.follows);
    let splits = sizes.write_splits(singles_of(plan), None, &mut words[at(layout.splits)..at(layout.window_splits)]);
    let in_window = |window: &Window| {
        let words = &mut words[at(layout.window_splits)..at(layout.tiles)];
        sizes.write_splits(singles_of(plan), Some(window.positions), words)
    };
    let window_splits = sizes.spec.window.as_ref().map_or(0, in_window);
    let counts = [tokens, rows, sampled, tiles, splits, window_splits].map(|n| n as u32);
    words[..N_COUNTS].copy_from_slice(&counts);
    (at(layout.tables), Rows { n: rows, words: width, pitch: blocks })
}

/// The rows of one token.
fn singles_of(plan: &StepPlan) -> impl Iterator<Item = Single> + Clone {
    let single = |(row, of): (usize, &Row)| {
        let (token, len) = (of.tokens.start as usize, of.position as usize + 1);
        (of.tokens.len() == 1).then_some(Single { row, token, len })
    };
    plan.rows.iter().enumerate().filter_map(single)
}

/// The extent of a step that is not captured: exactly what it has.
pub(crate) fn extent_of(sizes: &Sizes, plan: &StepPlan) -> Extent {
    let is_single = |row: &&Row| row.tokens.len() == 1;
    let tiles = |row: &Row| row.tokens.len().div_ceil(sizes.tile_tokens());
    Extent {
        rows: plan.rows.len(),
        tokens: plan.tokens.len(),
        sampled: plan.rows.iter().filter(|row| row.sample.is_some()).count(),
        singles: plan.rows.iter().filter(is_single).count(),
        tiles: plan.rows.iter().filter(|row| !is_single(row)).map(tiles).sum(),
    }
}

/// Rows that follow nothing, of a step behind one that samples so many tokens: 0 where none is under way.
pub(crate) fn check_follows(plan: &StepPlan, n_before: usize) -> Result<(), ExecuteError> {
    let follows =
        |(row, place): (&Row, &u32)| row.tokens.len() == 1 && row.sample.is_some() && (*place as usize) < n_before;
    let is_whole = plan.follows.len() == plan.rows.len() && plan.rows.iter().zip(&plan.follows).all(follows);
    match plan.follows.is_empty() || is_whole {
        true => Ok(()),
        false => Err(ExecuteError::Malformed { what: "a row that follows no token of a step under way" }),
    }
}

/// Lists too long for the room that the device has for them.
pub(crate) fn check_lists(plan: &StepPlan) -> Result<(), ExecuteError> {
    for sample in plan.rows.iter().filter_map(|row| row.sample.as_ref()) {
        if sample.sampling.logit_bias.len() > MAX_REQUEST_BIASES {
            return Err(ExecuteError::Malformed { what: "more than 1024 biases in a request" });
        }
        if sample.banned.as_ref().is_some_and(|banned| banned.len() > MAX_BANS) {
            return Err(ExecuteError::Malformed { what: "more than 512 banned tokens in a row" });
        }
    }
    Ok(())
}

/// Writes the rules of every row that samples, in their order, for a launch of `rows` rows; how many words there are.
pub(crate) fn write_rules(
    sizes: &Sizes,
    rows: usize,
    plan: &StepPlan,
    edits: &[Option<Arc<Edit>>],
    words: &mut [u32],
) -> usize {
    let lists_at = (sizes.lists_at(rows as u64) / 4) as usize;
    let (rules, lists) = words.split_at_mut(lists_at);
    let mut lists = Lists { words: lists, taken: 0, vocab: sizes.spec.vocab };
    let rule_words = RULES_BYTES as usize / 4;
    // Masks first: rules name them by number, so they stand side by side from the start of the lists.
    let mut n_masks = 0;
    for (rule, edit) in rules.chunks_exact_mut(rule_words).zip(edits) {
        rule[MASK] = NONE;
        if let Some(mask) = edit.as_deref().and_then(Mask::of) {
            lists.mask(sizes.mask_words(), mask);
            rule[MASK] = n_masks;
            n_masks += 1;
        }
    }
    let samples = plan.rows.iter().filter_map(|row| row.sample.as_ref());
    for ((rule, sample), edit) in rules.chunks_exact_mut(rule_words).zip(samples).zip(edits) {
        write_rule(rule, &mut lists, (sample, &plan.history), edit.as_deref());
    }
    // Each row of a step that follows samples; its history ends with the token that it follows with.
    for (rule, place) in rules.chunks_exact_mut(rule_words).zip(&plan.follows) {
        rule[PREVIOUS] = *place;
    }
    lists_at + lists.taken
}

/// Word of a rule that says where the last token of its history stands among those of the step before; none for none.
const PREVIOUS: usize = 13;

/// Word of a rule that names its mask.
const MASK: usize = 18;

/// Word of a rule that says how many log-probabilities are wanted; behind it stands the token that is chosen whatever is likely.
const LOGPROBS: usize = 21;

/// Everything of a rule but its mask.
fn write_rule(rule: &mut [u32], lists: &mut Lists<'_>, (sample, history): (&Sample, &[u32]), edit: Option<&Edit>) {
    let sampling = &*sample.sampling;
    let (mut history_at, mut history_len, mut prompt) = (0, 0, 0);
    if sampling.needs_history() {
        let history = &history[sample.history.start as usize..sample.history.end as usize];
        let (in_prompt, in_output) = history.split_at(sample.history_prompt as usize);
        (history_at, prompt) = lists.tokens(in_prompt);
        history_len = prompt + lists.tokens(in_output).1;
    }
    let (bias_at, biases) = lists.biases(&sampling.logit_bias);
    let policy = match edit {
        // Longer ones than any policy needs are set aside: room for them in every row would be room for nothing else.
        Some(Edit::Bias(biases)) if biases.len() <= MAX_POLICY_BIASES => &biases[..],
        _ => &[],
    };
    let (edit_at, edits) = lists.biases(policy);
    let (ban_at, bans) = lists.tokens(sample.banned.as_deref().unwrap_or_default());
    rule[..MASK].copy_from_slice(&[
        sampling.seed as u32,
        (sampling.seed >> 32) as u32,
        sample.index,
        sampling.temperature.to_bits(),
        sampling.top_k,
        sampling.top_p.to_bits(),
        sampling.min_p.to_bits(),
        sampling.repetition_penalty.to_bits(),
        sampling.presence_penalty.to_bits(),
        sampling.frequency_penalty.to_bits(),
        history_at,
        history_len,
        prompt,
        NONE,
        bias_at,
        biases,
        edit_at,
        edits,
    ]);
    let logprobs = sampling.logprobs.map_or(NONE, |n| u32::from(n).min(MAX_LOGPROBS as u32));
    rule[MASK + 1..].copy_from_slice(&[ban_at, bans, logprobs, NONE, 0]);
}

/// A prompt's token, how many others to name beside it, and after which token of the step it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scored {
    after: u32,
    token: u32,
    top: u8,
}

impl Scored {
    /// Those of a step, in the order of its output.
    pub(crate) fn all(plan: &StepPlan) -> impl Iterator<Item = Self> + '_ {
        plan.scores.iter().flat_map(|score| {
            let tokens = &plan.scored[score.next.start as usize..score.next.end as usize];
            score.after.clone().zip(tokens).map(|(after, &token)| Self { after, token, top: score.top })
        })
    }
}

/// Writes inputs of which nothing is looked at but the tokens after which scored ones come: where the list begins on the device, and
/// how many words there are.
pub(crate) fn write_picks(sizes: &Sizes, tokens: &[Scored], words: &mut [u32]) -> (u64, usize) {
    let extent = Extent { rows: 0, tokens: 0, sampled: tokens.len(), singles: 0, tiles: 0 };
    let pick = sizes.inputs(extent).pick;
    words[..N_COUNTS].fill(0);
    words[(N_SAMPLED / 4) as usize] = tokens.len() as u32;
    let list = &mut words[(pick / 4) as usize..][..tokens.len()];
    list.iter_mut().zip(tokens).for_each(|(word, scored)| *word = scored.after);
    (pick, (pick / 4) as usize + tokens.len())
}

/// Writes rules that leave logits as they are and choose the scored tokens; how many words there are.
pub(crate) fn write_score_rules(sizes: &Sizes, tokens: &[Scored], words: &mut [u32]) -> usize {
    let plain = Sample { sampling: Arc::default(), index: 0, history: 0..0, history_prompt: 0, banned: None };
    let mut lists = Lists { words: &mut [], taken: 0, vocab: sizes.spec.vocab };
    for (rule, scored) in words.chunks_exact_mut(RULES_BYTES as usize / 4).zip(tokens) {
        rule[MASK] = NONE;
        write_rule(rule, &mut lists, (&plain, &[]), None);
        rule[LOGPROBS..][..2].copy_from_slice(&[u32::from(scored.top).min(MAX_LOGPROBS as u32), scored.token]);
    }
    (sizes.lists_at(tokens.len() as u64) / 4) as usize
}

/// A mask as its edit says it.
enum Mask<'a> {
    Allow(&'a [u32]),
    Forbid(&'a [u32]),
    /// A bit per token, as the device wants it.
    Bits(&'a [u32]),
}

impl<'a> Mask<'a> {
    fn of(edit: &'a Edit) -> Option<Self> {
        match edit {
            Edit::Allow(tokens) => Some(Self::Allow(tokens)),
            Edit::Forbid(tokens) => Some(Self::Forbid(tokens)),
            Edit::Only(set) => Some(Self::Bits(set.words())),
            Edit::Bias(_) => None,
        }
    }
}

/// The lists that rules point into, and how much of their room is taken.
struct Lists<'a> {
    words: &'a mut [u32],
    taken: usize,
    vocab: usize,
}

impl Lists<'_> {
    fn mask(&mut self, n_words: usize, mask: Mask<'_>) {
        let words = &mut self.words[self.taken..][..n_words];
        let exist = |token: &&u32| (**token as usize) < self.vocab;
        match mask {
            Mask::Allow(tokens) => {
                words.fill(0);
                tokens.iter().filter(exist).for_each(|token| words[*token as usize / 32] |= 1 << (token % 32));
            }
            Mask::Forbid(tokens) => {
                words.fill(u32::MAX);
                tokens.iter().filter(exist).for_each(|token| words[*token as usize / 32] &= !(1 << (token % 32)));
            }
            // Those of a tokenizer, which may know fewer tokens than the model.
            Mask::Bits(bits) => {
                words.fill(0);
                words.iter_mut().zip(bits).for_each(|(word, bits)| *word = *bits);
            }
        }
        self.taken += n_words;
    }

    /// Adds those that exist; where they begin and how many they are.
    fn tokens(&mut self, tokens: &[u32]) -> (u32, u32) {
        let start = self.taken;
        for &token in tokens.iter().filter(|&&token| (token as usize) < self.vocab) {
            self.words[self.taken] = token;
            self.taken += 1;
        }
        (start as u32, (self.taken - start) as u32)
    }

    /// Adds a bias of each token that exists, once: where they begin, counted in entries, and how many they are.
    fn biases(&mut self, biases: &[(u32, f32)]) -> (u32, u32) {
        if biases.is_empty() {
            return (0, 0);
        }
        self.taken = self.taken.next_multiple_of(2);
        let start = self.taken;
        for &(token, bias) in biases.iter().filter(|(token, _)| (*token as usize) < self.vocab) {
            let listed = &mut self.words[start..self.taken];
            // A request's list is short, and a policy's has each token once: nothing is looked up twice for long.
            match listed.chunks_exact_mut(2).find(|entry| entry[0] == token) {
                Some(entry) => entry[1] = (f32::from_bits(entry[1]) + bias).to_bits(),
                None => {
                    self.words[self.taken..][..2].copy_from_slice(&[token, bias.to_bits()]);
                    self.taken += 2;
                }
            }
        }
        (start as u32 / 2, (self.taken - start) as u32 / 2)
    }
}

/// Words of the outputs of `rows` rows in a launch of `extent` rows: tokens alone, or log-probabilities with them.
pub(crate) fn output_words(extent: usize, rows: usize, plan: &StepPlan) -> usize {
    let wanted = |row: &Row| row.sample.as_ref().is_some_and(|sample| sample.sampling.logprobs.is_some());
    match plan.rows.iter().any(wanted) {
        true => words_with_tops(extent, rows),
        false => rows,
    }
}

/// The same with log-probabilities.
pub(crate) fn words_with_tops(extent: usize, rows: usize) -> usize {
    (Sizes::tops_at(extent as u64) + rows as u64 * TOP_BYTES) as usize / 4
}

/// Reads the log-probabilities of so many scored tokens.
pub(crate) fn read_scores(n: usize, words: &[u32], out: &mut StepOutput) -> Result<(), ExecuteError> {
    let (tokens, tops) = words.split_at((Sizes::tops_at(n as u64) / 4) as usize);
    if tokens[..n].contains(&NONE) {
        return Err(no_finite_logit());
    }
    out.scores.extend(tops.chunks_exact(TOP_BYTES as usize / 4).take(n).map(read_top));
    Ok(())
}

fn no_finite_logit() -> ExecuteError {
    ExecuteError::Device { what: "a row has no token with a finite logit".into() }
}

/// Reads the outputs of a launch of `extent` rows, of which a row with drafts takes one for each of them as well.
pub(crate) fn read_outputs(
    (extent, vocab): (usize, usize),
    plan: &StepPlan,
    words: &[u32],
    out: &mut StepOutput,
) -> Result<(), ExecuteError> {
    let tops = (Sizes::tops_at(extent as u64) / 4) as usize;
    let sampling = plan.rows.iter().filter_map(|row| row.sample.as_ref().map(|sample| (row, sample)));
    let places = sampling.flat_map(|(row, sample)| (0..=row.drafts).map(move |ahead| (ahead, sample)));
    for (i, (ahead, sample)) in places.enumerate() {
        let token = words[i];
        if token == NONE {
            return Err(no_finite_logit());
        }
        if token as usize >= vocab {
            return Err(ExecuteError::Device { what: format!("token {token} is outside the vocabulary").into() });
        }
        let top = || &words[tops + i * TOP_BYTES as usize / 4..][..TOP_BYTES as usize / 4];
        let logprobs = sample.sampling.logprobs.map(|_| Box::new(read_top(top())));
        let to = if ahead == 0 { &mut out.sampled } else { &mut out.after_drafts };
        to.push(Sampled { token, logprobs });
    }
    Ok(())
}

fn read_top(words: &[u32]) -> TokenLogprobs {
    let (tokens, logprobs) = words[2..].split_at(MAX_LOGPROBS);
    let pairs = tokens.iter().zip(logprobs).map(|(&token, &logprob)| (token, f32::from_bits(logprob)));
    TokenLogprobs { chosen: f32::from_bits(words[0]), top: pairs.take(words[1] as usize).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::EngineConfig;
    use crate::backend::cuda::element::Element;
    use crate::backend::cuda::tune::GemmChoices;
    use crate::spec::ModelSpec;
    use pointsman_sched::execute::Score;
    use pointsman_sched::ids::{BlockId, RequestId};
    use pointsman_sched::mask::TokenSet;
    use pointsman_sched::request::Sampling;

    fn sizes() -> Sizes {
        let config = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 70, "hidden_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64,
            "max_position_embeddings": 64}"#;
        Sizes {
            spec: ModelSpec::from_config(config.as_bytes()).expect("a Llama"),
            form: Element::F32.into(),
            config: EngineConfig {
                n_blocks: 9,
                block_tokens: 16,
                max_step_tokens: 64,
                max_rows: 4,
                context_tokens: 64,
            },
            n_sms: 4,
            has_library: false,
            choices: GemmChoices::default(),
        }
    }

    fn sample(sampling: Sampling, history: std::ops::Range<u32>, prompt: u32, banned: &[u32]) -> Option<Sample> {
        let banned = (!banned.is_empty()).then(|| banned.into());
        Some(Sample { sampling: Arc::new(sampling), index: 3, history, history_prompt: prompt, banned })
    }

    /// A decode, a chunk of 20 tokens that samples, and a chunk of 2 that does not.
    fn plan() -> StepPlan {
        let mut plan = StepPlan::default();
        let penalised = Sampling {
            presence_penalty: 0.5,
            temperature: 0.7,
            seed: 0x1_0000_0002,
            logit_bias: vec![(5, 1.0), (99, 2.0), (5, 0.5)],
            logprobs: Some(2),
            ..Sampling::default()
        };
        for (len, position, blocks, sample) in [
            (1, 17, vec![3, 8], sample(Sampling::default(), 0..0, 0, &[])),
            (20, 0, vec![1, 2], sample(penalised, 0..4, 2, &[7, 70, 8])),
            (2, 30, vec![4, 5], None),
        ] {
            let tokens = plan.tokens.len() as u32..plan.tokens.len() as u32 + len;
            plan.tokens.extend((0..len).map(|i| 10 + i));
            let first = plan.blocks.len() as u32;
            plan.blocks.extend(blocks.into_iter().map(BlockId));
            let blocks = first..plan.blocks.len() as u32;
            plan.rows.push(Row { request: RequestId(1), tokens, position, blocks, sample, drafts: 0 });
        }
        plan.history = vec![1, 2, 70, 4];
        plan
    }

    #[test]
    fn inputs_stand_where_the_kernels_look() {
        let (sizes, plan) = (sizes(), plan());
        let extent = extent_of(&sizes, &plan);
        // 64 / 4 tokens a tile: one token alone, 2 tiles and 1.
        assert_eq!(extent, Extent { rows: 3, tokens: 23, sampled: 2, singles: 1, tiles: 3 });
        let layout = sizes.inputs(extent);
        let mut words = vec![u32::MAX; layout.bytes as usize / 4];
        let tables = layout.tables as usize / 4;
        let rows = Rows { n: 3, words: 2, pitch: (words.len() - tables) / 3 };
        assert_eq!(write_inputs(&sizes, extent, &plan, &mut words), (tables, rows));
        let at = |bytes: u64, n: usize| &words[bytes as usize / 4..][..n];
        assert_eq!(&words[..6], [23, 3, 2, 3, 1, 0]);
        assert_eq!(at(layout.tokens, 3), [10, 10, 11]);
        assert_eq!(at(layout.positions, 3), [17, 0, 1]);
        assert_eq!(&at(layout.positions, 23)[20..], [19, 30, 31]);
        assert_eq!(&at(layout.row_of, 23)[19..], [1, 1, 2, 2]);
        assert_eq!(at(layout.row_starts, 4), [0, 1, 21, 23]);
        assert_eq!(at(layout.lens, 3), [18, 20, 32]);
        assert_eq!(at(layout.pick, 2), [0, 20]);
        assert_eq!(at(layout.splits, 8), [0, 0, 0, 18, 0, 1, 0, 0]);
        assert_eq!(at(layout.tiles, 6), [1, 0, 1, 16, 2, 0]);
        assert_eq!(at(layout.tables, 6), [3, 8, 1, 2, 4, 5], "side by side, as wide as the longest");
    }

    #[test]
    fn rules_point_into_their_lists() {
        let (sizes, plan) = (sizes(), plan());
        let mut words = vec![0x5555_5555; 4_096];
        let forbid = Some(Arc::new(Edit::Forbid([0, 33].into())));
        let n = write_rules(&sizes, 2, &plan, &[forbid, None], &mut words);
        let (rules, lists) = words.split_at(sizes.lists_at(2) as usize / 4);
        // 70 bits are three words; then history without the token that does not exist, two words a bias, two bans.
        assert_eq!(lists[..3], [!1, !2, !0]);
        assert_eq!(lists[3..6], [1, 2, 4]);
        assert_eq!(lists[6..8], [5, 1.5f32.to_bits()]);
        assert_eq!(lists[8..10], [7, 8]);
        assert_eq!(n, rules.len() + 10);
        let (greedy, penalised) = rules.split_at(24);
        assert_eq!((greedy[MASK], greedy[3], greedy[11], greedy[15], greedy[20], greedy[21]), (0, 0, 0, 0, 0, NONE));
        assert_eq!(penalised[..4], [2, 1, 3, 0.7f32.to_bits()]);
        assert_eq!(penalised[10..16], [3, 3, 2, NONE, 3, 1]);
        assert_eq!(penalised[17..24], [0, NONE, 8, 2, 2, NONE, 0]);
    }

    #[test]
    fn a_mask_of_bits_ends_with_the_tokenizer() {
        let (sizes, plan) = (sizes(), plan());
        let mut words = vec![0x5555_5555; 4_096];
        let only = Some(Arc::new(Edit::Only(TokenSet::from_words(vec![6, 9]))));
        write_rules(&sizes, 2, &plan, &[None, only], &mut words);
        let (rules, lists) = words.split_at(sizes.lists_at(2) as usize / 4);
        assert_eq!(lists[..3], [6, 9, 0]);
        assert_eq!((rules[MASK], rules[24 + MASK]), (NONE, 0));
    }

    #[test]
    fn lists_that_have_no_room_are_refused_or_set_aside() {
        let mut plan = plan();
        assert_eq!(check_lists(&plan), Ok(()));
        let long = Sampling { logit_bias: vec![(1, 1.0); MAX_REQUEST_BIASES + 1], ..Sampling::default() };
        plan.rows[0].sample = sample(long, 0..0, 0, &[]);
        assert!(matches!(check_lists(&plan), Err(ExecuteError::Malformed { what }) if what.contains("biases")));
        plan.rows[0].sample = sample(Sampling::default(), 0..0, 0, &[1; MAX_BANS + 1]);
        assert!(matches!(check_lists(&plan), Err(ExecuteError::Malformed { what }) if what.contains("banned")));
    }

    #[test]
    fn scored_tokens_are_picked_and_known() {
        let (sizes, mut plan) = (sizes(), plan());
        plan.scored = vec![11, 12, 31];
        plan.scores = vec![Score { after: 1..3, next: 0..2, top: 0 }, Score { after: 21..22, next: 2..3, top: 99 }];
        let tokens: Vec<Scored> = Scored::all(&plan).collect();
        let mut words = vec![7; 200];
        let (pick, n) = write_picks(&sizes, &tokens, &mut words);
        assert_eq!((&words[..N_COUNTS], n), (&[0, 0, 3, 0, 0, 0][..], pick as usize / 4 + 3));
        assert_eq!(words[pick as usize / 4..][..4], [1, 2, 21, 7]);
        assert_eq!(write_score_rules(&sizes, &tokens, &mut words), 3 * 24);
        let rule = |i: usize| &words[i * 24..][..24];
        assert_eq!([0, 1, 2].map(|i| rule(i)[LOGPROBS..][..3].to_vec()), [[0, 11, 0], [0, 12, 0], [20, 31, 0]]);
        assert_eq!((rule(2)[7], rule(2)[13], rule(2)[MASK], words[72]), (1.0f32.to_bits(), NONE, NONE, 7));
        let mut out = StepOutput::default();
        words[..3].copy_from_slice(&[11, NONE, 31]);
        assert!(read_scores(3, &words, &mut out).is_err() && out.scores.is_empty());
    }

    #[test]
    fn outputs_are_read_in_the_order_of_the_rows() {
        let plan = plan();
        let words_of = |tokens: [u32; 2]| {
            let mut words = vec![0; output_words(4, 2, &plan)];
            words[..2].copy_from_slice(&tokens);
            let top = &mut words[4 + 42..];
            top[..2].copy_from_slice(&[(-0.5f32).to_bits(), 2]);
            top[2..4].copy_from_slice(&[9, 8]);
            top[22..24].copy_from_slice(&[(-0.5f32).to_bits(), (-2.0f32).to_bits()]);
            words
        };
        let mut out = StepOutput::default();
        read_outputs((4, 70), &plan, &words_of([6, 9]), &mut out).expect("two tokens");
        assert_eq!(out.sampled[0], Sampled { token: 6, logprobs: None });
        let logprobs = TokenLogprobs { chosen: -0.5, top: vec![(9, -0.5), (8, -2.0)] };
        assert_eq!(out.sampled[1], Sampled { token: 9, logprobs: Some(Box::new(logprobs)) });
        for bad in [NONE, 70] {
            let error = read_outputs((4, 70), &plan, &words_of([6, bad]), &mut StepOutput::default());
            assert!(matches!(error, Err(ExecuteError::Device { .. })));
        }
    }
}
