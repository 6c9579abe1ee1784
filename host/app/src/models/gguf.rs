//! What a GGUF file says about text, from the engine's reader to the server's tokenizer: neither knows the other.

use std::borrow::Cow;

use anyhow::{Context, bail};
use pointsman_engine::Weights;
use pointsman_engine::gguf::{List, Value};
use pointsman_server::text::Vocabulary;
use serde_json::{Map, Value as Json};

/// The file's tokenizer.
///
/// # Errors
/// A value is missing or of another type than it must be.
pub(super) fn vocabulary(weights: &Weights) -> anyhow::Result<Vocabulary<'_>> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let text = |name: &str| match weights.metadata(&key(name)) {
        Some(Value::Text(text)) => Ok(Some(text)),
        None => Ok(None),
        Some(other) => Err(wrong(&key(name), "text", &other)),
    };
    let id = |name: &str| match weights.metadata(&key(name)) {
        Some(Value::Whole(id)) => match u32::try_from(id) {
            Ok(id) => Ok(Some(id)),
            Err(_) => bail!("the file's metadata has {} = {id}; it must be the number of a token", key(name)),
        },
        None => Ok(None),
        Some(other) => Err(wrong(&key(name), "the number of a token", &other)),
    };
    let flag = |name: &str| match weights.metadata(&key(name)) {
        Some(Value::Flag(flag)) => Ok(Some(flag)),
        None => Ok(None),
        Some(other) => Err(wrong(&key(name), "true or false", &other)),
    };
    let tokens = list(weights, &key("tokens"), "a list of texts", as_text)?;
    Ok(Vocabulary {
        model: text("model")?.context("the file's metadata lacks tokenizer.ggml.model; it has no tokenizer")?,
        pre: text("pre")?.unwrap_or("default".into()),
        tokens: tokens.context("the file's metadata lacks tokenizer.ggml.tokens")?,
        kinds: list(weights, &key("token_type"), "a list of whole numbers", as_whole)?.unwrap_or_default(),
        scores: list(weights, &key("scores"), "a list of numbers", as_real)?.unwrap_or_default(),
        merges: list(weights, &key("merges"), "a list of texts", as_text)?.unwrap_or_default(),
        bos: id("bos_token_id")?,
        eos: id("eos_token_id")?,
        ends: [id("eot_token_id")?, id("eom_token_id")?].into_iter().flatten().collect(),
        unknown: id("unknown_token_id")?,
        add_bos: flag("add_bos_token")?,
        add_eos: flag("add_eos_token")?.unwrap_or(false),
        add_space: flag("add_space_prefix")?,
    })
}

/// The file's chat template.
pub(super) fn chat_template(weights: &Weights) -> Option<Cow<'_, str>> {
    match weights.metadata("tokenizer.chat_template") {
        Some(Value::Text(template)) => Some(template),
        _ => None,
    }
}

/// The file's sampling defaults, as a `generation_config.json` has them.
pub(super) fn generation_config(weights: &Weights) -> String {
    let mut config = Map::new();
    for (field, name) in [
        ("temperature", "temp"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("repetition_penalty", "penalty_repeat"),
    ] {
        let value = match weights.metadata(&format!("general.sampling.{name}")) {
            Some(Value::Whole(n)) => u32::try_from(n).ok().map(Json::from),
            Some(Value::Real(x)) => Some(x.into()),
            _ => None,
        };
        config.extend(value.map(|value| (field.to_owned(), value)));
    }
    Json::Object(config).to_string()
}

/// A list whose elements are all of one kind.
fn list<'a, T>(
    weights: &'a Weights,
    key: &str,
    expected: &str,
    element: fn(Value<'a>) -> Option<T>,
) -> anyhow::Result<Option<Vec<T>>> {
    let list: List<'a> = match weights.metadata(key) {
        None => return Ok(None),
        Some(Value::List(list)) => list,
        Some(other) => return Err(wrong(key, expected, &other)),
    };
    let elements: Option<Vec<T>> = list.iter().map(element).collect();
    elements.map(Some).with_context(|| format!("the file's metadata has {key}; it must be {expected}"))
}

fn as_text(value: Value<'_>) -> Option<Cow<'_, str>> {
    match value {
        Value::Text(text) => Some(text),
        _ => None,
    }
}

fn as_whole(value: Value<'_>) -> Option<i64> {
    match value {
        Value::Whole(n) => i64::try_from(n).ok(),
        _ => None,
    }
}

fn as_real(value: Value<'_>) -> Option<f64> {
    match value {
        Value::Real(x) => Some(x),
        _ => None,
    }
}

fn wrong(key: &str, expected: &str, found: &Value<'_>) -> anyhow::Error {
    let found = match found {
        Value::Whole(_) => "a whole number",
        Value::Real(_) => "a number",
        Value::Flag(_) => "true or false",
        Value::Text(_) => "text",
        Value::List(_) => "a list",
    };
    anyhow::anyhow!("the file's metadata has {found} for {key}; it must be {expected}")
}
