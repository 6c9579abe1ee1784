//! How the contexts of a step's rows are cut into splits, which decode attention computes side by side.
//!
//! A captured graph cannot change its grid, so the list of splits lies in the step's inputs, and a grid has room for the longest that
//! its rows can need. Splits are at most as long as a share of all contexts together: no row keeps a step waiting while the rest of the
//! device idles, however much longer than the others it is.

use super::layout::Sizes;

/// Positions that a block computes at once; contexts are cut at multiples of this.
const GRAIN: usize = 64;

/// Positions of a context that is not cut: joining takes about as long as computing them.
const LEAST: usize = 2 * GRAIN;

/// Most splits of a row. Where a device computes hundreds at once (one key head), the warps that join more would take longer than is won.
const MOST_OF_A_ROW: usize = 64;

/// Words of a split: row, token, begin and end of its positions, the first of the row's splits, how many those are; two are unused.
pub(super) const SPLIT_WORDS: usize = 8;

/// A row of one token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Single {
    pub(super) row: usize,
    pub(super) token: usize,
    /// Tokens of its context, with its own.
    pub(super) len: usize,
}

/// What a layer sees of a row.
#[derive(Clone, Copy)]
struct Seen {
    single: Single,
    /// The first position.
    first: usize,
    /// The multiple of [`GRAIN`] at or before it, from which splits are counted.
    base: usize,
}

impl Seen {
    fn of(single: Single, window: Option<usize>) -> Self {
        let first = window.map_or(0, |window| single.len.saturating_sub(window));
        Self { single, first, base: first / GRAIN * GRAIN }
    }

    fn len(&self) -> usize {
        self.single.len - self.base
    }
}

// === impl Sizes ===

impl Sizes {
    /// Splits beyond one a row that a step has at most: two blocks for each multiprocessor, about as many as it computes at once.
    fn further_splits(&self) -> usize {
        (2 * self.n_sms as usize).div_ceil(self.clusters())
    }

    /// Most splits of so many rows.
    pub(super) fn most_splits(&self, rows: usize) -> usize {
        (rows + self.further_splits()).min(rows * self.config.context_tokens.div_ceil(LEAST))
    }

    /// Most splits of rows that have several. With contexts of `x > 1` times the longest split, those are at most `2x`, and all `x` of a
    /// step come to [`Self::further_splits`] at most.
    pub(super) fn most_joined_splits(&self) -> usize {
        2 * self.further_splits()
    }

    /// Writes the splits of these rows, in layers with this window, and how many they are. Rows that have several come first: they take
    /// longest, so they should not begin last, and only they have a place for what is joined.
    pub(super) fn write_splits(
        &self,
        rows: impl Iterator<Item = Single> + Clone,
        window: Option<usize>,
        words: &mut [u32],
    ) -> usize {
        let rows = rows.map(|single| Seen::of(single, window));
        let (all, longest) = rows.clone().fold((0, 0), |(all, longest), row| (all + row.len(), row.len().max(longest)));
        let share = all.div_ceil(self.further_splits()).max(longest.div_ceil(MOST_OF_A_ROW));
        let most = share.next_multiple_of(GRAIN).max(LEAST);
        let mut n_splits = 0;
        let of = |is_cut| rows.clone().filter(move |row| (row.len() > most) == is_cut);
        for row in of(true).chain(of(false)) {
            let Seen { single, first, base } = row;
            // As long as each other, but for the last.
            let count = row.len().div_ceil(most);
            let each = row.len().div_ceil(count).next_multiple_of(GRAIN);
            let words = &mut words[n_splits * SPLIT_WORDS..][..count * SPLIT_WORDS];
            for (i, words) in words.chunks_exact_mut(SPLIT_WORDS).enumerate() {
                let (begin, end) = (first.max(base + i * each), single.len.min(base + (i + 1) * each));
                let split = [single.row, single.token, begin, end, n_splits, count, 0, 0];
                words.iter_mut().zip(split).for_each(|(word, n)| *word = n as u32);
            }
            n_splits += count;
        }
        n_splits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::EngineConfig;
    use crate::backend::cuda::cases::Rng;
    use crate::backend::cuda::element::Element;
    use crate::backend::cuda::tune::GemmChoices;
    use crate::spec::ModelSpec;

    /// With this many query and key heads, on 132 multiprocessors.
    fn sizes(heads: usize, kv_heads: usize) -> Sizes {
        sizes_on(132, 32_768, (heads, kv_heads))
    }

    /// On so many multiprocessors, for contexts of so many tokens.
    fn sizes_on(n_sms: u32, context_tokens: usize, (heads, kv_heads): (usize, usize)) -> Sizes {
        let config = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 70, "hidden_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": 128, "intermediate_size": 64,
            "max_position_embeddings": 32768}}"#
        );
        Sizes {
            spec: ModelSpec::from_config(config.as_bytes()).expect("a Llama"),
            form: Element::Bf16.into(),
            config: EngineConfig {
                n_blocks: 4_096,
                block_tokens: 16,
                max_step_tokens: 256,
                max_rows: 256,
                context_tokens,
            },
            n_sms,
            has_library: false,
            choices: GemmChoices::default(),
        }
    }

    /// The splits of rows of these lengths: row, begin, end, first and count.
    fn splits(sizes: &Sizes, lens: &[usize], window: Option<usize>) -> Vec<[usize; 5]> {
        let mut words = vec![u32::MAX; sizes.most_splits(lens.len()) * SPLIT_WORDS];
        let rows = lens.iter().enumerate().map(|(row, &len)| Single { row, token: 3 * row, len });
        let n = sizes.write_splits(rows, window, &mut words);
        let (written, rest) = words.split_at(n * SPLIT_WORDS);
        assert!(rest.iter().all(|word| *word == u32::MAX), "{n} splits of {lens:?}");
        let split = |words: &[u32]| {
            let &[row, token, begin, end, first, count, 0, 0] = words else { panic!("{words:?}") };
            assert_eq!(token, 3 * row);
            [row, begin, end, first, count].map(|n| n as usize)
        };
        written.chunks_exact(SPLIT_WORDS).map(split).collect()
    }

    #[test]
    fn a_row_alone_has_the_device_to_itself() {
        let sizes = sizes(32, 8);
        assert_eq!(splits(&sizes, &[1], None), [[0, 0, 1, 0, 1]]);
        assert_eq!(splits(&sizes, &[64], None), [[0, 0, 64, 0, 1]]);
        assert_eq!(splits(&sizes, &[128], None), [[0, 0, 128, 0, 1]]);
        assert_eq!(splits(&sizes, &[300], None), [[0, 0, 128, 0, 3], [0, 128, 256, 0, 3], [0, 256, 300, 0, 3]]);
        let of_8k = splits(&sizes, &[8_192], None);
        assert_eq!((of_8k.len(), of_8k[0], of_8k[31]), (32, [0, 0, 256, 0, 32], [0, 7_936, 8_192, 0, 32]));
        // With one key head the device could compute 264 at once.
        assert_eq!(splits(&self::sizes(8, 1), &[32_768], None).len(), MOST_OF_A_ROW);
    }

    #[test]
    fn rows_that_are_much_longer_than_others_are_cut_and_come_first() {
        let sizes = sizes(32, 8);
        let even = splits(&sizes, &[1_000; 64], None);
        assert!(even.iter().enumerate().all(|(row, split)| *split == [row, 0, 1_000, row, 1]), "{even:?}");
        let mut lens = vec![500; 64];
        lens[9] = 32_000;
        // 33 shares of 63,500 positions are 1,925 each, and 1,984 by whole grains: 17 splits, as long as each other.
        let uneven = splits(&sizes, &lens, None);
        assert_eq!(uneven.len(), 63 + 17);
        assert_eq!((uneven[0], uneven[16]), ([9, 0, 1_920, 0, 17], [9, 30_720, 32_000, 0, 17]));
        assert_eq!((uneven[17], uneven[79]), ([0, 0, 500, 17, 1], [63, 0, 500, 79, 1]));
        let half_in_one = [vec![16_384], vec![528; 31]].concat();
        let longest = splits(&sizes, &half_in_one, None).into_iter().map(|[_, begin, end, ..]| end - begin).max();
        assert_eq!(longest, Some(1_024));
    }

    #[test]
    fn a_window_is_all_that_is_cut() {
        let sizes = sizes(32, 8);
        assert_eq!(splits(&sizes, &[1_000], Some(1)), [[0, 999, 1_000, 0, 1]]);
        assert_eq!(splits(&sizes, &[1_000], Some(150)), [[0, 850, 960, 0, 2], [0, 960, 1_000, 0, 2]]);
        assert_eq!(splits(&sizes, &[40], Some(50)), [[0, 0, 40, 0, 1]]);
        assert_eq!(splits(&sizes, &[8_000, 10], Some(300)).len(), 4);
    }

    #[test]
    fn every_position_is_in_one_split_and_all_have_room() {
        let mut rng = Rng(5);
        for (n_sms, context, heads) in
            [(132, 32_768, (32, 8)), (132, 300, (8, 1)), (108, 4_096, (32, 32)), (4, 128, (32, 8)), (1, 2_000, (16, 2))]
        {
            let sizes = sizes_on(n_sms, context, heads);
            for _ in 0..300 {
                let scale = context.min(1 << rng.below(16));
                let mut lens: Vec<usize> = (0..1 + rng.below(256)).map(|_| 1 + rng.below(scale)).collect();
                for _ in 0..rng.below(3) {
                    let row = rng.below(lens.len());
                    lens[row] = 1 + rng.below(context);
                }
                let window = (rng.below(2) == 1).then(|| 1 + rng.below(5_000));
                // Room for all of them is what `splits` writes into.
                let found = splits(&sizes, &lens, window);
                let joined = found.iter().filter(|split| split[4] > 1).count();
                assert!(joined <= sizes.most_joined_splits(), "{joined} of {lens:?} in {window:?}");
                assert!(found[..joined].iter().all(|split| split[4] > 1), "they come first");
                let mut next: Vec<usize> =
                    lens.iter().map(|len| window.map_or(0, |window| len.saturating_sub(window))).collect();
                for (i, [row, begin, end, first, count]) in found.into_iter().enumerate() {
                    assert!(begin == next[row] && end > begin && (first..first + count).contains(&i));
                    assert!(begin % GRAIN == 0 || i == first, "cut at {begin}");
                    assert!(count <= MOST_OF_A_ROW);
                    next[row] = end;
                }
                assert_eq!(next, lens);
            }
        }
    }
}
