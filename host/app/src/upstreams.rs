//! Upstreams of the configuration become rows in the catalog: a variant of a model's alias, with a replica per server.
//!
//! They stand behind the variants that are served here, and share their tokenizer where there are some, so that a prompt is
//! counted once, before the router has chosen.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32};
use std::time::Duration;

use anyhow::{Context, bail};
use pointsman_sched::ids::ReplicaId;
use pointsman_sched::publish::PrefixSketch;
use pointsman_server::Secret;
use pointsman_server::ports::{Clock, Elsewhere, Encoder, Replica, Variant};
use pointsman_server::text::TextModel;
use pointsman_server::upstream::{Protocol, Roots, Upstream, UpstreamTerms};
use pointsman_server::{Validity, validity};
use pointsman_telemetry::{Metrics, NameKind};
use serde::{Deserialize, Serialize};

use crate::clock::SystemClock;
use crate::config::{Config, ReplicaSection};
use crate::files;
use crate::models::{Loaded, labels, stable_key};
use crate::serve::Shared;

/// Number of the first upstream in the column `replica.device`, above those of all devices; the others follow in the order of
/// their names.
const FIRST_DEVICE: u64 = 1 << 32;
/// Upstreams of one host: each is a row of every decision about its model.
const MAX_UPSTREAMS: usize = 64;

/// A server elsewhere that speaks `OpenAI`'s API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct UpstreamSection {
    pub url: String,
    pub protocol: ProtocolName,
    /// PEM file with the authorities that may vouch for it, read at the start and at SIGHUP; empty for those of the machine.
    pub ca_file: PathBuf,
    /// The name under which it is served here: an alias, of this host's models or of its own.
    pub model: String,
    pub serves: Serves,
    /// What its variant is called, as in `demo:remote`; upstreams of one model and variant are replicas of it.
    pub variant: String,
    /// What the upstream calls the model; empty for `model`.
    pub upstream_model: String,
    /// File with its API key, read at the start; empty for none.
    pub api_key_file: PathBuf,
    /// Environment variable with its API key; empty for none.
    pub api_key_env: String,
    pub max_in_flight: u32,
    pub context_tokens: u32,
    /// Opened at the start.
    pub connections: u32,
    pub connect_timeout_ms: u64,
    pub first_byte_timeout_ms: u64,
    /// Until another is asked as well; 0: none is.
    pub hedge_after_ms: u64,
    pub idle_timeout_ms: u64,
    pub max_answer_mib: u32,
    pub probe_path: String,
    /// Read with each probe; empty: not.
    pub metrics_path: String,
    /// 0: none.
    pub probe_interval_ms: u64,
    pub probe_failures: u32,
}

/// What is spoken to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ProtocolName {
    /// Over TLS what it chooses, HTTP/1.1 in the clear.
    #[default]
    Auto,
    Http1,
    Http2,
}

/// What it is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Serves {
    /// Conversations and completions.
    #[default]
    Text,
    Embeddings,
}

/// What is wrong with one, with what it must be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SectionError {
    #[error("{MAX_UPSTREAMS} upstreams are the most, found {0}")]
    TooMany(usize),
    #[error("upstreams.{name}: the name must match [a-z0-9-]{{1,40}} and be none of a device")]
    Name { name: String },
    #[error("upstreams.{name}.{key} = {found}: {rule}")]
    Value { name: String, key: &'static str, found: String, rule: String },
}

impl Default for UpstreamSection {
    fn default() -> Self {
        Self {
            url: String::new(),
            protocol: ProtocolName::Auto,
            ca_file: PathBuf::new(),
            model: String::new(),
            serves: Serves::Text,
            variant: "remote".to_owned(),
            upstream_model: String::new(),
            api_key_file: PathBuf::new(),
            api_key_env: String::new(),
            max_in_flight: 64,
            context_tokens: 32_768,
            connections: 2,
            connect_timeout_ms: 2_000,
            first_byte_timeout_ms: 30_000,
            hedge_after_ms: 0,
            idle_timeout_ms: 30_000,
            max_answer_mib: 64,
            probe_path: "/health".to_owned(),
            metrics_path: String::new(),
            probe_interval_ms: 5_000,
            probe_failures: 3,
        }
    }
}

// === checking ===

/// Checks what types cannot say.
///
/// # Errors
/// The first value out of bounds, with its rule.
pub(crate) fn check(sections: &BTreeMap<String, UpstreamSection>) -> Result<(), SectionError> {
    if sections.len() > MAX_UPSTREAMS {
        return Err(SectionError::TooMany(sections.len()));
    }
    sections.iter().try_for_each(|(name, section)| section.check(name))
}

fn is_word(text: &str) -> bool {
    let letters = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    (1..=40).contains(&text.len()) && text.bytes().all(letters)
}

impl UpstreamSection {
    fn check(&self, name: &str) -> Result<(), SectionError> {
        if !is_word(name) || name.contains('_') || matches!(name, "cpu" | "null") {
            return Err(SectionError::Name { name: name.to_owned() });
        }
        let fault =
            |key, found: String, rule: String| Err(SectionError::Value { name: name.to_owned(), key, found, rule });
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
        if !(1..=100).contains(&self.model.len()) || !self.model.bytes().all(good) {
            let rule = "1 to 100 letters, digits, `-`, `_`, `.` or `/`: the name by which requests ask for it";
            return fault("model", format!("\"{}\"", self.model), rule.to_owned());
        }
        if !is_word(&self.variant) {
            let rule = "1 to 40 characters of a-z, 0-9, `-` and `_`";
            return fault("variant", format!("\"{}\"", self.variant), rule.to_owned());
        }
        if !self.api_key_file.as_os_str().is_empty() && !self.api_key_env.is_empty() {
            return fault(
                "api_key_env",
                format!("\"{}\"", self.api_key_env),
                "only one of it and api_key_file".to_owned(),
            );
        }
        if self.has_ca() && !self.url.starts_with("https://") {
            let rule = "only with a URL of https://: in the clear there is no certificate".to_owned();
            return fault("ca_file", self.ca_file.display().to_string(), rule);
        }
        if self.hedge_after_ms >= self.first_byte_timeout_ms {
            let rule = "less than first_byte_timeout_ms, or 0 for never".to_owned();
            return fault("hedge_after_ms", self.hedge_after_ms.to_string(), rule);
        }
        let bounds: [(&'static str, u64, u64, u64, &'static str); 10] = [
            ("max_in_flight", self.max_in_flight.into(), 1, 65_536, "requests"),
            ("context_tokens", self.context_tokens.into(), 1, 1 << 24, "tokens"),
            ("connections", self.connections.into(), 0, 1_024, "connections"),
            ("connect_timeout_ms", self.connect_timeout_ms, 1, 60_000, "milliseconds"),
            ("first_byte_timeout_ms", self.first_byte_timeout_ms, 1, 3_600_000, "milliseconds"),
            ("hedge_after_ms", self.hedge_after_ms, 0, 3_600_000, "milliseconds (0: never)"),
            ("idle_timeout_ms", self.idle_timeout_ms, 1, 3_600_000, "milliseconds"),
            ("max_answer_mib", self.max_answer_mib.into(), 1, 1_024, "MiB"),
            ("probe_interval_ms", self.probe_interval_ms, 0, 3_600_000, "milliseconds (0: none)"),
            ("probe_failures", self.probe_failures.into(), 1, 1_000, "probes"),
        ];
        match bounds.into_iter().find(|(_, found, least, most, _)| !(least..=most).contains(&found)) {
            Some((key, found, least, most, unit)) => fault(key, found.to_string(), format!("{least} to {most} {unit}")),
            None => Ok(()),
        }
    }

    pub(crate) fn variant(&self) -> String {
        format!("{}:{}", self.model, self.variant)
    }

    /// As in `demo:remote@east`.
    fn replica(&self, name: &str) -> String {
        format!("{}@{name}", self.variant())
    }

    fn api_key(&self) -> anyhow::Result<Option<Secret>> {
        let key = if !self.api_key_env.is_empty() {
            #[expect(clippy::disallowed_methods, reason = "the app reads the environment, once, at the start")]
            let key = std::env::var(&self.api_key_env);
            key.with_context(|| format!("api_key_env: the environment has no `{}`", self.api_key_env))?
        } else if !self.api_key_file.as_os_str().is_empty() {
            files::read_text(&self.api_key_file).context("api_key_file")?
        } else {
            return Ok(None);
        };
        if key.trim().is_empty() {
            bail!("its API key is empty");
        }
        Ok(Some(Secret::new(key.trim())))
    }

    /// Whether it has authorities of its own.
    pub(crate) fn has_ca(&self) -> bool {
        !self.ca_file.as_os_str().is_empty()
    }

    /// Who may vouch for it, read now.
    pub(crate) fn roots(&self) -> anyhow::Result<Roots> {
        Ok(if self.has_ca() { Roots::Pem(files::read(&self.ca_file).context("ca_file")?) } else { Roots::System })
    }

    /// When its authorities are valid, where it has some of its own that say it.
    pub(crate) fn ca_validity(&self) -> Option<Validity> {
        validity(&files::read(&self.ca_file).ok().filter(|_| self.has_ca())?)
    }

    /// One that can be used as it is configured; nothing is sent to it.
    pub(crate) fn open(
        &self,
        name: &str,
        clock: &Arc<SystemClock>,
        metrics: &Metrics,
    ) -> anyhow::Result<Arc<Upstream>> {
        Ok(Upstream::new(self.terms(name)?, Arc::clone(clock) as Arc<dyn Clock>, metrics)?)
    }

    fn terms(&self, name: &str) -> anyhow::Result<UpstreamTerms> {
        let named = if self.upstream_model.is_empty() { &self.model } else { &self.upstream_model };
        Ok(UpstreamTerms {
            name: name.into(),
            url: self.url.clone(),
            protocol: match self.protocol {
                ProtocolName::Auto => Protocol::Auto,
                ProtocolName::Http1 => Protocol::Http1,
                ProtocolName::Http2 => Protocol::Http2,
            },
            roots: self.roots()?,
            model: named.clone(),
            api_key: self.api_key()?,
            max_in_flight: self.max_in_flight,
            connections: self.connections,
            connect_timeout: Duration::from_millis(self.connect_timeout_ms),
            first_byte_timeout: Duration::from_millis(self.first_byte_timeout_ms),
            hedge_after: Duration::from_millis(self.hedge_after_ms),
            idle_timeout: Duration::from_millis(self.idle_timeout_ms),
            max_answer_bytes: (self.max_answer_mib as usize) << 20,
            probe_path: self.probe_path.clone(),
            metrics_path: self.metrics_path.clone(),
            probe_interval: Duration::from_millis(self.probe_interval_ms),
            probe_failures: self.probe_failures,
        })
    }
}

// === into the catalog ===

/// Names of the replicas that the upstreams will be.
pub(crate) fn replicas(config: &Config) -> impl Iterator<Item = String> + '_ {
    let replicas = config.upstreams.iter().filter(|(_, section)| section.serves == Serves::Text);
    replicas.map(|(name, section)| section.replica(name))
}

/// Whether an upstream makes embeddings under this name.
pub(crate) fn makes_embeddings(config: &Config, model: &str) -> bool {
    config.upstreams.values().any(|section| section.serves == Serves::Embeddings && section.model == model)
}

/// Adds the variants and the models for embeddings that upstreams serve.
///
/// # Errors
/// One cannot be used as it is configured, or has a name that something here has.
pub(crate) fn add(config: &Config, shared: &Shared, loaded: &mut Loaded) -> anyhow::Result<()> {
    add_encoders(config, shared, loaded)?;
    let local: Vec<String> = loaded.variants.iter().map(|variant| variant.id.to_string()).collect();
    let mut variants: BTreeMap<String, Variant> = BTreeMap::new();
    for (device, (name, section)) in (FIRST_DEVICE..).zip(&config.upstreams) {
        if section.serves == Serves::Embeddings {
            continue;
        }
        let id = section.variant();
        if local.contains(&id) {
            bail!("upstreams.{name}: this host serves a variant `{id}` itself; choose another name with `variant`");
        }
        let model = &section.model;
        if makes_embeddings(config, model) || loaded.encoders.iter().any(|encoder| *encoder.model.name == **model) {
            bail!("upstreams.{name}.model: `{model}` makes embeddings; choose another name for what generates text");
        }
        let upstream = section.open(name, &shared.clock, &shared.metrics);
        let upstream = upstream.with_context(|| format!("upstreams.{name}"))?;
        let replica = Arc::new(replica(config, shared, (device, &section.replica(name), &id), upstream)?);
        match variants.get_mut(&id) {
            Some(variant) => {
                variant.context_tokens = variant.context_tokens.min(section.context_tokens);
                variant.replicas.push(replica);
            }
            None => drop(variants.insert(id, variant(config, shared, (section, replica), loaded)?)),
        }
    }
    loaded.variants.extend(variants.into_values().map(Arc::new));
    Ok(())
}

fn add_encoders(config: &Config, shared: &Shared, loaded: &mut Loaded) -> anyhow::Result<()> {
    let mut encoders: BTreeMap<&str, Encoder> = BTreeMap::new();
    let sections = config.upstreams.iter().filter(|(_, section)| section.serves == Serves::Embeddings);
    for (name, section) in sections {
        let (model, max_tokens) = (&*section.model, section.context_tokens);
        if loaded.encoders.iter().any(|encoder| *encoder.model.name == *model)
            || loaded.variants.iter().any(|variant| *variant.alias == *model || *variant.id == *model)
        {
            bail!("upstreams.{name}.model: this host serves a model `{model}` itself; choose another name");
        }
        let upstream = section.open(name, &shared.clock, &shared.metrics);
        let upstream = upstream.with_context(|| format!("upstreams.{name}"))?;
        let replica: Arc<str> = format!("{model}@{name}").into();
        let encoder = encoders.entry(model).or_insert(Encoder {
            name: model.into(),
            replica: Arc::clone(&replica),
            text: Arc::new(TextModel::estimate()?),
            max_tokens,
            dimensions: None,
            created: shared.clock.unix_seconds(),
            upstreams: Vec::new(),
        });
        encoder.max_tokens = encoder.max_tokens.min(max_tokens);
        encoder.upstreams.push(Elsewhere { replica, upstream });
    }
    loaded.elsewhere.extend(encoders.into_values().map(Arc::new));
    Ok(())
}

fn variant(
    config: &Config,
    shared: &Shared,
    (section, replica): (&UpstreamSection, Arc<Replica>),
    loaded: &Loaded,
) -> anyhow::Result<Variant> {
    let here = loaded.variants.iter().find(|variant| *variant.alias == *section.model);
    let text = here.map_or_else(|| TextModel::estimate().map(Arc::new), |here| Ok(Arc::clone(&here.text)))?;
    Ok(Variant {
        id: section.variant().into(),
        alias: section.model.as_str().into(),
        text,
        context_tokens: section.context_tokens,
        block_tokens: config.sched.block_tokens,
        draft_model: None,
        created: shared.clock.unix_seconds(),
        replicas: vec![replica],
    })
}

fn replica(
    config: &Config,
    shared: &Shared,
    (device, name, variant): (u64, &str, &str),
    upstream: Arc<Upstream>,
) -> anyhow::Result<Replica> {
    let section = config.replicas.get(name);
    let id = shared.names.intern(NameKind::Replica, name);
    if *shared.names.name(NameKind::Replica, id) != *name {
        bail!("there are too many replicas: {name} cannot have a number of its own");
    }
    Ok(Replica {
        id: ReplicaId(id),
        key: stable_key(name),
        name: name.into(),
        device,
        variant: shared.names.intern(NameKind::Variant, variant).into(),
        weight: AtomicU32::new(section.map_or(ReplicaSection::default().weight, |section| section.weight)),
        health: AtomicU8::new(0),
        // Nobody waits here for an upstream: its places are its bound.
        max_waiting: u32::MAX,
        started: shared.clock.now(),
        labels: labels(config, section),
        gauges: Arc::clone(upstream.gauges()),
        upstream: Some(upstream),
        scores_prompts: true,
        sketch: Arc::new(PrefixSketch::new(0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_upstreams_are_named_with_their_rule() {
        let section = |text: &str| toml::from_str::<UpstreamSection>(text).map_err(|error| error.to_string());
        for (name, text, expect) in [
            ("east", "model = \"demo\"\nurl = \"http://x\"", None),
            ("East", "model = \"demo\"", Some("upstreams.East: the name must match")),
            ("cpu", "model = \"demo\"", Some("none of a device")),
            ("east", "", Some("upstreams.east.model = \"\": 1 to 100 letters")),
            ("east", "model = \"a\"\nvariant = \"a:b\"", Some("upstreams.east.variant")),
            ("east", "model = \"a\"\nmax_in_flight = 0", Some("max_in_flight = 0: 1 to 65536 requests")),
            ("east", "model = \"a\"\napi_key_env = \"A\"\napi_key_file = \"b\"", Some("only one of it")),
            ("east", "model = \"a\"\napi_key = \"secret\"", Some("unknown field `api_key`")),
            (
                "east",
                "model = \"a\"\nurl = \"http://x\"\nca_file = \"ca.pem\"",
                Some("ca_file = ca.pem: only with a URL"),
            ),
            ("east", "model = \"a\"\nprotocol = \"http3\"", Some("expected one of `auto`, `http1`, `http2`")),
        ] {
            let checked = section(text).and_then(|section| section.check(name).map_err(|error| error.to_string()));
            match expect {
                None => assert_eq!(checked, Ok(())),
                Some(expect) => assert!(checked.as_ref().is_err_and(|e| e.contains(expect)), "{checked:?}"),
            }
        }
        let many = (0..65).map(|n| (format!("u{n}"), UpstreamSection::default())).collect();
        assert!(matches!(check(&many), Err(SectionError::TooMany(65))));
    }
}
