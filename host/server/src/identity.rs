//! Who asks: API key, tenant, session, priority, and the id of the request.
//!
//! With keys, tenant and highest priority come from the key and headers can only lower; without them, headers are believed,
//! because then the operator has put something in front that sets them, or runs alone.

use std::sync::Arc;

use axum::extract::{FromRequestParts, State};
use axum::http::header::{HeaderMap, HeaderName, HeaderValue};
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use pointsman_sched::ids::Priority;
use pointsman_telemetry::NameKind;

use crate::error::ApiError;
use crate::keys::{self, Holder, KeyDigest};
use crate::places::NoPlace;
use crate::state::ServerState;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TENANT_ID: &str = "x-tenant-id";
const SESSION_ID: &str = "x-session-id";
const PRIORITY: &str = "x-pointsman-priority";

/// The tenant of requests that name none.
pub(crate) const ANONYMOUS: &str = "default";

/// Longest id, tenant or session that a header may name.
const MAX_NAME: usize = 128;

/// What is asked of a host by those who look after it, and costs it little.
const PROBES: [&str; 4] = ["/health", "/ready", "/version", "/metrics"];

/// Most headers that a router may see of a request, and the longest; others are left out.
const MAX_ATTRIBUTES: usize = 16;
const MAX_ATTRIBUTE: usize = 1_024;

/// The id that client and server call a request by.
#[derive(Clone, Debug)]
pub(crate) struct RequestTag(pub(crate) Arc<str>);

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Of the API key, `None` without keys: requests of the same key may cancel one another.
    pub(crate) key: Option<KeyDigest>,
    /// Whose limits its requests count against.
    pub(crate) holder: Option<Arc<Holder>>,
    pub(crate) tenant: Arc<str>,
    pub(crate) tenant_id: u32,
    /// Hash of the session, 0 without one.
    pub(crate) session: u64,
    pub(crate) max_priority: Priority,
    pub(crate) header_priority: Option<Priority>,
    /// Allow-listed headers as a router names them, `header.<name>`.
    pub(crate) attributes: Arc<[(String, String)]>,
}

// === impl Caller ===

impl Caller {
    /// Whoever asks without a transport: nobody has sent headers, and a key was looked at elsewhere.
    pub(crate) fn within(state: &ServerState, tenant: &str, max_priority: Priority) -> Result<Self, ApiError> {
        check_name("tenant", tenant.as_bytes())?;
        Ok(Self {
            key: None,
            holder: None,
            tenant: tenant.into(),
            tenant_id: state.names.intern(NameKind::Tenant, tenant),
            session: 0,
            max_priority,
            header_priority: None,
            attributes: Arc::default(),
        })
    }

    /// The priority of a request whose body names `asked`.
    pub(crate) fn priority(&self, asked: Option<Priority>) -> Priority {
        asked.or(self.header_priority).unwrap_or_default().max(self.max_priority)
    }
}

impl FromRequestParts<Arc<ServerState>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<ServerState>) -> Result<Self, ApiError> {
        let holder = keys::required(state, &parts.extensions)?;
        identify(&parts.headers, holder, state)
    }
}

fn identify(headers: &HeaderMap, holder: Option<Arc<Holder>>, state: &ServerState) -> Result<Caller, ApiError> {
    let key = holder.as_ref().map(|holder| &holder.key);
    let tenant = match key {
        Some(key) => key.tenant.as_str(),
        None => name_header(headers, TENANT_ID)?.unwrap_or(ANONYMOUS),
    };
    let header_priority = match name_header(headers, PRIORITY)? {
        Some(text) => Some(priority_word(text).ok_or_else(|| bad_priority(PRIORITY, &format!("`{text}`")))?),
        None => None,
    };
    let tenant_id = state.names.intern(NameKind::Tenant, tenant);
    Ok(Caller {
        key: key.map(|key| key.digest),
        tenant: tenant.into(),
        tenant_id,
        session: name_header(headers, SESSION_ID)?.map_or(0, session_hash),
        max_priority: key.map_or(Priority::Critical, |key| key.max_priority),
        header_priority,
        attributes: attributes(headers, &state.config.route_headers).into(),
        holder,
    })
}

/// What follows `Bearer ` in an `Authorization` header.
pub(crate) fn bearer(header: &HeaderValue) -> Option<&str> {
    let (scheme, token) = header.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// A header that names something: 1 to 128 visible ASCII characters.
fn name_header<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, ApiError> {
    headers.get(name).map(|value| check_name(name, value.as_bytes())).transpose()
}

fn check_name<'a>(param: &str, value: &'a [u8]) -> Result<&'a str, ApiError> {
    let text = std::str::from_utf8(value).unwrap_or_default();
    if (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(text);
    }
    let found = value.len();
    Err(ApiError::invalid(
        param,
        format!("`{param}` must be 1 to {MAX_NAME} visible ASCII characters, found {found} bytes"),
    ))
}

/// Headers that some pattern allows: a name, or the beginning of one with a `*` behind it. Those that the host itself reads
/// are never passed on, because routers get what they came to; those that look like credentials only by their whole name.
fn attributes(headers: &HeaderMap, allowed: &[String]) -> Vec<(String, String)> {
    let own = |name: &str| ["x-request-id", TENANT_ID, SESSION_ID].contains(&name) || name.starts_with("x-pointsman-");
    let secret =
        |name: &str| ["key", "token", "secret", "auth", "cookie", "passw"].iter().any(|word| name.contains(word));
    let fits = |name: &str, pattern: &String| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning) && !own(name) && !secret(name),
        None => name == pattern,
    };
    let one = |(name, value): (&HeaderName, &HeaderValue)| {
        let allowed = allowed.iter().any(|pattern| fits(name.as_str(), pattern));
        let value = value.to_str().ok().filter(|value| allowed && value.len() <= MAX_ATTRIBUTE)?;
        Some((format!("header.{name}"), value.to_owned()))
    };
    headers.iter().filter_map(one).take(MAX_ATTRIBUTES).collect()
}

/// A priority in the words of the contract.
pub(crate) fn word_of(priority: Priority) -> &'static str {
    match priority {
        Priority::Critical => "critical",
        Priority::High => "high",
        Priority::Normal => "normal",
        Priority::Low => "low",
    }
}

/// The words of the contract.
pub(crate) fn priority_word(word: &str) -> Option<Priority> {
    match word {
        "critical" => Some(Priority::Critical),
        "high" => Some(Priority::High),
        "normal" => Some(Priority::Normal),
        "low" => Some(Priority::Low),
        other => other.parse().ok().map(priority_number),
    }
}

/// vLLM's integers, where lower is earlier and 0 is the default.
pub(crate) fn priority_number(number: i64) -> Priority {
    match number {
        ..=-2 => Priority::Critical,
        -1 => Priority::High,
        0 => Priority::Normal,
        1.. => Priority::Low,
    }
}

pub(crate) fn bad_priority(param: &str, found: &str) -> ApiError {
    let problem = format!("`{param}` must be critical, high, normal, low or an integer, found {found}");
    ApiError::invalid(param, problem)
}

/// FNV-1a with a final mix: the same session hashes alike on every host and in every release. Never 0.
pub(crate) fn session_hash(session: &str) -> u64 {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = session.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).max(1)
}

/// Middleware: keeps or makes the id of a request and puts it on the response, whatever becomes of it.
pub(crate) async fn tag(
    State(state): State<Arc<ServerState>>,
    mut request: axum::extract::Request,
    next: Next,
) -> Response {
    let (tag, refused) = match name_header(request.headers(), "x-request-id") {
        Ok(Some(id)) => (Arc::from(id), None),
        Ok(None) => (new_id(&state, request.uri().path()), None),
        Err(error) => (new_id(&state, request.uri().path()), Some(error)),
    };
    let refused = refused.or_else(|| no_place(&state, &request));
    request.extensions_mut().insert(RequestTag(Arc::clone(&tag)));
    let mut response = match refused {
        Some(error) => error.into_response(),
        None => next.run(request).await,
    };
    if let Ok(value) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// The refusal of a request that has no place; probes need none, so that a full host is not taken for a dead one.
fn no_place(state: &ServerState, request: &axum::extract::Request) -> Option<ApiError> {
    let found = request.extensions().get::<NoPlace>()?;
    if PROBES.contains(&request.uri().path()) {
        return None;
    }
    state.metrics.rejected("queue");
    Some((*found).into())
}

/// A fresh id with the prefix that clients know, and 96 random bits.
pub(crate) fn new_id(state: &ServerState, path: &str) -> Arc<str> {
    let prefix = match path {
        "/v1/chat/completions" => "chatcmpl-",
        "/v1/completions" => "cmpl-",
        "/v1/responses" => "resp_",
        "/v1/messages" => "msg_",
        _ => "req-",
    };
    let low = state.clock.random() & 0xffff_ffff;
    format!("{prefix}{:016x}{low:08x}", state.clock.random()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_words_or_integers() {
        for (text, expect) in [
            ("critical", Some(Priority::Critical)),
            ("low", Some(Priority::Low)),
            ("-7", Some(Priority::Critical)),
            ("-1", Some(Priority::High)),
            ("0", Some(Priority::Normal)),
            ("3", Some(Priority::Low)),
            ("urgent", None),
            ("1.5", None),
        ] {
            assert_eq!(priority_word(text), expect, "{text}");
        }
    }

    #[test]
    fn routers_see_the_headers_that_are_allowed() {
        let mut headers = HeaderMap::new();
        let long: &'static str = Box::leak("l".repeat(MAX_ATTRIBUTE + 1).into_boxed_str());
        for (name, value) in [
            ("x-plan", "gold"),
            ("x-tenant-id", "t"),
            ("x-request-id", "r"),
            ("x-pointsman-priority", "low"),
            ("authorization", "Bearer k"),
            ("x-long", long),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        for (allowed, expect) in [
            (&[][..], &[][..]),
            (&["x-*"], &["header.x-plan"]),
            (&["x-plan", "x-absent"], &["header.x-plan"]),
            (&["x-tenant-id"], &["header.x-tenant-id"]),
            (&["plan"], &[]),
        ] {
            let allowed: Vec<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
            let names: Vec<String> = attributes(&headers, &allowed).into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, expect, "{allowed:?}");
        }
    }

    #[test]
    fn sessions_hash_alike_everywhere() {
        assert_eq!(session_hash("a"), session_hash("a"));
        assert_ne!(session_hash("a"), session_hash("b"));
        assert_ne!(session_hash(""), 0);
    }

    #[test]
    fn bearer_tokens_are_read_from_the_header() {
        for (header, expect) in
            [("Bearer abc", Some("abc")), ("bearer  abc ", Some("abc")), ("Basic abc", None), ("Bearer", None)]
        {
            assert_eq!(bearer(&HeaderValue::from_static(header)), expect, "{header}");
        }
    }
}
