//! The one place where anything that went wrong becomes an HTTP response.
//!
//! Handlers say what happened; status, `type`, `code`, retry advice and headers are decided here, in one table, so that the
//! same fault looks the same on every route and in the middle of a stream.

use std::sync::Arc;

use axum::http::StatusCode;
use axum::http::header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use pointsman_sched::mask::MaskError;
use pointsman_sched::request::{CancelCause, Failure, ResourceExhausted};
use pointsman_sched::route::{Refusal, Rejection};
use serde::Serialize;

use crate::ports::{AdminError, AdminErrorKind};
use crate::upstream::{Blame, Mishap};

/// Says which bound stands in the way of a refused request.
pub(crate) const REASON: HeaderName = HeaderName::from_static("x-pointsman-reason");
/// `false` where a retry cannot help; stock clients honour it.
pub(crate) const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A client that closed its connection, for logs.
const CLIENT_CLOSED: u16 = 499;

/// What went wrong with a request, seen from the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// A field holds what it must not.
    #[error("{problem}")]
    Invalid { param: String, problem: String },
    /// A field or value that this host does not implement.
    #[error("{what} is not supported by this server")]
    Unsupported { param: String, what: String },
    #[error("the body is not valid JSON: {0}")]
    Json(#[source] serde_json::Error),
    #[error("the body is not UTF-8: byte {at} is wrong; JSON is sent as UTF-8")]
    Utf8 { at: usize },
    #[error("the body must be sent as `application/json`, found `{found}`")]
    ContentType { found: String },
    #[error("the body must be sent as it is, found the `content-encoding` `{found}`")]
    ContentEncoding { found: String },
    #[error(
        "the context of this model is {limit} tokens; the prompt has {prompt} and {requested} more were requested: \
         shorten the prompt or lower the number of tokens to generate"
    )]
    Context { param: &'static str, prompt: usize, requested: u32, limit: u32 },
    #[error(
        "`{param}` has {found} tokens and this model takes {limit}: send less at a time, or set `truncate_prompt_tokens` to \
         -1 to embed only its beginning"
    )]
    InputTooLong { param: String, found: usize, limit: u32 },
    #[error("{problem}: send `Authorization: Bearer <key>`")]
    Unauthorized { problem: &'static str },
    #[error(
        "{problem}: send `Authorization: Bearer <key>` or `x-api-key: <key>`, with a key from whoever runs this server"
    )]
    ApiKey { problem: &'static str },
    #[error("{what}")]
    Forbidden { what: &'static str },
    #[error("the admin token `{token}` has the role `read` and this call needs `operate`")]
    Role { token: String },
    #[error("the model `{name}` does not exist; known models: {known}")]
    UnknownModel { param: &'static str, name: String, known: String },
    #[error("no request `{id}` is in flight")]
    UnknownRequest { id: String },
    #[error("no route for {method} {path}")]
    UnknownRoute { method: String, path: String },
    #[error("{method} is not allowed on {path}")]
    Method { method: String, path: String },
    #[error("no {what} `{id}` is kept for this tenant")]
    NotKept { what: &'static str, id: String },
    #[error("{problem}")]
    InUse { problem: String },
    #[error("{what}: delete files, or wait until some expire")]
    StorageFull { what: String },
    /// The log has the details.
    #[error("{what}: the disk of the server refuses it; retry later")]
    Disk { what: &'static str },
    #[error("the body did not arrive within {limit_ms} ms")]
    BodyTimeout { limit_ms: u64 },
    #[error("the body could not be read")]
    BodyBroken,
    #[error("a request with the id `{id}` is in flight")]
    IdInUse { id: String },
    #[error("the body exceeds {limit} bytes")]
    TooLarge { limit: usize },
    #[error("the host is saturated: {what}; retry later")]
    Saturated { what: String },
    /// A limit of the API key.
    #[error("{what}")]
    Quota { what: String, wait_us: u64 },
    #[error("{}", policy_message(.0))]
    Rejected(Rejection),
    #[error("{}", failure_message(.0))]
    Failed(Failure),
    #[error("the request was cancelled")]
    Cancelled,
    #[error("the client did not read its response fast enough")]
    SlowClient,
    #[error("the deadline of {limit_ms} ms has passed")]
    Deadline { limit_ms: u64 },
    #[error("models are being loaded")]
    Loading,
    #[error("a device has stopped working; restart the host")]
    DriverGone,
    /// Of the host as a whole.
    #[error("no model can be served now: {degraded}")]
    Unserved { degraded: String },
    #[error("the host is draining and takes no new requests")]
    Draining,
    #[error("the model was unloaded before the request had ended; ask for another, or again where the name stays")]
    Unloaded,
    #[error("no replica of `{model}` is running")]
    NoReplica { model: String },
    /// A model that is loaded on demand.
    #[error("`{model}` is being loaded, and {why}; retry later")]
    NotYet { model: String, why: String },
    #[error("`{model}` could not be loaded: {why}")]
    NotLoaded { model: String, why: String, retry_after_ms: u32 },
    #[error("the upstream `{upstream}` {}", .mishap.told())]
    Upstream { upstream: Arc<str>, mishap: Mishap },
    /// A request that only a replica here could serve.
    #[error("`{model}` is served by upstreams alone, and {what}")]
    NotOnward { model: String, what: &'static str },
    #[error("{0}")]
    Admin(AdminError),
    /// A bug or a panic; the log has the details.
    #[error("the server failed to handle the request")]
    Internal,
}

/// The classes of errors that clients know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Class {
    status: u16,
    kind: &'static str,
    code: &'static str,
    /// Whether sending the same request again may succeed.
    retry: bool,
}

/// `{"type": "error", "error": {...}}`, as Anthropic writes it.
#[derive(Debug, Serialize)]
struct AnthropicEnvelope {
    r#type: &'static str,
    error: AnthropicBody,
}

#[derive(Debug, Serialize)]
struct AnthropicBody {
    r#type: &'static str,
    message: String,
}

/// `{"error": {...}}`, on the wire.
#[derive(Debug, Serialize)]
struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Debug, Serialize)]
struct Body<'a> {
    message: String,
    r#type: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

const fn class(status: u16, kind: &'static str, code: &'static str, retry: bool) -> Class {
    Class { status, kind, code, retry }
}

const INVALID: &str = "invalid_request_error";

fn policy_message(rejection: &Rejection) -> String {
    let why = match rejection.reason {
        Refusal::Overloaded => "a policy refused the request: too much load",
        Refusal::Quota => "a policy refused the request: quota used up",
        Refusal::NotAllowed => "a policy does not allow the request",
        Refusal::CannotMeetDeadline => "a policy refused the request: it would miss its deadline",
    };
    if rejection.message.is_empty() { why.to_owned() } else { format!("{why}: {}", rejection.message) }
}

/// Which device failed, and how, is for the log.
fn failure_message(failure: &Failure) -> String {
    match failure {
        Failure::Engine(_) => "the engine failed while computing this request; retry it".to_owned(),
        other => other.to_string(),
    }
}

// === impl ApiError ===

impl ApiError {
    /// A field that holds what it must not; `problem` is a whole sentence.
    pub(crate) fn invalid(param: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { param: param.into(), problem: problem.into() }
    }

    pub(crate) fn unsupported(param: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Unsupported { param: param.into(), what: what.into() }
    }

    /// What an engine's early end means to the client.
    pub(crate) fn cancelled(cause: CancelCause, limit_ms: u64) -> Self {
        match cause {
            CancelCause::ClientGone => Self::SlowClient,
            CancelCause::Asked | CancelCause::StopString => Self::Cancelled,
            CancelCause::Deadline => Self::Deadline { limit_ms },
            CancelCause::Shutdown => Self::Draining,
            CancelCause::Unloaded => Self::Unloaded,
        }
    }

    fn class(&self) -> Class {
        match self {
            Self::Invalid { .. } => class(400, INVALID, "invalid_value", false),
            Self::Unsupported { .. } => class(400, INVALID, "unsupported", false),
            Self::Json(_) | Self::Utf8 { .. } => class(400, INVALID, "invalid_json", false),
            Self::BodyBroken => class(400, INVALID, "incomplete_body", false),
            Self::Context { .. } | Self::InputTooLong { .. } => class(400, INVALID, "context_length_exceeded", false),
            Self::ContentType { .. } | Self::ContentEncoding { .. } => {
                class(415, INVALID, "unsupported_media_type", false)
            }
            Self::Unauthorized { .. } | Self::ApiKey { .. } => {
                class(401, "authentication_error", "invalid_api_key", false)
            }
            Self::Forbidden { .. } | Self::Role { .. } => class(403, "permission_error", "forbidden", false),
            Self::UnknownModel { .. } => class(404, INVALID, "model_not_found", false),
            Self::UnknownRequest { .. } => class(404, INVALID, "request_not_found", false),
            Self::UnknownRoute { .. } => class(404, INVALID, "unknown_url", false),
            Self::NotKept { .. } => class(404, INVALID, "not_found", false),
            Self::InUse { .. } => class(409, INVALID, "conflict", false),
            Self::StorageFull { .. } => class(429, "rate_limit_error", "storage_full", false),
            Self::Disk { .. } => class(503, "server_error", "disk", true),
            Self::Method { .. } => class(405, INVALID, "method_not_allowed", false),
            Self::BodyTimeout { .. } => class(408, "timeout_error", "body_timeout", true),
            Self::IdInUse { .. } => class(409, INVALID, "request_id_in_use", false),
            Self::TooLarge { .. } => class(413, INVALID, "body_too_large", false),
            Self::Saturated { .. } => class(429, "rate_limit_error", "saturated", true),
            Self::Quota { .. } => class(429, "rate_limit_error", "rate_limit_exceeded", true),
            Self::Rejected(r) if r.reason == Refusal::NotAllowed => {
                class(403, "permission_error", "not_allowed", false)
            }
            Self::Rejected(_) => class(429, "rate_limit_error", "rejected_by_policy", true),
            Self::Failed(failure) => failure_class(failure),
            Self::Cancelled => class(CLIENT_CLOSED, "cancelled_error", "cancelled", false),
            Self::SlowClient => class(CLIENT_CLOSED, "cancelled_error", "client_too_slow", false),
            Self::Deadline { .. } => class(504, "timeout_error", "deadline_exceeded", true),
            Self::Loading | Self::NotYet { .. } => class(503, "server_error", "loading", true),
            Self::NotLoaded { .. } => class(503, "server_error", "model_not_loaded", true),
            Self::DriverGone | Self::Unserved { .. } => class(503, "server_error", "no_replica", true),
            Self::Draining => class(503, "server_error", "draining", true),
            Self::Unloaded => class(503, "server_error", "unloaded", true),
            Self::NoReplica { .. } => class(503, "server_error", "no_replica", true),
            Self::Upstream { mishap, .. } => upstream_class(mishap),
            Self::NotOnward { .. } => class(400, INVALID, "unsupported", false),
            Self::Admin(error) => admin_class(error.kind),
            Self::Internal => class(500, "server_error", "internal", false),
        }
    }

    /// The status that it becomes.
    pub(crate) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.class().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Whether a retry may help.
    pub(crate) fn retryable(&self) -> bool {
        self.class().retry
    }

    /// The field at fault.
    pub(crate) fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } | Self::Unsupported { param, .. } if param.is_empty() => None,
            Self::Invalid { param, .. } | Self::Unsupported { param, .. } => Some(param),
            Self::Context { param, .. } => Some(param),
            Self::InputTooLong { param, .. } => Some(param),
            Self::UnknownModel { param, .. } => Some(param),
            Self::IdInUse { .. } => Some("x-request-id"),
            Self::Admin(error) => error.param.as_deref(),
            _ => None,
        }
    }

    /// `queue|kv|quota|deadline|policy`, for the reason header, the metric and the event.
    pub(crate) fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Saturated { .. }
            | Self::Failed(Failure::Exhausted(ResourceExhausted::Queue { .. }) | Failure::Mask(MaskError::NoMemory)) => {
                Some("queue")
            }
            Self::Failed(Failure::Exhausted(ResourceExhausted::KvPool { .. })) => Some("kv"),
            Self::Upstream { mishap, .. } if mishap.blame() == Blame::Load => Some("queue"),
            Self::Quota { .. } => Some("quota"),
            Self::Rejected(rejection) => Some(match rejection.reason {
                Refusal::Quota => "quota",
                Refusal::CannotMeetDeadline => "deadline",
                Refusal::Overloaded | Refusal::NotAllowed => "policy",
            }),
            Self::Failed(Failure::DroppedByPolicy | Failure::Unanswered) => Some("policy"),
            _ => None,
        }
    }

    /// Milliseconds after which a retry makes sense; one second is about the length of a queue's turn.
    pub(crate) fn retry_after_ms(&self) -> u32 {
        match self {
            Self::Rejected(rejection) if rejection.retry_after_ms > 0 => rejection.retry_after_ms,
            Self::Upstream { mishap: Mishap::Status { retry_after_ms, .. }, .. } if *retry_after_ms > 0 => {
                *retry_after_ms
            }
            Self::NotLoaded { retry_after_ms, .. } => *retry_after_ms,
            Self::Quota { wait_us, .. } if *wait_us > 0 => u32::try_from(wait_us.div_ceil(1_000)).unwrap_or(u32::MAX),
            _ => 1_000,
        }
    }

    /// The error object, as it stands in a body or in a frame of a stream.
    pub(crate) fn json(&self) -> String {
        let class = self.class();
        let body = Body { message: self.to_string(), r#type: class.kind, param: self.param(), code: class.code };
        serde_json::to_string(&Envelope { error: body }).unwrap_or_default()
    }

    /// The same as Anthropic's clients know it.
    pub(crate) fn anthropic_json(&self) -> String {
        let (_, kind) = anthropic_class(self.class().status);
        let error = AnthropicBody { r#type: kind, message: self.to_string() };
        serde_json::to_string(&AnthropicEnvelope { r#type: "error", error }).unwrap_or_default()
    }

    /// The status that Anthropic's clients know.
    pub(crate) fn anthropic_status(&self) -> StatusCode {
        let (status, _) = anthropic_class(self.class().status);
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// Anthropic's status and type for a status of ours: it has words for fewer things, and a status of its own for a host that is
/// there and cannot serve now.
fn anthropic_class(status: u16) -> (u16, &'static str) {
    match status {
        401 => (401, "authentication_error"),
        403 => (403, "permission_error"),
        404 => (404, "not_found_error"),
        408 | 504 => (status, "timeout_error"),
        413 => (413, "request_too_large"),
        429 => (429, "rate_limit_error"),
        503 => (529, "overloaded_error"),
        500.. => (status, "api_error"),
        _ => (status, INVALID),
    }
}

fn failure_class(failure: &Failure) -> Class {
    match failure {
        Failure::Exhausted(ResourceExhausted::Queue { .. }) => class(429, "rate_limit_error", "saturated", true),
        Failure::Exhausted(ResourceExhausted::KvPool { .. }) => {
            class(429, "rate_limit_error", "resource_exhausted", false)
        }
        Failure::Exhausted(ResourceExhausted::Context { .. }) => class(400, INVALID, "context_length_exceeded", false),
        Failure::DroppedByPolicy => class(429, "rate_limit_error", "dropped_by_policy", true),
        Failure::Mask(MaskError::Grammar { .. }) => class(400, INVALID, "format_too_complex", false),
        Failure::Mask(MaskError::NoMemory) => class(429, "rate_limit_error", "saturated", true),
        Failure::Mask(MaskError::Disjoint) => class(403, "permission_error", "not_allowed", false),
        Failure::Unanswered => class(503, "server_error", "sampler_failed", true),
        Failure::Engine(_) => class(500, "server_error", "engine_fault", true),
        Failure::DeviceLost => class(503, "server_error", "no_replica", true),
    }
}

fn upstream_class(mishap: &Mishap) -> Class {
    match (mishap.blame(), mishap) {
        (Blame::Client, Mishap::Status { status, .. }) => class(*status, INVALID, "refused_by_upstream", false),
        (Blame::Load, _) => class(429, "rate_limit_error", "saturated", true),
        (_, Mishap::Silent { .. } | Mishap::Stalled { .. }) => class(504, "timeout_error", "upstream_timeout", true),
        (_, Mishap::Unreachable(_)) => class(502, "server_error", "upstream_unreachable", true),
        _ => class(502, "server_error", "upstream_failed", true),
    }
}

fn admin_class(kind: AdminErrorKind) -> Class {
    match kind {
        AdminErrorKind::Invalid => class(400, INVALID, "invalid_value", false),
        AdminErrorKind::NotFound => class(404, INVALID, "not_found", false),
        AdminErrorKind::Conflict => class(409, INVALID, "conflict", false),
        AdminErrorKind::TooLarge => class(413, INVALID, "body_too_large", false),
        AdminErrorKind::Refused => class(422, INVALID, "refused", false),
        AdminErrorKind::Busy => class(429, "rate_limit_error", "busy", true),
        AdminErrorKind::Upstream => class(502, "server_error", "registry", true),
        AdminErrorKind::Internal => class(500, "server_error", "internal", true),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let class = self.class();
        let mut response = Response::new(axum::body::Body::from(self.json()));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if !class.retry {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        } else if matches!(class.status, 429 | 503) {
            headers.insert(RETRY_AFTER, HeaderValue::from(self.retry_after_ms().div_ceil(1_000)));
        }
        if let Some(reason) = self.reason() {
            headers.insert(REASON, HeaderValue::from_static(reason));
        }
        if class.status == 413 {
            // What is left of the body stays unread.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if class.status == 401 {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}

/// What a panic in a handler becomes; the payload goes to the log only.
#[expect(clippy::needless_pass_by_value, reason = "the signature that the catch-panic layer calls")]
pub(crate) fn panicked(payload: Box<dyn std::any::Any + Send>) -> Response<http_body_util::Full<Bytes>> {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    tracing::error!(panic = text.unwrap_or("no text"), "a handler panicked; this is a bug of the host");
    let error = ApiError::Internal;
    let mut response = Response::new(http_body_util::Full::from(error.json()));
    *response.status_mut() = error.status();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    response.extensions_mut().insert(Arc::new(error));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(error: ApiError) -> (u16, Option<String>, Option<String>, Option<String>) {
        let response = error.into_response();
        let text = |name: HeaderName| response.headers().get(name).map(|v| v.to_str().expect("ascii").to_owned());
        (response.status().as_u16(), text(RETRY_AFTER), text(REASON), text(SHOULD_RETRY))
    }

    #[test]
    fn every_fault_has_its_status_and_advice() {
        let rejected =
            |reason, retry_after_ms| ApiError::Rejected(Rejection { reason, retry_after_ms, message: "m".into() });
        let some = |s: &str| Some(s.to_owned());
        for (error, expect) in [
            (ApiError::invalid("x", "y"), (400, None, None, some("false"))),
            (ApiError::Saturated { what: "x".into() }, (429, some("1"), some("queue"), None)),
            (ApiError::Quota { what: "x".into(), wait_us: 0 }, (429, some("1"), some("quota"), None)),
            (ApiError::Quota { what: "x".into(), wait_us: 2_000_001 }, (429, some("3"), some("quota"), None)),
            (rejected(Refusal::Overloaded, 2_500), (429, some("3"), some("policy"), None)),
            (rejected(Refusal::Quota, 0), (429, some("1"), some("quota"), None)),
            (rejected(Refusal::CannotMeetDeadline, 0), (429, some("1"), some("deadline"), None)),
            (rejected(Refusal::NotAllowed, 0), (403, None, some("policy"), some("false"))),
            (
                ApiError::Failed(ResourceExhausted::KvPool { needed: 9, total: 8 }.into()),
                (429, None, some("kv"), some("false")),
            ),
            (
                ApiError::Failed(ResourceExhausted::Queue { waiting: 9, limit: 8 }.into()),
                (429, some("1"), some("queue"), None),
            ),
            (ApiError::Failed(Failure::Engine("boom".into())), (500, None, None, None)),
            (ApiError::Failed(Failure::DeviceLost), (503, some("1"), None, None)),
            (ApiError::Deadline { limit_ms: 5 }, (504, None, None, None)),
            (ApiError::Draining, (503, some("1"), None, None)),
            (ApiError::NotYet { model: "m".into(), why: "x".into() }, (503, some("1"), None, None)),
            (
                ApiError::NotLoaded { model: "m".into(), why: "x".into(), retry_after_ms: 3_001 },
                (503, some("4"), None, None),
            ),
            (ApiError::cancelled(CancelCause::Asked, 5), (499, None, None, some("false"))),
            (ApiError::Internal, (500, None, None, some("false"))),
        ] {
            let name = format!("{error:?}");
            assert_eq!(headers(error), expect, "{name}");
        }
    }

    #[test]
    fn the_object_has_the_four_members() {
        let json = ApiError::invalid("n", "`n` must be \"1\"").json();
        assert_eq!(
            json,
            r#"{"error":{"message":"`n` must be \"1\"","type":"invalid_request_error","param":"n","code":"invalid_value"}}"#
        );
        assert!(ApiError::Loading.json().contains(r#""param":null"#));
    }
}
