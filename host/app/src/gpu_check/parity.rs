//! Whether the GPU computes what it should: each kernel against a reference, and whole steps against the CPU.

use std::collections::BTreeMap;

use pointsman_engine::ComputePool;
use pointsman_engine::cuda::cases::{self, Case, CaseError, CaseRunner, Placement};
use pointsman_engine::cuda::{Device, ParityCase};
use serde_json::json;

use super::Check;

/// Cases of each kernel, and of each whose sums are cut, in a small check, which NVIDIA's memory checker shall finish in a minute.
const FEW: usize = 2;

/// Of so many cases one is run with launches that overlap, too: no multiple of the three types, so that each has some.
const OVERLAPPING: usize = 4;

/// Threads of the CPU that is compared with.
const MOST_THREADS: usize = 16;

impl Check<'_> {
    pub(super) fn kernels(&mut self) -> anyhow::Result<()> {
        for kind in self.types.clone() {
            if self.small {
                let of = kind.element().map_or("without a type".to_owned(), |element| format!("in {element}"));
                let cases = few(kind.element().map_or_else(cases::untyped, cases::typed));
                self.run_cases(&format!("kernels {of}, few cases of each"), &cases, Placement::Apart)?;
                continue;
            }
            let Some(element) = kind.element() else {
                self.run_cases("kernels without a type", &cases::untyped(), Placement::Fenced)?;
                continue;
            };
            self.run_cases(&format!("kernels in {element}"), &cases::typed(element), Placement::Fenced)?;
            self.run_cases(&format!("large kernels in {element}"), &cases::large(element), Placement::Fenced)?;
        }
        Ok(())
    }

    fn run_cases(&mut self, what: &str, cases: &[Case], placement: Placement) -> anyhow::Result<()> {
        let mut gpu = self.open(false)?;
        gpu.enter()?;
        let mut runner = CaseRunner::new(&mut gpu, placement)?;
        let (mut n_good, mut n_run) = (BTreeMap::<&str, u32>::new(), 0);
        let (passed, cases): (Vec<&Case>, Vec<&Case>) =
            cases.iter().partition(|case| self.passed.contains(&case.call.kernel));
        if !passed.is_empty() {
            let words = format!("{} cases of {what} are passed over, as asked", passed.len());
            self.report.judge(false, &words, json!({"passed_over": what, "count": passed.len()}))?;
        }
        for case in &cases {
            if self.is_late() {
                self.report.uncompared(what, cases.len() - n_run)?;
                break;
            }
            n_run += 1;
            self.report.tries(Some(&case.call.kernel))?;
            match runner.run(case) {
                Ok(()) => *n_good.entry(&case.call.kernel).or_default() += 1,
                Err(error) => {
                    let words = format!("{}: {error}", case.what);
                    self.report.judge(false, &words, json!({"case": case.what, "error": error.to_string()}))?;
                    if let CaseError::Device(fault) = error
                        && fault.is_lost()
                    {
                        // Nothing works any more: the bundle's script begins again without this kernel.
                        self.report
                            .say(&format!("lost at: {}", case.call.kernel), json!({"lost_at": case.call.kernel}))?;
                        return Err(fault.into());
                    }
                }
            }
        }
        self.report.tries(None)?;
        let n: u32 = n_good.values().sum();
        let words = format!("{what}: {n} of {n_run} cases are right, of {} kernels", n_good.len());
        let json = json!({"kernels": what, "right": n_good, "run": n_run});
        // Those that are wrong, or were not run, were judged one by one.
        if cases.is_empty() && passed.is_empty() {
            self.report.judge(false, &format!("{what}: there are no cases"), json)
        } else if n as usize == n_run && n_run > 0 {
            self.report.judge(true, &words, json)
        } else {
            self.report.say(&words, json)
        }
    }

    /// Whether there is cuBLASLt; where it is not, or no GPU any more, that is said.
    fn has_library(&mut self) -> anyhow::Result<bool> {
        let why = match self.open(false) {
            Ok(gpu) if gpu.has_library() => return Ok(true),
            Ok(gpu) => gpu.notes().join("; "),
            Err(error) => format!("{error:#}"),
        };
        self.report.say(&format!("nothing is compared by cuBLASLt: {why}"), json!({"cublaslt": false, "why": why}))?;
        Ok(false)
    }

    pub(super) fn parity(&mut self) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = ComputePool::start(cores.min(MOST_THREADS))?;
        let of = |name: &'static str, overlap, cases: Vec<ParityCase>| {
            cases.into_iter().map(move |case| (name, overlap, case))
        };
        if self.small {
            let cases = of("small", false, ParityCase::small()).collect();
            return self.compare_all(cases, &pool);
        }
        // As a host serves them first.
        let mut cases: Vec<_> = of("graphs", false, ParityCase::all())
            .chain(of("weights in 8 bits", false, ParityCase::in_8_bits()))
            .chain(of("sparse experts", false, ParityCase::experts()))
            .chain(of("launched one by one", false, ParityCase::eager()))
            .chain(of("steps begun behind others", false, ParityCase::ahead()))
            .chain(of("decodes beside chunks", false, ParityCase::beside()))
            .chain(of("drafts", false, ParityCase::drafted()))
            .chain(of("a long context", false, ParityCase::long()))
            .chain(of("prompts that are scored", false, ParityCase::scored()))
            .chain(of("a pool that shrinks and grows", false, ParityCase::resized()))
            .collect();
        if self.overlaps {
            cases.extend(of("overlapping launches in graphs", true, ParityCase::all()).step_by(OVERLAPPING));
            cases.extend(of("steps begun behind others, overlapping launches", true, ParityCase::ahead()));
            cases.extend(of("a long context, overlapping launches", true, ParityCase::long()));
            cases.extend(of("sparse experts, overlapping launches", true, ParityCase::experts()));
        }
        if self.has_library()? {
            cases.extend(of("prompts by cuBLASLt", false, ParityCase::by_library()));
            let overlapping = of("prompts by cuBLASLt, overlapping launches", true, ParityCase::by_library());
            cases.extend(overlapping.step_by(OVERLAPPING).filter(|_| self.overlaps));
        }
        self.compare_all(cases, &pool)
    }

    /// Those of the types that are asked for, each with its name and whether launches overlap.
    fn compare_all(
        &mut self,
        mut cases: Vec<(&'static str, bool, ParityCase)>,
        pool: &ComputePool,
    ) -> anyhow::Result<()> {
        cases.retain(|(.., case)| self.types.iter().any(|kind| kind.element() == Some(case.form.element)));
        let n_cases = cases.len();
        if cases.is_empty() {
            let words = "there are no comparisons with the CPU of these types";
            return self.report.judge(false, words, json!({"parity": null}));
        }
        for (i, (name, overlap, case)) in cases.into_iter().enumerate() {
            if self.is_late() {
                return self.report.uncompared("the comparisons with the CPU", n_cases - i);
            }
            let device = match self.open(overlap) {
                Ok(gpu) => Box::new(gpu),
                // After a fault that took it.
                Err(error) => {
                    let why = format!("{error:#}");
                    return self.report.uncompared_because("the comparisons with the CPU", n_cases - i, &why);
                }
            };
            let spec = case.spec()?;
            let what = format!(
                "{} as on the CPU, {name}: {} heads of {} on {}",
                case.form, spec.heads, spec.head_dim, spec.kv_heads
            );
            match case.run(device, pool) {
                Ok(parity) => {
                    let json = json!({"parity": what, "worst": parity.worst, "worst_logprob": parity.worst_logprob,
                        "tokens": parity.tokens, "other_tokens": parity.other_tokens});
                    self.report.judge(parity.is_good(), &format!("{what}: {parity}"), json)?;
                }
                Err(error) => self.report.judge(false, &format!("{what}: {error}"), json!({"parity": what}))?,
            }
        }
        Ok(())
    }
}

/// The first cases of each kernel.
fn few(cases: Vec<Case>) -> Vec<Case> {
    let mut taken = BTreeMap::<(String, bool), usize>::new();
    let is_early = |case: &Case| {
        // Sums of a product that is cut into runs are joined by code that others never reach.
        let n = taken.entry((case.call.kernel.clone(), case.call.grid[2] > 1)).or_default();
        *n += 1;
        *n <= FEW
    };
    cases.into_iter().filter(is_early).collect()
}
