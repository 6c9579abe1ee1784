//! What the host does for a decode step of the CUDA engine: lists, tables and rules written, graphs replayed, tokens read. The device
//! here computes nothing and its calls cost nothing, so that the figures are the engine's own part and the same without a GPU.
//! Bar: 20 us for all of the host's part, to which planning, the driver's calls and handing tokens on add
//! (`pointsman_step_host_seconds`).

use std::sync::Arc;
use std::time::Duration;

use pointsman_benches::{each_call, header, plan};
use pointsman_engine::cuda::{
    CudaEngine, CudaOptions, Device, DeviceError, DeviceInfo, DeviceLaunch, Element, Form, GraphId, Lane, LibraryUse,
    Rows, Source, Turn, VramFree,
};
use pointsman_engine::{EngineConfig, ModelSpec, Precision};
use pointsman_sched::execute::{InHalves as _, StepOutput, StepPlan};
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::NoEdits;

/// Llama-3.1-8B.
const LLAMA_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#;

/// Rows and positions of each.
const SHAPES: [(u32, u32); 6] = [(1, 1_024), (8, 1_024), (32, 1_024), (64, 1_024), (128, 1_024), (32, 8_160)];

/// Has host memory and nothing else.
#[derive(Debug)]
struct Nothing {
    info: DeviceInfo,
    lanes: [Vec<u32>; Lane::COUNT],
    allocated: u64,
}

impl Device for Nothing {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&mut self) -> Result<VramFree, DeviceError> {
        Ok(VramFree { total: 80 << 30, free: 80 << 30 })
    }

    fn enter(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn load(&mut self, _: &[(usize, String)]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64, DeviceError> {
        self.allocated += bytes.next_multiple_of(256);
        Ok(self.allocated)
    }

    fn allocate_lane(&mut self, lane: Lane, words: usize) -> Result<(), DeviceError> {
        self.lanes[lane.index()] = vec![0; words];
        Ok(())
    }

    fn lane(&mut self, lane: Lane) -> &mut [u32] {
        &mut self.lanes[lane.index()]
    }

    fn upload(&mut self, _: u64, _: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn download(&mut self, _: u64, _: &mut [u32]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn send(&mut self, _: Lane, _: u64, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn send_rows(&mut self, _: Lane, _: usize, _: u64, _: Rows) -> Result<(), DeviceError> {
        Ok(())
    }

    fn receive(&mut self, _: Lane, _: u64, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn launch(&mut self, _: &DeviceLaunch<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn start_timer(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn stop_timer(&mut self) -> Result<f64, DeviceError> {
        Ok(0.0)
    }

    fn captures(&self) -> bool {
        true
    }

    fn begin_capture(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn end_capture(&mut self) -> Result<GraphId, DeviceError> {
        Ok(GraphId(0))
    }

    fn replay(&mut self, _: GraphId) -> Result<(), DeviceError> {
        Ok(())
    }

    fn mark(&mut self, _: Turn) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reach(&mut self, _: Turn) -> Result<(), DeviceError> {
        Ok(())
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// As on an H100.
fn nothing() -> Nothing {
    let info = DeviceInfo { name: "nothing".to_owned(), n_sms: 132, capability: (9, 0) };
    Nothing { info, lanes: Default::default(), allocated: 0 }
}

/// The same step with these rules for each row.
fn with_sampling(mut plan: StepPlan, sampling: &Sampling) -> StepPlan {
    let sampling = Arc::new(sampling.clone());
    plan.rows.iter_mut().filter_map(|row| row.sample.as_mut()).for_each(|sample| {
        sample.sampling = Arc::clone(&sampling);
    });
    plan
}

fn main() {
    header("gpu_step: the host's part of a decode step of the CUDA engine, 8B, on a device that computes nothing");
    let spec = ModelSpec::from_config(LLAMA_8B.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
    let config = EngineConfig {
        n_blocks: 32_768,
        block_tokens: 16,
        max_step_tokens: 2_048,
        max_rows: 128,
        context_tokens: 8_192,
    };
    let form = Form { element: Element::Bf16, precision: Precision::F16 };
    let options = CudaOptions { form, graphs: true, library: LibraryUse::Faster };
    let loaded = CudaEngine::load(Box::new(nothing()), (spec, Source::Random(1)), config, options, &mut |_| true);
    let mut engine = loaded.unwrap_or_else(|e| panic!("{e}"));
    let sampled = Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::default() };
    for (rows, position) in SHAPES {
        for (rules, sampling) in [("", &Sampling::default()), (", sampled", &sampled)] {
            let step = with_sampling(plan(rows, position, 1), sampling);
            let behind = StepPlan { follows: (0..rows).collect(), ..with_sampling(plan(rows, position, 1), sampling) };
            let mut out = StepOutput::default();
            engine.begin(&step, &mut NoEdits).unwrap_or_else(|e| panic!("{e}"));
            let percentiles = each_call(1_000, 10_000, || {
                engine.begin(&behind, &mut NoEdits).unwrap_or_else(|e| panic!("{e}"));
                engine.finish(&behind, &mut out).unwrap_or_else(|e| panic!("{e}"));
            });
            engine.finish(&behind, &mut out).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(out.sampled.len(), rows as usize);
            percentiles.print(&format!("{rows} x {position}{rules}"), Some(Duration::from_micros(20)));
        }
    }
}
