//! Texts as `prompt` and `input` take them: a string, strings, token ids, or lists of token ids.
//!
//! One reader for both fields, so that they take the same shapes and name what they refuse in the same words.

use serde_json::Value;

use super::fields::{mismatch, token_id};
use super::generate::tokenizing;
use crate::error::ApiError;

const EXPECT: &str = "a string, an array of strings, an array of token ids, or an array of those";

/// One of them, as it was sent.
#[derive(Debug)]
pub(super) enum Input {
    Text(String),
    Ids(Vec<Value>),
}

/// A field that holds some.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    pub(super) param: &'static str,
    /// What it holds, in words.
    pub(super) noun: &'static str,
    /// How many at most.
    pub(super) limit: usize,
}

/// Makes something of each input of a field; `read` is told the input's own name, as in `prompt[3]`.
pub(super) async fn read_each<T: Send + 'static>(
    value: Value,
    Holder { param, noun, limit }: Holder,
    read: impl Fn(String, Input) -> Result<T, ApiError> + Send + 'static,
) -> Result<Vec<T>, ApiError> {
    let items = match value {
        text @ Value::String(_) => vec![text],
        Value::Array(items) if items.first().is_some_and(Value::is_number) => vec![Value::Array(items)],
        Value::Array(items) if (1..=limit).contains(&items.len()) => items,
        Value::Array(items) => {
            let problem = format!("`{param}` must hold 1 to {limit} {noun}, found {}", items.len());
            return Err(ApiError::invalid(param, problem));
        }
        other => return Err(mismatch(param, EXPECT, &other)),
    };
    let bytes = items.iter().map(|item| item.as_str().map_or(0, str::len)).sum();
    let single = items.len() == 1;
    tokenizing(bytes, move || {
        let name = |i: usize| if single { param.to_owned() } else { format!("{param}[{i}]") };
        let one = |(i, item): (usize, Value)| match item {
            Value::String(text) => read(name(i), Input::Text(text)),
            Value::Array(ids) => read(name(i), Input::Ids(ids)),
            other => Err(mismatch(&name(i), EXPECT, &other)),
        };
        items.into_iter().enumerate().map(one).collect()
    })
    .await
}

/// The token ids of an input called `param`.
pub(super) fn token_ids<C>(param: &str, ids: &[Value], vocabulary: u32) -> Result<C, ApiError>
where
    C: FromIterator<u32>,
{
    ids.iter().enumerate().map(|(i, value)| token_id(&format!("{param}[{i}]"), value, vocabulary)).collect()
}
