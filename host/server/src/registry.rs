//! The requests in flight, by the id that their client knows: for cancelling, and so that an id is in use once.
//!
//! One map behind one lock: two short critical sections per HTTP request, none per token.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pointsman_sched::ids::{Micros, ReplicaId, RequestId};
use pointsman_sched::request::CancelCause;
use tokio::sync::Notify;

use crate::admission::Permit;
use crate::error::ApiError;
use crate::keys::KeyDigest;
use crate::ports::EnginePort;
use crate::trace::Trace;

/// Every request in flight.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    by_id: Mutex<HashMap<Arc<str>, Arc<Live>>>,
}

/// One HTTP request and the engine requests behind it.
#[derive(Debug)]
struct Live {
    /// API key, `None` without keys.
    owner: Option<KeyDigest>,
    engine: Mutex<Running>,
    /// Wakes whoever waits for something else than engine requests.
    cancel_asked: Notify,
}

/// The engine requests of one HTTP request, in the order of its choices.
#[derive(Debug, Default)]
struct Running {
    requests: Vec<EngineRequest>,
    /// A cancel came; what is submitted after it ends at once.
    cancelled: bool,
}

#[derive(Clone, Copy, Debug)]
struct EngineRequest {
    replica: ReplicaId,
    id: RequestId,
    ended: bool,
}

/// Holds a request's place in the registry and in admission. Dropping it, as when the client goes away and hyper drops
/// the handler or the body, cancels whatever is still running.
#[derive(Debug)]
pub(crate) struct InFlight {
    registry: Arc<Registry>,
    engine: Arc<dyn EnginePort>,
    id: Arc<str>,
    live: Arc<Live>,
    pub(crate) permit: Permit,
}

/// The id of a request's draft.
pub(crate) fn draft_of(id: &str) -> String {
    format!("{id}.draft")
}

// === impl Registry ===

impl Registry {
    /// Enters a request; refused while its id is in use.
    pub(crate) fn enter(
        self: &Arc<Self>,
        id: &Arc<str>,
        owner: Option<KeyDigest>,
        engine: &Arc<dyn EnginePort>,
        permit: Permit,
    ) -> Result<InFlight, ApiError> {
        let live = Arc::new(Live { owner, engine: Mutex::default(), cancel_asked: Notify::new() });
        let mut by_id = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
        if by_id.contains_key(id) {
            return Err(ApiError::IdInUse { id: id.to_string() });
        }
        by_id.insert(Arc::clone(id), Arc::clone(&live));
        drop(by_id);
        Ok(InFlight { registry: Arc::clone(self), engine: Arc::clone(engine), id: Arc::clone(id), live, permit })
    }

    /// Cancels a request of the same API key, with its draft; false when there is none.
    pub(crate) fn cancel(&self, id: &str, owner: Option<KeyDigest>, engine: &dyn EnginePort) -> bool {
        let find = |id: &str| {
            let by_id = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
            by_id.get(id).filter(|live| live.owner == owner).cloned()
        };
        let Some(live) = find(id) else { return false };
        for live in [Some(live), find(&draft_of(id))].into_iter().flatten() {
            live.cancel_rest(engine, CancelCause::Asked);
            live.cancel_asked.notify_one();
        }
        true
    }
}

// === impl Live ===

impl Live {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the drivers to end what has not ended, and ends what is still to come. It counts as ended only when the driver
    /// says so.
    fn cancel_rest(&self, engine: &dyn EnginePort, cause: CancelCause) {
        let rest: Vec<EngineRequest> = {
            let mut running = self.running();
            running.cancelled = true;
            running.requests.iter().filter(|r| !r.ended).copied().collect()
        };
        for request in rest {
            engine.cancel(request.replica, request.id, cause);
        }
    }
}

// === impl InFlight ===

impl InFlight {
    /// The id that the client knows.
    pub(crate) fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// The client went away: says so where somebody looks for it.
    pub(crate) fn abandoned(&self, trace: &Trace, now: Micros) {
        if trace.abandoned(now) {
            tracing::info!(request = &*self.id, status = 499, "the client went away");
        }
    }

    /// Notes that an engine request is running for this one.
    pub(crate) fn submitted(&self, replica: ReplicaId, id: RequestId) {
        let mut running = self.live.running();
        running.requests.push(EngineRequest { replica, id, ended: false });
        let cancelled = running.cancelled;
        drop(running);
        if cancelled {
            self.engine.cancel(replica, id, CancelCause::Asked);
        }
    }

    /// Waits until the client asks for the end of its request.
    pub(crate) async fn cancel_asked(&self) {
        self.live.cancel_asked.notified().await;
    }

    /// The same for whoever outlives a borrow.
    pub(crate) fn told_to_cancel(&self) -> impl Future<Output = ()> + Send + use<> {
        let live = Arc::clone(&self.live);
        async move { live.cancel_asked.notified().await }
    }

    /// Notes that the n-th engine request has ended.
    pub(crate) fn ended(&self, choice: usize) {
        if let Some(request) = self.live.running().requests.get_mut(choice) {
            request.ended = true;
        }
    }

    /// Cancels the n-th engine request and forgets it.
    pub(crate) fn cancel(&self, choice: usize, cause: CancelCause) {
        let mut running = self.live.running();
        let Some(request) = running.requests.get_mut(choice).filter(|r| !r.ended) else { return };
        request.ended = true;
        let EngineRequest { replica, id, .. } = *request;
        drop(running);
        self.engine.cancel(replica, id, cause);
    }

    /// Cancels every engine request that still runs and forgets them.
    pub(crate) fn cancel_all(&self, cause: CancelCause) {
        self.live.cancel_rest(&*self.engine, cause);
        for request in &mut self.live.running().requests {
            request.ended = true;
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.cancel_all(CancelCause::ClientGone);
        self.registry.by_id.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
