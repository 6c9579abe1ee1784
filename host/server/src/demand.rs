//! The way from a model's name to what serves it, for every route; where the model is loaded on demand, through a wait for it.
//!
//! Most names need one look into the catalog. A model that is loaded on demand is asked for first: that begins its load, or keeps it
//! from being given up while the request is inside. A request that waits holds its place in admission, so those that wait may have
//! half of the places and no more: however slow a load is, the models that are there go on being served. It waits in its handler,
//! which goes when its client does, or cancels it by its id; the load belongs to the host and goes on. Its id stays in use until it
//! is in flight under it, or ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pointsman_sched::ids::Micros;
use tokio::sync::watch;

use crate::admission::Permit;
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::keys::KeyDigest;
use crate::ports::{Catalog, Lease, LoadReport, Want};
use crate::state::ServerState;

/// Who asks for a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asking<'a> {
    pub(crate) arrived: Micros,
    pub(crate) timeout_ms: u64,
    /// The id and the API key by which it may be cancelled from when it begins to wait.
    pub(crate) id: (&'a Arc<str>, Option<KeyDigest>),
    /// Hears how the load gets on.
    pub(crate) told: Option<&'a watch::Sender<Option<Loading>>>,
}

/// A model on its way.
#[derive(Clone, Debug)]
pub(crate) struct Loading {
    pub(crate) model: Arc<str>,
    /// None before its load has begun.
    pub(crate) percent: Option<u8>,
}

/// A place among the requests that wait.
#[derive(Debug)]
struct Waiting<'a> {
    n_waiting: &'a AtomicU32,
}

/// Finds what a client named and generates text.
pub(crate) async fn find(
    state: &ServerState,
    name: &str,
    permit: &mut Permit,
    asking: Asking<'_>,
) -> Result<Target, ApiError> {
    let catalog = reach(state, name, permit, asking).await?;
    let target = Target::find(&catalog, name)?;
    hold(state, &catalog, target, permit)
}

/// What is served once the model is there that a name needs, of either kind; the request has it from now on.
pub(crate) async fn reach(
    state: &ServerState,
    name: &str,
    permit: &mut Permit,
    asking: Asking<'_>,
) -> Result<Arc<Catalog>, ApiError> {
    let catalog = state.engine.catalog();
    let Some(model) = catalog.demanded(name).cloned() else { return Ok(catalog) };
    // What it names may go while this waits.
    drop(catalog);
    let Asking { arrived, timeout_ms, .. } = asking;
    let limit_ms = state.config.load_wait_ms;
    let passed_ms = state.clock.now().saturating_sub(arrived) / 1_000;
    let left_ms = timeout_ms.saturating_sub(passed_ms);
    let patience = Duration::from_millis(limit_ms.min(left_ms));
    match tokio::time::timeout(patience, bring(state, &model, (asking, permit))).await {
        Ok(brought) => {
            let (lease, catalog) = brought?;
            permit.keep(lease);
            Ok(catalog)
        }
        Err(_) if left_ms <= limit_ms => Err(ApiError::Deadline { limit_ms: timeout_ms }),
        Err(_) => {
            let why = format!("is not there after {limit_ms} ms (engine.load_wait_ms)");
            Err(ApiError::NotYet { model: model.to_string(), why })
        }
    }
}

/// Holds the variants of an alias that come and go by themselves, beside the model that was asked for. One that is to go is not
/// offered: nobody waits for it, because the others serve the name as well.
fn hold(state: &ServerState, catalog: &Catalog, mut target: Target, permit: &mut Permit) -> Result<Target, ApiError> {
    let asked = catalog.demanded(&target.name);
    target.variants.retain(|variant| {
        if asked == Some(&variant.id) || !catalog.on_demand.contains(&variant.id) {
            return true;
        }
        let lease = state.models.hold(&variant.id);
        lease.map(|lease| permit.keep(lease)).is_some()
    });
    if target.variants.is_empty() {
        let why = "makes room for another model".to_owned();
        return Err(ApiError::NotYet { model: target.name, why });
    }
    Ok(target)
}

/// Holds a model; what is served with it.
async fn bring(
    state: &ServerState,
    model: &Arc<str>,
    (asking, permit): (Asking<'_>, &mut Permit),
) -> Result<(Lease, Arc<Catalog>), ApiError> {
    let mut is_first = true;
    loop {
        let lease = lease(state, (model, is_first), (asking, permit)).await?;
        let catalog = state.engine.catalog();
        if catalog.unloaded().all(|unloaded| unloaded != model) {
            return Ok((lease, catalog));
        }
        // An operator has unloaded it since.
        is_first = false;
        tokio::task::yield_now().await;
    }
}

/// Asks for a model until it is there. From its first wait on the request's id is in use, without a gap until it is in flight.
async fn lease(
    state: &ServerState,
    (model, is_first): (&Arc<str>, bool),
    (asking, permit): (Asking<'_>, &mut Permit),
) -> Result<Lease, ApiError> {
    let mut want = state.models.want(model, is_first);
    if is_first {
        let metrics = state.metrics.models();
        if matches!(want, Want::Here(_)) { &metrics.hits } else { &metrics.misses }.inc();
    }
    let mut place = None;
    loop {
        // What it holds on its way it gives up only when it has asked again.
        let (_held, mut changes) = match want {
            // A cancel that came with the model has been answered: it holds.
            Want::Here(lease) => return permit.check_cancelled().map(|()| lease),
            Want::Failed { why, retry_after_ms } => {
                return Err(ApiError::NotLoaded { model: model.to_string(), why, retry_after_ms });
            }
            Want::Coming(lease, changes) => (lease, changes),
        };
        if place.is_none() {
            place = Some(Waiting::enter(state, model)?);
        }
        let (id, owner) = asking.id;
        let known = permit.known_by(|| state.registry.know(id, owner))?;
        let mut load = asking.told.and_then(|_| state.models.loading(model));
        if let Some(reports) = &mut load {
            reports.mark_unchanged();
        }
        loop {
            asking.tell(model, load.as_ref());
            tokio::select! {
                biased;
                () = known.cancel_asked() => return Err(ApiError::Cancelled),
                // It ends with the host alone.
                changed = changes.changed() => {
                    changed.map_err(|_| ApiError::Draining)?;
                    break;
                }
                () = progress(&mut load) => {}
            }
        }
        want = state.models.want(model, false);
    }
}

/// Completes when there is news of a load.
async fn progress(load: &mut Option<watch::Receiver<LoadReport>>) {
    let is_over = match load {
        Some(reports) => reports.changed().await.is_err(),
        None => true,
    };
    if is_over {
        std::future::pending::<()>().await;
    }
}

// === impl Asking ===

impl Asking<'_> {
    /// Says how far the load is, where that is news; its end is told by what follows.
    fn tell(&self, model: &Arc<str>, load: Option<&watch::Receiver<LoadReport>>) {
        let Some(told) = self.told else { return };
        let percent = load.and_then(|reports| match &*reports.borrow() {
            LoadReport::Progress(progress) => Some(progress.percent),
            LoadReport::Ready(_) | LoadReport::Failed(_) => None,
        });
        told.send_if_modified(|last| {
            let is_news = last.as_ref().is_none_or(|last| percent.is_some() && last.percent != percent);
            if is_news {
                *last = Some(Loading { model: Arc::clone(model), percent });
            }
            is_news
        });
    }
}

// === impl Waiting ===

impl<'a> Waiting<'a> {
    fn enter(state: &'a ServerState, model: &str) -> Result<Self, ApiError> {
        let (waiting, most) = (&state.waiting_for_models, (state.config.max_requests / 2).max(1));
        if waiting.fetch_add(1, Ordering::Relaxed) < most {
            return Ok(Self { n_waiting: waiting });
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
        let why = format!("{most} requests wait for models, half of server.max_in_flight and the most at once");
        Err(ApiError::NotYet { model: model.to_owned(), why })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.n_waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
