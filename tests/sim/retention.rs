//! A retention policy that ranks at random, now and then wrongly, and checks what it is shown. Half of all histories have it,
//! whatever else they are about: no order of eviction may break the books, or change an answer.

use std::sync::{Arc, Mutex};

use pointsman_policy::{Activation, Maintenance, Runtime, RuntimeConfig, Slot};
use pointsman_sched::batch::{Attention, NativeBatch};
use pointsman_sched::config::Config;
use pointsman_sched::draft::DraftMethod;
use pointsman_sched::execute::{Executor, StepOutput};
use pointsman_sched::ids::{Micros, Priority, RequestId};
use pointsman_sched::prefix::chain_hashes;
use pointsman_sched::publish::PrefixSketch;
use pointsman_sched::request::{Request, Sampling, SinkEvent, SinkState, TokenSink};
use pointsman_sched::retention::{
    BadRanking, BlockColumns, MAX_ROWS, NativeRetention, Ranking, RetentionPolicy, check_ranking,
};
use pointsman_sched::sampler::NoEdits;
use pointsman_sched::scheduler::Scheduler;
use pointsman_telemetry::{Metrics, Recorder};

use crate::executor::ModelEngine;
use crate::rng::Rng;

/// The retention policy of a history.
pub(crate) fn of_seed(seed: u64) -> Box<dyn RetentionPolicy> {
    if seed.is_multiple_of(2) {
        Box::new(Shuffler { rng: Rng::new(seed ^ 0x7368_656c_6600), spoiled: false })
    } else {
        Box::new(NativeRetention)
    }
}

struct Shuffler {
    rng: Rng,
    /// The last ranking was wrong on purpose.
    spoiled: bool,
}

impl RetentionPolicy for Shuffler {
    fn attend(&mut self, _now: Micros) -> Attention {
        match self.rng.below(40) {
            0 => Attention::Native,
            1 => Attention::NeedsView,
            _ => Attention::Following,
        }
    }

    fn rank(&mut self, now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        assert!(wanted > 0 && (1..=MAX_ROWS).contains(&blocks.len()));
        assert!(blocks.last_used.is_sorted(), "the host's own order");
        assert!(blocks.last_used.iter().zip(&blocks.created).all(|(used, created)| created <= used && *used <= now));
        for row in 0..u32::try_from(blocks.len()).expect("few rows") {
            let list = self.rng.pick(&[Some(true), Some(false), None]);
            let Some(evict) = list else { continue };
            let list = if evict { &mut ranking.evict } else { &mut ranking.keep };
            let place = self.rng.below(list.len() as u64 + 1);
            list.insert(usize::try_from(place).expect("an index"), row);
        }
        self.spoiled = self.rng.chance(50_000);
        if self.spoiled {
            ranking.evict.push(ranking.keep.first().copied().unwrap_or(u32::MAX));
        }
        assert_eq!(check_ranking(ranking, blocks.len(), &mut Vec::new()).is_err(), self.spoiled);
        self.rng.chance(900_000)
    }

    fn refused(&mut self, _now: Micros, why: BadRanking) {
        assert!(self.spoiled, "{why}");
    }
}

/// A replica whose cache holds a third of what passes between two turns of an assistant.
const SMALL: Config = Config {
    block_tokens: 16,
    n_blocks: 256,
    max_running: 4,
    step_tokens: 256,
    max_waiting: 8,
    prefill_chunk: 256,
    starvation_us: 1 << 40,
    context_tokens: 1_024,
};
/// Tokens of the assistant's system prompt.
const SYSTEM: u32 = 512;
/// Requests of a batch job between two turns.
const FLOOD: u64 = 20;
/// Turns.
const TURNS: u64 = 40;

#[derive(Debug)]
struct Cached(Arc<Mutex<u32>>);

impl TokenSink for Cached {
    fn push(&mut self, event: SinkEvent) -> SinkState {
        if let SinkEvent::Started { cached_tokens, .. } = event {
            *self.0.lock().expect("one thread") += cached_tokens;
        }
        SinkState::Open
    }
}

/// Share of an assistant's prompt tokens that it finds cached, beside a batch job of another tenant.
fn hit_rate(policy: &mut dyn RetentionPolicy) -> f64 {
    let sketch = Arc::new(PrefixSketch::new(SMALL.n_blocks));
    let mut scheduler = Scheduler::new(SMALL, 1, Arc::default(), sketch).expect("a good configuration");
    let mut engine = ModelEngine::new(SMALL.n_blocks, SMALL.block_tokens);
    let cached = Arc::new(Mutex::new(0));
    let mut asked = 0;
    for id in 1..=TURNS * (FLOOD + 1) {
        let own = u32::try_from(id).expect("few requests") * 1_000;
        let is_turn = id % (FLOOD + 1) == 0;
        let shared = if is_turn { 0..SYSTEM } else { 0..0 };
        let prompt: Vec<u32> = shared.chain(own..own + if is_turn { 64 } else { 600 }).collect();
        asked += if is_turn { prompt.len() } else { 0 };
        let counts = if is_turn { Arc::clone(&cached) } else { Arc::default() };
        let request = Request {
            id: RequestId(id),
            tenant: if is_turn { 1 } else { 2 },
            tenant_name: if is_turn { "assistant".into() } else { "batch".into() },
            priority: Priority::Normal,
            arrived: id,
            session: 0,
            deadline: 0,
            block_hashes: chain_hashes(&prompt, SMALL.block_tokens).into(),
            prompt: prompt.into(),
            max_new_tokens: 4,
            min_new_tokens: 0,
            stop_tokens: Arc::default(),
            sampling: Arc::new(Sampling::default()),
            attributes: Arc::default(),
            transient: false,
            draft_tokens: 0,
            draft_method: DraftMethod::Ngram,
            fork_of: None,
            mask: None,
            router_generation: 0,
            sink: Box::new(Cached(counts)),
        };
        scheduler.submit(request, id).map_err(|(_, failure)| failure).expect("room");
        let mut out = StepOutput::default();
        while !scheduler.is_idle() {
            scheduler.review_cache(id, policy);
            let plan = scheduler.schedule(id, &mut NativeBatch, &mut |_| {}).expect("work");
            engine.execute(plan, &mut NoEdits, &mut out).expect("the model does not fail");
            scheduler.complete(id, &mut out, &mut |_| {});
        }
        scheduler.assert_consistent();
    }
    f64::from(*cached.lock().expect("one thread")) / asked as f64
}

/// The share under least recent use, and with the assistant pinned by the committed guest.
pub(crate) fn hit_rates() -> [f64; 2] {
    let config = RuntimeConfig { maintenance: Maintenance::Manual, ..RuntimeConfig::default() };
    let runtime = Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(64), Arc::new(|| 1)).expect("a runtime");
    let path = pointsman_tests::root().join("plugins/prebuilt/kv-lru-with-pins.wasm");
    let component = runtime.admit(&std::fs::read(path).expect("a committed guest")).expect("a good one");
    let slot = runtime.retention_slot("kv-retention");
    let activation = Activation {
        slot: "kv-retention".into(),
        generation: 1,
        config: r#"{"tenants": ["assistant"]}"#.into(),
        ..Activation::default()
    };
    slot.publish(runtime.prepare(&component, activation).expect("it starts")).expect("it is newer");
    let mut guest = slot.attach(&"replica".into());
    let rates = [hit_rate(&mut NativeRetention), hit_rate(&mut guest)];
    assert_eq!(slot.status().faults.iter().sum::<u64>(), 0);
    rates
}
