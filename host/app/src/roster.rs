//! Models that come and go while requests flow, behind the server's port.
//!
//! A load has threads of its own; the one that opens the files, checks the room, packs the weights and makes an engine has the
//! lowest priority that a thread can have, while the drivers go on and know nothing of it. What it has made joins the drivers
//! (a message each, taken between two steps), then the stored list says that it is to be there, and last the catalog names it:
//! from that pointer swap on requests find it. Whatever fails before leaves everything as it was: replicas that had joined are
//! given back, and the list is written again. One model is loaded at a time, because two would share the memory that each was
//! told it has.
//!
//! An unload goes the other way: the stored list, then the catalog, so that nobody new comes; then each driver gives its replica
//! back when the last request there has ended, or when the time for that is over. The replica is dropped here, with its policies'
//! guests, its cache and its weights, since that may take long, and the allocator is asked to return the memory. Its name and
//! its replica's number are free again only after that, so that no event, cancel or guest ever takes one for another.
//!
//! What is loaded so is loaded again at the next start, before the host is ready; what the configuration names comes back by
//! itself. A model that is lost by then keeps its place in the list, with the reason, until somebody unloads it.
//!
//! Models that requests load ([`demand`]) take the same way, and another back; they are in no stored list.

mod demand;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{anyhow, bail};
use pointsman_control::{Happened, LoadedModel as StoredModel};
use pointsman_engine::cuda::{Bytes, CodeOptions, PoolShare};
use pointsman_engine::{ComputePool, give_back_freed, lowest_priority};
use pointsman_sched::ids::Micros;
use pointsman_server::admin::wire::{self, LoadStage, ModelSource, ModelState};
use pointsman_server::ports::{
    self, AdminError, AdminErrorKind, AliasPort, Clock as _, DeviceState, EnginePort, Lease, LoadReport, ModelAdmin,
    Variant, Want,
};
use tokio::sync::watch;

use crate::aliases::Aliases;
use crate::config::Config;
use crate::deploy::{Deploy, lock};
use crate::devices::Place;
use crate::doctor::available_memory;
use crate::draft_models::DraftSources;
use crate::encoders::EncoderPool;
use crate::engine::{Engine, Joined, Left, PoolRefusal};
use crate::models::{Follow, LoadTerms, LoadedModel, Loader, LostModel, allowed, check_spelling, of};
use crate::serve::Shared;
use crate::store::Store;
use demand::{Backoff, Demand};

/// Lowest priority of a thread.
const LOWEST: i32 = 19;

/// How often the end of the host looks whether a load has ended.
const STOP_LOOKS: u32 = 200;
/// After what time each; and that after which a load looks whether a model is idle that it could take the place of.
const LOOK: Duration = Duration::from_millis(10);

/// Every model by name.
#[derive(Debug)]
pub(crate) struct Roster {
    parts: Arc<Parts>,
    /// Loads under way, one of them in its turn.
    loaders: Mutex<Vec<JoinHandle<()>>>,
}

/// What loads and unloads work on.
#[derive(Debug)]
pub(crate) struct RosterParts {
    pub config: Config,
    pub shared: Shared,
    pub store: Arc<Store>,
    pub deploy: Arc<Deploy>,
    pub engine: Arc<Engine>,
    pub aliases: Arc<Aliases>,
    /// Threads of the CPU.
    pub pool: ComputePool,
    /// Those for models of embeddings.
    pub encoder_pool: EncoderPool,
    /// Where code for a GPU comes from.
    pub code: CodeOptions,
    /// Models that draft for others.
    pub draft_sources: Arc<DraftSources>,
}

#[derive(Debug)]
struct Parts {
    parts: RosterParts,
    /// Requests look here: nothing that may block is done under this lock.
    entries: Mutex<BTreeMap<String, Entry>>,
    /// Held while the stored list changes.
    stored: Mutex<()>,
    /// Held by who divides devices' memory: the load whose turn it is, or pools that grow or are bounded.
    turn: Mutex<()>,
    /// Pools may have room to grow; whoever has held `turn` looks.
    may_settle: AtomicBool,
    /// Changes when a model comes or goes on which requests may wait; under the lock of the entries.
    changes: watch::Sender<()>,
    /// For models that are loaded on demand, so far.
    requests: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    source: ModelSource,
    path: Option<PathBuf>,
    state: State,
    /// Of one that is loaded on demand.
    demand: Demand,
}

/// A load that is to be.
#[derive(Debug)]
struct Load {
    name: String,
    path: PathBuf,
    /// Whose wish it is; none where requests ask for it. They are not in the journal: it would be full of them.
    actor: Option<String>,
    asked: Micros,
}

#[derive(Debug)]
enum State {
    Loading {
        reports: watch::Receiver<LoadReport>,
        /// Nobody wants it any more.
        stop: Arc<AtomicBool>,
    },
    Ready(Served),
    Draining(Served),
    Unloaded,
    Failed(String),
}

/// What a model is served as.
#[derive(Clone, Debug)]
struct Served {
    variants: Vec<Arc<Variant>>,
    encoder: Option<(Arc<ports::Encoder>, wire::DeviceMemory)>,
    /// Where it cannot be served.
    unserved: Vec<wire::Unserved>,
}

/// What a model is that somebody unloads.
enum Leaving {
    Loading,
    Failed,
    Serving(Served),
}

/// A load that somebody may follow, and stop.
struct Followed<'a> {
    roster: &'a Parts,
    load: &'a Load,
    reports: &'a watch::Sender<LoadReport>,
    stop: &'a AtomicBool,
    /// What it has been given of the CPU's memory so far.
    taken: AtomicU64,
    /// Whether it needed what others have, and they went on having it.
    is_short: AtomicBool,
    /// Whether others would have had to go for it, and nobody asks for it any more.
    is_unwanted: AtomicBool,
}

/// The same for the thread that packs. Locks that requests take are not for a thread of the lowest priority, which may be put aside
/// while it has one: where it needs room, it asks the load's own thread and waits.
struct Packing<'a> {
    followed: &'a Followed<'a>,
    asks: mpsc::SyncSender<Ask>,
    answers: Mutex<mpsc::Receiver<anyhow::Result<u64>>>,
}

/// What that thread asks.
enum Ask {
    /// For so many bytes of the CPU.
    Room(u64),
    /// What models hold of a device that may go.
    Held(String),
    /// Whether one of them has gone.
    Give(String),
    /// Whether a KV pool on a device has shrunk to so many bytes.
    Shrink(String, u64),
    /// For threads that compute for models of embeddings.
    EncoderPool,
}

// === impl Roster ===

impl Roster {
    /// Knows what the start has loaded, and what it could not.
    pub(crate) fn new(parts: RosterParts, loaded: Vec<LoadedModel>, lost: Vec<LostModel>) -> Self {
        let mut entries = BTreeMap::new();
        for LoadedModel { name, path, source, variants, encoder, unserved } in loaded {
            let state = State::Ready(Served { variants, encoder, unserved });
            entries.insert(name.to_string(), Entry::new(source, path, state));
        }
        for (name, path) in &parts.config.on_demand {
            let known = Entry::new(ModelSource::OnDemand, Some(path.clone()), State::Unloaded);
            entries.insert(name.clone(), known);
        }
        for LostModel { name, path, error } in lost {
            tracing::error!("not served, though it was loaded before: {error}");
            let (model, text) = (name.clone(), path.display().to_string());
            parts.shared.metrics.models().failed.inc();
            parts.deploy.note("startup", Happened::ModelRefused { model, path: text, error: error.clone() });
            // One that the configuration has by now is served.
            let lost = Entry::new(ModelSource::Loaded, Some(path), State::Failed(error));
            entries.entry(name).or_insert(lost);
        }
        let parts = Parts {
            parts,
            entries: Mutex::new(entries),
            stored: Mutex::default(),
            turn: Mutex::default(),
            may_settle: AtomicBool::new(false),
            changes: watch::Sender::new(()),
            requests: AtomicU64::new(1),
        };
        parts.weigh();
        // One that was lost may have had others make room.
        parts.settle_pools();
        Self { parts: Arc::new(parts), loaders: Mutex::default() }
    }

    /// Starts the thread of a load whose place is taken.
    fn begin(
        &self,
        load: Load,
        (progress, stop): (watch::Sender<LoadReport>, Arc<AtomicBool>),
    ) -> Result<(), AdminError> {
        let (parts, name) = (Arc::clone(&self.parts), load.name.clone());
        let run = move || parts.run(&load, (&progress, &stop));
        let mut loaders = lock(&self.loaders);
        loaders.retain(|loader| !loader.is_finished());
        match std::thread::Builder::new().name(format!("load-{name}")).spawn(run) {
            Ok(thread) => loaders.push(thread),
            Err(error) => {
                let error = refused(AdminErrorKind::Internal, None, format!("no thread for the load: {error}"));
                self.parts.not_loaded(&name, error.message.clone(), true);
                return Err(error);
            }
        }
        Ok(())
    }

    fn no_device(&self, device: &str) -> AdminError {
        let names: Vec<String> = self.device_states().into_iter().map(|device| device.name).collect();
        let message = format!("there is no device `{device}` here; there are {}", names.join(", "));
        refused(AdminErrorKind::NotFound, None, message)
    }

    fn pools_refused(&self, device: &str, why: PoolRefusal) -> AdminError {
        let message = match why {
            PoolRefusal::NoDevice => return self.no_device(device),
            PoolRefusal::Down => format!("{device} serves no more; restart the host"),
            PoolRefusal::Fixed => {
                format!("KV pools on {device} keep their size; on the CPU it is engine.kv_mib, for the next start")
            }
            PoolRefusal::Failed => {
                format!("not all that is on {device} could be changed; `pointsman device list` and the log say more")
            }
        };
        refused(AdminErrorKind::Conflict, None, message)
    }

    /// Ends loads that are under way, and waits for them, but not for one that waits for a disk or a GPU.
    pub(crate) fn stop(&self) {
        for entry in lock(&self.parts.entries).values() {
            if let State::Loading { stop, .. } = &entry.state {
                stop.store(true, Ordering::Release);
            }
        }
        let loaders = std::mem::take(&mut *lock(&self.loaders));
        for _ in 0..STOP_LOOKS {
            if loaders.iter().all(JoinHandle::is_finished) {
                return;
            }
            std::thread::park_timeout(LOOK);
        }
        tracing::warn!("a load is still under way; it ends with the process");
    }
}

impl ModelAdmin for Roster {
    fn devices(&self) -> Vec<wire::Device> {
        self.parts.parts.engine.report()
    }

    fn clear_prefix_caches(&self, device: &str, actor: &str) -> Result<Vec<wire::ClearedReplica>, AdminError> {
        let cleared = self.parts.parts.engine.clear_caches(device).map_err(|why| self.pools_refused(device, why))?;
        let blocks: u64 = cleared.iter().map(|replica| u64::from(replica.kv_blocks)).sum();
        tracing::info!(%actor, device, blocks, "prefix caches were cleared");
        Ok(cleared)
    }

    fn bound_kv_pools(&self, device: &str, bytes: Option<u64>, actor: &str) -> Result<wire::Device, AdminError> {
        let engine = &self.parts.parts.engine;
        let turn = self.parts.try_turn().ok_or_else(|| {
            let message =
                "a model is being loaded, and divides the memory; try again after it (`pointsman model list`)";
            refused(AdminErrorKind::Busy, None, message.to_owned())
        })?;
        let bounded = engine.bound_pools(device, bytes);
        drop(turn);
        self.parts.settle_if_wanted();
        bounded.map_err(|why| self.pools_refused(device, why))?;
        tracing::info!(%actor, device, bytes, "KV pools were bounded");
        let report = engine.report().into_iter().find(|report| report.name == device);
        report.ok_or_else(|| self.no_device(device))
    }

    fn device_states(&self) -> Vec<DeviceState> {
        self.parts.parts.engine.states()
    }

    fn models(&self) -> Vec<wire::Model> {
        let entries = lock(&self.parts.entries);
        entries.iter().map(|(name, entry)| self.parts.view(name, entry)).collect()
    }

    fn load(&self, load: wire::LoadModel, actor: &str) -> Result<watch::Receiver<LoadReport>, AdminError> {
        let (progress, reports) = watch::channel(LoadReport::Progress(beginning()));
        let stop = Arc::<AtomicBool>::default();
        let path = self.parts.enter(&load, (&reports, &stop))?;
        let asked = self.parts.parts.shared.clock.micros();
        let load = Load { name: load.name, path, actor: Some(actor.to_owned()), asked };
        self.begin(load, (progress, stop))?;
        Ok(reports)
    }

    fn unload(&self, name: &str, grace_ms: u64, actor: &str) -> Result<wire::Unloaded, AdminError> {
        self.parts.unload(name, grace_ms, actor)
    }

    fn want(&self, name: &str, is_first: bool) -> Want {
        self.demand(name, is_first)
    }

    fn loading(&self, name: &str) -> Option<watch::Receiver<LoadReport>> {
        match &lock(&self.parts.entries).get(name)?.state {
            State::Loading { reports, .. } => Some(reports.clone()),
            _ => None,
        }
    }

    fn hold(&self, name: &str) -> Option<Lease> {
        self.keep(name)
    }

    fn state(&self, name: &str) -> Option<ModelState> {
        lock(&self.parts.entries).get(name).map(|entry| entry.state.shown())
    }
}

// === loads ===

impl Parts {
    /// Takes a place among the models for one that is to be loaded; its path as it is on the disk.
    fn enter(
        &self,
        load: &wire::LoadModel,
        (reports, stop): (&watch::Receiver<LoadReport>, &Arc<AtomicBool>),
    ) -> Result<PathBuf, AdminError> {
        let wire::LoadModel { name, path } = load;
        self.parts.deploy.check_changeable(None)?;
        let invalid = |param, error: anyhow::Error| refused(AdminErrorKind::Invalid, Some(param), format!("{error:#}"));
        check_spelling(name).map_err(|error| invalid("name", error))?;
        let path = allowed(&self.parts.config, Path::new(path)).map_err(|error| invalid("path", error))?;
        let mut entries = lock(&self.entries);
        let most = self.parts.config.engine.max_loaded as usize;
        let n_loaded = entries.values().filter(|entry| entry.source == ModelSource::Loaded).count();
        let conflict = |message: String| Err(refused(AdminErrorKind::Conflict, Some("name"), message));
        if let Some((busy, _)) = entries.iter().find(|(_, entry)| entry.is_being_loaded()) {
            let message = format!("`{busy}` is being loaded, and one model is loaded at a time; try again after it");
            return Err(refused(AdminErrorKind::Busy, None, message));
        }
        let state = State::Loading { reports: reports.clone(), stop: Arc::clone(stop) };
        if let Some(entry) = entries.get_mut(name).filter(|entry| entry.is_known_as(&path)) {
            entry.state = state;
            return Ok(path);
        }
        if entries.contains_key(name) {
            return conflict(format!("there is a model `{name}` already; choose another name, or unload that first"));
        }
        let catalog = self.parts.engine.catalog();
        let alias = name.split(':').next().unwrap_or(name);
        if self.parts.config.on_demand.contains_key(alias) {
            return conflict(format!(
                "`{alias}` is loaded on demand: it comes and goes, and no variant can join it; name `{alias}` in [models], or \
                 `{name}` in [on_demand] too"
            ));
        }
        if alias != name && catalog.variants.iter().all(|variant| *variant.alias != *alias) {
            return conflict(format!(
                "there is no model `{alias}` of which `{name}` could be a variant; load that first"
            ));
        }
        if catalog.variants.iter().any(|variant| *variant.id == **name || (alias == name && *variant.alias == *alias)) {
            return conflict(format!("`{name}` is served already, as a variant; choose another name"));
        }
        if n_loaded >= most {
            return conflict(format!(
                "{n_loaded} models are loaded, the most at once; unload one, or raise engine.max_loaded ({most})"
            ));
        }
        entries.insert(name.clone(), Entry::new(ModelSource::Loaded, Some(path.clone()), state));
        Ok(path)
    }

    /// The thread of a load.
    fn run(&self, load: &Load, (reports, stop): (&watch::Sender<LoadReport>, &AtomicBool)) {
        let Load { name, path, actor, .. } = load;
        let followed = Followed {
            roster: self,
            load,
            reports,
            stop,
            taken: AtomicU64::new(0),
            is_short: AtomicBool::new(false),
            is_unwanted: AtomicBool::new(false),
        };
        let brought = {
            let _turn = lock(&self.turn);
            std::panic::catch_unwind(AssertUnwindSafe(|| self.bring(load, &followed)))
        };
        // What was left over, or all that pools gave up for one that did not come.
        self.settle_pools();
        let brought = brought.unwrap_or_else(|_| {
            let message = "the load ended in a panic; this is a bug of the host".to_owned();
            Err(refused(AdminErrorKind::Internal, None, message))
        });
        let report = match brought {
            Ok(loaded) => {
                self.parts.shared.metrics.models().loaded.inc();
                LoadReport::Ready(Box::new(loaded))
            }
            Err(error) if followed.is_unwanted.load(Ordering::Relaxed) => {
                self.gone(name);
                LoadReport::Failed(error)
            }
            Err(error) => {
                tracing::warn!("`{name}` was not loaded: {error}");
                self.parts.shared.metrics.models().failed.inc();
                give_back_freed();
                let may_change = followed.is_short.into_inner() || stop.load(Ordering::Acquire);
                self.not_loaded(name, for_clients(&error.message, (name, path)), may_change);
                if let Some(actor) = actor {
                    let (model, path) = (name.clone(), path.display().to_string());
                    let error = error.message.clone();
                    self.parts.deploy.note(actor, Happened::ModelRefused { model, path, error });
                }
                LoadReport::Failed(error)
            }
        };
        // Nobody may follow it any more.
        reports.send_replace(report);
    }

    /// A load has failed: its name is free, and one that is loaded on demand may be tried again after a while.
    fn not_loaded(&self, name: &str, why: String, may_change: bool) {
        let now = self.parts.shared.clock.micros();
        let mut entries = lock(&self.entries);
        match entries.get_mut(name) {
            Some(entry) if entry.source == ModelSource::OnDemand => {
                entry.demand.backoff.failed(now, may_change);
                entry.state = State::Failed(why);
            }
            _ => drop(entries.remove(name)),
        }
        self.changes.send_replace(());
    }

    /// A model is there no more; one that is loaded on demand stays known.
    fn gone(&self, name: &str) {
        let mut entries = lock(&self.entries);
        let state = match entries.get_mut(name) {
            Some(entry) if entry.source == ModelSource::OnDemand => Some(entry.unloaded()),
            _ => entries.remove(name).map(|entry| entry.state),
        };
        self.changes.send_replace(());
        drop(entries);
        // Its tokenizer may go with it, which takes a while.
        drop(state);
        self.weigh();
    }

    /// Nobody's who divides memory now.
    fn try_turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Gives KV pools the sizes that they are to have, now or when whoever divides memory is done.
    fn settle_pools(&self) {
        self.may_settle.store(true, Ordering::SeqCst);
        self.settle_if_wanted();
    }

    fn settle_if_wanted(&self) {
        // Looked at again when the turn is given back: who found it taken has left the wish behind.
        while self.may_settle.load(Ordering::SeqCst) {
            let Some(_turn) = self.try_turn() else { return };
            if self.may_settle.swap(false, Ordering::SeqCst) {
                self.parts.engine.settle_pools();
            }
        }
    }

    /// Says what models take.
    fn weigh(&self) {
        let bytes = self.parts.engine.held(|_| true);
        self.parts.shared.metrics.models().bytes.set(bytes.cast_signed());
    }

    /// Gives up models while there would be more than may be loaded at once, this one included.
    fn make_place(&self, name: &str, followed: &Followed<'_>) -> Result<(), AdminError> {
        let most = self.parts.config.engine.max_loaded as usize;
        let is_other = |(other, entry): &(&String, &Entry)| *other != name && entry.takes_a_place();
        while lock(&self.entries).iter().filter(is_other).count() >= most {
            if !followed.make_room(None) {
                let message = format!(
                    "{most} models are loaded, the most at once, and none of them is idle that requests have loaded; unload one, or \
                     raise engine.max_loaded"
                );
                return Err(refused(AdminErrorKind::Conflict, None, message));
            }
        }
        Ok(())
    }

    /// Loads a model and serves it.
    fn bring(&self, load: &Load, followed: &Followed<'_>) -> Result<wire::Model, AdminError> {
        let Load { name, path, actor, .. } = load;
        let RosterParts { config, shared, deploy, engine, pool, encoder_pool, code, .. } = &self.parts;
        followed.check_stop().map_err(|error| refused(AdminErrorKind::Conflict, None, error.to_string()))?;
        self.make_place(name, followed)?;
        let places = engine.places();
        let terms = LoadTerms {
            places: &places,
            code,
            created: shared.clock.unix_seconds(),
            started: shared.clock.micros(),
            clock: &shared.clock,
            pool,
            encoder_pool,
        };
        let known = engine.catalog();
        let loader = Loader::new(config, &shared.names, terms).drafted_by(&self.parts.draft_sources);
        let ((asks, asked), (answer, answers)) = (mpsc::sync_channel(1), mpsc::sync_channel(1));
        let packing = Packing { followed, asks, answers: Mutex::new(answers) };
        let pack = move || {
            if let Err(error) = lowest_priority().or_else(|_| rustix::process::nice(LOWEST).map(drop)) {
                tracing::warn!("the load of `{name}` competes with those that serve: {error}");
            }
            loader.load_one((name, path), &known.variants, &packing)
        };
        // Threads begin with the priority of those that start them: the policies' must not come from this one.
        let loaded = std::thread::scope(move |scope| {
            let thread = std::thread::Builder::new().name(format!("pack-{name}")).spawn_scoped(scope, pack)?;
            // Until it has no more to ask.
            asked.into_iter().map(|ask| followed.answer(&ask)).try_for_each(|found| answer.send(found)).ok();
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let loaded = loaded.map_err(|error| refused(AdminErrorKind::Refused, None, format!("{error:#}")))?;
        let encoder = loaded.encoders.first().map(|encoder| (Arc::clone(&encoder.model), encoder.memory));
        let unserved = loaded.models.iter().flat_map(|model| model.unserved.clone()).collect();
        let (served, bytes) = (Served { variants: loaded.variants.clone(), encoder, unserved }, loaded.bytes());
        followed.report(LoadStage::Starting, (0, 0));
        let joined = engine.join(shared, deploy, loaded);
        let joined = joined.map_err(|error| refused(AdminErrorKind::Internal, None, format!("{error:#}")))?;
        let variants = served.ids();
        let path = path.display().to_string();
        let loaded = self.settle(StoredModel { name: name.clone(), path: path.clone() }, (joined, served), followed)?;
        match actor {
            Some(actor) => deploy.note(actor, Happened::ModelLoaded { model: name.clone(), path, variants, bytes }),
            None => tracing::info!("`{name}` was loaded for a request: {bytes} bytes"),
        }
        Ok(loaded)
    }

    /// Stores that a model is there and lets requests find it. Whoever stops its load does so before or not at all.
    fn settle(
        &self,
        stored: StoredModel,
        (joined, served): (Joined, Served),
        followed: &Followed<'_>,
    ) -> Result<wire::Model, AdminError> {
        let RosterParts { shared, store, engine, .. } = &self.parts;
        let _one = lock(&self.stored);
        let name = stored.name.clone();
        let is_known = self.parts.config.on_demand.contains_key(&name);
        let kept = if let Err(error) = followed.check_stop() {
            Err(refused(AdminErrorKind::Conflict, None, error.to_string()))
        } else if is_known {
            // The next start brings it when somebody asks for it.
            Ok(())
        } else {
            store.models().and_then(|models| store.write_models(&models.with(stored))).map_err(|error| {
                let message = format!("not loaded: the list of models cannot be stored ({error})");
                refused(AdminErrorKind::Internal, None, message)
            })
        };
        if let Err(error) = kept {
            engine.part(joined, shared);
            return Err(error);
        }
        engine.publish(&joined);
        let mut entries = lock(&self.entries);
        // Its place is kept while it is loading.
        let Some(entry) = entries.get_mut(&name) else {
            return Err(refused(
                AdminErrorKind::Internal,
                None,
                "its place was lost; this is a bug of the host".into(),
            ));
        };
        entry.state = State::Ready(served);
        entry.demand.backoff = Backoff::default();
        self.changes.send_replace(());
        let view = self.view(&name, entry);
        drop(entries);
        self.weigh();
        Ok(view)
    }
}

// === unloads ===

impl Parts {
    fn unload(&self, name: &str, grace_ms: u64, actor: &str) -> Result<wire::Unloaded, AdminError> {
        let RosterParts { shared, deploy, .. } = &self.parts;
        deploy.check_changeable(None)?;
        let Some(served) = self.close(name)? else {
            return Ok(wire::Unloaded {
                name: name.to_owned(),
                variants: Vec::new(),
                ended: 0,
                waited_ms: 0,
                bytes: 0,
            });
        };
        let began = shared.clock.micros();
        let Left { ended, bytes } = self.clear(&served, (grace_ms.saturating_mul(1_000), false));
        let ids = served.ids();
        // Its tokenizer goes with the last of these.
        self.gone(name);
        drop(served);
        give_back_freed();
        deploy.note(actor, Happened::ModelUnloaded { model: name.to_owned(), ended, bytes });
        self.settle_pools();
        Ok(wire::Unloaded {
            name: name.to_owned(),
            variants: ids,
            ended,
            waited_ms: shared.clock.micros().saturating_sub(began) / 1_000,
            bytes,
        })
    }

    /// Takes a model out of the stored list and of the catalog; what it was served as, unless that was nothing.
    fn close(&self, name: &str) -> Result<Option<Served>, AdminError> {
        // Before the entries, as loads do; and no rollout begins between the look and the end of the model.
        let (_one, _held) = (lock(&self.stored), self.parts.aliases.hold());
        let served = match self.leave(name)? {
            Leaving::Serving(served) => served,
            Leaving::Loading => return Ok(None),
            Leaving::Failed => {
                self.forget(name)?;
                self.gone(name);
                return Ok(None);
            }
        };
        if let Err(error) = self.forget(name) {
            if let Some(entry) = lock(&self.entries).get_mut(name) {
                entry.state = State::Ready(served);
                self.changes.send_replace(());
            }
            return Err(error);
        }
        self.shut(&served);
        Ok(Some(served))
    }

    /// Takes a model out of the catalog.
    fn shut(&self, served: &Served) {
        let engine = &self.parts.engine;
        engine.close(&served.variants);
        served.encoder.iter().for_each(|(encoder, _)| engine.close_encoder(encoder));
    }

    /// Waits this long for what it still runs, ends the rest, and frees what it held; where it may return, its counters stay.
    fn clear(&self, served: &Served, (grace_us, may_return): (Micros, bool)) -> Left {
        let RosterParts { shared, engine, .. } = &self.parts;
        if let Some((encoder, _)) = &served.encoder {
            let left = engine.clear_encoder(encoder, grace_us);
            match may_return {
                true => shared.metrics.forget_gauges(&encoder.name, "cpu", 0, 0),
                false => shared.metrics.forget_replica(&encoder.name, "cpu", 0, 0),
            }
            return left;
        }
        let left = engine.clear(&served.variants, grace_us);
        engine.forget(&served.variants, may_return, shared);
        left
    }

    /// Marks a model as one that goes, if it may. The caller holds the weights of the aliases.
    fn leave(&self, name: &str) -> Result<Leaving, AdminError> {
        let mut entries = lock(&self.entries);
        let others = entries.values().filter(|entry| matches!(entry.state, State::Ready(_))).count();
        let known: Vec<String> = entries.keys().map(|name| format!("`{name}`")).collect();
        let Some(entry) = entries.get_mut(name) else {
            let message = format!("there is no model `{name}`; models are {}", known.join(", "));
            return Err(refused(AdminErrorKind::NotFound, None, message));
        };
        let conflict = |message: String| Err(refused(AdminErrorKind::Conflict, None, message));
        let served = match &entry.state {
            State::Loading { stop, .. } => {
                stop.store(true, Ordering::Release);
                return Ok(Leaving::Loading);
            }
            State::Draining(_) => return conflict(format!("`{name}` is being unloaded already")),
            State::Unloaded => return conflict(format!("`{name}` is not loaded; the next request for it does that")),
            State::Failed(_) => return Ok(Leaving::Failed),
            State::Ready(served) => served.clone(),
        };
        if let Some((model, _)) = self.parts.config.draft_models.iter().find(|(_, draft)| is_of(draft, name)) {
            return conflict(format!(
                "`{name}` drafts for `{model}`: it goes with the host; take it out of [draft_models] and restart"
            ));
        }
        if others == 1 && self.parts.config.on_demand.is_empty() {
            return conflict(format!("`{name}` is the only model; load another first"));
        }
        self.check_rollouts(&served.variants)?;
        entry.state = State::Draining(served.clone());
        Ok(Leaving::Serving(served))
    }

    /// Takes a model out of the stored list. The caller holds `stored`.
    fn forget(&self, name: &str) -> Result<(), AdminError> {
        let store = &self.parts.store;
        let stored = store.models().and_then(|models| match models.models.iter().any(|model| model.name == name) {
            true => store.write_models(&models.without(name)),
            false => Ok(()),
        });
        stored.map_err(|error| {
            let message = format!("`{name}` stays: the list of models cannot be stored ({error})");
            refused(AdminErrorKind::Internal, None, message)
        })
    }

    /// A rollout measures its two variants: neither goes meanwhile.
    fn check_rollouts(&self, variants: &[Arc<Variant>]) -> Result<(), AdminError> {
        for variant in variants {
            if let Some(rollout) = self.parts.aliases.weights(&variant.alias).rollout {
                let message = format!(
                    "the rollout {} of `{}` is under way; promote or abort it first",
                    rollout.id, variant.alias
                );
                return Err(refused(AdminErrorKind::Conflict, None, message));
            }
        }
        Ok(())
    }
}

// === what is there ===

impl Parts {
    fn view(&self, name: &str, entry: &Entry) -> wire::Model {
        let mut view = wire::Model {
            name: name.to_owned(),
            state: entry.state.shown(),
            source: entry.source,
            path: entry.path.as_ref().map(|path| path.display().to_string()),
            variants: Vec::new(),
            replicas: Vec::new(),
            progress: None,
            error: None,
            idle_ms: None,
            unserved: Vec::new(),
        };
        let served = match &entry.state {
            State::Loading { reports, .. } => {
                if let LoadReport::Progress(progress) = &*reports.borrow() {
                    view.progress = Some(progress.clone());
                }
                return view;
            }
            State::Failed(error) => {
                view.error = Some(error.clone());
                return view;
            }
            State::Unloaded => return view,
            State::Draining(served) | State::Ready(served) => served,
        };
        if let Some((encoder, memory)) = &served.encoder {
            view.variants = served.ids();
            let (name, device) = (encoder.replica.to_string(), "cpu".to_owned());
            view.replicas = vec![wire::ModelReplica { name, device, memory: *memory }];
            return view;
        }
        let (replicas, used) = self.parts.engine.replicas_of(&served.variants);
        view.variants = served.ids();
        view.unserved.clone_from(&served.unserved);
        view.replicas = replicas;
        view.idle_ms = used.map(|used| self.parts.shared.clock.micros().saturating_sub(used) / 1_000);
        view
    }
}

// === impl Served ===

impl Served {
    /// What it is called in answers and metrics.
    fn ids(&self) -> Vec<String> {
        let encoder = self.encoder.iter().map(|(encoder, _)| encoder.name.to_string());
        self.variants.iter().map(|variant| variant.id.to_string()).chain(encoder).collect()
    }
}

// === impl Entry ===

impl Entry {
    fn new(source: ModelSource, path: Option<PathBuf>, state: State) -> Self {
        Self { source, path, state, demand: Demand::default() }
    }

    /// Whether it is one that requests load, from there, and is not there now.
    fn is_known_as(&self, path: &Path) -> bool {
        let own = self.path.as_ref().and_then(|own| own.canonicalize().ok());
        let is_absent = matches!(self.state, State::Unloaded | State::Failed(_));
        self.source == ModelSource::OnDemand && is_absent && own.is_some_and(|own| own == path)
    }

    /// Whether somebody loads it by name; what requests load takes its turn with it.
    fn is_being_loaded(&self) -> bool {
        self.source == ModelSource::Loaded && matches!(self.state, State::Loading { .. })
    }

    /// Whether it counts against the most that may be loaded while the host runs.
    fn takes_a_place(&self) -> bool {
        match self.source {
            ModelSource::Embedded | ModelSource::Configured => false,
            ModelSource::Loaded => !matches!(self.state, State::Failed(_)),
            ModelSource::OnDemand => matches!(self.state, State::Ready(_) | State::Draining(_)),
        }
    }
}

impl State {
    fn shown(&self) -> ModelState {
        match self {
            Self::Loading { .. } => ModelState::Loading,
            Self::Ready(_) => ModelState::Ready,
            Self::Draining(_) => ModelState::Draining,
            Self::Unloaded => ModelState::Unloaded,
            Self::Failed(_) => ModelState::Failed,
        }
    }
}

// === impl Followed ===

impl Followed<'_> {
    fn report(&self, stage: LoadStage, bytes: (u64, u64)) {
        self.reports.send_if_modified(|last| {
            let LoadReport::Progress(last) = last else { return false };
            let bytes = if stage == LoadStage::Starting { (last.total_bytes, last.total_bytes) } else { bytes };
            let next = progress(stage, bytes);
            let is_news = (next.stage, next.percent) != (last.stage, last.percent);
            *last = next;
            is_news
        });
    }

    fn check_stop(&self) -> anyhow::Result<()> {
        if self.stop.load(Ordering::Acquire) {
            bail!("the load was stopped");
        }
        Ok(())
    }

    /// What may still be taken of the CPU's memory when so much has been given back, and by whose word; none where nobody says.
    fn room(&self, given: u64) -> (Option<u64>, &'static str) {
        let Parts { parts: RosterParts { config, engine, .. }, .. } = self.roster;
        if config.engine.memory_mib == 0 {
            return (available_memory().map(|free| free.saturating_add(given)), "the machine");
        }
        let taken = engine.held(|place| matches!(place, Place::Cpu(_))) + self.taken.load(Ordering::Relaxed);
        let bound = u64::from(config.engine.memory_mib) << 20;
        (Some(bound.saturating_sub(taken.saturating_sub(given))), "engine.memory_mib")
    }

    fn total(&self) -> u64 {
        match &*self.reports.borrow() {
            LoadReport::Progress(progress) => progress.total_bytes,
            LoadReport::Ready(_) | LoadReport::Failed(_) => 0,
        }
    }
}

impl Followed<'_> {
    fn answer(&self, ask: &Ask) -> anyhow::Result<u64> {
        match ask {
            Ask::Room(bytes) => self.take_room(*bytes).map(|()| *bytes),
            Ask::Held(device) => Ok(self.roster.could_give(device)),
            Ask::Give(device) => Ok(self.make_room(Some(device)).into()),
            Ask::Shrink(device, bytes) => Ok(self.roster.parts.engine.shrink_pools(device, *bytes).into()),
            Ask::EncoderPool => {
                let RosterParts { pool, encoder_pool, .. } = &self.roster.parts;
                encoder_pool.get(pool.n_threads()).map(|_| 0)
            }
        }
    }

    fn take_room(&self, bytes: u64) -> anyhow::Result<()> {
        loop {
            self.check_stop()?;
            let (room, what) = self.room(0);
            let Some(room) = room.filter(|room| bytes > *room) else { break };
            // For one that can never fit nobody goes.
            let most = self.room(self.roster.could_give("cpu")).0.unwrap_or(room);
            if bytes > most || !self.make_room(Some("cpu")) {
                bail!(
                    "it needs {} of the CPU's memory, weights and KV pool, and {what} leaves {}, or {} without what requests \
                     have loaded; unload a model, lower engine.kv_mib, or take a smaller precision (engine.precisions)",
                    Bytes(bytes),
                    Bytes(room),
                    Bytes(most)
                );
            }
        }
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Gives up a model that requests have loaded, one that holds something of this device where one is named. Where all are in use it waits for one, as long as a request would for this one;
    /// meanwhile the next to go takes no more requests, else one that is always in use would stay for ever.
    fn make_room(&self, device: Option<&str>) -> bool {
        let RosterParts { config, shared, .. } = &self.roster.parts;
        let end = self.load.asked.saturating_add(config.engine.load_wait_ms.saturating_mul(1_000));
        let has_gone = loop {
            if self.load.actor.is_none() && self.roster.is_unwanted(&self.load.name) {
                self.is_unwanted.store(true, Ordering::Relaxed);
                break false;
            }
            if self.roster.evict(device) {
                break true;
            }
            let has_some = self.roster.ask_back(device);
            if !has_some || shared.clock.micros() >= end || self.stop.load(Ordering::Acquire) {
                self.is_short.store(has_some, Ordering::Relaxed);
                break false;
            }
            std::thread::park_timeout(LOOK);
        };
        self.roster.ask_no_more();
        has_gone
    }
}

// === impl Packing ===

impl Packing<'_> {
    fn ask(&self, ask: Ask) -> anyhow::Result<u64> {
        let answers = lock(&self.answers);
        let over = "the load is over";
        self.asks.send(ask).map_err(|_| anyhow!(over))?;
        answers.recv().map_err(|_| anyhow!(over))?
    }
}

impl Follow for Packing<'_> {
    fn opened(&self, bytes: u64) {
        self.followed.report(LoadStage::Packing, (0, bytes));
    }

    fn packed(&self, bytes: u64) -> bool {
        let total = self.followed.total();
        self.followed.report(LoadStage::Packing, (bytes.min(total), total));
        !self.followed.stop.load(Ordering::Acquire)
    }

    fn check_room(&self, bytes: u64) -> anyhow::Result<()> {
        self.ask(Ask::Room(bytes)).map(drop)
    }

    fn could_give(&self, device: &str) -> u64 {
        self.ask(Ask::Held(device.to_owned())).unwrap_or(0)
    }

    fn make_room(&self, device: &str) -> bool {
        self.ask(Ask::Give(device.to_owned())).is_ok_and(|given| given > 0)
    }

    fn pool_shares(&self, device: &str) -> Vec<PoolShare> {
        let shares = self.followed.roster.parts.engine.pool_shares(device);
        shares.into_iter().map(|(_, share)| share).collect()
    }

    fn staying_pool_shares(&self, device: &str) -> Vec<PoolShare> {
        self.followed.roster.staying_pool_shares(device)
    }

    fn shrink_pools(&self, device: &str, bytes: u64) -> bool {
        self.ask(Ask::Shrink(device.to_owned(), bytes)).is_ok_and(|n| n > 0)
    }

    fn start_encoder_pool(&self) -> anyhow::Result<()> {
        self.ask(Ask::EncoderPool).map(drop)
    }
}

// === parts ===

/// Before the files are open.
fn beginning() -> wire::LoadProgress {
    progress(LoadStage::Reading, (0, 0))
}

/// Packing is nearly all of it.
fn progress(stage: LoadStage, (bytes, total_bytes): (u64, u64)) -> wire::LoadProgress {
    let percent = match stage {
        LoadStage::Reading => 0,
        LoadStage::Packing => (u128::from(bytes) * 98 / u128::from(total_bytes.max(1))) as u8 + 1,
        LoadStage::Starting => 99,
    };
    wire::LoadProgress { stage, bytes, total_bytes, percent: percent.min(99) }
}

/// Why a load has failed, without where its files are: that is nobody's business who sends requests.
fn for_clients(message: &str, (name, path): (&str, &Path)) -> String {
    let why = message.strip_prefix(&format!("{}: ", of(name, path))).unwrap_or(message);
    why.replace(&path.display().to_string(), "its path")
}

/// Whether a draft model's name is that of this model, or of a variant of it.
fn is_of(draft: &str, name: &str) -> bool {
    draft == name || draft.split(':').next() == Some(name)
}

fn refused(kind: AdminErrorKind, param: Option<&str>, message: String) -> AdminError {
    AdminError { kind, message, param: param.map(str::to_owned) }
}
