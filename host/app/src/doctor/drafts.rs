//! The draft models: whether each line of `[draft_models]` names two models that can work together on the CPU.
//!
//! Pairs are loaded as the models are, on a device that computes nothing, and compared by what a start compares. Models that are in the
//! stored list alone are not looked at here: only a start reads their files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::models::{Files, open};
use super::report::Report;
use crate::config::Config;
use crate::devices::{self, Place};
use crate::models::DEMO_NAMES;

const SECTION: &str = "draft models";

pub(super) fn examine(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    let drafted = &config.draft_models;
    // What is wrong with the devices is told where they are examined.
    let has_cpu = || {
        devices::find(&config.engine).map_or(true, |places| places.iter().any(|place| matches!(place, Place::Cpu(_))))
    };
    if !drafted.is_empty() && !has_cpu() {
        let found = "the only device with draft models, the CPU, is not among engine.devices";
        return report.fault(SECTION, "devices", found, "add \"cpu\" to engine.devices, or leave [draft_models] out");
    }
    drafted.iter().try_for_each(|(name, draft)| pair(config, (name, draft), report))
}

/// What is told of one line.
fn pair(config: &Config, (name, draft): (&str, &str), report: &mut Report<'_>) -> anyhow::Result<()> {
    let remedy = "name a model of [models] that is smaller and has the same tokenizer, or leave the line out";
    let alias = draft.split(':').next().unwrap_or(draft);
    let may_come = !config.engine.model_dirs.is_empty();
    let (own, other) = (files(config, name), files(config, alias));
    if config.on_demand.contains_key(alias) {
        let found = format!("`{draft}` is loaded on demand, and comes and goes");
        return report.fault(
            SECTION,
            name,
            found,
            "name it in [models] instead: a draft model is there from the start",
        );
    }
    match (own, other) {
        (Some(own), Some(other)) => match compare(config, (name, own), (draft, alias, other)) {
            Ok(Verdict::Fits) => report.good(SECTION, name, format!("`{draft}` has the same tokenizer")),
            Ok(Verdict::NoSuchVariant) => {
                let found = format!("`{alias}` has no variant `{draft}`");
                report.fault(SECTION, name, found, "name a variant of engine.precisions, or the model alone")
            }
            Ok(Verdict::OtherTokenizer) => {
                report.fault(SECTION, name, format!("`{draft}` has another tokenizer"), remedy)
            }
            Ok(Verdict::Encoder) => {
                report.fault(SECTION, name, format!("`{name}` or `{draft}` makes embeddings, and no text"), remedy)
            }
            Err(error) => {
                let found = format!("not compared with `{draft}`: {error:#}");
                report.warn(SECTION, name, found, "mend what is said of the models, and ask again")
            }
        },
        (None, _) if !may_come => report.fault(SECTION, name, format!("there is no model `{name}`"), remedy),
        (_, None) if !may_come => report.fault(SECTION, name, format!("there is no model `{draft}`"), remedy),
        (Some(_), None) => {
            let found =
                format!("`{draft}` is no model of the configuration; a start needs it among those it loads again");
            report.warn(SECTION, name, found, "name it in [models]")
        }
        (None, _) => report.good(SECTION, name, format!("`{draft}` drafts for it once it is loaded")),
    }
}

/// Where the files of a model of the configuration are.
fn files(config: &Config, name: &str) -> Option<Files> {
    let path = config.models.get(name).or_else(|| config.on_demand.get(name));
    match path {
        Some(path) => Some(Files::At(path.clone())),
        None => (config.engine.demo && DEMO_NAMES.contains(&name)).then_some(Files::Demo),
    }
}

enum Verdict {
    Fits,
    OtherTokenizer,
    NoSuchVariant,
    Encoder,
}

fn compare(
    config: &Config,
    (name, own): (&str, Files),
    (draft, alias, other): (&str, &str, Files),
) -> anyhow::Result<Verdict> {
    let mut models = BTreeMap::<String, PathBuf>::new();
    let mut demo = false;
    for (name, files) in [(name, own), (alias, other)] {
        match files {
            Files::Demo => demo = true,
            Files::At(path) => drop(models.insert(name.to_owned(), path)),
        }
    }
    let loaded = open(config, models, demo)?;
    if [name, alias].iter().any(|name| loaded.encoders.iter().any(|encoder| *encoder.model.name == **name)) {
        return Ok(Verdict::Encoder);
    }
    let variant = |wanted: &str| loaded.variants.iter().find(|v| *v.alias == *wanted || *v.id == *wanted);
    Ok(match (variant(name), variant(draft)) {
        (Some(own), Some(other)) if own.text.has_tokens_of(&other.text) => Verdict::Fits,
        (Some(_), Some(_)) => Verdict::OtherTokenizer,
        _ => Verdict::NoSuchVariant,
    })
}
