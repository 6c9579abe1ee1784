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

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::bail;
use pointsman_control::{Happened, LoadedModel as StoredModel};
use pointsman_engine::cuda::{Bytes, CodeOptions};
use pointsman_engine::{ComputePool, give_back_freed};
use pointsman_server::admin::wire::{self, LoadStage, ModelSource, ModelState};
use pointsman_server::ports::{
    self, AdminError, AdminErrorKind, AliasPort, Clock as _, EnginePort, LoadReport, ModelAdmin, Variant,
};
use tokio::sync::watch;

use crate::aliases::Aliases;
use crate::config::Config;
use crate::deploy::{Deploy, lock};
use crate::doctor::available_memory;
use crate::engine::{Engine, Joined, Left};
use crate::models::{Follow, LoadTerms, LoadedModel, Loader, LostModel, allowed, check_spelling};
use crate::serve::Shared;
use crate::store::Store;

/// Lowest priority of a thread.
const LOWEST: i32 = 19;

/// How often, and after what time each, the end of the host looks whether a load has ended.
const STOP_LOOKS: u32 = 200;
const STOP_LOOK: Duration = Duration::from_millis(10);

/// Every model by name.
#[derive(Debug)]
pub(crate) struct Roster {
    parts: Arc<Parts>,
    /// The load under way, or the last one.
    loader: Mutex<Option<JoinHandle<()>>>,
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
    /// Where code for a GPU comes from.
    pub code: CodeOptions,
}

#[derive(Debug)]
struct Parts {
    parts: RosterParts,
    entries: Mutex<BTreeMap<String, Entry>>,
    /// Held while the stored list changes.
    stored: Mutex<()>,
}

#[derive(Debug)]
struct Entry {
    source: ModelSource,
    path: Option<PathBuf>,
    state: State,
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
    Failed(String),
}

/// What a model is served as.
#[derive(Clone, Debug)]
struct Served {
    variants: Vec<Arc<Variant>>,
    encoder: Option<(Arc<ports::Encoder>, wire::DeviceMemory)>,
}

/// A load that somebody may follow, and stop.
struct Followed<'a> {
    parts: &'a RosterParts,
    reports: &'a watch::Sender<LoadReport>,
    stop: &'a AtomicBool,
    /// What it has been given of the CPU's memory so far.
    taken: AtomicU64,
}

// === impl Roster ===

impl Roster {
    /// Knows what the start has loaded, and what it could not.
    pub(crate) fn new(parts: RosterParts, loaded: Vec<LoadedModel>, lost: Vec<LostModel>) -> Self {
        let mut entries = BTreeMap::new();
        for LoadedModel { name, path, source, variants, encoder } in loaded {
            let state = State::Ready(Served { variants, encoder });
            entries.insert(name.to_string(), Entry { source, path, state });
        }
        for LostModel { name, path, error } in lost {
            tracing::error!("not served, though it was loaded before: {error}");
            let (model, text) = (name.clone(), path.display().to_string());
            parts.deploy.note("startup", Happened::ModelRefused { model, path: text, error: error.clone() });
            // One that the configuration has by now is served.
            let lost = Entry { source: ModelSource::Loaded, path: Some(path), state: State::Failed(error) };
            entries.entry(name).or_insert(lost);
        }
        let parts = Parts { parts, entries: Mutex::new(entries), stored: Mutex::default() };
        Self { parts: Arc::new(parts), loader: Mutex::default() }
    }

    /// Ends a load that is under way, and waits for it, but not for one that waits for a disk or a GPU.
    pub(crate) fn stop(&self) {
        for entry in lock(&self.parts.entries).values() {
            if let State::Loading { stop, .. } = &entry.state {
                stop.store(true, Ordering::Release);
            }
        }
        let Some(loader) = lock(&self.loader).take() else { return };
        for _ in 0..STOP_LOOKS {
            if loader.is_finished() {
                return;
            }
            std::thread::park_timeout(STOP_LOOK);
        }
        tracing::warn!("a load is still under way; it ends with the process");
    }
}

impl ModelAdmin for Roster {
    fn devices(&self) -> Vec<wire::Device> {
        self.parts.parts.engine.report()
    }

    fn models(&self) -> Vec<wire::Model> {
        let entries = lock(&self.parts.entries);
        entries.iter().map(|(name, entry)| self.parts.view(name, entry)).collect()
    }

    fn load(&self, load: wire::LoadModel, actor: &str) -> Result<watch::Receiver<LoadReport>, AdminError> {
        let (progress, reports) = watch::channel(LoadReport::Progress(progress(LoadStage::Reading, (0, 0))));
        let stop = Arc::<AtomicBool>::default();
        let path = self.parts.enter(&load, (&reports, &stop))?;
        let (parts, name, actor) = (Arc::clone(&self.parts), load.name.clone(), actor.to_owned());
        let run = move || parts.run((&name, &path), &actor, (&progress, &stop));
        let thread = std::thread::Builder::new().name(format!("load-{}", load.name)).spawn(run).map_err(|error| {
            lock(&self.parts.entries).remove(&load.name);
            refused(AdminErrorKind::Internal, None, format!("no thread for the load: {error}"))
        })?;
        *lock(&self.loader) = Some(thread);
        Ok(reports)
    }

    fn unload(&self, name: &str, grace_ms: u64, actor: &str) -> Result<wire::Unloaded, AdminError> {
        self.parts.unload(name, grace_ms, actor)
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
        if let Some((busy, _)) = entries.iter().find(|(_, entry)| matches!(entry.state, State::Loading { .. })) {
            let message = format!("`{busy}` is being loaded, and one model is loaded at a time; try again after it");
            return Err(refused(AdminErrorKind::Busy, None, message));
        }
        if entries.contains_key(name) {
            return conflict(format!("there is a model `{name}` already; choose another name, or unload that first"));
        }
        let catalog = self.parts.engine.catalog();
        let alias = name.split(':').next().unwrap_or(name);
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
        let state = State::Loading { reports: reports.clone(), stop: Arc::clone(stop) };
        entries.insert(name.clone(), Entry { source: ModelSource::Loaded, path: Some(path.clone()), state });
        Ok(path)
    }

    /// The thread of a load.
    fn run(
        &self,
        (name, path): (&str, &Path),
        actor: &str,
        (reports, stop): (&watch::Sender<LoadReport>, &AtomicBool),
    ) {
        let brought = std::panic::catch_unwind(AssertUnwindSafe(|| {
            self.bring((name, path), actor, &Followed { parts: &self.parts, reports, stop, taken: AtomicU64::new(0) })
        }));
        let brought = brought.unwrap_or_else(|_| {
            let message = "the load ended in a panic; this is a bug of the host".to_owned();
            Err(refused(AdminErrorKind::Internal, None, message))
        });
        let (model, text) = (name.to_owned(), path.display().to_string());
        let report = match brought {
            Ok(loaded) => LoadReport::Ready(Box::new(loaded)),
            Err(error) => {
                tracing::warn!("`{name}` was not loaded: {error}");
                lock(&self.entries).remove(name);
                let why = error.message.clone();
                self.parts.deploy.note(actor, Happened::ModelRefused { model, path: text, error: why });
                give_back_freed();
                LoadReport::Failed(error)
            }
        };
        // Nobody may follow it any more.
        reports.send_replace(report);
    }

    /// Loads a model and serves it.
    fn bring(
        &self,
        (name, path): (&str, &Path),
        actor: &str,
        followed: &Followed<'_>,
    ) -> Result<wire::Model, AdminError> {
        let RosterParts { config, shared, deploy, engine, pool, code, .. } = &self.parts;
        let places = engine.places();
        let terms = LoadTerms {
            places: &places,
            code,
            created: shared.clock.unix_seconds(),
            started: shared.clock.micros(),
            clock: &shared.clock,
            pool,
        };
        let known = engine.catalog();
        let loader = Loader::new(config, &shared.names, terms);
        let pack = || {
            if let Err(error) = rustix::process::nice(LOWEST) {
                tracing::warn!("the load of `{name}` competes with those that serve: {error}");
            }
            loader.load_one((name, path), &known.variants, followed)
        };
        // Threads begin with the priority of those that start them: the policies' must not come from this one.
        let loaded = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name(format!("pack-{name}")).spawn_scoped(scope, pack)?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let loaded = loaded.map_err(|error| refused(AdminErrorKind::Refused, None, format!("{error:#}")))?;
        let (served, bytes) = (served_as(&loaded.models), loaded.bytes());
        followed.report(LoadStage::Starting, (0, 0));
        let joined = engine.join(shared, deploy, loaded);
        let joined = joined.map_err(|error| refused(AdminErrorKind::Internal, None, format!("{error:#}")))?;
        let variants = served.variants.iter().map(|variant| variant.id.to_string()).collect();
        let text = path.display().to_string();
        let stored = StoredModel { name: name.to_owned(), path: text.clone() };
        let loaded = self.settle(stored, (joined, served), followed)?;
        deploy.note(actor, Happened::ModelLoaded { model: name.to_owned(), path: text, variants, bytes });
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
        let kept = if followed.stop.load(Ordering::Acquire) {
            Err(refused(AdminErrorKind::Conflict, None, "the load was stopped".to_owned()))
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
        Ok(self.view(&name, entry))
    }
}

fn served_as(models: &[LoadedModel]) -> Served {
    Served { variants: models.iter().flat_map(|model| model.variants.iter().cloned()).collect(), encoder: None }
}

// === unloads ===

impl Parts {
    fn unload(&self, name: &str, grace_ms: u64, actor: &str) -> Result<wire::Unloaded, AdminError> {
        let RosterParts { shared, engine, deploy, .. } = &self.parts;
        deploy.check_changeable(None)?;
        let Some(Served { variants, .. }) = self.close(name)? else {
            return Ok(wire::Unloaded {
                name: name.to_owned(),
                variants: Vec::new(),
                ended: 0,
                waited_ms: 0,
                bytes: 0,
            });
        };
        let began = shared.clock.micros();
        let Left { ended, bytes } = engine.clear(&variants, grace_ms.saturating_mul(1_000), shared);
        let ids = variants.iter().map(|variant| variant.id.to_string()).collect();
        // Its tokenizer goes with the last of these.
        lock(&self.entries).remove(name);
        drop(variants);
        give_back_freed();
        deploy.note(actor, Happened::ModelUnloaded { model: name.to_owned(), ended, bytes });
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
        // Before the entries, as loads do.
        let _one = lock(&self.stored);
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
                return Ok(None);
            }
            State::Draining(_) => return conflict(format!("`{name}` is being unloaded already")),
            State::Failed(_) => {
                self.forget(name)?;
                entries.remove(name);
                return Ok(None);
            }
            State::Ready(served) => served.clone(),
        };
        if served.encoder.is_some() {
            return conflict(format!(
                "`{name}` makes embeddings, and such models go with the host: restart without it"
            ));
        }
        if others == 1 {
            return conflict(format!("`{name}` is the only model; load another first"));
        }
        // No rollout begins between the look and the end of the model.
        let _held = self.parts.aliases.hold();
        self.check_rollouts(&served.variants)?;
        self.forget(name)?;
        entry.state = State::Draining(served.clone());
        self.parts.engine.close(&served.variants);
        Ok(Some(served))
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
            state: ModelState::Ready,
            source: entry.source,
            path: entry.path.as_ref().map(|path| path.display().to_string()),
            variants: Vec::new(),
            replicas: Vec::new(),
            progress: None,
            error: None,
            idle_ms: None,
        };
        let served = match &entry.state {
            State::Loading { reports, .. } => {
                view.state = ModelState::Loading;
                if let LoadReport::Progress(progress) = &*reports.borrow() {
                    view.progress = Some(progress.clone());
                }
                return view;
            }
            State::Failed(error) => {
                (view.state, view.error) = (ModelState::Failed, Some(error.clone()));
                return view;
            }
            State::Draining(served) => {
                view.state = ModelState::Draining;
                served
            }
            State::Ready(served) => served,
        };
        if let Some((encoder, memory)) = &served.encoder {
            view.variants = vec![encoder.name.to_string()];
            let (name, device) = (encoder.replica.to_string(), "cpu".to_owned());
            view.replicas = vec![wire::ModelReplica { name, device, memory: *memory }];
            return view;
        }
        let (replicas, used) = self.parts.engine.replicas_of(&served.variants);
        view.variants = served.variants.iter().map(|variant| variant.id.to_string()).collect();
        view.replicas = replicas;
        view.idle_ms = used.map(|used| self.parts.shared.clock.micros().saturating_sub(used) / 1_000);
        view
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

    fn total(&self) -> u64 {
        match &*self.reports.borrow() {
            LoadReport::Progress(progress) => progress.total_bytes,
            LoadReport::Ready(_) | LoadReport::Failed(_) => 0,
        }
    }
}

impl Follow for Followed<'_> {
    fn opened(&self, bytes: u64) {
        self.report(LoadStage::Packing, (0, bytes));
    }

    fn packed(&self, bytes: u64) -> bool {
        let total = self.total();
        self.report(LoadStage::Packing, (bytes.min(total), total));
        !self.stop.load(Ordering::Acquire)
    }

    fn check_room(&self, bytes: u64) -> anyhow::Result<()> {
        if self.stop.load(Ordering::Acquire) {
            bail!("the load was stopped");
        }
        let (room, what) = room(&self.parts.config, || {
            let devices = self.parts.engine.report();
            let cpu = devices.iter().find(|device| device.name == "cpu").map(|device| device.memory);
            let served = cpu.map_or(0, |memory| memory.weights + memory.kv + memory.workspace);
            served + self.taken.load(Ordering::Relaxed)
        });
        if room.is_some_and(|room| bytes > room) {
            bail!(
                "it needs {} of the CPU's memory, weights and KV pool, and {what} leaves {}; unload a model, lower \
                 engine.kv_mib, or take a smaller precision (engine.precisions)",
                Bytes(bytes),
                Bytes(room.unwrap_or(0))
            );
        }
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

// === bounds ===

/// What may still be taken of the CPU's memory, and by whose word; none where nobody says.
fn room(config: &Config, held: impl FnOnce() -> u64) -> (Option<u64>, &'static str) {
    match config.engine.memory_mib {
        0 => (available_memory(), "the machine"),
        mib => (Some((u64::from(mib) << 20).saturating_sub(held())), "engine.memory_mib"),
    }
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

fn refused(kind: AdminErrorKind, param: Option<&str>, message: String) -> AdminError {
    AdminError { kind, message, param: param.map(str::to_owned) }
}
