//! JSON text into any type that derives `Deserialize`: a small reader, because the usual one is half of a guest.
//!
//! Reading configurations with `serde_json` took 48 of the 116 KB of `route-least-loaded`: parsing and printing of floats
//! and the tables of both, unicode for quoting, a state machine per type. All of it is compiled while the operator waits for
//! an upload. Here the reader makes [`Token`]s, once for all types; only the step from a token to the type's visitor is
//! generic. Floats are parsed only where a type asks for one, and never printed: an error quotes what stands in the text.
//!
//! Why not a small crate: those for microcontrollers give errors without names, and those with a derive of their own take
//! serde's attributes away from policies. It reads all of RFC 8259 and is tested against `serde_json`; speed does not matter.

use std::borrow::Cow;
use std::fmt;

use serde::de::value::CowStrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Expected, IntoDeserializer, Unexpected, Visitor};

/// Arrays and objects inside each other; the stack of a guest holds more.
const MAX_DEPTH: u32 = 100;

/// Reads the whole of `text` as a `T`; the error ends with the place where reading stopped.
pub(crate) fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut reader = Reader { text, at: 0, depth: 0 };
    T::deserialize(&mut reader).and_then(|value| reader.end().map(|()| value)).map_err(|error| reader.explain(&error))
}

struct Reader<'de> {
    text: &'de str,
    at: usize,
    depth: u32,
}

/// The next thing in the text; of an array or object, its opening.
enum Token<'de> {
    Null,
    Bool(bool),
    Unsigned(u64),
    Negative(i64),
    /// A number that no 64-bit integer holds, as it stands in the text.
    Fraction(&'de str),
    Text(Cow<'de, str>),
    Array,
    Object,
}

#[derive(Debug)]
struct Error(String);

type Result<T, E = Error> = std::result::Result<T, E>;

// === impl Error ===

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self(format!("invalid type: {}, expected {expected}", name(unexpected)))
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self(format!("invalid value: {}, expected {expected}", name(unexpected)))
    }
}

/// serde's own words, without its code for floats and quoting: numbers that are not integers come as `Other`.
fn name(unexpected: Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Bool(value) => format!("boolean `{value}`"),
        Unexpected::Unsigned(value) => format!("integer `{value}`"),
        Unexpected::Signed(value) => format!("integer `{value}`"),
        Unexpected::Float(_) => "floating point number".to_owned(),
        Unexpected::Char(value) => format!("character `{value}`"),
        Unexpected::Str(text) => format!("string \"{text}\""),
        Unexpected::Bytes(_) => "bytes".to_owned(),
        Unexpected::Unit | Unexpected::Option => "null".to_owned(),
        Unexpected::NewtypeStruct | Unexpected::Map => "map".to_owned(),
        Unexpected::Seq => "sequence".to_owned(),
        Unexpected::Enum => "enum".to_owned(),
        Unexpected::UnitVariant => "unit variant".to_owned(),
        Unexpected::NewtypeVariant => "newtype variant".to_owned(),
        Unexpected::TupleVariant => "tuple variant".to_owned(),
        Unexpected::StructVariant => "struct variant".to_owned(),
        Unexpected::Other(what) => what.to_owned(),
    }
}

fn error<T>(message: &str) -> Result<T> {
    Err(Error(message.to_owned()))
}

fn not_an_integer(literal: &str, expected: &dyn Expected) -> Error {
    de::Error::invalid_type(Unexpected::Other(&format!("number `{literal}`")), expected)
}

// === impl Reader: from text to tokens ===

impl<'de> Reader<'de> {
    fn explain(&self, error: &Error) -> String {
        let before = self.text.get(..self.at).unwrap_or_default();
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        let column = before.bytes().rev().take_while(|byte| *byte != b'\n').count();
        format!("{error} at line {line} column {column}")
    }

    fn next_byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.next_byte() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.next_byte() {
            self.at += 1;
        }
    }

    fn end(&mut self) -> Result<()> {
        self.skip_space();
        if self.at < self.text.len() { error("trailing characters") } else { Ok(()) }
    }

    fn token(&mut self) -> Result<Token<'de>> {
        self.skip_space();
        let Some(byte) = self.next_byte() else { return error("the text ends where a value should be") };
        match byte {
            b'"' => self.text().map(Token::Text),
            b'-' | b'0'..=b'9' => self.number(),
            b'[' | b'{' => {
                self.at += 1;
                Ok(if byte == b'[' { Token::Array } else { Token::Object })
            }
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Result<Token<'de>> {
        let rest = self.text.as_bytes().get(self.at..).unwrap_or_default();
        let (word, token) = match rest {
            [b'n', ..] => ("null", Token::Null),
            [b't', ..] => ("true", Token::Bool(true)),
            _ => ("false", Token::Bool(false)),
        };
        if !rest.starts_with(word.as_bytes()) {
            return error("expected a value");
        }
        self.at += word.len();
        Ok(token)
    }

    fn number(&mut self) -> Result<Token<'de>> {
        let start = self.at;
        self.eat(b'-');
        if !self.eat(b'0') {
            self.digits()?;
        }
        if self.eat(b'.') {
            self.digits()?;
        }
        if self.eat(b'e') || self.eat(b'E') {
            let _sign = self.eat(b'-') || self.eat(b'+');
            self.digits()?;
        }
        let literal = self.text.get(start..self.at).unwrap_or_default();
        let digits = literal.strip_prefix('-');
        Ok(match (digits.unwrap_or(literal).parse(), digits) {
            (Ok(value), None) => Token::Unsigned(value),
            (Ok(value), Some(_)) => 0_i64.checked_sub_unsigned(value).map_or(Token::Fraction(literal), Token::Negative),
            _ => Token::Fraction(literal),
        })
    }

    fn digits(&mut self) -> Result<()> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.next_byte() {
            self.at += 1;
        }
        if self.at == start { error("expected a digit") } else { Ok(()) }
    }

    fn text(&mut self) -> Result<Cow<'de, str>> {
        if !self.eat(b'"') {
            return error("expected a name in quotes");
        }
        let mut text = String::new();
        loop {
            let start = self.at;
            while self.next_byte().is_some_and(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
                self.at += 1;
            }
            // Both ends are ends of the text or stand at an ASCII character.
            let run = self.text.get(start..self.at).unwrap_or_default();
            if self.eat(b'"') {
                return Ok(if text.is_empty() { Cow::Borrowed(run) } else { Cow::Owned(text + run) });
            }
            if !self.eat(b'\\') {
                return error("a string without an end, or with a control character");
            }
            text.push_str(run);
            text.push(self.escaped()?);
        }
    }

    fn escaped(&mut self) -> Result<char> {
        let byte = self.next_byte().unwrap_or_default();
        self.at += usize::from(byte.is_ascii_graphic());
        Ok(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => return self.unicode(),
            _ => return error("unknown escape"),
        })
    }

    /// Four digits, or eight of a surrogate pair.
    fn unicode(&mut self) -> Result<char> {
        let mut code = self.hex4()?;
        if (0xd800..0xdc00).contains(&code) && self.eat(b'\\') && self.eat(b'u') {
            let low = self.hex4()?.wrapping_sub(0xdc00);
            code = if low < 0x400 { 0x1_0000 + ((code - 0xd800) << 10) + low } else { code };
        }
        char::from_u32(code).ok_or_else(|| Error("half of a surrogate pair".to_owned()))
    }

    fn hex4(&mut self) -> Result<u32> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.next_byte().and_then(|byte| char::from(byte).to_digit(16));
            let Some(digit) = digit else { return error("expected four hexadecimal digits") };
            code = code << 4 | digit;
            self.at += 1;
        }
        Ok(code)
    }
}

// === impl Reader: from tokens to types ===

impl<'de> Reader<'de> {
    /// The next value, whatever it is. Without `FLOATS`, which is for types that want one, a fraction is an error.
    fn value<V: Visitor<'de>, const FLOATS: bool>(&mut self, visitor: V) -> Result<V::Value> {
        match self.token()? {
            Token::Null => visitor.visit_unit(),
            Token::Bool(value) => visitor.visit_bool(value),
            Token::Unsigned(value) => visitor.visit_u64(value),
            Token::Negative(value) => visitor.visit_i64(value),
            Token::Fraction(literal) if !FLOATS => Err(not_an_integer(literal, &visitor)),
            Token::Fraction(literal) => match literal.parse::<f64>() {
                Ok(value) if value.is_finite() => visitor.visit_f64(value),
                _ => error("number out of range"),
            },
            Token::Text(Cow::Borrowed(text)) => visitor.visit_borrowed_str(text),
            Token::Text(Cow::Owned(text)) => visitor.visit_string(text),
            Token::Array => self.items(b']', |items| visitor.visit_seq(items)),
            Token::Object => self.items(b'}', |items| visitor.visit_map(items)),
        }
    }

    fn items<T>(&mut self, close: u8, visit: impl FnOnce(&mut Items<'_, 'de>) -> Result<T>) -> Result<T> {
        if self.depth == MAX_DEPTH {
            return error("too many arrays and objects inside each other");
        }
        self.depth += 1;
        let mut items = Items { reader: self, close, state: State::Opened };
        let value = visit(&mut items)?;
        if items.more()? {
            return error("more elements than expected");
        }
        self.depth -= 1;
        Ok(value)
    }

    fn colon(&mut self) -> Result<()> {
        self.skip_space();
        if self.eat(b':') { Ok(()) } else { error("expected `:`") }
    }
}

macro_rules! read_as {
    ($floats:literal: $($hint:ident)*) => {$(
        fn $hint<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
            self.value::<V, $floats>(visitor)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for &mut Reader<'de> {
    type Error = Error;

    read_as! { true: deserialize_any deserialize_f32 deserialize_f64 }
    read_as! { false: deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 }
    read_as! { false: deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 }
    read_as! { false: deserialize_char deserialize_str deserialize_string deserialize_bytes deserialize_byte_buf }
    read_as! { false: deserialize_unit deserialize_seq deserialize_map deserialize_identifier }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.skip_space();
        if self.next_byte() != Some(b'n') {
            return visitor.visit_some(self);
        }
        self.word()?;
        visitor.visit_none()
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.skip_space();
        if let Some(b'-' | b'0'..=b'9') = self.next_byte() {
            self.number()?;
            return visitor.visit_unit();
        }
        self.value::<V, false>(visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value> {
        self.value::<V, false>(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value> {
        self.value::<V, false>(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(self, _: &'static str, _: usize, visitor: V) -> Result<V::Value> {
        self.value::<V, false>(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        self.value::<V, false>(visitor)
    }

    /// `"variant"`, or `{"variant": content}`.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        match self.token()? {
            Token::Text(variant) => visitor.visit_enum(variant.into_deserializer()),
            Token::Object => self.items(b'}', |items| {
                items.more()?;
                visitor.visit_enum(&mut *items.reader)
            }),
            _ => error("expected the name of a variant, or a map with one entry"),
        }
    }
}

/// What stands between the brackets of an array or object.
struct Items<'r, 'de> {
    reader: &'r mut Reader<'de>,
    close: u8,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Opened,
    Inside,
    Closed,
}

impl Items<'_, '_> {
    /// Whether there is another one; goes past the comma, or past the end.
    fn more(&mut self) -> Result<bool> {
        self.reader.skip_space();
        if self.state == State::Closed || self.reader.eat(self.close) {
            self.state = State::Closed;
            return Ok(false);
        }
        if self.state == State::Inside && !self.reader.eat(b',') {
            return error(if self.close == b']' { "expected `,` or `]`" } else { "expected `,` or `}`" });
        }
        self.reader.skip_space();
        self.state = State::Inside;
        Ok(true)
    }
}

impl<'de> de::SeqAccess<'de> for &mut Items<'_, 'de> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>> {
        if self.more()? { seed.deserialize(&mut *self.reader).map(Some) } else { Ok(None) }
    }
}

impl<'de> de::MapAccess<'de> for &mut Items<'_, 'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>> {
        if !self.more()? {
            return Ok(None);
        }
        let key = self.reader.text()?;
        seed.deserialize(Key(key)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value> {
        self.reader.colon()?;
        seed.deserialize(&mut *self.reader)
    }
}

/// The name before a colon; a number in quotes where a map has numbers for keys.
struct Key<'de>(Cow<'de, str>);

macro_rules! number_key {
    ($($hint:ident)*) => {$(
        fn $hint<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
            match self.0.parse() {
                Ok(number) => visitor.visit_u64(number),
                Err(_) => match self.0.parse() {
                    Ok(number) => visitor.visit_i64(number),
                    Err(_) => self.deserialize_any(visitor),
                },
            }
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Key<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.0 {
            Cow::Borrowed(text) => visitor.visit_borrowed_str(text),
            Cow::Owned(text) => visitor.visit_string(text),
        }
    }

    number_key! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 }
    number_key! { deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        let variant: CowStrDeserializer<'de, Error> = self.0.into_deserializer();
        visitor.visit_enum(variant)
    }

    serde::forward_to_deserialize_any! {
        bool f32 f64 char str string bytes byte_buf option unit unit_struct seq tuple tuple_struct map struct
        identifier ignored_any
    }
}

// An enum's variant with content: the name, then the content.

impl<'de> de::EnumAccess<'de> for &mut Reader<'de> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self)> {
        let variant = seed.deserialize(Key(self.text()?))?;
        self.colon()?;
        Ok((variant, self))
    }
}

impl<'de> de::VariantAccess<'de> for &mut Reader<'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<()> {
        serde::Deserialize::deserialize(self)
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value> {
        self.value::<V, false>(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, _fields: &'static [&'static str], visitor: V) -> Result<V::Value> {
        self.value::<V, false>(visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::Value;

    use super::*;

    const TEXTS: &[&str] = &[
        "",
        " ",
        "null",
        "nul",
        "true",
        "false",
        "falsE",
        "?",
        "0",
        "7",
        "-12",
        "01",
        "-",
        "+1",
        ".5",
        "1.",
        "1.5",
        "-2.25e3",
        "1e-2",
        "1E+2",
        "1e",
        "1e400",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775808",
        "-9223372036854775809",
        r#""""#,
        r#""plain é 漢""#,
        r#""a\n\t\r\b\f\/\\\"z""#,
        r#""\u00e9\ud83d\ude00.""#,
        r#""\ud83d""#,
        r#""\ud83dx""#,
        r#""\ud83d\u0041""#,
        r#""\ude00""#,
        r#""\u00g0""#,
        r#""\u00"#,
        r#""\x""#,
        r#""\é""#,
        r#""open"#,
        "\"\n\"",
        r#""\"#,
        "[]",
        "[ ]",
        "[1]",
        " [ 1 , [ 2 ] , {} ] ",
        "[1,]",
        "[,1]",
        "[1 2]",
        "[1",
        "[",
        "{}",
        "{ }",
        r#"{"a":1}"#,
        r#" { "a" : 1 , "b" : [ true , null ] } "#,
        r#"{"a":1,}"#,
        r#"{"a"}"#,
        r#"{"a":}"#,
        r#"{a:1}"#,
        r#"{"a":1 "b":2}"#,
        r#"{1:1}"#,
        "{",
        r#"{"a":1"#,
        "[}",
        "{]",
        "1 2",
        "{}x",
        "[[[[1.5]]]]",
    ];

    #[test]
    fn any_text_reads_as_with_serde_json() {
        for text in TEXTS {
            assert_eq!(read::<Value>(text).ok(), serde_json::from_str(text).ok(), "{text}");
        }
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Off,
        Fixed(u8),
        Ramp { from: f32, to: f32 },
        Pair(i8, i8),
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Id(u32);

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct All {
        flag: bool,
        share: f64,
        small: i8,
        letter: char,
        name: String,
        limit: Option<u16>,
        modes: Vec<Mode>,
        pair: (u8, u8),
        unit: (),
        id: Option<Id>,
        #[serde(rename = "weights")]
        by_number: BTreeMap<u32, i64>,
    }

    #[test]
    fn types_read_as_with_serde_json() {
        for text in [
            "{}",
            r#"{"flag": true, "share": 0.25, "small": -3, "letter": "x", "name": "n\u0061me"}"#,
            r#"{"share": 3}"#,
            r#"{"share": -3}"#,
            r#"{"share": 1e2}"#,
            r#"{"limit": null}"#,
            r#"{"limit": 5}"#,
            r#"{"modes": ["off", {"fixed": 3}, {"ramp": {"from": 0.5, "to": 2}}, {"pair": [1, -1]}, {"off": null}]}"#,
            r#"{"modes": ["on"]}"#,
            r#"{"modes": ["fixed"]}"#,
            r#"{"modes": [{}]}"#,
            r#"{"modes": [{"off": null, "fixed": 1}]}"#,
            r#"{"modes": [3]}"#,
            r#"{"modes": "off"}"#,
            r#"{"modes": [{"pair": [1, 2, 3]}]}"#,
            r#"{"modes": [{"pair": [1]}]}"#,
            r#"{"pair": [1, 2], "unit": null, "id": 7}"#,
            r#"{"pair": [1, 2, 3]}"#,
            r#"{"pair": [1]}"#,
            r#"{"unit": 0}"#,
            r#"{"weights": {"1": 5, "20": -6}}"#,
            r#"{"weights": {"x": 5}}"#,
            r#"{"weights": {"-1": 5}}"#,
            r#"{"other": [1.5, {"a": "b", "c": [null, 1e9]}], "small": 1}"#,
            r#"{"other": [1.}"#,
            r#"{"flag": true, "flag": true}"#,
            r#"{"small": 200}"#,
            r#"{"small": 1.0}"#,
            r#"{"small": "1"}"#,
            r#"{"flag": 1}"#,
            r#"{"name": 1}"#,
            r#"{"letter": "xy"}"#,
        ] {
            assert_eq!(read::<All>(text).ok(), serde_json::from_str(text).ok(), "{text}");
        }
    }

    #[test]
    fn depth_has_a_bound() {
        let nested = |n| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(read::<Value>(&nested(100)).is_ok());
        assert!(read::<Value>(&nested(101)).is_err_and(|error| error.contains("inside each other")));
    }
}
