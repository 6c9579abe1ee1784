//! An answer as a response object, whole or as the numbered events of its life.

use serde::Serialize;

use super::request::Echo;
use crate::error::ApiError;
use crate::identity::session_hash;
use crate::openai::blocks::{Block, Blocks, parts};
use crate::openai::generate::{Collected, Head};
use crate::openai::sse_named;
use crate::openai::tools::CallStream;
use crate::stream::{Encode, Finish, Totals, Update};

#[derive(Serialize)]
struct ResponseObject<'a> {
    id: &'a str,
    object: &'static str,
    created_at: u64,
    status: Status,
    error: Option<Fault>,
    incomplete_details: Option<Details>,
    model: &'a str,
    output: Vec<Item<'a>>,
    usage: Option<Usage>,
    #[serde(flatten)]
    echo: &'a Echo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

#[derive(Serialize)]
struct Fault {
    code: &'static str,
    message: String,
}

#[derive(Serialize)]
struct Details {
    reason: &'static str,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Item<'a> {
    Message { id: String, status: Status, role: &'static str, content: Vec<Text<'a>> },
    FunctionCall { id: String, status: Status, call_id: &'a str, name: &'a str, arguments: &'a str },
}

#[derive(Serialize)]
struct Text<'a> {
    r#type: &'static str,
    text: &'a str,
    annotations: [(); 0],
    logprobs: [(); 0],
}

#[derive(Serialize)]
struct Usage {
    input_tokens: u32,
    input_tokens_details: InputDetails,
    output_tokens: u32,
    output_tokens_details: OutputDetails,
    total_tokens: u32,
}

#[derive(Serialize)]
struct InputDetails {
    cached_tokens: u32,
}

#[derive(Serialize)]
struct OutputDetails {
    reasoning_tokens: u32,
}

#[derive(Serialize)]
struct Event<'a> {
    r#type: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    body: Body<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Body<'a> {
    Response {
        response: Box<ResponseObject<'a>>,
    },
    Item {
        output_index: usize,
        item: Item<'a>,
    },
    InItem {
        item_id: String,
        output_index: usize,
        #[serde(flatten)]
        inner: Inner<'a>,
    },
}

#[derive(Serialize)]
#[serde(untagged)]
enum Inner<'a> {
    Part { content_index: usize, part: Text<'a> },
    TextDelta { content_index: usize, delta: &'a str, logprobs: [(); 0] },
    TextDone { content_index: usize, text: &'a str, logprobs: [(); 0] },
    ArgumentsDelta { delta: &'a str },
    ArgumentsDone { name: &'a str, arguments: &'a str },
}

impl From<Totals> for Usage {
    fn from(Totals { prompt, completion, cached, .. }: Totals) -> Self {
        Self {
            input_tokens: prompt,
            input_tokens_details: InputDetails { cached_tokens: cached },
            output_tokens: completion,
            output_tokens_details: OutputDetails { reasoning_tokens: 0 },
            total_tokens: prompt.saturating_add(completion),
        }
    }
}

impl From<Option<Finish>> for Status {
    fn from(finish: Option<Finish>) -> Self {
        if finish.is_some_and(Finish::is_stop) { Self::Completed } else { Self::Incomplete }
    }
}

/// The identity of an item, the same in every event and in the whole.
fn item_id(head: &Head, block: &Block, index: usize) -> String {
    let prefix = if matches!(block, Block::Text(_)) { "msg" } else { "fc" };
    format!("{prefix}_{:016x}", session_hash(&format!("{}/{index}", head.id)))
}

fn text(text: &str) -> Text<'_> {
    Text { r#type: "output_text", text, annotations: [], logprobs: [] }
}

fn item<'a>(head: &Head, (index, block): (usize, &'a Block), status: Status) -> Item<'a> {
    let id = item_id(head, block, index);
    let is_new = status == Status::InProgress;
    match block {
        Block::Text(said) => {
            let content = if is_new { Vec::new() } else { vec![text(said)] };
            Item::Message { id, status, role: "assistant", content }
        }
        Block::Call { id: call_id, name, arguments } => {
            let arguments = if is_new { "" } else { arguments.as_str() };
            Item::FunctionCall { id, status, call_id, name, arguments }
        }
    }
}

/// All items of an answer that has ended so; the last one is cut where the answer is.
fn items<'a>(head: &Head, blocks: &'a Blocks, status: Status) -> Vec<Item<'a>> {
    let last = blocks.0.len().saturating_sub(1);
    let of = |(i, block)| item(head, (i, block), if i == last { status } else { Status::Completed });
    blocks.0.iter().enumerate().map(of).collect()
}

fn object<'a>((head, echo): (&'a Head, &'a Echo), status: Status, output: Vec<Item<'a>>) -> ResponseObject<'a> {
    let incomplete_details = (status == Status::Incomplete).then_some(Details { reason: "max_output_tokens" });
    let Head { id, created, model } = head;
    ResponseObject {
        id,
        object: "response",
        created_at: *created,
        status,
        error: None,
        incomplete_details,
        model,
        output,
        usage: None,
        echo,
    }
}

/// An answer that is sent whole.
pub(super) fn write_whole(
    (head, echo): (&Head, &Echo),
    choices: Vec<Collected>,
    calls: Option<CallStream>,
    totals: Totals,
) -> Vec<u8> {
    let choice = choices.into_iter().next().unwrap_or_default();
    let blocks = Blocks::of(&choice, calls);
    let status = Status::from(choice.finish);
    let mut whole = object((head, echo), status, items(head, &blocks, status));
    whole.usage = Some(totals.into());
    serde_json::to_vec(&whole).unwrap_or_default()
}

/// The events of a response.
#[derive(Debug)]
pub(super) struct ResponseSse {
    head: Head,
    echo: Echo,
    calls: Option<CallStream>,
    blocks: Blocks,
    finish: Option<Finish>,
    sequence: u64,
}

impl ResponseSse {
    pub(super) fn new(head: Head, echo: Echo, calls: Option<CallStream>) -> Self {
        Self { head, echo, calls, blocks: Blocks::default(), finish: None, sequence: 0 }
    }

    /// The response as it is, in an event.
    fn life(
        &mut self,
        out: &mut Vec<u8>,
        name: &'static str,
        status: Status,
        fill: impl FnOnce(&mut ResponseObject<'_>),
    ) {
        let Self { head, echo, blocks, sequence, .. } = self;
        let output = match status {
            Status::InProgress => Vec::new(),
            Status::Failed => items(head, blocks, Status::Incomplete),
            status => items(head, blocks, status),
        };
        let mut response = Box::new(object((head, echo), status, output));
        fill(&mut response);
        event(out, sequence, name, Body::Response { response });
    }

    /// A block begins.
    fn opened(&mut self, out: &mut Vec<u8>, at: usize) {
        let Self { head, blocks, sequence, .. } = self;
        let block = &blocks.0[at];
        let new = item(head, (at, block), Status::InProgress);
        event(out, sequence, "response.output_item.added", Body::Item { output_index: at, item: new });
        if matches!(block, Block::Text(_)) {
            let part = Inner::Part { content_index: 0, part: text("") };
            event(out, sequence, "response.content_part.added", within(head, (at, block), part));
        }
    }

    /// A block goes on.
    fn more(&mut self, out: &mut Vec<u8>, at: usize, delta: &str) {
        let Self { head, blocks, sequence, .. } = self;
        let block = &blocks.0[at];
        let (name, delta) = match block {
            Block::Text(_) => {
                ("response.output_text.delta", Inner::TextDelta { content_index: 0, delta, logprobs: [] })
            }
            Block::Call { .. } => ("response.function_call_arguments.delta", Inner::ArgumentsDelta { delta }),
        };
        event(out, sequence, name, within(head, (at, block), delta));
    }

    /// A block ends.
    fn closed(&mut self, out: &mut Vec<u8>, at: usize, status: Status) {
        let Self { head, blocks, sequence, .. } = self;
        let block = &blocks.0[at];
        match block {
            Block::Text(said) => {
                let done = Inner::TextDone { content_index: 0, text: said, logprobs: [] };
                event(out, sequence, "response.output_text.done", within(head, (at, block), done));
                let part = Inner::Part { content_index: 0, part: text(said) };
                event(out, sequence, "response.content_part.done", within(head, (at, block), part));
            }
            Block::Call { name, arguments, .. } => {
                let done = Inner::ArgumentsDone { name, arguments };
                event(out, sequence, "response.function_call_arguments.done", within(head, (at, block), done));
            }
        }
        let done = item(head, (at, block), status);
        event(out, sequence, "response.output_item.done", Body::Item { output_index: at, item: done });
    }
}

impl Encode for ResponseSse {
    fn begin(&mut self, out: &mut Vec<u8>) {
        self.life(out, "response.created", Status::InProgress, |_| {});
        self.life(out, "response.in_progress", Status::InProgress, |_| {});
    }

    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let Update::Delta(delta) = update else { return };
        for part in parts(&mut self.calls, delta) {
            let step = self.blocks.push(part);
            if let Some(before) = step.closed {
                self.closed(out, before, Status::Completed);
            }
            if step.opened {
                self.opened(out, step.at);
            }
            if !step.more.is_empty() {
                self.more(out, step.at, &step.more);
            }
        }
        self.finish = delta.finish.or(self.finish);
    }

    fn error(&mut self, out: &mut Vec<u8>, error: &ApiError) {
        let code = match error.status().as_u16() {
            429 => "rate_limit_exceeded",
            400..500 => "invalid_prompt",
            _ => "server_error",
        };
        let fault = Fault { code, message: error.to_string() };
        self.life(out, "response.failed", Status::Failed, |response| response.error = Some(fault));
    }

    fn end(&mut self, out: &mut Vec<u8>, totals: Totals) {
        let status = Status::from(self.finish);
        if let Some(last) = self.blocks.0.len().checked_sub(1) {
            self.closed(out, last, status);
        }
        let name = if status == Status::Completed { "response.completed" } else { "response.incomplete" };
        self.life(out, name, status, |response| response.usage = Some(totals.into()));
    }
}

/// What happens inside of an item.
fn within<'a>(head: &Head, (output_index, block): (usize, &Block), inner: Inner<'a>) -> Body<'a> {
    Body::InItem { item_id: item_id(head, block, output_index), output_index, inner }
}

fn event(out: &mut Vec<u8>, sequence: &mut u64, name: &'static str, body: Body<'_>) {
    sse_named(out, name, &Event { r#type: name, sequence_number: *sequence, body });
    *sequence += 1;
}
