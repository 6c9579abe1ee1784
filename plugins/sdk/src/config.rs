//! Configuration: the JSON text of `lifecycle.init` into the policy's own type.
//!
//! The error goes to an operator's terminal, so it says where in the text it stands and which fields exist.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::json;

/// The configuration of a policy that has none: `{}` only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoConfig {}

/// Reads `text` as a `C`.
pub(crate) fn parse<C: DeserializeOwned>(text: &str) -> Result<C, String> {
    let text = if text.trim().is_empty() { "{}" } else { text };
    json::read(text).map_err(|error| format!("bad configuration: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Limits {
        slo_ms: u32,
        share: f64,
    }

    #[test]
    fn errors_name_the_field_and_the_known_ones() {
        for (text, expect) in [
            ("", Ok(Limits::default())),
            (" {} ", Ok(Limits::default())),
            (r#"{"slo_ms": 5, "share": 0.5}"#, Ok(Limits { slo_ms: 5, share: 0.5 })),
            (r#"{"slo": 5}"#, Err("unknown field `slo`, expected `slo_ms` or `share`")),
            (r#"{"slo_ms": -5}"#, Err("invalid value: integer `-5`, expected u32 at line 1 column 13")),
            (r#"{"slo_ms": 1.5}"#, Err("invalid type: number `1.5`, expected u32")),
            (r#"{"slo_ms": "5"}"#, Err("invalid type: string \"5\", expected u32")),
            (r#"{"share": true}"#, Err("invalid type: boolean `true`, expected f64")),
            (r#"{"share": {}}"#, Err("invalid type: map, expected f64")),
            ("{\n\"slo_ms\": 5", Err("expected `,` or `}` at line 2 column 11")),
            (r#"{"slo_ms": }"#, Err("expected a value at line 1 column 11")),
            ("[1]x", Err("trailing characters")),
        ] {
            match (parse::<Limits>(text), expect) {
                (Ok(got), Ok(expect)) => assert_eq!(got, expect, "{text}"),
                (Err(got), Err(expect)) => assert!(got.contains(expect), "{text}: {got}"),
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
        assert!(parse::<NoConfig>(r#"{"a":1}"#).is_err_and(|error| error.contains("unknown field `a`")));
    }
}
