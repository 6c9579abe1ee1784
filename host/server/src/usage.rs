//! What each tenant has been served since the start: requests and tokens, for whoever pays or is asked why the host is full.
//!
//! The counters of `/metrics` are the only account, and the admin plane reads those: two accounts would differ one day. They are
//! kept by the number of the tenant's name, and names are bounded, so that a client that makes up a tenant per request
//! ends in `other`. A request counts when it ends, and only if it was served, or was cut short by its client, its
//! deadline or a shutdown: what was refused, and what an engine's fault broke off, is nobody's to pay.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use pointsman_sched::admit::Outcome;
use pointsman_sched::ids::Micros;
use pointsman_telemetry::{Metrics, NameKind, Names, TenantMetrics};

use crate::error::ApiError;
use crate::keys::Place;

/// The accounts, by the number of the tenant's name.
#[derive(Debug, Default)]
pub(crate) struct Usage(RwLock<BTreeMap<u32, Arc<TenantMetrics>>>);

/// One request's entry in its tenant's account, and its share of its key's limits.
#[derive(Debug)]
pub(crate) struct Bill {
    account: Arc<TenantMetrics>,
    place: Option<Place>,
    prompt_tokens: u32,
    /// Cached and generated tokens of one that was served.
    served: Option<(u32, u32)>,
}

// === impl Usage ===

impl Usage {
    /// The account of a tenant; opened at its first request.
    pub(crate) fn account(&self, tenant: u32, names: &Names, metrics: &Metrics) -> Arc<TenantMetrics> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = known.get(&tenant) {
            return Arc::clone(account);
        }
        drop(known);
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let open = || Arc::new(metrics.tenant(&names.name(NameKind::Tenant, tenant)));
        Arc::clone(known.entry(tenant).or_insert_with(open))
    }

    /// Every account with its tenant, by name.
    pub(crate) fn accounts(&self, names: &Names) -> BTreeMap<Arc<str>, Arc<TenantMetrics>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.iter().map(|(tenant, account)| (names.name(NameKind::Tenant, *tenant), Arc::clone(account))).collect()
    }
}

// === impl Bill ===

impl Bill {
    pub(crate) fn new(account: Arc<TenantMetrics>, place: Option<Place>) -> Self {
        Self { account, place, prompt_tokens: 0, served: None }
    }

    /// Takes the tokens that the request may use from those of its key.
    pub(crate) fn charge(&mut self, prompt_tokens: u32, new_tokens: u32, now: Micros) -> Result<(), ApiError> {
        self.prompt_tokens = prompt_tokens;
        self.place.as_mut().map_or(Ok(()), |place| place.take(prompt_tokens, new_tokens, now))
    }

    /// Notes what the request came to; the last word counts.
    pub(crate) fn ended(&mut self, outcome: Outcome, cached_tokens: u32, generated_tokens: u32) {
        self.served = match outcome {
            Outcome::Finished | Outcome::Cancelled => Some((cached_tokens, generated_tokens)),
            Outcome::Failed | Outcome::Rejected => None,
        };
    }
}

impl Drop for Bill {
    fn drop(&mut self) {
        let Some((cached, generated)) = self.served else { return };
        if let Some(place) = &mut self.place {
            place.spent(u64::from(self.prompt_tokens) + u64::from(generated));
        }
        self.account.requests.inc();
        self.account.prompt_tokens.inc_by(self.prompt_tokens.into());
        self.account.cached_tokens.inc_by(cached.into());
        self.account.completion_tokens.inc_by(generated.into());
    }
}
