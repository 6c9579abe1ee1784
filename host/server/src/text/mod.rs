//! A model's text side: tokenizer, chat template, stop tokens and default sampling, read once from its files.
//!
//! The rest of the server sees token ids and UTF-8 pieces. Built from bytes, not from paths: reading files is the app's
//! job, and the demo model is embedded. The variants of one alias share a `TextModel`, because a prompt is tokenized
//! before the router has chosen among them.

mod detokenize;
#[cfg(test)]
mod parity;
mod stop;
mod strftime;
mod template;
mod trie;
mod vocabulary;
mod words;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use llguidance::ParserFactory;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::{ModelWrapper, PostProcessor as _, Tokenizer, TruncationDirection};

pub use self::detokenize::Detokenizer;
pub use self::stop::StopMatcher;
pub use self::template::{ChatMessage, TemplateError, ToolStyle};
pub use self::vocabulary::{Vocabulary, VocabularyError};

use self::detokenize::ByteTable;
use self::template::ChatTemplate;
use self::words::Words;

/// How a conversation is written where only its length counts.
const ESTIMATE_TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}";

/// The files of a model that concern text.
#[derive(Clone, Copy, Debug, Default)]
pub struct TextFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// What takes its place in a GGUF file.
    pub vocabulary: Option<&'a Vocabulary<'a>>,
    /// `tokenizer_config.json`: chat template, names of the special tokens.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `generation_config.json`: sampling defaults, more stop tokens.
    pub generation_config: Option<&'a [u8]>,
    /// `chat_template.jinja`; wins over the template in `tokenizer_config.json`.
    pub chat_template: Option<&'a str>,
    /// `eos_token_id` of `config.json`.
    pub eos_token_ids: &'a [u32],
}

/// Why a model's text files cannot be used. The operator's fault, found at load.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` is not one.
    #[error("tokenizer.json cannot be read: {0}")]
    Tokenizer(#[source] tokenizers::Error),
    /// The vocabulary of a GGUF file is not one.
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
    /// A JSON file is malformed.
    #[error("{file} cannot be read: {source}")]
    Json {
        /// Which one.
        file: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The chat template does not compile.
    #[error("the chat template does not compile: {0:#}")]
    Template(#[source] minijinja::Error),
}

/// Why a client's text cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The model has no chat template.
    #[error("this model has no chat template; use /v1/completions")]
    NoTemplate,
    /// The template refused the messages.
    #[error("the model's chat template refused the messages: {0}")]
    Template(#[from] TemplateError),
    /// The tokenizer failed.
    #[error("the text cannot be tokenized: {0}")]
    Tokenizer(#[source] tokenizers::Error),
}

/// Sampling values that hold where a request names none.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 1 unless the model says otherwise; 0 for a model that says `do_sample: false`.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 drops none.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// Tokens that a chat answer has at most when the request does not say.
    pub max_new_tokens: Option<u32>,
}

/// Tokenizer, template, stop tokens and sampling defaults of one model.
pub struct TextModel {
    tokenizer: Tokenizer,
    words: Option<Words>,
    bytes: Option<ByteTable>,
    special: Vec<bool>,
    template: Option<ChatTemplate>,
    stop_tokens: Arc<[u32]>,
    defaults: SamplingDefaults,
    /// What grammars are compiled with; empty until one is asked for.
    grammars: OnceLock<Option<ParserFactory>>,
    /// Whether it has no tokenizer: lengths are guessed from bytes.
    is_estimate: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Option<Value>,
    eos_token: Option<Value>,
    /// Whatever else there is; templates know the special tokens by these names.
    #[serde(flatten)]
    others: serde_json::Map<String, Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct GenerationConfig {
    eos_token_id: Option<Value>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<u32>,
}

// === impl TextModel ===

impl std::fmt::Debug for TextModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tokenizer: _, words, bytes, special, template, stop_tokens, defaults, grammars: _, is_estimate } =
            self;
        f.debug_struct("TextModel")
            .field("words", &words.is_some())
            .field("byte_level", &bytes.is_some())
            .field("vocabulary", &special.len())
            .field("template", &template.is_some())
            .field("stop_tokens", stop_tokens)
            .field("defaults", defaults)
            .field("is_estimate", is_estimate)
            .finish_non_exhaustive()
    }
}

impl TextModel {
    /// Reads a model's text files.
    ///
    /// # Errors
    /// Names the file that cannot be used.
    pub fn from_files(parts: &TextFiles<'_>) -> Result<Self, TextError> {
        let mut tokenizer = match parts.vocabulary {
            Some(vocabulary) => vocabulary.tokenizer()?,
            None => Tokenizer::from_bytes(parts.tokenizer).map_err(TextError::Tokenizer)?,
        };
        // Some files keep what their training did: every text cut and padded to one length.
        tokenizer.with_padding(None).with_truncation(None).map_err(TextError::Tokenizer)?;
        keep_no_words(&mut tokenizer);
        let config: TokenizerConfig = json("tokenizer_config.json", parts.tokenizer_config)?;
        let generation: GenerationConfig = json("generation_config.json", parts.generation_config)?;
        let special = special_tokens(&tokenizer);
        let ends = parts.vocabulary.map(|v| (v.text(v.bos), v.text(v.eos), v.stop_tokens()));
        let (bos, eos, ends) = ends.unwrap_or_default();
        let eos = config.eos_token.as_ref().and_then(token_text).or_else(|| eos.map(str::to_owned)).unwrap_or_default();
        let named = config.others.iter().filter(|(name, _)| name.ends_with("_token"));
        let mut tokens: BTreeMap<String, String> =
            named.filter_map(|(name, token)| Some((name.clone(), token_text(token)?))).collect();
        tokens.insert("eos_token".to_owned(), eos.clone());
        tokens.entry("bos_token".to_owned()).or_insert_with(|| bos.unwrap_or_default().to_owned());
        let source = parts.chat_template.map(str::to_owned).or_else(|| config.chat_template.and_then(template_source));
        let template = source.map(|source| ChatTemplate::new(&source, tokens)).transpose();
        let mut stop_tokens = parts.eos_token_ids.to_vec();
        stop_tokens.extend(generation.eos_token_id.as_ref().map(token_ids).unwrap_or_default());
        stop_tokens.extend(tokenizer.token_to_id(&eos));
        stop_tokens.extend(ends);
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Ok(Self {
            bytes: ByteTable::of(&tokenizer, special.len()),
            special,
            template: template.map_err(TextError::Template)?,
            stop_tokens: stop_tokens.into(),
            defaults: generation.defaults(),
            grammars: OnceLock::new(),
            words: Words::of(&tokenizer),
            tokenizer,
            is_estimate: false,
        })
    }

    /// That of a model which is served elsewhere alone: a token for every four bytes, which are its id. So lengths are about
    /// right for text in English, and equal beginnings have equal tokens.
    ///
    /// # Errors
    /// None that a build which passes its tests has.
    pub fn estimate() -> Result<Self, TextError> {
        let template = ChatTemplate::new(ESTIMATE_TEMPLATE, BTreeMap::new()).map_err(TextError::Template)?;
        Ok(Self {
            tokenizer: Tokenizer::new(BPE::default()),
            words: None,
            bytes: None,
            special: Vec::new(),
            template: Some(template),
            stop_tokens: Arc::default(),
            defaults: GenerationConfig::default().defaults(),
            grammars: OnceLock::new(),
            is_estimate: true,
        })
    }

    /// Whether its lengths are guesses and its ids mean nothing.
    #[must_use]
    pub fn is_estimate(&self) -> bool {
        self.is_estimate
    }

    /// Number of token ids, added tokens included.
    #[must_use]
    pub fn vocabulary(&self) -> u32 {
        if self.is_estimate {
            return u32::MAX;
        }
        u32::try_from(self.special.len()).unwrap_or(u32::MAX)
    }

    /// Whether every text and conversation comes to the same tokens by both, and ends at the same ones: then variants of one
    /// alias may share either. Compares all of them; for loads, not for requests.
    #[must_use]
    pub fn reads_as(&self, other: &Self) -> bool {
        let same_template = match (&self.template, &other.template) {
            (Some(ours), Some(theirs)) => ours.is_like(theirs),
            (ours, theirs) => ours.is_none() && theirs.is_none(),
        };
        let written = |model: &Self| model.tokenizer.to_string(false).ok();
        same_template && self.stop_tokens == other.stop_tokens && written(self) == written(other)
    }

    /// Whether every token means the same to both: then one may draft for the other. Compares all of them; for loads.
    #[must_use]
    pub fn has_tokens_of(&self, other: &Self) -> bool {
        let written = |model: &Self| model.tokenizer.to_string(false).ok();
        written(self) == written(other)
    }

    /// Tokens that end a generation, ascending.
    #[must_use]
    pub fn stop_tokens(&self) -> &Arc<[u32]> {
        &self.stop_tokens
    }

    /// What holds where a request names no value.
    #[must_use]
    pub fn defaults(&self) -> &SamplingDefaults {
        &self.defaults
    }

    /// Tokenizes text. `add_special` adds what the tokenizer puts around a plain text, such as a bos token.
    ///
    /// # Errors
    /// The tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        if self.is_estimate {
            return Ok(text.as_bytes().chunks(4).map(quad).collect());
        }
        let words = self.words.as_ref().and_then(|words| words.encode(&self.tokenizer, text, add_special));
        words.unwrap_or_else(|| self.encode_as_library(text, add_special)).map_err(EncodeError::Tokenizer)
    }

    fn encode_as_library(&self, text: &str, add_special: bool) -> tokenizers::Result<Vec<u32>> {
        Ok(self.tokenizer.encode_fast(text, add_special)?.get_ids().to_vec())
    }

    /// As [`encode`](Self::encode) with what the tokenizer puts around a text, and no longer than `limit` tokens with it: the
    /// end of a longer text is left out.
    ///
    /// # Errors
    /// The tokenizer has no token for a part of the text.
    pub fn encode_cut(&self, text: &str, limit: usize) -> Result<Vec<u32>, EncodeError> {
        if self.is_estimate {
            return Ok(text.as_bytes().chunks(4).take(limit).map(quad).collect());
        }
        let around = self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        let mut encoding = self.tokenizer.encode_fast(text, false).map_err(EncodeError::Tokenizer)?;
        encoding.truncate(limit.saturating_sub(around), 0, TruncationDirection::Right);
        let encoding = self.tokenizer.post_process(encoding, None, true).map_err(EncodeError::Tokenizer)?;
        Ok(encoding.get_ids()[..encoding.len().min(limit)].to_vec())
    }

    /// Renders a conversation as the prompt that the model was trained on; tokenize it without special tokens. `now`, in Unix
    /// seconds, is what a template that asks for the date gets.
    ///
    /// # Errors
    /// The model has no template, or its template refuses the messages.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        extra: Option<&serde_json::Map<String, Value>>,
        now: u64,
    ) -> Result<String, EncodeError> {
        let template = self.template.as_ref().ok_or(EncodeError::NoTemplate)?;
        Ok(template.render(messages, add_generation_prompt, extra, now)?)
    }

    /// The whole text of some tokens; invalid UTF-8 becomes U+FFFD. Unknown ids are left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        match &self.bytes {
            Some(table) => table.decode(ids.iter().copied().filter(|id| !skip_special || !self.is_special(*id))),
            None => self.tokenizer.decode(ids, skip_special).unwrap_or_default(),
        }
    }

    /// The bytes of one token, for `logprobs`; a part of a character is a valid answer.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.bytes {
            Some(table) => table.get(id).to_vec(),
            None => detokenize::single_token(&self.tokenizer, id),
        }
    }

    /// How its model writes calls of tools, as far as the template shows it.
    #[must_use]
    pub fn tool_style(&self) -> Option<ToolStyle> {
        self.template.as_ref().and_then(|template| template.tool_style)
    }

    /// What compiles grammars for these tokens; `None` where no token ends a text. The first call builds it: not for a thread
    /// that serves others.
    pub(crate) fn grammar_factory(&self) -> Option<&ParserFactory> {
        self.grammars.get_or_init(|| trie::factory(self)).as_ref()
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

impl GenerationConfig {
    fn defaults(&self) -> SamplingDefaults {
        let greedy = self.do_sample == Some(false);
        let fraction = |value: Option<f32>, neutral: f32| value.filter(|v| (0.0..=1.0).contains(v)).unwrap_or(neutral);
        SamplingDefaults {
            temperature: if greedy { 0.0 } else { self.temperature.filter(|t| *t >= 0.0).unwrap_or(1.0) },
            top_k: self.top_k.unwrap_or(0),
            top_p: fraction(self.top_p.filter(|p| *p > 0.0), 1.0),
            min_p: fraction(self.min_p, 0.0),
            repetition_penalty: self.repetition_penalty.filter(|p| *p > 0.0).unwrap_or(1.0),
            max_new_tokens: self.max_new_tokens.filter(|n| *n > 0),
        }
    }
}

fn json<T: Default + for<'de> Deserialize<'de>>(file: &'static str, bytes: Option<&[u8]>) -> Result<T, TextError> {
    let Some(bytes) = bytes else { return Ok(T::default()) };
    serde_json::from_slice(bytes).map_err(|source| TextError::Json { file, source })
}

/// Up to four bytes as a number.
fn quad(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| (number << 8) | u32::from(*byte))
}

/// A special token is written as its text or as an object with it.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// Token ids are written as one number or as a list.
fn token_ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        other => id(other).into_iter().collect(),
    }
}

/// A template is written as its text or as a list of named ones, of which `default` counts.
fn template_source(value: Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").or(named.first())?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Has the library keep no words of a model: it does so in each thread that encodes, and forgets none of a model that has gone (an
/// empty table of each, of some tens of bytes, is left). [`Words`] keeps its own; a text that it does not split, such as one that
/// is yet to be composed, is worked out word by word.
fn keep_no_words(tokenizer: &mut Tokenizer) {
    if let ModelWrapper::BPE(model) = tokenizer.get_model() {
        let mut model = model.clone();
        model.resize_cache(0);
        tokenizer.with_model(model);
    }
}

/// One flag per token id.
fn special_tokens(tokenizer: &Tokenizer) -> Vec<bool> {
    let n = tokenizer.get_vocab(true).values().max().map_or(0, |max| *max as usize + 1);
    let mut special = vec![false; n];
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        if let Some(flag) = special.get_mut(id as usize) {
            *flag = token.special;
        }
    }
    special
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A byte-level tokenizer of 256 bytes, a few merges and three special tokens: 0 `<|bos|>`, 1 `<|eos|>`, 2 `<|x|>`;
    /// byte `b` is token `b + 3`. Built here so that the tests need no file.
    pub(crate) fn tokenizer_json() -> Vec<u8> {
        let mut vocab = serde_json::Map::new();
        let specials = ["<|bos|>", "<|eos|>", "<|x|>"];
        for (id, token) in specials.iter().enumerate() {
            vocab.insert((*token).into(), id.into());
        }
        for byte in 0..=255u8 {
            vocab.insert(detokenize::byte_char(byte).to_string(), (usize::from(byte) + 3).into());
        }
        let merges = ["h e", "l l", "he ll", "hell o", "Ġ w"];
        for (i, merge) in merges.iter().enumerate() {
            vocab.insert(merge.replace(' ', ""), (259 + i).into());
        }
        let added: Vec<Value> = (0..)
            .zip(specials)
            .map(|(id, content)| {
                serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true});
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": byte_level, "decoder": byte_level,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}}},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                "merges": merges},
        });
        tokenizer.to_string().into_bytes()
    }

    pub(crate) const TOKENIZER_CONFIG: &str = r#"{"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"},
        "chat_template": "{{ bos_token }}{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}{{ m['role'] }}: {{ m['content'].strip() }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"}"#;

    pub(crate) fn model() -> TextModel {
        TextModel::from_files(&TextFiles {
            tokenizer: &tokenizer_json(),
            tokenizer_config: Some(TOKENIZER_CONFIG.as_bytes()),
            ..TextFiles::default()
        })
        .expect("the test's tokenizer is good")
    }

    #[test]
    fn text_goes_in_and_comes_back() {
        let model = model();
        for text in ["hello world", "", "h\u{e9}llo \u{1f980} \u{4e16}\u{754c}", "a<|x|>b"] {
            let ids = model.encode(text, false).expect("every byte has a token");
            assert_eq!(model.decode(&ids, false), text);
        }
        assert_eq!(model.encode("hello", true).expect("encodes"), [0, 262]);
        for (limit, expect) in [(4, &[0, 262, 262][..]), (3, &[0, 262, 262]), (2, &[0, 262]), (1, &[0]), (0, &[])] {
            assert_eq!(model.encode_cut("hellohello", limit).expect("encodes"), expect, "{limit}");
        }
        assert_eq!(model.token_bytes(262), b"hello");
        assert_eq!(model.token_bytes(3 + 0xe9), [0xe9]);
        assert_eq!(**model.stop_tokens(), [1]);
        assert_eq!(model.vocabulary(), 264);
    }

    #[test]
    fn the_demo_model_speaks() {
        let model = TextModel::from_files(&TextFiles {
            tokenizer: include_bytes!("../../../app/demo/tokenizer.json"),
            tokenizer_config: Some(include_bytes!("../../../app/demo/tokenizer_config.json")),
            ..TextFiles::default()
        })
        .expect("the embedded files are good");
        let content = " What is a trait? ".into();
        let message = ChatMessage { role: "user".into(), content, ..ChatMessage::default() };
        let prompt = model.render(&[message], true, None, 0).expect("the template renders");
        assert_eq!(prompt, "<|bos|><|user|>What is a trait?<|end|><|assistant|>");
        let ids = model.encode(&prompt, false).expect("every byte has a token");
        assert_eq!((ids[0], ids[1], ids.last()), (0, 2, Some(&3)), "special tokens are one token each");
        assert_eq!(model.decode(&ids, true), "What is a trait?");
        assert!(model.is_special(5) && !model.is_special(6));
    }

    #[test]
    fn defaults_come_from_the_model() {
        let with = |generation: &str| {
            let tokenizer = tokenizer_json();
            let parts = TextFiles {
                tokenizer: &tokenizer,
                generation_config: Some(generation.as_bytes()),
                eos_token_ids: &[7, 5],
                ..TextFiles::default()
            };
            TextModel::from_files(&parts).expect("good parts")
        };
        let model = with(r#"{"temperature": 0.7, "top_k": 40, "top_p": 0.9, "eos_token_id": [1, 5]}"#);
        assert_eq!(**model.stop_tokens(), [1, 5, 7]);
        let d = model.defaults();
        assert_eq!((d.temperature, d.top_k, d.top_p, d.min_p), (0.7, 40, 0.9, 0.0));
        assert_eq!(with(r#"{"do_sample": false}"#).defaults().temperature, 0.0);
        assert_eq!(with("{}").defaults().temperature, 1.0);
    }

    #[test]
    fn broken_files_are_named() {
        let tokenizer = tokenizer_json();
        let good = TextFiles { tokenizer: &tokenizer, ..TextFiles::default() };
        for (parts, expect) in [
            (TextFiles { tokenizer: b"{", ..good }, "tokenizer.json"),
            (TextFiles { tokenizer_config: Some(b"["), ..good }, "tokenizer_config.json"),
            (TextFiles { generation_config: Some(b"{\"top_k\": \"x\"}"), ..good }, "generation_config.json"),
            (TextFiles { chat_template: Some("{% if %}"), ..good }, "chat template"),
        ] {
            let error = TextModel::from_files(&parts).expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
