//! `GET /admin/v1/usage`: what each tenant has been served since the start, as JSON or as CSV for a spreadsheet.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use pointsman_telemetry::TenantMetrics;
use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::openai::json;
use crate::state::ServerState;

#[derive(Debug, Deserialize)]
pub(super) struct Ask {
    #[serde(default)]
    format: Format,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Json,
    Csv,
}

#[derive(Serialize)]
struct Accounts {
    object: &'static str,
    /// Unix seconds of the start.
    since: u64,
    data: Vec<Account>,
}

#[derive(Serialize)]
struct Account {
    tenant: String,
    requests: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
}

pub(super) async fn usage(
    State(state): State<Arc<ServerState>>,
    ask: Result<Query<Ask>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(Ask { format }) = ask.map_err(|error| ApiError::invalid("format", error.body_text()))?;
    let accounts = state.usage.accounts(&state.names).into_iter();
    let data: Vec<Account> = accounts.map(|(tenant, account)| Account::new(&tenant, &account)).collect();
    Ok(match format {
        Format::Json => json(&Accounts { object: "list", since: state.started, data }),
        Format::Csv => ([(CONTENT_TYPE, "text/csv; charset=utf-8")], csv(&data)).into_response(),
    })
}

/// RFC 4180. Clients may choose the names of tenants.
fn csv(data: &[Account]) -> String {
    let mut text = "tenant,requests,prompt_tokens,cached_tokens,completion_tokens\r\n".to_owned();
    for Account { tenant, requests, prompt_tokens, cached_tokens, completion_tokens } in data {
        // A spreadsheet takes what begins so for a formula.
        let mark = if tenant.starts_with(['=', '+', '-', '@']) { "'" } else { "" };
        let tenant = tenant.replace('"', "\"\"");
        // Writing to a string does not fail.
        let _ = write!(text, "\"{mark}{tenant}\",{requests},{prompt_tokens},{cached_tokens},{completion_tokens}\r\n");
    }
    text
}

impl Account {
    fn new(tenant: &str, account: &TenantMetrics) -> Self {
        Self {
            tenant: tenant.to_owned(),
            requests: account.requests.get(),
            prompt_tokens: account.prompt_tokens.get(),
            cached_tokens: account.cached_tokens.get(),
            completion_tokens: account.completion_tokens.get(),
        }
    }
}
