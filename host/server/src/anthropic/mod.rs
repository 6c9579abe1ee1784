//! Anthropic's shapes: messages, and the count of their tokens.
//!
//! The wire types alone are of this module. What they are turned into, and everything that happens to it, is what chat
//! completions are turned into: there is one way from a conversation to a stream of tokens.

mod answer;
mod request;

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::HeaderName;
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;

use crate::admission::Permit;
use crate::demand::{self, Asking};
use crate::error::ApiError;
use crate::identity::{Caller, REQUEST_ID, RequestTag};
use crate::openai::conversation::Answering;
use crate::openai::fields::Fields;
use crate::openai::generate::{Answer, Arrival, Collected, Head, Running, Shape, serve};
use crate::openai::params::model;
use crate::openai::tools::CallStream;
use crate::openai::{json, read_fields};
use crate::state::ServerState;
use crate::stream::{Encode, Totals};
use crate::text::TextModel;

/// Where the beginning of its paths is the same, so are its errors.
const PREFIX: &str = "/v1/messages";

/// What Anthropic calls `x-request-id`.
const OWN_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// `POST /v1/messages`.
pub(crate) async fn messages(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: Request,
) -> Result<Response, ApiError> {
    serve(Arrival::new(&state, caller, tag, request.headers()), request, begin).await
}

/// From a body to what it asked for, under way.
async fn begin(arrival: Arrival, permit: Permit, mut fields: Fields) -> Result<Answer, ApiError> {
    let talk = request::talk(&mut fields, &arrival.state.config)?;
    let Answering { running, rules, streams, stop, .. } = talk.start(&arrival, permit).await?;
    let calls = rules.map(|rules| rules.stream(&running.head.id, 0));
    Ok(Answer { running, n_choices: 1, streams, shape: Box::new(MessageShape { calls, stop }) })
}

/// How a message is written.
#[derive(Debug)]
struct MessageShape {
    calls: Option<CallStream>,
    stop: Arc<[String]>,
}

impl Shape for MessageShape {
    fn events(self: Box<Self>, running: &Running) -> Box<dyn Encode> {
        Box::new(answer::MessageSse::new(running, self.calls, self.stop))
    }

    fn whole(self: Box<Self>, (head, _): (&Head, &TextModel), choices: Vec<Collected>, totals: Totals) -> Vec<u8> {
        answer::write_whole(head, choices, (self.calls, &self.stop), totals)
    }
}

/// `POST /v1/messages/count_tokens`: what the same conversation would cost as a prompt.
pub(crate) async fn count_tokens(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: Request,
) -> Result<Response, ApiError> {
    #[derive(Serialize)]
    struct Count {
        input_tokens: usize,
    }
    // Tokenizing is work like any other: it takes a place among the requests in flight.
    let mut permit = state.enter(&caller)?;
    let (arrived, timeout_ms) = (state.clock.now(), state.config.default_timeout_ms);
    let mut fields = read_fields(&state, request).await?;
    let asking = Asking { arrived, timeout_ms, id: (&tag, caller.key), told: None };
    let target = demand::find(&state, &model(&mut fields)?, &mut permit, asking).await?;
    let mut conversation = request::conversation(&mut fields)?;
    if let Some(tools) = request::tools(&mut fields)? {
        tools.show(&mut conversation.template_kwargs);
    }
    let prompt = conversation.prompt(target.text(), state.clock.unix_seconds()).await?;
    permit.check_cancelled()?;
    Ok(json(&Count { input_tokens: prompt.tokens.len() }))
}

/// Middleware: what goes wrong on these routes, wherever it does, is told in Anthropic's words.
pub(crate) async fn dress(request: Request, next: Next) -> Response {
    let is_own = request.uri().path().starts_with(PREFIX);
    let mut response = next.run(request).await;
    if !is_own {
        return response;
    }
    if let Some(id) = response.headers().get(REQUEST_ID).cloned() {
        response.headers_mut().insert(OWN_REQUEST_ID, id);
    }
    let Some(error) = response.extensions().get::<Arc<ApiError>>().cloned() else { return response };
    *response.status_mut() = error.anthropic_status();
    *response.body_mut() = Body::from(error.anthropic_json());
    response
}
