//! The upstreams: whether each can be used as it is configured, and whether it takes connections: over TLS with a certificate
//! that is trusted.
//!
//! No request is sent, since one may cost money. A start goes on without an upstream that is down, so that is a warning.

use std::sync::Arc;

use anyhow::Context;
use pointsman_telemetry::Metrics;

use super::certificates::{Left, left};
use super::report::Report;
use crate::causes::told;
use crate::clock::SystemClock;
use crate::config::Config;

pub(super) fn examine(config: &Config, now_s: u64, report: &mut Report<'_>) -> anyhow::Result<()> {
    if config.upstreams.is_empty() {
        return Ok(());
    }
    let (clock, metrics) = (Arc::new(SystemClock::start()), Metrics::new());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot connect")?;
    for (name, section) in &config.upstreams {
        match section.open(name, &clock, &metrics) {
            Ok(upstream) => match runtime.block_on(upstream.reach()) {
                Ok(()) => report.good("upstreams", name, format!("{} takes connections", upstream.url()))?,
                Err(error) => {
                    let error = error.to_string();
                    let remedy = match error.contains("CaUsedAsEndEntity") {
                        true => "give it a certificate with basicConstraints=CA:FALSE (docs/upstreams.md)",
                        false => {
                            "start it, or correct `url`, `protocol` or `ca_file`; until it answers, requests go elsewhere or fail"
                        }
                    };
                    report.warn("upstreams", name, format!("{}: {error}", upstream.url()), remedy)?;
                }
            },
            Err(error) => {
                let remedy = "correct it, or leave the upstream out (docs/upstreams.md)";
                report.fault("upstreams", name, told(error.chain()), remedy)?;
            }
        }
        let file = section.ca_file.display();
        let remedy = "put the new authorities beside the old ones, and send SIGHUP";
        match section.ca_validity().map(|valid| left(valid, now_s)) {
            None | Some(Left::Enough { .. }) => {}
            Some(Left::Little { days }) => {
                report.warn("upstreams", name, format!("of {file}, one expires in {days} days"), remedy)?;
            }
            Some(Left::NotYet { days, expires }) => {
                let remedy = "put those in use beside it, and look at the clock of this machine";
                let found =
                    format!("of {file}, one expires in {expires} days and one is not valid yet, for {days} days");
                report.warn("upstreams", name, found, remedy)?;
            }
            Some(Left::Nothing) => report.warn("upstreams", name, format!("of {file}, one has expired"), remedy)?,
        }
    }
    Ok(())
}
