//! A tokenizer's tokens as the grammar engine wants them: a trie of their bytes, built when the first form is asked for.

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::TextModel;

/// A factory of parsers over the tokens of a model; `None` for one without a token that ends a text. Special tokens are
/// marked: no text matches them. The work grows with the vocabulary: not for a thread that serves others.
pub(super) fn factory(model: &TextModel) -> Option<ParserFactory> {
    let ends: Vec<u32> = model.stop_tokens().iter().copied().filter(|&id| id < model.vocabulary()).collect();
    let first = *ends.first()?;
    let words: Vec<Vec<u8>> = (0..model.vocabulary()).map(|id| word(model, id)).collect();
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
