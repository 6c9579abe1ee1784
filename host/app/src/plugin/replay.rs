//! `pointsman plugin run`: recorded inputs through a policy, its decisions as a table, beside those of another.
//!
//! Each decision is asked for in the situation that was recorded, not in the one to which the policy's earlier decisions would
//! have led: that takes a simulator. Two decisions are the same when they come to the same: the row that a request goes to
//! (with room on every row, which a recording does not tell), the requests that a step starts and drops.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use pointsman_policy::{RouterSlot, SchedulerGuest, SchedulerSlot, Slot, World};
use pointsman_sched::batch::{Answer as Stepped, Attention, BatchPolicy, Budgets, Changes, Plan, Rest, View};
use pointsman_sched::route::{Choice, RoutePolicy, resolve};
use pointsman_server::admin::wire::decision::{
    Answer, LastLine, Line, PlanSeen, RouterLine, SchedulerCall, SchedulerLine,
};
use serde_json::{Value, json};

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
    Recorded,
    Native,
    Guest(Guest),
}

/// A component in a runtime of its own.
struct Guest {
    trial: Trial,
    router: Arc<RouterSlot>,
    scheduler: Arc<SchedulerSlot>,
    world: World,
    revision: Arc<str>,
    /// One instance per replica of the recording.
    replicas: HashMap<String, SchedulerGuest>,
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
        let mut one = Guest::start(self.wasm, self.with)?;
        let mut other = match &self.against {
            Against::Recorded => Side::Recorded,
            Against::Native => Side::Native,
            Against::File(path) => {
                Side::Guest(Guest::start(path, &TrialArgs { config: json!({}), ..self.with.clone() })?)
            }
        };
        if let Side::Guest(other) = &other
            && other.world != one.world
        {
            bail!("{} is a {} and {} is a {}", self.wasm.display(), one.world, other.revision, other.world);
        }
        if !self.json {
            let what = if one.world == World::Router { "REQUEST" } else { "REPLICA AND TIME" };
            writeln!(out, "{what:<32} {:<36} {:<36} SAME", one.revision, other.title())?;
        }
        let mut count = Count::default();
        let mut orders: HashMap<String, HostOrder> = HashMap::new();
        let file = std::fs::File::open(self.input).with_context(|| format!("cannot read {}", self.input.display()))?;
        for (number, text) in (1_u64..).zip(BufReader::new(file).lines()) {
            match parse(&text?).with_context(|| format!("{}, line {number}", self.input.display()))? {
                Some(Line::Router(line)) if one.world == World::Router => {
                    let decisions = (one.route(&line), other.route(&line));
                    self.show(&line.request.id.to_string(), decisions, &mut count, out)?;
                }
                Some(Line::Scheduler(line)) if one.world == World::Scheduler => {
                    let order = orders.entry(line.replica.clone()).or_default();
                    if let Some(decisions) = step(&mut one, &mut other, order, &line) {
                        self.show(&format!("{} {}", line.replica, line.now), decisions, &mut count, out)?;
                    }
                }
                _ => {}
            }
        }
        self.sum_up(&one, &other, count, out)
    }

    fn show(
        &self,
        what: &str,
        (one, other): (Option<Decision>, Option<Decision>),
        count: &mut Count,
        out: &mut dyn Write,
    ) -> anyhow::Result<()> {
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

// === impl Side ===

impl Side {
    fn title(&self) -> &str {
        match self {
            Self::Recorded => "the recording",
            Self::Native => "native",
            Self::Guest(guest) => &guest.revision,
        }
    }

    fn route(&mut self, line: &RouterLine) -> Option<Decision> {
        match self {
            Self::Recorded => Some(routed(&line.answer.clone().into(), line)),
            Self::Native => Some(routed(&Choice::Abstain, line)),
            Self::Guest(guest) => guest.route(line),
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
        let trial = Trial::new(&with.labels)?;
        let component = trial.runtime.admit(&read(wasm)?).with_context(|| format!("{} is refused", wasm.display()))?;
        let (router, scheduler) = (trial.runtime.router_slot("router"), trial.runtime.scheduler_slot("scheduler"));
        let prepared = trial.prepare(&component, &with.config, 1)?;
        let (world, revision) = (component.world, Arc::clone(&prepared.revision));
        match world {
            World::Router => router.publish(prepared)?,
            World::Scheduler => scheduler.publish(prepared)?,
            other => bail!("a {other} takes no decisions that could be compared"),
        };
        Ok(Self { trial, router, scheduler, world, revision, replicas: HashMap::new() })
    }

    fn route(&mut self, line: &RouterLine) -> Option<Decision> {
        // An instance that faulted is replaced, as the host's maintenance would.
        self.trial.runtime.maintain();
        let texts = line.request.texts();
        let said = self.router.route(line.now, &line.request.lend(&texts), &line.replicas);
        said.fallback.is_none().then(|| routed(&said.choice, line))
    }

    /// Its policy for a replica.
    fn replica(&mut self, name: &str) -> &mut SchedulerGuest {
        if !self.replicas.contains_key(name) {
            self.replicas.insert(name.to_owned(), self.scheduler.attach(name));
        }
        self.trial.runtime.maintain();
        self.replicas.entry(name.to_owned()).or_insert_with(|| self.scheduler.attach(name))
    }

    fn last_fault(&self) -> Option<String> {
        let slot: &dyn Slot = if self.world == World::Router { &*self.router } else { &*self.scheduler };
        slot.status().last_fault.map(|fault| format!("{}: {}", fault.kind.as_str(), fault.message))
    }
}

// === scheduling ===

/// One recorded call, shown to both sides; their decisions if it was a step.
fn step(
    one: &mut Guest,
    other: &mut Side,
    order: &mut HostOrder,
    line: &SchedulerLine,
) -> Option<(Option<Decision>, Option<Decision>)> {
    let against_native = matches!(other, Side::Native);
    let other_guest = match other {
        Side::Guest(guest) => Some(guest.replica(&line.replica)),
        Side::Recorded | Side::Native => None,
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

    fn run(name: &str, config: &Value, against: &str, shown: (bool, usize)) -> (anyhow::Result<()>, String) {
        let (json, times) = shown;
        let file = tempfile::NamedTempFile::new().expect("a file");
        let lines = [routed_line(1, [500, 40], 1), routed_line(2, [40, 500], 1)].into_iter().chain(scheduler_lines());
        let text: String = lines.map(|line| serde_json::to_string(&line).expect("plain data") + "\n").collect();
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
        ] {
            let config = if name == "fixture-router" { json!({ "do": "abstain" }) } else { json!({}) };
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
