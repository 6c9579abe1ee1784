//! Reads the fields of a JSON body one by one, so that an error names the field, its range and what was found instead.
//!
//! Not a derived `Deserialize`: untagged enums ("a string or an array of strings") fail with a sentence that helps nobody,
//! and ranges would live in a second place. Unknown fields are ignored, as clients of many servers expect.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// A JSON object that is being read. `null` counts as absent.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Path of the object, with a trailing dot; empty for the body itself.
    path: String,
    map: Map<String, Value>,
}

/// What a value is, for an error message. Long texts are cut.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) if s.len() > 40 => format!("the string \"{}...\"", &s[..s.floor_char_boundary(40)]),
        Value::String(s) => format!("the string \"{s}\""),
        Value::Array(a) => format!("an array of {}", a.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}

impl Fields {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|error| ApiError::Utf8 { at: error.valid_up_to() })?;
        let value: Value = serde_json::from_str(text).map_err(ApiError::Json)?;
        Self::of("", value)
    }

    /// Reads the object at `path`.
    pub(crate) fn of(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) if path.is_empty() => Ok(Self { path: String::new(), map }),
            Value::Object(map) => Ok(Self { path: format!("{path}."), map }),
            other if path.is_empty() => {
                Err(ApiError::invalid("", format!("the body must be a JSON object, found {}", describe(&other))))
            }
            other => Err(mismatch(path, "an object", &other)),
        }
    }

    /// A copy of all of it.
    pub(crate) fn copied(&self) -> Map<String, Value> {
        self.map.clone()
    }

    /// Gives a field this value.
    pub(crate) fn put(&mut self, name: &str, value: Value) {
        self.map.insert(name.to_owned(), value);
    }

    /// The full name of a field.
    pub(crate) fn param(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// Looks at a field.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Takes a field out.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a field that must be there.
    pub(crate) fn require(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name).ok_or_else(|| self.missing(name))
    }

    /// The error of a field that must be there and is not.
    pub(crate) fn missing(&self, name: &str) -> ApiError {
        let param = self.param(name);
        let problem = format!("`{param}` is required");
        ApiError::invalid(param, problem)
    }

    /// A string that must be there.
    pub(crate) fn text(&mut self, name: &str) -> Result<String, ApiError> {
        self.string(name)?.ok_or_else(|| self.missing(name))
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, || "a boolean".to_owned(), Value::as_bool)
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(mismatch(&self.param(name), "a string", &other)),
        }
    }

    /// An integer; whole floats such as `1.0` count, because some clients send them.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let expect = || match (*range.start(), *range.end()) {
            (i64::MIN, i64::MAX) => "an integer".to_owned(),
            (low, i64::MAX) => format!("an integer of at least {low}"),
            (low, high) if low == high => low.to_string(),
            (low, high) => format!("an integer from {low} to {high}"),
        };
        self.read(name, expect, |value| whole(value).filter(|n| range.contains(n)))
    }

    pub(crate) fn u32(&mut self, name: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
        let value = self.integer(name, i64::from(*range.start())..=i64::from(*range.end()))?;
        Ok(value.and_then(|n| u32::try_from(n).ok()))
    }

    /// A number in a closed range.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        let expect = || format!("a number from {} to {}", range.start(), range.end());
        #[expect(clippy::cast_possible_truncation, reason = "sampling computes in f32; the range is checked after")]
        let read = |value: &Value| value.as_f64().map(|n| n as f32).filter(|n| range.contains(n));
        self.read(name, expect, read)
    }

    fn read<T>(
        &mut self,
        name: &str,
        expect: impl FnOnce() -> String,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| mismatch(&self.param(name), &expect(), &value))
    }
}

/// "`x` must be A, found B".
pub(crate) fn mismatch(param: &str, expect: &str, found: &Value) -> ApiError {
    ApiError::invalid(param, format!("`{param}` must be {expect}, found {}", describe(found)))
}

/// A whole number, also when written as a float.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "guarded: whole and small")]
    let from_float = |n: f64| (n.fract() == 0.0 && n.abs() < 9e15).then_some(n as i64);
    value.as_i64().or_else(|| value.as_f64().filter(|_| value.is_f64()).and_then(from_float))
}

/// A token id of a model with `vocabulary` ids.
pub(crate) fn token_id(param: &str, value: &Value, vocabulary: u32) -> Result<u32, ApiError> {
    let id = whole(value).and_then(|id| u32::try_from(id).ok()).filter(|id| *id < vocabulary);
    id.ok_or_else(|| mismatch(param, &format!("a token id below {vocabulary}"), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).expect("an object")
    }

    #[test]
    fn errors_name_field_expectation_and_find() {
        let long = format!(r#"{{"x": "{}"}}"#, "y".repeat(90));
        for (error, expect) in [
            (
                fields(r#"{"n": "one"}"#).u32("n", 1..=8).map(|_| ()),
                "`n` must be an integer from 1 to 8, found the string \"one\"",
            ),
            (
                fields(r#"{"n": 9}"#).u32("n", 1..=8).map(|_| ()),
                "`n` must be an integer from 1 to 8, found the number 9",
            ),
            (
                fields(r#"{"n": 1.5}"#).integer("n", i64::MIN..=i64::MAX).map(|_| ()),
                "`n` must be an integer, found the number 1.5",
            ),
            (
                fields(r#"{"t": []}"#).number("t", 0.0..=2.0).map(|_| ()),
                "`t` must be a number from 0 to 2, found an array of 0",
            ),
            (fields(r#"{"s": {}}"#).string("s").map(|_| ()), "`s` must be a string, found an object"),
            (fields(r#"{"s": 1}"#).bool("s").map(|_| ()), "`s` must be a boolean, found the number 1"),
            (fields(&long).bool("x").map(|_| ()), "found the string \"yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy...\""),
            (fields(r#"{"m": null}"#).require("m").map(|_| ()), "`m` is required"),
            (Fields::parse(b"[1]").map(|_| ()), "the body must be a JSON object, found an array of 1"),
            (Fields::parse(b"{\"a\":\n 1,}").map(|_| ()), "trailing comma at line 2 column 4"),
            (Fields::parse(b"{\"a\": \"\xff\"}").map(|_| ()), "not UTF-8: byte 7"),
            (Fields::of("a[0]", Value::Bool(true)).map(|_| ()), "`a[0]` must be an object, found true"),
        ] {
            let error = error.expect_err(expect).to_string();
            assert!(error.contains(expect), "{error} does not contain {expect}");
        }
    }

    #[test]
    fn null_is_absent_and_whole_floats_are_integers() {
        let mut f = fields(r#"{"a": null, "b": 3.0, "c": 0.5}"#);
        assert_eq!(f.u32("a", 1..=2).expect("absent"), None);
        assert_eq!(f.u32("b", 1..=8).expect("whole"), Some(3));
        assert_eq!(f.number("c", 0.0..=1.0).expect("in range"), Some(0.5));
        assert_eq!(f.string("d").expect("absent"), None);
    }
}
