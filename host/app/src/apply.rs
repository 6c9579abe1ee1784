//! `pointsman apply`: makes the slots of a running host what a file says.
//!
//! A client like `pointsman policy`, so that a file can be applied from anywhere. Everything is uploaded and tried out before
//! the first slot changes; each change then names the generation that the plan was made from, so that two people who apply at
//! once do not mix; and a change that fails takes back those before it. Slots that the file does not name stay as they are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;

use anyhow::{Context, bail};
use pointsman_control::{Budget, SlotName};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::ApplyArgs;
use crate::client::{Admin, rows, text};
use crate::reference::OCI_SCHEME;

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Wanted {
    slots: BTreeMap<String, WantedSlot>,
}

/// What a file says of a slot.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedSlot {
    /// As for `policy activate`: a built-in's name, a digest, a file, an `oci://` reference or `native`.
    component: String,
    #[serde(default = "nothing")]
    config: Value,
    #[serde(default)]
    state_namespace: Option<String>,
    #[serde(default)]
    budget: Budget,
}

/// A slot that has to change, and what it is now.
#[derive(Clone, Debug, PartialEq)]
struct Change {
    slot: String,
    /// As the file names it.
    component: String,
    /// `native` or a digest; trying out only, also a reference.
    digest: String,
    config: Value,
    state_namespace: String,
    budget: Budget,
    /// `null` for a slot that does not exist.
    now: Value,
}

fn nothing() -> Value {
    json!({})
}

/// Runs the command; the plan goes to `out`.
///
/// # Errors
/// The file, the host, or the first thing that would not work; what had been applied by then is taken back.
pub(crate) fn run(args: &ApplyArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let wanted = read(args)?;
    let admin = Admin::new(args.at.clone());
    let now = admin.get("/admin/v1/slots")?;
    let changes = plan(&wanted, &now, |component| admin.resolve_for(component, args.dry_run))?;
    let kept = wanted.slots.len() - changes.len();
    writeln!(out, "{}", describe(&changes, kept)).context("cannot print")?;
    if changes.is_empty() {
        return Ok(());
    }
    let known = admin.get("/admin/v1/components")?;
    for change in &changes {
        if !change.is_there(&known) {
            let (slot, component) = (&change.slot, &change.component);
            writeln!(out, "{slot}: the host does not have {component} yet; whether it fits shows when it is applied")?;
            continue;
        }
        admin.put(change, true).with_context(|| format!("nothing was changed: `{}`", change.slot))?;
    }
    if args.dry_run {
        return Ok(());
    }
    for (done, change) in changes.iter().enumerate() {
        if let Err(error) = admin.put(change, false) {
            let undone = changes[..done].iter().rev().map(|change| admin.take_back(change)).collect::<Vec<_>>();
            bail!("`{}` was not changed: {error:#}{}", change.slot, told(&undone));
        }
    }
    writeln!(out, "applied").context("cannot print")
}

/// What became of the changes before the one that failed.
fn told(undone: &[Result<String, String>]) -> String {
    let mut text = String::new();
    for outcome in undone {
        let _ = match outcome {
            Ok(slot) => write!(text, "; `{slot}` was taken back"),
            Err(why) => write!(text, "; {why}"),
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
    if wanted.slots.is_empty() {
        bail!("{name} names no slot: write [slots.router] with component = \"...\"");
    }
    for slot in wanted.slots.keys() {
        slot.parse::<SlotName>().with_context(|| format!("{name}, slots.{slot}"))?;
    }
    Ok(wanted)
}

/// What differs, in the order of the file's names.
fn plan(
    wanted: &Wanted,
    now: &Value,
    mut resolve: impl FnMut(&str) -> anyhow::Result<String>,
) -> anyhow::Result<Vec<Change>> {
    let mut changes = Vec::new();
    for (slot, wanted) in &wanted.slots {
        let digest = resolve(&wanted.component).with_context(|| format!("slots.{slot}"))?;
        let active = rows(now).iter().find(|s| s["slot"] == *slot).map_or(Value::Null, |s| s["active"].clone());
        let state_namespace = wanted.state_namespace.clone().unwrap_or_else(|| slot.clone());
        let same = active["component"] == digest
            && same_json(&active["config"], &wanted.config)
            && active["state_namespace"] == state_namespace
            && own_budget(&active) == wanted.budget;
        if !same {
            let (slot, component, config) = (slot.clone(), wanted.component.clone(), wanted.config.clone());
            let budget = wanted.budget;
            changes.push(Change { slot, component, digest, config, state_namespace, budget, now: active });
        }
    }
    Ok(changes)
}

/// The limits that an active policy has of its own.
fn own_budget(active: &Value) -> Budget {
    Budget::deserialize(&active["budget"]).unwrap_or_default()
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

/// The plan, for a person.
fn describe(changes: &[Change], kept: usize) -> String {
    let mut lines = Vec::new();
    for Change { slot, component, digest, config, state_namespace, budget, now } in changes {
        if now.is_null() {
            lines.push(format!("+ {slot}: {component} with {config}"));
            continue;
        }
        lines.push(format!("~ {slot}: {};g={}", text(now, "revision"), now["generation"]));
        if now["component"] != *digest {
            lines.push(format!("    component  {} -> {component} ({digest})", text(now, "component")));
        }
        if !same_json(&now["config"], config) {
            lines.push(format!("    config  {} -> {config}", now["config"]));
        }
        if now["state_namespace"] != *state_namespace {
            lines.push(format!("    state_namespace  {} -> {state_namespace}", text(now, "state_namespace")));
        }
        if own_budget(now) != *budget {
            lines.push(format!("    budget  {} -> {}", json!(own_budget(now)), json!(budget)));
        }
    }
    lines.push(format!("{} to change, {kept} as the file says", changes.len()));
    lines.join("\n")
}

impl Change {
    /// Whether the host has the component: after the uploads it does, and trying out only it need not.
    fn is_there(&self, known: &Value) -> bool {
        self.digest == "native" || rows(known).iter().any(|component| component["digest"] == self.digest)
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

    fn put(&self, change: &Change, dry_run: bool) -> anyhow::Result<Value> {
        let body = json!({
            "component": change.digest,
            "config": change.config,
            "state_namespace": change.state_namespace,
            "budget": change.budget,
            "if_generation": change.now["generation"].as_u64().unwrap_or(0),
            "dry_run": dry_run,
        });
        self.put_slot(&change.slot, &body)
    }

    /// Puts back what was active before a change.
    fn take_back(&self, change: &Change) -> Result<String, String> {
        let (slot, now) = (&change.slot, &change.now);
        let back = if now.is_null() {
            self.send("DELETE", &format!("/admin/v1/slots/{slot}"), Vec::new(), "")
        } else {
            let (component, config, namespace) = (&now["component"], &now["config"], &now["state_namespace"]);
            let body = json!({ "component": component, "config": config, "state_namespace": namespace, "budget": now["budget"] });
            self.put_slot(slot, &body)
        };
        back.map(|_| slot.clone()).map_err(|error| format!("`{slot}` could not be taken back: {error:#}"))
    }

    pub(crate) fn put_slot(&self, slot: &str, body: &Value) -> anyhow::Result<Value> {
        self.send("PUT", &format!("/admin/v1/slots/{slot}"), body.to_string().into_bytes(), "application/json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let slots = |router: Value, scheduler: Value| json!({"data": [{"slot": "router", "active": router}, {"slot": "scheduler", "active": scheduler}]});
        let differing = |now: &Value| {
            let changes = plan(&wanted, now, |name| Ok(format!("sha256:{name}"))).expect("all are known");
            (changes.iter().map(|c| c.slot.clone()).collect::<Vec<_>>(), describe(&changes, 3 - changes.len()))
        };
        let (router, scheduler) =
            (active("sha256:a", json!({"x": 1}), "router"), active("sha256:b", json!({}), "scheduler"));
        let own = |mut active: Value, budget: Value| {
            active["budget"] = budget;
            active
        };
        let scheduler = own(scheduler, json!({"soft_us": 200}));
        let (changed, said) = differing(&slots(router.clone(), scheduler.clone()));
        assert_eq!(changed, ["telemetry.new"]);
        assert!(said.contains("+ telemetry.new: c with {}\n1 to change, 2 as the file says"), "{said}");
        for (now, slot, line) in [
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
            let (changed, said) = differing(&now);
            assert_eq!(changed, [slot, "telemetry.new"]);
            assert!(said.contains(line), "{line}: {said}");
        }
        let unknown = plan(&wanted, &json!({"data": []}), |_| bail!("no such component")).expect_err("unknown");
        assert_eq!(format!("{unknown:#}"), "slots.router: no such component");
    }

    #[test]
    fn files_that_mean_nothing_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, content, part) in [
            ("a.toml", "", "names no slot"),
            ("a.toml", "[slots.router]\nconfig = {}", "missing field `component`"),
            ("a.toml", "[slots.nowhere]\ncomponent = \"native\"", "slots.nowhere"),
            ("a.toml", "[slots.router]\ncomponent = \"native\"\nconfg = {}", "unknown field `confg`"),
            ("a.toml", "[slots.router]\ncomponent = \"native\"\nbudget = { soft = 1 }", "unknown field `soft`"),
            ("a.json", "[slots]", "not such a file"),
        ] {
            let file = folder.path().join(name);
            std::fs::write(&file, content).expect("it can be written");
            let at = crate::cli::AdminArgs { url: "http://127.0.0.1:1".into(), token: None, json: false };
            let error = read(&ApplyArgs { file, dry_run: true, at }).expect_err(part);
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
    }
}
