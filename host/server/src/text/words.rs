//! Texts to tokens a word at a time, for byte-level BPE, the kind of GPT-2, Llama 3, Qwen and the demo.
//!
//! The library keeps the way back from every piece to the original text, for callers that mark words; a prompt does not need
//! it, and it was a quarter of what the host spent on a short request. So the splitting is done here, on slices of the text,
//! with the library's expression, and each piece is given to the library's model. Tokenizers of any other form, and texts that
//! their normalizer may change, go through the library as they are; tests hold both ways to the same tokens.
//!
//! Such expressions end in a lookahead, for spaces before a word, and mostly need an engine that backtracks for its sake alone:
//! a fifth of the allocations of a short request. So where that end stands it is taken off, and its meaning is three lines of
//! `next_word`.
//!
//! The words of a language are few, so what became of each is kept, and goes with the model: the library keeps them in every
//! thread that has ever encoded, and there they would stay.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use regex_automata::Input;
use regex_automata::meta::Regex;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::utils::SysRegex;
use tokenizers::{
    AddedToken, Model as _, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
};
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

use super::detokenize::byte_char;

/// How GPT-2 splits words, where a tokenizer says only that it is byte-level.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How such an expression ends: spaces before a word are left to it but for the last, which the word may take.
const SPACES: &str = r"|\s+(?!\S)|\s+";

/// What words that are kept may take, in bytes, by an estimate of what each takes: some twenty thousand of a usual length. Beyond it
/// the least used go.
const KEPT_BYTES: u64 = 2 << 20;

/// The longest word that is kept, in bytes; the tokens of a longer one are worked out each time.
const MAX_KEPT: usize = 256;

/// What a byte-level tokenizer does before its model.
pub(super) struct Words {
    /// Tokens by word, of words that were seen.
    kept: Cache<Box<str>, Arc<[u32]>, Size>,
    splitter: Splitter,
    /// Tokens that are found in the text before anything else, in the order in which they are looked for.
    added: Vec<Added>,
    /// The characters that write bytes.
    alphabet: [char; 256],
    /// Whether text is brought into NFC first.
    composes: bool,
    /// What is put around a text, before it and after it.
    around: [Vec<u32>; 2],
}

/// What a word that is kept takes, in bytes.
#[derive(Clone)]
struct Size;

/// Finds words.
enum Splitter {
    /// An expression without its end, and one for spaces where the first finds nothing.
    Spaces(Regex),
    Other(SysRegex),
}

struct Added {
    find: AhoCorasick,
    ids: Vec<u32>,
}

// === impl Words ===

impl Words {
    /// `None` for a tokenizer of another form.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
        let composes = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let vocabulary = tokenizer.get_added_vocabulary();
        if model.dropout.is_some_and(|share| share > 0.0) || vocabulary.get_encode_special_tokens() {
            return None;
        }
        let tokens = vocabulary.get_added_tokens_decoder();
        if tokens.values().any(|token| token.single_word || token.lstrip || token.rstrip) {
            return None;
        }
        let of_kind = |normalized| Added::new(tokens.iter().filter(move |(_, token)| token.normalized == normalized));
        let added = [of_kind(false)?, of_kind(true)?];
        Some(Self {
            kept: Cache::with_weighter(KEPT_BYTES as usize / 100, KEPT_BYTES, Size),
            splitter: Splitter::new(pattern(tokenizer.get_pre_tokenizer()?)?)?,
            added: added.into_iter().filter(|added| !added.ids.is_empty()).collect(),
            alphabet: std::array::from_fn(|byte| byte_char(byte as u8)),
            composes,
            around: around(tokenizer)?,
        })
    }

    /// Tokens of a text; `None` where the library must look at it.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        add_special: bool,
    ) -> Option<tokenizers::Result<Vec<u32>>> {
        // Parts of a text in NFC are in NFC as well.
        let stays = || is_nfc_quick(text.chars()) == IsNormalized::Yes;
        if text.is_empty() || (self.composes && !stays()) {
            return None;
        }
        let mut ids = Vec::with_capacity(text.len() / 3 + 4);
        let [before, after] = &self.around;
        ids.extend(before.iter().filter(|_| add_special));
        let done = self.segment(&self.added, tokenizer, text, &mut ids);
        ids.extend(after.iter().filter(|_| add_special));
        Some(done.map(|()| ids))
    }

    /// A part of a text in which the `added` tokens may still be.
    fn segment(
        &self,
        added: &[Added],
        tokenizer: &Tokenizer,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let Some((first, rest)) = added.split_first() else { return self.split(tokenizer, text, ids) };
        let mut done = 0;
        for token in first.find.find_iter(text) {
            self.segment(rest, tokenizer, &text[done..token.start()], ids)?;
            ids.push(first.ids[token.pattern().as_usize()]);
            done = token.end();
        }
        self.segment(rest, tokenizer, &text[done..], ids)
    }

    /// A part without added tokens: the pieces that the expression finds, and what is between them.
    fn split(&self, tokenizer: &Tokenizer, text: &str, ids: &mut Vec<u32>) -> tokenizers::Result<()> {
        let mut written = String::new();
        // An expression may find a word that begins behind its end.
        let of = |start: usize, end: usize| text.get(start..end).unwrap_or_default();
        let mut piece = |start: usize, end: usize| self.piece(tokenizer, of(start, end), &mut written, ids);
        let mut done = 0;
        let mut word = |(start, end): (usize, usize)| {
            piece(done, start)?;
            piece(start, end)?;
            done = end;
            tokenizers::Result::Ok(end)
        };
        match &self.splitter {
            Splitter::Spaces(regex) => {
                let mut at = 0;
                while let Some(found) = next_word(regex, text, at) {
                    // An expression may find empty words, and the same one for ever.
                    at = word(found)?.max(at + 1);
                }
            }
            Splitter::Other(regex) => regex.find_iter(text).try_for_each(|found| word(found).map(drop))?,
        }
        piece(done, text.len())
    }

    /// The model's tokens of a piece. `written` is room for how the model has it written.
    fn piece(
        &self,
        tokenizer: &Tokenizer,
        piece: &str,
        written: &mut String,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        if let Some(kept) = self.kept.get(piece) {
            ids.extend_from_slice(&kept);
            return Ok(());
        }
        written.clear();
        written.extend(piece.bytes().map(|byte| self.alphabet[usize::from(byte)]));
        let from = ids.len();
        ids.extend(tokenizer.get_model().tokenize(written)?.iter().map(|token| token.id));
        if piece.len() <= MAX_KEPT {
            self.kept.insert(piece.into(), ids[from..].into());
        }
        Ok(())
    }
}

// === impl Size ===

impl Weighter<Box<str>, Arc<[u32]>> for Size {
    fn weight(&self, word: &Box<str>, tokens: &Arc<[u32]>) -> u64 {
        // What the two point to, with the counts of the latter, and about what their place in the cache takes.
        (word.len() + size_of_val(&**tokens) + 16 + 64) as u64
    }
}

// === impl Splitter ===

impl Splitter {
    fn new(pattern: &str) -> Option<Self> {
        let plain = pattern.strip_suffix(SPACES).and_then(|words| Regex::new_many(&[words, r"\s+"]).ok());
        match plain {
            Some(regex) => Some(Self::Spaces(regex)),
            None => Some(Self::Other(SysRegex::new(pattern).ok()?)),
        }
    }
}

/// The next word from a byte on, where [`SPACES`] has been taken off.
fn next_word(regex: &Regex, text: &str, at: usize) -> Option<(usize, usize)> {
    let found = regex.find(Input::new(text).range(at..))?;
    let (start, mut end) = (found.start(), found.end());
    if found.pattern().as_usize() == 1 && end < text.len() {
        let last = text[start..end].char_indices().next_back().map_or(0, |(last, _)| last);
        end = if last > 0 { start + last } else { end };
    }
    Some((start, end))
}

impl Added {
    fn new<'a>(tokens: impl Iterator<Item = (&'a u32, &'a AddedToken)>) -> Option<Self> {
        let (ids, texts): (Vec<u32>, Vec<&str>) = tokens.map(|(id, token)| (*id, token.content.as_str())).unzip();
        let find = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts).ok()?;
        Some(Self { find, ids })
    }
}

/// The expression that splits words; `None` where more is done to a text than that.
fn pattern(pre_tokenizer: &PreTokenizerWrapper) -> Option<&str> {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(bytes) if bytes.use_regex && !bytes.add_prefix_space => Some(GPT2),
        PreTokenizerWrapper::Sequence(steps) => match steps.as_ref() {
            [
                PreTokenizerWrapper::Split(Split {
                    pattern: SplitPattern::Regex(pattern),
                    behavior: SplitDelimiterBehavior::Isolated,
                    ..
                }),
                PreTokenizerWrapper::ByteLevel(bytes),
            ] if !bytes.use_regex && !bytes.add_prefix_space => Some(pattern),
            _ => None,
        },
        _ => None,
    }
}

/// What the tokenizer puts before a text and after it.
fn around(tokenizer: &Tokenizer) -> Option<[Vec<u32>; 2]> {
    let ids = |special| Some(tokenizer.encode_fast("a", special).ok()?.get_ids().to_vec());
    let (text, whole): (Vec<u32>, Vec<u32>) = (ids(false)?, ids(true)?);
    let at = whole.windows(text.len().max(1)).position(|part| part == text)?;
    Some([whole[..at].to_vec(), whole[at + text.len()..].to_vec()])
}

#[cfg(test)]
mod tests {
    use super::super::tests::model;
    use super::{KEPT_BYTES, MAX_KEPT};

    #[test]
    fn words_that_are_kept_are_bounded_and_have_the_same_tokens() {
        let model = model();
        let words = model.words.as_ref().expect("it is byte-level");
        let text: String = (0..60_000).map(|n| format!("hello{n} ")).collect();
        let first = model.encode(&text, false).expect("every byte has a token");
        let kept = words.kept.weight();
        assert!((KEPT_BYTES / 2..=KEPT_BYTES).contains(&kept), "{kept}");
        assert_eq!(model.encode(&text, false).expect("encodes"), first);
        assert_eq!(model.encode_as_library(&text, false).expect("encodes"), first);

        let long = "a".repeat(MAX_KEPT + 1);
        for word in [&long[1..], &long] {
            model.encode(word, false).expect("encodes");
            assert_eq!(words.kept.get(word).is_some(), word.len() <= MAX_KEPT, "{}", word.len());
        }
    }
}
