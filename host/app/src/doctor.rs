//! `pointsman doctor`: whether this machine can serve what a configuration asks for, before anybody starts it.
//!
//! It asks the code that a start runs, so that both give the same answer: devices are looked for, files of models are opened,
//! policies are compiled, started and probed from a copy of the data directory. Nothing is changed, and a host may be running. It
//! does not stop at the first fault as a start does: whoever repairs a machine wants all of them.

mod certificates;
mod drafts;
mod machine;
mod models;
mod policies;
mod remedy;
mod report;
mod store;
mod upstreams;

use std::io::Write;
use std::net::{SocketAddr, TcpListener};

use anyhow::bail;
use serde_json::json;

use crate::causes::told;
use crate::cli::DoctorArgs;
use crate::clock::SystemClock;
use crate::config::Config;
use crate::devices::{self, Place};
use crate::serve;
use report::Report;

pub(crate) use self::machine::available_memory;

/// Examines everything; what it finds goes to `out`.
///
/// # Errors
/// There is a fault, or nothing can be printed.
pub(crate) fn run(args: &DoctorArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut report = Report::new((!args.json).then_some(&mut *out));
    match serve::configure(&args.serve) {
        Ok(config) => all(&config, &mut report)?,
        Err(error) => {
            let found = told(error.chain());
            report.fault("config", "file and environment", found, &remedy::remedy(&error))?;
        }
    }
    let (faults, warnings) = (report.faults(), report.warnings());
    if args.json {
        let version = env!("CARGO_PKG_VERSION");
        let whole =
            json!({ "version": version, "faults": faults, "warnings": warnings, "findings": report.findings() });
        writeln!(out, "{whole:#}")?;
    } else {
        writeln!(out, "{} and {}", count(faults, "fault"), count(warnings, "warning"))?;
    }
    match faults {
        0 => Ok(()),
        n => bail!("{} would keep `pointsman serve` from serving what is configured", count(n, "fault")),
    }
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn all(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    machine::examine(config, report)?;
    settings(config, report)?;
    serving_devices(config, report)?;
    let root = serve::data_dir(config);
    models::examine(config, root.as_deref().ok(), report)?;
    drafts::examine(config, report)?;
    let now_s = SystemClock::start().unix_millis() / 1_000;
    certificates::examine(config, now_s, report)?;
    upstreams::examine(config, now_s, report)?;
    let in_use = store::examine(&root, report)?;
    policies::examine(config, root.as_deref().ok(), report)?;
    let planes = [("data", "listen", config.server.listen), ("admin", "admin", config.admin.listen)];
    planes.into_iter().try_for_each(|plane| port(plane, in_use, report))
}

/// What is allowed, and seldom meant.
fn settings(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    report.good("config", "file and environment", "read and checked")?;
    if serve::is_open(config) {
        let found = format!("{} takes requests of anybody who reaches it", config.server.listen);
        report.warn("config", "API keys", found, "make keys with `pointsman key new`, or listen on loopback")?;
    }
    if config.safe_mode {
        report.warn("config", "safe_mode", "native policies only", "leave it out to serve the stored deployment")?;
    }
    Ok(())
}

fn serving_devices(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    match devices::find(&config.engine) {
        Ok(places) => {
            let asks_for_gpus = config.engine.devices.iter().any(|device| device == "auto");
            if asks_for_gpus && !places.iter().any(|place| matches!(place, Place::Cuda(_))) {
                report.warn("devices", "auto", "no GPU that can be used", "check its driver, or ask for `cpu`")?;
            }
            places.iter().try_for_each(|place| report.good("devices", &place.name(), place.description()))
        }
        Err(error) => report.fault("devices", "engine.devices", told(error.chain()), "ask for a device that is there"),
    }
}

/// Whether a plane could listen. `in_use`: a host runs on the data directory.
fn port((plane, flag, at): (&str, &str, SocketAddr), in_use: bool, report: &mut Report<'_>) -> anyhow::Result<()> {
    match TcpListener::bind(at) {
        Ok(_) => report.good("ports", plane, format!("{at} is free")),
        Err(_) if in_use => {
            report.good("ports", plane, format!("{at} is taken, and a host runs on the data directory"))
        }
        Err(error) => {
            report.fault("ports", plane, format!("{at}: {error}"), &format!("free it, or choose another with --{flag}"))
        }
    }
}
