//! An answer as numbered blocks in the order in which they were said: a text, a call, a text again.
//!
//! Chat completions have a text and a list of calls side by side; the newer shapes have one list of both, and tell in a stream
//! where each begins and ends.

use serde_json::Value;

use super::generate::Collected;
use super::tools::{CallDelta, CallStream, Part};
use crate::stream::Delta;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Text(String),
    Call {
        id: String,
        name: String,
        /// JSON, or the beginning of it where the answer was cut.
        arguments: String,
    },
}

/// The blocks of one answer; the last one is open.
#[derive(Debug, Default)]
pub(crate) struct Blocks(pub(crate) Vec<Block>);

/// What a part did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// The block that it ended.
    pub(crate) closed: Option<usize>,
    /// Whether it began the block `at`.
    pub(crate) opened: bool,
    pub(crate) at: usize,
    /// What it added there.
    pub(crate) more: String,
}

impl Blocks {
    /// Of an answer that is there as a whole.
    pub(crate) fn of(choice: &Collected, calls: Option<CallStream>) -> Self {
        let parts = match &choice.raw {
            Some(raw) => relayed(&choice.text, raw),
            None => pieces(&mut { calls }, &choice.text, true),
        };
        let mut blocks = Self::default();
        parts.into_iter().for_each(|part| drop(blocks.push(part)));
        blocks
    }

    /// Takes the next part.
    pub(crate) fn push(&mut self, part: Part) -> Step {
        let (block, more) = match part {
            Part::Content(more) => (Block::Text(more.clone()), more),
            Part::Call(CallDelta { id, function, .. }) => {
                let (id, name) = (id.unwrap_or_default(), function.name.unwrap_or_default());
                (Block::Call { id, name, arguments: function.arguments.clone() }, function.arguments)
            }
        };
        match (self.0.last_mut(), &block) {
            (Some(Block::Text(text)), Block::Text(_)) => text.push_str(&more),
            (Some(Block::Call { arguments, .. }), Block::Call { id, .. }) if id.is_empty() => arguments.push_str(&more),
            _ => {
                let closed = self.0.len().checked_sub(1);
                self.0.push(block);
                return Step { closed, opened: true, at: self.0.len() - 1, more };
            }
        }
        Step { closed: None, opened: false, at: self.0.len() - 1, more }
    }
}

/// The parts of the next piece of an answer.
pub(crate) fn parts(calls: &mut Option<CallStream>, delta: &Delta) -> Vec<Part> {
    match &delta.raw {
        Some(raw) => relayed(&delta.text, raw),
        None => pieces(calls, &delta.text, delta.finish.is_some()),
    }
}

/// Those of an upstream's, which finds the calls itself.
fn relayed(text: &str, raw: &Value) -> Vec<Part> {
    let calls = raw["delta"]["tool_calls"].as_array().into_iter().flatten();
    let text = Some(text).filter(|text| !text.is_empty()).map(|text| Part::Content(text.to_owned()));
    text.into_iter().chain(calls.map(|call| Part::Call(CallDelta::of(call)))).collect()
}

/// Those of a text, the last of which is told with `is_last`.
fn pieces(calls: &mut Option<CallStream>, piece: &str, is_last: bool) -> Vec<Part> {
    match calls {
        Some(calls) => calls.push(piece, is_last),
        None if piece.is_empty() => Vec::new(),
        None => vec![Part::Content(piece.to_owned())],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tools::FunctionDelta;
    use super::*;

    fn call(id: Option<&str>, arguments: &str) -> Part {
        let function = FunctionDelta { name: id.map(|_| "f".to_owned()), arguments: arguments.to_owned() };
        Part::Call(CallDelta { index: Some(0), id: id.map(str::to_owned), kind: None, function })
    }

    #[test]
    fn calls_of_an_upstream_begin_with_their_names() {
        let call = |function: Value| json!({"index": 0, "id": "x", "type": "function", "function": function});
        let chunks = [
            json!({"delta": {"content": "a"}}),
            json!({"delta": {"tool_calls": [call(json!({"name": "f", "arguments": ""}))]}}),
            json!({"delta": {"tool_calls": [call(json!({"name": null, "arguments": "{"}))]}}),
            json!({"delta": {"tool_calls": [call(json!({"arguments": "}"}))]}}),
        ];
        let mut blocks = Blocks::default();
        for raw in chunks {
            let text = raw["delta"]["content"].as_str().unwrap_or_default();
            relayed(text, &raw).into_iter().for_each(|part| drop(blocks.push(part)));
        }
        let f = Block::Call { id: "x".to_owned(), name: "f".to_owned(), arguments: "{}".to_owned() };
        assert_eq!(blocks.0, [Block::Text("a".to_owned()), f]);
    }

    #[test]
    fn a_part_goes_on_or_begins_a_block() {
        let text = |text: &str| Part::Content(text.to_owned());
        let mut blocks = Blocks::default();
        let steps = [
            text("a"),
            text("b"),
            call(Some("1"), ""),
            call(None, "{"),
            call(None, "}"),
            call(Some("2"), "{}"),
            text("c"),
        ];
        let steps: Vec<_> =
            steps.into_iter().map(|part| blocks.push(part)).map(|s| (s.closed, s.opened, s.at)).collect();
        let expect = [
            (None, true, 0),
            (None, false, 0),
            (Some(0), true, 1),
            (None, false, 1),
            (None, false, 1),
            (Some(1), true, 2),
            (Some(2), true, 3),
        ];
        assert_eq!(steps, expect);
        let block = |id: &str| Block::Call { id: id.into(), name: "f".into(), arguments: "{}".into() };
        assert_eq!(blocks.0, [Block::Text("ab".into()), block("1"), block("2"), Block::Text("c".into())]);
    }
}
