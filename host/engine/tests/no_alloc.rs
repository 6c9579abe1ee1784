//! A step allocates nothing after the first: counted, not promised. A test of its own, because it replaces the global allocator.
#![expect(unsafe_code, reason = "`GlobalAlloc` is an unsafe trait, and nothing else counts allocations")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Weights};
use pointsman_sched::execute::{Executor, Row, Sample, StepOutput, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::NoEdits;

/// Of all threads, since a step works on several.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call goes to `System` with the caller's own arguments; the counter does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` above, hence from `System`, with this `layout`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often each plan runs.
const N_ROUNDS: u64 = 10;

/// `rows` sequences, each computing `n` tokens from `position` on, of which the last `drafts` are drafts.
fn plan(rows: u32, position: u32, n: u32, drafts: u32) -> StepPlan {
    let mut plan = StepPlan::default();
    for row in 0..rows {
        plan.tokens.extend((0..n).map(|i| 7 * row + 31 * i + 11));
        plan.blocks.extend((4 * row..4 * (row + 1)).map(BlockId));
        let sampling = Arc::new(Sampling::default());
        plan.rows.push(Row {
            request: RequestId(u64::from(row) + 1),
            tokens: row * n..(row + 1) * n,
            position,
            blocks: 4 * row..4 * (row + 1),
            sample: Some(Sample { sampling, index: 0, history: 0..0, history_prompt: 0, banned: None }),
            drafts,
        });
    }
    plan
}

#[test]
fn a_step_allocates_nothing_after_the_first() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../app/demo/demo-mini");
    let plans = [plan(1, 40, 1, 0), plan(8, 40, 1, 0), plan(1, 0, 40, 0), plan(3, 5, 17, 0), plan(2, 40, 4, 3)];
    for precision in [Precision::F16, Precision::Q8_0] {
        let spec = ModelSpec::from_config(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let model = Arc::new(Model::load(spec, &Weights::open(&folder).unwrap(), precision).unwrap());
        for n_threads in [1, 2] {
            let config =
                EngineConfig { n_blocks: 32, block_tokens: 16, max_step_tokens: 64, max_rows: 8, context_tokens: 64 };
            let pool = ComputePool::start(n_threads).unwrap();
            let mut engine = CpuEngine::new(Arc::clone(&model), pool, config).unwrap();
            let mut out = StepOutput::default();
            plans.iter().for_each(|plan| engine.execute(plan, &mut NoEdits, &mut out).unwrap());
            let mut allocations = || {
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                for _ in 0..N_ROUNDS {
                    plans.iter().for_each(|plan| engine.execute(plan, &mut NoEdits, &mut out).unwrap());
                }
                ALLOCATIONS.load(Ordering::Relaxed) - before
            };
            // The thread of the test harness may come to its turn in the middle of one; what steps allocate, most do.
            let mut counted: Vec<u64> = (0..5).map(|_| allocations()).collect();
            counted.sort_unstable();
            let allocated = counted[2];
            // The queues through which work reaches other threads take a block now and then, whatever the work.
            let allowed = if n_threads == 1 { 0 } else { N_ROUNDS };
            assert!(allocated <= allowed, "{allocated} allocations, {precision:?}, {n_threads} threads");
        }
    }
}
