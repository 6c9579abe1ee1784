//! The body of a message request, as what every conversation comes to.
//!
//! A turn of Anthropic's is a list of blocks; a template knows messages. So results of tools, which are blocks of the user's
//! turn, become messages of their own, and calls go to the assistant's message.

use serde_json::{Value, json};

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::openai::conversation::{Conversation, Talk, content, elements};
use crate::openai::fields::{Fields, mismatch};
use crate::openai::format::Format;
use crate::openai::params::{Own, Params, refuse, stop};
use crate::openai::tools::{Choice, Tool, Tools};
use crate::text::ChatMessage;

/// Stop sequences of one request.
const MAX_STOPS: usize = 16;

/// Fields that would change the answer and that this host does not implement.
const UNSUPPORTED: [&str; 3] = ["container", "context_management", "mcp_servers"];

/// Reads a body.
pub(super) fn talk(fields: &mut Fields, config: &ServerConfig) -> Result<Talk, ApiError> {
    refuse(fields, &UNSUPPORTED)?;
    thinking(fields)?;
    let conversation = conversation(fields)?;
    let tools = tools(fields)?;
    let max_tokens = fields.u32("max_tokens", 1..=u32::MAX)?.ok_or_else(|| fields.missing("max_tokens"))?;
    let own = Own {
        n: fields.u32("n", 1..=1)?.unwrap_or(1),
        max_tokens: Some(max_tokens),
        stop: stop(fields, "stop_sequences", MAX_STOPS)?,
        session: session(fields)?,
        logprobs: None,
        format: format(fields)?,
    };
    Talk::new(Params::parse(fields, config, own)?, tools, conversation)
}

/// Thinking is a matter of models that were taught to; what such a model thinks here is text.
fn thinking(fields: &mut Fields) -> Result<(), ApiError> {
    let Some(thinking) = fields.take("thinking") else { return Ok(()) };
    let kind = Fields::of("thinking", thinking)?.text("type")?;
    if kind == "disabled" {
        return Ok(());
    }
    Err(ApiError::unsupported("thinking.type", format!("`thinking` of type `{kind}`")))
}

/// Who the user is groups requests where no session header does.
fn session(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(metadata) = fields.take("metadata") else { return Ok(None) };
    Ok(Fields::of("metadata", metadata)?.string("user_id")?.filter(|id| !id.is_empty()))
}

fn format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let Some(config) = fields.take("output_config") else { return Ok(None) };
    let Some(format) = Fields::of("output_config", config)?.take("format") else { return Ok(None) };
    let mut format = Fields::of("output_config.format", format)?;
    let kind = format.text("type")?;
    if kind != "json_schema" {
        return Err(ApiError::unsupported(format.param("type"), format!("a format of type `{kind}`")));
    }
    Format::schema(format.param("schema"), format.require("schema")?).map(Some)
}

// === Messages ===

/// Reads `system` and `messages`.
pub(super) fn conversation(fields: &mut Fields) -> Result<Conversation, ApiError> {
    let mut said = Vec::new();
    if let Some(system) = fields.take("system") {
        let content = content("system", system, &["text"])?;
        said.push(ChatMessage { role: "system".to_owned(), content, ..ChatMessage::default() });
    }
    for (i, turn) in elements("messages", "messages", fields.require("messages")?)?.into_iter().enumerate() {
        Turn::parse(Fields::of(&format!("messages[{i}]"), turn)?, &mut said)?;
    }
    if said.last().is_some_and(|last| last.role == "assistant") {
        let problem = "`messages` must not end with a message of the assistant: this server does not continue one";
        return Err(ApiError::invalid("messages", problem));
    }
    Ok(Conversation::new("messages", said))
}

/// A turn that is being read.
struct Turn<'a> {
    role: String,
    texts: Vec<String>,
    calls: Vec<Value>,
    /// What came before it.
    said: &'a mut Vec<ChatMessage>,
}

impl Turn<'_> {
    fn parse(mut turn: Fields, said: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
        let role = match turn.require("role")? {
            Value::String(role) if matches!(&*role, "user" | "assistant" | "system") => role,
            other => return Err(mismatch(&turn.param("role"), "user, assistant or system", &other)),
        };
        let mut reading = Turn { role, texts: Vec::new(), calls: Vec::new(), said };
        let param = turn.param("content");
        match turn.require("content")? {
            Value::String(text) => reading.texts.push(text),
            blocks => {
                for (i, block) in elements(&param, "blocks", blocks)?.into_iter().enumerate() {
                    reading.block(Fields::of(&format!("{param}[{i}]"), block)?)?;
                }
            }
        }
        reading.end();
        Ok(())
    }

    fn block(&mut self, mut block: Fields) -> Result<(), ApiError> {
        let kind = block.text("type")?;
        match (&*kind, &*self.role) {
            ("text", _) => self.texts.push(block.text("text")?),
            ("tool_use", "assistant") => self.calls.push(call(block)?),
            ("tool_result", "user") => {
                self.end();
                let tool_call_id = Some(block.text("tool_use_id")?);
                let param = block.param("content");
                let content = block.take("content").map(|value| content(&param, value, &["text"])).transpose()?;
                let (role, content) = ("tool".to_owned(), content.unwrap_or_default());
                self.said.push(ChatMessage { role, content, tool_call_id, ..ChatMessage::default() });
            }
            ("tool_use" | "tool_result", role) => {
                let problem = format!("`{}` does not belong to a message of the role {role}", block.param("type"));
                return Err(ApiError::invalid(block.param("type"), problem));
            }
            _ => return Err(ApiError::unsupported(block.param("type"), format!("content of type `{kind}`"))),
        }
        Ok(())
    }

    /// What was read becomes a message, or more of the last one, where that has the same role.
    fn end(&mut self) {
        let (texts, calls) = (std::mem::take(&mut self.texts), std::mem::take(&mut self.calls));
        if texts.is_empty() && calls.is_empty() {
            return;
        }
        let content = texts.join("\n");
        match self.said.last_mut().filter(|last| last.role == self.role) {
            Some(last) => {
                if !last.content.is_empty() && !content.is_empty() {
                    last.content.push('\n');
                }
                last.content.push_str(&content);
                last.tool_calls.extend(calls);
            }
            None => {
                let role = self.role.clone();
                self.said.push(ChatMessage { role, content, tool_calls: calls, ..ChatMessage::default() });
            }
        }
    }
}

/// A call of an earlier turn, as templates know it.
fn call(mut block: Fields) -> Result<Value, ApiError> {
    let (id, name) = (block.text("id")?, block.text("name")?);
    match block.require("input")? {
        input @ Value::Object(_) => {
            Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input}}))
        }
        other => Err(mismatch(&block.param("input"), "an object", &other)),
    }
}

// === Tools ===

/// Reads `tools` and `tool_choice`; `None` where no tool may be called.
pub(super) fn tools(fields: &mut Fields) -> Result<Option<Tools>, ApiError> {
    let tools = Tool::each(fields, tool)?;
    let (choice, parallel) = match fields.take("tool_choice") {
        None if tools.is_empty() => (Choice::None, true),
        None => (Choice::Auto, true),
        Some(value) => choice(Fields::of("tool_choice", value)?, &tools)?,
    };
    Ok(Tools::new(tools, choice, parallel))
}

fn tool(path: &str, value: Value) -> Result<Tool, ApiError> {
    let mut tool = Fields::of(path, value)?;
    match tool.string("type")? {
        Some(kind) if kind != "custom" => {
            Err(ApiError::unsupported(tool.param("type"), format!("a tool of type `{kind}`")))
        }
        _ => Tool::flat(tool, "input_schema"),
    }
}

fn choice(mut choice: Fields, tools: &[Tool]) -> Result<(Choice, bool), ApiError> {
    let kind = choice.text("type")?;
    let parallel = !choice.bool("disable_parallel_tool_use")?.unwrap_or(false);
    let choice = match (&*kind, tools.is_empty()) {
        ("none", _) | ("auto", true) => Choice::None,
        ("auto", false) => Choice::Auto,
        ("any", false) => Choice::Required,
        ("any", true) => {
            return Err(ApiError::invalid("tool_choice", "`tool_choice` is \"any\" and there are no `tools`"));
        }
        ("tool", _) => Tool::named(tools, "tool_choice.name", &choice.text("name")?)?,
        _ => return Err(mismatch("tool_choice.type", "auto, any, tool or none", &Value::String(kind))),
    };
    Ok((choice, parallel))
}
