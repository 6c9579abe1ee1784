//! Tool calls in the text that a model writes: found, named, and their arguments handed on as they come.
//!
//! Families differ in how they say that a call begins; what follows is always a JSON object with a name and arguments. So
//! there is one scanner of such an object and a few ways to get to it. Own code and not a JSON parser, because arguments are
//! streamed before the object is complete, and because a text that turns out to be no call must come out as it was.

use serde_json::Value;

/// How a text says that it calls a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// `<tool_call>{...}</tool_call>`, any number of them, text around (Hermes, Qwen).
    Tagged,
    /// `[TOOL_CALLS][{...}, {...}]`, or as newer models write it `[TOOL_CALLS]name[ARGS]{...}`, with an identity or without marks
    /// between (Mistral).
    Listed,
    /// `<|tool_call|>[{...}, {...}]<|/tool_call|>`, or `functools[...]` (Phi-4-mini).
    Piped,
    /// The text is `{...}`, or several with `;` between them (Llama 3).
    Bare,
    /// The text is `[{...}, {...}]`: what a grammar makes of `tool_choice: required`.
    Array,
    /// The text is the arguments of this tool: what a grammar makes of a tool that is named.
    Arguments(String),
}

/// A part of what was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    Text(String),
    /// A call begins.
    Call {
        name: String,
    },
    /// More of the JSON text of the last call's arguments.
    Arguments(String),
}

/// Reads a text that arrives in pieces.
#[derive(Debug)]
pub(super) struct CallReader {
    style: Style,
    place: Place,
    /// Text that may still become a sign.
    held: String,
    said: Vec<Said>,
}

#[derive(Debug)]
enum Place {
    /// Nothing but white space has come.
    Start,
    /// In what is text, unless a sign comes.
    Text,
    /// Where an object may follow: after a sign, or between two objects.
    Between,
    Object(Box<Object>),
    /// In what stands between a sign and the arguments of a call, in `held` with the sign.
    Header,
    /// In the arguments of a call that has been named.
    Raw(Nesting),
    /// After an object.
    Behind,
    /// Whatever comes is text.
    Rest,
    /// Whatever comes is arguments.
    Arguments,
}

const OPEN_TAG: &str = "<tool_call>";
const CLOSE_TAG: &str = "</tool_call>";
const LIST: &str = "[TOOL_CALLS]";
const PIPED: [&str; 2] = ["<|tool_call|>", "functools["];
const CLOSE_PIPED: &str = "<|/tool_call|>";
/// A special token that says of what follows that it is a call; seen only where special tokens are shown.
const PYTHON: &str = "<|python_tag|>";

/// What newer models of Mistral write between a name and its arguments.
const CALL_ID: &str = "[CALL_ID]";
const ARGS: &str = "[ARGS]";
/// Bytes of a header.
const MAX_HEADER: usize = 256;

/// Keys of a call.
const KEYS: [&str; 5] = ["name", "arguments", "parameters", "type", "id"];

/// An object that is being read.
#[derive(Debug, Default)]
struct Object {
    /// As it came, while nothing of it has been handed on.
    raw: String,
    name: Option<String>,
    /// Arguments that wait for the name.
    early: String,
    has_arguments: bool,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// At depth 1: a key, or the value after it.
    in_value: bool,
    key: String,
    value: String,
}

/// Where in an object a character is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Nesting {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// Takes the next character; whether the object ends with it.
    pub(super) fn ends_with(&mut self, c: char) -> bool {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => self.in_string = !self.in_string,
            _ if self.in_string => {}
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

/// What a character came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    On,
    Done,
    /// It is no call.
    No,
}

// === impl CallReader ===

impl CallReader {
    pub(super) fn new(style: Style) -> Self {
        let (place, said) = match &style {
            Style::Tagged | Style::Listed | Style::Piped => (Place::Text, Vec::new()),
            Style::Bare | Style::Array => (Place::Start, Vec::new()),
            Style::Arguments(name) => (Place::Arguments, vec![Said::Call { name: name.clone() }]),
        };
        Self { style, place, held: String::new(), said }
    }

    /// Takes the next piece; what is clear with it.
    pub(super) fn push(&mut self, piece: &str) -> Vec<Said> {
        for c in piece.chars() {
            self.take(c);
        }
        merged(std::mem::take(&mut self.said))
    }

    /// What was held back, at the end of the text.
    pub(super) fn finish(&mut self) -> Vec<Said> {
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.place, Place::Rest) {
            Place::Object(object) if object.name.is_none() => self.text(&format!("{held}{}", object.raw)),
            Place::Between if self.style != Style::Tagged => {}
            _ => self.text(&held),
        }
        merged(std::mem::take(&mut self.said))
    }

    /// Where a grammar leaves room for calls alone, what is none was cut off in the midst of one: nothing that a reader should see.
    fn text(&mut self, text: &str) {
        if !text.is_empty() && self.style != Style::Array {
            self.said.push(Said::Text(text.to_owned()));
        }
    }

    fn take(&mut self, c: char) {
        match &mut self.place {
            Place::Start => self.start(c),
            Place::Text => self.look_for_sign(c),
            Place::Between => self.between(c),
            Place::Object(object) => match object.take(c, &mut self.said) {
                Step::On => {}
                Step::Done => self.go(Place::Behind),
                Step::No => self.is_no_call(),
            },
            Place::Header => self.header(c),
            Place::Raw(nesting) => {
                self.said.push(Said::Arguments(c.into()));
                if nesting.ends_with(c) {
                    self.go(Place::Behind);
                }
            }
            Place::Behind => self.behind(c),
            Place::Rest => self.text(c.encode_utf8(&mut [0; 4])),
            Place::Arguments => self.said.push(Said::Arguments(c.into())),
        }
    }

    /// Changes the place and forgets the sign that led there.
    fn go(&mut self, place: Place) {
        self.held.clear();
        self.place = place;
    }

    /// What looked like a call is text, sign included.
    fn is_no_call(&mut self) {
        let Place::Object(object) = std::mem::replace(&mut self.place, Place::Rest) else { return };
        let text = format!("{}{}", std::mem::take(&mut self.held), object.raw);
        self.text(&text);
        if matches!(self.style, Style::Tagged | Style::Piped) {
            self.place = Place::Text;
        }
    }

    fn start(&mut self, c: char) {
        self.held.push(c);
        let seen = self.held.trim_start();
        match self.style {
            _ if seen.is_empty() => {}
            Style::Bare if PYTHON.starts_with(seen) => {
                if seen == PYTHON {
                    self.held.clear();
                }
            }
            Style::Bare if seen == "{" => {
                self.held.pop();
                self.object();
            }
            Style::Array if seen == "[" => self.go(Place::Between),
            _ => {
                let held = std::mem::take(&mut self.held);
                self.text(&held);
                self.place = Place::Rest;
            }
        }
    }

    fn look_for_sign(&mut self, c: char) {
        let signs = match self.style {
            Style::Tagged => &[OPEN_TAG][..],
            Style::Piped => &PIPED,
            _ => &[LIST],
        };
        self.held.push(c);
        if let Some(sign) = signs.iter().find(|sign| self.held.ends_with(**sign)) {
            let text = self.held[..self.held.len() - sign.len()].to_owned();
            self.text(&text);
            self.held = (*sign).to_owned();
            self.place = Place::Between;
            return;
        }
        let kept_of = |sign: &&str| (1..sign.len()).rev().find(|&n| self.held.ends_with(&sign[..n])).unwrap_or(0);
        let kept = signs.iter().map(kept_of).max().unwrap_or(0);
        let text = self.held[..self.held.len() - kept].to_owned();
        self.held.drain(..text.len());
        self.text(&text);
    }

    /// Before an object. `held` is the sign, if one led here.
    fn between(&mut self, c: char) {
        let is_list = matches!(self.style, Style::Listed | Style::Piped | Style::Array);
        match c {
            c if c.is_whitespace() => self.held.push(c),
            '{' => self.object(),
            '[' if matches!(self.style, Style::Listed | Style::Piped) => self.held.push(c),
            c if self.style == Style::Listed && is_of_name(c) && self.held.trim_end() == LIST => {
                self.held.push(c);
                self.place = Place::Header;
            }
            ']' if is_list => self.go(Place::Behind),
            _ => {
                let held = std::mem::take(&mut self.held);
                self.text(&held);
                let goes_on = matches!(self.style, Style::Tagged | Style::Piped);
                self.place = if goes_on { Place::Text } else { Place::Rest };
                self.take(c);
            }
        }
    }

    /// The name of a call, and perhaps its identity.
    fn header(&mut self, c: char) {
        let header = self.held[LIST.len()..].trim_start();
        if c == '{'
            && let Some(name) = name_of(header)
        {
            self.said.push(Said::Call { name: name.to_owned() });
            self.go(Place::Raw(Nesting::default()));
            return self.take(c);
        }
        self.held.push(c);
        if self.held.len() > MAX_HEADER || !may_be_header(self.held[LIST.len()..].trim_start()) {
            let held = std::mem::take(&mut self.held);
            self.text(&held);
            self.place = Place::Rest;
        }
    }

    /// An object begins, with this brace.
    fn object(&mut self) {
        let object = Object { raw: "{".to_owned(), depth: 1, ..Object::default() };
        self.place = Place::Object(Box::new(object));
    }

    /// What is held is no sign that closes: it is text, in which a sign may begin.
    fn is_text(&mut self) {
        self.place = Place::Text;
        std::mem::take(&mut self.held).chars().for_each(|c| self.take(c));
    }

    fn behind(&mut self, c: char) {
        if c.is_whitespace() && !self.held.starts_with(['<', '[']) {
            return;
        }
        match (&self.style, c) {
            (Style::Listed | Style::Piped | Style::Array, ',') | (Style::Bare, ';') if self.held.is_empty() => {
                self.go(Place::Between);
            }
            (Style::Listed, _) if c == '[' || !self.held.is_empty() => {
                self.held.push(c);
                if self.held == LIST {
                    self.place = Place::Between;
                } else if !LIST.starts_with(&self.held) {
                    let held = std::mem::take(&mut self.held);
                    self.text(&held);
                    self.place = Place::Rest;
                }
            }
            (Style::Listed | Style::Piped | Style::Array, ']') if self.held.is_empty() => {}
            (Style::Piped, _) => {
                self.held.push(c);
                if self.held == CLOSE_PIPED {
                    self.go(Place::Text);
                } else if !CLOSE_PIPED.starts_with(&self.held) {
                    self.is_text();
                }
            }
            (Style::Tagged, _) => {
                self.held.push(c);
                if self.held == CLOSE_TAG {
                    self.held.clear();
                } else if self.held == OPEN_TAG {
                    self.place = Place::Between;
                } else if !CLOSE_TAG.starts_with(&self.held) && !OPEN_TAG.starts_with(&self.held) {
                    self.is_text();
                }
            }
            _ => {
                self.said.push(Said::Text(c.into()));
                self.place = Place::Rest;
            }
        }
    }
}

// === impl Object ===

impl Object {
    fn take(&mut self, c: char, said: &mut Vec<Said>) -> Step {
        if self.name.is_none() {
            self.raw.push(c);
        }
        let was_string = self.in_string;
        let ends_here = !was_string && self.depth == 1 && matches!(c, ',' | '}');
        if ends_here && !self.value_ends(said) {
            return Step::No;
        }
        if self.in_value && !ends_here {
            self.value_goes_on(c, said);
        }
        if was_string {
            return self.string(c);
        }
        match c {
            '"' => {
                self.in_string = true;
                if self.depth == 1 && !self.in_value {
                    self.key.clear();
                }
            }
            '{' | '[' => self.depth += 1,
            '}' | ']' => self.depth -= 1,
            ':' if self.depth == 1 && !self.in_value => {
                self.in_value = true;
                self.value.clear();
            }
            ',' if self.depth == 1 => {}
            c if c.is_whitespace() || self.in_value => {}
            // No JSON: between a brace, a key and a colon stands nothing.
            _ => return if self.name.is_none() { Step::No } else { Step::On },
        }
        if self.depth > 0 {
            return Step::On;
        }
        match (&self.name, self.has_arguments) {
            (None, _) => Step::No,
            (Some(_), false) => {
                said.push(Said::Arguments("{}".to_owned()));
                Step::Done
            }
            (Some(_), true) => Step::Done,
        }
    }

    fn string(&mut self, c: char) -> Step {
        let is_key = self.depth == 1 && !self.in_value;
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' => self.escaped = true,
            '"' => {
                self.in_string = false;
                // Without its name an object is a call only as long as it has the keys of one.
                let is_strange = is_key && self.name.is_none() && !KEYS.contains(&&*self.key);
                return if is_strange { Step::No } else { Step::On };
            }
            _ => {}
        }
        if is_key {
            self.key.push(c);
        }
        Step::On
    }

    fn is_arguments(&self) -> bool {
        matches!(&*self.key, "arguments" | "parameters")
    }

    /// Hands on arguments once the tool has a name. Arguments that are written as a string wait for its end.
    fn value_goes_on(&mut self, c: char, said: &mut Vec<Said>) {
        if c.is_whitespace() && self.depth == 1 && !self.in_string {
            return;
        }
        self.value.push(c);
        if self.is_arguments() && !self.value.starts_with('"') && self.name.is_some() {
            self.has_arguments = true;
            said.push(Said::Arguments(c.into()));
        }
    }

    /// Whether the object may still be a call.
    fn value_ends(&mut self, said: &mut Vec<Said>) -> bool {
        if !std::mem::take(&mut self.in_value) {
            return true;
        }
        let value = std::mem::take(&mut self.value);
        match &*self.key {
            "name" if self.name.is_none() => {
                let Ok(name) = serde_json::from_str::<String>(&value) else { return false };
                said.push(Said::Call { name: name.clone() });
                self.name = Some(name);
                self.raw.clear();
                if !self.early.is_empty() {
                    self.has_arguments = true;
                    said.push(Said::Arguments(std::mem::take(&mut self.early)));
                }
            }
            _ if self.is_arguments() && !self.has_arguments => {
                let text = serde_json::from_str::<Value>(&value).ok();
                let text = text.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or(value);
                match self.name {
                    Some(_) => {
                        self.has_arguments = true;
                        said.push(Said::Arguments(text));
                    }
                    None => self.early = text,
                }
            }
            _ => {}
        }
        true
    }
}

/// Whether a character may stand in the name of a tool.
fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_-.".contains(c)
}

/// A header in parts: a name, and what follows it.
fn split_header(header: &str) -> (&str, &str) {
    let n = header.find(|c| !is_of_name(c)).unwrap_or(header.len());
    (&header[..n], header[n..].trim())
}

/// The name that a whole header gives.
fn name_of(header: &str) -> Option<&str> {
    let (name, rest) = split_header(header);
    let has_id = |rest: &str| rest.strip_suffix(ARGS).is_some_and(|id| id.trim().chars().all(is_of_name));
    let is_whole = rest.is_empty() || rest == ARGS || rest.strip_prefix(CALL_ID).is_some_and(has_id);
    (is_whole && !name.is_empty()).then_some(name)
}

/// Whether more may make a header of it.
fn may_be_header(header: &str) -> bool {
    let (_, rest) = split_header(header);
    match rest.strip_prefix(CALL_ID) {
        Some(id) => ARGS.starts_with(split_header(id.trim_start()).1),
        None => [ARGS, CALL_ID].iter().any(|mark| mark.starts_with(rest)),
    }
}

/// Neighbours of one kind as one.
pub(super) fn merged(said: Vec<Said>) -> Vec<Said> {
    let mut out: Vec<Said> = Vec::new();
    for said in said {
        match (out.last_mut(), said) {
            (Some(Said::Text(last)), Said::Text(text)) | (Some(Said::Arguments(last)), Said::Arguments(text)) => {
                last.push_str(&text);
            }
            (_, said) => out.push(said),
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn read(style: &Style, text: &str) -> Vec<Said> {
        read_in_pieces(text, |pieces| {
            let mut reader = CallReader::new(style.clone());
            let mut said: Vec<Said> = pieces.iter().flat_map(|piece| reader.push(piece)).collect();
            said.extend(reader.finish());
            said
        })
    }

    /// Reads a text whole and cut at every place and into characters; all must say the same.
    pub(in crate::openai) fn read_in_pieces(text: &str, read: impl Fn(&[&str]) -> Vec<Said>) -> Vec<Said> {
        let run = |pieces: &[&str]| merged(read(pieces));
        let whole = run(&[text]);
        for (cut, _) in text.char_indices() {
            assert_eq!(run(&[&text[..cut], &text[cut..]]), whole, "{text} cut at {cut}");
        }
        let mut buffer = [0; 4];
        let letters: Vec<String> = text.chars().map(|c| c.encode_utf8(&mut buffer).to_owned()).collect();
        assert_eq!(run(&letters.iter().map(String::as_str).collect::<Vec<_>>()), whole, "{text} by letters");
        whole
    }

    fn text(text: &str) -> Said {
        Said::Text(text.into())
    }

    fn call(name: &str, arguments: &str) -> [Said; 2] {
        [Said::Call { name: name.into() }, Said::Arguments(arguments.into())]
    }

    #[test]
    fn calls_are_found_in_every_style_however_the_text_is_cut() {
        let weather = || call("weather", r#"{"city": "Z\"\u00fc}rich", "days": [1, {"a": 2}]}"#).to_vec();
        let object = r#"{"name": "weather", "arguments": {"city": "Z\"\u00fc}rich", "days": [1, {"a": 2}]}}"#;
        let time = || call("time", "{}").to_vec();
        let tagged = format!("<tool_call>\n{object}\n</tool_call>");
        let second = r#"<tool_call>{"name": "time"}</tool_call>"#;
        for (style, said, expect) in [
            (Style::Tagged, tagged.clone(), vec![weather()]),
            (Style::Tagged, format!("Let me see. {tagged}"), vec![vec![text("Let me see. ")], weather()]),
            (Style::Tagged, format!("{tagged}\n{second}"), vec![weather(), time()]),
            (Style::Tagged, format!("{tagged} done"), vec![weather(), vec![text("done")]]),
            (Style::Tagged, format!("<tool_call>{object}"), vec![weather()]),
            (Style::Tagged, "a <tool_ca".into(), vec![vec![text("a <tool_ca")]]),
            (Style::Tagged, "a <b> <tool_call> c".into(), vec![vec![text("a <b> <tool_call> c")]]),
            (
                Style::Tagged,
                "<tool_call>{\"x\": 1}</tool_call>".into(),
                vec![vec![text("<tool_call>{\"x\": 1}</tool_call>")]],
            ),
            (Style::Listed, format!("[TOOL_CALLS] [{object}, {{\"name\": \"time\"}}]"), vec![weather(), time()]),
            (Style::Listed, format!("[TOOL_CALLS]{object}"), vec![weather()]),
            (Style::Listed, "[TOOL] no".into(), vec![vec![text("[TOOL] no")]]),
            (Style::Bare, object.replace("arguments", "parameters"), vec![weather()]),
            (Style::Bare, format!(" {object}; {{\"name\": \"time\"}}"), vec![weather(), time()]),
            (Style::Bare, format!("<|python_tag|>{object}"), vec![weather()]),
            (Style::Bare, "Hello {\"name\": 1}".into(), vec![vec![text("Hello {\"name\": 1}")]]),
            (
                Style::Bare,
                r#"{"answer": [1, 2], "b": "c"}"#.into(),
                vec![vec![text(r#"{"answer": [1, 2], "b": "c"}"#)]],
            ),
            (Style::Bare, "{not json} at all".into(), vec![vec![text("{not json} at all")]]),
            (Style::Bare, "{\"name\": \"ti".into(), vec![vec![text("{\"name\": \"ti")]]),
            (Style::Array, format!("[{object}, {{\"name\": \"time\"}}]"), vec![weather(), time()]),
            (Style::Array, "[]".into(), vec![]),
            // Cut short: nothing of it is text.
            (Style::Array, "\n  { \"na".into(), vec![]),
            (Style::Array, "[ { \"name\" :\n".into(), vec![]),
            (Style::Array, format!("[{object}, \n {{ \"na"), vec![weather()]),
            // The arguments before the name, as a string, and cut short.
            (Style::Bare, r#"{"arguments": {"a": 1} , "name": "f"}"#.into(), vec![call("f", r#"{"a": 1}"#).to_vec()]),
            (
                Style::Bare,
                r#"{"name": "f", "arguments": "{\"a\": 1}"}"#.into(),
                vec![call("f", r#"{"a": 1}"#).to_vec()],
            ),
            (Style::Bare, r#"{"name": "f", "arguments": {"a": "b"#.into(), vec![call("f", r#"{"a": "b"#).to_vec()]),
            (Style::Arguments("f".into()), r#"{"a": 1}"#.into(), vec![call("f", r#"{"a": 1}"#).to_vec()]),
        ] {
            assert_eq!(read(&style, &said), expect.concat(), "{style:?}: {said}");
        }
    }

    #[test]
    fn lists_are_read_as_each_family_writes_them() {
        let arguments = r#"{"city": "Ulm", "days": [1, {"a": "}"}]}"#;
        let weather = || call("weather", arguments).to_vec();
        let object = format!(r#"{{"name": "weather", "arguments": {arguments}}}"#);
        let time = || call("time", "{}").to_vec();
        for (style, said, expect) in [
            (
                Style::Piped,
                format!("So. <|tool_call|>[{object}, {{\"name\": \"time\"}}]<|/tool_call|>"),
                vec![vec![text("So. ")], weather(), time()],
            ),
            (Style::Piped, format!("functools[{object}]"), vec![weather()]),
            // What is left of a sign is text, and so are letters; a sign may follow either.
            (Style::Piped, format!("functools[{object}]\n<|"), vec![weather(), vec![text("<|")]]),
            (
                Style::Piped,
                format!("functools[{object}] and functools[{object}]"),
                vec![weather(), vec![text("and ")], weather()],
            ),
            (Style::Piped, format!("functools[{object}]<|tool_call|>[{object}]"), vec![weather(), weather()]),
            (Style::Piped, format!("functools[{object}]<, ]"), vec![weather(), vec![text("<, ]")]]),
            (Style::Tagged, format!("<tool_call>{object}</tool"), vec![weather(), vec![text("</tool")]]),
            (Style::Piped, "Use functools".to_owned(), vec![vec![text("Use functools")]]),
            (Style::Piped, "[functools](x)".to_owned(), vec![vec![text("[functools](x)")]]),
            (Style::Piped, format!("functools[{object}]<b>"), vec![weather(), vec![text("<b>")]]),
            (
                Style::Piped,
                format!("import functools, then <|tool_call|>[{object}]"),
                vec![vec![text("import functools, then ")], weather()],
            ),
            (Style::Piped, "func <|tool_c".into(), vec![vec![text("func <|tool_c")]]),
            (Style::Listed, format!("[TOOL_CALLS]weather{arguments}"), vec![weather()]),
            (Style::Listed, format!("[TOOL_CALLS]weather[ARGS]{arguments}"), vec![weather()]),
            (
                Style::Listed,
                format!("So. [TOOL_CALLS]weather[CALL_ID]a1B[ARGS] {arguments}\n[TOOL_CALLS]time{{}}"),
                vec![vec![text("So. ")], weather(), time()],
            ),
            (Style::Listed, "[TOOL_CALLS]f[ARGS]{\"a\": \"b".into(), vec![call("f", "{\"a\": \"b").to_vec()]),
            (Style::Listed, "[TOOL_CALLS]f[AR".into(), vec![vec![text("[TOOL_CALLS]f[AR")]]),
            (Style::Listed, "[TOOL_CALLS]f[ID]{}".into(), vec![vec![text("[TOOL_CALLS]f[ID]{}")]]),
            (Style::Listed, "[TOOL_CALLS] is a mark {}".into(), vec![vec![text("[TOOL_CALLS] is a mark {}")]]),
            (Style::Listed, "[TOOL_CALLS]f{}[TOOL".into(), vec![call("f", "{}").to_vec(), vec![text("[TOOL")]]),
            (Style::Listed, "[TOOL_CALLS]f{}[x] y".into(), vec![call("f", "{}").to_vec(), vec![text("[x] y")]]),
        ] {
            assert_eq!(read(&style, &said), expect.concat(), "{style:?}: {said}");
        }
    }

    #[test]
    fn arguments_come_as_they_are_written() {
        let mut reader = CallReader::new(Style::Tagged);
        let mut seen = Vec::new();
        for piece in ["So: <tool", "_call>{\"name\": \"f\", ", "\"arguments\": {\"a\"", ": 1", "}}", "</tool_call>"] {
            seen.push(reader.push(piece));
        }
        let arguments = |text: &str| vec![Said::Arguments(text.into())];
        let name = vec![Said::Call { name: "f".into() }];
        assert_eq!(seen, [vec![text("So: ")], name, arguments("{\"a\""), arguments(": 1"), arguments("}"), vec![]]);
        assert_eq!(reader.finish(), []);
    }
}
