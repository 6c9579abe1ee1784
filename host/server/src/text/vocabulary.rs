//! A tokenizer from the vocabulary of a GGUF file: what `tokenizer.json` says in words, the file says by two names.
//!
//! `tokenizer.ggml.model` names the algorithm, `tokenizer.ggml.pre` how a text is cut beforehand: the tables here. The result is what
//! the model's own `tokenizer.json` would give. The lists come from a file that nobody has checked, so all of them are bounded.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::{AddedToken, Tokenizer};

/// Tokens and merges that a vocabulary may have.
const MAX_TOKENS: usize = 1 << 20;
const MAX_MERGES: usize = 1 << 21;

/// Bytes of a token that may come out of two others.
const MAX_JOINED: usize = 512;

/// Tokens that end a turn, whatever else a file says: many files name only the one that ends a document.
const ENDS: [&str; 8] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>"];

/// What a GGUF file says about its tokenizer.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary<'a> {
    /// `gpt2`: byte-level merges; `llama`: SentencePiece's.
    pub model: Cow<'a, str>,
    /// How text is cut before it is merged; for `gpt2`.
    pub pre: Cow<'a, str>,
    /// By id.
    pub tokens: Vec<Cow<'a, str>>,
    /// By id: 1 plain, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte. None means all plain.
    pub kinds: Vec<i64>,
    /// By id; for `llama`.
    pub scores: Vec<f64>,
    /// Pairs with a space between them, best first; for `gpt2`.
    pub merges: Vec<Cow<'a, str>>,
    /// The token at the start of a text.
    pub bos: Option<u32>,
    /// The token at its end.
    pub eos: Option<u32>,
    /// More tokens that end a generation.
    pub ends: Vec<u32>,
    /// The token for what has none.
    pub unknown: Option<u32>,
    /// Whether a text gets the first; each kind of tokenizer has a default.
    pub add_bos: Option<bool>,
    /// Whether a text gets the last.
    pub add_eos: bool,
    /// Whether a text gets a space before it; for `llama`, where it does unless this says no.
    pub add_space: Option<bool>,
}

/// Why a vocabulary cannot be used. The file's fault.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    /// An algorithm that is not implemented.
    #[error("tokenizer.ggml.model = {0:?} is not supported; supported: gpt2, llama")]
    Model(String),
    /// A way to cut text that is not known.
    #[error("tokenizer.ggml.pre = {found:?} is not supported; supported: {supported}")]
    Pre {
        /// The name.
        found: String,
        /// Those that are.
        supported: String,
    },
    /// A list of the wrong length.
    #[error("{key} has {found} entries; there must be {expected}")]
    Length {
        /// Which list.
        key: &'static str,
        /// Its length.
        found: usize,
        /// What it must be.
        expected: String,
    },
    /// An id without a token.
    #[error("{key} = {id} names no token; there are {tokens}")]
    Id {
        /// Which key.
        key: &'static str,
        /// The id.
        id: u32,
        /// Number of tokens.
        tokens: usize,
    },
    /// A merge of tokens that are not there.
    #[error("tokenizer.ggml.merges has {0:?}; it must be two tokens with a space between them that make a third")]
    Merge(String),
    /// A score that is no number.
    #[error("tokenizer.ggml.scores has {score} for token {id}")]
    Score {
        /// The id.
        id: usize,
        /// The score.
        score: f64,
    },
    /// The tokenizer cannot be put together.
    #[error("the tokenizer cannot be made from the file's metadata: {0}")]
    Build(#[source] tokenizers::Error),
}

/// How a byte-level tokenizer cuts text.
struct Pre {
    names: &'static [&'static str],
    cut: Cut,
    /// Whether a piece that is a token stays whole, whatever the merges say.
    whole: bool,
    add_bos: bool,
}

#[derive(Clone, Copy)]
enum Cut {
    /// As GPT-2, and each digit by itself or not.
    Gpt2 { digits: bool },
    /// By an expression; `compose` to NFC beforehand.
    By { pattern: &'static str, compose: bool },
}

const LLAMA_3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN_2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const PRES: [Pre; 7] = [
    Pre { names: &["default", "gpt-2", "phi-2"], cut: Cut::Gpt2 { digits: false }, whole: false, add_bos: false },
    Pre { names: &["smollm", "starcoder"], cut: Cut::Gpt2 { digits: true }, whole: false, add_bos: false },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        cut: Cut::By { pattern: LLAMA_3, compose: false },
        whole: true,
        add_bos: true,
    },
    Pre {
        names: &["smaug-bpe", "dbrx"],
        cut: Cut::By { pattern: LLAMA_3, compose: false },
        whole: false,
        add_bos: false,
    },
    Pre { names: &["qwen2"], cut: Cut::By { pattern: QWEN_2, compose: true }, whole: false, add_bos: false },
    Pre {
        names: &["deepseek-r1-qwen"],
        cut: Cut::By { pattern: QWEN_2, compose: false },
        whole: false,
        add_bos: false,
    },
    Pre { names: &["tekken"], cut: Cut::By { pattern: TEKKEN, compose: false }, whole: true, add_bos: true },
];

// === impl Vocabulary ===

impl Vocabulary<'_> {
    /// The text of a token.
    pub(super) fn text(&self, id: Option<u32>) -> Option<&str> {
        self.tokens.get(id? as usize).map(|token| &**token)
    }

    /// Tokens that end a generation.
    pub(super) fn stop_tokens(&self) -> Vec<u32> {
        let named = self.eos.iter().chain(&self.ends).copied();
        let by_text = (0..).zip(&self.tokens).filter(|(_, token)| ENDS.contains(&&***token)).map(|(id, _)| id);
        named.chain(by_text).collect()
    }

    /// The tokenizer.
    pub(super) fn tokenizer(&self) -> Result<Tokenizer, VocabularyError> {
        self.check()?;
        let vocab: HashMap<&str, u32> = self.tokens.iter().map(|token| &**token).zip(0..).collect();
        let (model, parts) = match &*self.model {
            "gpt2" => self.byte_level(&vocab)?,
            "llama" => self.sentencepiece(&vocab)?,
            other => return Err(VocabularyError::Model(other.to_owned())),
        };
        let build = |error: serde_json::Error| VocabularyError::Build(error.into());
        let mut tokenizer: Tokenizer = serde_json::from_value(parts).map_err(build)?;
        tokenizer.with_model(model);
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| match self.kinds.get(id) {
            _ if token.is_empty() => None,
            Some(2 | 3) => Some(AddedToken::from(&**token, true)),
            Some(4) => Some(AddedToken::from(&**token, false).normalized(false)),
            _ => None,
        });
        tokenizer.add_tokens(added).map_err(VocabularyError::Build)?;
        Ok(tokenizer)
    }

    /// Every length and every id.
    fn check(&self) -> Result<(), VocabularyError> {
        let n = self.tokens.len();
        let length = |key, found, expected: String| Err(VocabularyError::Length { key, found, expected });
        if n == 0 || n > MAX_TOKENS {
            return length("tokenizer.ggml.tokens", n, format!("1 to {MAX_TOKENS}"));
        }
        if !self.kinds.is_empty() && self.kinds.len() != n {
            return length("tokenizer.ggml.token_type", self.kinds.len(), format!("as many as tokens, {n}"));
        }
        if self.merges.len() > MAX_MERGES {
            return length("tokenizer.ggml.merges", self.merges.len(), format!("at most {MAX_MERGES}"));
        }
        let ids = [
            ("tokenizer.ggml.bos_token_id", self.bos),
            ("tokenizer.ggml.eos_token_id", self.eos),
            ("tokenizer.ggml.unknown_token_id", self.unknown),
        ];
        let ends = self.ends.iter().map(|&id| ("tokenizer.ggml.eot_token_id", Some(id)));
        match ids.into_iter().chain(ends).find_map(|(key, id)| id.filter(|&id| id as usize >= n).map(|id| (key, id))) {
            Some((key, id)) => Err(VocabularyError::Id { key, id, tokens: n }),
            None => Ok(()),
        }
    }

    /// GPT-2's kind: bytes written as characters, merges in the order of the file.
    fn byte_level(&self, vocab: &HashMap<&str, u32>) -> Result<(BPE, Value), VocabularyError> {
        let unknown = || VocabularyError::Pre {
            found: self.pre.clone().into_owned(),
            supported: PRES.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", "),
        };
        let pre = PRES.iter().find(|pre| pre.names.contains(&&*self.pre)).ok_or_else(unknown)?;
        let merge = |merge: &Cow<'_, str>| {
            let pair = merge.split_once(' ').filter(|(a, b)| {
                [a, b].iter().all(|part| vocab.contains_key(**part)) && vocab.contains_key(&*format!("{a}{b}"))
            });
            let pair = pair.map(|(a, b)| (a.to_owned(), b.to_owned()));
            pair.ok_or_else(|| VocabularyError::Merge(merge.chars().take(100).collect()))
        };
        let merges = self.merges.iter().map(merge).collect::<Result<Merges, _>>()?;
        let bytes = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let (cuts, compose) = match pre.cut {
            Cut::Gpt2 { digits: false } => (vec![bytes(true)], false),
            Cut::Gpt2 { digits: true } => {
                (vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)], false)
            }
            Cut::By { pattern, compose } => {
                let pattern = json!({"Regex": pattern});
                let split = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
                (vec![split, bytes(false)], compose)
            }
        };
        let parts = json!({
            "normalizer": compose.then(|| json!({"type": "NFC"})),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
            "decoder": bytes(true),
        });
        let model = BPE::builder().vocab_and_merges(owned(vocab), merges).ignore_merges(pre.whole);
        Ok((model.build().map_err(VocabularyError::Build)?, self.with_ends(parts, pre.add_bos)))
    }

    /// SentencePiece's kind: every token that two others make is a merge, the best score first.
    fn sentencepiece(&self, vocab: &HashMap<&str, u32>) -> Result<(BPE, Value), VocabularyError> {
        let n = self.tokens.len();
        if self.scores.len() != n {
            let (key, found) = ("tokenizer.ggml.scores", self.scores.len());
            return Err(VocabularyError::Length { key, found, expected: format!("as many as tokens, {n}") });
        }
        if let Some((id, &score)) = self.scores.iter().enumerate().find(|(_, score)| !score.is_finite()) {
            return Err(VocabularyError::Score { id, score });
        }
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate().filter(|(_, token)| token.len() <= MAX_JOINED) {
            let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let known = splits.filter(|(a, b)| vocab.contains_key(a) && vocab.contains_key(b));
            merges.extend(known.map(|(a, b)| (self.scores[id], a, b)));
            if merges.len() > MAX_MERGES {
                let (key, expected) = ("tokenizer.ggml.tokens", format!("tokens that make at most {MAX_MERGES} pairs"));
                return Err(VocabularyError::Length { key, found: n, expected });
            }
        }
        // Of equal scores the longer parts first, as Hugging Face's converter has them.
        let widths = |(_, a, b): &(f64, &str, &str)| (a.chars().count(), b.chars().count());
        merges.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| widths(y).cmp(&widths(x))));
        let merges = merges.into_iter().map(|(_, a, b)| (a.to_owned(), b.to_owned())).collect();
        let model = BPE::builder().vocab_and_merges(owned(vocab), merges).byte_fallback(true).fuse_unk(true);
        let model = match self.text(self.unknown) {
            Some(unknown) => model.unk_token(unknown.to_owned()),
            None => model,
        };
        let space = self.add_space.unwrap_or(true);
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut before = vec![replace(" ", "\u{2581}")];
        let mut after = vec![replace("\u{2581}", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if space {
            before.insert(0, json!({"type": "Prepend", "prepend": "\u{2581}"}));
            after.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let parts = json!({
            "normalizer": {"type": "Sequence", "normalizers": before},
            "decoder": {"type": "Sequence", "decoders": after},
        });
        Ok((model.build().map_err(VocabularyError::Build)?, self.with_ends(parts, true)))
    }

    /// The parts of a tokenizer, with the tokens that stand around a text; the model is put in afterwards.
    fn with_ends(&self, mut parts: Value, add_bos: bool) -> Value {
        let bos = self.text(self.bos).filter(|_| self.add_bos.unwrap_or(add_bos)).zip(self.bos);
        let eos = self.text(self.eos).filter(|_| self.add_eos).zip(self.eos);
        let piece = |end: Option<(&str, u32)>| end.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": 0}}));
        let around = |kind: u8, sequence: &str| -> Vec<Value> {
            let sequence = json!({"Sequence": {"id": sequence, "type_id": kind}});
            piece(bos).into_iter().chain([sequence]).chain(piece(eos)).collect()
        };
        let special =
            |(text, id): (&str, u32)| (String::from(text), json!({"id": text, "ids": [id], "tokens": [text]}));
        let specials: serde_json::Map<_, _> = bos.into_iter().chain(eos).map(special).collect();
        if !specials.is_empty() {
            let pair = [around(0, "A"), around(1, "B")].concat();
            parts["post_processor"] = json!({"type": "TemplateProcessing", "single": around(0, "A"), "pair": pair,
                "special_tokens": specials});
        }
        parts["model"] = json!({"type": "BPE", "vocab": {}, "merges": []});
        parts["version"] = "1.0".into();
        parts
    }
}

fn owned(vocab: &HashMap<&str, u32>) -> Vocab {
    vocab.iter().map(|(token, id)| ((*token).to_owned(), *id)).collect()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::text::{TextFiles, TextModel};

    #[derive(Deserialize)]
    struct Golden {
        vocabulary: Lists,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Lists {
        model: String,
        tokens: Vec<String>,
        kinds: Vec<i64>,
        scores: Vec<f64>,
        merges: Vec<String>,
        bos: u32,
        eos: u32,
        unknown: Option<u32>,
    }

    #[derive(Deserialize)]
    struct Case {
        pre: String,
        text: String,
        ids: Vec<u32>,
    }

    fn goldens() -> HashMap<String, Golden> {
        serde_json::from_str(include_str!("goldens/vocabulary.json")).expect("written by make.py")
    }

    impl Lists {
        fn vocabulary<'a>(&'a self, pre: &'a str) -> Vocabulary<'a> {
            Vocabulary {
                model: (&*self.model).into(),
                pre: pre.into(),
                tokens: self.tokens.iter().map(|token| token.into()).collect(),
                kinds: self.kinds.clone(),
                scores: self.scores.clone(),
                merges: self.merges.iter().map(|merge| merge.into()).collect(),
                bos: Some(self.bos),
                eos: Some(self.eos),
                unknown: self.unknown,
                ..Vocabulary::default()
            }
        }
    }

    fn model(vocabulary: &Vocabulary<'_>) -> TextModel {
        TextModel::from_files(&TextFiles { vocabulary: Some(vocabulary), ..TextFiles::default() }).expect("good parts")
    }

    #[test]
    fn awkward_strings_have_the_tokens_of_the_original_libraries() {
        for (name, Golden { vocabulary, cases }) in goldens() {
            assert!(cases.len() > 10, "{name}");
            for Case { pre, text, ids } in cases {
                let model = model(&vocabulary.vocabulary(&pre));
                let found = model.encode(&text, true).expect("every byte has a token");
                assert_eq!(found, ids, "{name} {pre}: {text:?}");
                // NFC is not undone, and a special token swallows the space that SentencePiece puts before what follows it.
                if pre != "qwen2" && !(name == "spm" && text.contains('<')) {
                    assert_eq!(model.decode(&found, true), text.replace("<s>", "").replace("</s>", ""), "{name} {pre}");
                }
            }
        }
    }

    #[test]
    fn ends_and_starts_are_those_of_the_file() {
        let goldens = goldens();
        let lists = &goldens["bytes"].vocabulary;
        let plain = lists.vocabulary("gpt-2");
        let around = Vocabulary { add_bos: Some(true), add_eos: true, ..plain.clone() };
        let found = model(&around).encode("x", true).expect("encodes");
        assert_eq!((found.first(), found.last(), found.len()), (Some(&0), Some(&1), 3));
        let bare = Vocabulary { add_bos: Some(false), ..lists.vocabulary("llama-bpe") };
        assert_eq!(model(&bare).encode("x", true).expect("encodes").len(), 1);
        let ends = Vocabulary { ends: vec![2], ..plain.clone() };
        assert_eq!(**model(&ends).stop_tokens(), [1, 2]);
        let mut tokens = plain.tokens.clone();
        tokens[300] = "<|im_end|>".into();
        let merges = Vec::new();
        assert_eq!(**model(&Vocabulary { tokens, merges, ..plain }).stop_tokens(), [1, 300]);
        let spm = goldens["spm"].vocabulary.vocabulary("default");
        let bare = Vocabulary { add_space: Some(false), add_bos: Some(false), ..spm.clone() };
        let text = model(&bare).encode("policy", true).expect("encodes");
        assert_ne!(text, model(&spm).encode("policy", false).expect("encodes"));
        assert_eq!(model(&bare).decode(&text, true), "policy");
    }

    #[test]
    fn vocabularies_that_cannot_be_used_say_why() {
        type Break = fn(&mut Vocabulary<'_>);
        let goldens = goldens();
        let cases: [(&str, Break, &str); 11] = [
            ("bytes", |v| v.model = "bert".into(), "tokenizer.ggml.model = \"bert\" is not supported"),
            (
                "bytes",
                |v| v.pre = "viking".into(),
                "tokenizer.ggml.pre = \"viking\" is not supported; supported: default",
            ),
            ("bytes", |v| v.tokens.clear(), "tokenizer.ggml.tokens has 0 entries"),
            ("bytes", |v| v.kinds.truncate(399), "tokenizer.ggml.token_type has 399 entries; there must be as many as"),
            ("bytes", |v| v.merges = vec!["a".into(); MAX_MERGES + 1], "tokenizer.ggml.merges has 2097153 entries"),
            ("bytes", |v| v.merges.push("ab".into()), "tokenizer.ggml.merges has \"ab\"; it must be two tokens"),
            // Longer than every token: the library would write beyond its buffer.
            ("bytes", |v| v.merges.push("\u{120}policies \u{120}policies".into()), "tokenizer.ggml.merges has"),
            ("bytes", |v| v.bos = Some(400), "tokenizer.ggml.bos_token_id = 400 names no token; there are 400"),
            ("bytes", |v| v.ends = vec![9_999], "tokenizer.ggml.eot_token_id = 9999 names no token"),
            ("spm", |v| v.scores.truncate(419), "tokenizer.ggml.scores has 419 entries"),
            ("spm", |v| v.scores[7] = f64::NAN, "tokenizer.ggml.scores has NaN for token 7"),
        ];
        for (name, change, expect) in cases {
            let mut vocabulary = goldens[name].vocabulary.vocabulary("gpt-2");
            change(&mut vocabulary);
            let parts = TextFiles { vocabulary: Some(&vocabulary), ..TextFiles::default() };
            let error = TextModel::from_files(&parts).expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
