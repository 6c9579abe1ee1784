//! `pointsman apply`: makes slots, aliases and rollouts of a running host what a file says.
//!
//! A client like `pointsman policy`, so that a file can be applied from anywhere. Everything is uploaded and tried out before
//! the first thing changes; each change then names the generation that the plan was made from, or that an earlier change has
//! made, so that two people who apply at once do not mix; and a change that fails takes back those before it, where nobody has
//! been there since. What the file does not name stays as it is.
//!
//! A rollout is started once: while it is under way, and after its end, it is as the file says. So a file that is applied every
//! minute neither starts an aborted candidate again nor undoes a promotion.

mod aliases;
mod slots;
mod trials;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;

use anyhow::{Context, bail};
use pointsman_control::SlotName;
use serde::Deserialize;
use serde_json::{Value, json};

use self::aliases::WantedAlias;
use self::slots::WantedSlot;
use self::trials::WantedTrial;
use crate::cli::ApplyArgs;
use crate::client::{Admin, rows, text};
use crate::reference::OCI_SCHEME;
use crate::rollouts::Subject;

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Wanted {
    slots: BTreeMap<String, WantedSlot>,
    aliases: BTreeMap<String, WantedAlias>,
    /// By what they are of: a slot or `alias.<name>`.
    rollouts: BTreeMap<String, WantedTrial>,
}

/// One thing to do: tried out first, carried out in order, taken back when a later one fails.
trait Act {
    /// What it changes: a slot or `alias.<name>`.
    fn subject(&self) -> &str;
    /// What it is about, in words.
    fn name(&self) -> String;
    /// What changes, for a person.
    fn lines(&self) -> Vec<String>;
    /// The component that it needs.
    fn component(&self) -> Option<Needs<'_>>;
    /// What is asked to see whether it would work, and changes nothing. `generation` is its subject's, `before` what the file
    /// changes there first.
    fn check(&self, generation: u64, before: Option<&dyn Act>) -> anyhow::Result<Option<Ask>>;
    fn carry_out(&self, generation: u64) -> Ask;
    /// Puts back what was there before; `done` is what carrying it out answered.
    fn take_back(&self, done: &Value) -> Ask;
}

/// A request to the admin API.
#[derive(Clone, Debug, PartialEq)]
struct Ask {
    method: &'static str,
    path: String,
    body: Value,
}

/// A component that the host may lack: after the uploads it has it, and trying out only it need not.
struct Needs<'a> {
    /// As the file names it.
    name: &'a str,
    /// `native` or a digest; trying out only, also a reference.
    digest: &'a str,
}

/// What differs, and what does not.
struct Plan {
    acts: Vec<Box<dyn Act>>,
    /// Entries of the file that are as it says, and what is to be said of them.
    kept: usize,
    notes: Vec<String>,
}

/// What a host is now, as far as the file asks.
struct Now {
    slots: Value,
    aliases: Value,
    /// The last rollout of each subject of the file; `null` for none.
    rollouts: BTreeMap<String, Value>,
}

/// Runs the command; the plan goes to `out`.
///
/// # Errors
/// The file, the host, or the first thing that would not work; what had been applied by then is taken back.
pub(crate) fn run(args: &ApplyArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let wanted = read(args)?;
    let admin = Admin::new(args.at.clone());
    let now = Now::of(&admin, &wanted)?;
    let mut plan = plan(&wanted, &now, |component| admin.resolve_for(component, args.dry_run))?;
    let generations = now.generations();
    if !plan.acts.is_empty() {
        plan.tell_authors(&generations, &admin.journal()?);
    }
    writeln!(out, "{}", plan.describe()).context("cannot print")?;
    if plan.acts.is_empty() {
        return Ok(());
    }
    let known = admin.get("/admin/v1/components")?;
    for (place, act) in plan.acts.iter().enumerate() {
        let before = plan.acts[..place].iter().find(|before| before.subject() == act.subject());
        match act.component().filter(|needs| !needs.is_met(&known)) {
            Some(Needs { name, .. }) => {
                let about = act.name();
                writeln!(out, "{about}: the host does not have {name} yet; whether it fits shows when it is applied")?;
            }
            None => act
                .check(generation(&generations, &**act), before.map(|before| &**before))
                .and_then(|ask| ask.map_or(Ok(()), |ask| ask.send(&admin).map(drop)))
                .with_context(|| format!("nothing was changed: {}", act.name()))?,
        }
    }
    if args.dry_run {
        return Ok(());
    }
    carry_out(&plan, &admin, generations)?;
    writeln!(out, "applied").context("cannot print")
}

/// The generation that a change is made from; 0 where nothing is.
fn generation(generations: &BTreeMap<String, u64>, act: &dyn Act) -> u64 {
    generations.get(act.subject()).copied().unwrap_or(0)
}

fn carry_out(plan: &Plan, admin: &Admin, mut generations: BTreeMap<String, u64>) -> anyhow::Result<()> {
    let mut done: Vec<(&dyn Act, Value)> = Vec::new();
    for act in &plan.acts {
        match act.carry_out(generation(&generations, &**act)).send(admin) {
            Ok(answer) => {
                // A rollout of the same slot comes after this and finds its generation there.
                generations.extend(answer["generation"].as_u64().map(|new| (act.subject().to_owned(), new)));
                done.push((&**act, answer));
            }
            Err(error) => bail!("{} was not changed: {error:#}{}", act.name(), take_back(admin, &done)),
        }
    }
    Ok(())
}

/// Takes back what was done, the last first, and says what became of it.
fn take_back(admin: &Admin, done: &[(&dyn Act, Value)]) -> String {
    let mut text = String::new();
    for (act, answer) in done.iter().rev() {
        let name = act.name();
        let _ = match act.take_back(answer).send(admin) {
            Ok(_) => write!(text, "; {name} was taken back"),
            Err(error) => write!(text, "; {name} could not be taken back: {error:#}"),
        };
    }
    text
}

fn read(args: &ApplyArgs) -> anyhow::Result<Wanted> {
    let name = args.file.display();
    let content = std::fs::read_to_string(&args.file).with_context(|| format!("cannot read {name}"))?;
    let wanted: Wanted = match args.file.extension().is_some_and(|extension| extension == "json") {
        true => serde_json::from_str(&content).with_context(|| format!("{name} is not such a file"))?,
        false => toml::from_str(&content).with_context(|| format!("{name} is not such a file"))?,
    };
    if wanted == Wanted::default() {
        bail!("{name} names no slot, alias or rollout: write [slots.router] with component = \"...\"");
    }
    for slot in wanted.slots.keys() {
        slot.parse::<SlotName>().with_context(|| format!("{name}, slots.{slot}"))?;
    }
    for (subject, trial) in &wanted.rollouts {
        let of: Subject = subject.parse().with_context(|| format!("{name}, rollouts.{subject}"))?;
        trial.check(&of).with_context(|| format!("{name}, rollouts.{subject}"))?;
    }
    Ok(wanted)
}

/// What differs: slots, then aliases, then rollouts, each in the order of their names.
fn plan(wanted: &Wanted, now: &Now, mut resolve: impl FnMut(&str) -> anyhow::Result<String>) -> anyhow::Result<Plan> {
    let mut plan = Plan { acts: Vec::new(), kept: 0, notes: Vec::new() };
    let mut to_start: Vec<Box<dyn Act>> = Vec::new();
    let mut promoted = Vec::new();
    for (subject, trial) in &wanted.rollouts {
        let last = now.rollouts.get(subject).unwrap_or(&Value::Null);
        let found = trial.compare(subject, (wanted, now), last, &mut resolve);
        match found.with_context(|| format!("rollouts.{subject}"))? {
            trials::Found::Start(act) => to_start.push(act),
            trials::Found::Kept { note, is_promoted } => {
                plan.notes.push(note);
                plan.kept += 1;
                promoted.extend(is_promoted.then_some(subject));
            }
        }
    }
    for (slot, entry) in &wanted.slots {
        let digest = resolve(&entry.component).with_context(|| format!("slots.{slot}"))?;
        let change = match promoted.contains(&slot) {
            true => None,
            false => entry.compare(slot, digest, &now.slots),
        };
        plan.take(change);
    }
    for (alias, entry) in &wanted.aliases {
        let change = entry.compare(alias, &now.aliases).with_context(|| format!("aliases.{alias}"))?;
        plan.take(change.filter(|_| !promoted.contains(&&format!("alias.{alias}"))));
    }
    plan.acts.append(&mut to_start);
    Ok(plan)
}

impl Plan {
    fn take(&mut self, change: Option<Box<dyn Act>>) {
        match change {
            Some(act) => self.acts.push(act),
            None => self.kept += 1,
        }
    }

    /// Says who made what differs, as far as the journal goes back: a hand, or an earlier version of the file.
    fn tell_authors(&mut self, generations: &BTreeMap<String, u64>, journal: &[Value]) {
        // What is new (`+`) nobody has made.
        for act in self.acts.iter().filter(|act| act.lines().iter().any(|line| line.starts_with('~'))) {
            let (subject, generation) = (act.subject(), generation(generations, &**act));
            let made = journal.iter().rev().find(|line| made_by(line) == Some((subject.to_owned(), generation)));
            let Some(made) = made else { continue };
            let why = made["why"].as_str().map(|why| format!(" ({why})")).unwrap_or_default();
            self.notes.push(format!("  {subject};g={generation} is by {}{why}", text(made, "actor")));
        }
    }

    fn describe(&self) -> String {
        let count = format!("{} to change, {} as the file says", self.acts.len(), self.kept);
        let acts = self.acts.iter().flat_map(|act| act.lines());
        acts.chain(self.notes.iter().cloned()).chain([count]).collect::<Vec<_>>().join("\n")
    }
}

impl Now {
    fn of(admin: &Admin, wanted: &Wanted) -> anyhow::Result<Self> {
        let mut rollouts = BTreeMap::new();
        for subject in wanted.rollouts.keys() {
            let listed =
                admin.get(&subject.parse::<Subject>()?.path()).with_context(|| format!("rollouts.{subject}"))?;
            rollouts.insert(subject.clone(), rows(&listed).first().cloned().unwrap_or_default());
        }
        Ok(Self { slots: admin.get("/admin/v1/slots")?, aliases: admin.get("/admin/v1/aliases")?, rollouts })
    }

    /// Of every slot, and of every alias as `alias.<name>`.
    fn generations(&self) -> BTreeMap<String, u64> {
        let slots = rows(&self.slots).iter().map(|slot| (text(slot, "slot"), &slot["active"]["generation"]));
        let aliases =
            rows(&self.aliases).iter().map(|alias| (format!("alias.{}", text(alias, "alias")), &alias["generation"]));
        slots.chain(aliases).filter_map(|(subject, generation)| Some((subject, generation.as_u64()?))).collect()
    }
}

impl Ask {
    fn send(&self, admin: &Admin) -> anyhow::Result<Value> {
        let body = if self.body.is_null() { Vec::new() } else { self.body.to_string().into_bytes() };
        admin.send(self.method, &self.path, body, "application/json")
    }
}

/// The subject and generation that a line of the journal tells of.
fn made_by(line: &Value) -> Option<(String, u64)> {
    match line["event"].as_str()? {
        "published" => Some((text(line, "slot"), line["target"]["generation"].as_u64()?)),
        "alias-changed" => Some((format!("alias.{}", text(line, "alias")), line["generation"].as_u64()?)),
        _ => None,
    }
}

impl Needs<'_> {
    fn is_met(&self, known: &Value) -> bool {
        self.digest == "native" || rows(known).iter().any(|component| component["digest"] == *self.digest)
    }
}

impl Admin {
    /// A digest for what the file names. Trying out only, nothing is uploaded or pulled: a file is known by its bytes, and a
    /// reference, which only the host can resolve, stands for itself and differs from everything.
    fn resolve_for(&self, component: &str, dry_run: bool) -> anyhow::Result<String> {
        match (dry_run, component.starts_with(OCI_SCHEME)) {
            (true, _) => self.identify(component),
            (false, true) => Ok(text(&self.pull(component, None)?, "digest")),
            (false, false) => self.resolve(component),
        }
    }
}

fn nothing() -> Value {
    json!({})
}

/// Whether two texts mean the same: order and spelling of numbers do not matter.
fn same_json(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_json(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same_json(a, b)))
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of what a plan changes, and what it says.
    fn differing(wanted: &Wanted, now: &Now) -> (Vec<String>, String) {
        let plan = plan(wanted, now, |name| Ok(format!("sha256:{name}"))).expect("all are known");
        (plan.acts.iter().map(|act| act.name()).collect(), plan.describe())
    }

    fn now(slots: Value) -> Now {
        Now { slots, aliases: Value::Null, rollouts: BTreeMap::new() }
    }

    #[test]
    fn configs_are_compared_by_meaning() {
        for (a, b, same) in [
            (json!({"a": 1, "b": [1, 2]}), json!({"b": [1, 2], "a": 1}), true),
            (json!({"a": 1}), json!({"a": 1.0}), true),
            (json!({"a": 1}), json!({"a": "1"}), false),
            (json!({"a": [1, 2]}), json!({"a": [2, 1]}), false),
            (json!({"a": 1}), json!({}), false),
            (json!({}), json!({"a": null}), false),
            (json!({"a": u64::MAX}), json!({"a": u64::MAX}), true),
        ] {
            assert_eq!((same_json(&a, &b), same_json(&b, &a)), (same, same), "{a} {b}");
        }
    }

    #[test]
    fn the_plan_holds_what_differs_and_nothing_else() {
        let wanted: Wanted = toml::from_str(
            r#"
            [slots.router]
            component = "a"
            config = { x = 1.0 }
            [slots.scheduler]
            component = "b"
            budget = { soft_us = 200 }
            [slots."telemetry.new"]
            component = "c"
            state_namespace = "shared"
            "#,
        )
        .expect("a good file");
        let active = |component: &str, config: Value, namespace: &str| {
            json!({"component": component, "config": config, "state_namespace": namespace, "generation": 4,
                   "revision": format!("{component}@1")})
        };
        let slots = |router: Value, scheduler: Value| {
            now(json!({"data": [{"slot": "router", "active": router}, {"slot": "scheduler", "active": scheduler}]}))
        };
        let (router, scheduler) =
            (active("sha256:a", json!({"x": 1}), "router"), active("sha256:b", json!({}), "scheduler"));
        let own = |mut active: Value, budget: Value| {
            active["budget"] = budget;
            active
        };
        let scheduler = own(scheduler, json!({"soft_us": 200}));
        let (changed, said) = differing(&wanted, &slots(router.clone(), scheduler.clone()));
        assert_eq!(changed, ["`telemetry.new`"]);
        assert!(said.contains("+ telemetry.new: c with {}\n1 to change, 2 as the file says"), "{said}");
        for (then, slot, line) in [
            (
                slots(active("sha256:z", json!({"x": 1}), "router"), scheduler.clone()),
                "router",
                "sha256:z -> a (sha256:a)",
            ),
            (
                slots(active("sha256:a", json!({"x": 2}), "router"), scheduler.clone()),
                "router",
                r#"config  {"x":2} -> {"x":1.0}"#,
            ),
            (
                slots(router.clone(), own(active("sha256:b", json!({}), "other"), json!({"soft_us": 200}))),
                "scheduler",
                "state_namespace  other -> scheduler",
            ),
            (
                slots(router, active("sha256:b", json!({}), "scheduler")),
                "scheduler",
                r#"budget  {} -> {"soft_us":200}"#,
            ),
        ] {
            let (changed, said) = differing(&wanted, &then);
            assert_eq!(changed, [format!("`{slot}`"), "`telemetry.new`".to_owned()]);
            assert!(said.contains(line), "{line}: {said}");
        }
        let unknown =
            plan(&wanted, &now(json!({"data": []})), |_| bail!("no such component")).map(|_| ()).expect_err("unknown");
        assert_eq!(format!("{unknown:#}"), "slots.router: no such component");
    }

    #[test]
    fn every_change_names_the_generation_that_it_is_made_from() {
        let wanted: Wanted = toml::from_str(
            r#"
            [slots.admission]
            component = "a"
            [slots.router]
            component = "a"
            handover = "require"
            [slots."telemetry.new"]
            component = "c"
            [aliases.demo]
            weights = { x = 1 }
            [rollouts."alias.demo"]
            candidate = "y"
            mode = "ab"
            [rollouts.router]
            component = "b"
            mode = "canary"
            "#,
        )
        .expect("a good file");
        let active = |component: &str, generation: u64| json!({"component": component, "config": {}, "state_namespace": "-", "generation": generation});
        let slots = json!([{"slot": "admission", "active": active("native", 0)}, {"slot": "router", "active": active("sha256:z", 4)}]);
        let variants = json!([{"id": "x", "weight": 1}, {"id": "y", "weight": 2}]);
        let aliases = json!([{"alias": "demo", "generation": 3, "sticky": "tenant", "variants": variants}]);
        let now = Now { slots, aliases, rollouts: BTreeMap::new() };
        let plan = plan(&wanted, &now, |name| Ok(format!("sha256:{name}"))).expect("all are known");
        let generations = now.generations();
        let found: Vec<(u64, Ask, Ask)> = plan
            .acts
            .iter()
            .map(|act| {
                let from = generation(&generations, &**act);
                (from, act.carry_out(from), act.take_back(&json!({"generation": 9, "id": "r-9"})))
            })
            .collect();
        let ask = |method, path: &str, body: Value| Ask { method, path: format!("/admin/v1/{path}"), body };
        let published = |actor: &str, generation: u64, why: &str| json!({"event": "published", "slot": "router", "actor": actor, "target": {"generation": generation}, "why": why});
        let mut told = Plan { acts: plan.acts, kept: 0, notes: Vec::new() };
        let weighted = json!({"event": "alias-changed", "alias": "demo", "generation": 3, "actor": "ana@::1"});
        told.tell_authors(&generations, &[weighted, published("ci", 3, "put"), published("rollout", 4, "rollout")]);
        assert_eq!(told.notes, ["  router;g=4 is by rollout (rollout)", "  alias.demo;g=3 is by ana@::1"]);
        let weights = json!({"weights": {"x": 1, "y": 2}, "sticky": "tenant", "if_generation": 9});
        // Native had no activation to go back to; a slot that was not there goes; the others return to what they were, whole.
        for ((from, done, undone), (path, expect, undo)) in found.iter().zip([
            ("slots/admission", 0, ask("DELETE", "slots/admission?if_generation=9", Value::Null)),
            ("slots/router", 4, ask("POST", "slots/router/rollback", json!({"if_generation": 9}))),
            ("slots/telemetry.new", 0, ask("DELETE", "slots/telemetry.new?if_generation=9", Value::Null)),
            ("aliases/demo", 3, ask("PUT", "aliases/demo", weights)),
            ("aliases/demo/rollouts", 3, ask("POST", "aliases/demo/rollouts/r-9/abort", Value::Null)),
            ("slots/router/rollouts", 4, ask("POST", "slots/router/rollouts/r-9/abort", Value::Null)),
        ]) {
            assert_eq!((from, &done.body["if_generation"]), (&expect, &json!(expect)), "{done:?}");
            assert_eq!((done.path.as_str(), undone), (format!("/admin/v1/{path}").as_str(), &undo));
        }
        assert_eq!(found.len(), 6);
    }

    #[test]
    fn aliases_differ_by_weights_that_count() {
        let wanted: Wanted =
            toml::from_str("[aliases.m]\nweights = { a = 9, b = 0 }\nsticky = \"tenant\"").expect("a file");
        let view = |a: Value, b: Value, sticky: Value| {
            let variants = json!([{"id": "a", "weight": a}, {"id": "b", "weight": b}]);
            json!({"data": [{"alias": "m", "generation": 3, "sticky": sticky, "variants": variants}]})
        };
        for (view, line) in [
            (view(json!(9), json!(0), json!("tenant")), "0 to change, 1 as the file says"),
            (view(json!(9), json!(1), json!("tenant")), "    weights  {\"a\":9,\"b\":1} -> {\"a\":9}"),
            (view(json!(9), json!(0), json!("session")), "    sticky  session -> tenant"),
            (view(Value::Null, Value::Null, Value::Null), "    weights  {} -> {\"a\":9}"),
        ] {
            let (_, said) = differing(&wanted, &Now { aliases: view, ..now(Value::Null) });
            assert!(said.contains(line), "{line}: {said}");
        }
        let unknown = plan(&wanted, &Now { aliases: json!({"data": []}), ..now(Value::Null) }, |_| bail!("none"));
        let error = unknown.map(|_| ()).expect_err("no such alias");
        assert!(format!("{error:#}").starts_with("aliases.m: the host has no such alias"), "{error:#}");
    }

    #[test]
    fn a_rollout_is_started_once() {
        let wanted: Wanted = toml::from_str(
            r#"
            [slots.router]
            component = "a"
            [rollouts.router]
            component = "b"
            mode = "canary"
            steps = [10, 50]
            "#,
        )
        .expect("a good file");
        let spec = |steps: Value| {
            let plan: pointsman_control::rollout::Plan =
                serde_json::from_value(json!({"mode": "canary", "steps": steps})).expect("a plan");
            serde_json::to_value(plan.spec(77)).expect("plain data")
        };
        let last = |phase: &str, component: &str, steps: Value| {
            let target = json!({"component": component, "config": "{ }", "generation": 5});
            json!({"id": "router-5", "phase": {"is": phase}, "target": target, "spec": spec(steps)})
        };
        let active = |component: &str, generation: u64| {
            let active = json!({"component": component, "config": {}, "state_namespace": "router", "generation": generation,
                                "revision": "r"});
            json!({"data": [{"slot": "router", "active": active}]})
        };
        let steps = || json!([10, 50]);
        for (slots, last, acts, line) in [
            (active("sha256:a", 1), Value::Null, &["the rollout of `router`"][..], "+ rollout of router: b with {}"),
            (
                active("sha256:a", 1),
                last("running", "sha256:b", steps()),
                &[],
                "= rollout of router: router-5 is running",
            ),
            (active("sha256:a", 1), last("aborted", "sha256:b", steps()), &[], "it is not started again"),
            (active("sha256:b", 5), last("promoted", "sha256:b", steps()), &[], "0 to change, 2 as the file says"),
            (active("sha256:c", 6), last("promoted", "sha256:b", steps()), &["`router`"], "sha256:c -> a"),
            (active("sha256:a", 1), last("aborted", "sha256:z", steps()), &["the rollout of `router`"], "+ rollout of"),
            (
                active("sha256:a", 1),
                last("paused", "sha256:z", steps()),
                &["the rollout of `router`"],
                "component  sha256:z -> b",
            ),
            (
                active("sha256:a", 1),
                last("running", "sha256:b", json!([50])),
                &["the rollout of `router`"],
                "steps  [50] -> [10,50]",
            ),
        ] {
            let rollouts = [("router".to_owned(), last.clone())].into();
            let (found, said) = differing(&wanted, &Now { rollouts, ..now(slots) });
            assert_eq!(found, acts, "{last}");
            assert!(said.contains(line), "{line}: {said}");
        }
    }

    #[test]
    fn files_that_mean_nothing_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, content, part) in [
            ("a.toml", "", "names no slot, alias or rollout"),
            ("a.toml", "[slots.router]\nconfig = {}", "missing field `component`"),
            ("a.toml", "[slots.nowhere]\ncomponent = \"native\"", "slots.nowhere"),
            ("a.toml", "[slots.router]\ncomponent = \"native\"\nconfg = {}", "unknown field `confg`"),
            ("a.toml", "[slots.router]\ncomponent = \"native\"\nbudget = { soft = 1 }", "unknown field `soft`"),
            ("a.toml", "[aliases.m]\nweight = {}", "unknown field `weight`"),
            ("a.toml", "[rollouts.nowhere]\nmode = \"canary\"", "rollouts.nowhere"),
            ("a.toml", "[rollouts.router]\nmode = \"canary\"", "needs `component`"),
            ("a.toml", "[rollouts.router]\ncomponent = \"a\"", "missing field `mode`"),
            ("a.toml", "[rollouts.router]\ncomponent = \"a\"\nmode = \"canary\"\nstep = [1]", "unknown field `step`"),
            ("a.toml", "[rollouts.router]\ncomponent = \"a\"\nmode = \"ab\"", "use `switchback`"),
            ("a.toml", "[rollouts.\"alias.m\"]\ncomponent = \"a\"\nmode = \"ab\"", "needs `candidate`"),
            ("a.toml", "[rollouts.\"alias.m\"]\ncandidate = \"a\"\nconfig = {}\nmode = \"ab\"", "takes no `config`"),
            ("a.json", "[slots]", "not such a file"),
        ] {
            let file = folder.path().join(name);
            std::fs::write(&file, content).expect("it can be written");
            let at =
                crate::cli::AdminArgs { url: "http://127.0.0.1:1".into(), ca_file: None, token: None, json: false };
            let error = read(&ApplyArgs { file, dry_run: true, at }).expect_err(part);
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
    }
}
