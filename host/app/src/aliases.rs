//! Aliases with weights: the pure assignment (control), its documents (store) and the journal, behind the server's port.
//!
//! Changed by hand or by a rollout, read by every request: a request loads one pointer and hashes its unit.

mod rollout;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use pointsman_control::rollout::Sticky;
use pointsman_control::{AliasDocument, AliasError, DesiredAlias, Happened, Unit};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, AdminErrorKind, AliasPort, Asker, Assigned, EnginePort};
use pointsman_telemetry::Metrics;
use serde_json::value::RawValue;

use crate::clock::SystemClock;
use crate::deploy::rollout::Live;
use crate::deploy::{Deploy, lock};
use crate::store::Store;

/// Every alias that has weights, or had. Locks nest in this order: `operations`, `rollouts`, then those of the deployments.
#[derive(Debug)]
pub(crate) struct Aliases {
    parts: AliasParts,
    /// Held from planning to the swap.
    operations: Mutex<()>,
    /// Rollouts under way, by alias; the observer thread looks after them.
    rollouts: Mutex<BTreeMap<String, Live>>,
    live: ArcSwap<pointsman_control::Aliases>,
}

/// What aliases share with the rest of the host.
#[derive(Debug)]
pub(crate) struct AliasParts {
    /// Where the journal is, and whether anything may be changed.
    pub deploy: Arc<Deploy>,
    /// Where documents are.
    pub store: Arc<Store>,
    /// Knows what is loaded.
    pub engine: Arc<dyn EnginePort>,
    /// Time for the rollouts.
    pub clock: Arc<SystemClock>,
    /// Series of their arms.
    pub metrics: Arc<Metrics>,
}

// === impl Aliases ===

impl Aliases {
    /// Takes the stored documents as the truth. In an alias whose document cannot be read the router chooses.
    pub(crate) fn start(parts: AliasParts) -> Arc<Self> {
        let mut live = pointsman_control::Aliases::default();
        let mut rolling_out = Vec::new();
        for document in parts.store.alias_documents() {
            match document {
                Ok(document) => {
                    parts.deploy.catch_up_alias(&document);
                    rolling_out.extend(document.rollout.clone().map(|rollout| (document.alias.clone(), rollout)));
                    live.put(document);
                }
                Err(error) => tracing::error!("the router chooses among the variants of an alias: {error}"),
            }
        }
        let live = ArcSwap::from_pointee(live);
        let aliases = Self { parts, operations: Mutex::default(), rollouts: Mutex::default(), live };
        rolling_out.into_iter().for_each(|(alias, rollout)| aliases.restore_rollout(&alias, rollout));
        Arc::new(aliases)
    }

    /// Keeps weights and rollouts as they are until it is dropped.
    pub(crate) fn hold(&self) -> MutexGuard<'_, ()> {
        lock(&self.operations)
    }

    /// Changes what requests see.
    fn change(&self, change: impl Fn(&mut pointsman_control::Aliases)) {
        self.live.rcu(|live| {
            let mut next = pointsman_control::Aliases::clone(live);
            change(&mut next);
            next
        });
    }
}

impl AliasPort for Aliases {
    fn assign(&self, alias: &str, asker: &Asker<'_>) -> Option<Assigned> {
        let Asker { tenant, session, request } = *asker;
        let live = self.live.load();
        let pointsman_control::Assigned { variant, unit, is_trial } =
            live.assign(alias, &Unit { tenant, session, request })?;
        Some(Assigned { variant: Arc::from(variant), unit, is_trial })
    }

    fn weights(&self, alias: &str) -> wire::Weights {
        let live = self.live.load();
        let document = live.get(alias);
        let rollout = document.rolling_out().map(|rollout| wire::Trial {
            id: rollout.id.clone(),
            candidate: rollout.candidate.clone(),
            percent: live.share(alias),
        });
        let AliasDocument { generation, weights, sticky, .. } = document;
        wire::Weights { generation, weights, sticky: to_wire(sticky), rollout }
    }

    fn put_alias(&self, alias: &str, request: wire::PutAlias, actor: &str) -> Result<wire::Weights, AdminError> {
        let _one = lock(&self.operations);
        self.parts.deploy.check_changeable(None)?;
        let wire::PutAlias { weights, sticky, if_generation, dry_run } = request;
        let desired = DesiredAlias { weights, sticky: from_wire(sticky), if_generation };
        let planned = self.live.load().plan(alias, desired).map_err(alias_error)?;
        if dry_run {
            return Ok(self.weights(alias));
        }
        let document = AliasDocument { journal_before: self.parts.deploy.last_line(), ..planned };
        self.parts.store.write_alias(&document).map_err(|error| unchanged(alias, &error))?;
        self.change(|live| live.put(document.clone()));
        self.note_change(actor, document);
        Ok(self.weights(alias))
    }

    fn start_rollout(
        &self,
        alias: &str,
        request: wire::StartAliasRollout,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        self.begin_rollout(alias, request, actor)
    }

    fn rollouts(&self, alias: &str) -> Result<Vec<Box<RawValue>>, AdminError> {
        Ok(self.last_rollout(alias)?.into_iter().collect())
    }

    fn rollout(&self, alias: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        self.one_rollout(alias, id)
    }

    fn steer_rollout(
        &self,
        alias: &str,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        self.steer(alias, id, steer, actor)
    }
}

impl Aliases {
    fn note_change(&self, actor: &str, document: AliasDocument) {
        let AliasDocument { alias, generation, weights, sticky, .. } = document;
        self.parts.deploy.note(actor, Happened::AliasChanged { alias, generation, weights, sticky });
    }
}

/// The disk has refused what must be stored first.
fn unchanged(alias: &str, error: &io::Error) -> AdminError {
    let message = format!("nothing was changed: the document of `{alias}` cannot be stored ({error})");
    AdminError { kind: AdminErrorKind::Internal, message, param: None }
}

fn alias_error(error: AliasError) -> AdminError {
    let (kind, param) = match &error {
        AliasError::Stale { .. } => (AdminErrorKind::Conflict, Some("if_generation")),
        AliasError::RollingOut { .. } | AliasError::NoControl { .. } => (AdminErrorKind::Conflict, None),
        AliasError::Itself { .. } => (AdminErrorKind::Invalid, Some("candidate")),
        AliasError::Weight { .. } | AliasError::NoWeight | AliasError::TooMany { .. } => {
            (AdminErrorKind::Invalid, Some("weights"))
        }
    };
    AdminError { kind, message: error.to_string(), param: param.map(str::to_owned) }
}

fn to_wire(sticky: Sticky) -> wire::Sticky {
    match sticky {
        Sticky::Tenant => wire::Sticky::Tenant,
        Sticky::Session => wire::Sticky::Session,
        Sticky::Request => wire::Sticky::Request,
    }
}

fn from_wire(sticky: wire::Sticky) -> Sticky {
    match sticky {
        wire::Sticky::Tenant => Sticky::Tenant,
        wire::Sticky::Session => Sticky::Session,
        wire::Sticky::Request => Sticky::Request,
    }
}
