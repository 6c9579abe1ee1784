//! The components that ship inside the binary: prebuilt from `plugins/`, so that a fresh machine needs no wasm toolchain.

/// A built-in component.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Builtin {
    /// Its name in configurations and on the command line.
    pub name: &'static str,
    /// Its bytes.
    pub bytes: &'static [u8],
}

macro_rules! builtins {
    ($($name:literal),* $(,)?) => {
        &[$(Builtin { name: $name, bytes: include_bytes!(concat!("../../../plugins/prebuilt/", $name, ".wasm")) }),*]
    };
}

/// Every built-in component.
pub(crate) const BUILTINS: &[Builtin] = builtins![
    "admit-token-bucket",
    "route-least-loaded",
    "route-prefix-aware",
    "route-weighted",
    "route-sticky-until-saturated",
    "route-canary-by-header",
    "route-device-affinity",
    "route-bandit",
    "sched-fcfs",
    "sched-shortest-first",
    "sched-priority",
    "sched-fair-share",
    "kv-lru-with-pins",
    "sampler-allowlist",
    "hook-slo-log",
    "hook-outcomes",
];
