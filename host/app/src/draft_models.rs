//! Draft models: for each replica on the CPU whose model has one in `[draft_models]`, an engine for the smaller model beside it.
//!
//! Its weights are those that are served under its own name; its KV pool and activations are its own. What does not fit
//! together is refused when it is loaded, in words: a draft by another tokenizer would be wrong always and cost a step each time.
//! A draft model stays as long as the host does, because whoever drafts with it holds its weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, bail};
use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, KvPlan, Model};
use pointsman_sched::draft::LEAST_PERCENT;
use pointsman_sched::draft::model::{DraftModel, DraftTerms};
use pointsman_server::ports::Variant;
use pointsman_server::text::TextModel;

use crate::config::Config;
use crate::models::{Loaded, LoadedReplica};

/// Models that draft for others, by the name that the configuration has for them.
pub(crate) type DraftSources = BTreeMap<String, DraftSource>;

/// What a draft model is made from.
#[derive(Clone)]
pub(crate) struct DraftSource {
    model: Arc<Model>,
    text: Arc<TextModel>,
}

impl std::fmt::Debug for DraftSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DraftSource").finish_non_exhaustive()
    }
}

/// Finds the models that draft among those that the start has loaded, and checks for whom.
///
/// # Errors
/// A name that no model has, or one of a model that cannot draft.
pub(crate) fn sources(config: &Config, loaded: &Loaded) -> anyhow::Result<DraftSources> {
    let is_known = |name: &String| {
        loaded.variants.iter().any(|variant| *variant.alias == **name) || config.on_demand.contains_key(name)
    };
    let lost = |name: &String| loaded.lost.iter().any(|lost| lost.name == *name);
    let mut found = DraftSources::new();
    for (name, draft) in &config.draft_models {
        if !is_known(name) && !lost(name) {
            if config.engine.model_dirs.is_empty() {
                bail!("draft_models.\"{name}\" names no model; models are {}", names(&loaded.variants));
            }
            tracing::warn!("draft_models.\"{name}\" names no model so far; it holds for one that is loaded");
        }
        found.insert(draft.clone(), source(config, loaded, draft).with_context(|| of(name, draft))?);
    }
    Ok(found)
}

fn source(config: &Config, loaded: &Loaded, draft: &str) -> anyhow::Result<DraftSource> {
    let Some(variant) = loaded.variants.iter().find(|variant| *variant.id == *draft || *variant.alias == *draft) else {
        if config.on_demand.contains_key(draft) {
            bail!("`{draft}` is loaded on demand: it comes and goes; name it in [models] instead");
        }
        if loaded.encoders.iter().any(|encoder| *encoder.model.name == *draft) {
            bail!("`{draft}` makes embeddings, and no text; models that do are {}", names(&loaded.variants));
        }
        bail!("there is no model `{draft}`; models are {}", names(&loaded.variants));
    };
    let of_variant = |replica: &&LoadedReplica| replica.variant == variant.id;
    let Some(model) = loaded.replicas.iter().filter(of_variant).find_map(|replica| replica.model.clone()) else {
        bail!(
            "`{draft}` is not on the CPU, the only device with draft models; add \"cpu\" to engine.devices, or take the line out"
        );
    };
    Ok(DraftSource { model, text: Arc::clone(&variant.text) })
}

/// Gives replicas on the CPU their draft models.
///
/// # Errors
/// A model and its draft model do not fit together, or there is no CPU among the devices.
pub(crate) fn attach(
    (config, pool): (&Config, &ComputePool),
    sources: &DraftSources,
    loaded: &mut Loaded,
    check_room: impl Fn(u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for variant in &loaded.variants {
        let Some(draft) = config.draft_models.get(&*variant.alias) else { continue };
        let source = sources.get(draft).with_context(|| format!("`{draft}` is not loaded; restart the host"))?;
        let own = loaded.replicas.iter_mut().filter(|replica| replica.variant == variant.id);
        let mut n_drafted = 0;
        for replica in own.filter(|replica| replica.model.is_some()) {
            fit(variant, replica, source)
                .and_then(|()| add(replica, source, (config, pool), &check_room))
                .with_context(|| of(&variant.id, draft))?;
            n_drafted += 1;
        }
        if n_drafted == 0 {
            let why = "is not on the CPU, the only device with draft models; add \"cpu\" to engine.devices, or take the line out";
            return Err(anyhow::anyhow!("`{}` {why}", variant.id)).with_context(|| of(&variant.alias, draft));
        }
    }
    Ok(())
}

/// Whether a model can be drafted for by this one.
fn fit(variant: &Variant, replica: &LoadedReplica, source: &DraftSource) -> anyhow::Result<()> {
    if !variant.text.has_tokens_of(&source.text) {
        bail!(
            "the two have different tokenizers; a draft model needs the very same, as smaller models of a family have"
        );
    }
    if replica.executor.draft_places() == 0 {
        bail!("a step of this model has no room for drafts: each of several tokens may ask for experts of its own");
    }
    if replica.model.as_ref().is_some_and(|model| Arc::ptr_eq(model, &source.model)) {
        bail!("a model cannot draft for itself; name a smaller one");
    }
    Ok(())
}

fn add(
    replica: &mut LoadedReplica,
    source: &DraftSource,
    (config, pool): (&Config, &ComputePool),
    check_room: &impl Fn(u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (Some(model), spec) = (&replica.model, source.model.spec()) else { return Ok(()) };
    let section = &config.sched;
    let max_rows = replica.executor.draft_places().min(section.max_running);
    let step_tokens = section.prefill_chunk_tokens.max(max_rows);
    let block_tokens = section.block_tokens as usize;
    let fits = KvPlan::for_memory(spec, block_tokens, (config.engine.draft_kv_mib as usize) << 20);
    // More than texts of full length in all places are of no use.
    let n_blocks = fits.n_blocks.min(max_rows as usize * spec.context.div_ceil(block_tokens));
    if n_blocks == 0 {
        let (mib, bytes) = (config.engine.draft_kv_mib, fits.block_bytes);
        bail!("engine.draft_kv_mib = {mib} does not hold one block of the draft model ({bytes} bytes); raise it");
    }
    check_room((n_blocks * fits.block_bytes) as u64)?;
    let sizes = EngineConfig {
        n_blocks,
        block_tokens,
        max_step_tokens: step_tokens as usize,
        max_rows: max_rows as usize,
        context_tokens: spec.context,
    };
    let percent = (100 * source.model.read_bytes()).div_ceil(model.read_bytes().max(1));
    let engine = CpuEngine::new(Arc::clone(&source.model), pool.clone(), sizes)?;
    let used = engine.memory();
    let terms = DraftTerms {
        block_tokens: section.block_tokens,
        n_blocks: u32::try_from(n_blocks)?,
        max_rows,
        step_tokens,
        context_tokens: u32::try_from(spec.context)?,
        vocabulary: u32::try_from(spec.vocab.min(model.spec().vocab))?,
        least_percent: LEAST_PERCENT.saturating_add(u32::try_from(percent).unwrap_or(u32::MAX)),
    };
    replica.memory.drafts = Some((used.kv + used.workspace) as u64);
    replica.draft_model = Some(DraftModel::new(Box::new(engine), terms));
    Ok(())
}

fn names(variants: &[Arc<Variant>]) -> String {
    let mut names: Vec<String> = variants.iter().map(|variant| format!("`{}`", variant.alias)).collect();
    names.dedup();
    names.join(", ")
}

fn of(name: &str, draft: &str) -> String {
    format!("draft model `{draft}` of `{name}` (draft_models in the configuration)")
}
