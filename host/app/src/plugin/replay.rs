//! `pointsman plugin run`: recorded inputs through a policy, its decisions as a table, beside those of another.
//!
//! Each decision is asked for in the situation that was recorded, not in the one to which the policy's earlier decisions would
//! have led: that takes a simulator. Two decisions are the same when they come to the same: the row that a request goes to
//! (with room on every row, which a recording does not tell), the requests that a step starts and drops, whether a request
//! enters and as what, the blocks that go first, the edits that hold.

mod calls;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use pointsman_policy::{RouterSlot, SchedulerGuest, SchedulerSlot, Slot, World};
use pointsman_sched::admit::Verdict;
use pointsman_sched::batch::{Answer as Stepped, Attention, BatchPolicy, Budgets, Changes, Plan, Rest, View};
use pointsman_sched::route::{Choice, RoutePolicy, resolve};
use pointsman_server::admin::wire::calls::{AdmissionCall, AdmissionLine, RetentionLine, SamplerLine};
use pointsman_server::admin::wire::decision::{
    Answer, LastLine, Line, PlanSeen, RouterLine, SchedulerCall, SchedulerLine,
};
use serde_json::{Value, json};

use calls::{Calls, Held};

use super::host::{Trial, read};
use super::native::HostOrder;
use crate::cli::TrialArgs;

/// Ids of a plan that a table shows.
const SHOWN_IDS: usize = 6;

/// What the policy is compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Against {
    /// What the recording says.
    #[default]
    Recorded,
    /// The host's own policy.
    Native,
    /// Another component, with its default configuration.
    File(std::path::PathBuf),
}

/// What is run, on what, and how it is shown.
#[derive(Debug)]
pub(crate) struct Replay<'a> {
    /// The component.
    pub wasm: &'a Path,
    /// For its `init`, and the labels of its host.
    pub with: &'a TrialArgs,
    /// The recording.
    pub input: &'a Path,
    /// The other policy.
    pub against: Against,
    /// Lines of JSON instead of a table.
    pub json: bool,
}

/// Decisions so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    decisions: u64,
    same: u64,
    faults: u64,
}

/// One side of a comparison.
enum Side {
    Recorded(Held),
    Native,
    Guest(Box<Guest>),
}

/// Both sides, and the host's own order of each replica.
struct Both {
    one: Guest,
    other: Side,
    orders: HashMap<String, HostOrder>,
}

/// What both decided; none for a fault.
type Decisions = (Option<Decision>, Option<Decision>);

/// A component in a runtime of its own.
struct Guest {
    trial: Trial,
    router: Arc<RouterSlot>,
    scheduler: Arc<SchedulerSlot>,
    world: World,
    revision: Arc<str>,
    /// One instance per replica of the recording.
    replicas: HashMap<String, SchedulerGuest>,
    calls: Calls,
}

/// A decision: as it was said, and what it comes to.
#[derive(Clone, Debug, PartialEq)]
struct Decision {
    said: String,
    comes_to: Value,
}

impl Replay<'_> {
    /// Runs the recording through both policies.
    ///
    /// # Errors
    /// A file cannot be read, a component is refused, or the recording has no decision for it.
    pub(crate) fn run(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        let one = Guest::start(self.wasm, self.with)?;
        let other = match &self.against {
            Against::Recorded => Side::Recorded(Held::default()),
            Against::Native => Side::Native,
            Against::File(path) => {
                let with = TrialArgs { config: json!({}), ..self.with.clone() };
                Side::Guest(Box::new(Guest::start(path, &with)?))
            }
        };
        if let Side::Guest(other) = &other
            && other.world != one.world
        {
            bail!("{} is a {} and {} is a {}", self.wasm.display(), one.world, other.revision, other.world);
        }
        let mut both = Both { one, other, orders: HashMap::new() };
        if !self.json {
            let by_request = matches!(both.one.world, World::Router | World::Admission);
            let what = if by_request { "REQUEST" } else { "REPLICA AND TIME" };
            writeln!(out, "{what:<32} {:<36} {:<36} SAME", both.one.revision, both.other.title())?;
        }
        let mut count = Count::default();
        let file = std::fs::File::open(self.input).with_context(|| format!("cannot read {}", self.input.display()))?;
        for (number, text) in (1_u64..).zip(BufReader::new(file).lines()) {
            let line = parse(&text?).with_context(|| format!("{}, line {number}", self.input.display()))?;
            if let Some((what, decisions)) = line.and_then(|line| both.ask(&line)) {
                self.show(&what, decisions, &mut count, out)?;
            }
        }
        self.sum_up(&both.one, &both.other, count, out)
    }

    fn show(&self, what: &str, (one, other): Decisions, count: &mut Count, out: &mut dyn Write) -> anyhow::Result<()> {
        count.decisions += 1;
        count.faults += u64::from(one.is_none());
        let same = one.is_some() && one.as_ref().map(|d| &d.comes_to) == other.as_ref().map(|d| &d.comes_to);
        count.same += u64::from(same);
        let said = |decision: &Option<Decision>| decision.as_ref().map_or("fault".to_owned(), |d| d.said.clone());
        if self.json {
            let comes_to = |decision: &Option<Decision>| decision.as_ref().map(|d| d.comes_to.clone());
            let line = json!({
                "decision": what, "said": said(&one), "comes_to": comes_to(&one),
                "against": { "said": said(&other), "comes_to": comes_to(&other) }, "same": same,
            });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out, "{what:<32} {:<36} {:<36} {}", said(&one), said(&other), if same { "yes" } else { "no" })?;
        }
        Ok(())
    }

    fn sum_up(&self, one: &Guest, other: &Side, count: Count, out: &mut dyn Write) -> anyhow::Result<()> {
        let Count { decisions, same, faults } = count;
        if decisions == 0 {
            bail!("{} has no decision for a {}", self.input.display(), one.world);
        }
        if self.json {
            writeln!(out, "{}", json!({ "decisions": decisions, "same": same, "faults": faults }))?;
        } else {
            let percent = same as f64 * 100.0 / decisions as f64;
            writeln!(
                out,
                "{same} of {decisions} decisions are those of {} ({percent:.1} %); {faults} faults",
                other.title()
            )?;
        }
        match one.last_fault() {
            Some(fault) => bail!("the policy faulted {faults} times, at last: {fault}"),
            None => Ok(()),
        }
    }
}

/// A line of a recording; none for its last one.
fn parse(text: &str) -> anyhow::Result<Option<Line>> {
    let line = serde_json::from_str(text);
    if line.is_err() && serde_json::from_str::<LastLine>(text).is_ok() {
        return Ok(None);
    }
    line.map(Some).context("not a decision; `pointsman policy record` writes them")
}

// === impl Against ===

impl From<&str> for Against {
    fn from(text: &str) -> Self {
        match text {
            "recorded" => Self::Recorded,
            "native" => Self::Native,
            file => Self::File(file.into()),
        }
    }
}

// === impl Both ===

impl Both {
    /// Shows a recorded call to both sides: what it was about, and what they decide, if it asks for a decision.
    fn ask(&mut self, line: &Line) -> Option<(String, Decisions)> {
        let Self { one, other, orders } = self;
        // An instance that faulted is replaced, as the host's maintenance would.
        one.trial.runtime.maintain();
        if let Side::Guest(other) = other {
            other.trial.runtime.maintain();
        }
        let at = |replica: &str, now: u64| format!("{replica} {now}");
        match (line, one.world) {
            (Line::Router(line), World::Router) => {
                Some((line.request.id.to_string(), (one.route(line), other.route(line))))
            }
            (Line::Scheduler(line), World::Scheduler) => {
                let order = orders.entry(line.replica.clone()).or_default();
                step(one, other, order, line).map(|decisions| (at(&line.replica, line.now), decisions))
            }
            (Line::Admission(line), World::Admission) => {
                let decisions = (one.calls.admission(line), other.admission(line));
                match (&line.call, decisions) {
                    (AdmissionCall::Admit { request, .. }, (Some(one), Some(other))) => {
                        Some((request.id.to_string(), (one, other)))
                    }
                    _ => None,
                }
            }
            (Line::Retention(line), World::Retention) => {
                Some((at(&line.replica, line.now), (one.calls.rank(line), other.rank(line))))
            }
            (Line::Sampler(line), World::Sampler) => {
                let decisions = (one.calls.sample(line), other.sample(line));
                (!line.words.is_empty()).then(|| (at(&line.replica, line.now), decisions))
            }
            _ => None,
        }
    }
}

// === impl Side ===

impl Side {
    fn title(&self) -> &str {
        match self {
            Self::Recorded(_) => "the recording",
            Self::Native => "native",
            Self::Guest(guest) => &guest.revision,
        }
    }

    fn route(&mut self, line: &RouterLine) -> Option<Decision> {
        match self {
            Self::Recorded(_) => Some(routed(&line.answer.clone().into(), line)),
            Self::Native => Some(routed(&Choice::Abstain, line)),
            Self::Guest(guest) => guest.route(line),
        }
    }

    fn admission(&mut self, line: &AdmissionLine) -> Option<Option<Decision>> {
        match (self, &line.call) {
            (Self::Guest(guest), _) => guest.calls.admission(line),
            (Self::Recorded(_), AdmissionCall::Admit { answer, .. }) => {
                Some(Some(calls::judge(answer.clone().map(Verdict::from).as_ref())))
            }
            (Self::Native, AdmissionCall::Admit { .. }) => Some(Some(calls::judge(None))),
            (_, AdmissionCall::Settle { .. }) => None,
        }
    }

    fn rank(&mut self, line: &RetentionLine) -> Option<Decision> {
        match self {
            Self::Recorded(_) => Some(calls::rank(line.answer.as_ref().map(|seen| &seen.0), line)),
            Self::Native => Some(calls::rank(None, line)),
            Self::Guest(guest) => guest.calls.rank(line),
        }
    }

    fn sample(&mut self, line: &SamplerLine) -> Option<Decision> {
        match self {
            Self::Recorded(held) => {
                let words = line.renewed.iter().chain(&line.words).map(|(id, word)| (*id, &word.0));
                Some(held.speak(line, words))
            }
            Self::Native => Some(calls::unedited(line)),
            Self::Guest(guest) => guest.calls.sample(line),
        }
    }
}

/// What a choice comes to, with room on every row.
fn routed(choice: &Choice, line: &RouterLine) -> Decision {
    let row = match choice {
        Choice::Reject(_) => json!("rejected"),
        _ => match resolve(choice, &line.replicas, line.request.seed, |_| true) {
            pointsman_sched::route::Resolved::Row(row) => json!(row),
            pointsman_sched::route::Resolved::Full => Value::Null,
        },
    };
    let said = match Answer::from(choice) {
        Answer::Abstain(_) => format!("abstain (native: {row})"),
        Answer::Pick(row) => format!("pick {row}"),
        Answer::Rank(rows) => format!("rank {}", ids(rows.into_iter().map(u64::from).collect())),
        Answer::Reject(rejection) => format!("reject: {}", rejection.message),
    };
    Decision { said, comes_to: row }
}

/// The first ids of a list, as text.
fn ids(list: Vec<u64>) -> String {
    let shown: Vec<String> = list.iter().take(SHOWN_IDS).map(u64::to_string).collect();
    let more = if list.len() > SHOWN_IDS { format!(" and {} more", list.len() - SHOWN_IDS) } else { String::new() };
    shown.join(" ") + &more
}

// === impl Guest ===

impl Guest {
    fn start(wasm: &Path, with: &TrialArgs) -> anyhow::Result<Self> {
        let trial = Trial::patient(&with.labels)?;
        let component = trial.runtime.admit(&read(wasm)?).with_context(|| format!("{} is refused", wasm.display()))?;
        let (router, scheduler) = (trial.runtime.router_slot("router"), trial.runtime.scheduler_slot("scheduler"));
        let prepared = trial.prepare(&component, &with.config, 1)?;
        let (world, revision) = (component.world, Arc::clone(&prepared.revision));
        let calls = Calls::new(&trial.runtime);
        let guest = Self { trial, router, scheduler, world, revision, replicas: HashMap::new(), calls };
        let slot = guest.slot().with_context(|| format!("a {world} takes no decisions that could be compared"))?;
        slot.publish(prepared)?;
        Ok(guest)
    }

    fn slot(&self) -> Option<&dyn Slot> {
        match self.world {
            World::Router => Some(&*self.router),
            World::Scheduler => Some(&*self.scheduler),
            World::Admission => Some(&*self.calls.admission),
            World::Retention => Some(&*self.calls.retention),
            World::Sampler => Some(&*self.calls.sampler),
            World::Telemetry => None,
        }
    }

    fn route(&mut self, line: &RouterLine) -> Option<Decision> {
        let texts = line.request.texts();
        let said = self.router.route(line.now, &line.request.lend(&texts), &line.replicas);
        said.fallback.is_none().then(|| routed(&said.choice, line))
    }

    /// Its policy for a replica.
    fn replica(&mut self, name: &str) -> &mut SchedulerGuest {
        if !self.replicas.contains_key(name) {
            self.replicas.insert(name.to_owned(), self.scheduler.attach(name));
        }
        self.replicas.entry(name.to_owned()).or_insert_with(|| self.scheduler.attach(name))
    }

    fn last_fault(&self) -> Option<String> {
        self.slot()?.status().last_fault.map(|fault| format!("{}: {}", fault.kind.as_str(), fault.message))
    }
}

// === scheduling ===

/// One recorded call, shown to both sides; their decisions if it was a step.
fn step(one: &mut Guest, other: &mut Side, order: &mut HostOrder, line: &SchedulerLine) -> Option<Decisions> {
    let against_native = matches!(other, Side::Native);
    let other_guest = match other {
        Side::Guest(guest) => Some(guest.replica(&line.replica)),
        Side::Recorded(_) | Side::Native => None,
    };
    let one = one.replica(&line.replica);
    match &line.call {
        SchedulerCall::Resync { seed, tenants, waiting, running } => {
            let tenants: Vec<(u32, Arc<str>)> = tenants.iter().map(|(n, name)| (*n, name.as_str().into())).collect();
            let view = View { now: line.now, seed: *seed, budgets: &line.budgets, tenants: &tenants, waiting, running };
            for guest in [Some(one), other_guest].into_iter().flatten() {
                if guest.attend(line.now) != Attention::Native {
                    guest.resync(&view);
                }
            }
            order.resync(&view);
            None
        }
        SchedulerCall::Step { changes, answer, .. } => {
            let mut native = Plan::default();
            if order.attend(line.now) != Attention::Following {
                return None;
            }
            order.step(line.now, &line.budgets, changes, &mut native);
            let ask = |guest: &mut SchedulerGuest| {
                ask(guest, line.now, &line.budgets, changes).map(|plan| planned(plan.as_ref(), order, &native))
            };
            let decided = ask(one);
            let compared = match other_guest {
                Some(guest) => ask(guest),
                None if against_native => Some(planned(None, order, &native)),
                None => Some(planned(answer.as_ref().map(|PlanSeen(plan)| plan), order, &native)),
            };
            Some((decided, compared))
        }
    }
}

/// A guest's plan, none where it leaves the step to the host; `None` for a fault.
fn ask(guest: &mut SchedulerGuest, now: u64, budgets: &Budgets, changes: &Changes) -> Option<Option<Plan>> {
    if guest.attend(now) != Attention::Following {
        return None;
    }
    let mut plan = Plan::default();
    match guest.step(now, budgets, changes, &mut plan) {
        Stepped::Planned => Some(Some(plan)),
        Stepped::Native => (guest.attend(now) == Attention::Following).then_some(None),
    }
}

/// What a plan comes to: who starts, and who is dropped. `native` is the host's order, as far as there are places.
fn planned(plan: Option<&Plan>, order: &HostOrder, native: &Plan) -> Decision {
    let Some(plan) = plan else {
        let said = format!("native: {}", ids(native.admit.clone()));
        return Decision { said, comes_to: json!({ "starts": native.admit, "drops": [] }) };
    };
    let mut starts: Vec<u64> = plan.admit.iter().copied().filter(|id| order.waits(*id)).collect();
    if plan.rest == Rest::HostOrder {
        let rest: Vec<u64> = native.admit.iter().copied().filter(|id| !plan.admit.contains(id)).collect();
        starts.extend(rest);
    }
    starts.truncate(native.admit.len());
    let drops = if plan.drop.is_empty() { String::new() } else { format!(" drop {}", ids(plan.drop.clone())) };
    let said = format!("start {}{drops}", ids(starts.clone()));
    Decision { said, comes_to: json!({ "starts": starts, "drops": plan.drop }) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use pointsman_sched::batch::SequenceColumns;
    use pointsman_sched::ids::{Priority, RequestId};
    use pointsman_sched::route::{ReplicaColumns, RequestNumbers, RouteRequest};
    use pointsman_server::admin::wire::decision::RequestSeen;

    use super::*;

    fn prebuilt(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../plugins/prebuilt/{name}.wasm"))
    }

    /// Two replicas with this much queued; the recorded policy picked `picked`.
    fn routed_line(id: u64, queued: [u32; 2], picked: u32) -> Line {
        let request = RouteRequest {
            id: RequestId(id),
            model: "m",
            tenant: "t",
            tenant_id: 1,
            session: 0,
            prefix: 0,
            priority: Priority::Normal,
            prompt_tokens: 10,
            max_new_tokens: 4,
            arrived: 1,
            deadline: 0,
            seed: u64::MAX - id,
            numbers: RequestNumbers::default(),
            attributes: &[],
        };
        let column = |value| vec![value; 2];
        Line::Router(Box::new(RouterLine {
            now: id,
            request: RequestSeen::of(&request),
            replicas: ReplicaColumns {
                id: vec![0, 1],
                key: vec![7, u64::MAX],
                health: vec![0; 2],
                weight: column(1_000),
                waiting: column(0),
                running: column(0),
                running_limit: column(8),
                queued_tokens: queued.to_vec(),
                free_blocks: column(50),
                total_blocks: column(50),
                cached_tokens: column(0),
                device: vec![0; 2],
                variant: vec![1; 2],
                load: vec![0; 2],
                errors: vec![0; 2],
                age: vec![0; 2],
                predicted_ttft: vec![0; 2],
                kind: vec![0; 2],
                labels: Vec::new(),
            },
            answer: Answer::Pick(picked),
            revision: "r@1.0.0+00000000".into(),
            generation: 1,
            fallback: false,
            chosen: Some(picked),
        }))
    }

    /// Two wait, the longer one arrived first; the recorded policy started the shorter one.
    fn scheduler_lines() -> Vec<Line> {
        let waiting = SequenceColumns {
            id: vec![1, 2],
            prompt_tokens: vec![900, 10],
            max_new_tokens: vec![900, 10],
            cached_tokens: vec![0; 2],
            computed_tokens: vec![0; 2],
            generated_tokens: vec![0; 2],
            held_blocks: vec![0; 2],
            priority: vec![2; 2],
            tenant: vec![1; 2],
            arrived: vec![100, 101],
            deadline: vec![0; 2],
            prefix: vec![0; 2],
            session: vec![0; 2],
        };
        let budgets = Budgets {
            step_tokens: 512,
            running: 1,
            free_blocks: 90,
            total_blocks: 90,
            block_tokens: 16,
            ..Budgets::default()
        };
        let line =
            |now, call| Line::Scheduler(Box::new(SchedulerLine { replica: "m:f16@cpu".into(), now, budgets, call }));
        let plan = Plan { admit: vec![2], rest: Rest::Hold, ..Plan::default() };
        vec![
            line(
                200,
                SchedulerCall::Resync {
                    seed: 1,
                    tenants: vec![(1, "t".into())],
                    waiting,
                    running: SequenceColumns::default(),
                },
            ),
            line(
                201,
                SchedulerCall::Step {
                    changes: Changes::default(),
                    answer: Some(PlanSeen(plan)),
                    revision: "s@1.0.0+00000000".into(),
                    generation: 1,
                },
            ),
        ]
    }

    /// Three requests of one tenant, the first of which is cancelled before the last one comes; all were let in.
    fn admission_lines() -> Vec<Value> {
        let line = |now: u64, call: Value| {
            let mut line = json!({ "slot": "admission", "now": now, "revision": "a@1.0.0+00000000", "generation": 1 });
            line.as_object_mut().expect("an object").extend(call.as_object().expect("an object").clone());
            line
        };
        let load = json!({
            "in_flight": 0, "in_flight_limit": 8, "queued_tokens": 0, "queued_tokens_limit": 9_000,
            "tenant_in_flight": 0, "tenant_queued_tokens": 0,
        });
        let numbers =
            json!({ "choices": 1, "temperature_ppm": 0, "stream": 0, "min_new_tokens": 0, "cache_prompt": 1 });
        let admit = |id: u64| {
            let request = json!({
                "id": id, "model": "m", "tenant": "acme", "tenant_id": 30, "session": 0, "priority": "normal",
                "highest": "normal", "prompt_tokens": 100, "max_new_tokens": 50, "arrived": id, "deadline": 0, "seed": id,
                "numbers": numbers, "attributes": [],
            });
            line(id, json!({ "call": "admit", "request": request, "load": load, "answer": { "accept": true } }))
        };
        let ending = json!({
            "id": 1, "tenant": 30, "outcome": "failed", "prompt_tokens": 100, "cached_tokens": 0, "generated_tokens": 0,
            "max_new_tokens": 50,
        });
        let settle = line(3, json!({ "call": "settle", "tenants": [[30, "acme"]], "endings": [ending] }));
        vec![admit(1), admit(2), settle, admit(4)]
    }

    /// Three blocks, the middle one of which was found three times: one is wanted, then two.
    fn retention_lines() -> Vec<Value> {
        let blocks = json!({
            "prefix": [1, 2, 3], "depth": [0, 0, 0], "children": [0, 0, 0], "last_used": [1, 2, 3], "created": [1, 1, 1],
            "hits": [0, 3, 0], "tenant": [30, 30, 30],
        });
        let line = |wanted: u32| {
            json!({
                "slot": "kv-retention", "replica": "m:f16@cpu", "now": wanted, "wanted": wanted, "tenants": [[30, "acme"]],
                "blocks": blocks, "answer": null, "revision": "k@1.0.0+00000000", "generation": 1,
            })
        };
        vec![line(1), line(2)]
    }

    /// A request that may say one token, and says it.
    fn sampler_lines() -> Vec<Value> {
        let started = json!({ "id": 7, "tenant": "t", "stop_tokens": [2], "prompt_tokens": 5, "max_new_tokens": 10 });
        let line = |now: u64, started: Value, tokens: Value, words: Value| {
            json!({
                "slot": "sampler", "replica": "m:f16@cpu", "variant": "m:f16", "vocabulary": 100, "now": now, "renewed": [],
                "started": started, "tokens": tokens, "ended": [], "words": words, "revision": "s@1.0.0+00000000",
                "generation": 1,
            })
        };
        let first = line(1, json!([started]), json!([]), json!([[7, { "allow": [2, 9] }]]));
        vec![first, line(2, json!([]), json!([[7, 9]]), json!([[7, "keep"]]))]
    }

    fn run(name: &str, config: &Value, against: &str, shown: (bool, usize)) -> (anyhow::Result<()>, String) {
        let (json, times) = shown;
        let file = tempfile::NamedTempFile::new().expect("a file");
        let lines = [routed_line(1, [500, 40], 1), routed_line(2, [40, 500], 1)].into_iter().chain(scheduler_lines());
        let lines = lines.map(|line| json!(line));
        let lines = lines.chain(admission_lines()).chain(retention_lines()).chain(sampler_lines());
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        std::fs::write(file.path(), text.repeat(times) + "{\"dropped\":0}\n").expect("a file");
        let mut said = Vec::new();
        let with = TrialArgs { config: config.clone(), labels: Vec::new() };
        let replay = Replay { wasm: &prebuilt(name), with: &with, input: file.path(), against: against.into(), json };
        let outcome = replay.run(&mut said);
        (outcome, String::from_utf8_lossy(&said).into_owned())
    }

    #[test]
    fn decisions_are_compared_by_what_they_come_to() {
        let weighted = prebuilt("route-least-loaded").display().to_string();
        for (name, against, expect) in [
            ("route-least-loaded", "recorded", "1 of 2 decisions are those of the recording (50.0 %); 0 faults"),
            ("route-least-loaded", "native", "2 of 2 decisions are those of native (100.0 %); 0 faults"),
            ("route-least-loaded", &weighted, "2 of 2 decisions are those of route-least-loaded@"),
            ("fixture-router", "native", "2 of 2 decisions"),
            ("sched-shortest-first", "recorded", "1 of 1 decisions are those of the recording"),
            ("sched-shortest-first", "native", "0 of 1 decisions are those of native"),
            ("sched-fcfs", "native", "1 of 1 decisions are those of native"),
            // The second request finds the bucket empty; the third one what the first gave back.
            ("admit-token-bucket", "recorded", "2 of 3 decisions are those of the recording"),
            ("admit-token-bucket", "native", "2 of 3 decisions are those of native"),
            ("kv-lru-with-pins", "recorded", "1 of 2 decisions are those of the recording"),
            ("kv-lru-with-pins", "native", "1 of 2 decisions are those of native"),
            ("sampler-allowlist", "recorded", "2 of 2 decisions are those of the recording"),
            ("sampler-allowlist", "native", "0 of 2 decisions are those of native"),
        ] {
            let config = match name {
                "fixture-router" => json!({ "do": "abstain" }),
                "admit-token-bucket" => json!({ "tokens_per_second": 1, "burst_tokens": 150, "output_cost": 1 }),
                "kv-lru-with-pins" => json!({ "min_hits": 3 }),
                "sampler-allowlist" => json!({ "allow": [9] }),
                _ => json!({}),
            };
            let (outcome, said) = run(name, &config, against, (false, 1));
            assert!(outcome.is_ok() && said.contains(expect), "{name} against {against}: {outcome:?}\n{said}");
        }
        let (_, said) = run("route-least-loaded", &json!({}), "recorded", (true, 1));
        let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines[1]["comes_to"], 0, "{said}");
        assert_eq!(lines[2], json!({ "decisions": 2, "same": 1, "faults": 0 }));
    }

    #[test]
    fn what_cannot_be_compared_is_said() {
        for (name, config, against, expect) in [
            ("hook-slo-log", json!({}), "recorded", "takes no decisions"),
            ("route-least-loaded", json!({ "sequence": 1 }), "native", "refused its configuration"),
            ("fixture-router", json!({ "do": "trap", "after": 40 }), "native", "the policy faulted"),
            ("fixture-admission", json!({ "do": "trap", "after": 40 }), "native", "the policy faulted"),
            ("fixture-retention", json!({ "do": "trap", "after": 40 }), "native", "the policy faulted"),
            ("fixture-sampler", json!({ "do": "trap", "after": 40 }), "native", "the policy faulted"),
            ("route-least-loaded", json!({}), "nothing.wasm", "cannot read nothing.wasm"),
            ("route-least-loaded", json!({}), &prebuilt("sched-fcfs").display().to_string(), "is a scheduler-policy"),
        ] {
            let (outcome, said) = run(name, &config, against, (false, 60));
            let error = format!("{:#}", outcome.expect_err(&said));
            assert!(error.contains(expect), "{name}: {error}");
        }
        assert!(parse("{\"slot\":\"router\"}").is_err() && parse("{\"dropped\":3}").is_ok_and(|line| line.is_none()));
    }
}
