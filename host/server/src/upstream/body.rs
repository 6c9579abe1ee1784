//! What is sent to an upstream, and how the chunks that come back are put together where the client wants one object.
//!
//! The body is the client's own: fields that this host does not know pass through, because the upstream may. What only this
//! host can obey stays here: it has the place in line, the deadline and the caches. An answer is always asked for as a stream,
//! also for a client that waits for the whole: only a stream shows within seconds that a server has begun, which decides
//! whether another one is asked.

use bytes::Bytes;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value, json};

/// Fields that this host obeys, and that an upstream might not take in this form.
const OWN: [&str; 5] = ["priority", "timeout_ms", "cache_prompt", "cache_response", "speculative_config"];
/// Texts that come in pieces.
const PIECES: [&str; 6] = ["content", "reasoning_content", "reasoning", "refusal", "arguments", "text"];

/// A request in the form in which upstreams take it.
#[derive(Clone, Debug)]
pub(crate) struct Onward {
    pub(crate) path: &'static str,
    body: Map<String, Value>,
    /// Choices of its answer.
    pub(crate) n_choices: usize,
}

impl Onward {
    /// Of a body in OpenAI's form.
    pub(crate) fn new(path: &'static str, body: Map<String, Value>, n_choices: usize) -> Self {
        let Self { mut body, .. } = Self::whole(path, body);
        body.insert("stream".into(), true.into());
        // What an answer cost is asked for always: accounts and limits count it.
        let options = body.entry("stream_options").or_insert_with(|| json!({}));
        if !options.is_object() {
            *options = json!({});
        }
        options["include_usage"] = true.into();
        Self { path, body, n_choices }
    }

    /// The same for an answer that has no parts.
    pub(crate) fn whole(path: &'static str, mut body: Map<String, Value>) -> Self {
        // Each upstream has a name of its own for the model.
        OWN.iter().chain(&["model"]).for_each(|field| drop(body.remove(*field)));
        Self { path, body, n_choices: 1 }
    }

    /// With the limit of this host where the client set none: what is charged here is not exceeded there.
    pub(crate) fn capped(mut self, limit: Option<u32>) -> Self {
        let has_limit = ["max_tokens", "max_completion_tokens"]
            .iter()
            .any(|name| self.body.get(*name).is_some_and(|v| !v.is_null()));
        if let Some(limit) = limit.filter(|_| !has_limit) {
            self.body.insert("max_tokens".into(), limit.into());
        }
        self
    }

    /// As it is sent to one that knows the model by this name.
    pub(super) fn write(&self, model: &str) -> Bytes {
        serde_json::to_vec(&Named { body: &self.body, model }).unwrap_or_default().into()
    }
}

/// A body under the name that an upstream has for the model.
struct Named<'a> {
    body: &'a Map<String, Value>,
    model: &'a str,
}

impl Serialize for Named<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("model", self.model)?;
        self.body.iter().try_for_each(|(name, value)| map.serialize_entry(name, value))?;
        map.end()
    }
}

/// Adds a chunk's choice to what its choice was so far: texts that come in pieces are put together, lists too, their elements by
/// `index` where they have one; of all else the last word counts.
pub(crate) fn fold(sum: &mut Value, more: Value) {
    match (sum, more) {
        (_, Value::Null) => {}
        (Value::Object(sum), Value::Object(more)) => {
            for (name, value) in more {
                match sum.get_mut(&name) {
                    Some(Value::String(text)) if PIECES.contains(&&*name) => match value {
                        Value::String(piece) => text.push_str(&piece),
                        other => drop(other),
                    },
                    Some(known) => fold(known, value),
                    None => drop(sum.insert(name, value)),
                }
            }
        }
        (Value::Array(sum), Value::Array(more)) => {
            for element in more {
                let index = element.get("index").filter(|index| index.is_u64()).cloned();
                let known = index.and_then(|index| sum.iter_mut().find(|known| known.get("index") == Some(&index)));
                match known {
                    Some(known) => fold(known, element),
                    None => sum.push(element),
                }
            }
        }
        (sum, more) => *sum = more,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_the_clients_but_for_what_is_this_hosts() {
        let body = json!({"model": "demo", "messages": [], "top_k": 3, "timeout_ms": 5, "priority": "high", "x": null});
        let Value::Object(body) = body else { panic!("an object") };
        let onward = Onward::new("/v1/chat/completions", body, 1).capped(Some(7)).capped(Some(9));
        let sent: Value = serde_json::from_slice(&onward.write("their/name")).expect("JSON");
        let expect = json!({"model": "their/name", "messages": [], "top_k": 3, "x": null, "stream": true,
            "stream_options": {"include_usage": true}, "max_tokens": 7});
        assert_eq!(sent, expect);
    }

    #[test]
    fn pieces_become_one() {
        for (pieces, expect) in [
            (
                vec![
                    json!({"index": 0, "delta": {"role": "assistant", "content": null}, "finish_reason": null}),
                    json!({"index": 0, "delta": {"content": "a"}}),
                    json!({"index": 0, "delta": {"content": "b"}, "finish_reason": "stop", "logprobs": null}),
                ],
                json!({"index": 0, "delta": {"role": "assistant", "content": "ab"}, "finish_reason": "stop",
                    "logprobs": null}),
            ),
            (
                vec![
                    json!({"delta": {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}]}}),
                    json!({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}),
                    json!({"delta": {"tool_calls": [{"index": 1, "id": "y", "function": {"name": "g"}}]}}),
                    json!({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}}),
                ],
                json!({"delta": {"tool_calls": [
                    {"index": 0, "id": "x", "function": {"name": "f", "arguments": "{}"}},
                    {"index": 1, "id": "y", "function": {"name": "g"}},
                ]}}),
            ),
            (
                vec![
                    json!({"text": "a", "logprobs": {"tokens": ["a"], "content": [{"token": "a"}]}}),
                    json!({"text": "b", "logprobs": {"tokens": ["b"], "content": [{"token": "b"}]}}),
                ],
                json!({"text": "ab", "logprobs": {"tokens": ["a", "b"], "content": [{"token": "a"}, {"token": "b"}]}}),
            ),
        ] {
            let mut sum = Value::Null;
            pieces.into_iter().for_each(|piece| fold(&mut sum, piece));
            assert_eq!(sum, expect);
        }
    }
}
