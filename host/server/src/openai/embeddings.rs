//! `POST /v1/embeddings`: texts or token ids in, one vector each out.
//!
//! Shares admission, cancelling and errors with the generations and nothing else: there is no replica to choose, no token to
//! stream and no cache, so a request is one job in an encoder's mailbox and one answer, or one request to an upstream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use pointsman_sched::admit::{AdmitRequest, Outcome};
use pointsman_sched::ids::{Micros, Priority};
use pointsman_sched::request::{CancelCause, Failure};
use pointsman_sched::route::RequestNumbers;
use pointsman_telemetry::RequestMetrics;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::oneshot;

use super::elsewhere::{self, Made, Wanted};
use super::fields::{Fields, mismatch};
use super::generate::{Arrival, Held};
use super::inputs::{Holder, Input, read_each, token_ids};
use super::read_fields;
use crate::admission::Permit;
use crate::demand;
use crate::dispatch::record_rejection;
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::ports::{Catalog, EmbedJob, Embedded, Encoder, SubmitError};
use crate::registry::InFlight;
use crate::state::ServerState;
use crate::text::TextModel;
use crate::upstream::{Blame, Onward};

/// Inputs of one request, as OpenAI bounds them.
const MAX_INPUTS: usize = 2_048;
/// Numbers of a vector, where only an upstream knows how many it has.
const MAX_DIMENSIONS: u32 = 1 << 16;

/// A body but for its input.
#[derive(Debug)]
struct Asked {
    encoder: Arc<Encoder>,
    base64: bool,
    /// As upstreams are asked, where they have the model.
    onward: Option<Onward>,
    /// Numbers of each vector, where the client wants fewer than there are.
    dimensions: Option<u32>,
    /// Tokens beyond which an input is cut; none refuses what is too long.
    cut: Option<u32>,
    timeout_ms: u64,
}

/// What a request comes to; it holds its place in admission.
#[derive(Debug)]
pub(crate) struct Vectors {
    asked: Asked,
    /// One for each input.
    pub(crate) vectors: Vec<Vec<f32>>,
    /// Of all inputs together.
    pub(crate) tokens: u32,
    /// Who made them.
    replica: Arc<str>,
    in_flight: InFlight,
}

/// Vectors on their way.
enum Making<'a> {
    Here(oneshot::Receiver<Result<Embedded, Failure>>),
    There(&'a Onward),
}

/// Vectors that have come.
struct Computed {
    vectors: Vec<Vec<f32>>,
    tokens: u32,
    replica: Arc<str>,
    queued_us: Micros,
}

/// Counts how a request ended, and that it is inside until then. One that is dropped on its way, as when its client goes away,
/// has been aborted.
struct Ending {
    metrics: Arc<RequestMetrics>,
    /// Where it counts; none of the lowest priority.
    inside: Option<Arc<AtomicU32>>,
    done: bool,
}

/// Handles the route.
pub(crate) async fn embeddings(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let arrival = Arrival::new(&state, caller, tag, request.headers());
    let permit = arrival.admit()?;
    let fields = read_fields(&state, request).await?;
    embed(&arrival, permit, fields).await?.respond()
}

/// From a body to its vectors.
pub(crate) async fn embed(arrival: &Arrival, mut permit: Permit, mut fields: Fields) -> Result<Vectors, ApiError> {
    let state = &arrival.state;
    let name = super::params::model(&mut fields)?;
    // Upstreams get it as it was sent; what they have is never loaded on demand.
    let is_elsewhere = state.engine.catalog().encoder(&name).is_some_and(|encoder| !encoder.upstreams.is_empty());
    let onward = is_elsewhere.then(|| Onward::whole("/v1/embeddings", fields.copied()));
    let timeout_ms = timeout_ms(&mut fields, state)?;
    let catalog = demand::reach(state, &name, &mut permit, arrival.asking(timeout_ms)).await?;
    let asked = Asked::parse(&mut fields, (find(&catalog, name)?, onward), timeout_ms)?;
    let inputs = asked.inputs(fields.require("input")?).await?;
    let tokens = u32::try_from(inputs.iter().map(Vec::len).sum::<usize>()).unwrap_or(u32::MAX);
    let answered = answer(arrival, permit, asked, inputs, tokens).await;
    answered.inspect_err(|error| record_rejection(state, &arrival.caller, error, (tokens, None)))
}

/// Takes room, asks the admission policy, and waits for the vectors.
async fn answer(
    arrival: &Arrival,
    mut permit: Permit,
    asked: Asked,
    inputs: Vec<Vec<u32>>,
    tokens: u32,
) -> Result<Vectors, ApiError> {
    let Arrival { state, caller, tag, arrived, .. } = arrival;
    permit.queue_tokens(tokens)?;
    permit.charge(tokens, 0, state.clock.now())?;
    let deadline = arrived.saturating_add(asked.timeout_ms.saturating_mul(1_000));
    ask_door(arrival, &mut permit, &asked, (tokens, deadline))?;
    let mut in_flight = state.registry.enter(tag, caller.key, &state.engine, permit)?;
    let mut ending = Ending::of(arrival, &asked);
    let n_inputs = inputs.len();
    let making = asked.begin(state, inputs, (*arrived, deadline))?;
    // Unless something else is said: its client has gone, and it was computed for nothing.
    in_flight.permit.ended(Outcome::Cancelled, 0, 0);
    let left = Duration::from_micros(deadline.saturating_sub(state.clock.now()));
    let ended = tokio::time::timeout(left, async {
        tokio::select! {
            computed = making.finish(&asked, tag, (n_inputs, tokens)) => computed,
            () = in_flight.cancel_asked() => Err(ApiError::cancelled(CancelCause::Asked, asked.timeout_ms)),
        }
    });
    let computed = ended.await.unwrap_or(Err(ApiError::Deadline { limit_ms: asked.timeout_ms }));
    let outcome = match &computed {
        Ok(_) => Outcome::Finished,
        Err(ApiError::Failed(_) | ApiError::DriverGone) => Outcome::Failed,
        Err(ApiError::Upstream { mishap, .. }) if mishap.blame() == Blame::Upstream => Outcome::Failed,
        Err(ApiError::Upstream { .. } | ApiError::Saturated { .. } | ApiError::NoReplica { .. }) => Outcome::Rejected,
        Err(_) => Outcome::Cancelled,
    };
    in_flight.permit.ended(outcome, 0, 0);
    let Computed { vectors, tokens: counted, replica, queued_us } = computed?;
    in_flight.permit.computed(tokens);
    ending.finished(queued_us, state.clock.now().saturating_sub(*arrived));
    Ok(Vectors { asked, vectors, tokens: counted, replica, in_flight })
}

/// Asks the admission policy, where there is one. Priorities order generations only.
fn ask_door(
    arrival: &Arrival,
    permit: &mut Permit,
    asked: &Asked,
    (prompt_tokens, deadline): (u32, Micros),
) -> Result<(), ApiError> {
    let Arrival { state, caller, arrived, .. } = arrival;
    if state.admission.is_native() {
        return Ok(());
    }
    let attributes: Vec<(&str, &str)> =
        caller.attributes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let request = AdmitRequest {
        id: state.next_request(),
        model: &asked.encoder.name,
        tenant: &caller.tenant,
        tenant_id: caller.tenant_id,
        session: caller.session,
        priority: caller.priority(None),
        highest: caller.max_priority,
        prompt_tokens,
        max_new_tokens: 0,
        arrived: *arrived,
        deadline,
        seed: state.clock.random(),
        numbers: RequestNumbers::default(),
        attributes: &attributes,
    };
    arrival.judge(permit, &request).map(|_| ())
}

fn refused(error: SubmitError, encoder: &Encoder) -> ApiError {
    match error {
        SubmitError::Full => ApiError::Saturated { what: format!("the mailbox of `{}` is full", encoder.name) },
        SubmitError::Stopped => ApiError::DriverGone,
    }
}

// === impl Asked ===

impl Asked {
    fn parse(
        fields: &mut Fields,
        (encoder, onward): (Arc<Encoder>, Option<Onward>),
        timeout_ms: u64,
    ) -> Result<Self, ApiError> {
        let base64 = match fields.take("encoding_format") {
            None => false,
            Some(Value::String(format)) if format == "float" => false,
            Some(Value::String(format)) if format == "base64" => true,
            Some(other) => return Err(mismatch("encoding_format", "float or base64", &other)),
        };
        // vLLM's name; -1 stands for all that the model takes.
        let cut = fields.integer("truncate_prompt_tokens", -1..=encoder.max_tokens.into())?;
        if cut == Some(0) {
            return Err(ApiError::invalid(
                "truncate_prompt_tokens",
                "`truncate_prompt_tokens` must be -1 or at least 1",
            ));
        }
        let dimensions = fields.u32("dimensions", 1..=encoder.dimensions.unwrap_or(MAX_DIMENSIONS))?;
        Ok(Self {
            base64,
            onward,
            dimensions,
            cut: cut.map(|cut| u32::try_from(cut).unwrap_or(encoder.max_tokens)),
            timeout_ms,
            encoder,
        })
    }

    /// Has the vectors made.
    fn begin(
        &self,
        state: &ServerState,
        inputs: Vec<Vec<u32>>,
        (arrived, deadline): (Micros, Micros),
    ) -> Result<Making<'_>, ApiError> {
        if let Some(onward) = &self.onward {
            return Ok(Making::There(onward));
        }
        let (reply, replied) = oneshot::channel();
        let job = EmbedJob { encoder: Arc::clone(&self.encoder.name), inputs, arrived, deadline, reply };
        state.engine.embed(job).map_err(|error| refused(error, &self.encoder))?;
        Ok(Making::Here(replied))
    }

    /// Reads and tokenizes. Ids are taken as they are, texts get the model's special tokens.
    async fn inputs(&self, value: Value) -> Result<Vec<Vec<u32>>, ApiError> {
        let (text, limit, cut) = (Arc::clone(&self.encoder.text), self.encoder.max_tokens, self.cut);
        let read = move |param: String, input: Input| match input {
            Input::Text(input) => within(text_input(&text, &param, &input, cut)?, limit, param),
            Input::Ids(ids) => within(id_input(&text, &param, &ids, cut)?, limit, param),
        };
        read_each(value, Holder { param: "input", noun: "inputs", limit: MAX_INPUTS }, read).await
    }
}

fn timeout_ms(fields: &mut Fields, state: &ServerState) -> Result<u64, ApiError> {
    let most = i64::try_from(state.config.max_timeout_ms).unwrap_or(i64::MAX);
    let ms = fields.integer("timeout_ms", 1..=most)?.and_then(|ms| u64::try_from(ms).ok());
    Ok(ms.unwrap_or(state.config.default_timeout_ms))
}

fn find(catalog: &Catalog, name: String) -> Result<Arc<Encoder>, ApiError> {
    if let Some(encoder) = catalog.encoder(&name) {
        return Ok(Arc::clone(encoder));
    }
    let known: Vec<String> = catalog.encoders.iter().map(|encoder| format!("`{}`", encoder.name)).collect();
    let known = match known[..] {
        [] => "there is none here: serve one with --model NAME=FOLDER".to_owned(),
        _ => format!("there is {}", known.join(", ")),
    };
    let generates = catalog.names().iter().any(|(known, _)| *known == name);
    match generates {
        true => Err(ApiError::invalid(
            "model",
            format!("`{name}` generates text and makes no embeddings; of models that do {known}"),
        )),
        false => Err(ApiError::UnknownModel {
            param: "model",
            name,
            known: format!("of models that make embeddings {known}"),
        }),
    }
}

fn text_input(text: &TextModel, param: &str, input: &str, cut: Option<u32>) -> Result<Vec<u32>, ApiError> {
    let tokens = match cut {
        Some(limit) => text.encode_cut(input, limit as usize),
        None => text.encode(input, true),
    };
    tokens.map_err(|error| ApiError::invalid(param, error.to_string()))
}

fn id_input(text: &TextModel, param: &str, ids: &[Value], cut: Option<u32>) -> Result<Vec<u32>, ApiError> {
    let ids = &ids[..cut.map_or(ids.len(), |limit| ids.len().min(limit as usize))];
    token_ids(param, ids, text.vocabulary())
}

fn within(tokens: Vec<u32>, limit: u32, param: String) -> Result<Vec<u32>, ApiError> {
    match tokens.len() {
        0 => Err(ApiError::invalid(&*param, format!("`{param}` has no tokens"))),
        found if found > limit as usize => Err(ApiError::InputTooLong { param, found, limit }),
        _ => Ok(tokens),
    }
}

// === impl Making ===

impl Making<'_> {
    async fn finish(
        self,
        Asked { encoder, dimensions, .. }: &Asked,
        tag: &str,
        (n_inputs, tokens): (usize, u32),
    ) -> Result<Computed, ApiError> {
        match self {
            Self::Here(replied) => {
                let embedded = replied.await.map_err(|_| ApiError::DriverGone)?;
                let Embedded { vectors, queued_us } = embedded.map_err(ApiError::Failed)?;
                Ok(Computed { vectors, tokens, replica: Arc::clone(&encoder.replica), queued_us })
            }
            Self::There(onward) => {
                let wanted = Wanted { n_inputs, dimensions: *dimensions };
                let made = elsewhere::ask(encoder, (onward, tag), (wanted, tokens)).await?;
                let Made { by, vectors, tokens: counted } = made;
                let replica = Arc::clone(&by.replica);
                Ok(Computed { vectors, tokens: counted.unwrap_or(tokens), replica, queued_us: 0 })
            }
        }
    }
}

// === impl Vectors ===

impl Vectors {
    fn respond(self) -> Result<Response, ApiError> {
        let Self { asked, vectors, tokens, replica, in_flight } = self;
        let body = write(&asked, vectors, tokens)?;
        let mut response = Response::new(Body::new(Held::new(body, in_flight)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let names = [("x-pointsman-replica", &replica), ("x-pointsman-variant", &asked.encoder.name)];
        for (header, name) in names {
            headers.extend(HeaderValue::from_str(name).ok().map(|name| (HeaderName::from_static(header), name)));
        }
        Ok(response)
    }

    /// The object of the response, without what HTTP puts around it.
    pub(crate) fn object(self) -> Result<Vec<u8>, ApiError> {
        write(&self.asked, self.vectors, self.tokens)
    }

    /// The model that made them.
    pub(crate) fn model(&self) -> &Arc<str> {
        &self.asked.encoder.name
    }
}

// === impl Ending ===

impl Ending {
    fn of(arrival: &Arrival, asked: &Asked) -> Self {
        let state = &arrival.state;
        let inside = (arrival.caller.priority(None) != Priority::Low).then(|| Arc::clone(&state.embeddings));
        if let Some(inside) = &inside {
            inside.fetch_add(1, Ordering::Relaxed);
        }
        Self { metrics: state.request_metrics(&asked.encoder.name), inside, done: false }
    }

    fn finished(&mut self, queued_us: Micros, took_us: Micros) {
        self.done = true;
        self.metrics.queue_time.observe(queued_us as f64 * 1e-6);
        self.metrics.e2e.observe(took_us as f64 * 1e-6);
        self.metrics.finished_stop.inc();
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(inside) = &self.inside {
            inside.fetch_sub(1, Ordering::Relaxed);
        }
        if !self.done {
            self.metrics.finished_abort.inc();
        }
    }
}

// === On the wire ===

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Item>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Floats(Vec<f32>),
    /// Little-endian `f32`s.
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}

fn write(asked: &Asked, vectors: Vec<Vec<f32>>, tokens: u32) -> Result<Vec<u8>, ApiError> {
    let item = |(index, mut vector): (usize, Vec<f32>)| {
        if let Some(n) = asked.dimensions {
            shorten(&mut vector, n as usize);
        }
        let bytes = || vector.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let embedding =
            if asked.base64 { Vector::Base64(BASE64_STANDARD.encode(bytes())) } else { Vector::Floats(vector) };
        Item { object: "embedding", index, embedding }
    };
    let list = List {
        object: "list",
        data: vectors.into_iter().enumerate().map(item).collect(),
        model: &asked.encoder.name,
        usage: Usage { prompt_tokens: tokens, total_tokens: tokens },
    };
    serde_json::to_vec(&list).map_err(|_| ApiError::Internal)
}

/// Keeps the first `n` numbers and makes them a vector of length 1 again.
fn shorten(vector: &mut Vec<f32>, n: usize) {
    if n < vector.len() {
        vector.truncate(n);
        let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        vector.iter_mut().for_each(|x| *x /= length);
    }
}
