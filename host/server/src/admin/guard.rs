//! Who may use the admin plane: nobody's web page, only loopback names on loopback, and the holder of the token if one is
//! configured.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::identity::bearer;
use crate::state::ServerState;

/// Who called, for the journal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Actor(pub(super) &'static str);

/// Middleware: refuses or names the actor.
pub(super) async fn guard(State(state): State<Arc<ServerState>>, mut request: Request, next: Next) -> Response {
    match admit(&state, request.headers()) {
        Ok(actor) => {
            request.extensions_mut().insert(actor);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

fn admit(state: &ServerState, headers: &HeaderMap) -> Result<Actor, ApiError> {
    if headers.contains_key(ORIGIN) {
        return Err(ApiError::Forbidden { what: "the admin plane takes no requests from web pages (`Origin` is set)" });
    }
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if !state.config.admin_remote && !is_loopback(host) {
        return Err(ApiError::Forbidden { what: "the admin plane answers to loopback names only (`Host`)" });
    }
    let Some(token) = &state.config.admin_token else { return Ok(Actor("loopback")) };
    let given = headers.get(AUTHORIZATION).ok_or(ApiError::Unauthorized { problem: "the admin token is required" })?;
    match bearer(given) {
        Some(given) if token.matches(given) => Ok(Actor("token")),
        _ => Err(ApiError::Unauthorized { problem: "the admin token is wrong" }),
    }
}

/// Whether a `Host` header names this machine from within: `localhost`, 127.0.0.0/8 or `[::1]`, with or without a port.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, port)) if port.is_empty() || port.starts_with(':') => name,
            _ => return false,
        },
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_names_are_known() {
        for (host, expect) in [
            ("localhost", true),
            ("LocalHost:8081", true),
            ("127.0.0.1:8081", true),
            ("127.9.9.9", true),
            ("[::1]:8081", true),
            ("[::1]", true),
            ("", false),
            ("evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example:80", false),
            ("10.0.0.1:8081", false),
            ("[::1].evil.example", false),
            ("[::1", false),
        ] {
            assert_eq!(is_loopback(host), expect, "{host}");
        }
    }
}
