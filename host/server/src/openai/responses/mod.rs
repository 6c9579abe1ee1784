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
use super::fields::Fields;
use super::generate::{Answer, Arrival, Collected, Head, Running, Shape, serve};
use super::tools::CallStream;
use crate::admission::Permit;
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::state::ServerState;
use crate::stream::{Encode, Totals};
use crate::text::TextModel;

/// Handles the route.
pub(crate) async fn responses(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: Request,
) -> Result<Response, ApiError> {
    serve(Arrival::new(&state, caller, tag, request.headers()), request, begin).await
}

/// From a body to what it asked for, under way.
pub(crate) async fn begin(arrival: Arrival, permit: Permit, mut fields: Fields) -> Result<Answer, ApiError> {
    let (talk, echo) = request::talk(&mut fields, &arrival.state.config)?;
    let Answering { running, rules, streams, .. } = talk.start(&arrival, permit).await?;
    let calls = rules.map(|rules| rules.stream(&running.head.id, 0));
    Ok(Answer { running, n_choices: 1, streams, shape: Box::new(ResponseShape { echo, calls }) })
}

/// How a response is written.
#[derive(Debug)]
struct ResponseShape {
    echo: request::Echo,
    calls: Option<CallStream>,
}

impl Shape for ResponseShape {
    fn events(self: Box<Self>, running: &Running) -> Box<dyn Encode> {
        Box::new(answer::ResponseSse::new(running.head.clone(), self.echo, self.calls))
    }

    fn whole(self: Box<Self>, (head, _): (&Head, &TextModel), choices: Vec<Collected>, totals: Totals) -> Vec<u8> {
        answer::write_whole((head, &self.echo), choices, self.calls, totals)
    }
}
