//! `GET /admin/v1/requests`: why the last requests went where they went.
//!
//! What the policy before the active one would have said is found out here, when somebody asks, and not when the request
//! comes: it costs a fresh instance of a guest that no longer serves.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use pointsman_sched::admit::Judged;
use pointsman_sched::ids::RequestId;
use pointsman_sched::route::Routed;
use serde::Deserialize;

use super::places::Kind;
use super::wire::calls::VerdictSeen;
use super::wire::decision::{Admission, Answer, Explained, Previous, PreviousVerdict, RequestSummary};
use super::{blocking, list};
use crate::error::ApiError;
use crate::openai::json;
use crate::path::Path;
use crate::ports::{AdminError, AdminErrorKind, Catalog, DoorQuestion, Question};
use crate::state::ServerState;
use crate::trace::{Decided, Doored, Trace};

/// Requests of a list that does not say how many.
const LISTED: usize = 50;

#[derive(Debug, Deserialize)]
pub(super) struct Ask {
    limit: Option<usize>,
}

pub(super) async fn requests(
    State(state): State<Arc<ServerState>>,
    ask: Result<Query<Ask>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(ask) = ask.map_err(|error| ApiError::invalid("limit", error.body_text()))?;
    let newest = state.traces.newest().take(ask.limit.unwrap_or(LISTED));
    Ok(list::<RequestSummary>(newest.map(|trace| trace.summary()).collect()))
}

pub(super) async fn request(
    State(state): State<Arc<ServerState>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(json(&blocking(&state, Kind::Read, move |state| explain(state, &id)).await?))
}

fn explain(state: &ServerState, id: &str) -> Result<Explained, AdminError> {
    let trace: Arc<Trace> = state.traces.find(id).ok_or_else(|| AdminError {
        kind: AdminErrorKind::NotFound,
        message: format!(
            "no request `{id}` among the last {}; GET /admin/v1/requests lists them",
            state.traces.capacity()
        ),
        param: Some("id".into()),
    })?;
    let catalog = state.engine.catalog();
    let previous = trace.decision().map(|decided| ask_previous(state, decided, &catalog));
    let explained = trace.explain(&catalog);
    let others = trace.door().map(|doored| (ask_previous_door(state, doored), shadow_at_the_door(state, doored)));
    let (before, beside) = others.unzip();
    let admission =
        explained.admission.map(|admission| Admission { previous: before, shadow: beside.flatten(), ..admission });
    let shadow = trace.decision().and_then(|decided| {
        let routed = state.policies.shadow_router_said(RequestId(decided.request.id))?;
        Some(said(routed, decided, &catalog))
    });
    Ok(Explained { previous, shadow, admission, ..explained })
}

fn ask_previous_door(state: &ServerState, doored: &Doored) -> PreviousVerdict {
    let texts = doored.request.texts();
    let question = DoorQuestion { now: doored.now, request: &doored.request.lend(&texts), load: &doored.load };
    match state.policies.ask_previous_admission(&question) {
        Ok(judged) => judged_by(&judged),
        Err(error) => PreviousVerdict::Unavailable { unavailable: error.message },
    }
}

fn shadow_at_the_door(state: &ServerState, doored: &Doored) -> Option<PreviousVerdict> {
    state.policies.shadow_admission_said(RequestId(doored.request.id)).as_ref().map(judged_by)
}

/// Another admission policy's answer.
fn judged_by(judged: &Judged) -> PreviousVerdict {
    PreviousVerdict::Said {
        revision: judged.decided_by.revision.to_string(),
        generation: judged.decided_by.generation,
        answer: judged.verdict.as_ref().map(VerdictSeen::from),
    }
}

fn ask_previous(state: &ServerState, decided: &Decided, catalog: &Catalog) -> Previous {
    let texts = decided.request.texts();
    let (request, replicas) = (decided.request.lend(&texts), decided.replicas());
    let question = Question { now: decided.now, request: &request, replicas: &replicas };
    match state.policies.ask_previous_router(&question) {
        Ok(routed) => said(routed, decided, catalog),
        Err(error) => Previous::Unavailable { unavailable: error.message },
    }
}

/// Another policy's answer, and what it comes to.
fn said(routed: Routed, decided: &Decided, catalog: &Catalog) -> Previous {
    Previous::Said {
        revision: routed.decided_by.revision.to_string(),
        generation: routed.decided_by.generation,
        row: decided.row_of(&routed.choice, catalog),
        answer: Answer::from(&routed.choice),
    }
}
