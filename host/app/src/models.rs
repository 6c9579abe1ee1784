//! Models on disk or in the binary become variants with a replica on every device that serves, at the start or while it serves.
//!
//! A model is a Hugging Face folder or one GGUF file. The embedded demo is served as the variants `demo:f16` and `demo:q8_0`
//! under the alias `demo`, the second quantised at load from the first; every other model in the configured precisions, a
//! variant each.

mod gguf;

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32};

use anyhow::{Context, bail};
use pointsman_control::{LoadedModel as StoredModel, ModelsDocument};
use pointsman_engine::cuda::{
    self, CodeOptions, CudaEngine, CudaError, CudaOptions, Device, DeviceError, DeviceRoom, Element, Form, FoundGpu,
    Gpu, KvWish, LibraryUse, PoolShare, VramError, VramFree,
};
use pointsman_engine::{
    ComputePool, CpuEngine, Encoder, EncoderSpec, EngineConfig, KvPlan, Model, ModelSpec, Precision, Weights,
};
use pointsman_sched::config::Config as SchedConfig;
use pointsman_sched::draft::model::DraftModel;
use pointsman_sched::execute::{ExecuteError, Executor};
use pointsman_sched::ids::{Micros, ReplicaId};
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::route::NO_LABEL;
use pointsman_server::admin::wire;
use pointsman_server::ports::{self, Replica, Variant};
use pointsman_server::text::{TextFiles, TextModel};
use pointsman_telemetry::{NameKind, Names};
use serde_json::Value;

use crate::clock::SystemClock;
use crate::config::{Config, Label, ReplicaSection};
use crate::devices::Place;
use crate::draft_models::{self, DraftSources};
use crate::encoders::{Encode, EncoderPool, NamedEncoder};
use crate::engine::PoolBounds;
use crate::null::NullExecutor;
use crate::upstreams;

/// One replica with its engine, before its driver takes it.
pub(crate) struct LoadedReplica {
    /// What the server sees.
    pub replica: Arc<Replica>,
    /// Its variant, as in `demo:f16`.
    pub variant: Arc<str>,
    /// Computes for it.
    pub executor: Box<dyn Executor>,
    /// What it computes, on the CPU.
    pub model: Option<Arc<Model>>,
    /// Drafts for it.
    pub draft_model: Option<DraftModel>,
    /// What it took of its device. Weights that several replicas share are counted with the first of them.
    pub memory: wire::DeviceMemory,
    /// Tokens that the model knows.
    pub vocabulary: u32,
    /// Bounds of its scheduler.
    pub sched: SchedConfig,
    /// Of the blocks there, those that its pool has memory for: fewer where it made room for a model that came after it.
    pub kv_blocks: u32,
    /// How large that pool may be.
    pub pool: PoolBounds,
}

/// A model for embeddings, before its driver takes it.
pub(crate) struct LoadedEncoder {
    /// What the server sees.
    pub model: Arc<ports::Encoder>,
    /// Computes for it.
    pub named: NamedEncoder,
    /// What it took.
    pub memory: wire::DeviceMemory,
}

/// A model of some name, as it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct LoadedModel {
    /// As in `llama`, or `llama:v2` for a variant of it.
    pub name: Arc<str>,
    /// Where its files are; none for one in the binary.
    pub path: Option<PathBuf>,
    /// How it came.
    pub source: wire::ModelSource,
    /// What it is served as; none for one of embeddings, ...
    pub variants: Vec<Arc<Variant>>,
    /// ... which has this, and what it took.
    pub encoder: Option<(Arc<ports::Encoder>, wire::DeviceMemory)>,
    /// Devices that serve and cannot serve it.
    pub unserved: Vec<wire::Unserved>,
}

/// One that was loaded in an earlier life of the host and cannot be now.
#[derive(Clone, Debug)]
pub(crate) struct LostModel {
    /// As above.
    pub name: String,
    /// As it was stored.
    pub path: PathBuf,
    /// What is wrong.
    pub error: String,
}

/// Everything that was loaded.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// What was asked for, in its order.
    pub models: Vec<LoadedModel>,
    /// What was not found as it was stored.
    pub lost: Vec<LostModel>,
    /// For the catalog.
    pub variants: Vec<Arc<Variant>>,
    /// For the drivers.
    pub replicas: Vec<LoadedReplica>,
    /// For the encoders' driver.
    pub encoders: Vec<LoadedEncoder>,
    /// Models for embeddings that upstreams have, for the catalog.
    pub elsewhere: Vec<Arc<ports::Encoder>>,
    /// Models that draft for others.
    pub draft_sources: Arc<DraftSources>,
}

impl std::fmt::Debug for LoadedEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadedEncoder").field("name", &self.model.name).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for LoadedReplica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadedReplica").field("replica", &self.replica.name).finish_non_exhaustive()
    }
}

/// The files of a model, wherever they come from.
struct ModelFiles<'a> {
    name: &'a str,
    path: Option<&'a Path>,
    source: wire::ModelSource,
    spec: ModelSpec,
    text: TextFiles<'a>,
    weights: &'a Weights,
    precisions: &'a [Precision],
    /// What the variant is called that keeps the weights as they are stored.
    stored: &'a str,
}

/// Whoever follows a load.
pub(crate) trait Follow {
    /// Its files are good, and hold this much for each time that they are packed, all in all.
    fn opened(&self, bytes: u64);

    /// So much of that is packed. The load ends where the answer is no.
    fn packed(&self, bytes: u64) -> bool;

    /// Whether there is room on the CPU for so many bytes more.
    ///
    /// # Errors
    /// There is not, with what to change.
    fn check_room(&self, bytes: u64) -> anyhow::Result<()>;

    /// What other models hold of a device that could be given up for this one.
    fn could_give(&self, device: &str) -> u64;

    /// Gives up one of those; whether there was one.
    fn make_room(&self, device: &str) -> bool;

    /// What KV pools on a device have that serve, and must keep.
    fn pool_shares(&self, device: &str) -> Vec<PoolShare>;

    /// The same of those that would stay when all had gone that [could](Self::could_give).
    fn staying_pool_shares(&self, device: &str) -> Vec<PoolShare>;

    /// Has those that are larger shrink to so many bytes; whether one has.
    fn shrink_pools(&self, device: &str, bytes: u64) -> bool;

    /// Has the threads for models of embeddings started by one whose priority they may have.
    ///
    /// # Errors
    /// The system refuses to start them.
    fn start_encoder_pool(&self) -> anyhow::Result<()>;
}

/// Where and when models are loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadTerms<'a> {
    /// The devices.
    pub places: &'a [Place],
    /// Where code for a GPU comes from.
    pub code: &'a CodeOptions,
    /// What `GET /v1/models` reports, in Unix seconds.
    pub created: u64,
    /// The same moment on the host's clock.
    pub started: Micros,
    pub clock: &'a Arc<SystemClock>,
    /// Threads of the CPU.
    pub pool: &'a ComputePool,
    /// Those for models of embeddings.
    pub encoder_pool: &'a EncoderPool,
}

/// Loads models one after the other.
pub(crate) struct Loader<'a> {
    config: &'a Config,
    names: &'a Names,
    terms: LoadTerms<'a>,
    /// Of those that were loaded before.
    known: &'a [Arc<Variant>],
    follower: Option<&'a (dyn Follow + Sync)>,
    /// Of what a follower was told of.
    n_packed: u64,
    /// Engines that each GPU has yet to hold: they share what it has free.
    to_come: u32,
    /// Devices that cannot serve the model at hand.
    unserved: Vec<wire::Unserved>,
    loaded: Loaded,
}

/// What a variant is made from.
#[derive(Clone, Copy)]
struct Source<'a> {
    id: &'a Arc<str>,
    spec: &'a ModelSpec,
    weights: &'a Weights,
    precision: Precision,
}

/// Where a model's files are, and how it came.
type From<'a> = (&'a Path, wire::ModelSource);

/// An engine and what it came to.
struct Made {
    executor: Box<dyn Executor>,
    /// On the CPU.
    model: Option<Arc<Model>>,
    memory: wire::DeviceMemory,
    n_blocks: usize,
}

/// What the embedded models are called.
pub(crate) const DEMO_NAMES: [&str; 2] = ["demo", "demo-mini"];

macro_rules! demo_file {
    ($path:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/", $path)).as_slice()
    };
}

// === impl Loaded ===

impl Loaded {
    /// What the replicas took, all devices together.
    pub(crate) fn bytes(&self) -> u64 {
        let encoders = self.encoders.iter().map(|encoder| encoder.memory.held());
        self.replicas.iter().map(|replica| replica.memory.held()).chain(encoders).sum()
    }

    /// How much there is of everything.
    fn marks(&self) -> [usize; 4] {
        [self.models.len(), self.variants.len(), self.replicas.len(), self.encoders.len()]
    }

    /// Drops what has come since.
    fn forget_after(&mut self, [models, variants, replicas, encoders]: [usize; 4]) {
        self.models.truncate(models);
        self.variants.truncate(variants);
        self.replicas.truncate(replicas);
        self.encoders.truncate(encoders);
    }
}

// === impl Loader ===

impl<'a> Loader<'a> {
    pub(crate) fn new(config: &'a Config, names: &'a Names, terms: LoadTerms<'a>) -> Self {
        // The demo is two variants and a second model.
        let models = config.models.len() * config.engine.precisions.len() + if config.engine.demo { 3 } else { 0 };
        let to_come = u32::try_from(models).unwrap_or(u32::MAX);
        Self {
            config,
            names,
            terms,
            known: &[],
            follower: None,
            n_packed: 0,
            to_come,
            unserved: Vec::new(),
            loaded: Loaded::default(),
        }
    }

    /// Loads the demo (if configured), every configured model, and those that were loaded while an earlier host ran.
    ///
    /// # Errors
    /// The first configured model that cannot be used, with what is wrong with which file. A stored one is left out.
    pub(crate) fn load_all(mut self, stored: &ModelsDocument) -> anyhow::Result<Loaded> {
        if self.config.engine.demo {
            self.load_demo().context("the embedded demo model")?;
        }
        let precisions = precisions(&self.config.engine.precisions)?;
        for (name, path) in &self.config.models {
            self.load_path(name, (path, wire::ModelSource::Configured), &precisions).with_context(|| of(name, path))?;
        }
        for StoredModel { name, path } in &stored.models {
            let path = PathBuf::from(path);
            if is_configured(self.config, (name, &path)) {
                continue;
            }
            let (before, to_come) = (self.loaded.marks(), self.to_come);
            self.to_come += n_variants(name, &precisions);
            let loaded = allowed(self.config, &path)
                .and_then(|path| self.load_path(name, (&path, wire::ModelSource::Loaded), &precisions))
                .and_then(|()| self.check_upstreams(before[1]));
            self.to_come = to_come;
            if let Err(error) = loaded.with_context(|| of(name, &path)) {
                self.loaded.forget_after(before);
                self.loaded.lost.push(LostModel { name: name.clone(), path, error: format!("{error:#}") });
            }
        }
        if self.loaded.variants.is_empty()
            && self.loaded.encoders.is_empty()
            && self.config.upstreams.is_empty()
            && self.config.on_demand.is_empty()
            && self.loaded.lost.is_empty()
        {
            bail!("no model to serve: set engine.demo = true or add one with --model NAME=PATH");
        }
        let replicas: Vec<String> = self.loaded.replicas.iter().map(|r| r.replica.name.to_string()).collect();
        let replicas: Vec<String> = replicas.into_iter().chain(upstreams::replicas(self.config)).collect();
        // On demand, or another time: where a device does not hold it today, or a start could not bring its model back.
        let may_come = |name: &str| {
            let mut ids = [name.split('@').next(), name.split(':').next()].into_iter().flatten();
            let Loaded { models, lost, .. } = &self.loaded;
            let mut unserved = models.iter().flat_map(|model| &model.unserved);
            unserved.any(|one| name == format!("{}@{}", one.variant, one.device))
                || ids.any(|id| self.config.on_demand.contains_key(id) || lost.iter().any(|model| model.name == id))
        };
        let mut named = self.config.replicas.keys();
        if let Some(unknown) = named.find(|name| !replicas.contains(name) && !may_come(name)) {
            bail!("replicas.\"{unknown}\" in the configuration names no replica; there are: {}", replicas.join(", "));
        }
        self.loaded.draft_sources = Arc::new(draft_models::sources(self.config, &self.loaded)?);
        self.attach_draft_models()?;
        Ok(self.loaded)
    }

    /// Loads one model beside those that are known.
    ///
    /// # Errors
    /// It cannot be used, there is no room for it, or the follower has said no.
    pub(crate) fn load_one(
        mut self,
        (name, path): (&str, &Path),
        known: &'a [Arc<Variant>],
        follower: &'a (dyn Follow + Sync),
    ) -> anyhow::Result<Loaded> {
        let precisions = precisions(&self.config.engine.precisions)?;
        (self.known, self.follower) = (known, Some(follower));
        self.to_come = n_variants(name, &precisions);
        self.load_path(name, (path, wire::ModelSource::Loaded), &precisions).with_context(|| of(name, path))?;
        self.attach_draft_models().with_context(|| of(name, path))?;
        Ok(self.loaded)
    }

    /// Has these draft for what it loads.
    pub(crate) fn drafted_by(mut self, sources: &Arc<DraftSources>) -> Self {
        self.loaded.draft_sources = Arc::clone(sources);
        self
    }

    fn attach_draft_models(&mut self) -> anyhow::Result<()> {
        let sources = Arc::clone(&self.loaded.draft_sources);
        let check_room = |bytes| self.follower.map_or(Ok(()), |follower| follower.check_room(bytes));
        draft_models::attach((self.config, self.terms.pool), &sources, &mut self.loaded, check_room)
    }

    fn load_demo(&mut self) -> anyhow::Result<()> {
        let eos = eos_token_ids(demo_file!("demo/config.json"));
        let text = TextFiles {
            tokenizer: demo_file!("tokenizer.json"),
            tokenizer_config: Some(demo_file!("tokenizer_config.json")),
            generation_config: Some(demo_file!("demo/generation_config.json")),
            eos_token_ids: &eos,
            ..TextFiles::default()
        };
        self.load(ModelFiles {
            name: DEMO_NAMES[0],
            path: None,
            source: wire::ModelSource::Embedded,
            spec: ModelSpec::from_config(demo_file!("demo/config.json"))?,
            text,
            weights: &Weights::from_bytes(demo_file!("demo/model.safetensors"))?,
            precisions: &[Precision::F16, Precision::Q8_0],
            stored: Precision::F16.name(),
        })?;
        self.load(ModelFiles {
            name: DEMO_NAMES[1],
            path: None,
            source: wire::ModelSource::Embedded,
            spec: ModelSpec::from_config(demo_file!("demo-mini/config.json"))?,
            text: TextFiles { generation_config: Some(demo_file!("demo-mini/generation_config.json")), ..text },
            weights: &Weights::from_bytes(demo_file!("demo-mini/model.safetensors"))?,
            precisions: &[Precision::F16],
            stored: Precision::F16.name(),
        })
    }

    fn load_path(&mut self, name: &str, from: From<'_>, precisions: &[Precision]) -> anyhow::Result<()> {
        check_spelling(name)?;
        let precisions = precisions_of(name, precisions);
        match from.0.is_dir() {
            true => self.load_folder(name, from, precisions),
            false => self.load_gguf(name, from, precisions),
        }
    }

    fn load_gguf(&mut self, name: &str, (path, source): From<'_>, precisions: &[Precision]) -> anyhow::Result<()> {
        if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("gguf")) {
            bail!("a model is a folder with config.json, safetensors and tokenizer.json, or a .gguf file");
        }
        let weights = Weights::open(path)?;
        let spec = ModelSpec::from_gguf(&weights)?;
        let vocabulary = gguf::vocabulary(&weights)?;
        let (generation, template) = (gguf::generation_config(&weights), gguf::chat_template(&weights));
        let text = TextFiles {
            vocabulary: Some(&vocabulary),
            generation_config: Some(generation.as_bytes()),
            chat_template: template.as_deref(),
            ..TextFiles::default()
        };
        let stored = weights.predominant();
        self.load(ModelFiles { name, path: Some(path), source, spec, text, weights: &weights, precisions, stored })
    }

    fn load_folder(&mut self, name: &str, (folder, source): From<'_>, precisions: &[Precision]) -> anyhow::Result<()> {
        let read = |file: &str| {
            let path = folder.join(file);
            if path.exists() && !path.is_file() {
                bail!("{file} is not a regular file");
            }
            std::fs::read(path).with_context(|| format!("cannot read {file}"))
        };
        let (config, tokenizer) = (read("config.json")?, read("tokenizer.json")?);
        let may_lack = |file: &str| if folder.join(file).exists() { read(file).map(Some) } else { Ok(None) };
        let tokenizer_config = may_lack("tokenizer_config.json")?;
        let generation_config = may_lack("generation_config.json")?;
        let chat_template = may_lack("chat_template.jinja")?.map(String::from_utf8).transpose();
        let chat_template = chat_template.context("chat_template.jinja is not UTF-8")?;
        let eos = eos_token_ids(&config);
        let text = TextFiles {
            tokenizer: &tokenizer,
            tokenizer_config: tokenizer_config.as_deref(),
            generation_config: generation_config.as_deref(),
            chat_template: chat_template.as_deref(),
            eos_token_ids: &eos,
            ..TextFiles::default()
        };
        if EncoderSpec::describes(&config) {
            return self.load_encoder(name, (folder, source), &text);
        }
        let (spec, weights) = (ModelSpec::from_config(&config)?, Weights::open(folder)?);
        let stored = Precision::F16.name();
        self.load(ModelFiles { name, path: Some(folder), source, spec, text, weights: &weights, precisions, stored })
    }

    /// A model for embeddings: on the CPU, whatever devices serve the others, with threads of its own.
    fn load_encoder(&mut self, name: &str, (folder, source): From<'_>, text: &TextFiles<'_>) -> anyhow::Result<()> {
        let joins = self.check_name(name, source)?.is_some();
        let variant = |other: &&String| other.split_once(':').is_some_and(|(alias, _)| alias == name);
        if let Some(other) = self.config.on_demand.keys().find(variant) {
            bail!("it makes embeddings, and such models have no variants: name `{other}` of [on_demand] otherwise");
        }
        if joins || name.contains(':') {
            bail!("it makes embeddings, and such models have no variants: leave the `:` out of its name");
        }
        let spec = EncoderSpec::open(folder)?;
        let text = Arc::new(TextModel::from_files(text)?);
        check_vocabulary(&text, spec.vocab)?;
        let (max_tokens, dimensions) = (u32::try_from(spec.max_tokens)?, u32::try_from(spec.hidden)?);
        let batch_tokens = self.config.sched.max_batch_tokens as usize;
        let weights = Weights::open(folder)?;
        if let Some(follower) = self.follower {
            follower.opened(weights.bytes());
            follower.check_room(weights.packed_bytes(Precision::F16) + workspace_bytes(&spec, batch_tokens))?;
            follower.start_encoder_pool()?;
        }
        let pool = self.terms.encoder_pool.get(self.terms.pool.n_threads())?;
        let encoder = Encoder::load(spec, &weights, pool, batch_tokens)?;
        if !self.packed(weights.bytes()) {
            bail!("the load was stopped");
        }
        let used = encoder.memory();
        let memory = wire::DeviceMemory {
            weights: used.weights as u64,
            workspace: used.workspace as u64,
            ..wire::DeviceMemory::default()
        };
        let name: Arc<str> = name.into();
        let model = Arc::new(ports::Encoder {
            replica: format!("{name}@cpu").into(),
            name: Arc::clone(&name),
            text,
            max_tokens,
            dimensions: Some(dimensions),
            created: self.terms.created,
            upstreams: Vec::new(),
        });
        self.loaded.models.push(LoadedModel {
            name: Arc::clone(&name),
            path: Some(folder.to_owned()),
            source,
            variants: Vec::new(),
            encoder: Some((Arc::clone(&model), memory)),
            unserved: Vec::new(),
        });
        let named = NamedEncoder { name, encoder: Box::new(encoder) };
        self.loaded.encoders.push(LoadedEncoder { model, named, memory });
        // No GPU has to hold it, in any precision.
        let precisions = u32::try_from(self.config.engine.precisions.len()).unwrap_or(u32::MAX);
        self.to_come = self.to_come.saturating_sub(precisions);
        Ok(())
    }

    /// No two models answer to one name; a variant has a model to join, whose texts are its own.
    fn check_name(&self, name: &str, source: wire::ModelSource) -> anyhow::Result<Option<&Arc<TextModel>>> {
        let Loaded { variants, encoders, .. } = &self.loaded;
        let mut all = self.known.iter().chain(variants);
        let is_taken = match name.split_once(':') {
            Some((alias, _)) => {
                let Some(joined) = all.clone().find(|v| *v.alias == *alias) else {
                    // What it joined has been unloaded since, or comes when it is asked for: it stands for the name alone.
                    let comes = self.follower.is_none() || self.config.on_demand.contains_key(name);
                    if source == wire::ModelSource::Loaded && comes {
                        return Ok(None);
                    }
                    bail!(
                        "there is no model `{alias}` of which it could be a variant; load that first, or leave the `:` out"
                    );
                };
                if all.all(|v| *v.id != *name) {
                    return Ok(Some(&joined.text));
                }
                true
            }
            None => {
                // Those that come by themselves may be there before it.
                let (mut own, others): (Vec<_>, Vec<_>) =
                    all.filter(|v| *v.alias == *name).partition(|v| self.config.on_demand.contains_key(&*v.id));
                let is_encoder = encoders.iter().any(|e| *e.model.name == *name);
                if !is_encoder
                    && others.is_empty()
                    && let Some(variant) = own.pop()
                {
                    return Ok(Some(&variant.text));
                }
                is_encoder || upstreams::makes_embeddings(self.config, name) || !others.is_empty()
            }
        };
        if is_taken {
            bail!("there is a model of this name already; choose another, or leave the demo out (engine.demo = false)");
        }
        Ok(None)
    }

    fn load(&mut self, files: ModelFiles<'_>) -> anyhow::Result<()> {
        let mut text = Arc::new(TextModel::from_files(&files.text)?);
        if let Some(shared) = self.check_name(files.name, files.source)? {
            if !shared.reads_as(&text) {
                bail!(
                    "its tokenizer, chat template or stop tokens are not those of the model that it is to be a variant of, or that \
                     is there as a variant of it: give it a name of its own"
                );
            }
            text = Arc::clone(shared);
        }
        let ModelFiles { name, path, source, spec, weights, stored, precisions, .. } = files;
        check_vocabulary(&text, spec.vocab)?;
        let ids = precisions.iter().map(|&precision| (precision, Arc::from(variant_name(name, precision, stored))));
        let ids: Vec<(Precision, Arc<str>)> = ids.collect();
        if let Some(follower) = self.follower {
            follower.opened(weights.bytes() * (ids.len() * self.terms.places.len()) as u64);
        }
        let first = self.loaded.variants.len();
        self.unserved.clear();
        let alias = name.split(':').next().unwrap_or(name);
        for (precision, id) in &ids {
            if self.loaded.variants.iter().any(|variant| variant.id == *id) {
                bail!("engine.precisions asks for {}, which is how the file has it; leave one out", precision.name());
            }
            if let Some(own) = self.known.iter().find(|variant| variant.id == *id) {
                bail!("`{}` is there already, loaded on demand by that name: give it another in [on_demand]", own.id);
            }
            self.add_variant(alias, Source { id, spec: &spec, weights, precision: *precision }, &text)?;
            self.to_come = self.to_come.saturating_sub(1);
        }
        let variants = self.loaded.variants[first..].to_vec();
        let (name, path, unserved) = (name.into(), path.map(Path::to_owned), std::mem::take(&mut self.unserved));
        self.loaded.models.push(LoadedModel { name, path, source, variants, encoder: None, unserved });
        Ok(())
    }

    /// Upstreams come after, and theirs are the names that the configuration gives them.
    fn check_upstreams(&self, first: usize) -> anyhow::Result<()> {
        let taken = |variant: &&Arc<Variant>| self.config.upstreams.values().any(|u| u.variant() == *variant.id);
        match self.loaded.variants[first..].iter().find(taken) {
            Some(variant) => bail!("`{}` is a variant of an upstream of the configuration by now", variant.id),
            None => Ok(()),
        }
    }

    /// Tells the follower of this much more of the file at hand.
    fn packed(&self, bytes: u64) -> bool {
        self.follower.is_none_or(|follower| follower.packed(self.n_packed + bytes))
    }

    /// A variant with one replica on every device that can serve it.
    fn add_variant(&mut self, alias: &str, source: Source<'_>, text: &Arc<TextModel>) -> anyhow::Result<()> {
        let section = &self.config.sched;
        let config = engine_config(self.config, source.spec);
        let context_tokens = u32::try_from(config.context_tokens).context("the model's context is too long")?;
        let (mut replicas, mut unfit) = (Vec::new(), None);
        for place in self.terms.places {
            self.check_number(source.id, place)?;
            let made = match self.make(source, config, (place, text)) {
                Err(error) if is_unfit(&error) => {
                    tracing::warn!("not served there: {error:#}");
                    let (device, variant) = (place.name(), source.id.to_string());
                    self.unserved.push(wire::Unserved { variant, device, error: format!("{:#}", error.root_cause()) });
                    unfit = Some(error);
                    continue;
                }
                made => made?,
            };
            let Some(made) = made else { continue };
            let sched = SchedConfig {
                block_tokens: section.block_tokens,
                n_blocks: u32::try_from(made.n_blocks).context("the KV pool is too large; lower engine.kv_mib")?,
                max_running: section.max_running,
                step_tokens: section.max_batch_tokens,
                max_waiting: section.max_waiting,
                prefill_chunk: section.prefill_chunk_tokens,
                starvation_us: section.starvation_ms * 1_000,
                context_tokens,
            };
            self.n_packed += source.weights.bytes();
            let scores_prompts = made.executor.scores_prompts();
            let replica = Replica { scores_prompts, ..self.replica(source.id, place, &sched) };
            let replica = Arc::new(replica);
            replicas.push(Arc::clone(&replica));
            let vocabulary = u32::try_from(source.spec.vocab).unwrap_or(u32::MAX);
            let (variant, Made { mut executor, model, memory, .. }) = (Arc::clone(source.id), made);
            let pool = PoolBounds::of(&mut *executor, &sched, memory.kv);
            self.loaded.replicas.push(LoadedReplica {
                replica,
                variant,
                executor,
                model,
                draft_model: None,
                memory,
                vocabulary,
                sched,
                kv_blocks: sched.n_blocks,
                pool,
            });
        }
        match unfit {
            Some(error) if replicas.is_empty() => return Err(error),
            None if self.terms.places.is_empty() => bail!("no device serves any more; restart the host"),
            // One precision may be for other devices alone.
            _ if replicas.is_empty() => return Ok(()),
            _ => {}
        }
        self.loaded.variants.push(Arc::new(Variant {
            id: Arc::clone(source.id),
            alias: alias.into(),
            text: Arc::clone(text),
            context_tokens,
            block_tokens: section.block_tokens,
            draft_model: self.config.draft_models.get(alias).map(|draft| draft.as_str().into()),
            created: self.terms.created,
            replicas,
        }));
        Ok(())
    }

    /// What computes a variant on a device; none where it is for other devices.
    fn make(
        &mut self,
        source: Source<'_>,
        config: EngineConfig,
        (place, text): (&Place, &Arc<TextModel>),
    ) -> anyhow::Result<Option<Made>> {
        let made = match place {
            // Beside a GPU it is one replica less; without one, the engine says what to do.
            Place::Cpu(_) if source.precision == Precision::Fp8 && self.terms.places.len() > 1 => {
                tracing::info!("{} is not served on the CPU, which does not compute with fp8 weights", source.id);
                return Ok(None);
            }
            Place::Cpu(_) => self.on_cpu(source, config)?,
            Place::Cuda(found) => self.on_gpu(source, config, found)?,
            Place::Null(step) => Made {
                executor: Box::new(NullExecutor::new(text, *step, Arc::clone(self.terms.clock))),
                model: None,
                memory: wire::DeviceMemory::default(),
                n_blocks: self.kv_plan(source.spec, config.block_tokens)?.n_blocks,
            },
        };
        Ok(Some(made))
    }

    /// Past the bound of the names a replica would share its number with others, and be taken for one of them.
    fn check_number(&self, variant: &str, place: &Place) -> anyhow::Result<()> {
        let name = format!("{variant}@{}", place.name());
        let number = self.names.intern(NameKind::Replica, &name);
        if *self.names.name(NameKind::Replica, number) != *name {
            bail!("{name} cannot have a number of its own: the host has had too many names of replicas; restart it");
        }
        Ok(())
    }

    fn on_cpu(&self, source: Source<'_>, config: EngineConfig) -> anyhow::Result<Made> {
        let kv = self.kv_plan(source.spec, config.block_tokens)?;
        if let Some(follower) = self.follower {
            let kv_bytes = (kv.n_blocks * kv.block_bytes) as u64;
            follower.check_room(source.weights.packed_bytes(source.precision) + kv_bytes)?;
        }
        let Source { spec, weights, precision, .. } = source;
        let model = Model::load_watched(spec.clone(), weights, precision, &mut |bytes| self.packed(bytes))?;
        let model = Arc::new(model);
        let config = EngineConfig { n_blocks: kv.n_blocks, ..config };
        let engine = CpuEngine::new(Arc::clone(&model), self.terms.pool.clone(), config)?;
        let used = engine.memory();
        let memory = wire::DeviceMemory {
            weights: used.weights as u64,
            kv: used.kv as u64,
            workspace: used.workspace as u64,
            ..wire::DeviceMemory::default()
        };
        Ok(Made { executor: Box::new(engine), model: Some(model), memory, n_blocks: kv.n_blocks })
    }

    fn kv_plan(&self, spec: &ModelSpec, block_tokens: usize) -> anyhow::Result<KvPlan> {
        let kv_bytes = (self.config.engine.kv_mib as usize) << 20;
        let kv = KvPlan::for_memory(spec, block_tokens, kv_bytes);
        if kv.n_blocks == 0 {
            bail!(
                "engine.kv_mib = {} does not hold one block of this model ({} bytes)",
                self.config.engine.kv_mib,
                kv.block_bytes
            );
        }
        Ok(kv)
    }

    /// Says how the memory will be divided, or what would fit, before anything is allocated.
    fn on_gpu(&mut self, source: Source<'_>, config: EngineConfig, found: &FoundGpu) -> anyhow::Result<Made> {
        let (precision, forms) = (source.precision, forms(source.weights, source.precision));
        let wish = match self.config.engine.gpu_kv_mib {
            0 => KvWish::Share(self.to_come),
            mib => KvWish::Bytes(u64::from(mib) << 20),
        };
        let name = format!("{}@cuda:{}", source.id, found.ordinal);
        // The library multiplies plain numbers alone.
        let cublaslt = self.terms.code.cublaslt && precision == Precision::F16;
        let code = CodeOptions { cublaslt, ..self.terms.code.clone() };
        let overlap = self.config.engine.overlap_launches;
        let mut gpu = Gpu::open(found.clone(), code, overlap).with_context(|| name.clone())?;
        let plan = loop {
            let room = gpu.room()?;
            let plan = |room| cuda::plan_memory(source.spec, &forms, config, room, wish);
            let error = match plan(room) {
                Ok(plan) => break plan,
                Err(error) => error,
            };
            if let CudaError::Vram(error) = &error
                && self.shrink_pools(found, error)
            {
                continue;
            }
            // Others go for one that fits without them, and for no other.
            let device = format!("cuda:{}", found.ordinal);
            let given = self.follower.map_or(0, |follower| follower.could_give(&device));
            let memory = VramFree { free: room.memory.free + given, ..room.memory };
            let fits = match plan(DeviceRoom { memory, ..room }) {
                Ok(_) => true,
                // Not without the pools of those that stay.
                Err(CudaError::Vram(error)) => error.share(&self.pool_shares(found, true)).is_some(),
                Err(_) => false,
            };
            if given == 0 || !fits {
                return Err(error).with_context(|| name.clone());
            }
            // It may fit later, so this is no device that cannot serve the model.
            if !self.follower.is_some_and(|follower| follower.make_room(&device)) {
                bail!("{name}: {error}");
            }
        };
        tracing::info!("{name}: {plan}");
        let config = EngineConfig { n_blocks: plan.n_blocks as usize, ..config };
        let options = CudaOptions { form: plan.footprint.form, graphs: true, library: LibraryUse::Faster };
        let (all, mut told) = (plan.bytes.weights.max(1), 0);
        let in_file = source.weights.bytes();
        let mut progress = |done: u64| {
            if done * 4 / all > told {
                told = done * 4 / all;
                tracing::info!("{name}: {} of {} loaded", cuda::Bytes(done), cuda::Bytes(all));
            }
            self.packed((u128::from(in_file) * u128::from(done) / u128::from(all)) as u64)
        };
        let model = (source.spec.clone(), cuda::Source::Files(source.weights));
        let mut engine =
            CudaEngine::load(Box::new(gpu), model, config, options, &mut progress).with_context(|| name.clone())?;
        engine.device().notes().iter().for_each(|note| tracing::warn!("{name}: {note}"));
        if overlap && !engine.device().overlaps() {
            tracing::warn!("{name}: launches do not overlap; docs/devices.md says what engine.overlap_launches needs");
        }
        engine.take_note().into_iter().for_each(|note| tracing::warn!("{name}: {note}"));
        if let Some(words) = cuda::GemmChoice::summary(engine.gemm_choices()) {
            tracing::info!("{name}: by cuBLASLt in long prompts: {words}");
        }
        let used = engine.memory();
        let memory = wire::DeviceMemory {
            weights: used.weights,
            kv: used.kv,
            workspace: used.workspace,
            graphs: Some(used.graphs),
            ..wire::DeviceMemory::default()
        };
        Ok(Made { executor: Box::new(engine), model: None, memory, n_blocks: config.n_blocks })
    }

    /// What the KV pools on a GPU have and must keep: those of this load and those that serve, or of these those that stay.
    fn pool_shares(&self, found: &FoundGpu, staying: bool) -> Vec<PoolShare> {
        let place = Place::Cuda(found.clone());
        let serving = |follower: &(dyn Follow + Sync)| match staying {
            true => follower.staying_pool_shares(&place.name()),
            false => follower.pool_shares(&place.name()),
        };
        let mut shares = self.follower.map(serving).unwrap_or_default();
        let own = self.loaded.replicas.iter().filter(|loaded| loaded.replica.device == u64::from(place.index()));
        shares.extend(own.map(|loaded| loaded.pool.share(loaded.memory.kv)));
        shares
    }

    /// Has the KV pools on a GPU shrink where one more model then fits beside them; whether one has.
    fn shrink_pools(&mut self, found: &FoundGpu, error: &VramError) -> bool {
        let Some(bytes) = error.share(&self.pool_shares(found, false)) else { return false };
        let place = Place::Cuda(found.clone());
        let (device, index) = (place.name(), u64::from(place.index()));
        tracing::info!(
            "KV pools on {device} shrink to {} each, or to one full context, for one more model",
            cuda::Bytes(bytes)
        );
        let mut has_shrunk = self.follower.is_some_and(|follower| follower.shrink_pools(&device, bytes));
        for loaded in self.loaded.replicas.iter_mut().filter(|loaded| loaded.replica.device == index) {
            let n_blocks = loaded.pool.blocks_in(bytes);
            if n_blocks < loaded.kv_blocks
                && let Ok(Some(sized)) = loaded.executor.resize_pool(n_blocks)
            {
                has_shrunk |= sized.n_blocks < loaded.kv_blocks;
                (loaded.kv_blocks, loaded.memory.kv) = (sized.n_blocks, sized.bytes);
            }
        }
        has_shrunk
    }

    fn replica(&self, variant: &Arc<str>, place: &Place, sched: &SchedConfig) -> Replica {
        let name: Arc<str> = format!("{variant}@{}", place.name()).into();
        let section = self.config.replicas.get(&*name);
        Replica {
            // The number under which events and telemetry hooks know the name.
            id: ReplicaId(self.names.intern(NameKind::Replica, &name)),
            key: stable_key(&name),
            name,
            device: place.index().into(),
            variant: self.names.intern(NameKind::Variant, variant).into(),
            weight: AtomicU32::new(section.map_or(ReplicaSection::default().weight, |s| s.weight)),
            health: AtomicU8::new(0),
            max_waiting: sched.max_waiting,
            started: self.terms.started,
            labels: labels(self.config, section),
            upstream: None,
            scores_prompts: false,
            gauges: Arc::<ReplicaGauges>::default(),
            sketch: Arc::new(PrefixSketch::new(sched.n_blocks)),
        }
    }
}

/// Types in which a GPU may compute a file's weights in some precision, the best first: 16 bits as they are; 32 bits where they fit,
/// else half of them, which is more than enough for what was in fewer bits.
fn forms(weights: &Weights, precision: Precision) -> Vec<Form> {
    let elements = match weights.stored() {
        Some(Element::F16) => &[Element::F16][..],
        Some(Element::F32) if precision == Precision::F16 => &[Element::F32, Element::Bf16],
        Some(Element::F32 | Element::Bf16) | None => &[Element::Bf16],
    };
    elements.iter().map(|&element| Form { element, precision }).collect()
}

/// The sizes of an engine, but for its pool.
fn engine_config(config: &Config, spec: &ModelSpec) -> EngineConfig {
    let section = &config.sched;
    let most = Some(config.engine.max_context as usize).filter(|most| *most > 0);
    EngineConfig {
        n_blocks: 0,
        block_tokens: section.block_tokens as usize,
        max_step_tokens: section.max_batch_tokens as usize,
        max_rows: section.max_running as usize,
        context_tokens: most.map_or(spec.context, |most| spec.context.min(most)),
    }
}

/// How the memory of a GPU would be divided for one model and no other, in each precision that is configured: in words, or what would
/// fit instead. None for a model that makes embeddings, which is on the CPU.
///
/// # Errors
/// The files cannot be read, or the device does not answer.
pub(crate) fn gpu_plans(
    config: &Config,
    (name, path): (&str, &Path),
    (found, code): (&FoundGpu, &CodeOptions),
) -> anyhow::Result<Vec<(String, Result<String, CudaError>)>> {
    let (spec, weights) = match path.is_dir() {
        true => {
            let text = std::fs::read(path.join("config.json")).context("cannot read config.json")?;
            if EncoderSpec::describes(&text) {
                return Ok(Vec::new());
            }
            (ModelSpec::from_config(&text)?, Weights::open(path)?)
        }
        false => {
            let weights = Weights::open(path)?;
            (ModelSpec::from_gguf(&weights)?, weights)
        }
    };
    let wish = match config.engine.gpu_kv_mib {
        0 => KvWish::Share(1),
        mib => KvWish::Bytes(u64::from(mib) << 20),
    };
    let mut gpu = Gpu::open(found.clone(), code.clone(), false)?;
    let room = gpu.room()?;
    // As they are stored without one of 8 bits, and as they are called.
    let stored = if path.is_dir() { Precision::F16.name() } else { weights.predominant() };
    let plan = |precision: Precision| {
        let plan = cuda::plan_memory(&spec, &forms(&weights, precision), engine_config(config, &spec), room, wish);
        (variant_name(name, precision, stored), plan.map(|plan| plan.to_string()))
    };
    Ok(precisions_of(name, &precisions(&config.engine.precisions)?).iter().copied().map(plan).collect())
}

/// Every label that some replica has, with what it is for one of them.
pub(crate) fn labels(config: &Config, section: Option<&ReplicaSection>) -> Arc<[(Arc<str>, u64)]> {
    let label = |label: String| {
        let value = section.and_then(|section| section.labels.get(&label));
        (label.into(), value.map_or(NO_LABEL, Label::number))
    };
    config.label_names().into_iter().map(label).collect()
}

/// Threads for the CPU's share of the models.
///
/// # Errors
/// The system refuses to start them.
pub(crate) fn compute_pool(config: &Config) -> anyhow::Result<ComputePool> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_threads = if config.engine.threads == 0 { cores } else { config.engine.threads };
    if !config.engine.pin_threads {
        return Ok(ComputePool::start(n_threads)?);
    }
    let pool = ComputePool::pinned(n_threads).context("engine.pin_threads")?;
    tracing::info!("compute threads are pinned to the cores {:?}", pool.pinned_to());
    Ok(pool)
}

/// A name that a model may have, or one of a variant behind a colon.
///
/// # Errors
/// It may not.
pub(crate) fn check_spelling(name: &str) -> anyhow::Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(good);
    let (model, variant) = name.split_once(':').map_or((name, None), |(model, variant)| (model, Some(variant)));
    if name.len() > 100 || !is_part(model) || !variant.is_none_or(is_part) {
        bail!(
            "a model's name has 1 to 100 letters, digits, `-`, `_`, `.` or `/`; a variant of it has its own behind a `:`"
        );
    }
    Ok(())
}

/// A path below a folder from which models may be loaded, or that of a model that the configuration names; as it is on the disk, so that no link
/// leads out.
///
/// # Errors
/// It is neither.
pub(crate) fn allowed(config: &Config, path: &Path) -> anyhow::Result<PathBuf> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        bail!("the path must be absolute, one on the host's machine, and without `..`");
    }
    let folders = &config.engine.model_dirs;
    let real = path.canonicalize().with_context(|| format!("cannot read {}", path.display()));
    let is_inside = |folder: &PathBuf, real: &Path| folder.canonicalize().is_ok_and(|folder| real.starts_with(folder));
    let named = || config.models.values().chain(config.on_demand.values());
    // Whether a path exists is nobody's business who may not read it.
    match real {
        Ok(real) if folders.iter().any(|folder| is_inside(folder, &real)) => Ok(real),
        Ok(real) if named().any(|model| model.canonicalize().is_ok_and(|model| model == real)) => Ok(real),
        Err(error) if folders.iter().any(|folder| path.starts_with(folder)) => Err(error),
        _ if folders.is_empty() => bail!(
            "models are loaded from the folders of engine.model_dirs alone, and there are none; name one and restart"
        ),
        _ => {
            let named: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
            bail!("{} is below none of engine.model_dirs ({})", path.display(), named.join(", "))
        }
    }
}

/// What the activations of an encoder's batch take, about.
fn workspace_bytes(spec: &EncoderSpec, batch_tokens: usize) -> u64 {
    let numbers = batch_tokens.max(spec.max_tokens) * (5 * spec.hidden + spec.ffn);
    (numbers * size_of::<f32>()) as u64
}

/// Those that a model of this name is served in: a variant of its own name is one, as its files have it.
fn precisions_of<'a>(name: &str, precisions: &'a [Precision]) -> &'a [Precision] {
    if name.contains(':') { &[Precision::F16] } else { precisions }
}

/// What a model's variant is called, whose weights as they are stored are called so.
fn variant_name(name: &str, precision: Precision, stored: &str) -> String {
    let suffix = if precision == Precision::F16 { stored } else { precision.name() };
    if name.contains(':') { name.to_owned() } else { format!("{name}:{suffix}") }
}

/// Variants that a model of this name comes to.
fn n_variants(name: &str, precisions: &[Precision]) -> u32 {
    if name.contains(':') { 1 } else { u32::try_from(precisions.len()).unwrap_or(u32::MAX) }
}

/// Which model an error is about.
pub(crate) fn of(name: &str, path: &Path) -> String {
    format!("model `{name}` in {}", path.display())
}

/// Whether the configuration has a stored model by now.
pub(crate) fn is_configured(config: &Config, (name, path): (&str, &Path)) -> bool {
    config.on_demand.contains_key(name)
        || config.models.get(name).is_some_and(|own| own.canonicalize().is_ok_and(|own| own == *path))
}

/// Each once.
fn precisions(names: &[String]) -> anyhow::Result<Vec<Precision>> {
    let mut found: Vec<Precision> = Vec::new();
    for name in names {
        let precision = name.parse().context("engine.precisions")?;
        if found.contains(&precision) {
            bail!("engine.precisions names {name} twice");
        }
        found.push(precision);
    }
    if found.is_empty() {
        bail!("engine.precisions is empty; name at least one of f16, q8_0 and fp8");
    }
    Ok(found)
}

/// Whether a device cannot serve a model that others may.
fn is_unfit(error: &anyhow::Error) -> bool {
    // Memory may be gone since it was divided: somebody else's process has taken it.
    let is_gone = |error: &DeviceError| matches!(error, DeviceError::Lost { .. } | DeviceError::OutOfMemory { .. });
    let is_unfit = |error: &CudaError| match error {
        CudaError::Unsupported { .. } | CudaError::Vram(_) => true,
        CudaError::Device(error) => is_gone(error),
        _ => false,
    };
    error.downcast_ref().is_some_and(is_unfit) || error.downcast_ref().is_some_and(is_gone)
}

fn check_vocabulary(text: &TextModel, known: usize) -> anyhow::Result<()> {
    let tokens = text.vocabulary();
    if tokens as usize > known {
        bail!("the tokenizer knows {tokens} tokens and the model {known}: they do not belong together");
    }
    Ok(())
}

impl Encode for Encoder {
    fn batch_tokens(&self) -> usize {
        Self::batch_tokens(self)
    }

    fn encode(&mut self, batch: &[&[u32]]) -> Result<Vec<Vec<f32>>, ExecuteError> {
        Self::encode(self, batch)
    }
}

/// A hash that is the same on every host and in every version (FNV-1a), for rendezvous hashing by routers.
pub(crate) fn stable_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// `eos_token_id` of config.json: a number, a list, or nothing.
fn eos_token_ids(config: &[u8]) -> Vec<u32> {
    let value: Value = serde_json::from_slice(config).unwrap_or_default();
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match &value["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eos_ids_come_in_three_shapes() {
        for (config, expect) in
            [("{}", vec![]), (r#"{"eos_token_id": 2}"#, vec![2]), (r#"{"eos_token_id": [2, 3]}"#, vec![2, 3])]
        {
            assert_eq!(eos_token_ids(config.as_bytes()), expect, "{config}");
        }
    }

    #[test]
    fn precisions_are_named_once_each() {
        for (names, expect) in [
            (&["f16"][..], Ok(&[Precision::F16][..])),
            (&["fp8", "q8_0"], Ok(&[Precision::Fp8, Precision::Q8_0])),
            (&["q8_0", "q8_0"], Err("names q8_0 twice")),
            (&["q4"], Err("`q4` is no precision: use f16, q8_0 or fp8")),
            (&[], Err("is empty")),
        ] {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            match (precisions(&names), expect) {
                (Ok(found), Ok(expect)) => assert_eq!(found, expect),
                (Err(error), Err(expect)) => assert!(format!("{error:#}").contains(expect), "{error:#}"),
                (found, _) => panic!("{names:?}: {found:?}"),
            }
        }
    }

    #[test]
    fn keys_are_the_same_everywhere() {
        assert_eq!(stable_key("demo:f16@cpu"), 0x0809_e4f0_90b1_09c7_u64, "a change would move every sticky session");
    }
}
