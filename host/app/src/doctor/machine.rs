//! The machine: cores and their instructions, memory, open files.
//!
//! From `/proc`, which every Linux has; elsewhere these are left out, since nothing about a start depends on them.

use pointsman_engine::{ComputePool, cuda::Bytes};

use super::report::Report;
use crate::config::Config;
use crate::models::compute_pool;

/// Files that a host has open besides its connections: logs, models, pipes of the compile process.
const OTHER_FILES: u64 = 128;

pub(super) fn examine(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernels = ComputePool::start(1)?.isa().name();
    report.good("machine", "processor", format!("{cores} cores to use, kernels for {kernels}"))?;
    if config.engine.threads > cores {
        let found = format!("{} compute threads on {cores} cores", config.engine.threads);
        report.warn("machine", "engine.threads", found, "0 takes one per core; more wait for each other")?;
    }
    if config.engine.pin_threads {
        pins(config, report)?;
    }
    if let Some(bytes) = available_memory() {
        report.good("machine", "memory", format!("{} available", Bytes(bytes)))?;
    }
    open_files(config, report)
}

/// Whether each compute thread can have a core of its own.
fn pins(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    match compute_pool(config) {
        Ok(pool) if pool.pinned_to().is_empty() => {
            report.good("machine", "engine.pin_threads", "one compute thread, which is the device's own and not pinned")
        }
        Ok(pool) => {
            report.good("machine", "engine.pin_threads", format!("compute threads on the cores {:?}", pool.pinned_to()))
        }
        Err(error) => report.fault(
            "machine",
            "engine.pin_threads",
            format!("{error:#}"),
            "lower engine.threads, or set it to false",
        ),
    }
}

/// Memory that new programs could have, in bytes: what the system has left, or less where a control group allows less.
pub(crate) fn available_memory() -> Option<u64> {
    let read = |path| std::fs::read_to_string(path).ok();
    let system = field(&read("/proc/meminfo")?, "MemAvailable:")?.saturating_mul(1_024);
    let group = |file| read(file).and_then(|text| text.trim().parse::<u64>().ok());
    let limit = group("/sys/fs/cgroup/memory.max").unwrap_or(u64::MAX);
    // Pages of files that were read are given up for whoever asks.
    let stat = read("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let cached: u64 = ["inactive_file ", "active_file "].iter().filter_map(|name| field(&stat, name)).sum();
    let used = group("/sys/fs/cgroup/memory.current").unwrap_or(0).saturating_sub(cached);
    Some(system.min(limit.saturating_sub(used)))
}

/// The number after a name in a text of such lines.
fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn open_files(config: &Config, report: &mut Report<'_>) -> anyhow::Result<()> {
    let Some(limit) = std::fs::read_to_string("/proc/self/limits").ok().and_then(|t| field(&t, "Max open files"))
    else {
        return Ok(());
    };
    let wanted = u64::from(config.server.max_connections) + OTHER_FILES;
    let found = format!("{limit} may be open, for {} connections", config.server.max_connections);
    match limit >= wanted {
        true => report.good("machine", "files", found),
        false => {
            let remedy = format!("`ulimit -n {wanted}` or LimitNOFILE={wanted}, or lower server.max_connections");
            report.warn("machine", "files", found, &remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_names() {
        let text =
            "MemTotal:       24690088 kB\nMemAvailable:    1024 kB\nMax open files            4096   8192   files\n";
        for (name, expect) in
            [("MemAvailable:", Some(1_024)), ("Max open files", Some(4_096)), ("MemFree:", None), ("Mem", None)]
        {
            assert_eq!(field(text, name), expect, "{name}");
        }
    }
}
