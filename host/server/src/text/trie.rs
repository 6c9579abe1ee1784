//! A tokenizer's tokens as the grammar engine wants them: a trie of their bytes, built when the first form is asked for.

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::TextModel;

/// Bytes of the longest token that the trie can hold, the mark of a special one included.
const MAX_WORD: usize = 1_023;

/// A factory of parsers over the tokens of a model; `None` for one without a token that ends a text. Special tokens are
/// marked: no text matches them. The work grows with the vocabulary: not for a thread that serves others.
pub(super) fn factory(model: &TextModel) -> Option<ParserFactory> {
    let ends: Vec<u32> = model.stop_tokens().iter().copied().filter(|&id| id < model.vocabulary()).collect();
    let first = *ends.first()?;
    let mut words: Vec<Vec<u8>> = (0..model.vocabulary()).map(|id| word(model, id)).collect();
    let too_long = words.iter_mut().filter(|word| word.len() > MAX_WORD);
    // Without bytes no text matches them.
    let n_left_out = too_long.map(Vec::clear).count();
    if n_left_out > 0 {
        tracing::warn!(n_left_out, "tokens of more than {MAX_WORD} bytes are not used in texts that must have a form");
    }
    let trie = TokTrie::from(&TokRxInfo::new(model.vocabulary(), first), &words).with_eos_tokens(&ends);
    let env: TokEnv = std::sync::Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::json_slices();
    let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
    factory.inspect_err(|error| tracing::error!(%error, "the trie of a tokenizer cannot be built")).ok()
}

fn word(model: &TextModel, id: u32) -> Vec<u8> {
    let bytes = model.token_bytes(id);
    match (model.is_special(id), bytes.first()) {
        (true, _) => [&[TokTrie::SPECIAL_TOKEN_MARKER], &*bytes].concat(),
        // No UTF-8 begins with this byte, and the engine would take it for its mark.
        (false, Some(&TokTrie::SPECIAL_TOKEN_MARKER)) => Vec::new(),
        (false, _) => bytes,
    }
}
