//! The requests in flight, by the id that their client knows: for cancelling, and so that an id is in use once.
//!
//! One map behind one lock: two short critical sections per HTTP request, none per token.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

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
    /// Whose draft it is; of a draft.
    draft_of: OnceLock<Arc<str>>,
    /// Whether nobody wants its answer any more, whoever drops it.
    is_given_up: AtomicBool,
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
    engine: Arc<dyn EnginePort>,
    known: Known,
    pub(crate) permit: Permit,
}

/// A request whose id is in use, and by which it can be cancelled, whether it is in flight yet or not. Dropping it forgets it.
#[derive(Debug)]
pub(crate) struct Known {
    registry: Arc<Registry>,
    id: Arc<str>,
    live: Arc<Live>,
}

/// The longest id that a client may send, which an upstream may be told.
const MAX_ID: usize = 128;

/// The id of a request's draft.
pub(crate) fn draft_of(id: &str) -> String {
    part_of(id, ".draft")
}

/// The id under which a second upstream knows a request: it may be the same server.
pub(crate) fn hedge_of(id: &str) -> String {
    part_of(id, ".hedge")
}

fn part_of(id: &str, suffix: &str) -> String {
    format!("{}{suffix}", &id[..id.floor_char_boundary(MAX_ID - suffix.len())])
}

// === impl Registry ===

impl Registry {
    /// Enters a request; refused while its id is in use. One that has waited for its model is known since then.
    pub(crate) fn enter(
        self: &Arc<Self>,
        id: &Arc<str>,
        owner: Option<KeyDigest>,
        engine: &Arc<dyn EnginePort>,
        mut permit: Permit,
    ) -> Result<InFlight, ApiError> {
        permit.check_cancelled()?;
        let known = permit.take_known().map_or_else(|| self.know(id, owner), Ok)?;
        Ok(InFlight { engine: Arc::clone(engine), known, permit })
    }

    /// Makes a request known that is not in flight yet; refused while its id is in use.
    pub(crate) fn know(self: &Arc<Self>, id: &Arc<str>, owner: Option<KeyDigest>) -> Result<Known, ApiError> {
        let live = self.insert(id, owner)?;
        Ok(Known { registry: Arc::clone(self), id: Arc::clone(id), live })
    }

    fn insert(&self, id: &Arc<str>, owner: Option<KeyDigest>) -> Result<Arc<Live>, ApiError> {
        let (engine_requests, cancel_asked) = (Mutex::default(), Notify::new());
        let (draft_of, is_given_up) = (OnceLock::new(), AtomicBool::new(false));
        let live = Arc::new(Live { owner, engine: engine_requests, draft_of, is_given_up, cancel_asked });
        let mut by_id = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
        if by_id.contains_key(id) {
            return Err(ApiError::IdInUse { id: id.to_string() });
        }
        by_id.insert(Arc::clone(id), Arc::clone(&live));
        Ok(live)
    }

    fn remove(&self, id: &str) {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// Cancels a request of the same API key, with its draft; false when there is none.
    pub(crate) fn cancel(&self, id: &str, owner: Option<KeyDigest>, engine: &dyn EnginePort) -> bool {
        let Some(live) = self.find(id).filter(|live| live.owner == owner) else { return false };
        for live in [Some(live), self.draft(id)].into_iter().flatten() {
            live.cancel_rest(engine, CancelCause::Asked);
            live.cancel_asked.notify_one();
        }
        true
    }

    /// Notes that nobody wants the draft of a request any more: whoever drops it is no client that goes away.
    pub(crate) fn give_up_draft(&self, id: &str) {
        self.draft(id).iter().for_each(|live| live.is_given_up.store(true, Ordering::Relaxed));
    }

    fn find(&self, id: &str) -> Option<Arc<Live>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// The draft of a request, and no other request that a client has given such an id.
    fn draft(&self, id: &str) -> Option<Arc<Live>> {
        self.find(&draft_of(id)).filter(|live| live.draft_of.get().is_some_and(|of| **of == *id))
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
        &self.known.id
    }

    /// Notes that it is the draft of another request.
    pub(crate) fn drafts_for(&self, id: &Arc<str>) {
        // It is entered once.
        let _ = self.known.live.draft_of.set(Arc::clone(id));
    }

    /// The client went away, or wants no draft any more: says so where somebody looks for it.
    pub(crate) fn abandoned(&self, trace: &Trace, now: Micros) {
        if self.known.live.is_given_up.load(Ordering::Relaxed) {
            return trace.superseded(now);
        }
        trace.abandoned(now);
        tracing::info!(request = &*self.known.id, status = 499, "the client went away");
    }

    /// Notes that an engine request is running for this one.
    pub(crate) fn submitted(&self, replica: ReplicaId, id: RequestId) {
        let mut running = self.known.live.running();
        running.requests.push(EngineRequest { replica, id, ended: false });
        let cancelled = running.cancelled;
        drop(running);
        if cancelled {
            self.engine.cancel(replica, id, CancelCause::Asked);
        }
    }

    /// Waits until the client asks for the end of its request.
    pub(crate) async fn cancel_asked(&self) {
        self.known.live.cancel_asked.notified().await;
    }

    /// The same for whoever outlives a borrow.
    pub(crate) fn told_to_cancel(&self) -> impl Future<Output = ()> + Send + use<> {
        let live = Arc::clone(&self.known.live);
        async move { live.cancel_asked.notified().await }
    }

    /// Notes that the n-th engine request has ended.
    pub(crate) fn ended(&self, choice: usize) {
        if let Some(request) = self.known.live.running().requests.get_mut(choice) {
            request.ended = true;
        }
    }

    /// Cancels the n-th engine request and forgets it.
    pub(crate) fn cancel(&self, choice: usize, cause: CancelCause) {
        let mut running = self.known.live.running();
        let Some(request) = running.requests.get_mut(choice).filter(|r| !r.ended) else { return };
        request.ended = true;
        let EngineRequest { replica, id, .. } = *request;
        drop(running);
        self.engine.cancel(replica, id, cause);
    }

    /// Cancels every engine request that still runs and forgets them.
    pub(crate) fn cancel_all(&self, cause: CancelCause) {
        self.known.live.cancel_rest(&*self.engine, cause);
        for request in &mut self.known.live.running().requests {
            request.ended = true;
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let is_given_up = self.known.live.is_given_up.load(Ordering::Relaxed);
        self.cancel_all(if is_given_up { CancelCause::Asked } else { CancelCause::ClientGone });
    }
}

// === impl Known ===

impl Known {
    pub(crate) fn is_cancelled(&self) -> bool {
        self.live.running().cancelled
    }

    /// Waits until the client asks for the end of its request.
    pub(crate) async fn cancel_asked(&self) {
        self.live.cancel_asked.notified().await;
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        self.registry.remove(&self.id);
    }
}
