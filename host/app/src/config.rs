//! The configuration: one tree, read once from file, environment and flags, in that order, and validated once.
//!
//! Defaults are the tree's own `Default`, and the set of known keys is that default serialised: so a key cannot exist
//! without a default, and an unknown one is answered with the nearest known one. `pointsman.example.toml` and
//! `.env.example` list every key; a test compares them with this file.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pointsman_control::{Budget, OnFault, SlotName};
use pointsman_policy::{BudgetError, RuntimeConfig, World};
use pointsman_sched::draft::MAX_DRAFTS;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::builtin::BUILTINS;
use crate::deploy::budget::change;
use crate::devices::Wanted;
use crate::keys::{self, ApiKeySection, KeyError};
use crate::models::{DEMO_NAMES, check_spelling, stable_key};
use crate::reference::{OCI_SCHEME, Reference, ReferenceError};
use crate::tls::{CertificateError, TlsSection};
use crate::trust::{KeyRing, TrustError};
use crate::upstreams::{self, UpstreamSection};

/// Prefix of environment variables: `POINTSMAN_SCHED__MAX_BATCH_TOKENS` is `sched.max_batch_tokens`.
pub(crate) const ENV_PREFIX: &str = "POINTSMAN_";

/// Most labels of all replicas together, and the longest name of one.
const MAX_LABELS: usize = 16;
const MAX_LABEL: usize = 40;

/// Longest wait for a model: beyond, no client is still there.
const MAX_LOAD_WAIT_MS: u64 = 3_600_000;
/// Models that are loaded on demand: each may have a thread that waits for its turn to load.
const MAX_ON_DEMAND: usize = 64;

/// Longest wait of an idle encoder: beyond, a lone request waits for nobody longer than for its own computing.
const MAX_EMBED_WINDOW_MS: u32 = 50;

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Where slots, uploaded components, compiled components and the journal live. Empty: the user's data directory.
    pub data_dir: PathBuf,
    /// Native policies only.
    pub safe_mode: bool,
    pub server: ServerSection,
    pub admin: AdminSection,
    pub sched: SchedSection,
    pub engine: EngineSection,
    pub policy: PolicySection,
    pub batch: BatchSection,
    pub trust: TrustSection,
    /// How registries are reached from which components are pulled, by host, as in `ghcr.io` or `10.0.0.7:5000`.
    pub registries: BTreeMap<String, RegistrySection>,
    /// What a fresh data directory starts with, by slot name.
    pub slots: BTreeMap<String, SlotSection>,
    /// Servers elsewhere to which requests are sent on, by name.
    pub upstreams: BTreeMap<String, UpstreamSection>,
    /// What the operator says of replicas, by name, as in `demo:f16@cpu`.
    pub replicas: BTreeMap<String, ReplicaSection>,
    /// Extra models: name to folder (config.json, safetensors, tokenizer.json) or .gguf file.
    pub(crate) models: BTreeMap<String, PathBuf>,
    /// The same of models that are loaded when somebody asks for them.
    pub(crate) on_demand: BTreeMap<String, PathBuf>,
    /// A smaller model with the same tokenizer that drafts for a model, by the model's name.
    pub(crate) draft_models: BTreeMap<String, String>,
    pub log: LogSection,
}

/// The data plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ServerSection {
    pub listen: SocketAddr,
    pub max_in_flight: u32,
    pub max_queued_tokens: u32,
    /// For what answers say of their prompts, all together.
    pub prompt_scores_mib: u32,
    pub max_body_bytes: u64,
    pub max_connections: u32,
    /// For the head of a request to come whole, and for its body; and for a client to take a byte of its answer.
    pub header_timeout_ms: u64,
    pub body_timeout_ms: u64,
    pub write_timeout_ms: u64,
    /// Threads that serve HTTP; 0 for one to every two cores, since the others compute.
    pub io_threads: u32,
    pub max_choices: u32,
    pub max_rows: u32,
    pub draft_lead_ms: u64,
    pub max_grammar_mib: u32,
    /// Compiled forms that are kept, and their room; 0 of either keeps none.
    pub kept_forms: u32,
    pub kept_forms_mib: u32,
    /// Room of the response cache; 0 leaves it off.
    pub response_cache_mib: u32,
    pub response_cache_ttl_s: u64,
    pub shutdown_grace_ms: u64,
    /// Request headers that routers may ask for as `header.<name>`; a `*` at the end stands for any rest.
    pub route_headers: Vec<String>,
    /// Origins of web pages that may read answers; `*` for all of them.
    pub cors_origins: Vec<String>,
    /// File with further keys, read again at SIGHUP; empty for none.
    pub api_keys_file: PathBuf,
    /// API keys by name; with none here and no file, anybody is served.
    pub api_keys: BTreeMap<String, ApiKeySection>,
    pub tls: TlsSection,
}

/// The admin plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct AdminSection {
    pub listen: SocketAddr,
    /// Bearer token that may do everything; one is required off loopback, empty for none.
    pub token: String,
    /// Further tokens, by the name that stands in the journal.
    pub tokens: BTreeMap<String, AdminTokenSection>,
    pub tls: TlsSection,
}

/// A named token of the admin plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdminTokenSection {
    pub token: String,
    pub role: RoleName,
}

/// What a token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RoleName {
    /// Look.
    Read,
    /// Look and change.
    Operate,
}

/// Who may bring policies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TrustSection {
    /// Refuse components that no key of the ring has signed.
    pub require_signature: bool,
    /// Ed25519 public keys, base64 or hex, by the name that stands in the journal.
    pub keys: BTreeMap<String, String>,
}

/// How a registry is reached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RegistrySection {
    /// Empty: pulls are anonymous.
    pub username: String,
    /// File with the password or access token of that user, read at every pull.
    pub password_file: PathBuf,
    /// PEM file with the certificates that sign the registry's, instead of the system's.
    pub ca_file: PathBuf,
}

/// Limits of each replica's scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct SchedSection {
    pub max_batch_tokens: u32,
    pub max_running: u32,
    pub max_waiting: u32,
    pub prefill_chunk_tokens: u32,
    pub starvation_ms: u64,
    pub block_tokens: u32,
    pub draft_tokens: u32,
}

/// The compute side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct EngineSection {
    /// Threads of the compute pool; 0 for one per core.
    pub threads: usize,
    /// Each of them stays on a core of its own.
    pub pin_threads: bool,
    /// KV pool of each replica on the CPU.
    pub kv_mib: u32,
    /// KV pool of the draft model of each replica that has one.
    pub draft_kv_mib: u32,
    /// Serve the embedded demo model.
    pub demo: bool,
    /// Where to serve: `auto`, `cpu`, `cuda:N`, `null[:MICROSECONDS]`; each has a replica of every variant that it can serve.
    pub devices: Vec<String>,
    /// KV pool of each replica on a GPU; 0 for a fair share of what is free.
    pub gpu_kv_mib: u32,
    /// Most tokens of a sequence; 0 for what the model can.
    pub max_context: u32,
    /// Folders to look for NVIDIA's libraries in before the usual ones.
    pub cuda_lib_dirs: Vec<PathBuf>,
    /// Whether cuBLASLt computes the products of long prompts on a GPU, where it is found and faster than the kernels.
    pub cublaslt: bool,
    /// Whether a kernel may start while the one before it ends, on a GPU that can (programmatic dependent launch).
    pub overlap_launches: bool,
    /// How the weights of configured models are kept: `f16`, `q8_0`, `fp8`; each is a variant.
    pub precisions: Vec<String>,
    /// How long an idle encoder waits for more inputs to share a batch.
    pub embed_window_ms: u32,
    /// Folders below which models may be loaded while the host runs; none for no such models.
    pub model_dirs: Vec<PathBuf>,
    /// Models loaded while the host runs, at once.
    pub max_loaded: u32,
    /// What models may take of the CPU's memory when one is loaded while the host runs; 0 for what the machine has free.
    pub memory_mib: u32,
    /// Longest time that a request waits for a model that is loaded on demand.
    pub load_wait_ms: u64,
}

/// The WebAssembly half.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct PolicySection {
    pub compile_timeout_ms: u64,
    pub compile_memory_mib: u64,
    pub router_instances: u32,
    pub event_ring: u32,
    /// Requests that `GET /admin/v1/requests/{id}` can explain; 0 remembers none.
    pub explain_requests: u32,
}

/// Files and batches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct BatchSection {
    /// Lines that are computed at once; 0 leaves batches where they are.
    pub max_in_flight: u32,
    /// Batches that have not ended.
    pub max_unfinished: u32,
    pub max_lines: u32,
    pub max_file_mib: u32,
    pub max_files: u32,
    /// All files together.
    pub max_store_mib: u32,
    /// How long files, and batches that have ended, are kept.
    pub retention_hours: u32,
}

/// A policy for a slot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct SlotSection {
    /// Name of a built-in component, a digest, a path to a component, an `oci://` reference, or `native`.
    pub component: String,
    /// Handed to the component's `init` as JSON.
    pub config: Table,
    /// Limits of whatever policy the slot has, unless its activation brings its own.
    #[serde(skip_serializing_if = "Budget::is_empty")]
    pub budget: Budget,
    /// Of a sampler: whether requests go on without it where it faults.
    #[serde(skip_serializing_if = "OnFault::is_open")]
    pub on_fault: OnFault,
}

/// What the operator says of a replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ReplicaSection {
    /// 1000 is normal, 0 drains.
    pub weight: u32,
    /// Columns `replica.label.<name>` for routers.
    pub labels: BTreeMap<String, Label>,
}

/// A label's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Label {
    /// Passed as it is.
    Number(u64),
    /// Passed as its hash.
    Text(String),
}

/// Logging.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LogSection {
    /// A tracing filter, such as `info` or `info,pointsman_policy=debug`.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For collectors.
    Json,
}

/// What is wrong with a configuration; every message says where and what to change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration {path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{origin} is not valid TOML: {message}")]
    Syntax { origin: String, message: String },
    #[error("unknown key `{key}` in {origin}{}", hint(nearest))]
    UnknownKey { key: String, origin: String, nearest: Option<String> },
    #[error("bad configuration: {0}")]
    Shape(String),
    #[error("`{key}` = {found}: {rule}")]
    Value { key: &'static str, found: String, rule: String },
    #[error(
        "slots.{slot}.component = \"{component}\" is no built-in, digest, file, `oci://` reference or `native`{}",
        hint(nearest)
    )]
    UnknownComponent { slot: String, component: String, nearest: Option<String> },
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Upstream(#[from] upstreams::SectionError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("slots.{slot}.component: {source}")]
    Component { slot: String, source: ReferenceError },
    #[error("slots.{slot}.budget: {source}")]
    Budget { slot: String, source: BudgetError },
    #[error("registries.\"{registry}\" {problem}")]
    Registry { registry: String, problem: &'static str },
    #[error("admin.tokens.{name} {problem}")]
    AdminToken { name: String, problem: &'static str },
    #[error("{name}: `{section}` is set in the configuration file, not in the environment")]
    NotInEnvironment { name: String, section: &'static str },
}

fn hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default()
}

// === defaults ===

impl Default for Config {
    fn default() -> Self {
        let slot = |component: &str| SlotSection { component: component.into(), ..SlotSection::default() };
        Self {
            data_dir: PathBuf::new(),
            safe_mode: false,
            server: ServerSection::default(),
            admin: AdminSection::default(),
            sched: SchedSection::default(),
            engine: EngineSection::default(),
            policy: PolicySection::default(),
            batch: BatchSection::default(),
            trust: TrustSection::default(),
            registries: BTreeMap::new(),
            slots: [
                ("router", slot("route-least-loaded")),
                ("scheduler", slot("sched-fcfs")),
                ("telemetry.slo-log", slot("hook-slo-log")),
            ]
            .map(|(name, slot)| (name.to_owned(), slot))
            .into(),
            upstreams: BTreeMap::new(),
            replicas: BTreeMap::new(),
            models: BTreeMap::new(),
            on_demand: BTreeMap::new(),
            draft_models: BTreeMap::new(),
            log: LogSection::default(),
        }
    }
}

impl Default for ServerSection {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 8080).into(),
            max_in_flight: 256,
            max_queued_tokens: 262_144,
            prompt_scores_mib: 256,
            max_body_bytes: 8 << 20,
            max_connections: 1_024,
            header_timeout_ms: 60_000,
            body_timeout_ms: 30_000,
            write_timeout_ms: 30_000,
            io_threads: 0,
            max_choices: 8,
            max_rows: 64,
            draft_lead_ms: 500,
            max_grammar_mib: 1_024,
            kept_forms: 256,
            kept_forms_mib: 64,
            response_cache_mib: 0,
            response_cache_ttl_s: 3_600,
            shutdown_grace_ms: 20_000,
            route_headers: vec!["x-*".to_owned()],
            cors_origins: Vec::new(),
            api_keys_file: PathBuf::new(),
            api_keys: BTreeMap::new(),
            tls: TlsSection::default(),
        }
    }
}

impl Default for AdminSection {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 8081).into(),
            token: String::new(),
            tokens: BTreeMap::new(),
            tls: TlsSection::default(),
        }
    }
}

impl Default for SchedSection {
    fn default() -> Self {
        Self {
            max_batch_tokens: 512,
            max_running: 64,
            max_waiting: 256,
            prefill_chunk_tokens: 256,
            starvation_ms: 10_000,
            block_tokens: 16,
            draft_tokens: 0,
        }
    }
}

impl Default for EngineSection {
    fn default() -> Self {
        Self {
            threads: 0,
            pin_threads: false,
            kv_mib: 64,
            draft_kv_mib: 16,
            demo: true,
            devices: vec!["cpu".to_owned()],
            gpu_kv_mib: 0,
            max_context: 0,
            cuda_lib_dirs: Vec::new(),
            cublaslt: true,
            overlap_launches: false,
            precisions: vec!["f16".to_owned()],
            embed_window_ms: 0,
            model_dirs: Vec::new(),
            max_loaded: 8,
            memory_mib: 0,
            load_wait_ms: 60_000,
        }
    }
}

impl Default for PolicySection {
    fn default() -> Self {
        Self {
            compile_timeout_ms: 30_000,
            compile_memory_mib: 2_048,
            router_instances: 8,
            event_ring: 65_536,
            explain_requests: 1_024,
        }
    }
}

impl Default for BatchSection {
    fn default() -> Self {
        Self {
            max_in_flight: 8,
            max_unfinished: 100,
            max_lines: 50_000,
            max_file_mib: 200,
            max_files: 1_000,
            max_store_mib: 4_096,
            retention_hours: 720,
        }
    }
}

impl Default for ReplicaSection {
    fn default() -> Self {
        Self { weight: 1_000, labels: BTreeMap::new() }
    }
}

impl Default for LogSection {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

// === reading ===

/// Actors of the journal that are no named token.
const ACTORS: [&str; 5] = ["host", "loopback", "rollout", "startup", "token"];

/// Keys under which anything may stand.
const FREE_FORM: [&str; 10] = [
    "slots",
    "models",
    "on_demand",
    "draft_models",
    "upstreams",
    "replicas",
    "registries",
    "server.api_keys",
    "admin.tokens",
    "trust.keys",
];

impl Config {
    /// Reads the file (if any), then the environment on top. Flags are applied by the caller, then [`Config::validate`].
    ///
    /// # Errors
    /// An unreadable file, bad TOML, an unknown key or a value of the wrong type.
    pub(crate) fn read(file: Option<&Path>, env: impl Iterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let known = Table::try_from(Self::default()).map_err(|e| ConfigError::Shape(e.to_string()))?;
        // A slot that nobody names keeps its default policy; `native` switches one off.
        let mut merged: Table =
            known.get("slots").cloned().map(|slots| ("slots".to_owned(), slots)).into_iter().collect();
        if let Some(path) = file {
            let origin = path.display().to_string();
            let text =
                std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: origin.clone(), source })?;
            let table: Table = text
                .parse()
                .map_err(|e: toml::de::Error| ConfigError::Syntax { origin: origin.clone(), message: e.to_string() })?;
            check_keys(&table, &known, "", &origin)?;
            merge(&mut merged, table);
        }
        let table = env_table(env, &known)?;
        check_keys(&table, &known, "", "the environment")?;
        merge(&mut merged, table);
        check_key_texts(&merged)?;
        Value::Table(merged).try_into().map_err(|e: toml::de::Error| ConfigError::Shape(e.to_string()))
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// The first value out of bounds, with its rule.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        for (key, found, least, most, unit) in self.bounds() {
            if !(least..=most).contains(&found) {
                return Err(ConfigError::Value {
                    key,
                    found: found.to_string(),
                    rule: format!("{least} to {most} {unit}"),
                });
            }
        }
        self.check_rules()
    }

    /// Numbers as key, value, least, most and unit.
    fn bounds(&self) -> [(&'static str, u64, u64, u64, &'static str); 40] {
        let (sched, server, policy, files) = (&self.sched, &self.server, &self.policy, &self.batch);
        let batch = u64::from(sched.max_batch_tokens);
        [
            ("sched.block_tokens", sched.block_tokens.into(), 16, 256, "tokens"),
            ("sched.max_running", sched.max_running.into(), 1, 4_096, "sequences"),
            ("sched.max_waiting", sched.max_waiting.into(), 1, 65_536, "requests"),
            ("sched.max_batch_tokens", batch, 1, 65_536, "tokens"),
            ("sched.prefill_chunk_tokens", sched.prefill_chunk_tokens.into(), 1, 65_536, "tokens"),
            ("sched.draft_tokens", sched.draft_tokens.into(), 0, MAX_DRAFTS.into(), "tokens"),
            ("sched.starvation_ms", sched.starvation_ms, 1, 86_400_000, "milliseconds"),
            ("engine.threads", self.engine.threads as u64, 0, 256, "threads (0: one per core)"),
            ("engine.kv_mib", self.engine.kv_mib.into(), 1, 1 << 20, "MiB"),
            ("engine.max_context", self.engine.max_context.into(), 0, 1 << 24, "tokens (0: what the model can)"),
            ("engine.max_loaded", self.engine.max_loaded.into(), 0, 64, "models (0: none while the host runs)"),
            ("server.max_in_flight", server.max_in_flight.into(), 1, 65_536, "requests"),
            ("server.max_queued_tokens", server.max_queued_tokens.into(), 1, 1 << 30, "tokens"),
            ("server.prompt_scores_mib", server.prompt_scores_mib.into(), 1, 1 << 20, "MiB"),
            ("server.max_body_bytes", server.max_body_bytes, 1_024, 1 << 30, "bytes"),
            ("server.max_connections", server.max_connections.into(), 1, 65_536, "connections"),
            ("server.header_timeout_ms", server.header_timeout_ms, 1, 3_600_000, "milliseconds"),
            ("server.body_timeout_ms", server.body_timeout_ms, 1, 3_600_000, "milliseconds"),
            ("server.write_timeout_ms", server.write_timeout_ms, 1, 3_600_000, "milliseconds"),
            ("server.io_threads", server.io_threads.into(), 0, 256, "threads (0: one for every two cores)"),
            ("server.max_choices", server.max_choices.into(), 1, 1_024, "choices"),
            ("server.max_rows", server.max_rows.into(), 1, 4_096, "texts"),
            ("server.draft_lead_ms", server.draft_lead_ms, 0, 60_000, "milliseconds (0: both at once)"),
            ("server.max_grammar_mib", server.max_grammar_mib.into(), 1, 1 << 20, "MiB"),
            ("server.kept_forms", server.kept_forms.into(), 0, 4_096, "forms"),
            ("server.kept_forms_mib", server.kept_forms_mib.into(), 0, 1 << 20, "MiB"),
            ("server.response_cache_mib", server.response_cache_mib.into(), 0, 1 << 20, "MiB (0: off)"),
            ("server.response_cache_ttl_s", server.response_cache_ttl_s, 1, 31_536_000, "seconds"),
            ("server.shutdown_grace_ms", server.shutdown_grace_ms, 0, 3_600_000, "milliseconds"),
            ("policy.compile_timeout_ms", policy.compile_timeout_ms, 100, 600_000, "milliseconds"),
            ("policy.compile_memory_mib", policy.compile_memory_mib, 256, 65_536, "MiB"),
            ("policy.router_instances", policy.router_instances.into(), 1, 100, "instances"),
            ("policy.explain_requests", policy.explain_requests.into(), 0, 65_536, "requests"),
            ("batch.max_in_flight", files.max_in_flight.into(), 0, 4_096, "lines (0: none are computed)"),
            ("batch.max_unfinished", files.max_unfinished.into(), 1, 10_000, "batches"),
            ("batch.max_lines", files.max_lines.into(), 1, 1_000_000, "lines"),
            ("batch.max_file_mib", files.max_file_mib.into(), 1, 4_096, "MiB"),
            ("batch.max_files", files.max_files.into(), 1, 100_000, "files"),
            ("batch.max_store_mib", files.max_store_mib.into(), 1, 1 << 24, "MiB"),
            ("batch.retention_hours", files.retention_hours.into(), 1, 87_600, "hours"),
        ]
    }

    /// What is no range.
    fn check_rules(&self) -> Result<(), ConfigError> {
        let (sched, policy) = (&self.sched, &self.policy);
        let batch = u64::from(sched.max_batch_tokens);
        let rule = |good: bool, key: &'static str, found: &dyn std::fmt::Display, rule: &str| {
            if good { Ok(()) } else { Err(ConfigError::Value { key, found: found.to_string(), rule: rule.to_owned() }) }
        };
        let block = sched.block_tokens;
        rule(block.is_multiple_of(16), "sched.block_tokens", &block, "a multiple of 16")?;
        let running = "at least sched.max_running: each running sequence decodes a token a step";
        rule(batch >= sched.max_running.into(), "sched.max_batch_tokens", &batch, running)?;
        let chunk = u64::from(sched.prefill_chunk_tokens);
        rule(chunk <= batch, "sched.prefill_chunk_tokens", &chunk, "at most sched.max_batch_tokens")?;
        let ring = policy.event_ring;
        let window = self.engine.embed_window_ms;
        rule(window <= MAX_EMBED_WINDOW_MS, "engine.embed_window_ms", &window, "0 to 50 milliseconds")?;
        rule((64..=1 << 22).contains(&ring), "policy.event_ring", &ring, "64 to 4194304 events")?;
        let open = !self.admin.listen.ip().is_loopback() && self.admin.token.is_empty() && self.admin.tokens.is_empty();
        rule(!open, "admin.listen", &self.admin.listen, "not a loopback address, so admin.token must be set")?;
        for device in &self.engine.devices {
            let bad = device.parse::<Wanted>().err();
            rule(bad.is_none(), "engine.devices", device, "auto, cpu or cuda:N")?;
        }
        rule(!self.engine.devices.is_empty(), "engine.devices", &"[]", "at least one of auto, cpu and cuda:N")?;
        self.check_secrets()?;
        upstreams::check(&self.upstreams)?;
        self.registries.iter().try_for_each(|(registry, section)| section.check(registry))?;
        self.check_names()?;
        self.slots.iter().try_for_each(|(name, section)| check_slot(name, section))
    }

    /// Names that nobody else has, and room for one of them.
    fn check_on_demand(&self) -> Result<(), ConfigError> {
        let bad = |key, found: &str, rule: &str| {
            Err(ConfigError::Value { key, found: found.to_owned(), rule: rule.to_owned() })
        };
        let (n, wait_ms) = (self.on_demand.len(), self.engine.load_wait_ms);
        if wait_ms > MAX_LOAD_WAIT_MS {
            return bad("engine.load_wait_ms", &wait_ms.to_string(), "0 to 3600000 milliseconds");
        }
        if n > MAX_ON_DEMAND {
            return bad("on_demand", &n.to_string(), "at most 64 models");
        }
        if n > 0 && self.engine.max_loaded == 0 {
            return bad("engine.max_loaded", "0", "at least 1 where models are loaded on demand");
        }
        for name in self.on_demand.keys() {
            let is_demo = self.engine.demo && DEMO_NAMES.contains(&name.as_str());
            let is_elsewhere = self.upstreams.values().any(|up| up.model == *name || up.variant() == *name);
            if check_spelling(name).is_err() {
                let rule = "1 to 100 letters, digits, `-`, `_`, `.` or `/`, and the same behind a `:` for a variant";
                return bad("on_demand.<name>", name, rule);
            }
            if is_demo || is_elsewhere || self.models.contains_key(name) || self.is_made(name) {
                return bad("on_demand.<name>", name, "a name that no other model, upstream or the demo has");
            }
            let is_known = |model: &str| {
                let is_demo = self.engine.demo && DEMO_NAMES.contains(&model);
                is_demo || self.models.contains_key(model) || self.on_demand.contains_key(model)
            };
            if let Some((model, _)) = name.split_once(':').filter(|(model, _)| !is_known(model)) {
                let rule =
                    format!("a variant of a model of [models] or [on_demand], or of the demo; `{model}` is in none");
                return bad("on_demand.<name>", name, &rule);
            }
        }
        Ok(())
    }

    /// Whether a name is that of a variant that comes with its model.
    fn is_made(&self, name: &str) -> bool {
        let Some((model, variant)) = name.split_once(':') else { return false };
        let of = |section: &BTreeMap<String, PathBuf>| {
            section.get(model).is_some_and(|path| {
                // What a GGUF file's is called shows when it is read.
                let is_stored = variant == "f16" && path.extension().is_some_and(|extension| extension == "gguf");
                self.engine.precisions.iter().any(|precision| precision == variant) && !is_stored
            })
        };
        let is_demo = self.engine.demo && DEMO_NAMES.contains(&model) && ["f16", "q8_0"].contains(&variant);
        is_demo || of(&self.models) || of(&self.on_demand)
    }

    /// A draft model is another one; the rest shows when they are loaded.
    fn check_draft_models(&self) -> Result<(), ConfigError> {
        let bad = |found: &str, rule: &str| {
            Err(ConfigError::Value { key: "draft_models.<name>", found: format!("\"{found}\""), rule: rule.to_owned() })
        };
        let mib = self.engine.draft_kv_mib;
        if !(1..=1 << 20).contains(&mib) {
            let (key, rule) = ("engine.draft_kv_mib", "1 to 1048576 MiB".to_owned());
            return Err(ConfigError::Value { key, found: mib.to_string(), rule });
        }
        for (name, draft) in &self.draft_models {
            if name.contains(':') || check_spelling(name).is_err() {
                return bad(name, "the name of a model; its variants draft with the same one");
            }
            if check_spelling(draft).is_err() || draft.split(':').next() == Some(name) {
                return bad(draft, "another model, a smaller one with the same tokenizer");
            }
        }
        Ok(())
    }

    fn check_secrets(&self) -> Result<(), ConfigError> {
        keys::read(&self.server)?;
        self.server.tls.check("server")?;
        self.admin.tls.check("admin")?;
        self.admin.check_tokens()?;
        KeyRing::new(&self.trust)?;
        Ok(())
    }

    /// Limits of slots that have some here.
    pub(crate) fn budgets(&self) -> BTreeMap<SlotName, Budget> {
        let named = |(name, section): (&String, &SlotSection)| Some((name.parse().ok()?, section.budget));
        self.slots.iter().filter_map(named).filter(|(_, budget)| !budget.is_empty()).collect()
    }

    /// Every label that a replica has, by name.
    pub(crate) fn label_names(&self) -> Vec<String> {
        let names: BTreeSet<&String> = self.replicas.values().flat_map(|section| section.labels.keys()).collect();
        names.into_iter().cloned().collect()
    }

    /// Models that can be told apart, labels and header patterns that can be names of inputs.
    fn check_names(&self) -> Result<(), ConfigError> {
        self.check_on_demand()?;
        self.check_draft_models()?;
        let bad = |key, found: &str, rule: &str| {
            Err(ConfigError::Value { key, found: format!("\"{found}\""), rule: rule.to_owned() })
        };
        let letters = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        for pattern in &self.server.route_headers {
            let name = pattern.strip_suffix('*').unwrap_or(pattern);
            if name.is_empty() || !letters(name) {
                return bad("server.route_headers", pattern, "names of headers in lower case, or a beginning and `*`");
            }
        }
        let labels = self.label_names();
        if labels.len() > MAX_LABELS {
            return bad("replicas.<name>.labels", &labels.join(", "), "at most 16 different names");
        }
        match labels.iter().find(|name| !(1..=MAX_LABEL).contains(&name.len()) || !letters(name)) {
            Some(name) => bad("replicas.<name>.labels", name, "1 to 40 characters of a-z, 0-9 and `-`"),
            None => Ok(()),
        }
    }
}

impl Label {
    /// What a router sees: the number, or a hash of the text that is the same on every host.
    pub(crate) fn number(&self) -> u64 {
        match self {
            Self::Number(number) => *number,
            Self::Text(text) => stable_key(text),
        }
    }
}

impl RegistrySection {
    /// A host that a reference can name, and both halves of the credentials or none.
    fn check(&self, registry: &str) -> Result<(), ConfigError> {
        let named = format!("{OCI_SCHEME}{registry}/r").parse::<Reference>();
        let is_host = matches!(named, Ok(Reference::Oci(reference)) if reference.registry == registry);
        let problem = if !is_host {
            "is not the host of a registry reference, as in `ghcr.io` or `10.0.0.7:5000`"
        } else if self.username.is_empty() != self.password_file.as_os_str().is_empty() {
            "needs both `username` and `password_file`, or neither"
        } else if self.username.contains(':') {
            "has a `:` in its username, which basic authentication cannot carry"
        } else {
            return Ok(());
        };
        Err(ConfigError::Registry { registry: registry.to_owned(), problem })
    }
}

impl ServerSection {
    /// Whether requests need a key.
    pub(crate) fn needs_keys(&self) -> bool {
        self.has_key_file() || !self.api_keys.is_empty()
    }

    pub(crate) fn has_key_file(&self) -> bool {
        !self.api_keys_file.as_os_str().is_empty()
    }
}

impl AdminSection {
    /// Names that the journal can tell apart, and tokens that say something.
    fn check_tokens(&self) -> Result<(), ConfigError> {
        let mut seen = vec![self.token.as_str()];
        for (name, AdminTokenSection { token, .. }) in &self.tokens {
            let good_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            let problem = if !(1..=40).contains(&name.len()) || !name.bytes().all(good_byte) {
                "is not a good name: it must match [a-z0-9-]{1,40}"
            } else if ACTORS.contains(&name.as_str()) {
                "has a name that the journal uses for the host itself; choose another"
            } else if token.is_empty() {
                "has an empty token"
            } else if seen.contains(&token.as_str()) {
                "has the token of another name"
            } else {
                seen.push(token);
                continue;
            };
            return Err(ConfigError::AdminToken { name: name.clone(), problem });
        }
        Ok(())
    }
}

/// A slot that exists, limits that it may have, and a component that could be: a built-in, a digest, a file, a reference to a
/// registry or `native`. One that has only limits needs none.
fn check_slot(name: &str, section: &SlotSection) -> Result<(), ConfigError> {
    let slot = name.parse::<SlotName>().map_err(|error| ConfigError::Shape(format!("slots: {error}")))?;
    let component = section.component.as_str();
    if !section.on_fault.is_open() && slot != SlotName::Sampler {
        let why = "only a sampler can fail closed; elsewhere the native policy decides, so leave it out";
        return Err(ConfigError::Shape(format!("slots.{name}.on_fault: {why}")));
    }
    if !section.budget.is_empty() {
        if let Some(world) = World::of_slot(&slot.to_string()) {
            let fault = |source| ConfigError::Budget { slot: name.to_owned(), source };
            RuntimeConfig::default().limits(world, change(section.budget)).map_err(fault)?;
        }
        if component.is_empty() {
            return Ok(());
        }
    }
    let known = || BUILTINS.iter().map(|b| b.name).chain(["native"]);
    let fault = |source| ConfigError::Component { slot: name.to_owned(), source };
    let named = match component.parse().map_err(fault)? {
        Reference::Native | Reference::Digest(_) | Reference::Oci(_) => return Ok(()),
        Reference::Named { name, .. } => name,
    };
    if known().any(|n| n == named) || Path::new(&named).is_file() {
        return Ok(());
    }
    let nearest = nearest(&named, known()).map(str::to_owned);
    Err(ConfigError::UnknownComponent { slot: name.to_owned(), component: component.to_owned(), nearest })
}

/// The candidate that a person may have meant.
fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = candidates.map(|candidate| (strsim::jaro_winkler(candidate, word), candidate));
    let best = scored.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    (best.0 > 0.7).then_some(best.1)
}

/// Variables with our prefix that are not configuration of the host: those of its clients and of the tests.
const NOT_CONFIG: [&str; 6] = ["ADMIN_URL", "ADMIN_TOKEN", "ADMIN_CA_FILE", "API_KEY", "REQUIRE", "URL"];

/// The one of them that a variable may hold as a whole, as an inline table: secrets are handed to containers so.
const WHOLE_IN_ENV: &str = "server.api_keys";

/// Turns `POINTSMAN_A__B=value` into a table. Where the default is a text, the value is one, whatever it looks like; else it
/// is read as TOML.
fn env_table(env: impl Iterator<Item = (String, String)>, known: &Table) -> Result<Table, ConfigError> {
    let mut table = Table::new();
    for (name, text) in env {
        let Some(path) = name.strip_prefix(ENV_PREFIX).filter(|path| !NOT_CONFIG.contains(path)) else { continue };
        let path: Vec<String> = path.to_ascii_lowercase().split("__").map(str::to_owned).collect();
        let dotted = path.join(".");
        let is_free = |s: &&str| (dotted == *s && dotted != WHOLE_IN_ENV) || dotted.starts_with(&format!("{s}."));
        if let Some(section) = FREE_FORM.into_iter().find(is_free) {
            return Err(ConfigError::NotInEnvironment { name, section });
        }
        let default = path.iter().try_fold(None, |at: Option<&Value>, key| {
            Some(Some(at.map_or_else(|| known.get(key), |value| value.get(key))?))
        });
        let value = match default.flatten() {
            Some(Value::String(_)) => Value::String(text.trim_matches('"').to_owned()),
            _ => {
                let literal = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
                literal.unwrap_or(Value::String(text))
            }
        };
        insert_at(&mut table, &path, value)
            .map_err(|at| ConfigError::Shape(format!("{name}: `{at}` is a value, not a section")))?;
    }
    Ok(table)
}

/// Puts a value at a path; the error is the part of the path that is a value already.
fn insert_at(table: &mut Table, path: &[String], value: Value) -> Result<(), String> {
    let Some((last, parents)) = path.split_last() else { return Ok(()) };
    let mut at = table;
    for parent in parents {
        let entry = at.entry(parent.clone()).or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(inner) = entry else { return Err(parent.clone()) };
        at = inner;
    }
    at.insert(last.clone(), value);
    Ok(())
}

/// Refuses keys that the default tree lacks, naming the nearest one that it has.
fn check_keys(table: &Table, known: &Table, prefix: &str, origin: &str) -> Result<(), ConfigError> {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        let Some(expected) = known.get(key) else {
            let nearest = nearest(key, known.keys().map(String::as_str));
            let nearest = nearest.map(|k| if prefix.is_empty() { k.to_owned() } else { format!("{prefix}.{k}") });
            return Err(ConfigError::UnknownKey { key: path, origin: origin.to_owned(), nearest });
        };
        if let (Value::Table(inner), Value::Table(expected)) = (value, expected)
            && !FREE_FORM.contains(&path.as_str())
        {
            check_keys(inner, expected, &path, origin)?;
        }
    }
    Ok(())
}

/// Says what to do about keys that stand there themselves, and does not repeat them as a reader of their shape would.
fn check_key_texts(merged: &Table) -> Result<(), KeyError> {
    let keys = merged.get("server").and_then(|server| server.get("api_keys"));
    let is_plain = |keys: &Value| keys.as_table().is_none_or(|keys| keys.values().any(|key| !key.is_table()));
    if keys.is_some_and(is_plain) { Err(KeyError::PlainText) } else { Ok(()) }
}

/// Puts `over` on top of `base`, section by section.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => merge(base, over),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn defaults_are_valid() {
        let config = Config::read(None, env(&[])).expect("an empty configuration is one");
        assert_eq!(config, Config::default());
        config.validate().expect("defaults are valid");
    }

    #[test]
    fn the_environment_overrides_by_path() {
        let pairs = [
            ("POINTSMAN_SCHED__MAX_BATCH_TOKENS", "1024"),
            ("POINTSMAN_LOG__LEVEL", "debug"),
            ("POINTSMAN_ADMIN__TOKEN", "12345"),
            ("HOME", "/"),
        ];
        let config = Config::read(None, env(&pairs)).expect("good keys");
        assert_eq!((config.sched.max_batch_tokens, config.log.level.as_str()), (1_024, "debug"));
        assert_eq!(config.admin.token, "12345", "a text may look like a number");
        let hash = format!("sha256:{}", "0".repeat(64));
        let keys = format!("{{ ci = {{ hash = \"{hash}\", priority = \"low\" }} }}");
        let pairs = [("POINTSMAN_SERVER__API_KEYS", &*keys), ("POINTSMAN_API_KEY", "of a client")];
        let config = Config::read(None, env(&pairs)).expect("an inline table");
        config.validate().expect("a good key");
        assert_eq!((config.server.api_keys["ci"].hash.as_str(), config.server.needs_keys()), (&*hash, true));
    }

    #[test]
    fn wrong_input_names_what_to_change() {
        for (pairs, expect) in [
            (&[("POINTSMAN_SCHED__MAX_BACH_TOKENS", "1")][..], "did you mean `sched.max_batch_tokens`?"),
            (&[("POINTSMAN_SHED__MAX_RUNNING", "1")], "did you mean `sched`?"),
            (&[("POINTSMAN_SCHED__MAX_RUNNING", "many")], "invalid type"),
            (&[("POINTSMAN_SCHED", "1"), ("POINTSMAN_SCHED__MAX_RUNNING", "1")], "not a section"),
            (&[("POINTSMAN_LOG__FORMAT", "xml")], "unknown variant `xml`"),
            (&[("POINTSMAN_SERVER__API_KEYS__Key", "acme")], "set in the configuration file"),
            (&[("POINTSMAN_SERVER__API_KEYS", "pm-x")], "holds a key in plain text; it takes hashes"),
            (&[("POINTSMAN_ADMIN__TOKENS", "{}")], "set in the configuration file"),
        ] {
            let error = Config::read(None, env(pairs)).expect_err(expect).to_string();
            assert!(error.contains(expect), "{pairs:?}: {error}");
        }
        for (pairs, expect) in [
            (&[("POINTSMAN_SCHED__MAX_RUNNING", "0")][..], "`sched.max_running` = 0: 1 to 4096"),
            (&[("POINTSMAN_SCHED__MAX_BATCH_TOKENS", "8")], "at least sched.max_running"),
            (&[("POINTSMAN_ADMIN__LISTEN", "0.0.0.0:8081")], "admin.token must be set"),
            (&[("POINTSMAN_ENGINE__DEVICES", "[\"gpu\"]")], "`engine.devices` = gpu: auto, cpu or cuda:N"),
            (&[("POINTSMAN_ENGINE__EMBED_WINDOW_MS", "51")], "`engine.embed_window_ms` = 51: 0 to 50 milliseconds"),
            (&[("POINTSMAN_ENGINE__DEVICES", "[]")], "at least one of auto, cpu and cuda:N"),
        ] {
            let config = Config::read(None, env(pairs)).expect("well-formed");
            let error = config.validate().expect_err(expect).to_string();
            assert!(error.contains(expect), "{pairs:?}: {error}");
        }
    }

    #[test]
    fn a_file_is_read_and_its_faults_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pointsman.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("it can be written");
            Config::read(Some(&path), env(&[("POINTSMAN_SCHED__MAX_RUNNING", "3")]))
        };
        let text = "[sched]\nmax_running = 2\nmax_waiting = 9\n[slots.router]\ncomponent = \"native\"\n";
        let config = read(text).expect("a good file");
        assert_eq!((config.sched.max_running, config.sched.max_waiting), (3, 9));
        assert_eq!(config.slots["router"].component, "native");
        assert_eq!(config.slots["scheduler"], Config::default().slots["scheduler"]);
        let config =
            read("[slots.admission.budget]\nsoft_us = 5\n[slots.router.budget]\nhard_ms = 2\n").expect("limits");
        config.validate().expect("limits alone are a section");
        let expect = [("admission", Some(5), None), ("router", None, Some(2))];
        let budgets = config.budgets();
        assert!(
            budgets
                .iter()
                .map(|(slot, b)| (slot.to_string(), b.soft_us, b.hard_ms))
                .eq(expect.map(|(slot, soft, hard)| (slot.to_owned(), soft, hard)))
        );
        for (text, expect) in
            [("[sched", "not valid TOML"), ("[sched]\nmax_runing = 1", "did you mean `sched.max_running`?")]
        {
            let error = read(text).expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
        for (text, expect) in [
            ("[server.api_keys]\npm-x = \"acme\"", "holds a key in plain text; it takes hashes"),
            ("[server.api_keys]\nci = { hash = \"pm-x\" }", "the API key `ci`: a key's hash is `sha256:`"),
            ("[server]\napi_keys_file = \"/nowhere/keys.toml\"", "server.api_keys_file /nowhere/keys.toml: "),
            ("[admin.tls]\ncert_file = \"x\"", "admin.tls needs both `cert_file` and `key_file`"),
            ("[admin.tokens]\nci = { token = \"x\" }", "missing field `role`"),
            ("[admin.tokens]\nci = { token = \"x\", role = \"root\" }", "unknown variant `root`"),
            ("[admin.tokens]\nci = { token = \"\", role = \"read\" }", "admin.tokens.ci has an empty token"),
            ("[admin.tokens]\nhost = { token = \"x\", role = \"read\" }", "uses for the host itself"),
            (
                "[admin]\ntoken = \"x\"\n[admin.tokens]\nci = { token = \"x\", role = \"read\" }",
                "token of another name",
            ),
            ("[trust.keys]\nci = \"x\"", "trust.keys.ci is not an Ed25519 public key"),
            ("[registries.\"a/b\"]", "is not the host of a registry reference"),
            ("[registries.\"ghcr.io\"]\nusername = \"ci\"", "needs both `username` and `password_file`"),
            ("[registries.\"ghcr.io\"]\npassword = \"x\"", "unknown field `password`"),
            ("[slots.router]\ncomponent = \"oci://x\"", "names no repository"),
            ("[slots.router]\ncomponent = \"route-weighted@sha256:12\"", "64 lower-case hexadecimal digits"),
            ("[slots.router]\ncomponent = \"route-weigted\"", "did you mean `route-weighted`?"),
            ("[slots.admission]\nconfig = {}", "slots.admission.component = \"\" is no built-in"),
            ("[slots.router.budget]\nsoft = 1", "unknown field `soft`"),
            ("[slots.router]\non_fault = \"closed\"", "slots.router.on_fault: only a sampler can fail closed"),
            ("[slots.router.budget]\nhard_ms = 0", "slots.router.budget: a budget of 0 us soft and 0 us hard"),
            (
                "[slots.router.budget]\nsoft_us = 20000",
                "slots.router.budget: a budget of 20000 us soft and 10000 us hard",
            ),
            (
                "[slots.admission.budget]\nmemory_mib = 257",
                "slots.admission.budget: a budget of 269484032 bytes of memory",
            ),
        ] {
            let error = match read(text) {
                Ok(config) => config.validate().expect_err(expect).to_string(),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(expect), "{error}");
        }
        let missing = Config::read(Some(&folder.path().join("none.toml")), env(&[])).expect_err("no file").to_string();
        assert!(missing.contains("cannot read the configuration"), "{missing}");
    }

    #[test]
    fn models_on_demand_have_names_of_their_own_and_room() {
        for (text, expect) in [
            ("[on_demand]\n\"m:v:2\" = \"/m\"", "`on_demand.<name>` = m:v:2: 1 to 100 letters"),
            (
                "[on_demand]\n\"m:v2\" = \"/m\"",
                "a variant of a model of [models] or [on_demand], or of the demo; `m` is in none",
            ),
            ("[on_demand]\n\"demo:q8_0\" = \"/m\"", "a name that no other model, upstream or the demo has"),
            ("[on_demand]\n\"m:f16\" = \"/m\"\n[models]\nm = \"/m\"", "a name that no other model, upstream"),
            ("[on_demand]\ndemo-mini = \"/m\"", "a name that no other model, upstream or the demo has"),
            ("[on_demand]\nm = \"/m\"\n[models]\nm = \"/m\"", "a name that no other model, upstream or the demo has"),
            ("[on_demand]\nm = \"/m\"\n[engine]\nmax_loaded = 0", "`engine.max_loaded` = 0: at least 1"),
        ] {
            let table: Table = text.parse().expect("it is TOML");
            let config: Config = Value::Table(table).try_into().expect("of the right shape");
            let error = config.validate().expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
    }

    #[test]
    fn the_examples_list_every_key_with_its_default() {
        let text = include_str!("../../../pointsman.example.toml");
        let example: Table = text.parse().expect("the example is TOML");
        assert_eq!(example, Table::try_from(Config::default()).expect("defaults serialise"));
        let mut keys = Vec::new();
        scalar_keys(&example, ENV_PREFIX, &mut keys);
        let env = include_str!("../../../.env.example");
        let pairs: Vec<(String, String)> = env
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
            .collect();
        let listed: Vec<String> = pairs.iter().map(|(key, _)| key.clone()).collect();
        assert_eq!(listed.iter().collect::<std::collections::BTreeSet<_>>(), keys.iter().collect());
        assert_eq!(Config::read(None, pairs.into_iter()).expect("good keys"), Config::default());
    }

    fn scalar_keys(table: &Table, prefix: &str, keys: &mut Vec<String>) {
        for (key, value) in table.iter().filter(|(key, _)| *key != "slots") {
            match value {
                Value::Table(inner) => scalar_keys(inner, &format!("{prefix}{}__", key.to_uppercase()), keys),
                _ => keys.push(format!("{prefix}{}", key.to_uppercase())),
            }
        }
    }
}
