//! Tool calls that are written as `<function=name>` with their arguments between marks.
//!
//! Apart from the scanner of JSON objects, because nothing of the call is JSON here: Qwen3-Coder writes each argument as
//! `<parameter=key>` and a bare value, whose type only the tool's schema says. The one exception, Llama's own way to write such
//! a call, has one object for all arguments. Values are handed on one by one: a bare value can still turn out to be no number.

use std::sync::Arc;

use serde_json::Value;

use super::calls::{Nesting, Said};

const FUNCTION: &str = "<function=";
const END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const END_PARAMETER: &str = "</parameter>";
const OPEN_TAG: &str = "<tool_call>";
const CLOSE_TAG: &str = "</tool_call>";
/// Bytes of a function's or parameter's name; what is longer is none.
const MAX_NAME: usize = 256;

/// Schemas of the arguments of each tool, by its name.
pub(super) type Schemas = Arc<[(String, Option<Value>)]>;

/// Reads a text that arrives in pieces.
#[derive(Debug)]
pub(super) struct MarkedReader {
    schemas: Schemas,
    place: Place,
    /// The call that is being read, and its parameter.
    function: String,
    key: String,
    /// What has come and is not understood yet.
    held: String,
    /// Leading bytes of it in which no value ends.
    n_searched: usize,
    said: Vec<Said>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Text,
    /// After `<tool_call>`, which is kept in `held` with the white space after it: it may be text after all.
    Tagged,
    /// In the name of a function, or of a parameter of the function of this number.
    Name,
    /// Between two parameters; the number of them so far.
    Body(usize),
    Key(usize),
    Value(usize),
    Object(Nesting),
    /// After a call, where marks that close may follow.
    Behind,
}

/// Whether more of what is held can be understood now.
enum Step {
    Again,
    Wait,
}

// === impl MarkedReader ===

impl MarkedReader {
    pub(super) fn new(schemas: Schemas) -> Self {
        Self {
            schemas,
            place: Place::Text,
            function: String::new(),
            key: String::new(),
            held: String::new(),
            n_searched: 0,
            said: Vec::new(),
        }
    }

    /// Takes the next piece; what is clear with it.
    pub(super) fn push(&mut self, piece: &str) -> Vec<Said> {
        self.held.push_str(piece);
        while let Step::Again = self.step() {}
        std::mem::take(&mut self.said)
    }

    /// What was held back, at the end of the text. A call that is cut stays as far as it came.
    pub(super) fn finish(&mut self) -> Vec<Said> {
        let held = std::mem::take(&mut self.held);
        match self.place {
            Place::Text | Place::Tagged => self.text(&held),
            Place::Name => self.text(&format!("{FUNCTION}{held}")),
            // What is left of a mark may as well be text.
            Place::Behind => self.text(held.trim_start()),
            Place::Body(_) | Place::Key(_) | Place::Value(_) | Place::Object(_) => {}
        }
        std::mem::take(&mut self.said)
    }

    fn step(&mut self) -> Step {
        match self.place {
            Place::Text => self.look_for_mark(),
            Place::Tagged => self.tagged(),
            Place::Name => self.name(),
            Place::Body(n) => self.body(n),
            Place::Key(n) => self.key(n),
            Place::Value(n) => self.value(n),
            Place::Object(nesting) => self.object(nesting),
            Place::Behind => self.behind(),
        }
    }

    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.said.push(Said::Text(text.to_owned()));
        }
    }

    fn arguments(&mut self, text: String) {
        self.said.push(Said::Arguments(text));
    }

    fn go(&mut self, n_taken: usize, place: Place) -> Step {
        self.held.drain(..n_taken);
        self.place = place;
        Step::Again
    }

    fn look_for_mark(&mut self) -> Step {
        let found = [OPEN_TAG, FUNCTION].into_iter().filter_map(|mark| Some((self.held.find(mark)?, mark))).min();
        let is_kept = |n: usize| [OPEN_TAG, FUNCTION].iter().any(|mark| mark.starts_with(&self.held[n..]));
        let mut starts = self.held.char_indices().map(|(n, _)| n);
        let clear = found.map_or_else(|| starts.find(|n| is_kept(*n)).unwrap_or(self.held.len()), |(n, _)| n);
        let text: String = self.held.drain(..clear).collect();
        self.text(&text);
        match found {
            Some((_, FUNCTION)) => self.go(FUNCTION.len(), Place::Name),
            Some(_) => self.go(0, Place::Tagged),
            None => Step::Wait,
        }
    }

    fn tagged(&mut self) -> Step {
        let inner = self.held[OPEN_TAG.len()..].trim_start();
        let n_before = self.held.len() - inner.len();
        if inner.starts_with(FUNCTION) {
            return self.go(n_before + FUNCTION.len(), Place::Name);
        }
        if FUNCTION.starts_with(inner) {
            return Step::Wait;
        }
        let text: String = self.held.drain(..OPEN_TAG.len()).collect();
        self.text(&text);
        self.go(0, Place::Text)
    }

    fn name(&mut self) -> Step {
        match named(&self.held) {
            Named::Wait => Step::Wait,
            Named::No => {
                self.text(FUNCTION);
                self.go(0, Place::Text)
            }
            Named::Is(name, n_taken) => {
                self.function.clone_from(&name);
                self.said.push(Said::Call { name });
                self.go(n_taken, Place::Body(0))
            }
        }
    }

    fn body(&mut self, n: usize) -> Step {
        let inner = self.held.trim_start();
        let n_before = self.held.len() - inner.len();
        if inner.starts_with(PARAMETER) {
            return self.go(n_before + PARAMETER.len(), Place::Key(n));
        }
        if inner.starts_with(END) {
            self.arguments(if n == 0 { "{}" } else { "}" }.to_owned());
            return self.go(n_before + END.len(), Place::Behind);
        }
        if n == 0 && inner.starts_with('{') {
            return self.go(n_before, Place::Object(Nesting::default()));
        }
        if [PARAMETER, END].iter().any(|mark| mark.starts_with(inner)) {
            return Step::Wait;
        }
        // Neither a parameter nor the end: the call is over, and what follows is text.
        self.arguments(if n == 0 { "{}" } else { "}" }.to_owned());
        self.go(0, Place::Text)
    }

    fn key(&mut self, n: usize) -> Step {
        match named(&self.held) {
            Named::Wait => Step::Wait,
            Named::No => {
                self.arguments(if n == 0 { "{}" } else { "}" }.to_owned());
                self.text(PARAMETER);
                self.go(0, Place::Text)
            }
            Named::Is(key, n_taken) => {
                let written = Value::from(&*key);
                self.arguments(format!("{}{written}: ", if n == 0 { "{" } else { ", " }));
                self.key = key;
                self.go(n_taken, Place::Value(n))
            }
        }
    }

    fn value(&mut self, n: usize) -> Step {
        // Some models forget to close the last one.
        let ends = [(END_PARAMETER, END_PARAMETER.len()), (END, 0)];
        let unread = &self.held[self.n_searched..];
        let found = ends.into_iter().filter_map(|(mark, n_mark)| Some((unread.find(mark)?, n_mark))).min();
        let Some((at, n_mark)) = found else {
            // A mark may be cut. What is before that is not read again: a value can be long, and comes in many pieces.
            self.n_searched = self.held.floor_char_boundary((self.held.len() + 1).saturating_sub(END_PARAMETER.len()));
            return Step::Wait;
        };
        let at = std::mem::take(&mut self.n_searched) + at;
        let value = self.typed(&self.held[..at]);
        self.arguments(value.to_string());
        self.go(at + n_mark, Place::Body(n + 1))
    }

    fn object(&mut self, mut nesting: Nesting) -> Step {
        let end = self.held.char_indices().find_map(|(at, c)| nesting.ends_with(c).then_some(at + c.len_utf8()));
        let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        if !text.is_empty() {
            self.arguments(text);
        }
        self.place = if end.is_some() { Place::Behind } else { Place::Object(nesting) };
        if end.is_some() { Step::Again } else { Step::Wait }
    }

    fn behind(&mut self) -> Step {
        let inner = self.held.trim_start();
        let n_before = self.held.len() - inner.len();
        if let Some(mark) = [END, CLOSE_TAG].into_iter().find(|mark| inner.starts_with(mark)) {
            return self.go(n_before + mark.len(), Place::Behind);
        }
        if [END, CLOSE_TAG].iter().any(|mark| mark.starts_with(inner)) {
            return Step::Wait;
        }
        self.go(n_before, Place::Text)
    }

    /// A bare value as JSON: a text where the tool's schema says so or nothing else, else what it reads as, if that is JSON.
    fn typed(&self, value: &str) -> Value {
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let known = self.schemas.iter().find(|(name, _)| *name == self.function);
        let property = known.and_then(|(_, schema)| schema.as_ref()?.get("properties")?.get(&self.key));
        let kinds = property.map(kinds_of).unwrap_or_default();
        let says_something = |property: &Value| ["$ref", "const", "enum"].iter().any(|key| property.get(key).is_some());
        let is_known = !kinds.is_empty() || property.is_some_and(says_something);
        let is_listed = property
            .and_then(|property| property.get("enum")?.as_array())
            .is_some_and(|values| values.iter().any(|listed| listed == value));
        let read = match value.trim() {
            // As Python writes them, which models that are taught in it do.
            "None" => Some(Value::Null),
            "True" => Some(Value::Bool(true)),
            "False" => Some(Value::Bool(false)),
            trimmed => serde_json::from_str(trimmed).ok(),
        };
        let read = read.filter(|read| match kinds.contains(&"string") || is_listed {
            _ if !is_known => false,
            true => read.is_null() && kinds.contains(&"null"),
            false => true,
        });
        read.unwrap_or_else(|| Value::from(value))
    }
}

/// The types that a schema allows, its alternatives' included.
fn kinds_of(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => {
            let alternatives = ["anyOf", "oneOf"].iter().filter_map(|key| schema.get(key)?.as_array()).flatten();
            alternatives.filter(|one| one.get("type").is_some()).flat_map(kinds_of).collect()
        }
    }
}

/// What stands before a `>`.
enum Named {
    Wait,
    No,
    /// With the number of bytes that it takes.
    Is(String, usize),
}

fn named(held: &str) -> Named {
    let name = held.split('>').next().unwrap_or_default();
    let is_good = name.len() <= MAX_NAME && !name.contains(|c: char| c.is_whitespace() || c == '<');
    match (is_good, name.len() < held.len()) {
        (true, true) if !name.is_empty() => Named::Is(name.to_owned(), name.len() + 1),
        (true, false) => Named::Wait,
        _ => Named::No,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::calls::merged;
    use super::super::calls::tests::read_in_pieces;
    use super::*;

    fn schemas() -> Schemas {
        let properties = json!({"city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"},
            "sure": {"type": "boolean"}, "note": {"type": ["string", "null"]},
            "most": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "unit": {"enum": ["3", 4]}});
        [("weather".to_owned(), Some(json!({"type": "object", "properties": properties}))), ("time".to_owned(), None)]
            .into()
    }

    fn read(text: &str) -> Vec<Said> {
        read_in_pieces(text, |pieces| {
            let mut reader = MarkedReader::new(schemas());
            let mut said: Vec<Said> = pieces.iter().flat_map(|piece| reader.push(piece)).collect();
            said.extend(reader.finish());
            said
        })
    }

    fn text(text: &str) -> Vec<Said> {
        vec![Said::Text(text.into())]
    }

    fn call(name: &str, arguments: &str) -> Vec<Said> {
        let arguments = (!arguments.is_empty()).then(|| Said::Arguments(arguments.into()));
        std::iter::once(Said::Call { name: name.into() }).chain(arguments).collect()
    }

    #[test]
    fn marked_calls_are_found_however_the_text_is_cut() {
        let weather = "<function=weather>\n<parameter=city>\nZ\"\u{fc}rich\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>";
        let whole = || call("weather", "{\"city\": \"Z\\\"\u{fc}rich\", \"days\": 3}");
        let parameter = |key: &str, value: &str| {
            format!(
                "<tool_call>\n<function=weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"
            )
        };
        for (said, expect) in [
            (format!("<tool_call>\n{weather}\n</tool_call>"), vec![whole()]),
            (format!("Let me see.\n<tool_call>\n{weather}\n</tool_call>\n"), vec![text("Let me see.\n"), whole()]),
            (weather.to_owned(), vec![whole()]),
            (
                format!("<tool_call>{weather}</tool_call>\n<tool_call><function=time></function></tool_call> done"),
                vec![whole(), call("time", "{}"), text("done")],
            ),
            // Llama's own way, whole and without its end.
            (
                "<function=f>{\"a\": \"}\\\"\", \"b\": [{}]}</function>".into(),
                vec![call("f", "{\"a\": \"}\\\"\", \"b\": [{}]}")],
            ),
            ("<function=f>{\"a\": 1}".into(), vec![call("f", "{\"a\": 1}")]),
            // Types are those of the schema; what does not fit them is a text, and so is what no schema names.
            (parameter("city", "3"), vec![call("weather", "{\"city\": \"3\"}")]),
            (parameter("days", "soon"), vec![call("weather", "{\"days\": \"soon\"}")]),
            (parameter("sure", "True"), vec![call("weather", "{\"sure\": true}")]),
            (parameter("deep", "{\"a\": [1]}"), vec![call("weather", "{\"deep\": {\"a\":[1]}}")]),
            (parameter("note", "null"), vec![call("weather", "{\"note\": null}")]),
            (parameter("note", "7"), vec![call("weather", "{\"note\": \"7\"}")]),
            (parameter("most", "3"), vec![call("weather", "{\"most\": 3}")]),
            (parameter("most", "None"), vec![call("weather", "{\"most\": null}")]),
            (parameter("unit", "3"), vec![call("weather", "{\"unit\": \"3\"}")]),
            (parameter("unit", "4"), vec![call("weather", "{\"unit\": 4}")]),
            (parameter("what", "7"), vec![call("weather", "{\"what\": \"7\"}")]),
            (parameter("city", "a\n\n<b> x\n"), vec![call("weather", "{\"city\": \"a\\n\\n<b> x\\n\"}")]),
            // A last value that is not closed, and calls that are cut.
            (
                "<function=weather><parameter=city>Ulm</function></tool_call>".into(),
                vec![call("weather", "{\"city\": \"Ulm\"}")],
            ),
            ("<function=weather><parameter=city>Ul".into(), vec![call("weather", "{\"city\": ")]),
            ("<function=weather>".into(), vec![call("weather", "")]),
            ("<function=f>{\"a\": ".into(), vec![call("f", "{\"a\": ")]),
            // What only looks like one.
            ("a <tool_call> b".into(), vec![text("a <tool_call> b")]),
            ("a <tool_call".into(), vec![text("a <tool_call")]),
            ("<function=".into(), vec![text("<function=")]),
            ("<function=a b>".into(), vec![text("<function=a b>")]),
            ("<function=>x".into(), vec![text("<function=>x")]),
            ("x < y <f".into(), vec![text("x < y <f")]),
            ("<function=time> and so on".into(), vec![call("time", "{}"), text(" and so on")]),
        ] {
            assert_eq!(read(&said), expect.concat(), "{said}");
        }
    }

    #[test]
    fn a_long_value_is_searched_once() {
        let mut reader = MarkedReader::new(schemas());
        reader.push("<function=weather><parameter=city>");
        for piece in
            ["Z\u{fc}rich </", "para", "meter\u{1f600}", "\u{1f600}\u{1f600}\u{1f600}", " </parameter", "x", "y"]
        {
            assert_eq!(reader.push(piece), [], "{piece}");
            let n_again = reader.held.len() - reader.n_searched;
            assert!(n_again < END_PARAMETER.len() + 3, "{n_again} bytes are read again after {piece}");
        }
        let value = "Z\u{fc}rich </parameter\u{1f600}\u{1f600}\u{1f600}\u{1f600} </parameterxy";
        let expect = vec![Said::Arguments(Value::from(value).to_string())];
        assert_eq!(reader.push("</parameter>"), expect);
        assert_eq!(reader.n_searched, 0);
    }

    #[test]
    fn arguments_come_one_by_one() {
        let mut reader = MarkedReader::new(schemas());
        let mut seen = Vec::new();
        for piece in [
            "So <tool",
            "_call>\n<function=wea",
            "ther>\n<parameter=city>\nU",
            "lm\n</parameter>",
            "\n</function>\n</tool_call>",
        ] {
            seen.push(merged(reader.push(piece)));
        }
        let arguments = |text: &str| vec![Said::Arguments(text.into())];
        let named = [call("weather", ""), arguments("{\"city\": ")].concat();
        assert_eq!(seen, [text("So "), vec![], named, arguments("\"Ulm\""), arguments("}")]);
    }
}
