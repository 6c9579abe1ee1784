//! The body of a response request, as what every conversation comes to, and what the answer repeats of it.

use serde_json::{Map, Value, json};

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::grammar::Form;
use crate::openai::conversation::{Conversation, MAX_MESSAGES, Talk, content};
use crate::openai::fields::{Fields, mismatch};
use crate::openai::format::Format;
use crate::openai::params::{MAX_STOPS, Own, Params, refuse, session, stop};
use crate::openai::tools::Tools;
use crate::text::ChatMessage;

/// Entries of `metadata` (`OpenAI`'s bound).
const MAX_METADATA: usize = 16;

/// Fields that would change the answer and that this host does not implement.
const UNSUPPORTED: [&str; 4] = ["background", "conversation", "prompt", "context_management"];

/// Parts of text, in what was sent and in what was answered.
const TEXTS: [&str; 2] = ["input_text", "output_text"];

/// What an answer says of its request.
pub(super) type Echo = Map<String, Value>;

/// Reads a body.
pub(super) fn talk(fields: &mut Fields, config: &ServerConfig) -> Result<(Talk, Echo), ApiError> {
    refuse(fields, &UNSUPPORTED)?;
    refuse_stored(fields)?;
    refuse_logprobs(fields)?;
    let echo = echo(fields)?;
    let conversation = conversation(fields)?;
    let tools = Tools::parse_flat(fields)?;
    let own = Own {
        n: fields.u32("n", 1..=1)?.unwrap_or(1),
        max_tokens: fields.u32("max_output_tokens", 1..=u32::MAX)?,
        stop: stop(fields, "stop", MAX_STOPS)?,
        session: session(fields)?,
        logprobs: None,
        format: format(fields)?,
    };
    Ok((Talk::new(Params::parse(fields, config, own)?, tools, conversation)?, echo))
}

/// `store` is true where a client does not say, so it is taken, and the answer says that it is false.
fn refuse_stored(fields: &mut Fields) -> Result<(), ApiError> {
    fields.bool("store")?;
    if fields.take("previous_response_id").is_some() {
        let problem = "`previous_response_id` needs a stored response and this server stores none: send the earlier items in \
            `input`";
        return Err(ApiError::invalid("previous_response_id", problem));
    }
    match fields.string("truncation")?.as_deref() {
        None | Some("disabled") => Ok(()),
        Some(other) => Err(ApiError::unsupported("truncation", format!("`truncation` {other}"))),
    }
}

fn refuse_logprobs(fields: &mut Fields) -> Result<(), ApiError> {
    let asks = |value: &Value| value == "message.output_text.logprobs";
    let include = fields.take("include");
    if include.is_some_and(|include| include.as_array().is_some_and(|names| names.iter().any(asks))) {
        return Err(ApiError::unsupported("include", "`message.output_text.logprobs`, which chat completions have,"));
    }
    match fields.u32("top_logprobs", 0..=20)? {
        None | Some(0) => Ok(()),
        Some(_) => Err(ApiError::unsupported("top_logprobs", "`top_logprobs`, which chat completions have,")),
    }
}

fn echo(fields: &Fields) -> Result<Echo, ApiError> {
    let metadata = fields.get("metadata").cloned().unwrap_or_else(|| json!({}));
    let is_good =
        |entries: &Map<String, Value>| entries.len() <= MAX_METADATA && entries.values().all(Value::is_string);
    if !metadata.as_object().is_some_and(is_good) {
        return Err(mismatch("metadata", &format!("an object of at most {MAX_METADATA} texts"), &metadata));
    }
    let or = |name: &str, other: Value| fields.get(name).cloned().unwrap_or(other);
    let echo = json!({
        "background": false,
        "instructions": or("instructions", Value::Null),
        "max_output_tokens": or("max_output_tokens", Value::Null),
        "metadata": metadata,
        "parallel_tool_calls": or("parallel_tool_calls", true.into()),
        "previous_response_id": null,
        "store": false,
        "temperature": or("temperature", Value::Null),
        "text": or("text", json!({"format": {"type": "text"}})),
        "tool_choice": or("tool_choice", "auto".into()),
        "tools": or("tools", json!([])),
        "top_p": or("top_p", Value::Null),
        "truncation": "disabled",
    });
    Ok(echo.as_object().cloned().unwrap_or_default())
}

fn format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let Some(text) = fields.take("text") else { return Ok(None) };
    let Some(format) = Fields::of("text", text)?.take("format") else { return Ok(None) };
    let mut format = Fields::of("text.format", format)?;
    match &*format.text("type")? {
        "text" => Ok(None),
        "json_object" => Ok(Some(Format::of("text.format", Form::any_object()))),
        "json_schema" => Format::schema(format.param("schema"), format.require("schema")?).map(Some),
        other => Err(ApiError::unsupported("text.format.type", format!("a format of type `{other}`"))),
    }
}

/// Reads `instructions` and `input`.
fn conversation(fields: &mut Fields) -> Result<Conversation, ApiError> {
    let said = |role: &str, content| ChatMessage { role: role.to_owned(), content, ..ChatMessage::default() };
    let mut messages: Vec<ChatMessage> =
        fields.string("instructions")?.map(|text| said("system", text)).into_iter().collect();
    match fields.require("input")? {
        Value::String(text) => messages.push(said("user", text)),
        Value::Array(items) if (1..=MAX_MESSAGES).contains(&items.len()) => {
            for (i, item) in items.into_iter().enumerate() {
                self::item(Fields::of(&format!("input[{i}]"), item)?, &mut messages)?;
            }
        }
        other => return Err(mismatch("input", &format!("a string or an array of 1 to {MAX_MESSAGES} items"), &other)),
    }
    Ok(Conversation::new("input", messages))
}

fn item(mut item: Fields, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let kind = item.string("type")?;
    match kind.as_deref() {
        None | Some("message") => messages.push(message(item)?),
        Some("function_call") => {
            let call = call(item)?;
            match messages.last_mut().filter(|last| last.role == "assistant") {
                Some(last) => last.tool_calls.push(call),
                None => {
                    let (role, tool_calls) = ("assistant".to_owned(), vec![call]);
                    messages.push(ChatMessage { role, tool_calls, ..ChatMessage::default() });
                }
            }
        }
        Some("function_call_output") => {
            let tool_call_id = Some(item.text("call_id")?);
            let content = content(&item.param("output"), item.require("output")?, &TEXTS)?;
            messages.push(ChatMessage { role: "tool".to_owned(), content, tool_call_id, ..ChatMessage::default() });
        }
        Some(other) => return Err(ApiError::unsupported(item.param("type"), format!("an item of type `{other}`"))),
    }
    Ok(())
}

fn message(mut item: Fields) -> Result<ChatMessage, ApiError> {
    let role = match item.require("role")? {
        // Templates know the older name of it.
        Value::String(role) if role == "developer" => "system".to_owned(),
        Value::String(role) if matches!(&*role, "user" | "assistant" | "system") => role,
        other => return Err(mismatch(&item.param("role"), "user, assistant, system or developer", &other)),
    };
    let content = content(&item.param("content"), item.require("content")?, &TEXTS)?;
    Ok(ChatMessage { role, content, ..ChatMessage::default() })
}

/// A call of an earlier turn, as templates know it. Its arguments are JSON where they are: what a model once wrote may be
/// anything.
fn call(mut item: Fields) -> Result<Value, ApiError> {
    let (id, name, written) = (item.text("call_id")?, item.text("name")?, item.text("arguments")?);
    let arguments = serde_json::from_str(&written).unwrap_or(Value::String(written));
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}
