//! Tokens to text, one at a time: a character is shown when its last byte has come, never in halves.
//!
//! Two ways, because tokenizers come in two kinds. Where a token is the same bytes wherever it stands (byte-level ones such as
//! GPT-2, Llama 3, Qwen and our demo; SentencePiece with byte fallback such as Llama 2, Mistral and Gemma): a table and a UTF-8
//! cursor, some 10 ns a token. The others decode in context: a short window is decoded twice and the difference shown.
//! Decoding the whole output again at every token would be simpler and quadratic.
//!
//! Of bytes that are no UTF-8 only those that cannot belong to a character become U+FFFD. Hugging Face's byte fallback gives up
//! a whole run of byte tokens for one wrong byte at its end, which no text that has been shown could follow.

use std::sync::Arc;

use tokenizers::{DecoderWrapper, Tokenizer};

use super::TextModel;

/// Most tokens that a window holds back while its text ends in the middle of a character.
const MAX_WINDOW: usize = 32;

/// Turns one generation's tokens into text.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    model: Arc<TextModel>,
    skip_special: bool,
    /// With a table: spaces that the text still loses at its start.
    leading: usize,
    /// With a table: bytes of an unfinished character.
    pending: Vec<u8>,
    /// Otherwise: recent tokens, of which the first `shown` are visible already.
    window: Vec<u32>,
    shown: usize,
}

/// The bytes of every token, in one allocation.
#[derive(Debug)]
pub(super) struct ByteTable {
    ends: Vec<u32>,
    bytes: Vec<u8>,
    /// Spaces that a text loses at its start: the tokenizer put one before the first word.
    leading: usize,
}

/// How a vocabulary writes bytes.
enum Writing {
    /// Every byte as a character.
    ByteLevel,
    /// Text with something in place of a space; `<0x0A>` is a byte.
    Pieces { space: String, leading: usize },
}

// === impl Detokenizer ===

impl Detokenizer {
    /// A detokenizer at the start of a text. `skip_special` leaves special tokens out.
    #[must_use]
    pub fn new(model: Arc<TextModel>, skip_special: bool) -> Self {
        let leading = model.bytes.as_ref().map_or(0, |table| table.leading);
        Self { model, skip_special, leading, pending: Vec::new(), window: Vec::new(), shown: 0 }
    }

    /// Takes the next token; answers the text that is complete with it.
    pub fn push(&mut self, token: u32) -> String {
        if self.skip_special && self.model.is_special(token) {
            return String::new();
        }
        match &self.model.bytes {
            Some(table) => {
                self.pending.extend_from_slice(without_leading(table.get(token), &mut self.leading));
                complete_characters(&mut self.pending)
            }
            None => self.push_window(token),
        }
    }

    /// What was held back, at the end: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        if !self.pending.is_empty() {
            self.pending.clear();
            return char::REPLACEMENT_CHARACTER.into();
        }
        let text = self.unseen(true).unwrap_or_default();
        self.window.clear();
        self.shown = 0;
        text
    }

    fn push_window(&mut self, token: u32) -> String {
        self.window.push(token);
        let Some(text) = self.unseen(self.window.len() >= MAX_WINDOW) else { return String::new() };
        self.window.drain(..self.shown);
        self.shown = self.window.len();
        text
    }

    /// Text of the window beyond what is visible; `None` while it may end in the middle of a character.
    fn unseen(&self, even_unfinished: bool) -> Option<String> {
        let visible = self.model.decode(&self.window[..self.shown], self.skip_special);
        let all = self.model.decode(&self.window, self.skip_special);
        let unfinished = all.ends_with(char::REPLACEMENT_CHARACTER) && !even_unfinished;
        // What is shown stays, also where a decoder would now write it differently.
        let changed = even_unfinished.then(|| &all[all.floor_char_boundary(visible.len())..]);
        let fresh = all.strip_prefix(&visible).or(changed)?;
        (!fresh.is_empty() && !unfinished).then(|| fresh.to_owned())
    }
}

/// What is left of the bytes of a token where the text loses up to `leading` spaces at its start.
fn without_leading<'a>(bytes: &'a [u8], leading: &mut usize) -> &'a [u8] {
    let spaces = bytes.iter().take(*leading).take_while(|byte| **byte == b' ').count();
    let rest = &bytes[spaces..];
    *leading = if rest.is_empty() { *leading - spaces } else { 0 };
    rest
}

/// Takes the complete characters out of `pending`; sequences that can never become one turn into U+FFFD.
fn complete_characters(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut used = 0;
    loop {
        match std::str::from_utf8(&pending[used..]) {
            Ok(rest) => {
                text.push_str(rest);
                pending.clear();
                return text;
            }
            Err(error) => {
                let valid = &pending[used..used + error.valid_up_to()];
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                used += valid.len();
                let Some(invalid) = error.error_len() else {
                    pending.drain(..used);
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                used += invalid;
            }
        }
    }
}

// === impl ByteTable ===

impl ByteTable {
    /// The table of a tokenizer; `None` where what a token says depends on its neighbours.
    pub(super) fn of(tokenizer: &Tokenizer, n_tokens: usize) -> Option<Self> {
        let writing = Writing::of(tokenizer.get_decoder()?)?;
        let leading = match writing {
            Writing::ByteLevel => 0,
            Writing::Pieces { leading, .. } => leading,
        };
        let mut table = Self { ends: Vec::with_capacity(n_tokens), bytes: Vec::new(), leading };
        for id in 0..n_tokens {
            let token = u32::try_from(id).ok().and_then(|id| written_token(tokenizer, id)).unwrap_or_default();
            table.bytes.extend(writing.bytes(&token));
            table.ends.push(u32::try_from(table.bytes.len()).ok()?);
        }
        Some(table)
    }

    /// The text of some tokens.
    pub(super) fn decode(&self, ids: impl Iterator<Item = u32>) -> String {
        let mut leading = self.leading;
        let bytes: Vec<u8> = ids.flat_map(|id| without_leading(self.get(id), &mut leading)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes of a token, none for an unknown one.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.ends.get(id).map_or(&[], |&end| &self.bytes[start as usize..end as usize])
    }
}

impl Writing {
    fn of(decoder: &DecoderWrapper) -> Option<Self> {
        if let DecoderWrapper::ByteLevel(_) = decoder {
            return Some(Self::ByteLevel);
        }
        // The decoders keep their fields to themselves; their JSON does not.
        let json = serde_json::to_value(decoder).ok()?;
        let steps = json["decoders"].as_array()?;
        let (steps, leading) = match steps.split_last() {
            Some((strip, rest)) if strip["type"] == "Strip" => {
                let spaces = strip["content"] == " " && strip["stop"] == 0;
                (rest, spaces.then(|| strip["start"].as_u64())??)
            }
            _ => (&steps[..], 0),
        };
        let [replace, fallback, fuse] = steps else { return None };
        let plain = replace["type"] == "Replace" && replace["content"] == " ";
        let (fallback, fuse) = (fallback["type"] == "ByteFallback", fuse["type"] == "Fuse");
        let space = replace["pattern"]["String"].as_str().filter(|_| plain && fallback && fuse)?.to_owned();
        Some(Self::Pieces { space, leading: usize::try_from(leading).ok()? })
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                token.chars().map(char_byte).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::Pieces { space, .. } => piece_bytes(token, space),
        }
    }
}

/// The bytes of a token that is text with something in place of a space, or `<0x0A>`.
fn piece_bytes(token: &str, space: &str) -> Vec<u8> {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|hex| hex.len() == 2);
    let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
    byte.map_or_else(|| token.replace(space, " ").into_bytes(), |byte| vec![byte])
}

/// A token as the vocabulary writes it; added tokens rule.
fn written_token(tokenizer: &Tokenizer, id: u32) -> Option<String> {
    tokenizer.get_added_vocabulary().simple_id_to_token(id).or_else(|| tokenizer.id_to_token(id))
}

/// The bytes of one token of a tokenizer that is not byte-level: `<0x0A>` is a byte, U+2581 a space.
pub(super) fn single_token(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    piece_bytes(&written_token(tokenizer, id).unwrap_or_default(), "\u{2581}")
}

/// Bytes that byte-level vocabularies write as the character of the same number: the visible ones of Latin-1.
fn is_visible(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// The byte behind a character of a byte-level vocabulary: the n-th invisible byte is written as U+0100 + n.
fn char_byte(c: char) -> Option<u8> {
    match u8::try_from(u32::from(c)) {
        Ok(byte) => is_visible(byte).then_some(byte),
        Err(_) => {
            let nth = usize::try_from(u32::from(c) - 0x100).ok()?;
            (0..=255u8).filter(|&b| !is_visible(b)).nth(nth)
        }
    }
}

/// The character that writes a byte; the inverse of [`char_byte`].
pub(super) fn byte_char(byte: u8) -> char {
    let nth = || (0..byte).filter(|&before| !is_visible(before)).count();
    if is_visible(byte) { byte.into() } else { char::from_u32(0x100 + nth() as u32).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::TextFiles;
    use crate::text::tests::model;
    use proptest::prelude::*;

    /// A tokenizer of the SentencePiece kind: words, spaces as U+2581, byte fallback.
    fn sentencepiece() -> TextModel {
        let mut vocab = serde_json::Map::new();
        for byte in 0..=255u8 {
            vocab.insert(format!("<0x{byte:02X}>"), byte.into());
        }
        for (id, word) in (256..).zip(["\u{2581}hello", "\u{2581}world", "!", "\u{2581}", "\u{e9}", "a"]) {
            vocab.insert(word.into(), id.into());
        }
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        let tokenizer = tokenizer.to_string();
        TextModel::from_files(&TextFiles { tokenizer: tokenizer.as_bytes(), ..TextFiles::default() })
            .expect("good parts")
    }

    fn stream(model: &Arc<TextModel>, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(model), skip_special);
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    #[test]
    fn a_character_is_never_halved() {
        let model = Arc::new(model());
        let crab: Vec<u32> = "\u{1f980}".bytes().map(|b| u32::from(b) + 3).collect();
        assert_eq!(stream(&model, &crab, true), ["", "", "", "\u{1f980}", ""]);
        assert_eq!(stream(&model, &crab[..2], true), ["", "", "\u{fffd}"]);
        assert_eq!(stream(&model, &[0, 262, 2], true), ["", "hello", "", ""]);
        assert_eq!(stream(&model, &[262, 2], false), ["hello", "<|x|>", ""]);
        assert_eq!(stream(&model, &[9_999], true), ["", ""]);
    }

    #[test]
    fn pieces_lose_the_space_before_the_first_word() {
        let model = Arc::new(sentencepiece());
        assert_eq!(stream(&model, &[256, 257, 258], true), ["hello", " world", "!", ""]);
        let crab: Vec<u32> = "\u{1f980}".bytes().map(u32::from).collect();
        assert_eq!(stream(&model, &crab, true), ["", "", "", "\u{1f980}", ""]);
        // A wrong byte costs no character before it.
        let broken = [&crab[..], &[0xff, 259, 0xe9]].concat();
        assert_eq!(stream(&model, &broken, true), ["", "", "", "\u{1f980}", "\u{fffd}", " ", "", "\u{fffd}"]);
        assert_eq!(stream(&model, &[259, 259, 261], true), ["", " ", "a", ""]);
        assert_eq!(model.token_bytes(256), b" hello");
        assert_eq!(model.token_bytes(0x0a), b"\n");
    }

    proptest! {
        #[test]
        fn byte_level_pieces_are_the_whole(ids in prop::collection::vec(0u32..264, 0..40), skip in any::<bool>()) {
            let model = Arc::new(model());
            prop_assert_eq!(stream(&model, &ids, skip).concat(), model.decode(&ids, skip));
        }

        #[test]
        fn sentencepiece_pieces_are_the_whole(text in "[a\u{e9}\u{1f980}!]{1,12}") {
            let model = Arc::new(sentencepiece());
            let ids: Vec<u32> = text.chars().flat_map(|c| match c {
                '!' => vec![258],
                'a' => vec![261],
                '\u{e9}' => vec![260],
                other => other.to_string().bytes().map(u32::from).collect(),
            }).collect();
            prop_assert_eq!(stream(&model, &ids, true).concat(), model.decode(&ids, true));
        }
    }
}
