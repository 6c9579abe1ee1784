//! An answer as a message of Anthropic's, whole or as named events.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::blocks::{Block, Blocks, parts};
use crate::openai::generate::{Collected, Head, Running};
use crate::openai::sse_named;
use crate::openai::tools::CallStream;
use crate::stream::{Encode, Finish, Totals, Update};

#[derive(Serialize)]
struct Message<'a> {
    id: &'a str,
    r#type: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<Content<'a>>,
    #[serde(flatten)]
    end: End<'a>,
    usage: Usage,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Content<'a> {
    Text { text: &'a str },
    ToolUse { id: &'a str, name: &'a str, input: Value },
}

/// Why it ended.
#[derive(Serialize)]
struct End<'a> {
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
}

/// What was cached is not counted twice.
#[derive(Clone, Copy, Serialize)]
struct Usage {
    input_tokens: u32,
    cache_creation_input_tokens: u32,
    cache_read_input_tokens: u32,
    output_tokens: u32,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart { message: Message<'a> },
    Ping,
    ContentBlockStart { index: usize, content_block: Content<'a> },
    ContentBlockDelta { index: usize, delta: Delta<'a> },
    ContentBlockStop { index: usize },
    MessageDelta { delta: End<'a>, usage: Usage },
    MessageStop,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Delta<'a> {
    TextDelta { text: &'a str },
    InputJsonDelta { partial_json: &'a str },
}

impl From<Totals> for Usage {
    fn from(Totals { prompt, completion, cached, .. }: Totals) -> Self {
        Self {
            input_tokens: prompt.saturating_sub(cached),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached,
            output_tokens: completion,
        }
    }
}

impl<'a> End<'a> {
    fn of(finish: Option<Finish>, blocks: &Blocks, stop: &'a [String]) -> Self {
        let has_calls = blocks.0.iter().any(|block| matches!(block, Block::Call { .. }));
        let (reason, place) = match finish {
            None => return Self { stop_reason: None, stop_sequence: None },
            Some(Finish::Length) => ("max_tokens", None),
            Some(finish) if has_calls && finish.is_stop() => ("tool_use", None),
            Some(Finish::StopString(place)) => ("stop_sequence", Some(place)),
            Some(Finish::Stop) => ("end_turn", None),
        };
        let stop_sequence = place.and_then(|place| stop.get(place)).map(String::as_str);
        Self { stop_reason: Some(reason), stop_sequence }
    }
}

impl<'a> Content<'a> {
    fn whole(block: &'a Block) -> Self {
        match block {
            Block::Text(text) => Self::Text { text },
            Block::Call { id, name, arguments } => Self::ToolUse { id, name, input: input(arguments) },
        }
    }

    /// As it begins.
    fn empty(block: &'a Block) -> Self {
        match block {
            Block::Text(_) => Self::Text { text: "" },
            Block::Call { id, name, .. } => Self::ToolUse { id, name, input: Map::new().into() },
        }
    }
}

/// The input of a call is an object. One that was cut, or that the model got wrong, is wrapped as Anthropic's documents wrap it.
fn input(arguments: &str) -> Value {
    match serde_json::from_str(arguments) {
        Ok(input @ Value::Object(_)) => input,
        _ => json!({"INVALID_JSON": arguments}),
    }
}

fn message<'a>(head: &'a Head, content: Vec<Content<'a>>, end: End<'a>, usage: Usage) -> Message<'a> {
    Message { id: &head.id, r#type: "message", role: "assistant", model: &head.model, content, end, usage }
}

/// An answer that is sent whole.
pub(super) fn write_whole(
    head: &Head,
    choices: Vec<Collected>,
    (calls, stop): (Option<CallStream>, &[String]),
    totals: Totals,
) -> Vec<u8> {
    let choice = choices.into_iter().next().unwrap_or_default();
    let blocks = Blocks::of(&choice, calls);
    let end = End::of(choice.finish, &blocks, stop);
    let content = blocks.0.iter().map(Content::whole).collect();
    serde_json::to_vec(&message(head, content, end, totals.into())).unwrap_or_default()
}

/// The events of a message.
#[derive(Debug)]
pub(super) struct MessageSse {
    head: Head,
    /// Of the prompt, until the end.
    totals: Totals,
    stop: Arc<[String]>,
    calls: Option<CallStream>,
    blocks: Blocks,
    is_open: bool,
    finish: Option<Finish>,
}

impl MessageSse {
    pub(super) fn new(running: &Running, calls: Option<CallStream>, stop: Arc<[String]>) -> Self {
        let (head, totals) = (running.head.clone(), running.feed.totals());
        Self { head, totals, stop, calls, blocks: Blocks::default(), is_open: false, finish: None }
    }

    /// Before the first block; it waits for what the scheduler found cached.
    fn open(&mut self, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.is_open, true) {
            return;
        }
        let end = End { stop_reason: None, stop_sequence: None };
        event(out, &Event::MessageStart { message: message(&self.head, Vec::new(), end, self.totals.into()) });
        event(out, &Event::Ping);
    }
}

impl Encode for MessageSse {
    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let delta = match update {
            Update::Started { cached_tokens, .. } => {
                self.totals.cached = *cached_tokens;
                return self.open(out);
            }
            Update::Prefilled { .. } | Update::Scored { .. } => return,
            Update::Delta(delta) => delta,
        };
        self.open(out);
        for part in parts(&mut self.calls, delta) {
            let step = self.blocks.push(part);
            if let Some(index) = step.closed {
                event(out, &Event::ContentBlockStop { index });
            }
            let (index, block) = (step.at, &self.blocks.0[step.at]);
            if step.opened {
                event(out, &Event::ContentBlockStart { index, content_block: Content::empty(block) });
            }
            let delta = match block {
                Block::Text(_) => Delta::TextDelta { text: &step.more },
                Block::Call { .. } => Delta::InputJsonDelta { partial_json: &step.more },
            };
            if !step.more.is_empty() {
                event(out, &Event::ContentBlockDelta { index, delta });
            }
        }
        self.finish = delta.finish.or(self.finish);
    }

    fn error(&mut self, out: &mut Vec<u8>, error: &ApiError) {
        out.extend_from_slice(b"event: error\ndata: ");
        out.extend_from_slice(error.anthropic_json().as_bytes());
        out.extend_from_slice(b"\n\n");
    }

    fn end(&mut self, out: &mut Vec<u8>, totals: Totals) {
        if let Some(index) = self.blocks.0.len().checked_sub(1) {
            event(out, &Event::ContentBlockStop { index });
        }
        let delta = End::of(self.finish, &self.blocks, &self.stop);
        event(out, &Event::MessageDelta { delta, usage: totals.into() });
        event(out, &Event::MessageStop);
    }
}

fn event(out: &mut Vec<u8>, event: &Event<'_>) {
    let name = match event {
        Event::MessageStart { .. } => "message_start",
        Event::Ping => "ping",
        Event::ContentBlockStart { .. } => "content_block_start",
        Event::ContentBlockDelta { .. } => "content_block_delta",
        Event::ContentBlockStop { .. } => "content_block_stop",
        Event::MessageDelta { .. } => "message_delta",
        Event::MessageStop => "message_stop",
    };
    sse_named(out, name, event);
}
