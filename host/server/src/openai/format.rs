//! What a request says about the form of its text: `OpenAI`'s `response_format`, and vLLM's `guided_*` fields and
//! `structured_outputs`, of which a request may use one.

use std::sync::Arc;

use serde_json::{Value, json};

use super::fields::{Fields, mismatch};
use crate::cache::Key;
use crate::error::ApiError;
use crate::grammar::{Compiled, Form, GrammarError};
use crate::state::ServerState;
use crate::text::TextModel;

/// Texts of `guided_choice`.
const MAX_CHOICES: usize = 1_024;

/// A form, and the field that asks for it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Format {
    param: String,
    form: Form,
}

/// The names of one set of fields: JSON schema, regular expression, choice, grammar.
const GUIDED: [&str; 4] = ["guided_json", "guided_regex", "guided_choice", "guided_grammar"];
const STRUCTURED: [&str; 4] = ["json", "regex", "choice", "grammar"];

impl Format {
    /// An instance of the schema in a field.
    pub(crate) fn schema(param: String, value: Value) -> Result<Self, ApiError> {
        schema(&param, value).map(|form| Self { param, form })
    }

    /// As chat completions ask for it; none for a form that has no name there.
    pub(super) fn written(&self) -> Option<Value> {
        let Form::Json(schema) = &self.form else { return None };
        Some(json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": true}}))
    }

    /// The form that a field asks for.
    pub(crate) fn of(param: impl Into<String>, form: Form) -> Self {
        Self { param: param.into(), form }
    }

    /// Reads every field that may ask for a form, beside the one that is `asked` for already.
    pub(super) fn parse(fields: &mut Fields, asked: Option<Self>) -> Result<Option<Self>, ApiError> {
        let mut asked: Vec<Self> = asked.into_iter().chain(response_format(fields)?).collect();
        guided(fields, GUIDED, &mut asked)?;
        if let Some(outputs) = fields.take("structured_outputs") {
            let mut inner = Fields::of("structured_outputs", outputs)?;
            if inner.bool("json_object")? == Some(true) {
                asked.push(Self::of(inner.param("json_object"), Form::any_object()));
            }
            guided(&mut inner, STRUCTURED, &mut asked)?;
        }
        if let [first, second, ..] = &*asked {
            return Err(second.clashes(&first.param));
        }
        Ok(asked.pop())
    }

    /// The error of a request that asks for another form as well, in `other`.
    pub(super) fn clashes(&self, other: &str) -> ApiError {
        let problem = format!("`{other}` and `{}` both say what the text must be; send one of them", self.param);
        ApiError::invalid(&*self.param, problem)
    }

    /// What stands for its form.
    pub(super) fn key(&self) -> Key {
        self.form.key()
    }

    /// Compiles it for a model.
    pub(super) async fn compile(self, state: &ServerState, text: &Arc<TextModel>) -> Result<Arc<Compiled>, ApiError> {
        let Self { param, form } = self;
        state.grammars.compile(text, form).await.map_err(|error| match error {
            GrammarError::Busy | GrammarError::NoMemory => ApiError::Saturated { what: error.to_string() },
            error => {
                let problem = format!("`{param}` cannot be used: {error}");
                ApiError::invalid(param, problem)
            }
        })
    }
}

fn response_format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let Some(format) = fields.take("response_format") else { return Ok(None) };
    let mut format = Fields::of("response_format", format)?;
    match &*format.string("type")?.unwrap_or_default() {
        "text" => Ok(None),
        "json_object" => Ok(Some(Format::of("response_format", Form::any_object()))),
        "json_schema" => {
            let inner = format.require("json_schema")?;
            let mut inner = Fields::of("response_format.json_schema", inner)?;
            let param = inner.param("schema");
            let form = inner.take("schema").map(|schema| self::schema(&param, schema)).transpose()?;
            Ok(Some(Format::of(param, form.unwrap_or_else(Form::any_object))))
        }
        other => Err(ApiError::unsupported("response_format.type", format!("`response_format` of type `{other}`"))),
    }
}

fn guided(fields: &mut Fields, names: [&str; 4], asked: &mut Vec<Format>) -> Result<(), ApiError> {
    let [json, regex, choice, grammar] = names;
    let param = fields.param(json);
    if let Some(value) = fields.take(json) {
        asked.push(Format::of(&*param, self::schema(&param, value)?));
    }
    if let Some(pattern) = fields.string(regex)? {
        asked.push(Format::of(fields.param(regex), Form::Regex(pattern)));
    }
    let param = fields.param(choice);
    if let Some(value) = fields.take(choice) {
        asked.push(Format::of(&*param, choices(&param, value)?));
    }
    if let Some(text) = fields.string(grammar)? {
        asked.push(Format::of(fields.param(grammar), Form::Lark(text)));
    }
    Ok(())
}

/// A schema, or the text of one.
fn schema(param: &str, value: Value) -> Result<Form, ApiError> {
    let parsed = match &value {
        Value::String(text) => serde_json::from_str(text).ok(),
        _ => Some(value.clone()),
    };
    match parsed {
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Form::Json(schema)),
        _ => Err(mismatch(param, "a JSON schema", &value)),
    }
}

fn choices(param: &str, value: Value) -> Result<Form, ApiError> {
    let texts = match &value {
        Value::Array(texts) if (1..=MAX_CHOICES).contains(&texts.len()) => texts,
        other => return Err(mismatch(param, &format!("an array of 1 to {MAX_CHOICES} texts"), other)),
    };
    let text = |(i, text): (usize, &Value)| match text {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        other => Err(mismatch(&format!("{param}[{i}]"), "a text of at least one character", other)),
    };
    Ok(Form::one_of(&texts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Option<Format>, ApiError> {
        Format::parse(&mut Fields::parse(json.as_bytes())?, None)
    }

    #[test]
    fn a_form_is_read_from_every_field_that_has_one() {
        let schema = serde_json::json!({"type": "integer"});
        for (json, param, form) in [
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format", Form::any_object()),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true,
                    "schema": {"type": "integer"}}}}"#,
                "response_format.json_schema.schema",
                Form::Json(schema.clone()),
            ),
            (r#"{"guided_json": {"type": "integer"}}"#, "guided_json", Form::Json(schema.clone())),
            (r#"{"guided_json": "{\"type\": \"integer\"}"}"#, "guided_json", Form::Json(schema)),
            (r#"{"guided_regex": "a+"}"#, "guided_regex", Form::Regex("a+".into())),
            (r#"{"guided_choice": ["a", "\""]}"#, "guided_choice", Form::Lark(r#"start: "a" | "\"""#.into())),
            (r#"{"guided_grammar": "start: \"a\""}"#, "guided_grammar", Form::Lark("start: \"a\"".into())),
            (r#"{"structured_outputs": {"regex": "a"}}"#, "structured_outputs.regex", Form::Regex("a".into())),
            (r#"{"structured_outputs": {"json_object": true}}"#, "structured_outputs.json_object", Form::any_object()),
        ] {
            assert_eq!(parse(json).expect(json), Some(Format::of(param, form)), "{json}");
        }
        for json in ["{}", r#"{"response_format": {"type": "text"}}"#, r#"{"guided_regex": null}"#] {
            assert_eq!(parse(json).expect(json), None, "{json}");
        }
    }

    #[test]
    fn what_is_no_form_is_named() {
        for (json, param, expect) in [
            (r#"{"response_format": "json"}"#, "response_format", "must be an object"),
            (r#"{"response_format": {"type": "xml"}}"#, "response_format.type", "`xml` is not supported"),
            (r#"{"response_format": {"type": "json_schema"}}"#, "response_format.json_schema", "is required"),
            (r#"{"guided_json": 7}"#, "guided_json", "must be a JSON schema, found the number 7"),
            (r#"{"guided_json": "{"}"#, "guided_json", "must be a JSON schema, found the string"),
            (r#"{"guided_choice": []}"#, "guided_choice", "1 to 1024 texts, found an array of 0"),
            (r#"{"guided_choice": ["a", ""]}"#, "guided_choice[1]", "at least one character"),
            (
                r#"{"response_format": {"type": "json_object"}, "guided_regex": "a"}"#,
                "guided_regex",
                "`response_format` and `guided_regex` both say",
            ),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.to_string().contains(expect), "{json}: {error}");
            assert!(error.json().contains(&format!(r#""param":"{param}""#)), "{json}: {}", error.json());
        }
    }
}
