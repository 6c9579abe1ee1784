//! The text side against `transformers`: what it made of awkward texts with tiny tokenizers of the usual kinds, and what it
//! rendered from conversations with chat templates of the usual structures (`tests/text/make.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::template::ChatTemplate;
use super::{Detokenizer, TemplateError, TextFiles, TextModel};

#[derive(Deserialize)]
struct Golden {
    made_by: String,
    tokenizers: BTreeMap<String, Encoded>,
    now: u64,
    conversations: BTreeMap<String, Map<String, Value>>,
    templates: BTreeMap<String, Vec<Rendered>>,
}

#[derive(Deserialize)]
struct Encoded {
    texts: Vec<Text>,
    soup: Vec<Soup>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    bare: Vec<u32>,
    /// With special tokens, and without.
    decoded: [String; 2],
}

/// Tokens at random.
#[derive(Deserialize)]
struct Soup {
    ids: Vec<u32>,
    decoded: [String; 2],
}

#[derive(Deserialize)]
struct Rendered {
    conversation: String,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text")
}

fn golden() -> Golden {
    let text = std::fs::read(folder().join("golden.json")).expect("the golden is there");
    serde_json::from_slice(&text).expect("a golden")
}

fn tokenizer(kind: &str) -> Arc<TextModel> {
    let file = std::fs::read(folder().join(format!("{kind}.json"))).expect("the tokenizer is there");
    Arc::new(TextModel::from_files(&TextFiles { tokenizer: &file, ..TextFiles::default() }).expect("a tokenizer"))
}

/// Pieces as they would be streamed.
fn streamed(model: &Arc<TextModel>, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(model), skip_special);
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

#[test]
fn tokens_and_texts_are_those_of_transformers() {
    for (kind, Encoded { texts, soup }) in &golden().tokenizers {
        let model = tokenizer(kind);
        for Text { text, ids, bare, decoded } in texts {
            let encoded = [true, false].map(|special| model.encode(text, special).expect("it is encoded"));
            assert_eq!(encoded, [ids.clone(), bare.clone()], "{kind}: {text:?}");
            let found = [false, true].map(|skip| model.decode(ids, skip));
            assert_eq!(&found, decoded, "{kind}: {text:?}");
            // What WordPiece writes of a token depends on the next one; no model that generates has it.
            if kind != "wordpiece" {
                let found = [false, true].map(|skip| streamed(&model, ids, skip).concat());
                assert_eq!(&found, decoded, "{kind}, streamed: {text:?}");
            }
        }
        for Soup { ids, decoded } in soup {
            // Hugging Face gives up a run of bytes for one that is wrong.
            if kind == "sentencepiece" && decoded[0].contains(char::REPLACEMENT_CHARACTER) {
                continue;
            }
            assert_eq!(&[false, true].map(|skip| model.decode(ids, skip)), decoded, "{kind}: {ids:?}");
        }
    }
}

/// The byte-level tokenizer in the forms that are split here, and some that are left to the library.
fn byte_levels() -> Vec<(&'static str, bool, TextModel)> {
    let file = std::fs::read(folder().join("bytelevel.json")).expect("the tokenizer is there");
    let written: Value = serde_json::from_slice(&file).expect("JSON");
    let gpt2 = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let prefix = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    let split = json!({ "type": "Split", "pattern": { "Regex": r"\b|\p{L}*|\s+(?!\S)|\s+" }, "behavior": "Isolated",
        "invert": false });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let empty_words = json!({ "type": "Sequence", "pretokenizers": [split, bytes] });
    let stripped = json!({ "id": 332, "content": "<think>", "single_word": false, "lstrip": true, "rstrip": false,
        "normalized": true, "special": false });
    let form = |name, is_split, changes: &[(&str, &Value)]| {
        let mut written = written.clone();
        changes.iter().for_each(|(at, value)| {
            *written.pointer_mut(at).expect("it has the field") = (*value).clone();
        });
        let tokenizer = written.to_string();
        let files = TextFiles { tokenizer: tokenizer.as_bytes(), ..TextFiles::default() };
        (name, is_split, TextModel::from_files(&files).expect("a tokenizer"))
    };
    vec![
        form("Qwen", true, &[]),
        form("Llama 3", true, &[("/normalizer", &Value::Null)]),
        form("GPT-2", true, &[("/normalizer", &Value::Null), ("/pre_tokenizer", &gpt2)]),
        form("without special tokens around", true, &[("/post_processor", &Value::Null)]),
        form("whole words", true, &[("/model/ignore_merges", &json!(true))]),
        form("empty words", true, &[("/normalizer", &Value::Null), ("/pre_tokenizer", &empty_words)]),
        form("RoBERTa", false, &[("/pre_tokenizer", &prefix)]),
        form("another normalizer", false, &[("/normalizer", &json!({ "type": "NFKC" }))]),
        form("a token that takes spaces", false, &[("/added_tokens/4", &stripped)]),
    ]
}

#[test]
fn words_are_those_of_the_library() {
    let part = prop_oneof![
        prop::sample::select(vec![
            "<|bos|>",
            "<|end|>",
            "<|im_start|>",
            "<think>",
            "</think>",
            "<|im_",
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t ",
            "'s",
            "'LL",
            "12345",
            " hello",
            "the",
            "The ",
            "e\u{301}",
            "\u{1f980}",
            "\u{fb01}",
            "\u{a0}",
            "\u{3000}",
            "::",
            " {}",
            "\0",
        ])
        .prop_map(str::to_owned),
        ".{0,6}",
        "[a-z ]{0,12}",
    ];
    let text = prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat());
    for (name, is_split, model) in byte_levels() {
        assert_eq!(model.words.is_some(), is_split, "{name}");
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(1_000));
        let outcome = runner.run(&(&text, any::<bool>()), |(text, special)| {
            let library = model.encode_as_library(&text, special).expect("it is encoded");
            prop_assert_eq!(model.encode(&text, special).expect("it is encoded"), library);
            Ok(())
        });
        outcome.unwrap_or_else(|fault| panic!("{name}: {fault}"));
    }
}

#[test]
fn prompts_are_those_of_transformers() {
    let Golden { made_by, now, conversations, templates, .. } = golden();
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
    let mut faults = Vec::new();
    for (name, cases) in &templates {
        let source = std::fs::read_to_string(folder().join("templates").join(format!("{name}.jinja")));
        let tokens = tokens.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
        let template = ChatTemplate::new(&source.expect("the template is there"), tokens).expect("it compiles");
        for Rendered { conversation, add_generation_prompt, text, error } in cases {
            let mut extra = conversations[conversation].clone();
            let Some(Value::Array(messages)) = extra.remove("messages") else { panic!("{conversation} has messages") };
            let found = template.render(&messages, *add_generation_prompt, Some(&extra), now);
            let same = match (&found, text, error.as_deref()) {
                (Ok(found), Some(text), _) => found == text,
                // What Python says of a wrong type is its own.
                (Err(TemplateError::Refused(_)), None, Some("TypeError")) => true,
                (Err(TemplateError::Refused(found)), None, Some(error)) => found == error,
                _ => false,
            };
            if !same {
                faults.push(format!("{name}, {conversation}: {found:?}\n  not {text:?} {error:?}"));
            }
        }
    }
    assert!(faults.is_empty(), "{} differ from {made_by}:\n{}", faults.len(), faults.join("\n"));
}

/// Runs of tokens: some at random, some that spell characters of several bytes, whole or cut.
fn runs(model: &TextModel) -> impl Strategy<Value = Vec<u32>> + use<> {
    let spell = |text: &str| model.encode(text, false).expect("it is encoded");
    let spelled: Vec<Vec<u32>> =
        ["\u{1f980}", "\u{1f468}\u{200d}\u{1f469}", "\u{e9}", "\u{4e16}", " hello ", "\u{fffd}"].map(spell).into();
    let random = prop::collection::vec(0..model.vocabulary() + 2, 1..5);
    let cut = (prop::sample::select(spelled), any::<prop::sample::Index>(), any::<bool>());
    let cut = cut.prop_map(|(ids, at, whole)| if whole { ids } else { ids[..=at.index(ids.len())].to_vec() });
    prop::collection::vec(prop_oneof![random, cut], 0..12).prop_map(|runs| runs.concat())
}

#[test]
fn pieces_add_up_to_the_whole_and_halve_no_character() {
    for kind in ["bytelevel", "sentencepiece", "unigram"] {
        let model = tokenizer(kind);
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(512));
        let outcome = runner.run(&(runs(&model), any::<bool>()), |(ids, skip)| {
            let (pieces, whole) = (streamed(&model, &ids, skip), model.decode(&ids, skip));
            prop_assert_eq!(pieces.concat(), whole);
            // Nothing that is complete is held back: what is shown after each token is all that its bytes spell.
            if model.bytes.is_some() {
                for end in 0..ids.len() {
                    let shown = pieces[..=end].concat();
                    let whole = model.decode(&ids[..=end], skip);
                    let held = whole.strip_prefix(&shown);
                    prop_assert!(matches!(held, Some("" | "\u{fffd}")), "{:?} of {:?}", shown, whole);
                }
            }
            Ok(())
        });
        outcome.unwrap_or_else(|fault| panic!("{kind}: {fault}"));
    }
}
