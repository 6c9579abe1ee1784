//! What a file says of slots, and how one is changed.

use pointsman_control::{Budget, Handover, OnFault};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Act, Ask, Needs, nothing, same_json};
use crate::client::{Admin, rows, text};

/// What a file says of a slot.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WantedSlot {
    /// As for `policy activate`: a built-in's name, a digest, a file, an `oci://` reference or `native`.
    pub(super) component: String,
    #[serde(default = "nothing")]
    config: Value,
    #[serde(default)]
    state_namespace: Option<String>,
    #[serde(default)]
    budget: Budget,
    #[serde(default)]
    handover: Handover,
    #[serde(default)]
    on_fault: OnFault,
}

/// A slot that has to change, and what it is now.
struct Change {
    slot: String,
    /// As the file names it.
    component: String,
    /// `native` or a digest; trying out only, also a reference.
    digest: String,
    config: Value,
    state_namespace: String,
    budget: Budget,
    handover: Handover,
    on_fault: OnFault,
    /// `null` for a slot that does not exist.
    now: Value,
}

impl WantedSlot {
    /// What has to change; `digest` is the component's.
    pub(super) fn compare(&self, slot: &str, digest: String, slots: &Value) -> Option<Box<dyn Act>> {
        let Self { component, config, state_namespace, budget, handover, on_fault } = self.clone();
        let state_namespace = state_namespace.unwrap_or_else(|| slot.to_owned());
        let now = active(slots, slot);
        let same = now["component"] == digest
            && same_json(&now["config"], &config)
            && now["state_namespace"] == state_namespace
            && own_budget(&now) == budget
            && own_handover(&now) == handover
            && own_on_fault(&now) == on_fault;
        let slot = slot.to_owned();
        let change = Change { slot, component, digest, config, state_namespace, budget, handover, on_fault, now };
        (!same).then(|| Box::new(change) as _)
    }
}

/// What is active in a slot; `null` for one that does not exist.
pub(super) fn active(slots: &Value, slot: &str) -> Value {
    rows(slots).iter().find(|s| s["slot"] == slot).map_or(Value::Null, |s| s["active"].clone())
}

/// The limits that a policy has of its own.
pub(super) fn own_budget(policy: &Value) -> Budget {
    Budget::deserialize(&policy["budget"]).unwrap_or_default()
}

/// Whether a policy might start cold.
pub(super) fn own_handover(policy: &Value) -> Handover {
    Handover::deserialize(&policy["handover"]).unwrap_or_default()
}

/// Whether requests go on without a policy.
pub(super) fn own_on_fault(policy: &Value) -> OnFault {
    OnFault::deserialize(&policy["on_fault"]).unwrap_or_default()
}

impl Act for Change {
    fn subject(&self) -> &str {
        &self.slot
    }

    fn name(&self) -> String {
        format!("`{}`", self.slot)
    }

    fn lines(&self) -> Vec<String> {
        let Self { slot, component, digest, config, state_namespace, budget, handover, on_fault, now } = self;
        if now.is_null() {
            return vec![format!("+ {slot}: {component} with {config}")];
        }
        let mut lines = vec![format!("~ {slot}: {};g={}", text(now, "revision"), now["generation"])];
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
        if own_handover(now) != *handover {
            lines.push(format!("    handover  {} -> {}", json!(own_handover(now)), json!(handover)));
        }
        if own_on_fault(now) != *on_fault {
            lines.push(format!("    on_fault  {} -> {}", json!(own_on_fault(now)), json!(on_fault)));
        }
        lines
    }

    fn component(&self) -> Option<Needs<'_>> {
        Some(Needs { name: &self.component, digest: &self.digest })
    }

    fn check(&self, generation: u64, _: Option<&dyn Act>) -> anyhow::Result<Option<Ask>> {
        Ok(Some(self.put(generation, true)))
    }

    fn carry_out(&self, generation: u64) -> Ask {
        self.put(generation, false)
    }

    /// A rollback and not an activation of what was there: it brings all of that back, and is not refused for a handover.
    fn take_back(&self, done: &Value) -> Ask {
        let (path, generation) = (path(&self.slot), &done["generation"]);
        // Nothing was ever activated there.
        if self.now["generation"].as_u64().is_none_or(|before| before == 0) {
            return Ask { method: "DELETE", path: format!("{path}?if_generation={generation}"), body: Value::Null };
        }
        Ask { method: "POST", path: format!("{path}/rollback"), body: json!({ "if_generation": generation }) }
    }
}

impl Change {
    fn put(&self, generation: u64, dry_run: bool) -> Ask {
        let body = json!({
            "component": self.digest,
            "config": self.config,
            "state_namespace": self.state_namespace,
            "budget": self.budget,
            "handover": self.handover,
            "if_generation": generation,
            "on_fault": self.on_fault,
            "dry_run": dry_run,
        });
        Ask { method: "PUT", path: path(&self.slot), body }
    }
}

/// Where a slot is.
pub(super) fn path(slot: &str) -> String {
    format!("/admin/v1/slots/{slot}")
}

impl Admin {
    pub(crate) fn put_slot(&self, slot: &str, body: &Value) -> anyhow::Result<Value> {
        self.send("PUT", &path(slot), body.to_string().into_bytes(), "application/json")
    }
}
