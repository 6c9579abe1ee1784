//! Aliases with weights: the pure assignment (control), its documents (store) and the journal, behind the server's port.
//!
//! Changed by hand, read by every request: a request loads one pointer and hashes its unit.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use pointsman_control::rollout::Sticky;
use pointsman_control::{AliasDocument, AliasError, DesiredAlias, Happened, Unit};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, AdminErrorKind, AliasPort, Asker};

use crate::deploy::Deploy;
use crate::store::Store;

/// Every alias that has weights, or had.
#[derive(Debug)]
pub(crate) struct Aliases {
    deploy: Arc<Deploy>,
    store: Arc<Store>,
    /// Held from planning to the swap.
    operations: Mutex<()>,
    live: ArcSwap<pointsman_control::Aliases>,
}

// === impl Aliases ===

impl Aliases {
    /// Takes the stored documents as the truth. In an alias whose document cannot be read the router chooses.
    pub(crate) fn start(deploy: Arc<Deploy>, store: Arc<Store>) -> Arc<Self> {
        let mut live = pointsman_control::Aliases::default();
        for document in store.alias_documents() {
            match document {
                Ok(document) => {
                    deploy.catch_up_alias(&document);
                    live.put(document);
                }
                Err(error) => tracing::error!("the router chooses among the variants of an alias: {error}"),
            }
        }
        Arc::new(Self { deploy, store, operations: Mutex::default(), live: ArcSwap::from_pointee(live) })
    }
}

impl AliasPort for Aliases {
    fn assign(&self, alias: &str, asker: &Asker<'_>) -> Option<Arc<str>> {
        let Asker { tenant, session, request } = *asker;
        self.live.load().assign(alias, &Unit { tenant, session, request }).map(Arc::from)
    }

    fn weights(&self, alias: &str) -> wire::Weights {
        let AliasDocument { generation, weights, sticky, .. } = self.live.load().get(alias);
        wire::Weights { generation, weights, sticky: to_wire(sticky) }
    }

    fn put_alias(&self, alias: &str, request: wire::PutAlias, actor: &str) -> Result<wire::Weights, AdminError> {
        let _one = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        self.deploy.check_changeable(None)?;
        let wire::PutAlias { weights, sticky, if_generation } = request;
        let desired = DesiredAlias { weights, sticky: from_wire(sticky), if_generation };
        let document = self.live.load().plan(alias, desired).map_err(alias_error)?;
        self.store.write_alias(&document).map_err(|error| AdminError {
            kind: AdminErrorKind::Internal,
            message: format!("nothing was changed: the document of `{alias}` cannot be stored ({error})"),
            param: None,
        })?;
        let mut live = pointsman_control::Aliases::clone(&self.live.load());
        live.put(document.clone());
        self.live.store(Arc::new(live));
        let AliasDocument { alias, generation, weights, sticky, .. } = document;
        self.deploy.note(actor, Happened::AliasChanged { alias: alias.clone(), generation, weights, sticky });
        Ok(self.weights(&alias))
    }
}

fn alias_error(error: AliasError) -> AdminError {
    let (kind, param) = match &error {
        AliasError::Stale { .. } => (AdminErrorKind::Conflict, "if_generation"),
        _ => (AdminErrorKind::Invalid, "weights"),
    };
    AdminError { kind, message: error.to_string(), param: Some(param.into()) }
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
