//! What an upstream wrote, under this host's names: the choices are its own words, the identity around them is ours.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Usage;
use super::generate::{Collected, Head};
use crate::stream::Totals;

#[derive(Serialize)]
struct Object<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Value],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

/// One choice of a chunk, as a server-sent event.
pub(super) fn chunk(out: &mut Vec<u8>, head: &Head, (object, include_usage): (&'static str, bool), choice: &Value) {
    let Head { id, created, model } = head;
    let usage = include_usage.then_some(None);
    super::sse(out, &Object { id, object, created: *created, model, choices: std::slice::from_ref(choice), usage });
}

/// The object of an answer that is sent whole, where an upstream wrote it; its words are taken out of the choices.
pub(super) fn whole(head: &Head, object: &'static str, choices: &mut [Collected], totals: Totals) -> Option<Vec<u8>> {
    if choices.iter().all(|choice| choice.raw.is_none()) {
        return None;
    }
    let raw = |(index, choice): (usize, &mut Collected)| settled(index, choice.raw.take().unwrap_or_else(|| json!({})));
    let choices: Vec<Value> = choices.iter_mut().enumerate().map(raw).collect();
    let Head { id, created, model } = head;
    let usage = Some(Some(totals.into()));
    serde_json::to_vec(&Object { id, object, created: *created, model, choices: &choices, usage }).ok()
}

/// A choice whose pieces are together, with the members that a whole answer has.
fn settled(index: usize, mut choice: Value) -> Value {
    let Some(rest) = choice.as_object_mut() else { return choice };
    let mut members = Map::new();
    members.insert("index".into(), index.into());
    match rest.remove("delta") {
        Some(delta) => members.insert("message".into(), message(delta)),
        None => members.insert("text".into(), rest.remove("text").unwrap_or_else(|| "".into())),
    };
    for name in ["logprobs", "finish_reason"] {
        members.insert(name.into(), rest.remove(name).unwrap_or_default());
    }
    rest.remove("index");
    members.append(rest);
    Value::Object(members)
}

/// What the deltas of a choice come to; calls have no places in it.
fn message(mut delta: Value) -> Value {
    let calls = delta.get_mut("tool_calls").and_then(Value::as_array_mut);
    calls.into_iter().flatten().filter_map(Value::as_object_mut).for_each(|call| drop(call.remove("index")));
    if let Some(members) = delta.as_object_mut() {
        members.entry("role").or_insert("assistant".into());
        members.entry("content").or_insert(Value::Null);
        members.entry("refusal").or_insert(Value::Null);
    }
    delta
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_choice_has_a_message_and_calls_without_places() {
        let delta = json!({"content": null, "tool_calls": [{"index": 0, "id": "x", "function": {"name": "f"}}]});
        let settled = settled(1, json!({"delta": delta, "finish_reason": "tool_calls"}));
        let message = json!({"content": null, "role": "assistant", "refusal": null,
            "tool_calls": [{"id": "x", "function": {"name": "f"}}]});
        let expect = json!({"finish_reason": "tool_calls", "index": 1, "logprobs": null, "message": message});
        assert_eq!(settled, expect);
    }
}
