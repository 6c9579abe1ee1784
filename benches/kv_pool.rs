//! The bookkeeping of a step without an engine: scheduling and settling with the native policy, and prefix look-ups. The host
//! may cost 20 us per step without a policy.

use std::sync::Arc;
use std::time::Duration;

use pointsman_benches::{Samples, header, now};
use pointsman_sched::batch::NativeBatch;
use pointsman_sched::config::Config;
use pointsman_sched::draft::DraftMethod;
use pointsman_sched::execute::{Sampled, StepOutput};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::prefix::chain_hashes;
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::request::{Request, Sampling, SinkEvent, SinkState, TokenSink};
use pointsman_sched::scheduler::Scheduler;
use pointsman_telemetry::Event;

const BLOCK_TOKENS: u32 = 16;

#[derive(Debug)]
struct Sink;

impl TokenSink for Sink {
    fn push(&mut self, _event: SinkEvent) -> SinkState {
        SinkState::Open
    }
}

fn request(id: u64, prompt_tokens: u32) -> Request {
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| i * 7 % 1_000 + u32::try_from(id).unwrap_or(0)).collect();
    Request {
        id: RequestId(id),
        tenant: 1,
        tenant_name: "acme".into(),
        session: 0,
        priority: Priority::Normal,
        arrived: 1,
        deadline: 0,
        block_hashes: chain_hashes(&prompt, BLOCK_TOKENS).into(),
        prompt: prompt.into(),
        max_new_tokens: 4_000,
        min_new_tokens: 0,
        stop_tokens: Arc::from([]),
        sampling: Arc::new(Sampling::default()),
        attributes: Arc::default(),
        transient: false,
        draft_tokens: 0,
        draft_method: DraftMethod::Ngram,
        fork_of: None,
        mask: None,
        router_generation: 0,
        sink: Box::new(Sink),
    }
}

/// Steps of `n` decoding sequences.
fn decode_steps(n: u32) {
    let config = Config {
        block_tokens: BLOCK_TOKENS,
        n_blocks: 65_536,
        max_running: n,
        step_tokens: n.max(512),
        max_waiting: n,
        prefill_chunk: 512,
        starvation_us: 1 << 40,
        context_tokens: 8_192,
    };
    let gauges = Arc::<ReplicaGauges>::default();
    let sketch = Arc::new(PrefixSketch::new(config.n_blocks));
    let mut scheduler = Scheduler::new(config, 1, gauges, sketch).unwrap_or_else(|e| panic!("{e}"));
    for id in 1..=u64::from(n) {
        assert!(scheduler.submit(request(id, 128), 1).is_ok(), "the pool is large enough");
    }
    let mut observe = |_: Event| {};
    let mut policy = NativeBatch;
    let mut output = StepOutput::default();
    let mut samples = Samples::default();
    for step in 0..3_000u64 {
        let start = now();
        let Some(plan) = scheduler.schedule(step + 2, &mut policy, &mut observe) else { break };
        let planned = start.elapsed();
        let sampling = plan.rows.iter().filter(|row| row.sample.is_some()).count();
        output.sampled.clear();
        output.sampled.extend((0..sampling).map(|_| Sampled { token: 5, logprobs: None }));
        let settling = now();
        scheduler.complete(step + 3, &mut output, &mut observe);
        if step > 500 {
            samples.add(planned + settling.elapsed());
        }
    }
    let bar = (n == 32).then_some(Duration::from_micros(20));
    samples.percentiles().print(&format!("schedule + complete, {n} decoding sequences"), bar);
}

fn main() {
    header("kv_pool: the bookkeeping of a step, native policy, no engine");
    for n in [1, 32, 256] {
        decode_steps(n);
    }
    let prompt: Vec<u32> = (0..4_096).collect();
    let mut samples = Samples::default();
    for _ in 0..5_000 {
        let start = now();
        let hashes = chain_hashes(std::hint::black_box(&prompt), BLOCK_TOKENS);
        samples.add(start.elapsed());
        std::hint::black_box(hashes);
    }
    samples.percentiles().print("hashing the blocks of a 4,096-token prompt", None);
}
