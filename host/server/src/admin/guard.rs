//! Who may use the admin plane: nobody's web page, only loopback names on loopback, and the holder of a token if any is
//! configured. A token that may only read gets no further than `GET`.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::Method;
use axum::http::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN};
use axum::http::uri::Authority;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::config::{AdminRole, AdminToken};
use crate::error::ApiError;
use crate::identity::bearer;
use crate::places::NoPlace;
use crate::state::ServerState;

/// Who called, for the journal: the token's name (`loopback` where none is asked for) and the address, as in `ci@10.0.0.7`.
#[derive(Clone, Debug)]
pub(super) struct Actor(pub(super) Arc<str>);

/// The other end of a connection, as the connection loop knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// Middleware: refuses or names the actor.
pub(super) async fn guard(State(state): State<Arc<ServerState>>, mut request: Request, next: Next) -> Response {
    match admit(&state, &request) {
        Ok(actor) => {
            request.extensions_mut().insert(actor);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

fn admit(state: &ServerState, request: &Request) -> Result<Actor, ApiError> {
    if let Some(refused) = request.extensions().get::<NoPlace>() {
        state.metrics.rejected("queue");
        return Err((*refused).into());
    }
    let headers = request.headers();
    if headers.contains_key(ORIGIN) {
        return Err(ApiError::Forbidden { what: "the admin plane takes no requests from web pages (`Origin` is set)" });
    }
    // Browsers leave `Origin` out of the requests that images make.
    if headers.get("sec-fetch-site").is_some_and(|site| site != "none" && site != "same-origin") {
        return Err(ApiError::Forbidden {
            what: "the admin plane takes no requests from web pages (`Sec-Fetch-Site`)",
        });
    }
    if !state.config.admin_remote && !names_loopback(request) {
        return Err(ApiError::Forbidden { what: "the admin plane answers to loopback names only (`Host`)" });
    }
    let name = match &*state.config.admin_tokens {
        [] => "loopback",
        tokens => {
            let token = token_of(tokens, headers)?;
            if token.role == AdminRole::Read && !matches!(*request.method(), Method::GET | Method::HEAD) {
                return Err(ApiError::Role { token: token.name.clone() });
            }
            &token.name
        }
    };
    Ok(Actor(match request.extensions().get() {
        Some(Peer(address)) => format!("{name}@{address}").into(),
        None => name.into(),
    }))
}

/// The token that a request carries. All are compared, so that the time says nothing about which was near.
fn token_of<'a>(tokens: &'a [AdminToken], headers: &HeaderMap) -> Result<&'a AdminToken, ApiError> {
    let given = headers.get(AUTHORIZATION).ok_or(ApiError::Unauthorized { problem: "an admin token is required" })?;
    let given = bearer(given).unwrap_or_default();
    let found = tokens.iter().fold(None, |found, token| if token.token.matches(given) { Some(token) } else { found });
    found.ok_or(ApiError::Unauthorized { problem: "the admin token is wrong" })
}

/// Whether a request names this machine from within, wherever it says what it asks: in `Host`, or in HTTP/2's `:authority`,
/// which hyper puts into the URI.
fn names_loopback(request: &Request) -> bool {
    let hosts = request.headers().get_all(HOST).iter().map(|host| host.to_str().unwrap_or_default());
    let authority = request.uri().authority().map(Authority::as_str);
    let mut named = hosts.chain(authority).map(is_loopback).peekable();
    named.peek().is_some() && named.all(|is_loopback| is_loopback)
}

/// Whether the name of a host is this machine from within: `localhost`, 127.0.0.0/8 or `[::1]`, with or without a port.
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
