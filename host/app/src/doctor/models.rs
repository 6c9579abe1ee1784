//! The models: whether their files can be served, and whether the machine has room for them.
//!
//! They are loaded on a device that computes nothing, which reads everything about a model but its numbers: architecture,
//! tokenizer, templates, the tables of tensors. Reading the numbers as well would take what a start takes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pointsman_control::{LoadedModel as StoredModel, ModelsDocument};
use pointsman_engine::ComputePool;
use pointsman_engine::cuda::{Bytes, CodeOptions};
use pointsman_telemetry::Names;

use super::machine::available_memory;
use super::report::Report;
use crate::causes::told;
use crate::clock::SystemClock;
use crate::config::Config;
use crate::devices::{self, Place};
use crate::encoders::EncoderPool;
use crate::models::{LoadTerms, Loaded, Loader, allowed, gpu_plans, is_configured};
use crate::store::stored_models;

/// `root`: the data directory, which has a list of further models.
pub(super) fn examine(config: &Config, root: Option<&Path>, report: &mut Report<'_>) -> anyhow::Result<()> {
    let stored = stored(config, root, report)?;
    let has_none = config.models.is_empty() && config.upstreams.is_empty() && config.on_demand.is_empty();
    let has_none = has_none && stored.is_empty();
    if has_none && !config.engine.demo {
        let remedy = "engine.demo = true, or a model with --model NAME=PATH";
        report.fault("models", "none", "there is no model to serve", remedy)?;
    }
    if config.engine.demo {
        report.good("models", "demo", "part of the program")?;
    }
    for (name, path) in config.models.iter().chain(&config.on_demand) {
        match load_aside(config, name, path) {
            Ok(bytes) => {
                report.good("models", name, format!("{}, {}", path.display(), Bytes(bytes)))?;
                on_gpus(config, (name, path), root, report)?;
            }
            Err(error) => {
                let remedy = "bring what is named, or leave the model out";
                report.fault("models", name, told(error.chain()), remedy)?;
            }
        }
    }
    for (name, path) in &stored {
        match allowed(config, path).and_then(|path| load_aside(config, name, &path)) {
            Ok(bytes) => {
                let found = format!("{}, {}, loaded while a host ran", path.display(), Bytes(bytes));
                report.good("models", name, found)?;
            }
            Err(error) => {
                let found = format!("loaded while a host ran, and would not be again: {}", told(error.chain()));
                let remedy = format!(
                    "bring {} back below engine.model_dirs, or start without it and `pointsman model unload {name}`",
                    path.display()
                );
                report.fault("models", name, found, &remedy)?;
            }
        }
    }
    room(config, &stored, report)
}

/// How each GPU's memory would be divided for a model that has it alone. A start divides what it finds then.
fn on_gpus(
    config: &Config,
    (name, path): (&str, &Path),
    root: Option<&Path>,
    report: &mut Report<'_>,
) -> anyhow::Result<()> {
    // What is wrong with devices is told where they are looked for.
    let places = devices::find(&config.engine).unwrap_or_default();
    let Ok(code) = devices::code_options(&config.engine, root.unwrap_or(Path::new(""))) else { return Ok(()) };
    // The memory may be another process's for now: no reason to fail.
    let else_it_fails = if config.models.contains_key(name) { "the start fails" } else { "it cannot be loaded" };
    let remedy = format!(
        "do what it says; where a host that runs has the GPU's memory, ask again without it. Other devices serve the model; without \
         one {else_it_fails}"
    );
    for place in places {
        let Place::Cuda(found) = &place else { continue };
        let device = place.name();
        let plans = match gpu_plans(config, (name, path), (found, &code)) {
            Ok(plans) => plans,
            Err(error) => {
                let (what, found) = (format!("{name} on {device}"), told(error.chain()));
                report.warn("models", &what, found, "free the GPU where another process has it")?;
                continue;
            }
        };
        for (variant, plan) in plans {
            let what = format!("{variant} on {device}");
            match plan {
                Ok(plan) => report.good("models", &what, plan)?,
                Err(error) => report.warn("models", &what, error.to_string(), &remedy)?,
            }
        }
    }
    Ok(())
}

/// Models that a start would load again.
fn stored(config: &Config, root: Option<&Path>, report: &mut Report<'_>) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    // What is wrong with the folder itself is told where it is examined.
    let models = match root.filter(|root| root.is_dir()).map_or(Ok(ModelsDocument::empty()), stored_models) {
        Ok(stored) => stored.models,
        Err(error) => {
            let remedy =
                "mend or delete models.json in the data directory; what it lists is served again once it can be read";
            report.fault("models", "stored list", error.to_string(), remedy)?;
            Vec::new()
        }
    };
    let models = models.into_iter().map(|StoredModel { name, path }| (name, PathBuf::from(path)));
    Ok(models.filter(|(name, path)| !is_configured(config, (name, path))).collect())
}

/// Where a model is.
pub(super) enum Files {
    /// In the binary.
    Demo,
    /// On the disk.
    At(PathBuf),
}

/// Bytes of its files.
fn load_aside(config: &Config, name: &str, path: &Path) -> anyhow::Result<u64> {
    // One at a time, and without the demo, so that each is told its own fault; a variant as a model, since what it joins is not there.
    let alone = name.split(':').next().unwrap_or(name);
    open(config, [(alone.to_owned(), path.to_owned())].into(), false)?;
    Ok(size(path))
}

/// These models, with nothing that would ask for others.
pub(super) fn open(config: &Config, models: BTreeMap<String, PathBuf>, demo: bool) -> anyhow::Result<Loaded> {
    let (names, clock, code) = (Names::default(), Arc::new(SystemClock::start()), CodeOptions::default());
    let pool = &ComputePool::start(1)?;
    let (places, encoder_pool) = (&[Place::Null(0)], &EncoderPool::default());
    let terms = LoadTerms { places, code: &code, created: 0, started: 0, clock: &clock, pool, encoder_pool };
    let engine = crate::config::EngineSection { demo, ..config.engine.clone() };
    let (replicas, upstreams, on_demand, draft_models) = Default::default();
    let alone = Config { models, engine, replicas, upstreams, on_demand, draft_models, ..config.clone() };
    Loader::new(&alone, &names, terms).load_all(&ModelsDocument::empty())
}

/// Bytes of a file, or of the weights in a folder.
fn size(path: &Path) -> u64 {
    let length = |path: &Path| path.metadata().map_or(0, |found| found.len());
    if path.is_file() {
        return length(path);
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).map(|path| length(&path)).sum()
}

/// Compares what the models and their pools on the CPU will take with what there is. On GPUs the memory is divided at the
/// start.
fn room(config: &Config, stored: &BTreeMap<String, PathBuf>, report: &mut Report<'_>) -> anyhow::Result<()> {
    let Some(available) = available_memory() else { return Ok(()) };
    let on_cpu = config.engine.devices.iter().any(|device| device == "cpu");
    let variants = config.engine.precisions.len() as u64;
    let drafts = |name: &str| if config.draft_models.contains_key(name) { config.engine.draft_kv_mib } else { 0 };
    let pools = |name: &str| (u64::from(config.engine.kv_mib) + u64::from(drafts(name))) << 20;
    let taken = |(name, path): (&String, &PathBuf)| (size(path) + pools(name)) * variants;
    // Of those on demand the largest must have room; the others may have to go for it.
    let largest = config.on_demand.iter().map(taken).max().unwrap_or(0);
    let there = |(_, path): &(&String, &PathBuf)| path.exists();
    let wanted = config.models.iter().chain(stored.iter().filter(there)).map(taken).sum::<u64>() + largest;
    if !on_cpu || wanted == 0 {
        return Ok(());
    }
    let found = format!("about {} for weights and KV pools, {} available", Bytes(wanted), Bytes(available));
    match wanted <= available {
        true => report.good("models", "memory", found),
        false => {
            let remedy =
                "fewer or smaller models, one of engine.precisions, or a lower engine.kv_mib or engine.draft_kv_mib";
            report.fault("models", "memory", found, remedy)
        }
    }
}
