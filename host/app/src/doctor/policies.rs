//! The policies: what each slot would have after a start.
//!
//! They are started for real, from a copy of the documents and components of the data directory: what a start would log as an
//! error is found here, the compiler and the registries included, and the data directory stays as it is.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use pointsman_server::admin::wire::{self, HealthState};
use tempfile::TempDir;

use super::report::Report;
use crate::causes::told;
use crate::config::Config;
use crate::serve;
use crate::store::Store;

pub(super) fn examine(config: &Config, root: Option<&Path>, report: &mut Report<'_>) -> anyhow::Result<()> {
    if config.safe_mode {
        return Ok(());
    }
    let tried = copy_of(root).context("the data directory cannot be copied aside").and_then(|copy| {
        let store = Arc::new(Store::open(copy.path())?);
        serve::try_policies(config, &store)
    });
    match tried {
        Ok((true, _)) => {
            let remedy = "`pointsman policy safe-mode off` on the running host";
            report.warn("policies", "safe mode", "on: native policies decide in every slot", remedy)
        }
        Ok((false, slots)) => slots.into_iter().try_for_each(|slot| tell(slot, report)),
        Err(error) => {
            let remedy = "free memory or disk, or serve with --safe-mode";
            report.fault("policies", "start", told(error.chain()), remedy)
        }
    }
}

fn tell(slot: wire::Slot, report: &mut Report<'_>) -> anyhow::Result<()> {
    let revision = format!("{};g={}", slot.active.revision, slot.active.generation);
    match (slot.health.state, slot.health.reason) {
        (HealthState::Closed, _) | (_, None) => report.good("policies", &slot.slot, revision),
        (_, Some(reason)) => {
            let remedy =
                "activate another policy, roll back, or correct the configuration; until then its fallback serves";
            report.fault("policies", &slot.slot, reason, remedy)
        }
    }
}

/// The documents, and the components that they name.
fn copy_of(root: Option<&Path>) -> io::Result<TempDir> {
    let copy = tempfile::tempdir()?;
    let Some(root) = root.filter(|root| root.is_dir()) else { return Ok(copy) };
    let mut named = Vec::new();
    for folder in ["slots", "aliases", "models"] {
        for path in files(&root.join(folder)) {
            named.extend(fs::read(&path)?);
            copy_into(&path, &copy.path().join(folder))?;
        }
    }
    let named = String::from_utf8_lossy(&named);
    let is_named = |path: &Path| path.file_stem().and_then(OsStr::to_str).is_some_and(|digest| named.contains(digest));
    for path in files(&root.join("components")).filter(|path| is_named(path)) {
        copy_into(&path, &copy.path().join("components"))?;
    }
    files(root)
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .try_for_each(|p| copy_into(&p, copy.path()))?;
    Ok(copy)
}

fn files(folder: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_file())
}

fn copy_into(file: &Path, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::copy(file, folder.join(file.file_name().unwrap_or_default()))?;
    Ok(())
}
