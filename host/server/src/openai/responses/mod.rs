//! `POST /v1/responses`: `OpenAI`'s newer shape, text and functions, on the way that every conversation goes.
//!
//! Nothing is stored: an answer is told once, so there is no route to fetch one, and no request goes on from an earlier one.

mod answer;
mod request;

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::conversation::Answering;
use super::generate::Arrival;
use super::read_fields;
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::state::ServerState;

/// Handles the route.
pub(crate) async fn responses(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrival = Arrival::new(&state, caller, tag, request.headers());
    let permit = arrival.admit()?;
    let mut fields = read_fields(&state, request).await?;
    let (talk, echo) = request::talk(&mut fields, &state.config)?;
    let Answering { running, rules, streams, .. } = talk.start(&arrival, permit).await?;
    let calls = rules.map(|rules| rules.stream(&running.head.id, 0));
    if streams {
        return running.stream(|running| Box::new(answer::ResponseSse::new(running.head.clone(), echo, calls))).await;
    }
    running.whole(1, |head, _, choices, totals| answer::write_whole((head, &echo), choices, calls, totals)).await
}
