//! Chat templates: the Jinja text that ships with a model, rendered as Hugging Face renders it.
//!
//! A template is the operator's, its input the client's: rendering is bounded by fuel and sees no clock. Time is an argument,
//! for the templates that tell the model the date.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;

use super::strftime::strftime;

/// Instructions that one rendering may take: some 10,000 messages of a usual template.
const FUEL: u64 = 2_000_000;

const NAME: &str = "chat";

/// One message of a conversation, text only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Its text.
    pub content: String,
    /// Who speaks, where several share a role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Calls that the assistant has made, with their arguments as JSON and not as its text: templates write them out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<serde_json::Value>,
    /// Which call a tool's message answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

/// How a family of models writes that it calls a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolStyle {
    /// Objects between `<tool_call>` and `</tool_call>` (Hermes, Qwen).
    Tagged,
    /// A list after `[TOOL_CALLS]` (Mistral).
    Listed,
    /// The object alone (Llama 3).
    Bare,
    /// A list after `<|tool_call|>` or `functools`; the template wants the tools in a system message (Phi-4-mini).
    Piped,
    /// Each argument between marks, after `<function=name>` (Qwen3-Coder, Llama's custom tools).
    Marked,
}

impl ToolStyle {
    /// The style that a template shows to its model; `None` for one without tools, or of a family that is not known.
    fn of(template: &str) -> Option<Self> {
        let has = |sign: &str| template.contains(sign);
        // The same tag is used around something else than JSON.
        if !has("tools") || has("<arg_key>") {
            return None;
        }
        [
            ("<|tool|>", Self::Piped),
            ("<function=", Self::Marked),
            ("<tool_call>", Self::Tagged),
            ("[TOOL_CALLS]", Self::Listed),
            ("\"parameters\":", Self::Bare),
        ]
        .into_iter()
        .find_map(|(sign, style)| has(sign).then_some(style))
    }
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// It took too many steps.
    #[error("rendering takes more than {FUEL} steps; send fewer messages")]
    TooLong,
    /// The template's own `raise_exception`, or an error in it.
    #[error("{0}")]
    Refused(String),
}

/// A compiled template with the texts of the special tokens.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    /// By the names under which templates know them, as in `bos_token`.
    tokens: BTreeMap<String, String>,
    pub(super) tool_style: Option<ToolStyle>,
}

impl ChatTemplate {
    pub(super) fn new(source: &str, tokens: BTreeMap<String, String>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", python_json);
        let tool_style = ToolStyle::of(source);
        environment.add_template_owned(NAME, without_generation(source).into_owned())?;
        Ok(Self { environment, tokens, tool_style })
    }

    /// Whether both render the same.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let source =
            |template: &Self| template.environment.get_template(NAME).map(|found| found.source().to_owned()).ok();
        self.tokens == other.tokens && source(self) == source(other)
    }

    pub(super) fn render<M: Serialize>(
        &self,
        messages: &[M],
        add_generation_prompt: bool,
        extra: Option<&serde_json::Map<String, serde_json::Value>>,
        now: u64,
    ) -> Result<String, TemplateError> {
        let clock = Value::from_function(move |format: &str| strftime(format, now));
        // Templates ask whether these are none, not whether they are there.
        let mut context = vec![("tools", Value::from(())), ("documents", Value::from(())), ("strftime_now", clock)];
        for (name, value) in extra.into_iter().flatten() {
            context.push((name, Value::from(Serde(value))));
        }
        let tools = extra.and_then(|extra| extra.get("tools")).filter(|_| self.tool_style == Some(ToolStyle::Piped));
        let with_tools = tools.and_then(|tools| with_tools(messages, tools));
        let messages = with_tools.map_or_else(|| Value::from(Serde(messages)), |all| Value::from(Serde(all)));
        context.push(("messages", messages));
        context.push(("add_generation_prompt", add_generation_prompt.into()));
        context.extend(self.tokens.iter().map(|(name, token)| (name.as_str(), token.as_str().into())));
        let template = self.environment.get_template(NAME);
        template.and_then(|t| t.render(Value::from_pairs(context))).map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => TemplateError::TooLong,
            _ => TemplateError::Refused(error.detail().map_or_else(|| error.to_string(), str::to_owned)),
        })
    }
}

/// Messages of which the first system message shows the tools; one that says nothing else where there is none.
fn with_tools<M: Serialize>(messages: &[M], tools: &serde_json::Value) -> Option<Vec<serde_json::Value>> {
    let mut messages: Vec<_> = messages.iter().map(serde_json::to_value).collect::<Result<_, _>>().ok()?;
    let shown = || serde_json::Value::from(tools.to_string());
    match messages.iter_mut().find(|message| message["role"] == "system") {
        Some(system) => system["tools"] = shown(),
        None => messages.insert(0, serde_json::json!({"role": "system", "content": "", "tools": shown()})),
    }
    Some(messages)
}

/// Marks of what the model is trained on, which Hugging Face's Jinja knows, become blocks that are always written: the white
/// space around them is as before.
fn without_generation(source: &str) -> Cow<'_, str> {
    if !source.contains("endgeneration") {
        return source.into();
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("{%") {
        let (tag, next) = after.split_once("%}").unwrap_or((after, ""));
        let word = tag.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        let replaced = match word {
            "generation" => tag.replace(word, "if true"),
            "endgeneration" => tag.replace(word, "endif"),
            _ => tag.to_owned(),
        };
        let end = if after.len() > tag.len() { "%}" } else { "" };
        out.extend([before, "{%", &replaced, end]);
        rest = next;
    }
    out.push_str(rest);
    out.into()
}

/// `tojson` as templates expect it: Python's separators, no HTML escapes, an optional `indent`.
fn python_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = vec![b' '; width.min(8)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// Compact JSON with a space after `,` and `:`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.into(), content: content.into(), ..ChatMessage::default() }
    }

    fn render(source: &str, messages: &[ChatMessage]) -> Result<String, TemplateError> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.into(), text.into()));
        let template = ChatTemplate::new(source, tokens.into()).expect("compiles");
        template.render(messages, true, None, 86_400)
    }

    #[test]
    fn templates_render_as_hugging_face_renders_them() {
        let messages = [message("system", " be brief "), message("user", "hi \"<b>\"")];
        for (source, expect) in [
            ("{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}", "<s>be brief</s>"),
            (
                "{% for m in messages %}\n  {% if loop.first %}\n{% continue %}\n{% endif %}\n{{ m.role }}\n{% endfor %}",
                "user\n",
            ),
            ("{{ messages[1].content.split(' ')[0].upper() }}", "HI"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{{ messages[1] | tojson }}", r#"{"role": "user", "content": "hi \"<b>\""}"#),
            ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
            ("{{ strftime_now('%d %b %Y') }} {{ tools is none }} {{ tools is defined }}", "02 Jan 1970 True True"),
            ("a\n{%- generation %}\nb{%+ endgeneration -%}\n c", "abc"),
            ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ] {
            assert_eq!(render(source, &messages).expect(source), expect, "{source}");
        }
    }

    #[test]
    fn a_template_shows_how_its_model_calls_tools() {
        for (source, expect) in [
            ("{{ messages }}", None),
            ("{% if tools %}use <tool_call>{...}</tool_call>{% endif %}", Some(ToolStyle::Tagged)),
            ("{% if tools %}<tool_call><function=f>{% endif %}", Some(ToolStyle::Marked)),
            ("{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}", Some(ToolStyle::Piped)),
            ("{% if tools %}<tool_call>f<arg_key>a</arg_key>{% endif %}", None),
            (
                "{% if tools is defined %}{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}{% endif %}",
                Some(ToolStyle::Listed),
            ),
            ("{{ tools }}{\"name\": function name, \"parameters\": dictionary}", Some(ToolStyle::Bare)),
            ("{{ tools }}", None),
        ] {
            assert_eq!(ToolStyle::of(source), expect, "{source}");
        }
    }

    #[test]
    fn a_template_may_want_its_tools_in_the_system_message() {
        let source = "{% for m in messages %}{% if 'tools' in m %}{{ m.role + m.content + '<|tool|>' + m['tools'] + '<|/tool|>' }}\
            {% else %}{{ m.role + m.content }}{% endif %}{% endfor %}";
        let template = ChatTemplate::new(source, BTreeMap::new()).expect("good");
        let message = |role: &str, content: &str| ChatMessage {
            role: role.into(),
            content: content.into(),
            ..ChatMessage::default()
        };
        let tools = serde_json::json!({"tools": [{"name": "f"}]});
        let shown = "<|tool|>[{\"name\":\"f\"}]<|/tool|>";
        for (messages, tools, expect) in [
            (vec![message("system", "S"), message("user", "U")], tools.as_object(), format!("systemS{shown}userU")),
            (vec![message("user", "U")], tools.as_object(), format!("system{shown}userU")),
            (vec![message("user", "U")], None, "userU".into()),
        ] {
            assert_eq!(template.render(&messages, false, tools, 0).expect("good"), expect);
        }
    }

    #[test]
    fn calls_reach_the_template_as_json() {
        let call = serde_json::json!({"id": "1", "type": "function",
            "function": {"name": "f", "arguments": {"a": [1, "b"]}}});
        let called = ChatMessage { tool_calls: vec![call], ..message("assistant", "") };
        let answered = ChatMessage { tool_call_id: Some("1".into()), ..message("tool", "7") };
        let source = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name }}\
            {{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{{ m.content }}{% endfor %}";
        assert_eq!(render(source, &[called, answered]).expect("renders"), "f{\"a\": [1, \"b\"]}17");
    }

    #[test]
    fn a_refusal_and_a_runaway_are_errors() {
        let refused = render("{{ raise_exception('roles must alternate') }}", &[]).expect_err("raises");
        assert_eq!(refused.to_string(), "roles must alternate");
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(matches!(render(source, &[]), Err(TemplateError::TooLong)));
    }

    #[test]
    fn extra_values_reach_the_template_and_cannot_replace_the_messages() {
        let template = ChatTemplate::new("{{ thinking }} {{ messages | length }}", BTreeMap::new());
        let extra = serde_json::json!({"thinking": true, "messages": [1, 2, 3]});
        let text = template.expect("compiles").render(&[message("user", "x")], true, extra.as_object(), 0);
        assert_eq!(text.expect("renders"), "True 1");
    }
}
