//! What can go wrong with a request that was sent to an upstream, whose fault it is, and whether another server may do better.

use std::error::Error;

use pointsman_telemetry::UpstreamOutcome;

use super::{pool, wire};

/// Bytes of an upstream's own words that are kept.
const MAX_WORDS: usize = 512;

/// Why an upstream gave no answer, or not all of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Mishap {
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    #[error("did not begin to answer within {limit_ms} ms")]
    Silent { limit_ms: u64 },
    #[error("sent nothing for {limit_ms} ms in the middle of its answer")]
    Stalled { limit_ms: u64 },
    #[error("broke off before its answer was whole")]
    Broken,
    /// It said that its answer was whole.
    #[error("ended its answer before each choice had a `finish_reason`")]
    Unfinished,
    #[error("answered with {0} instead of what was asked for")]
    Garbled(String),
    #[error("answered with more than {limit} bytes{}", if *.is_event { " in one event" } else { "" })]
    TooLarge { limit: usize, is_event: bool },
    /// Its error in the middle of a stream.
    #[error("failed: {0}")]
    Said(String),
    /// An answer that is an error; the words are its own.
    #[error("answered {status}: {words}")]
    Status { status: u16, words: String, retry_after_ms: u32 },
}

/// What a mishap is to the one who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// The request cannot be served, here or elsewhere.
    Client,
    /// The upstream has no room now.
    Load,
    /// The upstream, the way to it, or what this host knows of it.
    Upstream,
}

impl Mishap {
    /// An error before the head of an answer.
    pub(super) fn of(error: &hyper_util::client::legacy::Error) -> Self {
        if error.is_connect() {
            return Self::Unreachable(wire::cause(error));
        }
        // What this side found wrong with the other's frames; what the other side resets is its own end.
        if let Some(error) = pool::h2_error(error).filter(|error| error.is_library()) {
            return Self::Garbled(shortened(&format!("something else than HTTP/2 ({error})")));
        }
        let hyper = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
        match hyper {
            Some(error) if error.is_parse_too_large() => Self::Garbled("a head that is too large".to_owned()),
            Some(error) if error.is_parse() => Self::Garbled(shortened(&format!("something else than HTTP ({error})"))),
            _ => Self::Broken,
        }
    }

    /// An answer that is an error. `body` is the beginning of it.
    pub(super) fn status(status: u16, body: &[u8], retry_after_ms: u32) -> Self {
        Self::Status { status, words: words(body), retry_after_ms }
    }

    /// For the log: without the upstream's own words, which may be those of the prompt or of the answer. Explanations have them.
    pub(crate) fn logged(&self) -> String {
        match self {
            Self::Status { status, .. } => format!("answered {status}"),
            Self::Said(_) | Self::Garbled(_) => self.told(),
            other => other.to_string(),
        }
    }

    /// For the client. What an upstream says of itself, or of this host's key, is for explanations.
    pub(crate) fn told(&self) -> String {
        match self {
            Self::Status { status, .. } if self.blame() == Blame::Upstream => format!("answered {status}"),
            Self::Said(_) => "failed in the middle of its answer".to_owned(),
            Self::Garbled(_) => "answered with something else than was asked for".to_owned(),
            other => other.to_string(),
        }
    }

    pub(crate) fn blame(&self) -> Blame {
        match self {
            // The others of 4xx say that this host, or whoever configured it, is wrong about the upstream.
            Self::Status { status: 400 | 413 | 415 | 422, .. } => Blame::Client,
            Self::Status { status: 429, .. } => Blame::Load,
            _ => Blame::Upstream,
        }
    }

    pub(crate) fn outcome(&self) -> UpstreamOutcome {
        match self {
            Self::Unreachable(_) => UpstreamOutcome::Unreachable,
            Self::Silent { .. } | Self::Stalled { .. } => UpstreamOutcome::Timeout,
            Self::Broken | Self::Unfinished => UpstreamOutcome::Broken,
            Self::Garbled(_) | Self::TooLarge { .. } => UpstreamOutcome::Garbled,
            Self::Said(_) => UpstreamOutcome::Failed,
            // Somebody else's request has this id there now: no fault, and others may take it.
            Self::Status { status: 409, .. } => UpstreamOutcome::Refused,
            Self::Status { .. } => match self.blame() {
                Blame::Client => UpstreamOutcome::Refused,
                Blame::Load => UpstreamOutcome::Saturated,
                Blame::Upstream => UpstreamOutcome::Failed,
            },
        }
    }
}

/// The message of an error object, or what there is instead of one.
pub(super) fn words(body: &[u8]) -> String {
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let message = json.as_ref().and_then(|json| {
        let error = json.get("error").unwrap_or(json);
        error.as_str().or_else(|| error.get("message")?.as_str())
    });
    let text = message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    let text = text.trim();
    if text.is_empty() { "without a word".to_owned() } else { shortened(text) }
}

fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_WORDS)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_read_in_every_form_that_servers_have() {
        for (body, expect) in [
            (r#"{"error": {"message": "too long", "code": 3}}"#, "too long"),
            (r#"{"error": "no such model"}"#, "no such model"),
            (r#"{"object": "error", "message": "an older vLLM"}"#, "an older vLLM"),
            ("<html>Bad Gateway</html>\n", "<html>Bad Gateway</html>"),
            ("", "without a word"),
        ] {
            assert_eq!(words(body.as_bytes()), expect);
        }
        assert_eq!(words("\u{e9}".repeat(400).as_bytes()).len(), MAX_WORDS);
    }

    #[test]
    fn a_status_says_whose_fault_it_is() {
        for (status, blame, outcome) in [
            (400, Blame::Client, UpstreamOutcome::Refused),
            (422, Blame::Client, UpstreamOutcome::Refused),
            (401, Blame::Upstream, UpstreamOutcome::Failed),
            (404, Blame::Upstream, UpstreamOutcome::Failed),
            (429, Blame::Load, UpstreamOutcome::Saturated),
            (500, Blame::Upstream, UpstreamOutcome::Failed),
            (503, Blame::Upstream, UpstreamOutcome::Failed),
            (302, Blame::Upstream, UpstreamOutcome::Failed),
            (409, Blame::Upstream, UpstreamOutcome::Refused),
        ] {
            let mishap = Mishap::status(status, b"", 0);
            assert_eq!((mishap.blame(), mishap.outcome()), (blame, outcome), "{status}");
        }
    }
}
