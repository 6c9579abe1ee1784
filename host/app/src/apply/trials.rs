//! What a file says of rollouts, and how one is started.

use anyhow::{Context, bail};
use pointsman_control::rollout::{Plan, Spec};
use pointsman_control::{Budget, ComponentRef, Handover, OnFault};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::slots::{active, own_budget, own_handover, own_on_fault};
use super::{Act, Ask, Needs, Now, Wanted, aliases, same_json, slots};
use crate::client::{segment, text};
use crate::rollouts::Subject;

/// What a file says of a rollout.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct WantedTrial {
    /// Of a slot: as in `[slots]`.
    component: Option<String>,
    config: Option<Value>,
    state_namespace: Option<String>,
    #[serde(default)]
    budget: Budget,
    #[serde(default)]
    handover: Handover,
    #[serde(default)]
    on_fault: OnFault,
    /// Of an alias: one of its variants.
    candidate: Option<String>,
    /// The members of the plan, as in docs/rollouts.md.
    #[serde(flatten)]
    plan: Map<String, Value>,
}

/// Where a rollout of the file stands.
pub(super) enum Found {
    /// It is to be started, or stands in the way of one that is.
    Start(Box<dyn Act>),
    /// It is under way, or over.
    Kept {
        /// Which, for a person.
        note: String,
        /// Whether what it tried is what its subject has since.
        is_promoted: bool,
    },
}

/// A rollout to start.
struct Trial {
    name: String,
    subject: Subject,
    /// As the file names it.
    tried: String,
    /// The component's digest or the variant.
    id: String,
    body: Value,
    spec: Spec,
    /// Of an alias: the variants that serve by weight once the file's weights are applied.
    serving: Vec<String>,
    /// Of an alias: its variants.
    variants: Vec<String>,
    /// A rollout under way that is not this one, and how it differs.
    in_the_way: Option<(String, Vec<String>)>,
}

impl WantedTrial {
    /// Checks what needs no host.
    pub(super) fn check(&self, subject: &Subject) -> anyhow::Result<()> {
        let spec = self.spec(&Value::Null)?;
        match subject {
            Subject::Slot(slot) => {
                self.component.as_ref().context("a rollout of a slot needs `component`")?;
                if self.candidate.is_some() {
                    bail!("a rollout of a slot takes no `candidate`: name a `component`");
                }
                spec.check_slot(slot)?;
            }
            Subject::Alias(_) => {
                self.candidate.as_ref().context("a rollout of an alias needs `candidate`, one of its variants")?;
                let own = [
                    ("component", self.component.is_some()),
                    ("config", self.config.is_some()),
                    ("state_namespace", self.state_namespace.is_some()),
                    ("budget", self.budget != Budget::default()),
                    ("handover", self.handover != Handover::default()),
                    ("on_fault", self.on_fault != OnFault::default()),
                ];
                if let Some((member, _)) = own.iter().find(|(_, given)| *given) {
                    bail!("a rollout of an alias takes no `{member}`: a variant is a model, not a policy");
                }
                spec.check_alias()?;
            }
        }
        Ok(spec.check()?)
    }

    /// The plan with every default; what a rollout drew by itself is taken from `last`.
    fn spec(&self, last: &Value) -> anyhow::Result<Spec> {
        let plan: Plan = serde_json::from_value(Value::Object(self.plan.clone())).context("the plan")?;
        Ok(match Spec::deserialize(&last["spec"]) {
            Ok(known) => plan.or_sticky(known.sticky).spec(known.seed),
            Err(_) => plan.spec(0),
        })
    }

    /// Compares with the last rollout of the subject, `null` for none.
    pub(super) fn compare(
        &self,
        name: &str,
        (wanted, now): (&Wanted, &Now),
        last: &Value,
        resolve: &mut impl FnMut(&str) -> anyhow::Result<String>,
    ) -> anyhow::Result<Found> {
        let subject: Subject = name.parse()?;
        let tried = self.component.as_ref().or(self.candidate.as_ref()).cloned().unwrap_or_default();
        let id = match &subject {
            Subject::Slot(_) => resolve(&tried)?,
            Subject::Alias(_) => tried.clone(),
        };
        let phase = text(&last["phase"], "is");
        let is_over = !matches!(phase.as_str(), "running" | "paused");
        let differences = self.differences(&subject, &id, last)?;
        if !last.is_null() && differences.is_empty() {
            let again = if is_over { "; it is not started again" } else { "" };
            let note = format!("= rollout of {name}: {} is {phase}{again}", text(last, "id"));
            return Ok(Found::Kept { note, is_promoted: phase == "promoted" && is_there(&subject, now, last) });
        }
        let in_the_way = (!last.is_null() && !is_over).then(|| (text(last, "id"), differences));
        let (mut serving, mut variants) = (Vec::new(), Vec::new());
        if let Subject::Alias(alias) = &subject {
            let view = aliases::view(&now.aliases, alias)?;
            let weights = wanted.aliases.get(alias).map_or_else(|| aliases::serving(view), |entry| entry.serving());
            serving = weights.into_keys().collect();
            variants = view["variants"].as_array().into_iter().flatten().map(|v| text(v, "id")).collect();
        }
        let (name, body, spec) = (name.to_owned(), self.body(&subject, &id), self.spec(&Value::Null)?);
        Ok(Found::Start(Box::new(Trial { name, subject, tried, id, body, spec, serving, variants, in_the_way })))
    }

    fn differences(&self, subject: &Subject, id: &str, last: &Value) -> anyhow::Result<Vec<String>> {
        let mut lines = Vec::new();
        let target = &last["target"];
        if let Subject::Slot(slot) = subject {
            if target["component"] != *id {
                let named = self.component.as_deref().unwrap_or_default();
                lines.push(format!("    component  {} -> {named} ({id})", text(target, "component")));
            }
            let config: Value = serde_json::from_str(target["config"].as_str().unwrap_or("{}")).unwrap_or_default();
            let own = self.config.clone().unwrap_or_else(|| json!({}));
            if !same_json(&config, &own) {
                lines.push(format!("    config  {config} -> {own}"));
            }
            let slot = slot.to_string();
            let namespaces = [target["state_namespace"].as_str(), self.state_namespace.as_deref()];
            if let [before, after] = namespaces.map(|namespace| namespace.unwrap_or(&slot))
                && before != after
            {
                lines.push(format!("    state_namespace  {before} -> {after}"));
            }
            if own_budget(target) != self.budget {
                lines.push(format!("    budget  {} -> {}", json!(own_budget(target)), json!(self.budget)));
            }
            if own_handover(target) != self.handover {
                lines.push(format!("    handover  {} -> {}", json!(own_handover(target)), json!(self.handover)));
            }
            if own_on_fault(target) != self.on_fault {
                lines.push(format!("    on_fault  {} -> {}", json!(own_on_fault(target)), json!(self.on_fault)));
            }
        } else if last["candidate"]["name"] != *id {
            lines.push(format!("    candidate  {} -> {id}", text(&last["candidate"], "name")));
        }
        let spec = serde_json::to_value(self.spec(last)?).context("the plan")?;
        let members = spec.as_object().into_iter().flatten();
        let differing = members.filter(|(member, value)| !same_json(&last["spec"][member], value));
        lines.extend(differing.map(|(member, value)| format!("    {member}  {} -> {value}", last["spec"][member])));
        Ok(lines)
    }

    fn body(&self, subject: &Subject, id: &str) -> Value {
        let mut body = self.plan.clone();
        match subject {
            Subject::Slot(_) => {
                body.insert("component".into(), id.into());
                body.insert("config".into(), self.config.clone().unwrap_or_else(|| json!({})));
                body.insert("budget".into(), json!(self.budget));
                body.insert("handover".into(), json!(self.handover));
                body.insert("on_fault".into(), json!(self.on_fault));
                if let Some(namespace) = &self.state_namespace {
                    body.insert("state_namespace".into(), namespace.as_str().into());
                }
            }
            Subject::Alias(_) => drop(body.insert("candidate".into(), id.into())),
        }
        Value::Object(body)
    }
}

/// A body with its condition.
fn with(body: &Value, generation: u64, dry_run: bool) -> Value {
    let mut body = body.clone();
    (body["if_generation"], body["dry_run"]) = (generation.into(), dry_run.into());
    body
}

/// Whether what a promoted rollout tried is what its subject has now.
fn is_there(subject: &Subject, now: &Now, last: &Value) -> bool {
    match subject {
        Subject::Slot(slot) => active(&now.slots, &slot.to_string())["generation"] == last["target"]["generation"],
        Subject::Alias(alias) => aliases::view(&now.aliases, alias).is_ok_and(|view| {
            let serving = aliases::serving(view);
            serving.len() == 1 && serving.contains_key(&text(&last["candidate"], "name"))
        }),
    }
}

impl Act for Trial {
    fn subject(&self) -> &str {
        &self.name
    }

    fn name(&self) -> String {
        format!("the rollout of `{}`", self.name)
    }

    fn lines(&self) -> Vec<String> {
        let Self { name, tried, body, in_the_way, .. } = self;
        if let Some((id, differences)) = in_the_way {
            let mut lines = vec![format!("~ rollout of {name}: {id} is under way")];
            lines.extend(differences.iter().cloned());
            return lines;
        }
        let with = body.get("config").map(|config| format!(" with {config}")).unwrap_or_default();
        vec![format!("+ rollout of {name}: {tried}{with}, {}", text(body, "mode"))]
    }

    fn component(&self) -> Option<Needs<'_>> {
        matches!(self.subject, Subject::Slot(_)).then_some(Needs { name: &self.tried, digest: &self.id })
    }

    /// The host is asked to start it and not to: that finds whatever a start would. Where the file changes its subject first, it
    /// would be tried against what is there now; then the policy alone is tried, and the file is held against itself.
    fn check(&self, generation: u64, before: Option<&dyn Act>) -> anyhow::Result<Option<Ask>> {
        if let Some((id, _)) = &self.in_the_way {
            bail!("{id} is under way with another candidate or plan; `pointsman policy rollout abort {id}` ends it");
        }
        let start = Ask { body: with(&self.body, generation, true), ..self.carry_out(generation) };
        match (&self.subject, before) {
            (Subject::Slot(slot), Some(change)) => {
                let control = change.component().map(|needs| needs.digest).unwrap_or_default();
                let policies = [control, self.id.as_str()].map(|name| ComponentRef::from(name.to_owned()));
                self.spec.check_answers(slot, policies.each_ref())?;
                let members = ["component", "config", "state_namespace", "budget", "handover", "on_fault"];
                let own = members.into_iter().filter_map(|m| Some((m.to_owned(), self.body.get(m)?.clone())));
                let body = with(&Value::Object(own.collect()), generation, true);
                Ok(Some(Ask { method: "PUT", path: slots::path(&slot.to_string()), body }))
            }
            (Subject::Slot(_), None) => Ok(Some(start)),
            (Subject::Alias(_), _) if !self.variants.contains(&self.id) => {
                bail!("`{}` is not one of its variants: {}", self.id, self.variants.join(", "))
            }
            (Subject::Alias(alias), before) => match self.serving.as_slice() {
                [control] if *control != self.id => Ok(before.is_none().then_some(start)),
                [_] => bail!("`{}` serves the alias already", self.id),
                found => bail!(
                    "a rollout needs one variant as control, and {} serve by weight; give one all of it in [aliases.{alias}]",
                    found.len()
                ),
            },
        }
    }

    fn carry_out(&self, generation: u64) -> Ask {
        Ask { method: "POST", path: self.subject.path(), body: with(&self.body, generation, false) }
    }

    /// Its id is never given again: nobody else's rollout can be met.
    fn take_back(&self, done: &Value) -> Ask {
        let path = format!("{}/{}/abort", self.subject.path(), segment(&text(done, "id")));
        Ask { method: "POST", path, body: Value::Null }
    }
}
