//! Models on disk or in the binary become variants with replicas on the CPU device.
//!
//! A model folder is a Hugging Face folder. The embedded demo is served as the variants `demo:f16` and `demo:q8_0` under the
//! alias `demo`, the second quantised at load from the first; every other model is served as it is stored, as one variant.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32};

use anyhow::{Context, bail};
use pointsman_engine::{ComputePool, CpuConfig, CpuEngine, KvPlan, Model, ModelSpec, Precision, Weights};
use pointsman_sched::config::Config as SchedConfig;
use pointsman_sched::ids::{Micros, ReplicaId};
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::route::NO_LABEL;
use pointsman_server::ports::{Replica, Variant};
use pointsman_server::text::{TextFiles, TextModel};
use pointsman_telemetry::{NameKind, Names};
use serde_json::Value;

use crate::config::{Config, Label, ReplicaSection};

/// One replica with its engine, before its driver takes it.
#[derive(Debug)]
pub(crate) struct LoadedReplica {
    /// What the server sees.
    pub replica: Arc<Replica>,
    /// Its variant, as in `demo:f16`.
    pub variant: Arc<str>,
    /// Computes for it.
    pub engine: CpuEngine,
    /// Bounds of its scheduler.
    pub sched: SchedConfig,
}

/// Everything that was loaded for the CPU device.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// For the catalog.
    pub variants: Vec<Arc<Variant>>,
    /// For the driver.
    pub replicas: Vec<LoadedReplica>,
}

/// The files of a model, wherever they come from.
struct ModelFiles<'a> {
    name: &'a str,
    config: &'a [u8],
    text: TextFiles<'a>,
    weights: Weights,
    precisions: &'a [Precision],
}

/// Loads models one after the other onto the CPU.
#[derive(Debug)]
pub(crate) struct Loader<'a> {
    config: &'a Config,
    names: &'a Names,
    pool: ComputePool,
    created: u64,
    started: Micros,
    loaded: Loaded,
}

/// Index of the CPU in columns and events.
const CPU: u64 = 0;

macro_rules! demo_file {
    ($path:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/", $path)).as_slice()
    };
}

// === impl Loader ===

impl<'a> Loader<'a> {
    /// Starts the compute pool. `created` is what `GET /v1/models` reports, in Unix seconds; `started` the same moment on the
    /// host's clock.
    ///
    /// # Errors
    /// The pool's threads cannot be started.
    pub(crate) fn start(
        config: &'a Config,
        names: &'a Names,
        (created, started): (u64, Micros),
    ) -> anyhow::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if config.engine.threads == 0 { cores } else { config.engine.threads };
        let pool = ComputePool::start(threads)?;
        Ok(Self { config, names, pool, created, started, loaded: Loaded::default() })
    }

    /// Loads the demo (if configured) and every configured model.
    ///
    /// # Errors
    /// The first model that cannot be used, with what is wrong with which file.
    pub(crate) fn load_all(mut self) -> anyhow::Result<Loaded> {
        if self.config.engine.demo {
            self.load_demo().context("the embedded demo model")?;
        }
        for (name, path) in &self.config.models {
            self.load_folder(name, path).with_context(|| format!("model `{name}` in {}", path.display()))?;
        }
        if self.loaded.variants.is_empty() {
            bail!("no model to serve: set engine.demo = true or add one with --model NAME=FOLDER");
        }
        let replicas: Vec<&str> = self.loaded.replicas.iter().map(|r| &*r.replica.name).collect();
        if let Some(unknown) = self.config.replicas.keys().find(|name| !replicas.contains(&name.as_str())) {
            bail!("replicas.\"{unknown}\" in the configuration names no replica; there are: {}", replicas.join(", "));
        }
        Ok(self.loaded)
    }

    fn load_demo(&mut self) -> anyhow::Result<()> {
        let text = TextFiles {
            tokenizer: demo_file!("tokenizer.json"),
            tokenizer_config: Some(demo_file!("tokenizer_config.json")),
            generation_config: Some(demo_file!("demo/generation_config.json")),
            ..TextFiles::default()
        };
        self.load(ModelFiles {
            name: "demo",
            config: demo_file!("demo/config.json"),
            text,
            weights: Weights::from_bytes(demo_file!("demo/model.safetensors"))?,
            precisions: &[Precision::F16, Precision::Q8_0],
        })?;
        self.load(ModelFiles {
            name: "demo-mini",
            config: demo_file!("demo-mini/config.json"),
            text: TextFiles { generation_config: Some(demo_file!("demo-mini/generation_config.json")), ..text },
            weights: Weights::from_bytes(demo_file!("demo-mini/model.safetensors"))?,
            precisions: &[Precision::F16],
        })
    }

    fn load_folder(&mut self, name: &str, folder: &Path) -> anyhow::Result<()> {
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
        if name.is_empty() || name.len() > 100 || !name.bytes().all(good) {
            bail!("a model's name has 1 to 100 letters, digits, `-`, `_`, `.` or `/`");
        }
        let read = |file: &str| std::fs::read(folder.join(file)).with_context(|| format!("cannot read {file}"));
        let (config, tokenizer) = (read("config.json")?, read("tokenizer.json")?);
        let tokenizer_config = read("tokenizer_config.json").ok();
        let generation_config = read("generation_config.json").ok();
        let chat_template = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        let text = TextFiles {
            tokenizer: &tokenizer,
            tokenizer_config: tokenizer_config.as_deref(),
            generation_config: generation_config.as_deref(),
            chat_template: chat_template.as_deref(),
            eos_token_ids: &[],
        };
        let weights = Weights::open(folder)?;
        self.load(ModelFiles { name, config: &config, text, weights, precisions: &[Precision::F16] })
    }

    fn load(&mut self, files: ModelFiles<'_>) -> anyhow::Result<()> {
        if self.loaded.variants.iter().any(|v| &*v.alias == files.name) {
            bail!("there is a model of this name already; choose another, or leave the demo out (engine.demo = false)");
        }
        let spec = ModelSpec::from_config(files.config)?;
        let eos = eos_token_ids(files.config);
        let text = Arc::new(TextModel::from_files(&TextFiles { eos_token_ids: &eos, ..files.text })?);
        if text.vocabulary() as usize > spec.vocab {
            bail!(
                "the tokenizer knows {} tokens and the model {}: they do not belong together",
                text.vocabulary(),
                spec.vocab
            );
        }
        for &precision in files.precisions {
            let model = Arc::new(Model::load(spec.clone(), &files.weights, precision)?);
            let suffix = match precision {
                Precision::F16 => "f16",
                Precision::Q8_0 => "q8_0",
            };
            let id: Arc<str> = format!("{}:{suffix}", files.name).into();
            self.add_variant(files.name, id, model, &text)?;
        }
        Ok(())
    }

    /// A variant with one replica on the CPU.
    fn add_variant(
        &mut self,
        alias: &str,
        id: Arc<str>,
        model: Arc<Model>,
        text: &Arc<TextModel>,
    ) -> anyhow::Result<()> {
        let section = &self.config.sched;
        let context_tokens = model.spec().context;
        let kv_bytes = (self.config.engine.kv_mib as usize) << 20;
        let kv = KvPlan::for_memory(model.spec(), section.block_tokens as usize, kv_bytes);
        if kv.n_blocks == 0 {
            bail!(
                "engine.kv_mib = {} does not hold one block of this model ({} bytes)",
                self.config.engine.kv_mib,
                kv.block_bytes
            );
        }
        let sched = SchedConfig {
            block_tokens: section.block_tokens,
            n_blocks: u32::try_from(kv.n_blocks).context("engine.kv_mib is too large")?,
            max_running: section.max_running,
            step_tokens: section.max_batch_tokens,
            max_waiting: section.max_waiting,
            prefill_chunk: section.prefill_chunk_tokens,
            starvation_us: section.starvation_ms * 1_000,
            context_tokens: u32::try_from(context_tokens).context("the model's context is too long")?,
        };
        let engine = CpuConfig {
            n_blocks: kv.n_blocks,
            block_tokens: kv.block_tokens,
            max_step_tokens: section.max_batch_tokens as usize,
            max_rows: section.max_running as usize,
            context_tokens,
        };
        let engine = CpuEngine::new(model, self.pool.clone(), engine)?;
        let replica = Arc::new(self.replica(&id, &sched));
        if self.loaded.replicas.iter().any(|loaded| loaded.replica.id == replica.id) {
            bail!("there are too many replicas: {} cannot have a number of its own", replica.name);
        }
        self.loaded.variants.push(Arc::new(Variant {
            id: Arc::clone(&id),
            alias: alias.into(),
            text: Arc::clone(text),
            context_tokens: sched.context_tokens,
            block_tokens: sched.block_tokens,
            created: self.created,
            replicas: vec![Arc::clone(&replica)],
        }));
        self.loaded.replicas.push(LoadedReplica { replica, variant: id, engine, sched });
        Ok(())
    }

    fn replica(&self, variant: &Arc<str>, sched: &SchedConfig) -> Replica {
        let name: Arc<str> = format!("{variant}@cpu").into();
        let section = self.config.replicas.get(&*name);
        let label = |label: String| {
            let value = section.and_then(|s| s.labels.get(&label));
            (label.into(), value.map_or(NO_LABEL, Label::number))
        };
        Replica {
            // The number under which events and telemetry hooks know the name.
            id: ReplicaId(self.names.intern(NameKind::Replica, &name)),
            key: stable_key(&name),
            name,
            device: CPU,
            variant: self.names.intern(NameKind::Variant, variant).into(),
            weight: AtomicU32::new(section.map_or(ReplicaSection::default().weight, |s| s.weight)),
            health: AtomicU8::new(0),
            max_waiting: sched.max_waiting,
            started: self.started,
            labels: self.config.label_names().into_iter().map(label).collect(),
            gauges: Arc::<ReplicaGauges>::default(),
            sketch: Arc::new(PrefixSketch::new(sched.n_blocks)),
        }
    }
}

/// A hash that is the same on every host and in every version (FNV-1a), for rendezvous hashing by routers.
pub(crate) fn stable_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// `eos_token_id` of config.json: a number, a list, or nothing.
fn eos_token_ids(config: &[u8]) -> Vec<u32> {
    let value: Value = serde_json::from_slice(config).unwrap_or_default();
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match &value["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eos_ids_come_in_three_shapes() {
        for (config, expect) in
            [("{}", vec![]), (r#"{"eos_token_id": 2}"#, vec![2]), (r#"{"eos_token_id": [2, 3]}"#, vec![2, 3])]
        {
            assert_eq!(eos_token_ids(config.as_bytes()), expect, "{config}");
        }
    }

    #[test]
    fn keys_are_the_same_everywhere() {
        assert_eq!(stable_key("demo:f16@cpu"), 0x0809_e4f0_90b1_09c7_u64, "a change would move every sticky session");
    }
}
