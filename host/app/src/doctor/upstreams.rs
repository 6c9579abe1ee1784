//! The upstreams: whether each can be used as it is configured, and whether something listens there.
//!
//! No request is sent, since one may cost money. A start goes on without an upstream that is down, so that is a warning.

use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;

use anyhow::Context;
use pointsman_telemetry::Metrics;

use super::report::Report;
use crate::clock::SystemClock;
use crate::config::Config;
use crate::upstreams::UpstreamSection;

pub(super) fn examine(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    let (clock, metrics) = (Arc::new(SystemClock::start()), Metrics::new());
    for (name, section) in &config.upstreams {
        match section.open(name, &clock, &metrics) {
            Ok(upstream) => match connect(section, upstream.address()) {
                Ok(()) => report.good("upstreams", name, format!("{} takes connections", upstream.url()))?,
                Err(error) => {
                    let remedy = "start it, or correct `url`; until it answers, requests go elsewhere or fail";
                    report.warn("upstreams", name, format!("{}: {error:#}", upstream.url()), remedy)?;
                }
            },
            Err(error) => {
                let remedy = "correct it, or leave the upstream out (docs/upstreams.md)";
                report.fault("upstreams", name, format!("{error:#}"), remedy)?;
            }
        }
    }
    Ok(())
}

fn connect(section: &UpstreamSection, address: (&str, u16)) -> anyhow::Result<()> {
    let mut last = None;
    for found in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&found, section.connect_timeout()) {
            Ok(_) => return Ok(()),
            Err(error) => last = Some(error),
        }
    }
    Err(last.context("its name stands for no address")?.into())
}
