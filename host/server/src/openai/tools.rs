//! Tools of a chat request: what the client offers, what it wants done with them, and the calls on their way back.
//!
//! Shapes differ in how they write a tool and a choice; all of them become the same [`Tools`].
//!
//! A call that the client forces is a matter of grammar: the text is the arguments of the tool it names, or a list of calls.
//! A call that the model may make is found in what it writes, in the style of its family, which its chat template shows.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::calls::{CallReader, Said, Style, merged};
use super::fields::{Fields, mismatch};
use super::format::Format;
use super::marked::{MarkedReader, Schemas};
use crate::error::ApiError;
use crate::grammar::Form;
use crate::identity::session_hash;
use crate::text::{TextModel, ToolStyle};

/// Tools of one request (`OpenAI`'s bound).
const MAX_TOOLS: usize = 128;
/// Letters of a tool's name.
const MAX_NAME: usize = 64;
/// Calls that one answer may be forced to have.
const MAX_CALLS: usize = 16;

/// The tools that a request offers.
#[derive(Debug)]
pub(crate) struct Tools {
    tools: Vec<Tool>,
    choice: Choice,
    parallel: bool,
}

#[derive(Debug)]
pub(crate) struct Tool {
    /// What the template shows.
    shown: Value,
    /// Where its schema stands in the request.
    param: String,
    name: String,
    /// Schema of its arguments.
    parameters: Option<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    None,
    Auto,
    Required,
    /// Place of the one tool that is to be called.
    Named(usize),
}

/// How calls are looked for in the texts of a request.
#[derive(Clone, Debug)]
pub(crate) struct CallRules {
    style: Style,
    /// Of a model that writes its calls between marks: then the style is not looked at.
    marked: Option<Schemas>,
    parallel: bool,
    /// Mistral's templates want identities of nine letters.
    short_ids: bool,
}

/// The calls of one choice as they come.
#[derive(Debug)]
pub(crate) struct CallStream {
    reader: Reader,
    rules: CallRules,
    /// Request and choice, of which identities are made.
    origin: String,
    n_calls: usize,
}

/// Whatever finds calls.
#[derive(Debug)]
enum Reader {
    Objects(CallReader),
    Marked(MarkedReader),
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Content(String),
    Call(CallDelta),
}

/// A call on the wire, whole or in parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct CallDelta {
    /// Only where an answer comes in parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<&'static str>,
    pub(super) function: FunctionDelta,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    pub(super) arguments: String,
}

// === impl CallDelta ===

impl CallDelta {
    /// As an upstream wrote it. Only the first part of a call has a name; some servers repeat its identity in each.
    pub(super) fn of(raw: &Value) -> Self {
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let (name, arguments) = (text(&raw["function"]["name"]), text(&raw["function"]["arguments"]));
        let id = name.as_ref().map(|_| text(&raw["id"]).unwrap_or_default());
        let index = raw["index"].as_u64().and_then(|index| usize::try_from(index).ok());
        let kind = name.as_ref().map(|_| "function");
        Self { index, id, kind, function: FunctionDelta { name, arguments: arguments.unwrap_or_default() } }
    }
}

// === impl Tools ===

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`; `None` where no tool may be called.
    pub(super) fn parse(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        Self::parse_as(fields, Tool::parse, |choice| {
            Fields::of("tool_choice.function", Fields::of("tool_choice", choice)?.require("function")?)
        })
    }

    /// The same where the members of a function stand beside its type.
    pub(super) fn parse_flat(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let tool = |path: &str, value| {
            let mut tool = Fields::of(path, value)?;
            is_function(&mut tool, "a tool")?;
            Tool::flat(tool, "parameters")
        };
        Self::parse_as(fields, tool, |choice| {
            let mut choice = Fields::of("tool_choice", choice)?;
            is_function(&mut choice, "a choice")?;
            Ok(choice)
        })
    }

    fn parse_as(
        fields: &mut Fields,
        tool: impl Fn(&str, Value) -> Result<Tool, ApiError>,
        named: impl FnOnce(Value) -> Result<Fields, ApiError>,
    ) -> Result<Option<Self>, ApiError> {
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let tools = Tool::each(fields, tool)?;
        let choice = choice(fields.take("tool_choice"), &tools, named)?;
        Ok(Self::new(tools, choice, parallel))
    }

    /// Tools of any shape; `None` where none may be called.
    pub(crate) fn new(tools: Vec<Tool>, choice: Choice, parallel: bool) -> Option<Self> {
        (choice != Choice::None).then_some(Self { tools, choice, parallel })
    }

    /// Shows the tools to the chat template.
    pub(crate) fn show(&self, template_kwargs: &mut Option<Map<String, Value>>) {
        let kwargs = template_kwargs.get_or_insert_default();
        let shown = self.tools.iter().map(|tool| tool.shown.clone()).collect();
        kwargs.insert("tools".to_owned(), Value::Array(shown));
    }

    /// Whether a call is forced.
    pub(super) fn is_forced(&self) -> bool {
        matches!(self.choice, Choice::Required | Choice::Named(_))
    }

    /// Writes them as chat completions have them.
    pub(super) fn write(&self, body: &mut Map<String, Value>) {
        let choice = match self.choice {
            Choice::None => "none".into(),
            Choice::Auto => "auto".into(),
            Choice::Required => "required".into(),
            Choice::Named(i) => json!({"type": "function", "function": {"name": self.tools[i].name}}),
        };
        let shown = self.tools.iter().map(|tool| tool.shown.clone()).collect();
        body.insert("tools".to_owned(), Value::Array(shown));
        body.insert("tool_choice".to_owned(), choice);
        body.insert("parallel_tool_calls".to_owned(), self.parallel.into());
    }

    /// What the text must be, if a call is forced.
    pub(super) fn format(&self) -> Result<Option<Format>, ApiError> {
        match self.choice {
            Choice::None | Choice::Auto => Ok(None),
            Choice::Named(i) => {
                let Tool { param, parameters, .. } = &self.tools[i];
                let form = parameters.clone().map_or_else(Form::any_object, Form::Json);
                Ok(Some(Format::of(&**param, form)))
            }
            Choice::Required => Ok(Some(Format::of("tools", Form::Json(self.any_calls())))),
        }
    }

    /// The schema of a list of calls. A tool's schema moves whole, definitions and all, so that two tools may use one name for
    /// different things; its references, which begin at its root, are made to begin where it stands now.
    fn any_calls(&self) -> Value {
        let call = |(i, Tool { name, parameters, .. }): (usize, &Tool)| {
            let mut arguments = parameters.clone().unwrap_or_else(|| json!({"type": "object"}));
            rebase(&mut arguments, &format!("#/items/anyOf/{i}/properties/arguments"));
            json!({
                "type": "object", "additionalProperties": false, "required": ["name", "arguments"],
                "properties": {"name": {"const": name}, "arguments": arguments},
            })
        };
        let calls: Vec<Value> = self.tools.iter().enumerate().map(call).collect();
        let most = if self.parallel { MAX_CALLS } else { 1 };
        json!({"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}})
    }

    /// How this model's calls are found.
    pub(super) fn rules(&self, text: &TextModel) -> Result<CallRules, ApiError> {
        let own = text.tool_style();
        let style = match (self.choice, own) {
            (Choice::Named(i), _) => Style::Arguments(self.tools[i].name.clone()),
            (Choice::Required, _) => Style::Array,
            (_, Some(ToolStyle::Tagged)) => Style::Tagged,
            (_, Some(ToolStyle::Listed)) => Style::Listed,
            (_, Some(ToolStyle::Piped)) => Style::Piped,
            (_, Some(ToolStyle::Bare)) => Style::Bare,
            (_, Some(ToolStyle::Marked)) => {
                let schemas = self.tools.iter().map(|tool| (tool.name.clone(), tool.parameters.clone())).collect();
                let (parallel, short_ids) = (self.parallel, false);
                return Ok(CallRules { style: Style::Tagged, marked: Some(schemas), parallel, short_ids });
            }
            (_, None) => {
                let problem = "this model was not taught to call tools (its chat template shows no style of calls that this \
                    server knows): send `tool_choice` \"required\" or name a function";
                return Err(ApiError::invalid("tools", problem));
            }
        };
        Ok(CallRules { style, marked: None, parallel: self.parallel, short_ids: own == Some(ToolStyle::Listed) })
    }
}

impl Tool {
    /// Reads each element of `tools`.
    pub(crate) fn each(
        fields: &mut Fields,
        read: impl Fn(&str, Value) -> Result<Self, ApiError>,
    ) -> Result<Vec<Self>, ApiError> {
        let tools = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(tools)) if tools.len() <= MAX_TOOLS => tools,
            Some(other) => return Err(mismatch("tools", &format!("an array of at most {MAX_TOOLS} tools"), &other)),
        };
        tools.into_iter().enumerate().map(|(i, tool)| read(&format!("tools[{i}]"), tool)).collect()
    }

    fn parse(path: &str, value: Value) -> Result<Self, ApiError> {
        let mut tool = Fields::of(path, value.clone())?;
        is_function(&mut tool, "a tool")?;
        let path = tool.param("function");
        Self::read(Fields::of(&path, tool.require("function")?)?, "parameters", value)
    }

    /// A tool whose members stand beside its type, with the schema of its arguments in the field `schema`.
    pub(crate) fn flat(mut tool: Fields, schema: &str) -> Result<Self, ApiError> {
        let description = tool.string("description")?;
        let mut read = Self::read(tool, schema, Value::Null)?;
        let mut function = json!({"name": read.name});
        for (name, value) in [("description", description.map(Value::String)), ("parameters", read.parameters.clone())]
        {
            if let Some(value) = value {
                function[name] = value;
            }
        }
        read.shown = json!({"type": "function", "function": function});
        Ok(read)
    }

    fn read(mut function: Fields, schema: &str, shown: Value) -> Result<Self, ApiError> {
        let param = function.param("name");
        let name = match function.require("name")? {
            Value::String(name) if is_name(&name) => name,
            other => {
                let expect = format!("1 to {MAX_NAME} letters, digits, `_`, `-` or `.`");
                return Err(mismatch(&param, &expect, &other));
            }
        };
        let param = function.param(schema);
        let parameters = match function.take(schema) {
            None => None,
            Some(schema @ Value::Object(_)) => Some(schema),
            Some(other) => return Err(mismatch(&param, "a JSON schema", &other)),
        };
        Ok(Self { shown, param, name, parameters })
    }

    /// The choice of the tool that `param` names.
    pub(crate) fn named(tools: &[Self], param: &str, name: &str) -> Result<Choice, ApiError> {
        let known = tools.iter().position(|tool| tool.name == name);
        known.map(Choice::Named).ok_or_else(|| {
            let problem = format!("`tool_choice` names the function `{name}`, which is not among the `tools`");
            ApiError::invalid(param, problem)
        })
    }
}

/// Makes the references of a schema, which begin at its root, begin at `root`. What is data and no schema stays as it is.
fn rebase(schema: &mut Value, root: &str) {
    let members = match schema {
        Value::Object(members) => members,
        Value::Array(all) => return all.iter_mut().for_each(|schema| rebase(schema, root)),
        _ => return,
    };
    for (key, value) in members {
        match (&**key, value) {
            ("const" | "enum" | "default" | "examples", _) => {}
            ("$ref", Value::String(to)) => {
                if let Some(inner) = to.strip_prefix('#') {
                    *to = format!("{root}{}", inner.trim_end_matches('/'));
                }
            }
            // Keys are names here, whatever they say.
            (
                "properties" | "patternProperties" | "dependentSchemas" | "$defs" | "definitions",
                Value::Object(named),
            ) => named.values_mut().for_each(|schema| rebase(schema, root)),
            (_, value) => rebase(value, root),
        }
    }
}

fn is_name(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(good)
}

/// Functions are all that a client may offer or name.
fn is_function(fields: &mut Fields, noun: &str) -> Result<(), ApiError> {
    let kind = fields.text("type")?;
    if kind == "function" {
        return Ok(());
    }
    Err(ApiError::unsupported(fields.param("type"), format!("{noun} of type `{kind}`")))
}

/// Reads a choice; `named` finds the function in one that is an object.
fn choice(
    value: Option<Value>,
    tools: &[Tool],
    named: impl FnOnce(Value) -> Result<Fields, ApiError>,
) -> Result<Choice, ApiError> {
    let object = match value {
        None if tools.is_empty() => return Ok(Choice::None),
        None => return Ok(Choice::Auto),
        Some(Value::String(word)) => match (&*word, tools.is_empty()) {
            ("none", _) | ("auto", true) => return Ok(Choice::None),
            ("auto", false) => return Ok(Choice::Auto),
            ("required", false) => return Ok(Choice::Required),
            ("required", true) => {
                return Err(ApiError::invalid("tool_choice", "`tool_choice` is \"required\" and there are no `tools`"));
            }
            _ => {
                return Err(mismatch(
                    "tool_choice",
                    "none, auto, required or a function",
                    &Value::String(word.clone()),
                ));
            }
        },
        Some(object @ Value::Object(_)) => object,
        Some(other) => return Err(mismatch("tool_choice", "none, auto, required or a function", &other)),
    };
    let mut function = named(object)?;
    let name = function.string("name")?.unwrap_or_default();
    Tool::named(tools, &function.param("name"), &name)
}

// === impl CallRules ===

impl CallRules {
    /// Whether the signs of this style are special tokens, which must then be shown.
    pub(super) fn wants_special_tokens(&self) -> bool {
        matches!(self.style, Style::Listed | Style::Piped)
    }

    /// What a choice that has stopped and has calls says of its end. A function that the client named is no surprise.
    pub(super) fn finish_reason(&self) -> &'static str {
        if matches!(self.style, Style::Arguments(_)) { "stop" } else { "tool_calls" }
    }

    /// The calls of one choice of a request.
    pub(crate) fn stream(&self, request: &Arc<str>, choice: usize) -> CallStream {
        let origin = format!("{request}/{choice}");
        let reader = match &self.marked {
            Some(schemas) => Reader::Marked(MarkedReader::new(Arc::clone(schemas))),
            None => Reader::Objects(CallReader::new(self.style.clone())),
        };
        CallStream { reader, rules: self.clone(), origin, n_calls: 0 }
    }
}

// === impl CallStream ===

impl CallStream {
    /// Takes the next piece of text; the last one with `is_last`.
    pub(super) fn push(&mut self, piece: &str, is_last: bool) -> Vec<Part> {
        let mut said = match &mut self.reader {
            Reader::Objects(reader) => reader.push(piece),
            Reader::Marked(reader) => reader.push(piece),
        };
        if is_last {
            said.extend(match &mut self.reader {
                Reader::Objects(reader) => reader.finish(),
                Reader::Marked(reader) => reader.finish(),
            });
        }
        merged(said).into_iter().filter_map(|said| self.part(said)).collect()
    }

    /// Calls so far.
    pub(super) fn n_calls(&self) -> usize {
        if self.rules.parallel { self.n_calls } else { self.n_calls.min(1) }
    }

    /// `None` for what belongs to a second call where there may be one.
    fn part(&mut self, said: Said) -> Option<Part> {
        let (name, arguments) = match said {
            Said::Text(text) => return Some(Part::Content(text)),
            Said::Call { name } => {
                self.n_calls += 1;
                (Some(name), String::new())
            }
            Said::Arguments(text) => (None, text),
        };
        let index = self.n_calls.saturating_sub(1);
        let (id, kind) = match name {
            Some(_) => (Some(self.identity(index)), Some("function")),
            None => (None, None),
        };
        let delta = CallDelta { index: Some(index), id, kind, function: FunctionDelta { name, arguments } };
        (self.rules.parallel || index == 0).then_some(Part::Call(delta))
    }

    /// The same for the same request, choice and place, and for no other.
    fn identity(&self, index: usize) -> String {
        let hash = session_hash(&format!("{}/{index}", self.origin));
        if self.rules.short_ids { format!("{:09x}", hash >> 28) } else { format!("call_{hash:016x}") }
    }
}

/// An answer in parts as content and whole calls.
pub(super) fn whole(parts: Vec<Part>) -> (String, Vec<CallDelta>) {
    let (mut content, mut calls) = (String::new(), Vec::<CallDelta>::new());
    for part in parts {
        match part {
            Part::Content(text) => content.push_str(&text),
            Part::Call(call) if call.id.is_some() => calls.push(CallDelta { index: None, ..call }),
            Part::Call(call) => {
                if let Some(last) = calls.last_mut() {
                    last.function.arguments.push_str(&call.function.arguments);
                }
            }
        }
    }
    (content, calls)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pointsman_sched::mask::TokenMask;
    use pointsman_sched::sampler::Edit;

    use super::*;
    use crate::grammar::GrammarDesk;
    use crate::text::tests::model;

    fn parse(json: &str) -> Result<Option<Tools>, ApiError> {
        Tools::parse(&mut Fields::parse(json.as_bytes())?)
    }

    const TOOLS: &str = r#""tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object",
        "$defs": {"d": {"type": "integer"}}}}}, {"type": "function", "function": {"name": "g"}}]"#;

    #[test]
    fn the_choice_says_what_the_text_must_be() {
        for (choice, expect) in [
            (r#""tool_choice": "none""#, None),
            ("\"x\": 1", Some((Choice::Auto, None))),
            (r#""tool_choice": "auto""#, Some((Choice::Auto, None))),
            (
                r#""tool_choice": {"type": "function", "function": {"name": "g"}}"#,
                Some((Choice::Named(1), Some("tools[1]"))),
            ),
            (r#""tool_choice": "required""#, Some((Choice::Required, Some("tools")))),
        ] {
            let tools = parse(&format!("{{{TOOLS}, {choice}}}")).expect(choice);
            let found = tools.map(|tools| (tools.choice, tools.format().expect("a good schema")));
            assert_eq!(found.as_ref().map(|(choice, _)| *choice), expect.map(|(choice, _)| choice), "{choice}");
            let format = found.and_then(|(_, format)| format).map(|format| format!("{format:?}"));
            let param = expect.and_then(|(_, param)| param);
            assert_eq!(format.is_some(), param.is_some(), "{choice}");
            assert!(format.zip(param).is_none_or(|(format, param)| format.contains(param)), "{choice}");
        }
        for json in ["{}", r#"{"tools": []}"#, r#"{"tools": [], "tool_choice": "auto"}"#] {
            assert!(parse(json).expect(json).is_none(), "{json}");
        }
        let tools = parse(&format!("{{{TOOLS}, \"tool_choice\": \"required\", \"parallel_tool_calls\": false}}"));
        let schema = tools.expect("good").expect("tools").any_calls();
        assert_eq!(schema["maxItems"], json!(1));
    }

    #[test]
    fn references_move_with_their_schema() {
        for (schema, expect) in [
            (json!({"$ref": "#/$defs/a"}), json!({"$ref": "#/x/$defs/a"})),
            (json!({"items": {"$ref": "#"}}), json!({"items": {"$ref": "#/x"}})),
            (json!({"anyOf": [true, {"$ref": "#/"}]}), json!({"anyOf": [true, {"$ref": "#/x"}]})),
            (json!({"$ref": "https://a.b/c#/d"}), json!({"$ref": "https://a.b/c#/d"})),
            // A property may be called anything; data is no schema.
            (
                json!({"properties": {"$ref": {"$ref": "#/a"}, "enum": {"$ref": "#/b"}}}),
                json!({"properties": {"$ref": {"$ref": "#/x/a"}, "enum": {"$ref": "#/x/b"}}}),
            ),
            (json!({"definitions": {"const": {"$ref": "#/c"}}}), json!({"definitions": {"const": {"$ref": "#/x/c"}}})),
            (json!({"const": {"$ref": "#/a"}}), json!({"const": {"$ref": "#/a"}})),
        ] {
            let mut found = schema.clone();
            rebase(&mut found, "#/x");
            assert_eq!(found, expect, "{schema}");
        }
    }

    /// The length of the beginning of `said` that the mask lets through.
    fn allowed(mask: &mut dyn TokenMask, text: &TextModel, said: &str) -> usize {
        mask.advance(None);
        for (i, byte) in said.bytes().enumerate() {
            let token = u32::from(byte) + 3;
            assert_eq!(text.token_bytes(token), [byte]);
            let edit = mask.mask(Duration::from_secs(20)).expect("it comes").expect("a good grammar");
            let Edit::Only(set) = &*edit else { panic!("{edit:?}") };
            if !set.contains(token) {
                return i;
            }
            mask.advance(Some(token));
        }
        said.len()
    }

    #[tokio::test]
    async fn two_tools_may_define_one_name_each_in_its_own_way() {
        let tool = |name: &str, key: &str, kind: &str| {
            json!({"type": "function", "function": {"name": name, "parameters": {
                "type": "object", "required": ["a"], "additionalProperties": false,
                "properties": {"a": {"$ref": format!("#/{key}/Item")}},
                key: {"Item": {"type": kind}, "Other": {"$ref": format!("#/{key}/Item")}}}}})
        };
        let (desk, text) = (GrammarDesk::new(1 << 30), Arc::new(model()));
        for keys in [["definitions", "definitions"], ["$defs", "$defs"], ["definitions", "$defs"]] {
            let offered = [tool("f", keys[0], "integer"), tool("g", keys[1], "boolean")];
            let tools = parse(&json!({"tools": offered, "tool_choice": "required"}).to_string());
            let form = Form::Json(tools.expect("good").expect("tools").any_calls());
            let compiled = desk.compile(&text, form).await.expect("both are known");
            let good = r#"[{"name":"f","arguments":{"a":17}},{"name":"g","arguments":{"a":true}}]"#;
            assert_eq!(allowed(&mut *compiled.mask(), &text, good), good.len(), "{keys:?}");
            let bad = r#"[{"name":"f","arguments":{"a":true"#;
            assert_eq!(allowed(&mut *compiled.mask(), &text, bad), bad.len() - "true".len(), "{keys:?}");
        }
    }

    #[test]
    fn tools_that_are_none_are_named() {
        for (json, param, expect) in [
            (r#"{"tools": 1}"#, "tools", "an array of at most 128"),
            (r#"{"tools": [{}]}"#, "tools[0].type", "is required"),
            (r#"{"tools": [{"type": "web_search"}]}"#, "tools[0].type", "`web_search` is not supported"),
            (r#"{"tools": [{"type": "function"}]}"#, "tools[0].function", "is required"),
            (r#"{"tools": [{"type": "function", "function": {"name": "a b"}}]}"#, "tools[0].function.name", "letters"),
            (
                r#"{"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}"#,
                "tools[0].function.parameters",
                "a JSON schema",
            ),
            (r#"{"tool_choice": "required"}"#, "tool_choice", "no `tools`"),
            (r#"{"tool_choice": "maybe"}"#, "tool_choice", "found the string"),
            (
                r#"{"tool_choice": {"type": "function", "function": {"name": "h"}}}"#,
                "tool_choice.function.name",
                "`h`, which is not among",
            ),
        ] {
            let error = parse(json).and_then(|tools| tools.expect("tools").format()).expect_err(json);
            assert!(error.to_string().contains(expect), "{json}: {error}");
            assert!(error.json().contains(&format!(r#""param":"{param}""#)), "{json}: {}", error.json());
        }
        let tools = parse(&format!("{{{TOOLS}}}")).expect("good").expect("tools");
        let error = tools.rules(&model()).expect_err("no template");
        assert!(error.to_string().contains("send `tool_choice`"), "{error}");
    }

    #[test]
    fn calls_are_counted_and_have_identities_of_their_own() {
        let rules = |parallel| CallRules { style: Style::Array, marked: None, parallel, short_ids: true };
        let text = r#"[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]"#;
        let read = |parallel| {
            let mut stream = rules(parallel).stream(&"r1".into(), 0);
            let parts = stream.push(text, true);
            (whole(parts).1, stream.n_calls())
        };
        let (calls, n) = read(true);
        assert_eq!((calls.len(), n), (2, 2));
        assert_eq!((calls[0].function.name.as_deref(), &*calls[0].function.arguments), (Some("f"), r#"{"a": 1}"#));
        let ids: Vec<&String> = calls.iter().flat_map(|call| &call.id).collect();
        assert!(ids[0] != ids[1] && ids.iter().all(|id| id.len() == 9), "{ids:?}");
        let (calls, n) = read(false);
        assert_eq!((calls.len(), n), (1, 1), "one at a time");
    }
}
