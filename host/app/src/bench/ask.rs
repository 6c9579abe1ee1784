//! One request and its times, over a pool of kept connections.
//!
//! The stream is cut into server-sent events here: what a measuring client needs is the moment at which an event was whole and
//! whether it carried text, which is a search for a blank line and one look at the JSON.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use pointsman_sched::ids::Micros;
use serde::Deserialize;
use serde_json::Value;

use crate::cli::BenchArgs;
use crate::clock::SystemClock;

/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// Longest event of a stream.
const MAX_EVENT: usize = 8 << 20;
/// Characters of an error that are shown.
const MAX_MESSAGE: usize = 300;

/// The server under load.
#[derive(Debug)]
pub(super) struct Target {
    client: Client<HttpConnector, Full<Bytes>>,
    clock: Arc<SystemClock>,
    uri: Uri,
    key: Option<HeaderValue>,
    timeout: Duration,
    streams: bool,
    pub(super) model: String,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was answered.
    Done(Times),
    /// The server would not take it, and said why: `x-pointsman-reason`, or the status; in so many microseconds.
    Rejected(String, Micros),
    /// It went wrong.
    Failed(String),
}

/// A request that was answered, in microseconds from when it was due.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    /// To the first text; absent without streaming.
    pub(super) first: Option<u64>,
    /// Between texts.
    pub(super) gaps: Vec<u64>,
    /// To the end.
    pub(super) whole: u64,
    pub(super) usage: Usage,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) prompt_tokens_details: Option<Details>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Details {
    pub(super) cached_tokens: u64,
}

/// What a chunk or an answer may say; the rest is not looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Said {
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice {
    text: Option<String>,
    delta: Delta,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Delta {
    content: Option<String>,
}

// === impl Target ===

impl Target {
    /// Finds the model to ask, which is also the proof that a server is there.
    ///
    /// # Errors
    /// Not a URL that can be used, nobody answers, or the model is unknown.
    pub(super) async fn connect(args: &BenchArgs, clock: Arc<SystemClock>) -> anyhow::Result<Self> {
        let base = args.url.trim_end_matches('/').trim_end_matches("/v1");
        if !base.starts_with("http://") {
            bail!("--url {}: it must begin with http:// (https is not spoken here)", args.url);
        }
        let path = if args.chat { "chat/completions" } else { "completions" };
        let uri: Uri = format!("{base}/v1/{path}").parse().with_context(|| format!("--url {}", args.url))?;
        let key = args.api_key.as_ref().map(|key| HeaderValue::from_str(&format!("Bearer {key}")));
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let mut target = Self {
            client: Client::builder(TokioExecutor::new()).pool_max_idle_per_host(usize::MAX).build(connector),
            clock,
            uri,
            key: key.transpose().context("--api-key has characters that no header may have")?,
            timeout: Duration::from_secs(args.timeout_s),
            streams: !args.no_stream,
            model: String::new(),
        };
        let models = target.models(&format!("{base}/v1/models")).await.with_context(|| args.url.clone())?;
        target.model = match &args.model {
            Some(model) if models.contains(model) => model.clone(),
            Some(model) => bail!("--model {model}: the server has {}", models.join(", ")),
            None => models.first().context("the server has no model")?.clone(),
        };
        Ok(target)
    }

    async fn models(&self, url: &str) -> anyhow::Result<Vec<String>> {
        let request = self.request(Method::GET, url.parse()?, Bytes::new())?;
        let answer = tokio::time::timeout(self.timeout, self.client.request(request)).await??;
        let status = answer.status();
        let body = whole(answer).await?;
        if status != StatusCode::OK {
            bail!("GET {url}: {}", refused(status, &body));
        }
        let list: Value = serde_json::from_slice(&body).with_context(|| format!("GET {url} is not JSON"))?;
        let ids = list["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
        Ok(ids.map(str::to_owned).collect())
    }

    fn request(&self, method: Method, uri: Uri, body: Bytes) -> anyhow::Result<Request<Full<Bytes>>> {
        let mut request = Request::builder().method(method).uri(uri).header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, key.clone());
        }
        Ok(request.body(Full::new(body))?)
    }

    /// Sends a request that was due at `due` and reads its answer to the end.
    pub(super) async fn ask(&self, body: Vec<u8>, due: Micros) -> Outcome {
        match tokio::time::timeout(self.timeout, self.answer(body.into(), due)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Outcome::Failed(shown(&format!("{error:#}"))),
            Err(_) => Outcome::Failed(format!("no whole answer within {} s", self.timeout.as_secs())),
        }
    }

    async fn answer(&self, body: Bytes, due: Micros) -> anyhow::Result<Outcome> {
        let request = self.request(Method::POST, self.uri.clone(), body)?;
        let answer = self.client.request(request).await.map_err(root)?;
        let status = answer.status();
        if status == StatusCode::OK && self.streams {
            return self.stream(answer, due).await;
        }
        let reason = answer.headers().get("x-pointsman-reason").and_then(|v| v.to_str().ok()).map(str::to_owned);
        let body = whole(answer).await?;
        Ok(match status {
            StatusCode::OK => {
                let said: Said = serde_json::from_slice(&body).context("an answer that is not JSON")?;
                let whole = self.clock.micros() - due;
                Outcome::Done(Times { whole, usage: said.usage.unwrap_or_default(), ..Times::default() })
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                let reason = reason.unwrap_or_else(|| status.as_str().to_owned());
                Outcome::Rejected(reason, self.clock.micros() - due)
            }
            _ => Outcome::Failed(refused(status, &body)),
        })
    }

    async fn stream(&self, answer: Response<hyper::body::Incoming>, due: Micros) -> anyhow::Result<Outcome> {
        let (mut body, mut events, mut times, mut last) =
            (answer.into_body(), Events::default(), Times::default(), due);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            let now = self.clock.micros();
            events.add(&data)?;
            while let Some(event) = events.next() {
                if event == b"[DONE]" {
                    times.whole = now - due;
                    return Ok(Outcome::Done(times));
                }
                let said: Said = serde_json::from_slice(event).context("an event that is not JSON")?;
                if let Some(error) = said.error {
                    return Ok(Outcome::Failed(shown(error["message"].as_str().unwrap_or("an error event"))));
                }
                times.usage = said.usage.unwrap_or(times.usage);
                if said.choices.iter().any(Choice::has_text) {
                    match times.first {
                        None => times.first = Some(now - due),
                        Some(_) => times.gaps.push(now - last),
                    }
                    last = now;
                }
            }
        }
        bail!("the stream ended without [DONE]")
    }
}

impl Choice {
    fn has_text(&self) -> bool {
        [&self.text, &self.delta.content].into_iter().flatten().any(|text| !text.is_empty())
    }
}

/// The `data:` lines of a stream.
#[derive(Debug, Default)]
struct Events {
    buffer: Vec<u8>,
    /// What was handed out already.
    read: usize,
}

impl Events {
    fn add(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.buffer.drain(..self.read);
        self.read = 0;
        if self.buffer.len() + bytes.len() > MAX_EVENT {
            bail!("an event of more than {} MiB", MAX_EVENT >> 20);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next whole line of data. Every server that streams completions sends one line per event.
    fn next(&mut self) -> Option<&[u8]> {
        loop {
            let rest = &self.buffer[self.read..];
            let end = rest.iter().position(|&b| b == b'\n')?;
            let line = self.read..self.read + end;
            self.read += end + 1;
            if self.buffer[line.clone()].starts_with(b"data:") {
                return Some(self.buffer[line].trim_ascii_end()[5..].trim_ascii_start());
            }
        }
    }
}

/// The whole body, up to a bound.
async fn whole(answer: Response<hyper::body::Incoming>) -> anyhow::Result<Bytes> {
    let body = Limited::new(answer, MAX_ANSWER).collect().await;
    Ok(body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes())
}

/// The innermost error: that of the connection, without the client's own frames around it.
fn root(error: hyper_util::client::legacy::Error) -> anyhow::Error {
    anyhow::anyhow!("{}", anyhow::Error::from(error).root_cause())
}

/// An error object's message, or the body's beginning.
fn refused(status: StatusCode, body: &[u8]) -> String {
    let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = String::from_utf8_lossy(body);
    shown(&format!("{status}: {}", parsed["error"]["message"].as_str().unwrap_or(&text)))
}

fn shown(message: &str) -> String {
    message.chars().take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_lines_wherever_the_bytes_are_cut() {
        let stream = b": hello\nevent: x\ndata: {\"a\":1}\n\ndata:[DONE]\r\n\r\nid: 3\n\n";
        for cut in 1..stream.len() {
            let mut events = Events::default();
            let mut found = Vec::new();
            for part in stream.chunks(cut) {
                events.add(part).expect("short");
                while let Some(event) = events.next() {
                    found.push(String::from_utf8(event.to_vec()).expect("UTF-8"));
                }
            }
            assert_eq!(found, ["{\"a\":1}", "[DONE]"], "cut every {cut} bytes");
        }
    }

    #[test]
    fn text_is_told_from_other_chunks() {
        for (chunk, expect) in [
            (r#"{"choices":[{"text":" a"}]}"#, true),
            (r#"{"choices":[{"delta":{"content":"a"}}]}"#, true),
            (r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, false),
            (r#"{"choices":[{"delta":{"content":null},"finish_reason":"stop"}]}"#, false),
            (r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}"#, false),
        ] {
            let said: Said = serde_json::from_str(chunk).expect(chunk);
            assert_eq!(said.choices.iter().any(Choice::has_text), expect, "{chunk}");
        }
    }
}
