//! `pointsman plugin ...`: the workbench of people who write policies. Make a folder, build it, check it, time it, run it on
//! recorded inputs; nothing here needs a running host.
//!
//! It uses the host's own runtime, not a model of it: what `check` accepts is what an upload and an activation accept,
//! because the same functions say so. Guests are compiled in this process: their author is the one who runs them.

mod bench;
mod build;
mod check;
mod host;
pub mod inputs;
mod native;
mod project;
mod replay;
mod rust;
mod template;

use std::io::Write;

pub(crate) use project::{Kind, Lang};

use crate::cli::PluginCommand;

/// Runs one command; what it prints goes to `out`.
///
/// # Errors
/// What is wrong with the folder, the tools or the policy, and what to change.
pub(crate) fn run(command: PluginCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    host::log_to_stderr();
    match command {
        PluginCommand::New { name, kind, lang } => template::create(&name, kind, lang, out),
        PluginCommand::Build { path, with } => build::build(&path, &with, out),
        PluginCommand::Check { path, with } => check::check(&project::wasm(&path)?, &with, out),
        PluginCommand::Run { path, input, with, against, json } => {
            let wasm = project::wasm(&path)?;
            replay::Replay { wasm: &wasm, with: &with, input: &input, against: against.as_str().into(), json }.run(out)
        }
        PluginCommand::Bench { path, with, calls } => bench::bench(&project::wasm(&path)?, &with, calls, out),
    }
}
